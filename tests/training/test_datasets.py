"""Data sets: the fixed splits, every scaling against its formula, binarisation, and every kind of bad data refused."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from inference import fit
from inference.training.datasets import (
    TOY_DENSITIES,
    DataError,
    DataSet,
    as_dataset,
    binarize,
    check_data,
    iterate,
    list_data,
    load_data,
)
from ppl_models import VAE
from ppl_models.likelihoods import Categorical

COUNTS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 3, 2), dtype=np.uint8))


class Rows(Dataset[tuple[Tensor, int]]):
    """A map-style data set of (datum, label) without a tensor of the whole."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], index


def tensor(x: Tensor | Dataset | None) -> Tensor:
    assert isinstance(x, Tensor)
    return x


def test_digits_are_scikit_learns_under_the_fixed_split() -> None:
    data = load_data("digits")
    order = np.random.default_rng(0).permutation(1797)
    images, labels = load_digits().images[order], load_digits().target[order]
    np.testing.assert_array_equal(tensor(data.train).numpy(), images[:1500])
    np.testing.assert_array_equal(tensor(data.test).numpy(), images[1500:])
    np.testing.assert_array_equal(tensor(data.train_labels).numpy(), labels[:1500])
    np.testing.assert_array_equal(tensor(data.test_labels).numpy(), labels[1500:])
    assert (data.data_shape, data.levels, data.kind, data.scaling) == ((8, 8), 17, "image", "none")


@pytest.mark.parametrize(
    ("scaling", "formula"),
    [
        ("none", lambda k: float(k)),
        ("unit", lambda k: k / 16),
        ("symmetric", lambda k: -1 + 2 * k / 16),
        ("classes", lambda k: k),
    ],
)
def test_scalings_are_their_formulae(scaling: str, formula: Any) -> None:
    data = load_data("digits", scaling=scaling)
    counts = tensor(load_data("digits").train)[:50].flatten().tolist()
    assert tensor(data.train)[:50].flatten().tolist() == [formula(int(k)) for k in counts]
    assert tensor(data.train).dtype == (torch.int64 if scaling == "classes" else torch.float64)
    assert data.describe()["scaling"] == scaling


