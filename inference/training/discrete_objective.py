"""Losses of pairs whose latents are categorical: the same -ELBO, its gradient by four estimators.

With f(z) the drawn part of the bound and q = q_phi(z | x), the gradient of E_q[f(z)] in phi is

    enumeration        sum_z f(z) dq(z)                                      exact; K^M evaluations of f
    score function     (1/S) sum_s (f(z_s) - mean_{r != s} f(z_r)) dlog q(z_s)      unbiased; S >= 2 draws
    Gumbel-softmax     df(y)/dphi,  y = softmax((log q + g) / tau),  g ~ Gumbel(0, 1)     biased; low variance
    straight-through   df/dz at z = onehot(argmax y), times dy/dphi                  biased; low variance

(Kool et al. 2019, *Buy 4 REINFORCE samples, get a baseline for free!*; Jang et al. 2016, arXiv:1611.01144, eqs. 1 to 3, and
Maddison et al. 2016, arXiv:1611.00712). As tau falls to 0 the relaxed gradients' bias falls and their variance grows;
:class:`Annealing` takes tau there during training. KL terms known in closed form are exact in all four.

Each loss's *value* is the bound of the discrete pair, never the relaxed one's: where the gradient comes from a relaxed z, the
value comes from draws of the guide itself.

The one constraint: a relaxed z must be one-hot in the program (as in :class:`ppl_models.discrete_vae.CategoricalVAE`), and
its KL known in closed form, for a relaxed z has no probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import config_enumerate
from pyro.poutine.messenger import Messenger
from torch import Tensor

from inference.bounds.closed_forms import law_name, site_divergence
from inference.bounds.particles import forked_rng, make_plan
from inference.bounds.sites import PairError, Site, is_deterministic, sample_sites
from inference.bounds.validity import ClosedForms, find_closed_forms
from inference.training.objectives import ElboLoss
from ppl_models.discrete_vae import MAX_STATES, TooManyStatesError, one_hot
from ppl_models.pair import ModelGuidePair


@dataclass(frozen=True)
class Annealing:
    """Temperature by step: tau(s) = start (end / start)^(s / steps), and ``end`` from step ``steps`` on.

    The exponential schedule of Jang et al. 2016 (arXiv:1611.01144), section 4, by its end points.

    Args:
        start: tau before the first step, > 0.
        end: tau after ``steps``, > 0.
        steps: >= 1.

    Raises:
        ValueError: a temperature that is not positive and finite, or ``steps`` below one.

    Example:
        >>> tau = Annealing(start=1.0, end=0.25, steps=100)
        >>> tau(0), tau(50), tau(1000)
        (1.0, 0.5, 0.25)
    """

    start: float = 1.0
    end: float = 0.5
    steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected a positive finite temperature {name}, got {getattr(self, name)}")
        if self.steps < 1:
            raise ValueError(f"expected steps >= 1, got {self.steps}: for one temperature throughout, pass a number")

    def __call__(self, step: int) -> float:
        """Tau after ``step`` steps."""
        return self.start * (self.end / self.start) ** min(1.0, step / self.steps)


class _DiscreteLoss(ElboLoss):
    """What the four have in common: checks that do not ask for reparameterised latents, and each site's term."""

    def _prepare(self, x: Tensor) -> None:
        """Decides which closed forms are terms, as :class:`ElboLoss` does, and checks the latents for the estimator."""
        modes = [(module, module.training) for module in self.pair.modules()]
        self.pair.eval()
        try:
            with torch.no_grad(), forked_rng():
                plan = make_plan(self.pair.model, self.pair.guide, (x,), {}, vectorize=False)
                found = find_closed_forms(plan) if self.closed_form else ClosedForms()
        finally:
            for module, mode in modes:
                module.training = mode
        if plan.shape != x.shape[:1]:
            raise PairError(
                f"expected every site inside one data plate, of size {len(x)} at dim -1, got sites that share plates of "
                f"sizes {list(plan.shape)}: put all sites, and nothing else, inside it"
            )
        closed = {} if found.structure_may_change else found.exact
        latents = {
            name: site
            for name, site in plan.prototype.guide.items()
            if not site["is_observed"] and not is_deterministic(site)
        }
        self._check_latents(latents, {name: found.reasons.get(name, "") for name in latents if name not in closed})
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


