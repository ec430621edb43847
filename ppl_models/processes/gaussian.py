r"""The Gaussian forward process q of a diffusion: transition, marginal, posterior and prior (lecture notes 001 and 003).

    transition   q(x_t | x_{t-1})      = N(sqrt(alpha_t) x_{t-1}, beta_t I)
    marginal     q(x_t | x_0)          = N(sqrt(alpha-bar_t) x_0, (1 - alpha-bar_t) I)
    posterior    q(x_{t-1} | x_t, x_0) = N(mu-tilde_t(x_t, x_0), beta-tilde_t I)
                 mu-tilde_t   = sqrt(alpha-bar_{t-1}) beta_t / (1 - alpha-bar_t) x_0
                                + sqrt(alpha_t) (1 - alpha-bar_{t-1}) / (1 - alpha-bar_t) x_t
                 beta-tilde_t = (1 - alpha-bar_{t-1}) / (1 - alpha-bar_t) beta_t
    prior        p(x_T)                = N(0, I)

Notes 001 print mu-tilde as x_0 + (x_t - x_0)/(1 - A_t): a slip, a test shows that it violates Bayes' rule.

Convention: t is a LongTensor in 1..T that broadcasts against the batch shape of x, ``[*batch, *data_shape]``; a law's event is
one whole datum. Constraint: coefficients are gathered from float64 tables and only then cast to the dtype of x; the
tables stay float64 when the module is moved to another dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn

from ppl_models.arguments import sizes
from ppl_models.processes.schedules import NoiseSchedule

__all__ = ["GaussianProcess"]

_TABLES = (
    "beta",
    "alpha",
    "alpha_bar",
    "alpha_bar_previous",
    "marginal_variance",
    "marginal_variance_previous",
    "posterior_variance",
    "posterior_weight_x_0",
    "posterior_weight_x_t",
    "snr",
    "log_alpha",
    "log_alpha_bar",
    "log_beta",
    "log_snr",
    "log_variance_ratio",
    "log_posterior_variance",
)
_ROOTS = ("alpha", "alpha_bar", "alpha_bar_previous", "beta", "marginal_variance", "posterior_variance")


class GaussianProcess(nn.Module):
    """q(x_1..T | x_0) of a Gaussian diffusion, one law at a time.

    Args:
        schedule: the variances beta_1..beta_T.
        data_shape: shape of one datum.

    Attributes:
        schedule: as given (its tables stay on the CPU).
        num_timesteps: T.

    Example:
        >>> process = GaussianProcess(NoiseSchedule.cosine(100), data_shape=(8, 8))
        >>> x_t = process.marginal(torch.zeros(5, 8, 8), torch.tensor(50)).sample()
        >>> x_t.shape, process.posterior(x_t, torch.zeros(5, 8, 8), torch.tensor([2, 3, 50, 99, 100])).batch_shape
        (torch.Size([5, 8, 8]), torch.Size([5]))
    """

    prior_loc: Tensor
    prior_scale: Tensor

    def __init__(self, schedule: NoiseSchedule, data_shape: Sequence[int]) -> None:
        super().__init__()
        self.schedule = schedule
        self.data_shape = torch.Size(sizes("data_shape", data_shape))
        self.num_timesteps = schedule.num_timesteps
        tables = {name: getattr(schedule, name) for name in _TABLES}
        tables |= {f"sqrt_{name}": tables[name].sqrt() for name in _ROOTS}
        self._numbers: dict[str, list[float]] = {}
        self.tabulate(**tables)
        a, v = tables["alpha_bar"][-1], tables["marginal_variance"][-1]
        log_v = torch.where(a < 0.5, torch.log1p(-a), v.log())
        self._prior_offset = float(a + log_v)  # of second order in a: summed in float64
        self.register_buffer("prior_loc", torch.zeros(self.data_shape), persistent=False)
        self.register_buffer("prior_scale", torch.ones(self.data_shape), persistent=False)

    def tabulate(self, **tables: Tensor) -> None:
        """Adds coefficients by name, float64 ``[T]`` for t = 1..T, that :meth:`coefficient` gathers like the schedule's own."""
        device = next(self.buffers(), torch.empty(0)).device
        for name, table in tables.items():
            # entry 0 is NaN: t = 0 is the data, and must not wrap around to step T where nothing is validated
            padded = torch.cat([table.new_full((1,), torch.nan), table])
            self._numbers[name] = padded.tolist()
            self.register_buffer(f"_{name}", padded.to(device), persistent=False)

    @property
    def names(self) -> tuple[str, ...]:
        """What :meth:`coefficient` and :meth:`number` know."""
        return tuple(self._numbers)

    def transition(self, x_previous: Tensor, t: Tensor) -> dist.TorchDistribution:
        """q(x_t | x_{t-1}) = N(sqrt(alpha_t) x_{t-1}, beta_t I).

        Args:
            x_previous: x_{t-1}, ``[*batch, *data_shape]``.
            t: LongTensor in 1..T, broadcasting against ``batch``.

        Returns:
            A Normal with batch shape ``batch``, event shape ``data_shape``.

        Raises:
            ValueError: shapes that do not fit; with validation on, also t outside 1..T.
            TypeError: t is not a LongTensor.
        """
        loc = self.coefficient("sqrt_alpha", t, x_previous) * x_previous
        return self._law(loc, self.coefficient("sqrt_beta", t, x_previous))

    def marginal(self, x_0: Tensor, t: Tensor) -> dist.TorchDistribution:
        """q(x_t | x_0) = N(sqrt(alpha-bar_t) x_0, (1 - alpha-bar_t) I); see :meth:`transition`."""
        loc = self.coefficient("sqrt_alpha_bar", t, x_0) * x_0
        return self._law(loc, self.coefficient("sqrt_marginal_variance", t, x_0))

    def posterior(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> dist.TorchDistribution:
        """q(x_{t-1} | x_t, x_0) = N(mu-tilde_t, beta-tilde_t I), for t >= 2; see :meth:`transition`.

        At t = 1 it is a point mass on x_0, of scale 0, which validation refuses: mask it out before.
        """
        if dist.is_validation_enabled() and isinstance(t, Tensor) and bool((t == 1).any()):
            raise ValueError(
                "expected t >= 2 for q(x_{t-1} | x_t, x_0), got t = 1, where it is a point mass on x_0: "
                "mask these entries and put another t there"
            )
        return self._law(self.posterior_mean(x_t, x_0, t), self.coefficient("sqrt_posterior_variance", t, x_t))

    def posterior_mean(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """mu-tilde_t(x_t, x_0), ``[*batch, *data_shape]``, for all t in 1..T (x_0 itself at t = 1)."""
        weight_x_0 = self.coefficient("posterior_weight_x_0", t, x_0)
        weight_x_t = self.coefficient("posterior_weight_x_t", t, x_t)
        return weight_x_0 * x_0 + weight_x_t * x_t

    def sample_marginal(self, x_0: Tensor, t: Tensor) -> Tensor:
        """A draw from :meth:`marginal`: sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) eps."""
        return self.sample_marginal_with_noise(x_0, t)[0]

    def sample_marginal_with_noise(self, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`sample_marginal` and its eps."""
        level, std = self.coefficient("sqrt_alpha_bar", t, x_0), self.coefficient("sqrt_marginal_variance", t, x_0)
        eps = torch.randn(torch.broadcast_shapes(x_0.shape, std.shape), dtype=x_0.dtype, device=x_0.device)
        return (eps * std).addcmul_(level, x_0), eps  # two passes over the data

    def prior_divergence(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || p(x_T)) = (A |x_0|^2 - D (A + log(1 - A))) / 2 with A = alpha-bar_T, ``[*batch]`` nats."""
        n = len(self.data_shape)
        squares = sum_rightmost(x_0.square(), n)
        level = self.number("alpha_bar", self.num_timesteps)
        return 0.5 * level * squares - 0.5 * self.data_shape.numel() * self._prior_offset

    def prior(self) -> dist.TorchDistribution:
        """p(x_T) = N(0, I): batch shape ``()``, event shape ``data_shape``, in the module's dtype."""
        return self._law(self.prior_loc, self.prior_scale)

    def coefficient(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """One coefficient per t, shaped to broadcast against data.

        Args:
            name: a table of :class:`NoiseSchedule`, or ``sqrt_`` before alpha, alpha_bar, alpha_bar_previous, beta,
                marginal_variance or posterior_variance, or one of :meth:`tabulate`; all are in ``self.names``.
            t: LongTensor in 1..T, broadcasting against the batch of ``like``.
            like: data ``[*batch, *data_shape]``, whose dtype the result takes.

        Returns:
            ``[*t.shape, 1, ..., 1]`` with ``len(data_shape)`` ones.

        Raises:
            ValueError: an unknown name, or data of another shape; with validation on, also t outside 1..T, or of a shape that
                does not broadcast.
            TypeError: t is not a LongTensor, or data are no floats.
        """
        n = len(self.data_shape)
        self._check_name(name)
        if like.dim() < n or like.shape[like.dim() - n :] != self.data_shape:
            raise ValueError(
                f"expected data of shape [*batch, {', '.join(map(str, self.data_shape))}], got {list(like.shape)}: "
                "keep the data's own dimensions last"
            )
        if not like.is_floating_point():
            raise TypeError(f"expected floating-point data, got {like.dtype}: convert with .float()")
        self._check_t(t, like)
        # Not table[t]: for a t of no dims that reads its value, which waits for the device and cannot be traced.
        gathered = torch.take(self._buffers[f"_{name}"], t).to(like.dtype)  # type: ignore[arg-type]
        return gathered.reshape((*t.shape, *[1] * n))

    def number(self, name: str, t: int) -> float:
        """The same coefficient as a number, without a look at the device.

        Raises:
            ValueError: an unknown name, or t outside 1..T.

        Example:
            >>> round(GaussianProcess(NoiseSchedule.from_betas([0.1, 0.19]), ()).number("sqrt_alpha", 2), 6)
            0.9
        """
        if not 1 <= t <= self.num_timesteps:
            raise ValueError(f"expected t in 1..{self.num_timesteps}, got {t}")
        self._check_name(name)
        return self._numbers[name][t]

    def _check_name(self, name: str) -> None:
        if name not in self._numbers:
            raise ValueError(f"expected a coefficient among {', '.join(self.names)}, got {name!r}")

    def _check_t(self, t: Tensor, like: Tensor) -> None:
        if not isinstance(t, Tensor) or t.dtype != torch.long:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(
                f"expected t to be a LongTensor of steps 1..{self.num_timesteps}, got {got}: use torch.tensor(t)"
            )
        if dist.is_validation_enabled():
            outside = (t < 1) | (t > self.num_timesteps)
            if bool(outside.any()):
                raise ValueError(
                    f"expected every t in 1..{self.num_timesteps}, got {int(t[outside][0])}: steps are counted from 1, "
                    "and t = 0 is the data"
                )
            batch = like.shape[: like.dim() - len(self.data_shape)]
            if any(a != b and 1 not in (a, b) for a, b in zip(reversed(t.shape), reversed(batch), strict=False)):
                raise ValueError(
                    f"expected t to broadcast against a batch of shape {list(batch)}, got t of shape {list(t.shape)}: give one "
                    "t, or one for each datum"
                )

    def _law(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        return dist.Normal(loc, scale).to_event(len(self.data_shape))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GaussianProcess:
        """Moves everything, but leaves the tables in float64 (``.float()``, ``.half()`` act on what the prior returns)."""
        tables = {key: table for key, table in self._buffers.items() if key.startswith("_") and table is not None}
        super()._apply(fn, recurse)
        for key, table in tables.items():
            moved = self._buffers[key]
            assert moved is not None
            self._buffers[key] = table.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Schedule and shape, for ``print(process)``."""
        return f"{self.schedule!r}, data_shape={tuple(self.data_shape)}"
