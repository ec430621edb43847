"""Every example runs, at tiny size, and says what it claims; an example without a test here fails."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
TESTED = {"any_pyro_program", "evidence_and_gap", "ladder_of_bounds", "vae_on_digits"}


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test():
    assert {path.stem for path in FOLDER.glob("*.py")} == TESTED


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.stem)
def test_mains_are_short(path):
    lines = path.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def main"))
    end = next(i for i in range(start + 1, len(lines)) if lines[i] and not lines[i][0].isspace() and lines[i][0] != ")")
    assert end - start < 80


def test_evidence_and_gap(capsys):
    numbers = _load("evidence_and_gap").main(num_particles=400)
    assert numbers["certificate"] == pytest.approx(numbers["evidence"], rel=1e-10)
    assert abs(numbers["elbo"] - (numbers["evidence"] - numbers["gap"])) < 6 * numbers["elbo_std_error"]
    assert "notes 000" in capsys.readouterr().out


def test_any_pyro_program(capsys):
    numbers = _load("any_pyro_program").main(num_particles=4000)
    assert numbers["exact"] == pytest.approx(-1.8564, abs=1e-4)
    assert abs(numbers["elbo"] - numbers["exact"]) < 6 * numbers["std_error"]
    assert abs(numbers["mean_field"] - numbers["exact"]) > 6 * numbers["std_error"]
    assert "z_2, above z_1 in the model, descends" in capsys.readouterr().out


def test_vae_on_digits(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    numbers = _load("vae_on_digits").main(epochs=1, num_particles=20, out=tmp_path)
    assert numbers["elbo"] < 0
    assert (tmp_path / "posterior.nc").is_file()
    assert "mean" in capsys.readouterr().out


def test_ladder_of_bounds(tmp_path, capsys):
    numbers = _load("ladder_of_bounds").main(num_data=4, num_temperatures=4, steps=20, out=tmp_path / "ladder.png")
    assert numbers["holds"] == 1.0
    assert numbers["ELBO"] < numbers["exact"]
    assert (tmp_path / "ladder.png").is_file()
    assert "amortisation gap" in capsys.readouterr().out
