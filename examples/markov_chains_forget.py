"""Markov chains forget: what the forward processes of DDPM and D3PM have in common with notes 000's "brief reminder".

P(t + 1) = T P(t) tends to pi = T pi if the chain is irreducible and aperiodic, and a diffusion begins its way back at pi.
How far q(x_t | x_0) still is from pi, in total variation and from the worst start x_0 in [-1, 1] (or 17 levels of it):

    a constant T    a walk between 17 levels: the distance falls as |lambda_2|^t and no faster
    D3PM            Q_t of growing strength: uniform, absorbing, discretised Gaussian
    DDPM            N(sqrt(alpha-bar_t) x_0, 1 - alpha-bar_t) against N(0, 1), in closed form

By t = T hardly anything may be left: what is left is the term L_T of the bound.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.special import ndtr

from inference.views.drawing import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION, save_figure, style
from ppl_models.processes import MarkovChain, NoiseSchedule, Transitions, absorbing, discretized_gaussian, uniform

LEVELS = 17


def walk(levels: int) -> MarkovChain:
    """Up or down by one level with probability 1/3 each, otherwise stay, as at the ends where there is no step."""
    step = torch.diag(torch.full((levels - 1,), 1 / 3), 1)
    matrix = step + step.T
    return MarkovChain(matrix + torch.diag(1 - matrix.sum(0)))


def of_transitions(transitions: Transitions) -> list[float]:
    """Distance after t steps, t = 0..T, of the inhomogeneous chain Q_1, ..., Q_T: max over x_0."""
    steps = range(transitions.num_timesteps + 1)
    return [float((transitions.cumulative(t) - transitions.stationary).abs().sum(-1).max() / 2) for t in steps]


def of_gaussian(schedule: NoiseSchedule, x_0: float = 1.0) -> list[float]:
    """TV(N(m, s^2), N(0, 1)), m = sqrt(alpha-bar_t) x_0: the former is the larger density between two roots."""
    distances = [1.0]
    for alpha_bar in schedule.alpha_bar.tolist():
        m, variance = math.sqrt(alpha_bar) * x_0, 1 - alpha_bar
        a, half_b, c = 1 / variance - 1, -m / variance, m**2 / variance + math.log(variance)
        far = (-half_b + math.sqrt(half_b**2 - a * c)) / a
        near, s = c / (a * far), math.sqrt(variance)
        distances.append(float(ndtr((far - m) / s) - ndtr((near - m) / s) - ndtr(far) + ndtr(near)))
    return distances


def draw(curves: dict[str, list[float]]) -> Figure:
    """Distance by t/T, on a linear and on a logarithmic scale."""
    colours = (GREY, BLUE, VERMILION, ORANGE, GREEN, SKY)
    with style():
        figure = Figure(figsize=(8.4, 3.8), layout="constrained")
        for axes, scale in zip(figure.subplots(1, 2), ("linear", "log"), strict=True):
            for (name, curve), colour in zip(curves.items(), colours, strict=False):
                t = [i / (len(curve) - 1) for i in range(len(curve))]
                axes.plot(t, curve, color=colour, label=name, linestyle="--" if colour == GREY else "-")
            axes.set(xlabel="t/T", ylabel="total variation to the stationary law", yscale=scale)
            axes.grid(True)
        axes.set_ylim(1e-6, 1.5)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle("Distance of q(x_t | x_0) from the stationary law, worst x_0", fontsize=10)
    return figure


def main(num_timesteps: int = 100, out: Path | None = None) -> dict[str, float]:
    """Prints when each process has forgotten, and what is left at T; draws into ``out`` if given."""
    torch.set_default_dtype(torch.float64)
    chain = walk(LEVELS)
    rate = float(chain.eigenvalues[1].abs())
    print(f"notes 000: a walk between {LEVELS} levels is {chain.describe()};")
    print(f"|lambda_2| = {rate:.4f}, first t with distance <= 1/4: {chain.mixing_time()}\n")
    curves = {
        "constant T (a walk)": [float(chain.distance(t)) for t in range(num_timesteps + 1)],
        "D3PM uniform, cosine": of_transitions(uniform(LEVELS, num_timesteps)),
        "D3PM absorbing, 1/(T - t + 1)": of_transitions(absorbing(LEVELS + 1, num_timesteps)),
        "D3PM Gaussian, linear": of_transitions(discretized_gaussian(LEVELS, num_timesteps)),
        "DDPM, cosine": of_gaussian(NoiseSchedule.cosine(num_timesteps)),
        "DDPM, linear": of_gaussian(NoiseSchedule.linear(num_timesteps)),
    }
    print(f"{'process':<32}{'t with distance <= 1/4':>24}{'distance at T':>16}")
    for name, curve in curves.items():
        first = next((str(t) for t, d in enumerate(curve) if d <= 0.25), "never")
        print(f"{name:<32}{first:>24}{curve[-1]:>16.2e}")
    if out is not None:
        print(f"wrote {save_figure(draw(curves), out, overwrite=True)}")
    return {name: curve[-1] for name, curve in curves.items()} | {"|lambda_2|": rate}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-timesteps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=None, help="picture of the distances (.png, .svg, .pdf)")
    main(**vars(parser.parse_args()))
