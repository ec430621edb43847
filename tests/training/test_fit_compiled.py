"""`fit` with a compiled objective: the same run as without, bit for bit after a resume, and loud where it cannot."""

import pytest
import torch

from inference import ConfigError, fit
from inference.training import stepping
from inference.training.config import TrainConfig, make_config
from inference.training.stepping import CPU_STEPS, CUDA_STEPS, Stepper
from inference.training.trainer import Trainer
from ppl_models import DDPM, VAE, LinearGaussian
from ppl_models.likelihoods import Normal

CALLS = []


@pytest.fixture(autouse=True)
def _flat_graphs(monkeypatch):
    """The graph as it is, for the compiler takes half a minute; counts what ran in it."""

    def counted(graph, inputs):
        def run(*args):
            CALLS.append(1)
            return graph(*args)

        return run

    CALLS.clear()
    monkeypatch.setattr(stepping, "BACKEND", counted)


def _vae():
    torch.manual_seed(0)
    return VAE.preset((3,), Normal(scale=0.5), latent_dim=2, hidden=(4,))


def _ddpm():
    torch.manual_seed(0)
    return DDPM.preset((3,), Normal(), num_timesteps=4, hidden=8, blocks=1, predict="x_0")


@pytest.mark.parametrize("build", [_vae, _ddpm])
@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"gradient_clip": 1.0}])
def test_a_compiled_run_is_the_uncompiled_one(build, options):
    x = torch.randn(40, 3)  # two full batches of 16 and one of 8 an epoch
    options = {"epochs": 3, "batch_size": 16, "progress": False, **options}
    plain, fast = (fit(build(), x, compile=how, **options) for how in ("off", "on"))
    assert len(CALLS) >= 6, "full batches ran in the graph"
    for a, b in zip(plain.metrics, fast.metrics, strict=True):
        assert a.keys() == b.keys()
        assert all(abs(a[key] - b[key]) <= 1e-8 * (1 + abs(a[key])) for key in a)
    other = fit(build(), x, compile="off", **{**options, "seed": 1})
    assert abs(other.metrics[-1]["train_elbo"] - plain.metrics[-1]["train_elbo"]) > 1e-6, "the twin: other draws"


def test_a_cut_compiled_run_ends_the_same(tmp_path, monkeypatch):
    x = torch.randn(40, 3)
    options = {"epochs": 3, "batch_size": 16, "progress": False, "compile": "on"}
    whole = fit(_vae(), x, tmp_path / "whole", **options)
    end = Trainer._end_epoch

    def stop(self, timing):
        end(self, timing)
        if self.epoch == 1:
            self.save()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_end_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(_vae(), x, tmp_path / "cut", **options)
    resumed = fit(_vae(), x, tmp_path / "cut", resume=True, **options)
    assert resumed.metrics == whole.metrics
    assert all(torch.equal(a, b) for a, b in zip(whole.pair.parameters(), resumed.pair.parameters(), strict=True))


def test_the_smaller_last_batch_is_said_to_run_uncompiled_once(capsys):
    sentence = "batches of 8, the last of an epoch, run uncompiled"
    for count, times in ((40, 1), (32, 0)):
        fit(_vae(), torch.randn(count, 3), epochs=3, batch_size=16, compile="on")
        assert capsys.readouterr().err.count(sentence) == times


def test_auto_compiles_runs_that_win_the_cost_back():
    loss, said = object(), []
    for device, enough in (("cpu", CPU_STEPS), ("cuda", CUDA_STEPS)):
        for steps, wanted in ((enough, True), (enough - 1, False)):
            stepper = Stepper(loss, TrainConfig(), steps, 16, torch.device(device), said.append)
            assert stepper.wanted is wanted
    for config, wanted in ((TrainConfig(compile="off"), False), (TrainConfig(processes=2), False)):
        assert Stepper(loss, config, 10**9, 16, torch.device("cpu"), said.append).wanted is wanted
    assert Stepper(loss, TrainConfig(processes=2, compile="on"), 1, 16, torch.device("cpu"), said.append).wanted


def test_what_cannot_be_compiled_is_refused_under_on_and_said_under_auto(monkeypatch, capsys):
    pair = LinearGaussian.random(3, 2)  # its guide looks at its precision matrix to choose the family
    x = pair.model(size=32).detach()
    with pytest.raises(ConfigError, match=r"compile: .*; use compile=off"):
        fit(pair, x, epochs=1, batch_size=16, progress=False, compile="on")
    monkeypatch.setattr(stepping, "CPU_STEPS", 1)
    run = fit(pair, x, epochs=1, batch_size=16)
    assert len(run.metrics) == 1
    assert "training uncompiled" in capsys.readouterr().err


def test_on_and_off_may_be_written_as_yaml_reads_them():
    """--set compile=off comes as false."""
    assert [make_config({"compile": value}).compile for value in (True, False, "auto")] == ["on", "off", "auto"]
    with pytest.raises(ConfigError, match="compile: input should be 'auto', 'on' or 'off', got 'never'"):
        make_config({"compile": "never"})
