"""What annealing refuses: options out of range, and programs whose latents it cannot move; each error names the site."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from inference.bounds.annealing import annealed_evidence
from inference.bounds.bidirectional import bidirectional_evidence
from inference.bounds.importance import EvidenceError
from inference.bounds.sites import NotANumberError, PairError
from ppl_models import LinearGaussian

SHORT = {"num_temperatures": 6, "num_leapfrog": 3}


def normal_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def normal_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 1.0))


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"num_chains": 0}, "expected num_chains >= 1, got 0"),
            ({"num_temperatures": 0}, "expected num_temperatures >= 1, got 0"),
            ({"num_leapfrog": 0}, "expected num_leapfrog >= 1, got 0"),
            ({"schedule": "cosine"}, "expected schedule 'linear' or 'sigmoid', got 'cosine'"),
            ({"start": "posterior"}, "expected start 'guide' or 'prior', got 'posterior'"),
            ({"jitter": 1.0}, r"expected jitter in \[0, 1\), got 1.0"),
        ],
    )
    def test_options(self, options, match):
        with pytest.raises(ValueError, match=match):
            annealed_evidence(normal_model, normal_guide, torch.zeros(2), **options)

    def test_no_data_to_simulate(self):
        pair = LinearGaussian.random(3, 2)
        with pytest.raises(ValueError, match="expected num_data >= 1, got 0"):
            bidirectional_evidence(pair, 0)

    def refused(self, match, model=normal_model, guide=normal_guide, x=None, error=PairError, **options):
        with pytest.raises(error, match=match):
            annealed_evidence(model, guide, torch.zeros(3) if x is None else x, **{**SHORT, **options})

    def test_no_data_plate(self):
        def model(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

        self.refused(
            "expected a plate that every site is in, .* everything under pyro.plate",
            model,
            lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)),
        )

    def test_discrete_latents(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                k = pyro.sample("k", dist.Bernoulli(0.5))
                pyro.sample("x", dist.Normal(z + k, 0.5), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.5 * x, 1.0))
                pyro.sample("k", dist.Bernoulli(0.5))

        self.refused("got a discrete law at site 'k'", model, guide)

    def test_a_subsampling_plate(self):
        def model(x):
            with pyro.plate("data", 3, subsample_size=2) as index:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

        def guide(x):
            with pyro.plate("data", 3, subsample_size=2):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        self.refused("got 2 of 3 in plate 'data'", model, guide)

    @pytest.mark.parametrize(
        "handler", [poutine.scale(scale=2.0), poutine.mask(mask=torch.tensor([True, True, False]))]
    )
    def test_scaled_or_masked_latents(self, handler):
        self.refused("got a scale or mask at site 'z'", handler(normal_model), handler(normal_guide))

    def test_a_guide_without_a_density(self):
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(x))

        self.refused("got site 'z' as a function of others: use start='prior'", guide=guide)
        ais = annealed_evidence(normal_model, guide, torch.zeros(3), start="prior", **SHORT)
        assert bool(ais.log_lower.isfinite().all())

    def test_a_latent_fixed_by_the_model(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Delta(torch.zeros(len(x))))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(torch.zeros(len(x))))

        self.refused("got a Delta at site 'z'", model, guide)

    def test_no_latents(self):
        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(0.0, 0.5), obs=x)

        self.refused("got a model without any", model, lambda x: None)

    def test_a_guide_outside_the_support(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Exponential(1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

        with pyro.validation_enabled(False):  # with it, Pyro itself refuses the value
            self.refused("expected latents inside the model's support at site 'z'", model)

    def test_random_densities(self):
        dropout = torch.nn.Dropout(0.5)

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(dropout(z), 0.5), obs=x)

        self.refused(r"into evaluation mode with .eval\(\)", model)

    def test_impossible_data(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                possible = torch.where(x > 1, -torch.inf, 0.0)
                pyro.factor("possible", possible + 0 * z)

        x = torch.tensor([0.0, 2.0, 0.0])
        self.refused(r"got none for datum \[1\]", model, x=x, error=EvidenceError)

    @pytest.mark.parametrize(
        ("guide", "match"),
        [
            (normal_guide, r"NaN at site 'z' of the guide, batch index \[1\]: its loc is not a number"),
            (
                lambda x: normal_guide(torch.zeros(3)),
                r"NaN at site 'x' of the model, batch index \[1\]: the observed data",
            ),
        ],
    )
    def test_nan_names_site_and_datum(self, guide, match):
        x = torch.tensor([0.0, torch.nan, 0.0])
        self.refused(match, guide=guide, x=x, error=NotANumberError)
