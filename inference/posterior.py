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

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from inference.posterior_layout import DRAW, GROUPS, PosteriorError

if TYPE_CHECKING:
    import pandas
    import xarray
    from matplotlib.figure import Figure

    from inference.bounds.particles import Program

MAX_ROWS = 60  # what a page holds legibly

__all__ = [
    "DRAW",
    "GROUPS",
    "PosteriorError",
    "load_posterior",
    "plot_posterior",
    "save_posterior",
    "summary",
    "to_datatree",
]


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
    from inference.posterior_draws import Draws, add_chunk, assemble, one_at_a_time_if_needed
    from inference.posterior_layout import Sites, labels_of, wanted_groups
    from inference.progress import Progress

    model, guide, args = _programs(pair, args)
    if num_samples < 1:
        raise PosteriorError(f"expected num_samples >= 1, got {num_samples}: ask for at least one draw")
    with torch.no_grad():
        plan = make_plan(model, guide, args, kwargs)
        sites = Sites.of(plan, dims or {})
        wanted = wanted_groups(groups, sites)
        labels = labels_of(plan, sites, coords or {})
        plan = one_at_a_time_if_needed(plan, wanted)
        draws = Draws(num_samples)
        with Progress("drawing from guide and model", num_samples, unit="draws") as progress:
            for particles in plan.chunks(num_samples):
                add_chunk(draws, plan, sites, particles, wanted)
                draws.start += particles.count
                progress.advance(particles.count)
    return assemble(draws, plan, sites, labels, wanted)


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


def first_scalars(tree: xarray.DataTree, sites: Sequence[str]) -> dict[str, list[int]]:
    """Coordinates for :func:`plot_posterior` of at most :data:`MAX_ROWS` scalars.

    Two data where they fit, else one; of a site with many entries the first ones.

    Example:
        >>> import torch
        >>> from ppl_models import LinearGaussian
        >>> tree = to_datatree(LinearGaussian.random(data_dim=3, latent_dim=2), torch.zeros(5, 3), num_samples=10)
        >>> first_scalars(tree, ["z"])
        {'data': [0, 1]}
    """
    draws = tree["posterior"].dataset[list(sites)]
    one = draws.isel({DRAW: 0, "data": 0})
    each = sum(variable.size for variable in one.data_vars.values())
    if each <= MAX_ROWS:
        return {"data": list(range(min(draws.sizes["data"], 2 if 2 * each <= MAX_ROWS else 1)))}
    first = {str(site): str(one[site].dims[0]) for site in sites if one[site].dims}
    kept = max(one[site].sizes[dim] for site, dim in first.items())
    while kept > 1 and sum(one[s].size * min(1, kept / one[s].sizes[d]) for s, d in first.items()) > MAX_ROWS:
        kept -= 1
    return {"data": [0]} | {dim: list(range(min(kept, one[site].sizes[dim]))) for site, dim in first.items()}


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
        # The names of a label's dimensions stand side by side below, an inch each.
        names = 1.0 + len({dim for variable in draws.data_vars.values() for dim in variable.dims if dim != DRAW})
        figsize, ratios = (4.6 + names, 1.4 + 0.25 * rows), [names, 4.6]
        size: dict[str, Any] = {"figsize": figsize, "width_ratios": ratios, "layout": "constrained"}
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
        if len(args) == 1:
            pair.check_data(args[0])
        return pair.model, pair.guide, args
    if not args or not callable(args[0]):
        got = type(args[0]).__name__ if args else "nothing"
        raise PosteriorError(
            f"expected the guide, a Pyro program, after the model, got {got}: call to_datatree(model, guide, *args)"
        )
    return pair, args[0], args[1:]


def _require_group(tree: xarray.DataTree, group: str) -> xarray.Dataset:
    drawn = [name for name, node in tree.children.items() if DRAW in node.dims]
    if group not in drawn:
        raise PosteriorError(f"expected a group of draws among {', '.join(drawn) or 'none'}, got {group!r}: choose one")
    return tree[group].to_dataset()
