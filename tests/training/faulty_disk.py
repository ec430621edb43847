"""A model of the disk: `FaultyDisk` stands between the code and `os`, and dies where it is told to.

It numbers each open, write, fsync, replace and unlink, stops the program at one of them, and then says which contents a
power cut may leave: what was not fsynced may be cut in half, and each change of a folder that was not fsynced may be
lost, one without the other.
"""

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock


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
