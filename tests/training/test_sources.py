"""Readers: well-formed files come back value for value; damaged and malicious ones are refused in one sentence."""

import gzip
import io
import json
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from inference.training import images
from inference.training.datasets import DataError, DataSet, load_data

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (7, 5, 4), dtype=np.uint8)
LABELS = np.arange(7, dtype=np.uint8)


def train(data: DataSet) -> Tensor:
    assert isinstance(data.train, Tensor)
    return data.train


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, zipped: bool) -> None:
    for part, count in (("train", 7), ("t10k", 3)):
        for name, array in (("images-idx3", PIXELS[:count]), ("labels-idx1", LABELS[:count])):
            data = idx(array)
            path = folder / f"{part}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(data) if zipped else data)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_comes_back_value_for_value(tmp_path: Path, zipped: bool) -> None:
    write_mnist(tmp_path, zipped)
    data = load_data(f"mnist:{tmp_path}")
    assert (data.data_shape, data.num_train, data.num_test, data.levels) == ((5, 4), 7, 3, 256)
    np.testing.assert_array_equal(train(data).numpy(), PIXELS)
    assert data.train_labels is not None
    assert data.train_labels.tolist() == LABELS.tolist()
    assert data.kind == "image"
    json.dumps(data.describe())


IDX_FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "got an empty file"),
    "wrong type": (b"\0\0\x0d" + idx(PIXELS)[3:], "magic 0000 0803.*got 00000d03"),
    "labels for images": (idx(LABELS), "got 00000801"),
    "one byte short": (idx(PIXELS)[:-1], r"header states \[7, 5, 4\], 140 bytes, found 139"),
    "one byte long": (idx(PIXELS) + b"\0", "found more than 140"),
    "another count": (idx(PIXELS[:6]), "6 images and 7 labels"),
    "huge dimensions": (b"\0\0\x08\x03" + b"\xff" * 12, "train-images"),
    "no images": (b"\0\0\x08\x03" + struct.pack(">3I", 0, 5, 4), "0 images and 7 labels"),
}


@pytest.mark.parametrize("fault", IDX_FAULTS)
def test_damaged_idx_files_are_refused(tmp_path: Path, fault: str) -> None:
    write_mnist(tmp_path, zipped=False)
    content, message = IDX_FAULTS[fault]
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(f"mnist:{tmp_path}")


def test_a_damaged_gzip_stream_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], b"not gzip at all"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="fetch it anew"):
            load_data(f"mnist:{tmp_path}")
    path.unlink()
    with pytest.raises(
        DataError, match=r"expected train-images-idx3-ubyte or train-images-idx3-ubyte\.gz, found neither"
    ):
        load_data(f"mnist:{tmp_path}")


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy's stub takes each keyword for allow_pickle
    return f"npz:{path}"


def test_npz_counts_floats_labels_and_levels(tmp_path: Path) -> None:
    counts = npz(tmp_path / "a.npz", train=PIXELS, test=PIXELS[:2], train_labels=LABELS)
    data = load_data(counts, scaling="unit")
    np.testing.assert_array_equal(train(data).numpy(), PIXELS / 255)
    assert (data.levels, data.num_test, data.test_labels) == (256, 2, None)
    assert data.train_labels is not None
    assert data.train_labels.tolist() == LABELS.tolist()

    few = load_data(npz(tmp_path / "b.npz", train=PIXELS % 5, levels=np.array(5)), scaling="symmetric")
    np.testing.assert_array_equal(train(few).numpy(), -1 + 2 * (PIXELS % 5) / 4)
    binary = load_data(npz(tmp_path / "c.npz", x=PIXELS % 2), scaling="unit")
    assert (binary.levels, train(binary).max()) == (2, 1.0)
    floats = load_data(npz(tmp_path / "d.npz", anything=RNG.normal(size=(4, 3)).astype(">f4")))
    assert (floats.levels, floats.kind, train(floats).dtype, floats.test) == (None, "point", torch.float64, None)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_npz_classes_need_a_stated_number(tmp_path: Path, dtype: type) -> None:
    few: np.ndarray = (PIXELS % 5).astype(dtype)
    more: np.ndarray = np.full((2, 5, 4), 6, dtype=dtype)
    unstated = npz(tmp_path / "a.npz", train=few, test=more)
    with pytest.raises(DataError, match=r"a\.npz: .*number of classes .* integers up to 6 .*'levels', 7 or more"):
        load_data(unstated, scaling="classes")
    with pytest.raises(
        DataError, match=r"integers up to 6 without it, which may be 7 levels or dark 8-bit grey values"
    ):
        load_data(unstated, scaling="unit")
    grey = npz(tmp_path / "e.npz", train=few + np.array(200, dtype), test=more)
    assert load_data(grey, scaling="unit").levels == 256  # as grey values they are taken for 8-bit ones
    stated = load_data(npz(tmp_path / "b.npz", train=few, test=more, levels=np.array(7)), scaling="classes")
    assert (stated.levels, train(stated).dtype) == (7, torch.int64)
    np.testing.assert_array_equal(train(stated).numpy(), few)
    pixels = npz(tmp_path / "c.npz", train=few, levels=np.array(256))
    assert load_data(pixels, scaling="classes").levels == 256  # it is a statement, not a guess, that is asked for
    assert load_data(npz(tmp_path / "d.npz", train=few % 2), scaling="classes").levels == 2


