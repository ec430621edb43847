"""A folder of image files as a map-style Dataset, decoded by pillow at each use.

Grey files (mode L) are [H, W], coloured ones (RGB) [3, H, W], uint8. One folder has one mode and one size, which is
compared from the headers when the Dataset is made.

The one constraint: files are not trusted. Only png and jpg decoders run, decompression bombs are refused, and so are
links that leave the folder.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from inference.training.scaling import DataError

IN_MEMORY_VALUES = 2**28  # values of an image folder that are kept in memory: 1 GiB in float32


class ImageFiles(Dataset[Tensor]):
    """Image files as uint8 tensors, read at each use; their headers are all compared when it is made."""

    def __init__(self, paths: Sequence[Path], image_size: int | None = None) -> None:
        self.paths, self.image_size = list(paths), image_size
        headers = [self._read(path, decode=False) for path in self.paths]
        for path, header in zip(self.paths, headers, strict=True):
            if header != headers[0]:
                raise DataError(
                    f"{path}: {header[0]} {header[1]}, but {self.paths[0].name} is {headers[0][0]} {headers[0][1]}; "
                    "expected one mode and size, convert the files (load_data has image_size for sizes that differ)"
                )
        mode, (width, height) = headers[0]
        self.data_shape = (height, width) if mode == "L" else (3, height, width)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        pixels = torch.from_numpy(self._read(self.paths[index], decode=True))
        return pixels.movedim(-1, 0).contiguous() if pixels.dim() == 3 else pixels

    def in_memory_if_small(self) -> "Tensor | ImageFiles":
        """The images as one tensor where they are at most `IN_MEMORY_VALUES` values, else itself."""
        if len(self) * math.prod(self.data_shape) > IN_MEMORY_VALUES:
            return self
        return torch.stack([self[i] for i in range(len(self))])

    def _read(self, path: Path, *, decode: bool) -> Any:
        try:
            from PIL import Image
        except ImportError as error:
            raise DataError("images: reading image files needs pillow; install ppl-models[images]") from error
        try:
            resample = Image.Resampling.LANCZOS
            with warnings.catch_warnings():
                # Of a decompression bomb of moderate size pillow only warns.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=("PNG", "JPEG")) as image:
                    if image.mode not in ("L", "RGB"):
                        raise DataError(
                            f"{path}: expected a grey (L) or RGB image, got mode {image.mode}; convert the file"
                        )
                    side = self.image_size
                    if not decode:
                        return image.mode, image.size if side is None else (side, side)
                    return np.array(image if side is None else _centre_square(image).resize((side, side), resample))
        except DataError:
            raise
        except Exception as error:  # a decoder fed with a damaged file raises anything from SyntaxError to struct.error
            raise DataError(f"{path}: cannot be read as png or jpg ({error}); replace or remove the file") from error


def _centre_square(image: Any) -> Any:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def image_paths(folder: Path, root: Path) -> list[Path]:
    """The png and jpg files of a folder, sorted by name.

    Args:
        folder: where they lie; sub-folders are not searched.
        root: the folder that links must not leave, folder itself or above it.

    Raises:
        DataError: none there, or a link that leaves `root`.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise DataError(f"{folder}: no png or jpg files; expected images in it, or in its sub-folders train/ and test/")
    for path in paths:
        if not path.resolve().is_relative_to(root.resolve()):
            raise DataError(f"{path}: a link that leaves {root}; copy the file into the folder")
    return paths
