"""Standardised data: a change of variables, made of the training part, recorded with a run, and undone for what is shown."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from inference import ElboLoss, fit, load_run
from inference.training.datasets import DataError, DataSet, as_dataset, load_data
from inference.training.standardizing import Standardization
from ppl_models import VAE, LinearGaussian
from ppl_models.likelihoods import Normal

OPTIONS = {"epochs": 1, "progress": False}


def points(size=40):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(size=(size, 3)) * [1.0, 100.0, 1e-3] + [0.0, 5000.0, -1.0])


def test_the_training_part_has_mean_zero_and_variance_one_and_the_rest_its_statistics():
    x = points()
    data = as_dataset(x[:30], test=x[30:], scaling="standard")
    mean, std = x[:30].numpy().mean(0), x[:30].numpy().std(0)
    np.testing.assert_allclose(data.train.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(data.train.numpy().std(0), 1, rtol=1e-12)
    np.testing.assert_allclose(data.test, (x[30:].numpy() - mean) / std, rtol=1e-12)
    np.testing.assert_allclose(data.in_own_units(data.test), x[30:], rtol=1e-12)
    of_all = as_dataset(x, scaling="standard").train[30:]
    assert not np.allclose(of_all, data.test)  # control: other statistics give other numbers


def test_the_offset_is_that_of_the_change_of_variables():
    """Evidence of a linear Gaussian fitted to y, in closed form, against that of the same law of x, in closed form."""
    x = points()
    data = as_dataset(x, scaling="standard")
    own = data.standardization
    weight, bias = torch.randn(3, 1), torch.randn(3)
    pair = LinearGaussian(weight, bias, noise_scale=0.5)
    covariance = weight @ weight.T + 0.25 * torch.eye(3)
    law = torch.distributions.MultivariateNormal(
        own.center + own.spread * bias, covariance_matrix=own.spread[:, None] * covariance * own.spread
    )
    log_p = pair.log_evidence(data.train).detach() + own.log_density_offset
    np.testing.assert_allclose(log_p, law.log_prob(x), rtol=1e-9)
    assert not np.allclose(log_p - own.log_density_offset, law.log_prob(x), rtol=1e-3)  # control


def test_a_run_keeps_the_statistics_and_other_data_are_read_by_them(tmp_path):
    x = points()
    np.savez(tmp_path / "x.npz", train=x.numpy())
    spec = f"npz:{tmp_path / 'x.npz'}"
    data = load_data(spec, scaling="standard", test_fraction=0.25)
    pair = VAE.preset((3,), Normal("learned"), latent_dim=2, hidden=(4,))
    fit(pair, data, tmp_path / "run", spec=spec, **OPTIONS)
    run = load_run(tmp_path / "run")
    again = run.data()
    assert torch.equal(again.train, data.train)
    assert torch.equal(again.test, data.test)
    assert torch.equal(run.standardization.center, data.standardization.center)
    assert torch.equal(run.in_own_units(data.test), data.in_own_units(data.test))
    other = load_data(spec, scaling="standard", standardization=run.standardization)
    np.testing.assert_allclose(other.in_own_units(other.train), x, rtol=1e-6)
    plain = fit(pair, x.float(), **OPTIONS)
    assert plain.standardization is None
    assert plain.in_own_units(x) is x


def test_a_bound_of_standardised_data_is_that_of_the_data_but_for_the_offset():
    """A VAE whose encoder standardises and whose decoder undoes it is the same program of x."""
    x = points()
    data = as_dataset(x, scaling="standard")
    own = data.standardization
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(3, 2), nn.Linear(1, 3)

    class Encoder(nn.Module):
        def forward(self, v):
            loc, log_scale = encoder(own(v)).chunk(2, -1)
            return loc, log_scale.exp()

    class Decoder(nn.Module):
        def forward(self, z):
            loc = decoder(z)
            return own.inverse(loc), (0.3 * own.spread).expand_as(loc)

    class StandardEncoder(nn.Module):
        def forward(self, v):
            loc, log_scale = encoder(v).chunk(2, -1)
            return loc, log_scale.exp()

    in_own_units = VAE(Encoder(), Decoder(), 1, Normal(scale=None))
    standardised = VAE(StandardEncoder(), decoder, 1, Normal(scale=0.3))
    values = []
    for pair, data_ in ((in_own_units, x), (standardised, data.train)):
        torch.manual_seed(1)
        values.append(sum(term.detach() for term in ElboLoss(pair).terms(data_).values()))
    np.testing.assert_allclose(values[0], values[1] + own.log_density_offset, rtol=1e-9)
    assert math.isclose(own.log_density_offset, -float(np.log(x.numpy().std(0)).sum()), rel_tol=1e-12)


REFUSED = {
    "a constant column": (torch.tensor([[1.0, 2.0], [1.0, 3.0]]), {}, r"the same in all 2 data in dimension \[0\]"),
    "too large": (torch.randn(5, 2, dtype=torch.float64) * 1e200, {}, "whose squares float64 can hold"),
    "too small": (torch.tensor([[1.0], [2.0]], dtype=torch.float64) * 1e-200, {}, "the same in all 2 data"),
    "one datum": (torch.tensor([[1.0, 2.0]]), {}, "the same in all 1 data"),
    "levels": (torch.tensor([[1, 2], [0, 3]]), {"levels": 4}, "for continuous data in memory, got data of 4 levels"),
    "held-out data of another shape": (
        torch.randn(4, 2),
        {"test": torch.randn(4, 3)},
        r"expected data of shape \[\.\.\., 2\]",
    ),
    "a binarisation": (torch.rand(4, 2), {"binarization": "fixed"}, "needs scaling 'unit', got 'standard'"),
}


@pytest.mark.parametrize(("x", "options", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_standardised_is_refused(x, options, match):
    with pytest.raises(DataError, match=match):
        as_dataset(x, scaling="standard", **options)


def test_the_two_statements_go_together():
    with pytest.raises(DataError, match="go together"):
        DataSet("x", torch.randn(4, 2), scaling="standard")
    with pytest.raises(DataError, match="only with scaling 'standard'"):
        load_data("rings", standardization=Standardization.of(torch.randn(4, 2)))
    with pytest.raises(DataError, match="for continuous data"):
        load_data("digits", scaling="standard")
