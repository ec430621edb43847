"""What a training run is given: data checked against the pair, split, and in the pair's dtype.

Everything that can be refused is refused here, before the first step and before anything is written. A tensor is checked
whole; the items of a Dataset are checked as they are read, the first 64 of them at once.

The one constraint: a datum keeps the index that it has in the data as they were handed over, also where a part of them is
put aside for validation, so that messages can name it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from inference.training.config import ConfigError, TrainConfig
from inference.training.datasets import DataSet
from inference.training.items import FIRST_ITEMS, first_entry, num_items
from inference.training.scaling import DataError, binarize
from ppl_models.networks.labels import refuse_other_labels
from ppl_models.pair import ModelGuidePair

Data = Tensor | Dataset[Any]


@dataclass  # not frozen: a launcher of several processes detaches tensors from shared memory in place
class Inputs:
    """Training and validation data of a run.

    Args:
        train: what is trained on, ``[N, *data_shape]``.
        validation: what the reported bound is computed on.
        dynamic: the training data are grey values, binarised anew at each use.
        validation_dynamic: so are the validation data (held-out data were binarised once).
        validation_name: what they are, in words.
        rows: each training datum's index in the data as handed over, LongTensor ``[N]``.
        validation_rows: likewise of the validation data.
        labels: each training datum's label, where the pair is conditioned on labels, LongTensor ``[N]``; None elsewhere.
        validation_labels: likewise of the validation data.
    """

    train: Data
    validation: Data
    dynamic: bool
    validation_dynamic: bool
    validation_name: str
    rows: Tensor
    validation_rows: Tensor
    labels: Tensor | None = None
    validation_labels: Tensor | None = None


def prepare_inputs(pair: ModelGuidePair, dataset: DataSet, config: TrainConfig, dtype: torch.dtype) -> Inputs:
    """A data set as a run's inputs: floating point data in ``dtype``, with the validation part put aside.

    Raises:
        DataError: data that the pair cannot take; the message names the first bad index.
        ConfigError: ``validation_fraction`` leaves nothing to train on.
    """
    _check_fits(pair, dataset)
    dynamic = dataset.binarization == "dynamic"
    train = _in_dtype(dataset.train, dtype, None if dynamic else pair, "train")
    everything = torch.arange(num_items(dataset.train))
    labels, test_labels = _labels(pair, dataset)
    if config.validation_fraction > 0:
        kept, aside = _permuted(len(everything), config)
        name = f"{len(aside)} of the training data, put aside"
        own = (None, None) if labels is None else (labels[kept], labels[aside])
        return Inputs(_take(train, kept), _take(train, aside), dynamic, dynamic, name, kept, aside, *own)
    if dataset.test is None:
        name = "the training data themselves (there are no held-out data)"
        return Inputs(train, train, dynamic, dynamic, name, everything, everything, labels, labels)
    test, test_rows = _in_dtype(dataset.test, dtype, pair, "test"), torch.arange(num_items(dataset.test))
    return Inputs(train, test, dynamic, False, "the held-out part", everything, test_rows, labels, test_labels)


def fingerprint(dataset: DataSet, with_labels: bool = False) -> str:
    """SHA-256 over training and held-out data; of a Dataset over its first items, for it may not fit into memory.

    Args:
        dataset: the data.
        with_labels: over their labels as well, where these are part of what is learned.

    Example:
        >>> a, b = (DataSet("points", torch.tensor([[0.0], [x]])) for x in (1.0, 2.0))
        >>> fingerprint(a) == fingerprint(a), fingerprint(a) == fingerprint(b)
        (True, False)
    """
    digest = hashlib.sha256()
    for part in (dataset.train, dataset.test, *([dataset.train_labels, dataset.test_labels] if with_labels else [])):
        if part is not None:
            x = part if isinstance(part, Tensor) else _first_items(part)
            digest.update(f"{x.dtype} {list(x.shape)}".encode())
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class CheckedItems(Dataset[Tensor]):
    """A Dataset whose items are checked and brought into a dtype as they are read.

    Args:
        data: map-style Dataset.
        dtype: of floating point items.
        check: refuses a batch ``[1, *data_shape]`` that does not fit, with the name given.
        name: in messages.
    """

    def __init__(self, data: Dataset, dtype: torch.dtype, check: Callable[[Tensor, str], None], name: str) -> None:
        self.data, self.dtype, self.check, self.name = data, dtype, check, name

    def __len__(self) -> int:
        return num_items(self.data)

    def __getitem__(self, index: int) -> Tensor:
        name = f"{self.name} item {index}"
        x = first_entry(self.data[index], name)
        try:
            self.check(x[None], name)
        except ValueError as error:
            raise DataError(str(error)) from None
        return x.to(self.dtype) if x.is_floating_point() else x


def _check_fits(pair: ModelGuidePair, dataset: DataSet) -> None:
    if dataset.data_shape != pair.data_shape:
        raise DataError(
            f"train: expected data of shape [N, {', '.join(map(str, pair.data_shape))}] for this pair, got "
            f"[N, {', '.join(map(str, dataset.data_shape))}]; reshape the data or build the pair for them"
        )
    for name, part in (("train", dataset.train), ("test", dataset.test)):
        if part is None:
            continue
        x = part if isinstance(part, Tensor) else _first_items(part)
        grey = dataset.binarization == "dynamic" and name == "train"
        try:
            pair.check_data(binarize(x, torch.Generator(x.device).manual_seed(0)) if grey else x, name)
        except ValueError as error:
            raise DataError(str(error)) from None


def _labels(pair: ModelGuidePair, dataset: DataSet) -> tuple[Tensor | None, Tensor | None]:
    """The labels of training and held-out data, where the pair is conditioned on labels; checked."""
    count = pair.num_labels
    if count is None:
        return None, None
    if pair.labels is not None:
        raise DataError(
            "labels: expected a pair before given(y), for training takes each datum's own label, got one at labels already: "
            "pass the pair itself, and the labels with the data"
        )
    for name, part, labels in (
        ("train_labels", dataset.train, dataset.train_labels),
        ("test_labels", dataset.test, dataset.test_labels),
    ):
        if part is None:
            continue
        if labels is None:
            raise DataError(
                f"{name}: expected a label for each datum, for the pair is conditioned on {count} labels, got none; give them, "
                "as in as_dataset(x, labels=y) (those in a Dataset's items are not read), or make the pair without num_labels"
            )
        try:
            refuse_other_labels(labels, count, name)
        except ValueError as error:
            raise DataError(str(error)) from None
    return dataset.train_labels, dataset.test_labels


def _first_items(data: Dataset) -> Tensor:
    return torch.stack([first_entry(data[i]) for i in range(min(FIRST_ITEMS, num_items(data)))])


def _in_dtype(data: Data, dtype: torch.dtype, pair: ModelGuidePair | None, name: str) -> Data:
    """The data with floating point values in ``dtype``; a Dataset's items also checked against a pair, if one is given."""
    if isinstance(data, Tensor):
        return data.to(dtype) if data.is_floating_point() else data
    return CheckedItems(data, dtype, _no_check if pair is None else pair.check_data, name)


def _no_check(x: Tensor, name: str) -> None:
    """Grey values are no data of the pair yet; `binarize` checks them at each use."""


def _permuted(total: int, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices to put aside, by a permutation that depends on the seed alone."""
    held = max(1, round(config.validation_fraction * total))
    if held >= total:
        raise ConfigError(
            f"expected validation_fraction to leave training data, got {config.validation_fraction} of {total}; "
            "lower it or provide more data"
        )
    order = torch.from_numpy(np.random.default_rng(config.seed).permutation(total))
    return order[held:], order[:held]


def _take(data: Data, rows: Tensor) -> Data:
    return data[rows.to(data.device)] if isinstance(data, Tensor) else Subset(data, rows.tolist())
