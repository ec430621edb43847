r"""What Pyro lacks: a Normal seen through a quantiser; and a Bernoulli of logits whose density is two passes over memory.

A pixel takes one of ``levels`` values, spaced evenly on [-1, 1],

    v_k = -1 + 2k/(levels - 1),        k = 0..levels-1,

and its probability is the mass that N(loc, scale^2) puts on the bin of half-width h = 1/(levels - 1) around it,
the first bin open to -inf and the last to +inf, so that the bins sum to one:

    P(x = v_k) = Phi((v_k + h - loc)/scale) - Phi((v_k - h - loc)/scale).

Convention: everything is computed in units of half a bin. There v_k is the integer n = 2k - (levels - 1), the bin's
edges are n - 1 and n + 1, and the Normal has centre (levels - 1) loc and spread (levels - 1) scale. Neighbouring bins
then share the very same edge in floating point, without which they would not sum to one for a small scale in float32.
"""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions.utils import broadcast_all

from ppl_models.bin_probability import log_bin_probability

__all__ = ["Bernoulli", "DiscretizedNormal", "Grid"]


class Bernoulli(dist.Bernoulli):
    """Pyro's Bernoulli of logits l, with log p(x) = x l - softplus(l) evaluated in two passes over memory instead of four.

    The density of large images under many latents is bound by memory, and this is most of its time.

    Example:
        >>> Bernoulli(logits=torch.tensor([0.0, 100.0, -100.0])).log_prob(torch.tensor([1.0, 1.0, 1.0]))
        tensor([  -0.6931,    0.0000, -100.0000])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log P(x = value) in nats, of the broadcast shape.

        Raises:
            ValueError: with validation, a value other than 0 and 1.
        """
        if self._validate_args:
            self._validate_sample(value)
        # Above the threshold softplus returns l itself; what it leaves out there, e^-40, is below float64's resolution.
        return (value * self.logits).sub_(F.softplus(self.logits, threshold=40))


