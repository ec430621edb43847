"""Numbers that are not finite stop a run before the step, with their place named, and are never saved (row 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inference import TrainingDiverged, fit, load_run
from inference.training.checkpoints import load_checkpoint
from inference.training.runs import RunError
from inference.training.texts import read_yaml
from ppl_models import LinearGaussian
from tests.training.training_pairs import NanAtNine, NanAtOnce, RootAtZero, Scalar, linear_vae, points


def data_with(value: float, at: int, size: int = 40) -> Tensor:
    x = torch.linspace(0.5, 2.0, size)
    x[at] = value
    return x


def seed_that_puts(datum: int, aside: bool) -> int:
    """The first seed under which a datum is among the 12 of 40 put aside, or is not."""
    return next(s for s in range(99) if (datum in np.random.default_rng(s).permutation(40)[:12]) == aside)


DIVERGING: dict[str, tuple[Any, Tensor, dict[str, Any], str]] = {
    "a NaN from the network for one datum": (
        NanAtNine,
        data_with(10.0, at=23),
        {"batch_size": 4, "seed": 1},
        r"expected a finite loss, got nan at site 'z' for datum 23 in step ([2-9]|1\d|20): lower the learning rate",
    ),
    "a NaN in the very first step": (
        NanAtOnce,
        data_with(10.0, at=5),
        {"batch_size": 40},
        r"got nan at site 'z' for datum 5 in step 1: ",
    ),
    "an infinite gradient of a finite loss": (
        RootAtZero,
        data_with(0.0, at=17),
        {"batch_size": 40},
        r"got a NaN or infinity in that of a from site 'z' for datum 17 in step 1: ",
    ),
    "with several particles": (
        NanAtNine,
        data_with(10.0, at=31),
        {"batch_size": 4, "num_particles": 3},
        r"got nan at site 'z' for datum 31 in step",
    ),
    "with a part put aside": (
        NanAtOnce,
        data_with(10.0, at=7),
        {"batch_size": 40, "validation_fraction": 0.3, "seed": seed_that_puts(7, aside=False)},
        r"got nan at site 'z' for datum 7 in step 1: ",
    ),
    "with averaging and clipping": (
        RootAtZero,
        data_with(0.0, at=3),
        {"batch_size": 5, "ema": 0.9, "gradient_clip": 1.0},
        r"got a NaN or infinity in that of a from site 'z' for datum 3 in step",
    ),
    "a huge learning rate": (
        Scalar,
        data_with(1.0, at=0),
        {"batch_size": 8, "learning_rate": 1e200},
        r"got (nan|-?inf) at site '[zx]' for datum \d+ in step 2: |in that of \w+ from site '[zx]' for datum \d+ in step 2",
    ),
    "a learning rate that overflows the weights": (
        linear_vae,
        points(),
        {"batch_size": 37, "learning_rate": 1e308, "epochs": 2},
        r"step 1|step 2|after step",
    ),
    "only in the data put aside": (
        NanAtNine,
        data_with(10.0, at=13),
        {"batch_size": 40, "validation_fraction": 0.3, "seed": seed_that_puts(13, aside=True)},
        r"after step 1, expected a finite bound, got nan at site 'z' for datum 13 of the validation data",
    ),
}


@pytest.mark.parametrize("name", DIVERGING)
def test_what_is_not_finite_stops_before_the_step(name: str, tmp_path: Path) -> None:
    make, x, options, reason = DIVERGING[name]
    pair = make()
    out = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match=reason):
        fit(pair, x, out, checkpoint_seconds=0.0, progress=False, **{"epochs": 3, **options})
    saved = sorted((out / "checkpoints").glob("*.safetensors"))
    assert saved
    for path in saved:
        tensors, _ = load_checkpoint(path)
        assert all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())
    if name != "a learning rate that overflows the weights":
        assert all(bool(torch.isfinite(p).all()) for p in pair.parameters())
    assert not (out / "model").exists()
    if read_yaml(out / "config.yaml")["pair"] is None:
        with pytest.raises(RunError, match="networks of its own"):
            load_run(out)
    else:
        with pytest.warns(UserWarning, match="unfinished run"):
            load_run(out)


def test_without_the_bad_datum_the_same_runs_end_well() -> None:
    for make, at in ((NanAtNine, 23), (NanAtOnce, 5), (RootAtZero, 17)):
        run = fit(make(), data_with(1.0, at), epochs=2, batch_size=4, progress=False)
        assert all(bool(torch.isfinite(p).all()) for p in run.pair.parameters())


def test_linear_algebra_that_fails_is_named_with_its_step() -> None:
    pair = LinearGaussian(torch.tensor([[1.0, 0.9], [0.5, 1.0], [-0.3, 0.6]]), torch.zeros(3), 0.5)
    with pytest.raises(TrainingDiverged, match=r"step \d"):
        fit(pair, points(20, 3), epochs=20, learning_rate=1e150, progress=False)


def test_a_run_that_diverged_is_resumed_from_before(tmp_path: Path) -> None:
    """It diverges again at the very same step, as everything is the same."""
    messages = []
    for resume in (False, True):
        with pytest.raises(TrainingDiverged) as caught:
            fit(
                NanAtNine(),
                data_with(10.0, at=23),
                tmp_path / "run",
                batch_size=4,
                epochs=3,
                checkpoint_seconds=0.0,
                resume=resume,
                progress=False,
            )
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
