"""Two states to save, and when two things are the same to the last bit. Raw bytes decide, not `==`."""

import struct
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from inference.training.checkpoints import checkpoint_name, latest_checkpoint, save_checkpoint


class State(NamedTuple):
    """What one checkpoint holds."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]


OLD = State({"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(1)}, {"epoch": 1})
NEW = State({"w": torch.arange(6.0).reshape(2, 3) / 3, "n": torch.tensor(2)}, {"epoch": 2})


def same(left: Any, right: Any) -> bool:
    """Equal in type, shape and every bit, NaN included."""
    if isinstance(left, torch.Tensor):
        if not isinstance(right, torch.Tensor) or (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        raw = [tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in (left, right)]
        return raw[0] == raw[1]
    if isinstance(left, dict):
        pairs = zip(left.items(), right.items(), strict=True) if len(left) == len(right) else [((0, 0), (1, 1))]
        return isinstance(right, dict) and all(same(a, b) and same(x, y) for (a, x), (b, y) in pairs)
    if type(left) is not type(right):
        return False
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return struct.pack("<d", left) == struct.pack("<d", right)
    return left == right


def holds(folder: Path) -> State | None:
    """What a resume would find."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = latest_checkpoint(folder)
    return None if found is None else State(*found[1:])


def is_state(found: State | None, wanted: State | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return same(dict(sorted(wanted.tensors.items())), found.tensors) and same(wanted.values, found.values)


def save(folder: Path, step: int, state: State) -> Path:
    return save_checkpoint(folder, checkpoint_name(step), *state)
