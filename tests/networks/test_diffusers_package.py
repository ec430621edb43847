"""The chain against Hugging Face's diffusers, where it is installed: tables, noising, a reverse step, and its own U-Net."""

import importlib
import importlib.util
import warnings

import pytest
import torch

from ppl_models import DDPM
from ppl_models.likelihoods import Normal
from ppl_models.networks.diffusers import DiffusersUNet
from ppl_models.processes import NoiseSchedule

pytestmark = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
FLOAT32 = (
    2e-5  # their tables are products of up to 1000 factors in float32: 1000 roundings of 6e-8, halved by their signs
)
SHAPE = (8, 8)
SIZES = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
KINDS = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "block_out_channels": [8, 16]}


def package():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, while importing
        found = importlib.import_module("diffusers")
        found.DDPMScheduler, found.UNet2DModel  # noqa: B018 - loaded at first use
    return found


@pytest.fixture(scope="module")
def scheduler():
    return package().DDPMScheduler(num_train_timesteps=1000, variance_type="fixed_small", clip_sample=False)


class Double(torch.nn.Module):
    """A network simple enough to be known."""

    def forward(self, x_t, t):
        return 0.7 * x_t + 0.1


@pytest.fixture
def ddpm():
    return DDPM(Double(), NoiseSchedule.linear(1000), SHAPE, variance="posterior", likelihood=Normal())


def test_tables_are_theirs(scheduler):
    ours = NoiseSchedule.linear(1000)
    assert torch.allclose(scheduler.alphas_cumprod.double(), ours.alpha_bar, rtol=1000 * 6e-8, atol=0)
    cosine = NoiseSchedule.cosine(1000)
    assert not torch.allclose(scheduler.alphas_cumprod.double(), cosine.alpha_bar, rtol=1e-2, atol=0)  # twin


@pytest.mark.parametrize("t", [1, 2, 500, 1000])
def test_noising_is_theirs(scheduler, ddpm, t):
    torch.manual_seed(t)
    x_0, eps = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    law = ddpm.process.marginal(x_0, torch.full((3,), t)).base_dist
    theirs = scheduler.add_noise(x_0, eps, torch.full((3,), t - 1))
    assert torch.allclose(theirs, law.mean + law.stddev * eps, rtol=0, atol=FLOAT32)
    later = scheduler.add_noise(x_0, eps, torch.full((3,), min(t + 8, 999)))
    assert t == 1000 or not torch.allclose(later, law.mean + law.stddev * eps, rtol=0, atol=1e-3)  # twin


@pytest.mark.parametrize("t", [2, 3, 500, 1000])
def test_a_reverse_step_is_theirs(ddpm, t):
    """With their tables in float64, for 1 - alpha-bar loses four digits in theirs."""
    scheduler = package().DDPMScheduler(num_train_timesteps=1000, variance_type="fixed_small", clip_sample=False)
    scheduler.alphas = 1 - ddpm.process.schedule.beta
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    torch.manual_seed(t)
    x_t = torch.randn(3, *SHAPE)
    output, steps = ddpm.network(x_t, torch.tensor(t)), torch.full((3,), t)
    law = ddpm.reverse_law(output, x_t, steps).base_dist
    stepped = scheduler.step(output, t - 1, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5), dtype=output.dtype)
    tolerance = 1e-14 * 1e4  # rounding, over the smallest 1 - alpha-bar
    assert torch.allclose(stepped, law.mean + law.stddev * noise, rtol=0, atol=tolerance)
    assert not torch.allclose(stepped, law.mean, rtol=0, atol=1e-3)  # twin: without its noise
    predicted = scheduler.step(output, t - 1, x_t).pred_original_sample
    assert torch.allclose(predicted, ddpm.predict_x_0(output, x_t, steps), rtol=1e-9, atol=tolerance)


def test_their_u_net_takes_our_steps():
    torch.set_default_dtype(torch.float32)
    package()
    network = DiffusersUNet.from_config(SHAPE, {**SIZES, **KINDS}).eval()
    x, t = torch.randn(2, 3, *SHAPE), torch.tensor([1, 500, 1000])
    with torch.no_grad():
        found = network(x, t)
        expected = network.unet(x.reshape(6, 1, *SHAPE), (t - 1).repeat(2)).sample.reshape(2, 3, *SHAPE)
        other = network.unet(x.reshape(6, 1, *SHAPE), t.repeat(2)).sample.reshape(2, 3, *SHAPE)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, other, rtol=0, atol=1e-5)  # twin: their steps count from 0
    pair = DDPM(network, NoiseSchedule.linear(1000), SHAPE, likelihood=Normal())
    assert pair.reverse(x[0], torch.tensor([2, 3, 4])).batch_shape == (3,)
