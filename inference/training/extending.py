"""More epochs for a run: when its steps so far are those of a longer run, and what has to go before it is one.

A run that is given more epochs must end where one of that length would have ended, or nothing could be said of it. With a
constant learning rate and temperature nothing in a step depends on how many are to come; with a schedule everything does. One
thing may differ, by rounding: whether ``compile="auto"`` pays is asked of the whole run, so a longer one may be compiled from
its start.

Constraint: a finished run is never left without weights. Its model goes only once a checkpoint has been read back whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inference.training.checkpoints import CheckpointError, latest_checkpoint
from inference.training.runs import RunError
from inference.training.storage import remove_durably
from inference.training.texts import read_json, write_yaml

__all__ = ["asks_for_more", "extend"]


def asks_for_more(recorded: dict[str, Any], stated: dict[str, Any]) -> bool:
    """Whether ``stated`` has more epochs than ``recorded``; both as in config.yaml.

    Example:
        >>> asks_for_more({"train": {"epochs": 10}}, {"train": {"epochs": 20}})
        True
    """
    before, after = (config["train"].get("epochs") for config in (recorded, stated))
    return isinstance(before, int) and after > before


def extend(folder: Path, recorded: dict[str, Any], epochs: int) -> None:
    """Makes the run in ``folder`` one of ``epochs`` epochs that is not finished yet.

    Args:
        folder: the RUN folder, locked.
        recorded: its config.yaml, which differs from what is asked for in nothing else.
        epochs: more than it has.

    Raises:
        RunError: the steps already taken belong to a run of the old length, or training has stopped by itself.
        CheckpointError: no checkpoint is intact, so that there is nothing to go on from; the model is left alone.
    """
    train = recorded["train"]
    course = _laid_out_over_the_run(train)
    if course:
        raise RunError(
            f"{folder}: expected a constant learning rate and temperature to go on for more epochs ({train['epochs']} to "
            f"{epochs}), got {course}, which is laid out over the whole run: begin a new run with its weights, --start-from "
            f"{folder}"
        )
    model = folder / "model" / "config.json"
    if model.is_file():
        done = read_json(model).get("epoch")
        if isinstance(done, int) and done < train["epochs"]:
            raise RunError(
                f"{folder}: training stopped by itself after epoch {done} of {train['epochs']}, as patience="
                f"{train.get('patience')} says, so more epochs would not be taken: begin a new run with its weights, "
                f"--start-from {folder}"
            )
        if latest_checkpoint(folder / "checkpoints") is None:
            raise CheckpointError(
                f"{folder} has no checkpoint to go on from: begin a new run with its weights, --start-from {folder}"
            )
        remove_durably(model)  # first: from here on the run counts as unfinished, and is read from its checkpoint
        remove_durably(model.with_name("model.safetensors"))
    write_yaml(folder / "config.yaml", {**recorded, "train": {**train, "epochs": epochs}})


def _laid_out_over_the_run(train: dict[str, Any]) -> str:
    """The option whose meaning depends on the number of epochs, in words; empty where there is none."""
    if train.get("schedule", "constant") != "constant":
        return f"schedule={train['schedule']!r}"
    return "" if train.get("temperature_end") is None else f"temperature_end={train['temperature_end']}"
