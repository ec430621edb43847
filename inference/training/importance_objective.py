"""The importance-weighted bound as a loss, with the plain or the doubly reparameterised gradient.

    loss(x) = -log (1/K) sum_k w_k,    w_k = p(x, z_k) / q(z_k | x),    z_k = z(eps_k, phi) ~ q(z | x)

(Burda et al. 2016, arXiv:1509.00519, eq. 8). With the normalised weights v_k = w_k / sum_j w_j,

    "iwae"                      d/dtheta, d/dphi:  -sum_k v_k  d log w_k          (all of log w_k, through z_k as well)
    "doubly_reparameterized"    d/dtheta:          -sum_k v_k  d log p(x, z_k)
                                d/dphi:            -sum_k v_k^2  (d log w_k / d z_k) (d z_k / d phi)

Both have the same expectation, the gradient of the bound (Tucker et al. 2019, arXiv:1810.04152, eqs. 5 and 8). The plain
one's signal-to-noise ratio for phi falls as 1/sqrt(K) (Rainforth et al. 2018, arXiv:1802.04537); the other's does not.

How d log w / d z is had for any pair: log q is evaluated by a second run of the guide with its parameters detached, at
the values that the first run drew, so that z alone carries gradients into it; a hook multiplies what reaches each z_k by
v_k once more. In a guide with several latents the hooks sit on copies that only the densities see, so that the
factor is applied once, however long the chain of draws. Parameters that guide and model share get both parts.

The one constraint: the doubly reparameterised gradient needs a guide that gives the same law twice. One with dropout is
refused; batch normalisation in training mode updates its running statistics twice a call.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, Literal, get_args

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from inference.bounds.particles import forked_rng
from inference.bounds.sites import PairError, Site
from inference.training.module_state import ModuleState
from inference.training.objectives import ElboLoss, TrainingStep, sum_terms
from ppl_models.arguments import whole_count
from ppl_models.pair import ModelGuidePair

Gradient = Literal["iwae", "doubly_reparameterized"]


class ImportanceWeightedLoss(ElboLoss):
    """-log (1/K) sum_k w_k of a pair as a module: ``loss(x)`` is ``[B]`` nats, to be minimised.

    The IWAE-K bound of Burda et al. 2016 (arXiv:1509.00519), eq. 8. K = 1 is ``ElboLoss(pair, closed_form=False)``, draw
    for draw. :meth:`~inference.ElboLoss.terms` remain the ELBO's, averaged over K draws.

    Args:
        pair: the model/guide pair; its parameters are this module's parameters.
        k: K >= 1 draws per datum.
        gradient: ``"iwae"`` or ``"doubly_reparameterized"`` (DReG); the same value, the same expected gradient, another
            variance. With K = 1 the latter is the path derivative of Roeder et al. 2017 (arXiv:1703.09194).

    Raises:
        ValueError: ``k`` below one or no whole number, or an unknown gradient.
        NotReparameterizedError: at the first call, for a latent whose guide law has no ``rsample``.
        PairError: at the first call, for sites that do not match, or one outside the data plate; or, with
            ``"doubly_reparameterized"``, for a guide that gives another law at a second run.
        PrecisionError: at the first call, for a log-density in half precision.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2, guide="mean_field")
        >>> x = pair.model(size=4).detach()
        >>> loss = ImportanceWeightedLoss(pair, k=1000)
        >>> bool(((-loss(x) - pair.log_evidence(x)).abs() < 0.2).all())
        True
    """

    takes_scales = False  # the weights would be those of no densities

    def __init__(self, pair: ModelGuidePair, k: int, gradient: Gradient = "iwae") -> None:
        k = whole_count("k", k)
        if gradient not in get_args(Gradient):
            raise ValueError(f"expected a gradient among {', '.join(get_args(Gradient))}, got {gradient!r}")
        super().__init__(pair, num_particles=k, closed_form=False)
        self.gradient = gradient
        self._repeats_in_mode: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        """-log (1/K) sum_k w_k of each datum of ``x`` ``[B, *data_shape]``: ``[B]`` nats."""
        return self._reduced(self.log_weights(x))

    def step(self, x: Tensor) -> TrainingStep:
        """The loss, and the ELBO's terms averaged over the same K draws."""
        by_draw = self._terms_by_draw(x)
        means = {name: term.detach().mean(0) for name, term in by_draw.items()}
        return TrainingStep(self._reduced(sum_terms(by_draw)), means)

    def log_weights(self, x: Tensor) -> Tensor:
        """log w_k, ``[K, B]`` nats, of fresh draws; differentiable as ``gradient`` says once reduced by ``logsumexp``."""
        return sum_terms(self._terms_by_draw(x))

    def _reduced(self, log_weights: Tensor) -> Tensor:
        if self.num_particles == 1:
            return -log_weights[0]
        return math.log(self.num_particles) - torch.logsumexp(log_weights, 0)

    def _terms_by_draw(self, x: Tensor) -> dict[str, Tensor]:
        """Each site's part of log w_k, ``[K, B]``."""
        if self.closed_sites is None:
            self._prepare(x)
        if self.gradient == "doubly_reparameterized" and self.pair.training not in self._repeats_in_mode:
            self._check_guide_repeats(x)
        with self._particle_plate():
            terms = self._terms(x) if self.gradient == "iwae" else self._terms_through_draws(x)
        return {name: term[None] for name, term in terms.items()} if self.num_particles == 1 else terms

    def _terms_through_draws(self, x: Tensor) -> dict[str, Tensor]:
        """The parts of log w_k with d log q through the draws alone, and v_k applied once more to what reaches the draws."""
        path = _PathWeights(self.num_particles, self.nesting)
        drawn = poutine.trace(self.pair.guide).get_trace(x)
        draws = _with_values(drawn, path)
        model = poutine.trace(poutine.replay(self.pair.model, trace=draws)).get_trace(x)
        guide = poutine.trace(poutine.replay(_GuideDetached(self.pair), trace=draws)).get_trace(x)
        model.compute_log_prob()
        guide.compute_log_prob()
        terms = {name: self._per_datum(site["log_prob"]) for name, site in model.nodes.items() if _is_random(site)}
        for name, site in guide.nodes.items():
            if _is_random(site) and not (name in model.nodes and model.nodes[name]["is_observed"]):
                log_q = self._per_datum(site["log_prob"])
                terms[name] = terms[name] - log_q if name in terms else -log_q
        path.set(sum_terms(terms))
        return terms

    def _particle_plate(self) -> Any:
        if self.num_particles == 1:
            return nullcontext()
        return pyro.plate("_particles", self.num_particles, dim=-1 - self.nesting)

    def _check_guide_repeats(self, x: Tensor) -> None:
        """Refuses a guide whose second run on the same draws gives another law (dropout); the state stays as it was."""
        mode = self.pair.training
        with torch.no_grad(), forked_rng():
            program = _GuideDetached(self.pair, spare_buffers=True)
            first = poutine.trace(program).get_trace(x)
            second = poutine.trace(poutine.replay(program, trace=first)).get_trace(x)
            first.compute_log_prob()
            second.compute_log_prob()
        for name, site in first.nodes.items():
            if not _is_random(site):
                continue
            tolerance = torch.finfo(site["log_prob"].dtype).eps ** 0.5
            if not torch.allclose(site["log_prob"], second.nodes[name]["log_prob"], rtol=tolerance, atol=tolerance):
                raise PairError(
                    f"expected the guide to give the same law twice, but that of site {name!r} changed: take dropout out "
                    'of its networks, or use gradient="iwae"'
                )
        self._repeats_in_mode.add(mode)


