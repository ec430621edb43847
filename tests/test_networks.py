"""Networks map shapes as stated, for any leading dims, with and without classes."""

import pytest
import torch

from ppl_models.networks import MLP, Decoder, GaussianEncoder


@pytest.mark.parametrize("leading", [(), (5,), (7, 5), (2, 3, 4)])
def test_leading_dims_are_batch_dims(leading):
    encoder, decoder = GaussianEncoder((4, 3), 2, (8,)), Decoder(2, (4, 3), (8,))
    x, z = torch.randn(*leading, 4, 3), torch.randn(*leading, 2)
    loc, scale = encoder(x)
    assert loc.shape == scale.shape == (*leading, 2)
    assert decoder(z).shape == (*leading, 4, 3)
    if leading:  # each batch entry is treated alone
        first = (0,) * len(leading)
        assert torch.allclose(encoder(x[first])[0], loc[first])
        assert torch.allclose(decoder(z[first]), decoder(z)[first])


def test_scale_is_the_exponential_of_the_second_half():
    encoder = GaussianEncoder((3,), 2, (4,))
    x = torch.randn(5, 3)
    loc, scale = encoder(x)
    assert torch.equal(torch.cat([loc, scale.log()], -1).round(decimals=10), encoder.body(x).round(decimals=10))


def test_classes_enter_one_hot():
    encoder = GaussianEncoder((3,), 2, (4,), num_classes=5)
    x = torch.tensor([[0, 4, 2]])
    by_hand = encoder.body(torch.eye(5)[x].reshape(1, -1))
    assert torch.allclose(torch.cat([encoder(x)[0], encoder(x)[1].log()], -1), by_hand)


def test_decoder_with_scale_returns_a_pair():
    loc, scale = Decoder(2, (3, 3), (4,), with_scale=True)(torch.randn(6, 2))
    assert loc.shape == scale.shape == (6, 3, 3)
    assert (scale > 0).all()


def test_layers_are_as_wide_as_asked():
    layers = [m for m in MLP([3, 5, 7, 2], "silu") if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in layers] == [(3, 5), (5, 7), (7, 2)]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(([3],), "at least two"), (([3, 0],), "positive widths"), (([3, 2], "swish"), "activation among tanh")],
)
def test_bad_arguments_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        MLP(*arguments)
