"""Whether a pair's particles may be drawn many at a time, under an outer plate, and if not, why.

Three things stand in the way: a batch dimension outside any plate, which would be confused with the particles; a plate that
subsamples, because each particle draws a subsample of its own; and a latent value read into Python as a number or a
truth value, because all particles would have to share what follows from it. Where none does, a few vectorised particles
are replayed one by one, and every site's log-density must agree.
"""

from __future__ import annotations

import torch
from pyro import poutine

from inference.bounds.dependencies import scalars_read
from inference.bounds.particles import Particles, Plan, collect, draw, forked_rng


def obstacle_to_vectorizing(plan: Plan, count: int = 3, share_subsample: bool = False) -> str:
    """Why particles cannot be vectorised; empty when a vectorised draw agrees with its particles replayed singly.

    With ``share_subsample`` nothing is said of programs that subsample, whose particles cannot be replayed.
    """
    for program in (plan.prototype.model, plan.prototype.guide):
        for site in program.values():
            if site["log_prob"].dim() > plan.nesting:
                return f"site {site['name']!r} has a batch dimension outside any plate"
    if _subsamples(plan):
        return "" if share_subsample else "a plate subsamples, so each particle draws a subsample of its own"
    try:
        with forked_rng():
            read = scalars_read(plan.model, plan.guide, plan.args, plan.kwargs)
            if read:
                return (
                    f"a program reads {' and '.join(sorted(read))} into Python, which all particles would have to share"
                )
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