@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
@pytest.mark.parametrize("scaling", ["none", "unit", "symmetric", "classes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled_counts_are_valid_when_they_come_back_as_floats(levels: int, scaling: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    counts = torch.arange(levels).reshape(-1, 1)
    once = tensor(as_dataset(counts, scaling=scaling, levels=levels).train)
    assert torch.equal(tensor(as_dataset(once, scaling=scaling, levels=levels).train), once)


@pytest.mark.parametrize("name", TOY_DENSITIES)
def test_toy_densities_are_points_of_fixed_draws(name: str) -> None:
    data, again = load_data(name), load_data(name)
    assert (data.data_shape, data.num_train, data.num_test, data.levels) == ((2,), 8000, 2000, None)
    assert (data.kind, data.scaling, data.binarization) == ("point", "none", "none")
    assert torch.equal(tensor(data.train), tensor(again.train))
    with pytest.raises(DataError, match=f"{name}: continuous data have scaling 'none' or 'standard', got 'unit'"):
        load_data(name, scaling="unit")


def test_loading_neither_uses_nor_moves_the_global_generators() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)
    load_data("digits", scaling="unit", binarization="fixed")
    load_data("rings")
    as_dataset(COUNTS, scaling="unit", levels=256, test_fraction=0.5)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_equal(np.random.get_state(legacy=False), numpy_state)


def test_fixed_binarisation_is_one_bernoulli_draw() -> None:
    grey = tensor(load_data("digits", scaling="unit").train)
    data = load_data("digits", scaling="unit", binarization="fixed")
    drawn = tensor(data.train)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(drawn, tensor(load_data("digits", scaling="unit", binarization="fixed").train))
    assert bool((drawn[grey == 0] == 0).all())
    assert bool((drawn[grey == 1] == 1).all())
    for level in range(1, 16):  # a z-test a grey level, 15 of them: |z| < 5.6 fails falsely with a rate below 1e-6
        at = grey == level / 16
        mean, p = drawn[at].mean().item(), level / 16
        assert abs(mean - p) < 5.6 * math.sqrt(p * (1 - p) / at.sum().item())
    # The control: thresholding at a half is not a draw, and the same test catches it.
    at = grey == 4 / 16
    assert abs((grey > 0.5).double()[at].mean().item() - 0.25) > 5.6 * math.sqrt(0.25 * 0.75 / at.sum().item())


def test_dynamic_binarisation_keeps_training_grey_and_holds_out_one_draw() -> None:
    data = load_data("digits", scaling="unit", binarization="dynamic")
    fixed = load_data("digits", scaling="unit", binarization="fixed")
    assert torch.equal(tensor(data.train), tensor(load_data("digits", scaling="unit").train))
    assert torch.equal(tensor(data.test), tensor(fixed.test))
    x = tensor(data.train)[:100]
    draws = [binarize(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0], binarize(x.float(), torch.Generator().manual_seed(1)).double())
    assert torch.equal(binarize(tensor(data.test)), tensor(data.test))  # what is binary stays as it is
    with pytest.raises(DataError, match=r"x\[1\] = 2: scaling 'unit' states values in \[0, 1\]"):
        binarize(torch.tensor([0.5, 2.0]))


@pytest.mark.parametrize("scaling", [None, "none", "symmetric", "classes"])
def test_binarisation_needs_the_unit_scaling(scaling: str | None) -> None:
    with pytest.raises(DataError, match=r"needs scaling 'unit'.*state scaling='unit'"):
        load_data("digits", scaling=scaling, binarization="dynamic")


def test_unknown_names_are_refused_with_what_there_is() -> None:
    for spec in ("cifar", "text:", "hf:", "mnist:", "mnist"):
        with pytest.raises(
            DataError, match=r"expected one of digits, two_moons, .*images:FOLDER, text:FILE, hf:NAME, got"
        ):
            load_data(spec)
    with pytest.raises(
        DataError, match="scaling: expected one of none, unit, symmetric, classes, standard, counts, got 'tanh'"
    ):
        load_data("digits", scaling="tanh")
    with pytest.raises(DataError, match="binarization: expected one of none, dynamic, fixed, got 'often'"):
        load_data("digits", scaling="unit", binarization="often")
    with pytest.raises(DataError, match="image_size: expected only with images:FOLDER"):
        load_data("digits", image_size=8)


def test_list_data_is_true_of_what_is_loaded() -> None:
    rows = {row["spec"]: row for row in list_data()}
    for spec in ("digits", *TOY_DENSITIES):
        described = load_data(spec).describe()
        row = rows[spec]
        assert row["shape"] == described["data_shape"]
        for key in ("kind", "num_train", "num_test", "levels"):
            assert row[key] == described[key]
        for scaling in row["scaling"]:
            load_data(spec, scaling=scaling)
    assert {"mnist:FOLDER", "npz:FILE", "images:FOLDER"} <= set(rows)
    json.dumps(list_data())


def test_as_dataset_takes_tensors_arrays_data_sets_and_names() -> None:
    floats = torch.randn(20, 3, dtype=torch.float32)
    assert as_dataset(floats).train is floats
    assert tensor(as_dataset(floats.numpy()).train).dtype == torch.float64
    data = as_dataset(COUNTS.numpy(), scaling="unit", levels=256, test_fraction=0.25)
    assert (data.num_train, data.num_test, data.kind) == (15, 5, "image")
    both = torch.cat([tensor(data.train), tensor(data.test)]).flatten(1)
    assert sorted(both.tolist()) == sorted((COUNTS.double() / 255).flatten(1).tolist())
    assert as_dataset(data) is data
    assert as_dataset(data, scaling="unit") is data
    assert as_dataset("digits", scaling="unit").describe() == load_data("digits", scaling="unit").describe()
    json.dumps(data.describe())


@pytest.mark.parametrize("binarization", ["none", "fixed", "dynamic"])
def test_a_map_style_dataset_is_scaled_item_by_item(binarization: str) -> None:
    kwargs: dict[str, Any] = {"scaling": "unit", "levels": 256, "binarization": binarization}
    data = as_dataset(Rows(COUNTS), test=Rows(COUNTS), **kwargs)
    assert isinstance(data.train, Dataset)
    assert isinstance(data.test, Dataset)
    assert (data.data_shape, data.num_train, data.kind) == ((3, 2), 20, "image")
    train = torch.cat([x for _, x in iterate(data.train, 6, epoch=0, seed=0, shuffle=False)])
    again = torch.cat([x for _, x in iterate(data.train, 7, epoch=1, seed=0, shuffle=False)])
    assert torch.equal(train, again)
    if binarization == "fixed":
        assert set(train.unique().tolist()) == {0.0, 1.0}
        assert not torch.equal(train, torch.stack([data.test[i] for i in range(20)]))  # train and test have own seeds
    else:
        assert torch.equal(train, COUNTS.double() / 255)
    if binarization == "dynamic":
        assert all(set(data.test[i].unique().tolist()) <= {0.0, 1.0} for i in range(20))
    split = as_dataset(Rows(COUNTS), test_fraction=0.25, **kwargs)
    assert (split.num_train, split.num_test) == (15, 5)


def test_a_bad_item_is_named_at_once_among_the_first_and_later_at_its_read() -> None:
    x = torch.rand(100, 2)
    x[3, 1] = math.nan
    with pytest.raises(DataError, match=r"train item 3\[1\] = nan: expected finite numbers"):
        as_dataset(Rows(x))
    x[3, 1], x[99, 0] = 0.0, math.inf
    data = as_dataset(Rows(x))
    with pytest.raises(DataError, match=r"train item 99\[0\] = inf"):
        list(iterate(data.train, 10, epoch=0, seed=0))


TABLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unstated uint8": (COUNTS, {}, "look like unscaled counts such as pixels in 0..255; state scaling='unit'"),
    "unstated uint8 with levels": (COUNTS, {"levels": 256}, "look like unscaled counts"),
    "unstated float counts": (COUNTS.double(), {}, r"train\[0, 0, 0\] = .*look like unscaled counts"),
    "unstated classes as floats": (
        torch.tensor([[0.0, 1.0, 2.0]]),
        {},
        r"train\[0, 2\] = 2: .*; state .* scaling='classes' and levels=K \(or, .*pass x\.long\(\)\) if they are K classes",
    ),
    "unstated counts in a Dataset": (Rows(COUNTS), {}, "look like unscaled counts"),
    "unstated counts in test": (torch.rand(4, 3, 2), {"test": COUNTS}, r"test\[0, 0, 0\] = .*look like unscaled"),
    "unstated large integers": (torch.tensor([[1], [1000]]), {}, r"train\[1, 0\] = 1000.*look like unscaled"),
    "unit, yet 0..255": (COUNTS.double(), {"scaling": "unit"}, r"train\[0, 0, 0\] = .* states values in \[0, 1\]"),
    "symmetric, yet 0..255": (COUNTS.double(), {"scaling": "symmetric"}, r"states values in \[-1, 1\]"),
    "counts without levels": (COUNTS, {"scaling": "unit"}, "needs the number of levels; state it, such as levels=256"),
    "classes without levels": (
        COUNTS,
        {"scaling": "classes"},
        "'classes' needs the number of levels; state it, such as levels=3 for",
    ),
    "more levels than stated": (COUNTS, {"scaling": "unit", "levels": 17}, r"expected counts in 0\.\.16"),
    "off the grid": (
        torch.tensor([[0.0], [0.1]]),
        {"scaling": "unit", "levels": 17},
        r"train\[1, 0\] = 0.1: not on the",
    ),
    "classes without number": (torch.rand(3, 2), {"scaling": "classes"}, "needs the number of classes; state levels"),
    "classes in between": (torch.tensor([0.5]), {"scaling": "classes", "levels": 3}, "not on the grid of 3 levels"),
    "one level": (COUNTS, {"scaling": "unit", "levels": 1}, "at least 2, got 1"),
    "booleans": (COUNTS > 9, {}, r"train: expected floating point numbers or integer counts, got torch\.bool"),
    "complex": (torch.zeros(3, 2, dtype=torch.complex64), {}, r"got torch\.complex64"),
    "no rows": (torch.zeros(0, 2), {}, r"N >= 1, got shape \[0, 2\]"),
    "a scalar": (torch.tensor(0.5), {}, r"got shape \[\]"),
    "an empty Dataset": (Rows(COUNTS[:0]), {"scaling": "unit"}, "got an empty Dataset"),
    "strings": (np.array(["a", "b"]), {}, "train: expected floating point numbers or integers up to int64.*<U1"),
    "objects": (np.array([[None], [1]], dtype=object), {}, "dtype object"),
    "a list": ([[0.0, 1.0]], {}, "expected a Tensor, a numpy array.*got list"),
    "None": (None, {}, "got NoneType"),
    "another test shape": (
        torch.rand(4, 3),
        {"test": torch.rand(4, 2)},
        r"test: expected data of shape \[3\], got \[2\]",
    ),
    "another item shape": (torch.rand(4, 3), {"test": Rows(torch.rand(4, 2))}, r"test: expected data of shape \[3\]"),
    "two held-out parts": (torch.rand(4, 3), {"test": torch.rand(4, 3), "test_fraction": 0.5}, "leave one out"),
    "fraction of nothing": (torch.rand(4, 3), {"test_fraction": 0.01}, "leaves some of 4 data on both sides"),
    "fraction above one": (torch.rand(4, 3), {"test_fraction": 1.5}, r"test_fraction: expected a number in \(0, 1\)"),
    "levels of a named set": ("digits", {"levels": 17}, "has its own; leave them out"),
    "nan": (torch.tensor([[0.0, math.nan]]), {"scaling": "unit"}, r"train\[0, 1\] = nan: expected finite numbers"),
}


