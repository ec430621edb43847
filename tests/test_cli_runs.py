"""What `ppl train` leaves behind and takes up again: options, stopped runs, weights to begin with; and what it remarks on."""

import numpy as np
import pytest
import torch
import yaml

from inference import load_run
from inference.cli import run
from inference.training.display import HEADER, metrics_line
from tests.test_cli import TINY, refuse, succeed


@pytest.fixture
def answers(tmp_path):
    """Binary answers in a file: 40 rows of 6, a quarter of them held out."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (40, 6), dtype=np.uint8)
    np.savez(tmp_path / "bits.npz", train=bits[10:], test=bits[:10])
    return f"npz:{tmp_path / 'bits.npz'}"


def test_options_are_kept_and_read_back(answers, tmp_path, capsys):
    succeed(capsys, "train", "vae", "--data", answers, "--out", tmp_path / "a", *TINY)
    kept = yaml.safe_load((tmp_path / "a" / "options.yaml").read_text())
    assert (kept["data"], kept["latent_dim"], kept["epochs"]) == (answers, 3, 1)
    succeed(capsys, "train", "vae", "--config", tmp_path / "a" / "options.yaml", "--out", tmp_path / "b")
    a, b = (load_run(tmp_path / name) for name in "ab")
    assert a.metrics == b.metrics
    match = r"the record of a run: options\.yaml beside it is one"
    refuse(capsys, "train", "vae", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "c", match=match)
    before = (tmp_path / "a" / "options.yaml").read_bytes()
    refuse(capsys, "train", "vae", "--data", answers, "--out", tmp_path / "a", "--epochs", "9", match="holds|run")
    assert (tmp_path / "a" / "options.yaml").read_bytes() == before


def test_a_stopped_run_can_be_looked_at_and_gone_on_with(answers, tmp_path, capsys):
    """A run without its model is one that was stopped: its last checkpoint is what there is."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        succeed(capsys, "train", "vae", "--data", answers, "--out", folder, *TINY)
    for path in (stopped / "model").iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match="is an unfinished run: these are its weights after epoch 1; --resume"):
        succeed(capsys, "terms", stopped, "--particles", "10")
    with pytest.warns(UserWarning, match="unfinished"):
        loaded = load_run(stopped)
    for name, tensor in load_run(whole).pair.state_dict().items():
        assert torch.equal(tensor, loaded.pair.state_dict()[name])
    assert run(["train", "vae", "--out", str(stopped), "--resume", "--threads", "1"]) == 0  # under its own options
    assert (stopped / "model" / "model.safetensors").is_file()
    capsys.readouterr()


def test_weights_to_begin_with(answers, tmp_path, capsys):
    succeed(capsys, "train", "vae", "--data", answers, "--out", tmp_path / "a", *TINY)
    slow = ["--learning-rate", "1e-12", "--start-from", tmp_path / "a"]
    succeed(capsys, "train", "vae", "--data", answers, "--out", tmp_path / "b", *TINY, *slow)
    succeed(capsys, "train", "vae", "--data", answers, "--out", tmp_path / "c", *TINY, *slow[:2])
    a, b, c = (load_run(tmp_path / name).pair.state_dict() for name in "abc")
    assert all(torch.allclose(a[name], b[name], atol=1e-9) for name in a)
    assert not all(torch.allclose(a[name], c[name], atol=1e-9) for name in a)  # control: the weights of the seed
    (tmp_path / "a").rename(tmp_path / "gone")
    for path in (tmp_path / "b" / "model").iterdir():
        path.unlink()
    succeed(capsys, "train", "vae", "--resume", "--out", tmp_path / "b", "--threads", "1")  # it has weights of its own
    (tmp_path / "gone").rename(tmp_path / "a")
    wider = [*TINY, "--hidden", "17", "--start-from", tmp_path / "a"]
    wider = [part for i, part in enumerate(wider) if i not in (0, 1)]
    refuse(
        capsys, "train", "vae", "--data", answers, "--out", tmp_path / "d", *wider, match="start_from: the weights of"
    )


