"""A disk that says no, and one writer per folder."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inference.training import storage
from inference.training.storage import (
    RunLock,
    RunLocked,
    StorageError,
    make_folder,
    remove_durably,
    sha256,
    write_atomic,
)
from tests.training.saved_states import NEW, OLD, holds, is_state, save

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
