"""`decompose_elbo` before an independent jury: every term of programs whose ELBO is known exactly.

Each case runs once. Its numbers are held against exact ones, its closed forms against where they are valid, its sum
against Pyro's own estimator. Negative controls show that these checks would see an error, and how small a one.
"""

import math
from dataclasses import replace

import awkward_programs
import gaussian_programs
import handled_programs
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_case import FALSE_FAILURE, ROUNDING, discrepancies, quantile, smallest_visible_error
from oracles.linear_forms import entropy_of_normal, expected_log_normal, normal
from pyro import poutine
from pyro.infer import Trace_ELBO

from inference.bounds import Decomposition

CASES = [*gaussian_programs.CASES, *handled_programs.CASES, *awkward_programs.CASES]
KNOWN_FAULTS = {}


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    if request.param.name in KNOWN_FAULTS:
        request.applymarker(pytest.mark.xfail(strict=True, reason=KNOWN_FAULTS[request.param.name]))
    return request.param


def test_every_term_is_exact_within_its_error(case):
    d = case.run()
    assert discrepancies(d, case.terms) == []
    assert d.elbo.shape == case.elbo.shape
    assert set(d.sites) >= set(case.terms)
    for extra in set(d.sites) - set(case.terms):  # deterministic sites are listed, and are nothing
        assert not d[extra].monte_carlo.any()
    closed = {site for site in d if d[site].analytic is not None and d[site].kind in ("latent", "auxiliary")}
    assert closed == case.closed, {site: d[site].reason for site in d}
    assert all(d[site].reason for site in d)
    if case.fast:
        assert "vectorised; " in d.note, d.note
    else:
        assert "one at a time" in d.note, d.note


@pytest.mark.parametrize("case", [c for c in CASES if c.elbo.ndim <= 2], ids=lambda case: case.name)
def test_exact_elbo_is_what_trace_elbo_estimates(case):
    """The oracle itself is checked: Pyro's estimator, an independent implementation, has the oracle's expectation."""
    draws = 60
    with pytest.warns() if False else _quiet():
        losses = [-Trace_ELBO(num_particles=1).loss(case.model, case.guide, *case.args) for _ in range(draws)]
    error = np.std(losses, ddof=1) / math.sqrt(draws)
    assert abs(np.mean(losses) - case.elbo.sum()) <= quantile(1) * error + 1e-9
