"""An MLP from arrays of one shape to arrays of another: x -> class logits or code vectors, one-hot or code vectors -> x.

    output = reshape(MLP(flatten(input)))

Plain torch: no Pyro and no probability. The one constraint: leading dims, whatever their number, are batch dims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ppl_models.networks.entries import flat_entries
from ppl_models.networks.labels import stated_labels
from ppl_models.networks.mlp import Decoder


class ArrayMLP(nn.Module):
    """``[..., *input_shape]`` to ``[..., *output_shape]``, or to a pair of such arrays.

    Args:
        input_shape: shape of one input.
        output_shape: shape of one output.
        hidden: hidden widths.
        activation: see :class:`ppl_models.networks.MLP`.
        num_classes: when given, the input holds integers 0..num_classes-1 and enters one-hot.
        with_scale: return ``(loc, scale)`` with scale = exp(head) > 0 instead of one array.
        counts: the input holds counts and enters as log(1 + n).
        num_labels: see :class:`ppl_models.networks.MLP`.

    Example:
        >>> import torch
        >>> ArrayMLP((3, 4), (8, 8), hidden=(16,))(torch.zeros(7, 5, 3, 4)).shape
        torch.Size([7, 5, 8, 8])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        output_shape: Sequence[int],
        hidden: Sequence[int] = (200, 200),
        activation: str = "tanh",
        num_classes: int | None = None,
        with_scale: bool = False,
        counts: bool = False,
        num_labels: int | None = None,
    ) -> None:
        super().__init__()
        self.input_shape = list(input_shape)
        self.num_classes = num_classes
        self.counts = counts
        width = math.prod(self.input_shape) * (num_classes or 1)
        self.body = Decoder(width, output_shape, hidden, activation, with_scale, num_labels)

    def forward(self, array: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The output for ``array`` ``[..., *input_shape]``."""
        reference = next(self.body.parameters())
        return self.body(flat_entries(array, len(self.input_shape), reference, self.num_classes, self.counts))

    def config(self) -> dict[str, object]:
        """Constructor arguments, JSON-able."""
        return {
            "input_shape": self.input_shape,
            "output_shape": self.body.output_shape,
            "hidden": self.body.hidden,
            "activation": self.body.activation,
            "num_classes": self.num_classes,
            "with_scale": self.body.with_scale,
            "counts": self.counts,
            **stated_labels(self.body.num_labels),
        }


def mirrored(
    data_shape: Sequence[int],
    latent_shape: Sequence[int],
    hidden: Sequence[int] = (200, 200),
    activation: str = "tanh",
    num_classes: int | None = None,
    with_scale: bool = False,
    counts: bool = False,
    num_labels: int | None = None,
) -> tuple[ArrayMLP, ArrayMLP]:
    """An encoder x -> ``[..., *latent_shape]`` and a decoder back to a likelihood's parameters, with ``hidden`` reversed.

    Args:
        data_shape: shape of one datum.
        latent_shape: shape of one latent.
        hidden: the encoder's hidden widths.
        activation: see :class:`ppl_models.networks.MLP`.
        num_classes: of class-valued data: one-hot in the encoder, the decoder's last axis.
        with_scale: the decoder returns ``(loc, scale)``.
        counts: the encoder reads log(1 + x).
        num_labels: both read a label, see :class:`ppl_models.networks.MLP`.

    Example:
        >>> import torch
        >>> encoder, decoder = mirrored((8, 8), (3, 4), hidden=(16,))
        >>> decoder(encoder(torch.zeros(5, 8, 8))).shape
        torch.Size([5, 8, 8])
    """
    output_shape = [*data_shape] if num_classes is None else [*data_shape, num_classes]
    encoder = ArrayMLP(
        data_shape, latent_shape, hidden, activation, num_classes=num_classes, counts=counts, num_labels=num_labels
    )
    decoder = ArrayMLP(
        latent_shape, output_shape, list(hidden)[::-1], activation, with_scale=with_scale, num_labels=num_labels
    )
    return encoder, decoder
