"""Every example runs, at tiny size, and says what it claims; an example without a test here fails."""

import importlib.util
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from inference.training.enumerated_objective import EnumeratedLoss

FOLDER = Path(__file__).parents[1] / "examples"
TESTED = {
    "any_pyro_program",
    "autoencoders",  # in test_examples_autoencoders.py, as is why_it_blurs
    "discrete_gradients",
    "evidence_and_gap",
    "given_labels",
    "hvae_progressive",
    "ladder_of_bounds",
    "markov_chains_forget",
    "mixture_vae",
    "one_bound_three_derivations",
    "published_table_1",
    "one_table",  # in test_examples_table.py
    "text_d3pm",  # in test_examples_text.py
    "vae_on_digits",
    "why_it_blurs",
}


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


def test_given_labels(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    numbers = _load("given_labels").main(
        epochs=8, ddpm_epochs=1, num_particles=10, num_test=40, out=tmp_path / "given.png"
    )
    assert numbers["accuracy"] > 0.3  # of guesses a tenth: above it but once in 10^4, of 40
    assert numbers["information"] < 2.302586  # log 10, whatever the draws
    assert (tmp_path / "given.png").is_file()
    assert "most probable label" in capsys.readouterr().out


def test_mixture_vae(tmp_path, capsys):
    """Its terms are those of a VAE whose prior is the mixture itself, in which no y is drawn."""
    torch.set_default_dtype(torch.float32)
    example = _load("mixture_vae")
    numbers = example.main(epochs=3, num_classes=5, num_particles=10, out=tmp_path / "m.png")
    assert 0 <= numbers["accuracy"] <= 1
    assert (tmp_path / "m.png").is_file()
    assert "higher by" in capsys.readouterr().out
    pair, x = example.MixtureVAE(5), torch.randint(0, 17, (4, 8, 8)) / 8 - 1
    q_z, d = pair.q_z(x), torch.distributions
    components = d.Independent(d.Normal(pair.loc, pair.log_scale.exp()), 1)
    prior = d.MixtureSameFamily(d.Categorical(torch.ones(5)), components)
    torch.manual_seed(1)
    value = -EnumeratedLoss(pair)(x)
    torch.manual_seed(1)
    z = q_z.rsample()
    log_likelihood = pair.likelihood(pair.decoder(z), 2).log_prob(x)
    torch.testing.assert_close(value, log_likelihood + prior.log_prob(z) - q_z.log_prob(z), rtol=1e-4, atol=1e-3)


def test_ladder_of_bounds(tmp_path, capsys):
    numbers = _load("ladder_of_bounds").main(num_data=4, num_temperatures=4, steps=20, out=tmp_path / "ladder.png")
    assert numbers["holds"] == 1.0
    assert numbers["ELBO"] < numbers["exact"]
    assert (tmp_path / "ladder.png").is_file()
    assert "amortisation gap" in capsys.readouterr().out


def test_hvae_progressive(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    numbers = _load("hvae_progressive").main(epochs=1, num_particles=10, num_chains=5, out=tmp_path / "p.png")
    assert numbers["elbo"] < 0
    assert (tmp_path / "p.png").is_file()
    assert "held" in capsys.readouterr().out


def test_discrete_gradients(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    numbers = _load("discrete_gradients").main(steps=2, num_data=8, num_pairs=3, out=tmp_path / "g.png")
    assert numbers["elbo"] <= numbers["evidence"]
    assert (tmp_path / "g.png").is_file()
    assert "bias" in capsys.readouterr().out


def test_markov_chains_forget(tmp_path, capsys):
    numbers = _load("markov_chains_forget").main(num_timesteps=30, out=tmp_path / "forget.png")
    assert numbers["D3PM absorbing, 1/(T - t + 1)"] < 1e-12
    assert numbers["constant T (a walk)"] > 0.1
    assert (tmp_path / "forget.png").is_file()
    assert "irreducible and aperiodic" in capsys.readouterr().out


def test_one_bound_three_derivations(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    found = _load("one_bound_three_derivations").main(4, train_steps=20, repeats=60, out=tmp_path / "e.png")
    exact = found[3]  # all L_t: the quietest
    assert all(abs(e.mean - exact.mean) < 7 * (e.std_error**2 + exact.std_error**2) ** 0.5 for e in found)
    assert (tmp_path / "e.png").is_file()


def test_published_table_1(tmp_path, capsys):
    """Ten images of each part in MNIST's own format, one epoch, and the table is there; a second call trains nothing."""
    torch.set_default_dtype(torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 10, 28, 28) + pixels.tobytes())
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 10) + bytes(10))
    options = {"epochs": 1, "rows": 3, "num_test": 10, "num_particles": 20}
    example = _load("published_table_1")
    table = example.main(f"mnist:{tmp_path}", tmp_path / "runs", **options)
    assert [row[0] for row in table] == ["vae-1-1", "vae-2-1", "vae-1-5"]
    assert [row[3] for row in table] == ["86.76", "85.33", "86.47"]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    again = example.main(f"mnist:{tmp_path}", tmp_path / "runs", **options)
    assert [row[0] for row in again] == [row[0] for row in table]
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert "published" in capsys.readouterr().out
