"""Data too large for memory: a map-style Dataset, checked, scaled and binarised item by item as it is read.

An item is one datum, [*data_shape]: a tensor, an array, or a tuple whose first entry is one (the rest, such as a label,
is left alone).

The one constraint: an item is the same number at every read, in whichever process: a fixed binarisation is seeded by
the item's own index.
"""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from inference.training.scaling import DataError, binarize_fixed, scale, to_tensor

FIRST_ITEMS = 64  # read, and so checked, at once


def num_items(data: Tensor | Dataset) -> int:
    """N, of a Tensor [N, *data_shape] or a map-style Dataset."""
    return len(data)  # type: ignore[arg-type]  # a map-style Dataset has a length; its base class does not say so


def first_entry(item: Any, name: str = "item") -> Tensor:
    """The datum in one item of a map-style data set: the item itself, or the first entry of a tuple or list."""
    return to_tensor(item[0] if isinstance(item, tuple | list) else item, name)


class Items(Dataset[Tensor]):
    """A map-style Dataset whose items are checked and scaled as they are read, and binarised for good where asked.

    Args:
        data: a map-style Dataset; items are tensors (or arrays), or tuples whose first entry is one.
        name: in messages: "train" or "test".
        levels: as in `DataSet`.
        scaling: as in `DataSet`.
        seed: None: no binarisation; else each item is drawn from Bernoulli(item), seeded by (seed, its index).

    Raises:
        DataError: at once for the first `FIRST_ITEMS`, later at the read: not a number, off the scale, another shape.

    >>> import torch
    >>> items = Items(torch.utils.data.TensorDataset(torch.tensor([[0], [255]])), "train", levels=256, scaling="unit")
    >>> len(items), items[1].tolist()
    (2, [1.0])
    """

    def __init__(self, data: Dataset, name: str, *, levels: int | None, scaling: str, seed: int | None = None) -> None:
        self.data, self.name, self.levels, self.scaling, self.seed = data, name, levels, scaling, seed
        if len(self) < 1:
            raise DataError(f"{name}: expected at least one datum, got an empty Dataset; check where it reads from")
        self.data_shape = first_entry(data[0], f"{name} item 0").shape
        for index in range(min(len(self), FIRST_ITEMS)):
            self[index]

    def __len__(self) -> int:
        return num_items(self.data)

    def __getitem__(self, index: int) -> Tensor:
        name = f"{self.name} item {index}"
        x = scale(first_entry(self.data[index], name), name, levels=self.levels, scaling=self.scaling)
        if x.shape != self.data_shape:
            raise DataError(
                f"{name}: expected shape {list(self.data_shape)} as item 0, got {list(x.shape)}; reshape it"
            )
        return x if self.seed is None else binarize_fixed(x, self.seed, index)
