"""Bias and variance of four gradients through a categorical latent: "Discrete-VAE", lecture notes 004 (its outline).

With M = 3 latents of K = 4 classes all 64 values of z can be summed over, so the exact gradient of the bound is known. Score
function, Gumbel-softmax and straight-through are held against it on the same data at the same weights: the first has no
bias, the others trade bias for variance by their temperature. The bound that each loss reports is the discrete one.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from inference import EnumeratedLoss, GumbelSoftmaxLoss, ScoreFunctionLoss, StraightThroughLoss, load_data
from inference.views.drawing import BLUE, GREEN, VERMILION, save_figure, style
from inference.views.tables import text_table
from ppl_models import CategoricalVAE
from ppl_models.likelihoods import Bernoulli

TEMPERATURES = (2.0, 1.0, 0.5, 0.25)
DRAWS = (2, 4, 8, 16)


def gradient(loss: nn.Module, x: Tensor) -> Tensor:
    """Of the batch mean of -ELBO in the guide's parameters, flat."""
    parameters = list(loss.pair.encoder.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(x).mean(), parameters)])


def bias_and_variance(loss: nn.Module, x: Tensor, exact: Tensor, num_pairs: int) -> tuple[float, float, float]:
    """|E g - e|^2 / |e|^2 with its standard error, and tr Cov(g) / |e|^2, both without bias, from pairs of draws g, g'.

    E[(g - e) . (g' - e)] = |E g - e|^2 and E|g - g'|^2 / 2 = tr Cov(g).
    """
    squares, variances = [], []
    for _ in range(num_pairs):
        one, other = gradient(loss, x), gradient(loss, x)
        squares.append((one - exact) @ (other - exact))
        variances.append((one - other).square().sum() / 2)
    bias, scale = torch.stack(squares), float(exact.square().sum())
    error = float(bias.std()) / num_pairs**0.5
    return float(bias.mean()) / scale, error / scale, float(torch.stack(variances).mean()) / scale


def draw(found: dict[str, tuple[str, float, float, float]]) -> Figure:
    """Variance to the right, squared bias upwards, both over the squared length of the exact gradient."""
    looks = {  # colour, marker, where the label goes (points)
        "score function": (GREEN, "o", (-8, -14)),
        "Gumbel-softmax": (BLUE, "s", (6, 4)),
        "straight-through": (VERMILION, "^", (-6, 12)),
    }
    with style():
        figure = Figure(figsize=(6.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0, color="black", linewidth=0.8)
        for family, (colour, marker, place) in looks.items():
            points = [value for name, value in found.items() if name.startswith(family)]
            settings, bias, errors, variances = zip(*points, strict=True)
            bars = [2 * error for error in errors]
            axes.errorbar(variances, bias, yerr=bars, color=colour, marker=marker, linewidth=1, capsize=3, label=family)
            for setting, right, up in zip(settings, variances, bias, strict=True):
                axes.annotate(setting, (right, up), place, textcoords="offset points", fontsize=7, color=colour)
        axes.set(xscale="log", title="Gradient of the bound in the guide's parameters, against enumeration")
        axes.set_xlabel("variance: tr Cov(g) / |exact gradient|²")
        axes.set_ylabel("squared bias: |E g − exact|² / |exact gradient|²\n(± 2 standard errors)")
        axes.grid(True)
        axes.legend()
    return figure


def main(steps: int = 300, num_data: int = 256, num_pairs: int = 300, out: Path | None = None) -> dict[str, float]:
    """Trains a little by enumeration, then compares gradients on held-out images; draws them into ``out`` if given."""
    torch.manual_seed(0)
    digits = load_data("digits", scaling="unit", binarization="fixed")
    pair = CategoricalVAE.preset((8, 8), Bernoulli(), num_latents=3, num_classes=4, hidden=(64,))
    enumerated = EnumeratedLoss(pair)
    optimizer = torch.optim.Adam(pair.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = digits.train[torch.randint(len(digits.train), (64,))]
        optimizer.zero_grad()
        enumerated(batch).mean().backward()
        optimizer.step()

    x = digits.test[:num_data]
    exact = gradient(enumerated, x)
    losses = {f"score function, S = {s}": (f"S = {s}", ScoreFunctionLoss(pair, s)) for s in DRAWS}
    for tau in TEMPERATURES:
        losses[f"Gumbel-softmax, tau = {tau:g}"] = (f"τ = {tau:g}", GumbelSoftmaxLoss(pair, temperature=tau))
    for tau in TEMPERATURES:
        losses[f"straight-through, tau = {tau:g}"] = (f"τ = {tau:g}", StraightThroughLoss(pair, temperature=tau))
    found = {name: (setting, *bias_and_variance(loss, x, exact, num_pairs)) for name, (setting, loss) in losses.items()}

    evidence, elbo = float(pair.log_evidence(x).mean().detach()), -float(enumerated(x).mean().detach())
    print(
        f"{len(x)} held-out digits after {steps} steps: log p(x) = {evidence:.3f}, ELBO = {elbo:.3f} nats, both exact"
    )
    rows = [[name, f"{b:.4f}", f"{e:.4f}", f"{v:.4f}"] for name, (_, b, e, v) in found.items()]
    print(text_table(["gradient", "bias²", "+- SE", "variance"], rows))
    print("both over the squared length of the exact gradient; enumeration has neither")
    if out is not None:
        print(f"wrote {save_figure(draw(found), out, overwrite=True)}")
    return {"evidence": evidence, "elbo": elbo} | {f"bias of {name}": b / e for name, (_, b, e, _) in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num-data", type=int, default=256)
    parser.add_argument("--num-pairs", type=int, default=300)
    parser.add_argument("--out", type=Path, default=None, help="picture of bias against variance (.png, .svg, .pdf)")
    main(**vars(parser.parse_args()))
