"""Compiled objectives when what is no tensor changes: layers and hooks that are added, and numbers kept as attributes."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from inference import ElboLoss
from inference.training import module_state
from inference.training.compilation import MAX_GRAPHS, NotTraceableError, compile_objective
from ppl_models import ModelGuidePair
from tests.training.test_compilation import said, same


class Weighted(ModelGuidePair):
    """A linear VAE with a noise scale and a weight beta of its rate as plain numbers, and dropout."""

    def __init__(self):
        super().__init__((3,), ("z",))
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.2))
        self.noise, self.beta, self.condition = 0.7, 1.0, None
        self.register_buffer("weight", torch.tensor(0.3))

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            with poutine.scale(scale=self.weight * self.beta):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.decoder(z) if self.condition is None else self.decoder(z) + self.condition
            return pyro.sample("x", dist.Normal(loc, self.noise).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)), poutine.scale(scale=self.weight * self.beta):
            return pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


CHANGES = {
    "layer appended": lambda pair: pair.decoder.append(nn.Linear(3, 3)),
    "buffer added": lambda pair: pair.register_buffer("condition_", torch.ones(3)),
    "bias given": lambda pair: pair.decoder[0].register_parameter("bias", nn.Parameter(torch.ones(3))),
    "hook": lambda pair: pair.decoder[0].register_forward_hook(lambda module, inputs, output: 5 * output),
    "number": lambda pair: setattr(pair, "noise", 0.2),
    "weight": lambda pair: setattr(pair, "beta", 3.0),
    "dropout's p": lambda pair: setattr(pair.decoder[1], "p", 0.9),
    "nothing to something": lambda pair: setattr(pair, "condition", 2.0),
    "buffer's value": lambda pair: pair.weight.fill_(2.0),
}


def made(closed_form=True, without_bias=False):
    torch.manual_seed(0)
    pair = Weighted()
    if without_bias:
        pair.decoder[0].bias = None
    loss, x = ElboLoss(pair, closed_form=closed_form), torch.randn(8, 3)
    return loss, x, compile_objective(loss, x, backend="eager")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change, caplog):
    loss, x, fast = made(without_bias=change == "bias given")
    assert same(fast, loss, x)
    CHANGES[change](loss.pair)
    assert same(fast, loss, x)
    caplog.clear()
    fast(x)
    assert not said(caplog)  # traced anew once


@pytest.mark.parametrize("change", ["number", "hook", "layer appended"])
def test_without_the_look_it_would_not_be(change, monkeypatch):
    """The twin: the graph of before gives other values."""
    monkeypatch.setattr(module_state.ModuleState, "settings", lambda self: ())
    monkeypatch.setattr(module_state.ModuleState, "is_current", lambda self: True)
    loss, x, fast = made()
    CHANGES[change](loss.pair)
    torch.manual_seed(1)
    frozen = fast(x)
    torch.manual_seed(1)
    assert not torch.allclose(frozen, loss(x), rtol=1e-3)


def test_numbers_that_come_back_find_their_graph():
    loss, x, fast = made()
    for noise in (0.2, 0.7, 0.2, 0.7):
        loss.pair.noise = noise
        assert same(fast, loss, x)
    assert sum("traced" in sentence for sentence in fast.history) == 2


def test_a_number_that_changes_at_each_step_ends_uncompiled_and_right(caplog):
    loss, x, fast = made()
    for step in range(MAX_GRAPHS + 3):
        loss.pair.beta = 0.1 * (step + 1)
        assert same(fast, loss, x)
    assert f"{MAX_GRAPHS} signatures were traced" in caplog.text


@pytest.mark.parametrize("closed_form", [True, False])
def test_a_weight_as_a_buffer_and_masks_of_the_data_compile(closed_form):
    """The same scale and the same mask in both programs keep the closed form, under tracing too."""

    class Masked(Weighted):
        def model(self, x=None, size=None):
            with poutine.mask(mask=torch.ones((), dtype=torch.bool) if x is None else x[..., 0] > 0):
                return super().model(x, size)

        def guide(self, x):
            with poutine.mask(mask=x[..., 0] > 0):
                return super().guide(x)

    torch.manual_seed(0)
    loss, x = ElboLoss(Masked(), closed_form=closed_form), torch.randn(8, 3)
    fast = compile_objective(loss, x, backend="eager")
    assert same(fast, loss, x)
    other = -x
    assert same(fast, loss, other)


def test_masks_that_come_to_differ_give_no_number():
    """Alike for the example, so that a closed form is used; where they differ later the graph says NaN, the loss refuses."""

    class Odd(Weighted):
        def guide(self, x):
            with pyro.plate("data", self.batch_size(x)):
                law = dist.Normal(self.encoder(x), 1.0).to_event(1).mask(x[..., 1] > -5)
                return pyro.sample("z", law)

        def model(self, x=None, size=None):
            with pyro.plate("data", self.batch_size(x, size)):
                law = dist.Normal(torch.zeros(2), 1.0).expand([self.batch_size(x, size), 2]).to_event(1)
                z = pyro.sample("z", law.mask(x[..., 0] > -5))
                return pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    torch.manual_seed(0)
    loss, x = ElboLoss(Odd()), torch.randn(8, 3)
    fast = compile_objective(loss, x, backend="eager")
    assert same(fast, loss, x)
    x[2, 0] = -6.0
    assert fast(x).isnan().any()
    with pytest.raises(Exception, match="masked differently"):
        loss(x)


def test_transforms_of_torch_func_are_refused():
    _, x, fast = made()
    with pytest.raises(
        NotTraceableError, match=r"outside torch.func's transforms .* transform the loss itself, .loss.forward"
    ):
        torch.func.grad(lambda x: fast(x).sum())(x)
    assert fast(x).shape == (8,)
