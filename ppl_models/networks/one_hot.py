"""Classes as rows of a table, such as those of the identity: what a network reads in place of a number."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rows_of(table: Tensor, classes: Tensor) -> Tensor:
    """``table[classes]``, ``[*classes.shape, width]``, of a table ``[K, width]``.

    Raises:
        TypeError: classes that are no int64.
        ValueError: a class outside 0..K-1 (on a CPU; elsewhere it costs a look at the device, and ends in its own error).
    """
    if classes.dtype != torch.long:
        raise TypeError(f"expected class indices (int64), got {classes.dtype}: leave out num_classes for real values")
    try:
        # not nn.functional.one_hot, which reads the values on the CPU and so cannot be traced
        return nn.functional.embedding(classes, table)
    except IndexError as error:
        wrong = classes[(classes < 0) | (classes >= len(table))][0]
        raise ValueError(
            f"expected class indices in 0..{len(table) - 1}, got {int(wrong)}: make the network for as many classes as there "
            "are, a diffusion's mask included"
        ) from error
