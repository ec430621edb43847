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

from ppl_models.processes.transitions import Schedule, Transitions, betas, log_add_exp, refuse_steps, shapes_are_fixed

__all__ = ["AbsorbingTransitions", "UniformTransitions", "absorbing", "uniform"]

_EXACT = 40.0  # log(1 + e^x) is x from there on, in float64 too


class _Mixing(Transitions):
    """Q_t = (1 - beta_t) I + beta_t 1 pi': stay, or be drawn anew from pi. Only pi differs between the subclasses."""

    log_stay: Tensor
    log_jump: Tensor
    log_kept: Tensor
    log_lost: Tensor

    def __init__(self, num_classes: int, num_timesteps: int, schedule: Schedule) -> None:
        super().__init__(num_classes, num_timesteps)
        self.schedule = schedule if isinstance(schedule, str) else betas(schedule, num_timesteps).tolist()
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

    def sample_marginal(self, x_0: Tensor, t: Tensor) -> Tensor:
        """See the base class; O(1): x_0 itself with probability a_t, else a draw from pi."""
        self._check(x_0, t, first=0)
        kept = self.log_kept[t].exp()
        u = torch.rand(torch.broadcast_shapes(x_0.shape, t.shape), dtype=kept.dtype, device=x_0.device)
        return torch.where(u < kept, x_0, self._drawn_anew(u))

    @abstractmethod
    def _drawn_anew(self, like: Tensor) -> Tensor:
        """Draws from pi, of the shape of ``like`` or broadcastable to it."""

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

    def step_losses(self, x_t: Tensor, x_0: Tensor, x_0_logits: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class; one pass over the classes, for q takes three values only. See :meth:`divergence_of`."""
        log_p = x_0_logits.log_softmax(-1)
        both = torch.stack(torch.broadcast_tensors(x_t, x_0), -1)
        at_t, at_0 = log_p.gather(-1, both.expand(*log_p.shape[:-1], 2)).unbind(-1)
        shift = self.log_odds(t)[..., None].to(log_p.dtype)
        total = F.softplus(log_p + shift, threshold=_EXACT).sum(-1)
        return self.divergence_of(x_t, x_0, total, at_t, at_0, t), -at_0

    def log_odds(self, t: Tensor) -> Tensor:
        """log a / b with a = a_{t-1} and b = (1 - a_{t-1}) / K, of the shape of t, float64; t in 2..T."""
        return self.log_kept[t - 1] - self.log_lost[t - 1] + math.log(self.num_classes)

    def divergence_of(
        self, x_t: Tensor, x_0: Tensor, total: Tensor, log_p_t: Tensor, log_p_0: Tensor, t: Tensor
    ) -> Tensor:
        r"""The KL of :meth:`step_losses` from what it needs of p_k = p(x_0 = k | x_t).

        Write s = 1 - beta_t, r = beta_t / K, a = a_{t-1}, b = (1 - a_{t-1}) / K, i = x_0, j = x_t, and
        f(p) = log(1 + a p / b), so that Qbar_{t-1} carries p to b e^f(p). Then with Z = (s [i = j] a + s b) + r

            q_k = (s [k = j] + r) (a [k = i] + b) / Z
            KL  = [ r b (f(1) - sum_k f(p_k)) + s b (f([i = j]) - f(p_j)) + (r + s [i = j]) a (f(1) - f(p_i)) ] / Z
                  + log(s b e^f(p_j) + r) - log Z.

        Args:
            x_t: as in :meth:`step_losses`.
            x_0: the same.
            total: sum_k f(p_k), for each entry.
            log_p_t: log p_j.
            log_p_0: log p_i.
            t: as in :meth:`step_losses`.
        """
        self._check(x_0, t, first=2)
        self._check(x_t, t, first=2)
        same, dtype = x_t == x_0, total.dtype
        log_s, log_r = self.log_stay[t], self.log_jump[t] - math.log(self.num_classes)
        log_a, log_b = self.log_kept[t - 1], self.log_lost[t - 1] - math.log(self.num_classes)
        log_sb, log_rest = log_s + log_b, torch.logaddexp(log_s + log_b, log_r)
        log_z = torch.where(same, torch.logaddexp(log_s + log_a, log_rest), log_rest)
        log_moved = torch.where(same, torch.logaddexp(log_s, log_r), log_r) + log_a
        of_all, of_x_t, of_x_0 = (
            (log_weight - log_z).exp().to(dtype) for log_weight in (log_r + log_b, log_sb, log_moved)
        )
        shift = self.log_odds(t).to(dtype)
        top, at_t, at_0 = (
            F.softplus(each + shift, threshold=_EXACT) for each in (torch.zeros_like(shift), log_p_t, log_p_0)
        )
        spent = of_all * (top - total) + of_x_t * (torch.where(same, top, 0.0) - at_t) + of_x_0 * (top - at_0)
        return spent + torch.logaddexp(log_sb.to(dtype) + at_t, log_r.to(dtype)) - log_z.to(dtype)

    def prior_divergence(self, x_0: Tensor) -> Tensor:
        """See the base class: the same for every x_0."""
        self._check(x_0, x_0.new_ones(()))
        a, log_lost, size = self.log_kept[-1].exp(), self.log_lost[-1], self.num_classes
        gain = torch.log1p((size - 1) * a)  # log K Qbar_ii; K Qbar_ij = 1 - a elsewhere
        kept = a + (1 - a) / size
        elsewhere = torch.where(log_lost > -torch.inf, (1 - kept) * log_lost, 0.0)
        return (kept * gain + elsewhere).expand(x_0.shape)

    def _drawn_anew(self, like: Tensor) -> Tensor:
        return torch.randint(self.num_classes, like.shape, device=like.device)


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
        kept = float(self.log_kept[-1])
        if kept > -math.inf:
            probability = f"{math.exp(kept):.3g}" if kept > -700 else f"e^{kept:.0f}"
            raise ValueError(
                f"expected a schedule at whose end all is absorbed, but x_T still shows x_0 with probability {probability}: "
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

    def step_losses(self, x_t: Tensor, x_0: Tensor, x_0_logits: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class: -w_t log p(x_0 | x_t), w_t = (a_{t-1} - a_t) / (1 - a_t), which an unmasked x_t makes zero."""
        self._check(x_0, t, first=2)
        self._check(x_t, t, first=2)
        surprisal = self.surprisal(x_t, x_0, x_0_logits)
        return self.log_unmasking(t).exp().to(surprisal.dtype) * surprisal, surprisal

    def surprisal(self, x_t: Tensor, x_0: Tensor, x_0_logits: Tensor) -> Tensor:
        """See the base class: zero where x_t is unmasked, so that only masked entries are looked at where shapes allow."""
        shape = x_0_logits.shape[:-1]
        masked, x_0 = (x_t == self.mask).expand(shape), x_0.expand(shape)
        if shapes_are_fixed():
            log_p = x_0_logits[..., : self.mask].log_softmax(-1)
            return torch.where(masked, -log_p.gather(-1, x_0[..., None])[..., 0], 0.0)
        rows = masked.flatten().nonzero()[:, 0]
        few = x_0_logits.reshape(-1, self.num_classes).index_select(0, rows)[:, : self.mask]
        of_rows = F.cross_entropy(few, x_0.flatten().index_select(0, rows), reduction="none")
        return of_rows.new_zeros(masked.numel()).index_copy(0, rows, of_rows).reshape(shape)

    def prior_divergence(self, x_0: Tensor) -> Tensor:
        """See the base class: zero, all is absorbed."""
        self._check(x_0, x_0.new_ones(()))
        return torch.zeros_like(x_0, dtype=self._log_stationary.dtype)

    def _drawn_anew(self, like: Tensor) -> Tensor:
        return torch.full((), self.mask, device=like.device)

    def restrict(self, logits: Tensor, x_t: Tensor) -> Tensor:
        """An unmasked x_t *is* x_0; a masked one excludes the mask alone, in which no datum is."""
        data = ~self._equal(torch.full((), self.mask, device=logits.device))
        possible = data & (self._equal(x_t) | (x_t == self.mask)[..., None])
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
