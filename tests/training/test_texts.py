"""Texts of plain data: hostile ones are refused, and what is written reads back equal."""

import math
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference.training.storage import (
    StorageError,
)
from inference.training.texts import ContentError, read_json, read_yaml, write_json, write_yaml
from tests.training.saved_states import same

YAML_TEXTS = {
    "call": (
        "a: !!python/object/apply:pathlib.Path.touch [MARKER]",
        "has the tag 'tag:yaml.org,2002:python/object/apply",
    ),
    "object": ("!!python/object:pathlib.Path {}", "has the tag"),
    "name": ("a: !!python/name:os.system", "has the tag"),
    "own tag": ("a: !custom 1", "has the tag '!custom'"),
    "standard tag": ("a: !!binary aGk=", "has the tag"),
    "alias": ("a: &x [1]\nb: *x", r"has the alias \*x"),
    "twice": ("lr: 1\nlr: 2", "the key 'lr' stands twice"),
    "twice, nested": ("a: {lr: 1, lr: 2}", "the key 'lr' stands twice"),
    "two documents": ("a: 1\n---\nb: 2", "is not plain YAML: expected a single document"),
    "list": ("- 1", "holds a list; expected a mapping"),
    "empty": ("", "holds a NoneType; expected a mapping"),
    "date": ("a: 2026-05-01", r"\['a'\] is a date"),
    "infinity": ("a: .inf", r"\['a'\] is inf"),
    "number as key": ("1: a", "has the key 1, a int"),
    "list as key": ("? [1]\n: a", "is not plain YAML"),
    "syntax": ("a: [1", "is not plain YAML"),
    "nested": ("a: " + "[" * 1000 + "]" * 1000, "is not plain YAML"),
}
JSON_TEXTS = {
    "list": ("[1]", "holds a list; expected a mapping"),
    "string": ('"a"', "holds a str; expected a mapping"),
    "not a number": ('{"a": NaN}', "NaN is not a JSON number"),
    "overflow": ('{"a": 1e999}', r"\['a'\] is inf"),
    "twice": ('{"a": 1, "a": 1}', "the key 'a' stands twice"),
    "syntax": ("{", "is not plain JSON"),
    "nested": ('{"a":' * 100_000, "is not plain JSON"),
    "pickle": (pickle.dumps({}, 0).decode(), "is not plain JSON"),
}


@pytest.mark.parametrize(
    ("read", "text", "reason"),
    [pytest.param(read_yaml, *case, id=f"yaml: {name}") for name, case in YAML_TEXTS.items()]
    + [pytest.param(read_json, *case, id=f"json: {name}") for name, case in JSON_TEXTS.items()],
)
def test_a_text_that_is_not_plain_data_is_refused(
    read: Callable[[Path], Any], text: str, reason: str, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "file").write_text(text.replace("MARKER", str(marker)))
    with pytest.raises(ContentError, match=reason):
        read(tmp_path / "file")
    assert not marker.exists()


@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_bytes_that_are_not_text_and_files_that_are_not_there(read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    with pytest.raises(ContentError, match="is not UTF-8 text"):
        read(tmp_path / "file")
    with pytest.raises(StorageError, match=r"cannot read .*absent: No such file"):
        read(tmp_path / "absent")


@pytest.mark.parametrize("write", [write_yaml, write_json])
@pytest.mark.parametrize(
    ("obj", "error", "reason"),
    [
        ({"a": (1,)}, TypeError, r"f\['a'\] is a tuple"),
        ({"a": [{1}]}, TypeError, r"f\['a'\]\[0\] is a set"),
        ({"a": np.float64(1)}, TypeError, r"f\['a'\] is a float64"),
        ({"a": torch.ones(1)}, TypeError, r"f\['a'\] is a Tensor"),
        ({"a": {1: 2}}, TypeError, r"f\['a'\] has the key 1, a int"),
        ({"a": math.nan}, ValueError, r"f\['a'\] is nan; expected a finite number"),
        ({"a": -math.inf}, ValueError, r"f\['a'\] is -inf; expected a finite number"),
    ],
)
def test_what_would_not_read_back_equal_is_not_written(
    write: Callable[[Path, Any], None], obj: Any, error: type[Exception], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        write(tmp_path / "f", obj)
    assert not (tmp_path / "f").exists()


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(TEXT, PLAIN, max_size=4))
@example({"\x85": "a\nb\r\u2028 \t\x07\ufeff", "yes": "no", "1e-3": 1e-3, "date": "2026-05-01", "": "é: #x"})
@settings(max_examples=60, deadline=None)
def test_plain_data_reads_back_equal(obj: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(os, "fsync"):
        for write, read in ((write_json, read_json), (write_yaml, read_yaml)):
            write(Path(folder) / "file", obj)
            assert same(read(Path(folder) / "file"), obj)


def test_a_list_that_occurs_twice_is_written_twice(tmp_path: Path) -> None:
    widths = [200, 200]
    write_yaml(tmp_path / "file", {"encoder": widths, "decoder": widths})
    assert read_yaml(tmp_path / "file") == {"encoder": [200, 200], "decoder": [200, 200]}
