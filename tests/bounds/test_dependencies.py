"""Parents found by tagging: Pyro's own where it looks, and more where it does not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.inspect import get_dependencies

from inference.bounds.dependencies import descendants, parents


def chain():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(a, 1.0))
    pyro.sample("c", dist.Normal(b, 1.0), obs=torch.tensor(0.0))


def collider():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(a, b))
        pyro.sample("x", dist.Normal(z, b), obs=torch.zeros(3))


@pytest.mark.parametrize("program", [chain, collider])
def test_parents_are_those_of_get_dependencies(program):
    expected = {site: set(above) - {site} for site, above in get_dependencies(program)["prior_dependencies"].items()}
    assert {site: set(above) for site, above in parents(program, (), {}).items()} == expected


def through_delta():
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Delta(2 * w))


def test_a_delta_site_is_seen_where_get_dependencies_elides_it():
    assert "z" not in get_dependencies(through_delta)["prior_dependencies"]
    assert parents(through_delta, (), {})["z"] == {"w"}
    assert descendants("w", parents(through_delta, (), {})) == {"z"}
