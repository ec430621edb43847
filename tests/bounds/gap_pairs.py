"""Pairs with known gaps: Gaussian guides that are off by a known shift and stretch, two layers, and any law at one site."""

import pyro
import pyro.distributions as dist
import torch

from ppl_models import LinearGaussian, ModelGuidePair


class Amortised(LinearGaussian):
    """A linear-Gaussian pair whose guide is off by a known shift (in posterior sds) and stretch, full or diagonal."""

    def __init__(self, base: LinearGaussian, shift: float, stretch: float, full: bool = False) -> None:
        super().__init__(base.weight, base.bias, base.noise_scale, "mean_field")
        self.shift, self.stretch, self.full = shift, stretch, full

    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)):
            if self.full:
                q = self.posterior(x)
                law = dist.MultivariateNormal(q.loc + self.shift * q.stddev, scale_tril=q.scale_tril * self.stretch)
            else:
                q = self.guide_distribution(x).base_dist
                law = dist.Normal(q.loc + self.shift * q.scale, q.scale * self.stretch).to_event(1)
            return pyro.sample("z", law)


class Chain(ModelGuidePair):
    """z_2 -> z_1 -> x, unit normals; the guide goes up and is as told."""

    def __init__(self, a: float, b: float, scale: float = 0.7) -> None:
        super().__init__((1,), ("z_2", "z_1"))
        self.a, self.b, self.scale = a, b, scale

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            z_2 = pyro.sample("z_2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z_1 = pyro.sample("z_1", dist.Normal(z_2, 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z_1, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)):
            z_1 = pyro.sample("z_1", dist.Normal(self.a * x, self.scale).to_event(1))
            return pyro.sample("z_2", dist.Normal(self.b * z_1, self.scale).to_event(1))


class OneSite(ModelGuidePair):
    """p(z) and q(z | x) as told, p(x | z) = N(0, 1)."""

    def __init__(self, prior, law) -> None:
        super().__init__((1,), ("z",))
        self.prior, self.law = prior, law

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            pyro.sample("z", self.prior)
            return pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)):
            return pyro.sample("z", self.law(x))
