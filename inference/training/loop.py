"""``fit``: trains a pair on data and returns a run, from one process on a CPU to many on GPUs.

Devices, precision and processes are lightning-fabric's; the loop and its checkpoints are ours (:mod:`.trainer`).
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import Dataset, Subset

from inference.bounds.particles import forked_rng
from inference.training.config import ConfigError, TrainConfig, make_config
from inference.training.datasets import DataSet, as_dataset
from inference.training.display import TrainingDisplay
from inference.training.items import first_entry
from inference.training.runs import FORMAT, Run, RunError, description_of, environment, read_metrics, save_model
from inference.training.scaling import DataError, binarize
from inference.training.storage import RunLock, make_folder, read_yaml, sha256, write_json, write_yaml
from inference.training.trainer import TERMINATED, Trainer
from ppl_models.pair import ModelGuidePair


@dataclass  # not frozen: the launcher detaches modules from shared memory in place
class Job:
    """What each process of a run is given."""

    pair: ModelGuidePair
    train: Tensor | Dataset
    validation: Tensor | Dataset
    dynamic: bool
    validation_dynamic: bool
    config: TrainConfig
    folder: Path | None
    resume: bool
    progress: bool


def fit(
    pair: ModelGuidePair,
    data: Any,
    out: Path | str | None = None,
    *,
    config: TrainConfig | None = None,
    resume: bool = False,
    progress: bool = True,
    spec: str | None = None,
    **options: Any,
) -> Run:
    """Trains a pair by stochastic variational inference: maximises the mean ELBO over data.

    KL warm-up, free bits and the like shape the objective; the reported bound is always the plain ELBO.

    Args:
        pair: trained in place.
        data: a data set: :class:`inference.training.DataSet`, a name such as ``"digits"``, or a tensor, array or Dataset.
        out: the RUN folder; None keeps the run in memory only.
        config: a :class:`TrainConfig`; or give its fields as ``options`` (``epochs``, ``batch_size``, ``learning_rate``, ...).
        resume: go on with the run in ``out``, under its own configuration.
        progress: show epochs on stderr.
        spec: what ``data`` was read from, so that the run can read it again; known when ``data`` is a name.
        options: fields of :class:`TrainConfig`.

    Returns:
        :class:`Run`: the trained pair, its configuration and metrics.

    Raises:
        ConfigError: an option out of range.
        DataError: data that the pair's likelihood cannot take, found before the first step.
        RunError: ``out`` holds another run, or one under another configuration.
        RunLocked: another process writes to ``out``.
        TrainingDiverged: a loss or gradient that is not finite; nothing of that step is saved.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=1, guide="mean_field")
        >>> run = fit(pair, pair.model(size=64).detach(), epochs=2, progress=False)
        >>> [int(row["epoch"]) for row in run.metrics]
        [1, 2]
    """
    if config is not None and options:
        raise ConfigError(f"expected either config or options, got both: put {', '.join(options)} into the config")
    config = config or make_config(options)
    spec = data if isinstance(data, str) else spec
    dataset = as_dataset(data)
    _check_device(config)
    _check_fits(pair, dataset)
    dtype = {"32-true": torch.float32, "64-true": torch.float64}.get(config.precision or "", _dtype_of(pair))
    pair.to(dtype)
    train, validation, validation_name = _split(dataset, config)
    stated = {
        "format": FORMAT,
        "pair": description_of(pair),
        "data": {**dataset.describe(), "spec": spec, "sha256": _fingerprint(dataset.train)},
        "validation": validation_name,
        "train": config.model_dump(),
    }
    folder = None if out is None else Path(out)
    dynamic = dataset.binarization == "dynamic"
    validation_dynamic = dynamic and validation is not dataset.test  # held-out data were binarised once
    train, validation = _as_dtype(train, dtype), _as_dtype(validation, dtype)
    job = Job(pair, train, validation, dynamic, validation_dynamic, config, folder, resume, progress)
    if folder is None:
        if resume:
            raise RunError("expected out=FOLDER with resume=True: there is nothing to go on from in memory")
        rows = _launch(job)
        return Run(pair.eval(), stated, rows)
    make_folder(folder)
    with RunLock(folder):
        if _finished(folder, stated, resume):
            from inference.training.runs import load_run

            return load_run(folder, pair)
        _launch(job)
        save_model(
            folder, pair, {"epoch": len(read_metrics(folder / "metrics.csv")), "averaged": config.ema is not None}
        )
        return Run(pair.eval(), stated, read_metrics(folder / "metrics.csv"), folder)


def _launch(job: Job) -> list[dict[str, float]]:
    """Runs the job in as many processes as asked for, and brings the trained weights back."""
    from lightning_fabric import Fabric

    many = job.config.processes > 1
    device = {"cuda": "gpu"}.get(job.config.device, job.config.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        fabric = Fabric(
            accelerator=device,
            devices=job.config.processes,
            strategy="ddp_spawn" if many else "auto",
            precision="bf16-mixed"
            if job.config.precision == "bf16-mixed"
            else "32-true",  # dtypes themselves are set above
        )
    if not many:
        return _work(fabric, job)[1]
    with _forwarding_sigterm():
        try:
            weights, rows = fabric.launch(_work, job)
        except ProcessExitedException as error:
            if error.exit_code == TERMINATED:
                raise SystemExit(TERMINATED) from None
            raise
    job.pair.load_state_dict(weights)
    return rows


@contextmanager
def _forwarding_sigterm() -> Iterator[None]:
    """Passes SIGTERM on to the first process of the run, which saves and leaves; the others end with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: Any) -> None:
        children = sorted(multiprocessing.active_children(), key=lambda child: child.pid or 0)
        if children:
            children[0].terminate()

    previous = signal.signal(signal.SIGTERM, forward)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _work(fabric: Any, job: Job) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """One process's part of a job; returns weights on the CPU and the metrics."""
    with forked_rng():
        pair = job.pair.to(fabric.device)
        batches = -(-len(job.train) // job.config.batch_size)
        display = TrainingDisplay(job.config.epochs, batches, enabled=job.progress and fabric.global_rank == 0)
        trainer = Trainer(
            pair,
            _to_device(job.train, fabric.device),
            _to_device(job.validation, fabric.device),
            job.config,
            dynamic=job.dynamic,
            validation_dynamic=job.validation_dynamic,
            folder=job.folder,
            display=display,
            autocast=fabric.autocast,
            rank=fabric.global_rank,
            world=fabric.world_size,
        )
        if job.resume:
            trainer.restore()
        display.message(
            f"training {type(pair).__name__} ({sum(p.numel() for p in trainer.parameters):,} parameters) on {len(job.train)} "
            f"data, validating on {len(job.validation)}; {fabric.world_size} x {fabric.device.type}"
        )
        try:
            trainer.run()
        finally:
            display.close()
        if trainer.model is not pair:
            pair.load_state_dict(trainer.model.state_dict())
    return {name: t.detach().cpu() for name, t in pair.state_dict().items()}, trainer.rows


def _finished(folder: Path, stated: dict[str, Any], resume: bool) -> bool:
    """Prepares the folder for a new or resumed run; True where the run in it has already ended."""
    config = folder / "config.yaml"
    if not config.is_file():
        if resume and any(folder.glob("checkpoints/*")):
            raise RunError(f"{folder} has checkpoints but no config.yaml: it is not a run that can be resumed")
        write_yaml(config, stated)
        write_json(folder / "environment.json", environment())
        return False
    recorded = read_yaml(config)
    if not resume:
        raise RunError(f"{folder} already holds a run: go on with --resume (resume=True), or choose another folder")
    differing = _differences(recorded, stated)
    if differing:
        raise RunError(
            f"{folder} was started under another configuration ({'; '.join(differing)}): resume with the same, "
            "or train into another folder"
        )
    return (folder / "model" / "config.json").is_file()


def _differences(recorded: dict[str, Any], stated: dict[str, Any], place: str = "") -> list[str]:
    found = []
    for key in sorted(recorded.keys() | stated.keys()):
        a, b = recorded.get(key), stated.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{place}{key}.")
        elif a != b:
            found.append(f"{place}{key} was {a}, is {b}")
    return found


def _check_fits(pair: ModelGuidePair, dataset: DataSet) -> None:
    """Refuses data that the pair cannot take, before anything is written."""
    if dataset.data_shape != pair.data_shape:
        raise DataError(
            f"train: expected data of shape [N, {', '.join(map(str, pair.data_shape))}] for this pair, got "
            f"[N, {', '.join(map(str, dataset.data_shape))}]; reshape the data or build the pair for them"
        )
    for name, part in (("train", dataset.train), ("test", dataset.test)):
        if part is not None:
            x = (
                part
                if isinstance(part, Tensor)
                else torch.stack([first_entry(part[i]) for i in range(min(64, len(part)))])
            )
            grey = dataset.binarization == "dynamic" and name == "train"
            pair.check_data(binarize(x, torch.Generator(x.device).manual_seed(0)) if grey else x, name)


def _check_device(config: TrainConfig) -> None:
    if config.device in ("cuda", "gpu") and not torch.cuda.is_available():
        raise ConfigError(f"device: expected a CUDA device for {config.device!r}, found none; use auto or cpu")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: expected an Apple GPU for 'mps', found none; use auto or cpu")


def _dtype_of(pair: ModelGuidePair) -> torch.dtype:
    return next((p.dtype for p in pair.parameters()), torch.get_default_dtype())


def _as_dtype(data: Any, dtype: torch.dtype) -> Any:
    return data.to(dtype) if isinstance(data, Tensor) and data.is_floating_point() else data


def _split(dataset: DataSet, config: TrainConfig) -> tuple[Any, Any, str]:
    """Training data, validation data, and what the latter are."""
    if config.validation_fraction == 0:
        if dataset.test is None:
            return dataset.train, dataset.train, "the training data themselves (there are no held-out data)"
        return dataset.train, dataset.test, "the held-out part"
    total = len(dataset.train)
    held = max(1, round(config.validation_fraction * total))
    if held >= total:
        raise ConfigError(
            f"expected validation_fraction to leave training data, got {config.validation_fraction} of {total}"
        )
    order = torch.from_numpy(np.random.default_rng(config.seed).permutation(total))
    if isinstance(dataset.train, Tensor):
        kept, aside = dataset.train[order[held:]], dataset.train[order[:held]]
    else:
        kept, aside = Subset(dataset.train, order[held:].tolist()), Subset(dataset.train, order[:held].tolist())
    return kept, aside, f"{held} of the training data, put aside"


def _to_device(data: Any, device: torch.device) -> Any:
    """Keeps tensors on the device when they take less than half of its free memory; batches move one by one otherwise."""
    if not isinstance(data, Tensor) or device.type == "cpu":
        return data
    if device.type == "cuda" and data.numel() * data.element_size() > torch.cuda.mem_get_info(device)[0] // 2:
        return data
    return data.to(device)


def _fingerprint(data: Tensor | Dataset) -> str | None:
    if not isinstance(data, Tensor):
        return None
    return sha256(data.detach().cpu().contiguous().numpy().tobytes())
