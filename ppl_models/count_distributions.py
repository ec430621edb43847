r"""Laws of things counted, n = 0, 1, 2, ..., in logs that keep their digits: Poisson and negative binomial of a log mean l.

    Poisson              log p(n) = n l - e^l - log n!
    negative binomial    log p(n) = log Gamma(n + r) - log Gamma(r) - log n! + r log(r/(r + e^l)) + n log(e^l/(r + e^l))

Written so, float32 has no correct digit left at n = 1e6: terms of 1e7 cancel. Loader 2000 (*Fast and accurate computation of
binomial probabilities*) writes both by Stirling errors s and deviances D >= 0, none of which is larger than the result,

    Poisson              log p(n) = -s(n) - n D(d) - log(2 pi n)/2,                                   d = l - log n
    negative binomial    log p(n) = s(n + r) - s(r) - s(n) - r (u - log(1 + u)) - n D(d) - log(1 + n/r)/2 - log(2 pi n)/2,
                         u = (n - e^l)/(r + e^l),   d = l - log n + log(1 + u)

for n > 0, with D(d) = e^d - 1 - d and s(n) = log Gamma(n + 1) - (n + 1/2) log n + n - log(2 pi)/2; at n = 0, -e^l and
r log(r/(r + e^l)).

The one constraint: each branch of a `torch.where` is fed harmless numbers where it is not taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions.utils import broadcast_all

__all__ = ["NegativeBinomial", "Poisson"]

_LOG_2_PI = math.log(2 * math.pi)
_SERIES_FROM = 16.0  # where the series of s has an error below float64's resolution of log p


class Poisson(TorchDistribution):
    """Poisson of a log mean: E[n] = Var[n] = e^l.

    Args:
        log_mean: l, any shape.
        validate_args: check data; Pyro's setting unless given.

    Raises:
        ValueError: with validation, a value that is no whole number >= 0, or a log mean that is not real.

    Example:
        >>> law = Poisson(torch.tensor(2.0).log())
        >>> [round(p, 4) for p in law.log_prob(torch.arange(4.0)).exp().tolist()]
        [0.1353, 0.2707, 0.2707, 0.1804]
    """

    arg_constraints = {"log_mean": constraints.real}  # noqa: RUF012 (torch's own declaration)
    support = constraints.nonnegative_integer

    def __init__(self, log_mean: Tensor, validate_args: bool | None = None) -> None:
        self.log_mean = log_mean
        super().__init__(log_mean.shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: TorchDistribution | None = None) -> Poisson:
        """The same law with its parameter expanded, without a copy, to `batch_shape`."""
        new = self._get_checked_instance(Poisson, _instance)
        new.log_mean = self.log_mean.expand(batch_shape)
        super(Poisson, new).__init__(new.log_mean.shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """e^l, shape batch_shape."""
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        """e^l, shape batch_shape."""
        return self.mean

    def log_prob(self, value: Tensor) -> Tensor:
        """Log P(n = value) in nats, of the broadcast shape.

        Raises:
            ValueError: with validation, a value that is no whole number >= 0.
        """
        if self._validate_args:
            self._validate_sample(value)
        n = value.clamp(min=1)
        some = -_stirling_error(n) - n * _deviance(self.log_mean - n.log()) - 0.5 * (_LOG_2_PI + n.log())
        return torch.where(value == 0, -self.log_mean.exp(), some)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, ``[*sample_shape, *batch_shape]``, as floating point numbers; no gradient."""
        with torch.no_grad():
            return torch.poisson(self.mean.expand(self._extended_shape(torch.Size(sample_shape))))


class NegativeBinomial(TorchDistribution):
    """Negative binomial of a log mean l and a size r: E[n] = mu = e^l, Var[n] = mu + mu^2/r; Poisson as r grows.

    A Poisson whose mean is a Gamma with mean mu and shape r.

    Args:
        log_mean: l, any shape.
        size: r > 0, broadcastable to `log_mean`.
        validate_args: check parameters and data; Pyro's setting unless given.

    Raises:
        ValueError: with validation, a value that is no whole number >= 0, a log mean that is not real, or a size <= 0.

    Example:
        >>> law = NegativeBinomial(torch.tensor(2.0).log(), torch.tensor(1.0))    # geometric
        >>> [round(p, 4) for p in law.log_prob(torch.arange(4.0)).exp().tolist()]
        [0.3333, 0.2222, 0.1481, 0.0988]
    """

    arg_constraints = {"log_mean": constraints.real, "size": constraints.positive}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(self, log_mean: Tensor, size: Tensor, validate_args: bool | None = None) -> None:
        self.log_mean, self.size = broadcast_all(log_mean, size)
        super().__init__(self.log_mean.shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: TorchDistribution | None = None) -> NegativeBinomial:
        """The same law with its parameters expanded, without a copy, to `batch_shape`."""
        new = self._get_checked_instance(NegativeBinomial, _instance)
        new.log_mean, new.size = self.log_mean.expand(batch_shape), self.size.expand(batch_shape)
        super(NegativeBinomial, new).__init__(new.log_mean.shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """e^l, shape batch_shape."""
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        """mu + mu^2/r, shape batch_shape."""
        return self.mean * (1 + self.mean / self.size)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log P(n = value) in nats, of the broadcast shape; finite for every finite l.

        Raises:
            ValueError: with validation, a value that is no whole number >= 0.
        """
        if self._validate_args:
            self._validate_sample(value)
        log_odds, r = self.log_mean - self.size.log(), self.size
        log_rest = F.logsigmoid(-log_odds)  # log r/(r + mu)
        n = value.clamp(min=1)
        u = n / r * log_rest.exp() - log_odds.sigmoid()
        # far below the mean u is -1 but for what rounding takes away
        log_1_u = torch.where(u > -0.5, u.clamp(min=-0.5).log1p(), log_rest + (n / r).log1p())
        some = (
            _stirling_error(n + r)
            - _stirling_error(r)
            - _stirling_error(n)
            - r * (u - log_1_u)
            - n * _deviance(self.log_mean - n.log() + log_1_u)
            - 0.5 * ((n / r).log1p() + _LOG_2_PI + n.log())
        )
        return torch.where(value == 0, r * log_rest, some)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, ``[*sample_shape, *batch_shape]``, as floating point numbers; no gradient."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            r = self.size.expand(shape)
            return torch.poisson(torch._standard_gamma(r) / r * self.mean)


def _stirling_error(n: Tensor) -> Tensor:
    """s(n) = log Gamma(n + 1) - (n + 1/2) log n + n - log(2 pi)/2, n > 0."""
    large, small = n.clamp(min=_SERIES_FROM), n.clamp(max=_SERIES_FROM)
    square = large.square()
    terms = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)
    series = torch.zeros_like(large)
    for term in reversed(terms):
        series = series / square + term
    direct = torch.lgamma(small + 1) - (small + 0.5) * small.log() + small - 0.5 * _LOG_2_PI
    return torch.where(n > _SERIES_FROM, series / large, direct)


def _deviance(d: Tensor) -> Tensor:
    """D(d) = e^d - 1 - d."""
    return torch.expm1(d) - d
