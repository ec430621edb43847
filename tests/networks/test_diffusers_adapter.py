"""The adapter speaks the convention of `diffusers.UNet2DModel`, here a stand-in with the same call."""

import json
import sys
import types

import pytest
import torch
from torch import nn

from ppl_models.networks import DiffusersUNet


class Config(dict):
    """Like diffusers' FrozenDict: a dict whose keys are attributes."""

    __getattr__ = dict.__getitem__


class StubUNet(nn.Module):
    """Called like UNet2DModel: ``(sample [N, C, H, W], timestep [N])``, returns an object with ``.sample``."""

    def __init__(self, in_channels=3, out_channels=3, sample_size=None):
        super().__init__()
        self.config = Config(
            in_channels=in_channels, out_channels=out_channels, sample_size=sample_size, _class_name="UNet2DModel"
        )
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        assert sample.dim() == 4
        assert timestep.shape == sample.shape[:1]
        self.timestep = timestep
        return types.SimpleNamespace(sample=self.conv(sample) * timestep[:, None, None, None])


def test_steps_count_from_zero_there_and_dims_are_restored():
    unet = StubUNet()
    network = DiffusersUNet(unet, (3, 8, 8))
    x, t = torch.randn(2, 5, 3, 8, 8), torch.tensor([1, 2, 3, 500, 1000])
    out = network(x, t)
    assert unet.timestep.tolist() == [0, 1, 2, 499, 999] * 2
    assert out.shape == x.shape
    assert torch.allclose(out[1, 3], unet.conv(x[1, 3]) * 499)
    assert network(x[0, 0], torch.tensor(7)).shape == (3, 8, 8)


def test_tuples_of_the_settings_are_written_as_lists():
    """diffusers' own defaults are tuples, which YAML and JSON files have none of."""
    unet = StubUNet()
    unet.config = Config(in_channels=3, out_channels=3, block_out_channels=(32, (64, 64)), sizes={"a": (1,)})
    config = DiffusersUNet(unet, (3, 8, 8)).config()
    assert config["unet"]["block_out_channels"] == [32, [64, 64]]
    assert config["unet"]["sizes"] == {"a": [1]}
    assert json.loads(json.dumps(config)) == config


def test_grey_images_need_no_channel_axis():
    assert DiffusersUNet(StubUNet(1, 1), (8, 8))(torch.zeros(4, 8, 8), torch.tensor(2)).shape == (4, 8, 8)


def test_doubled_channels_are_prediction_and_variance():
    unet = StubUNet(3, 6)
    network = DiffusersUNet(unet, (3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    out = network(x, torch.tensor([2, 3, 4, 5]))
    assert network.with_variance
    assert out.shape == (4, 3, 8, 8, 2)
    raw = unet(x, torch.tensor([1, 2, 3, 4])).sample
    assert torch.equal(out[..., 0], raw[:, :3])
    assert torch.equal(out[..., 1], raw[:, 3:])


def test_it_is_rebuilt_from_its_description(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(UNet2DModel=StubUNet))
    network = DiffusersUNet(StubUNet(3, 6, sample_size=8), (3, 8, 8))
    config = json.loads(json.dumps(network.config()))
    assert config == {"data_shape": [3, 8, 8], "unet": {"in_channels": 3, "out_channels": 6, "sample_size": 8}}
    again = DiffusersUNet.from_config(**config)
    assert again.config() == network.config()


def test_a_missing_package_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"package diffusers .*pip install 'ppl-models\[diffusers\]'"):
        DiffusersUNet.from_config((3, 8, 8), {})


@pytest.mark.parametrize(("channels", "shape"), [((1, 1), (3, 8, 8)), ((3, 5), (3, 8, 8)), ((3, 3), (8, 8))])
def test_channels_that_do_not_fit_are_refused(channels, shape):
    with pytest.raises(ValueError, match=r"channels in and .* out .*got"):
        DiffusersUNet(StubUNet(*channels), shape)
