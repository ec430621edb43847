r"""The mass that a Normal puts on one bin of a grid, in logs, with its derivative in closed form.

In units of half a bin the bin around the integer n is (n - 1, n + 1), those at -top and top open outwards. Mirror it to lie
above the centre, and measure in sqrt(2) spreads: its edges are lo < hi, lo the nearer one, mid >= 0 is its middle, half the
half of its width, so that 1/half = sqrt(2) spread. With x = hi^2 - lo^2 = 4 mid half,

    2 P               = erfc(lo) - erfc(hi),                  erfc(hi) = 0 and e^-x = 0 for an open bin
    d log P/d centre  = +-(1 - e^-x) G,  G = half e^{-lo^2} / (sqrt(pi) P);  + for a bin above the centre
    d log P/d spread  = sqrt(2) [lo (1 - e^-x) - 2 half e^-x] G

Three forms of P, each without cancellation where it is used; erfcx(z) = e^{z^2} erfc(z):

    narrow (half <= 1/sqrt(8), x <= 2)    P = e^{-mid^2} (2 half/sqrt pi) R,  R = int_0^1 e^{-(half u)^2} cosh(x u/2) du
    tail (lo >= 0)                        P = e^{-lo^2} [erfcx(lo) - erfcx(hi) e^-x]/2
    central (lo < 0)                      P = 1 - e^{-lo^2} [erfcx(-lo) + erfcx(hi) e^-x]/2, above 0.3

R by quadrature. For a few data, kernels cost more the first time than arithmetic does: there are few different ones.

Constraint: no value decides the control flow in Python, so that all can be traced, vmapped and compiled; each branch of a
`torch.where` is fed harmless numbers where it is not taken, because 0 * inf in its backward pass is NaN.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

__all__ = ["log_bin_probability"]

_SQRT_2 = math.sqrt(2.0)
_1_OVER_SQRT_PI = 1.0 / math.sqrt(math.pi)


class _Rule(NamedTuple):
    """Gauss-Legendre on [-1, 1] for an even integrand, times 2/sqrt(pi): ``weight`` times the value at ``node``, summed."""

    centre: float  # the weight at zero, of a rule of odd length
    pairs: list[tuple[float, float]]

    @classmethod
    def of(cls, count: int) -> "_Rule":
        nodes, weights = np.polynomial.legendre.leggauss(count)
        above = slice((count + 1) // 2, None)
        weights = 2 * _1_OVER_SQRT_PI * weights
        centre = float(weights[count // 2] / 2) if count % 2 else 0.0
        return cls(centre, list(zip(nodes[above].tolist(), weights[above].tolist(), strict=True)))


# Relative errors over half <= 1/sqrt(8), x <= 2: 9e-10 with 5 points, 1e-15 with 8.
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
        with_spread = spread.requires_grad or unpack_dual(spread).tangent is not None
        log_p: Tensor = _LogBinProbability.apply(n, centre, spread, top, with_spread)[0]
        return log_p
    return _bin(n, centre, spread, top).log_p


class _LogBinProbability(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        n: Tensor, centre: Tensor, spread: Tensor, top: int, with_spread: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = _bin(n, centre, spread, top)
        by_centre = found.by_centre()
        return found.log_p, by_centre, found.by_spread() if with_spread else by_centre.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        n, centre, spread, ctx.top, _ = inputs
        _, by_centre, by_spread = output
        ctx.mark_non_differentiable(by_centre, by_spread)
        ctx.save_for_backward(n, centre, spread, by_centre, by_spread)
        ctx.save_for_forward(n, centre, spread, by_centre, by_spread)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        by_centre, by_spread = _slopes(ctx)
        _, with_centre, with_spread, *_ = ctx.needs_input_grad
        of_centre, of_spread = grad * by_centre if with_centre else None, grad * by_spread if with_spread else None
        return None, of_centre, of_spread, None, None

    @staticmethod
    def jvp(ctx: Any, _: None, of_centre: Tensor, of_spread: Tensor, *__: None) -> tuple[Tensor, None, None]:
        by_centre, by_spread = _slopes(ctx)
        return by_centre * of_centre + by_spread * of_spread, None, None


def _slopes(ctx: Any) -> tuple[Tensor, Tensor]:
    """The derivatives in centre and spread: those that came with the value, or, to be differentiated again, made anew."""
    n, centre, spread, by_centre, by_spread = ctx.saved_tensors
    if torch.is_grad_enabled() and (centre.requires_grad or spread.requires_grad):
        found = _bin(n, centre, spread, ctx.top)
        return found.by_centre(), found.by_spread()
    return by_centre, by_spread


class _Bin(NamedTuple):
    """What value and slopes are made of; all of the broadcast shape."""

    log_p: Tensor
    side: Tensor  # 1 for a bin above the centre, else -1
    lo: Tensor
    half: Tensor
    decay: Tensor  # e^-x
    minus_u: Tensor  # e^-x - 1
    minus_density: Tensor  # -G

    def by_centre(self) -> Tensor:
        """d log P/d centre."""
        return self.side * self.minus_u * self.minus_density

    def by_spread(self) -> Tensor:
        """d log P/d spread."""
        return (self.lo * self.minus_u + 2 * self.half * self.decay) * self.minus_density * _SQRT_2


def _bin(n: Tensor, centre: Tensor, spread: Tensor, top: int) -> _Bin:
    width, one = _SQRT_2 * spread, n.new_full((), 1.0)
    half, offset, is_closed = width.reciprocal(), n - centre, n * n < (top - 1) ** 2
    side = torch.where(torch.where(is_closed, offset, n) < 0, -one, one)
    per_half_bin = side * half
    lo, mid = (n - side - centre) * per_half_bin, offset * per_half_bin
    hi = torch.add(lo, half, alpha=2).clamp(min=0)  # below 0 in an open bin alone, which has none
    minus_x = torch.where(is_closed, -4 * half * mid, -torch.inf)
    decay, minus_u = torch.exp(minus_x), torch.expm1(minus_x)

    is_wide = torch.where(width < math.sqrt(8.0), -torch.inf, minus_x) < -2  # not narrow
    z = torch.where(is_wide, lo, 0.0)  # where it is 0, erfcx is fast
    minus_z, is_central = -z, z < 0

    a, b = half * half, -0.5 * minus_x.clamp(min=-2)  # b is that of a narrow bin, and harmless elsewhere
    rule = _GAUSS_LEGENDRE[a.dtype]
    ratio = a.new_full((), rule.centre)
    for node, weight in rule.pairs:
        ratio = torch.add(ratio, torch.exp(-(node**2) * a) * torch.cosh(node * b), alpha=weight)

    beyond = torch.special.erfcx(hi) * decay
    nearer = torch.special.erfcx(torch.where(is_central, minus_z, z))
    sides = 0.5 * (nearer + torch.where(is_central, beyond, -beyond))
    bell = torch.exp(torch.where(is_wide, z.clamp(max=0) * minus_z, b - a))
    outside = torch.where(is_central, bell * sides, 0.0)
    # P is `share` of e^{-mid^2} if narrow, of e^{-lo^2} in a tail, and 1 - `outside` if central, where `bell` is e^{-lo^2}.
    share = torch.where(is_wide, sides, half * ratio)
    mass = torch.where(is_central, one - outside, share)
    distance = torch.where(is_wide, lo, mid)
    log_p = torch.where(is_central, torch.log1p(-outside), torch.log(mass) - distance * distance)
    return _Bin(log_p, side, lo, half, decay, minus_u, -_1_OVER_SQRT_PI * bell * (width * mass).reciprocal())
