"""A program whose laws give no density to values outside their support.

    log p(z) = -infinity        where z is outside the support of p
    log p(x | z) = -infinity    where x is outside the support of p(. | z)

A guide may draw what the model excludes (a Normal guide for a positive latent), or a latent under which the data are
impossible (x ~ Pareto(z, 3) with z > x): the importance weight of such a draw is zero, and the estimate stays right. Laws
do not all say so themselves: with validation they raise an error, and without it some return a number (an Exponential at
a negative value). A transformed law that takes its density from its base has the support that its base leaves it: z +
Exponential(1) is none below z, although the transform says "real".

The one constraint: supports are given number by number, as intervals or sets of integers. Simplices and matrices, whose
checks depend on rounding, are left to the law itself; and so are data whose law was made with ``validate_args=False``
while validation is on otherwise, as for grey values under a Bernoulli law.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, TransformedDistribution

from inference.bounds.particles import forked_rng
from inference.bounds.sites import bare_law


class ZeroOutsideSupport(Messenger):
    """A handler for a program: each site's law becomes itself with density zero outside its support.

    Args:
        unchecked: observed sites to leave alone; those whose law opts out of validation are added when they are met.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro import poutine
        >>> def model():
        ...     return pyro.sample("z", dist.Exponential(1.0))
        >>> trace = poutine.trace(ZeroOutsideSupport()(model)).get_trace()
        >>> trace.nodes["z"]["fn"].log_prob(torch.tensor([-1.0, 2.0]))
        tensor([-inf, -2.])
    """

    def __init__(self, unchecked: Iterable[str] = ()) -> None:
        super().__init__()
        self.unchecked = set(unchecked)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg):
            return
        if msg["is_observed"] and opts_out(msg["fn"]):
            self.unchecked.add(msg["name"])  # for runs with validation off, where laws no longer tell
        if not (msg["is_observed"] and msg["name"] in self.unchecked):
            msg["fn"] = on_support(msg["fn"])


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
        return support_of(self.law)

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
        """The law's log-density; minus infinity outside the support. At NaN the law itself answers."""
        nan = _all_of_event(~value.isnan(), self.law.event_dim).logical_not()
        inside = in_support(self.law, value) | nan
        all_inside = detach_provenance(
            inside
        ).all()  # untagged: it saves a draw and changes no number that a program sees
        if bool(all_inside):
            return self.law.log_prob(value)
        with forked_rng():  # what is drawn afterwards must not depend on how often densities are asked for
            own_draw = self.law.sample()  # where the law's formula may be evaluated; its result there is replaced
        harmless = torch.where(inside[(..., *[None] * self.law.event_dim)], value, own_draw)
        return torch.where(inside, self.law.log_prob(harmless), -math.inf)


def on_support(law: Any) -> Any:
    """The law with density zero outside its support; wrappers and mixtures stay what they are, about such laws.

    Example:
        >>> shifted = dist.TransformedDistribution(dist.Exponential(1.0), dist.transforms.AffineTransform(2.0, 1.0))
        >>> on_support(shifted).log_prob(torch.tensor([1.0, 3.0]))
        tensor([-inf, -1.])
    """
    if not excludes_numbers(law):
        return law
    if isinstance(law, dist.MaskedDistribution):
        return dist.MaskedDistribution(on_support(law.base_dist), law._mask)
    if isinstance(law, Independent):
        return dist.Independent(on_support(law.base_dist), law.reinterpreted_batch_ndims)
    if isinstance(law, MixtureSameFamily):
        components = on_support(law.component_distribution)
        return dist.MixtureSameFamily(law.mixture_distribution, components, validate_args=False)
    return law if isinstance(law, OnSupport) else OnSupport(law)


def in_support(law: Any, value: Tensor) -> Tensor:
    """Whether values are in a law's support, of its batch shape or one that broadcasts to it; a base's support counts."""
    event_dim = len(law.event_shape)
    inside = _meets(_support(law), value, event_dim)
    if _density_by_base(law):
        for i, transform in enumerate(reversed(law.transforms)):
            if i > 0:  # the last one's codomain is the law's own support, or wider
                inside = inside & _meets(transform.codomain, value, event_dim)
            value = transform.inv(value)
            event_dim += transform.domain.event_dim - transform.codomain.event_dim
        inside = inside & _all_of_event(in_support(law.base_dist, value), event_dim - len(law.base_dist.event_shape))
    return inside


def opts_out(law: Any) -> bool:
    """Whether a law was made with ``validate_args=False`` while validation is on."""
    law = bare_law(law)
    return Distribution._validate_args and not getattr(law, "_validate_args", True) and not isinstance(law, OnSupport)


def excludes_numbers(law: Any) -> bool:
    """Whether the law's support is known, number by number, and is not all of the real numbers."""
    if isinstance(law, MixtureSameFamily):
        return excludes_numbers(law.component_distribution)
    if isinstance(law, (Independent, dist.MaskedDistribution)):
        return excludes_numbers(law.base_dist)
    if _narrows(_support(law)):
        return True
    inner = law.transforms[:-1] if _density_by_base(law) else []
    return any(_narrows(t.codomain) for t in inner) or (_density_by_base(law) and excludes_numbers(law.base_dist))


def _density_by_base(law: Any) -> bool:
    """Whether the density is the base's at the preimage; laws with a formula of their own (Gumbel) ask no base."""
    return (
        isinstance(law, TransformedDistribution)
        and bool(law.transforms)
        and type(law).log_prob is TransformedDistribution.log_prob
    )


def support_of(law: Any) -> Any:
    """The law's support as a constraint that has a map to R^n, where PyTorch's own does not say it.

    An angle lies in [-pi, pi], where its density integrates to one, though it goes on periodically and PyTorch says all real
    numbers; a mixture's support is that of its components.

    Raises:
        NotImplementedError, AttributeError: the law does not know its support.

    Example:
        >>> support_of(dist.VonMises(torch.zeros(3), 1.0)), support_of(dist.Gamma(1.0, 1.0))
        (Interval(lower_bound=-3.141592653589793, upper_bound=3.141592653589793), GreaterThanEq(lower_bound=0.0))
    """
    if isinstance(law, dist.MaskedDistribution):
        return support_of(law.base_dist)
    if isinstance(law, OnSupport):
        return support_of(law.law)
    if isinstance(law, Independent):
        base, dims = support_of(law.base_dist), law.reinterpreted_batch_ndims
        return constraints.independent(base, dims) if dims else base
    if isinstance(law, MixtureSameFamily):
        return support_of(law.component_distribution)
    if isinstance(law, torch.distributions.VonMises):
        return constraints.interval(-math.pi, math.pi)
    if isinstance(law, dist.SineBivariateVonMises | dist.SineSkewed):
        return constraints.independent(constraints.interval(-math.pi, math.pi), 1)
    return law.support


def _support(law: Any) -> Any:
    try:
        return support_of(law)
    except (AttributeError, NotImplementedError):
        return None


def _narrows(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is not None and support is not constraints.real and support.event_dim == 0


def _meets(support: Any, value: Tensor, event_dim: int) -> Tensor:
    """Whether events of ``event_dim`` dims meet a support, where that is given number by number."""
    if not _narrows(support):
        return value.new_ones(value.shape[: value.dim() - event_dim], dtype=torch.bool)
    return _all_of_event(support.check(value), event_dim - support.event_dim)


def _all_of_event(holds: Tensor, dims: int) -> Tensor:
    """Reduces the last ``dims`` dims."""
    return holds.flatten(holds.dim() - dims).all(-1) if dims else holds
