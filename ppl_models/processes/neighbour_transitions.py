r"""Transitions between states that are near in an embedding (D3PM, arXiv:2107.03006, A.2.4).

    Q_t = exp(alpha_t R),   R = A - diag(A 1),   A = (G + G') / (2k),   G_ij = 1 if i is one of the k nearest to j

R is symmetric, so that Q_t is doubly stochastic and the stationary law uniform, and all Q_t commute:
Qbar_t = exp((alpha_1 + ... + alpha_t) R). Constraint: the neighbours must link all classes; otherwise some step could never
be taken and x_T would still show the group of x_0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ppl_models.processes.dense_transitions import DenseTransitions, log_matmul, refuse_large
from ppl_models.processes.transitions import betas, refuse_steps, whole

__all__ = ["NearestNeighbourTransitions", "nearest_neighbour"]

_REMAINING = 1e-3  # of the information about x_0 at the end of the schedule


class NearestNeighbourTransitions(DenseTransitions):
    """See :func:`nearest_neighbour`.

    Attributes:
        rate: R, ``[K, K]`` float64, rows sum to zero.
        exponents: alpha_1..alpha_T.
    """

    def __init__(
        self,
        embeddings: Tensor | Sequence[Sequence[float]],
        num_timesteps: int,
        num_neighbours: int = 5,
        schedule: str | Sequence[float] = "mutual_information",
    ) -> None:
        points = torch.as_tensor(embeddings, dtype=torch.float64)
        if points.dim() != 2 or len(points) < 2 or not bool(points.isfinite().all()):
            raise ValueError(f"expected finite embeddings of shape [K, d], K >= 2, got shape {list(points.shape)}")
        classes = len(points)
        refuse_large(classes, whole("num_timesteps", num_timesteps, 1))
        if whole("num_neighbours", num_neighbours, 1) >= classes:
            raise ValueError(
                f"expected num_neighbours in 1..{classes - 1}, one less than the classes, got {num_neighbours}"
            )
        links = _neighbour_graph(points, num_neighbours)
        parts, _ = connected_components((links + links.T).numpy(), directed=False)
        if parts > 1:
            raise ValueError(
                f"expected neighbours that link all classes, but they fall into {parts} groups that no step leaves, so that "
                f"x_T still shows the group of x_0: raise num_neighbours above {num_neighbours}"
            )
        adjacency = (links + links.T) / (2 * num_neighbours)
        rate = adjacency - torch.diag(adjacency.sum(-1))
        if isinstance(schedule, str):
            if schedule != "mutual_information":
                raise ValueError(f'expected schedule "mutual_information" or alpha_1..alpha_T, got {schedule!r}')
            exponents = _mutual_information_exponents(rate, num_timesteps)
        else:
            exponents = betas(schedule, num_timesteps)
            refuse_steps(exponents, exponents <= 0, "alpha", "> 0 and finite", "it is the time that R acts for")
        log_steps = torch.stack([_log_exponential(rate, float(a)) for a in exponents])
        self._set_tables(log_steps, rate.new_full((classes,), -math.log(classes)))
        self.register_buffer("rate", rate, persistent=False)
        self.register_buffer("exponents", exponents, persistent=False)
        self._config = {
            "embeddings": points.tolist(),
            "num_timesteps": num_timesteps,
            "num_neighbours": num_neighbours,
            "schedule": schedule if isinstance(schedule, str) else exponents.tolist(),
        }

    def config(self) -> dict[str, Any]:
        """See the base class."""
        return dict(self._config)

    def extra_repr(self) -> str:
        """All but the embeddings."""
        return ", ".join(f"{key}={value!r}" for key, value in self._config.items() if key != "embeddings")


def nearest_neighbour(
    embeddings: Tensor | Sequence[Sequence[float]],
    num_timesteps: int,
    num_neighbours: int = 5,
    schedule: str | Sequence[float] = "mutual_information",
) -> NearestNeighbourTransitions:
    """Steps between states that are near in an embedding (arXiv:2107.03006, A.2.4): Q_t = exp(alpha_t R).

    Args:
        embeddings: ``[K, d]``, a point for each class; distances are Euclidean.
        num_timesteps: T.
        num_neighbours: k; each class is linked to its k nearest and to those that it is near to.
        schedule: "mutual_information" (A.7: I(x_t; x_0) falls linearly with t, for x_0 uniform, to 0.1 % of log K at T), or
            alpha_1..alpha_T > 0.

    Raises:
        ValueError: fewer than two classes, k not a whole number in 1..K-1, classes that the links do not join, or a bad
            schedule.

    Example:
        >>> nearest_neighbour(torch.tensor([[0.0], [1.0], [2.5]]), 4, num_neighbours=1).rate
        tensor([[-1.0000,  1.0000,  0.0000],
                [ 1.0000, -1.5000,  0.5000],
                [ 0.0000,  0.5000, -0.5000]], dtype=torch.float64)
    """
    return NearestNeighbourTransitions(embeddings, num_timesteps, num_neighbours, schedule)


def _log_exponential(rate: Tensor, time: float) -> Tensor:
    """log exp(time R) by scaling and squaring of non-negative matrices: R = M - c I with M >= 0, so that nothing cancels."""
    c = float(-rate.diagonal().min())
    squarings = max(0, math.ceil(math.log2(max(time * c, 1.0))))
    part = time / 2**squarings
    identity = torch.eye(len(rate), dtype=rate.dtype)
    log_matrix = torch.linalg.matrix_exp(part * (rate + c * identity)).log() - part * c
    for _ in range(squarings):
        log_matrix = log_matmul(log_matrix, log_matrix)
    return log_matrix.log_softmax(-1)  # rows sum to one up to rounding; now to the last digit


def _mutual_information_exponents(rate: Tensor, num_timesteps: int) -> Tensor:
    """alpha_t with I(x_t; x_0) = (1 - (1 - r) t/T) log K for uniform x_0: bisection on the time that R has acted for."""
    classes = len(rate)
    values, vectors = torch.linalg.eigh(rate)

    def information(time: Tensor) -> Tensor:
        q = ((vectors * (values * time[:, None, None]).exp()) @ vectors.T).clamp(min=0)
        return math.log(classes) + (torch.special.xlogy(q, q).sum(-1)).mean(-1)

    t = torch.arange(1, num_timesteps + 1, dtype=rate.dtype)
    target = (1 - (1 - _REMAINING) * t / num_timesteps) * math.log(classes)
    gap = float(-values.sort(descending=True).values[1])
    low = torch.full_like(t, math.log(1e-12))
    high = torch.full_like(t, math.log(20.0 / gap))
    for _ in range(60):
        middle = (low + high) / 2
        above = torch.cat([information(m.exp()[None]) for m in middle]) > target
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high.exp().diff(prepend=high.new_zeros(1))


def _neighbour_graph(points: Tensor, num_neighbours: int) -> Tensor:
    """G, ``[K, K]``: G_ij = 1 if i is one of the nearest neighbours of j; ties go to the lower index."""
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    nearest = distances.sort(dim=0, stable=True).indices[:num_neighbours]
    return torch.zeros_like(distances).scatter_(0, nearest, 1.0)
