"""Data for training: a `DataSet` states what its numbers are, and every one that exists has been checked.

Shapes are [N, *data_shape]. Scaling and binarisation (see `scaling`) are part of a likelihood's validity: they are stated, kept in the
data set, recorded in a run by `describe`, and never guessed. Held-out data are for evaluation, so their binarisation is drawn
once, with a fixed seed, under "dynamic" as under "fixed": the bound on them is the same number each time. Training data stay grey
under "dynamic", and are to be passed through `binarize` at each use (which leaves zeros and ones as they are).

The one constraint: data in memory are checked whole before the first step; a `Dataset` that is read at each use is checked item
by item as it is read, its first items at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from inference.training.batches import epoch_order, first_entry, iterate, num_batches
from inference.training.densities import TOY_DENSITIES, log_density
from inference.training.scaling import (
    BINARIZATIONS,
    SCALINGS,
    DataError,
    binarize,
    binarize_fixed,
    check_data,
    check_scaled,
    refuse_unscaled,
    scale,
    to_tensor,
)
from inference.training.sources import Source, read_digits, read_images, read_mnist, read_npz, read_toy

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

_SPLIT_SEEDS = {"train": 0, "test": 1}
_FIRST_ITEMS = 64


@dataclass(frozen=True, eq=False)
class DataSet:
    """Training and held-out data with the statement of what their numbers are.

    Args:
        name: where they come from, such as "digits" or "tensor".
        train: Tensor [N, *data_shape], scaled as stated; or a map-style Dataset of such data where memory is too small.
        test: the held-out part, of the same layout, or None.
        train_labels: LongTensor [N], or None.
        test_labels: LongTensor, or None.
        levels: the number of levels of quantised data, or None for continuous data.
        scaling: one of `SCALINGS`.
        binarization: one of `BINARIZATIONS`; "dynamic": `train` holds probabilities, to be passed through `binarize`.
        kind: "image" or "point".
        split: how the held-out part came about, in words.

    Raises:
        DataError: values, shapes or labels that are not what the rest states.
    """

    name: str
    train: Tensor | Dataset
    test: Tensor | Dataset | None = None
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    levels: int | None = None
    scaling: str = "none"
    binarization: str = "none"
    kind: str = "point"
    split: str = "as given"

    def __post_init__(self) -> None:
        _check_choice("scaling", self.scaling, SCALINGS)
        _check_choice("binarization", self.binarization, BINARIZATIONS)
        _check_choice("kind", self.kind, ("image", "point"))
        if self.binarization != "none" and self.scaling != "unit":
            raise DataError(
                f"binarization {self.binarization!r} reads values as probabilities and needs scaling 'unit', "
                f"got {self.scaling!r}; state scaling='unit'"
            )
        for name, x, labels in (("train", self.train, self.train_labels), ("test", self.test, self.test_labels)):
            if isinstance(x, Tensor):
                check_data(x, name, None if name == "train" else tuple(self.data_shape))
                binary = self.binarization == "fixed" or (self.binarization == "dynamic" and name == "test")
                check_scaled(x, name, levels=2 if binary else self.levels, scaling=self.scaling)
            elif x is not None and (shape := first_entry(x[0]).shape) != self.data_shape:
                raise DataError(
                    f"{name}: expected data of shape {list(self.data_shape)}, got {list(shape)}; reshape them"
                )
            if labels is not None:
                _check_labels(labels, f"{name}_labels", 0 if x is None else _length(x))

    @property
    def data_shape(self) -> torch.Size:
        """The shape of one datum."""
        return self.train.shape[1:] if isinstance(self.train, Tensor) else first_entry(self.train[0]).shape

    @property
    def num_train(self) -> int:
        """The number of training data."""
        return _length(self.train)

    @property
    def num_test(self) -> int:
        """The number of held-out data, 0 where there are none."""
        return 0 if self.test is None else _length(self.test)

    def describe(self) -> dict[str, Any]:
        """What a run records of its data: plain numbers, strings and lists, ready for JSON.

        >>> load_data("digits", scaling="unit").describe()["data_shape"]
        [8, 8]
        """
        return {
            "name": self.name,
            "kind": self.kind,
            "data_shape": list(self.data_shape),
            "num_train": self.num_train,
            "num_test": self.num_test,
            "split": self.split,
            "levels": self.levels,
            "scaling": self.scaling,
            "binarization": self.binarization,
            "labels": self.train_labels is not None,
        }


class Items(Dataset[Tensor]):
    """A map-style Dataset whose items are checked and scaled as they are read, and binarised once and for all where asked.

    Args:
        data: a map-style Dataset; items are tensors (or arrays), or tuples whose first entry is one.
        name: in messages: "train" or "test".
        levels: as in `DataSet`.
        scaling: as in `DataSet`.
        binarize: whether each item is drawn from Bernoulli(item), from a seed of its own index: the same at every read.
    """

    def __init__(self, data: Dataset, name: str, *, levels: int | None, scaling: str, binarize: bool = False) -> None:
        self.data, self.name, self.levels, self.scaling, self.binarize = data, name, levels, scaling, binarize
        if len(self) < 1:
            raise DataError(f"{name}: expected at least one datum, got an empty Dataset; check where it reads from")
        self.data_shape = first_entry(data[0], f"{name} item 0").shape
        for index in range(min(len(self), _FIRST_ITEMS)):
            self[index]

    def __len__(self) -> int:
        return _length(self.data)

    def __getitem__(self, index: int) -> Tensor:
        name = f"{self.name} item {index}: x"
        x = scale(first_entry(self.data[index], name), name, levels=self.levels, scaling=self.scaling)
        check_data(x.unsqueeze(0), f"{self.name} item {index}", tuple(self.data_shape))
        return binarize_fixed(x, _SPLIT_SEEDS[self.name], index) if self.binarize else x


def load_data(
    spec: str, *, scaling: str | None = None, binarization: str | None = None, image_size: int | None = None
) -> DataSet:
    """Data by name.

    Args:
        spec: one of `list_data()`: "digits", a toy density, "mnist:FOLDER", "npz:FILE" or "images:FOLDER".
        scaling: of quantised data; None: "none", counts 0..levels-1 as floating point numbers. Continuous data are
            never changed: "none" for toy densities; for floats in an npz file a statement that is checked, as in `as_dataset`.
        binarization: one of `BINARIZATIONS`, None: "none"; needs scaling "unit".
        image_size: side in pixels, for "images:FOLDER" only.

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
        "images": lambda folder: read_images(folder, image_size),
    }
    if image_size is not None and reader != "images":
        raise DataError(f"image_size: expected only with images:FOLDER, got it with {spec!r}; leave it out")
    if spec == "digits":
        source = read_digits()
    elif spec in TOY_DENSITIES:
        source = read_toy(spec)
        if scaling not in (None, "none"):
            raise DataError(f"{spec}: continuous data have scaling 'none', got {scaling!r}; leave it out")
    elif reader in readers and place:
        source = readers[reader](Path(place))
    else:
        known = ", ".join(row["spec"] for row in list_data())
        raise DataError(f"data: expected one of {known}, got {spec!r}; `ppl data` lists them")
    if scaling is None and source.levels is not None:
        scaling = "none"
    return _state(source, scaling, binarization)


