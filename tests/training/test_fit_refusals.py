"""``fit`` refuses bad data and bad options before the first step and before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from inference import ConfigError, DataError, DataSet, RunError, fit
from inference.training.config import TrainConfig
from inference.training.datasets import as_dataset
from ppl_models import VAE, LinearGaussian
from ppl_models.likelihoods import Bernoulli, Categorical, DiscretizedNormal
from tests.training.training_pairs import grey_points, linear_vae, points


def weights(pair: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in pair.parameters()])


class Late(Dataset[torch.Tensor]):
    """The item at 70 is not binary; only the first 64 are looked at before training."""

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), 0.5 if index == 70 else 1.0)


def bernoulli() -> VAE:
    return linear_vae(4, likelihood=Bernoulli())


def discretized() -> VAE:
    return linear_vae(4, likelihood=DiscretizedNormal(levels=256))


GREY, PIXELS = grey_points(), torch.randint(0, 256, (9, 4))
BAD_DATA: dict[str, tuple[Any, Any, str]] = {
    "shape": (linear_vae, points(37, 4), r"expected data of shape \[N, 5\] for this pair, got \[N, 4\]"),
    "not a number": (linear_vae, torch.full((3, 5), float("nan")), r"train\[0, 0\] = nan: expected finite numbers"),
    "infinity": (linear_vae, torch.full((3, 5), float("inf")), r"train\[0, 0\] = inf: expected finite numbers"),
    "no rows": (linear_vae, torch.zeros(0, 5), r"expected data \[N, \*data_shape\] with N >= 1"),
    "strings": (linear_vae, np.array([["a"] * 5]), "got an array of dtype <U1"),
    "a list": (linear_vae, [[0.0] * 5], "expected a Tensor, a numpy array, .* got list"),
    "no such name": (linear_vae, "nonsense", "got 'nonsense'"),
    "complex": (linear_vae, torch.zeros(3, 5, dtype=torch.complex64), "got torch.complex64"),
    "grey under Bernoulli": (bernoulli, GREY, r"train: expected exact 0 or 1 under a Bernoulli likelihood"),
    "pixels under Bernoulli": (bernoulli, PIXELS, "look like unscaled counts such as pixels"),
    "pixels as floats under Bernoulli": (bernoulli, PIXELS.double(), "look like unscaled counts such as pixels"),
    "pixels under Normal": (lambda: linear_vae(4), PIXELS, "look like unscaled counts such as pixels"),
    "pixels under DiscretizedNormal": (discretized, PIXELS, "look like unscaled counts such as pixels"),
    "stated as counts": (
        bernoulli,
        DataSet("pixels", PIXELS.double(), levels=256),
        "these look like integer grey levels 0..255",
    ),
    "[0, 1] under DiscretizedNormal": (
        discretized,
        DataSet("pixels", PIXELS / 255.0, levels=256, scaling="unit"),
        r"values in \[0, 1\] need scaling \"symmetric\", 2x - 1",
    ),
    "held-out part": (bernoulli, DataSet("points", torch.ones(3, 4), GREY), r"test: expected exact 0 or 1"),
    "item": (bernoulli, Late(), r"train item 70: expected exact 0 or 1"),
    "integers": (bernoulli, DataSet("pixels", PIXELS), "these look like integer grey levels"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_are_refused_before_the_step_and_before_anything_is_written(name: str, tmp_path: Path) -> None:
    make, data, reason = BAD_DATA[name]
    pair = make()
    before = weights(pair)
    with pytest.raises(DataError, match=reason):
        fit(pair, data, tmp_path / "run", epochs=1, batch_size=8, progress=False)
    if name == "item":  # only reading finds it, which is training
        assert not (tmp_path / "run" / "model").exists()
    else:
        assert torch.equal(before, weights(pair))
        assert [*tmp_path.iterdir()] == []


def test_the_same_data_well_stated_are_taken() -> None:
    for pair, stated in (
        (bernoulli(), {"scaling": "unit", "binarization": "dynamic"}),
        (bernoulli(), {"scaling": "unit", "binarization": "fixed"}),
        (discretized(), {"scaling": "symmetric"}),
        (linear_vae(4), {"scaling": "none"}),
        (VAE.preset((4,), Categorical(256), latent_dim=2, hidden=(8,)), {"scaling": "classes"}),
    ):
        fit(pair, as_dataset(PIXELS, levels=256, **stated), epochs=1, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"epochs": 0}, ConfigError, "epochs: input should be greater than or equal to 1, got 0"),
        ({"epoch": 3}, ConfigError, "epoch: no such option; did you mean epochs"),
        ({"learning_rate": float("nan")}, ConfigError, "learning_rate: "),
        ({"patience": 3}, ConfigError, "expected validation_fraction > 0 with patience"),
        ({"validation_fraction": 0.999}, ConfigError, "expected validation_fraction to leave training data"),
        ({"device": "cuda"}, ConfigError, "expected a CUDA device for 'cuda', found none"),
        ({"device": "cuda:1"}, ConfigError, "expected a CUDA device for 'cuda:1', found none"),
        ({"device": "cpu:1"}, ConfigError, "device: expected auto, cpu, mps, cuda or cuda:1, got 'cpu:1'"),
        ({"tensorboard": True}, ConfigError, "tensorboard: expected a RUN folder to write to, got none"),
        ({"resume": True}, RunError, "expected out=FOLDER with resume=True"),
        ({"config": TrainConfig(), "epochs": 2}, ConfigError, "expected either config or options, got both"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], reason: str) -> None:
    if str(options.get("device")).startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(error, match=reason):
        fit(linear_vae(), points(), progress=False, **options)


def test_a_pair_without_parameters_is_refused() -> None:
    pair = LinearGaussian.random(data_dim=5, latent_dim=1).requires_grad_(False)
    with pytest.raises(ConfigError, match="expected a pair with parameters to train, got none"):
        fit(pair, points(), progress=False)
