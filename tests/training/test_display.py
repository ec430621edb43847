"""What a run shows: plain lines where stderr is no terminal, one line drawn over and over where it is."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from inference import fit
from inference.training import display
from inference.training.display import HEADER, TrainingDisplay, metrics_line
from ppl_models import DDPM
from ppl_models.likelihoods import Normal
from tests.training.training_pairs import linear_vae, points

ROW = {
    "epoch": 1.0,
    "train_elbo": -10.5,
    "validation_elbo": -11.0,
    "validation_std_error": 0.1,
    "validation_rate": 4.0,
    "validation_distortion": 7.0,
    "validation_bits_per_dim": 0.25,
    "active_units": 5.0,
}


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a short run: what is trained on what, the first epoch, and the last."""
    run = fit(linear_vae(), points(), epochs=4, batch_size=10, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[0].startswith(
        "training VAE (30 parameters) on 37 data of 5 numbers, validating on the training data themselves"
    )
    assert lines[1] == "uncompiled: 16 steps, and compiling pays from 40,000; compile=on compiles all the same"
    assert lines[2] == HEADER
    for line, row in zip(lines[3:], (run.metrics[0], run.metrics[-1]), strict=True):
        place, train, valid, error, rate, distortion, bits, active, speed, left = line.split()
        assert place == f"{int(row['epoch'])}/4"
        assert [float(train), float(valid), float(error), float(rate), float(distortion)] == pytest.approx(
            [
                row[f"validation_{n}"] if n != "train" else row["train_elbo"]
                for n in ("train", "elbo", "std_error", "rate", "distortion")
            ],
            abs=0.00501,
        )
        assert float(bits) == pytest.approx(row["validation_bits_per_dim"], abs=0.000501)
        assert int(active) == row["active_units"]
        assert float(speed) > 0
        assert re.fullmatch(r"\d+:\d\d", left)
    assert lines[-1].endswith(" 0:00")
    assert max(map(len, lines[1:])) <= 100


def test_a_diffusion_has_no_units_to_count(capsys: pytest.CaptureFixture[str]) -> None:
    pair = DDPM.preset((2,), Normal(), num_timesteps=3, hidden=4, blocks=1)
    fit(pair, torch.randn(20, 2), epochs=1, progress=True)
    assert capsys.readouterr().err.splitlines()[3].split()[-3] == "-"


def test_nothing_is_shown_when_not_asked(capsys: pytest.CaptureFixture[str]) -> None:
    fit(linear_vae(), points(), epochs=2, progress=False)
    assert capsys.readouterr() == ("", "")


def test_columns_stand_under_their_names() -> None:
    line = metrics_line(ROW, 10, 120.0, 61.0)
    columns = {
        "valid ELBO": "-11.00",
        "rate": "4.00",
        "distortion": "7.00",
        "active": "5",
        "it/s": "120",
        "left": "1:01",
    }
    for name, value in columns.items():
        assert HEADER.index(name) + len(name) == line.rindex(value) + len(value), name
    assert len(line) == len(HEADER)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


def test_a_long_epoch_says_how_far_it_is(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = TrainingDisplay(epochs=2, batches=100)
    for batch in range(1, 31):
        clock.now += 1.0
        shown.step(1, batch)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "epoch 1/2, step 5/100, 1 it/s, 3:15 left"
    assert len(lines) == 6


def test_epochs_between_are_shown_every_few_seconds_and_the_last_once(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = TrainingDisplay(epochs=9, batches=1)
    for epoch in range(1, 10):
        clock.now += 2.0
        shown.step(epoch, 1)
        shown.epoch({**ROW, "epoch": float(epoch)})
    shown.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if re.match(r"\d+/9 ", line)]
    assert [line.split()[0] for line in lines] == ["1/9", "4/9", "7/9", "9/9"]


ON_A_TERMINAL = """
from inference.training.display import TrainingDisplay
shown = TrainingDisplay(epochs=3, batches=2)
shown.message("training")
for epoch in range(1, 4):
    shown._drawn_at = -1.0
    shown.step(epoch, 1)
    shown.epoch({**ROW, "epoch": float(epoch)})
shown.close()
"""


def test_on_a_terminal_one_line_is_drawn_over_and_over() -> None:
    """On a pseudo-terminal: the line shows each epoch and the step, and what remains is the last epoch."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", f"ROW = {ROW}\n{ON_A_TERMINAL}"]
    with subprocess.Popen(command, stdin=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}):
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # raised once the other end is closed
            while part := os.read(ours, 65536):
                text += part
    os.close(ours)
    plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", text).decode()
    for expected in ("training", "epoch 1/3, step 1/2", "epoch 2/3, step 1/2", "1/3  ", "2/3  "):
        assert expected in plain
    assert b"\x1b[" in text
    assert plain.rstrip().splitlines()[-1].startswith("3/3")


def test_the_streams_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def __init__(self) -> None:
            self.text = ""

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return True

    before: Any = sys.stdout
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fit(linear_vae(), points(), epochs=2, progress=True)
    assert sys.stderr is terminal
    assert sys.stdout is before
    assert "2/2" in terminal.text
