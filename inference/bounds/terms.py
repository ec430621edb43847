"""What a decomposition of the bound returns: one term per site, each with its error and its reason.

    ELBO(x) = sum over sites of E_q[log p(site | parents) - log q(site | parents)]

A latent site's term is minus a rate (an expected KL), an observed site's term is minus a distortion, and a site that only
the guide has (an autoguide's auxiliary latent) contributes its -log q. All terms are in nats and of the shape [B] of the
plates that all sites share; they add up to the ELBO, which is maximised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from inference.printed import Printed

if TYPE_CHECKING:
    import xarray

Kind = Literal["latent", "observed", "factor", "auxiliary"]


@dataclass(frozen=True)
class SiteTerm:
    """E_q[log p - log q] of one site, in nats.

    ``monte_carlo`` and ``std_error`` come from draws. ``analytic`` is the site's own expectation in closed form with its
    parents still drawn, which is what ``analytic_std_error`` is the error of; both are None without a valid closed form.
    ``with_entropy`` is half a closed form, for latent sites without a whole one: E_q[log p] from draws, and -E_q[log q]
    from the conditional entropies of the guide's law, whose parents are drawn. It is None where it is not known or does not
    lower the variance. ``reason`` says in a sentence why a closed form is or is not used. ``z_score`` is the paired
    difference of Monte Carlo and the better estimate, averaged over data, in standard errors.
    """

    name: str
    kind: Kind
    monte_carlo: Tensor
    std_error: Tensor
    analytic: Tensor | None
    analytic_std_error: Tensor | None
    reason: str
    z_score: float | None = None
    with_entropy: Tensor | None = None
    with_entropy_std_error: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The better estimate: the closed form where there is one, else half of one, else Monte Carlo."""
        if self.analytic is not None:
            return self.analytic
        return self.monte_carlo if self.with_entropy is None else self.with_entropy

    @property
    def value_std_error(self) -> Tensor:
        """Standard error of :attr:`value`."""
        if self.analytic_std_error is not None:
            return self.analytic_std_error
        return self.std_error if self.with_entropy_std_error is None else self.with_entropy_std_error


@dataclass(frozen=True, repr=False)
class Decomposition(Printed, Mapping[str, SiteTerm]):
    """Terms by site; ``d[site]`` is a :class:`SiteTerm`, ``d.elbo`` their sum.

    ``elbo`` and ``std_error`` use the better estimate of each term, ``monte_carlo`` and ``monte_carlo_std_error`` draws
    alone; all have the shape [B]. The best of each term is not always the best sum: near the posterior the errors of the
    drawn terms cancel, and the sum of draws alone has the smaller error. ``mean_std_error`` is the error of the mean of
    ``elbo`` over data. Errors are computed from whole particles, so correlations between terms are in them.
    """

    terms: dict[str, SiteTerm]
    elbo: Tensor
    std_error: Tensor
    monte_carlo: Tensor
    monte_carlo_std_error: Tensor
    mean_std_error: float
    monte_carlo_mean_std_error: float
    plates: tuple[str, ...]
    num_particles: int
    note: str

    @property
    def sites(self) -> tuple[str, ...]:
        """Site names in the model's order, then those that only the guide has."""
        return tuple(self.terms)

    def __getitem__(self, site: str) -> SiteTerm:
        if site not in self.terms:
            raise KeyError(f"expected a site among {', '.join(self.terms)}, got {site!r}")
        return self.terms[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    @property
    def rate(self) -> Tensor:
        """Minus the sum of latent and auxiliary terms, nats ``[B]``: what the latents cost."""
        return -self._sum("latent", "auxiliary")

    @property
    def distortion(self) -> Tensor:
        """Minus the sum of observed terms, nats ``[B]``: what is lost in reconstruction."""
        return -self._sum("observed")

    def _sum(self, *kinds: str) -> Tensor:
        return sum((t.value for t in self.terms.values() if t.kind in kinds), torch.zeros_like(self.elbo))

    def table(self) -> str:
        """The terms as text: site, closed form, Monte Carlo with its error, z, and which was used."""
        from inference.views.tables import decomposition_table

        return decomposition_table(self)

    def to_dataset(self) -> xarray.Dataset:
        """The terms as an ``xarray.Dataset`` with dims ``site`` and the shared plates; nats."""
        import xarray

        def stacked(values: list[Tensor | None]) -> Any:
            nan = torch.full_like(self.elbo, float("nan"))
            return torch.stack([nan if v is None else v for v in values]).cpu().numpy()

        terms = list(self.terms.values())
        dims = ("site", *self.plates)
        return xarray.Dataset(
            {
                "monte_carlo": (dims, stacked([t.monte_carlo for t in terms])),
                "std_error": (dims, stacked([t.std_error for t in terms])),
                "analytic": (dims, stacked([t.analytic for t in terms])),
                "analytic_std_error": (dims, stacked([t.analytic_std_error for t in terms])),
                "with_entropy": (dims, stacked([t.with_entropy for t in terms])),
                "with_entropy_std_error": (dims, stacked([t.with_entropy_std_error for t in terms])),
                "elbo": (self.plates, self.elbo.cpu().numpy()),
                "elbo_std_error": (self.plates, self.std_error.cpu().numpy()),
                "kind": ("site", [t.kind for t in terms]),
                "reason": ("site", [t.reason for t in terms]),
            },
            coords={
                "site": list(self.terms),
                **{p: range(n) for p, n in zip(self.plates, self.elbo.shape, strict=True)},
            },
            attrs={"units": "nats", "num_particles": self.num_particles, "note": self.note},
        )
