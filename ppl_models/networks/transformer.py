"""A transformer that denoises sequences of classes: text, or any discrete data read as a sequence.

    h_i <- token(x_i) + place_i + e(t);    h <- h + GELU(C * h);    h <- layer(h) for each layer;    logits_i = W LN(h_i)

with PyTorch's own encoder layers, normalised first, and no causal mask: every position sees every other, as a denoiser must
(D3PM: Austin et al. 2021, arXiv:2107.03006, appendix B). C is a convolution over neighbours, as in front of the transformer of
wav2vec 2.0 (Baevski et al. 2020, arXiv:2006.11477): from it the first steps learn what stands beside what, which attention
alone finds only after thousands. W starts at zero, so an untrained network says that all classes are equally likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from ppl_models.networks.denoiser import Denoiser, starting_at_zero
from ppl_models.networks.entries import rows_of
from ppl_models.networks.labels import label_shift, stated_labels
from ppl_models.networks.time_embedding import TimeEmbedding

_INITIAL_SCALE = 0.02


class TransformerDenoiser(Denoiser):
    """``network(x_t, t)``: int64 ``[*batch, *data_shape]`` -> logits of x_0, ``[*batch, *data_shape, num_classes]``.

    Args:
        data_shape: shape of one datum, (L,) for text; other shapes are read row by row.
        num_classes: K.
        width: d, a multiple of ``heads``.
        layers: number of encoder layers.
        heads: attention heads in each.
        neighbours: positions that C sees, an odd number; None leaves it out.
        time_conditioned: False leaves t out. Absorbing diffusion can do without it: the number of masked positions tells t.
        num_labels: see :class:`Denoiser`.

    Raises:
        ValueError: a width that the heads do not divide, fewer than one layer or head, an even number of neighbours, or what
            the base class refuses.

    Example:
        >>> network = TransformerDenoiser((16,), num_classes=27, width=32, layers=1)
        >>> network(torch.zeros(5, 16, dtype=torch.long), torch.tensor([1, 2, 3, 4, 5])).shape
        torch.Size([5, 16, 27])
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        num_classes: int,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        time_conditioned: bool = True,
        neighbours: int | None = 7,
        num_labels: int | None = None,
    ) -> None:
        super().__init__(data_shape, num_classes, num_labels=num_labels)
        if layers < 1 or heads < 1 or width < 1 or width % heads:
            raise ValueError(
                f"expected layers, heads >= 1 and a width that heads divide, got layers={layers}, heads={heads}, width={width}"
            )
        if neighbours is not None and (type(neighbours) is not int or neighbours < 1 or neighbours % 2 == 0):
            raise ValueError(f"expected an odd number of neighbours, or None for no convolution, got {neighbours}")
        self.width = width
        self.heads = heads
        self.neighbours = neighbours
        self.token = nn.Embedding(num_classes, width)
        self.place = nn.Parameter(_INITIAL_SCALE * torch.randn(self.size, width))
        self.time = TimeEmbedding(width) if time_conditioned else None
        self.label = label_shift(num_labels, width)
        self.convolution = None if neighbours is None else nn.Conv1d(width, width, neighbours, padding=neighbours // 2)
        self.layers = nn.ModuleList(  # not nn.TransformerEncoder, whose layers all start as copies of one
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.last = nn.Sequential(nn.LayerNorm(width), starting_at_zero(nn.Linear(width, num_classes)))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Class indices and t to the logits of x_0."""
        batch = self.batch_shape(x_t)
        h = rows_of(self.token.weight, x_t.reshape(-1, self.size)) + self.place
        if self.time is not None:
            h = h + self.time(t).expand(*batch, -1).reshape(-1, 1, self.width)
        if self.label is not None:
            h = h + self.label(h.new_zeros(*batch, self.width)).reshape(-1, 1, self.width)
        if self.convolution is not None:
            h = h + gelu(self.convolution(h.mT).mT)
        for layer in self.layers:
            h = layer(h)
        return self.last(h).reshape(*batch, *self.data_shape, self.outputs)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {
            "data_shape": self.data_shape,
            "num_classes": self.num_classes,
            "width": self.width,
            "layers": len(self.layers),
            "heads": self.heads,
            "time_conditioned": self.time is not None,
            "neighbours": self.neighbours,
            **stated_labels(self.num_labels),
        }
