"""Tables as data: a CSV file of numbers, a row a datum.

    csv:FILE            every column is a dimension
    csv:FILE@COLUMN     as before, but COLUMN holds each row's label: any words, numbered in sorted order

Of the other columns some can be chosen by name, in an order of one's own.

The first line names the columns; commas, semicolons or tabs stand between them. Zeros and ones throughout are binary data of
two levels; everything else, whole numbers included, is continuous, for a table cannot say how many levels there are.

The one constraint: nothing is guessed or filled in. A cell that is empty or no finite number is refused, by its column and
row; rows count from 1 below the names.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inference.training.scaling import DataError
from inference.training.sources import Source


def read_csv(place: Path, columns: Sequence[str] | None = None) -> Source:
    """A CSV file as data ``[N, columns]``.

    Args:
        place: FILE, or FILE@COLUMN.
        columns: which columns are dimensions, in this order; None: all but the labels, as they stand.

    Returns:
        Source of floats, or of uint8 zeros and ones with 2 levels; with labels if a column of them is named.

    Raises:
        DataError: no such file or column, no rows, names that are missing or repeat, a row of another length, a cell that is
            empty or no finite number, a row without its label.
    """
    path, label = _path_and_label(str(place))
    names, rows = _read(path)
    label_names: tuple[str, ...] | None = None
    labels: Tensor | None = None
    if label is not None:
        column = [row[_place(label, names, path, "of labels")] for row in rows]
        if "" in column:
            raise DataError(
                f"{path}: column {label!r}, row {column.index('') + 1}: expected a label, got nothing; fill it in"
            )
        label_names = _in_order(set(column))
        labels = torch.tensor([label_names.index(word) for word in column])
    kept = [name for name in names if name != label] if columns is None else list(columns)
    if label in kept or len(set(kept)) < len(kept):
        raise DataError(
            f"{path}: expected columns named once and apart from the labels, got {', '.join(kept)}; correct them"
        )
    if not kept:
        raise DataError(f"{path}: expected columns of numbers beside the labels, found none; add some")
    places = [_place(name, names, path, "of numbers") for name in kept]
    values = np.array([[_number(row[j], path, names[j], i) for j in places] for i, row in enumerate(rows)])
    binary = bool(((values == 0) | (values == 1)).all())
    train = torch.from_numpy(values.astype(np.uint8) if binary else values)
    levels = 2 if binary else None
    return Source(
        f"csv:{place}",
        train,
        None,
        levels,
        "as in the file",
        labels,
        levels_stated=False,
        columns=tuple(kept),
        label_names=label_names,
        is_wide=not binary,
    )


def _place(name: str, names: list[str], path: Path, what: str) -> int:
    if name not in names:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise DataError(f"{path}: expected a column {name!r} {what}, found {shown}; correct the name")
    return names.index(name)


def _in_order(words: set[str]) -> tuple[str, ...]:
    """Words sorted; as numbers where all are whole ones.

    >>> _in_order({"9", "10"}), _in_order({"9", "10", "x"})
    (('9', '10'), ('10', '9', 'x'))
    """
    return tuple(sorted(words, key=lambda word: (int(word), word) if all(w.isdecimal() for w in words) else (0, word)))


def _path_and_label(place: str) -> tuple[Path, str | None]:
    path, sign, label = place.rpartition("@")
    return (Path(path), label) if sign and not Path(place).is_file() else (Path(place), None)


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """The names in the first line, and the cells below, of as many in each row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected a UTF-8 table with a first line of names"
        ) from error
    head = re.sub(r'"[^"]*"', "", text).lstrip().partition("\n")[0]  # what stands between quotes separates nothing
    between = max(",;\t", key=head.count)  # the first of them where none is there: a single column
    try:
        cells = csv.reader(io.StringIO(text, newline=""), delimiter=between)
        lines = [[cell.strip() for cell in line] for line in cells if line]
    except csv.Error as error:
        raise DataError(f"{path}: cannot be read as a table ({error}); expected comma-separated values") from error
    if len(lines) < 2:
        raise DataError(
            f"{path}: expected a first line of names and rows of numbers, found {len(lines)} lines; add rows"
        )
    names, *rows = lines
    repeated = [name for j, name in enumerate(names) if name in names[:j]]
    if repeated or "" in names or all(_is_number(name) for name in names):
        found = f"{repeated[0]!r} twice" if repeated else "an empty name" if "" in names else f"numbers: {head[:40]}"
        raise DataError(f"{path}: expected a name for each column in the first line, found {found}; put names there")
    for i, row in enumerate(rows):
        if len(row) != len(names):
            raise DataError(
                f"{path}: row {i + 1}: expected {len(names)} cells as there are names, got {len(row)}; mend it"
            )
    return names, rows


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(cell: str, path: Path, name: str, row: int) -> float:
    number = float(cell) if _is_number(cell) else math.nan
    if not math.isfinite(number):
        got = repr(cell[:40]) if cell else "nothing"
        raise DataError(
            f"{path}: column {name!r}, row {row + 1}: expected a finite number, got {got}; "
            + ("write it with a decimal point, " if re.fullmatch(r"-?\d+,\d+", cell) else "repair or drop the row, ")
            + f"leave the column out (columns, --columns), or name it as the rows' labels with csv:{path.name}@{name}"
        )
    return number
