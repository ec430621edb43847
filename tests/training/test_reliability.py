"""Faults while training: killed anywhere, told to stop, a full disk. Rows 1, 4 and 5 of RELIABILITY.

Runs are compared bit for bit: metrics, weights, and the last checkpoint, which holds optimiser, schedule, average, best
epoch and sums. The reference is the same run left alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.training import checkpoints, records
from inference.training.checkpoints import checkpoint_name
from inference.training.storage import StorageError
from inference.training.trainer import Trainer
from tests.training.faulty_disk import Crash, FaultyDisk
from tests.training.interrupted_runs import outcome, process, train, train_quietly, train_until


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------ row 1: kill -9


def run_in_process(target: Any, *args: Any) -> int:
    started = process(target, *args)
    started.join(120)
    assert started.exitcode is not None, "the process hangs"
    return started.exitcode


def killed_and_resumed(tmp_path: Path, kind: str, kills: int, seed: int, options: dict[str, Any]) -> list[str]:
    """Kills the same run at seeded calls, resumes it, and returns what is not as it would have been."""
    reference = tmp_path / "reference"
    assert run_in_process(train_until, None, reference, kind, options) == 0
    # How many calls there are depends on how often the clock asks for a checkpoint: the last ones may not come.
    calls = int(0.6 * int(reference.with_suffix(".calls").read_text()))
    draw, wrong = random.Random(seed), []
    for index in range(kills):
        folder = tmp_path / f"killed-{index}"
        at = draw.randrange(1, calls)
        if run_in_process(train_until, at, folder, kind, options) != -signal.SIGKILL:
            wrong.append(f"{index}: not killed at call {at} of {calls}")
            continue
        if index % 3 == 2 and (folder / "config.yaml").exists():  # and once more, while resuming
            run_in_process(train_until, draw.randrange(1, calls), folder, kind, options)
        if run_in_process(train_quietly, folder, kind, options) != 0:
            wrong.append(f"{index}: could not resume after call {at} of {calls}")
        elif outcome(folder) != outcome(reference):
            wrong.append(f"{index}: differs after call {at} of {calls}")
    return wrong


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    assert killed_and_resumed(tmp_path, "full", kills=2, seed=0, options={"checkpoint_seconds": 0.02}) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seconds"), [("full", 0.05), ("full", 0.0), ("plain", 0.02)])
def test_a_killed_run_resumes_bit_for_bit_20_of_20(kind: str, seconds: float, tmp_path: Path) -> None:
    assert killed_and_resumed(tmp_path, kind, kills=20, seed=1, options={"checkpoint_seconds": seconds}) == []


def all_checkpoints_of(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A run with a checkpoint after every step, none of them deleted."""
    with monkeypatch.context() as patch:
        patch.setattr(records, "prune_checkpoints", lambda folder: None)
        train(folder, kind, checkpoint_seconds=0.0)
    return sorted((folder / "checkpoints").glob("step-*.safetensors"))


