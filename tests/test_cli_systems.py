"""Every command on every system: right and useful, or refused in one clear sentence with status 2."""

import csv
import json

import matplotlib.image
import numpy as np
import pytest
import torch

from inference import load_run
from inference.cli import run
from inference.training.display import metrics_line
from inference.views.bounds import decompose
from tests.test_cli import refuse, succeed

TINY = ["--epochs", "1", "--batch-size", "750", "--threads", "1"]
CHOICES = {
    "ae": ["--hidden", "8", "--latent-dim", "3"],
    "hvae": ["--pair", "latent_dims=[4,3]", "--pair", "hidden=[[8],[8]]"],
    "categorical-vae": ["--hidden", "8", "--pair", "num_latents=2", "--pair", "num_classes=3"],
    "vq-vae": ["--hidden", "8", "--pair", "num_latents=2", "--pair", "num_codes=4"],
    "ddpm": ["--hidden", "8", "--pair", "num_timesteps=12"],
    "d3pm": ["--hidden", "8", "--pair", "num_timesteps=12"],
}
DIFFUSIONS = ("ddpm", "d3pm")
POINTS = ("ae", "vq-vae")
FEW = ["--num-data", 12, "--force"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A RUN of one epoch of each system, made by the command itself, on demand."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def of(system):
        if system not in made:
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            try:
                arguments = ["--data", "digits", "--out", str(folder / system), *CHOICES[system], *TINY]
                assert run(["train", system, *arguments]) == 0
            finally:
                torch.set_default_dtype(default)
            made[system] = folder / system
        return made[system]

    return of


def last_row(folder):
    with (folder / "metrics.csv").open() as file:
        return {key: float(value) for key, value in list(csv.DictReader(file))[-1].items()}


@pytest.mark.parametrize("system", DIFFUSIONS)
def test_terms_of_a_diffusion_come_by_t_and_add_up(capsys, runs, system):
    folder = runs(system)
    out = succeed(capsys, "terms", folder, *FEW)
    assert "T = 12" in out
    assert "bits/dim" in out
    record = json.loads((folder / "terms.json").read_text())
    assert record["t"] == list(range(13))
    assert sum(record["loss"]) == pytest.approx(-record["elbo"], rel=1e-9)
    assert sum(record["loss"][1:]) == pytest.approx(record["rate"], rel=1e-9)
    assert record["bits_per_dim"] == pytest.approx(-record["elbo"] / (64 * np.log(2)))
    assert matplotlib.image.imread(folder / "figures" / "terms.png").std() > 0


def test_an_autoencoder_is_said_to_bound_nothing(capsys, tmp_path):
    """Neither an ELBO nor a rate, bits or a collapse is claimed of what has no p(z); its twin, the VAE, has them all."""
    shown = {}
    for system in ("ae", "vae"):
        arguments = ["--data", "digits", "--out", tmp_path / system, *CHOICES["ae"], *TINY]
        assert run(["train", system, *map(str, arguments)]) == 0
        printed = capsys.readouterr()
        final = printed.out.strip().splitlines()[-2]
        header, row = printed.err.splitlines()[2:4]
        card = (tmp_path / system / "report.html", run(["report", str(tmp_path / system)]))[0].read_text()
        capsys.readouterr()
        shown[system] = (final.split(" on ")[0], "bits/dim" in final, "-loss" in header, row.split().count("-"))
        assert ("minus the loss, validation" in card) == (system == "ae")
        assert ("−ELBO by dimension" in card) == (system == "vae")
    assert shown == {"ae": ("minus the loss", False, True, 2), "vae": ("ELBO", True, False, 0)}


@pytest.mark.parametrize(
    ("system", "said"),
    [
        ("ae", "no p\\(z\\)"),
        ("hvae", "site z_2: .* of 3 units|COLLAPSED, none of 3 units"),
        ("vq-vae", "codebook perplexity"),
        ("categorical-vae", "of at most M log K = 2.20 nats"),
    ],
)
def test_terms_say_what_the_terms_do_not(capsys, runs, system, said):
    import re

    out = succeed(capsys, "terms", runs(system), "--particles", 10, *FEW)
    assert re.search(said, out)
    assert any(re.search(said, remark) for remark in json.loads((runs(system) / "terms.json").read_text())["remarks"])


def test_a_guide_of_points_is_drawn_twice_and_no_number_depends_on_it(runs):
    opened = load_run(runs("vq-vae"))
    x = opened.data().test[:5]
    two, many = decompose(opened.pair, x), decompose(opened.pair, x, 50)
    assert (two.num_particles, many.num_particles) == (2, 50)
    torch.testing.assert_close(two.elbo, many.elbo, rtol=1e-12, atol=0)


@pytest.mark.parametrize("system", list(CHOICES))
def test_samples_are_a_picture_and_depend_on_the_seed(capsys, runs, system, tmp_path):
    pictures = []
    for i, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{i}.npz"
        succeed(capsys, "sample", runs(system), "-n", 9, "--out", out, "--seed", seed)
        pictures.append(np.load(out)["x"])
    assert pictures[0].shape == (9, 8, 8)
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()
    words = succeed(capsys, "sample", runs(system), "-n", 9, "--out", tmp_path / "x.png")
    assert ("the model's own law" in words) == (system in DIFFUSIONS)
    assert matplotlib.image.imread(tmp_path / "x.png").std() > 0


def test_fewer_steps_and_less_noise_are_named(capsys, runs, tmp_path):
    options = ["--steps", 4, "--eta", 0.5, "--film", tmp_path / "film.png"]
    out = succeed(capsys, "sample", runs("ddpm"), "--out", tmp_path / "x.png", *options)
    assert "not the model's own law: respaced to 4 of 12 steps, DDIM with eta = 0.5" in out
    assert (tmp_path / "film.png").is_file()
    out = succeed(capsys, "sample", runs("ddpm"), "--out", tmp_path / "z.png", "--clip", -0.5, 0.5)
    assert "not the model's own law: x_0-hat clipped to [-0.5, 0.5]" in out
    refuse(
        capsys, "sample", runs("d3pm"), "--out", tmp_path / "y.png", "--clip", -1, 1, match="--clip with a ddpm only"
    )
    refuse(capsys, "sample", runs("ddpm"), "--out", tmp_path / "y.png", "--clip", 1, -1, match="with low < high")
    refuse(capsys, "sample", runs("ddpm"), "--out", tmp_path / "y.png", "--steps", 13, match="at most T = 12, got 13")
    for system in ("d3pm", "hvae"):
        refuse(capsys, "sample", runs(system), "--out", tmp_path / "y.png", "--steps", 4, match="with a ddpm only, got")
    assert not (tmp_path / "y.png").exists()


@pytest.mark.parametrize("system", ["ddpm", "d3pm", "hvae", "ae"])
def test_how_samples_come_about_is_drawn_where_there_is_a_chain(capsys, runs, system, tmp_path):
    call = ["sample", runs(system), "--out", tmp_path / "x.png", "--film", tmp_path / "film.png"]
    if system == "ae":
        refuse(capsys, *call, match="expected --film with a diffusion or several latent layers, got AutoEncoder")
        return
    out = succeed(capsys, *call)
    assert ("of the coarse" in out) == (system == "hvae")
    assert matplotlib.image.imread(tmp_path / "film.png").std() > 0


def test_evidence_is_exact_where_latents_can_be_summed_over(capsys, runs):
    folder = runs("categorical-vae")
    out = succeed(capsys, "evidence", folder, "--particles", 2000, *FEW)
    assert "summed over all 3^2 values of z" in out
    record = json.loads((folder / "evidence.json").read_text())
    assert record["elbo"] < record["log_evidence"] <= record["exact_log_evidence"] + 6 * record["std_error"]


@pytest.mark.parametrize("system", DIFFUSIONS)
def test_evidence_of_a_diffusion_is_its_bound_and_says_so(capsys, runs, system):
    out = succeed(capsys, "evidence", runs(system), *FEW)
    assert "a lower bound" in out
    record = json.loads((runs(system) / "evidence.json").read_text())
    assert record["bound"] == "lower: the ELBO"
    assert "log_evidence" not in record
    refuse(capsys, "evidence", runs(system), "--gaps", *FEW, match="no --se, --gaps or --ladder for a diffusion")


@pytest.mark.parametrize(
    ("command", "system", "match"),
    [
        ("evidence", "ae", "it has no p\\(x\\) to estimate"),
        ("evidence", "vq-vae", "got VQVAE, whose guide is one point for each datum"),
        *(("posterior", system, "whose guide is one point for each datum") for system in POINTS),
        *(("calibrate", system, "whose guide is one point for each datum") for system in POINTS),
        *(("posterior", system, "whose guide is the fixed process q\\(x_t \\| x_0\\)") for system in DIFFUSIONS),
        *(("calibrate", system, "whose guide is the fixed process q\\(x_t \\| x_0\\)") for system in DIFFUSIONS),
    ],
)
def test_what_has_no_meaning_is_refused(capsys, runs, command, system, match):
    refuse(capsys, command, runs(system), match=match)


def test_the_posterior_shows_every_layer(capsys, runs):
    out = succeed(capsys, "posterior", runs("hvae"), "--num-samples", 20, "--num-data", 3, "--force")
    assert "z_2[0, 0]" in out
    assert "z_1[0, 0]" in out


@pytest.mark.parametrize("system", list(CHOICES))
def test_a_trace_fits_on_a_page(capsys, runs, system):
    out = succeed(capsys, "trace", runs(system))
    assert "flowchart TD" in out
    assert len(out.splitlines()) < 45
    if system in DIFFUSIONS:
        assert "x_10 .. x_2" in out
        assert "9 more such KLs" in out


@pytest.mark.parametrize(
    "system",
    [pytest.param(name, marks=() if name in ("hvae", "d3pm") else pytest.mark.slow) for name in CHOICES],
)
def test_a_report_has_what_suits_the_system(capsys, runs, system):
    folder = runs(system)
    out = succeed(capsys, "report", folder, "--particles", 10, *FEW)
    page, files = (folder / "report.html").read_text(), {path.name for path in (folder / "figures").iterdir()}
    assert {"learning_curve.svg", "terms.svg", "samples.png"} <= files
    assert ("film.png" in files) == (system in DIFFUSIONS)
    assert ("progressive.png" in files) == (system == "hvae")
    assert ("posterior.png" in files) == (system in ("hvae", "categorical-vae"))
    assert ("reconstructions.png" in files) == (system not in DIFFUSIONS)
    assert ("codebook perplexity" in page) == (system == "vq-vae")
    assert "report.html" in out


def test_rates_come_by_layer_and_add_up(runs):
    row = last_row(runs("hvae"))
    for part in ("train", "validation"):
        by_layer = [row[f"{part}_rate_{site}"] for site in ("z_2", "z_1")]
        assert sum(by_layer) == pytest.approx(row[f"{part}_rate"], rel=1e-6)
        assert min(by_layer) != max(by_layer)
    assert not [key for key in last_row(runs("ddpm")) if key.startswith("train_rate_x")]


def test_a_collapsed_layer_is_named_at_the_end_of_training_and_an_active_one_is_not(capsys, tmp_path):
    from inference import fit
    from inference.training.datasets import DataSet
    from ppl_models.linear_gaussian import LinearGaussian

    for weight, collapsed in ((0.0, True), (2.0, False)):
        pair = LinearGaussian(torch.tensor([[weight], [0.0]]), torch.zeros(2), noise_scale=1.0)
        data = DataSet("points", pair.model(size=200).detach())
        fit(pair, data, epochs=1, learning_rate=1e-9, progress=True)
        assert ("COLLAPSED, none of 1 units is active" in capsys.readouterr().err) == collapsed


def test_large_figures_keep_apart():
    row = {"epoch": 2, "train_elbo": -29560.54, "validation_elbo": -29049.54, "validation_std_error": 882.42}
    row |= {"validation_rate": 29000.02, "validation_distortion": 49.52, "validation_bits_per_dim": 654.838}
    assert len(metrics_line(row | {"active_units": 0}, 2, 14.0, 0.0).split()) == 10
