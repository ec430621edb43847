r"""What a transition matrix of discrete diffusion has to do, and the schedules of the paper (D3PM, arXiv:2107.03006).

    [Q_t]_ij = q(x_t = j | x_{t-1} = i),       Qbar_t = Q_1 Q_2 ... Q_t,       Qbar_0 = I

Convention: *row*-stochastic, as in the paper; the notes' Markov chains (000) have columns that sum to one,
``MarkovChain(transitions.dense(t).T)``. All methods work with logarithms of probabilities; an impossible event is minus
infinity, and no epsilon is added anywhere. ``t`` broadcasts against x elementwise.

Constraint: the tables are float64 whatever the module's dtype, and are cast only after the gather. Laws come in the
module's dtype unless ``dtype`` says otherwise, at least float32.

See also :mod:`ppl_models.processes.structured_transitions` (uniform, absorbing: O(K) without a matrix) and
:mod:`ppl_models.processes.dense_transitions` (discretised Gaussian, nearest neighbours, any matrices).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ppl_models.processes.class_law import ClassLaw

__all__ = ["Schedule", "Transitions", "betas", "log_add_exp", "refuse_steps", "shapes_are_fixed", "whole"]

Schedule = str | Sequence[float] | Tensor

_COSINE_OFFSET, _LARGEST_COSINE_BETA = 0.008, 0.999


class Transitions(nn.Module, ABC):
    """Q_1..Q_T over K states, as actions on logarithms of probabilities.

    Args:
        num_classes: K >= 2, how many states there are, the mask (where there is one) included.
        num_timesteps: T >= 1.

    Attributes:
        num_data_classes: how many of the states data may be in: K, or K - 1 where the last is a mask.
        is_ordinal: whether neighbouring states are alike, as grey levels are.
    """

    is_ordinal = False

    def __init__(self, num_classes: int, num_timesteps: int) -> None:
        super().__init__()
        self.num_classes = whole("num_classes", num_classes, 2)
        self.num_data_classes = self.num_classes
        self.num_timesteps = whole("num_timesteps", num_timesteps, 1)
        self.register_buffer("_reference", torch.empty(0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the laws: what the module was moved to, at least float32."""
        reference = self._buffers["_reference"]
        assert reference is not None
        return torch.promote_types(reference.dtype, torch.float32)

    @abstractmethod
    def log_transition(self, x_previous: Tensor, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """log q(x_t = . | x_{t-1}), row x_{t-1} of log Q_t.

        Args:
            x_previous: int64 in 0..K-1, any shape.
            t: LongTensor in 1..T, broadcasting against x.
            dtype: floating dtype of the result, the module's if None.

        Returns:
            ``[*x.shape, K]``, normalised.

        Raises:
            ValueError: with validation on, t outside 1..T or a state outside 0..K-1.
        """

    @abstractmethod
    def log_column(self, x_t: Tensor, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """log q(x_t | x_{t-1} = .), column x_t of log Q_t, ``[*x.shape, K]``, up to one constant for each x_t.

        A likelihood in x_{t-1}: Bayes' rule divides the constant out. See :meth:`log_transition` for the arguments.
        """

    @abstractmethod
    def log_marginal(self, x_0: Tensor, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """log q(x_t = . | x_0), row x_0 of log Qbar_t; t may be 0, where it is a point mass. See :meth:`log_transition`."""

    @abstractmethod
    def log_propagate(self, log_p: Tensor, t: Tensor) -> Tensor:
        """log sum_i p_i [Qbar_t]_ij: the law of x_t when x_0 has the law p.

        Args:
            log_p: *normalised* log-probabilities ``[..., K]``, minus infinity allowed.
            t: LongTensor in 0..T, broadcasting against ``log_p[..., 0]``.

        Returns:
            As ``log_p``, with finite gradients for finite log_p; so they are for D3PM's impossible x_0.
        """

    def sample_marginal(self, x_0: Tensor, t: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0), int64 of the broadcast shape of x_0 and t; t in 0..T. See :meth:`log_transition`."""
        return ClassLaw(logits=self.log_marginal(x_0, t), validate_args=False).sample()

    def step_losses(self, x_t: Tensor, x_0: Tensor, x_0_logits: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), p by eq. 4, and -log p(x_0 | x_t): nats for each entry of x_t.

        Args:
            x_t: int64 in 0..K-1, with q(x_t | x_0) > 0.
            x_0: the same.
            x_0_logits: ``[*x_t.shape, K]``, logits of p(x_0 | x_t), with or without those that :meth:`restrict` takes away.
            t: LongTensor in 2..T, broadcasting against x.
        """
        log_p = self.restrict(x_0_logits, x_t).log_softmax(-1)
        column = self.log_column(x_t, t, log_p.dtype)
        q = ClassLaw(logits=column + self.log_marginal(x_0, t - 1, log_p.dtype), validate_args=False)
        p = ClassLaw(logits=column + self.log_propagate(log_p, t - 1), validate_args=False)
        return kl_divergence(q, p), -_at(log_p, x_0)

    def step_divergence(self, x_t: Tensor, x_0: Tensor, x_0_logits: Tensor, t: Tensor) -> Tensor:
        """The first of :meth:`step_losses`."""
        return self.step_losses(x_t, x_0, x_0_logits, t)[0]

    def surprisal(self, x_t: Tensor, x_0: Tensor, x_0_logits: Tensor) -> Tensor:
        """The second of :meth:`step_losses`: -log p(x_0 | x_t), at t = 1 too."""
        return -_at(self.restrict(x_0_logits, x_t).log_softmax(-1), x_0)

    @abstractmethod
    def prior_divergence(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || pi) in nats for each entry of x_0, float64."""

    @property
    @abstractmethod
    def log_stationary(self) -> Tensor:
        """log pi, ``[K]`` float64: the law that every start ends in, which is the prior p(x_T)."""

    @property
    def stationary(self) -> Tensor:
        """pi = pi Q_t for every t, ``[K]`` float64."""
        return self.log_stationary.exp()

    def restrict(self, logits: Tensor, x_t: Tensor) -> Tensor:
        """Logits ``[*x.shape, K]`` of x_0, with minus infinity at each x_0 that x_t excludes whatever t is.

        Only absorbing transitions exclude any, see :mod:`ppl_models.processes.structured_transitions`. Others leave the
        logits as they are, also where matrices with zeros give q(x_t | x_0) = 0 at this t: what p(x_0 | x_t) spends there
        is lost, but it is a law all the same and the bound a bound.
        """
        return logits

    def dense(self, t: int) -> Tensor:
        """Q_t, ``[K, K]`` float64, rows sum to one; t in 1..T."""
        return self.log_transition(*self._all(t, 1), dtype=torch.float64).exp()

    def cumulative(self, t: int) -> Tensor:
        """Qbar_t = Q_1 ... Q_t, ``[K, K]`` float64, rows sum to one; t in 0..T."""
        return self.log_marginal(*self._all(t, 0), dtype=torch.float64).exp()

    def _all(self, t: int, first: int) -> tuple[Tensor, Tensor]:
        if not first <= t <= self.num_timesteps:
            raise ValueError(f"expected t in {first}..{self.num_timesteps}, got {t}")
        device = self.log_stationary.device
        return torch.arange(self.num_classes, device=device), torch.tensor(t, device=device)

    def _check(self, x: Tensor, t: Tensor, first: int = 1) -> None:
        """Values are looked at under Pyro's validation only: the methods are traced without it."""
        if not dist.is_validation_enabled():
            return
        for name, value, low, high in (("x", x, 0, self.num_classes - 1), ("t", t, first, self.num_timesteps)):
            if value.dtype != torch.int64:
                raise ValueError(f"expected {name} as int64, got {value.dtype}: convert with .long()")
            outside = (value < low) | (value > high)
            if bool(outside.any()):
                raise ValueError(f"expected {name} in {low}..{high}, got {int(value[outside][0])}")

    def _equal(self, x: Tensor) -> Tensor:
        """Whether x is each of the states, ``[*x.shape, K]``."""
        return x[..., None] == torch.arange(self.num_classes, device=x.device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Transitions:
        """Moves the tables and leaves them in float64; only the dtype of the laws follows ``.float()`` and the like."""
        tables = {key: table for key, table in self._buffers.items() if key != "_reference" and table is not None}
        super()._apply(fn, recurse)
        device = self._buffers["_reference"].device  # type: ignore[union-attr]
        self._buffers.update({key: table.to(device) for key, table in tables.items()})
        return self

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""

    def extra_repr(self) -> str:
        """The constructor arguments, for ``print(transitions)``."""
        return ", ".join(f"{key}={value!r}" for key, value in self.config().items())


def betas(schedule: Schedule, num_timesteps: int) -> Tensor:
    """beta_1..beta_T of a named schedule, or as given, ``[T]`` float64.

    - "cosine": a_t = cos(((t/T + s)/(1 + s)) pi/2), s = 0.008, beta_t = 1 - a_t/a_{t-1} <= 0.999 (Hoogeboom et al. 2021,
      arXiv:2102.05379: a_t is the probability that x_0 is kept, not its square).
    - "linear": from 0.1/T to 20/T, DDPM's 1e-4 to 0.02 at T = 1000 (arXiv:2006.11239, section 4).
    - "reciprocal": 1/(T - t + 1), so that a_t = 1 - t/T (Sohl-Dickstein et al. 2015, arXiv:1503.03585).

    Raises:
        ValueError: an unknown name, or numbers that are not T.

    Example:
        >>> betas("reciprocal", 4)
        tensor([0.2500, 0.3333, 0.5000, 1.0000], dtype=torch.float64)
    """
    whole("num_timesteps", num_timesteps, 1)
    t = torch.arange(num_timesteps + 1, dtype=torch.float64)
    if isinstance(schedule, str):
        if schedule == "cosine":
            kept = torch.cos((t / num_timesteps + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2)
            return (1 - kept[1:] / kept[:-1]).clamp(max=_LARGEST_COSINE_BETA)
        if schedule == "linear":
            return torch.linspace(0.1, 20.0, num_timesteps, dtype=torch.float64) / num_timesteps
        if schedule == "reciprocal":
            return 1 / (num_timesteps - t[1:] + 1)
        raise ValueError(f"expected a schedule among cosine, linear, reciprocal, or T numbers, got {schedule!r}")
    try:
        values = torch.as_tensor(schedule, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"expected a schedule among cosine, linear, reciprocal, or T numbers, got {schedule!r}"
        ) from None
    if values.shape != (num_timesteps,):
        raise ValueError(
            f"expected one number for each of the {num_timesteps} steps, got shape {list(values.shape)}: "
            "let num_timesteps be the length of the schedule"
        )
    return values


def log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), with finite gradients also where both are minus infinity (``torch.logaddexp`` has NaN there)."""
    largest = torch.maximum(a, b).detach()
    possible = largest != -torch.inf  # a NaN is no impossible event and stays one
    shift = torch.where(possible, largest, 0.0)
    total = (a - shift).exp() + (b - shift).exp()
    return torch.where(possible, shift + torch.where(possible, total, 1.0).log(), -torch.inf)


def shapes_are_fixed() -> bool:
    """Whether a graph is being traced, in which no shape may hang on a value."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def _at(log_p: Tensor, x: Tensor) -> Tensor:
    """log p at the class x, of the shape of all but the last axis of ``log_p``."""
    return log_p.gather(-1, x.expand(log_p.shape[:-1])[..., None])[..., 0]


def whole(name: str, value: int, least: int) -> int:
    """``value``, refused unless it is an int >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"expected {name} to be an int >= {least}, got {value!r}")
    return value


def refuse_steps(values: Tensor, bad: Tensor, name: str, expected: str, meaning: str) -> None:
    """Raises ValueError on the first step where a schedule's value is bad or not finite."""
    bad = bad | ~values.isfinite()
    if bad.any():
        step = int(bad.nonzero()[0])
        raise ValueError(f"expected {name}_t {expected}, got {float(values[step]):.6g} at step {step + 1}: {meaning}")