class EnumeratedLoss(_DiscreteLoss):
    """-ELBO(x) with the expectation over all values of the latents: exact in value and gradient, no noise.

    sum_z q(z | x) [log p(x, z) - log q(z | x)], site by site.

    Args:
        pair: a pair whose latents can all be enumerated; its parameters are this module's parameters.

    Raises:
        PairError: at the first call, for a latent that cannot be enumerated, or sites that do not match.
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

    def __init__(self, pair: ModelGuidePair) -> None:
        super().__init__(pair)

    def _check_latents(self, latents: dict[str, Site], without_closed_form: dict[str, str]) -> None:
        states = 1
        for name, site in latents.items():
            try:
                states *= len(site["fn"].enumerate_support(expand=False))
            except NotImplementedError as error:
                raise PairError(
                    f"expected latents that can be enumerated, got {law_name(site['fn'])} at site {name!r}: use another "
                    "estimator"
                ) from error
        if states > MAX_STATES:
            raise TooManyStatesError(
                f"expected at most {MAX_STATES} values to sum over, got {states} of {', '.join(latents)} together: use an "
                "estimator that draws"
            )

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        enumerated = poutine.enum(config_enumerate(self.pair.guide), first_available_dim=-1 - self.nesting)
        guide = poutine.trace(enumerated).get_trace(x)
        model = poutine.trace(poutine.replay(self.pair.model, trace=guide)).get_trace(x)
        log_q = sum(_log_prob(site) for site in sample_sites(guide).values() if not site["is_observed"])
        weights = torch.as_tensor(log_q).exp()  # [*values of each latent, B]
        terms = {}
        for name, term in self._site_terms(guide, model).items():
            weighted = weights * term if term.dim() > 1 else term  # the same for all values: their weights sum to one
            terms[name] = weighted.sum(list(range(weighted.dim() - 1))) if weighted.dim() > 1 else weighted
        return terms


class ScoreFunctionLoss(_DiscreteLoss):
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
        if num_particles < 2:
            raise ValueError(
                f"expected num_particles >= 2, got {num_particles}: the baseline of each draw is the mean of the others"
            )
        super().__init__(pair, num_particles=num_particles)

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        guide, model = self._traces(x)
        log_q = [
            self._per_datum(_log_prob(site))
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


class GumbelSoftmaxLoss(_DiscreteLoss):
    """-ELBO(x) with the gradient through a relaxed z; its value comes from draws of the discrete guide.

    y = softmax((log q + g) / tau), g ~ Gumbel(0, 1): Jang et al. 2016 (arXiv:1611.01144), eq. 2; Maddison et al. 2016
    (arXiv:1611.00712). Two evaluations of the decoder a draw, one of them without gradient.

    Args:
        pair: a pair whose latents are one-hot, each with its KL in closed form.
        num_particles: draws per datum, averaged.
        temperature: tau > 0, or how it falls with the step; see :meth:`anneal`.

    Raises:
        ValueError: a temperature that is not positive and finite, or ``num_particles`` below one.
        PairError: at the first call, for a latent that is not one-hot or has no KL in closed form, or sites that do not
            match.

    Example:
        >>> from ppl_models.discrete_vae import CategoricalVAE
        >>> from ppl_models.likelihoods import Bernoulli
        >>> vae = CategoricalVAE.preset((3,), Bernoulli(), num_latents=30, num_classes=8, hidden=(4,))
        >>> loss = GumbelSoftmaxLoss(vae, temperature=Annealing(1.0, 0.5, steps=10))
        >>> loss.anneal(10)
        >>> float(loss.temperature), loss(torch.ones(2, 3)).shape
        (0.5, torch.Size([2]))
    """

    temperature: Tensor

    def __init__(self, pair: ModelGuidePair, num_particles: int = 1, temperature: float | Annealing = 1.0) -> None:
        super().__init__(pair, num_particles=num_particles)
        self.schedule = temperature if isinstance(temperature, Annealing) else Annealing(temperature, temperature)
        self.register_buffer(
            "temperature", torch.tensor(self.schedule(0)), False
        )  # a traced loss reads it anew each step

    def anneal(self, step: int) -> None:
        """Sets tau for the step after ``step`` steps."""
        self.temperature.fill_(self.schedule(step))

    def _check_latents(self, latents: dict[str, Site], without_closed_form: dict[str, str]) -> None:
        for name, site in latents.items():
            if _one_hot(site["fn"]) is None:
                raise PairError(
                    f"expected one-hot latents to relax, got {law_name(site['fn'])} at site {name!r}: use OneHotCategorical, "
                    "or another estimator"
                )
        for name, reason in without_closed_form.items():
            raise PairError(
                f"expected a KL in closed form at every relaxed site, got none at {name!r} ({reason}): use another estimator"
            )

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            drawn = super()._terms(x)
        relaxed = self._relaxed_terms(x)
        return {name: drawn[name].detach() + (term - term.detach()) for name, term in relaxed.items()}

    def _relaxed_terms(self, x: Tensor) -> dict[str, Tensor]:
        """Each site's term at relaxed draws."""
        traces = self._traces(x, _Replaced(self._relax))
        return {name: self._per_datum(term) for name, term in self._site_terms(*traces).items()}

    def _relax(self, law: Any) -> Tensor:
        """A reparameterised stand-in for a draw of a one-hot law."""
        return dist.RelaxedOneHotCategorical(self.temperature, logits=law.logits).rsample()


