"""Small pairs and data for tests of training; importable, so that other processes find their classes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ppl_models import VAE, LinearGaussian, ModelGuidePair
from ppl_models.likelihoods import Bernoulli, Normal


class LinearEncoder(nn.Module):
    """x -> (A x + a, exp(l)): the mean-field posterior of a linear-Gaussian model has this form."""

    def __init__(self, data_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.loc = nn.Linear(data_dim, latent_dim)
        self.log_scale = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.loc(x)
        return loc, self.log_scale.exp().expand_as(loc)


def linear_vae(data_dim: int = 5, latent_dim: int = 2, seed: int = 0, likelihood: Any = None) -> VAE:
    """The linear VAE, whose optimum is probabilistic PCA."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        likelihood = Normal(scale="learned", init_scale=1.0) if likelihood is None else likelihood
        return VAE(LinearEncoder(data_dim, latent_dim), nn.Linear(latent_dim, data_dim), latent_dim, likelihood)


class NoisyEncoder(nn.Module):
    """A network with dropout and batch normalisation: noise of its own, and running statistics."""

    def __init__(self, data_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(data_dim, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(6, 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.head(self.body(x)).chunk(2, -1)
        return loc, log_scale.exp()


def noisy_vae(data_dim: int = 4, latent_dim: int = 2, seed: int = 0) -> VAE:
    """A Bernoulli VAE with dropout and batch normalisation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VAE(NoisyEncoder(data_dim, latent_dim), nn.Linear(latent_dim, data_dim), latent_dim, Bernoulli())


class PointMass(ModelGuidePair):
    """q(z | x) = delta(A x): nothing is drawn, so that processes with other noise still agree to rounding."""

    def __init__(self, data_dim: int = 3, latent_dim: int = 2) -> None:
        super().__init__((data_dim,), latent_sites=("z",))
        self.encoder, self.decoder = nn.Linear(data_dim, latent_dim), nn.Linear(latent_dim, data_dim)

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        self.announce("decoder")
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", dist.Normal(self.decoder.weight.new_zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        self.announce("encoder")
        with pyro.plate("data", self.batch_size(x)):
            return pyro.sample("z", dist.Delta(self.encoder(x), event_dim=1))


class Scalar(ModelGuidePair):
    """z ~ N(0, 1), x ~ N(w z, 1) and a guide N(a x, s), all scalars; subclasses break one thing each."""

    def __init__(self) -> None:
        super().__init__((), latent_sites=("z",))
        self.w, self.a = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.3))
        self.log_s = nn.Parameter(torch.tensor(-0.2))

    def loc(self, x: Tensor) -> Tensor:
        return self.a * x

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        self.announce("w")
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", dist.Normal(self.w.new_zeros(()), 1.0))
            return pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        self.announce("a", "log_s")
        with pyro.plate("data", self.batch_size(x)):
            return pyro.sample("z", dist.Normal(self.loc(x), self.log_s.exp()))


class Replicates(ModelGuidePair):
    """Two plates: ``repeats`` measurements a datum, in an inner plate or as an event."""

    def __init__(self, plated: bool) -> None:
        super().__init__((3,), latent_sites=("z",))
        self.plated = plated
        self.a = nn.Parameter(torch.tensor(0.4))

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        with pyro.plate("data", self.batch_size(x, size), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            if not self.plated:
                return pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 3), 1.0).to_event(1), obs=x)
            with pyro.plate("repeats", 3, dim=-2):
                return pyro.sample("x", dist.Normal(z, 1.0), obs=None if x is None else x.transpose(-1, -2))

    def guide(self, x: Tensor) -> Tensor:
        with pyro.plate("data", self.batch_size(x), dim=-1):
            return pyro.sample("z", dist.Normal(self.a * x.sum(-1), 0.5))


class NanAtNine(Scalar):
    """The network returns NaN where x is above 9, once ``a`` has moved from its start."""

    def loc(self, x: Tensor) -> Tensor:
        moved = self.a.detach() != 0.3
        return self.a * torch.where((x > 9) & moved, x.new_tensor(float("nan")), x)


class NanAtOnce(Scalar):
    """The network returns NaN where x is above 9."""

    def loc(self, x: Tensor) -> Tensor:
        return self.a * torch.where(x > 9, x.new_tensor(float("nan")), x)


class RootAtZero(Scalar):
    """sqrt of |a x|: at x = 0 the value is finite and the gradient is not."""

    def loc(self, x: Tensor) -> Tensor:
        return (self.a * x).abs().sqrt()


class SlowItems(Dataset[Tensor]):
    """Data of which one takes a minute to read; a file appears when that begins."""

    def __init__(self, slow: int, marker: Path) -> None:
        self.slow, self.marker = slow, marker

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> Tensor:
        if index == self.slow:
            self.marker.touch()
            time.sleep(60)
        return torch.tensor(index / 200)


def correlated_pair() -> LinearGaussian:
    """Columns far from orthogonal, so that the mean-field guide is far from the posterior."""
    weight = torch.tensor([[1.0, 0.9], [0.5, 1.0], [-0.3, 0.6]])
    return LinearGaussian(weight, torch.tensor([0.1, -0.2, 0.3]), noise_scale=0.5, guide="mean_field")


def grey_points(num: int = 37, dims: int = 4) -> Tensor:
    """Grey values in [0, 1], the same each time."""
    return torch.rand(num, dims, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def points(num: int = 37, dims: int = 5) -> Tensor:
    """Gaussian points with correlated coordinates, the same each time."""
    generator = torch.Generator().manual_seed(8)
    mix = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    return torch.randn(num, dims, generator=generator, dtype=torch.float64) @ mix
