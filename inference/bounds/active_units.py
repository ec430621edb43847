"""Which latent units the data move, layer by layer, and what each costs: collapse named in words.

    A_u = Var_x(E_q[u | x])         unit u is active if A_u > 0.01

(Burda, Grosse and Salakhutdinov 2016, arXiv:1509.00519, section 5.2). E_q[u | x] is exact for the guide's first layer; a
deeper layer's is averaged over draws of the layers before it, and the variance that these draws add to A_u is taken off
again, so the count does not depend on the number of draws but for chance.

The cost of a unit is its share of the rate, KL(q(u | .) || p(u | .)) averaged over data and draws. It is known where the
site's closed-form KL is its term of the bound and both laws are diagonal Gaussians: a collapsed unit's share is near zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.bounds.joint import data_plan
from inference.bounds.moments import Moments
from inference.bounds.particles import Particles
from inference.bounds.sites import base_law
from inference.bounds.validity import closed_form_sites
from inference.printed import Printed
from ppl_models.pair import ModelGuidePair, refuse_other_than_pair

THRESHOLD = 0.01
IDLE = 0.1  # nats that a unit whose law is the prior's, as a collapsed one's, may cost


class NoMeanError(ValueError):
    """A guide law without a mean; the message names site and law."""


@dataclass(frozen=True)
class SiteUnits:
    """The units of one latent site, its event dims flattened to d.

    ``variance`` ``[d]`` is A_u with the draws' noise taken off (it may fall below zero by chance), ``kl`` ``[d]`` the mean
    rate of each unit in nats, or None where it is not known in closed form.
    """

    site: str
    variance: Tensor
    kl: Tensor | None
    threshold: float

    @property
    def active(self) -> Tensor:
        """Which units are active, bool ``[d]``."""
        return self.variance > self.threshold

    @property
    def count(self) -> int:
        """How many units are active."""
        return int(self.active.sum())

    def words(self) -> str:
        """The site as a sentence, collapse named."""
        total = len(self.variance)
        text = f"site {self.site}: {self.count} of {total} units active"
        if self.count == total:
            return text
        most = None if self.kl is None else float(self.kl[~self.active].max())
        if self.count == 0:  # a unit whose mean hardly moves with x may still have a law that is not the prior's
            how = "" if most is not None and most > IDLE else "COLLAPSED, "
            text = f"site {self.site}: {how}none of {total} units is active"
        others = "they" if self.count == 0 else "the others"
        if most is None:
            return f"{text}; what {others} cost is not known in closed form"
        if most > IDLE:
            return f"{text}; {others} cost up to {most:.2g} nats each, for laws that differ from the prior's alike for all data"
        return f"{text}; {others} cost at most {most:.2g} nats each"


@dataclass(frozen=True, repr=False)
class ActiveUnits(Printed):
    """:class:`SiteUnits` by latent site, in the pair's order."""

    sites: dict[str, SiteUnits]

    def __getitem__(self, site: str) -> SiteUnits:
        return self.sites[site]

    @property
    def count(self) -> int:
        """Active units of all layers together."""
        return sum(site.count for site in self.sites.values())

    def table(self) -> str:
        """One line per site."""
        return self.words()

    def words(self) -> str:
        """One line per site."""
        return "\n".join(site.words() for site in self.sites.values())


def active_units(
    pair: ModelGuidePair, x: Tensor, threshold: float = THRESHOLD, *, num_particles: int = 20
) -> ActiveUnits:
    """Burda's active units of each latent site, with each unit's rate where that is closed.

    Args:
        pair: the programs.
        x: data ``[N, *data_shape]``, N >= 2.
        threshold: a unit is active if its variance over data is above.
        num_particles: draws of each datum, for layers whose law depends on other layers; at least 2.

    Returns:
        :class:`ActiveUnits`.

    Raises:
        NoMeanError: a latent's guide law has no mean.
        ValueError: fewer than two data or draws, or a threshold that is not positive.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # x does not depend on z[1]
        >>> pair = LinearGaussian(weight, torch.zeros(2), noise_scale=0.5)
        >>> print(active_units(pair, pair.model(size=100).detach()).words())
        site z: 1 of 2 units active; the others cost at most 0 nats each
    """
    refuse_other_than_pair(pair)
    if len(x) < 2 or num_particles < 2 or not threshold > 0:
        raise ValueError(
            f"expected at least 2 data, num_particles >= 2 and threshold > 0, got {len(x)}, {num_particles} and "
            f"{threshold}: activity is a variance over data"
        )
    means = {site: Moments() for site in pair.latent_sites}
    rates = {site: Moments() for site in pair.latent_sites}
    with torch.no_grad():
        plan = data_plan(pair, x)
        closed = closed_form_sites(pair.model, pair.guide, x)
        known = {
            site: site in closed and _diagonal_normals(site, plan.prototype) is not None for site in pair.latent_sites
        }
        for particles in plan.chunks(num_particles):
            for site in pair.latent_sites:
                law = particles.guide[site]["fn"]
                means[site].add(_units(_mean(site, law), law, particles))
                if known[site]:
                    rates[site].add(_units(_unit_kl(site, particles), law, particles).mean(1))
    return ActiveUnits(
        {
            site: SiteUnits(site, _variance(means[site]), rates[site].mean if known[site] else None, threshold)
            for site in pair.latent_sites
        }
    )


def _variance(means: Moments) -> Tensor:
    """Var_x over the N data of E_q[u | x], less what the draws' noise adds to it: (N - 1)/N times its mean square error."""
    noise = means.std_error.square().mean(0) * (1 - 1 / len(means.mean))
    return means.mean.var(0, correction=0) - noise


def _units(values: Tensor, law: Any, particles: Particles) -> Tensor:
    """``[K, B, d]`` from values of a site's batch and event shape."""
    values = values.broadcast_to(law.batch_shape + law.event_shape)
    values = values.unsqueeze(0) if particles.dim is None else values
    values = values.reshape(*values.shape[: values.dim() - len(law.event_shape)], -1)
    return values.expand(particles.count, *values.shape[1:])


def _mean(site: str, law: Any) -> Tensor:
    try:
        mean = law.mean
    except NotImplementedError:
        mean = torch.tensor(torch.nan)
    if bool(mean.isnan().any()):
        raise NoMeanError(
            f"expected a guide law with a mean at site {site!r}, got {type(law).__name__}: activity is the variance of "
            "means (one-hot classes have one, classes by number have none)"
        )
    return mean


def _diagonal_normals(site: str, particles: Particles) -> tuple[Any, Any] | None:
    """The base laws of guide and model, if both are diagonal Gaussians."""
    laws = [base_law(program[site]["fn"]) for program in (particles.guide, particles.model)]
    return (laws[0], laws[1]) if all(isinstance(law, torch.distributions.Normal) for law in laws) else None


def _unit_kl(site: str, particles: Particles) -> Tensor:
    """KL(N(mu_q, sigma_q) || N(mu_p, sigma_p)) of each unit, of the site's batch and event shape; nats."""
    laws = _diagonal_normals(site, particles)
    assert laws is not None  # seen in the prototype
    return torch.distributions.kl_divergence(*laws)
