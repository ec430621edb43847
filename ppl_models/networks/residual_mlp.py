"""A residual MLP that denoises vectors, and small images taken as vectors.

    h <- W_in x_t;      h <- h + W_2 SiLU((1 + a(t)) * LN(W_1 LN(h)) + b(t))  for each block;      output = W_out SiLU(LN(h))

where a(t), b(t) are linear in an embedding of t (feature-wise modulation: Perez et al. 2018, arXiv:1709.07871; used for t
by Dhariwal and Nichol 2021, arXiv:2105.05233, section 3). W_out starts at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ppl_models.arguments import whole_count
from ppl_models.networks.denoiser import Denoiser, embedded, starting_at_zero
from ppl_models.networks.labels import label_shift
from ppl_models.networks.time_embedding import TimeEmbedding


class _Block(nn.Module):
    """h + W_2 SiLU((1 + a) * LN(W_1 LN(h)) + b), with (a, b) linear in SiLU(embedding)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)  # a and b are its scale and shift
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.second = nn.Sequential(nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        a, b = self.modulation(embedding).chunk(2, dim=-1)
        return h + self.second((1 + a) * self.norm(self.first(h)) + b)


class ResidualMLP(Denoiser):
    """``network(x_t, t)`` for data of any shape, flattened; see the module, and :class:`Denoiser` for the shapes.

    Args:
        data_shape: shape of one datum.
        hidden: width of h and of the embedding of t.
        blocks: number of residual blocks.
        num_classes: K when entries are class indices 0..K-1.
        with_variance: a second output per entry, for a learned variance.
        outputs: numbers per entry that come out, for a wrapper that says what they mean, such as
            :class:`ppl_models.networks.grid_denoiser.GridDenoiser`; None: one, two or K, by the two options above.
        num_labels: see :class:`Denoiser`.

    Raises:
        ValueError: a width or number of blocks or outputs below one, ``outputs`` beside the options that it replaces, or
            what the base class refuses.

    Example:
        >>> import torch
        >>> network = ResidualMLP((8, 8), hidden=32, blocks=2)
        >>> network(torch.zeros(5, 8, 8), torch.tensor([1, 2, 3, 4, 5])).shape
        torch.Size([5, 8, 8])
        >>> ResidualMLP((8,), hidden=32, num_classes=4)(torch.zeros(5, 8, dtype=torch.long), torch.tensor(1)).shape
        torch.Size([5, 8, 4])
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        hidden: int = 256,
        blocks: int = 4,
        num_classes: int | None = None,
        with_variance: bool = False,
        outputs: int | None = None,
        num_labels: int | None = None,
    ) -> None:
        super().__init__(data_shape, num_classes, with_variance, num_labels)
        if outputs is not None:
            if num_classes is not None or with_variance or outputs < 1:
                raise ValueError(
                    f"expected outputs >= 1, without num_classes and with_variance, which set it, got {outputs}: leave "
                    "one of them out"
                )
            self.outputs = outputs
        self._stated_outputs = outputs
        hidden, blocks = whole_count("hidden", hidden), whole_count("blocks", blocks)
        self.hidden = hidden
        self.time = TimeEmbedding(hidden)
        self.label = label_shift(num_labels, hidden)
        self.first = nn.Linear(self.size * self.inputs, hidden)
        self.blocks = nn.ModuleList(_Block(hidden) for _ in range(blocks))
        self.last = nn.Sequential(
            nn.LayerNorm(hidden), nn.SiLU(), starting_at_zero(nn.Linear(hidden, self.size * self.outputs))
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t ``[*batch, *data_shape]`` and t to the prediction or the logits."""
        batch = self.batch_shape(x_t)
        embedding = embedded(t, self.time, self.label, batch)
        h = self.first(self.features(x_t).reshape(*batch, -1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.output(self.last(h).reshape(*batch, *self.data_shape, self.outputs))

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        stated = {} if self._stated_outputs is None else {"outputs": self._stated_outputs}
        return super().config() | {"hidden": self.hidden, "blocks": len(self.blocks)} | stated
