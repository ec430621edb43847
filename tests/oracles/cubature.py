"""Expectations under a reparameterised guide without chance: exact wherever the integrand is quadratic in its noises.

    E[f(e)] = 1/(2n) sum_i f(+-sqrt(n) u_i),    e ~ N(0, I_n),  u_i the unit vectors

is exact for polynomials of degree 3 (Stroud 1971, E_n^{r^2}, degree 3). The log-densities of a chain of Gaussians whose means
are affine and whose variances are fixed are of degree 2, so a bound and its gradient come out to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger


class Cubature(Messenger):
    """Within it, each site takes the value loc + scale * noise, for all 2n noises at once: particles at dim -2.

    Args:
        shapes: event shape of each site whose noise is to be integrated out.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        sizes = [int(torch.Size(shape).numel()) for shape in shapes.values()]
        n = sum(sizes)
        self.num_particles = 2 * n
        points = n**0.5 * torch.cat([torch.eye(n), -torch.eye(n)])
        parts = points.split(sizes, dim=-1)
        self.noise = {
            name: part.reshape(2 * n, 1, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.noise and not msg["is_observed"]:
            law = msg["fn"]
            msg["value"] = law.mean + law.stddev * self.noise[msg["name"]].to(law.mean.dtype)