@pytest.mark.parametrize("case", TABLE)
def test_bad_data_are_refused(case: str) -> None:
    data, kwargs, message = TABLE[case]
    with pytest.raises(DataError, match=message) as caught:
        as_dataset(data, **kwargs)
    assert "\n" not in str(caught.value)


def test_whole_floats_are_classes_for_a_categorical_likelihood_once_that_is_said() -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    pair = VAE.preset((2,), Categorical(3), latent_dim=1, hidden=(2,))
    with pytest.raises(DataError, match=r"scaling='classes' and levels=K .*x\.long\(\)"):
        fit(pair, x, epochs=1, progress=False)
    for said in ({"data": x, "scaling": "classes", "levels": 3}, {"data": x.long()}):
        assert fit(pair, **said, epochs=1, progress=False).config["data"]["scaling"] == "classes"
    for wrong in ({"scaling": "none"}, {"scaling": "unit", "levels": 256}):  # what is right for pixels
        with pytest.raises(ValueError, match=r"int64 class indices|states values in \[0, 1\]"):
            fit(pair, x, **wrong, epochs=1, progress=False)


def test_an_iterable_dataset_is_refused() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(())

    with pytest.raises(DataError, match=r"map-style torch Dataset.*got Stream"):
        as_dataset(Stream())


