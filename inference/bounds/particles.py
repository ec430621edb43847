"""Draws from a guide with the model replayed on them: the raw material of every bound.

One particle is a draw z ~ q(z | x) together with log q of each guide site and log p of each model site at that draw. Any
pair of Pyro programs will do. Particles are drawn many at a time under an outer plate where the programs allow it and one
at a time otherwise. Which of the two holds is not guessed: a few vectorised particles are replayed singly, and only
when every site's log-density agrees is the fast path taken (:class:`Plan` says so, with the reason).

Sites are checked before anything is computed: a latent of the model without a guide site, a guide site unknown to the
model and not marked auxiliary, and a guide site that the model observes are each an error that names the site.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Program = Callable[..., Any]
Site = dict[str, Any]

PARTICLES = "_particles"
ELEMENTS_AT_ONCE = 2**21  # site elements held at a time: 16 MiB of float64 for each array of that size


class PairError(ValueError):
    """A model and a guide that do not form a pair; the message names the site and the remedy."""


class NotANumberError(ValueError):
    """A log-density that is not a number; the message names program, site and datum."""


@dataclass(frozen=True)
class Particles:
    """A chunk of particles: model and guide traces with log-densities computed.

    ``dim`` is the particle dim of each site's batch shape, or None for a single particle.
    """

    model: dict[str, Site]
    guide: dict[str, Site]
    count: int
    dim: int | None


@dataclass(frozen=True)
class Plan:
    """How a pair's particles are drawn, and what one draw looks like.

    ``shared`` are the plates that all sites share, as (name, dim, size), outermost first: they are the shape of
    per-datum terms.
    """

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prototype: Particles
    shared: tuple[tuple[str, int, int], ...]
    nesting: int
    vectorized: bool
    note: str

    @property
    def shape(self) -> torch.Size:
        """Shape of per-datum terms: the sizes of the shared plates."""
        return torch.Size(size for _, _, size in self.shared)

    def chunks(self, num_particles: int, chunk_size: int | None = None) -> Iterator[Particles]:
        """Yields chunks that hold ``num_particles`` particles together."""
        if num_particles < 1:
            raise ValueError(f"expected num_particles >= 1, got {num_particles}")
        if not self.vectorized:
            for _ in range(num_particles):
                yield draw(self.model, self.guide, self.args, self.kwargs)
            return
        size = chunk_size or self.default_chunk()
        for start in range(0, num_particles, size):
            count = min(size, num_particles - start)
            yield draw(self.model, self.guide, self.args, self.kwargs, count, -self.nesting - 1)

    def default_chunk(self) -> int:
        """Particles at a time such that the sites' values stay within a fixed number of elements."""
        sites = [*self.prototype.model.values(), *self.prototype.guide.values()]
        elements = sum(site["value"].numel() + site["log_prob"].numel() for site in sites)
        return max(1, ELEMENTS_AT_ONCE // max(1, elements))

    def reduce(self, log_prob: Tensor, particles: Particles) -> Tensor:
        """Sums a site's tensor over all plates but the shared ones: ``[count, *shape]`` in float64."""
        dims = [dim for _, dim, _ in self.shared]
        keep = dims if particles.dim is None else [particles.dim, *dims]
        sizes = {dim: size for _, dim, size in self.shared}
        if particles.dim is not None:
            sizes[particles.dim] = particles.count
        total = log_prob.detach().to(torch.float64)
        lowest = max([total.dim(), *(-dim for dim in keep)])
        total = total.reshape((1,) * (lowest - total.dim()) + total.shape)
        total = total.expand([sizes.get(i - lowest, n) for i, n in enumerate(total.shape)])
        summed = [i for i in range(lowest) if i - lowest not in keep]
        total = total.sum(summed) if summed else total
        return total.unsqueeze(0) if particles.dim is None else total


def make_plan(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], vectorize: bool | None = None
) -> Plan:
    """Draws one particle, checks that the programs form a pair, and decides how to draw the others.

    Args:
        model: Pyro program.
        guide: Pyro program over the same latent sites.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        vectorize: True demands vectorised particles, False forbids them, None lets the replay check decide.

    Raises:
        PairError: missing, superfluous or observed guide sites; or ``vectorize=True`` on programs that do not allow it.
        NotANumberError: a log-density is not a number.
    """
    prototype = prototype_draw(model, guide, args, kwargs)
    sites = [*prototype.model.values(), *prototype.guide.values()]
    frames = [{f.name: f for f in site["cond_indep_stack"] if f.vectorized} for site in sites]
    nesting = max([0, *(-f.dim for stack in frames for f in stack.values())])
    common = set.intersection(*(set(stack) for stack in frames)) if frames else set()
    shared = sorted((frames[0][name].dim, name) for name in common)
    plan = Plan(
        model,
        guide,
        args,
        kwargs,
        prototype,
        tuple((name, dim, frames[0][name].size) for dim, name in shared),
        nesting,
        vectorized=False,
        note="particles drawn one at a time, as asked",
    )
    if vectorize is False:
        return plan
    obstacle = _obstacle_to_vectorizing(plan)
    if obstacle and vectorize:
        raise PairError(f"expected programs that run under an outer particle plate, but {obstacle}: use vectorize=None")
    note = (
        f"particles drawn one at a time: {obstacle}" if obstacle else "particles vectorised; replayed singly they agree"
    )
    return replace(plan, vectorized=not obstacle, note=note)


