"""``fit``: it reaches the analytic optimum, does what its options say, refuses what it must, and leaves the caller alone."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch.utils.data import TensorDataset

from inference import ConfigError, DataError, ElboLoss, fit
from inference.training.config import TrainConfig
from inference.training.datasets import as_dataset
from inference.training.evaluation import evaluate
from inference.training.optimizers import Optimization, learning_rate_factor
from ppl_models import VAE, LinearDiffusion, NoiseSchedule
from ppl_models.likelihoods import Categorical, Normal
from tests.oracles import gaussian
from tests.training.training_pairs import PointMass, grey_points, linear_vae, noisy_vae, points


def weights(pair: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in pair.parameters()])


# ----------------------------------------------------------------------------------------------------- the optimum


def pca_evidence(x: np.ndarray, latent_dim: int) -> float:
    """The largest mean log evidence of probabilistic PCA (Tipping and Bishop 1999, eqs. 4 to 8): from eigenvalues alone."""
    values = np.sort(np.linalg.eigvalsh(np.cov(x.T, bias=True)))[::-1]
    noise = values[latent_dim:].mean()
    log_det = np.log(values[:latent_dim]).sum() + (len(values) - latent_dim) * np.log(noise)
    return float(-0.5 * (len(values) * np.log(2 * np.pi) + log_det + len(values)))


def test_a_linear_vae_reaches_probabilistic_pca() -> None:
    """Within p / 2N, by which the maximum of the likelihood itself lies above the truth (Wilks), on the training data.

    p = 15 parameters (10 + 5 + 1, less one rotation) and N = 500 data: 0.015 nats. At the optimum the columns of W are
    orthogonal, the guide is the posterior, and the bound is the evidence.
    """
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(5, 2, generator=generator)
    x = torch.randn(500, 2, generator=generator) @ w.T + 0.5 * torch.randn(500, 5, generator=generator) + 1.0
    pair, bar = linear_vae(), 15 / (2 * 500)
    options = {"learning_rate": 0.03, "schedule": "cosine", "batch_size": 500, "progress": False}

    def gaps() -> tuple[float, float]:
        """How far evidence and bound lie below the optimum, both exact."""
        parts = pair.decoder.weight.detach().numpy(), pair.decoder.bias.detach().numpy()
        scale = float(pair.likelihood.log_scale.detach().exp())
        evidence = gaussian.log_evidence(*parts, scale, x.numpy())
        loc, sd = (t.detach().numpy() for t in pair.encoder(x))
        inference = [
            gaussian.kl(loc[n], np.diag(sd[n] ** 2), *gaussian.posterior(*parts, scale, x[n].numpy()))
            for n in range(50)
        ]
        optimum = pca_evidence(x.numpy(), 2)
        return optimum - evidence.mean(), optimum - evidence.mean() + float(np.mean(inference))

    before = gaps()
    fit(pair, x, epochs=600, **options)
    after = gaps()
    assert before[0] > 20 * bar
    assert -1e-9 < after[0] < bar
    assert after[0] <= after[1] < bar


# ----------------------------------------------------------------------------------------------------- the options


def test_schedules_are_torchs() -> None:
    """Against torch's own classes, step by step, after a linear warm-up of five steps."""
    total, warmup = 25, 5
    for name, make in {
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, total - warmup),
        "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total - warmup),
        "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.01 ** (1 / (total - warmup))),
        "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
    }.items():
        config = TrainConfig(schedule=name, warmup_steps=warmup)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        reference, expected = make(optimizer), [(s + 1) / warmup for s in range(warmup)]
        for _ in range(warmup, total):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            reference.step()
        found = [learning_rate_factor(step, config, total) for step in range(total)]
        assert found == pytest.approx(expected, abs=1e-12), name


def test_a_run_follows_its_schedule_and_warm_up() -> None:
    """37 data in batches of 10: four steps an epoch; the row of an epoch has its last step's numbers."""
    options = {"schedule": "linear", "learning_rate": 0.1, "kl_warmup_epochs": 2.0, "warmup_steps": 2}
    run = fit(linear_vae(), points(), epochs=3, batch_size=10, progress=False, **options)
    assert [row["step"] for row in run.metrics] == [4, 8, 12]
    expected = [0.1 * (1 - (step - 2) / 10) for step in (3, 7, 11)]
    assert [row["learning_rate"] for row in run.metrics] == pytest.approx(expected, rel=1e-12)
    assert [row["rate_weight"] for row in run.metrics] == [3 / 8, 7 / 8, 1.0]


