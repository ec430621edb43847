"""The gradient-variance report against a loss whose gradient's law is known, and between a VAE's losses."""

import math

import pytest
import torch
from torch import Tensor, nn

from inference.bounds.gradient_variance import gradient_variance
from inference.training.importance_objective import ImportanceWeightedLoss
from inference.training.objectives import ElboLoss
from ppl_models import VAE
from ppl_models.likelihoods import Normal


class KnownNoise(nn.Module):
    """Gradient of the batch mean: 2 + s e_i / sqrt(B) over ``encoder`` (3 parameters), exactly -1 over ``decoder``."""

    def __init__(self, pair: nn.ModuleDict, scale: float) -> None:
        super().__init__()
        self.pair = pair
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        noisy = (2.0 + self.scale * torch.randn(len(x), 3)) @ self.pair["encoder"].weight[0]
        return noisy - self.pair["decoder"].weight.sum()


def parts() -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": nn.Linear(3, 1, bias=False), "decoder": nn.Linear(2, 1, bias=False)})


def test_variance_and_signal_of_a_known_gradient():
    pair, x, pairs = parts(), torch.zeros(4), 2000
    report = gradient_variance({"once": KnownNoise(pair, 1.0), "twice": KnownNoise(pair, 2.0)}, x, num_pairs=pairs)
    assert report.blocks == ("encoder", "decoder")
    for name, scale in (("once", 1.0), ("twice", 2.0)):
        found = report[name]["encoder"]
        exact = 3 * scale**2 / 4  # three parameters, four data
        assert abs(found.variance - exact) < 5.5 * found.variance_std_error
        assert math.isclose(found.variance_std_error, exact * math.sqrt(2 / 3 / pairs), rel_tol=0.2)
        assert abs(found.signal - 12.0) < 5.5 * found.signal_std_error
        quiet = report[name]["decoder"]
        assert (quiet.variance, quiet.signal, quiet.snr) == (0.0, 2.0, math.inf)
        assert quiet.num_parameters == 2
    once, twice = report["once"]["encoder"], report["twice"]["encoder"]
    assert twice.variance - once.variance > 10 * twice.variance_std_error, "the twin: another scale is seen"
    assert math.isclose(once.snr, math.sqrt(12 / (3 / 4)), rel_tol=0.1)


def test_a_vaes_losses_side_by_side():
    vae = VAE.preset((6,), Normal(scale=0.5), latent_dim=2, hidden=(8,))
    x = vae.model(size=8).detach()
    losses = {
        "closed form": ElboLoss(vae),
        "drawn": ElboLoss(vae, closed_form=False),
        "iwae": ImportanceWeightedLoss(vae, 10),
        "dreg": ImportanceWeightedLoss(vae, 10, "doubly_reparameterized"),
    }
    report = gradient_variance(losses, x, num_pairs=10)
    assert list(report) == list(losses)
    assert len(report) == 4
    lines = report.table().splitlines()
    assert lines[0] == "Gradient of the batch mean, nats^2; 10 pairs of draws"
    assert [line.split()[0] for line in lines[3:]] == ["encoder"] * 4 + ["decoder"] * 4
    assert all(p.grad is None for p in vae.parameters())


def test_bad_input_is_named():
    x, loss = torch.zeros(4), KnownNoise(parts(), 1.0)
    with pytest.raises(ValueError, match="expected at least one loss"):
        gradient_variance({}, x)
    with pytest.raises(ValueError, match="expected num_pairs >= 2, got 1"):
        gradient_variance({"a": loss}, x, num_pairs=1)
    with pytest.raises(ValueError, match="others in 'b' than in 'a'"):
        gradient_variance({"a": loss, "b": KnownNoise(parts(), 1.0)}, x)
    with pytest.raises(ValueError, match="trainable parameters, got none in 'frozen'"):
        gradient_variance({"frozen": loss.requires_grad_(False)}, x)
    report = gradient_variance({"a": KnownNoise(parts(), 1.0)}, x, num_pairs=2)
    with pytest.raises(KeyError, match="expected a loss among a, got 'b'"):
        report["b"]
