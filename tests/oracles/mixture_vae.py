"""The bound of a mixture with a class y and a number z by hand: sums over y, integrals over z by closed form or Gauss-Hermite.

    p(y) = softmax(a)_y      p(z | y) = N(z; m_y, exp(s_y)^2)      p(x | z) = prod_d N(x_d; w_d z + b_d, 1)

with one of two guides, x-bar the sum of the data's numbers:

    class first     q(y | x) = softmax(c + d x-bar)_y        q(z | x, y) = N(z; e_y + f_y x-bar, exp(t_y)^2)
    number first    q(z | x) = N(z; e_0 + f_0 x-bar, exp(t_0)^2)          q(y | z) = softmax(c + d z)_y

``v`` is a dict of these vectors. Terms of one datum, nats, by site. Nothing imported of what is judged.
"""

import math

import numpy as np
import torch
from torch import Tensor

NODES, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(80))
WEIGHTS = WEIGHTS / math.sqrt(2 * math.pi)


def class_first(v: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Terms of y, z and x under q(y | x) q(z | x, y)."""
    q = (v["c"] + v["d"] * x.sum()).softmax(-1)
    mean, sd = v["e"] + v["f"] * x.sum(), v["t"].exp()
    prior_sd = v["s"].exp()
    kl = (prior_sd / sd).log() + (sd**2 + (mean - v["m"]) ** 2) / (2 * prior_sd**2) - 0.5
    log_x = sum(
        -0.5 * math.log(2 * math.pi) - 0.5 * ((x[d] - v["w"][d] * mean - v["b"][d]) ** 2 + (v["w"][d] * sd) ** 2)
        for d in range(len(x))
    )
    return {"y": (q * (v["a"].log_softmax(-1) - q.log())).sum(), "z": -(q * kl).sum(), "x": (q * log_x).sum()}


def number_first(v: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Terms of y, z and x under q(z | x) q(y | z)."""
    mean, sd, prior_sd = v["e"][0] + v["f"][0] * x.sum(), v["t"][0].exp(), v["s"].exp()
    z = mean + sd * NODES.to(x)
    q = (v["c"] + v["d"] * z[:, None]).softmax(-1)  # [nodes, K]
    log_prior = -0.5 * ((z[:, None] - v["m"]) / prior_sd) ** 2 - prior_sd.log() - 0.5 * math.log(2 * math.pi)
    log_x = -0.5 * ((x - v["w"] * z[:, None] - v["b"]) ** 2).sum(-1) - 0.5 * len(x) * math.log(2 * math.pi)
    w = WEIGHTS.to(x)
    entropy = sd.log() + 0.5 * math.log(2 * math.pi * math.e)
    return {
        "y": (w[:, None] * q * (v["a"].log_softmax(-1) - q.log())).sum(),
        "z": (w[:, None] * q * log_prior).sum() + entropy,
        "x": (w * log_x).sum(),
    }
