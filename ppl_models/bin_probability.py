r"""The mass that a Normal puts on one bin of a grid, in logs, with its derivative in closed form.

In units of half a bin the bin around the integer n is (n - 1, n + 1), those at -top and top open outwards. Mirror it to lie
above the centre: its edges have z-scores lo < hi, lo the nearer one, m >= 0 is the z-score of its middle, d = 1/spread
half its width, and with Q(z) = 1 - Phi(z), phi the density, x = (hi^2 - lo^2)/2 = 2 m d,

    P                 = Q(lo) - Q(hi),                        Q(hi) = 0 and e^-x = 0 for an open bin
    d log P/d centre  = +-(1 - e^-x) A / spread,              A = phi(lo)/P; + for a bin above the centre
    d log P/d spread  = [m (1 - e^-x) - d (1 + e^-x)] A / spread,     or lo A / spread for an open bin.

Three forms of log P and A, each without cancellation where it is used; erfcx(z) = e^{z^2} erfc(z):

    narrow (2d <= 1, x <= 2)    P = 2 d phi(m) R,  R = int_0^1 exp(-(d u)^2/2) cosh(m d u) du by quadrature
    tail (lo > 0)               P = e^{-lo^2/2} [erfcx(lo/sqrt 2) - erfcx(hi/sqrt 2) e^-x]/2
    central (lo <= 0)           P = 1 - e^{-lo^2/2} [erfcx(-lo/sqrt 2) + erfcx(hi/sqrt 2) e^-x]/2, above 0.3

Constraint: no value decides the control flow in Python, so that all can be traced, vmapped and compiled; each branch of a
`torch.where` is fed harmless numbers where it is not taken, because 0 * inf in its backward pass is NaN.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["log_bin_probability"]

_SQRT_HALF = math.sqrt(0.5)
_SQRT_2PI = math.sqrt(2.0 * math.pi)


class _Rule(NamedTuple):
    """Gauss-Legendre on [-1, 1] for an even integrand, as a mean: sum of ``weight`` times the values at +-``node``."""

    centre: float  # the weight at zero, of a rule of odd length
    pairs: list[tuple[float, float]]

    @classmethod
    def of(cls, count: int) -> "_Rule":
        nodes, weights = np.polynomial.legendre.leggauss(count)
        half = weights / 2
        above = slice((count + 1) // 2, None)
        centre = float(half[count // 2]) if count % 2 else 0.0
        return cls(centre, list(zip(nodes[above].tolist(), half[above].tolist(), strict=True)))


# Relative errors over d <= 1/2, m d <= 1: 9e-10 with 5 points, 1e-15 with 8.
_GAUSS_LEGENDRE = {torch.float32: _Rule.of(5), torch.float64: _Rule.of(8)}


def log_bin_probability(n: Tensor, centre: Tensor, spread: Tensor, top: int) -> Tensor:
    """Log of the mass of N(centre, spread^2) in (n - 1, n + 1); the bins -top and top are open outwards.

    Args:
        n: integers -top, -top + 2, .., top, as floats.
        centre: in half bins.
        spread: in half bins, > 0.
        top: the number of levels less one.

    Returns:
        Nats, of the broadcast shape. Differentiable in centre and spread any number of times. The first derivative comes with
        the value, in closed form, so that a backward pass costs two products; the second has a relative error of up to z^2 eps
        at z standard deviations, where erfcx' cancels.

    Example:
        >>> centre = torch.tensor([0.2, 80.0]).requires_grad_()
        >>> log_p = log_bin_probability(torch.tensor([1.0, -255.0]), centre, torch.tensor(2.5), top=255)
        >>> [round(number, 2) for number in log_p.tolist()]
        [-1.22, -8930.29]
    """
    n, centre, spread = torch.broadcast_tensors(n, centre, spread)
    differentiated = torch.is_grad_enabled() and (centre.requires_grad or spread.requires_grad)
    if differentiated and not torch.compiler.is_dynamo_compiling():  # which differentiates by itself
        log_p: Tensor = _LogBinProbability.apply(n, centre, spread, top)[0]
        return log_p
    return _bin(n, centre, spread, top).log_p


class _LogBinProbability(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(n: Tensor, centre: Tensor, spread: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        found = _bin(n, centre, spread, top)
        return found.log_p, *found.slopes(spread)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        n, centre, spread, ctx.top = inputs
        _, by_centre, by_spread = output
        ctx.mark_non_differentiable(by_centre, by_spread)
        ctx.save_for_backward(n, centre, spread, by_centre, by_spread)
        ctx.save_for_forward(by_centre, by_spread)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        n, centre, spread, by_centre, by_spread = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            by_centre, by_spread = _bin(n, centre, spread, ctx.top).slopes(spread)
        _, with_centre, with_spread, _ = ctx.needs_input_grad
        return None, grad * by_centre if with_centre else None, grad * by_spread if with_spread else None, None

    @staticmethod
    def jvp(ctx: Any, _: None, of_centre: Tensor, of_spread: Tensor, *__: None) -> tuple[Tensor, None, None]:
        by_centre, by_spread = ctx.saved_tensors
        return by_centre * of_centre + by_spread * of_spread, None, None


class _Bin(NamedTuple):
    """What value and slopes are made of; all of the broadcast shape."""

    log_p: Tensor
    side: Tensor
    lo: Tensor
    d: Tensor
    u: Tensor  # 1 - e^-x
    density: Tensor  # A

    def slopes(self, spread: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives of log P in centre and spread."""
        scaled = self.density / spread
        return self.side * self.u * scaled, (self.lo * self.u - 2 * self.d * (1 - self.u)) * scaled


