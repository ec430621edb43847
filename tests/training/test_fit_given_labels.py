"""Training on data and their labels: each datum meets its own, in training, validation, other batches and after a resume."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from inference import DataError, ElboLoss, RunError, as_dataset, fit, load_run
from inference.training.config import TrainConfig
from inference.training.evaluation import evaluate
from inference.training.inputs import fingerprint, prepare_inputs
from ppl_models import DDPM, VAE
from ppl_models.likelihoods import Normal
from tests.test_labels import LinearOnLabels

MEANS = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])


def three_clusters(num: int) -> tuple[Tensor, Tensor]:
    """x | y ~ N(m_y, diag(1, 0.25)), and y."""
    y = torch.randint(3, (num,))
    return MEANS[y] + torch.randn(num, 2) * torch.tensor([1.0, 0.5]), y


def linear(num_labels: int | None = 3) -> VAE:
    torch.manual_seed(0)
    return VAE.preset((2,), Normal(scale=0.5), latent_dim=1, hidden=(), num_labels=num_labels)


def test_the_bound_reaches_the_best_that_labels_allow() -> None:
    """A linear VAE of x | y is a Gaussian of one covariance about a mean for each y: the pooled fit is the most likely."""
    x, y = three_clusters(600)
    error = (x - torch.stack([x[y == k].mean(0) for k in range(3)])[y]).numpy()
    covariance = error.T @ error / len(x)
    best = -0.5 * (np.log(np.linalg.det(covariance)) + 2 * math.log(2 * math.pi) + 2)
    options = {"epochs": 60, "batch_size": 60, "learning_rate": 0.1, "schedule": "cosine", "progress": False}
    run = fit(linear(), x, labels=y, scaling="none", **options)
    reached, error = run.metrics[-1]["validation_elbo"], run.metrics[-1]["validation_std_error"]
    assert (
        best - 0.05 < reached < best + 3 * error / math.sqrt(10)
    )  # draws alone: their error is far below that over data
    without = fit(linear(None), x, scaling="none", **options).metrics[-1]["validation_elbo"]
    shuffled = fit(linear(), x, labels=y[torch.randperm(600)], scaling="none", **options).metrics[-1]["validation_elbo"]
    assert max(without, shuffled) < best - 0.3


@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_the_reported_bound_is_that_of_each_datum_at_its_label(batch_size: int) -> None:
    oracle = LinearOnLabels()
    loss = ElboLoss(oracle.pair(), closed_form=False)  # the guide is the posterior
    x, y = torch.randn(9, 2), torch.randint(3, (9,))
    found = evaluate(loss, x, batch_size, labels=y)
    assert found.elbo == pytest.approx(oracle.log_evidence(x.numpy(), y.numpy()).mean(), rel=1e-9)
    assert abs(evaluate(loss, x, batch_size, labels=(y + 1) % 3).elbo - found.elbo) > 0.01


def test_labels_go_with_their_data_where_some_are_put_aside() -> None:
    y = torch.arange(30) % 3
    x = torch.stack([y.double(), torch.arange(30.0)], 1)
    data = as_dataset(x, labels=y, scaling="none")
    inputs = prepare_inputs(linear(), data, TrainConfig(validation_fraction=0.3), torch.float64)
    assert torch.equal(inputs.train[:, 0].long(), inputs.labels)
    assert torch.equal(inputs.validation[:, 0].long(), inputs.validation_labels)
    assert len(inputs.validation_labels) == 9


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"objective": "iwae", "num_particles": 3}], ids=str)
def test_a_run_that_goes_on_takes_the_steps_of_one_that_was_not_cut(tmp_path: Path, options: dict[str, object]) -> None:
    x, y = three_clusters(50)
    told = {"batch_size": 20, "labels": y, "scaling": "none", "progress": False, "schedule": "constant", **options}
    whole = fit(linear(), x, tmp_path / "whole", epochs=4, **told)
    fit(linear(), x, tmp_path / "cut", epochs=2, **told)
    again = fit(linear(), x, tmp_path / "cut", epochs=4, resume=True, **told)
    for p, q in zip(whole.pair.parameters(), again.pair.parameters(), strict=True):
        assert torch.equal(p, q)
    assert whole.metrics == again.metrics
    loaded = load_run(tmp_path / "cut").pair
    assert loaded.num_labels == 3
    assert loaded.given(2).guide(x).shape == (50, 1)
    told["labels"] = (y + 1) % 3
    with pytest.raises(RunError, match="another configuration"):
        fit(linear(), x, tmp_path / "cut", epochs=4, resume=True, **told)


def test_compiled_steps_follow_the_labels_of_their_batches() -> None:
    x, y = three_clusters(40)
    told = {"batch_size": 20, "labels": y, "scaling": "none", "progress": False, "epochs": 3}
    fast, slow = (fit(linear(), x, compile=each, **told).metrics[-1] for each in ("on", "off"))
    assert fast["train_elbo"] == pytest.approx(slow["train_elbo"], rel=1e-9)
    assert fast["validation_elbo"] == pytest.approx(slow["validation_elbo"], rel=1e-9)


def test_a_diffusion_learns_where_each_label_lies() -> None:
    x, y = three_clusters(600)
    torch.manual_seed(0)
    pair = DDPM.preset((2,), Normal(), 10, network="mlp", hidden=32, blocks=1, num_labels=3)
    fit(pair, x, labels=y, epochs=40, batch_size=60, learning_rate=3e-3, scaling="none", progress=False)
    for label in range(3):
        drawn = pair.given(label).model(size=400).detach()
        # an error of the mean of 400, five times, and half a standard deviation of what is left to learn
        assert (drawn.mean(0) - MEANS[label]).abs().max() < 5 / 20 + 0.5


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (None, r"train_labels: expected a label for each datum.*conditioned on 3 labels, got none"),
        ([0, 1, 2, 3], r"train_labels: expected whole numbers in 0..2, got 3"),
        ([0, 1, -1, 2], r"train_labels: expected whole numbers in 0..2, got -1"),
        ([0, 1], r"train_labels: expected one int64 label a datum, shape \[4\]"),
        ([0.0, 1.0, 1.0, 0.0], r"labels: expected whole numbers, got torch.float"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_the_first_step(
    tmp_path: Path, labels: list[float] | None, match: str
) -> None:
    with pytest.raises(DataError, match=match):
        fit(linear(), torch.randn(4, 2), tmp_path / "run", labels=labels, scaling="none", epochs=1, progress=False)
    assert not (tmp_path / "run").exists()


def test_labels_that_nothing_would_read_are_refused() -> None:
    x, told = torch.randn(4, 2), {"scaling": "none", "epochs": 1, "progress": False}
    with pytest.raises(DataError, match="expected a pair that is conditioned on them"):
        fit(linear(None), x, labels=[0, 1, 1, 0], **told)
    with pytest.raises(DataError, match=r"expected a pair before given\(y\)"):
        fit(linear().given(1), x, labels=[0, 1, 1, 0], **told)


def test_a_fingerprint_is_of_labels_only_where_they_are_learned_from() -> None:
    x = torch.randn(4, 2)
    first, second = (as_dataset(x, labels=y, scaling="none") for y in ([0, 1, 1, 0], [1, 1, 1, 0]))
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first, True) != fingerprint(second, True)
