"""The bound over a data set: the mean over data of ELBO, rate and distortion, with its error, and active units.

    ELBO(D) = 1/N sum_n ELBO(x_n) = -(rate + distortion)

Sums run over data, not over batches, so the figure does not depend on the batch size except through the random stream.
The bound here is always the plain one: no warm-up weight and no free bits.

An active unit is a latent dimension u with Var_x(E_q[u | x]) > 0.01 (Burda et al. 2016, arXiv:1509.00519, section 4.3).

The one constraint: with several processes, each makes the same calls of ``reduce``, whatever its share of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.utils.data import Dataset

from inference.bounds.particles import forked_rng
from inference.bounds.sites import bare_law
from inference.training.batches import iterate
from inference.training.divergence import TrainingDiverged, first_bad_term
from inference.training.items import first_entry
from inference.training.noise import noise_seed, seed_noise
from inference.training.scaling import binarize
from ppl_models.diffusion import Diffusion
from ppl_models.evaluation_mode import evaluating
from ppl_models.networks.labels import labelled, probe_label
from ppl_models.pair import ModelGuidePair

ACTIVE_VARIANCE = 0.01
MAX_LAYERS = 16
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Means over data, in nats: ``elbo`` = -(``rate`` + ``distortion``).

    ``std_error`` is that of ``elbo`` over data, infinite for a single datum. ``active_units`` counts latent dimensions (of
    classes and of codes, whole latents) of
    the sites whose law has a mean. ``rates`` has the rate of each latent site of a hierarchy, in nats, and is empty of others.
    """

    elbo: float
    rate: float
    distortion: float
    std_error: float
    bits_per_dim: float
    active_units: int
    num_data: int
    rates: dict[str, float] = field(default_factory=dict)


def evaluate(
    loss: Any,
    data: Tensor | Dataset,
    batch_size: int,
    *,
    seed: int = 0,
    dynamic: bool = False,
    device: torch.device | str | None = None,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce = lambda sums: sums,
    each_batch: Callable[[], None] = lambda: None,
    rows: Tensor | None = None,
    labels: Tensor | None = None,
) -> Evaluation:
    """The bound of ``loss.pair`` over ``data``, without gradients; the caller's random state is restored.

    Args:
        loss: the bound, with its number of draws: :class:`ElboLoss` or one like it, with ``pair``, ``terms`` and ``latents``.
        data: ``[N, *data_shape]`` or a Dataset of such.
        batch_size: data at a time.
        seed: of the draws; the same seed gives the same figure, so epochs compare on common noise.
        dynamic: the data are grey values, to be binarised (with the same seeds).
        device: where to compute.
        rank: this process; it takes its share of each batch.
        world: number of processes.
        reduce: sums a tensor over processes.
        each_batch: called after each batch; may raise to give up.
        rows: each datum's name in messages, LongTensor ``[N]``; None: its index.
        labels: each datum's label, LongTensor ``[N]``, of a pair that is conditioned on labels; None: there are none, or the
            pair was given one for all.

    Raises:
        TrainingDiverged: a term that is NaN or infinite; the message names site and datum.

    Example:
        >>> from inference import ElboLoss
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> x = pair.model(size=10).detach()
        >>> e = evaluate(ElboLoss(pair, closed_form=False), x, batch_size=4)
        >>> abs(e.elbo - pair.log_evidence(x).mean().item()) < 1e-4, e.num_data
        (True, 10)
    """
    pair = loss.pair
    # A diffusion's latents are the process's, with nothing learned in them to be active.
    sites = () if isinstance(pair, Diffusion) else pair.latent_sites
    sums, units = _Sums(layers(pair)), _Units(sites)
    with torch.no_grad(), forked_rng(), evaluating(pair):
        batches = iterate(data, batch_size, epoch=0, seed=0, shuffle=False, device=device, rank=rank, world=world)
        for b, (indices, x) in enumerate(batches):
            if len(indices):
                seed_noise(noise_seed(seed, b, rank), x.device)
                x = binarize(x) if dynamic else x
                with labelled(pair, rows_of(labels, indices)):
                    terms, means = loss.terms(x), guide_means(pair, x, sites)
                _refuse_not_finite(terms, indices.cpu() if rows is None else rows[indices.cpu()])
                sums.add({name: term.detach().cpu().double() for name, term in terms.items()}, loss.latents)
                units.add(means)
            each_batch()
        if sums.count == 0:  # this process had no share at all, but must know the shapes that it adds nothing to
            x = first_entry(data[0])[None].to(device)
            with labelled(pair, None if labels is None else probe_label(pair)):
                units.add({site: torch.zeros_like(mean[:0]) for site, mean in guide_means(pair, x, sites).items()})
    count, elbo, rate, distortion, *rates = reduce(sums.totals()).tolist()
    mean = elbo / count
    squares = float(reduce(sums.squares_about(mean)))
    return Evaluation(
        mean,
        rate / count,
        distortion / count,
        math.sqrt(squares / (count * (count - 1))) if count > 1 else math.inf,
        bits_per_dim(mean, pair.data_shape),
        units.active(reduce, count),
        round(count),
        {site: total / count for site, total in zip(sums.layers, rates, strict=True)},
    )


