r"""Transitions kept as matrices: any that are given, and the discretised Gaussian (D3PM, arXiv:2107.03006, A.2.3, eq. 8).

    [Q_t]_ij = exp(-4 (i - j)^2 / ((K - 1)^2 beta_t)) / Z_t   for j != i,   the diagonal such that rows sum to one
    Z_t = sum_{n = -(K-1)}^{K-1} exp(-4 n^2 / ((K - 1)^2 beta_t))

The last is symmetric, hence doubly stochastic: its stationary law is uniform. Constraint: log Q_t, log Qbar_t and Qbar_t are
three float64 tables of T K^2 numbers, the logarithms exact to relative rounding also far below the smallest float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import kl_divergence
from torch.nn import functional as F

from ppl_models.processes.class_law import ClassLaw
from ppl_models.processes.transitions import Schedule, Transitions, betas, refuse_steps, whole

__all__ = ["DenseTransitions", "DiscretizedGaussianTransitions", "discretized_gaussian", "log_matmul", "refuse_large"]

Numbers = Tensor | NDArray[Any] | Sequence[Any]

_LARGEST_TABLE = 2**28  # entries: 2 GiB
_FLOOR = 1e-280  # below this a float64 product may have lost terms to underflow
_ROW_SUM_TOLERANCE = 1e-6


class DenseTransitions(Transitions):
    """Q_1..Q_T as given, row-stochastic; all must leave the last law pi unchanged.

    All K states are data's: a mask given by its matrices is a state like any other, which the network may predict and
    samples may hold; :func:`ppl_models.processes.structured_transitions.absorbing` keeps the mask apart. Zeros of the
    matrices take no x_0 from p(x_0 | x_t), see :meth:`Transitions.restrict`.

    Args:
        matrices: ``[T, K, K]``, [Q_t]_ij = q(x_t = j | x_{t-1} = i); a tensor, an array, or (nested) sequences.
        stationary: pi ``[K]``, the prior p(x_T), as tensor, array or sequence; uniform if None.

    Raises:
        ValueError: values that are no numbers of those shapes, matrices that are not row-stochastic, a law that they do
            not leave unchanged or that x_T does not reach (infinite L_T), or tables too large.

    Example:
        >>> step = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
        >>> DenseTransitions(step.expand(3, 2, 2)).cumulative(2)
        tensor([[0.8200, 0.1800],
                [0.1800, 0.8200]], dtype=torch.float64)
    """

    log_columns: Tensor  # log Q_t transposed: training reads columns, which are slow in a table of rows
    log_products: Tensor
    _products: Tensor  # Qbar_t itself, so that no step takes K^2 exponentials
    _log_stationary: Tensor
    _prior_divergence: Tensor

    def __init__(self, matrices: Numbers, stationary: Numbers | None = None) -> None:
        given = matrices = _float64("matrices", matrices)
        if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2]:
            raise ValueError(f"expected matrices of shape [T, K, K], got {list(matrices.shape)}")
        sums = matrices.sum(-1)
        bad = (matrices < 0).any(-1) | ~((sums - 1).abs() <= _ROW_SUM_TOLERANCE)
        if bad.any():
            t, i = bad.nonzero()[0].tolist()
            raise ValueError(
                f"expected rows of probabilities that sum to one, as [Q_t]_ij = q(x_t = j | x_{{t-1}} = i), but row {i} of "
                f"Q_{t + 1} is not (its sum is {float(sums[t, i]):.6g}): normalise it, or transpose a column-stochastic one"
            )
        matrices = matrices / sums[..., None]
        classes = matrices.shape[-1]
        law = matrices.new_full((classes,), 1 / classes) if stationary is None else _float64("stationary", stationary)
        if law.shape != (classes,):
            raise ValueError(f"expected a stationary law of shape [{classes}], got {list(law.shape)}")
        moved = (law @ matrices - law).abs().amax(-1)
        if not bool((moved <= _ROW_SUM_TOLERANCE).all()):
            raise ValueError(
                f"expected a stationary law, pi Q_t = pi at every step, but step {int(moved.argmax()) + 1} moves it by "
                f"{float(moved.max()):.3g}: pass the law that all Q_t share as stationary"
            )
        if bool((law < 0).any()) or not float(law.sum()) > 0:
            raise ValueError(
                f"expected a stationary law of probabilities, got {law.tolist()}: pass numbers >= 0, not all zero"
            )
        self._set_tables(matrices.log(), (law / law.sum()).log())
        self._given = given, law  # not the tables' exponentials, whose last digits differ
        if bool(self._prior_divergence.isinf().any()):
            row = int(self._prior_divergence.isinf().nonzero()[0])
            raise ValueError(
                f"expected q(x_T | x_0) within the support of the stationary law, but from x_0 = {row} it reaches classes to "
                "which that gives no probability, so L_T = KL(q(x_T | x_0) || p(x_T)) would be infinite: let the last step end "
                "in the stationary law, or take more steps"
            )

    def _set_tables(self, log_steps: Tensor, log_stationary: Tensor) -> None:
        """The state that every subclass ends its construction with: log Q_t, log Qbar_t, log pi."""
        super().__init__(log_steps.shape[-1], len(log_steps))
        refuse_large(self.num_classes, self.num_timesteps)
        products = [torch.eye(self.num_classes, dtype=torch.float64).log()]
        for log_step in log_steps:
            products.append(log_matmul(products[-1], log_step))
        never = torch.full_like(log_steps[:1], torch.nan)
        self.register_buffer("log_columns", torch.cat([never, log_steps.mT]), persistent=False)
        self.register_buffer("log_products", torch.stack(products), persistent=False)
        self.register_buffer("_products", self.log_products.exp(), persistent=False)
        self.register_buffer("_log_stationary", log_stationary, persistent=False)
        rows, prior = ClassLaw(logits=products[-1]), ClassLaw(logits=log_stationary)
        self.register_buffer("_prior_divergence", kl_divergence(rows, prior), persistent=False)

    @property
    def log_stationary(self) -> Tensor:
        """See the base class."""
        return self._log_stationary

    def log_transition(self, x_previous: Tensor, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See the base class: one row."""
        self._check(x_previous, t)
        return self.log_columns.mT[t, x_previous].to(dtype or self.dtype)

    def log_column(self, x_t: Tensor, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See the base class: one column."""
        self._check(x_t, t)
        return self.log_columns[t, x_t].to(dtype or self.dtype)

    def log_marginal(self, x_0: Tensor, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See the base class: one row."""
        self._check(x_0, t, first=0)
        return self.log_products[t, x_0].to(dtype or self.dtype)

    def log_propagate(self, log_p: Tensor, t: Tensor) -> Tensor:
        """See the base class; O(K^2), a matrix product of probabilities in float64, whose non-negative terms cancel nothing.

        Where it is below 1e-280, near the smallest float64, one of its terms is kept, in log space: the diagonal's,
        p_j [Qbar_t]_jj, or if it is larger that of the likeliest class, which is nearly all where p is as sharp as that. A
        law becomes infinite only where Qbar_t has zeros at both and p leaves less than 1e-280 to all other classes.
        """
        shape = log_p.shape[:-1]
        t = t.reshape((1,) * (len(shape) - t.dim()) + t.shape)
        shared = 0  # trailing dims of x, those of one datum, that have the same t: one matrix serves them all
        while shared < t.dim() and t.shape[t.dim() - 1 - shared] == 1:
            shared += 1
        leading = len(shape) - shared
        t = t.reshape(t.shape[:leading])
        rows = log_p.reshape(*shape[:leading], -1, self.num_classes)
        moved = rows.to(torch.float64).exp() @ self._products[t]
        lost = moved <= _FLOOR  # not NaN, which must not become an impossible event
        log_moved = torch.where(lost, 1.0, moved).log().to(log_p.dtype)
        stay = self.log_products.diagonal(dim1=-2, dim2=-1)[t][..., None, :].to(log_p.dtype)
        largest, likeliest = rows.max(-1)
        term = largest[..., None] + self.log_products[t[..., None], likeliest].to(log_p.dtype)
        return torch.where(lost, torch.maximum(rows + stay, term), log_moved).reshape(log_p.shape)

    def prior_divergence(self, x_0: Tensor) -> Tensor:
        """See the base class: one number for each class."""
        self._check(x_0, x_0.new_ones(()))
        return self._prior_divergence[x_0]

    def config(self) -> dict[str, Any]:
        """See the base class."""
        matrices, stationary = self._given
        return {"matrices": matrices.tolist(), "stationary": stationary.tolist()}

    def extra_repr(self) -> str:
        """The sizes alone."""
        return f"num_classes={self.num_classes}, num_timesteps={self.num_timesteps}"


class DiscretizedGaussianTransitions(DenseTransitions):
    """See :func:`discretized_gaussian`."""

    is_ordinal = True

    def __init__(self, num_classes: int, num_timesteps: int, schedule: Schedule = "linear") -> None:
        refuse_large(whole("num_classes", num_classes, 2), whole("num_timesteps", num_timesteps, 1))
        beta = betas(schedule, num_timesteps)
        refuse_steps(beta, beta <= 0, "beta", "> 0 and finite", "it is twice the variance of a step, states on [-1, 1]")
        n = torch.arange(num_classes, dtype=torch.float64)
        log_weight = -4 * n.square() / ((num_classes - 1) ** 2 * beta[:, None])  # [T, K], of |i - j| = 0..K-1
        # Z - sum_{j != i} = 1 + what falls beyond either end: a sum of positive terms, where 1 - sum would cancel
        beyond = F.pad(log_weight.flip(-1).exp().cumsum(-1).flip(-1), (0, 1))[:, 1:]  # sum over n > k
        log_total = torch.log1p(2 * beyond[:, 0])
        log_diagonal = torch.log1p(beyond + beyond.flip(-1))
        log_steps = log_weight[:, (n[:, None] - n).abs().long()]
        log_steps.diagonal(dim1=-2, dim2=-1).copy_(log_diagonal)
        self._set_tables(log_steps - log_total[:, None, None], n.new_full((num_classes,), -math.log(num_classes)))
        self.schedule = schedule if isinstance(schedule, str) else beta.tolist()

    def config(self) -> dict[str, Any]:
        """See the base class."""
        return {"num_classes": self.num_classes, "num_timesteps": self.num_timesteps, "schedule": self.schedule}

    def extra_repr(self) -> str:
        """The constructor arguments."""
        return f"{super().extra_repr()}, schedule={self.schedule!r}"


def discretized_gaussian(
    num_classes: int, num_timesteps: int, schedule: Schedule = "linear"
) -> DiscretizedGaussianTransitions:
    """Steps between ordered states, likelier the nearer they are (arXiv:2107.03006, A.2.3, eq. 8).

    States are evenly spaced on [-1, 1], and a step is about N(0, beta_t/2), so that beta_t means what it does for images.

    Args:
        num_classes: K, in order.
        num_timesteps: T.
        schedule: "linear" (the paper's), "cosine", "reciprocal", or beta_1..beta_T > 0; see
            :func:`ppl_models.processes.transitions.betas`.

    Raises:
        ValueError: fewer than two classes, no steps, a schedule that is not one, or tables too large for K and T.

    Example:
        >>> discretized_gaussian(3, num_timesteps=1, schedule=[1.0]).dense(1)
        tensor([[0.7821, 0.2076, 0.0103],
                [0.2076, 0.5849, 0.2076],
                [0.0103, 0.2076, 0.7821]], dtype=torch.float64)
    """
    return DiscretizedGaussianTransitions(num_classes, num_timesteps, schedule)


def log_matmul(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(e^a e^b) of two matrices, to relative rounding also where e^a e^b is below the smallest float64.

    A product of non-negative numbers cancels nothing; only the entries that underflow are worked out again in log space.
    """
    product = log_a.exp() @ log_b.exp()
    result = product.log()
    for i in (product < _FLOOR).any(-1).nonzero()[:, 0].tolist():
        columns = product[i] < _FLOOR
        result[i, columns] = (log_a[i, :, None] + log_b[:, columns]).logsumexp(0)
    return result


def _float64(name: str, values: Numbers) -> Tensor:
    """A float64 copy of a tensor, an array, (nested) sequences of numbers, or a sequence of tensors or arrays."""
    try:
        if isinstance(values, Sequence) and any(isinstance(value, Tensor | np.ndarray) for value in values):
            values = torch.stack([torch.as_tensor(value) for value in values])
        if isinstance(values, Tensor) and values.is_complex():
            raise TypeError("complex numbers are no probabilities")
        return torch.as_tensor(values, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"expected {name} as a tensor or as (nested) sequences of numbers of one length: {error}"
        ) from None


def refuse_large(num_classes: int, num_timesteps: int) -> None:
    """Raises ValueError if T matrices of K^2 entries are more than this library makes room for."""
    entries = (num_timesteps + 1) * num_classes**2
    if entries > _LARGEST_TABLE:
        raise ValueError(
            f"expected T and K whose matrices fit in memory, (T + 1) K^2 <= {_LARGEST_TABLE:,}, got {entries:,} with "
            f"T = {num_timesteps}, K = {num_classes}: use uniform or absorbing transitions, which need no matrices"
        )
