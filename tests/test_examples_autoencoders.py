"""The examples of the autoencoder family, at tiny size, and what `why_it_blurs` claims, against closed forms.

For x in {-1, +1} with equal weight and q(z | x) = N(z; m x, s^2), the conditional mean is tanh(m z / s^2).
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pyro
import pytest
import torch
from torch import nn

from inference import ElboLoss
from ppl_models import VAE
from ppl_models.likelihoods import Normal
from ppl_models.networks import Decoder

FOLDER = Path(__file__).parents[1] / "examples"
SLOPE, SCALE = 1.3, 0.9
POINTS = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_autoencoders(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    rows = _load("autoencoders").main(epochs=1, hidden=(8,), shown=3, out=tmp_path / "picture.png")
    assert rows["k-sparse"]["units not 0"] == 8
    assert (tmp_path / "picture.png").is_file()
    out = capsys.readouterr().out
    assert "notes 004" in out
    assert all(site in out for site in ("l1", "activity", "contraction"))


def test_why_it_blurs(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    numbers = _load("why_it_blurs").main(num_data=60, epochs=1, out=tmp_path / "picture.png")
    for scale in ("0.3", "0.6", "1.5"):
        best = numbers[f"E[x | z], exact {scale}"]
        assert best < numbers[f"nearest image {scale}"]
        assert best < numbers[f"trained decoder {scale}"]
    assert (tmp_path / "picture.png").is_file()
    assert "E_q[x | z]" in capsys.readouterr().out


def test_the_conditional_mean_is_tanh_for_two_points():
    z = torch.linspace(-3, 3, 13)[:, None]
    mean = _load("why_it_blurs").conditional_mean(z, SLOPE * POINTS, SCALE, POINTS)
    assert torch.allclose(mean, torch.tanh(SLOPE * z / SCALE**2), rtol=1e-10, atol=1e-12)


def test_the_notes_prior_in_the_denominator_gives_no_mean():
    """Printed: q(x | z) = q(z | x) p_data(x) / p(z). With the prior N(0, 1) for q(z) the weights do not sum to one."""
    z = torch.linspace(-3, 3, 13)[:, None]
    q = torch.distributions.Normal(SLOPE * POINTS.T, SCALE).log_prob(z).exp() / 2  # q(z | x) p_data(x), [13, 2]
    printed = q / torch.distributions.Normal(0.0, 1.0).log_prob(z).exp()
    assert float((printed.sum(1) - 1).abs().max()) > 0.5
    correct = q / q.sum(1, keepdim=True)
    assert torch.allclose(correct @ POINTS, torch.tanh(SLOPE * z / SCALE**2), rtol=1e-10)


class TwoPointEncoder(nn.Module):
    """q(z | x) = N(z; m x, s^2), with nothing to train."""

    def forward(self, x):
        return SLOPE * x, torch.full_like(x, SCALE)


class Fixed(nn.Module):
    """A decoder that is a given function of z."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


def _best(z):
    return torch.tanh(SLOPE * z / SCALE**2)


def _vae(decoder):
    return VAE(TwoPointEncoder(), decoder, 1, Normal(scale=1.0))


def _excess(decoder, points=4001):
    """E_q(z) (mu(z) - tanh)^2 on a grid: q(z) is a mixture of two Normals."""
    z = torch.linspace(-7, 7, points)[:, None]
    density = torch.distributions.Normal(SLOPE * POINTS.T, SCALE).log_prob(z).exp().mean(1)
    with torch.no_grad():
        return float(torch.trapezoid(density * (decoder(z) - _best(z)).square()[:, 0], z[:, 0]))


@pytest.mark.parametrize("shift", [0.0, 0.3], ids=["tanh", "tanh + 0.3"])
def test_at_the_conditional_mean_the_bound_is_stationary_and_elsewhere_it_is_not(shift):
    """Derivative of E[reconstruction] along each direction h(z): zero at tanh. False-failure rate 6 x 8e-11."""
    directions = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(directions.weight)
    vae = _vae(Fixed(lambda z: _best(z) + shift + directions(torch.cat([z**0, z, z.square()], -1))))
    loss, x = ElboLoss(vae), POINTS.repeat(20, 1)
    gradients = []
    for _ in range(400):
        gradients.append(torch.autograd.grad(loss(x).mean(), directions.weight)[0][0])
    gradients = torch.stack(gradients)
    z_scores = gradients.mean(0) / (gradients.std(0) / len(gradients) ** 0.5)
    assert bool((z_scores.abs() < 6.5).all()) == (shift == 0.0)


def test_a_trained_decoder_comes_out_at_the_conditional_mean_and_a_sharp_one_pays_its_excess():
    decoder = Decoder(1, (1,), (16,))
    vae = _vae(decoder)
    loss, x = ElboLoss(vae), POINTS.repeat(128, 1)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 500)
    with pyro.validation_enabled(False):
        for _ in range(500):
            optimiser.zero_grad()
            loss(x).mean().backward()
            optimiser.step()
            schedule.step()
    assert _excess(decoder) < 2e-3
    sharp = torch.sign
    assert _excess(sharp) > 20 * 2e-3
    # E|x - mu(z)|^2 = E|x - mu*(z)|^2 + E|mu(z) - mu*(z)|^2, the losses being half of the squares; both on the same draws
    with torch.no_grad():
        draws = POINTS.repeat(50_000, 1)
        z = SLOPE * draws + SCALE * torch.randn_like(draws)
        for mean in (decoder, sharp):
            difference = ((draws - mean(z)).square() - (draws - _best(z)).square())[:, 0]
            error = float(difference.std()) / len(difference) ** 0.5
            assert abs(float(difference.mean()) - _excess(mean)) < 6.5 * error
        assert abs(float(difference.mean())) > 6.5 * error  # twin: the sharp decoder's excess is seen
