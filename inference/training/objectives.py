"""Differentiable losses of a pair: nats per datum, to be minimised.

    ElboLoss(x) = -ELBO(x) = -sum over sites of E_q[log p(site | parents) - log q(site | parents)]

One guide trace and one replayed model trace a call, no ``.item()``, no validation of its own. Sites whose closed-form KL
is the term itself (decided once, by the same tests as :func:`inference.decompose_elbo`) contribute -KL; the others
log p - log q at the draw. Gradients are pathwise, so every latent must be reparameterised.

The one constraint: every site is inside the data plate at dim -1, so that each term has a value for each datum.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from inference.bounds.closed_forms import site_divergence
from inference.bounds.particles import Plan, forked_rng, make_plan
from inference.bounds.sites import PairError, Site, is_deterministic
from inference.bounds.validity import ClosedForms, find_closed_forms
from inference.bounds.vectorizing import obstacle_to_vectorizing
from inference.bounds.whole_densities import refuse_parts
from ppl_models.arguments import whole_count
from ppl_models.evaluation_mode import evaluating
from ppl_models.pair import ModelGuidePair, refuse_other_than_pair


class NotReparameterizedError(ValueError):
    """A latent site whose draws carry no gradient; the message names it."""


class PrecisionError(ValueError):
    """A log-density that comes out in half precision; the message names the site."""


class TrainingStep(NamedTuple):
    """What one training step sees: each site's term of the bound ``[B]`` nats, and what is minimised ``[B]``.

    ``objective`` is None where it is the bound itself, which :func:`training_objective` may weight by site.
    """

    objective: Tensor | None
    terms: dict[str, Tensor]


class ElboLoss(nn.Module):
    """-ELBO(x) of a pair as a module: ``loss(x)`` is ``[B]`` nats, to be minimised.

    Kingma and Welling 2013 (arXiv:1312.6114), eq. 7 with closed-form KL and eq. 6 without; lecture notes 004, Theorem 1.

    Args:
        pair: the model/guide pair; its parameters are this module's parameters.
        num_particles: K >= 1 draws per datum, averaged.
        closed_form: use -KL(q || p) at the sites where it equals the term; False draws every term.

    The first call decides which closed forms are used and checks the pair, on draws of its own.

    Raises:
        ValueError: ``num_particles`` that is no whole number >= 1; at the first call, data that the pair cannot have made.
        NotReparameterizedError: at the first call, for a latent whose guide law has no ``rsample``.
        PairError: at the first call, for sites that do not match, one outside the data plate, or one that makes no bound: a
            latent that is masked in one program alone, a factor of the guide. Scales weigh the terms, as in Pyro. For several
            draws, also programs that do not take any number of leading dims.
        PrecisionError: at the first call, for a log-density in half precision.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> x = pair.model(size=4).detach()
        >>> loss = ElboLoss(pair, closed_form=False)  # the guide is the posterior: every draw gives the evidence
        >>> bool(torch.allclose(-loss(x), pair.log_evidence(x), atol=1e-4))
        True
    """

    takes_scales = True  # poutine.scale and subsampled plates, as weights of the terms
    reported_draws = 1  # at once, for the bound that `fit` reports where this loss trains

    def __init__(self, pair: ModelGuidePair, num_particles: int = 1, closed_form: bool = True) -> None:
        super().__init__()
        refuse_other_than_pair(pair)
        self.pair = pair
        self.num_particles = whole_count("num_particles", num_particles)
        self.closed_form = closed_form
        self.closed_sites: frozenset[str] | None = None
        self.nesting = 1

    def forward(self, x: Tensor) -> Tensor:
        """-ELBO of each datum of ``x`` ``[B, *data_shape]``: ``[B]`` nats."""
        return -sum_terms(self.terms(x))

    @property
    def latents(self) -> tuple[str, ...]:
        """Which of :meth:`terms` are latent sites, whose terms are minus a rate."""
        return self.pair.latent_sites

    def step(self, x: Tensor) -> TrainingStep:
        """What a training step of :func:`inference.fit` minimises and reports."""
        return TrainingStep(None, self.terms(x))

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        """Each site's term E_q[log p - log q], ``[B]`` nats, differentiable; their sum is the ELBO.

        The model's sites come in its order, a latent's term being minus its rate; then sites that only the guide has
        (auxiliary ones), with -log q.
        """
        if self.closed_sites is None:
            self._prepare(x)
        if self.num_particles == 1:
            return self._terms(x)
        with pyro.plate("_particles", self.num_particles, dim=-1 - self.nesting):
            return {name: term.mean(0) for name, term in self._terms(x).items()}

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        with self.pair.unannounced():
            guide = poutine.trace(self.pair.guide).get_trace(x)
            model = poutine.trace(poutine.replay(self.pair.model, trace=guide)).get_trace(x)
        terms = {}
        for name, site in model.nodes.items():
            if not _is_random(site):
                continue
            if name in (self.closed_sites or ()):
                term = -site_divergence(guide.nodes[name], site)
            elif site["is_observed"]:
                term = _log_prob(site)
            else:
                term = _log_prob(site) - _log_prob(guide.nodes[name])
            terms[name] = self._per_datum(term)
        for name, site in guide.nodes.items():
            if _is_random(site) and name not in model.nodes:
                terms[name] = self._per_datum(-_log_prob(site))
        return terms

    def _per_datum(self, term: Tensor) -> Tensor:
        """Sums over plates inside a datum: keeps the data plate, at -1, and the particle plate where there is one."""
        if self.num_particles == 1:
            return term.sum(list(range(term.dim() - 1))) if term.dim() > 1 else term
        if term.dim() <= self.nesting:  # a constant of the draw: no particle plate
            term = term.expand(self.num_particles, *[1] * (self.nesting - term.dim()), *term.shape)
        return term.sum(list(range(1, term.dim() - 1))) if term.dim() > 2 else term

    def _examine(self, x: Tensor) -> tuple[Plan, ClosedForms]:
        """One draw of both programs, and which sites have a valid closed form there.

        The caller's random state and the networks' running statistics are left as they were: a resumed run prepares at
        another step than the first did, and must go on the same all the same.
        """
        self.pair.check_data(x)
        with torch.no_grad(), forked_rng(), evaluating(self.pair):
            plan = make_plan(self.pair.model, self.pair.guide, (x,), {}, vectorize=False)
            sites = plan.prototype.model, plan.prototype.guide
            refuse_parts(*sites, "for a loss that is minus a bound of log p(x)", with_scales=not self.takes_scales)
            return plan, find_closed_forms(plan) if self.closed_form else ClosedForms()

    def _prepare(self, x: Tensor) -> None:
        """Checks the pair and decides which closed forms are terms."""
        plan, found = self._examine(x)
        closed = found.certain
        model, guide = (
            {name: site for name, site in sites.items() if not is_deterministic(site)}
            for sites in (plan.prototype.model, plan.prototype.guide)
        )
        for name, site in [*model.items(), *guide.items()]:
            _check_plate(name, site, len(x))
        check_precision([*model.values(), *guide.values()], closed)
        for name, site in guide.items():
            if not site["is_observed"] and not site["fn"].has_rsample:
                latents = [each["fn"] for each in guide.values() if not each["is_observed"]]
                raise NotReparameterizedError(
                    f"expected reparameterised latents, got {type(site['fn']).__name__} at site {name!r}, whose draws carry "
                    f"no gradient: {_other_losses(latents)}"
                )
        self._check_particles(plan)
        self.nesting = plan.nesting
        self.closed_sites = frozenset(closed) & frozenset(guide)

    def _at_once(self, draws: int) -> str:
        """What leading dims hold, for messages."""
        return f"{draws} draws are made"

    def _check_particles(self, plan: Plan) -> None:
        """Refuses programs whose draws cannot be made at once, where there are several; nothing of the caller's changes."""
        draws = max(self.num_particles, self.reported_draws)
        if draws == 1:
            return
        with torch.no_grad(), forked_rng(), evaluating(self.pair):
            obstacle = obstacle_to_vectorizing(plan, share_subsample=True)
        if obstacle:
            raise PairError(
                f"expected programs that run under an outer particle plate, for {self._at_once(draws)} at once, but "
                f"{obstacle}: let both take any number of leading dims, as z[..., 0] does and z[:, 0] does not"
                f"{', or take a loss of one draw' if self.reported_draws == 1 else ''}"
            )


