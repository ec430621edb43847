"""Losses of pairs whose latents are categorical: the same -ELBO, its gradient by enumeration or by the score function.

With f(z) the drawn part of the bound and q = q_phi(z | x), the gradient of E_q[f(z)] in phi is

    enumeration        sum_z f(z) dq(z)                                      exact; K^M evaluations of f
    score function     (1/S) sum_s (f(z_s) - mean_{r != s} f(z_r)) dlog q(z_s)      unbiased; S >= 2 draws

(Kool et al. 2019, *Buy 4 REINFORCE samples, get a baseline for free!*); biased ones of lower variance are in
:mod:`inference.training.relaxed_objective`. KL terms known in closed form are exact.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import config_enumerate
from torch import Tensor

from inference.bounds.closed_forms import law_name, site_divergence
from inference.bounds.sites import PairError, Site, is_deterministic, sample_sites
from inference.bounds.whole_densities import unmasked
from inference.training.objectives import ElboLoss
from ppl_models.discrete_vae import MAX_STATES, TooManyStatesError
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
        self._check_latents(latents, {name: found.reasons.get(name, "") for name in latents if name not in closed})
        self._check_particles(plan)
        self.nesting = plan.nesting
        self.closed_sites = frozenset(closed) & frozenset(latents)

    def _check_latents(self, latents: dict[str, Site], without_closed_form: dict[str, str]) -> None:
        """Refuses latents that the estimator cannot take."""

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
                terms[name] = _log_prob(site)
            else:
                terms[name] = _log_prob(site) - _log_prob(q_sites[name])
        for name, site in q_sites.items():
            if name not in model.nodes and not is_deterministic(site):
                terms[name] = -_log_prob(site)
        return terms

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        return {name: self._per_datum(term) for name, term in self._site_terms(*self._traces(x)).items()}


class EnumeratedLoss(DiscreteLoss):
    """-ELBO(x) with the expectation over all values of the discrete latents; the others, if any, are drawn.

    With y the latents that can be enumerated and z those that cannot, and h(y, z) = log p(x, y, z) - log q(y, z | x),

        ELBO(x) = E_{q(z | x)} sum_y q(y | x, z) h(y, z),  or  sum_y q(y | x) E_{q(z | x, y)} h(y, z),

    site by site, in whatever order the guide has them. Without z: exact in value and gradient, no noise. With z: pathwise
    gradients in z, each y with draws of its own where z depends on it, as in Kingma et al. 2014 (arXiv:1406.5298), eq. 7.

    Both programs run once, with each y in a dim of its own on the left: values of y have shape ``[K, 1]``, and what depends
    on y ``[K, B]``.

    Args:
        pair: a pair whose latents can be enumerated or are reparameterised; its parameters are this module's parameters.
        num_particles: draws of z per datum, averaged; 1 where there is no z.

    Raises:
        PairError: at the first call, for a latent that can be neither enumerated nor reparameterised, sites that do not match,
            programs that do not take leading dims, or several draws where there is nothing to draw.
        TooManyStatesError: at the first call, for more than 65,536 values together.

    Example:
        >>> from ppl_models.discrete_vae import CategoricalVAE
        >>> from ppl_models.likelihoods import Bernoulli
        >>> vae = CategoricalVAE.preset((3,), Bernoulli(), num_latents=2, num_classes=3, hidden=(4,))
        >>> x = torch.ones(2, 3)
        >>> loss = EnumeratedLoss(vae)
        >>> bool((loss(x) == loss(x)).all()), bool((-loss(x) <= vae.log_evidence(x)).all())
        (True, True)
    """

    def _check_latents(self, latents: dict[str, Site], without_closed_form: dict[str, str]) -> None:
        enumerated, states = [], 1
        for name, site in latents.items():
            try:
                states *= len(site["fn"].enumerate_support(expand=False))
                enumerated.append(name)
            except NotImplementedError as error:
                if site["fn"].has_rsample:
                    continue
                raise PairError(
                    f"expected latents that can be enumerated or are reparameterised, got {law_name(site['fn'])} at site "
                    f'{name!r}: use ScoreFunctionLoss, in fit objective="score_function"'
                ) from error
        if not enumerated:
            raise PairError(
                f"expected a latent that can be enumerated, got none among {', '.join(latents)}: use ElboLoss, in fit "
                'objective="elbo"'
            )
        if states > MAX_STATES:
            raise TooManyStatesError(
                f"expected at most {MAX_STATES} values to sum over, got {states} of {', '.join(enumerated)} together: use an "
                "estimator that draws"
            )
        if self.num_particles > 1 and len(enumerated) == len(latents):
            raise PairError(
                f"expected num_particles=1 where all latents are enumerated and nothing is drawn, got {self.num_particles}"
            )

    def _at_once(self, draws: int) -> str:
        return "all values of a latent are taken"

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        plates = self.nesting + (self.num_particles > 1)
        enumerated = poutine.enum(config_enumerate(self.pair.guide), first_available_dim=-1 - plates)
        guide = poutine.trace(enumerated).get_trace(x)
        model = poutine.trace(poutine.replay(self.pair.model, trace=guide)).get_trace(x)
        log_q = sum(_log_probability(site) for site in sample_sites(guide).values() if _is_enumerated(site))
        weights = torch.as_tensor(log_q).exp()  # [*values of each latent, *draws, B]
        terms = {}
        for name, term in self._site_terms(guide, model).items():
            if term.dim() > plates:  # otherwise the same for all values, whose weights sum to one
                weighted = weights * term
                term = weighted.sum(list(range(weighted.dim() - plates)))
            terms[name] = self._per_datum(term)
        return terms


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
            self._per_datum(_log_probability(site))
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


def _is_enumerated(site: Site) -> bool:
    return not site["is_observed"] and site["infer"].get("_enumerate_dim") is not None


def _log_probability(site: Site) -> Tensor:
    """log q of the value drawn, which its mask does not change."""
    log_prob: Tensor = unmasked(site["fn"]).log_prob(site["value"])
    return log_prob


def _log_prob(site: Site) -> Tensor:
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
