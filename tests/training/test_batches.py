"""Batches: every datum once an epoch over all processes, an order of (seed, epoch) alone, no global randomness consumed."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from inference.training.batches import iterate, num_batches

X = torch.arange(46.0).reshape(23, 2)


class Rows(Dataset[Tensor]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index]


LAYOUTS: dict[str, Callable[[Tensor], Tensor | Dataset]] = {
    "tensor": lambda x: x,
    "dataset": Rows,
    "tuples": lambda x: TensorDataset(x, torch.zeros(len(x))),
}


@settings(deadline=None, max_examples=60)
@given(
    num=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    world=st.integers(1, 4),
    epoch=st.integers(0, 1000),
    seed=st.integers(0, 2**40),
)
def test_each_datum_once_over_processes_and_as_many_batches_in_each(
    num: int, batch_size: int, world: int, epoch: int, seed: int
) -> None:
    x = torch.arange(float(num))
    shares = [
        [i.tolist() for i, _ in iterate(x, batch_size, epoch=epoch, seed=seed, rank=rank, world=world)]
        for rank in range(world)
    ]
    assert {len(share) for share in shares} == {num_batches(num, batch_size)}
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(num))
    whole = [i.tolist() for i, _ in iterate(x, batch_size, epoch=epoch, seed=seed)]
    for b, batch in enumerate(whole):
        assert [share[b] for share in shares] == [batch[rank::world] for rank in range(world)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (2, 3), (7, 8)])
def test_all_layouts_give_the_same_batches(layout: str, rank: int, world: int) -> None:
    batches = list(iterate(LAYOUTS[layout](X), 6, epoch=3, seed=1, rank=rank, world=world))
    expected = list(iterate(X, 6, epoch=3, seed=1, rank=rank, world=world))
    assert len(batches) == len(expected) == 4
    for (indices, x), (expected_indices, expected_x) in zip(batches, expected, strict=True):
        assert torch.equal(indices, expected_indices)
        assert torch.equal(x, X[indices])
        assert x.shape == expected_x.shape  # [0, 2] included: process 7 of 8 has nothing of a batch of 6
        assert x.dtype == X.dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_start_skips_exactly_the_batches_before_it(layout: str) -> None:
    data = LAYOUTS[layout](X)
    whole = [i.tolist() for i, _ in iterate(data, 5, epoch=2, seed=9)]
    for start in range(len(whole) + 1):
        assert [i.tolist() for i, _ in iterate(data, 5, epoch=2, seed=9, start=start)] == whole[start:]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_global_generators_neither_matter_nor_move(layout: str) -> None:
    data = LAYOUTS[layout](X)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [i.tolist() for i, _ in iterate(data, 5, epoch=0, seed=0)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert [i.tolist() for i, _ in iterate(data, 5, epoch=0, seed=0)] == first


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_worker_processes_change_neither_order_nor_values() -> None:
    state = torch.get_rng_state()
    batches = list(iterate(Rows(X), 6, epoch=3, seed=1, num_workers=1))
    for (indices, x), (expected_indices, expected_x) in zip(batches, iterate(X, 6, epoch=3, seed=1), strict=True):
        assert torch.equal(indices, expected_indices)
        assert torch.equal(x, expected_x)
    assert torch.equal(torch.get_rng_state(), state)


def test_order_changes_with_epoch_and_seed_and_is_the_data_s_own_without_shuffling() -> None:
    def order(**kwargs: int | bool) -> list[int]:
        return [i for indices, _ in iterate(X, 4, **kwargs) for i in indices.tolist()]  # type: ignore[arg-type]

    orders = {tuple(order(epoch=epoch, seed=seed)) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16
    assert order(epoch=5, seed=5, shuffle=False) == list(range(23))


def test_bad_arguments_are_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="batch_size >= 1, got 23 and 0"):
        iterate(X, 0, epoch=0, seed=0)
    with pytest.raises(ValueError, match="at least one datum"):
        iterate(X[:0], 4, epoch=0, seed=0)
    with pytest.raises(ValueError, match=r"start: expected 0\.\.6.*got 7"):
        iterate(X, 4, epoch=0, seed=0, start=7)
    with pytest.raises(ValueError, match=r"rank: expected 0\.\.world-1 with world = 2, got 2"):
        iterate(X, 4, epoch=0, seed=0, rank=2, world=2)
