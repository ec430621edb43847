"""A checkpoint: one safetensors file of tensors and plain values, and its SHA-256 beside it.

    step-000000123.safetensors           tensors; `values` as one JSON string in the file's metadata
    step-000000123.safetensors.sha256    the line that `sha256sum --check` reads

A checkpoint is *complete* once its hash stands beside it, and is accepted only if the very bytes that are then parsed
have that hash. The hash is written after the data, so a save that is cut short leaves a file that nobody considers, and
the checkpoint before it stays the newest. No byte is ever unpickled.

The one constraint: one writer per folder (`storage.RunLock`): `prune_checkpoints` clears what killed writers left.
"""

import itertools
import json
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from inference.training.storage import StorageError, make_folder, read_bytes, remove_durably, sha256, write_atomic
from inference.training.texts import ContentError, check_plain, parse_json

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_STEP = re.compile(r"step-([0-9]{9,})\.safetensors")
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
)
_PICKLE_STARTS = (b"\x80", b"PK")  # a pickle of protocol 2 or later, the zip archive of torch.save


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete, damaged or not one."""


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint after `step` optimiser steps; names sort as their steps.

    Args:
        step: number of steps done, 0 or more.

    Example:
        >>> checkpoint_name(123)
        'step-000000123'
    """
    if step < 0:
        raise ValueError(f"step is {step}; expected the number of steps done, 0 or more")
    return f"step-{step:09d}"


