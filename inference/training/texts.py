"""Texts of plain data, JSON and YAML: what is written reads back equal, and reading runs nothing.

Plain data are mappings with string keys, lists, strings, integers, finite floats, booleans, None. Reading never builds an
object of any other type, so no file can make the reader run code.

The one constraint: the outermost value is a mapping.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from inference.training.storage import read_bytes, write_atomic


class ContentError(ValueError):
    """A text is not the plain JSON or YAML mapping that it should be."""


def check_plain(value: Any, place: str) -> None:
    """Refuse what a JSON or YAML text would not give back equal: other types, keys not strings, NaN, infinities.

    Args:
        value: what is to be written.
        place: its name, for the message.

    Raises:
        TypeError: a value or key of another type.
        ValueError: a NaN or an infinity, for which JSON has no word.

    Example:
        >>> check_plain({"shape": (8, 8)}, "config")
        Traceback (most recent call last):
        ...
        TypeError: config['shape'] is a tuple; expected a dict, list, str, int, float, bool or None: convert it first
    """
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(
                    f"{place} has the key {key!r}, a {type(key).__name__}; expected strings: convert it first"
                )
            check_plain(item, f"{place}[{key!r}]")
    elif type(value) is list:
        for index, item in enumerate(value):
            check_plain(item, f"{place}[{index}]")
    elif type(value) is float and not math.isfinite(value):
        raise ValueError(f"{place} is {value}; expected a finite number: write None or a string instead")
    elif value is not None and type(value) not in (str, bool, int, float):  # exact: np.float64 is a float, too
        raise TypeError(
            f"{place} is a {type(value).__name__}; "
            "expected a dict, list, str, int, float, bool or None: convert it first"
        )


def write_json(path: Path, obj: Mapping[str, Any]) -> None:
    """Write a mapping of plain data as JSON (RFC 8259), atomically.

    Raises:
        TypeError, ValueError: not plain data, see `check_plain`.
        StorageError: see `storage.write_atomic`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder) / "terms.json", {"elbo": -1.5})
        ...     read_json(Path(folder) / "terms.json")
        {'elbo': -1.5}
    """
    plain = dict(obj)
    check_plain(plain, path.name)
    write_atomic(path, (json.dumps(plain, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a mapping of plain data from JSON; duplicate keys and the non-JSON words NaN and Infinity are refused.

    Raises:
        StorageError: missing or unreadable.
        ContentError: not such a text.
    """
    return parse_json(_text(path), str(path))


def parse_json(text: str, name: str) -> dict[str, Any]:
    """The mapping of plain data in a JSON text.

    Args:
        text: the text.
        name: what it is called in the message.

    Raises:
        ContentError: not a JSON text (RFC 8259), a key twice, or not a mapping.
    """
    try:
        return _mapping(json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant), name)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ContentError):
            raise
        raise ContentError(f"{name} is not plain JSON: {error}; correct it or restore it from a copy") from error


def write_yaml(path: Path, obj: Mapping[str, Any]) -> None:
    """Write a mapping of plain data as YAML, in the mapping's order, atomically.

    Raises:
        TypeError, ValueError: not plain data, see `check_plain`.
        StorageError: see `storage.write_atomic`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_yaml(Path(folder) / "config.yaml", {"model": "vae", "epochs": 3})
        ...     print((Path(folder) / "config.yaml").read_text(), read_yaml(Path(folder) / "config.yaml"), sep="")
        model: vae
        epochs: 3
        {'model': 'vae', 'epochs': 3}
    """
    plain = dict(obj)
    check_plain(plain, path.name)
    write_atomic(path, yaml.dump(plain, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True).encode())


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping of plain data from YAML; tags, aliases, duplicate keys and several documents are refused.

    Tags name types to be built. Aliases let a text of a few lines stand for a billion values.

    Raises:
        StorageError: missing or unreadable.
        ContentError: not such a text.
    """
    text = _text(path)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ContentError(f"{path} has the alias *{event.anchor}; expected plain data: write the value out")
            tag = getattr(event, "tag", None)
            if tag is not None:
                raise ContentError(f"{path} has the tag {tag!r}; expected plain data: remove the tag")
        return _mapping(yaml.load(text, Loader=_PlainLoader), str(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ContentError):
            raise
        reason = " ".join(str(error).split())
        raise ContentError(f"{path} is not plain YAML: {reason}; correct it or restore it from a copy") from error


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ContentError(f"{path} is not UTF-8 text ({error}); correct it or restore it from a copy") from error


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ContentError(f"{name} holds a {type(value).__name__}; expected a mapping of names to values")
    try:
        # YAML has words for dates and infinities, JSON digits that overflow to one.
        check_plain(value, name)
    except (TypeError, ValueError) as error:
        raise ContentError(str(error)) from error
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"the key {key!r} stands twice")
        mapping[key] = value
    return mapping


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


class _PlainDumper(yaml.SafeDumper):
    """Writes a list or mapping that occurs twice twice, since aliases are refused on reading."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def _string(self, value: str) -> yaml.ScalarNode:
        # Only in double quotes does every line separator of Unicode come back as it was.
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


_PlainDumper.add_representer(str, _PlainDumper._string)


class _PlainLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which plain YAML readers keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)
