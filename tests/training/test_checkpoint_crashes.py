"""After a fault at any call of a save, the old or the new checkpoint loads; and bad writers are caught."""

import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inference.training import checkpoints
from inference.training.checkpoints import (
    CheckpointError,
    checkpoint_name,
    prune_checkpoints,
)
from inference.training.storage import (
    StorageError,
    remove_durably,
    write_atomic,
)
from tests.training.faulty_disk import Crash, FaultyDisk
from tests.training.saved_states import NEW, OLD, State, holds, is_state, save


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
