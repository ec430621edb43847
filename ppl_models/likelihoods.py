r"""Likelihoods: what a decoder returns -> the distribution p(x | z) of one datum.

    AE, VAE, HVAE (lecture notes 004):  p(x | z) = N(x; mu(z), sigma^2 I), or a Bernoulli or categorical of its logits
    DDPM (notes 003):                   p(x_0 | x_1) = prod_i of the mass that a Normal puts on the bin of x_0^i

What they have in common, conventions included, is in :mod:`ppl_models.likelihood`; the laws of counts, Poisson and negative
binomial, are in :mod:`ppl_models.count_likelihoods`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

import ppl_models.distributions as extra
from ppl_models.count_likelihoods import NegativeBinomial, Poisson
from ppl_models.data_checks import refuse_grey_levels, refuse_other_than_floats, refuse_other_than_tensor, refuse_where
from ppl_models.likelihood import Likelihood, LocationScale, Parameters, check_dims, known_likelihood, single_tensor

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiscretizedNormal",
    "Likelihood",
    "LocationScale",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "known_likelihood",
]


class Normal(LocationScale):
    r"""x | z ~ N(mu, sigma^2 I), with mu the decoder's output.

        log p(x | z) = -\|x - mu\|^2/(2 sigma^2) - (D/2) log(2 pi sigma^2)

    Source: lecture notes 004, "Gaussian VAE".

    Args:
        scale: sigma: a positive number (fixed), "learned" (one parameter for all dimensions), None (the decoder returns
            the pair (mu, sigma)), or "default": 0.1, or what the system that uses it puts in its place.
        init_scale: where a learned sigma starts; 0.1 unless given.

    Raises:
        ValueError: a scale that is not positive and finite; with Pyro's validation, also at the call, a sigma whose
            square comes near the ends of its dtype (outside [1.1e-17, 1.8e19] in float32).

    Example:
        >>> likelihood = Normal(scale=0.5)
        >>> p = likelihood(torch.zeros(7, 3, 8, 8), data_dim=2)
        >>> p.batch_shape, p.event_shape
        (torch.Size([7, 3]), torch.Size([8, 8]))
        >>> round(Normal(scale=1.0)(torch.zeros(1, 2), 1).log_prob(torch.zeros(1, 2)).item(), 4)    # -log(2 pi)
        -1.8379
    """

    scaling = "none"
    is_discrete = False
    default_scale = 0.1

    def __init__(self, scale: float | str | None = "default", init_scale: float | None = None) -> None:
        super().__init__(scale, init_scale)

    def forward(self, parameters: Parameters, data_dim: int) -> dist.TorchDistribution:
        """N(mu, sigma^2) in each dimension; see `Likelihood.forward`."""
        loc, scale = self._loc_and_scale(parameters, data_dim)
        if dist.is_validation_enabled():
            limits = torch.finfo(scale.dtype)
            low, high = 100 * math.sqrt(limits.tiny), math.sqrt(limits.max)
            refuse_where(
                scale.detach(),
                ~((scale >= low) & (scale <= high)),
                "scale",
                f"a scale in [{low:.2g}, {high:.2g}] for {scale.dtype}",
                "bound the decoder's scale, or use float64",
            )
        return dist.Normal(loc, scale).to_event(data_dim)

    def check(self, x: Tensor, name: str = "x") -> None:
        """Any finite floats; see `Likelihood.check`."""
        refuse_other_than_floats(x, name)


class Bernoulli(Likelihood):
    """x_i | z ~ Bernoulli(sigmoid(l_i)), with the logits l the decoder's output.

        log p(x | z) = sum_i x_i log sigmoid(l_i) + (1 - x_i) log sigmoid(-l_i)

    Source: the two-class case of the categorical reconstruction in lecture notes 004, "Autoencoder"; Kingma and
    Welling, *Auto-Encoding Variational Bayes*, 2013, arXiv:1312.6114, appendix C.1. Grey values have no probability
    under it: they must be binarised, and how is for the user to say.

    Example:
        >>> Bernoulli()(torch.zeros(5, 4), data_dim=1).log_prob(torch.ones(5, 4)).exp()    # 2^-4 each
        tensor([0.0625, 0.0625, 0.0625, 0.0625, 0.0625])
    """

    scaling = "unit"
    is_discrete = True

    def forward(self, parameters: Parameters, data_dim: int) -> dist.TorchDistribution:
        """Bernoulli(logits) in each dimension; see `Likelihood.forward`."""
        logits = single_tensor(parameters, "logits", "return the logits alone")
        check_dims(logits, data_dim)
        return extra.Bernoulli(logits=logits).to_event(data_dim)

    def check(self, x: Tensor, name: str = "x") -> None:
        """Floats, each exactly 0 or 1; see `Likelihood.check`."""
        expected = "exact 0 or 1 under a Bernoulli likelihood"
        remedy = 'scale to [0, 1] (scaling "unit") and state a binarisation ("dynamic" or "fixed")'
        refuse_grey_levels(x, name, expected, remedy)
        refuse_other_than_floats(x, name)
        refuse_where(x, (x != 0) & (x != 1), name, expected, remedy)


class Categorical(Likelihood):
    """x_i | z ~ Categorical(softmax(l_i)) over K classes, with the logits l the decoder's output.

        log p(x | z) = sum_i [l_{i, x_i} - log sum_k exp l_{i, k}]

    Source: lecture notes 004, "Autoencoder", the loss for categorical x.

    Args:
        num_classes: K >= 2. The decoder returns ``[..., *data_shape, K]``; data are int64 in 0..K-1.

    Raises:
        ValueError: `num_classes` is not an int >= 2.

    Example:
        >>> likelihood = Categorical(num_classes=4)
        >>> p = likelihood(torch.zeros(5, 3, 4), data_dim=1)
        >>> p.event_shape, p.log_prob(torch.zeros(5, 3, dtype=torch.int64)).exp()[0].item()    # 4^-3
        (torch.Size([3]), 0.015625)
    """

    scaling = "classes"
    is_discrete = True

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes: int = _at_least_two("num_classes", num_classes)

    def forward(self, parameters: Parameters, data_dim: int) -> dist.TorchDistribution:
        """Categorical(logits) in each dimension, classes on the last axis; see `Likelihood.forward`."""
        return dist.Categorical(logits=self._logits(parameters, data_dim)).to_event(data_dim)

    def mean(self, parameters: Parameters, data_dim: int) -> Tensor:
        """Expected class index sum_k k P(x = k), a float: meaningful where the classes are ordered, as grey levels."""
        probs = self._logits(parameters, data_dim).softmax(-1)
        return probs @ torch.arange(self.num_classes, dtype=probs.dtype, device=probs.device)

    def data_shape_of(self, parameters: Parameters) -> torch.Size:
        """Shape of one datum: decoder output without the batch and class axes."""
        return super().data_shape_of(parameters)[:-1]

    def check(self, x: Tensor, name: str = "x") -> None:
        """int64 in 0..K-1; see `Likelihood.check`."""
        refuse_other_than_tensor(x, name)
        if x.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64 class indices, got {x.dtype}; convert with .long()")
        expected = f"class indices in 0..{self.num_classes - 1}"
        refuse_where(x, (x < 0) | (x >= self.num_classes), name, expected, "raise num_classes or relabel the data")

    def example(self, data_shape: Sequence[int], dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        """All of class 0, in int64 whatever `dtype` is; see `Likelihood.example`."""
        return torch.zeros(1, *data_shape, dtype=torch.int64, device=device)

    def config(self) -> dict[str, Any]:
        """See `Likelihood.config`."""
        return {"num_classes": self.num_classes}

    def _logits(self, parameters: Parameters, data_dim: int) -> Tensor:
        logits = single_tensor(parameters, "logits", "return the logits alone")
        check_dims(logits, data_dim + 1)
        if logits.shape[-1] != self.num_classes:
            raise ValueError(
                f"expected logits of shape [..., *data_shape, {self.num_classes}], one per class on the last axis, got "
                f"{list(logits.shape)}; match the decoder's last axis to num_classes"
            )
        return logits


class DiscretizedNormal(LocationScale):
    """x_i | z: Normal(mu_i, sigma^2) rounded to the nearest of `levels` values in [-1, 1]; mu is the decoder's output.

        p(x | z) = prod_i int_{delta_-(x_i)}^{delta_+(x_i)} N(y; mu_i, sigma^2) dy

    with bins of half-width 1/(levels - 1), open at the ends. Source: lecture notes 003, the discretised Gaussian
    decoder; arXiv:2006.11239, eq. 13. See `ppl_models.distributions.DiscretizedNormal`, also for the admissible sigma.

    Args:
        levels: number of values a pixel can take, an int >= 2.
        scale: sigma: "learned" (one parameter for all dimensions), a positive number (fixed), None (the decoder returns
            the pair (mu, sigma)), or "default": learned, or what the system that uses it puts in its place.
        init_scale: where a learned sigma starts; 0.1 unless given.

    Raises:
        ValueError: `levels` is not an int >= 2, or a scale that is not positive and finite.

    Example:
        >>> likelihood = DiscretizedNormal(levels=256, scale=0.1)
        >>> x = torch.full((3, 8, 8), -1.0)
        >>> log_p = likelihood(torch.zeros(3, 8, 8), data_dim=2).log_prob(x)    # ten standard deviations, 64 times
        >>> log_p.shape, bool(log_p.isfinite().all())
        (torch.Size([3]), True)
    """

    scaling = "symmetric"
    is_discrete = True
    default_scale = "learned"

    def __init__(
        self, levels: int = 256, scale: float | str | None = "default", init_scale: float | None = None
    ) -> None:
        super().__init__(scale, init_scale)
        self.levels = _at_least_two("levels", levels)

    def forward(self, parameters: Parameters, data_dim: int) -> dist.TorchDistribution:
        """The discretised Normal in each dimension; see `Likelihood.forward`."""
        loc, scale = self._loc_and_scale(parameters, data_dim)
        return extra.DiscretizedNormal(loc, scale, self.levels).to_event(data_dim)

    def check(self, x: Tensor, name: str = "x") -> None:
        """Floats on the grid of `levels` values in [-1, 1]; see `Likelihood.check`."""
        expected = f"one of {self.levels} evenly spaced values in [-1, 1]"
        refuse_grey_levels(x, name, expected, f'scale 0..{self.levels - 1} to [-1, 1] (scaling "symmetric")')
        refuse_other_than_floats(x, name)
        in_unit = bool(((x >= 0) & (x <= 1)).all())
        remedy = (
            'values in [0, 1] need scaling "symmetric", 2x - 1'
            if in_unit
            else 'round to the grid with scaling "symmetric", or match levels to the data'
        )
        refuse_where(x, ~extra.Grid(self.levels).check(x), name, expected, remedy)

    def example(self, data_shape: Sequence[int], dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        """All at the lowest level, -1; see `Likelihood.example`."""
        return torch.full((1, *data_shape), -1.0, dtype=dtype, device=device)

    def config(self) -> dict[str, Any]:
        """See `Likelihood.config`."""
        return {"levels": self.levels} | super().config()


def _at_least_two(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise ValueError(f"expected {name} to be an int >= 2, got {value!r}")
    return value
