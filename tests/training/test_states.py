"""State through a checkpoint and back, bit for bit."""

import math
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.training.checkpoints import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from inference.training.states import flatten_state, restore_state
from tests.training.saved_states import same

# ------------------------------------------------------------------------------------------------- state, bit for bit


def through_disk(state: Any, folder: Path) -> Any:
    return restore_state(*load_checkpoint(save_checkpoint(folder, "state", *flatten_state(state))))


OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam, amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1)),
    "SGD, momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_training_goes_on_from_a_checkpoint_bit_for_bit(name: str, tmp_path: Path) -> None:
    x, y = torch.randn(8, 3), torch.randn(8, 2)

    def start() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
        network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        optimiser = OPTIMISERS[name](network.parameters())
        return network, optimiser, torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, patience=0)

    def go(network: torch.nn.Module, optimiser: torch.optim.Optimizer, schedule: Any, steps: int) -> None:
        def closure() -> float:
            optimiser.zero_grad()
            loss = (network(x + 0.01 * noise) - y).square().mean()
            loss.backward()
            return loss.item()

        for _ in range(steps):
            noise = torch.randn_like(x)
            optimiser.step(closure)
            schedule.step(1.0)

    network, optimiser, schedule = run = start()
    go(*run, steps=3)
    state = {
        "network": network.state_dict(),
        "optimiser": optimiser.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": torch.get_rng_state(),
    }
    restored = through_disk(state, tmp_path)
    assert same({**state, "network": dict(state["network"])}, restored)
    go(*run, steps=3)

    other = start()
    for part, key in zip(other, ("network", "optimiser", "schedule"), strict=True):
        part.load_state_dict(restored[key])
    torch.set_rng_state(restored["rng"])
    go(*other, steps=3)
    assert same(dict(network.state_dict()), dict(other[0].state_dict()))
    assert same(through_disk(optimiser.state_dict(), tmp_path), through_disk(other[1].state_dict(), tmp_path))


DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def _awkward_tensors() -> dict[str, torch.Tensor]:
    base = torch.randn(4, 6)
    nan_with_payload = torch.tensor([0x7FF8_0000_0000_1234, -1, 1], dtype=torch.int64).view(torch.float64)
    return {
        "0-dim": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "transposed": base.T,
        "strided": base[:, ::2],
        "shared, whole": base,
        "shared, part": base[1:3],
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(base),
        "conjugate's part": torch.randn(3, dtype=torch.complex64).conj().imag,
        "rng state": torch.get_rng_state(),
        "not numbers": nan_with_payload,
        "minus zero": torch.tensor([-0.0, math.inf, -math.inf, 5e-324]),
        **{dtype: torch.randn(5).mul(9).abs().to(getattr(torch, dtype)) for dtype in DTYPES},
    }


def test_awkward_tensors_survive_bit_for_bit(tmp_path: Path) -> None:
    state = _awkward_tensors()
    expected = {name: tensor.detach().clone().resolve_neg() for name, tensor in state.items()}
    assert same(expected, through_disk(state, tmp_path))
    assert same(expected, through_disk(through_disk(state, tmp_path), tmp_path))


def test_what_is_loaded_shares_nothing_with_what_was_saved(tmp_path: Path) -> None:
    tensor = torch.zeros(3)
    loaded = through_disk({"a": tensor, "b": tensor}, tmp_path)
    loaded["a"] += 1
    assert torch.equal(tensor, torch.zeros(3))
    assert torch.equal(loaded["b"], torch.zeros(3))


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0])
    | st.lists(st.floats(width=32), max_size=3).map(lambda row: torch.tensor(row, dtype=torch.float32))
)
STATES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(TEXT | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(STATES)
@settings(max_examples=100, deadline=None)
def test_any_state_survives_bit_for_bit(state: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(os, "fsync"):
        assert same(through_disk(state, Path(folder)), state)


def test_places_that_look_alike_are_told_apart() -> None:
    state = {0: torch.zeros(1), "0": torch.ones(1), "a'][0": torch.full((1,), 2.0), "a": [torch.full((1,), 3.0)]}
    tensors, values = flatten_state(state)
    assert len(tensors) == 4
    assert same(restore_state(tensors, values), state)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"a": [1, {2}]}, r"state\['a'\]\[1\] is a builtins\.set; expected a tensor"),
        ({"a": {0: np.float64(1)}}, r"state\['a'\]\[0\] is a numpy\.float64"),
        ([np.ones(2)], r"state\[0\] is a numpy\.ndarray"),
        ({"a": print}, r"state\['a'\] is a builtins\.builtin_function_or_method"),
        ({"a": {(1, 2): 0}}, r"state\['a'\] has the key \(1, 2\), a tuple; expected str or int"),
        ({True: 0}, "state has the key True, a bool"),
    ],
)
def test_a_value_of_another_type_is_named_by_its_place(state: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        flatten_state(state)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"state": {"tensor": "absent"}},
        {"state": {"tensor": []}},
        {"state": {"unknown": 1}},
        {"state": {}},
        {"state": {"tuple": [], "dict": []}},
        {"state": {"dict": [1]}},
        {"state": {"float": "xyz"}},
        {"state": {"float": "00"}},
        {"state": {"tuple": 3}},
    ],
)
def test_values_that_describe_no_state_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="the values do not describe a state"):
        restore_state({}, values)
