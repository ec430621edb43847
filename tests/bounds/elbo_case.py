"""A program with its ELBO known term by term, and how a decomposition is held against it.

Monte Carlo numbers are compared in units of their own standard errors. A test that compares m numbers uses the
two-sided normal quantile of FALSE_FAILURE / m, so that it fails wrongly with probability 1e-6 in all. A number whose
standard error is zero is deterministic and must be exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import scipy.stats
import torch

from inference.bounds import Decomposition, decompose_elbo

FALSE_FAILURE = 1e-6
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Case:
    """A pair, the exact expectation of each of its terms, and where a closed form must and must not be used.

    ``terms`` maps a site to a number or to an array of the shape of the shared plates. ``closed`` names the latent and
    auxiliary sites whose closed form is known and valid. ``fast`` says whether particles can be vectorised.
    """

    name: str
    model: Callable[..., Any]
    guide: Callable[..., Any]
    terms: Mapping[str, Any]
    closed: frozenset[str] = frozenset()
    args: tuple[Any, ...] = ()
    fast: bool = True
    latent: frozenset[str] | None = None
    num_particles: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def elbo(self) -> np.ndarray:
        return np.asarray(sum(np.asarray(t, dtype=float) for t in self.terms.values()))

    def run(self, **options: Any) -> Decomposition:
        pyro.clear_param_store()
        n = self.num_particles or (4000 if self.fast else 300)
        return decompose_elbo(self.model, self.guide, *self.args, **{"num_particles": n, **self.kwargs, **options})


def quantile(comparisons: int) -> float:
    """The |z| that a test of so many standard normal numbers exceeds with probability FALSE_FAILURE."""
    return float(scipy.stats.norm.isf(FALSE_FAILURE / (2 * comparisons)))


def discrepancies(d: Decomposition, terms: Mapping[str, Any], rounding: float = ROUNDING[torch.float64]) -> list[str]:
    """Every number of a decomposition that contradicts the exact terms: what the tests demand to be empty.

    Takes in the Monte Carlo value and the closed form of each site, and both sums.
    """
    numbers: list[tuple[str, Any, Any, Any]] = []
    for site, exact in terms.items():
        numbers.append((f"{site} by Monte Carlo", d[site].monte_carlo, d[site].std_error, exact))
        if d[site].analytic is not None:
            numbers.append((f"{site} in closed form", d[site].analytic, d[site].analytic_std_error, exact))
    elbo = np.asarray(sum(np.asarray(t, dtype=float) for t in terms.values()))
    numbers.append(("the ELBO", d.elbo, d.std_error, elbo))
    numbers.append(("the ELBO by Monte Carlo", d.monte_carlo, d.monte_carlo_std_error, elbo))
    limit = quantile(sum(value.numel() for _, value, _, _ in numbers))
    found = []
    for what, value, error, exact in numbers:
        exact = np.broadcast_to(np.asarray(exact, dtype=float), value.shape)
        slack = limit * error.numpy() + rounding * (1.0 + np.abs(exact))
        if not bool((np.abs(value.numpy() - exact) <= slack).all()):
            found.append(f"{what}: got {value.numpy()} +- {error.numpy()}, exact {exact}")
    return found


def smallest_visible_error(d: Decomposition, site: str) -> float:
    """The error of a site's Monte Carlo term that a test with one part in a million of misses would catch.

    Threshold plus the normal quantile of the same rate, in standard errors: the power calculation of a negative control.
    """
    worst = float(d[site].std_error.max())
    return (quantile(4 * max(1, len(d) * d.elbo.numel())) + float(scipy.stats.norm.isf(FALSE_FAILURE))) * worst
