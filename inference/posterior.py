"""Posterior, prior and predictive draws of a pair as an ArviZ ``DataTree``: saved, summarised, drawn.

With z^(s) ~ q(z | x) drawn independently for s = 1..S, the groups are

    posterior             z^(s)                                   prior             z ~ p(z)
    posterior_predictive  x ~ p(x | z^(s))                        prior_predictive  x ~ p(x | z), with z of ``prior``
    log_likelihood        log p(x_i | z^(s)), datum by datum      observed_data     x
    sample_stats          log_p = log p(x, z^(s)), log_q = log q(z^(s) | x)

so ``posterior`` is the guide, right or wrong: the mean of log_p - log_q is the ELBO, and with the exact posterior as
guide every draw of it is log p(x) (lecture notes 000). Log-densities are in nats.

Conventions. Draws are independent, so there are no chains: the draw dimension is ``sample`` everywhere (ArviZ:
``sample_dims=["sample"]``). Plates are dimensions under their own names, a site's other dimensions are
``{site}_dim_0``... unless ``dims`` names them. Deterministic sites stand with the latents, auxiliary guide sites only
count in log_q. Draws keep their dtype (half precision, which netCDF lacks, is widened to float32).

The one constraint: each draw has the same sites, of the same shapes, for the same data. Reading, summarising and drawing
import no torch, so a saved file needs only ArviZ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas
    import xarray
    from matplotlib.figure import Figure
    from torch import Size, Tensor

    from inference.bounds.particles import Particles, Plan, Program, Site

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
MAX_ROWS = 60  # what a page holds legibly


class PosteriorError(ValueError):
    """Draws that cannot be laid out, or a request that does not fit them; the message names the site or dimension."""


def to_datatree(
    pair: Any,
    *args: Any,
    num_samples: int = 1000,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    groups: Collection[str] | None = None,
    **kwargs: Any,
) -> xarray.DataTree:
    """Draws from guide and model as an ArviZ ``DataTree``; see the module's text for the groups.

    ``to_datatree(pair, x)`` for a :class:`~ppl_models.ModelGuidePair`, ``to_datatree(model, guide, *args)`` for any two
    Pyro programs. The result depends on torch's random state and on nothing else.

    Args:
        pair: a ModelGuidePair, or a Pyro model p(x, z), whose guide q(z | x) is then the next argument.
        args: arguments of model and guide (for a pair: the data x ``[B, *data_shape]``).
        num_samples: S, independent draws of each group.
        coords: labels by dimension, as in ``{"data": names}``; dimensions without are numbered from 0.
        dims: names of a site's own dimensions, those that are no plates, as in ``{"x": ["row", "column"]}``.
        groups: which of :data:`GROUPS` to make; None makes all that the pair has (all, where the model observes data).
        kwargs: keyword arguments of model and guide.

    Returns:
        The tree. Variables are named by site and have dims ``[sample, *plates, *own]``; ``log_likelihood`` has
        ``[sample, *plates]`` without a plate's subsampling scale; ``log_p`` and ``log_q`` have
        ``[sample, *plates that all sites share]``, scaled as in the ELBO, in float64.

    Raises:
        PosteriorError: no latent site, ``num_samples`` below one, names or lengths in ``coords``, ``dims`` or ``groups``
            that do not fit, a model that cannot run without its data, or draws of changing sites, shapes or subsamples.
        PairError: the programs' sites do not match; the message names the site.
        NotANumberError: a draw or a log-density is NaN; the message names the site.

    Example:
        >>> import torch
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> tree = to_datatree(pair, torch.zeros(5, 3), num_samples=10)
        >>> dict(tree["posterior"]["z"].sizes)
        {'sample': 10, 'data': 5, 'z_dim_0': 2}
        >>> dict(tree["sample_stats"]["log_p"].sizes)
        {'sample': 10, 'data': 5}
    """
    import torch

    from inference.bounds.particles import make_plan
    from inference.progress import Progress

    model, guide, args = _programs(pair, args)
    if num_samples < 1:
        raise PosteriorError(f"expected num_samples >= 1, got {num_samples}: ask for at least one draw")
    with torch.no_grad():
        plan = make_plan(model, guide, args, kwargs)
        sites = _Sites.of(plan, dims or {})
        wanted = _wanted_groups(groups, sites)
        labels = _labels(plan, sites, coords or {})
        plan = _one_at_a_time_if_needed(plan, wanted)
        draws = _Draws(num_samples)
        with Progress("drawing from guide and model", num_samples, unit="draws") as progress:
            for particles in plan.chunks(num_samples):
                _add(draws, plan, sites, particles, wanted)
                draws.start += particles.count
                progress.advance(particles.count)
    return _assemble(draws, plan, sites, labels, wanted)


def save_posterior(tree: xarray.DataTree, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes a tree as netCDF-4, all or nothing; :func:`load_posterior` reads back what was written, bit by bit.

    Args:
        tree: from :func:`to_datatree`.
        path: the file, in an existing folder.
        overwrite: whether a file of that name may be replaced.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        inference.training.storage.StorageError: the file system refused; what was there before is intact.
    """
    from inference.training.storage import write_atomic

    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"expected a new file, but {path} exists: choose another name or pass overwrite=True")
    content = tree.to_netcdf(engine="h5netcdf")
    assert content is not None  # without a path, xarray returns the file's bytes
    write_atomic(path, bytes(content))


