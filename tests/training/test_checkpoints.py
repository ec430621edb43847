"""Checkpoints after damaged bytes, from hostile files, and which one is the newest."""

import contextlib
import hashlib
import json
import math
import pickle
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from inference.training.checkpoints import (
    CheckpointError,
    checkpoint_name,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from tests.training.saved_states import NEW, OLD, State, holds, is_state, save

# ------------------------------------------------------------------------------------------------------ damaged bytes


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, bytes]:
    """A folder with a small checkpoint and a newer one of about 300 KB; the path and the bytes of the newer."""
    save(tmp_path, 1, OLD)
    path = save_checkpoint(tmp_path, checkpoint_name(2), {"w": torch.randn(37_500)}, {"epoch": 2})
    return path, path.read_bytes()


def refused_and_the_previous_found(path: Path, reason: str) -> bool:
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(path)
    with pytest.warns(RuntimeWarning, match=reason):
        found = latest_checkpoint(path.parent)
    return found is not None and is_state(State(*found[1:]), OLD)


def test_no_truncated_checkpoint_is_accepted(large: tuple[Path, bytes]) -> None:
    path, data = large
    assert len(data) > 300_000
    for length in [*range(0, len(data), 4096), len(data) - 1]:
        path.write_bytes(data[:length])
        assert refused_and_the_previous_found(path, f"is truncated or changed: the SHA-256 of its {length} bytes")


def test_no_flipped_bit_is_accepted(large: tuple[Path, bytes]) -> None:
    path, data = large
    draw = random.Random(20_260_501)
    accepted_without_hash = 0
    for _ in range(1000):
        bit = draw.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert refused_and_the_previous_found(path, "is truncated or changed")
        with contextlib.suppress(safetensors.SafetensorError):
            accepted_without_hash += len(safetensors.torch.load(bytes(flipped)))
    # The twin: the format alone takes nearly every one of them.
    assert accepted_without_hash > 900


def test_no_flipped_bit_of_the_hash_is_accepted(tmp_path: Path) -> None:
    save(tmp_path, 1, OLD)
    path = save(tmp_path, 2, NEW)
    hash_path = Path(f"{path}.sha256")
    text = hash_path.read_bytes()
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        hash_path.write_bytes(flipped)
        assert refused_and_the_previous_found(path, "is damaged|is truncated or changed")
    hash_path.write_bytes(text)
    assert is_state(holds(tmp_path), NEW)


# ------------------------------------------------------------------------------------------------------ hostile files


