"""One bound, three derivations, as numbers with errors and variances: lecture notes 000, 001 and 003.

The forward guide (000, 002), the posterior guide (003) and single terms L_t (001) are three programs for one ELBO. Their
estimates must agree; how much they scatter must not, and which scatters least is measured here on digits: per estimate, and
per network call, for the value and for the gradient that training would use. The forward form of 000 (reconstruction, prior
matching and consistency) is the forward guide's estimate with its terms sorted otherwise, the same number in every draw.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from inference import load_data
from inference.training.diffusion_objective import DiffusionLoss
from inference.views.drawing import save_figure
from inference.views.estimators import Estimator, draw_estimators, estimators_table
from ppl_models.ddpm import DDPM
from ppl_models.likelihoods import DiscretizedNormal


def estimators(pair: DDPM, x: Tensor) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Network calls and a draw of -ELBO per datum, for each way to write it."""
    last, size = pair.num_timesteps, len(x)
    losses = {name: DiffusionLoss(pair, timesteps=name) for name in ("uniform", "stratified", "loss_second_moment")}
    for _ in range(30 * last):  # p_t is learned from the losses seen, and then held
        losses["loss_second_moment"](x)
    losses["loss_second_moment"].eval()

    def chain(elbo: Trace_ELBO, guide: Callable) -> Callable[[], Tensor]:
        return lambda: elbo.differentiable_loss(pair.model, guide, x) / size

    def one_term() -> Tensor:
        t = torch.randint(last + 1, (size,))
        return (last + 1) * Trace_ELBO().differentiable_loss(pair.term_model, pair.term_guide, x, t) / size

    def all_terms() -> Tensor:
        return torch.stack([losses["uniform"].term(x, torch.full((size,), t)).mean() for t in range(last + 1)]).sum()

    return {
        "forward guide, drawn": (last, chain(Trace_ELBO(), pair.guide)),
        "posterior guide, drawn": (last, chain(Trace_ELBO(), pair.posterior_guide)),
        "posterior guide, closed-form KLs": (last, chain(TraceMeanField_ELBO(), pair.posterior_guide)),
        "all L_t, closed-form KLs, own draws": (last + 1, all_terms),
        "one L_t a datum, drawn": (1, one_term),
        "one L_t, closed form, t uniform": (1, lambda: losses["uniform"](x).mean()),
        "one L_t, closed form, t stratified": (1, lambda: losses["stratified"](x).mean()),
        "one L_t, closed form, t by second moment": (1, lambda: losses["loss_second_moment"](x).mean()),
    }


def measure(name: str, calls: int, draw: Callable[[], Tensor], pair: DDPM, repeats: int) -> Estimator:
    """Mean and scatter of the value, and of a tenth as many gradients, over repeated draws on the same data."""
    gradients = []
    for _ in range(max(2, repeats // 10)):
        gradient = torch.autograd.grad(draw(), list(pair.parameters()))
        gradients.append(torch.cat([g.flatten() for g in gradient]))
    scatter = float(torch.stack(gradients).var(0).sum().sqrt())
    with torch.no_grad():
        value = torch.stack([draw().double() for _ in range(repeats)])
    return Estimator(name, calls, float(value.mean()), float(value.std()), scatter, repeats)


def largest_difference(found: list[Estimator]) -> float:
    """Of any two means, in standard errors of their difference."""
    errors = [e.scatter / math.sqrt(e.repeats) for e in found]
    return max(
        abs(a.mean - b.mean) / math.hypot(s, r)
        for (a, s), (b, r) in itertools.combinations(zip(found, errors, strict=True), 2)
    )


def main(
    num_timesteps: int = 10, train_steps: int = 600, repeats: int = 2000, out: Path | None = None
) -> list[Estimator]:
    """Trains a small DDPM on digits, then compares the estimators of its bound on one batch."""
    torch.manual_seed(0)
    data = load_data("digits", scaling="symmetric").train
    pair = DDPM.preset((8, 8), DiscretizedNormal(levels=17), num_timesteps, hidden=64, blocks=2, predict="x_0")
    loss, optimizer = DiffusionLoss(pair), torch.optim.Adam(pair.parameters(), 2e-3)
    with pyro.validation_enabled(False):
        for _ in range(train_steps):
            optimizer.zero_grad()
            loss(data[torch.randint(len(data), (128,))]).mean().backward()
            optimizer.step()
        ways = estimators(pair, data[:32])
        found = [measure(name, calls, draw, pair, repeats) for name, (calls, draw) in ways.items()]
    print(f"-ELBO of 32 digits under a DDPM with T = {num_timesteps}, {repeats} draws of each estimator")
    print(estimators_table(found))
    z = largest_difference(found)
    print(f"one bound: the two means farthest apart are {z:.1f} of their standard errors from each other")
    if out is not None:
        title = f"Estimators of one bound: DDPM with T = {num_timesteps} on 32 digits"
        print(f"wrote {save_figure(draw_estimators(found, title), out, overwrite=True)}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-timesteps", type=int, default=10)
    parser.add_argument("--train-steps", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=None, help="picture of the estimators (.png, .svg, .pdf)")
    main(**vars(parser.parse_args()))
