"""-ELBO with the sum over all values of the discrete latents: exact where there is no other latent.

The one constraint: the programs broadcast. Each enumerated latent has a dim of its own on the left, so its values have shape
``[K, 1]``, and what depends on them ``[K, B]``; the first call compares some values' terms with runs of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from inference.bounds.closed_forms import law_name
from inference.bounds.particles import Particles, Plan, collect, forked_rng
from inference.bounds.sites import PairError, Site, is_deterministic, sample_sites
from inference.bounds.vectorizing import DrawnAgain, base_of_draw, subsamples
from inference.training.discrete_objective import DiscreteLoss, log_prob_of, log_probability
from ppl_models.discrete_vae import MAX_STATES, TooManyStatesError
from ppl_models.evaluation_mode import evaluating

COMPARED = 4  # values of all enumerated latents together, drawn at random


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

    def _prepare(self, x: Tensor) -> None:
        super()._prepare(x)
        with torch.no_grad(), forked_rng(), evaluating(self.pair):
            self._compare_values(x, self._examine(x)[0])

    def _check_latents(self, latents: dict[str, Site], without_closed_form: dict[str, str]) -> None:
        enumerated, states = [], 1
        for name, site in latents.items():
            try:
                states *= len(site["fn"].enumerate_support(expand=False))
                enumerated.append(name)
            except NotImplementedError as error:
                if not site["fn"].has_rsample:
                    raise PairError(_not_enumerable(name, site)) from error
        if not enumerated:
            raise PairError(
                f"expected a latent that can be enumerated, got none among {', '.join(latents)}: use ElboLoss, in fit "
                'objective="elbo"'
            )
        for name in enumerated:
            plates = [frame.name for frame in latents[name]["cond_indep_stack"] if frame.vectorized]
            if len(plates) > 1:
                raise PairError(
                    f"expected latents that are summed over in the data plate alone, got {name!r} in {' and '.join(plates)}, "
                    'whose values would all be alike: give each a site of its own, or take objective="score_function"'
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

    @property
    def _plates(self) -> int:
        return self.nesting + (self.num_particles > 1)

    def _enumerated_traces(self, x: Tensor) -> tuple[poutine.Trace, poutine.Trace]:
        """Guide and model at all values of the enumerated latents, each in a dim of its own."""
        configured = poutine.infer_config(self.pair.guide, _all_values)
        guide = poutine.trace(poutine.enum(configured, first_available_dim=-1 - self._plates)).get_trace(x)
        return guide, poutine.trace(poutine.replay(self.pair.model, trace=guide)).get_trace(x)

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        guide, model = self._enumerated_traces(x)
        log_q = sum(log_probability(site) for site in sample_sites(guide).values() if _enumerate_dim(site) is not None)
        weights = torch.as_tensor(log_q).exp()  # [*values of each latent, *draws, B]
        terms = {}
        for name, term in self._site_terms(guide, model).items():
            if term.dim() > self._plates:  # otherwise the same for all values, whose weights sum to one
                weighted = weights * torch.where(weights == 0, 0.0, term)  # where q is zero, term may be infinite
                term = weighted.sum(list(range(weighted.dim() - self._plates)))
            terms[name] = self._per_datum(term)
        return terms

    def _compare_values(self, x: Tensor, plan: Plan) -> None:
        """Refuses programs that do not broadcast: at some values of the latents, both run by themselves and must agree."""
        try:
            guide, model = self._enumerated_traces(x)
            sites = sample_sites(guide).items()
            dims = {name: dim for name, site in sites if (dim := _enumerate_dim(site)) is not None}
            self._site_terms(guide, model)
        except Exception as error:
            message = str(error).strip().splitlines() or [type(error).__name__]
            raise PairError(_does_not_broadcast(f"they fail ({type(error).__name__}: {message[0][:120]})")) from error
        if len(set(dims.values())) < len(dims):
            raise PairError(
                f"expected a dim for each of {', '.join(sorted(dims))}, got some in one, as pyro.markov gives them: take "
                "range in place of pyro.markov"
            )
        if subsamples(plan):
            return  # whose part of the data cannot be had again
        for _ in range(COMPARED):
            at = {
                dim: int(torch.randint(guide.nodes[name]["fn"].enumerate_support(expand=False).shape[0], ()))
                for name, dim in dims.items()
            }
            own = self._run_at(at, plan, guide, x)
            for traced, singly in ((guide, own.guide), (model, own.model)):
                for name in (name for name, site in singly.items() if not is_deterministic(site)):
                    expected = singly[name]["log_prob"]
                    found = _chosen(log_prob_of(traced.nodes[name]), 0, at, expected.shape) if name in traced else None
                    tolerance = torch.finfo(expected.dtype).eps ** 0.5
                    if found is None or not torch.allclose(
                        found, expected, rtol=tolerance, atol=tolerance, equal_nan=True
                    ):
                        raise PairError(
                            _does_not_broadcast(f"site {name!r} has another log-density than at one value alone")
                        )

    def _run_at(self, at: dict[int, int], plan: Plan, guide: poutine.Trace, x: Tensor) -> Particles:
        """Both programs at one value of each latent, those in ``guide`` at these indices of their dims."""
        values, bases = poutine.Trace(), {}
        for name, site in sample_sites(guide).items():
            if site["is_observed"] or is_deterministic(site):
                continue
            shape, base = plan.prototype.guide[name]["value"].shape, base_of_draw(site["fn"], site["value"])
            if base is None:
                values.add_node(name, **{**site, "value": _chosen(site["value"], site["fn"].event_dim, at, shape)})
            else:
                bases[name] = _chosen(base, site["fn"].event_dim, at, shape)
        with DrawnAgain(bases):
            own_guide = poutine.trace(poutine.replay(self.pair.guide, trace=values)).get_trace(x)
        for name in bases:
            values.add_node(name, **own_guide.nodes[name])
        return collect(poutine.trace(poutine.replay(self.pair.model, trace=values)).get_trace(x), own_guide)


def _all_values(site: Site) -> dict[str, Any]:
    """Pyro's settings of a guide's site: all values at once, whatever the program says, where they can be listed."""
    listed = site["type"] == "sample" and not site["is_observed"] and site["fn"].has_enumerate_support
    return {"enumerate": "parallel", "num_samples": None} if listed else {}


def _enumerate_dim(site: Site) -> int | None:
    """The dim, counted from the right, that holds all values of a site."""
    return None if site["is_observed"] else site["infer"].get("_enumerate_dim")


def _not_enumerable(name: str, site: Site) -> str:
    law = law_name(site["fn"])
    if (
        site["fn"].event_dim
        and site["fn"].event_shape != ()
        and law in ("Bernoulli", "Categorical", "OneHotCategorical")
    ):
        return (
            f"expected latents that can be enumerated or are reparameterised, got {law} of event shape "
            f"{list(site['fn'].event_shape)} at site {name!r}, of which each number takes values of its own: give each a site, "
            'or use ScoreFunctionLoss, in fit objective="score_function"'
        )
    return (
        f"expected latents that can be enumerated or are reparameterised, got {law} at site {name!r}: use ScoreFunctionLoss, "
        'in fit objective="score_function"'
    )


def _does_not_broadcast(what: str) -> str:
    return (
        "expected programs that take all values of a latent y at once, as [K, 1], beside what is drawn given it, [K, B], but "
        f"{what}: broadcast them against each other, as * and @ do by themselves; cat and gather need torch.broadcast_tensors"
    )


def _chosen(value: Tensor, event_dim: int, at: dict[int, int], shape: torch.Size) -> Tensor:
    """A value where the enumerated dims have these indices, and at the first draw, in the shape that a single run gives it."""
    batch = value.dim() - event_dim
    for position in range(batch - (len(shape) - event_dim)):
        index = at.get(position - batch, 0) if value.shape[position] > 1 else 0
        value = value.narrow(position, index, 1)
    return value.reshape(value.shape[max(0, value.dim() - len(shape)) :]).expand(shape)
