"""Files that are whole or not there: atomic writes, plain-data texts, a lock for one writer, a hash.

A file is replaced, never edited. The order of the calls is the whole argument: write a temporary file *in the target's
folder* (so that both are on one file system), fsync it (so that its bytes are on the disk before its name is),
`os.replace` (atomic in POSIX), fsync the folder (so that the new name is on the disk too). A crash, a full disk or a
power cut between any two of them leaves the previous content or the new one, complete.

Texts hold plain data only: mappings with string keys, lists, strings, integers, finite floats, booleans, None. What is
written reads back equal, and reading never builds an object of any other type, so no file can make the reader run code.

The one constraint: POSIX (`fcntl.flock`, fsync of a folder).
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml


class StorageError(OSError):
    """The file system refused: disk full, no permission, no such folder. `errno` is that of the cause."""

    def __init__(self, sentence: str, cause: OSError | None = None) -> None:
        super().__init__(sentence)
        self.errno = cause.errno if cause is not None else None


class ContentError(ValueError):
    """A text is not the plain JSON or YAML mapping that it should be."""


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
        StorageError: see `write_atomic`.

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
        StorageError: see `write_atomic`.

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
