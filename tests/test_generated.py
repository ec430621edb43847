"""Generated data are the value of the data site, whatever the program returns."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from inference import ancestral_sample, simulation_based_calibration
from inference.bounds.bidirectional import bidirectional_evidence
from inference.generated import generate
from ppl_models import ModelGuidePair


class Returns(ModelGuidePair):
    """z ~ N(0, 1), x | z ~ N(z, 1) with its exact posterior; the model returns what it is told to."""

    def __init__(self, what):
        super().__init__((), ("z",))
        self.what = what
        self.shift = nn.Parameter(torch.tensor(0.0))

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            loc = pyro.sample("z", dist.Normal(0.0, 1.0)) + self.shift
            x = pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
            return {"mean": loc, "nothing": None, "data": x}[self.what]

    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)):
            return pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


@pytest.mark.parametrize("what", ["mean", "nothing", "data"])
def test_tools_read_the_data_site(what):
    torch.manual_seed(0)
    pair = Returns(what)
    trace, x = generate(pair, 4)
    assert x is trace.nodes["x"]["value"]
    drawn = ancestral_sample(pair, 20_000, seed=0)
    assert abs(float(drawn.var()) - 2) < 6 * 2 * (2 / 20_000) ** 0.5  # the mean alone has 1
    calibration = simulation_based_calibration(pair, num_simulations=400, num_draws=19, num_bins=20)
    assert calibration.chi_square.max() < 63.7  # chi-square(19) at 1e-6; with the mean for data it is in the hundreds
    both = bidirectional_evidence(pair, 5, num_temperatures=4, num_leapfrog=2, seed=0)
    torch.testing.assert_close(both.x, generate_again(pair), rtol=0, atol=0)


def generate_again(pair):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return generate(pair, 5)[1]


def test_a_model_with_two_data_sites_is_refused():
    class Two(Returns):
        def model(self, x=None, size=None):
            super().model(x, size)
            return pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="expected one data site in the model beside the latent sites z, got x, y"):
        generate(Two("data"), 3)