def cut_back(folder: Path, to: Path, checkpoint: Path) -> None:
    """The folder as a kill after that checkpoint would leave it, with a row half written."""
    (to / "checkpoints").mkdir(parents=True)
    for path in (checkpoint, Path(f"{checkpoint}.sha256")):
        shutil.copy(path, to / "checkpoints")
    shutil.copy(folder / "config.yaml", to)
    metrics = (folder / "metrics.csv").read_bytes()
    (to / "metrics.csv").write_bytes(metrics[: len(metrics) // 2])
    (to / "timing.csv").write_text("epoch,seconds,steps\n1.0,0.1,4.0\n2.0,0.")


@pytest.mark.parametrize("kind", ["full", "plain"])
def test_every_checkpoint_leads_to_the_same_end(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = all_checkpoints_of(tmp_path / "run", kind, monkeypatch)
    rows = len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) - 1
    assert len(found) == rows * (4 if kind == "full" else 5) + 1
    expected = outcome(tmp_path / "run")
    for checkpoint in found:
        folder = tmp_path / checkpoint.stem
        cut_back(tmp_path / "run", folder, checkpoint)
        train(folder, kind, resume=True, checkpoint_seconds=0.0)
        assert outcome(folder) == expected, checkpoint.stem


@pytest.mark.parametrize("part", ["optimizer", "average", "sums", "seed"])
def test_whatever_a_checkpoint_lacks_is_missed(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a trainer that forgets one part of its state does not reach the same end."""
    found = all_checkpoints_of(tmp_path / "run", "full", monkeypatch)
    cut_back(tmp_path / "run", tmp_path / "cut", found[6])
    restore = Trainer.restore

    def forgetful(trainer: Trainer) -> bool:
        fresh = trainer.optimization.state()
        kept = {key: value for key, value in fresh["optimizer"].items() if key == "state"}
        average = None if trainer.optimization.average is None else dict(trainer.optimization.average.state_dict())
        average = {name: tensor.clone() for name, tensor in average.items()} if average else None
        done = restore(trainer)
        if part == "optimizer":
            trainer.optimization.optimizer.state.clear()
            assert kept == {"state": {}}
        elif part == "average":
            trainer.optimization.average.load_state_dict(average)
        elif part == "sums":
            trainer.sums.zero_()
        else:
            trainer._seed = lambda stream: 0
        return done

    monkeypatch.setattr(Trainer, "restore", forgetful)
    # Without what is in the sums, their mean is 0 / 0 at an epoch's end, or another.
    train(tmp_path / "cut", "full", resume=True, checkpoint_seconds=0.0)
    assert outcome(tmp_path / "cut") != outcome(tmp_path / "run")


# --------------------------------------------------------------------------------------------------- row 4: a full disk


def test_a_disk_that_fills_up_is_loud_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    """At every call of the file system that a run makes: a typed error, and a folder from which the run goes on."""
    reference = tmp_path / "reference"
    with FaultyDisk() as disk:
        train(reference, "plain", checkpoint_seconds=0.0, epochs=1)
    expected, first = outcome(reference), disk.calls.index("replace", disk.calls.index("replace") + 1)
    for at in range(first + 2, len(disk.calls), 17):
        folder = tmp_path / f"full-{at}"
        with FaultyDisk(at, "error"), contextlib.suppress(StorageError):
            train(folder, "plain", checkpoint_seconds=0.0, epochs=1)
        assert not (folder / "model" / "config.json").exists() or outcome(folder) == expected
        train(folder, "plain", resume=True, checkpoint_seconds=0.0, epochs=1)
        assert outcome(folder) == expected, f"{at}: {disk.calls[at]}"


def test_the_first_refusal_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, count = checkpoints.write_atomic, 0

    def full(path: Path, data: bytes) -> None:
        nonlocal count
        count += 1
        if count > 7:
            cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise StorageError(f"cannot write {path}: {cause.strerror}", cause)
        write(path, data)

    monkeypatch.setattr(checkpoints, "write_atomic", full)
    with pytest.raises(StorageError, match="No space left on device"):
        train(tmp_path / "run", "plain", checkpoint_seconds=0.0)
    assert checkpoints.latest_checkpoint(tmp_path / "run" / "checkpoints") is not None


def test_metrics_that_find_no_room_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, row: Any) -> None:
        path.write_text("epo")
        raise StorageError(f"cannot write {path}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records, "append_metrics", full)
        with pytest.raises(StorageError, match=r"metrics.csv: No space left on device"):
            train(tmp_path / "run", "plain")
    train(tmp_path / "run", "plain", resume=True)
    train(tmp_path / "reference", "plain")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "reference")


def test_a_crash_anywhere_in_the_writing_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    """Not an error but an end, with what was being written half there."""
    train(tmp_path / "reference", "plain", epochs=1)
    expected = outcome(tmp_path / "reference")
    with FaultyDisk() as disk:
        train(tmp_path / "counted", "plain", epochs=1)
    for at in range(4, len(disk.calls), 5):
        folder = tmp_path / f"crash-{at}"
        with FaultyDisk(at, "half"), contextlib.suppress(Crash):
            train(folder, "plain", epochs=1)
        train(folder, "plain", resume=True, epochs=1)
        assert outcome(folder) == expected, f"{at}: {disk.calls[at]}"


# ------------------------------------------------------------------------------------------ row 5: SIGTERM and Ctrl-C


def wait_for(path: Path, text: str = "") -> None:
    """Until a file is there and holds a text."""
    until = time.monotonic() + 60
    while not (path.is_file() and text in path.read_text()):
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.005)


def stop_and_resume(tmp_path: Path, name: str, number: int, delay: float) -> int:
    """Sends a signal once the second epoch is done and a while has passed; resumes; the exit status of the first part."""
    folder = tmp_path / name
    started = process(train_quietly, folder, "full", {"epochs": 200, "patience": None})
    wait_for(folder / "metrics.csv", "\n2.0,")
    time.sleep(delay)
    os.kill(started.pid, number)
    started.join(30)
    assert started.exitcode is not None, "does not leave within 30 s"
    assert not (folder / "model").exists()
    return started.exitcode


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_a_checkpoint(number: int, status: int, tmp_path: Path) -> None:
    assert stop_and_resume(tmp_path, "run", number, 0.1) == status
    last = max((tmp_path / "run" / "checkpoints").glob("step-*.safetensors"))
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert int(last.stem[5:]) >= 4 * (len(rows) - 1) >= 8  # later than the first: it was saved because of the signal


@pytest.mark.slow
def test_sigterm_10_of_10_and_the_rest_is_as_it_would_have_been(tmp_path: Path) -> None:
    options = {"epochs": 200, "patience": None}
    assert run_in_process(train_quietly, tmp_path / "reference", "full", options) == 0
    draw = random.Random(2)
    for index in range(10):
        name = f"run-{index}"
        assert stop_and_resume(tmp_path, name, signal.SIGTERM, draw.uniform(0, 0.5)) == 143
        assert run_in_process(train_quietly, tmp_path / name, "full", options) == 0
        assert outcome(tmp_path / name) == outcome(tmp_path / "reference")


@pytest.mark.parametrize("where", ["step", "evaluation", "last evaluation"])
def test_a_signal_anywhere_is_heard(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised inside a step, inside an evaluation between its batches, and in the very last evaluation."""
    train(tmp_path / "reference", "plain")
    before = signal.getsignal(signal.SIGTERM)
    place = "_step" if where == "step" else "evaluate"
    real, calls, at = getattr(Trainer, place), 0, {"step": 7, "evaluation": 2, "last evaluation": 3}[where]

    def with_signal(trainer: Trainer, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            signal.raise_signal(signal.SIGTERM)
        return real(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, place, with_signal)
        with pytest.raises(SystemExit) as caught:
            train(tmp_path / "run", "plain")
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    steps = {"step": 7, "evaluation": 10, "last evaluation": 15}[where]
    assert (tmp_path / "run" / "checkpoints" / f"{checkpoint_name(steps)}.safetensors").exists()
    train(tmp_path / "run", "plain", resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "reference")


def test_ctrl_c_twice_leaves_at_once(tmp_path: Path) -> None:
    """The first is noted while a datum takes a minute to read; the second does not wait for it."""
    started = process(train_quietly, tmp_path / "run", "slow", {})
    wait_for(tmp_path / "run.reading")
    time.sleep(0.2)
    os.kill(started.pid, signal.SIGINT)
    started.join(0.5)
    assert started.exitcode is None, "the first Ctrl-C waits for the step"
    os.kill(started.pid, signal.SIGINT)
    started.join(10)
    assert started.exitcode == 130
