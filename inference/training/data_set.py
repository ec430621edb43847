"""A `DataSet`: data with the statement of what their numbers are; every one that exists has been checked.

Held-out data are for evaluation, so their binarisation is drawn once, under "dynamic" as under "fixed": the bound on them is
the same number each time. Training data stay grey under "dynamic", and are passed through `binarize` at each use.

The one constraint: data in memory are checked whole before the first step; a `Dataset` that is read at each use is
checked item by item as it is read, its first items at once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from inference.training.items import first_entry, num_items
from inference.training.scaling import BINARIZATIONS, SCALINGS, DataError, check_data, check_scaled
from inference.training.standardizing import Standardization

KINDS = ("image", "point", "text")


@dataclass(frozen=True, eq=False, repr=False)
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
        columns: of a table, the name of each entry of a datum; None for all else.
        label_names: what each label stands for, by its number; None where the number says it.
        standardization: with scaling "standard", what was done to the values; :func:`as_dataset` makes it.
        test_fraction: what part was held out by a permutation, where that was asked for.
        spec: what :func:`load_data` reads again to the same data; None where nothing does.

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
    columns: tuple[str, ...] | None = None
    label_names: tuple[str, ...] | None = None
    standardization: Standardization | None = None
    test_fraction: float | None = None
    spec: str | None = None

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
        if (self.scaling == "standard") != (self.standardization is not None):
            raise DataError(
                "scaling 'standard' and a standardization go together; as_dataset(x, scaling='standard') states both"
            )
        if self.binarization != "none" and self.scaling != "unit":
            raise DataError(
                f"binarization {self.binarization!r} reads values as probabilities and needs scaling 'unit', "
                f"got {self.scaling!r}; state scaling='unit'"
            )
        for name, x, labels in (("train", self.train, self.train_labels), ("test", self.test, self.test_labels)):
            if not isinstance(x, Tensor | Dataset) and not (name == "test" and x is None):
                got = type(x).__name__
                raise DataError(
                    f"{name}: expected a Tensor or a map-style Dataset, got {got}; as_dataset takes numpy arrays"
                )
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

    def __repr__(self) -> str:
        """What the data are, without their numbers."""
        stated = ", ".join(f"{key}={value!r}" for key, value in self.describe().items() if value is not None)
        return f"DataSet({stated})"

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

    def in_own_units(self, x: Tensor) -> Tensor:
        """Standardised values, such as samples, in the units that the data came in; other values as they are."""
        return x if self.standardization is None else self.standardization.inverse(x)

    def describe(self) -> dict[str, Any]:
        """What a run records of its data: plain numbers, strings and lists, ready for JSON.

        >>> from inference.training.datasets import load_data
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
            **({} if self.columns is None else {"columns": list(self.columns)}),
            **({} if self.label_names is None else {"label_names": list(self.label_names)}),
            **({} if self.test_fraction is None else {"test_fraction": self.test_fraction}),
            **({} if self.standardization is None else {"standardization": self.standardization.describe()}),
        }


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DataError(f"{name}: expected one of {', '.join(choices)}, got {value!r}; state one of these")


def _check_labels(labels: Tensor, name: str, num: int) -> None:
    if not isinstance(labels, Tensor):
        raise DataError(
            f"{name}: expected an int64 Tensor, got {type(labels).__name__}; convert with torch.tensor(labels)"
        )
    if labels.dtype != torch.int64 or labels.shape != (num,):
        raise DataError(
            f"{name}: expected one int64 label a datum, shape [{num}], got {labels.dtype} {list(labels.shape)}; "
            "give a flat list of as many whole numbers as data"
        )
