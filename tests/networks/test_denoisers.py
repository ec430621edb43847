"""What every denoising network must do: shapes for any leading dims, one t per datum, zero at the start, gradients."""

import copy
import json
import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_models.networks import ResidualMLP, TransformerDenoiser, UNet

NETWORKS = {
    "mlp-vector": lambda: ResidualMLP((6,), hidden=16, blocks=2),
    "mlp-scalar": lambda: ResidualMLP((), hidden=16, blocks=1),
    "mlp-image-variance": lambda: ResidualMLP((4, 3), hidden=16, blocks=2, with_variance=True),
    "mlp-classes": lambda: ResidualMLP((4, 3), hidden=16, blocks=2, num_classes=5),
    "unet-8": lambda: UNet((8, 8), channels=(8, 12), blocks=1),
    "unet-odd": lambda: UNet((9, 13), channels=(8, 8, 8, 8, 8), blocks=1, attention=True),
    "unet-colour-variance": lambda: UNet((3, 8, 10), channels=(8, 4), blocks=2, with_variance=True),
    "unet-classes": lambda: UNet((8, 8), channels=(4,), blocks=1, num_classes=3),
    "unet-colour-classes": lambda: UNet((2, 8, 8), channels=(8, 8), blocks=1, num_classes=3),
    "transformer": lambda: TransformerDenoiser((7,), num_classes=5, width=16, layers=2, heads=2),
    "transformer-image": lambda: TransformerDenoiser((3, 3), num_classes=4, width=8, layers=1, heads=2),
    "transformer-no-time": lambda: TransformerDenoiser((7,), 5, width=16, layers=2, heads=2, time_conditioned=False),
    "transformer-attention-alone": lambda: TransformerDenoiser((7,), 5, width=16, layers=1, heads=2, neighbours=None),
}


def awake(network):
    """The network with its zeroed last layer (and the rest) moved off its starting point."""
    for parameter in network.parameters():
        parameter.data += 0.3 / math.sqrt(parameter.shape[-1]) * torch.randn_like(parameter)
    return network


def noisy(network, *batch):
    if network.num_classes is None:
        return torch.randn((*batch, *network.data_shape))
    return torch.randint(network.num_classes, (*batch, *network.data_shape))


@pytest.fixture(params=NETWORKS)
def network(request):
    return awake(NETWORKS[request.param]())


def ending(network):
    return {1: (), 2: (2,)}[network.outputs] if network.num_classes is None else (network.num_classes,)


@pytest.mark.parametrize("batch", [(), (5,), (3, 5), (2, 1, 3)])
def test_leading_dims_are_batch_dims_and_t_broadcasts(network, batch):
    x = noisy(network, *batch)
    for shape in {(), batch[-1:], (1,) * len(batch), batch}:
        out = network(x, torch.randint(1, 1001, shape))
        assert out.shape == (*batch, *network.data_shape, *ending(network))


def test_each_datum_is_treated_alone_with_its_own_step(network):
    x, t = noisy(network, 2, 3), torch.tensor([1, 40, 1000])
    whole = network(x, t)
    for i in range(2):
        for j in range(3):
            assert torch.allclose(network(x[i, j], t[j]), whole[i, j], rtol=1e-9, atol=1e-11)


def test_the_step_and_every_entry_matter(network):
    x = noisy(network, 1)
    out = network(x, torch.tensor(3))
    timeless = getattr(network, "time", None) is None
    assert torch.equal(network(x, torch.tensor(4)), out) == timeless
    for k in range(max(1, network.size) if network.size <= 20 else 20):
        other = x.clone().reshape(1, -1)
        other[0, k] = (other[0, k] + 1) % network.num_classes if network.num_classes else other[0, k] + 1
        assert not torch.allclose(network(other.reshape(x.shape), torch.tensor(3)), out), k


