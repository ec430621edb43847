r"""A denoiser of quantised data: Bayes' rule for a pixel's own noise, a network for what the other pixels say of it.

    p(x_0^i = v_k | x_t)  is proportional to  exp(F_ik(x_t, t)) N(x_t^i; sqrt(alpha-bar_t) v_k, 1 - alpha-bar_t),
    m^i, s_i^2  =  mean and variance of it,        v_k = -1 + 2 k / (K - 1),  k = 0..K-1

Data of K levels lie on a grid, many pixels on its ends, and near t = 1 most of the bound is spent on which level it is. A
network that returns x_0 or the noise itself has to learn rounding, to the precision of the noise at each t; here rounding
is exact, and F is a log prior. Where pixels are independent, F = log p(v_k), the same for all t, is the optimum.

What comes out is what a :class:`ppl_models.DDPM` with predict="eps" and variance="learned" takes: the noise that m stands
for, eps = (x_t - sqrt(alpha-bar_t) m) / sqrt(1 - alpha-bar_t), and the u whose variance exp(w log beta_t +
(1 - w) log beta-tilde_t), w = sigmoid(u), is that of p(x_{t-1} | x_t) in each pixel, by the law of total variance:

    beta-tilde_t + c_t^2 s_i^2,     c_t = sqrt(alpha-bar_{t-1}) beta_t / (1 - alpha-bar_t)

with w clamped to [0.01, 0.99], since that parameterisation reaches no further than w = 0 and 1.

The one constraint: data are on the grid of K levels in [-1, 1]; the schedule is the DDPM's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ppl_models.networks.denoiser import Denoiser

_SMALLEST_WEIGHT = 0.01


class Schedule(Protocol):
    """What a noise schedule has to tell, as :class:`ppl_models.NoiseSchedule` does; entry t - 1 of a table is step t."""

    alpha_bar: Tensor
    marginal_variance: Tensor
    posterior_weight_x_0: Tensor
    log_beta: Tensor
    log_posterior_variance: Tensor

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""


class GridDenoiser(nn.Module):
    """``network(x_t, t)``: real ``[*batch, *data_shape]`` -> ``[*batch, *data_shape, 2]``, (eps, u); see the module.

    Args:
        network: F, ``[*batch, *data_shape]`` -> ``[*batch, *data_shape, K]``: a :class:`Denoiser` of real values made with
            ``outputs=K``.
        schedule: alpha-bar_t and the rest, T >= 2.

    Attributes:
        levels: K.

    Raises:
        ValueError: a network that takes classes or returns fewer than two numbers per entry; a schedule of one step.

    Example:
        >>> from ppl_models import DDPM, NoiseSchedule
        >>> from ppl_models.likelihoods import DiscretizedNormal
        >>> from ppl_models.networks import ResidualMLP
        >>> schedule = NoiseSchedule.cosine(1000)
        >>> network = GridDenoiser(ResidualMLP((8, 8), hidden=32, outputs=17), schedule)
        >>> x_1 = torch.full((1, 8, 8), 0.126)  # near the level 0.125, at little noise
        >>> mean, variance = network.posterior(x_1, torch.tensor(1))
        >>> round(mean[0, 0, 0].item(), 5), bool(variance.max() < 1e-6)
        (0.125, True)
        >>> ddpm = DDPM(network, schedule, (8, 8), variance="learned", likelihood=DiscretizedNormal(17))
    """

    values: Tensor
    tables: Tensor

    def __init__(self, network: Denoiser, schedule: Schedule) -> None:
        super().__init__()
        if network.inputs != 1 or network.outputs < 2:
            raise ValueError(
                f"expected a network of one input and K >= 2 outputs per entry, got {network.inputs} and "
                f"{network.outputs}: make it with outputs=K and without num_classes"
            )
        if len(schedule.alpha_bar) < 2:
            raise ValueError("expected a schedule of at least 2 steps, got 1: there is no reverse variance to match")
        self.network = network
        self.schedule = schedule
        self.levels = network.outputs
        low = schedule.log_posterior_variance.clone()
        low[0] = low[1]  # as DDPM has it: beta-tilde_2 in place of beta-tilde_1 = 0
        rows = [
            schedule.alpha_bar.sqrt(),
            schedule.marginal_variance.sqrt(),
            schedule.posterior_weight_x_0.square(),
            low,
            schedule.log_beta - low,
        ]
        self.register_buffer("values", torch.linspace(-1, 1, self.levels, dtype=torch.float64), persistent=False)
        self.register_buffer("tables", torch.stack(rows), persistent=False)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t ``[*batch, *data_shape]`` and t, which broadcasts against ``batch``, to (eps, u)."""
        mean, variance = self.posterior(x_t, t)
        signal, noise, square_weight, low, span = self._steps(x_t, t)
        weight = (square_weight * variance * (-low).exp()).log1p() / span
        u = weight.clamp(_SMALLEST_WEIGHT, 1 - _SMALLEST_WEIGHT).logit()
        return torch.stack([(x_t - signal * mean) / noise, u], -1)

    def posterior(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each entry of x_0 given x_t, each ``[*batch, *data_shape]``."""
        signal, noise, *_ = self._steps(x_t, t)
        values = self.values.to(x_t.dtype)
        distance = (x_t.unsqueeze(-1) - signal.unsqueeze(-1) * values) / noise.unsqueeze(-1)
        p = (self.network(x_t, t).to(x_t.dtype) - 0.5 * distance.square()).softmax(-1)
        mean = p @ values
        return mean, (p * (values - mean.unsqueeze(-1)).square()).sum(-1)

    def respaced(self, schedule: Schedule, timesteps: Sequence[int]) -> GridDenoiser:
        """The denoiser of the chain that visits only ``timesteps``, whose schedule that is: the same F, the variance its own.

        F is shared, not copied. A chain of one step has no reverse variance, and so no such denoiser.
        """
        return GridDenoiser(AtSteps(self.network, timesteps), schedule)  # type: ignore[arg-type]

    def _steps(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The tables at t, in the dtype of x_t and shaped to broadcast against it."""
        batch = self.network.batch_shape(x_t)
        steps = self.tables[:, t.expand(batch) - 1].to(x_t.dtype)
        return steps.reshape(*steps.shape, *[1] * (x_t.dim() - len(batch)))

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {
            "network": {"class": type(self.network).__name__, **self.network.config()},
            "schedule": {"class": type(self.schedule).__name__, **self.schedule.config()},
        }

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GridDenoiser:
        """Moves the tables and leaves them in float64."""
        tables = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = table.to(moved.device)
        return self


class AtSteps(nn.Module):
    """A :class:`Denoiser` seen from a coarser chain, whose step i is its step t_i; i = 0 is the data."""

    timesteps: Tensor

    def __init__(self, network: Denoiser, timesteps: Sequence[int]) -> None:
        super().__init__()
        self.network, self.inputs, self.outputs = network, network.inputs, network.outputs
        device = next(network.parameters(), torch.empty(0)).device
        self.register_buffer("timesteps", torch.tensor([0, *timesteps], device=device), persistent=False)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output at t_i."""
        return self.network(x_t, self.timesteps[t])

    def batch_shape(self, x_t: Tensor) -> torch.Size:
        """The network's own."""
        return self.network.batch_shape(x_t)
