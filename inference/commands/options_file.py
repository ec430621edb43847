"""RUN/options.yaml: what ``ppl train`` was told and chose, there from the first step of a run to whatever ends it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inference.commands.options import OPTIONS_FILE
from inference.training.storage import make_folder, read_bytes, write_atomic

__all__ = ["kept_beside_run"]


@contextmanager
def kept_beside_run(out: Path, text: str) -> Iterator[None]:
    """Writes the text before the block trains into ``out``; where no run came of it, all is as it was before.

    Before, because a run that is killed comes to no end; whether one began or went on is seen by its config.yaml.

    Raises:
        StorageError: the file system refused.
    """
    path, record = out / OPTIONS_FILE, out / "config.yaml"
    is_new, before, recorded = not out.exists(), _content(path), _content(record)
    make_folder(out)
    write_atomic(path, f"{text}\n".encode())
    try:
        yield
    except BaseException:
        if _content(record) == recorded:
            if before is not None:
                write_atomic(path, before)
            else:
                path.unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):  # something else was put there
                    out.rmdir()
        raise


def _content(path: Path) -> bytes | None:
    return read_bytes(path) if path.is_file() else None