def test_clipping_scales_the_whole_gradient() -> None:
    """Summed over steps, each gradient having norm at most 1; the twin without it is not bounded."""
    for clip, expected in ((1.0, 1.0), (100.0, 5.0), (None, 5.0)):
        module = torch.nn.Linear(2, 1, bias=False)
        optimization = Optimization(module, TrainConfig(gradient_clip=clip), total_steps=1)
        (3 * module.weight[0, 0] + 4 * module.weight[0, 1]).backward()
        assert float(optimization.gradient_norm()) == 5.0
        optimization.step()
        assert float(module.weight.grad.norm()) == pytest.approx(expected, rel=1e-5)
        assert module.weight.grad[0, 1] / module.weight.grad[0, 0] == pytest.approx(4 / 3, rel=1e-12)


def test_one_step_of_adam_by_hand() -> None:
    """The first step moves each weight by learning_rate * g / (|g| + 1e-8), g the gradient of the batch mean of -ELBO."""
    pair, x = PointMass(), points(8, 3)
    before = weights(pair)
    z = pair.encoder(x)
    mean = pair.decoder(z)
    loss = 0.5 * (z.square().sum(-1) + ((x - mean) / 0.5).square().sum(-1)).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(pair.parameters()))])
    fit(pair, x, epochs=1, batch_size=8, learning_rate=0.01, progress=False)
    torch.testing.assert_close(
        weights(pair), before - 0.01 * gradient / (gradient.abs() + 1e-8), rtol=1e-10, atol=1e-12
    )


def test_averaged_weights_by_hand() -> None:
    """After steps 1, 2, 3 the weights are w_1, w_2, w_3; the average starts at w_1 and moves a fifth of the way."""
    steps = []
    for epochs in (1, 2, 3):
        pair = linear_vae()
        fit(pair, points(), epochs=epochs, batch_size=37, learning_rate=0.1, progress=False)
        steps.append(weights(pair))
    averaged = linear_vae()
    run = fit(averaged, points(), epochs=3, batch_size=37, learning_rate=0.1, ema=0.8, progress=False)
    expected = 0.8 * (0.8 * steps[0] + 0.2 * steps[1]) + 0.2 * steps[2]
    torch.testing.assert_close(weights(averaged), expected, rtol=1e-12, atol=1e-12)
    assert float((weights(averaged) - steps[2]).abs().max()) > 1e-3
    # What is reported is the averaged pair's bound.
    found = evaluate(ElboLoss(averaged), points(), 37, seed=1).elbo
    assert run.metrics[-1]["validation_elbo"] == pytest.approx(found, rel=0.05)


def test_early_stopping_keeps_the_best_epoch() -> None:
    """A learning rate that overshoots: the bound gets worse, and the best epoch's weights are the run's."""
    options = {"batch_size": 10, "learning_rate": 0.4, "validation_fraction": 0.3, "progress": False}
    pair = linear_vae()
    run = fit(pair, points(), epochs=60, patience=3, **options)
    elbos = [row["validation_elbo"] for row in run.metrics]
    best = int(np.argmax(elbos))
    assert len(elbos) == best + 4 < 60
    until_best = linear_vae()
    fit(until_best, points(), epochs=best + 1, **options)
    assert torch.equal(weights(pair), weights(until_best))
    free = fit(linear_vae(), points(), epochs=len(elbos) + 2, **options)  # the twin: without patience it goes on
    assert [row["validation_elbo"] for row in free.metrics[: len(elbos)]] == elbos


def test_data_put_aside_are_not_trained_on() -> None:
    """Only the datum put aside is different; so the weights are the same, and the figures are not."""
    x = points()
    order = np.random.default_rng(3).permutation(37)
    results = []
    for other in (0.0, 100.0):
        changed, pair = x.clone(), linear_vae()
        changed[order[0]] += other
        run = fit(pair, changed, epochs=2, batch_size=8, validation_fraction=0.01, seed=3, progress=False)
        results.append((weights(pair), run.metrics[-1]["validation_elbo"]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[1][1] < results[0][1] - 100
    assert run.config["validation"] == "1 of the training data, put aside"


def test_the_seed_decides_everything() -> None:
    def trained(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        pair = noisy_vae()
        data = as_dataset(grey_points(), scaling="unit", binarization="dynamic")
        fit(pair, data, epochs=2, batch_size=8, seed=seed, progress=False)
        return weights(pair)

    assert torch.equal(trained(0, 1), trained(0, 2))
    assert not torch.equal(trained(0, 1), trained(1, 1))


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("64-true", torch.float64), ("32-true", torch.float32), ("bf16-mixed", torch.float32), (None, torch.float64)],
)
def test_precision(precision: str | None, dtype: torch.dtype) -> None:
    pair = VAE.preset((4,), Normal(scale=0.5), latent_dim=2, hidden=(8,))
    run = fit(pair, points(37, 4), epochs=2, precision=precision, progress=False)
    assert {p.dtype for p in pair.parameters()} == {dtype}
    assert run.config["dtype"] == str(dtype).removeprefix("torch.")
    assert np.isfinite(run.metrics[-1]["validation_elbo"])


def test_half_precision_changes_the_figures_a_little() -> None:
    figures = {}
    for precision in ("32-true", "bf16-mixed"):
        pair = linear_vae()
        options = {"learning_rate": 1e-30, "progress": False, "epochs": 1}
        figures[precision] = fit(pair, points(), precision=precision, **options).metrics[0]["validation_elbo"]
    assert figures["bf16-mixed"] != figures["32-true"]
    assert figures["bf16-mixed"] == pytest.approx(figures["32-true"], rel=0.02)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_dataset_trains_like_its_tensor(dynamic: bool) -> None:
    """Also where its items are of another dtype than the pair."""
    outcomes = []
    for wrap in (lambda x: x, lambda x: TensorDataset(x, torch.zeros(len(x)))):
        x = grey_points().float() if dynamic else points().float()
        stated = {"scaling": "unit", "binarization": "dynamic"} if dynamic else {}
        pair = noisy_vae() if dynamic else linear_vae()
        data = as_dataset(wrap(x), test=wrap(x[:9].round() if dynamic else x[:9]), **stated)
        run = fit(pair, data, epochs=2, batch_size=8, progress=False)
        outcomes.append((weights(pair), run.metrics))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]


