"""The registry of pairs under test: adding a pair here is one line, and brings the whole battery of test_pairs.py.

A case builds a pair and data for it. ``exact`` cases know their evidence, and their guide is the posterior, so that
log p(x, z) - log q(z | x) is the same number for every draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppl_models import VAE, LinearGaussian, ModelGuidePair
from ppl_models.likelihoods import Bernoulli, Categorical, DiscretizedNormal, Normal
from ppl_models.networks import Decoder, GaussianEncoder


@dataclass(frozen=True)
class Case:
    """One pair under test: how to build it, data for it, and what is known of it."""

    build: Callable[[], ModelGuidePair]
    data: Callable[[ModelGuidePair], Tensor]
    exact: bool = False  # the guide is the posterior and pair.log_evidence(x) is exact
    rebuilds: bool = True  # made of the library's own parts, so that a description rebuilds it


BATCH = 5


def _generated(pair: ModelGuidePair) -> Tensor:
    with torch.no_grad():
        return pair.model(size=BATCH).detach()


def _linear_vae() -> VAE:
    """A VAE built by hand, one Linear layer each way."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Linear(3, 2)
            self.log_scale = nn.Parameter(torch.tensor([-0.3, 0.1]))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            loc = self.loc(x)
            return loc, self.log_scale.exp().expand_as(loc)

    return VAE(Encoder(), nn.Linear(2, 3), 2, Normal(scale=0.5))


def _preset(
    likelihood: Callable[[], nn.Module], shape: tuple[int, ...] = (4, 3), **options: object
) -> Callable[[], VAE]:
    return lambda: VAE.preset(shape, likelihood(), latent_dim=2, hidden=(8,), **options)


CASES: dict[str, Case] = {
    "vae-bernoulli": Case(_preset(Bernoulli), _generated),
    "vae-normal": Case(_preset(lambda: Normal(scale=0.3)), _generated),
    "vae-normal-learned-scale": Case(_preset(lambda: Normal(scale="learned"), (6,)), _generated),
    "vae-normal-decoder-scale": Case(_preset(lambda: Normal(scale=None), (2, 2, 2)), _generated),
    "vae-categorical": Case(_preset(lambda: Categorical(num_classes=4)), _generated),
    "vae-discretized-normal": Case(_preset(lambda: DiscretizedNormal(levels=17)), _generated),
    "vae-by-hand": Case(_linear_vae, _generated, rebuilds=False),
    "vae-scalar-data": Case(
        lambda: VAE(GaussianEncoder((1,), 2, (4,)), Decoder(2, (1,), (4,)), 2, Normal()), _generated
    ),
    "linear-exact": Case(lambda: LinearGaussian.random(4, 2), _generated, exact=True),
    "linear-orthogonal": Case(lambda: LinearGaussian.random(4, 2, orthogonal=True), _generated, exact=True),
    "linear-mean-field": Case(lambda: LinearGaussian.random(4, 2, guide="mean_field"), _generated),
}
