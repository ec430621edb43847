"""How a pair's draws are laid out as named arrays: groups, dimensions and labels, read off one draw.

Plates are dimensions under their own names; a site's other dimensions are ``{site}_dim_0``... unless the user names them.
The one constraint: each draw has the same sites, of the same shapes, for the same data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Size, Tensor

    from inference.bounds.particles import Plan, Site

DRAW = "sample"
GROUPS = (
    "posterior",
    "prior",
    "posterior_predictive",
    "prior_predictive",
    "log_likelihood",
    "observed_data",
    "sample_stats",
)
NEED_DATA = {"posterior_predictive", "prior_predictive", "log_likelihood", "observed_data"}


class PosteriorError(ValueError):
    """Draws that cannot be laid out, or a request that does not fit them; the message names the site or dimension."""


@dataclass(frozen=True)
class Layout:
    """Where a site's numbers go: its shape in one draw and the names of its dimensions, None for one that is dropped."""

    site: str
    batch: Size
    event: Size
    batch_dims: tuple[str | None, ...]
    event_dims: tuple[str, ...]

    @classmethod
    def of(cls, site: Site, names: Sequence[str] | None) -> Layout:
        """Reads the layout off one draw; ``names`` are the user's for the dimensions that are no plates."""
        import torch

        event_dim = site["fn"].event_dim
        value = torch.as_tensor(site["value"])
        event = value.shape[value.dim() - event_dim :]
        batch = value.shape[: value.dim() - event_dim]
        if not is_deterministic(site):  # these declare all their dims as event dims unless told otherwise
            batch = torch.broadcast_shapes(batch, site["fn"].batch_shape)
        plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
        places = range(-len(batch), 0)
        # Between plates of which the site is in the outer one only, Pyro leaves a dimension of size 1.
        holes = {
            d for d, n in zip(places, batch, strict=True) if n == 1 and d not in plates and min(plates, default=0) < d
        }
        own = [d for d in places if d not in plates and d not in holes]
        count = len(own) + len(event)
        if names is None:
            names = [f"{site['name']}_dim_{k}" for k in range(count)]
        if isinstance(names, str) or len(names) != count:
            raise PosteriorError(
                f"expected {count} dimension names for site {site['name']!r}, whose shape without plates is "
                f"{[*(batch[d] for d in own), *event]}, got {names!r}: pass a list of as many names"
            )
        own_names = dict(zip(own, names, strict=False))
        batch_dims = tuple(plates.get(d, own_names.get(d)) for d in places)
        return cls(site["name"], batch, event, batch_dims, tuple(names[len(own) :]))

    @property
    def plates(self) -> tuple[str, ...]:
        """Names of the batch dimensions that are kept."""
        return tuple(name for name in self.batch_dims if name is not None)

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of all dimensions that are kept."""
        return (*self.plates, *self.event_dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of :attr:`dims`."""
        kept = (n for n, name in zip(self.batch, self.batch_dims, strict=True) if name is not None)
        return (*kept, *self.event)

    def values(self, value: Any, count: int = 1, dim: int | None = None) -> Tensor:
        """``[count, *shape]``, from a value drawn ``count`` times under a plate at ``dim`` (None: drawn once)."""
        import torch

        value = torch.as_tensor(value)
        padding = 0 if dim is None else -dim - 1 - len(self.batch)
        target = (count, *[1] * padding, *self.batch, *self.event)
        from_the_right = enumerate(zip(reversed(value.shape), reversed(target), strict=False))
        if value.dim() > len(target) or any(n != t and (n != 1 or k < len(self.event)) for k, (n, t) in from_the_right):
            raise PosteriorError(
                f"expected draws of one shape at site {self.site!r}, got {list(value.shape)} after "
                f"{[*self.batch, *self.event]}: pad them to a fixed shape"
            )
        return value.broadcast_to(target).reshape(count, *self.shape)

    def log_densities(self, log_prob: Tensor, count: int, dim: int | None) -> Tensor:
        """``[count, *plates]`` likewise."""
        return replace(self, event=self.event[:0], event_dims=()).values(log_prob, count, dim)