@pytest.mark.parametrize(
    ("x", "kwargs"),
    [
        (COUNTS, {"scaling": "unit", "levels": 256}),
        (COUNTS, {"scaling": "none"}),
        (COUNTS.double(), {"scaling": "none"}),
        (COUNTS.double() / 255, {"scaling": "unit", "levels": 256, "binarization": "fixed"}),
        (COUNTS % 2, {}),
        (COUNTS % 2, {"scaling": "unit"}),
        (torch.tensor([[-3.0], [2.0]]), {}),
        (torch.rand(5), {}),
        (TensorDataset(torch.rand(5, 2)), {"scaling": "unit"}),
    ],
)
def test_what_is_stated_truly_is_accepted(x: Tensor | Dataset, kwargs: dict[str, Any]) -> None:
    data = as_dataset(x, **kwargs)
    if isinstance(data.train, Tensor):
        check_data(data.train)


def test_a_data_set_made_by_hand_is_held_to_its_own_statement() -> None:
    grey = torch.tensor([[0.25], [1.0]])
    with pytest.raises(DataError, match=r"train\[0, 0\] = 0.25: not on the grid of 2 levels"):
        DataSet("mine", grey, scaling="unit", binarization="fixed")
    with pytest.raises(DataError, match="kind: expected one of image, point, text, got 'sound'"):
        DataSet("mine", grey, kind="sound")
    with pytest.raises(DataError, match=r"train_labels: expected one int64 label a datum, shape \[2\]"):
        DataSet("mine", grey, train_labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DataError, match="train_labels: expected an int64 Tensor, got list"):
        DataSet("mine", grey, train_labels=[0] * len(grey))  # type: ignore[arg-type]
    with pytest.raises(
        DataError, match="train: expected a Tensor or a map-style Dataset, got ndarray; as_dataset takes"
    ):
        DataSet("mine", grey.numpy())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the DataSet states scaling 'none' and binarization 'none', got 'unit'"):
        as_dataset(DataSet("mine", grey), scaling="unit")
    assert DataSet("mine", grey, scaling="unit", binarization="dynamic").num_test == 0


SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(deadline=None, max_examples=100)
@given(shape=SHAPES, bad=st.sampled_from([math.nan, math.inf, -math.inf]), data=st.data())
def test_the_first_value_that_is_not_finite_is_named(shape: list[int], bad: float, data: st.DataObject) -> None:
    x = torch.zeros(shape)
    check_data(x, data_shape=tuple(shape[1:]))
    positions = data.draw(st.lists(st.integers(0, x.numel() - 1), min_size=1, max_size=3))
    x.view(-1)[positions] = bad
    first = [int(i) for i in np.unravel_index(min(positions), shape)]
    with pytest.raises(DataError) as caught:
        check_data(x, "test")
    assert str(caught.value).startswith(f"test{first} = {bad}: expected finite numbers")


@settings(deadline=None, max_examples=100)
@given(shape=SHAPES, expected=st.lists(st.integers(1, 4), max_size=3))
def test_another_shape_is_refused_and_no_other(shape: list[int], expected: list[int]) -> None:
    x = torch.zeros(shape)
    if shape[1:] == expected:
        check_data(x, data_shape=tuple(expected))
    else:
        with pytest.raises(DataError) as caught:
            check_data(x, data_shape=tuple(expected))
        assert f"expected data of shape {expected}, got {shape[1:]}" in str(caught.value)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.complex64, torch.complex128]
)
def test_check_data_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(DataError, match=f"expected floating point numbers, or int64 for classes, got {dtype}"):
        check_data(torch.zeros(3, 2).to(dtype))


def test_check_data_accepts_floats_of_any_width_and_classes() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64):
        check_data(torch.zeros(3, 2, dtype=dtype))
    for x, message in ((np.zeros(3), "expected a torch Tensor, got ndarray"), ("abc", "got str"), ([1.0], "got list")):
        with pytest.raises(DataError, match=message):
            check_data(x)