def forked_rng() -> AbstractContextManager[None]:
    """Restores torch's random state on exit, on the CPU and on any CUDA device in use."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else [])


def draw(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int = 1,
    dim: int | None = None,
) -> Particles:
    """One guide trace, and the model replayed on it; ``count`` particles at once under a plate at ``dim``."""
    if dim is None:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    else:
        with pyro.plate(PARTICLES, count, dim=dim):
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return collect(model_trace, guide_trace, count, dim)


def collect(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, count: int = 1, dim: int | None = None
) -> Particles:
    """Computes log-densities and keeps the sample sites, without subsampling sites and the particle plate."""
    model_trace.compute_log_prob()
    guide_trace.compute_log_prob()
    particles = Particles(_sample_sites(model_trace), _sample_sites(guide_trace), count, dim)
    _refuse_nan(particles)
    return particles


def prototype_draw(model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Particles:
    """The first particle, with the sites checked; a program stopped by a NaN parameter is told apart by site."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found vars in model but not guide|Found non-auxiliary vars in guide")
            particles = draw(model, guide, args, kwargs)
    except ValueError as error:
        if isinstance(error, (PairError, NotANumberError)):
            raise
        with pyro.validation_enabled(False):  # let the NaN pass, to see at which site it first shows
            try:
                draw(model, guide, args, kwargs)
            except NotANumberError as located:
                raise located from error
            except Exception:  # the second run only serves to locate; the first error stands
                raise error from None
        raise
    check_sites(particles)
    return particles


def check_sites(particles: Particles) -> None:
    """Raises :class:`PairError` unless guide sites and latent model sites match."""
    model, guide = particles.model, particles.guide
    for name, site in model.items():
        if site["is_observed"]:
            if name in guide and not guide[name]["is_observed"]:
                raise PairError(f"the guide draws site {name!r}, which the model observes: remove it from the guide")
        elif name not in guide:
            raise PairError(
                f"the model's latent site {name!r} has no guide site: add pyro.sample({name!r}, ...) to the guide"
                + (" (sites enumerated in the model need one here)" if site["infer"].get("enumerate") else "")
            )
    for name, site in guide.items():
        if name not in model and not site["infer"].get("is_auxiliary") and not site["is_observed"]:
            raise PairError(
                f"the guide's site {name!r} is not in the model: remove it, or mark it with "
                "infer={'is_auxiliary': True} if it only serves to draw other sites"
            )


