"""Training runs that are cut off: in processes of their own, forked from one that has everything imported.

A kill point is the n-th call of a Python function, counted from the start of ``fit``: so a process dies anywhere, in a step,
in an evaluation or in the middle of writing a checkpoint, and it dies there again when asked to.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from inference import fit
from inference.training.datasets import as_dataset
from tests.training.training_pairs import Scalar, SlowItems, grey_points, linear_vae, noisy_vae, points

FULL: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 8,
    "learning_rate": 0.03,
    "schedule": "cosine",
    "warmup_steps": 3,
    "gradient_clip": 1.0,
    "ema": 0.7,
    "kl_warmup_epochs": 2.5,
    "free_bits": 0.05,
    "validation_fraction": 0.2,
    "patience": 2,
    "num_particles": 2,
}
PLAIN: dict[str, Any] = {"epochs": 3, "batch_size": 8, "optimizer": "adamw", "weight_decay": 0.1}


def train(folder: Path, kind: str, *, resume: bool = False, **options: Any) -> Any:
    """One run: ``full`` has every option and a network with noise of its own, ``plain`` next to none."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if kind == "full":
        pair, data = noisy_vae(), as_dataset(grey_points(), scaling="unit", binarization="dynamic")
        options = {**FULL, **options}
    elif kind == "slow":
        pair, data = Scalar(), SlowItems(150, folder.with_suffix(".reading"))
        options = {"epochs": 2, "batch_size": 20, **options}
    else:
        pair, data = linear_vae(), as_dataset(points(), test=points()[:9])
        options = {**PLAIN, **options}
    return fit(pair, data, folder, resume=resume, progress=False, **options)


def train_until(call: int | None, folder: Path, kind: str, options: dict[str, Any]) -> None:
    """Trains and dies by SIGKILL at a call; None counts the calls and writes how many there are beside the run."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event == "call":
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    train(folder, kind, resume=folder.exists(), **options)
    sys.setprofile(None)
    folder.with_suffix(".calls").write_text(str(calls))


def train_quietly(folder: Path, kind: str, options: dict[str, Any]) -> None:
    """Trains; an interrupt shows in the exit status alone: 130 after Ctrl-C."""
    try:
        train(folder, kind, resume=folder.exists(), **options)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def process(target: Any, *args: Any) -> Any:
    """A started process, forked from a server that has imported what is needed."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.interrupted_runs", "inference.training.loop", "lightning_fabric"])
    started = context.Process(target=target, args=args)
    started.start()
    return started


def outcome(folder: Path) -> dict[str, bytes]:
    """All that two equal runs have in common, bit for bit: metrics, weights, and the last checkpoint's whole state."""
    last = max((folder / "checkpoints").glob("step-*.safetensors"))
    names = [folder / "metrics.csv", folder / "model" / "model.safetensors", last]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}