def test_integers_that_nobody_explains(tmp_path, capsys):
    rng = np.random.default_rng(0)
    likert = rng.integers(1, 6, (30, 4))
    np.savez(tmp_path / "a.npz", train=likert)
    np.savez(tmp_path / "b.npz", train=likert, levels=6)
    out = ["--out", tmp_path / "run", *TINY]
    refuse(
        capsys,
        "train",
        "vae",
        "--data",
        f"npz:{tmp_path / 'a.npz'}",
        *out,
        match="integers up to 5 .* may be 6 levels or",
    )
    succeed(capsys, "train", "vae", "--data", f"npz:{tmp_path / 'b.npz'}", *out)
    assert load_run(tmp_path / "run").config["data"]["levels"] == 6
    succeed(capsys, "sample", tmp_path / "run", "--out", tmp_path / "draws.npz", "-n", "50")
    drawn = np.load(tmp_path / "draws.npz")
    assert drawn["counts"].min() >= 0
    assert drawn["counts"].max() <= 5
    np.testing.assert_allclose(drawn["counts"] / 2.5 - 1, drawn["x"], atol=1e-12)  # the scaling is symmetric
    continuous = ["--likelihood", "normal", "--scaling", "standard", "--out", tmp_path / "c", *TINY]
    succeed(capsys, "train", "vae", "--data", f"npz:{tmp_path / 'a.npz'}", *continuous)


def test_entries_that_are_not_used_are_named(tmp_path, capsys):
    bits = np.random.default_rng(0).integers(0, 2, (30, 4))
    np.savez(tmp_path / "a.npz", train=bits, valid=bits[:5], extra=bits)
    with pytest.warns(UserWarning, match=r"entries not used: extra, valid \(did you mean test\?\)"):
        succeed(capsys, "train", "vae", "--data", f"npz:{tmp_path / 'a.npz'}", "--out", tmp_path / "run", *TINY)


def test_columns_of_wild_sizes_are_remarked_on(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(30, 3)) * [1e-3, 1.0, 1e5]
    np.save(tmp_path / "x.npy", x)
    call = ["train", "vae", "--data", f"npz:{tmp_path / 'x.npy'}", "--likelihood", "normal", *TINY]
    with pytest.warns(UserWarning, match="dimensions vary by .* scaling 'standard'"):
        succeed(capsys, *call, "--out", tmp_path / "a")
    succeed(capsys, *call, "--out", tmp_path / "b", "--scaling", "standard")  # warnings are errors here


def test_channels_that_come_last_are_refused_where_they_matter(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", train=x)
    call = ["train", "ddpm", "--data", f"npz:{tmp_path / 'x.npz'}", "--epochs", "1", "--hidden", "8", "--threads", "1"]
    match = r"channels first, \[3, 8, 8\], got \[8, 8, 3\]: permute"
    refuse(capsys, *call, "--out", tmp_path / "a", "--pair", "num_timesteps=4", match=match)
    succeed(capsys, *call, "--out", tmp_path / "b", "--pair", "num_timesteps=4", "--pair", "network=mlp")
    assert type(load_run(tmp_path / "b").pair.network).__name__ == "ResidualMLP"


@pytest.mark.parametrize("size", [1.0, 1e3, 1e4, 1e6, 1e15, 1e200])
def test_columns_never_touch(size):
    names = ("train_elbo", "validation_elbo", "validation_std_error", "validation_rate", "validation_distortion")
    row = {"epoch": 3, **dict.fromkeys(names, -size), "validation_bits_per_dim": size, "active_units": 5}
    assert len(metrics_line(row, 10, 120.0, 61.0).split()) == len(
        HEADER.replace(" ELBO", "").replace("+- SE", "SE").split()
    )
