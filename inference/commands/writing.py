"""Files that commands write: nothing that exists is replaced unless that is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

FORCE = typer.Option("--force", help="replace files that exist")


def check_new(path: Path, *, force: bool) -> None:
    """Refuses, before any work is done, a file that could not be written after it.

    Raises:
        FileNotFoundError: its folder does not exist.
        FileExistsError: it exists and ``force`` is False.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected an existing folder for {path.name}, got {path.parent}: make it first")
    if path.exists() and not force:
        raise FileExistsError(
            f"expected a new file, but {path} exists: choose another name, or replace it with --force"
        )


def check_suffix(path: Path, *suffixes: str) -> str:
    """The file's suffix in lower case.

    Raises:
        ValueError: it is not one of those.

    Example:
        >>> check_suffix(Path("grid.PNG"), ".png", ".npz")
        '.png'
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"expected a file name ending in {' or '.join(suffixes)}, got {path.name!r}: rename it")
    return path.suffix.lower()


def keep_record(path: Path, record: dict[str, Any], *, force: bool) -> str:
    """Writes a record where there is none; other figures that are there stay unless ``force``. Says what was done."""
    from inference.training.texts import read_json, write_json

    if path.exists() and not force:
        if read_json(path) == record:
            return f"{path} holds these figures"
        return f"{path} holds figures of another call and was left as it is; --force replaces it"
    write_json(path, record)
    return f"wrote {path}"


def write_rows(path: Path, columns: Mapping[str, Sequence[float | bool | str]]) -> str:
    """Writes what is known of each datum as CSV, a row each, numbered from 0; what was written, in words.

    Args:
        path: checked by :func:`check_new` before.
        columns: values by datum, of one length each, by name.
    """
    import csv
    import io

    from inference.training.storage import write_atomic

    text = io.StringIO()
    rows = list(zip(*columns.values(), strict=True))
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["datum", *columns])
    table.writerows([i, *(int(cell) if isinstance(cell, bool) else cell for cell in row)] for i, row in enumerate(rows))
    write_atomic(path, text.getvalue().encode())
    return f"wrote {len(rows)} rows to {path}"