class Bomb:
    """Leaves a mark if anything unpickles it."""

    path = ""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return (open, (self.path, "w"))


def raw_zip(path: Path, members: dict[str, bytes], stored: bool = True) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return f"npz:{path}"


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def test_pickles_in_any_place_are_refused_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    bomb = Bomb()
    Bomb.path = str(mark)
    objects = npy(np.array([bomb], dtype=object), allow_pickle=True)
    good = npy(PIXELS)
    with pytest.raises(DataError, match="pickled objects, which are never loaded"):
        load_data(raw_zip(tmp_path / "a.npz", {"train.npy": objects}))
    with pytest.raises(DataError, match=r"more\.npy: holds pickled objects"):
        load_data(raw_zip(tmp_path / "b.npz", {"train.npy": good, "more.npy": objects}))
    with pytest.raises(DataError, match=r"'train' is no \.npy array"):
        load_data(raw_zip(tmp_path / "c.npz", {"train": pickle.dumps(bomb)}))
    (tmp_path / "d.npz").write_bytes(pickle.dumps(bomb))
    with pytest.raises(DataError, match="cannot be read"):
        load_data(f"npz:{tmp_path / 'd.npz'}")
    assert not mark.exists()
    pickle.loads(pickle.dumps(bomb)).close()
    assert mark.exists()  # the control: unpickled, it does leave its mark


@pytest.mark.parametrize(
    "name", ["../train.npy", "/etc/train.npy", "a/../../train.npy", "..\\train.npy", "C:\\train.npy"]
)
def test_member_names_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="leaves the archive"):
        load_data(raw_zip(tmp_path / "a.npz", {"train.npy": npy(PIXELS), name: npy(PIXELS)}))


