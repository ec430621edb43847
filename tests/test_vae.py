"""The VAE against the linear-Gaussian oracle and the notes' displayed terms; its constructor refuses what cannot work."""

import math

import pytest
import torch
from torch import nn

from inference import decompose_elbo
from ppl_models import VAE, LinearGaussian
from ppl_models.likelihoods import Bernoulli, Categorical, Normal
from ppl_models.networks import Decoder, GaussianEncoder


class PosteriorEncoder(nn.Module):
    """The exact posterior of a linear-Gaussian model with orthogonal columns, as an encoder."""

    def __init__(self, oracle: LinearGaussian) -> None:
        super().__init__()
        self.oracle = oracle

    def forward(self, x):
        posterior = self.oracle.posterior(x)
        return posterior.loc, posterior.variance.sqrt()


def _by_hand(oracle: LinearGaussian) -> VAE:
    decoder = nn.Linear(2, 4)
    decoder.weight.data, decoder.bias.data = oracle.weight.data.clone(), oracle.bias.data.clone()
    return VAE(PosteriorEncoder(oracle), decoder, 2, Normal(scale=float(oracle.noise_scale.detach())))


def test_a_linear_vae_built_by_hand_gives_the_exact_evidence():
    oracle = LinearGaussian.random(4, 2, orthogonal=True)
    vae = _by_hand(oracle)
    x = oracle.model(size=6).detach()
    d = decompose_elbo(vae.model, vae.guide, x, num_particles=40)
    assert torch.allclose(d.monte_carlo, oracle.log_evidence(x), rtol=1e-10)
    assert (d.monte_carlo_std_error < 1e-10).all()


def test_with_a_wrong_noise_scale_it_does_not():
    oracle = LinearGaussian.random(4, 2, orthogonal=True)
    vae = _by_hand(oracle)
    vae.likelihood = Normal(scale=0.8 * float(oracle.noise_scale.detach()))
    x = oracle.model(size=6).detach()
    d = decompose_elbo(vae.model, vae.guide, x, num_particles=40)
    assert (d.monte_carlo_std_error > 1e-3).all()


def test_terms_are_those_of_the_notes():
    """004, "Gaussian VAE": KL in closed form, and -|x - mu|^2 / (2 s^2) - D/2 log(2 pi s^2) averaged over draws."""
    vae = VAE.preset((3,), Normal(scale=0.5), latent_dim=2, hidden=(6,))
    x = torch.randn(4, 3)
    d = decompose_elbo(vae.model, vae.guide, x, num_particles=20_000)
    loc, scale = (t.detach() for t in vae.encoder(x))
    kl = 0.5 * (loc.square() + scale.square() - 1 - scale.square().log()).sum(-1)
    assert torch.allclose(-d["z"].analytic, kl, rtol=1e-10)
    assert (d["z"].analytic_std_error < 1e-12).all()
    z = loc + scale * torch.randn(20_000, 4, 2)
    squares = (x - vae.decoder(z).detach()).square().sum(-1)
    reconstruction = -squares / (2 * 0.25) - 1.5 * math.log(2 * math.pi * 0.25)
    error = (reconstruction.var(0) / 20_000 + d["x"].std_error.square()).sqrt()
    assert ((reconstruction.mean(0) - d["x"].monte_carlo).abs() < 6.5 * error).all()


def test_construction_leaves_modes_and_the_random_stream_alone():
    encoder = nn.Sequential(nn.Dropout(0.5), GaussianEncoder((3,), 2, (4,)))
    decoder = nn.Sequential(nn.Dropout(0.5), Decoder(2, (3,), (4,)))
    decoder[0].eval()
    state = torch.get_rng_state()
    VAE(encoder, decoder, 2, Normal())
    assert torch.equal(state, torch.get_rng_state())
    assert encoder[0].training
    assert not decoder[0].training


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


ONE = torch.ones(1, 2)


@pytest.mark.parametrize(
    ("encoder", "error", "match"),
    [
        (Returns(ONE), TypeError, r"pair \(loc, scale\), got Tensor"),
        (Returns((ONE, ONE, ONE)), TypeError, "pair"),
        (Returns((torch.ones(1, 3), ONE)), ValueError, r"loc to have shape .*\[1, 2\].*got \[1, 3\]"),
        (Returns((ONE, torch.ones(2))), ValueError, "scale to have shape"),
        (Returns((ONE, -ONE)), ValueError, "scale to be > 0"),
    ],
)
def test_bad_encoders_are_refused_at_construction(encoder, error, match):
    with pytest.raises(error, match=match):
        VAE(encoder, Decoder(2, (3,), (4,)), 2, Normal())


def test_bad_decoders_and_widths_are_refused_at_construction():
    encoder = GaussianEncoder((3,), 2, (4,))
    with pytest.raises(ValueError, match="latent_dim >= 1"):
        VAE(encoder, Decoder(2, (3,), (4,)), 0, Normal())
    with pytest.raises(TypeError, match="scale"):
        VAE(encoder, Decoder(2, (3,), (4,)), 2, Normal(scale=None))
    with pytest.raises(ValueError, match="4"):
        VAE(encoder, Decoder(2, (3, 5), (4,)), 2, Categorical(num_classes=4))


def test_wrong_input_widths_are_refused_at_construction():
    with pytest.raises(ValueError, match=r"encoder to take one row of shape \[1, 3\]"):
        VAE(GaussianEncoder((5,), 2, (4,)), Decoder(2, (3,), (4,)), 2, Normal())
    with pytest.raises(ValueError, match=r"decoder to take one row of shape \[1, 2\]"):
        VAE(GaussianEncoder((3,), 2, (4,)), Decoder(4, (3,), (4,)), 2, Normal())


def test_data_outside_the_likelihood_are_refused():
    vae = VAE.preset((3,), Bernoulli(), latent_dim=2, hidden=(4,))
    with pytest.raises(ValueError, match="train"):
        vae.check_data(torch.full((2, 3), 0.5), "train")
