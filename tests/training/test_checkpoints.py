"""Whole or not there: every crash point, every damaged byte and every hostile file, against a model of the disk.

`FaultyDisk` stands between the code and `os`. It numbers each open, write, fsync, replace and unlink, stops the program at
one of them, and then says which contents a power cut may leave: what was not fsynced may be cut in half, and each change
of a folder that was not fsynced may be lost, one without the other. The judge compares raw bytes with what was saved.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference.training import checkpoints, storage
from inference.training.checkpoints import (
    CheckpointError,
    checkpoint_name,
    flatten_state,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    restore_state,
    save_checkpoint,
)
from inference.training.storage import (
    ContentError,
    RunLock,
    RunLocked,
    StorageError,
    make_folder,
    read_json,
    read_yaml,
    remove_durably,
    sha256,
    write_atomic,
    write_json,
    write_yaml,
)


class State(NamedTuple):
    """What one checkpoint holds."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]


OLD = State({"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(1)}, {"epoch": 1})
NEW = State({"w": torch.arange(6.0).reshape(2, 3) / 3, "n": torch.tensor(2)}, {"epoch": 2})


def same(left: Any, right: Any) -> bool:
    """Equal in type, shape and every bit, NaN included."""
    if isinstance(left, torch.Tensor):
        if not isinstance(right, torch.Tensor) or (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        raw = [tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in (left, right)]
        return raw[0] == raw[1]
    if isinstance(left, dict):
        pairs = zip(left.items(), right.items(), strict=True) if len(left) == len(right) else [((0, 0), (1, 1))]
        return isinstance(right, dict) and all(same(a, b) and same(x, y) for (a, x), (b, y) in pairs)
    if type(left) is not type(right):
        return False
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return struct.pack("<d", left) == struct.pack("<d", right)
    return left == right


def holds(folder: Path) -> State | None:
    """What a resume would find."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = latest_checkpoint(folder)
    return None if found is None else State(*found[1:])


def is_state(found: State | None, wanted: State | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return same(dict(sorted(wanted.tensors.items())), found.tensors) and same(wanted.values, found.values)


# ---------------------------------------------------------------------------------------------- the model of the disk


class Crash(BaseException):
    """The process is dead: nothing that it would do from here on happens."""


class Change(NamedTuple):
    """A change of a folder: the file's content after it (None: no file), and the inode that holds it."""

    path: Path
    after: bytes | None
    inode: int


class FaultyDisk:
    """Counts the calls, stops at number `at` in the way `how`, and remembers what no fsync has covered."""

    COUNTED = ("open", "write", "fsync", "replace", "unlink")

    def __init__(self, at: int | None = None, how: str = "before") -> None:
        self.at, self.how = at, how
        self.calls: list[str] = []
        self.dead = False
        self.unsynced: set[int] = set()
        self.pending: list[Change] = []
        self.synced: dict[Path, bytes | None] = {}  # content, on the disk for sure, of files with pending changes
        self.real = {name: getattr(os, name) for name in self.COUNTED}

    def __enter__(self) -> "FaultyDisk":
        self.patches = [mock.patch.object(os, name, getattr(self, f"_{name}")) for name in self.COUNTED]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for patch in self.patches:
            patch.stop()

    def _call(self, name: str, do: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        if self.dead:
            raise Crash
        self.calls.append(name)
        if len(self.calls) - 1 != self.at:
            return do()
        if self.how == "error":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        {"before": lambda: None, "half": half, "after": do}[self.how]()
        self.dead = True
        raise Crash

    def _open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        def do() -> int:
            descriptor = self.real["open"](path, flags, mode)
            if flags & os.O_TRUNC:
                self.unsynced.add(os.fstat(descriptor).st_ino)
            return descriptor

        return self._call("open", do)

    def _write(self, descriptor: int, data: Any) -> int:
        def do(part: int = len(data)) -> int:
            self.unsynced.add(os.fstat(descriptor).st_ino)
            return self.real["write"](descriptor, data[:part])

        return self._call("write", do, half=lambda: do(len(data) // 2))

    def _fsync(self, descriptor: int) -> None:
        def do() -> None:
            inode = os.fstat(descriptor).st_ino
            self.unsynced.discard(inode)
            for change in [change for change in self.pending if change.path.parent.stat().st_ino == inode]:
                self.pending.remove(change)
                self.synced.pop(change.path, None)

        self._call("fsync", do)

    def _replace(self, source: Path, target: Path) -> None:
        assert source.parent == target.parent, "a rename is atomic for sure within one folder"

        def do() -> None:
            self.synced.setdefault(target, target.read_bytes() if target.exists() else None)
            self.pending.append(Change(target, source.read_bytes(), source.stat().st_ino))
            self.real["replace"](source, target)

        self._call("replace", do)

    def _unlink(self, path: Path) -> None:
        def do() -> None:
            before = path.read_bytes() if path.exists() else None
            self.real["unlink"](path)
            self.synced.setdefault(path, before)
            self.pending.append(Change(path, None, 0))

        self._call("unlink", do)

    def after_power_cut(self, folder: Path) -> Iterator[dict[Path, bytes]]:
        """Every content of the folder that the disk may hold now."""
        for cut in (False, True):

            def stored(content: bytes | None, inode: int, cut: bool = cut) -> bytes | None:
                return content[: len(content) // 2] if cut and content and inode in self.unsynced else content

            for reached in itertools.product((False, True), repeat=len(self.pending)):
                files = {path: stored(path.read_bytes(), path.stat().st_ino) for path in folder.iterdir()}
                files.update(self.synced)
                for change, done in zip(self.pending, reached, strict=True):
                    if done:
                        files[change.path] = stored(change.after, change.inode)
                yield {path: content for path, content in files.items() if content is not None}


def save(folder: Path, step: int, state: State) -> Path:
    return save_checkpoint(folder, checkpoint_name(step), *state)


def save_and_prune(folder: Path) -> None:
    save(folder, 2, NEW)
    prune_checkpoints(folder, keep=1)


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "a new step": lambda folder: save(folder, 2, NEW),
    "the same step": lambda folder: save(folder, 1, NEW),
    "a new step, then prune": save_and_prune,
}
FAULTS = ("before", "half", "after", "error")


def violations(work: Path, action: Callable[[Path], Any], old: State | None = OLD) -> list[str]:
    """What goes wrong, fault by fault.

    "lost": neither the old nor the new checkpoint is found, or, after the action has returned, not the new one.
    """
    found = []

    def folder_with(files: dict[str, bytes]) -> Path:
        folder = Path(tempfile.mkdtemp(dir=work))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder

    start = folder_with({})
    if old is not None:
        save(start, 1, old)
    files = {path.name: path.read_bytes() for path in start.iterdir()}

    def check(folder: Path, allowed: list[State | None], what: str) -> None:
        try:
            survivor = holds(folder)
        except CheckpointError:
            found.append(f"lost: {what}")
        else:
            if not any(is_state(survivor, state) for state in allowed):
                found.append(f"lost: {what}")

    def check_disk(disk: FaultyDisk, folder: Path, allowed: list[State | None], what: str) -> None:
        check(folder, allowed, what)
        for index, content in enumerate(disk.after_power_cut(folder)):
            kept = folder_with({path.name: data for path, data in content.items()})
            check(kept, allowed, f"{what}, power cut {index}")

    with FaultyDisk() as disk:
        folder = folder_with(files)
        action(folder)
    check_disk(disk, folder, [NEW], "no fault")

    for how, at in itertools.product(FAULTS, range(len(disk.calls))):
        folder = folder_with(files)
        what = f"{how} {at} ({disk.calls[at]})"
        with FaultyDisk(at, how) as broken:
            try:
                action(folder)
            except (Crash, StorageError):
                pass
            except OSError:
                found.append(f"untyped error: {what}")
            else:
                found.append(f"unnoticed: {what}")
        check_disk(broken, folder, [old, NEW], what)
        if how == "error" and [*folder.glob(".*")]:
            found.append(f"temporary file left: {what}")
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_after_a_fault_at_any_call_the_old_or_the_new_checkpoint_loads(name: str, tmp_path: Path) -> None:
    assert violations(tmp_path, SCENARIOS[name]) == []


def test_after_a_fault_in_the_first_save_there_is_none_or_the_new_checkpoint(tmp_path: Path) -> None:
    assert violations(tmp_path, lambda folder: save(folder, 1, NEW), old=None) == []


def lost(found: list[str]) -> list[str]:
    return [what for what in found if what.startswith("lost")]


def in_place(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.write(descriptor, data)
    os.fsync(descriptor)
    os.close(descriptor)


def _through_temporary(path: Path, data: bytes, sync_file: bool, sync_folder: bool) -> None:
    temporary = path.with_name("temporary")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.write(descriptor, data)
    if sync_file:
        os.fsync(descriptor)
    os.close(descriptor)
    os.replace(temporary, path)
    if sync_folder:
        descriptor = os.open(path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


BAD_WRITERS: dict[str, Callable[[Path, bytes], None]] = {
    "not atomic": in_place,
    "file not synced": lambda path, data: _through_temporary(path, data, sync_file=False, sync_folder=True),
    "folder not synced": lambda path, data: _through_temporary(path, data, sync_file=True, sync_folder=False),
}


@pytest.mark.parametrize("name", BAD_WRITERS)
def test_the_enumeration_catches_a_bad_writer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "write_atomic", BAD_WRITERS[name])
    assert lost(violations(tmp_path, SCENARIOS["the same step"]))


def test_the_enumeration_catches_a_bad_order_of_good_writes(tmp_path: Path) -> None:
    new = save(tmp_path / "aside", 1, NEW).read_bytes()

    def data_then_hash(folder: Path) -> None:
        """Between the two writes, the new data stand beside the old hash only."""
        path = folder / f"{checkpoint_name(1)}.safetensors"
        write_atomic(path, new)
        write_atomic(Path(f"{path}.sha256"), f"{hashlib.sha256(new).hexdigest()}  {path.name}\n".encode())

    def delete_first(folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            remove_durably(path)
        save(folder, 2, NEW)

    assert lost(violations(tmp_path, data_then_hash))
    assert lost(violations(tmp_path, delete_first))


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


# ------------------------------------------------------------------------------------------- a disk that says no


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_refusal_is_loud_and_the_previous_intact(
    code: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    path = tmp_path / "config.yaml"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(
            StorageError, match=f"cannot write .*{os.strerror(code)}; .* is intact: make room"
        ) as caught:
            write_atomic(path, b"new")
    assert caught.value.errno == code
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_the_kernel_calls_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, OLD)
    real = os.open
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "open", lambda path, flags, *mode: real("/dev/full" if flags & os.O_CREAT else path, os.O_WRONLY)
        )
        with pytest.raises(StorageError, match="No space left on device"):
            save(tmp_path, 2, NEW)
    assert is_state(holds(tmp_path), OLD)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the injected refusals above stand in")
def test_a_read_only_folder(tmp_path: Path) -> None:
    save(tmp_path, 1, OLD)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Permission denied"):
            save(tmp_path, 2, NEW)
        assert is_state(holds(tmp_path), OLD)
    finally:
        tmp_path.chmod(0o700)


def test_when_only_the_folders_sync_fails_the_sentence_says_that_the_new_content_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with pytest.raises(StorageError, match="has its new content, but its folder could not be synced"):
        write_atomic(tmp_path / "note", b"new")
    assert (tmp_path / "note").read_bytes() == b"new"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    write_atomic(tmp_path / "note", b"0123456789")
    assert (tmp_path / "note").read_bytes() == b"0123456789"


def test_an_interrupt_passes_through_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "note", b"new")
    assert [*tmp_path.iterdir()] == []


def test_what_is_not_a_regular_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "link", "folder"):
        with pytest.raises(StorageError, match=f"{name}: it is not a regular file"):
            write_atomic(tmp_path / name, b"new")
    assert (tmp_path / "pipe").is_fifo()


def test_folders_and_deletions(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot create the folder .*file"):
        make_folder(tmp_path / "file" / "b")
    remove_durably(tmp_path / "file")
    remove_durably(tmp_path / "file")
    assert not (tmp_path / "file").exists()
    with pytest.raises(StorageError, match=r"cannot delete .*a: "):
        remove_durably(tmp_path / "a")
    with pytest.raises(StorageError, match=r"cannot read .*file: No such file"):
        sha256(tmp_path / "file")


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


# --------------------------------------------------------------------------------------------------------- one writer

# The module is loaded from its file: the child needs neither the package nor torch.
CHILD = """
import importlib.util, os, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("storage", sys.argv[1])
storage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(storage)
lock = storage.RunLock(Path(sys.argv[2]))
lock.__enter__()
print("locked", flush=True)
if sys.argv[3] == "exit":
    os._exit(1)
time.sleep(60)
"""


def child(folder: Path, what: str) -> "subprocess.Popen[str]":
    arguments = [sys.executable, "-c", CHILD, storage.__file__, str(folder), what]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_a_second_writer_is_refused_until_the_first_leaves(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(RunLocked, match=f"{tmp_path} is being written by process {os.getpid()};"):
        RunLock(tmp_path).__enter__()
    lock = RunLock(tmp_path)
    for _ in range(2):
        with lock:
            pass


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    with child(tmp_path, "wait") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RunLocked, match=f"process {process.pid};"):
            RunLock(tmp_path).__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
    with RunLock(tmp_path):
        pass


def test_a_writer_that_ends_without_goodbye_leaves_no_lock(tmp_path: Path) -> None:
    with child(tmp_path, "exit") as process:
        assert process.stdout is not None
        assert process.stdout.read() == "locked\n"
    assert process.returncode == 1
    with RunLock(tmp_path):
        pass


def test_the_lock_follows_no_link_and_needs_its_folder(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="cannot open the lock"):
        RunLock(tmp_path).__enter__()
    assert (tmp_path / "victim").read_bytes() == b"precious"
    with pytest.raises(StorageError, match=r"cannot open the lock .*absent"):
        RunLock(tmp_path / "absent").__enter__()


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
