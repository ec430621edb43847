"""A RUN: the folder that holds everything of one training run, and loads again without surprises.

    config.yaml        what was trained on what and how, as text
    options.yaml       what ppl train was told and chose: a file for its --config
    environment.json   versions and hardware
    metrics.csv        one row an epoch; nats per datum unless the name ends in _bits_per_dim
    timing.csv         seconds and speed, apart, because they differ from run to run
    checkpoints/       everything needed to go on bit for bit
    model/             config.json (description and hash) and model.safetensors (weights)
    terms.json posterior.nc figures/ report.html       what other commands wrote

Weights are safetensors and JSON; nothing is unpickled, and a description can only name this library's own parts.
"""

from __future__ import annotations

import platform
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.bounds.particles import forked_rng
from inference.training.checkpoints import CheckpointError, latest_checkpoint
from inference.training.datasets import DataSet, load_data
from inference.training.divergence import first_bad_parameter
from inference.training.metrics import read_metrics
from inference.training.standardizing import Standardization
from inference.training.states import restore_state
from inference.training.storage import StorageError, make_folder, read_bytes, sha256, write_atomic
from inference.training.texts import ContentError, read_json, read_yaml, write_json
from ppl_models.pair import ModelGuidePair
from ppl_models.registry import UnknownPartError, build, describe, outline

FORMAT = 1


class RunError(ValueError):
    """A folder that is no run, or a run that cannot be loaded or continued as asked."""


@dataclass(frozen=True)
class Run:
    """A trained pair with its configuration and metrics.

    ``metrics`` is one dict an epoch: ``epoch``, ``step``, ``learning_rate``, ``rate_weight``, ``train_*`` and
    ``validation_*`` with ``elbo``, ``rate``, ``distortion`` (nats per datum), ``bits_per_dim``, ``rate_bits_per_dim`` and
    ``distortion_bits_per_dim``, and ``active_units``.
    ``learning_rate`` and ``rate_weight`` are those of the epoch's last step. ``config`` has the keys ``pair``, ``dtype``,
    ``data``, ``train`` and ``validation``. ``unfinished`` says how far a run that has not ended got, whose weights and metrics
    are those of its last checkpoint; it is empty for others.
    """

    pair: ModelGuidePair
    config: dict[str, Any]
    metrics: list[dict[str, float]] = field(default_factory=list)
    folder: Path | None = None
    unfinished: str = ""

    def data(self) -> DataSet:
        """The run's data, read again from where they came.

        Raises:
            RunError: the data were handed over in memory, so there is nothing to read them from.
        """
        stated = self.config["data"]
        if stated.get("spec") is None:
            raise RunError(
                "this run was trained on data in memory: pass the data themselves, as in run.pair and your tensor, or on the "
                "command line say where they are with --data"
            )
        return load_data(
            stated["spec"],
            scaling=stated["scaling"],
            binarization=stated["binarization"],
            test_fraction=stated.get("test_fraction"),
            columns=stated.get("columns"),
        )

    def in_own_units(self, x: Tensor) -> Tensor:
        """Values of standardised data, such as samples, in the units that the data came in; other values as they are."""
        standardization = self.standardization
        return x if standardization is None else standardization.inverse(x)

    @property
    def standardization(self) -> Standardization | None:
        """What was done to the data with scaling "standard"; None otherwise."""
        stated = self.config["data"].get("standardization")
        return None if stated is None else Standardization.from_description(stated)


def load_run(folder: Path | str, pair: ModelGuidePair | None = None) -> Run:
    """A run from its folder; of one that was stopped, the weights of its last checkpoint.

    Args:
        folder: the RUN folder.
        pair: only for pairs with networks of your own, which a file cannot rebuild: the same pair, whose weights are
            then overwritten.

    Raises:
        RunError: not a run, or a pair is needed and none was given, or the one given was made in another way.
        CheckpointError: weights that are damaged or do not belong to the description.
        UserWarning: the run is unfinished; the message says how far it got.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise RunError(
            f"expected a RUN folder with a config.yaml, got {folder}: train one with ppl train ... --out {folder}"
        )
    config = read_yaml(folder / "config.yaml")
    if config.get("format") != FORMAT:
        raise RunError(
            f"{folder}/config.yaml: expected format {FORMAT}, got {config.get('format')!r}: read it with the version of "
            "ppl-models that wrote it"
        )
    description = config.get("pair")
    if pair is None:
        if description is None:
            raise RunError(
                f"{folder} holds a pair with networks of its own: pass it, as in load_run({str(folder)!r}, pair=...)"
            )
        pair = _rebuild(description, folder)
    else:
        differing = differences(*comparable(config, identity_of(pair)))
        if differing:
            raise RunError(
                f"{folder} holds another pair than the one passed ({'; '.join(differing)}): its weights would mean something "
                "else there; pass a pair made as that one was"
            )
    state = _unfinished_state(folder)
    tensors = _read_weights(folder) if state is None else _weights_in(state)
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    pair = pair.to(dtype) if dtype is not None else pair
    try:
        pair.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/model: the weights do not fit the pair: {str(error).splitlines()[-1].strip()}"
        ) from None
    model = folder / "model" / "config.json"
    if model.is_file() and read_json(model).get("pair") != description:
        raise RunError(
            f"{folder}: config.yaml and model/config.json describe different pairs, so one of them was changed after "
            "training: restore it from a copy"
        )
    pair.eval()
    if state is None:
        return Run(pair, config, read_metrics(folder / "metrics.csv"), folder)
    return Run(pair, config, state["rows"], folder, _how_far(state, config["train"]["epochs"]))


def save_model(folder: Path, pair: ModelGuidePair, info: dict[str, Any]) -> None:
    """Writes ``model/``: the weights, then the description with their hash; each file atomically."""
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in pair.state_dict().items()}
    bad = first_bad_parameter(pair)
    if bad:
        raise CheckpointError(f"expected finite parameters, got a NaN or infinity in {bad}: the model is not saved")
    data = save(tensors)
    make_folder(folder / "model")
    write_atomic(folder / "model" / "model.safetensors", data)
    write_json(folder / "model" / "config.json", {"pair": description_of(pair), "sha256": sha256(data), **info})


def description_of(pair: ModelGuidePair) -> dict[str, Any] | None:
    """The pair's description, or None where it holds networks that are not this library's."""
    try:
        return describe(pair)
    except UnknownPartError:
        return None


def identity_of(pair: ModelGuidePair) -> dict[str, Any]:
    """What a run records of its pair: a description, or, for networks of one's own, an outline to know it again by."""
    description = description_of(pair)
    return {"pair": description, "outline": outline(pair) if description is None else None}