@pytest.mark.parametrize("name", NETWORKS)
def test_untrained_networks_say_zero(name):
    network = NETWORKS[name]()
    assert (network(noisy(network, 3), torch.tensor([1, 2, 3])) == 0).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_moves_within_two_steps(name):
    network = NETWORKS[name]()
    before = {k: p.detach().clone() for k, p in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x, t = noisy(network, 8), torch.arange(1, 9)
    target = torch.randn((8, *network.data_shape, *ending(network)))
    for _ in range(2):
        optimizer.zero_grad()
        (network(x, t) - target).square().mean().backward()
        optimizer.step()
    # a softmax does not change when all keys move together, so a key's bias has no gradient
    keys = {k for k in before if k.endswith(("in_proj_bias", "qkv.1.bias"))}
    unmoved = [k for k, p in network.named_parameters() if torch.equal(p, before[k]) and k not in keys]
    assert not unmoved


@pytest.mark.parametrize("name", NETWORKS)
def test_configuration_goes_through_json(name):
    network = NETWORKS[name]()
    again = type(network)(**json.loads(json.dumps(network.config())))
    assert again.config() == network.config()
    again.load_state_dict(awake(network).state_dict())
    x, t = noisy(network, 2), torch.tensor([1, 9])
    assert torch.equal(again(x, t), network(x, t))


def test_float32_agrees_with_float64_at_late_steps(network):
    x, t = noisy(network, 4), torch.tensor([1, 999, 1000, 4000])
    exact = network(x, t)
    single = copy.deepcopy(network).float()
    out = single(x.float() if network.num_classes is None else x, t)
    assert out.dtype == torch.float32
    assert (out.double() - exact).abs().max() < 1e-5 * exact.abs().max().clamp(min=1)


def test_networks_trace_to_one_graph(network):
    x, t = noisy(network, 3), torch.tensor([1, 2, 3])
    graph = make_fx(lambda x, t: network(x, t))(x, t)
    other, later = noisy(network, 3), torch.tensor([7, 100, 4000])
    assert torch.allclose(graph(other, later), network(other, later), rtol=1e-9, atol=1e-11)


def test_evaluation_mode_gives_the_same_numbers(network):
    x, t = noisy(network, 3), torch.tensor([1, 2, 3])
    trained = network(x, t)
    network.eval()
    with torch.no_grad():  # PyTorch has a faster way through encoder layers here
        assert torch.allclose(network(x, t), trained, rtol=1e-9, atol=1e-11)


REFUSED = [
    (lambda: ResidualMLP((4,), hidden=0), "hidden >= 1"),
    (lambda: ResidualMLP((4,), blocks=0), "blocks >= 1"),
    (lambda: ResidualMLP((4, 0)), "sizes >= 1 as data_shape, got"),
    (lambda: ResidualMLP((4,), num_classes=1), "num_classes >= 2, got 1"),
    (lambda: ResidualMLP((4,), num_classes=3, with_variance=True), "got both"),
    (lambda: UNet((7, 8)), r"at least 8x8, got \[7, 8\]: use ResidualMLP"),
    (lambda: UNet((64,)), r"\(H, W\) or \(C, H, W\), got \[64\]"),
    (lambda: UNet((8, 8), channels=(8, 6)), r"multiples of 4, got \[8, 6\]"),
    (lambda: UNet((8, 8), channels=()), r"multiples of 4, got \[\]"),
    (lambda: UNet((8, 8), blocks=0), "blocks >= 1"),
    (lambda: TransformerDenoiser((4,), 5, width=10, heads=4), "width that heads divide"),
    (lambda: TransformerDenoiser((4,), 5, layers=0), "layers, heads >= 1"),
    (
        lambda: TransformerDenoiser((4,), 5, neighbours=4),
        "an odd number of neighbours, or None for no convolution, got 4",
    ),
    (lambda: ResidualMLP((4,))(torch.zeros(2, 5), torch.tensor(1)), r"\[\*batch, 4\], got \[2, 5\]"),
    (lambda: UNet((8, 8))(torch.zeros(8, 9), torch.tensor(1)), r"\[\*batch, 8, 8\], got \[8, 9\]"),
]


@pytest.mark.parametrize(("build", "match"), REFUSED, ids=range(len(REFUSED)))
def test_bad_arguments_are_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_classes_and_real_values_are_not_confused():
    t = torch.tensor(1)
    with pytest.raises(TypeError, match=r"expected real-valued x_t, got torch.int64: give the network num_classes"):
        ResidualMLP((4,))(torch.zeros(4, dtype=torch.long), t)
    for network in (ResidualMLP((4,), num_classes=3), TransformerDenoiser((4,), 3, width=8, layers=1)):
        with pytest.raises(TypeError, match=r"class indices \(int64\), got torch.float64"):
            network(torch.zeros(4), t)


def test_classes_enter_one_hot_and_only_known_ones():
    network = ResidualMLP((2,), hidden=4, num_classes=3)
    assert network.features(torch.tensor([[0, 2]])).tolist() == [[[1, 0, 0], [0, 0, 1]]]


@pytest.mark.parametrize("wrong", [3, -1])
def test_classes_that_a_network_does_not_know_are_refused(wrong):
    for network in (ResidualMLP((2,), hidden=4, num_classes=3), TransformerDenoiser((2,), 3, width=8, layers=1)):
        with pytest.raises(ValueError, match=rf"expected class indices in 0\.\.2, got {wrong}: make"):
            network(torch.tensor([[0, wrong]]), torch.tensor(1))
        network(torch.tensor([[0, 2]]), torch.tensor(1))
