"""ELBO surgery: how much of the rate is information about x, and how much is a bad prior (Hoffman and Johnson 2016).

    (1/N) sum_n KL(q(z | x_n) || p(z))  =  I_q(n; z)  +  KL(q(z) || p(z)),    q(z) = (1/N) sum_n q(z | x_n)
    rate                                =  mutual information  +  marginal KL

n is uniform on the N data at hand, so I_q(n; z) = E[log q(z | x_n) - log q(z)] lies between 0 and log N: a mutual
information near log N only says that every datum has a place of its own. All layers together are z.

Conventions. Nats per datum. The aggregate q(z) is evaluated exactly, with all N components; only z is drawn, so the
errors are the draws'. The same draws serve all three, and the identity holds to rounding. The one constraint is cost:
num_particles N^2 evaluations of log q(z | x_n), in chunks of bounded memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pyro
import torch
from pyro import poutine
from torch import Tensor

from inference.bounds.joint import data_plan, latent_values, log_guide, log_joint, refuse_point_masses
from inference.bounds.moments import Moments
from inference.bounds.particles import ELEMENTS_AT_ONCE, PARTICLES, PairError, Plan
from inference.printed import Printed
from inference.progress import Progress
from inference.views.tables import text_table
from ppl_models.pair import ModelGuidePair


@dataclass(frozen=True, repr=False)
class ElboSurgery(Printed):
    """The rate and its two parts in nats, means over the N data, with standard errors."""

    rate: float
    rate_std_error: float
    mutual_information: float
    mutual_information_std_error: float
    marginal_kl: float
    marginal_kl_std_error: float
    num_data: int

    @property
    def most_information(self) -> float:
        """log N, the largest mutual information that N data can show."""
        return math.log(self.num_data)

    def table(self) -> str:
        """The three numbers as text."""
        rows = [
            ("mutual information  I_q(x; z)", self.mutual_information, self.mutual_information_std_error),
            ("marginal KL         KL(q(z) || p(z))", self.marginal_kl, self.marginal_kl_std_error),
            ("rate                E KL(q(z|x) || p(z))", self.rate, self.rate_std_error),
        ]
        cells = [[name, f"{value:.4f}", f"{error:.4f}"] for name, value, error in rows]
        text = text_table([f"nats, mean over {self.num_data} data", "value", "+- SE"], cells)
        return f"{text}\n  (at most log N = {self.most_information:.4f} nats of information can be seen in these data)"


def elbo_surgery(pair: ModelGuidePair, x: Tensor, *, num_particles: int = 10) -> ElboSurgery:
    """Splits the rate into mutual information and marginal KL, with the exact aggregate posterior of the data.

    Args:
        pair: the programs.
        x: data ``[N, *data_shape]``.
        num_particles: draws z ~ q(z | x_n) for each datum, at least 2.

    Returns:
        :class:`ElboSurgery`.

    Raises:
        ValueError: ``num_particles`` below 2.
        PairError: sites do not match, are not inside the data plate, or the guide does not run under an outer plate.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> parts = elbo_surgery(pair, torch.zeros(5, 3))  # five equal data: nothing to tell apart
        >>> abs(parts.mutual_information) < 1e-5, abs(parts.rate - parts.marginal_kl) < 1e-5
        (True, True)
    """
    if num_particles < 2:
        raise ValueError(f"expected num_particles >= 2, got {num_particles}: one draw has no standard error")
    rate, information, marginal = Moments(), Moments(), Moments()
    with torch.no_grad(), Progress("surgery on the ELBO", num_particles, unit="draws") as progress:
        plan = data_plan(pair, x)
        refuse_point_masses(plan, "take the rate apart")
        if not plan.vectorized:
            raise PairError(
                f"expected programs that run under an outer plate, but {plan.note}: accept leading batch dims"
            )
        for particles in plan.chunks(num_particles):
            log_q = log_guide(particles)
            latents = {site: particles.model[site] for site in pair.latent_sites}
            log_prior = log_joint(replace(particles, model=latents))
            log_aggregate = _log_aggregate(plan, {s: latent_values(particles, s) for s in latents})
            rate.add(log_q - log_prior)
            information.add(log_q - log_aggregate)
            marginal.add(log_aggregate - log_prior)
            progress.advance(particles.count)
    return ElboSurgery(*_mean(rate), *_mean(information), *_mean(marginal), len(x))


def _log_aggregate(plan: Plan, values: dict[str, Tensor]) -> Tensor:
    """log q(z) = log (1/N) sum_m q(z | x_m) of draws z ``[K, N, *event]`` by site: ``[K, N]``."""
    count = len(plan.args[0])
    draws = {site: value.flatten(0, 1).unsqueeze(1) for site, value in values.items()}  # [K N, 1, *event]
    rows = max(1, ELEMENTS_AT_ONCE // (count * max(value[0].numel() for value in draws.values())))
    parts = []
    for chunk in zip(*(value.split(rows) for value in draws.values()), strict=True):
        size = len(chunk[0])
        fixed = {site: z.expand(size, count, *z.shape[2:]) for site, z in zip(draws, chunk, strict=True)}
        with pyro.plate(PARTICLES, size, dim=-2):
            components = poutine.trace(poutine.condition(plan.guide, data=fixed)).get_trace(*plan.args)
        components.compute_log_prob()
        log_q = torch.stack([components.nodes[site]["log_prob"].to(torch.float64) for site in fixed]).sum(0)
        parts.append(log_q.logsumexp(-1) - math.log(count))
    return torch.cat(parts).reshape(-1, count)


def _mean(moments: Moments) -> tuple[float, float]:
    """Mean over data, and its standard error from the draws of z at fixed data."""
    return float(moments.mean.mean()), float(moments.std_error.square().sum().sqrt() / len(moments.mean))