def save_checkpoint(folder: Path, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Path:
    """Write a checkpoint durably; a crash at any point leaves what was there before or the new one.

    Replacing a complete checkpoint of the same name goes through a hash file that lists the old and the new hash, so
    that the data file is accepted before and after it changes.

    Args:
        folder: where to; created if missing.
        name: `checkpoint_name(step)`, or another file name without a suffix, e.g. "best", which `latest_checkpoint` and
            `prune_checkpoints` leave alone.
        tensors: dense real tensors on any device; views, non-contiguous and shared memory are copied.
        values: plain data (see `texts.check_plain`); `states.flatten_state` turns other state into such.

    Returns:
        The path of the data file.

    Raises:
        ValueError: a name that is not a plain file name, or values that are not finite.
        TypeError: a tensor or a value that cannot be stored; the sentence names it.
        StorageError: the system refused; the previous checkpoints are intact.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_checkpoint(Path(folder), checkpoint_name(7), {"w": torch.ones(2)}, {"epoch": 1})
        ...     tensors, values = load_checkpoint(path)
        >>> path.name, tensors["w"].tolist(), values
        ('step-000000007.safetensors', [1.0, 1.0], {'epoch': 1})
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the checkpoint name is {name!r}; expected letters, digits, '_', '-' and '.', as in 'step-000000001'"
        )
    data = _to_bytes(tensors, values)
    path = folder / f"{name}.safetensors"
    hash_path = _hash_path(path)
    digest = sha256(data)
    make_folder(folder)
    if hash_path.exists():
        write_atomic(hash_path, _hash_text(path, [*_old_digests(path), digest]))
    write_atomic(path, data)
    write_atomic(hash_path, _hash_text(path, [digest]))
    return path


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint whose bytes have the hash that stands beside it.

    Args:
        path: the data file, `NAME.safetensors`.
        device: where the tensors go. Leave random number states on the CPU.

    Returns:
        Tensors by name, bit for bit as saved, and the values.

    Raises:
        CheckpointError: missing, incomplete, truncated, changed, or not a checkpoint; nothing in it has been run.
    """
    try:
        data = read_bytes(path)
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    digest, recorded = sha256(data), _recorded_digests(path)
    if digest not in recorded:
        raise CheckpointError(
            f"{path} is truncated or changed: the SHA-256 of its {len(data)} bytes is {digest}, the recorded one is "
            f"{' or '.join(recorded)}; use another checkpoint or restore it from a copy"
        )
    return _from_bytes(data, path, device)


def latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that verifies, among those named by `checkpoint_name`.

    Args:
        folder: of the checkpoints; it need not exist.

    Returns:
        Path, tensors (on the CPU) and values; None if the folder holds no complete checkpoint.

    Raises:
        CheckpointError: there are complete ones and none of them verifies.

    Warns:
        RuntimeWarning: for each damaged one that is skipped, with the reason.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(latest_checkpoint(Path(folder)))
        ...     for step in (9, 10):
        ...         _ = save_checkpoint(Path(folder), checkpoint_name(step), {}, {"step": step})
        ...     path, tensors, values = latest_checkpoint(Path(folder))
        None
        >>> values
        {'step': 10}
    """
    newest = next(_verified(folder), None)
    if newest is None and (complete := _complete(folder)):
        raise CheckpointError(
            f"{folder} holds {len(complete)} checkpoint(s) and none verifies, as the warnings say one by one; "
            "restore one from a copy or start again in another folder"
        )
    return newest


def prune_checkpoints(folder: Path, keep: int = 2) -> None:
    """Delete what is older than the `keep` newest checkpoints that verify, and left-over temporary files.

    Only names by `checkpoint_name` count; older damaged and incomplete ones go too. With fewer than `keep`
    that verify, no checkpoint is deleted. The hash goes first: without it a checkpoint is not complete, so no
    half-deleted one is ever accepted.

    Args:
        folder: of the checkpoints; the caller is its only writer.
        keep: how many to keep, 1 or more.

    Raises:
        ValueError: `keep` below 1.
        StorageError: the system refused.

    Warns:
        RuntimeWarning: for each damaged one met among the newest; it is kept.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in (1, 2, 3):
        ...         _ = save_checkpoint(Path(folder), checkpoint_name(step), {}, {})
        ...     prune_checkpoints(Path(folder), keep=2)
        ...     sorted(path.stem for path in Path(folder).glob("*.safetensors"))
        ['step-000000002', 'step-000000003']
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; expected 1 or more, for the newest checkpoint is never deleted")
    for left_over in folder.glob(".*.safetensors*.tmp"):
        remove_durably(left_over)
    kept = [path for path, _, _ in itertools.islice(_verified(folder), keep)]
    if len(kept) < keep:
        return
    for path in _numbered(folder):
        if _step(path) < _step(kept[-1]):
            remove_durably(_hash_path(path))
            remove_durably(path)


def _to_bytes(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> bytes:
    plain = dict(values)
    check_plain(plain, "values")
    copies = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout is not torch.strided:
            raise TypeError(f"tensors[{name!r}] is {_kind(tensor)}; expected a dense tensor with data")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"tensors[{name!r}] is {_kind(tensor)}; expected a real or integer dtype of safetensors")
        if name == "__metadata__":
            raise ValueError("a tensor is named '__metadata__', which safetensors reserves; rename it")
        # A copy, because the format refuses tensors that share memory; contiguous, because it has no strides.
        copies[name] = tensor.detach().to("cpu", copy=True).contiguous()
    # One metadata entry only: the order of several is random, and equal checkpoints should be equal files.
    return safetensors.torch.save(copies, metadata={"values": json.dumps(plain)})


def _from_bytes(data: bytes, path: Path, device: str | torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors = safetensors.torch.load(data)
        (header_length,) = struct.unpack_from("<Q", data)
        header = parse_json(data[8 : 8 + header_length].decode(), f"the header of {path}")
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        pickled = "a pickle or torch.save archive, which is never read; " if data.startswith(_PICKLE_STARTS) else ""
        raise CheckpointError(
            f"{path} is not a safetensors file: {pickled}{error}; use a checkpoint that save_checkpoint wrote"
        ) from error
    text = header.get("__metadata__", {}).get("values")
    if text is None:
        raise CheckpointError(f"{path} has no values in its metadata; use a checkpoint that save_checkpoint wrote")
    try:
        values = parse_json(text, f"the metadata of {path}")
    except ContentError as error:
        raise CheckpointError(str(error)) from error
    return {name: tensor.to(device) for name, tensor in sorted(tensors.items())}, values


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of layout {value.layout}, dtype {value.dtype}, device {value.device}"
    return f"a {type(value).__name__}"


def _hash_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _hash_text(path: Path, digests: Iterable[str]) -> bytes:
    return "".join(f"{digest}  {path.name}\n" for digest in dict.fromkeys(digests)).encode()


def _recorded_digests(path: Path) -> list[str]:
    """The hashes under which the data file is accepted: one, or two and more while it is being replaced."""
    hash_path = _hash_path(path)
    if not hash_path.exists():
        raise CheckpointError(
            f"{path} has no {hash_path.name} beside it: its save was cut short or the file was left behind; "
            "use another checkpoint or restore both files"
        )
    try:
        text = read_bytes(hash_path)
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    digests = re.findall(rb"[0-9a-f]{64}", text)
    if not digests or text != _hash_text(path, [digest.decode() for digest in digests]):
        raise CheckpointError(f"{hash_path} is damaged: expected lines of sha256sum; restore it from a copy")
    return [digest.decode() for digest in digests]


def _old_digests(path: Path) -> list[str]:
    try:
        return _recorded_digests(path)
    except CheckpointError:
        return []  # the data file was not acceptable before either


def _step(path: Path) -> int:
    return int(match[1]) if (match := _STEP.fullmatch(path.name)) else -1


def _numbered(folder: Path) -> list[Path]:
    """Data files of numbered checkpoints, newest first, complete or not, the data or only the hash there."""
    paths = {path.with_name(path.name.removesuffix(".sha256")) for path in folder.glob("step-*")}
    return sorted((path for path in paths if _step(path) >= 0), key=_step, reverse=True)


def _complete(folder: Path) -> list[Path]:
    return [path for path in _numbered(folder) if _hash_path(path).exists()]


def _verified(folder: Path) -> Iterator[tuple[Path, dict[str, Tensor], dict[str, Any]]]:
    """Checkpoints that verify, newest first; warns of each that does not."""
    for path in _complete(folder):
        try:
            yield path, *load_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"skipped a damaged checkpoint: {error}", RuntimeWarning, stacklevel=3)
