"""What an estimate of the evidence returns: log p(x) by datum, with its error and the means to judge both.

    log p_hat_K(x) = log (1/K) sum_k w_k,    w_k = p(x, z_k) / q(z_k | x),    z_k ~ q(z | x)

is, in expectation, a lower bound on log p(x) that rises with K (Burda et al. 2016, arXiv:1509.00519, Theorem 1); K = 1 is
the ELBO. To first order it lies se^2 / 2 below log p(x) on average (Maddison et al. 2017, arXiv:1705.09279,
Proposition 1), so that for a small standard error it is an estimate of log p(x) itself. All in nats unless the name ends
in ``_per_dim``.

The one constraint on reading it: where k-hat exceeds 0.7 the weights that matter may not have been drawn, and then the
standard error is too small as well. The bound stays a bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference.bounds.pareto import BAD_K_HAT
from inference.printed import Printed

if TYPE_CHECKING:
    import xarray

ROWS = 10
LARGEST_ERROR = 0.5  # nats: beyond it the delta method, of relative errors, says little; it never says more than 1


@dataclass(frozen=True, repr=False)
class Evidence(Printed):
    """log p(x) by importance weighting, per datum ``[B]``: the shape of the plates that all sites share.

    Args:
        log_evidence: log p_hat_K, ``[B]`` nats: the IWAE-K bound.
        std_error: standard error of ``log_evidence``, ``[B]`` nats, by the delta method.
        ess: effective sample size of the K weights, ``[B]``, in [1, K].
        k_hat: Pareto tail index of the weights, ``[B]``; good below 0.7; see :func:`~inference.bounds.pareto.pareto_k_hat`.
        elbo: mean of log w_k on the same draws, ``[B]`` nats.
        elbo_std_error: its standard error, ``[B]`` nats.
        num_particles: K.
        num_dims: observed numbers per datum; those of each, ``[B]``, where a mask leaves some out.
        plates: names of the dims of ``[B]``.
        note: how the particles were drawn, and what that cost.
        target_std_error: the standard error that was asked for, if any.
        missed_by_guide: latents at which the guide's support is narrower than the model's, a sentence each.
    """

    log_evidence: Tensor
    std_error: Tensor
    ess: Tensor
    k_hat: Tensor
    elbo: Tensor
    elbo_std_error: Tensor
    num_particles: int
    num_dims: int | Tensor
    plates: tuple[str, ...]
    note: str
    target_std_error: float | None = None
    missed_by_guide: tuple[str, ...] = ()

    @property
    def bits_per_dim(self) -> Tensor:
        """-log p_hat_K / (D log 2), ``[B]``: bits for each of a datum's D observed numbers; lower is better.

        A code length where x is discrete; for a density it depends on the units of x. NaN where nothing is observed.
        """
        return -self.log_evidence / (self._num_dims_or_nan * math.log(2))

    @property
    def std_error_bits_per_dim(self) -> Tensor:
        """Standard error of :attr:`bits_per_dim`, ``[B]``."""
        return self.std_error / (self._num_dims_or_nan * math.log(2))

    @property
    def _num_dims_or_nan(self) -> float | Tensor:
        if isinstance(self.num_dims, Tensor):
            return torch.where(self.num_dims > 0, self.num_dims.double(), math.nan).to(self.log_evidence.device)
        return self.num_dims or math.nan

    @property
    def mean_std_error(self) -> float:
        """Standard error of the mean of ``log_evidence`` over the data at hand: their draws are independent."""
        return float(self.std_error.square().sum().sqrt()) / max(1, self.std_error.numel())

    @property
    def num_bad_k_hat(self) -> int:
        """How many data have k-hat above 0.7."""
        return int((self.k_hat > BAD_K_HAT).sum())

    @property
    def doubtful(self) -> Tensor:
        """Data whose standard error may be far too small: k-hat above 0.7, or an error above 0.5 nats; bool ``[B]``."""
        return (self.k_hat > BAD_K_HAT) | (self.std_error > LARGEST_ERROR)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against these numbers, one sentence each; empty where nothing does."""
        size, found = self.k_hat.numel(), list(self.missed_by_guide)
        if self.num_bad_k_hat:
            found.append(
                f"{self.num_bad_k_hat} of {size} data have k-hat above {BAD_K_HAT}: there the bound may be loose and its "
                "standard error too small; use a wider or better guide, or annealed importance sampling"
            )
        wide = int((self.std_error > LARGEST_ERROR).sum())
        if wide:
            found.append(
                f"{wide} of {size} data have standard errors above {LARGEST_ERROR} nats: a few draws outweigh the others, and "
                "the error itself is not known; draw more particles"
            )
        unknown = int(self.k_hat.isnan().sum())
        if unknown:
            found.append(
                f"{unknown} of {size} data have no k-hat: their weights are tied, or fewer than 25, so the tail cannot "
                "be judged"
            )
        if self.target_std_error is not None:
            missed = int((self.std_error > self.target_std_error).sum())
            if missed:
                found.append(
                    f"{missed} of {size} data did not reach the standard error {self.target_std_error:g} within "
                    f"{self.num_particles} particles: raise max_particles, or improve the guide"
                )
        return tuple(found)

    def table(self) -> str:
        """The mean over data, the least certain data, and what speaks against the numbers, as text."""
        from inference.views.tables import text_table

        count = self.log_evidence.numel()
        flat = [t.flatten() for t in (self.log_evidence, self.std_error, self.elbo, self.ess, self.k_hat)]
        order = flat[1].argsort(descending=True, stable=True)[:ROWS] if count > ROWS else torch.arange(count)
        mean = [_number(self.log_evidence.mean()), f"{self.mean_std_error:.4f}", _number(self.elbo.mean())]
        median = [f"{float(self.ess.median()):.1f}", f"{float(self.k_hat.median()):.2f}"]
        what = "SE: of the draws, at these data; ess, k-hat: median"
        if 2 * int(self.doubtful.sum()) > count and math.isfinite(self.mean_std_error):
            what = "SE: not to be relied on, most data are doubtful; ess, k-hat: median"
        rows = [["mean", *mean, *median, what]]
        for i in order.tolist() if self.plates else []:
            log_evidence, std_error, elbo, ess, k_hat = (float(t[i]) for t in flat)
            index = ", ".join(str(int(j)) for j in torch.unravel_index(torch.tensor(i), self.log_evidence.shape))
            good = "large error" if std_error > LARGEST_ERROR else "good"
            verdict = "bad k-hat" if k_hat > BAD_K_HAT else "not known" if math.isnan(k_hat) else good
            verdict = "narrow guide" if self.missed_by_guide else verdict
            rows.append(
                [index, f"{log_evidence:.4f}", f"{std_error:.4f}", f"{elbo:.4f}", f"{ess:.1f}", f"{k_hat:.2f}", verdict]
            )
        which = f"; the {ROWS} largest errors" if count > ROWS else ""
        header = ["datum", f"IWAE-{self.num_particles}", "+- SE", "ELBO", "ess", "k-hat", "verdict"]
        bits = f"{float(self.bits_per_dim.mean()):.4f} bits/dim"
        lines = [f"log p(x), nats, {count} {'x'.join(self.plates) or 'datum'}{which}; mean {bits}"]
        lines += [text_table(header, rows), f"  ({self.note})", *(f"  warning: {text}" for text in self.warnings)]
        return "\n".join(lines)

    def to_dataset(self) -> xarray.Dataset:
        """The numbers as an ``xarray.Dataset`` over the shared plates; nats unless the name says otherwise."""
        import xarray

        names = ("log_evidence", "std_error", "ess", "k_hat", "elbo", "elbo_std_error", "bits_per_dim")
        attrs = {"units": "nats", "num_particles": self.num_particles, "note": self.note}
        columns = {name: (self.plates, getattr(self, name).cpu().numpy()) for name in names}
        if isinstance(self.num_dims, Tensor):
            columns["num_dims"] = (self.plates, self.num_dims.cpu().numpy())
        else:
            attrs["num_dims"] = self.num_dims
        return xarray.Dataset(
            columns,
            coords={p: range(n) for p, n in zip(self.plates, self.log_evidence.shape, strict=True)},
            attrs=attrs,
        )


def _number(value: Tensor) -> str:
    return f"{float(value):.4f}"
