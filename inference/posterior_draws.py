"""Fills the groups of a posterior tree with draws from guide and model, chunk by chunk.

``posterior`` holds the guide's draws and the model replayed on them; the predictive groups and the prior come from the
model run without its data. The arrays are allocated once, so memory is what the result takes plus one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.posterior_layout import DRAW, GROUPS, Layout, PosteriorError, Sites, is_deterministic

if TYPE_CHECKING:
    import xarray
    from torch import Tensor

    from inference.bounds.particles import Particles, Plan, Program, Site


def one_at_a_time_if_needed(plan: Plan, wanted: set[str]) -> Plan:
    """The plan, vectorised only if the replay check also holds for the model without its data, and covers all sites."""
    from inference.bounds.particles import make_plan

    if not plan.vectorized:
        return plan
    for name, site in plan.prototype.model.items():
        if is_deterministic(site):
            note = f"particles drawn one at a time: site {name!r} is deterministic, so no density checks its values"
            return replace(plan, vectorized=False, note=note)
    if not wanted & {"prior", "prior_predictive", "posterior_predictive"}:
        return plan
    free = _without_data(plan.model)
    try:
        check = make_plan(free, free, plan.args, plan.kwargs)
        note = check.note
        vectorized = check.vectorized
    except Exception as error:  # any failure means one at a time; where the draws fail too, that is an error there
        note = f"particles drawn one at a time: it fails ({type(error).__name__})"
        vectorized = False
    return plan if vectorized else replace(plan, vectorized=False, note=f"for the model without its data, {note}")


class Draws:
    """Arrays by group and variable, filled chunk by chunk: ``[num_samples, ...]`` each."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.start = 0
        self.arrays: dict[str, dict[str, np.ndarray]] = {}

    def put(self, group: str, name: str, rows: Tensor) -> None:
        """Takes ``[count, ...]`` as the rows from ``start`` on."""
        from inference.bounds.particles import NotANumberError

        values = _to_numpy(rows)
        if np.isnan(values).any():
            draw = self.start + int(np.isnan(values).nonzero()[0][0])
            raise NotANumberError(
                f"expected numbers, got NaN at site {name!r} in group {group!r}, draw {draw}: look at what the site "
                "is computed from"
            )
        arrays = self.arrays.setdefault(group, {})
        if name not in arrays:
            arrays[name] = np.empty((self.num_samples, *values.shape[1:]), values.dtype)
        arrays[name][self.start : self.start + len(values)] = values


def _to_numpy(tensor: Tensor) -> np.ndarray:
    import torch

    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return (tensor.float() if half else tensor).detach().cpu().numpy()


def add_chunk(draws: Draws, plan: Plan, sites: Sites, particles: Particles, wanted: set[str]) -> None:
    """Puts one chunk into the groups."""
    from pyro import poutine
    from pyro.distributions.util import scale_and_mask

    count, dim = particles.count, particles.dim
    _same_sites(plan, particles.model)
    if "posterior" in wanted:
        _put_values(draws, "posterior", sites.latent, particles.model, count, dim)
    if "log_likelihood" in wanted:
        for name, layout in sites.data.items():
            site = particles.model[name]
            pointwise = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])
            draws.put("log_likelihood", name, layout.log_densities(pointwise, count, dim))
    if "sample_stats" in wanted:
        for name, program in (("log_p", particles.model), ("log_q", particles.guide)):
            terms = [plan.reduce(site["log_prob"], particles) for site in program.values()]
            draws.put("sample_stats", name, sum(terms[1:], terms[0]))
    free = _without_data(plan.model)
    if "posterior_predictive" in wanted:
        trace = poutine.Trace()
        for name, site in particles.guide.items():
            trace.add_node(name, **site)
        predicted = _free_draw(poutine.replay(free, trace=trace), plan, count, dim)
        _put_values(draws, "posterior_predictive", sites.data, predicted, count, dim)
    if wanted & {"prior", "prior_predictive"}:
        prior = _free_draw(free, plan, count, dim)
        if "prior" in wanted:
            _put_values(draws, "prior", sites.latent, prior, count, dim)
        if "prior_predictive" in wanted:
            _put_values(draws, "prior_predictive", sites.data, prior, count, dim)


