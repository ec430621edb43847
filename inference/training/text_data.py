r"""Text as data: the characters of a file as classes, in windows of a fixed length.

    alphabet    the distinct characters of the text by code point; class k is the k-th of them, k = 0..K-1
    window      L consecutive characters, one datum of shape [L]; windows do not overlap
    held out    the last tenth of the characters, in one piece; the rest is for training

Nothing is normalised: no case is folded, no line end changed, and a byte-order mark is a character like any other. What is
left over at the end of either part, less than a window, is dropped, and the split says so.

The one constraint: classes mean nothing without their alphabet. A data set and a run carry it, and another text is read
under it (`read_text` with ``alphabet``) or refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inference.training.scaling import DataError
from inference.training.sources import Source

WINDOW = 64
MAX_CLASSES = 32_000
_HELD_OUT = 10  # one part in ten


def read_text(place: str | Path, alphabet: str | None = None) -> Source:
    """A UTF-8 text as windows of classes.

    Args:
        place: FILE, or FILE@L for windows of L characters instead of 64.
        alphabet: whose classes are meant, for a text beside that which a model was trained on; None: the text's own.

    Returns:
        Source with int64 windows ``[N, L]``, K levels and the alphabet.

    Raises:
        DataError: no such file, not UTF-8, too short for a window in the last tenth, fewer than 2 or more than 32,000
            distinct characters, or a character that is not in ``alphabet``.
    """
    path, window = _path_and_window(str(place))
    text = _text(path)
    if len(text) < _HELD_OUT * window:
        raise DataError(
            f"{path}: expected at least {_HELD_OUT * window} characters, a window of {window} in the last tenth, got "
            f"{len(text)}; give a longer text, or shorter windows as in text:{path.name}@{max(1, len(text) // _HELD_OUT)}"
        )
    own = "".join(sorted(set(text)))
    if alphabet is None and not 2 <= len(own) <= MAX_CLASSES:
        raise DataError(
            f"{path}: expected 2 to {MAX_CLASSES:,} distinct characters, got {len(own):,}; "
            f"{'give a text with more' if len(own) < 2 else 'replace the rare ones'}"
        )
    alphabet = own if alphabet is None else alphabet
    classes = encode(text, alphabet, str(path))
    start = len(text) - len(text) // _HELD_OUT
    parts = classes[:start], classes[start:]
    train, test = (part[: len(part) // window * window].reshape(-1, window) for part in parts)
    dropped = len(classes) - train.numel() - test.numel()
    split = f"the last tenth in one piece; windows of {window} characters, {dropped} left over"
    return Source(f"text:{path.name}", train, test, len(alphabet), split, alphabet=alphabet)


def encode(text: str, alphabet: str, name: str = "text") -> Tensor:
    """The class of each character, int64 ``[len(text)]``.

    Args:
        text: any.
        alphabet: distinct characters, by code point.
        name: what the text is called in messages.

    Raises:
        DataError: a character that is not in the alphabet, with its place; or an alphabet that is not one.

    Example:
        >>> encode("abba", "ab").tolist()
        [0, 1, 1, 0]
    """
    points, known = _code_points(text), _code_points(alphabet)
    if not len(known) or bool((known[1:] <= known[:-1]).any()):
        raise DataError(
            f"alphabet: expected distinct characters in the order of their code points, got {alphabet!r:.80}"
        )
    classes = np.searchsorted(known, points).clip(max=len(known) - 1)
    strange = np.flatnonzero(known[classes] != points)
    if len(strange):
        raise DataError(
            f"{name}: expected characters of the alphabet of {len(alphabet)} alone, got {text[strange[0]]!r} at character "
            f"{strange[0]}; remove such characters, or train on a text that has them"
        )
    return torch.from_numpy(classes.astype(np.int64))


def decode(classes: Tensor | np.ndarray | Sequence[Sequence[int]], alphabet: str) -> list[str]:
    """Windows of classes as strings, one each.

    Args:
        classes: ``[N, L]``, whole numbers in 0..K-1.
        alphabet: K characters.

    Raises:
        DataError: a class outside the alphabet.

    Example:
        >>> decode(torch.tensor([[0, 1, 1, 0]]), "ab")
        ['abba']
    """
    indices = np.asarray(classes).astype(np.int64)
    if indices.size and not 0 <= indices.min() <= indices.max() < len(alphabet):
        raise DataError(
            f"classes: expected 0..{len(alphabet) - 1}, places in the alphabet, got {indices.min()}..{indices.max()}; "
            "give the alphabet that they were made with"
        )
    return ["".join(alphabet[k] for k in row) for row in indices]


def printable(text: str) -> str:
    r"""The text with control characters other than line ends and tabs written as escapes, so that no terminal obeys them.

    Example:
        >>> print(printable("red: \x1b[31m"))
        red: \x1b[31m
    """
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _path_and_window(place: str) -> tuple[Path, int]:
    name, sign, length = place.rpartition("@")
    if not sign or not length.isdecimal():
        return Path(place), WINDOW
    if not name or int(length) < 1:
        raise DataError(f"text: expected FILE or FILE@L with windows of L >= 1 characters, got {place!r}")
    return Path(name), int(length)


def _text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a text in UTF-8")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8, got byte {error.object[error.start]:#04x} at {error.start}; convert the file, with "
            "iconv -t UTF-8 say"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a text in UTF-8") from error
    if not text:
        raise DataError(f"{path}: expected a text, got an empty file")
    return text


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
