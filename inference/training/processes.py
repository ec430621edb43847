"""Several processes on one training run: each takes its share of every batch, gradients are summed.

Each datum counts once: a process divides by the size of the *whole* batch, whatever its own share, and the gradients are
added up in one flat bucket. The sum then equals one process's gradient on the same draws, also where the data do not
divide. A share may be empty.
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn


def all_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over processes; the tensor itself where there is but one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Replaces each gradient by its sum over processes; a missing one counts as zero."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    bucket = all_sum(torch.cat([g.flatten() for g in gradients]))
    for p, g in zip(parameters, bucket.split([g.numel() for g in gradients]), strict=True):
        p.grad = g.view_as(p).clone()
