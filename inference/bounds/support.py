"""A model whose latent laws give no density to values outside their support.

    log p(z) = -infinity    where z is outside the support of p

A guide may draw what the model excludes (a Normal guide for a positive latent): the importance weight of such a draw is
zero, and the estimate stays right. Laws do not all say so themselves: with validation they raise an error, and without it
some return a number (an Exponential at a negative value). The one constraint: supports are given number by number, as intervals
or sets of integers. Simplices and matrices, whose checks depend on rounding, are left to the law itself.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor


class ZeroOutsideSupport(Messenger):
    """A handler for the model: each latent site's law becomes :class:`OnSupport` of it.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro import poutine
        >>> def model():
        ...     return pyro.sample("z", dist.Exponential(1.0))
        >>> trace = poutine.trace(ZeroOutsideSupport()(model)).get_trace()
        >>> trace.nodes["z"]["fn"].log_prob(torch.tensor([-1.0, 2.0]))
        tensor([-inf, -2.])
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg) and _excludes_numbers(msg["fn"]):
            msg["fn"] = OnSupport(msg["fn"])


class OnSupport(TorchDistribution):
    """A law as it is, with log-density minus infinity outside its support.

    Args:
        law: any law that knows its support.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, law: Any) -> None:
        self.law = law
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether the law's draws carry gradients."""
        return self.law.has_rsample

    @property
    def support(self) -> Any:
        """The law's support."""
        return self.law.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> OnSupport:
        """The law, expanded."""
        return OnSupport(self.law.expand(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """A draw of the law."""
        return self.law.sample(torch.Size(sample_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A draw of the law that carries gradients."""
        return self.law.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """The law's log-density; minus infinity outside the support."""
        inside = self.law.support.check(value)
        own_draw = self.law.sample()  # where the law's formula may be evaluated; its result there is replaced
        harmless = torch.where(inside[(..., *[None] * self.law.event_dim)], value, own_draw)
        return torch.where(inside, self.law.log_prob(harmless), -math.inf)


def _excludes_numbers(law: Any) -> bool:
    """Whether the law's support is known, number by number, and is not all of the real numbers."""
    try:
        support = law.support
    except (AttributeError, NotImplementedError):
        return False
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is not None and support is not constraints.real and support.event_dim == 0
