"""Whether a pair's particles may be drawn many at a time, under an outer plate, and if not, why.

Three things stand in the way: a batch dimension outside any plate, which would be confused with the particles; a plate that
subsamples, because each particle draws a subsample of its own; and a latent value read into Python as a number or a
truth value, because all particles would have to share what follows from it. Where none does, a few vectorised particles
are replayed one by one, and every site's log-density must agree.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from inference.bounds.dependencies import scalars_read
from inference.bounds.particles import Particles, Plan, collect, draw, forked_rng
from inference.bounds.sites import is_deterministic


def obstacle_to_vectorizing(plan: Plan, count: int = 3, share_subsample: bool = False) -> str:
    """Why particles cannot be vectorised; empty when a vectorised draw agrees with its particles replayed singly.

    With ``share_subsample`` nothing is said of programs that subsample, whose particles cannot be replayed.
    """
    for program in (plan.prototype.model, plan.prototype.guide):
        for site in program.values():
            if site["log_prob"].dim() > plan.nesting:
                return f"site {site['name']!r} has a batch dimension outside any plate"
    if subsamples(plan):
        return "" if share_subsample else "a plate subsamples, so each particle draws a subsample of its own"
    try:
        with forked_rng():
            read = scalars_read(plan.model, plan.guide, plan.args, plan.kwargs)
            if read:
                return (
                    f"a program reads {' and '.join(sorted(read))} into Python, which all particles would have to share"
                )
            many = draw(plan.model, plan.guide, plan.args, plan.kwargs, count, -plan.nesting - 1)
            bases = {name: base_of_draw(site["fn"], site["value"]) for name, site in many.guide.items()}
            for k in range(count):
                difference = _replayed_singly(plan, many, bases, k)
                if difference:
                    return difference
    except Exception as error:  # any failure under the plate means: one at a time, and says why
        message = str(error).strip().splitlines() or [type(error).__name__]
        return f"under an outer plate the programs fail ({type(error).__name__}: {message[0][:120]})"
    return ""


def _replayed_singly(plan: Plan, many: Particles, bases: dict[str, Tensor | None], k: int) -> str:
    """Replays particle k alone, or draws it again from its base; where its log-densities differ from the vectorised ones."""
    if set(many.guide) != set(plan.prototype.guide) or set(many.model) != set(plan.prototype.model):
        return "the set of sites changes from draw to draw"
    trace, own_bases = poutine.Trace(), {}
    for name, site in many.guide.items():
        if is_deterministic(site):
            continue
        shape = plan.prototype.guide[name]["value"].shape
        value = _particle(site["value"], site["fn"].event_dim, plan, many.count, k)
        base = bases[name]
        if base is None:
            trace.add_node(name, **{**site, "value": value.reshape(shape)})
        else:
            own_bases[name] = _particle(base, site["fn"].event_dim, plan, many.count, k)
    with DrawnAgain(own_bases):
        guide_trace = poutine.trace(poutine.replay(plan.guide, trace=trace)).get_trace(*plan.args, **plan.kwargs)
    for name in own_bases:
        trace.add_node(name, **guide_trace.nodes[name])
    model_trace = poutine.trace(poutine.replay(plan.model, trace=trace)).get_trace(*plan.args, **plan.kwargs)
    one = collect(model_trace, guide_trace)
    for together, single in ((many.guide, one.guide), (many.model, one.model)):
        if set(together) != set(single):
            return "the set of sites changes from draw to draw"
        for name in (name for name, site in together.items() if not is_deterministic(site)):
            expected = plan.reduce(single[name]["log_prob"], one)[0]
            got = plan.reduce(together[name]["log_prob"], many)[k]
            tolerance = torch.finfo(single[name]["log_prob"].dtype).eps ** 0.5
            if not torch.allclose(got, expected, rtol=tolerance, atol=tolerance):
                return f"site {name!r} has another log-density when particles are vectorised"
    return ""


def _particle(value: Tensor, event_dim: int, plan: Plan, count: int, k: int) -> Tensor:
    """Particle k of a vectorised value, or the value itself where all particles share it."""
    position = value.dim() - event_dim - plan.nesting - 1
    shared = position < 0 or value.shape[position] != count
    return value if shared else value.select(position, k)


def base_of_draw(law: Any, value: Tensor) -> Tensor | None:
    """The base law's draw behind a draw just made of a flow whose transforms have no inverse but for their last output.

    None for all other laws, whose density can be asked for anywhere. Planar and radial flows are such.
    """
    if not isinstance(law, torch.distributions.TransformedDistribution):
        return None
    stranger = value.clone()
    try:
        for transform in reversed(law.transforms):
            stranger = transform.inv(stranger)
    except (KeyError, NotImplementedError):
        for transform in reversed(law.transforms):
            value = transform.inv(value)
        return value
    return None


class DrawnAgain(Messenger):
    """Gives sites the values that their transforms make of given draws of their base laws."""

    def __init__(self, bases: dict[str, Tensor]) -> None:
        super().__init__()
        self.bases = bases

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.bases:
            value = self.bases[msg["name"]]
            for transform in msg["fn"].transforms:
                value = transform(value)
            msg["value"], msg["done"] = value, True


def subsamples(plan: Plan) -> bool:
    """Whether a plate draws a part of its data anew at each run."""
    sites = [*plan.prototype.model.values(), *plan.prototype.guide.values()]
    return any(f.size != f.full_size for site in sites for f in site["cond_indep_stack"] if f.full_size is not None)