def too_few_draws(pair: ModelGuidePair, count: int) -> str:
    """A sentence where an evaluation of ``count`` data draws fewer t than a diffusion's bound has terms; else nothing.

    Example:
        >>> from ppl_models import LinearDiffusion
        >>> from ppl_models.processes import NoiseSchedule
        >>> pair = LinearDiffusion(NoiseSchedule.cosine(50), torch.zeros(1), torch.ones(1))
        >>> too_few_draws(pair, 50), too_few_draws(pair, 20)[:43]
        ('', 'the bound has 50 terms, of which each of 20')
    """
    if not isinstance(pair, Diffusion) or pair.num_timesteps <= count:
        return ""
    return (
        f"the bound has {pair.num_timesteps} terms, of which each of {count} validation data draws one: where those that none "
        "draws are large, the ELBO shown is off by more than its error says; decompose_diffusion and ppl terms give all"
    )


def layers(pair: ModelGuidePair) -> tuple[str, ...]:
    """The latent sites whose rates are reported one by one: those of a hierarchy of 2 to 16 learned layers, else none.

    Example:
        >>> from ppl_models.linear_hierarchy import LinearHierarchy
        >>> layers(LinearHierarchy.random(data_dim=3, latent_dims=(2, 1)))
        ('z_2', 'z_1')
    """
    several = 2 <= len(pair.latent_sites) <= MAX_LAYERS and not isinstance(pair, Diffusion)
    return pair.latent_sites if several else ()


def bits_per_dim(elbo: float, data_shape: torch.Size) -> float:
    """-ELBO / (D log 2): nats per datum as bits per dimension, lower is better.

    Example:
        >>> round(bits_per_dim(-64 * math.log(2), torch.Size([8, 8])), 6)
        1.0
    """
    return -elbo / (max(1, math.prod(data_shape)) * math.log(2))


def guide_means(pair: ModelGuidePair, x: Tensor, sites: tuple[str, ...]) -> dict[str, Tensor]:
    """E_q[u | x] of each latent site that has a mean, ``[B, d, k]`` in float64; given draws of what is above it.

    A unit u has k numbers: one, or, for one-hot classes and for code vectors, a number for each class or coordinate.
    """
    if not sites:
        return {}
    trace = poutine.trace(pair.guide).get_trace(x)
    means = {}
    for site in sites:
        law = trace.nodes[site]["fn"]
        try:
            mean = law.mean
        except NotImplementedError:
            continue
        data_dim = mean.dim() - len(law.event_shape) - 1  # the data plate is the last batch dim
        whole = len(law.event_shape) == 2 and (law.support.is_discrete or isinstance(bare_law(law), dist.Delta))
        numbers = law.event_shape[-1] if whole else 1
        means[site] = mean.movedim(data_dim, 0).reshape(len(x), -1, numbers).cpu().double()
    return means


def rows_of(labels: Tensor | None, indices: Tensor) -> Tensor | None:
    """The labels of some data, None where there are no labels or no data."""
    return None if labels is None or not len(indices) else labels[indices.to(labels.device)]


class _Sums:
    """Sums over this process's data, and of squares about their own mean (Chan, Golub and LeVeque 1983)."""

    def __init__(self, layers: tuple[str, ...] = ()) -> None:
        self.layers = layers
        self.rates = [0.0] * len(layers)
        self.count, self.elbo, self.rate, self.distortion, self.squares = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, terms: dict[str, Tensor], latents: tuple[str, ...]) -> None:
        """Takes a batch's terms in, each ``[b]`` in float64."""
        elbo = torch.stack(list(terms.values())).sum(0)
        rate = -sum((terms[site] for site in latents), torch.zeros_like(elbo))
        mean = float(elbo.mean())
        if self.count:
            self.squares += (mean - self.elbo / self.count) ** 2 * self.count * len(elbo) / (self.count + len(elbo))
        self.squares += float((elbo - mean).square().sum())
        self.count += len(elbo)
        self.elbo += float(elbo.sum())
        self.rate += float(rate.sum())
        self.distortion += float((-elbo - rate).sum())
        self.rates = [total - float(terms[site].sum()) for site, total in zip(self.layers, self.rates, strict=True)]

    def totals(self) -> Tensor:
        return torch.tensor([self.count, self.elbo, self.rate, self.distortion, *self.rates], dtype=torch.float64)

    def squares_about(self, mean: float) -> Tensor:
        """Sum of squares of this process's data about the mean of all."""
        shift = self.count * (self.elbo / self.count - mean) ** 2 if self.count else 0.0
        return torch.tensor(self.squares + shift, dtype=torch.float64)


class _Units:
    """Sums of E_q[u | x] and of its square over data, for each latent dimension u."""

    def __init__(self, sites: tuple[str, ...]) -> None:
        self.sites = sites
        self.sums: dict[str, Tensor] = {}

    def add(self, means: dict[str, Tensor]) -> None:
        for site, mean in means.items():
            sums = torch.stack([mean.sum(0), mean.square().sum(0)])
            self.sums[site] = self.sums[site] + sums if site in self.sums else sums

    def active(self, reduce: Reduce, count: float) -> int:
        """The number of dimensions whose mean varies over data."""
        active = 0
        for site in self.sites:
            if site in self.sums:
                mean, square = reduce(self.sums[site]) / count
                active += int((square - mean.square() > ACTIVE_VARIANCE).any(-1).sum())
        return active


def _refuse_not_finite(terms: dict[str, Tensor], rows: Tensor) -> None:
    found = first_bad_term(terms)
    if found:
        site, position, value = found
        raise TrainingDiverged(
            f"expected a finite bound, got {value} at site {site!r} for datum {int(rows[position])} of the validation "
            "data: lower the learning rate, or look at that datum"
        )
