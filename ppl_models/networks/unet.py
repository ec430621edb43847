"""A small U-Net that denoises images of 8x8 and more.

Residual blocks at falling resolution, then at rising resolution, each of the latter joined by what the former saw at its
size (Ronneberger et al. 2015, arXiv:1505.04597; as a denoiser: Ho et al. 2020, arXiv:2006.11239, appendix B). Block:

    h <- S h + conv SiLU((1 + a(t)) * GN(conv SiLU(GN(h))) + b(t)),        S = 1, or a 1x1 convolution where widths differ

Any height and width: an odd size n halves to (n + 1)/2, and the way up returns to the size that was left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from ppl_models.networks.denoiser import Denoiser, embedded, starting_at_zero
from ppl_models.networks.labels import label_shift
from ppl_models.networks.time_embedding import TimeEmbedding

_SMALLEST_SIDE = 8


def image_shape(data_shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W) of data of shape (H, W), one channel, or (C, H, W).

    Raises:
        ValueError: data of another number of dimensions.
    """
    if len(data_shape) not in (2, 3):
        raise ValueError(
            f"expected images of shape (H, W) or (C, H, W), got {list(data_shape)}: use ResidualMLP for vectors"
        )
    channels, height, width = (1, *data_shape)[-3:]
    return channels, height, width


def _norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """At most 8 groups of at least 4 channels, so that a group's variance is one of several numbers at 1x1 as well."""
    return nn.GroupNorm(math.gcd(channels // 4, 8), channels, affine=affine)


class _Block(nn.Module):
    """The residual block of the module's docstring, ``[N, c_in, H, W]`` -> ``[N, c_out, H, W]``."""

    def __init__(self, c_in: int, c_out: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.norm = _norm(c_out, affine=False)  # a and b are its scale and shift
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * c_out))
        self.second = nn.Sequential(nn.SiLU(), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        a, b = self.modulation(embedding)[..., None, None].chunk(2, dim=1)
        return self.shortcut(h) + self.second((1 + a) * self.norm(self.first(h)) + b)


class _Attention(nn.Module):
    """h + W softmax(q k' / sqrt(c)) v over the pixels, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Sequential(_norm(channels), nn.Conv2d(channels, 3 * channels, 1))
        self.last = nn.Conv2d(channels, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        return h + self.last(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape))


class UNet(Denoiser):
    """``network(x_t, t)`` for images; see the module, and :class:`Denoiser` for the shapes.

    Args:
        data_shape: (H, W) or (C, H, W), H and W at least 8.
        channels: width at each resolution, highest first, multiples of 4; each further entry halves the resolution.
        blocks: residual blocks at each resolution, on the way down and again on the way up.
        attention: let the pixels of the lowest resolution attend to each other.
        num_classes: K when entries are class indices 0..K-1.
        with_variance: a second output per entry, for a learned variance.
        num_labels: see :class:`Denoiser`.

    Raises:
        ValueError: images too small or of another number of dimensions, widths that are not multiples of 4, fewer blocks
            than one, or what the base class refuses.

    Example:
        >>> UNet((28, 28), channels=(8, 8, 8), blocks=1)(torch.zeros(2, 28, 28), torch.tensor([1, 1000])).shape
        torch.Size([2, 28, 28])
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        blocks: int = 2,
        attention: bool = False,
        num_classes: int | None = None,
        with_variance: bool = False,
        num_labels: int | None = None,
    ) -> None:
        super().__init__(data_shape, num_classes, with_variance, num_labels)
        self.image_shape = image_shape(data_shape)
        if min(self.image_shape[1:]) < _SMALLEST_SIDE:
            raise ValueError(
                f"expected images of at least 8x8, got {list(data_shape)}: use ResidualMLP for smaller ones"
            )
        if not channels or any(c < 4 or c % 4 for c in channels):
            raise ValueError(f"expected channels to be positive multiples of 4, got {list(channels)}")
        if blocks < 1:
            raise ValueError(f"expected blocks >= 1, got {blocks}")
        self.channels = list(channels)
        self.blocks = blocks
        width = 4 * channels[0]
        self.time = TimeEmbedding(width)
        self.label = label_shift(num_labels, width)
        self.first = nn.Conv2d(self.image_shape[0] * self.inputs, channels[0], 3, padding=1)
        entering = [channels[0], *channels[:-1]]
        self.down = nn.ModuleList(
            nn.ModuleList(_Block(c_in if i == 0 else c, c, width) for i in range(blocks))
            for c_in, c in zip(entering, channels, strict=True)
        )
        self.downsample = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2, padding=1) for c in channels[:-1])
        c = channels[-1]
        self.middle = nn.ModuleList([_Block(c, c, width), _Block(c, c, width)])
        self.attention = _Attention(c) if attention else None
        self.up = nn.ModuleList(
            nn.ModuleList(_Block(2 * c, c, width) for _ in range(blocks)) for c in reversed(channels)
        )
        self.upsample = nn.ModuleList(
            nn.Conv2d(c_in, c, 3, padding=1) for c_in, c in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )
        self.last = nn.Sequential(
            _norm(channels[0]),
            nn.SiLU(),
            starting_at_zero(nn.Conv2d(channels[0], self.image_shape[0] * self.outputs, 3, padding=1)),
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t ``[*batch, *data_shape]`` and t to the prediction or the logits."""
        batch = self.batch_shape(x_t)
        channels, height, width = self.image_shape
        images = self.features(x_t).reshape(-1, channels, height, width, self.inputs)
        embedding = embedded(t, self.time, self.label, batch).expand(*batch, -1).reshape(len(images), -1)
        out = self._pixels(images.movedim(-1, 2).flatten(1, 2), embedding)
        out = out.reshape(-1, channels, self.outputs, height, width).movedim(2, -1)
        return self.output(out.reshape(*batch, *self.data_shape, self.outputs))

    def _pixels(self, images: Tensor, embedding: Tensor) -> Tensor:
        """``[N, channels in, H, W]`` -> ``[N, channels out, H, W]``."""
        h = self.first(images)
        seen = []
        for level, blocks in enumerate(self.down):
            if level > 0:
                h = self.downsample[level - 1](h)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, embedding)
                seen.append(h)
        h = self.middle[0](h, embedding)
        if self.attention is not None:
            h = self.attention(h)
        h = self.middle[1](h, embedding)
        for level, blocks in enumerate(self.up):
            if level > 0:
                h = self.upsample[level - 1](interpolate(h, size=seen[-1].shape[-2:]))
            for block in blocks:  # type: ignore[attr-defined]
                h = block(torch.cat([h, seen.pop()], 1), embedding)
        return self.last(h)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return super().config() | {
            "channels": self.channels,
            "blocks": self.blocks,
            "attention": self.attention is not None,
        }
