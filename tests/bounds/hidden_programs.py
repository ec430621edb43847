"""One bottom-up hierarchy whose dependence is hidden from any tagging of tensors: foreign code, control flow, assignment.

z_2 descends from z_1 in the guide and is z_1's parent in the model, so that z_1 must have no closed form, however the
guide's half z_1 / 2 comes about. Exact terms are those of :func:`tests.bounds.gaussian_programs.bottom_up_hvae`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats

from tests.bounds.awkward_programs import NORMAL
from tests.bounds.elbo_case import Case
from tests.oracles.expectations import expectation
from tests.oracles.linear_forms import entropy_of_normal, expected_log_normal, normal


def _hvae_through(name: str, foreign, fast: bool = False) -> Case:
    """The bottom-up hierarchy with its guide's second layer fed through foreign code that hides the dependence."""

    def model(x):
        z_2 = pyro.sample("z_2", dist.Normal(0.0, 1.0))
        z_1 = pyro.sample("z_1", dist.Normal(z_2, 1.0))
        pyro.sample("x", dist.Normal(z_1, 1.0), obs=x)

    def guide(x):
        z_1 = pyro.sample("z_1", dist.Normal(x / 2, 1.0))
        pyro.sample("z_2", dist.Normal(foreign(z_1), 1.0))

    z_1 = normal(0.5, 1.0)
    z_2 = normal(0.5 * z_1, 1.0)
    terms = {
        "z_2": expected_log_normal(z_2, 0.0, 1.0) + entropy_of_normal(1.0),
        "z_1": expected_log_normal(z_1, z_2, 1.0) + entropy_of_normal(1.0),
        "x": expected_log_normal(1.0, z_1, 1.0),
    }
    return Case(name, model, guide, terms, frozenset({"z_2"}), (torch.tensor(1.0),), fast)


def _half(z):
    return z * 0.5


def scripted(function):
    """TorchScript of a function; PyTorch deprecates it in words, and programs that use it go on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


def filled_in_place(value):
    """A scalar that has been written into a tensor by assignment."""
    tensor = torch.zeros(1)
    tensor[0] = value
    return tensor[0]


def through_numpy() -> Case:
    return _hvae_through("through NumPy", lambda z: torch.as_tensor(np.asarray(z.detach().numpy()) / 2), fast=True)


def through_item() -> Case:
    return _hvae_through("through .item()", lambda z: torch.tensor(z.item() / 2))


def through_script() -> Case:
    return _hvae_through("through torch.jit.script", scripted(_half), fast=True)


def through_dlpack() -> Case:
    return _hvae_through("through DLPack", lambda z: torch.from_dlpack(z.detach()) / 2, fast=True)


def through_assignment() -> Case:
    return _hvae_through("through an assignment in place", lambda z: filled_in_place(z / 2))


def through_branch() -> Case:
    """Descent through control flow alone: z_2's loc is one of two constants, chosen by z_1's sign."""
    case = _hvae_through("through a branch", lambda z: torch.tensor(1.0) if z > 0 else torch.tensor(-1.0))
    q, z_1 = stats.norm(0.5, 1.0), normal(0.5, 1.0)
    terms = {
        "z_2": expected_log_normal(normal(1.0, 1.0), 0.0, 1.0) + entropy_of_normal(1.0),  # z_2^2 does not see the sign
        "z_1": expectation(lambda u: NORMAL(u, math.copysign(1.0, u), 1.0) - 0.5, q, breaks=[0.0])
        + entropy_of_normal(1.0),
        "x": expected_log_normal(1.0, z_1, 1.0),
    }
    return replace(case, terms=terms)


PROGRAMS = (
    through_numpy,
    through_item,
    through_script,
    through_dlpack,
    through_assignment,
    through_branch,
)
