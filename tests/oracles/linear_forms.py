"""Linear-Gaussian programs by hand: every variable as an affine form of independent unit normals.

    u = c + sum_i a_i e_i,    e_i ~ N(0, 1)    =>    E[u] = c,    Var[u] = sum_i a_i^2

A guide that draws w ~ N(loc, s) with an affine loc adds one fresh noise: w = loc + s e_new. The expectation under the guide
of any Gaussian log-density with an affine value and an affine loc is then elementary:

    E[log N(u; loc, s)] = -1/2 log(2 pi s^2) - (E[u - loc]^2 + Var[u - loc]) / (2 s^2)

which is all that the terms of an ELBO are made of. Pure Python, so that it shares nothing with what it judges.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

_noises = itertools.count()


@dataclass(frozen=True)
class Form:
    """The affine form ``constant + sum(weight * noise)``."""

    constant: float
    weights: Mapping[int, float] = field(default_factory=dict)

    def __add__(self, other: Form | float) -> Form:
        other = as_form(other)
        keys = self.weights.keys() | other.weights.keys()
        weights = {k: self.weights.get(k, 0.0) + other.weights.get(k, 0.0) for k in keys}
        return Form(self.constant + other.constant, weights)

    __radd__ = __add__

    def __mul__(self, factor: float) -> Form:
        return Form(self.constant * factor, {k: w * factor for k, w in self.weights.items()})

    __rmul__ = __mul__

    def __sub__(self, other: Form | float) -> Form:
        return self + -1.0 * as_form(other)

    def __rsub__(self, other: float) -> Form:
        return as_form(other) - self

    @property
    def mean(self) -> float:
        return self.constant

    @property
    def variance(self) -> float:
        return sum(w * w for w in self.weights.values())


def as_form(value: Form | float) -> Form:
    return value if isinstance(value, Form) else Form(float(value))


def normal(loc: Form | float, scale: float) -> Form:
    """A fresh draw of N(loc, scale).

    >>> z = normal(1.0, 3.0); w = normal(2 * z, 1.0)
    >>> w.mean, w.variance
    (2.0, 37.0)
    """
    return loc + Form(0.0, {next(_noises): scale})


def expected_log_normal(value: Form | float, loc: Form | float, scale: float) -> float:
    """E[log N(value; loc, scale)] in nats.

    >>> round(expected_log_normal(normal(0.0, 1.0), 0.0, 1.0), 4)  # minus the entropy of a unit normal
    -1.4189
    """
    gap = as_form(value) - loc
    return -0.5 * math.log(2 * math.pi * scale**2) - (gap.mean**2 + gap.variance) / (2 * scale**2)


def entropy_of_normal(scale: float) -> float:
    """-E[log N(w; loc, scale)] of a draw w at its own loc, in nats.

    >>> round(entropy_of_normal(1.0), 4)
    1.4189
    """
    return 0.5 * math.log(2 * math.pi * math.e * scale**2)
