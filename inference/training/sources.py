"""Readers: what lies in a file, as integers or floats that nobody has scaled yet.

Each reader returns a `Source`: the values as they are stored (uint8 counts for images), the number of levels where it
is known, and how the held-out part was split off. What is done to the values is decided in `datasets`.

The one constraint: files are not trusted. Nothing is unpickled; a header and the bytes that are there must agree, and no
more is read than it states; names and links that leave their folder are refused; every refusal is a `DataError` naming
the file.
"""

import gzip
import math
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from inference.training import densities
from inference.training.images import ImageFiles, image_paths
from inference.training.scaling import DataError, to_tensor

MAX_LEVELS = 65_536  # of 16-bit images


@dataclass(frozen=True, eq=False)
class Source:
    """Data as they are stored, [N, *data_shape] each; integers are counts 0..levels-1.

    Where nothing states the levels of integers, they are taken for 8-bit grey values: ``levels_assumed``. That is no number
    of classes.
    """

    name: str
    train: Tensor | Dataset
    test: Tensor | Dataset | None
    levels: int | None
    split: str
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    alphabet: str | None = None  # of text: the character of each class
    levels_assumed: bool = False
    levels_stated: bool = True  # False: by the values, so that scaling "standard" may take them for continuous
    columns: tuple[str, ...] | None = None  # of a table, in the order of the entries of a datum
    label_names: tuple[str, ...] | None = None  # of a table: what each number among the labels stands for
    is_wide: bool = False  # floats are in float64 still, whatever torch's default dtype


def read_digits() -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8, 17 levels; 297 of them held out by a seed-0 permutation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    images, labels = torch.from_numpy(digits.images.astype(np.uint8)), torch.from_numpy(digits.target.astype(np.int64))
    train, test = order[:1500], order[1500:]
    return Source(
        "digits", images[train], images[test], 17, "seed-0 permutation, 1500/297", labels[train], labels[test]
    )


def read_toy(name: str) -> Source:
    """8000 training and 2000 held-out points of a toy density, drawn with seed 0; labels: the mixture's components."""
    points, component = densities.draw(name, 10_000, np.random.default_rng(0))
    x, k = to_tensor(points), torch.from_numpy(component)
    return Source(name, x[:8000], x[8000:], None, "drawn with seed 0, 8000/2000", k[:8000], k[8000:])


def read_mnist(folder: Path) -> Source:
    """The four idx files of MNIST and of the sets in its format, gzipped or not.

    Args:
        folder: holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
            t10k-labels-idx1-ubyte, each as it is or with .gz (as it is comes first).

    Returns:
        Source with uint8 images [N, rows, columns], 256 levels and labels.

    Raises:
        DataError: a missing or damaged file, or numbers of images and labels that differ.
    """
    parts: dict[str, Tensor] = {}
    for part in ("train", "t10k"):
        images = read_idx(_idx_path(folder, f"{part}-images-idx3-ubyte"), dims=3)
        labels = read_idx(_idx_path(folder, f"{part}-labels-idx1-ubyte"), dims=1)
        if len(images) != len(labels):
            raise DataError(
                f"{folder}: {part} has {len(images)} images and {len(labels)} labels; expected as many, fetch both anew"
            )
        parts[f"{part} images"], parts[f"{part} labels"] = torch.from_numpy(images), torch.from_numpy(labels).long()
    return Source(
        f"mnist:{folder}",
        parts["train images"],
        parts["t10k images"],
        256,
        "as in the files",
        parts["train labels"],
        parts["t10k labels"],
    )