def as_dataset(
    data: Any,
    *,
    test: Any = None,
    scaling: str | None = None,
    binarization: str | None = None,
    levels: int | None = None,
    test_fraction: float | None = None,
) -> DataSet:
    """A `DataSet` from what a caller has at hand.

    Args:
        data: Tensor or ndarray [N, *data_shape]; map-style torch Dataset, of tensors or of tuples whose first entry is one;
            a `DataSet`, which is returned; or a string, for `load_data`.
        test: the held-out part, a Tensor, ndarray or Dataset.
        scaling: states what the values are. Integers are counts, converted to it; floating point numbers are already so, and are
            checked. None: "none", refused where the values look like unscaled pixel counts.
        binarization: one of `BINARIZATIONS`, None: "none"; needs scaling "unit".
        levels: the number of levels of quantised data; None: continuous data.
        test_fraction: of the data to hold out by a permutation with seed 0, in (0, 1), instead of `test`.

    Returns:
        DataSet; floating point tensors keep their dtype, arrays and counts come in torch's default dtype.

    Raises:
        DataError: another type, bad values, or arguments that do not go together.

    >>> as_dataset(torch.tensor([[0, 255], [51, 0]]), scaling="unit", levels=256).train[0].tolist()
    [0.0, 1.0]
    """
    if isinstance(data, DataSet | str):
        if test is not None or levels is not None or test_fraction is not None:
            raise DataError("test, levels, test_fraction: a DataSet or a named one has its own; leave them out")
        if isinstance(data, str):
            return load_data(data, scaling=scaling, binarization=binarization)
        if scaling not in (None, data.scaling) or binarization not in (None, data.binarization):
            raise DataError(
                f"data: the DataSet states scaling {data.scaling!r} and binarization {data.binarization!r}, got {scaling!r} "
                f"and {binarization!r}; make it with these instead"
            )
        return data
    train = _tensor_or_dataset(data, "train")
    name = "tensor" if isinstance(train, Tensor) else type(train).__name__
    held_out = None if test is None else _tensor_or_dataset(test, "test")
    split = "as given"
    if test_fraction is not None:
        if held_out is not None:
            raise DataError("test and test_fraction: expected one of them, got both; leave one out")
        train, held_out = _split(train, test_fraction)
        split = f"seed-0 permutation, {_length(train)}/{_length(held_out)}"
    return _state(Source(name, train, held_out, levels, split), scaling, binarization)