def _sample_sites(trace: poutine.Trace) -> dict[str, Site]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and name != PARTICLES
    }


def _refuse_nan(particles: Particles) -> None:
    for program, sites in (("guide", particles.guide), ("model", particles.model)):
        for name, site in sites.items():
            bad = torch.isnan(site["log_prob"])
            if bool(bad.any()):
                index = bad.nonzero()[0].tolist()
                parameters = [
                    key
                    for key in getattr(site["fn"], "arg_constraints", {})
                    if isinstance(getattr(site["fn"], key, None), Tensor)
                    and bool(getattr(site["fn"], key).isnan().any())
                ]
                cause = f"its {' and '.join(parameters)} is not a number" if parameters else "look at its value"
                if bool(torch.isnan(site["value"]).any()) and site["is_observed"]:
                    cause = "the observed data hold a NaN"
                raise NotANumberError(
                    f"expected finite log-densities, got NaN at site {name!r} of the {program}, batch index {index}: {cause}"
                )


def _obstacle_to_vectorizing(plan: Plan, count: int = 3) -> str:
    """Why particles cannot be vectorised; empty when a vectorised draw agrees with its particles replayed singly."""
    for program in (plan.prototype.model, plan.prototype.guide):
        for site in program.values():
            if site["log_prob"].dim() > plan.nesting:
                return f"site {site['name']!r} has a batch dimension outside any plate"
    if _subsamples(plan):
        return "a plate subsamples, so each particle draws a subsample of its own"
    try:
        with forked_rng():
            many = draw(plan.model, plan.guide, plan.args, plan.kwargs, count, -plan.nesting - 1)
            for k in range(count):
                difference = _replayed_singly(plan, many, k)
                if difference:
                    return difference
    except Exception as error:  # any failure under the plate means: one at a time, and says why
        message = str(error).strip().splitlines() or [type(error).__name__]
        return f"under an outer plate the programs fail ({type(error).__name__}: {message[0][:120]})"
    return ""


def _replayed_singly(plan: Plan, many: Particles, k: int) -> str:
    """Replays particle k alone; where its log-densities differ from the vectorised ones."""
    if set(many.guide) != set(plan.prototype.guide) or set(many.model) != set(plan.prototype.model):
        return "the set of sites changes from draw to draw"
    trace = poutine.Trace()
    for name, site in many.guide.items():
        value, shape = site["value"], plan.prototype.guide[name]["value"].shape
        position = value.dim() - site["fn"].event_dim - plan.nesting - 1
        if position >= 0 and value.shape[position] == many.count:
            value = value.select(position, k)
        trace.add_node(name, **{**site, "value": value.reshape(shape)})
    guide_trace = poutine.trace(poutine.replay(plan.guide, trace=trace)).get_trace(*plan.args, **plan.kwargs)
    model_trace = poutine.trace(poutine.replay(plan.model, trace=trace)).get_trace(*plan.args, **plan.kwargs)
    one = collect(model_trace, guide_trace)
    for together, single in ((many.guide, one.guide), (many.model, one.model)):
        if set(together) != set(single):
            return "the set of sites changes from draw to draw"
        for name in together:
            expected = plan.reduce(single[name]["log_prob"], one)[0]
            got = plan.reduce(together[name]["log_prob"], many)[k]
            tolerance = torch.finfo(single[name]["log_prob"].dtype).eps ** 0.5
            if not torch.allclose(got, expected, rtol=tolerance, atol=tolerance):
                return f"site {name!r} has another log-density when particles are vectorised"
    return ""


def _subsamples(plan: Plan) -> bool:
    sites = [*plan.prototype.model.values(), *plan.prototype.guide.values()]
    return any(f.size != f.full_size for site in sites for f in site["cond_indep_stack"] if f.full_size is not None)