@dataclass(frozen=True)
class Sites:
    """The model's sites by what they are, with their layouts; ``latent`` includes deterministic ones."""

    latent: dict[str, Layout]
    data: dict[str, Layout]

    @classmethod
    def of(cls, plan: Plan, dims: Mapping[str, Sequence[str]]) -> Sites:
        """Reads the layouts of all sites off the plan's first draw; ``dims`` are the user's names by site."""
        from pyro.distributions import Unit

        latent: dict[str, Layout] = {}
        data: dict[str, Layout] = {}
        _refuse_random_subsamples(plan)
        if all(site["is_observed"] for site in plan.prototype.model.values()):
            raise PosteriorError(
                "expected a model with a latent site, got one whose sites are all observed "
                f"({', '.join(plan.prototype.model) or 'it has none'}): there is no posterior to draw"
            )
        for name, site in plan.prototype.model.items():
            if not site["is_observed"] or is_deterministic(site):
                latent[name] = Layout.of(site, dims.get(name))
            elif not isinstance(site["fn"], Unit):  # a factor has no value
                data[name] = Layout.of(site, dims.get(name))
        for name in dims:
            if name not in latent and name not in data:
                raise PosteriorError(
                    f"expected dims of the sites {', '.join([*latent, *data])}, got {name!r}: correct or remove the name"
                )
        return cls(latent, data)


def _refuse_random_subsamples(plan: Plan) -> None:
    """A plate that picks other data for each draw leaves nothing that draws could be compared along."""
    from pyro import poutine
    from pyro.poutine.util import site_is_subsample

    sites = [*plan.prototype.model.values(), *plan.prototype.guide.values()]
    if all(frame.full_size in (None, frame.size) for site in sites for frame in site["cond_indep_stack"]):
        return
    guide = poutine.trace(plan.guide).get_trace(*plan.args, **plan.kwargs)
    model = poutine.trace(poutine.replay(plan.model, trace=guide)).get_trace(*plan.args, **plan.kwargs)
    for name, site in [*guide.nodes.items(), *model.nodes.items()]:
        if site["type"] == "sample" and site_is_subsample(site):
            law = site["fn"]
            if law.subsample_size is not None and law.subsample_size < law.size:
                raise PosteriorError(
                    f"expected the same data in each draw, but plate {name!r} picks {law.subsample_size} of {law.size} "
                    "at random: fix the choice with subsample=indices in place of subsample_size"
                )


def wanted_groups(groups: Collection[str] | None, sites: Sites) -> set[str]:
    """The groups to make: those asked for, or all that the pair has."""
    if groups is None:
        return set(GROUPS) if sites.data else set(GROUPS) - NEED_DATA
    for group in groups:
        if group not in GROUPS:
            raise PosteriorError(f"expected groups among {', '.join(GROUPS)}, got {group!r}: correct or remove it")
        if group in NEED_DATA and not sites.data:
            raise PosteriorError(f"expected a model that observes data for the group {group!r}, got none: remove it")
    return set(groups)


def labels_of(plan: Plan, sites: Sites, coords: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Labels of each dimension: the user's, or 0, 1, ..."""
    owner: dict[str, str] = {}
    sizes: dict[str, int] = {}
    layouts = {**sites.latent, **sites.data}
    for site, layout in layouts.items():
        if len(set(layout.dims)) < len(layout.dims):
            raise PosteriorError(f"expected different names for the dimensions of site {site!r}, got {layout.dims}")
        for dim, size in zip(layout.dims, layout.shape, strict=True):
            if dim in layouts or dim == DRAW or site == DRAW:
                raise PosteriorError(
                    f"the dimension {dim!r} of site {site!r} clashes with a site or with the draws' {DRAW!r}: "
                    "rename it with dims={...}, or rename the plate or site"
                )
            if sizes.setdefault(dim, size) != size:
                raise PosteriorError(
                    f"the dimension {dim!r} has {sizes[dim]} elements at site {owner[dim]!r} and {size} at {site!r}: "
                    "give them different names in dims"
                )
            owner.setdefault(dim, site)
    labels = {dim: np.arange(size) for dim, size in sizes.items()}
    for dim, given in coords.items():
        if dim not in sizes:
            raise PosteriorError(
                f"expected coords of the dimensions {', '.join(sizes)}, got {dim!r}: correct or remove the name"
            )
        labels[dim] = np.asarray(given)
        if labels[dim].shape != (sizes[dim],):
            raise PosteriorError(
                f"expected {sizes[dim]} labels in coords for the dimension {dim!r} (as site {owner[dim]!r} has), "
                f"got shape {list(labels[dim].shape)}: pass one label per element"
            )
    return labels


def is_deterministic(site: Site) -> bool:
    """Whether a site is a ``pyro.deterministic`` one."""
    return bool(site["infer"].get("_deterministic"))
