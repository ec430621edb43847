"""``fit``: trains a pair on data and returns a run, from one process on a CPU to many on GPUs.

The order is: refuse what can be refused, prepare the RUN folder, train, save the model. Devices and processes are in
:mod:`.launching`, the loop and its checkpoints in :mod:`.trainer`.

The one constraint: one writer a folder, under one configuration, on the same data, from the first step to the last.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from inference.training.config import ConfigError, TrainConfig, make_config
from inference.training.data_set import DataSet
from inference.training.datasets import as_dataset
from inference.training.extending import asks_for_more, extend
from inference.training.inputs import fingerprint, prepare_inputs
from inference.training.launching import Job, launch
from inference.training.metrics import check_tensorboard
from inference.training.objective_choice import objective_of, warmup_epochs
from inference.training.runs import (
    FORMAT,
    Run,
    RunError,
    comparable,
    differences,
    environment,
    identity_of,
    load_run,
    save_model,
)
from inference.training.scaling import DataError
from inference.training.storage import RunLock, make_folder
from inference.training.texts import read_yaml, write_json, write_yaml
from ppl_models.pair import ModelGuidePair, refuse_other_than_pair

_DTYPES = {"32-true": torch.float32, "64-true": torch.float64, "bf16-mixed": torch.float32}

_LOG = logging.getLogger(__name__)


def fit(
    pair: ModelGuidePair,
    data: Any,
    out: Path | str | None = None,
    *,
    config: TrainConfig | None = None,
    resume: bool = False,
    progress: bool = True,
    spec: str | None = None,
    scaling: str | None = None,
    binarization: str | None = None,
    levels: int | None = None,
    labels: Any = None,
    **options: Any,
) -> Run:
    """Trains a pair by stochastic variational inference: maximises the mean ELBO over data.

    KL warm-up, free bits and the like shape the objective; the reported bound is always the plain ELBO.

    Args:
        pair: trained in place, in its own dtype or that of ``precision``.
        data: a data set: :class:`inference.training.DataSet`, a name such as ``"digits"``, or a tensor, array or Dataset.
        out: the RUN folder; None keeps the run in memory only.
        config: a :class:`TrainConfig`; or give its fields as ``options`` (``epochs``, ``batch_size``, ``learning_rate``, ...).
        resume: go on with the run in ``out``, under its own configuration or for more epochs; where there is none yet a new one
            begins, which is said in a logged warning.
        progress: show epochs on stderr.
        spec: what ``data`` was read from, so that the run can read it again; known when ``data`` is a name, or comes from
            :func:`load_data`.
        scaling: of a tensor, an array or a Dataset: "none" (as they are), "unit", "symmetric", "classes", "standard" or
            "counts"; by itself integers are classes where the pair's likelihood is over classes, and data counts where it is
            one of counts.
        binarization: of data in [0, 1]: "none", "dynamic" or "fixed".
        levels: number of levels of integer data.
        labels: of a tensor, an array or a Dataset: a whole number a datum, for a pair that is conditioned on labels (a preset
            with ``num_labels``); a data set has its own.
        options: fields of :class:`TrainConfig`. ``seed`` is that of batches and draws; the weights are as the pair has them, so
            seed torch before making it for the same ones again.

    The objective is the pair's own unless stated: ``objective="iwae"``, ``"simple"``, ... ; see
    :mod:`inference.training.objective_choice`.

    Returns:
        :class:`Run`: the trained pair, its configuration and metrics.

    Raises:
        ConfigError: an option out of range.
        DataError: data that the pair's likelihood cannot take, found before the first step.
        RunError: ``out`` holds another run, or one under another configuration.
        RunLocked: another process writes to ``out``.
        TrainingDiverged: a loss or gradient that is not finite; nothing of that step is saved.
        StorageError: the disk is full, say; the last checkpoint is intact.
        ProcessFailed: one of several processes died.
        SystemExit: with status 143 after SIGTERM, KeyboardInterrupt after Ctrl-C: with ``out``, once a checkpoint is written.

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
    refuse_other_than_pair(pair)
    spec = data if isinstance(data, str) else spec
    folder = None if out is None else Path(out)
    _check_config(config, folder, resume)
    objective_of(pair, config)
    warmup_epochs(config, pair)
    likelihood = getattr(pair, "likelihood", None)
    if scaling is None and _is_integer(data) and getattr(likelihood, "scaling", None) == "classes":
        scaling, levels = "classes", levels or likelihood.num_classes  # type: ignore[union-attr]
    if scaling is None and getattr(likelihood, "takes_counts", False) and not isinstance(data, str | DataSet):
        scaling = "counts"
    dataset = as_dataset(data, scaling=scaling, binarization=binarization, levels=levels, labels=labels)
    if labels is not None and pair.num_labels is None:
        raise DataError(
            "labels: expected a pair that is conditioned on them, as a preset with num_labels=K, got one that would not read "
            "them; leave them out, or make it so"
        )
    spec = dataset.spec if spec is None else spec
    dtype = _DTYPES.get(config.precision or "", _dtype_of(pair))
    inputs = prepare_inputs(pair, dataset, config, dtype)
    stated = {
        "format": FORMAT,
        **identity_of(pair),
        "dtype": str(dtype).removeprefix("torch."),
        "data": {**dataset.describe(), "spec": spec, "sha256": fingerprint(dataset, pair.num_labels is not None)},
        "validation": inputs.validation_name,
        "train": config.model_dump(),
    }
    job = Job(pair, inputs, config, folder, resume, progress)
    if folder is None:
        pair.to(dtype)
        rows = launch(job)
        return Run(pair.eval(), stated, rows)
    make_folder(folder)
    with RunLock(folder):
        if _is_finished(folder, stated, resume):
            return load_run(folder, pair)
        pair.to(dtype)
        rows = launch(job)
        save_model(folder, pair, {"epoch": len(rows), "averaged": config.ema is not None})
        return Run(pair.eval(), stated, rows, folder)


