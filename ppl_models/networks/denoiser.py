"""What the networks of a diffusion share: the signature ``network(x_t, t)`` and the shapes of its ends.

    real-valued x_t    [*batch, *data_shape]         -> [*batch, *data_shape]       a prediction of eps, x_0 or the mean
    with_variance      the same                      -> [*batch, *data_shape, 2]    the prediction, and v of the variance
    num_classes = K    int64 [*batch, *data_shape]   -> [*batch, *data_shape, K]    logits of x_0

Those made with ``num_labels`` add a vector of the label y to the embedding of t (:mod:`ppl_models.networks.labels`).

t is a LongTensor in 1..T that broadcasts against ``batch``; any number of leading dims is a batch. Networks do not know T.
The last layer starts at zero: an untrained network predicts zero noise, or equal probabilities (Ho et al. 2020's code).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ppl_models.arguments import sizes
from ppl_models.networks.entries import rows_of
from ppl_models.networks.labels import LabelShift, stated_labels

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class Denoiser(nn.Module):
    """Base of the denoising networks: turns x_t into features per entry, and features into the output's shape.

    Args:
        data_shape: shape of one datum.
        num_classes: K when entries are class indices 0..K-1, None when they are real.
        with_variance: whether there is a second output per entry, the v of a learned variance.
        num_labels: of how many labels a network knows that reads one beside x_t; None: of none.

    Attributes:
        inputs: features per entry that come in, 1 or K.
        outputs: numbers per entry that come out, 1, 2 or K.

    Raises:
        ValueError: an empty shape, K < 2, or both options at once.
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        num_classes: int | None = None,
        with_variance: bool = False,
        num_labels: int | None = None,
    ) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"expected num_classes >= 2, got {num_classes}: leave it out for real-valued data")
        if num_classes is not None and with_variance:
            raise ValueError(
                "expected num_classes or with_variance, got both: a law of classes has no variance to learn"
            )
        self.data_shape = sizes("data_shape", data_shape)
        self.num_classes = num_classes
        self.with_variance = with_variance
        self.num_labels = num_labels
        self.inputs = num_classes or 1
        self.outputs = num_classes or (2 if with_variance else 1)

    def batch_shape(self, x: Tensor) -> torch.Size:
        """The leading dims of x.

        Raises:
            ValueError: the trailing dims are not ``data_shape``.
        """
        n = x.dim() - len(self.data_shape)
        if n < 0 or list(x.shape[n:]) != self.data_shape:
            raise ValueError(
                f"expected x_t of shape [*batch, {', '.join(map(str, self.data_shape))}], got {list(x.shape)}: "
                "make the network for the shape of the data"
            )
        return x.shape[:n]

    def features(self, x: Tensor) -> Tensor:
        """x as ``[*batch, *data_shape, inputs]`` in the dtype of the weights; classes one-hot.

        Raises:
            TypeError: real values where classes are expected, or the reverse.
            ValueError: see :meth:`batch_shape` and :func:`ppl_models.networks.entries.rows_of`.
        """
        self.batch_shape(x)
        dtype = next(self.parameters()).dtype
        if self.num_classes is None:
            if not x.is_floating_point():
                raise TypeError(
                    f"expected real-valued x_t, got {x.dtype}: give the network num_classes for class indices"
                )
            return x.unsqueeze(-1).to(dtype)
        return rows_of(torch.eye(self.num_classes, dtype=dtype, device=x.device), x)

    def output(self, values: Tensor) -> Tensor:
        """``[*batch, *data_shape, outputs]`` as it is, without the last axis where it has length one."""
        return values.squeeze(-1) if self.outputs == 1 else values

    @property
    def size(self) -> int:
        """Number of entries of one datum."""
        return math.prod(self.data_shape)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {
            "data_shape": self.data_shape,
            "num_classes": self.num_classes,
            "with_variance": self.with_variance,
            **stated_labels(self.num_labels),
        }


def embedded(t: Tensor, time: nn.Module, label: LabelShift | None, batch: Sequence[int]) -> Tensor:
    """The step as a vector, that of the datum's label added to it where there are labels: it broadcasts against the batch."""
    return time(t) if label is None else label(time(t).expand(*batch, -1))


def starting_at_zero(layer: Layer) -> Layer:
    """The layer with weight and bias set to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
