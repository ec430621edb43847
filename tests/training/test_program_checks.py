"""Parameters that live in Pyro's store alone are refused before the first step; all others are trained. So are unnamed latents.

Scales and subsampled plates, which `fit` refuses, are in tests/bounds/test_whole_densities.py.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import nn

from inference import PairError, fit
from ppl_models.pair import ModelGuidePair


class Width(PyroModule):
    """A positive number by PyroParam."""

    def __init__(self):
        super().__init__()
        self.value = PyroParam(torch.tensor(0.1), constraints.positive)


class Held(ModelGuidePair):
    """q(z | x) = N(a x, 0.7); a is held in one of several ways, and its optimum is 1/2."""

    def __init__(self, how):
        super().__init__((), ("z",))
        self.how, self.loc = how, nn.Parameter(torch.tensor(0.0))
        self.a, self.width, self.linear = nn.Parameter(torch.tensor(0.1)), Width(), nn.Linear(1, 1, bias=False)

    def slope(self, x):
        match self.how:
            case "store":
                return pyro.param("slope", torch.tensor(0.1))
            case "batch":
                return pyro.param("slopes", torch.zeros(len(x)))
            case "parameter":
                return self.a
            case "pyro parameter":
                return self.width.value
        pyro.module("linear", self.linear)
        return self.linear.weight[0, 0]

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        slope = self.slope(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.7))


@pytest.mark.parametrize(("how", "name"), [("store", "slope"), ("batch", "slopes")])
def test_a_parameter_of_the_store_alone_is_refused(how, name):
    with pytest.raises(PairError, match=rf"got pyro.param\('{name}'\) in the guide, .* make it an nn.Parameter"):
        fit(Held(how), torch.randn(50), epochs=1, progress=False)
    assert list(pyro.get_param_store()) == []


@pytest.mark.parametrize("how", ["parameter", "pyro parameter", "module"])
def test_parameters_that_the_pair_holds_are_trained(how):
    pair, x = Held(how), torch.randn(200) * 2**0.5
    before = float(pair.slope(x).detach())
    fit(pair, x, epochs=60, learning_rate=0.05, batch_size=200, progress=False)
    after = float(pair.slope(x).detach())
    assert abs(after - 0.5) < 0.1 < abs(before - 0.5)


class TwoLayers(ModelGuidePair):
    """z_2 -> z_1 -> x, whose latent sites are named as told."""

    def __init__(self, latent_sites):
        super().__init__((), latent_sites)
        self.loc = nn.Parameter(torch.tensor(0.0))

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            top = pyro.sample("z_2", dist.Normal(self.loc, 1.0))
            low = pyro.deterministic("twice", 2 * pyro.sample("z_1", dist.Normal(top, 1.0)))
            return pyro.sample("x", dist.Normal(low, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z_2", dist.Normal(pyro.sample("z_1", dist.Normal(x / 2, 0.5)), 0.7))


@pytest.mark.parametrize("sites", [("z_2",), (), ("zz",), ("z_2", "z_1", "w"), ("z_2", "x")])
def test_latent_sites_that_are_not_the_models_are_refused(sites):
    named = ", ".join(map(repr, sorted(sites))) or "none"
    with pytest.raises(PairError, match=rf"the model's latent sites, 'z_1', 'z_2', got {named}: name them all"):
        fit(TwoLayers(sites), torch.randn(20), epochs=1, progress=False)


def test_latent_sites_that_are_the_models_are_trained():
    run = fit(TwoLayers(("z_2", "z_1")), torch.randn(20), epochs=1, progress=False)
    assert run.metrics[0]["train_rate"] > 0


def test_one_name_is_no_tuple_of_names():
    with pytest.raises(TypeError, match=r"latent_sites as a tuple of names, got 'top': use \('top',\)"):
        TwoLayers("top")