def _is_integer(data: Any) -> bool:
    """Whether data are a tensor or an array of integers."""
    if isinstance(data, torch.Tensor):
        return not data.is_floating_point()
    return getattr(getattr(data, "dtype", None), "kind", "") in ("u", "i")


def _is_finished(folder: Path, stated: dict[str, Any], resume: bool) -> bool:
    """Prepares the folder for a new or resumed run; True where the run in it has already ended."""
    config = folder / "config.yaml"
    if not config.is_file():
        left = [name for name in ("checkpoints", "metrics.csv", "model") if (folder / name).exists()]
        if left:
            raise RunError(
                f"{folder} holds {left[0]} but no config.yaml, so nothing says what run it is of: choose another folder"
            )
        if resume:
            _LOG.warning("%s holds no run to resume: a new one begins", folder)
        write_json(folder / "environment.json", environment())
        write_yaml(config, stated)
        return False
    if not resume:
        raise RunError(f"{folder} already holds a run: go on with --resume (resume=True), or choose another folder")
    recorded = read_yaml(config)
    differing = differences(*comparable(recorded, stated))
    more = asks_for_more(recorded, stated)
    if more:  # which is allowed
        differing = [each for each in differing if not each.startswith("train.epochs ")]
    if more and not differing:
        extend(folder, recorded, stated["train"]["epochs"])
        _LOG.warning(
            "%s goes on to epoch %d, where it had %d", folder, stated["train"]["epochs"], recorded["train"]["epochs"]
        )
    elif differing:
        raise RunError(
            f"{folder} was started under another configuration ({'; '.join(differing)}): resume with the same, or with more "
            "epochs, or train into another folder"
        )
    return (folder / "model" / "config.json").is_file()


def _check_config(config: TrainConfig, out: Path | None, resume: bool) -> None:
    if resume and out is None:
        raise RunError("expected out=FOLDER with resume=True: there is nothing to go on from in memory")
    if config.tensorboard:
        check_tensorboard(out)
    if config.device.startswith(("cuda", "gpu")) and not torch.cuda.is_available():
        raise ConfigError(f"device: expected a CUDA device for {config.device!r}, found none; use auto or cpu")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: expected an Apple GPU for 'mps', found none; use auto or cpu")


def _dtype_of(pair: ModelGuidePair) -> torch.dtype:
    """The dtype of the parameters that are to be trained."""
    parameter = next((p for p in pair.parameters() if p.requires_grad), None)
    if parameter is None:
        raise ConfigError("expected a pair with parameters to train, got none that requires a gradient")
    return parameter.dtype
