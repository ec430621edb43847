r"""Noise schedules: how much of the data each step of a diffusion destroys.

    q(x_t | x_{t-1}) = N(x_t; sqrt(alpha_t) x_{t-1}, beta_t I),      alpha_t = 1 - beta_t,      t = 1..T
    q(x_t | x_0)     = N(x_t; sqrt(alpha-bar_t) x_0, (1 - alpha-bar_t) I),   alpha-bar_t = prod_{s <= t} alpha_s

(lecture notes 001, where alpha-bar_t is called A_t, and 003.) The signal-to-noise ratio alpha-bar_t / (1 - alpha-bar_t)
falls strictly with t.

Convention: beta is a *variance*. Notes 004 write beta_i for a standard deviation and alpha_i = sqrt(1 - beta_i^2), so that
their alpha-bar is the square root of this one; :meth:`NoiseSchedule.from_stds` takes their numbers. Entry t - 1 of a table is
step t.

Constraint: tables are float64, built from log alpha_t = log1p(-beta_t) and its running sum; 1 - alpha-bar_t is
-expm1(log alpha-bar_t), never a difference. In float32 that difference has no correct digit left where beta_1 is small.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_models.processes.schedule_checks import check_num_timesteps, refuse_out_of_range, refuse_unusable, to_table

__all__ = ["NoiseSchedule"]

_COSINE_OFFSET = 0.008
_COSINE_LARGEST_BETA = 0.999
_LINEAR_FIRST, _LINEAR_LAST = 1e-4 * 1000, 0.02 * 1000  # times 1/T
_FIRST_LOG_SNR, _LAST_LOG_SNR = 7.8, -7.5


class NoiseSchedule:
    r"""The variances beta_1..beta_T of a Gaussian diffusion, and all that follows from them.

    Constructors: ``linear(T)``, ``cosine(T)``, ``geometric(T)``, ``from_betas(betas)`` (the same as the class itself),
    ``from_stds(stds)``.

    beta_T = 1 is allowed at the last step: *zero terminal SNR*, where x_T carries nothing of x_0 and q(x_T | x_0) is the prior
    exactly. It rules out predicting the noise at T: x_0 = (x_T - sqrt(1 - alpha-bar_T) eps) / sqrt(alpha-bar_T) is 0/0
    there. Predict x_0 or the mean instead (Lin et al. 2023, *Common Diffusion Noise Schedules and Sample Steps are Flawed*,
    arXiv:2305.08891, section 3.1).

    Args:
        betas: beta_1..beta_T, each in (0, 1), the last in (0, 1]; a sequence, array or tensor of shape [T].

    Attributes:
        num_timesteps: T.
        beta: beta_t, [T] float64, as are all others.
        alpha: alpha_t = 1 - beta_t.
        alpha_bar: alpha-bar_t = prod_{s <= t} alpha_s.
        alpha_bar_previous: alpha-bar_{t-1}; 1 at t = 1.
        marginal_variance: 1 - alpha-bar_t, variance of q(x_t | x_0).
        marginal_variance_previous: 1 - alpha-bar_{t-1}; 0 at t = 1.
        posterior_variance: beta-tilde_t = beta_t (1 - alpha-bar_{t-1}) / (1 - alpha-bar_t), variance of
            q(x_{t-1} | x_t, x_0) (notes 001); 0 at t = 1.
        posterior_weight_x_0: sqrt(alpha-bar_{t-1}) beta_t / (1 - alpha-bar_t), the weight of x_0 in mu-tilde_t; 1 at t = 1.
        posterior_weight_x_t: sqrt(alpha_t) (1 - alpha-bar_{t-1}) / (1 - alpha-bar_t), that of x_t; 0 at t = 1.
        snr: alpha-bar_t / (1 - alpha-bar_t).
        log_alpha, log_alpha_bar, log_beta, log_snr: their logarithms; -inf where the argument is 0.
        log_variance_ratio: log(beta-tilde_t / beta_t), exact also where the ratio is near one; -inf at t = 1.
        log_posterior_variance: log beta-tilde_t; -inf at t = 1.

    Raises:
        ValueError: a beta outside its range, named by its step; no step at all; a table of more than one dimension; a step
            too small to lower the signal-to-noise ratio in float64; or a product so small that float32 cannot hold it.
        TypeError: betas that are not numbers.

    Example:
        >>> schedule = NoiseSchedule([0.1, 0.2, 0.5])
        >>> [round(v, 3) for v in schedule.alpha_bar.tolist()]
        [0.9, 0.72, 0.36]
        >>> [round(v, 3) for v in schedule.posterior_variance.tolist()]
        [0.0, 0.071, 0.219]
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        beta = to_table("betas", betas)
        refuse_out_of_range("beta", beta, "pass variances; standard deviations go through NoiseSchedule.from_stds")
        self.num_timesteps = beta.numel()
        self.beta = beta
        self.alpha = 1 - beta
        self.log_beta = beta.log()
        self.log_alpha = torch.log1p(-beta)
        self.log_alpha_bar = self.log_alpha.cumsum(0)
        self.alpha_bar = self.log_alpha_bar.exp()
        self.alpha_bar_previous = _shifted(self.alpha_bar, 1.0)
        self.marginal_variance = -torch.expm1(self.log_alpha_bar)
        self.marginal_variance_previous = _shifted(self.marginal_variance, 0.0)
        ratio = self.marginal_variance_previous / self.marginal_variance  # beta-tilde_t / beta_t
        self.posterior_variance = beta * ratio
        self.posterior_weight_x_0 = self.alpha_bar_previous.sqrt() * beta / self.marginal_variance
        self.posterior_weight_x_t = self.alpha.sqrt() * ratio
        self.snr = self.alpha_bar / self.marginal_variance
        self.log_snr = self.log_alpha_bar - self.marginal_variance.log()
        # 1 - ratio = alpha-bar_{t-1} beta_t / (1 - alpha-bar_t) keeps its digits where the ratio is near one; the clamp only
        # feeds the branch that is not taken a harmless number
        near_one = torch.log1p(-(self.alpha_bar_previous * beta / self.marginal_variance).clamp(max=0.5))
        self.log_variance_ratio = torch.where(ratio > 0.5, near_one, ratio.log())
        self.log_posterior_variance = self.log_beta + self.log_variance_ratio
        self._config: dict[str, Any] = {"name": "betas", "betas": beta.tolist()}
        refuse_unusable(beta, self.alpha_bar, self.log_alpha_bar)

    @classmethod
    def linear(cls, num_timesteps: int, first: float | None = None, last: float | None = None) -> NoiseSchedule:
        """beta_t evenly spaced from ``first`` to ``last``, those of DDPM scaled to T steps unless given.

        Source: Ho, Jain, Abbeel 2020 (arXiv:2006.11239, section 4): 1e-4 to 0.02 at T = 1000. The factor 1000/T keeps
        alpha-bar_T within a factor of two of 4e-5 from T = 100 (Nichol and Dhariwal 2021's code); below, it falls fast, to
        8e-6 at T = 50 and 8e-9 at T = 21. For fewer steps beta_T would be 1 or more, and both ends are to be given.

        Args:
            num_timesteps: T >= 1.
            first: beta_1; 0.1/T unless given.
            last: beta_T; 20/T unless given. The only one at T = 1.

        Raises:
            ValueError: T is too small for DDPM's own ends, or betas outside (0, 1).
            TypeError: T is not an int.

        Example:
            >>> NoiseSchedule.linear(3, first=0.1, last=0.5).beta
            tensor([0.1000, 0.3000, 0.5000], dtype=torch.float64)
        """
        check_num_timesteps(num_timesteps)
        if last is None and _LINEAR_LAST / num_timesteps >= 1:
            raise ValueError(
                f"expected num_timesteps >= {math.floor(_LINEAR_LAST) + 1} for DDPM's linear schedule, whose last beta is "
                f"20/T, got {num_timesteps} (beta_T = {_LINEAR_LAST / num_timesteps:g}): take more steps, the cosine "
                "schedule, or give first and last"
            )
        ends = {"first": first, "last": last}
        first = _LINEAR_FIRST / num_timesteps if first is None else first
        last = _LINEAR_LAST / num_timesteps if last is None else last
        schedule = cls(_evenly(first, last, num_timesteps))._named("linear")
        schedule._config |= {name: float(value) for name, value in ends.items() if value is not None}
        return schedule

    @classmethod
    def cosine(cls, num_timesteps: int) -> NoiseSchedule:
        r"""alpha-bar_t = f(t)/f(0), f(t) = cos^2(pi/2 (t/T + s)/(1 + s)), s = 0.008, with beta_t <= 0.999.

        Source: Nichol and Dhariwal 2021, *Improved Denoising Diffusion Probabilistic Models*, arXiv:2102.09672, eq. 17.
        beta_t = 1 - f(t)/f(t-1) = sin(b - a) sin(b + a) / cos^2(a) for the angles a, b of t-1 and t, which has no
        cancellation. The bound 0.999 acts on the last step alone.

        Args:
            num_timesteps: T >= 1.

        Raises:
            ValueError: T is below one.
            TypeError: T is not an int.
        """
        check_num_timesteps(num_timesteps)
        steps = torch.arange(num_timesteps + 1, dtype=torch.float64, device="cpu") / num_timesteps
        angle = math.pi / 2 * (steps + _COSINE_OFFSET) / (1 + _COSINE_OFFSET)
        a, b = angle[:-1], angle[1:]
        beta = torch.sin(b - a) * torch.sin(b + a) / torch.cos(a).square()
        return cls(beta.clamp(max=_COSINE_LARGEST_BETA))._named("cosine")

    @classmethod
    def geometric(
        cls, num_timesteps: int, first_log_snr: float = _FIRST_LOG_SNR, last_log_snr: float = _LAST_LOG_SNR
    ) -> NoiseSchedule:
        r"""The signal-to-noise ratio falls by the same factor at every step.

            log alpha-bar_t / (1 - alpha-bar_t) evenly spaced from ``first_log_snr`` at t = 1 to ``last_log_snr`` at t = T

        Source: Kingma et al. 2021 (arXiv:2107.00630), section 5, their fixed linear log-SNR. Where data lie on a grid, most of
        the bound is spent at noise of the grid's spacing, a narrow range of t for the other schedules. The first value should
        be such that this noise is resolved but no finer one: at 7.8 the noise of x_1 has standard deviation 0.02, which
        suits 16 steps across [-1, 1]. At -7.5 the prior matching costs under 3e-4 nats a dimension.

        Args:
            num_timesteps: T >= 1.
            first_log_snr: log SNR of x_1, if T > 1.
            last_log_snr: log SNR of x_T, below that of x_1.

        Raises:
            ValueError: T is below one, or the log SNR does not fall.
            TypeError: T is not an int.

        Example:
            >>> NoiseSchedule.geometric(3, first_log_snr=2, last_log_snr=-2).log_snr.round(decimals=6)
            tensor([ 2.,  0., -2.], dtype=torch.float64)
        """
        check_num_timesteps(num_timesteps)
        if not first_log_snr > last_log_snr:
            raise ValueError(
                f"expected first_log_snr > last_log_snr, got {first_log_snr} and {last_log_snr}: swap them"
            )
        log_snr = _evenly(first_log_snr, last_log_snr, num_timesteps)
        log_alpha_bar = torch.nn.functional.logsigmoid(log_snr)
        schedule = cls(-torch.expm1(log_alpha_bar - _shifted(log_alpha_bar, 0.0)))._named("geometric")
        schedule._config |= {"first_log_snr": float(first_log_snr), "last_log_snr": float(last_log_snr)}
        return schedule

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> NoiseSchedule:
        """The schedule with these variances; see the class."""
        return cls(betas)

    @classmethod
    def from_stds(cls, stds: Sequence[float] | Tensor) -> NoiseSchedule:
        """The schedule whose steps add noise of these standard deviations: beta_t = std_t^2 (the beta_i of notes 004).

        Notes 004's alpha_i and alpha-bar_i are the square roots of ``alpha`` and ``alpha_bar``.

        Args:
            stds: [T], each in (0, 1), the last in (0, 1].

        Raises:
            ValueError: see the class.

        Example:
            >>> NoiseSchedule.from_stds([0.6, 0.8]).alpha_bar.sqrt()  # 0.8, 0.8 * 0.6
            tensor([0.8000, 0.4800], dtype=torch.float64)
        """
        std = to_table("stds", stds)
        refuse_out_of_range("std", std, "pass standard deviations; variances go through NoiseSchedule.from_betas")
        return cls(std.square())

    def with_zero_terminal_snr(self) -> NoiseSchedule:
        r"""This schedule bent to alpha-bar_T = 0, its first step kept, by an affine map of s_t = sqrt(alpha-bar_t).

            s'_t = (s_t - s_T) s_1 / (s_1 - s_T)

        Source: Lin et al. 2023 (arXiv:2305.08891, algorithm 1). See the class for what a network can then not predict.

        Raises:
            ValueError: T = 1, where the first step is also the last.
        """
        if self.num_timesteps == 1:
            raise ValueError(
                "expected at least two steps to rescale to zero terminal SNR, got T = 1: use NoiseSchedule([1.0])"
            )
        s = (0.5 * self.log_alpha_bar).exp()
        stretch = s[0] / (s[0] - s[-1])
        new = stretch * (s - s[-1])
        drop = stretch * s[:-1] * -torch.expm1(0.5 * self.log_alpha[1:])  # new[t-1] - new[t], without cancellation
        beta = torch.cat([self.beta[:1], drop * (new[:-1] + new[1:]) / new[:-1].square()])
        beta[-1] = 1.0
        schedule = NoiseSchedule(beta)
        if self._config["name"] != "betas":
            schedule._config = self._config | {"zero_terminal_snr": True}
        return schedule

    def respaced(self, timesteps: Sequence[int]) -> NoiseSchedule:
        r"""The schedule that visits only some of the steps, with the same q(x_t | x_0) at each of them.

        Step i goes from t_{i-1} to t_i at once (t_0 = 0), by composition of kernels (notes 001):
        beta'_i = 1 - alpha-bar_{t_i} / alpha-bar_{t_{i-1}}.

        Args:
            timesteps: t_1 < t_2 < ..., each in 1..T; end with T to start from the same prior.

        Raises:
            ValueError: steps outside 1..T or not increasing.
            TypeError: no sequence, or numbers that are not whole.

        Example:
            >>> full = NoiseSchedule.cosine(100)
            >>> bool(torch.allclose(full.respaced([50, 100]).alpha_bar, full.alpha_bar[[49, 99]]))
            True
        """
        try:
            steps = [operator.index(t) for t in timesteps if not isinstance(t, bool)]
            whole = len(steps) == len(timesteps)
        except TypeError:
            whole = False
        if not whole:
            raise TypeError(
                f"expected timesteps as a sequence of whole numbers, got {timesteps!r}: give a list of ints"
            )
        if (
            not steps
            or steps[0] < 1
            or steps[-1] > self.num_timesteps
            or any(a >= b for a, b in itertools.pairwise(steps))
        ):
            raise ValueError(
                f"expected increasing timesteps in 1..{self.num_timesteps}, got {steps}: sort them and leave out repeats"
            )
        log_alpha_bar = self.log_alpha_bar[[t - 1 for t in steps]]
        return NoiseSchedule(-torch.expm1(log_alpha_bar - _shifted(log_alpha_bar, 0.0)))

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether x_T carries nothing of x_0 (beta_T = 1), so that the noise cannot be predicted at T."""
        return bool(self.alpha_bar[-1] == 0)

    def config(self) -> dict[str, Any]:
        """A JSON-able description: ``NoiseSchedule.from_config(**schedule.config())`` makes the same tables."""
        return dict(self._config)

    @classmethod
    def from_config(cls, name: str, zero_terminal_snr: bool = False, **arguments: Any) -> NoiseSchedule:
        """The inverse of :meth:`config`.

        Args:
            name: ``linear``, ``cosine`` or ``geometric`` (with ``num_timesteps``), or ``betas`` (with ``betas``).
            zero_terminal_snr: rescale by :meth:`with_zero_terminal_snr`.
            arguments: those of the named constructor.

        Raises:
            ValueError: an unknown name.

        Example:
            >>> NoiseSchedule.from_config("cosine", num_timesteps=100)
            NoiseSchedule.cosine(100)
        """
        constructors: dict[str, Callable[..., NoiseSchedule]] = {
            "linear": cls.linear,
            "cosine": cls.cosine,
            "geometric": cls.geometric,
            "betas": cls.from_betas,
        }
        if name not in constructors:
            raise ValueError(f"expected a schedule among {', '.join(constructors)}, got {name!r}")
        schedule = constructors[name](**arguments)
        return schedule.with_zero_terminal_snr() if zero_terminal_snr else schedule

    def __len__(self) -> int:
        return self.num_timesteps

    def __repr__(self) -> str:
        if self._config["name"] == "betas":
            return f"NoiseSchedule.from_betas([{self.beta[0]:.6g}, ..., {self.beta[-1]:.6g}], T={self.num_timesteps})"
        rescaled = ".with_zero_terminal_snr()" if self._config["zero_terminal_snr"] else ""
        names = [name for name in ("first", "last", "first_log_snr", "last_log_snr") if name in self._config]
        ends = "".join(f", {name}={self._config[name]:g}" for name in names)
        return f"NoiseSchedule.{self._config['name']}({self.num_timesteps}{ends}){rescaled}"

    def _named(self, name: str) -> NoiseSchedule:
        self._config = {"name": name, "num_timesteps": self.num_timesteps, "zero_terminal_snr": False}
        return self


def _evenly(first: float, last: float, count: int) -> Tensor:
    """[count] float64 from ``first`` to ``last``; ``last`` if there is but one, so that a single step ends where all do."""
    first = last if count == 1 else first
    return torch.linspace(first, last, count, dtype=torch.float64, device="cpu")


def _shifted(table: Tensor, first: float) -> Tensor:
    """Entry t - 1 in place of entry t, ``first`` at t = 1."""
    return torch.cat([table.new_tensor([first]), table[:-1]])