def read_idx(path: Path, dims: int) -> np.ndarray:
    """One idx file of unsigned bytes: 0, 0, 8, dims; each dimension as a big-endian uint32; the values; nothing after.

    Args:
        path: the file; gzip if its name ends in .gz.
        dims: the number of dimensions that its header must state.

    Returns:
        uint8 array of the stated shape.

    Raises:
        DataError: another magic number, a length other than the header states, a damaged gzip stream.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            header = file.read(4 + 4 * dims)
            if len(header) < 4 + 4 * dims or header[:4] != bytes((0, 0, 8, dims)):
                raise DataError(
                    f"{path}: expected an idx file of unsigned bytes with {dims} dimensions (magic 0000 080{dims}), "
                    f"got {header[:4].hex() or 'an empty file'}; check which file this is"
                )
            shape = struct.unpack(f">{dims}I", header[4:])
            values = file.read(math.prod(shape) + 1)  # one more than stated, never all of a longer stream
    except (OSError, EOFError, zlib.error, MemoryError, OverflowError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a whole idx file, fetch it anew") from error
    if len(values) != math.prod(shape):
        found = len(values) if len(values) < math.prod(shape) else f"more than {math.prod(shape)}"
        raise DataError(f"{path}: header states {list(shape)}, {math.prod(shape)} bytes, found {found}; fetch it anew")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape).copy()


def _idx_path(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder}: expected {name} or {name}.gz, found neither; put the four idx files into one folder")


def read_npz(path: Path) -> Source:
    """A numpy archive of plain arrays, or one .npy array, never unpickled.

    Args:
        path: an .npy, which is all for training; or an .npz with `train` (or `x`, or one array of any name); optionally
            `test`, `train_labels`, `test_labels`, and `levels`, one integer. Other arrays are checked like these and not
            used.

    Returns:
        Source with integers as counts (levels: as stored, else 2 for zeros and ones, else 256, which is then marked as
        assumed: it will not do for classes), floats as continuous.

    Raises:
        DataError: no archive, no `train`, or a member that is no array, holds objects or is named to leave the archive.
    """
    arrays = _read_arrays(path)
    main: str | None = next((name for name in ("train", "x") if name in arrays), None)
    if main is None and len(arrays) == 1:
        (main,) = arrays
    if main is None:
        found = ", ".join(arrays) or "nothing"
        raise DataError(f"{path}: expected an array 'train' (or 'x', or one array alone), found {found}; rename one")
    unused = sorted(arrays.keys() - {main, "test", "train_labels", "test_labels", "levels"})
    if unused:
        meant = {"valid": "test", "validation": "test", "val": "test", "labels": "train_labels", "y": "train_labels"}
        hints = [f"{name} (did you mean {meant[name]}?)" if name in meant else name for name in unused]
        warnings.warn(f"{path}: entries not used: {', '.join(hints)}", stacklevel=2)
    train = _as_read(arrays[main], main)
    test = _as_read(arrays["test"], "test") if "test" in arrays else None
    labels = {name: to_tensor(arrays[name], name) for name in ("train_labels", "test_labels") if name in arrays}
    labels = {name: x.long() if x.dtype == torch.uint8 else x for name, x in labels.items()}
    levels = None
    if "levels" in arrays:
        if arrays["levels"].size != 1 or arrays["levels"].dtype.kind not in "ui":
            raise DataError(f"{path}: levels: expected one integer, got shape {list(arrays['levels'].shape)}")
        levels = int(arrays["levels"].item())
        if not 2 <= levels <= MAX_LEVELS:
            raise DataError(f"{path}: levels: expected 2..{MAX_LEVELS}, got {levels}; correct the file")
    elif not train.is_floating_point():
        levels = 256 if any(bool((x > 1).any()) for x in (train, test) if x is not None) else 2
    return Source(
        f"npz:{path}",
        train,
        test,
        levels,
        "as in the file",
        labels.get("train_labels"),
        labels.get("test_labels"),
        levels_assumed=levels == 256 and "levels" not in arrays,
        levels_stated="levels" in arrays,
        is_wide=True,
    )


def _as_read(array: np.ndarray, name: str) -> Tensor:
    """Floats in float64, so that what is done to them is done before they are rounded; else as :func:`to_tensor`."""
    return torch.from_numpy(array.astype(np.float64)) if array.dtype.kind == "f" else to_tensor(array, name)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                _check_header(file, path.stat().st_size, str(path))
                file.seek(0)
                return {"train": np.lib.format.read_array(file, allow_pickle=False)}
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename
                windows = PureWindowsPath(name)
                if ".." in windows.parts or windows.drive or windows.root or PurePosixPath(name).is_absolute():
                    raise DataError(
                        f"{path}: member {name!r} leaves the archive; expected plain names, write the file anew"
                    )
                if not name.endswith(".npy"):
                    raise DataError(f"{path}: member {name!r} is no .npy array; expected an archive from numpy.savez")
                with archive.open(info) as file:
                    _check_header(file, info.file_size, f"{path}: {name}")
                with archive.open(info) as file:  # opened anew, not rewound: a seek may switch off the checksum
                    arrays[name.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
    except DataError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected an archive from numpy.savez or an array from numpy.save, write it anew"
        ) from error
    return arrays


def _check_header(file: IO[bytes], num_bytes: int, name: str) -> None:
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise DataError(
            f"{name}: expected npy format 1.0 or 2.0 with plain numbers, got {version}; write the file anew"
        )
    shape, _, dtype = read_header[version](file)
    if dtype.hasobject:
        raise DataError(
            f"{name}: holds pickled objects, which are never loaded; expected numbers, save it with a numeric dtype"
        )
    stated, there = math.prod(shape) * dtype.itemsize, num_bytes - file.tell()
    if stated != there:
        raise DataError(
            f"{name}: header states {list(shape)} {dtype}, {stated} bytes, found {there}; write the file anew"
        )


def read_images(folder: Path, image_size: int | None = None) -> Source:
    """A folder of png and jpg files, in the order of their names; grey ones [H, W], coloured ones [3, H, W].

    Args:
        folder: holds the files, or `train/` and optionally `test/` which hold them.
        image_size: None: all must have one size; else each is cropped to its central square and resized to this side.

    Returns:
        Source with 256 levels; uint8 tensors up to `images.IN_MEMORY_VALUES` values, else Datasets that read at each
        use.

    Raises:
        DataError: no pillow, no images, unreadable or oversized ones, links that leave the folder, sizes that differ.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size: expected the side in pixels, at least 1, got {image_size}")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with png or jpg files")
    train_folder = folder / "train" if (folder / "train").is_dir() else folder
    train = ImageFiles(image_paths(train_folder, folder), image_size).in_memory_if_small()
    test = None
    if (folder / "test").is_dir():
        test = ImageFiles(image_paths(folder / "test", folder), image_size).in_memory_if_small()
    return Source(f"images:{folder}", train, test, 256, "as in the folders")
