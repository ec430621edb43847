"""The registry of pairs under test: adding a pair here is one line, and brings the whole battery of test_pairs.py.

A case builds a pair and data for it. ``exact`` cases know their evidence, and their guide is the posterior, so that
log p(x, z) - log q(z | x) is the same number for every draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inference import DiffusionLoss, ElboLoss, EnumeratedLoss, ScoreFunctionLoss
from ppl_models import (
    D3PM,
    DDPM,
    HVAE,
    VAE,
    VQVAE,
    AutoEncoder,
    CategoricalVAE,
    LinearDiffusion,
    LinearGaussian,
    LinearHierarchy,
    ModelGuidePair,
    NoiseSchedule,
)
from ppl_models.corruption import SaltAndPepper
from ppl_models.likelihoods import Bernoulli, Categorical, DiscretizedNormal, NegativeBinomial, Normal, Poisson
from ppl_models.networks import Decoder, GaussianEncoder
from tests.oracles.discrete_vae import BlockDecoder, PosteriorEncoder


@dataclass(frozen=True)
class Case:
    """One pair under test: how to build it, data for it, and what is known of it."""

    build: Callable[[], ModelGuidePair]
    data: Callable[[ModelGuidePair], Tensor]
    exact: bool = False  # the guide is the posterior and pair.log_evidence(x) is exact
    rebuilds: bool = True  # made of the library's own parts, so that a description rebuilds it
    objective: Callable[[ModelGuidePair], nn.Module] = ElboLoss  # whose mean is -ELBO
    closed: bool = True  # every latent site's term has a closed form
    mean_field: bool = True  # no model parent of a latent descends from it in the guide
    reparameterised: bool = True
    point_guide: bool = False  # a Delta, under which there is no evidence to estimate
    gaussian_guide: bool = True  # `guide_distribution` is one Gaussian, which a test can make wrong


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


def _stirred(pair: ModelGuidePair) -> ModelGuidePair:
    """Weights moved off their start, where a denoiser's last layer is zero and gives the others no gradient."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return pair


def _ddpm(likelihood: Callable[[], nn.Module], **options: object) -> Callable[[], ModelGuidePair]:
    return lambda: _stirred(DDPM.preset((4, 3), likelihood(), num_timesteps=3, hidden=8, blocks=1, **options))


def _d3pm(transitions: str, **options: object) -> Callable[[], ModelGuidePair]:
    return lambda: _stirred(D3PM.preset((6,), Categorical(4), 3, transitions, hidden=8, blocks=1, **options))


def _bound_of_diffusion(pair: ModelGuidePair) -> nn.Module:
    return DiffusionLoss(pair)


_CHAIN_OF_CLASSES = {
    "objective": _bound_of_diffusion,
    "closed": False,
    "mean_field": False,
    "reparameterised": False,
}


def _ae(likelihood: Callable[[], nn.Module], **options: object) -> Callable[[], ModelGuidePair]:
    return lambda: AutoEncoder.preset((4, 3), likelihood(), latent_dim=4, hidden=(8,), **options)


def _hvae(
    likelihood: Callable[[], nn.Module], guide: str, dims: tuple[int, ...] = (3, 2)
) -> Callable[[], ModelGuidePair]:
    return lambda: HVAE.preset((4, 3), likelihood(), dims, hidden=(8,), guide=guide)


def _linear_diffusion() -> LinearDiffusion:
    schedule, loc, scale = NoiseSchedule.cosine(4), torch.tensor([0.5, -1.0]), torch.tensor([0.8, 0.3])
    return LinearDiffusion(schedule, loc, scale, guide="exact")


def _exact_categorical() -> CategoricalVAE:
    """The guide is the posterior of a decoder small enough to invert."""
    decoder = BlockDecoder(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)))
    return CategoricalVAE(PosteriorEncoder(decoder), decoder, 2, 3, Bernoulli())


def _categorical() -> CategoricalVAE:
    return CategoricalVAE.preset((4, 3), Bernoulli(), num_latents=2, num_classes=3, hidden=(8,))


def _vector_quantised() -> VQVAE:
    """In evaluation mode, where its terms are the bound's alone."""
    return VQVAE.preset((4, 3), Bernoulli(), num_latents=2, num_codes=5, code_dim=2, hidden=(8,)).eval()


def _preset(
    likelihood: Callable[[], nn.Module], shape: tuple[int, ...] = (4, 3), **options: object
) -> Callable[[], VAE]:
    return lambda: VAE.preset(shape, likelihood(), latent_dim=2, hidden=(8,), **options)


def _given(build: Callable[[], ModelGuidePair]) -> Callable[[], ModelGuidePair]:
    """A pair that is conditioned on three labels, at one for all data."""
    return lambda: _stirred(build()).given(1)


