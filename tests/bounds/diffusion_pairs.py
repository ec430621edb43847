"""Small diffusions for the tests of what is done with one: exactly known, nonlinear, on pixels, and of classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppl_models.d3pm import D3PM
from ppl_models.ddpm import DDPM
from ppl_models.likelihoods import DiscretizedNormal, Likelihood, Normal
from ppl_models.linear_diffusion import LinearDiffusion
from ppl_models.processes import NoiseSchedule
from ppl_models.processes.structured_transitions import uniform

LOC, SCALE = (0.5, -1.0), (0.8, 0.3)


def linear(betas: tuple[float, ...] | NoiseSchedule = (0.1, 0.25, 0.4, 0.7)) -> LinearDiffusion:
    """The diffusion of two independent Gaussians: every L_t is known."""
    schedule = betas if isinstance(betas, NoiseSchedule) else NoiseSchedule(betas)
    return LinearDiffusion(schedule, LOC, SCALE)


class Tanh(nn.Module):
    """A small network, not affine, that counts its calls and the rows of the last one."""

    def __init__(self, dims: int = 2, outputs: int = 1, num_timesteps: int = 4, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(dims + 1, 8), nn.Tanh(), nn.Linear(8, dims * outputs))
        self.dims, self.outputs, self.num_timesteps = dims, outputs, num_timesteps
        self.calls, self.rows = 0, 0

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        self.rows = t.numel()
        time = (t[..., None] / self.num_timesteps).to(x_t.dtype)
        y = self.body(torch.cat([x_t, time], -1))
        return y if self.outputs == 1 else y.reshape(*y.shape[:-1], self.dims, self.outputs)


def tanh_ddpm(
    num_timesteps: int = 4,
    likelihood: Likelihood | None = None,
    variance: str = "beta",
    predict: str = "x_0",
    seed: int = 0,
) -> DDPM:
    """A DDPM on two pixels of five levels (or what the likelihood says)."""
    network = Tanh(outputs=2 if variance == "learned" else 1, num_timesteps=num_timesteps, seed=seed)
    likelihood = DiscretizedNormal(levels=5) if likelihood is None else likelihood
    return DDPM(network, NoiseSchedule.cosine(num_timesteps), (2,), predict, variance, likelihood)


def continuous_ddpm(num_timesteps: int = 4, predict: str = "x_0", variance: str = "beta") -> DDPM:
    """A DDPM on the plane."""
    return tanh_ddpm(num_timesteps, Normal(), variance, predict)


class Table(nn.Module):
    """Logits of x_0 that depend on x_t and t."""

    def __init__(self, num_classes: int, num_timesteps: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(torch.randn(num_timesteps, num_classes, num_classes, generator=generator))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.logits[t[..., None] - 1, x_t]


def d3pm(num_timesteps: int = 3) -> D3PM:
    """A D3PM on two places with three classes."""
    return D3PM(Table(3, num_timesteps), uniform(3, num_timesteps=num_timesteps), (2,), 3)


def pixels(count: int = 3) -> Tensor:
    """Data for :func:`tanh_ddpm`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, (count, 2), generator=generator) / 2 - 1


def points(count: int = 3) -> Tensor:
    """Data on the plane."""
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(1))


def classes(count: int = 3) -> Tensor:
    """Data for :func:`d3pm`."""
    return torch.randint(3, (count, 2), generator=torch.Generator().manual_seed(1))
