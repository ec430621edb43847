"""A run that is given more epochs ends where one of that length ends; what cannot be so is refused, and nothing is lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from inference import RunError, fit, load_run
from inference.training import extending, loop
from inference.training.checkpoints import CheckpointError
from inference.training.storage import StorageError
from tests.training.training_pairs import linear_vae, points

OPTIONS: dict[str, Any] = {"batch_size": 8, "learning_rate": 0.01, "compile": "off", "progress": False}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {"ema": 0.9},
    "warm": {"kl_warmup_epochs": 3.0, "warmup_steps": 15, "free_bits": 0.1},
    "decaying": {"optimizer": "adamw", "weight_decay": 0.1},
    "patient": {"validation_fraction": 0.2, "patience": 50},
}


def train(folder: Path, epochs: int, resume: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    return fit(linear_vae(), points(), folder, resume=resume, epochs=epochs, **{**OPTIONS, **options})


def outcome(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("metrics.csv", "model/model.safetensors", "model/config.json")]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_where_a_longer_run_ends_bit_for_bit(kind: str, tmp_path: Path) -> None:
    train(tmp_path / "long", 5, **KINDS[kind])
    train(tmp_path / "run", 2, **KINDS[kind])
    short = outcome(tmp_path / "run")
    for epochs in (3, 5):  # twice, the first time for a while only
        extended = train(tmp_path / "run", epochs, resume=True, **KINDS[kind])
    assert outcome(tmp_path / "run") == outcome(tmp_path / "long") != short
    assert extended.config["train"]["epochs"] == 5
    # The numbers of a run are kept up to the clock, and its record is the longer run's.
    assert (tmp_path / "run" / "config.yaml").read_text() == (tmp_path / "long" / "config.yaml").read_text()
    assert len((tmp_path / "run" / "timing.csv").read_text().splitlines()) == 6


@pytest.mark.parametrize("kind", ["plain", "averaged"])
def test_new_epochs_from_the_same_weights_alone_end_elsewhere(kind: str, tmp_path: Path) -> None:
    """The twin: without the optimiser's state, and with the order of the first epochs again."""
    train(tmp_path / "long", 5, **KINDS[kind])
    short = train(tmp_path / "run", 2, **KINDS[kind])
    other = fit(short.pair, points(), tmp_path / "other", epochs=3, **{**OPTIONS, **KINDS[kind]})
    weights = [dict(each.pair.state_dict()) for each in (other, load_run(tmp_path / "long", linear_vae()))]
    assert not all(torch.allclose(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_unfinished_run_may_have_more_epochs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "long", 5)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_model", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", 3)
    train(tmp_path / "run", 5, resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "long")


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], int, str]] = {
    "cosine": ({"schedule": "cosine"}, {}, 3, r"epochs \(2 to 3\), got schedule='cosine'.*--start-from"),
    "fewer": ({}, {}, 1, r"another configuration \(train.epochs was 2, is 1\)"),
    "something else": (
        {},
        {"learning_rate": 0.5},
        3,
        r"configuration \(train.learning_rate was 0.01, is 0.5\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_run_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    options, other, epochs, reason = REFUSED[name]
    train(tmp_path, 2, **options)
    before = files(tmp_path)
    with pytest.raises(RunError, match=reason):
        train(tmp_path, epochs, resume=True, **{**options, **other})
    assert files(tmp_path) == before


def test_a_falling_temperature_is_laid_out_over_the_run() -> None:
    train = {"epochs": 2, "schedule": "constant", "temperature_end": 0.5}
    assert extending._laid_out_over_the_run(train) == "temperature_end=0.5"
    assert extending._laid_out_over_the_run({**train, "temperature_end": None}) == ""


def test_a_run_that_stopped_by_itself_stays_so(tmp_path: Path) -> None:
    options = {"validation_fraction": 0.2, "patience": 1, "learning_rate": 0.9}
    run = train(tmp_path, 50, **options)
    assert len(run.metrics) < 50
    before = files(tmp_path)
    with pytest.raises(RunError, match=rf"stopped by itself after epoch {len(run.metrics)} of 50, as patience=1 says"):
        train(tmp_path, 60, resume=True, **options)
    assert files(tmp_path) == before


def test_without_checkpoints_the_model_stays(tmp_path: Path) -> None:
    train(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoints")
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match="has no checkpoint to go on from: begin a new run"):
        train(tmp_path, 3, resume=True)
    assert files(tmp_path) == before


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # one for each damaged checkpoint
def test_with_damaged_checkpoints_the_model_stays(tmp_path: Path) -> None:
    train(tmp_path, 2)
    for path in (tmp_path / "checkpoints").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    before = files(tmp_path)
    with pytest.raises(CheckpointError):
        train(tmp_path, 3, resume=True)
    assert files(tmp_path) == before


@pytest.mark.parametrize("after", [1, 2, 3])
def test_cut_off_on_the_way_nothing_is_lost(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between any two of its changes, the folder can be resumed as it was, or for more."""
    train(tmp_path / "long", 3)
    train(tmp_path / "run", 2)
    short, calls = outcome(tmp_path / "run"), []

    def cut_off(do: Any) -> Any:
        def done(*args: Any) -> None:
            calls.append(1)
            if len(calls) >= after:
                raise StorageError("the power went", OSError())
            do(*args)

        return done

    with monkeypatch.context() as patch:
        for name in ("remove_durably", "write_yaml"):
            patch.setattr(extending, name, cut_off(getattr(extending, name)))
        with pytest.raises(StorageError, match="the power went"):
            train(tmp_path / "run", 3, resume=True)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["epochs"] == 2
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    train(tmp_path / "copy", 2, resume=True)
    assert outcome(tmp_path / "copy") == short
    train(tmp_path / "run", 3, resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "long")
