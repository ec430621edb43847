"""Multilayer perceptrons that accept any leading dimensions: encoders and decoders for vectors and small images.

Plain torch: no Pyro and no probability. An encoder maps x to the two arrays (loc, scale) of a diagonal Gaussian with
scale = exp(log-scale head) > 0, as in Burda et al. 2016 (arXiv:1509.00519, section 2); a decoder maps z to whatever
arrays a likelihood asks for. Leading dims are batch dims, whatever their number, so a network serves a batch
``[B, ...]`` and particles over a batch ``[K, B, ...]`` alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ppl_models.arguments import sizes, whole_count
from ppl_models.networks.entries import flat_entries
from ppl_models.networks.labels import label_shift, stated_labels
from ppl_models.networks.precision import at_least_float32

Activation = Literal["tanh", "relu", "silu", "gelu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


class MLP(nn.Sequential):
    """Linear layers of the given widths with an activation between them.

    Args:
        widths: input width, hidden widths, output width; at least two entries.
        activation: one of ``tanh``, ``relu``, ``silu``, ``gelu``.
        num_labels: K, for networks that also read a label y in 0..K-1: after the first layer comes a
            :class:`ppl_models.networks.LabelShift`, which is y one-hot beside the input.

    Raises:
        ValueError: fewer than two widths, a width below one, or an unknown activation.

    Example:
        >>> MLP([3, 5, 2])(torch.zeros(7, 4, 3)).shape
        torch.Size([7, 4, 2])
    """

    def __init__(self, widths: Sequence[int], activation: str = "tanh", num_labels: int | None = None) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"expected at least two positive widths (input, ..., output), got {list(widths)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"expected an activation among {', '.join(ACTIVATIONS)}, got {activation!r}")
        layers: list[nn.Module] = []
        for i in range(len(widths) - 1):
            shift = label_shift(num_labels if i == 0 else None, widths[i + 1])
            layers += [
                nn.Linear(widths[i], widths[i + 1]),
                *([] if shift is None else [shift]),
                ACTIVATIONS[activation](),
            ]
        super().__init__(*layers[:-1])
        self.widths = list(widths)
        self.activation = activation
        self.num_labels = num_labels

    def config(self) -> dict[str, object]:
        """Constructor arguments, JSON-able."""
        return {"widths": self.widths, "activation": self.activation, **stated_labels(self.num_labels)}


class GaussianEncoder(nn.Module):
    """x -> (loc, scale), both ``[..., latent_dim]``, scale > 0.

    Args:
        data_shape: shape of one datum.
        latent_dim: width of loc and scale.
        hidden: hidden widths.
        activation: see :class:`MLP`.
        num_classes: when given, x holds integers 0..num_classes-1 and enters one-hot.
        counts: x holds counts and enters as log(1 + x).
        num_labels: see :class:`MLP`.

    Example:
        >>> loc, scale = GaussianEncoder((8, 8), latent_dim=3, hidden=(16,))(torch.zeros(5, 8, 8))
        >>> loc.shape, bool((scale > 0).all())
        (torch.Size([5, 3]), True)
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dim: int,
        hidden: Sequence[int] = (200, 200),
        activation: str = "tanh",
        num_classes: int | None = None,
        counts: bool = False,
        num_labels: int | None = None,
    ) -> None:
        super().__init__()
        self.data_shape = sizes("data_shape", data_shape)
        self.latent_dim = whole_count("latent_dim", latent_dim)
        self.hidden = sizes("hidden", hidden)
        self.activation = activation
        self.num_classes = num_classes
        self.counts = counts
        self.num_labels = num_labels
        inputs = math.prod(self.data_shape) * (num_classes or 1)
        self.body = MLP([inputs, *self.hidden, 2 * self.latent_dim], activation, num_labels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` of shape ``[..., *data_shape]`` to ``(loc, scale)``, each ``[..., latent_dim]``."""
        reference = next(self.body.parameters())
        flat = flat_entries(x, len(self.data_shape), reference, self.num_classes, self.counts)
        loc, log_scale = at_least_float32(self.body(flat)).chunk(2, dim=-1)
        return loc, log_scale.exp()

    def config(self) -> dict[str, object]:
        """Constructor arguments, JSON-able."""
        return {
            "data_shape": self.data_shape,
            "latent_dim": self.latent_dim,
            "hidden": self.hidden,
            "activation": self.activation,
            "num_classes": self.num_classes,
            "counts": self.counts,
            **stated_labels(self.num_labels),
        }


class Decoder(nn.Module):
    """z -> likelihood parameters of shape ``[..., *output_shape]``, or a pair of such arrays.

    Args:
        latent_dim: width of z.
        output_shape: shape of one datum's parameters (for classes, with the number of classes last).
        hidden: hidden widths.
        activation: see :class:`MLP`.
        with_scale: return ``(loc, scale)`` with scale = exp(head) > 0 instead of one array.
        num_labels: see :class:`MLP`.

    Example:
        >>> Decoder(3, (8, 8), hidden=(16,))(torch.zeros(5, 3)).shape
        torch.Size([5, 8, 8])
    """

    def __init__(
        self,
        latent_dim: int,
        output_shape: Sequence[int],
        hidden: Sequence[int] = (200, 200),
        activation: str = "tanh",
        with_scale: bool = False,
        num_labels: int | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim = whole_count("latent_dim", latent_dim)
        self.output_shape = sizes("output_shape", output_shape)
        self.hidden = sizes("hidden", hidden)
        self.activation = activation
        self.with_scale = with_scale
        self.num_labels = num_labels
        outputs = math.prod(self.output_shape) * (2 if with_scale else 1)
        self.body = MLP([self.latent_dim, *self.hidden, outputs], activation, num_labels)

    def forward(self, z: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """``z`` of shape ``[..., latent_dim]`` to ``[..., *output_shape]`` (twice, with ``with_scale``)."""
        outputs = self.body(z.to(next(self.body.parameters()).dtype))
        shape = torch.Size(
            [*outputs.shape[:-1], *self.output_shape]
        )  # of as many rows as z, or as labels where z has one
        if not self.with_scale:
            return outputs.reshape(shape)
        loc, log_scale = at_least_float32(outputs).chunk(2, dim=-1)
        return loc.reshape(shape), log_scale.exp().reshape(shape)

    def config(self) -> dict[str, object]:
        """Constructor arguments, JSON-able."""
        return {
            "latent_dim": self.latent_dim,
            "output_shape": self.output_shape,
            "hidden": self.hidden,
            "activation": self.activation,
            "with_scale": self.with_scale,
            **stated_labels(self.num_labels),
        }
