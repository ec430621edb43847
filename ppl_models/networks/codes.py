"""Encoders to a point z = f(x), as autoencoders use them, and the layer that keeps the k largest units of z.

Plain torch: no Pyro and no probability. As with the other networks, leading dims are batch dims, whatever their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppl_models.networks.entries import flat_entries
from ppl_models.networks.labels import stated_labels
from ppl_models.networks.mlp import MLP


class KSparse(nn.Module):
    """Keeps the k largest units of z and sets the others to zero: exactly k are kept, whatever the ties.

    Makhzani and Frey 2013, *k-Sparse Autoencoders* (arXiv:1312.5663), section 2.1: the largest, not the largest in
    absolute value; gradients reach the kept units alone. The same k holds in training and evaluation.

    Args:
        k: number of units kept, 1 <= k <= d.

    Raises:
        ValueError: k below one; k above d, at the call (an autoencoder makes one when it is built).

    Example:
        >>> KSparse(2)(torch.tensor([[0.1, 3.0, -5.0, 2.0]]))
        tensor([[0., 3., 0., 2.]])
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"expected k to be a whole number >= 1, got {k!r}: keep at least one unit")
        self.k = k

    def forward(self, z: Tensor) -> Tensor:
        """``z`` ``[..., d]`` with k units kept."""
        if self.k > z.shape[-1]:
            raise ValueError(
                f"expected k <= {z.shape[-1]}, the width of the layer, got {self.k}: lower k or widen the layer"
            )
        kept = z.topk(self.k, dim=-1).indices
        return torch.zeros_like(z).scatter(-1, kept, z.gather(-1, kept))

    def extra_repr(self) -> str:
        """The number of units kept, for ``print``."""
        return f"k={self.k}"


class CodeEncoder(nn.Module):
    """x -> z = f(x), ``[..., latent_dim]``: an MLP on the flattened datum.

    Args:
        data_shape: shape of one datum.
        latent_dim: d, width of z.
        hidden: hidden widths.
        activation: see :class:`ppl_models.networks.MLP`.
        num_classes: when given, x holds integers 0..num_classes-1 and enters one-hot.
        bounded: pass z through a sigmoid, so that each unit is an activity in (0, 1).
        k: keep the k largest units, see :class:`KSparse`; None keeps all.
        counts: x holds counts and enters as log(1 + x).
        num_labels: see :class:`ppl_models.networks.MLP`.

    Raises:
        ValueError: k not in 1..latent_dim; see also :class:`ppl_models.networks.MLP`.

    Example:
        >>> CodeEncoder((8, 8), latent_dim=3, hidden=(16,))(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dim: int,
        hidden: Sequence[int] = (200, 200),
        activation: str = "tanh",
        num_classes: int | None = None,
        bounded: bool = False,
        k: int | None = None,
        counts: bool = False,
        num_labels: int | None = None,
    ) -> None:
        super().__init__()
        if k is not None and k > latent_dim:
            raise ValueError(f"expected k <= latent_dim = {latent_dim}, got {k}: lower k or raise latent_dim")
        self.data_shape = list(data_shape)
        self.latent_dim = latent_dim
        self.hidden = list(hidden)
        self.activation = activation
        self.num_classes = num_classes
        self.counts = counts
        self.num_labels = num_labels
        self.bounded = bounded
        self.k = k
        self.keep = nn.Identity() if k is None else KSparse(k)
        self.body = MLP([math.prod(data_shape) * (num_classes or 1), *hidden, latent_dim], activation, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of shape ``[..., *data_shape]`` to ``[..., latent_dim]``."""
        reference = next(self.body.parameters())
        z = self.body(flat_entries(x, len(self.data_shape), reference, self.num_classes, self.counts))
        return self.keep(torch.sigmoid(z) if self.bounded else z)

    def config(self) -> dict[str, object]:
        """Constructor arguments, JSON-able."""
        return {
            "data_shape": self.data_shape,
            "latent_dim": self.latent_dim,
            "hidden": self.hidden,
            "activation": self.activation,
            "num_classes": self.num_classes,
            "bounded": self.bounded,
            "k": self.k,
            "counts": self.counts,
            **stated_labels(self.num_labels),
        }
