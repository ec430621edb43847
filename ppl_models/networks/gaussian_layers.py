"""The rung of a ladder: one network that gives a Gaussian for its own layer and features for the layer above.

    h_l = f_l(h_{l-1}),  h_0 = x        (mu_l, sigma_l) = linear heads of h_l,  sigma_l = exp(.) > 0

(Sonderby et al. 2016, arXiv:1602.02282, the deterministic upward pass). The features are shared: whatever the layers above
know of x they know through h_l. Plain torch: no Pyro and no probability; leading dims are batch dims, whatever their number.
The top rung of a ladder, above which nothing stands, is a :class:`ppl_models.networks.GaussianEncoder`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ppl_models.networks.entries import flat_entries
from ppl_models.networks.labels import stated_labels
from ppl_models.networks.mlp import ACTIVATIONS, MLP
from ppl_models.networks.precision import at_least_float32


class LadderEncoder(nn.Module):
    """h -> (loc, scale, features): loc and scale ``[..., latent_dim]``, scale > 0, features ``[..., hidden[-1]]``.

    Args:
        data_shape: shape of one input: of a datum for the lowest rung, ``(width,)`` of the features below for others.
        latent_dim: width of loc and scale.
        hidden: hidden widths, at least one; the last is the width of the features.
        activation: see :class:`ppl_models.networks.MLP`.
        num_classes: when given, the input holds integers 0..num_classes-1 and enters one-hot.
        counts: the input holds counts and enters as log(1 + n).
        num_labels: see :class:`ppl_models.networks.MLP`.

    Raises:
        ValueError: no hidden layer, and what :class:`ppl_models.networks.MLP` refuses.

    Example:
        >>> import torch
        >>> loc, scale, features = LadderEncoder((8, 8), latent_dim=3, hidden=(32, 16))(torch.zeros(5, 8, 8))
        >>> loc.shape, bool((scale > 0).all()), features.shape
        (torch.Size([5, 3]), True, torch.Size([5, 16]))
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
        if not hidden:
            raise ValueError("expected at least one hidden width, the last being that of the features, got none")
        self.data_shape = list(data_shape)
        self.latent_dim = latent_dim
        self.hidden = list(hidden)
        self.activation = activation
        self.num_classes = num_classes
        self.counts = counts
        self.num_labels = num_labels
        inputs = (num_classes or 1) * math.prod(data_shape)
        self.body = nn.Sequential(MLP([inputs, *hidden], activation, num_labels), ACTIVATIONS[activation]())
        self.head = nn.Linear(self.hidden[-1], 2 * latent_dim)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``h`` of shape ``[..., *data_shape]`` to ``(loc, scale, features)``."""
        flat = flat_entries(h, len(self.data_shape), self.head.weight, self.num_classes, self.counts)
        features = self.body(flat)
        loc, log_scale = at_least_float32(self.head(features)).chunk(2, dim=-1)
        return loc, log_scale.exp(), features

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
