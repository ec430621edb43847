"""Data sets of the Hugging Face hub, or of a folder laid out like one: ``hf:NAME``, or ``hf:NAME@CONFIG``.

One column is the data: the one of images, or else the one of arrays of numbers of one shape; a single column of class labels
is taken along. Split as the set is: "train", and "test" held out where there is one.

The one constraint: the package ``datasets`` does the loading (the extra ``hf``), and no code that comes with a set is run.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from inference.training.images import IN_MEMORY_VALUES
from inference.training.scaling import DataError
from inference.training.sources import Source

_ARRAYS = ("List", "LargeList", "Sequence", "Array2D", "Array3D", "Array4D", "Array5D")
_MODES = {"L": "grey", "RGB": "coloured"}


class Rows(Dataset[Tensor]):
    """One column as tensors of one shape, read at each use: grey images [H, W], coloured ones [3, H, W], or arrays."""

    def __init__(self, rows: Any, column: str, name: str) -> None:
        self.rows, self.column, self.name = rows.select_columns([column]), column, name
        if len(rows) == 0:
            raise DataError(f"{name}: expected at least one row, got none")
        self.data_shape = self._read(0).shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        x = self._read(index)
        if x.shape != self.data_shape:
            raise DataError(
                f"{self.name}: row {index} has shape {list(x.shape)}, the first {list(self.data_shape)}; expected one shape, "
                "convert the set"
            )
        return x

    def in_memory_if_small(self) -> Tensor | Rows:
        """The rows as one tensor where they are at most `IN_MEMORY_VALUES` values, else itself."""
        if len(self) * math.prod(self.data_shape) > IN_MEMORY_VALUES:
            return self
        return torch.stack([self[i] for i in range(len(self))])

    def _read(self, index: int) -> Tensor:
        value = self.rows[index][self.column]
        mode = getattr(value, "mode", None)
        if mode is not None and mode not in _MODES:
            raise DataError(
                f"{self.name}: row {index}: expected a grey (L) or RGB image, got mode {mode}; convert the set"
            )
        array = np.array(value)
        if array.dtype.kind not in "uif":
            raise DataError(
                f"{self.name}: row {index}: expected numbers in one shape, got {array.dtype}; convert the set"
            )
        x = torch.from_numpy(array)
        return x.movedim(-1, 0).contiguous() if mode == "RGB" else x


def read_hugging_face(place: str) -> Source:
    """A set by its name on the hub, or by the folder that holds it.

    Args:
        place: NAME, or NAME@CONFIG where a set has several.

    Returns:
        Source with images as uint8 counts of 256 levels; integers as counts (2 levels if all are 0 or 1, else 256), floats as
        continuous data.

    Raises:
        DataError: no package ``datasets``, a set that cannot be loaded, no split "train", or not one column to take.
    """
    try:
        package: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError("hf: reading from the hub needs the package datasets; install ppl-models[hf]") from error
    spec = f"hf:{place}"
    name, _, config = place.partition("@")
    try:
        parts = package.load_dataset(name, config or None)
    except Exception as error:  # of the network, of the hub, of any file format that the set is in
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{spec}: cannot be loaded ({why}); check the name and the connection") from error
    if "train" not in parts:
        raise DataError(f"{spec}: expected a split 'train', found {', '.join(parts)}; rename one")
    column = _data_column(parts["train"].features, spec)
    train = Rows(parts["train"], column, spec).in_memory_if_small()
    test = Rows(parts["test"], column, spec).in_memory_if_small() if "test" in parts else None
    known = [x for x in (train, test) if isinstance(x, Tensor)]
    levels: int | None = 256
    is_image = _kind(parts["train"].features[column]) == "Image"
    if any(x.is_floating_point() for x in known):
        levels = None
    elif known and not is_image and not any(bool((x > 1).any()) for x in known):
        levels = 2
    held_out_labels = _labels(parts["test"]) if "test" in parts else None
    assumed = levels == 256 and not is_image
    labels = _labels(parts["train"])
    return Source(spec, train, test, levels, "as in the set", labels, held_out_labels, levels_assumed=assumed)


def _data_column(features: dict[str, Any], spec: str) -> str:
    images = [name for name, feature in features.items() if _kind(feature) == "Image"]
    arrays = [name for name, feature in features.items() if _kind(feature) in _ARRAYS]
    found = images or arrays
    if len(found) != 1:
        raise DataError(
            f"{spec}: expected one column of images, or one of arrays, got "
            f"{', '.join(f'{name} ({_kind(feature)})' for name, feature in features.items())}; keep one, as npz:FILE say"
        )
    return found[0]


def _labels(rows: Any) -> Tensor | None:
    columns = [name for name, feature in rows.features.items() if _kind(feature) == "ClassLabel"]
    return torch.tensor(list(rows[columns[0]]), dtype=torch.int64) if len(columns) == 1 else None


def _kind(feature: Any) -> str:
    return type(feature).__name__