class _Bomb:
    """Unpickling it creates the file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def _torch_saved(value: Any, path: Path, zipped: bool) -> bytes:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.unlink()
    return data


def _safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _with_values(text: str) -> bytes:
    return _safetensors(json.dumps({"__metadata__": {"values": text}}).encode())


ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "pickle": (lambda marker: pickle.dumps(_Bomb(marker)), "a pickle or torch.save archive, which is never read"),
    "pickle, protocol 0": (lambda marker: pickle.dumps(_Bomb(marker), 0), "is not a safetensors file"),
    "torch.save": (lambda marker: _torch_saved(_Bomb(marker), marker, True), "a pickle or torch.save archive"),
    "torch.save, legacy": (lambda marker: _torch_saved(_Bomb(marker), marker, False), "a pickle or torch.save archive"),
    "weights by torch.save": (
        lambda marker: _torch_saved({"w": torch.ones(1)}, marker, True),
        "a pickle or torch.save archive",
    ),
    "empty": (lambda _: b"", "is not a safetensors file"),
    "a header longer than the file": (lambda _: struct.pack("<Q", 1 << 62) + b"{}", "is not a safetensors file"),
    "a header that is no mapping": (lambda _: _safetensors(b"[]"), "is not a safetensors file"),
    "a nested header": (lambda _: _safetensors(b'{"a":' * 5000 + b"1" + b"}" * 5000), "is not a safetensors file"),
    "a tensor beyond the end": (lambda _: _safetensors(f'{{"w": {ENTRY}}}'.encode()), "is not a safetensors file"),
    "an unknown dtype": (
        lambda _: _safetensors(f'{{"w": {ENTRY}}}'.replace("F32", "F4").encode(), b"...."),
        "is not a safetensors file",
    ),
    "one name twice": (
        lambda _: _safetensors(
            b'{"__metadata__": {"values": "{}"}, "w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, '
            b'"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
        ),
        "is not a safetensors file",
    ),
    "no metadata": (lambda _: safetensors.torch.save({"w": torch.ones(1)}), "has no values in its metadata"),
    "other metadata": (lambda _: safetensors.torch.save({}, {"format": "pt"}), "has no values in its metadata"),
    "values that are no JSON": (lambda _: _with_values("{'a': 1}"), "the metadata of .* is not plain JSON"),
    "values that are no mapping": (lambda _: _with_values("[1]"), "holds a list; expected a mapping"),
    "values with NaN": (lambda _: _with_values('{"a": NaN}'), "NaN is not a JSON number"),
    "values with a key twice": (lambda _: _with_values('{"a": 1, "a": 2}'), "the key 'a' stands twice"),
    "values nested": (lambda _: _with_values('{"a":' * 100_000), "is not plain JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_with_its_right_hash_is_refused_and_not_run(name: str, tmp_path: Path) -> None:
    make, reason = HOSTILE[name]
    marker = tmp_path / "marker"
    data = make(marker)
    path = tmp_path / "checkpoints" / f"{checkpoint_name(1)}.safetensors"
    path.parent.mkdir()
    path.write_bytes(data)
    Path(f"{path}.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(path)
    with (
        pytest.warns(RuntimeWarning, match=reason),
        pytest.raises(CheckpointError, match=r"1 checkpoint.* none verifies"),
    ):
        latest_checkpoint(path.parent)
    assert not marker.exists()


def test_the_hostile_pickles_are_live(tmp_path: Path) -> None:
    pickle.loads(HOSTILE["pickle"][0](tmp_path / "marker"))
    assert (tmp_path / "marker").exists()


# -------------------------------------------------------------------------------------------- which one is the newest


def test_no_checkpoint_is_none_and_a_save_that_was_cut_short_is_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None
    path = save(tmp_path, 1, OLD)
    save_checkpoint(tmp_path, "best", *NEW)
    Path(f"{path}.sha256").unlink()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"has no step-000000001\.safetensors\.sha256 beside it"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"cannot read .*absent"):
        load_checkpoint(tmp_path / "absent.safetensors")
    assert is_state(State(*load_checkpoint(tmp_path / "best.safetensors")), NEW)


def test_the_newest_is_the_one_of_the_largest_step(tmp_path: Path) -> None:
    for step in (1_000_000_000, 999_999_999, 2):
        save_checkpoint(tmp_path, checkpoint_name(step), {}, {"step": step})
    found = holds(tmp_path)
    assert found is not None
    assert found.values == {"step": 1_000_000_000}


def test_a_checkpoint_whose_data_are_gone_is_reported(tmp_path: Path) -> None:
    save(tmp_path, 1, OLD)
    path = save(tmp_path, 2, NEW)
    path.unlink()
    assert refused_and_the_previous_found(path, "cannot read .*step-000000002")


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:14]) for path in folder.glob("step-*.safetensors"))


def test_pruning_keeps_the_newest_that_verify(tmp_path: Path) -> None:
    paths = {step: save(tmp_path, step, OLD) for step in range(1, 7)}
    save_checkpoint(tmp_path, "best", *NEW)
    (tmp_path / ".step-000000003.safetensors.0123.tmp").write_bytes(b"left by a killed writer")
    paths[5].write_bytes(b"damaged")
    Path(f"{paths[2]}.sha256").unlink()
    with pytest.warns(RuntimeWarning, match=r"skipped a damaged checkpoint: .*step-000000005"):
        prune_checkpoints(tmp_path, keep=2)
    names = {f"step-00000000{step}.safetensors{end}" for step in (4, 5, 6) for end in ("", ".sha256")}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "best.safetensors", "best.safetensors.sha256"}


def test_pruning_deletes_nothing_while_too_few_verify(tmp_path: Path) -> None:
    prune_checkpoints(tmp_path / "absent")
    paths = [save(tmp_path, step, OLD) for step in (1, 2, 3)]
    for path in paths[1:]:
        path.write_bytes(b"damaged")
    with pytest.warns(RuntimeWarning, match="skipped a damaged checkpoint"):
        prune_checkpoints(tmp_path, keep=2)
    assert steps(tmp_path) == [1, 2, 3]
    with pytest.raises(ValueError, match="keep is 0; expected 1 or more"):
        prune_checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("name", ["", "../out", "a/b", ".hidden", "a\nb", "/etc/x"])
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the checkpoint name is .*expected letters"):
        save_checkpoint(tmp_path, name, *OLD)
    with pytest.raises(ValueError, match="step is -1"):
        checkpoint_name(-1)


def test_equal_checkpoints_are_equal_files(tmp_path: Path) -> None:
    paths = [save(tmp_path / side, 1, NEW) for side in ("left", "right")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_reads_the_hash(tmp_path: Path) -> None:
    path = save(tmp_path, 1, OLD)
    arguments = ["sha256sum", "--check", "--strict", "--status", f"{path.name}.sha256"]
    assert subprocess.run(arguments, cwd=tmp_path, check=False).returncode == 0
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert subprocess.run(arguments, cwd=tmp_path, check=False).returncode == 1


@pytest.mark.parametrize(
    ("tensors", "values", "error", "reason"),
    [
        ({"w": [1.0]}, {}, TypeError, r"tensors\['w'\] is a list; expected a dense tensor"),
        ({"w": torch.eye(2).to_sparse()}, {}, TypeError, r"tensors\['w'\] is a tensor of layout torch\.sparse_coo"),
        ({"w": torch.ones(2, device="meta")}, {}, TypeError, "device meta; expected a dense tensor with data"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, {}, TypeError, "dtype torch.complex128.*; expected a real"),
        ({"__metadata__": torch.ones(2)}, {}, ValueError, "'__metadata__', which safetensors reserves"),
        ({}, {"step": (1,)}, TypeError, r"values\['step'\] is a tuple"),
        ({}, {"best": math.inf}, ValueError, r"values\['best'\] is inf"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_before_anything_is_written(
    tensors: Any, values: Any, error: type[Exception], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        save_checkpoint(tmp_path, "state", tensors, values)
    assert [*tmp_path.iterdir()] == []
