r"""A real-valued denoiser made to read ordered classes: class k of K enters as the number -1 + 2k/(K - 1).

For grey levels as classes, where one-hot inputs would hide that neighbours are alike (D3PM: arXiv:2107.03006, A.8, feeds its
image networks so). The network's own last axis, of length 2, is passed on: location and log-scale of a logistic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppl_models.networks.denoiser import Denoiser


class OrdinalDenoiser(nn.Module):
    """``network(x_t, t)``: int64 ``[*batch, *data_shape]`` in 0..K-1 -> ``[*batch, *data_shape, 2]``.

    Args:
        network: a :class:`Denoiser` of real values, made with ``with_variance=True``.
        num_classes: K >= 2.

    Raises:
        ValueError: a network that takes classes, or that returns one number per entry; K < 2.

    Example:
        >>> from ppl_models.networks.residual_mlp import ResidualMLP
        >>> network = OrdinalDenoiser(ResidualMLP((8, 8), hidden=32, with_variance=True), num_classes=17)
        >>> network(torch.zeros(5, 8, 8, dtype=torch.long), torch.tensor(3)).shape
        torch.Size([5, 8, 8, 2])
    """

    def __init__(self, network: Denoiser, num_classes: int) -> None:
        super().__init__()
        if network.outputs != 2 or network.inputs != 1:
            raise ValueError(
                f"expected a network of one input and two outputs per entry, got {network.inputs} and {network.outputs}: "
                "make it with with_variance=True and without num_classes"
            )
        if num_classes < 2:
            raise ValueError(f"expected num_classes >= 2, got {num_classes}")
        self.network = network
        self.num_classes = num_classes

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Class indices and t to (location, log-scale) per entry."""
        if x_t.dtype != torch.long:
            raise TypeError(
                f"expected class indices (int64) x_t, got {x_t.dtype}: pass the network itself for real values"
            )
        dtype = next(self.network.parameters()).dtype
        return self.network(2 * x_t.to(dtype) / (self.num_classes - 1) - 1, t)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        inner = {"class": type(self.network).__name__, **self.network.config()}
        return {"network": inner, "num_classes": self.num_classes}
