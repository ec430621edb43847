"""Data for training, by name or from what a caller has at hand, as a `DataSet`.

Shapes are [N, *data_shape]. Scaling and binarisation (see `scaling`) are part of a likelihood's validity: they are
stated, kept in the data set, recorded in a run by `describe`, and never guessed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from inference.training.batches import epoch_order, iterate, num_batches
from inference.training.data_list import list_data
from inference.training.data_set import DataSet
from inference.training.densities import TOY_DENSITIES, log_density
from inference.training.held_out import with_held_out
from inference.training.hugging_face import read_hugging_face
from inference.training.items import FIRST_ITEMS, Items, first_entry, num_items
from inference.training.scaling import (
    BINARIZATIONS,
    SCALINGS,
    DataError,
    binarize,
    binarize_fixed,
    check_data,
    refuse_unscaled,
    scale,
    to_tensor,
)
from inference.training.sources import Source, read_digits, read_images, read_mnist, read_npz, read_toy
from inference.training.standardizing import Standardization
from inference.training.tables import read_csv
from inference.training.text_data import read_text

__all__ = [
    "BINARIZATIONS",
    "SCALINGS",
    "TOY_DENSITIES",
    "DataError",
    "DataSet",
    "Items",
    "as_dataset",
    "binarize",
    "check_data",
    "epoch_order",
    "iterate",
    "list_data",
    "load_data",
    "log_density",
    "num_batches",
]

FEWEST_OF_8_BITS = 32  # integers that end below it and whose levels nobody states are hardly 8-bit grey values
_SPLIT_SEEDS = {"train": 0, "test": 1}


def load_data(
    spec: str,
    *,
    scaling: str | None = None,
    binarization: str | None = None,
    image_size: int | None = None,
    alphabet: str | None = None,
    test_fraction: float | None = None,
    standardization: Standardization | None = None,
    columns: Sequence[str] | None = None,
) -> DataSet:
    """Data by name.

    Args:
        spec: one of `list_data()`: "digits", a toy density, "mnist:FOLDER", "npz:FILE", "csv:FILE" or "csv:FILE@COLUMN",
            with labels in that column, "images:FOLDER", "text:FILE" or "text:FILE@L", in windows of L characters, "hf:NAME" or
            "hf:NAME@CONFIG".
        scaling: of quantised data; None: "none", counts 0..levels-1 as floating point numbers. Continuous data are
            changed by "standard" alone: else it is "none" for toy densities, and for floats in a file a statement that is
            checked, as in `as_dataset`. Characters are "classes". Integers of an npz file are classes only where it states
            "levels", or where they are zeros and ones.
        binarization: one of `BINARIZATIONS`, None: "none"; needs scaling "unit".
        image_size: side in pixels, for "images:FOLDER" only.
        alphabet: whose classes are meant, for "text:FILE" only; None: the text's own.
        test_fraction: of the data to hold out by a permutation with seed 0, in (0, 1), of data that have no held-out part.
        standardization: whose statistics are meant, with scaling "standard" only, for data beside those that a model was
            trained on; None: the training part's own.
        columns: which columns are the entries of a datum, and in which order, for "csv:FILE" only; None: all of them.

    Returns:
        DataSet with floating point data in torch's default dtype (int64 for "classes").

    Raises:
        DataError: an unknown spec, a bad file, or a scaling that the data do not have.

    >>> data = load_data("digits", scaling="symmetric")
    >>> data.train.shape, data.num_test, data.levels
    (torch.Size([1500, 8, 8]), 297, 17)
    """
    reader, _, place = spec.partition(":")
    readers: dict[str, Callable[[Path], Source]] = {
        "mnist": read_mnist,
        "npz": read_npz,
        "csv": lambda file: read_csv(file, columns),
        "images": lambda folder: read_images(folder, image_size),
        "text": lambda file: read_text(file, alphabet),
        "hf": lambda place: read_hugging_face(str(place)),
    }
    if image_size is not None and reader != "images":
        raise DataError(f"image_size: expected only with images:FOLDER, got it with {spec!r}; leave it out")
    if columns is not None and reader != "csv":
        raise DataError(f"columns: expected only with csv:FILE, got them with {spec!r}; leave them out")
    if alphabet is not None and reader != "text":
        raise DataError(f"alphabet: expected only with text:FILE, got it with {spec!r}; leave it out")
    if spec == "digits":
        source = read_digits()
    elif spec in TOY_DENSITIES:
        source = read_toy(spec)
        if scaling not in (None, "none", "standard"):
            raise DataError(f"{spec}: continuous data have scaling 'none' or 'standard', got {scaling!r}; leave it out")
    elif reader in readers and place:
        source = readers[reader](Path(place))
    else:
        known = ", ".join(row["spec"] for row in list_data())
        raise DataError(f"data: expected one of {known}, got {spec!r}; {_meant(spec)}`ppl data` lists them")
    if source.alphabet is not None:
        if scaling not in (None, "classes") or binarization not in (None, "none"):
            raise DataError(
                f"text: characters are classes, with scaling 'classes' and binarization 'none', got {scaling!r} and "
                f"{binarization!r}; leave them out"
            )
        scaling = "classes"
    if scaling is None and (source.levels is not None or reader == "csv"):  # whole numbers in a table are numbers
        scaling = "none"
    if test_fraction is not None:
        if source.test is not None:
            raise DataError(f"test_fraction: {spec} has a held-out part ({source.split}); leave it out")
        source = with_held_out(source, test_fraction)
    data = _state(source, scaling, binarization, test_fraction, standardization)
    as_recorded = image_size is None and alphabet is None and standardization is None  # what a run does not keep
    return replace(data, spec=spec) if as_recorded else data


def as_dataset(
    data: Any,
    *,
    test: Any = None,
    scaling: str | None = None,
    binarization: str | None = None,
    levels: int | None = None,
    test_fraction: float | None = None,
    labels: Any = None,
    test_labels: Any = None,
) -> DataSet:
    """A `DataSet` from what a caller has at hand.

    Args:
        data: Tensor or ndarray [N, *data_shape]; map-style torch Dataset, of tensors or of tuples whose first entry is
            one; a `DataSet`, which is returned; or a string, for `load_data`.
        test: the held-out part, a Tensor, ndarray or Dataset.
        scaling: states what the values are. Integers are counts, converted to it; floating point numbers are already
            so, and are checked; "standard" alone changes them (see `standardizing`). None: "none", refused where the
            values look like unscaled pixel counts or classes.
        binarization: one of `BINARIZATIONS`, None: "none"; needs scaling "unit".
        levels: the number of levels of quantised data; None: continuous data.
        test_fraction: of the data to hold out by a permutation with seed 0, in (0, 1), instead of `test`.
        labels: a whole number a datum, [N], what a pair with ``num_labels`` is conditioned on and others are coloured by.
        test_labels: those of `test`.

    Returns:
        DataSet; floating point tensors keep their dtype, arrays and counts come in torch's default dtype.

    Raises:
        DataError: another type, bad values, or arguments that do not go together.

    >>> as_dataset(torch.tensor([[0, 255], [51, 0]]), scaling="unit", levels=256).train[0].tolist()
    [0.0, 1.0]
    """
    if isinstance(data, DataSet | str):
        if any(argument is not None for argument in (test, levels, test_fraction, labels, test_labels)):
            raise DataError("test, levels, test_fraction, labels: a DataSet or a named one has its own; leave them out")
        if isinstance(data, str):
            return load_data(data, scaling=scaling, binarization=binarization)
        if scaling not in (None, data.scaling) or binarization not in (None, data.binarization):
            raise DataError(
                f"data: the DataSet states scaling {data.scaling!r} and binarization {data.binarization!r}, "
                f"got {scaling!r} and {binarization!r}; make it with these instead"
            )
        return data
    is_wide = scaling == "standard" and _is_floats(data)
    if is_wide:
        data, test = (torch.from_numpy(x.astype(np.float64)) if _is_floats(x) else x for x in (data, test))
    train = _tensor_or_dataset(data, "train")
    name = "tensor" if isinstance(train, Tensor) else type(train).__name__
    held_out = None if test is None else _tensor_or_dataset(test, "test")
    own, held = (_whole_numbers(y, name) for y, name in ((labels, "labels"), (test_labels, "test_labels")))
    source = Source(name, train, held_out, levels, "as given", own, held, is_wide=is_wide)
    if test_fraction is not None:
        if held_out is not None:
            raise DataError("test and test_fraction: expected one of them, got both; leave one out")
        source = with_held_out(source, test_fraction)
    return _state(source, scaling, binarization, test_fraction)


def _whole_numbers(labels: Any, name: str) -> Tensor | None:
    """Labels as int64, from a list, an array or a tensor of integers."""
    if labels is None:
        return None
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name}: expected whole numbers, got {str(labels)[:40]!r}; number the labels from 0"
        ) from error
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise DataError(f"{name}: expected whole numbers, got {found.dtype}; number the labels from 0")
    return found.long()


def _state(
    source: Source,
    scaling: str | None,
    binarization: str | None,
    test_fraction: float | None = None,
    standardization: Standardization | None = None,
) -> DataSet:
    """The source's values under the stated scaling and binarisation; unstated is "none", where that is plausible."""
    stated, drawn = "none" if scaling is None else scaling, "none" if binarization is None else binarization
    if stated == "classes" and source.levels_assumed:
        remedy = "write the column to an npz file with" if source.name.startswith("hf:") else "add to the npz file"
        raise DataError(
            f"{source.name}: expected the number of classes to be stated, got integers up to {_largest(source)} without "
            f"it; {remedy} an entry 'levels', {_largest(source) + 1} or more"
        )
    if not source.levels_stated and stated in ("standard", "counts"):
        source = replace(source, levels=None, levels_assumed=False)
    if source.levels_assumed and stated in ("unit", "symmetric") and _largest(source) < FEWEST_OF_8_BITS:
        most = _largest(source)
        raise DataError(
            f"{source.name}: expected the number of levels to be stated, got integers up to {most} without it, which may be "
            f"{most + 1} levels or dark 8-bit grey values; add to the file an entry 'levels', {most + 1} or 256, or state "
            "scaling='standard' or 'none' if they are continuous, 'counts' if they are numbers of things"
        )
    if (standardization is not None) > (stated == "standard"):
        raise DataError(f"standardization: expected only with scaling 'standard', got it with {stated!r}; leave it out")
    if stated == "standard" and standardization is None:
        standardization = Standardization.of(_continuous(source.train, "train", source.levels), source.columns)

    def part(x: Tensor | Dataset, name: str) -> Tensor | Dataset:
        if standardization is not None:
            own = standardization(_continuous(x, name, source.levels))
            return own.to(torch.get_default_dtype()) if source.is_wide else own
        if source.is_wide and isinstance(x, Tensor) and x.is_floating_point():
            x = to_tensor(x.numpy(), name)
        binary = stated == "unit" and (drawn == "fixed" or (drawn == "dynamic" and name == "test"))
        seed = _SPLIT_SEEDS[name] if binary else None
        result: Tensor | Dataset
        if isinstance(x, Tensor):
            result = scale(x, name, levels=source.levels, scaling=stated)
            result = result if seed is None else binarize_fixed(result, seed)
        else:
            result = Items(x, name, levels=source.levels, scaling=stated, seed=seed)
        if scaling is None:
            refuse_unscaled(_first_rows(x, name), name)
        return result

    train = part(source.train, "train")
    dims = train.dim() - 1 if isinstance(train, Tensor) else first_entry(train[0]).dim()
    return DataSet(
        name=source.name,
        train=train,
        test=None if source.test is None else part(source.test, "test"),
        train_labels=source.train_labels,
        test_labels=source.test_labels,
        levels=source.levels,
        scaling=stated,
        binarization=drawn,
        kind="text" if source.alphabet is not None else "image" if dims >= 2 else "point",
        split=source.split,
        alphabet=source.alphabet,
        columns=source.columns,
        label_names=source.label_names,
        standardization=standardization,
        test_fraction=test_fraction,
    )