def load_posterior(path: str | Path) -> xarray.DataTree:
    """Reads a tree that :func:`save_posterior` wrote, whole, into memory.

    Raises:
        FileNotFoundError: there is no such file.
        PosteriorError: the file is not a netCDF-4 file, or is damaged.

    Example:
        >>> import tempfile, torch
        >>> from ppl_models import LinearGaussian
        >>> tree = to_datatree(LinearGaussian.random(data_dim=3, latent_dim=2), torch.zeros(5, 3), num_samples=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_posterior(tree, f"{folder}/posterior.nc")
        ...     load_posterior(f"{folder}/posterior.nc").identical(tree)
        True
    """
    import xarray

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a netCDF file, but there is no {path}: write one with save_posterior")
    try:
        with xarray.open_datatree(path, engine="h5netcdf") as stored:
            tree = stored.load()
    except (OSError, KeyError, ValueError, RuntimeError) as error:  # what HDF5 raises depends on where the damage is
        raise PosteriorError(
            f"expected a netCDF-4 file, but {path} cannot be read ({' '.join(str(error).split())}): write it anew"
        ) from error
    for node in tree.subtree:
        node.attrs = {
            name: value.item() if isinstance(value, np.generic) else value for name, value in node.attrs.items()
        }
    return tree


def summary(tree: xarray.DataTree, group: str = "posterior", **options: Any) -> pandas.DataFrame:
    """Mean, standard deviation and credible interval of each scalar: ``arviz_stats.summary`` for independent draws.

    Chain diagnostics (R-hat, ESS) have no meaning here and are left out.

    Args:
        tree: from :func:`to_datatree` or :func:`load_posterior`.
        group: which group of draws.
        options: further options of ``arviz_stats.summary``, as in ``var_names=["z"], coords={"data": [0]}, ci_prob=0.9``.

    Returns:
        One row per scalar, as in ``z[0, 1]``.

    Raises:
        PosteriorError: the tree has no such group.

    Example:
        >>> import torch
        >>> from ppl_models import LinearGaussian
        >>> tree = to_datatree(LinearGaussian.random(data_dim=3, latent_dim=2), torch.zeros(1, 3), num_samples=10)
        >>> list(summary(tree).index)
        ['z[0, 0]', 'z[0, 1]']
    """
    from arviz_stats import summary as arviz_summary

    _require_group(tree, group)
    return arviz_summary(tree, group=group, sample_dims=[DRAW], kind="stats", **options)