class StraightThroughLoss(GumbelSoftmaxLoss):
    """-ELBO(x) at one-hot draws, with the gradient of z replaced by that of the relaxed y behind it.

    z = onehot(argmax y) forwards, dz := dy backwards; straight-through Gumbel-softmax, Jang et al. 2016 (arXiv:1611.01144),
    section 2.2. The draws are exact ones of the guide, so one evaluation of the decoder gives value and gradient.

    Args, errors: as :class:`GumbelSoftmaxLoss`.

    Example:
        >>> from ppl_models.discrete_vae import CategoricalVAE
        >>> from ppl_models.likelihoods import Bernoulli
        >>> vae = CategoricalVAE.preset((3,), Bernoulli(), num_latents=30, num_classes=8, hidden=(4,))
        >>> StraightThroughLoss(vae, num_particles=2, temperature=0.5)(torch.ones(2, 3)).shape
        torch.Size([2])
    """

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        return self._relaxed_terms(x)

    def _relax(self, law: Any) -> Tensor:
        y = super()._relax(law)
        z = one_hot(y.argmax(-1), y.shape[-1]).to(y.dtype)
        return z + (y - y.detach())  # the value of z, exactly


ESTIMATORS = ("pathwise", "enumeration", "score_function", "gumbel_softmax", "straight_through")


def training_loss(
    pair: ModelGuidePair, estimator: str, num_particles: int = 1, temperature: float | Annealing = 1.0
) -> ElboLoss:
    """The loss that trains a pair by the named estimator of the gradient.

    Args:
        pair: the model/guide pair.
        estimator: one of :data:`ESTIMATORS`; ``"pathwise"`` is :class:`ElboLoss`, for reparameterised latents.
        num_particles: draws per datum; ``"enumeration"`` draws none and takes 1 only.
        temperature: of the relaxed estimators.

    Raises:
        ValueError: an unknown estimator, or a number of draws that it cannot take.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> type(training_loss(LinearGaussian.random(3, 2), "pathwise")).__name__
        'ElboLoss'
    """
    if estimator == "pathwise":
        return ElboLoss(pair, num_particles)
    if estimator == "enumeration":
        if num_particles != 1:
            raise ValueError(f"expected num_particles=1 with enumeration, which draws nothing, got {num_particles}")
        return EnumeratedLoss(pair)
    if estimator == "score_function":
        return ScoreFunctionLoss(pair, num_particles)
    if estimator == "gumbel_softmax":
        return GumbelSoftmaxLoss(pair, num_particles, temperature)
    if estimator == "straight_through":
        return StraightThroughLoss(pair, num_particles, temperature)
    raise ValueError(f"expected an estimator among {', '.join(ESTIMATORS)}, got {estimator!r}")


class _Replaced(Messenger):
    """Replaces each draw of a one-hot law by what ``replacement`` makes of that law.

    After the draw, because only then does its law have the batch shape of all plates; outside of ``poutine.trace``, so that
    the trace records the replacement.
    """

    def __init__(self, replacement: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.replacement = replacement

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        law = _one_hot(msg["fn"])
        if law is not None and not msg["is_observed"]:
            msg["value"] = self.replacement(law)


def _one_hot(law: Any) -> Any:
    """The law of single one-hot vectors inside ``Independent``; None for another law."""
    while isinstance(law, torch.distributions.Independent):
        law = law.base_dist
    return law if isinstance(law, torch.distributions.OneHotCategorical) else None


def _log_prob(site: Site) -> Tensor:
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
