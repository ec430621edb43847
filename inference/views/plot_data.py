"""What the pictures show, as plain arrays: computed here from tensors, drawn in :mod:`inference.views.figures`.

Each picture has a frozen dataclass of numpy arrays and a function that computes it from a pair, a decomposition or a
metrics table. Nothing here draws, and nothing in ``figures`` computes, so the numbers of every picture can be tested,
stored or drawn by other means. Values are in data units, bounds in nats per datum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from inference.ancestral import Trajectory, ancestral_trajectory
from inference.bounds.decomposition import decompose_elbo
from inference.generated import data_site
from inference.views.probing import conditional_mean, data_mean, guide_means
from ppl_models.diffusion import Diffusion
from ppl_models.pair import ModelGuidePair

if TYPE_CHECKING:
    from inference.bounds.terms import Decomposition

Array = NDArray[np.float64]

CURVES = ("elbo", "rate", "distortion")


@dataclass(frozen=True)
class Reconstructions:
    """Data beside E[x | z = E_q[z | x]], with the ELBO of each datum and its standard error, nats ``[N]``."""

    originals: Array
    means: Array
    elbo: Array
    std_error: Array


@dataclass(frozen=True)
class Samples:
    """Draws x ~ p(x), the means E[x | z] at the same z, and data to hold them against; ``[n, *data_shape]`` each.

    ``law`` says what the draws were drawn from, and ``columns`` names the labels that images are drawn at in turn.
    """

    draws: Array
    means: Array | None = None
    data: Array | None = None
    law: str = "x ~ p(x | z), z ~ p(z)"
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class LearningCurve:
    """The bound by epoch, ``[E]`` each, nats per datum; NaN where an epoch has no value. ELBO = -(rate + distortion).

    ``validated_on`` is what the validation values are of, in a word or two.
    """

    epoch: Array
    train_elbo: Array
    train_rate: Array
    train_distortion: Array
    validation_elbo: Array
    validation_rate: Array
    validation_distortion: Array
    validated_on: str = "validation"


@dataclass(frozen=True)
class BoundTerms:
    """Terms of the bound by site and their sum, nats, averaged over data; ``best`` is NaN where draws alone are the best.

    Elsewhere it is the closed form, or half of one (:class:`inference.bounds.terms.SiteTerm`). The last row, "ELBO", has the
    sum of the best estimator of each term in ``best`` and that of the draws alone in ``monte_carlo``. Errors are standard
    errors of the mean.
    """

    names: tuple[str, ...]
    best: Array
    best_error: Array
    monte_carlo: Array
    monte_carlo_error: Array
    per: str
    num_particles: int


def reconstructions(pair: ModelGuidePair, x: Tensor, num_particles: int = 100) -> Reconstructions:
    """E[x | z = E_q[z | x]] beside x, and ELBO(x) of each datum by :func:`inference.bounds.decompose_elbo`.

    Args:
        pair: the programs.
        x: data ``[N, *data_shape]``.
        num_particles: draws for the ELBO; the reconstructions themselves draw nothing.
    """
    means = conditional_mean(pair, guide_means(pair, x))
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=num_particles)
    return Reconstructions(to_array(x), to_array(means), to_array(d.elbo), to_array(d.std_error))


def samples(pair: ModelGuidePair, num: int, data: Tensor | None = None) -> Samples:
    """Runs the generative program: x ~ p(x | z), z ~ p(z), and E[x | z] at the same z (of a diffusion, x_0 alone).

    Args:
        pair: the programs.
        num: how many draws; of a pair that was given labels, of these in turn.
        data: real data ``[N, *data_shape]`` to show beside them.
    """
    pair = pair.in_turn(num)
    if isinstance(pair, Diffusion):
        drawn = trajectory_samples(ancestral_trajectory(pair, num), data)
        return replace(drawn, law=drawn.law + at_labels(pair))
    with torch.no_grad():
        trace = poutine.trace(pair.model).get_trace(size=num)
    node = trace.nodes[data_site(pair, trace)]
    law = "x ~ p(x | z), z ~ p(z)" if pair.labels is None else f"x ~ p(x | z, y), z ~ p(z){at_labels(pair)}"
    beside = None if data is None else to_array(data)
    shown = Samples(to_array(node["value"]), to_array(data_mean(node["fn"])), beside, law)
    if not pair.bounds_evidence:
        return replace(shown, law=f"{law.replace('p(z)', 'N(0, I)')}: an autoencoder has no p(z)")
    return shown


def at_labels(pair: ModelGuidePair, names: Sequence[str] | None = None) -> str:
    """At which labels a pair is, in words, by their names if there are any; nothing where it knows of none.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> at_labels(LinearGaussian.random(data_dim=3, latent_dim=2))
        ''
    """
    labels = pair.labels
    if labels is None:
        return ""
    if labels.dim() == 1:
        return ", at the labels y in turn"
    name = str(int(labels)) if names is None else names[int(labels)]
    return f", at y\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{name}"


def trajectory_samples(trajectory: Trajectory, data: Tensor | None = None) -> Samples:
    """The samples of a chain from x_T to x_0, which have no means to show beside them: the last step adds next to nothing."""
    return Samples(to_array(trajectory.x_0), None, None if data is None else to_array(data), f"x_0, {trajectory.law}")


def learning_curve(rows: Sequence[Mapping[str, Any]], validated_on: str = "validation") -> LearningCurve:
    """A metrics table as arrays by epoch.

    Args:
        rows: one mapping per epoch, with ``epoch`` and any of ``{train,validation}_{elbo,rate,distortion}`` in nats per
            datum; missing, None, empty and NaN all mean "no value".
        validated_on: what the validation values are of, for the legend.

    Raises:
        ValueError: no rows, or a row without ``epoch``.

    Example:
        >>> learning_curve([{"epoch": 1, "train_elbo": -3.0}, {"epoch": 2}]).train_elbo.tolist()
        [-3.0, nan]
    """
    if not rows or any("epoch" not in row for row in rows):
        raise ValueError(
            "expected at least one row of metrics, each with an 'epoch'; got none: train for an epoch first"
        )

    def column(key: str) -> Array:
        values = [row.get(key) for row in rows]
        return np.array([math.nan if v is None or v == "" else float(v) for v in values])

    columns = {f"{part}_{curve}": column(f"{part}_{curve}") for part in ("train", "validation") for curve in CURVES}
    return LearningCurve(column("epoch"), **columns, validated_on=validated_on)


def bound_terms(d: Decomposition) -> BoundTerms:
    """A decomposition as rows of a picture, averaged over the shared plates; the sum last.

    Example:
        >>> from inference.bounds import decompose_elbo
        >>> from ppl_models.linear_gaussian import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> d = decompose_elbo(pair.model, pair.guide, pair.model(size=4), num_particles=10)
        >>> bound_terms(d).names
        ('z', 'x', 'ELBO')
    """
    terms = list(d.terms.values())
    plates = " x ".join(f"{n} {name}" for name, n in zip(d.plates, d.elbo.shape, strict=True))
    missing = torch.full_like(d.elbo, math.nan)
    drawn = [t.analytic is None and t.with_entropy is None for t in terms]
    exact = [missing if only else t.value for t, only in zip(terms, drawn, strict=True)]
    exact_error = [missing if only else t.value_std_error for t, only in zip(terms, drawn, strict=True)]
    return BoundTerms(
        names=(*d.sites, "ELBO"),
        best=np.array([_mean(v) for v in [*exact, d.elbo]]),
        best_error=np.array([*(_error_of_mean(e) for e in exact_error), d.mean_std_error]),
        monte_carlo=np.array([_mean(v) for v in [*(t.monte_carlo for t in terms), d.monte_carlo]]),
        monte_carlo_error=np.array([*(_error_of_mean(t.std_error) for t in terms), d.monte_carlo_mean_std_error]),
        per=f"nats, mean over {plates}" if plates else "nats",
        num_particles=d.num_particles,
    )


def to_array(values: Tensor) -> Array:
    """A tensor as a float64 array on the CPU."""
    return values.detach().cpu().to(torch.float64).numpy()


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _error_of_mean(std_errors: Tensor) -> float:
    """Standard error of a mean of independent estimates."""
    return float(std_errors.square().sum().sqrt() / max(1, std_errors.numel()))
