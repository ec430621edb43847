"""Descriptions name only the library's own parts, and rebuild what they describe."""

import pytest
from torch import nn

from ppl_models.networks import MLP, Decoder, GaussianEncoder
from ppl_models.registry import PARTS, SYSTEMS, UnknownPartError, _resolve, build, describe, system


@pytest.mark.parametrize("path", [*PARTS.values(), *SYSTEMS.values()])
def test_every_entry_resolves_to_something_callable(path):
    assert callable(_resolve(path))


@pytest.mark.parametrize(
    "module",
    [MLP([2, 4, 3], "relu"), GaussianEncoder((2, 2), 3, (5,), num_classes=4), Decoder(3, (2, 2), with_scale=True)],
)
def test_networks_are_rebuilt(module):
    other = build(describe(module))
    assert describe(other) == describe(module)
    assert [p.shape for p in other.parameters()] == [p.shape for p in module.parameters()]


class VAE(nn.Module):
    """A stranger with a familiar name."""


@pytest.mark.parametrize("module", [nn.Linear(2, 2), VAE()])
def test_foreign_modules_are_not_described(module):
    with pytest.raises(UnknownPartError, match="network of your own"):
        describe(module)


@pytest.mark.parametrize("name", ["os.system", "torch.nn.Linear", "Sequential", None, "MLP.__init__"])
def test_foreign_names_are_not_built(name):
    with pytest.raises(UnknownPartError, match="expected a class among"):
        build({"class": name, "widths": [1, 2]})


def test_an_unknown_system_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"among ae, vae.*got 'gan'"):
        system("gan")