def comparable(recorded: dict[str, Any], stated: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both, restricted to what ``stated`` names and to what numbers depend on.

    Runs of older versions have no outline, and are compared without. Data read by a name and the same data handed over are
    the same: their hash is compared.
    """
    keys = [key for key in stated if key in recorded or key != "outline"]
    named = recorded.get("data")
    if isinstance(named, dict) and "columns" not in named and isinstance(stated.get("data"), dict):
        newer = ("columns", "label_names")  # which runs of older versions do not say
        stated = {**stated, "data": {key: value for key, value in stated["data"].items() if key not in newer}}
    return tuple({key: _essence(key, config.get(key)) for key in keys} for config in (recorded, stated))  # type: ignore[return-value]


def _essence(key: str, value: Any) -> Any:
    idle = {"train": ("checkpoint_seconds", "tensorboard"), "data": ("spec",)}.get(key, ())
    return {k: v for k, v in value.items() if k not in idle} if isinstance(value, dict) else value


def differences(recorded: Any, stated: Any, place: str = "") -> list[str]:
    """Where two nests of dicts and plain values differ, in words."""
    if not (isinstance(recorded, dict) and isinstance(stated, dict)):
        return [] if recorded == stated else [f"{place} was {recorded}, is {stated}"]
    keys = sorted(recorded.keys() | stated.keys())
    return [
        text
        for key in keys
        for text in differences(recorded.get(key), stated.get(key), f"{place}.{key}" if place else key)
    ]


def environment() -> dict[str, Any]:
    """Versions and hardware, for the record."""
    import importlib.metadata

    versions = {name: importlib.metadata.version(name) for name in ("torch", "pyro-ppl", "numpy", "lightning-fabric")}
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _rebuild(description: Any, folder: Path) -> ModelGuidePair:
    """The pair that a description names, with fresh weights and the caller's random state as it was."""
    try:
        with forked_rng():
            pair = build(description)
    # A description is foreign text: whatever a constructor says to it, it is the text that is wrong.
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise RunError(f"{folder}/config.yaml does not describe a pair of this library: {error}") from None
    if not isinstance(pair, ModelGuidePair):
        raise RunError(f"{folder}/config.yaml describes a {type(pair).__name__}: expected a pair of model and guide")
    return pair


def _unfinished_state(folder: Path) -> dict[str, Any] | None:
    """The state in the last checkpoint of a run that has no model yet, with a word on how far it got; None of one that has.

    Raises:
        RunError: there is neither a model nor a checkpoint.
    """
    if (folder / "model" / "model.safetensors").is_file():
        return None
    found = latest_checkpoint(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    if found is None:
        raise RunError(f"{folder} has no model yet: its training has not reached a checkpoint")
    state = restore_state(found[1], found[2])
    warnings.warn(
        f"{folder} is an unfinished run: these are its weights {_how_far(state)}; --resume (or fit(..., resume=True)) goes on "
        "with it",
        stacklevel=3,
    )
    return state


def _how_far(state: dict[str, Any], epochs: int | None = None) -> str:
    """How far a checkpoint's run had got, in words."""
    of_all = "" if epochs is None else f" of {epochs}"
    return f"after epoch {state['epoch']}{of_all}" + (
        f" and {state['batch']} steps of the next" if state["batch"] else ""
    )


def _weights_in(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint's state, averaged ones where there are any."""
    average = state["optimization"]["average"]
    if average is None:
        return state["optimization"]["weights"]
    return {name.removeprefix("module."): tensor for name, tensor in average.items() if name.startswith("module.")}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / "model" / "model.safetensors"
    data = read_bytes(path)
    try:
        recorded = read_json(folder / "model" / "config.json").get("sha256")
    except (ContentError, StorageError) as error:
        raise CheckpointError(f"{folder}/model/config.json cannot be read: {error}") from None
    if sha256(data) != recorded:
        raise CheckpointError(
            f"{path}: expected SHA-256 {recorded}, got {sha256(data)}: the file is damaged; train again"
        )
    try:
        return load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
