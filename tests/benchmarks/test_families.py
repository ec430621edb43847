"""The losses that the benchmark writes by hand are the library's: the same mean value and gradient, on small pairs.

Each compares the mean over draws of the loss and of its gradient, summed by parameter, in at most 60 z-scores a family; a
bound of 6.5 standard errors fails falsely with a probability below 1e-8.
"""

import copy

import pytest
import torch

from inference import DiffusionLoss, ElboLoss
from inference.training.relaxed_objective import StraightThroughLoss
from ppl_models import D3PM, DDPM, HVAE, VAE, VQVAE, CategoricalVAE
from ppl_models.likelihoods import Bernoulli, Categorical, Normal
from tests.benchmarks.families import FAMILIES

Z_MAX = 6.5
DRAWS = 400
SMALL = {
    "vae": lambda: VAE.preset((4, 3), Bernoulli(), latent_dim=2, hidden=(5,)),
    "hvae": lambda: HVAE.preset((4, 3), Bernoulli(), latent_dims=(3, 2), hidden=(5,)),
    "ddpm": lambda: DDPM.preset((4,), Normal(), num_timesteps=20, hidden=5, blocks=1, variance="beta"),
    "categorical-vae": lambda: CategoricalVAE.preset((4, 3), Bernoulli(), num_latents=3, num_classes=4, hidden=(5,)),
    "vq-vae": lambda: VQVAE.preset((4, 3), Bernoulli(), num_latents=3, num_codes=5, code_dim=2, hidden=(5,)),
    "d3pm": lambda: D3PM.preset((4,), Categorical(3), num_timesteps=5, hidden=5, blocks=1),
}


def small_pair(family):
    """With weights away from the start, where some layers are zero."""
    pair = SMALL[family]()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return pair


def draws(loss, pair, x):
    """Rows of (mean loss, gradient of it summed by parameter) over draws; buffers are put back after each."""
    buffers, rows = copy.deepcopy(list(pair.buffers())), []
    for _ in range(DRAWS):
        value = loss(x).mean()
        gradients = torch.autograd.grad(value, list(pair.parameters()), allow_unused=True)
        rows.append(torch.stack([value.detach(), *(x.new_zeros(()) if g is None else g.sum() for g in gradients)]))
        for buffer, old in zip(pair.buffers(), buffers, strict=True):
            buffer.copy_(old)
    return torch.stack(rows)


def largest_z(a, b):
    """Of the differences of means; columns that are constant in both must agree to rounding."""
    error = ((a.var(0) + b.var(0)) / DRAWS).sqrt() + 1e-9 * (1 + b.mean(0).abs())
    return float(((a.mean(0) - b.mean(0)).abs() / error).max())


@pytest.mark.parametrize("family", list(SMALL))
def test_a_loss_by_hand_is_ours_and_another_pair_s_is_not(family):
    pair, row = small_pair(family), FAMILIES[family]
    if family == "ddpm":
        x = torch.rand(6, 4) * 2 - 1
    elif family == "d3pm":
        x = torch.randint(3, (20, 4))
    else:
        x = (torch.rand(6, 4, 3) < 0.5).double()
    ours = row.objective(pair)
    kinds = {"ddpm": DiffusionLoss, "d3pm": DiffusionLoss, "categorical-vae": StraightThroughLoss}
    assert type(ours) is kinds.get(family, ElboLoss)
    found = draws(lambda data: row.by_hand(pair, data), pair, x)
    assert found.shape[1] <= 60
    expected = draws(ours, pair, x)
    assert largest_z(found, expected) < Z_MAX
    assert largest_z(1.3 * found, expected) > Z_MAX, "the twin: a factor that is wrong"
