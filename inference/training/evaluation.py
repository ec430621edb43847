"""The bound over a data set: the mean over data of ELBO, rate and distortion, with its error, and active units.

    ELBO(D) = 1/N sum_n ELBO(x_n) = -(rate + distortion)

Sums run over data, not over batches, so the figure does not depend on the batch size except through the random stream.
The bound here is always the plain one: no warm-up weight and no free bits.

An active unit is a latent dimension u with Var_x(E_q[u | x]) > 0.01 (Burda et al. 2016, arXiv:1509.00519, section 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from torch.utils.data import Dataset

from inference.bounds.particles import forked_rng
from inference.training.batches import iterate
from inference.training.objectives import ElboLoss
from inference.training.scaling import binarize

ACTIVE_VARIANCE = 0.01
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Means over data, in nats: ``elbo`` = -(``rate`` + ``distortion``); ``std_error`` is that of ``elbo`` over data."""

    elbo: float
    rate: float
    distortion: float
    std_error: float
    bits_per_dim: float
    active_units: int
    num_data: int


def evaluate(
    loss: ElboLoss,
    data: Tensor | Dataset,
    batch_size: int,
    *,
    seed: int = 0,
    dynamic: bool = False,
    device: torch.device | str | None = None,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce = lambda sums: sums,
) -> Evaluation:
    """The bound of ``loss.pair`` over ``data``, without gradients; the caller's random state is restored.

    Args:
        loss: the bound, with its number of draws.
        data: ``[N, *data_shape]`` or a Dataset of such.
        batch_size: data at a time.
        seed: of the draws; the same seed gives the same figure, so epochs compare on common noise.
        dynamic: the data are grey values, to be binarised (with the same seeds).
        device: where to compute.
        rank: this process; it takes its share of each batch.
        world: number of processes.
        reduce: sums a tensor over processes.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> x = pair.model(size=10).detach()
        >>> e = evaluate(ElboLoss(pair, closed_form=False), x, batch_size=4)
        >>> abs(e.elbo - float(pair.log_evidence(x).mean())) < 1e-4, e.num_data
        (True, 10)
    """
    pair = loss.pair
    training = pair.training
    pair.eval()
    scalars = torch.zeros(5, dtype=torch.float64)  # count, sum of elbo, of elbo^2, of rate, of distortion
    units: dict[str, Tensor] = {}  # per latent site: [2, d], sums of E_q[u | x] and of its square
    try:
        with torch.no_grad(), forked_rng():
            batches = iterate(data, batch_size, epoch=0, seed=0, shuffle=False, device=device, rank=rank, world=world)
            for b, (indices, x) in enumerate(batches):
                if not len(indices):
                    continue
                torch.manual_seed(noise_seed(seed, b, rank))
                x = binarize(x) if dynamic else x
                terms = {name: term.double() for name, term in loss.terms(x).items()}
                elbo = torch.stack(list(terms.values())).sum(0)
                rate = -sum((terms[s] for s in pair.latent_sites if s in terms), torch.zeros_like(elbo))
                parts = [torch.ones_like(elbo), elbo, elbo.square(), rate, -elbo - rate]
                scalars += torch.stack([p.sum() for p in parts]).cpu()
                for site, mean in guide_means(loss, x).items():
                    sums = torch.stack([mean.sum(0), mean.square().sum(0)]).cpu()
                    units[site] = units[site] + sums if site in units else sums
    finally:
        pair.train(training)
    count, total, squares, rates, distortions = reduce(scalars).tolist()
    elbo_mean = total / count
    variance = max(0.0, squares / count - elbo_mean**2)
    active = 0
    for sums in units.values():
        mean, square = reduce(sums) / count
        active += int((square - mean.square() > ACTIVE_VARIANCE).sum())
    return Evaluation(
        elbo_mean,
        rates / count,
        distortions / count,
        math.sqrt(variance / count),
        bits_per_dim(elbo_mean, pair.data_shape),
        active,
        round(count),
    )


def bits_per_dim(elbo: float, data_shape: torch.Size) -> float:
    """-ELBO / (D log 2): nats per datum as bits per dimension, lower is better.

    Example:
        >>> round(bits_per_dim(-64 * math.log(2), torch.Size([8, 8])), 6)
        1.0
    """
    return -elbo / (max(1, math.prod(data_shape)) * math.log(2))


def guide_means(loss: ElboLoss, x: Tensor) -> dict[str, Tensor]:
    """E_q[u | x] of each latent site that has a mean, ``[B, d]`` in float64; given draws of what is above it."""
    trace = poutine.trace(loss.pair.guide).get_trace(x)
    means = {}
    for site in loss.pair.latent_sites:
        law = trace.nodes[site]["fn"]
        try:
            means[site] = law.mean.double().reshape(x.shape[0], -1)
        except NotImplementedError:
            continue
    return means


def noise_seed(seed: int, *place: int) -> int:
    """A 63-bit seed for one place of a run (epoch, batch, process, ...): independent streams, the same after a resume."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0] >> np.uint64(1))
