"""What there is to train on, by the names that :func:`~inference.training.datasets.load_data` knows; nothing is loaded."""

from __future__ import annotations

from typing import Any

from inference.training.densities import TOY_DENSITIES
from inference.training.scaling import BINARIZATIONS, SCALINGS
from inference.training.text_data import WINDOW

__all__ = ["list_data"]


def list_data() -> list[dict[str, Any]]:
    """What `load_data` knows, a row each: spec, what, kind, shape, num_train, num_test, levels, scaling, binarization.

    Nothing is loaded; None is what depends on the file. `scaling` and `binarization` list what can be asked for.

    >>> [row["spec"] for row in list_data()][:3]
    ['digits', 'two_moons', 'rings']
    """
    columns = ("spec", "what", "kind", "shape", "num_train", "num_test", "levels")
    toys = [(name, toy.formula, "point", [2], 8000, 2000, None) for name, toy in TOY_DENSITIES.items()]
    folder = "png and jpg files, or train/ and test/ with them (needs ppl-models[images])"
    arrays = "numpy arrays: train; optionally test, train_labels, test_labels, levels"
    table = "a table of numbers, names in its first line; labels in a column of csv:FILE@COLUMN"
    text = f"the characters of a UTF-8 text, in windows of {WINDOW}; of L with text:FILE@L"
    hub = "a data set of the Hugging Face hub; a configuration of it with hf:NAME@CONFIG (needs ppl-models[hf])"
    entries = [
        ("digits", "scikit-learn's handwritten digits", "image", [8, 8], 1500, 297, 17),
        *toys,
        (
            "mnist:FOLDER",
            "MNIST's four idx files, gzipped or not, or a set like it",
            "image",
            [28, 28],
            60000,
            10000,
            256,
        ),
        ("npz:FILE", arrays, None, None, None, None, None),
        ("csv:FILE", table, "point", None, None, None, None),
        ("images:FOLDER", folder, "image", None, None, None, 256),
        ("text:FILE", text, "text", None, None, None, None),
        ("hf:NAME", hub, None, None, None, None, None),
    ]
    rows: list[dict[str, Any]] = [dict(zip(columns, entry, strict=True)) for entry in entries]
    for row in rows:
        continuous = row["kind"] == "point"
        characters = row["kind"] == "text"
        of_levels = [name for name in SCALINGS if name not in ("standard", "counts")]
        known = of_levels if row["levels"] is not None else list(SCALINGS)
        row["scaling"] = ["classes"] if characters else _of_points(row["spec"]) if continuous else known
        row["binarization"] = ["none"] if continuous or characters else list(BINARIZATIONS)
    return rows


def _of_points(spec: str) -> list[str]:
    return ["none", "standard"] if spec in TOY_DENSITIES else ["none", "standard", "counts"]
