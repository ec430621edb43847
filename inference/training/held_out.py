"""A held-out part for data that have none: a permutation with seed 0, so the same rows each time."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from inference.training.items import num_items
from inference.training.scaling import DataError
from inference.training.sources import Source


def with_held_out(source: Source, fraction: float) -> Source:
    """The source with a part of its training data, and of their labels, put aside.

    Args:
        source: without a held-out part.
        fraction: in (0, 1).

    Raises:
        DataError: a fraction that leaves nothing on one side.
    """
    train, test = _split(source.train, fraction)
    split = f"seed-0 permutation, {num_items(train)}/{num_items(test)}"
    source, labels = replace(source, train=train, test=test, split=split), source.train_labels
    if labels is None:
        return source
    kept, aside = _permutation(len(labels), fraction)
    return replace(source, train_labels=labels[kept], test_labels=labels[aside])


def _split(data: Tensor | Dataset, fraction: float) -> tuple[Tensor | Dataset, Tensor | Dataset]:
    train, test = _permutation(num_items(data), fraction)
    if isinstance(data, Tensor):
        return data[train.to(data.device)], data[test.to(data.device)]
    return Subset(data, train.tolist()), Subset(data, test.tolist())


def _permutation(num_data: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Which rows are for training and which are held out."""
    known = isinstance(fraction, int | float) and 0 < fraction < 1
    num_test = round(fraction * num_data) if known else 0
    if not 0 < num_test < num_data:
        raise DataError(
            f"test_fraction: expected a number in (0, 1) that leaves some of {num_data} data on both sides, "
            f"got {fraction}; choose another"
        )
    order = torch.from_numpy(np.random.default_rng(0).permutation(num_data))
    return order[num_test:], order[:num_test]
