"""Progressive generation against exact conditional variances, and on a pair built coarse to fine or the other way."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from inference.views.figures import figure_bytes
from inference.views.progressive import draw_progressive, progressive
from ppl_models import VAE, ModelGuidePair
from ppl_models.hvae import HVAE
from ppl_models.likelihoods import Bernoulli, Categorical
from ppl_models.linear_hierarchy import LinearHierarchy
from tests.oracles import linear_hvae

Z = 6.0  # fewer than a hundred comparisons a test: a correct one fails below 2e-7


@pytest.mark.parametrize("dims", [(3, (2,)), (4, (2, 2)), (3, (2, 3, 2))])
def test_the_variance_left_is_that_of_the_joint_gaussian(dims):
    pair = LinearHierarchy.random(*dims)
    shown = progressive(pair, num_redraws=20, num_chains=400)
    weights = [w.detach().numpy() for w in pair.weights]
    biases = [b.detach().numpy() for b in pair.biases]
    scales = pair.log_noise_scales.detach().exp().tolist()
    mean, cov, blocks = linear_hvae.joint(weights, biases, scales)
    index = [list(range(b.start, b.stop)) for b in blocks]
    for k, names in enumerate(shown.held):
        assert names == pair.latent_sites[:k]
        given = [i for name in names for i in index[int(name[2:])]]
        left = linear_hvae.conditional(mean, cov, index[1], given)[2] if given else cov[np.ix_(index[1], index[1])]
        exact = float(np.trace(weights[0] @ left @ weights[0].T)) / dims[0]
        assert abs(shown.variance[k] - exact) <= Z * shown.std_error[k] + 1e-12
        if k < len(dims[1]):  # the twin: a tenth more, or a biased variance (1/20 too small), would be seen at the top
            assert shown.std_error[k] < 0.1 * exact
    assert np.all(np.diff(shown.variance) < 0)
    assert shown.variance[-1] == pytest.approx(0, abs=1e-20)
    assert shown.settled[0] == 0
    assert shown.settled[-1] == pytest.approx(1)
    assert np.allclose(shown.coarse + shown.fine, shown.variance)
    assert shown.coarse[0] >= 0.45 * shown.variance[0]


class TwoScales(ModelGuidePair):
    """One latent moves whole 2x2 blocks of a 4x4 picture, the other a checkerboard inside them; either may be on top.

    Block values have variance 1 and boards 1/9 by pixel, four of each: eigenvalues 4 (four times) and 4/9 (four times). The
    leading components that hold half of the variance, 10/9 by pixel, are three of the first kind: 3/4 by pixel.
    """

    def __init__(self, coarse_first: bool) -> None:
        super().__init__((4, 4), ("z_2", "z_1"))
        self.coarse_first = coarse_first

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            top = pyro.sample("z_2", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            low = pyro.sample("z_1", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            coarse, fine = (top, low) if self.coarse_first else (low, top)
            board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / 3
            mean = torch.kron(coarse.unflatten(-1, (2, 2)), torch.ones(2, 2))
            mean = mean + torch.kron(fine.unflatten(-1, (2, 2)), board)
            return pyro.sample("x", dist.Normal(mean, 0.1).to_event(2), obs=x)

    def guide(self, x):
        raise NotImplementedError


@pytest.mark.parametrize("coarse_first", [True, False])
def test_what_each_layer_settles_is_told_apart(coarse_first):
    shown = progressive(TwoScales(coarse_first), num_redraws=10, num_chains=300)
    left_of_coarse = 0.0 if coarse_first else 0.75
    left_of_fine = 1 / 9 if coarse_first else 0.25
    assert shown.num_components == 3
    slack = 2e-3  # the components are estimated from 3000 draws: errors in them count in squares
    assert np.all(np.abs(shown.coarse - [0.75, left_of_coarse, 0.0]) <= Z * shown.coarse_std_error + slack)
    error = Z * (shown.std_error + shown.coarse_std_error) + slack
    assert np.all(np.abs(shown.fine - [0.25 + 1 / 9, left_of_fine, 0.0]) <= error)
    assert abs(shown.coarse[1] - left_of_coarse - 0.3) > Z * shown.coarse_std_error[1] + slack  # the twin
    site, *_, of_coarse, of_fine = shown.table().splitlines()[3].split()
    assert site == "z_2"
    assert float(of_coarse.strip("%")) == pytest.approx(100.0 if coarse_first else 0.0, abs=15)
    assert float(of_fine.strip("%")) == pytest.approx(69.2 if coarse_first else 30.8, abs=15)
    assert (shown.coarse_settled[1] > shown.fine_settled[1]) == coarse_first


def test_rows_hold_what_they_say_and_the_rest_is_redrawn():
    shown = progressive(TwoScales(coarse_first=True), num_redraws=4, num_chains=2)
    assert shown.means.shape == (3, 4, 4, 4)

    def blocks(row):
        return row.reshape(4, 2, 2, 2, 2).mean((2, 4))

    assert np.ptp(blocks(shown.means[0]), axis=0).min() > 1e-3
    assert np.allclose(np.ptp(blocks(shown.means[1]), axis=0), 0)  # z_2 held: the blocks stay
    assert np.ptp(shown.means[1], axis=0).min() > 1e-3  # z_1 redrawn: the boards do not
    assert np.allclose(np.ptp(shown.means[2], axis=0), 0)
    assert np.allclose(blocks(shown.means[1])[0], blocks(shown.means[2])[0])  # one chain all the way down


def test_the_seed_decides_and_the_random_state_is_left_alone():
    pair = LinearHierarchy.random(3, (2, 1))
    state = torch.get_rng_state()
    first, again, other = (progressive(pair, seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(first.means, again.means)
    assert not np.array_equal(first.means, other.means)


@pytest.mark.parametrize(
    "pair",
    [
        lambda: HVAE.preset((4, 4), Bernoulli(), (3, 2, 2), hidden=(6,), guide="top_down"),
        lambda: HVAE.preset((4, 4), Categorical(5), (3, 2), hidden=(6,)),
        lambda: VAE.preset((1, 4, 4), Bernoulli(), latent_dim=2, hidden=(6,)),
    ],
)
def test_any_pair_of_images_is_drawn(pair):
    pair = pair()
    shown = progressive(pair, num_redraws=3, num_chains=5)
    figure = draw_progressive(shown, value_range=(0, 1))
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "nothing"
    assert labels[-1] == ", ".join(pair.latent_sites)
    assert figure_bytes(figure, ".png").startswith(b"\x89PNG")


def test_a_model_that_draws_nothing_settles_nothing():
    pair = LinearHierarchy.random(2, (1,))
    with torch.no_grad():
        pair.weights[0].zero_()
    shown = progressive(pair)
    assert all(math.isnan(share) for share in shown.settled)
    assert "nan" in shown.table()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_redraws": 1}, "num_redraws >= 2"),
        ({"num_chains": 1}, "num_chains >= 2"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        progressive(TwoScales(coarse_first=True), **options)


def test_only_images_are_drawn_and_only_with_a_range():
    with pytest.raises(ValueError, match="print the table"):
        draw_progressive(progressive(LinearHierarchy.random(3, (2,))), value_range=(0, 1))
    with pytest.raises(ValueError, match="value_range"):
        draw_progressive(progressive(TwoScales(coarse_first=True)))
