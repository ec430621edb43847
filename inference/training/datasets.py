"""Data for training: a `DataSet` states what its numbers are, and every one that exists has been checked.

Shapes are [N, *data_shape]. Scaling and binarisation (see `scaling`) are part of a likelihood's validity: they are
stated, kept in the data set, recorded in a run by `describe`, and never guessed. Held-out data are for evaluation, so
their binarisation is drawn once, with a fixed seed, under "dynamic" as under "fixed": the bound on them is the same
number each time. Training data stay grey under "dynamic", and are to be passed through `binarize` at each use (which
leaves zeros and ones as they are).

The one constraint: data in memory are checked whole before the first step; a `Dataset` that is read at each use is
checked item by item as it is read, its first items at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from inference.training.batches import epoch_order, iterate, num_batches
from inference.training.densities import TOY_DENSITIES, log_density
from inference.training.hugging_face import read_hugging_face
from inference.training.items import FIRST_ITEMS, Items, first_entry, num_items
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
from inference.training.text_data import WINDOW, read_text

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

KINDS = ("image", "point", "text")
_SPLIT_SEEDS = {"train": 0, "test": 1}


@dataclass(frozen=True, eq=False)
class DataSet:
    """Training and held-out data with the statement of what their numbers are.

    Args:
        name: where they come from, such as "digits" or "tensor".
        train: Tensor [N, *data_shape], scaled as stated; or a map-style Dataset of such data where memory is too small.
        test: the held-out part, of the same layout, or None.
        train_labels: LongTensor [N], or None.
        test_labels: LongTensor, or None.
        levels: the number of levels of quantised data (of the grey values, before any binarisation); None: continuous.
        scaling: one of `SCALINGS`.
        binarization: one of `BINARIZATIONS`; "dynamic": `train` holds probabilities, to be passed through `binarize`.
        kind: one of `KINDS`.
        split: how the held-out part came about, in words.
        alphabet: of text, the character of each class in one string; None for all else.

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
    alphabet: str | None = None

    def __post_init__(self) -> None:
        _check_choice("scaling", self.scaling, SCALINGS)
        _check_choice("binarization", self.binarization, BINARIZATIONS)
        _check_choice("kind", self.kind, KINDS)
        characters = None if self.alphabet is None else len(self.alphabet)
        if (self.kind == "text") != (characters is not None) or characters not in (None, self.levels):
            raise DataError(
                f"alphabet: expected as many characters as levels ({self.levels}) with kind 'text' and only there, got "
                f"{self.alphabet!r:.40} with {self.kind!r}; state both"
            )
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
                _check_labels(labels, f"{name}_labels", 0 if x is None else num_items(x))

    @property
    def data_shape(self) -> torch.Size:
        """The shape of one datum."""
        return self.train.shape[1:] if isinstance(self.train, Tensor) else first_entry(self.train[0]).shape

    @property
    def num_train(self) -> int:
        """The number of training data."""
        return num_items(self.train)

    @property
    def num_test(self) -> int:
        """The number of held-out data, 0 where there are none."""
        return 0 if self.test is None else num_items(self.test)

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
            **({} if self.alphabet is None else {"alphabet": self.alphabet}),
        }