def plot_posterior(
    tree: xarray.DataTree,
    group: str = "posterior",
    *,
    kind: Literal["forest", "dist"] = "forest",
    var_names: Sequence[str] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> Figure:
    """Central intervals of each scalar as a forest, or their distributions, by ``arviz_plots`` on matplotlib.

    Args:
        tree: from :func:`to_datatree` or :func:`load_posterior`.
        group: which group of draws.
        kind: ``"forest"`` (means, 50 % and 89 % intervals below each other) or ``"dist"`` (a panel each: densities, or
            cumulative distributions where a site is discrete).
        var_names: sites to show; None shows all of the group.
        coords: labels to show by dimension, as in ``{"data": [0, 1, 2]}``.

    Returns:
        The figure, free of pyplot's list of open figures: save it with ``figure.savefig(path)``.

    Raises:
        PosteriorError: no such group, site or label, an unknown kind, or more than :data:`MAX_ROWS` scalars.

    Example:
        >>> import torch
        >>> from ppl_models import LinearGaussian
        >>> tree = to_datatree(LinearGaussian.random(data_dim=3, latent_dim=2), torch.zeros(1, 3), num_samples=10)
        >>> plot_posterior(tree).get_suptitle()
        'posterior: mean, 50 % and 89 % central intervals'
    """
    import matplotlib.pyplot as plt
    import xarray
    from arviz_plots import plot_dist, plot_forest

    if kind not in ("forest", "dist"):
        raise PosteriorError(f"expected kind 'forest' or 'dist', got {kind!r}")
    draws = _require_group(tree, group)
    chosen = {dim: np.atleast_1d(labels) for dim, labels in (coords or {}).items()}
    try:
        draws = draws[list(draws.data_vars) if var_names is None else list(var_names)].sel(chosen)
    except KeyError as error:
        has = f"sites among {', '.join(map(str, draws.data_vars))} and dimensions among {', '.join(map(str, draws.sizes))}"
        why = " ".join(str(error.args[0]).split())
        raise PosteriorError(f"expected {has} of {group!r}, with their labels, got another: {why}") from error
    rows = sum(variable.size // draws.sizes[DRAW] for variable in draws.data_vars.values())
    if not 1 <= rows <= MAX_ROWS:
        raise PosteriorError(
            f"expected 1 to {MAX_ROWS} scalars to draw, got {rows}: select some with var_names=[...] or "
            "coords={'data': [0, 1]}"
        )
    shown = xarray.DataTree.from_dict({group: draws})
    common: dict[str, Any] = {
        "group": group,
        "sample_dims": [DRAW],
        "backend": "matplotlib",
        "point_estimate": "mean",
        "ci_kind": "eti",
    }
    if kind == "forest":
        # A row is 0.25 inch, so that labels neither touch nor float apart however many rows there are.
        size: dict[str, Any] = {"figsize": (7.0, 1.4 + 0.25 * rows), "width_ratios": [1, 2], "layout": "constrained"}
        drawn = plot_forest(shown, ci_probs=(0.5, 0.89), figure_kwargs=size, **common)
        title = f"{group}: mean, 50 % and 89 % central intervals"
    else:
        columns = min(rows, 4)
        size = {"figsize": (2.6 * columns, 0.6 + 2.0 * -(-rows // columns)), "layout": "constrained"}
        discrete = any(variable.dtype.kind in "iub" for variable in draws.data_vars.values())
        law = "ecdf" if discrete else "kde"  # smoothing or binning would move a discrete site's mass off its values
        drawn = plot_dist(shown, kind=law, ci_prob=0.89, figure_kwargs=size, col_wrap=columns, **common)
        title = f"{group}: {'cumulative distribution' if discrete else 'density'}, mean and 89 % central interval"
    figure = drawn.viz["figure"].item()
    figure.suptitle(title)
    plt.close(figure)
    return figure


def _programs(pair: Any, args: tuple[Any, ...]) -> tuple[Program, Program, tuple[Any, ...]]:
    from ppl_models.pair import ModelGuidePair

    if isinstance(pair, ModelGuidePair):
        return pair.model, pair.guide, args
    if not args or not callable(args[0]):
        got = type(args[0]).__name__ if args else "nothing"
        raise PosteriorError(
            f"expected the guide, a Pyro program, after the model, got {got}: call to_datatree(model, guide, *args)"
        )
    return pair, args[0], args[1:]


@dataclass(frozen=True)
class _Layout:
    """Where a site's numbers go: its shape in one draw and the names of its dimensions, None for one that is dropped."""

    site: str
    batch: Size
    event: Size
    batch_dims: tuple[str | None, ...]
    event_dims: tuple[str, ...]

    @classmethod
    def of(cls, site: Site, names: Sequence[str] | None) -> _Layout:
        """Reads the layout off one draw; ``names`` are the user's for the dimensions that are no plates."""
        import torch

        event_dim = site["fn"].event_dim
        value = torch.as_tensor(site["value"])
        event = value.shape[value.dim() - event_dim :]
        batch = value.shape[: value.dim() - event_dim]
        if not _is_deterministic(site):  # these declare all their dims as event dims unless told otherwise
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
class _Sites:
    """The model's sites by what they are, with their layouts; ``latent`` includes deterministic ones."""

    latent: dict[str, _Layout]
    data: dict[str, _Layout]

    @classmethod
    def of(cls, plan: Plan, dims: Mapping[str, Sequence[str]]) -> _Sites:
        from pyro.distributions import Unit

        latent: dict[str, _Layout] = {}
        data: dict[str, _Layout] = {}
        _refuse_random_subsamples(plan)
        if all(site["is_observed"] for site in plan.prototype.model.values()):
            raise PosteriorError(
                "expected a model with a latent site, got one whose sites are all observed "
                f"({', '.join(plan.prototype.model) or 'it has none'}): there is no posterior to draw"
            )
        for name, site in plan.prototype.model.items():
            if not site["is_observed"] or _is_deterministic(site):
                latent[name] = _Layout.of(site, dims.get(name))
            elif not isinstance(site["fn"], Unit):  # a factor has no value
                data[name] = _Layout.of(site, dims.get(name))
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


def _wanted_groups(groups: Collection[str] | None, sites: _Sites) -> set[str]:
    if groups is None:
        return set(GROUPS) if sites.data else set(GROUPS) - NEED_DATA
    for group in groups:
        if group not in GROUPS:
            raise PosteriorError(f"expected groups among {', '.join(GROUPS)}, got {group!r}: correct or remove it")
        if group in NEED_DATA and not sites.data:
            raise PosteriorError(f"expected a model that observes data for the group {group!r}, got none: remove it")
    return set(groups)


def _labels(plan: Plan, sites: _Sites, coords: Mapping[str, Any]) -> dict[str, np.ndarray]:
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


def _one_at_a_time_if_needed(plan: Plan, wanted: set[str]) -> Plan:
    """The plan, vectorised only if the replay check also holds for the model without its data, and covers all sites."""
    from inference.bounds.particles import make_plan

    if not plan.vectorized:
        return plan
    for name, site in plan.prototype.model.items():
        if _is_deterministic(site):
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


def _is_deterministic(site: Site) -> bool:
    return bool(site["infer"].get("_deterministic"))


class _Draws:
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


def _add(draws: _Draws, plan: Plan, sites: _Sites, particles: Particles, wanted: set[str]) -> None:
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
    draws: _Draws, group: str, layouts: dict[str, _Layout], sites: dict[str, Site], count: int, dim: int | None
) -> None:
    for name, layout in layouts.items():
        draws.put(group, name, layout.values(sites[name]["value"], count, dim))


def _without_data(model: Program) -> Program:
    """The model with its data sites drawn: ``poutine.uncondition``, which would redraw deterministic sites as well."""
    from pyro.poutine.uncondition_messenger import UnconditionMessenger

    class DrawData(UnconditionMessenger):
        def _pyro_sample(self, msg: Any) -> None:
            if not _is_deterministic(msg):
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


def _assemble(
    draws: _Draws, plan: Plan, sites: _Sites, labels: dict[str, np.ndarray], wanted: set[str]
) -> xarray.DataTree:
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


def _require_group(tree: xarray.DataTree, group: str) -> xarray.Dataset:
    drawn = [name for name, node in tree.children.items() if DRAW in node.dims]
    if group not in drawn:
        raise PosteriorError(f"expected a group of draws among {', '.join(drawn) or 'none'}, got {group!r}: choose one")
    return tree[group].to_dataset()