def _put_values(
    draws: Draws, group: str, layouts: dict[str, Layout], sites: dict[str, Site], count: int, dim: int | None
) -> None:
    for name, layout in layouts.items():
        draws.put(group, name, layout.values(sites[name]["value"], count, dim))


def _without_data(model: Program) -> Program:
    """The model with its data sites drawn: ``poutine.uncondition``, which would redraw deterministic sites as well."""
    from pyro.poutine.uncondition_messenger import UnconditionMessenger

    class DrawData(UnconditionMessenger):
        def _pyro_sample(self, msg: Any) -> None:
            if not is_deterministic(msg):
                super()._pyro_sample(msg)

    return DrawData()(model)


def _free_draw(program: Program, plan: Plan, count: int, dim: int | None) -> dict[str, Site]:
    """Sites of the model run without its data, ``count`` times at once."""
    import pyro
    from pyro import poutine

    from inference.bounds.particles import PARTICLES

    try:
        with nullcontext() if dim is None else pyro.plate(PARTICLES, count, dim=dim):
            nodes = poutine.trace(program).get_trace(*plan.args, **plan.kwargs).nodes
    except Exception as error:  # a program is foreign code: it may fail in any way where its data are drawn
        raise PosteriorError(
            "expected a model that can draw its own data, but without them it fails "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): leave prior and predictive groups out "
            'with groups=("posterior", "log_likelihood", "observed_data", "sample_stats")'
        ) from error
    _same_sites(plan, nodes)
    return nodes


def _same_sites(plan: Plan, sites: Mapping[str, Site]) -> None:
    for name in plan.prototype.model:
        if name not in sites:
            raise PosteriorError(
                f"expected the same sites in each draw, but {name!r} is missing in some: draw it always, and ignore it "
                "where it is not used"
            )


def assemble(
    draws: Draws, plan: Plan, sites: Sites, labels: dict[str, np.ndarray], wanted: set[str]
) -> xarray.DataTree:
    """The filled arrays as a tree, with named dims, coords and what made it in the attributes."""
    import pyro
    import torch
    import xarray

    import ppl_models

    data = draws.arrays
    if "observed_data" in wanted:
        data["observed_data"] = {
            name: _to_numpy(layout.values(plan.prototype.model[name]["value"])[0])
            for name, layout in sites.data.items()
        }
    layouts = {**sites.latent, **sites.data}
    shared = tuple(name for name, _, _ in plan.shared)
    dims_of: dict[str, Callable[[str], tuple[str, ...]]] = {
        "log_likelihood": lambda name: (DRAW, *layouts[name].plates),
        "observed_data": lambda name: layouts[name].dims,
        "sample_stats": lambda name: (DRAW, *shared),
    }
    datasets = {}
    for group in (group for group in GROUPS if group in data):
        named = dims_of.get(group, lambda name: (DRAW, *layouts[name].dims))
        variables = {name: (named(name), array) for name, array in data[group].items()}
        used = dict.fromkeys(dim for dims, _ in variables.values() for dim in dims)
        coords = {dim: np.arange(draws.num_samples) if dim == DRAW else labels[dim] for dim in used}
        attrs = {"units": "nats"} if group in ("log_likelihood", "sample_stats") else {}
        datasets[group] = xarray.Dataset(variables, coords, attrs)
    tree = xarray.DataTree.from_dict(datasets)
    tree.attrs = {
        "units": "nats",
        "num_samples": draws.num_samples,
        "note": plan.note,
        "creation_library": "ppl-models",
        "creation_library_version": ppl_models.__version__,
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "torch_version": str(torch.__version__),
        "xarray_version": xarray.__version__,
    }
    return tree