def header(shape: str, descr: str = "'|u1'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


NPZ_FAULTS: dict[str, tuple[dict[str, bytes], str]] = {
    "no array": ({}, "found nothing"),
    "other names": ({"a.npy": npy(PIXELS), "b.npy": npy(PIXELS)}, "expected an array 'train'.*found a, b"),
    "strings": ({"train.npy": npy(np.array(["a", "b"]))}, "train: expected floating point numbers or integers.*<U1"),
    "booleans": ({"train.npy": npy(PIXELS > 9)}, "dtype bool"),
    "complex": ({"train.npy": npy(PIXELS * 1j)}, "dtype complex128"),
    "structured": ({"train.npy": npy(np.zeros(3, dtype=[("a", "u1")]))}, "train: expected floating point"),
    "unsigned 64": ({"train.npy": npy(PIXELS.astype(np.uint64))}, "dtype uint64"),
    "negative": ({"train.npy": npy(PIXELS.astype(np.int16) - 300)}, r"train\[0, 0, 0\] = -\d+: expected counts in 0"),
    "labels too few": ({"train.npy": npy(PIXELS), "train_labels.npy": npy(LABELS[:6])}, r"train_labels.*shape \[7\]"),
    "terabytes": ({"train.npy": header("(1048576, 1048576)")}, "1099511627776 bytes, found 0"),
    "code": ({"train.npy": header("__import__('os').getcwd()") + b"0"}, "cannot be read"),
    "not npy": ({"train.npy": b"hello"}, "cannot be read"),
    "another test shape": ({"train.npy": npy(PIXELS), "test.npy": npy(PIXELS[:, :4])}, r"test: expected data of shape"),
    "levels no integer": ({"train.npy": npy(PIXELS), "levels.npy": npy(np.ones(2))}, "levels: expected one integer"),
    "no rows": ({"train.npy": npy(PIXELS[:0])}, "train: expected data .* N >= 1"),
}


@pytest.mark.parametrize("fault", NPZ_FAULTS)
def test_bad_archives_are_refused(tmp_path: Path, fault: str) -> None:
    members, message = NPZ_FAULTS[fault]
    with pytest.raises(DataError, match=message):
        load_data(raw_zip(tmp_path / "a.npz", members))


@pytest.mark.parametrize("stored", [True, False])
def test_every_flipped_byte_of_an_array_is_noticed(tmp_path: Path, stored: bool) -> None:
    spec = raw_zip(tmp_path / "a.npz", {"train.npy": npy(PIXELS)}, stored)
    path = tmp_path / "a.npz"
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo("train.npy").compress_size
    first = 30 + len("train.npy")  # a local header of a zip has 30 bytes, then the name, then the data
    for position in range(first, first + size, 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            load_data(spec)
    path.write_bytes(whole)
    assert load_data(spec).num_train == 7


def test_an_npz_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npz: cannot be read.*No such file"):
        load_data(f"npz:{tmp_path / 'none.npz'}")


def write_images(folder: Path, pixels: np.ndarray, suffix: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in reversed(range(len(pixels))):
        Image.fromarray(pixels[i]).save(folder / f"{i:03d}.{suffix}")


def test_images_grey_and_coloured_with_and_without_a_test_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "grey", PIXELS)
    grey = load_data(f"images:{tmp_path / 'grey'}", scaling="classes")
    np.testing.assert_array_equal(train(grey).numpy(), PIXELS)
    assert (train(grey).dtype, grey.test) == (torch.int64, None)

    coloured = RNG.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    write_images(tmp_path / "rgb" / "train", coloured)
    write_images(tmp_path / "rgb" / "test", coloured[:2])
    rgb = load_data(f"images:{tmp_path / 'rgb'}")
    np.testing.assert_array_equal(train(rgb).numpy(), coloured.transpose(0, 3, 1, 2))
    assert (rgb.num_test, rgb.kind, rgb.levels) == (2, "image", 256)


def test_image_size_crops_the_centre_then_resizes(tmp_path: Path) -> None:
    pixels = np.zeros((1, 4, 10), dtype=np.uint8)
    pixels[0, :, 3:7] = 200  # the central square is all that is not black
    write_images(tmp_path, pixels)
    write_images(tmp_path / "other", np.full((1, 9, 9), 200, dtype=np.uint8))
    (tmp_path / "other" / "000.png").rename(tmp_path / "001.png")
    data = load_data(f"images:{tmp_path}", image_size=2)
    assert train(data).tolist() == [[[200.0, 200.0], [200.0, 200.0]]] * 2
    with pytest.raises(DataError, match=r"001\.png: L \(9, 9\), but 000\.png is L \(10, 4\)"):
        load_data(f"images:{tmp_path}")


def test_a_large_folder_is_read_item_by_item_with_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, PIXELS)
    whole = load_data(f"images:{tmp_path}", scaling="symmetric")
    monkeypatch.setattr(images, "IN_MEMORY_VALUES", 0)
    data = load_data(f"images:{tmp_path}", scaling="symmetric")
    assert not isinstance(data.train, torch.Tensor)
    assert torch.equal(torch.stack([data.train[i] for i in range(7)]), train(whole))
    assert data.describe() == whole.describe()


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 30_000])  # pillow warns of the first and raises at the second
def test_decompression_bombs_are_refused(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of_size(side, side))
    with pytest.raises(DataError, match=r"bomb\.png: cannot be read.*decompression bomb"):
        load_data(f"images:{tmp_path}")


def test_unreadable_images_odd_modes_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_data(f"images:{tmp_path / 'none'}")
    with pytest.raises(DataError, match="no png or jpg files"):
        load_data(f"images:{tmp_path}")
    path = tmp_path / "x.jpg"
    write_images(tmp_path / "good", RNG.integers(0, 256, (1, 64, 64), dtype=np.uint8), "jpg")
    whole = (tmp_path / "good" / "000.jpg").read_bytes()
    for damaged in (b"", b"GIF89a", whole[:20], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.jpg: cannot be read"):
            load_data(f"images:{tmp_path}")
    path.unlink()
    Image.new("RGBA", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png: expected a grey \(L\) or RGB image, got mode RGBA"):
        load_data(f"images:{tmp_path}")
    with pytest.raises(DataError, match="image_size: expected the side in pixels, at least 1, got 0"):
        load_data(f"images:{tmp_path}", image_size=0)


def test_links_that_leave_the_folder_are_refused_and_others_followed(tmp_path: Path) -> None:
    write_images(tmp_path / "secret", PIXELS[:1])
    inside = tmp_path / "inside"
    write_images(inside, PIXELS)
    (inside / "link.png").symlink_to(inside / "000.png")
    assert load_data(f"images:{inside}").num_train == 8
    (inside / "out.png").symlink_to(tmp_path / "secret" / "000.png")
    with pytest.raises(DataError, match=r"out\.png: a link that leaves"):
        load_data(f"images:{inside}")
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "train").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="a link that leaves"):
        load_data(f"images:{tmp_path / 'outer'}")


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, PIXELS)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"install ppl-models\[images\]"):
        load_data(f"images:{tmp_path}")
