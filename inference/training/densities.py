r"""Toy densities in two dimensions, each with exact samples *and* an exact, normalised log density.

With $\log p(x)$ known, the total error of a fitted model splits into its modelling and its inference error. Every
density is a uniform mixture of components $k$, and every component is a bijection of independent variables with a known
Jacobian. Noise is therefore put where the Jacobian is simple: on the radius (in polar coordinates, Jacobian $1/\rho$),
not on x, of rings, moons and the roll. A normal radius can be negative, with negligible probability; the densities
count it all the same (a negative radius at angle t is a positive one at t + pi), so that they are exact.

The one constraint: sampler and log density of a name are written apart, never one from the other, so that a test can
hold them against each other.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Draw = tuple[np.ndarray, np.ndarray]  # points [N, 2] and the component of each [N]


class ToyDensity(NamedTuple):
    """A density on the plane: what it is, how to draw from it, and its exact log density."""

    formula: str
    draw: Callable[[int, np.random.Generator], Draw]
    log_density: Callable[[Tensor], Tensor]


def log_density(name: str, x: Tensor) -> Tensor:
    """The exact log density of a toy data set.

    Args:
        name: a key of `TOY_DENSITIES`.
        x: points, [..., 2].

    Returns:
        log p(x) in nats, [...]; minus infinity outside the support. At the centre of a polar density, where the
        Jacobian is singular, it is plus infinity.

    Raises:
        ValueError: an unknown name, or a last dimension other than 2.

    >>> round(log_density("checkerboard", torch.tensor([0.5, 0.5])).exp().item() * 32, 6)
    1.0
    """
    if name not in TOY_DENSITIES:
        raise ValueError(f"name: expected one of {', '.join(TOY_DENSITIES)}, got {name!r}; there are no others")
    if x.shape[-1:] != (2,):
        raise ValueError(f"x: expected points of shape [..., 2], got {list(x.shape)}; put the coordinates last")
    return TOY_DENSITIES[name].log_density(x)


def draw(name: str, num: int, rng: np.random.Generator) -> Draw:
    """Independent draws from a toy density.

    Args:
        name: a key of `TOY_DENSITIES`.
        num: N.
        rng: numpy's generator, the only source of randomness.

    Returns:
        Points [N, 2] in float64, and for each the component it came from [N], int64.

    >>> points, component = draw("rings", 5, np.random.default_rng(0))
    >>> points.shape, component.shape
    ((5, 2), (5,))
    """
    return TOY_DENSITIES[name].draw(num, rng)


def _normal(x: Tensor, loc: float | Tensor, scale: float) -> Tensor:
    return -0.5 * ((x - loc) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))


def _polar(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


_GAUSSIANS, _GAUSSIAN_RADIUS, _GAUSSIAN_SCALE = 8, 2.0, 0.2


def _draw_eight_gaussians(num: int, rng: np.random.Generator) -> Draw:
    k = rng.integers(_GAUSSIANS, size=num)
    centre = _polar(np.full(num, _GAUSSIAN_RADIUS), 2 * np.pi * k / _GAUSSIANS)
    return centre + _GAUSSIAN_SCALE * rng.standard_normal((num, 2)), k


def _log_eight_gaussians(x: Tensor) -> Tensor:
    angle = 2 * math.pi * torch.arange(_GAUSSIANS, dtype=x.dtype, device=x.device) / _GAUSSIANS
    centre = _GAUSSIAN_RADIUS * torch.stack([angle.cos(), angle.sin()], dim=-1)
    return _normal(x.unsqueeze(-2), centre, _GAUSSIAN_SCALE).sum(-1).logsumexp(-1) - math.log(_GAUSSIANS)


def _draw_checkerboard(num: int, rng: np.random.Generator) -> Draw:
    k = rng.integers(8, size=num)
    column = k // 2
    row = 2 * (k % 2) + column % 2  # squares of one colour: column + row even
    return 2.0 * (np.stack([column, row], axis=-1) - 2 + rng.random((num, 2))), k


def _log_checkerboard(x: Tensor) -> Tensor:
    on_board = ((x >= -4) & (x < 4)).all(-1)
    black = (x / 2).floor().sum(-1) % 2 == 0
    outside = torch.full_like(x[..., 0], -torch.inf)
    return torch.where(on_board & black, -math.log(32.0), outside)


_RING_RADII, _RING_SCALE = (1.0, 2.0, 3.0), 0.1


def _draw_rings(num: int, rng: np.random.Generator) -> Draw:
    k = rng.integers(len(_RING_RADII), size=num)
    radius = np.asarray(_RING_RADII)[k] + _RING_SCALE * rng.standard_normal(num)
    return _polar(radius, 2 * np.pi * rng.random(num)), k


def _log_rings(x: Tensor) -> Tensor:
    rho = x.norm(dim=-1)
    terms = [_normal(sign * rho, radius, _RING_SCALE) for radius in _RING_RADII for sign in (1, -1)]
    return torch.stack(terms).logsumexp(0) - math.log(len(_RING_RADII)) - (2 * math.pi * rho).log()


_MOON_SCALE, _LOWER_CENTRE = 0.1, (1.0, 0.5)


def _draw_two_moons(num: int, rng: np.random.Generator) -> Draw:
    k = rng.integers(2, size=num)
    radius = 1 + _MOON_SCALE * rng.standard_normal(num)
    return _polar(radius, np.pi * (rng.random(num) + k)) + k[:, None] * np.asarray(_LOWER_CENTRE), k


def _log_two_moons(x: Tensor) -> Tensor:
    def moon(x: Tensor, upper: bool) -> Tensor:
        rho = x.norm(dim=-1)
        sign = torch.where((x[..., 1] >= 0) == upper, 1.0, -1.0).to(
            x
        )  # a negative radius lands in the other half plane
        return _normal(sign * rho, 1.0, _MOON_SCALE) - (math.pi * rho).log()

    lower = x - torch.tensor(_LOWER_CENTRE, dtype=x.dtype, device=x.device)
    return torch.logaddexp(moon(x, upper=True), moon(lower, upper=False)) - math.log(2)


_BLADES, _BLADE_RADIAL, _BLADE_TANGENTIAL, _BLADE_TWIST, _BLADE_SIZE = 5, 0.3, 0.1, 0.25, 2.0


def _draw_pinwheel(num: int, rng: np.random.Generator) -> Draw:
    k = rng.integers(_BLADES, size=num)
    blade = np.array([1.0, 0.0]) + rng.standard_normal((num, 2)) * np.array([_BLADE_RADIAL, _BLADE_TANGENTIAL])
    turn = 2 * np.pi * k / _BLADES + _BLADE_TWIST * np.exp(np.linalg.norm(blade, axis=-1))
    cos, sin = np.cos(turn), np.sin(turn)
    turned = np.stack([cos * blade[:, 0] - sin * blade[:, 1], sin * blade[:, 0] + cos * blade[:, 1]], axis=-1)
    return _BLADE_SIZE * turned, k


def _log_pinwheel(x: Tensor) -> Tensor:
    # A rotation by an angle that depends on the radius alone keeps the radius, and its Jacobian is 1.
    y = x / _BLADE_SIZE
    k = torch.arange(_BLADES, dtype=x.dtype, device=x.device)
    turn = 2 * math.pi * k / _BLADES + _BLADE_TWIST * y.norm(dim=-1, keepdim=True).exp()
    along = turn.cos() * y[..., :1] + turn.sin() * y[..., 1:]
    across = turn.cos() * y[..., 1:] - turn.sin() * y[..., :1]
    blades = _normal(along, 1.0, _BLADE_RADIAL) + _normal(across, 0.0, _BLADE_TANGENTIAL)
    return blades.logsumexp(-1) - math.log(_BLADES) - 2 * math.log(_BLADE_SIZE)


_ROLL_START, _ROLL_END, _ROLL_SCALE, _ROLL_SHRINK = 1.5 * math.pi, 4.5 * math.pi, 0.5, 5.0


def _draw_swiss_roll(num: int, rng: np.random.Generator) -> Draw:
    t = _ROLL_START + (_ROLL_END - _ROLL_START) * rng.random(num)
    turn = ((t - _ROLL_START) // (2 * np.pi)).astype(np.int64)
    return _polar(t + _ROLL_SCALE * rng.standard_normal(num), t) / _ROLL_SHRINK, turn


def _log_swiss_roll(x: Tensor) -> Tensor:
    y = _ROLL_SHRINK * x
    rho, phi = y.norm(dim=-1), torch.atan2(y[..., 1], y[..., 0])
    terms = []
    for half_turns in range(7):  # every angle t in [start, end] of the line through y, with radius rho or -rho
        t = phi + math.pi * half_turns
        inside = (t >= _ROLL_START) & (t < _ROLL_END)
        terms.append(torch.where(inside, _normal((-1) ** half_turns * rho, t, _ROLL_SCALE), -torch.inf))
    jacobian = 2 * math.log(_ROLL_SHRINK) - rho.log()
    return torch.stack(terms).logsumexp(0) - math.log(_ROLL_END - _ROLL_START) + jacobian


TOY_DENSITIES = {
    "two_moons": ToyDensity(
        "half circles r (cos t, sin t), r ~ N(1, 0.1^2): t ~ U(0, pi) about (0, 0), t ~ U(pi, 2 pi) about (1, 0.5)",
        _draw_two_moons,
        _log_two_moons,
    ),
    "rings": ToyDensity(
        "three circles r (cos t, sin t), r ~ N(k, 0.1^2), k = 1, 2, 3, t ~ U(0, 2 pi)", _draw_rings, _log_rings
    ),
    "pinwheel": ToyDensity(
        "five blades 2 R(2 pi k / 5 + exp(|f|) / 4) f, f ~ N((1, 0), diag(0.3^2, 0.1^2)), R a rotation",
        _draw_pinwheel,
        _log_pinwheel,
    ),
    "checkerboard": ToyDensity(
        "uniform on the eight squares of side 2 in [-4, 4)^2 with floor(x_1 / 2) + floor(x_2 / 2) even",
        _draw_checkerboard,
        _log_checkerboard,
    ),
    "eight_gaussians": ToyDensity(
        "N(c_k, 0.2^2 I), c_k = 2 (cos, sin)(2 pi k / 8), k = 0..7", _draw_eight_gaussians, _log_eight_gaussians
    ),
    "swiss_roll": ToyDensity(
        "spiral r (cos t, sin t) / 5, t ~ U(1.5 pi, 4.5 pi), r ~ N(t, 0.5^2)", _draw_swiss_roll, _log_swiss_roll
    ),
}
