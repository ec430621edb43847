"""Diagnostics of Markov chains by ArviZ: split R-hat, effective sample size, Monte Carlo error of the mean.

R-hat is the rank-normalised split one, ESS the bulk one (Vehtari, Gelman, Simpson, Carpenter and Buerkner 2021,
arXiv:1903.08008). Chains that agree have R-hat below 1.01; ESS counts the independent draws that they are worth.

The one constraint: a group has dims ``chain`` and ``draw``, as :func:`inference.nuts.gold_standard` makes it. For
a guide's independent draws these numbers have no meaning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray


def r_hat(tree: xarray.DataTree, group: str = "posterior") -> xarray.Dataset:
    """R-hat of every scalar of a group, a variable per site without the dims ``chain`` and ``draw``.

    Example:
        >>> import numpy as np, xarray
        >>> draws = np.random.default_rng(0).normal(size=(4, 500))
        >>> tree = xarray.DataTree.from_dict({"posterior": xarray.Dataset({"z": (("chain", "draw"), draws)})})
        >>> 0.99 < float(r_hat(tree)["z"]) < 1.01
        True
    """
    from arviz_stats import rhat

    return rhat(tree, group=group)


def effective_sample_size(tree: xarray.DataTree, group: str = "posterior") -> xarray.Dataset:
    """Bulk ESS of every scalar of a group, laid out as :func:`r_hat`."""
    from arviz_stats import ess

    return ess(tree, group=group)


def error_of_the_mean(tree: xarray.DataTree, group: str = "posterior") -> xarray.Dataset:
    """Monte Carlo standard error of every scalar's mean, laid out as :func:`r_hat`, in units of the site."""
    from arviz_stats import mcse

    return mcse(tree, group=group)
