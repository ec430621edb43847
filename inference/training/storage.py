"""Files that are whole or not there: atomic writes, a lock for one writer, a hash.

A file is replaced, never edited. The order of the calls is the whole argument: write a temporary file *in the target's
folder* (so that both are on one file system), fsync it (so that its bytes are on the disk before its name is),
`os.replace` (atomic in POSIX), fsync the folder (so that the new name is on the disk too). A crash, a full disk or a
power cut between any two of them leaves the previous content or the new one, complete.

The one constraint: POSIX (`fcntl.flock`, fsync of a folder).
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
from pathlib import Path
from typing import Self


class StorageError(OSError):
    """The file system refused: disk full, no permission, no such folder. `errno` is that of the cause."""

    def __init__(self, sentence: str, cause: OSError | None = None) -> None:
        super().__init__(sentence)
        self.errno = cause.errno if cause is not None else None


class RunLocked(RuntimeError):
    """Another writer holds the folder."""


def sha256(source: Path | bytes) -> str:
    """SHA-256 (FIPS 180-4) of a file's content or of the bytes themselves.

    Args:
        source: a file or bytes.

    Returns:
        64 lower-case hexadecimal digits.

    Raises:
        StorageError: the file cannot be read.

    Example:
        >>> sha256(b"abc")[:8]
        'ba7816bf'
    """
    return hashlib.sha256(source if isinstance(source, bytes) else read_bytes(source)).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data`, all or nothing, and return only when it is on the disk.

    Args:
        path: the target; its folder exists, and it is a regular file or not there yet.
        data: the whole new content.

    Raises:
        StorageError: the system refused. The previous content is intact, unless the sentence says that the new
            content, complete, is already in place (only the last step, the folder's fsync, failed).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomic(Path(folder) / "note.txt", b"old")
        ...     write_atomic(Path(folder) / "note.txt", b"new")
        ...     (Path(folder) / "note.txt").read_bytes(), len(os.listdir(folder))
        (b'new', 1)
    """
    if os.path.exists(path) and not os.path.isfile(path):
        # Replacing would delete a device or a pipe (`--out /dev/null` as root).
        raise StorageError(f"cannot write {path}: it is not a regular file; name another one")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        _write_synced(temporary, data)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise StorageError(
                f"cannot write {path}: {_why(error)}; what was there before is intact: "
                "make room or allow writing in its folder and try again",
                error,
            ) from error
        raise
    try:
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path} has its new content, but its folder could not be synced: {_why(error)}; "
            "a power cut may still undo the write, so check the disk and write again",
            error,
        ) from error


def remove_durably(path: Path) -> None:
    """Delete `path`, which need not exist, and return only when the deletion is on the disk.

    Raises:
        StorageError: the system refused.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"cannot delete {path}: {_why(error)}; allow writing in its folder", error) from error


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents where they are missing, durably.

    Raises:
        StorageError: the system refused, or a file of that name is in the way.
    """
    missing = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in missing:
            _sync_folder(place.parent)
    except OSError as error:
        raise StorageError(f"cannot create the folder {folder}: {_why(error)}; name another one", error) from error


def read_bytes(path: Path) -> bytes:
    """The whole content of `path`.

    Raises:
        StorageError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {_why(error)}; check the name and the permissions", error) from error


class RunLock:
    """One writer per folder: holds `flock` on `folder/.lock` while the context is open.

    The kernel drops the lock with the process, however it ends, so a crash never leaves a stale one. The file stays:
    deleting it would let two writers lock two files of one name. Processes forked inside the context share the lock.

    Args:
        folder: an existing folder.

    Raises:
        RunLocked: on entering, when another writer, of this process or another, is inside.
        StorageError: on entering, when the lock file cannot be opened or locked.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, RunLock(Path(folder)):
        ...     try:
        ...         RunLock(Path(folder)).__enter__()
        ...     except RunLocked:
        ...         print("refused")
        refused
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        path = self.folder / ".lock"
        try:
            # No link is followed: the file is about to be truncated.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise StorageError(
                f"cannot open the lock {path}: {_why(error)}; allow writing in its folder", error
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise RunLocked(
                f"{self.folder} is being written by process {holder}; wait for it to end or choose another folder"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise StorageError(f"cannot lock {path}: {_why(error)}; use a file system with flock", error) from error
        self._descriptor = descriptor
        return self

    def __exit__(self, *exception: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            # One call may take less than it was given: at 2 GiB on Linux, and when the disk fills.
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why(error: OSError) -> str:
    return error.strerror or str(error)