def load_data(
    spec: str,
    *,
    scaling: str | None = None,
    binarization: str | None = None,
    image_size: int | None = None,
    alphabet: str | None = None,
) -> DataSet:
    """Data by name.

    Args:
        spec: one of `list_data()`: "digits", a toy density, "mnist:FOLDER", "npz:FILE", "images:FOLDER", "text:FILE" or
            "text:FILE@L", in windows of L characters, "hf:NAME" or "hf:NAME@CONFIG".
        scaling: of quantised data; None: "none", counts 0..levels-1 as floating point numbers. Continuous data are
            never changed: "none" for toy densities; for floats in an npz file a statement that is checked, as in
            `as_dataset`. Characters are "classes". Integers of an npz file are classes only where it states "levels", or
            where they are zeros and ones.
        binarization: one of `BINARIZATIONS`, None: "none"; needs scaling "unit".
        image_size: side in pixels, for "images:FOLDER" only.
        alphabet: whose classes are meant, for "text:FILE" only; None: the text's own.

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
        "text": lambda file: read_text(file, alphabet),
        "hf": lambda place: read_hugging_face(str(place)),
    }
    if image_size is not None and reader != "images":
        raise DataError(f"image_size: expected only with images:FOLDER, got it with {spec!r}; leave it out")
    if alphabet is not None and reader != "text":
        raise DataError(f"alphabet: expected only with text:FILE, got it with {spec!r}; leave it out")
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
        raise DataError(f"data: expected one of {known}, got {spec!r}; {_meant(spec)}`ppl data` lists them")
    if source.alphabet is not None:
        if scaling not in (None, "classes") or binarization not in (None, "none"):
            raise DataError(
                f"text: characters are classes, with scaling 'classes' and binarization 'none', got {scaling!r} and "
                f"{binarization!r}; leave them out"
            )
        scaling = "classes"
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
        data: Tensor or ndarray [N, *data_shape]; map-style torch Dataset, of tensors or of tuples whose first entry is
            one; a `DataSet`, which is returned; or a string, for `load_data`.
        test: the held-out part, a Tensor, ndarray or Dataset.
        scaling: states what the values are. Integers are counts, converted to it; floating point numbers are already
            so, and are checked. None: "none", refused where the values look like unscaled pixel counts or classes.
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
                f"data: the DataSet states scaling {data.scaling!r} and binarization {data.binarization!r}, "
                f"got {scaling!r} and {binarization!r}; make it with these instead"
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
        split = f"seed-0 permutation, {num_items(train)}/{num_items(held_out)}"
    return _state(Source(name, train, held_out, levels, split), scaling, binarization)


def list_data() -> list[dict[str, Any]]:
    """What `load_data` knows, a row each: spec, what, kind, shape, num_train, num_test, levels, scaling, binarization.

    Nothing is loaded; None is what depends on the file. `scaling` and `binarization` list what can be asked for.

    >>> [row["spec"] for row in list_data()][:3]
    ['digits', 'two_moons', 'rings']
    """
    columns = ("spec", "what", "kind", "shape", "num_train", "num_test", "levels")
    toys = [(name, toy.formula, "point", [2], 8000, 2000, None) for name, toy in TOY_DENSITIES.items()]
    folder = "png and jpg files, or train/ and test/ with them (needs ppl-models[images])"
    arrays = "numpy arrays: train; optionally test, train_labels, test_labels, levels"
    text = f"the characters of a UTF-8 text, in windows of {WINDOW}; of L with text:FILE@L"
    hub = "a data set of the Hugging Face hub; a configuration of it with hf:NAME@CONFIG (needs ppl-models[hf])"
    entries = [
        ("digits", "scikit-learn's handwritten digits", "image", [8, 8], 1500, 297, 17),
        *toys,
        (
            "mnist:FOLDER",
            "MNIST's four idx files, gzipped or not, or a set like it",
            "image",
            [28, 28],
            60000,
            10000,
            256,
        ),
        ("npz:FILE", arrays, None, None, None, None, None),
        ("images:FOLDER", folder, "image", None, None, None, 256),
        ("text:FILE", text, "text", None, None, None, None),
        ("hf:NAME", hub, None, None, None, None, None),
    ]
    rows: list[dict[str, Any]] = [dict(zip(columns, entry, strict=True)) for entry in entries]
    for row in rows:
        continuous = row["kind"] == "point"
        characters = row["kind"] == "text"
        row["scaling"] = ["classes"] if characters else ["none"] if continuous else list(SCALINGS)
        row["binarization"] = ["none"] if continuous or characters else list(BINARIZATIONS)
    return rows


def _state(source: Source, scaling: str | None, binarization: str | None) -> DataSet:
    """The source's values under the stated scaling and binarisation; unstated is "none", where that is plausible."""
    stated, drawn = "none" if scaling is None else scaling, "none" if binarization is None else binarization
    if stated == "classes" and source.levels_assumed:
        remedy = "write the column to an npz file with" if source.name.startswith("hf:") else "add to the npz file"
        raise DataError(
            f"{source.name}: expected the number of classes to be stated, got integers up to {_largest(source)} without "
            f"it; {remedy} an entry 'levels', {_largest(source) + 1} or more"
        )

    def part(x: Tensor | Dataset, name: str) -> Tensor | Dataset:
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
    )


def _meant(spec: str) -> str:
    """What a file or folder given without its kind is read as, if it is there."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return f"a folder of images is images:{spec}, one of idx files mnist:{spec}; "
    kind = {".npz": "npz", ".txt": "text"}.get(path.suffix.lower())
    if path.is_file() and kind:
        return f"did you mean {kind}:{spec}? "
    return "numpy.savez(FILE, train=x) writes an array as npz:FILE; " if path.is_file() else ""


def _largest(source: Source) -> int:
    held = [int(x.max()) for x in (source.train, source.test) if isinstance(x, Tensor) and x.numel()]
    return max(held, default=255)


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
    num_test = round(fraction * num_items(data))
    if not (0 < fraction < 1 and 0 < num_test < num_items(data)):
        raise DataError(
            f"test_fraction: expected a number in (0, 1) that leaves some of {num_items(data)} data on both sides, "
            f"got {fraction}; choose another"
        )
    order = torch.from_numpy(np.random.default_rng(0).permutation(num_items(data)))
    train, test = order[num_test:], order[:num_test]
    if isinstance(data, Tensor):
        return data[train.to(data.device)], data[test.to(data.device)]
    return Subset(data, train.tolist()), Subset(data, test.tolist())


def _first_rows(x: Tensor | Dataset, name: str) -> Tensor:
    """All of a tensor; of a Dataset its first items' values in one row."""
    if isinstance(x, Tensor):
        return x
    return torch.cat([first_entry(x[i], f"{name} item {i}").flatten() for i in range(min(num_items(x), FIRST_ITEMS))])


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DataError(f"{name}: expected one of {', '.join(choices)}, got {value!r}; state one of these")


def _check_labels(labels: Tensor, name: str, num: int) -> None:
    if labels.dtype != torch.int64 or labels.shape != (num,):
        raise DataError(
            f"{name}: expected one int64 label a datum, shape [{num}], got {labels.dtype} {list(labels.shape)}; "
            "correct them"
        )
