"""Compiled objectives when modules change afterwards, and losses that a comparison on one draw would let pass by chance."""

import copy
import pickle
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from inference import ElboLoss, fit
from inference.training import compilation, stepping
from inference.training.compilation import NotTraceableError, compile_objective
from inference.training.config import ConfigError, TrainConfig
from ppl_models import VAE
from ppl_models.likelihoods import Bernoulli
from tests.training.test_compilation import is_fresh, run, said, same, vae_loss


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return (self.b(self.a(x).tanh())).square().mean(-1) + torch.randn(len(x))


def untie(loss):
    loss.b.weight = nn.Parameter(torch.randn(3, 3))


def replace_module(loss):
    loss.b = nn.Linear(3, 3)


def take_away(loss):
    loss.b.register_parameter("bias", None)


def assign(loss):
    state = {name: torch.randn_like(tensor) for name, tensor in loss.state_dict().items()}
    loss.load_state_dict(state, assign=True)


def other_strides(loss):
    with torch.no_grad():
        loss.a.weight.data = loss.a.weight.t().contiguous().t()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", [untie, replace_module, take_away, assign, other_strides])
def test_modules_and_ties_may_change(change, backend, caplog):
    torch.manual_seed(0)
    loss, x = Tied(), torch.randn(4, 3)
    fast = compile_objective(loss, x, backend=backend)
    change(loss)
    assert same(fast, loss, x) if backend == "eager" else len(run(fast, x, loss)[1]) == len(run(loss, x, loss)[1])
    caplog.clear()
    fast(x)
    assert not said(caplog)  # traced anew once


def test_a_look_at_the_ties_is_needed(monkeypatch):
    loss, x = Tied(), torch.randn(4, 3)
    fast = compile_objective(loss, x, backend="eager")
    monkeypatch.setattr(compilation.ModuleState, "is_current", lambda state: True)
    untie(loss)
    assert not same(fast, loss, x)


@pytest.mark.parametrize("copied", [lambda f: pickle.loads(pickle.dumps(f)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_copies_draw_fresh_noise(copied):
    loss, x = Tied(), torch.randn(4, 3)
    fast = compile_objective(loss, x, backend="eager")
    again = copied(fast)
    assert is_fresh(again, x)
    assert same(again, again.loss, x)
    assert again.loss.a.weight is not loss.a.weight


class Draws(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw, self.weight = draw, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * self.draw(x)


def _rarely(x):
    return x.flip(0) if random.random() < 1e-9 else x


def _own_generator(x):
    return x + torch.randn(len(x), generator=torch.Generator().manual_seed(5))


def _seeds_itself(x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return x + torch.randn(len(x))


@pytest.mark.parametrize(
    ("draw", "match"),
    [
        (_rarely, "draws from random, which a graph would freeze"),
        (lambda x: x + 0 * np.random.rand(), "draws from numpy.random"),
        (_own_generator, "torch.Generator of its own"),
        (_seeds_itself, "a value differs"),
        (lambda x: (x, torch.distributions.Normal(x, 1.0)), "nest of tensors, got a Normal"),
    ],
)
def test_what_might_pass_by_chance_is_refused(draw, match):
    python, legacy = random.getstate(), np.random.get_state()[1].copy()
    loss = Draws(draw)
    if "nest" in match:
        loss.forward = draw
    with pytest.raises(NotTraceableError, match=match):
        compile_objective(loss, torch.arange(3.0), backend="eager")
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], legacy)


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        self.last = self.layer(x)
        return self.last


def test_a_tensor_kept_on_a_module_is_refused_and_stays_real():
    loss = Keeps()
    with pytest.raises(NotTraceableError, match=r"sets Keeps.last, which a graph would never renew"):
        compile_objective(loss, torch.ones(3, 2), backend="eager")
    assert not isinstance(loss.last, FakeTensor)
    assert loss.last.shape == (3, 1)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)[:, 0] + torch.randn(len(x))


class DroppedInMemoryOrder(nn.Module):
    """Dropout of a tensor that is dense without being contiguous."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x):
        return nn.functional.dropout(self.layer(x).t(), 0.3, training=True).sum(0)


@pytest.mark.parametrize(
    "make",
    [
        Checkpointed,
        DroppedInMemoryOrder,
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten()),
    ],
    ids=["checkpoint", "dropout", "transformer"],
)
def test_programs_that_a_graph_can_stand_for_are_not_refused(make):
    torch.manual_seed(0)
    loss = make()
    x = torch.randn(7, 5, 4) if isinstance(loss, nn.Sequential) else torch.randn(7, 3 if hasattr(loss, "net") else 6)
    fast = compile_objective(loss, x, backend="eager")
    assert same(fast, loss, x)
    assert not torch.equal(fast(x), fast(x))


def test_threads_may_meet_new_shapes_at_once():
    loss, x = vae_loss()
    fast = compile_objective(loss, x, backend="eager")
    failures = []

    def work(count):
        try:
            for size in range(1, 6):
                fast(torch.cat([x] * 5)[: size + count])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(5 * i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not any(isinstance(p, FakeTensor) for p in loss.parameters())


class Recurrent(nn.Module):
    """An encoder that flat graphs cannot hold: torch's own kernel for an LSTM takes a workspace that tracing leaves out."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        out = self.head(self.lstm(x[..., None])[0][:, -1])
        return out[:, :2], 0.1 + out[:, 2:].exp()


@pytest.mark.parametrize("fault", ["lstm", "in place"])
def test_auto_trains_what_cannot_be_compiled_and_says_why(fault, monkeypatch, caplog, capsys):
    monkeypatch.setattr(stepping, "CPU_STEPS", 1)
    pair = VAE.preset((6,), Bernoulli(), latent_dim=2, hidden=(4,))
    if fault == "lstm":
        pair.encoder = Recurrent()
    else:
        guide = pair.guide
        pair.guide = lambda x: guide(x.clamp_(0.0, 1.0))
    pair, x = pair.float(), torch.bernoulli(torch.full((16, 6), 0.5, dtype=torch.float32))
    trained = fit(pair, x, epochs=1, batch_size=8, progress=False)
    assert len(trained.metrics) == 1
    assert "training uncompiled: expected a loss that" in caplog.text


def test_a_short_run_says_that_it_is_not_compiled(capsys):
    pair = VAE.preset((6,), Bernoulli(), latent_dim=2, hidden=(4,))
    fit(pair, torch.ones(16, 6), epochs=1, batch_size=8)
    assert (
        "uncompiled: 2 steps, and compiling pays from 40,000; compile=on compiles all the same"
        in capsys.readouterr().err
    )
    fit(pair, torch.ones(16, 6), epochs=1, batch_size=8, compile="off")
    assert "uncompiled" not in capsys.readouterr().err


def test_on_leaves_a_fault_of_the_data_what_it_is():
    pair = VAE.preset((6,), Bernoulli(), latent_dim=2, hidden=(4,))
    stepper = stepping.Stepper(ElboLoss(pair), TrainConfig(compile="on"), 1, 3, torch.device("cpu"), print)
    with pytest.raises(ValueError, match="0 or 1") as raised:
        stepper(torch.full((3, 6), 0.5))
    assert not isinstance(raised.value, ConfigError)
