"""Corruptions M(x~ | x) of denoising autoencoders: the encoder sees x~, the reconstruction is compared with x.

    Gaussian noise     x~_i = x_i + s e_i,  e_i ~ N(0, 1)
    masking            x~_i = fill with probability p, else x_i
    salt and pepper    x~_i = low with probability p/2, high with probability p/2, else x_i

independently for all entries i. Sources: lecture notes 004, "Denoising autoencoder" (M_0 there); Vincent et al. 2010,
*Stacked Denoising Autoencoders*, JMLR 11, section 3.3.

The one constraint: a corruption has no parameters to learn, so the draw of x~ carries every gradient there is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ppl_models.likelihoods import Likelihood


class Corruption(nn.Module, ABC):
    """x -> x~ ~ M(x~ | x), drawn afresh at each call, whatever the mode: the pair decides when to corrupt."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """A corrupted copy of ``x``, of its shape and dtype."""

    @abstractmethod
    def check(self, likelihood: Likelihood, example: Tensor) -> None:
        """Refuses data that it cannot corrupt.

        Args:
            likelihood: whose data they are.
            example: one datum, ``[1, *data_shape]``.

        Raises:
            ValueError: class indices where numbers are needed, or a replacement that is no class.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""

    def extra_repr(self) -> str:
        """The constructor arguments, for ``print``."""
        return ", ".join(f"{key}={value!r}" for key, value in self.config().items())


class GaussianNoise(Corruption):
    """x~ = x + s e, e ~ N(0, I).

    Args:
        scale: s > 0, in data units.

    Raises:
        ValueError: a scale that is not positive and finite.

    Example:
        >>> GaussianNoise(0.3)(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 8, 8])
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise ValueError(
                f"expected scale to be a positive finite number, got {scale!r}; for no noise, no corruption"
            )
        self.scale = float(scale)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with noise added."""
        return x + self.scale * torch.randn_like(x)

    def check(self, likelihood: Likelihood, example: Tensor) -> None:
        """Refuses class indices; see the base class."""
        if not example.is_floating_point():
            raise ValueError(
                f"expected floating-point data for GaussianNoise, got {example.dtype} class indices: use Masking or "
                "SaltAndPepper, which replace values"
            )

    def config(self) -> dict[str, Any]:
        """See :meth:`Corruption.config`."""
        return {"scale": self.scale}


class Masking(Corruption):
    """Each entry becomes ``fill`` with probability p.

    Args:
        probability: p in (0, 1).
        fill: what stands for a missing value: 0 for data in [0, 1], -1 for data in [-1, 1] whose background is black.

    Raises:
        ValueError: a probability outside (0, 1) or a fill that is not finite.

    Example:
        >>> sorted(set(Masking(0.5)(torch.ones(100)).tolist()))
        [0.0, 1.0]
    """

    def __init__(self, probability: float, fill: float = 0.0) -> None:
        super().__init__()
        self.probability = _probability(probability)
        self.fill = _finite("fill", fill)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with a random part of its entries replaced."""
        hit = torch.rand(x.shape, device=x.device) < self.probability
        return torch.where(hit, torch.full_like(x, self.fill), x)

    def check(self, likelihood: Likelihood, example: Tensor) -> None:
        """Refuses a fill that is no class where data are classes; see the base class."""
        _check_class("fill", self.fill, likelihood, example)

    def config(self) -> dict[str, Any]:
        """See :meth:`Corruption.config`."""
        return {"probability": self.probability, "fill": self.fill}


class SaltAndPepper(Corruption):
    """Each entry becomes ``low`` or ``high``, by a fair coin, with probability p.

    Args:
        probability: p in (0, 1).
        low: pepper, the least value of the data.
        high: salt, the greatest value of the data.

    Raises:
        ValueError: a probability outside (0, 1), or not low < high, both finite.

    Example:
        >>> sorted(set(SaltAndPepper(0.5)(torch.full((100,), 0.4, dtype=torch.float64)).tolist()))
        [0.0, 0.4, 1.0]
    """

    def __init__(self, probability: float, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        self.probability = _probability(probability)
        self.low, self.high = _finite("low", low), _finite("high", high)
        if not self.low < self.high:
            raise ValueError(f"expected low < high, got {low} and {high}: give the least and the greatest data value")

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with a random part of its entries replaced by either extreme."""
        u = torch.rand(x.shape, device=x.device)
        x = torch.where(u < self.probability / 2, torch.full_like(x, self.low), x)
        return torch.where(u > 1 - self.probability / 2, torch.full_like(x, self.high), x)

    def check(self, likelihood: Likelihood, example: Tensor) -> None:
        """Refuses extremes that are no classes where data are classes; see the base class."""
        _check_class("low", self.low, likelihood, example)
        _check_class("high", self.high, likelihood, example)

    def config(self) -> dict[str, Any]:
        """See :meth:`Corruption.config`."""
        return {"probability": self.probability, "low": self.low, "high": self.high}


def _probability(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"expected probability in (0, 1), got {value!r}; for no corruption at all, leave it out")
    return float(value)


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected {name} to be a finite number, got {value!r}")
    return float(value)


def _check_class(name: str, value: float, likelihood: Likelihood, example: Tensor) -> None:
    """Refuses a replacement value that class indices cannot take."""
    if example.is_floating_point():
        return
    if not value.is_integer():
        raise ValueError(f"expected {name} to be a class index for {example.dtype} data, got {value}")
    likelihood.check(torch.full_like(example, int(value)), name)
