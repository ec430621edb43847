"""Draws from a guide with the model replayed on them: the raw material of every bound.

One particle is a draw z ~ q(z | x) together with log q of each guide site and log p of each model site at that draw. Any
pair of Pyro programs will do. Particles are drawn many at a time under an outer plate where the programs allow it and one
at a time otherwise. Which of the two holds is not guessed: a few vectorised particles are replayed singly, and only
when every site's log-density agrees is the fast path taken (:class:`Plan` says so, with the reason).

Sites are checked before anything is computed: a latent of the model without a guide site, a guide site unknown to the
model and not marked auxiliary, and a guide site that the model observes are each an error that names the site.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from torch import Tensor, nn

from inference.bounds.closed_forms import is_point_mass
from inference.bounds.sites import (
    PARTICLES,
    NotANumberError,
    PairError,
    Site,
    check_sites,
    is_deterministic,
    refuse_nan,
    sample_sites,
)
from inference.bounds.whole_densities import why_no_bound
from ppl_models.arguments import whole_count

Program = Callable[..., Any]

__all__ = [
    "PARTICLES",
    "NotANumberError",
    "PairError",
    "Particles",
    "Plan",
    "Program",
    "Site",
    "collect",
    "draw",
    "forked_rng",
    "make_plan",
    "prototype_draw",
]

ELEMENTS_AT_ONCE = 2**21  # site elements held at a time: 16 MiB of float64 for each array of that size


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
        num_particles = whole_count("num_particles", num_particles)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"expected chunk_size >= 1 or None, got {chunk_size}")
        if not self.vectorized:
            for _ in range(num_particles):
                particles = located_draw(self.model, self.guide, self.args, self.kwargs)
                check_sites(particles.model, particles.guide)
                yield particles
            return
        size = chunk_size or self.default_chunk()
        for start in range(0, num_particles, size):
            count = min(size, num_particles - start)
            yield located_draw(self.model, self.guide, self.args, self.kwargs, count, -self.nesting - 1)

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


def _warn_of_training_mode(model: Program) -> None:
    """Says that measuring changes a network with batch statistics, or is one of networks with dropout."""
    owner = getattr(model, "__self__", None)
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    acting = [m for m in owner.modules() if isinstance(m, kinds) and m.training] if isinstance(owner, nn.Module) else []
    if acting:
        warnings.warn(
            f"{type(acting[0]).__name__} is in training mode: each draw has its own noise or moves its statistics; call "
            "pair.eval() to measure what is used after training",
            stacklevel=4,
        )


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
        TypeError: a model or guide that cannot be called.
        PairError: missing, superfluous or observed guide sites; or ``vectorize=True`` on programs that do not allow it.
        NotANumberError: a log-density is not a number.
    """
    from inference.bounds.vectorizing import obstacle_to_vectorizing

    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(
                f"expected two Pyro programs and what they are called with, got a {type(program).__name__} as {name}: of a "
                "pair they are pair.model and pair.guide, as in decompose_elbo(pair.model, pair.guide, x)"
            )
    _warn_of_training_mode(model)
    prototype = prototype_draw(model, guide, args, kwargs)
    sites = [s for s in (*prototype.model.values(), *prototype.guide.values()) if not is_deterministic(s)]
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
    remarks = _remarks(prototype)
    if vectorize is False:
        return replace(plan, note="; ".join([plan.note, *remarks]))
    obstacle = obstacle_to_vectorizing(plan)
    if obstacle and vectorize:
        raise PairError(f"expected programs that run under an outer particle plate, but {obstacle}: use vectorize=None")
    note = (
        f"particles drawn one at a time: {obstacle}" if obstacle else "particles vectorised; replayed singly they agree"
    )
    return replace(plan, vectorized=not obstacle, note="; ".join([note, *remarks]))


def _remarks(prototype: Particles) -> list[str]:
    """What a reader of the terms has to know of the programs: subsampled plates, and what makes their sum no bound."""
    model, guide = prototype.model, prototype.guide
    frames = {
        f.name: f for site in model.values() for f in site["cond_indep_stack"] if f.full_size not in (None, f.size)
    }
    found = [
        f"plate {f.name!r} holds {f.size} of {f.full_size}: each term is scaled by {f.full_size}/{f.size}, so that their sum "
        "over the plate, and no mean, is that over all"
        for f in frames.values()
    ]
    found += [f"no bound of log p(x): {why}" for why, _ in why_no_bound(model, guide)]
    if any(
        name not in model and not site["is_observed"] and not is_point_mass(site["fn"]) for name, site in guide.items()
    ):
        return found  # auxiliary draws of which a Delta may be a function, with a density, as in autoguides
    for name, site in guide.items():
        law = model[name]["fn"] if name in model else None
        if law is not None and is_point_mass(site["fn"]) and not is_point_mass(law) and not law.support.is_discrete:
            found.append(f"no bound of log p(x): the guide is a point mass at {name!r}, where the model has a density")
    return found


def forked_rng() -> AbstractContextManager[None]:
    """Restores torch's random state on exit, on the CPU and on any CUDA device in use."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else [])


def seed_generators(seed: int) -> None:
    """As ``torch.manual_seed``, which without an accelerator takes hundreds of times as long: it writes stack traces."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


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
        model_trace, guide_trace = _traces(model, guide, args, kwargs)
    else:
        with pyro.plate(PARTICLES, count, dim=dim):
            model_trace, guide_trace = _traces(model, guide, args, kwargs)
    return collect(model_trace, guide_trace, count, dim)


def collect(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, count: int = 1, dim: int | None = None
) -> Particles:
    """Computes log-densities and keeps the sample sites, without subsampling sites and the particle plate."""
    model_trace.compute_log_prob()
    guide_trace.compute_log_prob()
    particles = Particles(sample_sites(model_trace), sample_sites(guide_trace), count, dim)
    refuse_nan(particles.model, particles.guide)
    return particles


def prototype_draw(model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Particles:
    """The first particle, with the sites checked."""
    with warnings.catch_warnings():  # what Pyro remarks on is refused below, by site
        warnings.filterwarnings("ignore", "Found vars in model but not guide|Found non-auxiliary vars in guide")
        particles = located_draw(model, guide, args, kwargs)
    check_sites(particles.model, particles.guide)
    return particles


def located_draw(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int = 1,
    dim: int | None = None,
) -> Particles:
    """:func:`draw`; where validation stops a program, the same draw is repeated without, to name the first NaN's site."""
    state = torch.get_rng_state()
    try:
        return draw(model, guide, args, kwargs, count, dim)
    except ValueError as error:
        if isinstance(error, (PairError, NotANumberError)):
            raise
        torch.set_rng_state(state)
        with pyro.validation_enabled(False):
            try:
                draw(model, guide, args, kwargs, count, dim)
            except NotANumberError as located:
                raise located from error
            except Exception:  # the repetition only serves to locate; the first error stands
                raise error from None
        raise


def _traces(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[poutine.Trace, poutine.Trace]:
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    if isinstance(poutine.unwrap(guide), GuideMessenger):  # such a guide runs the model: its data are no terms of it
        for name in [name for name, site in guide_trace.nodes.items() if site.get("is_observed")]:
            guide_trace.remove_node(name)
    try:
        return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs), guide_trace
    except RuntimeError as error:
        name = re.match(r"site (\S+) must be sampled in trace", str(error))
        if name is None:
            raise
        raise PairError(
            f"the guide observes site {name[1]!r}, which is latent in the model: draw it in the guide"
        ) from error