def _bin(n: Tensor, centre: Tensor, spread: Tensor, top: int) -> _Bin:
    below, above = (n - 1) - centre, centre - (n + 1)
    first, last = n <= -top, n >= top
    is_open, is_above = first | last, last | (~first & (below >= above))
    side = 2 * is_above.to(centre.dtype) - 1
    lo = torch.where(is_above, below, above) / spread
    # The same mask for both edges, so that derivatives are those of one side where the bin's middle is the centre.
    hi = (-torch.where(is_above, above, below)).clamp(min=0) / spread  # clamped in an open bin, which has none, alone
    m, d = (side * (n - centre)).clamp(min=0) / spread, 1 / spread  # m is not asked for in an open bin
    half_x = m * d
    u = torch.where(is_open, 1.0, -torch.expm1(-2 * half_x))

    narrow = ~is_open & (d <= 0.5) & (half_x <= 1)
    central = ~narrow & (lo <= 0)

    b, a = half_x.clamp(max=1), -0.5 * d.clamp(max=0.5).square()  # those of a narrow bin, and harmless elsewhere
    rule = _GAUSS_LEGENDRE[a.dtype]
    mean_ratio = torch.full_like(a, rule.centre)
    for node, weight in rule.pairs:
        z = a * node**2
        pair = torch.exp(torch.add(z, b, alpha=node)) + torch.exp(torch.sub(z, b, alpha=node))
        mean_ratio = torch.add(mean_ratio, pair, alpha=weight)

    nearer = torch.special.erfcx(_SQRT_HALF * torch.where(central, -lo, lo))
    beyond = torch.special.erfcx(_SQRT_HALF * hi) * (1 - u)  # hi >= 0: it cannot overflow
    bell = torch.exp(-0.5 * torch.where(central, lo, 0.0).square())
    outside = torch.where(central, 0.5 * bell * (nearer + beyond), 0.0)
    # P is `share` of sqrt(2 pi) phi(m) if narrow, of sqrt(2 pi) phi(lo) in a tail, and 1 - `outside` if central.
    share = torch.where(narrow, (2 / _SQRT_2PI) * d * mean_ratio, 0.5 * (nearer - beyond))
    share = torch.where(central, 1.0, share)
    log_p = torch.where(central, torch.log1p(-outside), torch.log(share) - 0.5 * torch.where(narrow, m, lo).square())
    density = torch.where(narrow, torch.exp(b + a), bell) / (_SQRT_2PI * (share - outside))
    return _Bin(log_p, side, lo, d, u, density)
