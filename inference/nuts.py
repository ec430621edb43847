"""The guide beside a gold standard: NUTS on p(z | x) for chosen data, in one ``DataTree``.

    posterior   z ~ p(z | x_i) by NUTS     dims [chain, draw, data, ...]
    guide       z ~ q(z | x_i)             dims [sample, data, ...]
    sample_stats  diverging                dims [chain, draw, data]        observed_data  x_i

``posterior`` is laid out as ArviZ expects chains, so all of its tools apply; the guide's draws are independent and have no
chains: pass ``group="guide", sample_dims=["sample"]`` (as :func:`inference.posterior.summary` does).

NUTS (Hoffman and Gelman 2014, arXiv:1111.4246) is Pyro's, on the pair's own model, one datum at a time. Chains start from
prior draws, which are wider than the posterior, so that R-hat can show a posterior in several pieces.

The one constraint: every latent is continuous. Look at R-hat, ESS and divergences before the guide is blamed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from inference.chains import effective_sample_size, error_of_the_mean, r_hat
from inference.printed import Printed
from inference.views.tables import text_table

if TYPE_CHECKING:
    import xarray
    from torch import Tensor

    from ppl_models.pair import ModelGuidePair

Array = NDArray[np.float64]

GOOD_R_HAT = 1.01
ENOUGH_DRAWS = 400  # effective draws; Vehtari et al. 2021, section 4
FAR, NARROW, WIDE = 0.3, 0.8, 1.25  # what is put into words: a shift in posterior sds, and ratios of sds
Z_MAX = 4.0
DOUBT = " [chains not to be trusted]"


class GoldStandardError(ValueError):
    """Data or latents that NUTS cannot be run for."""


@dataclass(frozen=True, repr=False)
class GuideComparison(Printed):
    """Guide against NUTS for each datum and latent dimension; arrays ``[R]``, a row each, in units of the latent.

    ``shift`` is (guide mean - NUTS mean) / NUTS sd, ``shift_z`` the same difference in standard errors of the draws, and
    ``sd_ratio`` the guide's sd over NUTS', with the standard error ``sd_ratio_std_error``.
    """

    names: tuple[str, ...]
    data: NDArray[Any]
    nuts_mean: Array
    nuts_sd: Array
    guide_mean: Array
    guide_sd: Array
    shift: Array
    shift_z: Array
    sd_ratio: Array
    sd_ratio_std_error: Array
    r_hat: Array
    ess: Array
    num_divergences: int

    @property
    def trusted(self) -> NDArray[np.bool_]:
        """Where the chains are a gold standard: R-hat at most 1.01 and at least 400 effective draws."""
        return (self.r_hat <= GOOD_R_HAT) & (self.ess >= ENOUGH_DRAWS)

    def findings(self, row: int) -> str:
        """One row in words: what is wrong with the guide there, or "agrees", and whether the chains can tell."""
        said = []
        if abs(self.shift[row]) > FAR and abs(self.shift_z[row]) > Z_MAX:
            side = "high" if self.shift[row] > 0 else "low"
            said.append(f"{abs(self.shift[row]):.1f} sd too {side} (z = {self.shift_z[row]:+.0f})")
        ratio, error = self.sd_ratio[row], self.sd_ratio_std_error[row]
        if not NARROW <= ratio <= WIDE and abs(ratio - 1) > Z_MAX * error:
            said.append(f"too {'narrow' if ratio < 1 else 'wide'} (sd × {ratio:.2f})")
        return (" and ".join(said) or "agrees") + ("" if self.trusted[row] else DOUBT)

    def words(self) -> str:
        """The comparison in sentences: a summary, then one line for each row in which the guide is off."""
        found = [self.findings(row) for row in range(len(self.names))]
        off = [row for row, text in enumerate(found) if not text.startswith("agrees")]
        doubtful = int((~self.trusted).sum())
        doubt = f"; {doubtful} rows not to be trusted (R-hat above {GOOD_R_HAT} or ESS below {ENOUGH_DRAWS})"
        chains = (
            f"chains: R-hat at most {self.r_hat.max():.3f}, ESS at least {self.ess.min():.0f}, "
            f"{self.num_divergences} divergences{doubt if doubtful else ''}"
        )
        head = f"guide against NUTS: {len(found) - len(off)} of {len(found)} latent dimensions agree\n{chains}"
        return "\n".join([head, *(f"datum {self.data[row]}, {self.names[row]}: {found[row]}" for row in off)])

    def table(self) -> str:
        """Every row as text."""
        rows = [
            [
                f"{self.data[i]}  {name}",
                f"{self.nuts_mean[i]:.3f}",
                f"{self.nuts_sd[i]:.3f}",
                f"{self.guide_mean[i]:.3f}",
                f"{self.guide_sd[i]:.3f}",
                f"{self.r_hat[i]:.3f}",
                f"{self.ess[i]:.0f}",
                self.findings(i),
            ]
            for i, name in enumerate(self.names)
        ]
        header = ["datum", "NUTS mean", "sd", "guide mean", "sd", "R-hat", "ESS", "the guide"]
        return text_table(header, rows)


def gold_standard(
    pair: ModelGuidePair,
    x: Tensor,
    *,
    num_samples: int = 500,
    warmup: int = 300,
    num_chains: int = 4,
    num_guide_draws: int = 2000,
    labels: Sequence[Any] | None = None,
) -> xarray.DataTree:
    """NUTS draws of p(z | x_i) and the guide's draws for the same data, in one tree.

    The random numbers are torch's own; seed them for the same draws again. Takes seconds to minutes for each datum.

    Args:
        pair: the programs, all of whose latents are continuous.
        x: the chosen data ``[B, *data_shape]``, a few.
        num_samples: draws kept of each chain.
        warmup: draws to adapt step size and mass, not kept.
        num_chains: chains, run one after the other; two at least, for R-hat.
        num_guide_draws: draws from the guide.
        labels: names of the data, as their indices in a data set; None numbers them from 0.

    Returns:
        The tree described above.

    Raises:
        GoldStandardError: a discrete latent, numbers of draws or chains that are too small, or labels that do not fit.
        PairError: sites do not match, or are not all inside the data plate.

    Example:
        >>> import torch
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> tree = gold_standard(pair, torch.zeros(1, 3), num_samples=20, warmup=20, num_chains=2, num_guide_draws=50)
        >>> dict(tree["posterior"]["z"].sizes)
        {'chain': 2, 'draw': 20, 'data': 1, 'z_dim_0': 2}
        >>> dict(tree["guide"]["z"].sizes)
        {'sample': 50, 'data': 1, 'z_dim_0': 2}
    """
    import torch
    import xarray

    from inference.bounds.joint import data_plan, latent_values, refuse_point_masses
    from inference.progress import Progress

    if num_samples < 4 or warmup < 1 or num_chains < 2 or num_guide_draws < 2:
        raise GoldStandardError(
            f"expected num_samples >= 4, warmup >= 1, num_chains >= 2 and num_guide_draws >= 2, got {num_samples}, "
            f"{warmup}, {num_chains} and {num_guide_draws}: R-hat compares chains"
        )
    names = np.arange(len(x)) if labels is None else np.asarray(labels)
    if names.shape != (len(x),):
        raise GoldStandardError(f"expected {len(x)} labels, one per datum, got shape {list(names.shape)}")
    with torch.no_grad():
        plan = data_plan(pair, x)
        refuse_point_masses(plan, "hold against NUTS")
        _refuse_discrete(pair, plan.prototype.model)
        chunks = list(plan.chunks(num_guide_draws))
        guide = {s: torch.cat([latent_values(c, s) for c in chunks]).cpu().numpy() for s in pair.latent_sites}
    runs = []
    total = len(x) * num_chains * (warmup + num_samples)
    with Progress("running NUTS", total, unit="draws") as progress:
        for i in range(len(x)):
            own = pair.of_rows(slice(i, i + 1))
            chains = [_chain(own, x[i : i + 1], num_samples, warmup, progress.advance) for _ in range(num_chains)]
            runs.append({key: np.stack([chain[key] for chain in chains]) for key in chains[0]})
    draws = {key: np.stack([run[key] for run in runs], 2) for key in runs[0]}  # [chain, draw, data, *event]
    diverging = draws.pop("diverging")
    return xarray.DataTree.from_dict(
        {
            "posterior": _dataset({s: draws[s] for s in pair.latent_sites}, ("chain", "draw"), names),
            "guide": _dataset(guide, ("sample",), names),
            "sample_stats": _dataset({"diverging": diverging}, ("chain", "draw"), names),
            "observed_data": _dataset({"x": x.detach().cpu().numpy()}, (), names),
        }
    )


def compare_guide(tree: xarray.DataTree) -> GuideComparison:
    """Where the guide's mean and spread differ from NUTS', in units of the posterior and of the draws' errors.

    Args:
        tree: from :func:`gold_standard`.

    Example:
        >>> import numpy as np, xarray
        >>> rng = np.random.default_rng(0)
        >>> nuts = xarray.Dataset({"z": (("chain", "draw", "data"), rng.normal(size=(4, 500, 1)))}, {"data": [7]})
        >>> guide = xarray.Dataset({"z": (("sample", "data"), 0.5 * rng.normal(size=(2000, 1)) + 1)}, {"data": [7]})
        >>> diverging = xarray.Dataset({"diverging": (("chain", "draw", "data"), np.zeros((4, 500, 1), bool))})
        >>> groups = {"posterior": nuts, "guide": guide, "sample_stats": diverging}
        >>> print(compare_guide(xarray.DataTree.from_dict(groups)).words().splitlines()[-1])
        datum 7, z: 1.0 sd too high (z = +41) and too narrow (sd × 0.50)
    """
    nuts, guide = tree["posterior"].to_dataset(), tree["guide"].to_dataset()
    diagnostics = [f(tree) for f in (r_hat, effective_sample_size, error_of_the_mean)]
    columns: dict[str, list[Any]] = {key: [] for key in ("names", "data", "nuts", "guide", "diagnostics")}
    for site in nuts.data_vars:
        one, other = nuts[site].values, guide[site].values
        chains = one.reshape(-1, *one.shape[2:])
        for index in np.ndindex(*one.shape[2:]):
            columns["names"].append(f"{site}[{', '.join(map(str, index[1:]))}]" if index[1:] else str(site))
            columns["data"].append(nuts["data"].values[index[0]])
            columns["nuts"].append(_moments(chains[:, *index]))
            columns["guide"].append(_moments(other[:, *index]))
            columns["diagnostics"].append([float(d[site].values[index]) for d in diagnostics])
    nuts_mean, nuts_sd, nuts_kurtosis = np.array(columns["nuts"]).T
    guide_mean, guide_sd, guide_kurtosis = np.array(columns["guide"]).T
    rank, ess, error = np.array(columns["diagnostics"]).T
    count = guide.sizes["sample"]
    ratio = guide_sd / nuts_sd
    # Var(log sd) is (kurtosis - 1) / 4n: delta method on the sample variance, with n effective draws.
    ratio_error = ratio * np.sqrt((nuts_kurtosis - 1) / (4 * ess) + (guide_kurtosis - 1) / (4 * count))
    difference = guide_mean - nuts_mean
    return GuideComparison(
        tuple(columns["names"]),
        np.array(columns["data"]),
        nuts_mean,
        nuts_sd,
        guide_mean,
        guide_sd,
        difference / nuts_sd,
        difference / np.sqrt(error**2 + guide_sd**2 / count),
        ratio,
        ratio_error,
        rank,
        ess,
        int(tree["sample_stats"]["diverging"].sum()),
    )


def _chain(pair: ModelGuidePair, x: Tensor, num_samples: int, warmup: int, advance: Any) -> dict[str, np.ndarray]:
    """One chain for one datum: ``[draw, *event]`` by site, and which draws diverged."""
    import torch
    from pyro import poutine
    from pyro.infer import MCMC, NUTS
    from pyro.infer.autoguide.initialization import init_to_sample

    from inference.bounds.particles import forked_rng
    from inference.bounds.support import support_of

    with torch.no_grad(), forked_rng():
        sites = poutine.trace(pair.model).get_trace(x).nodes
    to_reals = {site: torch.distributions.biject_to(support_of(sites[site]["fn"])).inv for site in pair.latent_sites}
    kernel = NUTS(pair.model, init_strategy=init_to_sample, transforms=to_reals)
    mcmc = MCMC(
        kernel, num_samples, warmup_steps=warmup, hook_fn=lambda *_: advance(), disable_progbar=True
    )  # its bar would draw on stdout as well as on terminals
    mcmc.run(x)
    draws = mcmc.get_samples()
    diverging = np.zeros(num_samples, dtype=bool)
    diverging[mcmc.diagnostics()["divergences"]["chain 0"]] = True
    return {**{site: draws[site][:, 0].cpu().numpy() for site in pair.latent_sites}, "diverging": diverging}


def _refuse_discrete(pair: ModelGuidePair, sites: dict[str, Any]) -> None:
    for site in pair.latent_sites:
        law = sites[site]["fn"]
        if law.support.is_discrete:
            raise GoldStandardError(
                f"expected continuous latents, got {type(law).__name__} at site {site!r}: NUTS follows gradients; compare "
                "discrete guides by simulation_based_calibration"
            )


def _dataset(arrays: dict[str, np.ndarray], leading: tuple[str, ...], labels: np.ndarray) -> xarray.Dataset:
    """Arrays ``[*leading, data, *own]`` with named dims, numbered but for the data."""
    import xarray

    variables, coords = {}, {"data": labels}
    for name, array in arrays.items():
        own = [f"{name}_dim_{k}" for k in range(array.ndim - len(leading) - 1)]
        dims = (*leading, "data", *own)
        variables[name] = (dims, array)
        coords |= {dim: np.arange(n) for dim, n in zip(dims, array.shape, strict=True) if dim != "data"}
    return xarray.Dataset(variables, coords)


def _moments(draws: np.ndarray) -> tuple[float, float, float]:
    """Mean, standard deviation and kurtosis (3 for a Gaussian)."""
    mean, sd = float(draws.mean()), float(draws.std(ddof=1))
    return mean, sd, float(((draws - mean) ** 4).mean() / sd**4) if sd > 0 else math.nan
