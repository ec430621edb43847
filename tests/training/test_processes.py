"""Several processes on one run: each datum once, the gradient of one process, and an end to all when one fails.

Starting processes takes seconds, so all but one case are marked slow. ``PointMass`` draws nothing, so that what several
processes compute must be what one does, to rounding.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference import ConfigError, DataError, TrainingDiverged, fit
from inference.training import launching
from inference.training.launching import ProcessFailed
from inference.training.storage import StorageError
from tests.training.interrupted_runs import process
from tests.training.training_pairs import NanAtNine, NanAtOnce, PointMass, Scalar, linear_vae, points


def weights(pair: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in pair.parameters()])


def trained(
    processes: int, size: int = 13, batch_size: int = 5, **options: Any
) -> tuple[Tensor, list[dict[str, float]]]:
    torch.manual_seed(0)
    pair = PointMass()
    run = fit(pair, points(size, 3), epochs=2, batch_size=batch_size, processes=processes, progress=False, **options)
    return weights(pair), run.metrics


def assert_same(found: tuple[Tensor, list[dict[str, float]]], expected: tuple[Tensor, list[dict[str, float]]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    assert len(found[1]) == len(expected[1])
    for row, other in zip(found[1], expected[1], strict=True):
        assert row == pytest.approx(other, rel=1e-12)


def test_two_processes_are_one_where_nothing_is_drawn(tmp_path: Path) -> None:
    """Thirteen data in batches of five: shares of 3 and 2, and 2 and 1; the caller's environment is as before."""
    environment, children = dict(os.environ), threading.active_count()
    found = trained(2, out=tmp_path / "run", free_bits=0.4)
    assert_same(found, trained(1, free_bits=0.4))
    assert dict(os.environ) == environment
    assert threading.active_count() == children
    # The twin: one datum counted twice, or one left out, is seen.
    assert float((found[0] - trained(1, size=12, free_bits=0.4)[0]).abs().max()) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(("size", "batch_size"), [(13, 6), (7, 1), (1, 4)])
def test_an_empty_share_takes_part(processes: int, size: int, batch_size: int) -> None:
    """The last batch of 13 = 6 + 6 + 1, batches of one, and a single datum leave processes with nothing to do."""
    options = {"free_bits": 0.6, "gradient_clip": 0.1, "ema": 0.5, "kl_warmup_epochs": 1.5}
    assert_same(trained(processes, size, batch_size, **options), trained(1, size, batch_size, **options))


@pytest.mark.slow
def test_noise_differs_by_process_and_data_put_aside_are_the_same() -> None:
    """The same data everywhere: with the same noise in both processes, two would give what one gives on half of them."""
    outcomes = []
    for processes, size in ((1, 8), (2, 16)):
        pair = linear_vae()
        x = points(1).expand(size, 5).clone()
        options = {"epochs": 1, "batch_size": size, "processes": processes, "progress": False}
        fit(pair, x, learning_rate=0.1, **options)
        outcomes.append(weights(pair))
    assert float((outcomes[0] - outcomes[1]).abs().max()) > 1e-6


@pytest.mark.slow
def test_several_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    """SIGTERM to the caller: status 143, a checkpoint, and the rest as it would have been."""
    options = {"out": tmp_path / "run", "epochs": 120, "batch_size": 3, "processes": 2, "progress": False}
    started = process(fit_quietly, {**options})
    until = time.monotonic() + 100
    metrics = tmp_path / "run" / "metrics.csv"
    while not (metrics.is_file() and "\n5.0," in metrics.read_text()):
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(started.pid, signal.SIGTERM)
    started.join(30)
    assert started.exitcode == 143
    assert not (tmp_path / "run" / "model").exists()
    for folder, resume in ((tmp_path / "run", True), (tmp_path / "reference", False)):
        again = process(fit_quietly, {**options, "out": folder, "resume": resume})
        again.join(200)
        assert again.exitcode == 0
    names = ["metrics.csv", "model/model.safetensors"]
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes(), name


def fit_quietly(options: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        fit(linear_vae(), points(), **options)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


class Dying(Scalar):
    """Process 1 is killed in its second step."""

    calls = 0

    def guide(self, x: Tensor) -> Tensor:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            Dying.calls += 1
            if Dying.calls == 8:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().guide(x)


class Failing(Scalar):
    """Process 1 raises an error of the user's own."""

    def guide(self, x: Tensor) -> Tensor:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise ZeroDivisionError("in the user's network")
        return super().guide(x)


@pytest.mark.slow
def test_a_process_that_dies_ends_all(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ProcessFailed, match=r"process 1 of 3 died \(SIGKILL\), and the others were ended: .* --resume"):
        fit(Dying(), torch.linspace(0, 1, 60), tmp_path / "run", batch_size=3, processes=3, progress=False)
    assert time.monotonic() - started < 60
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.slow
def test_an_error_in_one_process_is_raised_as_what_it_is(tmp_path: Path) -> None:
    x = torch.linspace(0.5, 2.0, 40)
    x[23] = 10.0
    with pytest.raises(TrainingDiverged, match=r"got nan at site 'z' for datum 23"):
        fit(NanAtNine(), x, batch_size=4, processes=2, progress=False)
    with pytest.raises(TrainingDiverged, match=r"got nan at site 'z' for datum 23 in step 1"):
        fit(NanAtOnce(), x, batch_size=40, processes=2, progress=False)
    with pytest.raises(ProcessFailed, match=r"process 1 of 2 failed with ZeroDivisionError: in the user's network"):
        fit(Failing(), x, processes=2, progress=False)


def test_errors_are_told_apart() -> None:
    """What the launcher makes of a failure, without starting anything."""
    from multiprocessing import get_context

    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    errors = get_context("spawn").SimpleQueue()
    died = ProcessExitedException("", 1, 99, exit_code=-9, signal_name="SIGKILL")
    assert "process 1 of 2 died (SIGKILL)" in str(launching._explained(died, errors, 2))
    left = ProcessExitedException("", 0, 99, exit_code=3)
    assert "process 0 of 2 died (exit status 3)" in str(launching._explained(left, errors, 2))
    raised = ProcessRaisedException("trace", 0, 99)
    for kind in (DataError, StorageError, TrainingDiverged):
        errors.put((0, kind.__name__, "the sentence"))
        found = launching._explained(raised, errors, 2)
        assert type(found) is kind
        assert str(found) == "the sentence"


def test_a_pair_that_cannot_be_sent_is_refused() -> None:
    class Local(Scalar):
        pass

    with pytest.raises(
        ConfigError, match=r"processes: expected a pair and data that can be sent .* at the top of a module"
    ):
        fit(Local(), torch.linspace(0, 1, 8), processes=2, progress=False)