CASES: dict[str, Case] = {
    "vae-bernoulli": Case(_preset(Bernoulli), _generated),
    "vae-normal": Case(_preset(lambda: Normal(scale=0.3)), _generated),
    "vae-normal-learned-scale": Case(_preset(lambda: Normal(scale="learned"), (6,)), _generated),
    "vae-normal-decoder-scale": Case(_preset(lambda: Normal(scale=None), (2, 2, 2)), _generated),
    "vae-categorical": Case(_preset(lambda: Categorical(num_classes=4)), _generated),
    "vae-discretized-normal": Case(_preset(lambda: DiscretizedNormal(levels=17)), _generated),
    "vae-poisson": Case(_preset(Poisson), _generated),
    "vae-negative-binomial": Case(_preset(NegativeBinomial, (6,)), _generated),
    "vae-negative-binomial-decoder-size": Case(_preset(lambda: NegativeBinomial(size=None)), _generated),
    "vae-by-hand": Case(_linear_vae, _generated, rebuilds=False),
    "vae-scalar-data": Case(
        lambda: VAE(GaussianEncoder((1,), 2, (4,)), Decoder(2, (1,), (4,)), 2, Normal()), _generated
    ),
    "vae-given-labels": Case(_given(_preset(Bernoulli, num_labels=3)), _generated),
    "linear-exact": Case(lambda: LinearGaussian.random(4, 2), _generated, exact=True),
    "linear-orthogonal": Case(lambda: LinearGaussian.random(4, 2, orthogonal=True), _generated, exact=True),
    "ae-plain": Case(_ae(Normal), _generated, closed=False, point_guide=True),
    "ae-categorical": Case(_ae(lambda: Categorical(num_classes=4)), _generated, closed=False, point_guide=True),
    "ae-denoising": Case(
        _ae(lambda: Normal(scale=0.5), corruption=SaltAndPepper(0.3)), _generated, closed=False, point_guide=True
    ),
    "ae-k-sparse": Case(_ae(Bernoulli, k=2), _generated, closed=False, point_guide=True),
    "ddpm-normal": Case(_ddpm(Normal), _generated, closed=False, mean_field=False),
    "ddpm-discretized-learned": Case(
        _ddpm(lambda: DiscretizedNormal(levels=17), predict="x_0", variance="learned"),
        _generated,
        closed=False,
        mean_field=False,
    ),
    "linear-diffusion-exact": Case(
        _linear_diffusion, _generated, exact=True, closed=False, mean_field=False, gaussian_guide=False
    ),
    "d3pm-uniform": Case(_d3pm("uniform"), _generated, **_CHAIN_OF_CLASSES),
    "d3pm-absorbing": Case(_d3pm("absorbing"), _generated, **_CHAIN_OF_CLASSES),
    "d3pm-gaussian-logistic": Case(_d3pm("gaussian", output="logistic"), _generated, **_CHAIN_OF_CLASSES),
    "categorical-vae": Case(
        _categorical, _generated, objective=lambda pair: ScoreFunctionLoss(pair, 4), reparameterised=False
    ),
    "categorical-exact": Case(
        _exact_categorical,
        _generated,
        exact=True,
        rebuilds=False,
        objective=EnumeratedLoss,
        reparameterised=False,
        gaussian_guide=False,
    ),
    "vq-vae": Case(_vector_quantised, _generated, closed=False, point_guide=True),
    "hvae-bottom-up": Case(_hvae(Bernoulli, "bottom_up"), _generated, closed=False, mean_field=False),
    "hvae-top-down": Case(_hvae(Bernoulli, "top_down"), _generated),
    "hvae-three-layers": Case(
        _hvae(lambda: Normal(scale="learned"), "bottom_up", (3, 2, 2)), _generated, closed=False, mean_field=False
    ),
    "hvae-categorical-top-down": Case(_hvae(lambda: Categorical(num_classes=4), "top_down", (3, 2, 2)), _generated),
    "hvae-poisson-top-down": Case(_hvae(Poisson, "top_down"), _generated),
    "hvae-one-layer": Case(_hvae(Bernoulli, "bottom_up", (2,)), _generated),
    "linear-hierarchy-bottom-up": Case(
        lambda: LinearHierarchy.random(4, (2, 2)),
        _generated,
        exact=True,
        closed=False,
        mean_field=False,
        gaussian_guide=False,
    ),
    "linear-hierarchy-top-down": Case(
        lambda: LinearHierarchy.random(4, (2, 2), guide="top_down"), _generated, exact=True, gaussian_guide=False
    ),
    "linear-hierarchy-mean-field": Case(
        lambda: LinearHierarchy.random(4, (2, 2), exact=False), _generated, closed=False, mean_field=False
    ),
    "linear-mean-field": Case(lambda: LinearGaussian.random(4, 2, guide="mean_field"), _generated),
}
