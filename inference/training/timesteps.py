r"""Which t a diffusion is trained on: samplers of t in 0..T-1 with the weights that keep the bound unbiased.

    sum_{t=0}^{T-1} L_t = E_{t ~ p} [ L_t / p_t ],    weight = 1 / p_t

- uniform: t independent for each datum, p_t = 1/T (Ho et al. 2020, arXiv:2006.11239, algorithm 1).
- stratified: t_b = floor(T ((u + b/B) mod 1)) with one u ~ U(0, 1) a batch: each t_b is uniform, and the batch covers 0..T-1
  evenly (Kingma et al. 2021, arXiv:2107.00630, appendix I.1).
- loss_second_moment: p_t proportional to sqrt(E L_t^2), which gives the least variance there is for one draw of t (Nichol
  and Dhariwal 2021, arXiv:2102.09672, eq. 18). Uniform until every t has been seen ten times, and mixed with it by 0.1 %.

The one constraint: a sampler's state is in its buffers and moves only in :meth:`TimestepSampler.observe`, which is called
after t was drawn: the weights are those of the law that t came from, so the estimate is unbiased at every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SAMPLERS", "LossSecondMoment", "Stratified", "TimestepSampler", "Uniform"]


class TimestepSampler(nn.Module, ABC):
    """A law over t in 0..T-1.

    Args:
        num_timesteps: T.
    """

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        self.num_timesteps = num_timesteps

    @abstractmethod
    def forward(self, count: int, device: torch.device) -> Tensor:
        """Draws t for a batch: int64 ``[count]``, each in 0..T-1."""

    def probabilities(self, device: torch.device) -> Tensor:
        """p_t of each datum's t, ``[T]`` float64."""
        return torch.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=torch.float64, device=device)

    def weight(self, t: Tensor) -> Tensor:
        """1 / p_t, the shape of ``t``, float64."""
        return torch.full(t.shape, self.num_timesteps, dtype=torch.float64, device=t.device)

    def most_of_one(self, count: int) -> int:
        """The most data of a batch of ``count`` that can have the same t."""
        return count

    def observe(self, t: Tensor, loss: Tensor) -> None:
        """Takes note of L_t, ``[B]`` nats, at the t that were drawn; nothing where p is fixed, or of what is not finite."""


class Uniform(TimestepSampler):
    """Independent and uniform.

    Example:
        >>> sampler = Uniform(4)
        >>> t = sampler(1000, torch.device("cpu"))
        >>> int(t.min()), int(t.max()), sampler.weight(t[:2]).tolist()
        (0, 3, [4.0, 4.0])
    """

    def forward(self, count: int, device: torch.device) -> Tensor:
        """See the base class."""
        return torch.randint(self.num_timesteps, (count,), device=device)


class Stratified(TimestepSampler):
    """Uniform for each datum, evenly spread over the batch.

    Example:
        >>> Stratified(4)(8, torch.device("cpu")).bincount().tolist()
        [2, 2, 2, 2]
    """

    def forward(self, count: int, device: torch.device) -> Tensor:
        """See the base class."""
        u = torch.rand((), dtype=torch.float64, device=device)
        u = (u + torch.arange(count, dtype=torch.float64, device=device) / count).frac()
        return (u * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)  # T u may round up to T

    def most_of_one(self, count: int) -> int:
        """ceil(B/T), and one for rounding."""
        return min(count, -(-count // self.num_timesteps) + 1)


class LossSecondMoment(TimestepSampler):
    """p_t proportional to the root mean square of the last losses at t.

    E L_t^2 is a running mean over the first :attr:`memory` observations and an exponential one afterwards (in place of the
    paper's window of the last ten, so that a batch may hold any number of each t). In data-parallel training each process
    keeps its own; every one of them is unbiased.

    Args:
        num_timesteps: T.

    Example:
        >>> sampler, t = LossSecondMoment(2), torch.tensor([0, 1]).repeat(10)
        >>> sampler.observe(t, torch.where(t == 0, 1.0, 3.0))
        >>> [round(p, 3) for p in sampler.probabilities(torch.device("cpu")).tolist()]
        [0.25, 0.75]
    """

    memory = 10
    uniform_share = 0.001
    count: Tensor
    second_moment: Tensor

    def __init__(self, num_timesteps: int) -> None:
        super().__init__(num_timesteps)
        self.register_buffer("count", torch.zeros(num_timesteps, dtype=torch.float64))
        self.register_buffer("second_moment", torch.zeros(num_timesteps, dtype=torch.float64))

    def forward(self, count: int, device: torch.device) -> Tensor:
        """See the base class."""
        return torch.multinomial(self.probabilities(device), count, replacement=True)

    def probabilities(self, device: torch.device) -> Tensor:
        """See the base class."""
        uniform = super().probabilities(device)
        root = self.second_moment.to(device).sqrt()
        total = root.sum()
        informed = (self.count.to(device) >= self.memory).all() & (total > 0)
        share = root / torch.where(informed, total, torch.ones_like(total))
        return torch.where(informed, (1 - self.uniform_share) * share + self.uniform_share * uniform, uniform)

    def weight(self, t: Tensor) -> Tensor:
        """See the base class."""
        return self.probabilities(t.device)[t].reciprocal()

    def observe(self, t: Tensor, loss: Tensor) -> None:
        """See the base class."""
        square = loss.detach().to(self.second_moment).square()
        finite = square.isfinite()
        square = torch.where(finite, square, 0.0)
        seen = torch.zeros_like(self.count).index_add(0, t, finite.to(square.dtype))
        mean = torch.zeros_like(self.second_moment).index_add(0, t, square) / seen.clamp(min=1)
        forgetting = 1 - (1 - 1 / self.memory) ** seen
        rate = torch.maximum(forgetting, seen / (self.count + seen).clamp(min=1)) * (seen > 0)
        self.second_moment.copy_(self.second_moment + rate * (mean - self.second_moment))
        self.count.copy_(self.count + seen)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LossSecondMoment:
        """Moves the sums, but leaves them in float64."""
        super()._apply(fn, recurse)
        self.count, self.second_moment = self.count.double(), self.second_moment.double()
        return self


SAMPLERS: dict[str, type[TimestepSampler]] = {
    "uniform": Uniform,
    "stratified": Stratified,
    "loss_second_moment": LossSecondMoment,
}