class Grid(constraints.Constraint):
    """The values v_k = -1 + 2k/(levels - 1), k = 0..levels-1, each to within 4 float32 ulps of one (4.8e-7).

    The tolerance is float32's in every dtype, because data are usually scaled in float32 before they are widened.

    Args:
        levels: number of values, >= 2.

    Example:
        >>> Grid(3).check(torch.tensor([-1.0, 0.0, 0.5, 2.0]))
        tensor([ True,  True, False, False])
    """

    is_discrete = True
    event_dim = 0
    tolerance = 4 * torch.finfo(torch.float32).eps

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each value is on the grid, a bool tensor of the shape of `value`; False for NaN."""
        nearest = _half_bins(value, self.levels) / (self.levels - 1)
        return ((value - nearest).abs() <= self.tolerance) & (nearest.abs() <= 1)

    def __repr__(self) -> str:
        return f"one of {self.levels} evenly spaced values in [-1, 1]"


class _Finite(constraints.Constraint):
    """Finite reals: unlike `constraints.real`, infinities are refused."""

    def check(self, value: Tensor) -> Tensor:
        return value.isfinite()

    def __repr__(self) -> str:
        return "finite real"


class _ScaleRange(constraints.Constraint):
    """Scales for which `log_prob` and its gradients stay finite in their dtype, see `DiscretizedNormal`."""

    largest = 1e12

    def smallest(self, dtype: torch.dtype) -> float:
        return 100 * torch.finfo(dtype).tiny ** (1 / 3)

    def check(self, value: Tensor) -> Tensor:
        return (value >= self.smallest(value.dtype)) & (value <= self.largest)

    def __repr__(self) -> str:
        low, high = self.smallest(torch.float32), self.smallest(torch.float64)
        return f"scale in [{low:.2g} (float32) or {high:.2g} (float64), {self.largest:.0e}]"


class DiscretizedNormal(TorchDistribution):
    r"""Normal(loc, scale) rounded to the nearest of ``levels`` values in [-1, 1], its tails going to the end values.

        P(x = v_k) = int_{delta_-(v_k)}^{delta_+(v_k)} N(y; loc, scale^2) dy,
        delta_+(v) = inf if v = 1 else v + h,    delta_-(v) = -inf if v = -1 else v - h,    h = 1/(levels - 1)

    Source: lecture notes 003, the discretised Gaussian decoder; Ho, Jain, Abbeel, *Denoising Diffusion Probabilistic
    Models*, 2020, arXiv:2006.11239, eq. 13 (both with levels = 256).

    `log_prob` and its gradients are what exact arithmetic gives for a `loc` and `scale` moved by a few units in their
    last place, however far in the tails. They are finite for every admissible scale as long as \|loc\| <= 1000: the
    gradient in scale grows like (x - loc)^2/scale^3, hence the lower bound 100 tiny^(1/3) on scale (2.3e-11 in float32,
    2.8e-101 in float64); above 1e12 the gradient could underflow to 0. Validation refuses what lies outside.

    Args:
        loc: mean mu of the Normal before rounding, finite, float32 or float64, any shape.
        scale: its standard deviation sigma, broadcastable to `loc`.
        levels: number of values, an int >= 2.
        validate_args: check parameters and data; Pyro's setting unless given. Without it, a value between two levels
            counts as the nearer one, and a value outside [-1, 1] has no meaning.

    Raises:
        ValueError: `levels` is not an int >= 2; with validation, also a parameter or a value outside its constraint.
        TypeError: a parameter is not float32 or float64.

    Example:
        >>> d = DiscretizedNormal(torch.tensor(0.2), torch.tensor(0.5), levels=3)
        >>> d.enumerate_support()
        tensor([-1.,  0.,  1.])
        >>> [round(p, 4) for p in d.probs.tolist()]
        [0.0808, 0.645, 0.2743]
        >>> round(d.log_prob(torch.tensor(1.0)).exp().item(), 4)    # all the mass above 1/2
        0.2743
    """

    arg_constraints = {"loc": _Finite(), "scale": _ScaleRange()}  # noqa: RUF012 (torch's own declaration)
    has_enumerate_support = True

    def __init__(
        self, loc: Tensor | float, scale: Tensor | float, levels: int, validate_args: bool | None = None
    ) -> None:
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
            raise ValueError(f"expected levels to be an int >= 2, got {levels!r}; 256 is usual for 8-bit images")
        self.loc, self.scale = broadcast_all(loc, scale)
        for name in ("loc", "scale"):
            dtype = getattr(self, name).dtype
            if dtype not in (torch.float32, torch.float64):
                raise TypeError(f"expected {name} in float32 or float64, got {dtype}; convert it with .float()")
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The grid of `levels` values in [-1, 1]."""
        return Grid(self.levels)

    def expand(self, batch_shape: Sequence[int], _instance: TorchDistribution | None = None) -> "DiscretizedNormal":
        """The same law with its parameters expanded, without a copy, to `batch_shape`."""
        new = self._get_checked_instance(DiscretizedNormal, _instance)
        new.loc = self.loc.expand(batch_shape)
        new.scale = self.scale.expand(batch_shape)
        new.levels = self.levels
        super(DiscretizedNormal, new).__init__(new.loc.shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log P(x = value).

        Args:
            value: grid values, shape broadcastable with the batch shape.

        Returns:
            Log-probabilities in nats, <= 0, of the broadcast shape.

        Raises:
            ValueError: with validation, a value that is not on the grid.
        """
        if self._validate_args:
            self._validate_sample(value)
        top = self.levels - 1
        return log_bin_probability(_half_bins(value, self.levels), top * self.loc, top * self.scale, top)

    @property
    def logits(self) -> Tensor:
        """Normalised log-probabilities of all values in ascending order, shape [*batch_shape, levels], in nats."""
        top = self.levels - 1
        n = torch.arange(-top, top + 1, 2, dtype=self.loc.dtype, device=self.loc.device)
        return log_bin_probability(n, top * self.loc.unsqueeze(-1), top * self.scale.unsqueeze(-1), top)

    @property
    def probs(self) -> Tensor:
        """Probabilities of all values in ascending order, shape [*batch_shape, levels]; they sum to one."""
        return self.logits.exp()

    @property
    def mean(self) -> Tensor:
        """E[x] = sum_k v_k P(v_k), shape batch_shape: inside [-1, 1], unlike `loc`."""
        return (self.probs * self._values()).sum(-1)

    @property
    def variance(self) -> Tensor:
        """Var[x] = sum_k (v_k - E[x])^2 P(v_k), shape batch_shape."""
        probs, values = self.probs, self._values()
        mean = (probs * values).sum(-1, keepdim=True)
        return (probs * (values - mean).square()).sum(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw y ~ Normal(loc, scale) and round it to the grid, beyond the ends to the end: exactly this law.

        Args:
            sample_shape: shape of the independent draws.

        Returns:
            Grid values, shape [*sample_shape, *batch_shape]; not reparameterised, no gradient.
        """
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            y = torch.normal(self.loc.expand(shape), self.scale.expand(shape))
            top = self.levels - 1
            return _half_bins(y.clamp(-1, 1), self.levels) / top

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All values in ascending order, shape [levels, *batch_shape], or [levels, 1, ..., 1] without `expand`."""
        values = self._values().reshape((-1,) + (1,) * len(self.batch_shape))
        return values.expand((-1, *self.batch_shape)) if expand else values

    def _values(self) -> Tensor:
        top = self.levels - 1
        return torch.arange(-top, top + 1, 2, dtype=self.loc.dtype, device=self.loc.device) / top


def _half_bins(x: Tensor, levels: int) -> Tensor:
    """The level nearest to x as an integer n = 2k - (levels - 1), its position in units of half a bin."""
    return 2 * torch.round((x + 1) * ((levels - 1) / 2)) - (levels - 1)
