"""The table of all systems at tiny size: every row is there, resumes without training again, and is what it says."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from inference import load_run
from inference.views.images import to_rgb

PATH = Path(__file__).parents[1] / "examples" / "one_table.py"
TINY = {"epochs_scale": 1e-9, "num_particles": 2}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_table", PATH)
    module = importlib.util.module_from_spec(spec)
    module.__name__ = "one_table"
    import sys

    sys.modules["one_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(example):
    """The script with one network of a few units for each kind of row."""
    S, grey = example.SHAPE, example.grey
    example.SYSTEMS = {
        "HVAE": example.System(
            lambda: example.HVAE.preset(S, grey(), (3, 2), ((8,), (8,))), 1, options=dict(example.LATENT)
        ),
        "DDPM": example.System(
            lambda: example.DDPM.preset(S, grey(), 5, hidden=8, blocks=1), 1, options=dict(example.DIFFUSION)
        ),
        "D3PM": example.System(
            lambda: example.D3PM.preset(S, example.Categorical(17), 4, "absorbing", hidden=8, blocks=1),
            1,
            "classes",
            dict(example.DIFFUSION),
        ),
    }
    return example


def test_the_table_has_a_row_for_each_system_and_is_not_made_twice(small, tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    table = small.main(tmp_path / "runs", seeds=1, pictures=tmp_path / "pictures", **TINY)
    assert [row[0] for row in table] == ["HVAE", "DDPM", "D3PM"]
    assert [row[-3] == "-" for row in table] == [False, True, True]  # IWAE where the guide is learned
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"one_table.png", "ddpm_digits.png"}
    weights = sorted((tmp_path / "runs").glob("*/model/model.safetensors"))
    records = sorted((tmp_path / "runs").glob("*.json"))
    before = [path.stat().st_mtime_ns for path in weights + records]
    assert len(weights) == len(records) == 3
    again = small.main(tmp_path / "runs", seeds=1, **TINY)
    assert again == table
    assert [path.stat().st_mtime_ns for path in weights + records] == before

    record = json.loads((tmp_path / "runs" / "HVAE-0.json").read_text())
    pair = load_run(tmp_path / "runs" / "HVAE-0").pair
    data = small.load_data("digits", scaling="symmetric")
    torch.manual_seed(1)
    fresh = small.bound(pair, data.test, num_particles=20)
    error = math.hypot(fresh["draws"], record["test"]["draws"])
    assert abs(fresh["elbo"] - record["test"]["elbo"]) < 8 * error  # two draws leave the error itself uncertain
    assert abs(fresh["elbo"] - record["train"]["elbo"]) > 1e-9
    assert record["iwae"] > record["test"]["elbo"] - 8 * error
    small.main(tmp_path / "runs", seeds=2, only=["DDPM"], **TINY)
    assert "+-" in capsys.readouterr().out.splitlines()[-1]  # an error over seeds needs two


def test_an_error_over_seeds_is_that_of_the_mean(example):
    assert example.over_seeds([1.0, 2.0, 3.0]) == "2.00 +- 0.58"
    assert example.over_seeds([1.0]) == "1.00"


def test_classes_and_grey_values_show_the_same_picture(example):
    sets = [example.load_data("digits", scaling=scaling) for scaling in ("symmetric", "classes")]
    symmetric, classes = (example.images_of(data.test, data.scaling) for data in sets)
    assert torch.allclose(symmetric.double(), classes.double())
    assert to_rgb(classes[:2].double().numpy(), (-1, 1)).shape == (2, 8, 8, 3)
    assert not torch.allclose(symmetric.double(), sets[1].test.double())  # control