def check_precision(sites: Iterable[Site], closed: Collection[str]) -> None:
    """Refuses log-densities in half precision, but for sites in ``closed``, of which none is used."""
    for site in sites:
        if site["log_prob"].dtype in (torch.bfloat16, torch.float16) and site["name"] not in closed:
            raise PrecisionError(
                f"expected log-densities in float32 at least, got {site['log_prob'].dtype} at site {site['name']!r}: convert "
                "the law's parameters in the program, as in loc.float(), or train in precision 32-true"
            )


def sum_terms(terms: dict[str, Tensor]) -> Tensor:
    """The ELBO ``[B]`` from its terms."""
    return torch.stack(list(terms.values())).sum(0)


def training_objective(
    terms: dict[str, Tensor],
    latents: tuple[str, ...],
    rate_weight: float | Sequence[float] = 1.0,
    free_bits: float = 0.0,
    batch_size: int | None = None,
    all_sum: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:
    """What is minimised while training: distortion + rate_weight * sum over latents of max(rate, free_bits), batch means.

    With ``rate_weight`` = 1 and ``free_bits`` = 0 it is the batch mean of -ELBO. KL warm-up: Bowman et al. 2016
    (arXiv:1511.06349); free bits, one group a site: Kingma et al. 2016 (arXiv:1606.04934), eq. 15. Neither is part of any
    *reported* bound.

    Args:
        terms: each site's term, ``[b]`` nats, as from :meth:`ElboLoss.terms`.
        latents: which of them are latent.
        rate_weight: in [0, 1] during warm-up, 1 afterwards; or one for each of ``latents``.
        free_bits: lambda >= 0, nats; a site whose mean rate is below has no gradient from it.
        batch_size: B of the whole batch, of which ``terms`` may be one process's share; None: b.
        all_sum: sums a tensor over processes.

    Returns:
        This process's share of the objective, a scalar in nats; shares add up to the objective.

    Example:
        >>> terms = {"z": torch.tensor([-1.0, -3.0]), "x": torch.tensor([-10.0, -12.0])}
        >>> float(training_objective(terms, ("z",))), float(training_objective(terms, ("z",), free_bits=2.5))
        (13.0, 13.5)
    """
    size = batch_size or len(next(iter(terms.values())))
    share = len(next(iter(terms.values()))) / size
    objective = -torch.stack([term.sum() for name, term in terms.items() if name not in latents]).sum() / size
    if not any(name in latents for name in terms):
        return objective
    rates = -torch.stack([terms[name].sum() for name in latents if name in terms]) / size
    if free_bits > 0:
        pressed = all_sum(rates.detach().float()) > free_bits
        rates = torch.where(pressed, rates, torch.full_like(rates, free_bits * share))
    if isinstance(rate_weight, Sequence):
        return objective + sum(weight * rate for weight, rate in zip(rate_weight, rates, strict=True))
    return objective + rate_weight * rates.sum()


def rate_weight(step: int, warmup: float) -> float:
    """Weight of the rate in the objective (KL warm-up) after ``step`` steps: from 0 to 1 over ``warmup`` steps, then 1.

    Example:
        >>> rate_weight(0, 4), rate_weight(3, 4), rate_weight(9, 4), rate_weight(0, 0)
        (0.0, 0.75, 1.0, 1.0)
    """
    return 1.0 if step >= warmup else step / warmup


def join_idle(num_latents: int, all_sum: Callable[[Tensor], Tensor]) -> None:
    """What a process whose share of the batch is empty does in place of :func:`training_objective` with free bits.

    The others wait for its part of the mean rates.
    """
    all_sum(torch.zeros(num_latents, dtype=torch.float32))


def _other_losses(laws: Iterable[Any]) -> str:
    """Which losses take latents of these laws."""
    if all(law.has_enumerate_support or law.has_rsample for law in laws):
        return 'use EnumeratedLoss or ScoreFunctionLoss, in fit objective="enumeration" or "score_function"'
    return 'use ScoreFunctionLoss, in fit objective="score_function"'


def _check_plate(name: str, site: Site, size: int) -> None:
    if not any(frame.vectorized and frame.dim == -1 and frame.size == size for frame in site["cond_indep_stack"]):
        raise PairError(
            f"expected every site inside the data plate, of size {size} at dim -1, got site {name!r} outside it: put it "
            "inside, or train with pyro.infer.SVI"
        )


def _is_random(site: Site) -> bool:
    return site["type"] == "sample" and not site_is_subsample(site) and not is_deterministic(site)


def _log_prob(site: Site) -> Tensor:
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
