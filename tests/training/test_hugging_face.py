"""hf:NAME: one column of a set as data; by a stand-in for the package, and by the package where it is installed."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from inference import DataError, load_data


class Image:
    """Of these stand-ins only the names count."""


class ClassLabel:
    pass


class List:
    pass


class Value:
    pass


class Picture:
    """What pillow hands out."""

    def __init__(self, array, mode="L"):
        self.array, self.mode = np.asarray(array, np.uint8), mode

    def __array__(self, dtype=None, copy=None):
        return self.array


class Rows:
    """A split: columns, and a feature for each."""

    def __init__(self, features, columns):
        self.features, self.columns = features, columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: c[key] for name, c in self.columns.items()}

    def select_columns(self, names):
        return Rows(self.features, {name: self.columns[name] for name in names})


@pytest.fixture
def hub(monkeypatch):
    """Sets by name and configuration, as load_dataset finds them."""
    sets = {}

    def load_dataset(name, config=None):
        if (name, config) not in sets:
            raise FileNotFoundError(f"no set {name}\nand a second line")
        return sets[name, config]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return sets


PIXELS = np.arange(2 * 3 * 4).reshape(2, 3, 4) * 10
IMAGES = {"image": Image(), "label": ClassLabel(), "note": Value()}


def images(pixels, mode="L"):
    return Rows(IMAGES, {"image": [Picture(p, mode) for p in pixels], "label": [3, 1], "note": ["a", "b"]})


def test_images_and_labels_are_taken(hub):
    hub["someone/digits", None] = {"train": images(PIXELS), "test": images(PIXELS[::-1])}
    data = load_data("hf:someone/digits", scaling="unit")
    assert (data.name, data.kind, data.levels, data.num_train, data.num_test) == (
        "hf:someone/digits",
        "image",
        256,
        2,
        2,
    )
    assert torch.allclose(data.train, torch.tensor(PIXELS / 255))
    assert torch.allclose(data.test, torch.tensor(PIXELS[::-1] / 255))
    assert data.train_labels.tolist() == [3, 1]


def test_coloured_images_have_their_channels_first(hub):
    pixels = np.arange(2 * 3 * 4 * 3).reshape(2, 3, 4, 3)
    hub["colour", "small"] = {"train": images(pixels, "RGB")}
    data = load_data("hf:colour@small")
    assert data.train.shape == (2, 3, 3, 4)
    assert torch.equal(data.train[1, 2], torch.tensor(pixels[1, :, :, 2], dtype=data.train.dtype))
    assert data.num_test == 0


def test_arrays_are_points_or_counts(hub):
    hub["points", None] = {"train": Rows({"x": List()}, {"x": [[0.5, 1.5], [2.0, -1.0]]})}
    hub["bits", None] = {"train": Rows({"x": List()}, {"x": [[0, 1], [1, 1]]})}
    points, bits = load_data("hf:points"), load_data("hf:bits")
    assert (points.levels, points.train.tolist()) == (None, [[0.5, 1.5], [2.0, -1.0]])
    assert (bits.levels, bits.train.tolist()) == (2, [[0, 1], [1, 1]])
    assert load_data("hf:bits", scaling="classes").levels == 2
    hub["classes", None] = {"train": Rows({"x": List()}, {"x": [[0, 6], [1, 1]]})}
    with pytest.raises(
        DataError, match=r"got integers up to 6 without it; write the column to an npz file .*, 7 or more"
    ):
        load_data("hf:classes", scaling="classes")
    assert load_data("hf:classes").levels == 256  # as grey values


def test_large_sets_are_read_row_by_row(hub, monkeypatch):
    monkeypatch.setattr("inference.training.hugging_face.IN_MEMORY_VALUES", 23)
    hub["digits", None] = {"train": images(PIXELS)}
    data = load_data("hf:digits", scaling="unit")
    assert not isinstance(data.train, torch.Tensor)
    assert torch.allclose(data.train[1], torch.tensor(PIXELS[1] / 255))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"validation": images(PIXELS)}, "hf:a: expected a split 'train', found validation"),
        ({"train": Rows({"x": Value()}, {"x": [1.0]})}, r"one of arrays, got x \(Value\); keep one"),
        ({"train": Rows({"x": List(), "y": List()}, {"x": [[1.0]], "y": [[1.0]]})}, r"got x \(List\), y \(List\)"),
        ({"train": images(PIXELS, "CMYK")}, r"row 0: expected a grey \(L\) or RGB image, got mode CMYK"),
        ({"train": Rows({"x": List()}, {"x": [[1.0, 2.0], [1.0]]})}, r"row 1 has shape \[1\], the first \[2\]"),
        ({"train": Rows({"x": List()}, {"x": [["a", "b"]]})}, "row 0: expected numbers in one shape, got <U1"),
        ({"train": Rows({"x": List()}, {"x": []})}, "expected at least one row, got none"),
    ],
)
def test_what_is_no_data_is_refused(hub, parts, message):
    hub["a", None] = parts
    with pytest.raises(DataError, match=message) as caught:
        load_data("hf:a")
    assert "\n" not in str(caught.value)


def test_an_unknown_set_is_one_sentence(hub):
    with pytest.raises(
        DataError, match=r"^hf:nowhere: cannot be loaded \(no set nowhere\); check the name and the connection$"
    ):
        load_data("hf:nowhere")


def test_a_missing_package_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package datasets; install ppl-models\[hf\]"):
        load_data("hf:mnist")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_package_itself(tmp_path):
    """A folder of Parquet files, as the hub holds them."""
    import datasets
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pixels = PIXELS.astype(np.uint8)
    (tmp_path / "set").mkdir()
    for part, shown in (("train", pixels), ("test", pixels[::-1])):
        rows = []
        for label, values in zip((1, 0), shown, strict=True):
            Image.fromarray(values).save(tmp_path / "one.png")
            rows.append({"image": {"bytes": (tmp_path / "one.png").read_bytes(), "path": None}, "label": label})
        table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, tmp_path / "set" / f"{part}.parquet")
    data = load_data(f"hf:{tmp_path / 'set'}")
    assert torch.equal(data.train, torch.tensor(pixels).to(data.train.dtype))
    assert torch.equal(data.test, torch.tensor(pixels[::-1].copy()).to(data.test.dtype))
    assert (data.train_labels.tolist(), data.levels) == ([1, 0], 256)
