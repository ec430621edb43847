"""What a network reads of the entries of x: real numbers as they are, class indices one-hot, counts as log(1 + n)."""

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


def flat_entries(
    x: Tensor, data_dim: int, reference: Tensor, num_classes: int | None = None, counts: bool = False
) -> Tensor:
    """The entries of each datum as one row for a linear layer.

    Args:
        x: ``[*batch, *data_shape]``.
        data_dim: ``len(data_shape)``.
        reference: a parameter of the network, for its dtype.
        num_classes: K, of class indices 0..K-1, which enter one-hot.
        counts: whether entries are whole numbers of things counted, which enter as log(1 + n).

    Returns:
        ``[*batch, D]``, or ``[*batch, D K]`` of classes.

    Example:
        >>> flat_entries(torch.tensor([[0, 2]]), 1, torch.zeros(1), num_classes=3)
        tensor([[1., 0., 0., 0., 0., 1.]])
    """
    batch = x.shape[: x.dim() - data_dim]
    if num_classes is not None:
        x = rows_of(torch.eye(num_classes, dtype=reference.dtype, device=x.device), x)
    elif counts:
        x = x.log1p()
    return x.reshape(*batch, -1).to(reference.dtype)
