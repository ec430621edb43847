"""Losses of pairs whose latents are categorical: what they share, and the gradient by the score function.

With f(z) the drawn part of the bound and q = q_phi(z | x), the gradient of E_q[f(z)] in phi is

    score function     (1/S) sum_s (f(z_s) - mean_{r != s} f(z_r)) dlog q(z_s)      unbiased; S >= 2 draws

(Kool et al. 2019, *Buy 4 REINFORCE samples, get a baseline for free!*). The sum over all z, without noise, is in
:mod:`inference.training.enumerated_objective`; biased gradients of low variance are in
:mod:`inference.training.relaxed_objective`. KL terms known in closed form are exact.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from inference.bounds.closed_forms import site_divergence
from inference.bounds.sites import PairError, Site, is_deterministic, sample_sites
from inference.bounds.whole_densities import unmasked
from inference.training.objectives import ElboLoss, check_precision
from ppl_models.pair import ModelGuidePair


class DiscreteLoss(ElboLoss):
    """What estimators for categorical latents share: checks that do not ask for reparameterised draws, and each site's term."""

    reported_draws = 2

    def _prepare(self, x: Tensor) -> None:
        """Decides which closed forms are terms, as :class:`ElboLoss` does, and checks the latents for the estimator."""
        plan, found = self._examine(x)
        if plan.shape != x.shape[:1]:
            raise PairError(
                f"expected every site inside one data plate, of size {len(x)} at dim -1, got sites that share plates of "
                f"sizes {list(plan.shape)}: put all sites, and nothing else, inside it"
            )
        latents = {
            name: site
            for name, site in plan.prototype.guide.items()
            if not site["is_observed"] and not is_deterministic(site)
        }
        closed = found.certain
        reasons = {name: found.reasons.get(name, "") for name in latents if name not in closed}
        alone = {name: "only the guide has it" for name in latents if name not in plan.prototype.model}
        self._check_latents(latents, reasons | alone)
        check_precision(
            [*plan.prototype.model.values(), *latents.values()], frozenset(closed) - self._weighing(latents)
        )
        self._check_particles(plan)
        self.nesting = plan.nesting
        self.closed_sites = frozenset(closed) & frozenset(latents)

    def _check_latents(self, latents: dict[str, Site], without_closed_form: dict[str, str]) -> None:
        """Refuses latents that the estimator cannot take."""

    def _weighing(self, latents: dict[str, Site]) -> set[str]:
        """Latents whose probabilities weigh the terms, closed form or not."""
        return {name for name, site in latents.items() if not site["fn"].has_rsample}

    def _traces(
        self, x: Tensor, in_guide: AbstractContextManager[Any] | None = None
    ) -> tuple[poutine.Trace, poutine.Trace]:
        """Draws from the guide, under a handler if given, and the model replayed on them."""
        with in_guide or nullcontext():
            guide = poutine.trace(self.pair.guide).get_trace(x)
        return guide, poutine.trace(poutine.replay(self.pair.model, trace=guide)).get_trace(x)

    def _site_terms(self, guide: poutine.Trace, model: poutine.Trace) -> dict[str, Tensor]:
        """Each site's term at these draws, of the site's batch shape."""
        q_sites, terms = sample_sites(guide), {}
        for name, site in sample_sites(model).items():
            if is_deterministic(site):
                continue
            if name in (self.closed_sites or ()):
                terms[name] = -site_divergence(q_sites[name], site)
            elif site["is_observed"]:
                terms[name] = log_prob_of(site)
            else:
                terms[name] = log_prob_of(site) - log_prob_of(q_sites[name])
        for name, site in q_sites.items():
            if name not in model.nodes and not is_deterministic(site):
                terms[name] = -log_prob_of(site)
        return terms

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        return {name: self._per_datum(term) for name, term in self._site_terms(*self._traces(x)).items()}


class ScoreFunctionLoss(DiscreteLoss):
    """-ELBO(x) with the score-function gradient and, for each draw, the mean of the others as baseline ("RLOO").

    d E_q[f] = E[(1/S) sum_s (f(z_s) - mean_{r != s} f(z_r)) dlog q(z_s)] + E_q[df], without bias, for each site's term
    f by itself; Mnih and Rezende 2016 (arXiv:1602.06725); Kool et al. 2019.

    Args:
        pair: any pair; latents that are reparameterised keep their pathwise gradient.
        num_particles: S >= 2 draws per datum.

    Raises:
        ValueError: ``num_particles`` below two.
        PairError: at the first call, for sites that do not match, or one outside the data plate.

    Example:
        >>> from ppl_models.discrete_vae import CategoricalVAE
        >>> from ppl_models.likelihoods import Bernoulli
        >>> vae = CategoricalVAE.preset((3,), Bernoulli(), num_latents=30, num_classes=8, hidden=(4,))
        >>> ScoreFunctionLoss(vae, num_particles=8)(torch.ones(2, 3)).shape
        torch.Size([2])
    """

    def __init__(self, pair: ModelGuidePair, num_particles: int = 4) -> None:
        super().__init__(pair, num_particles=num_particles)
        if self.num_particles < 2:
            raise ValueError(
                f"expected num_particles >= 2, got {num_particles}: the baseline of each draw is the mean of the others"
            )

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        guide, model = self._traces(x)
        log_q = [
            self._per_datum(log_probability(site))
            for site in sample_sites(guide).values()
            if not site["is_observed"] and not site["fn"].has_rsample
        ]
        terms = {name: self._per_datum(term) for name, term in self._site_terms(guide, model).items()}  # [S, B]
        if not log_q:
            return terms
        score = torch.stack(log_q).sum(0)
        score = score - score.detach()  # zero, with the gradient of log q
        for name, term in terms.items():
            others = (term.sum(0) - term) / (self.num_particles - 1)
            terms[name] = term + (term - others).detach() * score
        return terms


def log_probability(site: Site) -> Tensor:
    """log q of the value drawn, which its mask does not change."""
    log_prob: Tensor = unmasked(site["fn"]).log_prob(site["value"])
    return log_prob


def log_prob_of(site: Site) -> Tensor:
    """Log-density of a site's value, scaled and masked."""
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