def test_a_dataset_can_be_split() -> None:
    outcomes = []
    for data in (points(), TensorDataset(points())):
        run = fit(linear_vae(), data, epochs=1, validation_fraction=0.2, progress=False)
        outcomes.append(run.metrics)
    assert outcomes[0] == outcomes[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_the_same_where_nothing_is_drawn() -> None:
    outcomes = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        pair = PointMass()
        options = {"epochs": 3, "batch_size": 5, "ema": 0.5, "free_bits": 0.1, "device": device, "progress": False}
        run = fit(pair, points(13, 3), **options)
        outcomes.append((weights(pair).cpu(), run.metrics[-1]))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-9, atol=1e-9)
    assert outcomes[0][1] == pytest.approx(outcomes[1][1], rel=1e-9)


# ----------------------------------------------------------------------------------------------------- extras


def test_tensorboard_has_the_metrics(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = fit(linear_vae(), points(), tmp_path / "run", epochs=3, tensorboard=True, progress=False)
    found = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    for name in run.metrics[0]:
        events = found.Scalars(name)
        assert [event.step for event in events] == [1, 2, 3]
        assert [event.value for event in events] == pytest.approx([row[name] for row in run.metrics], rel=1e-6)


def test_tensorboard_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install ppl-models\[tensorboard\]"):
        fit(linear_vae(), points(), tmp_path / "run", tensorboard=True, progress=False)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("writes", [False, True])
def test_the_callers_state_is_left_alone(writes: bool, tmp_path: Path) -> None:
    data = as_dataset(grey_points(), scaling="unit", binarization="dynamic")

    def state() -> dict[str, Any]:
        return {
            "torch": torch.get_rng_state().tolist(),
            "numpy": str(np.random.get_state()),
            "python": random.getstate(),
            "dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
            "grad": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "params": dict(pyro.get_param_store()),
            "validation": pyro.distributions.is_validation_enabled(),
            "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
            "environment": dict(os.environ),
            "streams": (sys.stdout, sys.stderr),
            "folder": os.getcwd(),
        }

    for validation in (True, False):
        with pyro.validation_enabled(validation):
            pair, out = noisy_vae(), tmp_path / str(validation) if writes else None
            before = state()
            fit(pair, data, out, epochs=2, batch_size=8, validation_fraction=0.2, patience=1, progress=True)
            after = state()
        assert {name for name in before if before[name] != after[name]} == set()
    assert not pair.training


def test_classes_and_whole_numbers_can_be_stated():
    """Integers are classes where the likelihood is over classes; whole reals are taken when said to be as they are."""
    classes = torch.randint(0, 2, (20, 4))
    fit(VAE.preset((4,), Categorical(2), latent_dim=1, hidden=(4,)), classes, epochs=1, progress=False)
    reals = torch.full((20, 4), 2.0)
    normal = VAE.preset((4,), Normal(), latent_dim=1, hidden=(4,))
    fit(normal, reals, epochs=1, progress=False, scaling="none")
    with pytest.raises(DataError, match="scaling"):
        fit(normal, reals, epochs=1, progress=False)


def test_fewer_validation_data_than_terms_of_a_diffusion_are_said(recwarn: pytest.WarningsRecorder) -> None:
    """One t is drawn for each datum, so that 20 data leave most of 50 terms out, of which no standard error over data knows."""
    pair = LinearDiffusion(NoiseSchedule.cosine(50), torch.zeros(2), torch.ones(2))
    with pytest.warns(UserWarning, match="the bound has 50 terms, of which each of 20 validation data draws one"):
        fit(pair, torch.randn(20, 2), epochs=1, progress=False)
    recwarn.clear()
    fit(pair, torch.randn(60, 2), epochs=1, progress=False)
    assert not [w for w in recwarn if "terms" in str(w.message)]
