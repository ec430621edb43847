"""Batches in an order that depends on the seed and the epoch alone.

The order of epoch e is one permutation of 0..N-1 drawn from (seed, e): the same in every process and after a resume,
and torch's default generator is not touched. Global batch b is entries b*B..(b+1)*B-1 of it, the last one shorter where
B does not divide N; of each global batch, process r of `world` takes entries r, r + world, ... So each datum is counted
exactly once an epoch over all processes, and every process sees the same number of batches, of which its share of the
last may be empty.

The one constraint: a step's batch is a function of (seed, epoch, b, rank) and of nothing that happened before it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from inference.training.items import first_entry, num_items


def num_batches(num_data: int, batch_size: int) -> int:
    """The number of batches in an epoch, the shorter last one included.

    >>> num_batches(1500, 128)
    12
    """
    return -(-num_data // batch_size)


def epoch_order(num_data: int, *, seed: int, epoch: int, shuffle: bool = True) -> Tensor:
    """The order in which an epoch visits the data.

    Args:
        num_data: N.
        seed: of the run, >= 0.
        epoch: >= 0.
        shuffle: False: 0..N-1 as it stands.

    Returns:
        A permutation of 0..N-1, LongTensor [N].

    >>> epoch_order(5, seed=0, epoch=1).sort().values.tolist()
    [0, 1, 2, 3, 4]
    """
    if not shuffle:
        return torch.arange(num_data)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    return torch.from_numpy(rng.permutation(num_data))


def iterate(
    data: Tensor | Dataset,
    batch_size: int,
    *,
    epoch: int,
    seed: int,
    shuffle: bool = True,
    device: torch.device | str | None = None,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One process's batches of one epoch.

    Args:
        data: Tensor [N, *data_shape], batched by index where it lies; or a map-style Dataset, read through a
            DataLoader.
        batch_size: B, of the global batch over all processes.
        epoch: >= 0; each has its own order.
        seed: of the run, >= 0.
        shuffle: False: the order of the data.
        device: where x goes; None: where the data are.
        start: the number of batches of this epoch that have already been used, 0 unless resumed.
        rank: of this process, 0..world-1.
        world: the number of processes.
        num_workers: of the DataLoader; without effect on tensors, and on the order.

    Yields:
        (indices, x): LongTensor [b] on the data's device (the CPU for a Dataset), and data [b, *data_shape]; b may be 0
        for a process's share of the last batch.

    Raises:
        ValueError: an argument out of its range, at the call and not at the first batch.

    >>> [i.tolist() for i, x in iterate(torch.zeros(5, 2), 2, epoch=0, seed=0, shuffle=False)]
    [[0, 1], [2, 3], [4]]
    """
    num_data = num_items(data)
    if num_data < 1 or batch_size < 1:
        raise ValueError(f"iterate: expected at least one datum and batch_size >= 1, got {num_data} and {batch_size}")
    total = num_batches(num_data, batch_size)
    if not 0 <= start <= total:
        raise ValueError(
            f"start: expected 0..{total}, the batches of an epoch, got {start}; resume with the same data and size"
        )
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected 0..world-1 with world = {world}, got {rank}; number the processes from 0")
    order = epoch_order(num_data, seed=seed, epoch=epoch, shuffle=shuffle)
    if isinstance(data, Tensor):
        order = order.to(data.device)
    shares = [order[b * batch_size : (b + 1) * batch_size][rank::world] for b in range(start, total)]
    if isinstance(data, Tensor):
        return ((indices, data.index_select(0, indices).to(device)) for indices in shares)
    return _load(data, shares, device, num_workers)


def _collate(data: Dataset, items: list[Any]) -> Tensor:
    if not items:
        example = first_entry(data[0])
        return example.new_empty((0, *example.shape))
    return torch.stack([first_entry(item) for item in items])


def _load(
    data: Dataset, shares: list[Tensor], device: torch.device | str | None, num_workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    # A generator of its own: without one a DataLoader takes a number from torch's default generator at each epoch.
    loader: DataLoader = DataLoader(
        data,
        batch_sampler=[share.tolist() for share in shares],
        collate_fn=partial(_collate, data),
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
    )
    for indices, x in zip(shares, loader, strict=True):
        yield indices, x.to(device)
