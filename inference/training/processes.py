"""Several processes on one training run: each takes its share of every batch, gradients are summed.

Each datum counts once: a process divides by the size of the *whole* batch, whatever its own share, and the gradients are
added up in one flat bucket. The sum then equals one process's gradient on the same draws, also where the data do not
divide. A share may be empty.

The one constraint: all processes call these functions in the same order, so none of the calls depends on the share.
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn


class LostProcessError(RuntimeError):
    """Another process of the run no longer answers."""


def all_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over processes, without gradient; the tensor itself where there is but one process.

    Raises:
        LostProcessError: another process has ended.
    """
    if not _several():
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if _backend() == "nccl" else torch.device("cpu")
    total = values.detach().to(device, copy=True)
    try:
        torch.distributed.all_reduce(total)
    except RuntimeError as error:
        raise LostProcessError(f"another process of the run no longer answers: {error}") from error
    return total.to(values.device)


def all_rows(values: Tensor) -> Tensor:
    """The tensors of all processes, one a row in the order of ranks, bit for bit; one row where there is one process."""
    if not _several():
        return values[None]
    rows = values.new_zeros(torch.distributed.get_world_size(), *values.shape)
    rows[torch.distributed.get_rank()] = values
    return all_sum(rows)


def in_any_process(*flags: bool) -> list[bool]:
    """Which flags are set in any process: what one decides, all do.

    Example:
        >>> in_any_process(True, False)
        [True, False]
    """
    if not _several():
        return list(flags)
    return [bool(flag) for flag in all_sum(torch.tensor([float(flag) for flag in flags]))]


def first_text(text: str | None) -> str | None:
    """The first text that any process has, in the order of ranks; the same in all of them."""
    if not _several():
        return text
    texts: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(texts, text)
    return next((found for found in texts if found is not None), None)


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Replaces each gradient by its sum over processes; a missing one counts as zero."""
    if not _several():
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    bucket = all_sum(torch.cat([g.flatten() for g in gradients]))
    for p, g in zip(parameters, bucket.split([g.numel() for g in gradients]), strict=True):
        p.grad = g.view_as(p).clone()


def leave_together() -> None:
    """Waits for all processes and ends their connection, whose threads would otherwise abort a process that exits."""
    if _several():
        all_sum(torch.zeros(1))
        torch.distributed.destroy_process_group()


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _backend() -> str:
    return torch.distributed.get_backend()