class _PathWeights:
    """Multiplies the gradients that reach the draws by v_k, which is known only once the draws have been weighed."""

    def __init__(self, count: int, nesting: int) -> None:
        self.count = count
        self.nesting = nesting
        self.weights: Tensor | None = None

    def set(self, log_weights: Tensor) -> None:
        """Takes log w ``[K, B]``; from here on the hooks work."""
        self.weights = torch.softmax(log_weights.detach(), 0) if self.count > 1 else None

    def attach(self, value: Tensor, event_dim: int) -> Tensor:
        """A copy of a draw ``[K, ..., B, *event]`` whose gradient is multiplied by v_k on the way back."""
        copy = value.view_as(value)
        if self.count > 1 and copy.requires_grad:
            copy.register_hook(lambda gradient: self.scale(gradient, event_dim))
        return copy

    def scale(self, gradient: Tensor, event_dim: int) -> Tensor:
        """v_k times a gradient ``[K, ..., B, *event]``."""
        assert self.weights is not None  # gradients flow after the weights are known
        k, b = self.weights.shape
        return gradient * self.weights.reshape(k, *[1] * (self.nesting - 1), b, *[1] * event_dim)


class _GuideDetached(nn.Module):
    """The pair's guide with every parameter detached; its buffers are the pair's own unless spared."""

    def __init__(self, pair: ModelGuidePair, spare_buffers: bool = False) -> None:
        super().__init__()
        self.program = _Guide(pair)
        self.spare_buffers = spare_buffers

    def forward(self, x: Tensor) -> Any:
        # Not torch.func.functional_call, which does not put back the parameters of a module that is registered twice.
        state = ModuleState(self.program)
        parameters, buffers = state.read()[: state.num_parameters], state.read()[state.num_parameters :]
        buffers = [buffer.clone() for buffer in buffers] if self.spare_buffers else buffers
        with state.replaced([*(parameter.detach() for parameter in parameters), *buffers]):
            return self.program(x)


class _Guide(nn.Module):
    """The pair's guide as a module's ``forward``."""

    def __init__(self, pair: ModelGuidePair) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x: Tensor) -> Any:
        return self.pair.guide(x)


def _with_values(drawn: poutine.Trace, path: _PathWeights) -> poutine.Trace:
    """The guide's trace with each draw replaced by a copy for the densities to see."""
    draws = poutine.Trace()
    for name, site in drawn.nodes.items():
        if _is_random(site) and not site["is_observed"]:
            site = {**site, "value": path.attach(site["value"], site["fn"].event_dim)}
        draws.add_node(name, **site)
    return draws


def _is_random(site: Site) -> bool:
    return site["type"] == "sample" and not site_is_subsample(site)
