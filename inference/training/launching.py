"""Runs a training job in one process or in several, on the devices asked for.

Devices, precision and the start of processes are lightning-fabric's. What several processes must agree on is settled here:

- SIGTERM and Ctrl-C reach the processes through the first one: all leave after the same step, once it is saved.
- An error in one process ends all, and is raised in the caller as what it was.
- A process that dies ends all; the error names it.

The one constraint: several processes are spawned, so that the pair must be one that Python can pickle.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.utils.data import Dataset

from inference.bounds.particles import forked_rng
from inference.bounds.sites import PairError
from inference.training.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from inference.training.config import ConfigError, TrainConfig
from inference.training.display import TrainingDisplay
from inference.training.divergence import TrainingDiverged
from inference.training.evaluation import too_few_draws
from inference.training.inputs import Inputs
from inference.training.interrupts import TERMINATED, StopRequest
from inference.training.objectives import NotReparameterizedError, PrecisionError
from inference.training.processes import LostProcessError, leave_together
from inference.training.records import Records
from inference.training.scaling import DataError
from inference.training.states import flatten_state, restore_state
from inference.training.storage import StorageError
from inference.training.trainer import Trainer
from ppl_models.diffusion import Diffusion
from ppl_models.pair import ModelGuidePair

RESULT = "result"
SECONDS_FOR_OTHERS = 20.0
MAX_MESSAGE = 10_000  # what a pipe holds for sure

_ERRORS = {
    kind.__name__: kind
    for kind in (
        CheckpointError,
        ConfigError,
        DataError,
        NotReparameterizedError,
        PairError,
        PrecisionError,
        StorageError,
        TrainingDiverged,
    )
}


class ProcessFailed(RuntimeError):
    """One of several processes died or failed; the message names it."""


@dataclass  # not frozen: the launcher detaches modules from shared memory in place
class Job:
    """What each process of a run is given."""

    pair: ModelGuidePair
    inputs: Inputs
    config: TrainConfig
    folder: Path | None
    resume: bool
    progress: bool


def launch(job: Job) -> list[dict[str, float]]:
    """Trains ``job.pair`` in place, in as many processes as asked for.

    Returns:
        The metrics, a row an epoch.

    Raises:
        ConfigError: devices that there are not, or a pair that cannot be sent to several processes.
        ProcessFailed: one of several processes died, or failed with an error that is none of ours.
        SystemExit: with status 143 after SIGTERM, once a checkpoint is written.
        KeyboardInterrupt: after Ctrl-C, likewise.
        TrainingDiverged, DataError, StorageError, ...: see :func:`inference.fit`.
    """
    if job.config.processes == 1:
        return _work(_fabric(job.config), job)
    # The result comes back in a file: a pipe would fill up before the launcher, which waits for the process, reads it.
    with tempfile.TemporaryDirectory() as folder:
        _launch_several(job, Path(folder))
        result = restore_state(*load_checkpoint(Path(folder) / f"{RESULT}.safetensors"))
    job.pair.load_state_dict(result["weights"])
    return result["rows"]


def _launch_several(job: Job, result: Path) -> None:
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    before = set(multiprocessing.active_children())

    def pass_on() -> None:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()

    stop = StopRequest(pass_on)
    try:
        with _environment_kept(), stop.listening():
            _fabric(job.config).launch(_work_as_one_of_several, job, result, errors, torch.get_default_dtype())
    except (ProcessExitedException, ProcessRaisedException) as failure:
        if stop.asked:
            stop.leave()
        if getattr(failure, "exit_code", None) == TERMINATED:  # a process was told to end, not this one
            raise SystemExit(TERMINATED) from None
        raise _explained(failure, errors, job.config.processes) from failure
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if "pickle" not in str(error):
            raise
        raise ConfigError(
            f"processes: expected a pair and data that can be sent to other processes, got {error}; define their classes "
            "at the top of a module, or use one process"
        ) from error


def _work_as_one_of_several(fabric: Any, job: Job, result: Path, errors: Any, dtype: torch.dtype) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the caller passes it on in order
    torch.set_default_dtype(dtype)
    try:
        rows = _work(fabric, job)
        if fabric.global_rank == 0:
            save_checkpoint(result, RESULT, *flatten_state({"weights": dict(job.pair.state_dict()), "rows": rows}))
        leave_together()
    except SystemExit:
        leave_together()
        raise
    except LostProcessError:
        time.sleep(
            SECONDS_FOR_OTHERS
        )  # the launcher ends this process, too, and should first see the one that is to blame
        raise
    except Exception as error:
        errors.put((fabric.global_rank, type(error).__name__, str(error)[:MAX_MESSAGE]))
        raise


def _work(fabric: Any, job: Job) -> list[dict[str, float]]:
    """One process's part of a job, with ``job.pair`` trained in place; returns the metrics."""
    first = fabric.global_rank == 0
    job.inputs.train, job.inputs.validation = (
        _on_device(data, fabric.device) for data in (job.inputs.train, job.inputs.validation)
    )
    with forked_rng():
        batches = -(-len(job.inputs.rows) // job.config.batch_size)
        shown = job.progress and first
        doubt = too_few_draws(job.pair, len(job.inputs.validation_rows))
        if doubt and first:
            warnings.warn(doubt, stacklevel=4)
        units = not isinstance(job.pair, Diffusion)
        display = TrainingDisplay(job.config.epochs, batches, shown, units, job.pair.bounds_evidence)
        records = Records(job.folder, writes=first, tensorboard=job.config.tensorboard)
        trainer = Trainer(
            job.pair.to(fabric.device),
            job.inputs,
            job.config,
            records=records,
            display=display,
            autocast=fabric.autocast,
            rank=fabric.global_rank,
            world=fabric.world_size,
        )
        try:
            if job.resume and trainer.restore():
                display.message(f"going on after epoch {trainer.epoch}, step {trainer.batch} of the next")
                if trainer.stopping.has_stopped(trainer.epoch):
                    display.message(f"training has stopped by itself there, as patience={job.config.patience} says")
            display.message(
                f"training {_named(job.pair)} ({sum(p.numel() for p in job.pair.parameters()):,} parameters) on "
                f"{len(job.inputs.rows)} data{_described(job.pair)}, validating on {job.inputs.validation_name}; "
                f"{fabric.world_size} x {fabric.device.type}"
            )
            trainer.run()
        finally:
            display.close()
            records.close()
        if trainer.model is not job.pair:
            job.pair.load_state_dict(trainer.model.state_dict())
    return trainer.rows


def _named(pair: ModelGuidePair) -> str:
    """The pair's kind, and its network's where it is one of several."""
    network = getattr(pair, "network", None)
    return type(pair).__name__ if network is None else f"{type(pair).__name__} with a {type(network).__name__}"


def _described(pair: ModelGuidePair) -> str:
    """Shape and levels of a datum, as the pair takes it."""
    likelihood = getattr(pair, "likelihood", None)
    levels = getattr(likelihood, "levels", None) or getattr(likelihood, "num_classes", None)
    shape = "x".join(map(str, pair.data_shape))
    kind = f" of {levels} {'levels' if hasattr(likelihood, 'levels') else 'classes'}" if levels else ""
    return f" of {shape} numbers{kind}" if shape else ""


def _fabric(config: TrainConfig) -> Any:
    from lightning_fabric import Fabric

    kind, _, index = config.device.partition(":")
    if index and config.processes > 1:
        raise ConfigError(
            f"device: expected {kind!r} with {config.processes} processes, which take one each, got {config.device!r}"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        try:
            return Fabric(
                accelerator="gpu" if kind == "cuda" else kind,
                devices=[int(index)] if index else config.processes,
                strategy="ddp_spawn" if config.processes > 1 else "auto",
                # Dtypes themselves are set on the pair and the data; only autocasting is left to do.
                precision="bf16-mixed" if config.precision == "bf16-mixed" else "32-true",
            )
        except (RuntimeError, ValueError) as error:  # MisconfigurationException is a ValueError
            reason = " ".join(str(error).split())
            raise ConfigError(f"device {config.device!r} with {config.processes} processes: {reason}") from error


def _explained(failure: Any, errors: Any, processes: int) -> Exception:
    """The error that ended several processes, as what it was."""
    if isinstance(failure, ProcessExitedException):
        how = failure.signal_name or f"exit status {failure.exit_code}"
        return ProcessFailed(
            f"process {failure.error_index} of {processes} died ({how}), and the others were ended: look for what ended it "
            "(too little memory, perhaps) and go on from the last checkpoint with --resume"
        )
    if errors.empty():
        return ProcessFailed(str(failure).strip())
    rank, name, message = errors.get()
    if name in _ERRORS:
        return _ERRORS[name](message)
    return ProcessFailed(f"process {rank} of {processes} failed with {name}: {message}")


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Takes out again what the launcher leaves in the environment, such as a port."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _on_device(data: Tensor | Dataset, device: torch.device) -> Tensor | Dataset:
    """Keeps tensors on the device when they take less than half of its free memory; batches move one by one otherwise."""
    if not isinstance(data, Tensor) or device.type == "cpu":
        return data
    if device.type == "cuda" and data.numel() * data.element_size() > torch.cuda.mem_get_info(device)[0] // 2:
        return data
    return data.to(device)
