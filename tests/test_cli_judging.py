"""``ppl evidence`` and ``ppl calibrate`` on a RUN of a small VAE."""

import json

import pytest
import torch

from inference.cli import run
from tests.test_cli import call, refuse, succeed


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """A RUN of one epoch on two moons, whose two latents make every draw cheap."""
    folder = tmp_path_factory.mktemp("runs") / "moons"
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        tiny = ["--hidden", "8", "--epochs", "1", "--batch-size", "1000", "--threads", "1"]
        assert run(["train", "vae", "--data", "two_moons", "--out", str(folder), *tiny]) == 0
    finally:
        torch.set_default_dtype(default)
    return folder


def test_evidence_prints_bound_error_and_trust(capsys, points):
    out = succeed(capsys, "evidence", points, "--particles", 200, "--num-data", 20, "--force")
    assert "IWAE-200" in out
    assert "k-hat" in out
    record = json.loads((points / "evidence.json").read_text())
    assert record["num_particles"] == 200
    assert record["log_evidence"] >= record["elbo"]
    assert record["std_error"] > 0


def test_evidence_draws_until_the_error_is_met_and_says_the_cost(capsys, points):
    out = succeed(capsys, "evidence", points, "--particles", 100, "--se", 2.0, "--num-data", 5, "--force")
    assert json.loads((points / "evidence.json").read_text())["largest_std_error"] <= 2.0
    assert "evaluations" in out


def test_evidence_of_one_particle_has_no_error_to_write(capsys, points):
    out = succeed(capsys, "evidence", points, "--particles", 1, "--num-data", 3, "--force")
    assert "of the draws, at these data" in out
    record = json.loads((points / "evidence.json").read_text())
    assert record["std_error"] is None
    assert record["largest_std_error"] is None
    assert record["log_evidence"] == record["elbo"]
    out = succeed(capsys, "evidence", points, "--particles", 2, "--num-data", 3)
    assert "left as it is; --force replaces it" in out
    assert json.loads((points / "evidence.json").read_text()) == record


def test_evidence_with_gaps(capsys, points, monkeypatch):
    from inference.bounds import gaps

    quick = gaps.inference_gap
    monkeypatch.setattr(
        gaps,
        "inference_gap",
        lambda pair, x, max_steps: quick(pair, x, num_particles=50, steps=20, max_steps=max_steps),
    )
    few = ("--particles", 50, "--num-data", 4)
    out = succeed(capsys, "evidence", points, *few, "--gaps", "--gap-steps", 40, "--force")
    written = json.loads((points / "evidence.json").read_text())["gaps"]
    assert written["num_data"] == 4
    assert written["gap"] == pytest.approx(written["amortisation_gap"] + written["approximation_gap"], abs=0.5)
    assert written["gap_std_error"] > 0
    assert "amortisation gap" in out


def test_evidence_with_a_ladder(capsys, points, tmp_path, monkeypatch):
    from inference.bounds import ladder

    quick = ladder.evidence_ladder
    settings = {"num_temperatures": 4, "num_leapfrog": 2, "num_chains": 4, "num_particles": [5, 20]}
    monkeypatch.setattr(ladder, "evidence_ladder", lambda pair, num_data: quick(pair, num_data=num_data, **settings))
    picture = tmp_path / "ladder.png"
    arguments = ("--particles", 50, "--num-data", 4, "--ladder", picture, "--ladder-data", 4)
    out = succeed(capsys, "evidence", points, *arguments, "--force")
    assert "reverse AIS" in out
    assert picture.stat().st_size > 1000
    refuse(capsys, "evidence", points, "--ladder", picture, match="exists")


def test_calibrate(capsys, points, tmp_path):
    picture = tmp_path / "ranks.png"
    out = succeed(capsys, "calibrate", points, "--simulations", 100, "--figure", picture)
    assert "z" in out
    lines = [line for line in out.splitlines() if line.strip() and not line.startswith("wrote")]
    assert len(lines) == len(set(lines)), "the verdict is said once"
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--particles", 0], "particles"),
        (["--se", -1], "se"),
        (["--ladder", "ladder.gif"], "ending in .png"),
        (["--ladder", "nowhere/ladder.png"], "existing folder"),
    ],
)
def test_bad_calls_are_refused(capsys, points, arguments, match):
    refuse(capsys, "evidence", points, *arguments, match=match)


def test_a_folder_that_is_no_run_is_refused(capsys, tmp_path):
    for command in ("evidence", "calibrate"):
        refuse(capsys, command, tmp_path, match="RUN folder")


def test_figures_depend_on_the_seed_alone(capsys, points):
    arguments = ("evidence", points, "--particles", 20, "--num-data", 3, "--seed", 1, "--force")
    assert call(capsys, *arguments)[1] == call(capsys, *arguments)[1]


def test_large_errors_are_counted_wherever_they_are():
    """Also beside a bad k-hat; and the error of a mean of which most parts are doubtful is said not to be relied on."""
    from inference.bounds.evidence import Evidence

    def of(std_error, k_hat):
        four = torch.zeros(4)
        return Evidence(
            four, torch.tensor(std_error), four + 2.0, torch.tensor(k_hat), four - 1, four, 100, 2, ("data",), "note"
        )

    bad = of([0.9, 0.8, 0.7, 0.1], [0.9, 1.2, 0.3, 0.2])
    assert "2 of 4 data have k-hat above 0.7" in bad.warnings[0]
    assert "3 of 4 data have standard errors above 0.5 nats" in bad.warnings[1]
    lines = bad.table().splitlines()
    assert "not to be relied on" in lines[3]
    assert [line.split()[-1] for line in lines[4:8]] == ["k-hat", "k-hat", "error", "good"]
    good = of([0.1, 0.2, 0.1, 0.1], [0.3, 0.2, 0.3, 0.2])
    assert not good.warnings
    assert "of the draws, at these data" in good.table()
