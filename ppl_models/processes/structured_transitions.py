r"""Transitions that need no matrix: stay with probability 1 - beta_t, or be drawn anew (D3PM, arXiv:2107.03006, A.2).

    uniform     Q_t = (1 - beta_t) I + beta_t 1 1' / K        Qbar_t = a_t I + (1 - a_t) 1 1' / K            (A.2.1)
    absorbing   Q_t = (1 - beta_t) I + beta_t 1 e_m'          Qbar_t = a_t I + (1 - a_t) 1 e_m'              (A.2.2)

with a_t = prod_{s <= t} (1 - beta_s) and m = K - 1 the mask. Both are (1 - beta_t) I + beta_t 1 pi' with pi the stationary
law, so that products stay in the family. Constraint: O(T + K) numbers are kept and every action takes O(K), so that K may
be a vocabulary of tens of thousands.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ppl_models.processes.transitions import Schedule, Transitions, betas, log_add_exp, refuse_steps

__all__ = ["AbsorbingTransitions", "UniformTransitions", "absorbing", "uniform"]


class _Mixing(Transitions):
    """Q_t = (1 - beta_t) I + beta_t 1 pi': stay, or be drawn anew from pi. Only pi differs between the subclasses."""

    log_stay: Tensor
    log_jump: Tensor
    log_kept: Tensor
    log_lost: Tensor

    def __init__(self, num_classes: int, num_timesteps: int, schedule: Schedule) -> None:
        super().__init__(num_classes, num_timesteps)
        self.schedule = schedule if isinstance(schedule, str) else torch.as_tensor(schedule).tolist()
        beta = betas(schedule, num_timesteps)
        refuse_steps(beta, (beta <= 0) | (beta > 1), "beta", "in (0, 1]", "it is the probability of a jump")
        log_kept = F.pad(torch.log1p(-beta).cumsum(0), (1, 0))  # log a_t, t = 0..T
        never = beta.new_tensor([torch.nan])  # there is no step 0: nothing may be read there unseen
        tables = {
            "log_stay": torch.cat([never, torch.log1p(-beta)]),  # log (1 - beta_t)
            "log_jump": torch.cat([never, beta.log()]),  # log beta_t
            "log_kept": log_kept,
            "log_lost": (-torch.expm1(log_kept)).log(),  # log (1 - a_t)
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def log_transition(self, x_previous: Tensor, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See the base class; O(K)."""
        self._check(x_previous, t)
        return self._row(x_previous, self.log_stay[t], self.log_jump[t], dtype)

    def log_marginal(self, x_0: Tensor, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See the base class; O(K)."""
        self._check(x_0, t, first=0)
        return self._row(x_0, self.log_kept[t], self.log_lost[t], dtype)

    def log_propagate(self, log_p: Tensor, t: Tensor) -> Tensor:
        """See the base class; O(K): log(a_t p + (1 - a_t) pi)."""
        kept, lost = self.log_kept[t][..., None].to(log_p.dtype), self.log_lost[t][..., None].to(log_p.dtype)
        return self._mixed(log_p + kept, lost)

    @abstractmethod
    def _mixed(self, log_kept_p: Tensor, log_lost: Tensor) -> Tensor:
        """log(e^log_kept_p + e^log_lost pi)."""

    def _row(self, x: Tensor, log_stay: Tensor, log_jump: Tensor, dtype: torch.dtype | None) -> Tensor:
        """log(stay I + jump 1 pi'), row x."""
        dtype = dtype or self.dtype
        jump = log_jump[..., None] + self.log_stationary  # [*t.shape, K], small, in float64
        both = torch.logaddexp(log_stay[..., None], jump)
        return torch.where(self._equal(x), both.to(dtype), jump.to(dtype))

    def config(self) -> dict[str, Any]:
        """See the base class."""
        return {"num_classes": self.num_classes, "num_timesteps": self.num_timesteps, "schedule": self.schedule}


class UniformTransitions(_Mixing):
    """See :func:`uniform`."""

    _log_stationary: Tensor

    def __init__(self, num_classes: int, num_timesteps: int, schedule: Schedule = "cosine") -> None:
        super().__init__(num_classes, num_timesteps, schedule)
        flat = torch.full((num_classes,), -math.log(num_classes), dtype=torch.float64)
        self.register_buffer("_log_stationary", flat, persistent=False)

    @property
    def log_stationary(self) -> Tensor:
        """-log K in every state."""
        return self._log_stationary

    def _mixed(self, log_kept_p: Tensor, log_lost: Tensor) -> Tensor:
        return torch.logaddexp(log_kept_p, log_lost - math.log(self.num_classes))

    def log_column(self, x_t: Tensor, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See the base class; Q_t is symmetric."""
        return self.log_transition(x_t, t, dtype)


class AbsorbingTransitions(_Mixing):
    """See :func:`absorbing`.

    Attributes:
        mask: m = K - 1, the state that nothing leaves and no datum is in.
    """

    _log_stationary: Tensor

    def __init__(self, num_classes: int, num_timesteps: int, schedule: Schedule = "reciprocal") -> None:
        super().__init__(num_classes, num_timesteps, schedule)
        self.mask = num_classes - 1
        self.num_data_classes = num_classes - 1
        point = torch.full((num_classes,), -torch.inf, dtype=torch.float64)
        point[self.mask] = 0
        self.register_buffer("_log_stationary", point, persistent=False)
        kept = float(self.log_kept[-1].exp())
        if kept > 0:
            raise ValueError(
                f"expected a schedule at whose end all is absorbed, but x_T still shows x_0 with probability {kept:.3g}: "
                "p(x_T) is the mask alone, so L_T = KL(q(x_T | x_0) || p(x_T)) would be infinite; "
                'let beta_T = 1, as schedule="reciprocal" does'
            )

    @property
    def log_stationary(self) -> Tensor:
        """All mass on the mask."""
        return self._log_stationary

    def _mixed(self, log_kept_p: Tensor, log_lost: Tensor) -> Tensor:
        masked = log_add_exp(log_kept_p[..., self.mask :], log_lost)
        return torch.cat([log_kept_p[..., : self.mask], masked], -1)

    def log_column(self, x_t: Tensor, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See the base class: beta_t, and 1 at the mask, for x_t = m; a point mass for every other x_t.

        The constant left out there, 1 - beta_t, is 0 at beta_t = 1, and the posterior then is that of the limit.
        """
        self._check(x_t, t)
        dtype = dtype or self.dtype
        of_mask = torch.where(self._equal(x_t), 0.0, self.log_jump[t].to(dtype)[..., None])
        return torch.where((x_t == self.mask)[..., None], of_mask, self._point(x_t, dtype))

    def log_unmasking(self, t: Tensor) -> Tensor:
        """log q(x_{t-1} = x_0 | x_t = m, x_0) = log (a_{t-1} - a_t) / (1 - a_t), of the shape of t, float64."""
        return self.log_jump[t] + self.log_kept[t - 1] - self.log_lost[t]

    def restrict(self, logits: Tensor, x_t: Tensor) -> Tensor:
        """An unmasked x_t *is* x_0; a masked one excludes the mask alone, in which no datum is."""
        data = ~self._equal(torch.full((), self.mask, device=logits.device))
        possible = torch.where((x_t == self.mask)[..., None], data, self._equal(x_t))
        return torch.where(possible, logits, -torch.inf)

    def _point(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.where(self._equal(x), 0.0, -torch.inf).to(dtype)


def uniform(num_classes: int, num_timesteps: int, schedule: Schedule = "cosine") -> UniformTransitions:
    """Q_t = (1 - beta_t) I + beta_t 1 1'/K: stay, or be drawn anew among all K states (arXiv:2107.03006, A.2.1).

    Args:
        num_classes: K.
        num_timesteps: T.
        schedule: "cosine" (the paper's), "linear", "reciprocal", or beta_1..beta_T, each in (0, 1]; see :func:`betas`.

    Raises:
        ValueError: fewer than two classes, no steps, or a schedule that is not one.

    Example:
        >>> uniform(3, num_timesteps=2, schedule=[0.3, 0.5]).dense(1)
        tensor([[0.8000, 0.1000, 0.1000],
                [0.1000, 0.8000, 0.1000],
                [0.1000, 0.1000, 0.8000]], dtype=torch.float64)
    """
    return UniformTransitions(num_classes, num_timesteps, schedule)


def absorbing(num_classes: int, num_timesteps: int, schedule: Schedule = "reciprocal") -> AbsorbingTransitions:
    """Q_t = (1 - beta_t) I + beta_t 1 e_m': stay, or fall into the mask m = K - 1 (arXiv:2107.03006, A.2.2).

    The mask is counted in K and is its last state: data of 17 classes have num_classes = 18 and never hold class 17.

    Args:
        num_classes: K, the mask included.
        num_timesteps: T.
        schedule: "reciprocal" (the paper's 1/(T - t + 1): x_t is masked with probability t/T), or beta_1..beta_T, each in
            (0, 1], the last one 1.

    Raises:
        ValueError: fewer than two classes, no steps, a schedule that is not one, or one at whose end not everything is
            absorbed, so that L_T is infinite.

    Example:
        >>> absorbing(3, num_timesteps=4).cumulative(1)
        tensor([[0.7500, 0.0000, 0.2500],
                [0.0000, 0.7500, 0.2500],
                [0.0000, 0.0000, 1.0000]], dtype=torch.float64)
    """
    return AbsorbingTransitions(num_classes, num_timesteps, schedule)