def _continuous(x: Tensor | Dataset, name: str, levels: int | None) -> Tensor:
    """Continuous data in memory, which alone can be standardised."""
    if levels is not None or not isinstance(x, Tensor):
        got = f"data of {levels} levels" if levels is not None else "a Dataset that is read at each use"
        raise DataError(
            f"{name}: scaling 'standard' is for continuous data in memory, got {got}; levels take 'symmetric' or 'unit'"
        )
    x = scale(x, name, levels=None, scaling="none")
    check_data(x, name)
    return x


def _meant(spec: str) -> str:
    """What a file or folder given without its kind is read as, if it is there."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return f"a folder of images is images:{spec}, one of idx files mnist:{spec}; "
    kind = {".npz": "npz", ".npy": "npz", ".csv": "csv", ".tsv": "csv", ".txt": "text"}.get(path.suffix.lower())
    if path.is_file() and kind:
        return f"did you mean {kind}:{spec}? "
    return "numpy.savez(FILE, train=x) writes an array as npz:FILE; " if path.is_file() else ""


def _largest(source: Source) -> int:
    held = [int(x.max()) for x in (source.train, source.test) if isinstance(x, Tensor) and x.numel()]
    return max(held, default=255)


def _is_floats(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def _tensor_or_dataset(x: Any, name: str) -> Tensor | Dataset:
    if isinstance(x, Tensor | np.ndarray):
        return to_tensor(x, name)
    if isinstance(x, Dataset) and not isinstance(x, IterableDataset) and hasattr(x, "__len__"):
        return x
    raise DataError(
        f"{name}: expected a Tensor, a numpy array, a map-style torch Dataset, a DataSet or a name of list_data(), "
        f"got {type(x).__name__}; convert it to one of these"
    )


def _first_rows(x: Tensor | Dataset, name: str) -> Tensor:
    """All of a tensor; of a Dataset its first items' values in one row."""
    if isinstance(x, Tensor):
        return x
    return torch.cat([first_entry(x[i], f"{name} item {i}").flatten() for i in range(min(num_items(x), FIRST_ITEMS))])
