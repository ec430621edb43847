"""The bound over a data set: the same for every batch size, its error right, and never touched by how one trains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from inference import ElboLoss, EnumeratedLoss, fit
from inference.training.divergence import TrainingDiverged
from inference.training.evaluation import _Sums, bits_per_dim, evaluate, guide_means
from inference.training.noise import noise_seed, seed_noise
from inference.training.scaling import binarize
from ppl_models import CategoricalVAE, LinearGaussian
from ppl_models.likelihoods import Bernoulli
from tests.oracles import gaussian
from tests.training.training_pairs import (
    NanAtOnce,
    PointMass,
    Replicates,
    correlated_pair,
    grey_points,
    linear_vae,
    noisy_vae,
    points,
)


def exact_pair() -> tuple[ElboLoss, Tensor]:
    """The posterior is the guide, so every draw gives the evidence."""
    pair = LinearGaussian.random(data_dim=5, latent_dim=2)
    return ElboLoss(pair, closed_form=False), points()


@pytest.mark.parametrize("batch_size", [1, 2, 7, 36, 37, 100])
def test_the_figure_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    loss, x = exact_pair()
    parts = [p.detach().numpy() for p in (loss.pair.weight, loss.pair.bias)]
    expected = gaussian.log_evidence(*parts, 0.5, x.numpy())
    found = evaluate(loss, x, batch_size)
    assert found.num_data == 37
    assert found.elbo == pytest.approx(expected.mean(), rel=1e-12)
    assert found.std_error == pytest.approx(expected.std(ddof=1) / 37**0.5, rel=1e-10)
    assert found.rate + found.distortion == pytest.approx(-expected.mean(), rel=1e-12)
    assert found.bits_per_dim == pytest.approx(-expected.mean() / (5 * np.log(2)), rel=1e-12)


def test_the_mean_over_batches_would_depend_on_it() -> None:
    loss, x = exact_pair()
    means = [np.mean([evaluate(loss, x[i : i + size], size).elbo for i in range(0, 37, size)]) for size in (7, 36)]
    assert abs(means[0] - means[1]) > 1e-3


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_together_see_each_datum_once(world: int) -> None:
    """Sums of all processes, put together by hand as a reduction would."""
    loss, x = exact_pair()
    whole = evaluate(loss, x, 4)
    totals: list[Tensor] = []
    for rank in range(world):
        evaluate(loss, x, 4, rank=rank, world=world, reduce=lambda sums: totals.append(sums) or sums)
    sums = torch.stack([t for t in totals if t.shape == (4,)]).sum(0)
    assert sums[0] == 37
    assert float(sums[1] / sums[0]) == pytest.approx(whole.elbo, rel=1e-12)


def test_a_process_without_data_makes_the_same_calls() -> None:
    loss, x = exact_pair()
    calls: dict[int, list[torch.Size]] = {0: [], 1: []}
    for rank in calls:

        def note(sums: Tensor, seen: list[torch.Size] = calls[rank]) -> Tensor:
            seen.append(sums.shape)
            return torch.ones_like(sums)

        evaluate(loss, x[:1], 4, rank=rank, world=2, reduce=note)
    assert calls[0] == calls[1]
    assert calls[0] == [torch.Size([4]), torch.Size([]), torch.Size([2, 2, 1])]


def test_the_error_of_nearly_equal_large_numbers_is_right() -> None:
    """The mean of squares minus the square of the mean would have no digit left."""
    values = 1e8 + np.random.default_rng(0).normal(size=50)
    sums = _Sums()
    for part in np.split(values, [1, 20]):
        sums.add({"x": torch.from_numpy(part)}, ())
    squares = float(sums.squares_about(sums.elbo / 50))
    assert squares == pytest.approx(((values - values.mean()) ** 2).sum(), rel=1e-6)
    naive = (values**2).mean() - values.mean() ** 2
    assert abs(naive * 50 / squares - 1) > 0.1
    loss, x = exact_pair()
    assert evaluate(loss, x[:1], 4).std_error == float("inf")


def test_the_standard_error_covers() -> None:
    """How often the interval of 1.96 standard errors holds the mean of the law; at half the width it holds too rarely."""
    pair = LinearGaussian.random(data_dim=2, latent_dim=1)
    loss = ElboLoss(pair, closed_form=False)
    expected = float(pair.log_evidence(pair.model(size=400_000)).mean().detach())
    inside = {1.96: 0, 0.98: 0}
    for _ in range(300):
        found = evaluate(loss, pair.model(size=60).detach(), 60)
        for width in inside:
            inside[width] += abs(found.elbo - expected) < width * found.std_error
    assert inside[1.96] >= 262  # Binomial(300, 0.94) is below with probability 1e-6
    assert inside[0.98] < 262


def test_active_units_are_those_whose_mean_moves() -> None:
    pair, x = linear_vae(latent_dim=3), points(50)
    with torch.no_grad():
        pair.encoder.loc.weight.zero_()
        pair.encoder.loc.weight[0, 0] = 1.0
        spread = 0.09 / float(x[:, 1].std(unbiased=False))  # a variance of 0.0081: just not active
        pair.encoder.loc.weight[1, 1] = spread
        pair.encoder.loc.bias.copy_(torch.tensor([0.0, 5.0, 1e4]))
        assert evaluate(ElboLoss(pair), x, 8).active_units == 1
        pair.encoder.loc.weight[1, 1] = spread * 1.2
        assert evaluate(ElboLoss(pair), x, 8).active_units == 2
    assert guide_means(Replicates(plated=True), points(5, 3), ("z",))["z"].shape == (5, 1, 1)


def test_classes_and_codes_are_counted_as_whole_latents() -> None:
    """Two latents of three classes, of which one follows x, are one active unit and not three."""
    pair = CategoricalVAE.preset((4,), Bernoulli(), num_latents=2, num_classes=3, hidden=(4,))
    with torch.no_grad():
        last = [module for module in pair.encoder.modules() if isinstance(module, torch.nn.Linear)][-1]
        last.weight[3:] = 0.0  # the second latent's logits are the same for all x
        last.weight[:3] *= 20
        x = (torch.rand(40, 4) < 0.5).to(last.weight.dtype)
        assert guide_means(pair, x, ("z",))["z"].shape == (40, 2, 3)
        assert evaluate(EnumeratedLoss(pair), x, 8).active_units == 1


def test_evaluating_leaves_modes_and_random_state_alone_and_drops_nothing_out() -> None:
    pair, x = noisy_vae(), binarize(grey_points())
    pair.train()
    pair.encoder.body[3].eval()
    state, buffers = torch.get_rng_state(), [b.clone() for b in pair.buffers()]
    loss = ElboLoss(pair)
    found = [evaluate(loss, x, 8, seed=1) for _ in range(2)]
    assert found[0] == found[1]
    assert evaluate(loss, x, 8, seed=2) != found[0]
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in pair.encoder.body] == [True, True, True, False]
    assert all(torch.equal(a, b) for a, b in zip(buffers, pair.buffers(), strict=True))


def test_a_dataset_gives_the_tensors_figure_and_grey_values_the_same_binarisation_each_time() -> None:
    loss, x = exact_pair()
    assert evaluate(loss, TensorDataset(x), 8) == evaluate(loss, x, 8)
    grey, bernoulli = grey_points(), ElboLoss(noisy_vae())
    assert evaluate(bernoulli, grey, 8, dynamic=True) == evaluate(bernoulli, grey, 8, dynamic=True)
    assert evaluate(bernoulli, grey, 8, dynamic=True) != evaluate(bernoulli, grey, 8, dynamic=True, seed=1)


def test_a_bound_that_is_not_finite_names_site_and_datum() -> None:
    x = torch.zeros(20)
    x[13] = 10.0
    loss = ElboLoss(NanAtOnce())
    loss(torch.zeros(4))
    with (
        pyro.validation_enabled(False),
        pytest.raises(TrainingDiverged, match=r"got nan at site 'z' for datum 13 of the validation data"),
    ):
        evaluate(loss, x, 8)


def test_giving_up_between_batches() -> None:
    def give_up() -> None:
        raise KeyboardInterrupt

    loss, x = exact_pair()
    state = torch.get_rng_state()
    loss.pair.train()
    with pytest.raises(KeyboardInterrupt):
        evaluate(loss, x, 8, each_batch=give_up)
    assert loss.pair.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "option", [{"kl_warmup_epochs": 50.0}, {"free_bits": 30.0}, {"free_bits": 2.0, "kl_warmup_epochs": 3.5}]
)
def test_what_shapes_the_objective_never_touches_the_reported_bound(option: dict[str, Any]) -> None:
    """At a learning rate too small to change a weight, all runs report the same numbers."""
    rows = []
    for options in ({}, option):
        run = fit(linear_vae(), points(), epochs=2, batch_size=8, learning_rate=1e-300, progress=False, **options)
        rows.append([{k: v for k, v in row.items() if k != "rate_weight"} for row in run.metrics])
    assert rows[0] == rows[1]
    # The twin: they do shape the training.
    trained = [
        fit(linear_vae(), points(), epochs=2, batch_size=8, learning_rate=1e-2, progress=False, **options).metrics
        for options in ({}, option)
    ]
    assert trained[0][-1]["validation_elbo"] != trained[1][-1]["validation_elbo"]


def test_the_reported_figures_are_the_plain_bound() -> None:
    """With a guide that is a point, ELBO(x) = log p(x, A x), worked out here."""
    pair, x = PointMass(), points(12, 3)
    run = fit(pair, x, epochs=1, batch_size=5, learning_rate=1e-300, free_bits=9.0, progress=False)
    with torch.no_grad():
        z = x @ pair.encoder.weight.T + pair.encoder.bias
        mean = z @ pair.decoder.weight.T + pair.decoder.bias
    log_prior = -0.5 * (z.square() + np.log(2 * np.pi)).sum(-1)
    log_likelihood = -0.5 * (((x - mean) / 0.5).square() + np.log(2 * np.pi) + 2 * np.log(0.5)).sum(-1)
    row = run.metrics[0]
    for part in ("train", "validation"):
        assert row[f"{part}_elbo"] == pytest.approx(float((log_prior + log_likelihood).mean()), rel=1e-12)
        assert row[f"{part}_rate"] == pytest.approx(float(-log_prior.mean()), rel=1e-12)
        assert row[f"{part}_distortion"] == pytest.approx(float(-log_likelihood.mean()), rel=1e-12)
        assert row[f"{part}_bits_per_dim"] == pytest.approx(-row[f"{part}_elbo"] / (3 * np.log(2)), rel=1e-12)


def test_more_draws_tighten_nothing_but_the_noise() -> None:
    pair, x = correlated_pair(), points(37, 3)
    found = [evaluate(ElboLoss(pair, num_particles=k), x, 37).elbo for k in (200, 400)]
    exact = float(pair.elbo(x).detach().mean())
    assert found == pytest.approx([exact, exact], rel=0.05)


def test_bits_per_dim_and_seeds() -> None:
    assert bits_per_dim(-np.log(2), torch.Size([])) == pytest.approx(1.0)
    seeds = {noise_seed(*place) for place in ((0, 1), (0, 2), (1, 1), (0, 1, 0), (0, 1, 1), (0, 1, 0, 0))}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    seed_noise(3, torch.device("cpu"))
    first = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(first, torch.rand(2))
