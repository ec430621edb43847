"""The parts of the denoisers against formulas written out: sinusoids, modulation, attention, positions."""

import numpy as np
import pytest
import torch

from ppl_models.networks import ResidualMLP, TimeEmbedding, TransformerDenoiser, UNet
from ppl_models.networks.time_embedding import sinusoids
from ppl_models.networks.unet import _Attention, _norm


def test_sinusoids_are_those_of_the_formula():
    t = np.array([1, 17, 1000, 4000])
    frequencies = 10_000.0 ** (-np.arange(8) / 8)
    exact = np.concatenate([np.cos(t[:, None] * frequencies), np.sin(t[:, None] * frequencies)], -1)
    assert np.allclose(sinusoids(torch.tensor(t), 8).numpy(), exact, atol=1e-11)
    single = (torch.tensor(t)[:, None].float() * torch.tensor(frequencies).float()).cos()
    assert not np.allclose(single.numpy(), exact[:, :8], atol=1e-5)  # control: float32 angles


def test_all_steps_differ():
    e = sinusoids(torch.arange(1, 4001), 32)
    distances = torch.cdist(e, e) + 10 * torch.eye(4000)
    assert distances.min() > 0.5


def test_time_embedding_takes_its_weights_dtype_and_any_shape():
    embedding = TimeEmbedding(6).float()
    assert embedding(torch.ones(2, 3, dtype=torch.long)).dtype == torch.float32
    assert TimeEmbedding(**embedding.config()).width == 6
    with pytest.raises(ValueError, match="width and num_frequencies >= 1, got 0 and 32"):
        TimeEmbedding(0)


def test_residual_mlp_is_its_formula():
    network = ResidualMLP((3,), hidden=4, blocks=1)
    for p in network.parameters():
        p.data = torch.randn_like(p)
    x, t = torch.randn(5, 3), torch.arange(1, 6)

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    def silu(h):
        return h / (1 + (-h).exp())

    p = dict(network.named_parameters())
    linear = lambda name, h: h @ p[f"{name}.weight"].T + p[f"{name}.bias"]  # noqa: E731
    e = linear("time.body.2", silu(linear("time.body.0", sinusoids(t, 32))))
    a, b = linear("blocks.0.modulation.1", silu(e)).split(4, -1)
    h = linear("first", x)
    inner = linear("blocks.0.first.1", norm(h) * p["blocks.0.first.0.weight"] + p["blocks.0.first.0.bias"])
    h = h + linear("blocks.0.second.1", silu((1 + a) * norm(inner) + b))
    out = linear("last.2", silu(norm(h) * p["last.0.weight"] + p["last.0.bias"]))
    assert torch.allclose(network(x, t), out, rtol=1e-10)


def test_attention_is_softmax_over_pixels():
    attention, h = _Attention(8), torch.randn(2, 8, 3, 2)
    norm, linear = attention.qkv
    q, k, v = linear(norm(h)).reshape(2, 3, 8, 6)[:, 0], *linear(norm(h)).reshape(2, 3, 8, 6).unbind(1)[1:]
    weights = torch.einsum("ncp,ncq->npq", q, k).div(8**0.5).softmax(-1)
    mixed = torch.einsum("npq,ncq->ncp", weights, v).reshape(2, 8, 3, 2)
    assert torch.allclose(attention(h), h + attention.last(mixed))


@pytest.mark.parametrize("channels", [4, 8, 12, 16, 32, 64, 96, 256])
def test_groups_hold_at_least_four_channels(channels):
    groups = _norm(channels).num_groups
    assert channels % groups == 0
    assert channels // groups >= 4
    assert groups <= 8


def test_unet_reaches_across_the_image_and_back_to_its_size():
    network = UNet((28, 28), channels=(8, 8, 8), blocks=1)
    network.last[2].weight.data.normal_()
    x = torch.randn(1, 28, 28)
    shifted = x.clone()
    shifted[0, 0, 0] += 1
    change = (network(x, torch.tensor(5)) - network(shifted, torch.tensor(5)))[0].abs()
    assert change.shape == (28, 28)
    assert change[0, 0] > change[14, 14] > 0  # strongest where the pixel is, felt through the lower resolutions


def test_transformer_sees_both_sides_and_knows_places():
    network = TransformerDenoiser((6,), num_classes=4, width=8, layers=1, heads=2, neighbours=None)
    network.last[1].weight.data.normal_()
    x, t = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor(1)
    out = network(x, t)
    for changed, seen in ((0, 5), (5, 0)):
        y = x.clone()
        y[changed] = (y[changed] + 1) % 4
        assert not torch.allclose(network(y, t)[seen], out[seen])
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    assert not torch.allclose(network(x[order], t), out[order])
    network.place.data.zero_()  # without places it is equivariant
    assert torch.allclose(network(x[order], t), network(x, t)[order])


def test_convolution_of_the_transformer_sees_neighbours_in_order_and_no_further():
    network = TransformerDenoiser((9,), num_classes=4, width=8, layers=1, heads=2, neighbours=5)
    network.last[1].weight.data.normal_()
    network.layers = torch.nn.ModuleList()
    network.place.data.zero_()
    x, t = torch.tensor([0, 1, 2, 3, 0, 1, 3, 2, 0]), torch.tensor(1)
    y = x.clone()
    y[4] = 2
    changed = (network(x, t) != network(y, t)).any(-1)
    assert changed.tolist() == [False, False, True, True, True, True, True, False, False]
    assert not torch.allclose(network(x.flip(0), t), network(x, t).flip(0))  # twin: what is left is not what is right


def test_transformer_layers_start_different():
    first, second = TransformerDenoiser((6,), 4, width=8, layers=2, heads=2).layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