def list_data() -> list[dict[str, Any]]:
    """What `load_data` knows, a row each: spec, what, kind, shape, num_train, num_test, levels, scaling, binarization.

    Nothing is loaded; an entry that depends on the file is None. `scaling` lists the scalings that can be asked for.

    >>> [row["spec"] for row in list_data()][:3]
    ['digits', 'two_moons', 'rings']
    """

    def row(spec: str, what: str, kind: str | None, shape: list[int] | None, counts: tuple, levels: int | None) -> dict:
        quantised = kind != "point"
        return {
            "spec": spec,
            "what": what,
            "kind": kind,
            "shape": shape,
            "num_train": counts[0],
            "num_test": counts[1],
            "levels": levels,
            "scaling": list(SCALINGS) if quantised else ["none"],
            "binarization": list(BINARIZATIONS) if quantised else ["none"],
        }

    unknown = (None, None)
    return [
        row("digits", "handwritten digits of scikit-learn, real", "image", [8, 8], (1500, 297), 17),
        *(row(name, toy.formula, "point", [2], (8000, 2000), None) for name, toy in TOY_DENSITIES.items()),
        row("mnist:FOLDER", "the four idx files of MNIST or its like, gzipped or not", "image", None, unknown, 256),
        row(
            "npz:FILE",
            "numpy arrays: train, optionally test, train_labels, test_labels, levels",
            None,
            None,
            unknown,
            None,
        ),
        row(
            "images:FOLDER",
            "png and jpg files, or train/ and test/ with them (needs pillow)",
            "image",
            None,
            unknown,
            256,
        ),
    ]


def _state(source: Source, scaling: str | None, binarization: str | None) -> DataSet:
    binarization = "none" if binarization is None else binarization
    _check_choice("binarization", binarization, BINARIZATIONS)
    parts: dict[str, Tensor | Dataset | None] = {"train": source.train, "test": source.test}
    if scaling is None:
        for name, x in parts.items():
            if x is not None:
                refuse_unscaled(_first_rows(x, name), name)
    scaling = "none" if scaling is None else scaling
    _check_choice("scaling", scaling, SCALINGS)
    for name, x in parts.items():
        draw = scaling == "unit" and (binarization == "fixed" or (binarization == "dynamic" and name == "test"))
        if isinstance(x, Tensor):
            if x.is_floating_point() or x.numel() == 0:
                check_data(x, name)
            scaled = scale(x, name, levels=source.levels, scaling=scaling)
            parts[name] = binarize_fixed(scaled, _SPLIT_SEEDS[name]) if draw else scaled
        elif x is not None:
            parts[name] = Items(x, name, levels=source.levels, scaling=scaling, binarize=draw)
    train = parts["train"]
    assert train is not None
    dims = train.dim() - 1 if isinstance(train, Tensor) else len(train[0].shape)
    return DataSet(
        name=source.name,
        train=train,
        test=parts["test"],
        train_labels=source.train_labels,
        test_labels=source.test_labels,
        levels=source.levels,
        scaling=scaling,
        binarization=binarization,
        kind="image" if dims >= 2 else "point",
        split=source.split,
    )


def _tensor_or_dataset(x: Any, name: str) -> Tensor | Dataset:
    if isinstance(x, Tensor | np.ndarray):
        return to_tensor(x, name)
    if isinstance(x, Dataset) and not isinstance(x, IterableDataset) and hasattr(x, "__len__"):
        return x
    raise DataError(
        f"{name}: expected a Tensor, a numpy array, a map-style torch Dataset, a DataSet or a name of list_data(), "
        f"got {type(x).__name__}; convert it to one of these"
    )


def _split(data: Tensor | Dataset, fraction: float) -> tuple[Tensor | Dataset, Tensor | Dataset]:
    num_test = round(fraction * _length(data))
    if not (0 < fraction < 1 and 0 < num_test < _length(data)):
        raise DataError(
            f"test_fraction: expected a number in (0, 1) that leaves data on both sides of {_length(data)}, got {fraction}"
        )
    order = torch.from_numpy(np.random.default_rng(0).permutation(_length(data)))
    train, test = order[num_test:], order[:num_test]
    if isinstance(data, Tensor):
        return data[train.to(data.device)], data[test.to(data.device)]
    return Subset(data, train.tolist()), Subset(data, test.tolist())


def _first_rows(x: Tensor | Dataset, name: str) -> Tensor:
    """All of a tensor; of a Dataset its first items' values in one row, whatever their shapes, which are checked later."""
    if isinstance(x, Tensor):
        return x
    return torch.cat([first_entry(x[i], f"{name} item {i}").flatten() for i in range(min(_length(x), _FIRST_ITEMS))])


def _length(x: Tensor | Dataset) -> int:
    return len(x)  # type: ignore[arg-type]  # a map-style Dataset has a length; the base class does not say so


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DataError(f"{name}: expected one of {', '.join(choices)}, got {value!r}; state one of these")


def _check_labels(labels: Tensor, name: str, num: int) -> None:
    if labels.dtype != torch.int64 or labels.shape != (num,):
        raise DataError(
            f"{name}: expected one int64 label a datum, shape [{num}], got {labels.dtype} {list(labels.shape)}; correct them"
        )
