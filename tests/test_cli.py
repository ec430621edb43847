"""The command line as its users meet it: what it writes, what it refuses and how, and with which exit status."""

import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from inference import load_posterior, load_run
from inference.cli import app, run
from inference.commands import demo, looking
from inference.commands.choices import build_pair, choose
from inference.commands.options import TrainOptions, gather_options
from inference.training.divergence import TrainingDiverged
from inference.training.storage import StorageError
from inference.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
TINY = ["--hidden", "16", "--latent-dim", "3", "--epochs", "1", "--threads", "1"]
COMMANDS = [
    "train",
    "evidence",
    "calibrate",
    "terms",
    "sample",
    "posterior",
    "trace",
    "report",
    "data",
    "models",
    "demo",
]


def call(capsys, *arguments):
    """Exit status, stdout and stderr of one call."""
    capsys.readouterr()
    status = run([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def succeed(capsys, *arguments):
    status, out, err = call(capsys, *arguments)
    assert status == 0, err
    return out


def refuse(capsys, *arguments, match, status=2):
    got, _, err = call(capsys, *arguments)
    assert got == status, err
    assert re.fullmatch(r"ppl: [^\n]+\n", err), f"expected exactly one line, got {err!r}"
    assert re.search(match, err), err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A RUN of one epoch on the digits, made by the command itself."""
    folder = tmp_path_factory.mktemp("runs") / "vae"
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # as in every test; the data's fingerprint depends on it
    try:
        assert run(["train", "vae", "--data", "digits", "--out", str(folder), *TINY]) == 0
    finally:
        torch.set_default_dtype(default)
    return folder


# --- help --------------------------------------------------------------------------------------------------------------


def test_help_answers_without_torch():
    code = f"""
import sys
from inference.cli import run
assert run(["--help"]) == run([]) == run(["--version"]) == 0
for command in {COMMANDS}:
    assert run([command, "--help"]) == 0, command
heavy = {{"torch", "pyro", "matplotlib", "arviz_base", "sklearn", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"ppl {command}" in done.stdout


def test_every_option_says_what_it_is_for(capsys):
    assert {command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)
    for command in COMMANDS:
        out = succeed(capsys, command, "--help")
        assert not re.search(r"│\s+-{1,2}[a-z-]+(\s+-[a-z])?\s+(<\w+>|[A-Z.,=]+)\s+│", out), out
    assert "E[x | z]" in succeed(capsys, "sample", "--help"), "brackets in help texts are text, not markup"


# --- the tour ----------------------------------------------------------------------------------------------------------


def test_train_leaves_a_run_that_loads(trained):
    again = load_run(trained)
    assert [row["epoch"] for row in again.metrics] == [1.0]
    assert again.config["data"]["spec"] == "digits"
    assert again.config["pair"]["likelihood"] == {"class": "DiscretizedNormal", "levels": 17, "scale": "default"}


def test_train_prints_what_it_chose_and_what_came_out(capsys, tmp_path):
    out = succeed(
        capsys, "train", "vae", "--data", "two_moons", "--out", tmp_path / "run", "--set", "batch_size=4000", *TINY
    )
    text, _, result = out.partition("\n\n")
    chosen = yaml.safe_load(text)
    assert (chosen["likelihood"], chosen["scaling"], chosen["latent_dim"]) == ("normal", "none", 3)
    last = load_run(tmp_path / "run").metrics[-1]
    assert f"{last['validation_elbo']:.2f} +- {last['validation_std_error']:.2f} nats" in result


def test_terms(capsys, trained):
    call_ = ("terms", trained, "--particles", "100", "--num-data", "20")
    out = succeed(capsys, *call_)
    assert "the first 20 of 297 held-out data of digits" in out
    record = json.loads((trained / "terms.json").read_text())
    terms = record["terms"]
    assert list(terms) == ["z", "x", "ELBO"]
    assert terms["ELBO"]["best"] == pytest.approx(terms["z"]["closed_form"] + terms["x"]["monte_carlo"])
    assert terms["x"]["closed_form"] is None
    assert f"{terms['z']['closed_form']:.4f}" in out
    assert "holds these figures" in succeed(capsys, *call_), "the same call gives the same figures"

    before = (trained / "terms.json").read_bytes()
    assert "left as it is" in succeed(capsys, *call_, "--seed", "1")
    assert (trained / "terms.json").read_bytes() == before
    succeed(capsys, *call_, "--seed", "1", "--force")
    assert (trained / "terms.json").read_bytes() != before


def test_terms_on_other_data(capsys, trained, tmp_path):
    np.savez(tmp_path / "other.npz", train=np.full((3, 8, 8), 16, np.uint8), levels=17)
    out = succeed(capsys, "terms", trained, "--particles", "10", "--data", f"npz:{tmp_path / 'other.npz'}")
    assert "3 data of npz:" in out


def test_sample_to_a_picture_and_to_arrays(capsys, trained, tmp_path):
    picture, arrays = tmp_path / "grid.png", tmp_path / "draws.npz"
    succeed(capsys, "sample", trained, "-n", "9", "--out", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    succeed(capsys, "sample", trained, "-n", "1500", "--out", arrays)
    with np.load(arrays) as stored:
        assert stored["x"].shape == stored["mean"].shape == (1500, 8, 8)
        levels = (stored["x"] + 1) * 8
        assert np.abs(levels - levels.round()).max() < 1e-9, "samples lie on the 17 levels"
        assert stored["x"].std() > stored["mean"].std()
    first = arrays.read_bytes()
    succeed(capsys, "sample", trained, "-n", "1500", "--out", arrays, "--force")
    assert arrays.read_bytes() == first, "the same seed gives the same file"


def test_posterior_is_a_datatree_of_arviz(capsys, trained, tmp_path):
    file, picture = tmp_path / "post.nc", tmp_path / "forest.png"
    options = ("--num-samples", "50", "--num-data", "4", "--figure", picture)
    out = succeed(capsys, "posterior", trained, "--out", file, *options)
    tree = load_posterior(file)
    assert dict(tree["posterior"]["z"].sizes) == {"sample": 50, "data": 4, "z_dim_0": 3}
    assert tree["observed_data"]["x"].dims == ("data", "row", "column")
    assert "z[0, 2]" in out
    assert "eti89" in out or "sd" in out
    assert picture.stat().st_size > 1000


def test_trace_shows_programs_and_graph(capsys, trained, tmp_path):
    out = succeed(capsys, "trace", trained)
    assert re.search(r"^z +data: 4 .*Normal", out, re.MULTILINE)
    assert "flowchart TD" in out
    assert "-.->" in out


def test_trace_writes_the_graph_where_graphviz_is(capsys, trained, tmp_path, monkeypatch):
    from inference.views import programs

    monkeypatch.setattr(programs, "graph_svg", lambda *_: b"<svg/>")
    succeed(capsys, "trace", trained, "--svg", tmp_path / "graph.svg")
    assert (tmp_path / "graph.svg").read_bytes() == b"<svg/>"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    refuse(capsys, "trace", trained, "--svg", tmp_path / "other.svg", match="Graphviz's dot program.*install graphviz")


def test_report(capsys, trained):
    out = succeed(capsys, "report", trained, "--particles", "10", "--num-data", "20")
    assert (trained / "report.html").is_file()
    named = [Path(line.removeprefix("wrote ")) for line in out.splitlines()]
    assert all(path.is_file() for path in named)
    assert {path.suffix for path in named} == {".html", ".svg", ".png"}
    refuse(capsys, "report", trained, match=r"report.html, but it exists: replace it with --force")


def test_lists(capsys):
    out = succeed(capsys, "data")
    for spec in ("digits", "two_moons", "mnist:FOLDER", "npz:FILE", "images:FOLDER"):
        assert re.search(rf"^{spec} ", out, re.MULTILINE), spec
    assert re.search(r"^digits +image +8 x 8 +1500 +297 +17 ", out, re.MULTILINE)
    out = succeed(capsys, "models")
    assert re.search(r"^vae +Gaussian VAE", out, re.MULTILINE)
    assert re.search(r"^discretized_normal +symmetric", out, re.MULTILINE)


def test_demo_goes_through_all_of_it(capsys, tmp_path, monkeypatch):
    for name, options in (
        ("terms", {"particles": 20, "num_data": 20}),
        ("posterior", {"num_samples": 20, "num_data": 3}),
        ("report", {"particles": 10, "num_data": 20}),
    ):
        monkeypatch.setattr(demo, name, partial(getattr(looking, name), **options))
    folder = tmp_path / "runs" / "demo"
    out = succeed(capsys, "demo", "--epochs", "1", "--out", folder)
    for command in ("train", "trace", "terms", "posterior", "report", "sample"):
        assert f"$ ppl {command} " in out
    for file in ("terms.json", "posterior.nc", "report.html", "figures/new_digits.png", "model/model.safetensors"):
        assert (folder / file).is_file(), file
    stated = re.findall(r"--set (\S+)", out)
    assert gather_options({"data": "digits"}, stated).batch_size == load_run(folder).config["train"]["batch_size"] == 64


def test_demo_makes_anew_only_what_it_made(capsys, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_tour", lambda out, epochs: None)
    folder = tmp_path / "demo"
    shutil.copytree(trained, folder)
    (folder / "notes.txt").write_text("mine")
    refuse(capsys, "demo", "--out", folder, match="holds a run.*--out.*--force")
    assert (folder / "metrics.csv").is_file()
    succeed(capsys, "demo", "--out", folder, "--force")
    assert {path.name for path in folder.iterdir()} <= {"notes.txt", ".lock"}


# --- the same call, the same numbers -----------------------------------------------------------------------------------


def test_the_seed_decides_everything(capsys, trained, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        succeed(capsys, "train", "vae", "--data", "digits", "--out", tmp_path / name, *TINY, "--seed", seed)
    weights = "model/model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() == (trained / weights).read_bytes()
    assert (tmp_path / "same" / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()
    assert (tmp_path / "other" / weights).read_bytes() != (trained / weights).read_bytes()


def test_the_seed_decides_the_initial_weights_and_nothing_else_does():
    options, data = choose("vae", TrainOptions(data="digits", hidden=(4,)))
    first, again = (torch.cat([p.flatten() for p in build_pair("vae", options, data).parameters()]) for _ in range(2))
    other = build_pair("vae", options.model_copy(update={"seed": 1}), data)
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.cat([p.flatten() for p in other.parameters()]))


def test_resume_wants_the_same_configuration(capsys, trained):
    call_ = ("train", "vae", "--data", "digits", "--out", trained)
    refuse(capsys, *call_, *TINY, match="already holds a run.*--resume")
    assert "at epoch 1 " in succeed(capsys, *call_, *TINY, "--resume")
    options = (trained / "options.yaml").read_bytes()
    refuse(capsys, *call_, *TINY, "--resume", "--set", "batch_size=64", match=r"batch_size was 128, is 64")
    assert (trained / "options.yaml").read_bytes() == options


def test_resume_may_go_on_for_more_epochs(capsys, trained, tmp_path):
    folder = tmp_path / "longer"
    shutil.copytree(trained, folder)
    out = succeed(capsys, "train", "vae", "--out", folder, "--resume", "--epochs", "2")
    assert "at epoch 2 " in out
    assert gather_options({}, [], folder / "options.yaml").epochs == 2
    assert len(load_run(folder).metrics) == 2
    succeed(capsys, "train", "vae", "--out", folder, "--resume")  # nothing is left to do


def test_resume_of_no_run_or_of_another_system_is_refused(capsys, trained, tmp_path):
    refuse(
        capsys,
        "train",
        "vae",
        "--out",
        tmp_path / "none",
        "--resume",
        match="expected a run to resume in .*none.*--data",
    )
    assert not (tmp_path / "none").exists()
    refuse(capsys, "train", "hvae", "--out", trained, "--resume", match="is a run of VAE, not of hvae")


def test_a_run_goes_on_with_the_weights_that_it_has(capsys, trained, tmp_path):
    call_ = ("train", "vae", "--data", "digits", "--out", tmp_path / "run", *TINY)
    succeed(capsys, *call_, "--start-from", trained)
    options = tmp_path / "run" / "options.yaml"
    again = ("train", "vae", "--out", tmp_path / "run", "--resume")
    refuse(
        capsys, *again, "--start-from", tmp_path / "other", match=f"start_from: .*run began with {trained}, and goes on"
    )
    assert gather_options({}, [], options).start_from == str(trained)
    for same in ((*again, "--start-from", trained), (*call_, "--resume")):
        succeed(capsys, *same)
        assert gather_options({}, [], options).start_from == str(trained)
    refuse(capsys, *call_[:5], trained, "--resume", "--start-from", trained, match="began with weights of its own")


def test_weights_of_a_run_on_data_of_another_scaling_are_warned_of(capsys, tmp_path):
    def train_on(scale, scaling, *more):
        name = f"{scale}-{scaling}"
        rows = "\n".join(f"{scale * i},{i % 7}" for i in range(60))
        (tmp_path / f"{scale}.csv").write_text(f"a,b\n{rows}\n")
        out = ("--out", tmp_path / name, "--scaling", scaling, "--test-fraction", "0.2", *TINY[:2], *TINY[4:])
        return call(capsys, "train", "vae", "--data", f"csv:{tmp_path / f'{scale}.csv'}", *out, *more)

    assert train_on(1, "standard")[0] == 0
    first = ("--start-from", tmp_path / "1-standard")
    assert "start_from" not in train_on(1, "standard", *first, "--out", tmp_path / "again")[2]
    assert "data.scaling was standard, is none" in train_on(1, "none", *first)[2]
    assert "standardization was by another mean" in train_on(3, "standard", *first)[2]


def test_a_run_has_its_options_from_the_start_and_a_refused_one_leaves_nothing(capsys, tmp_path, monkeypatch):
    call_ = ("train", "vae", "--data", "digits", *TINY, "--out", tmp_path / "run")
    refuse(capsys, *call_, "--device", "cuda", match="device")
    assert not (tmp_path / "run").exists()

    def at_the_first_step(_, indices, x):
        assert gather_options({}, [], tmp_path / "run" / "options.yaml").epochs == 1
        raise TrainingDiverged("seen")

    monkeypatch.setattr(Trainer, "_step", at_the_first_step)
    assert call(capsys, *call_)[0] == 1
    assert (tmp_path / "run" / "options.yaml").is_file()  # of a run that began, it stays


# --- what the data decide ----------------------------------------------------------------------------------------------


def write_mnist(folder):
    """Four idx files with six images of 4 x 4."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images = struct.pack(">4B3I", 0, 0, 8, 3, 6, 4, 4) + rng.integers(0, 256, 96, dtype=np.uint8).tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 6) + bytes(range(6)))
    return folder


CHOICES = {
    "digits": ({"data": "digits"}, ("discretized_normal", "symmetric", "none", 16, 17)),
    "toy": ({"data": "rings"}, ("normal", "none", "none", 2, None)),
    "mnist": ({"data": "mnist:{mnist}"}, ("bernoulli", "unit", "dynamic", 16, 256)),
    "mnist otherwise": (
        {"data": "mnist:{mnist}", "likelihood": "categorical"},
        ("categorical", "classes", "none", 16, 256),
    ),
    "counts": ({"data": "npz:{counts}"}, ("discretized_normal", "symmetric", "none", 16, 256)),
    "bits": ({"data": "npz:{bits}"}, ("bernoulli", "unit", "none", 2, 2)),
    "floats": ({"data": "npz:{floats}", "likelihood": "normal"}, ("normal", "none", "none", 2, None)),
    "stated": (
        {"data": "digits", "likelihood": "normal", "scaling": "unit", "latent_dim": 5},
        ("normal", "unit", "none", 5, 17),
    ),
    "binarised": (
        {"data": "digits", "likelihood": "bernoulli", "binarization": "fixed"},
        ("bernoulli", "unit", "fixed", 16, 17),
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Good data files by name."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    np.savez(folder / "counts.npz", train=rng.integers(0, 256, (6, 4, 4), dtype=np.uint8))
    np.savez(folder / "bits.npz", train=rng.integers(0, 2, (6, 5), dtype=np.uint8))
    np.savez(folder / "floats.npz", train=rng.normal(size=(6, 3)))
    paths = {name: folder / f"{name}.npz" for name in ("counts", "bits", "floats")}
    return {**paths, "mnist": write_mnist(folder / "mnist")}


@pytest.mark.parametrize(("stated", "expected"), CHOICES.values(), ids=CHOICES)
def test_what_is_not_stated_is_chosen_from_the_data(stated, expected, files):
    options, data = choose("vae", TrainOptions(**{**stated, "data": stated["data"].format(**files)}))
    chosen = (options.likelihood, options.scaling, options.binarization, options.latent_dim, data.levels)
    assert chosen == expected
    assert (data.scaling, data.binarization) == (options.scaling, options.binarization)
    pair = build_pair("vae", options, data)
    if options.binarization != "dynamic":  # whose training data stay grey until they are used
        pair.check_data(data.train)


def test_a_run_finds_its_data_from_any_folder(capsys, files, tmp_path, monkeypatch):
    monkeypatch.chdir(files["mnist"].parent)
    succeed(capsys, "train", "vae", "--data", "mnist:mnist", "--out", tmp_path / "run", *TINY)
    monkeypatch.chdir(tmp_path)
    assert "6 held-out data of mnist:" in succeed(capsys, "terms", tmp_path / "run", "--particles", "5")


def test_a_table_with_a_part_held_out_standardised(tmp_path, capsys):
    """From a CSV file to samples in its own units: columns of very different sizes, labels in one of them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 2)) * [1e-3, 1e3] + [0.0, 5e4]
    rows = "".join(f"{float(a)!r},{float(b)!r},{'yes' if a > 0 else 'no'}\n" for a, b in x)
    (tmp_path / "t.csv").write_text("a,b,kind\n" + rows)
    options = ["--scaling", "standard", "--test-fraction", "0.25", "--hidden", "4", "--epochs", "3"]
    run = tmp_path / "run"
    out = succeed(capsys, "train", "vae", "--data", f"csv:{tmp_path / 't.csv'}@kind", *options, "--out", run)
    assert "of standardised data: add " in out
    out = succeed(capsys, "terms", run, "--particles", "10")
    assert re.search(r"20 held-out data of csv:.*t\.csv@kind, standardised \(add -?\d+\.\d\d nats a datum", out)
    succeed(capsys, "sample", run, "--out", tmp_path / "draws.npz", "-n", "50")
    drawn = np.load(tmp_path / "draws.npz")["x"]
    assert np.all(np.abs(drawn.mean(0) - x.mean(0)) < 5 * x.std(0))  # standardised ones have a mean near 0, not 50,000
    np.save(tmp_path / "other.npy", x[:7])
    out = succeed(capsys, "terms", run, "--particles", "10", "--data", f"npz:{tmp_path / 'other.npy'}")
    assert "7 data of npz:" in out


def test_data_that_changed_since_are_refused(capsys, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", train=rng.integers(0, 2, (6, 5), dtype=np.uint8))
    succeed(capsys, "train", "vae", "--data", f"npz:{tmp_path / 'x.npz'}", "--out", tmp_path / "run", *TINY)
    succeed(capsys, "trace", tmp_path / "run")
    np.savez(tmp_path / "x.npz", train=rng.integers(0, 2, (6, 5), dtype=np.uint8))
    refuse(capsys, "trace", tmp_path / "run", match="trained on, but npz:.* holds other values now; put them back")


def test_training_data_under_dynamic_binarisation_are_looked_at_as_bits(capsys, files, tmp_path):
    stated = ("--likelihood", "bernoulli", "--binarization", "dynamic")
    succeed(capsys, "train", "vae", "--data", f"npz:{files['counts']}", *stated, "--out", tmp_path / "run", *TINY)
    assert "6 training data" in succeed(capsys, "terms", tmp_path / "run", "--particles", "5")


# --- options -----------------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("data: rings\nepochs: 5\nhidden: [8, 4]\n")
    options = gather_options({"epochs": 7, "seed": None}, ["patience=null", "learning_rate=1e-2"], file)
    assert (options.data, options.epochs, options.hidden, options.learning_rate) == ("rings", 7, (8, 4), 0.01)


def test_the_printed_configuration_is_a_configuration_file(tmp_path):
    options, _ = choose("vae", TrainOptions(data="digits", ema=0.9, hidden="7,5"))
    (tmp_path / "options.yaml").write_text(options.text())
    assert gather_options({}, [], tmp_path / "options.yaml") == options


# --- refusals: one line, status 2 --------------------------------------------------------------------------------------

TRAIN = ["train", "vae", "--out", "{new}"]
BAD_CALLS = {
    "no such command": (["evaluate"], "No such command 'evaluate'.*see ppl --help"),
    "no such option": (["terms", "{run}", "--particle", "5"], "No such option.*--particles.*see ppl terms --help"),
    "missing argument": (["terms"], "Missing argument 'RUN'"),
    "missing option": (["train", "vae", "--data", "digits"], "Missing option '--out'"),
    "not a number": ([*TRAIN, "--epochs", "many"], "'--epochs': Input should be a valid integer.*see ppl train --help"),
    "out of range": (
        ["terms", "{run}", "--particles", "1"],
        "'--particles': Input should be greater than or equal to 2",
    ),
    "no such system": (["train", "gan", "--data", "digits", "--out", "{new}"], "system among ae, vae, .*got 'gan'"),
    "no data": (TRAIN, "data: expected --data.*`ppl data`"),
    "unknown data": ([*TRAIN, "--data", "digit"], "expected one of digits, .*got 'digit'; `ppl data` lists them"),
    "unknown likelihood": (
        [*TRAIN, "--data", "digits", "--likelihood", "gumbel"],
        "likelihood: input should be 'bernoulli'.*got 'gumbel'",
    ),
    "likelihood of another system": (
        ["train", "d3pm", "--out", "{new}", "--data", "digits", "--likelihood", "bernoulli"],
        "likelihood: expected a Categorical likelihood, got Bernoulli",
    ),
    "epochs 0": ([*TRAIN, "--data", "digits", "--epochs", "0"], "epochs: .*greater than or equal to 1, got 0"),
    "odd widths": (
        [*TRAIN, "--data", "digits", "--hidden", "8,-1"],
        "hidden: expected widths in 1..1000000 .*got 8,-1",
    ),
    "endless seed": ([*TRAIN, "--data", "digits", "--seed", "99999999999999999999"], "seed"),
    "endless width": ([*TRAIN, "--data", "digits", "--latent-dim", "1000000000000"], "latent_dim"),
    "endless threads": ([*TRAIN, "--data", "digits", "--threads", "100000"], "threads"),
    "endless processes": ([*TRAIN, "--data", "digits", "--set", "processes=100"], "processes"),
    "unknown key": ([*TRAIN, "--data", "digits", "--set", "epoch=3"], "epoch: no such option; did you mean epochs\\?"),
    "no key": ([*TRAIN, "--data", "digits", "--set", "epochs"], "--set: expected key=value, got 'epochs'"),
    "given twice": (
        [*TRAIN, "--data", "digits", "--epochs", "3", "--set", "epochs=4"],
        "epochs: given twice on the command line",
    ),
    "no CUDA here": ([*TRAIN, "--data", "digits", "--device", "cuda"], "expected a CUDA device.*use auto or cpu"),
    "no such file": (
        [*TRAIN, "--data", "digits", "--config", "{new}.yaml"],
        r"cannot read .*new\.yaml.*check the name",
    ),
    "yaml tag": (
        [*TRAIN, "--data", "digits", "--config", "{folder}/tag.yaml"],
        r"tag\.yaml has the tag .*expected plain data",
    ),
    "a run's record as options": (
        [*TRAIN, "--config", "{run}/config.yaml"],
        r"expected a file of options, got the record of a run: options\.yaml beside it is one",
    ),
    "a file without its kind": ([*TRAIN, "--data", "{folder}/plain.npz"], r"did you mean npz:.*plain\.npz\?"),
    "another kind of file": ([*TRAIN, "--data", "{folder}/tag.yaml"], r"numpy\.savez\(FILE, train=x\) writes an array"),
    "a folder without its kind": ([*TRAIN, "--data", "{folder}"], "a folder of images is images:"),
    "no kind at all": ([*TRAIN, "--data", "foo:bar"], "got 'foo:bar'"),
    "no array": (
        [*TRAIN, "--data", "npz:{folder}/cut.npy"],
        r"cut\.npy: header states \[2, 3\] float64, 48 bytes, found 40",
    ),
    "words in a table": ([*TRAIN, "--data", "csv:{folder}/words.csv"], r"words\.csv: column 'b', row 1: .*got 'x'"),
    "a held-out part twice": ([*TRAIN, "--data", "digits", "--test-fraction", "0.1"], "digits has a held-out part"),
    "standardised levels": ([*TRAIN, "--data", "digits", "--scaling", "standard"], "'standard' is for continuous data"),
    "mnist without a folder": ([*TRAIN, "--data", "mnist:"], "data: expected one of digits"),
    "normal of counts": (
        [*TRAIN, "--data", "digits", "--likelihood", "normal"],
        "scaling: expected to be stated for a normal .*17 levels.*--scaling unit",
    ),
    "grey under Bernoulli": (
        [*TRAIN, "--data", "digits", "--likelihood", "bernoulli"],
        "exact 0 or 1 under a Bernoulli likelihood, but train.* is 0.* state a binarisation",
    ),
    "unscaled under Bernoulli": (
        [*TRAIN, "--data", "digits", "--likelihood", "bernoulli", "--scaling", "none"],
        "look like integer grey levels",
    ),
    "other scaling": (
        [*TRAIN, "--data", "digits", "--scaling", "unit"],
        r'one of 17 evenly spaced values in \[-1, 1\].*need scaling "symmetric"',
    ),
    "bins of continuous data": (
        [*TRAIN, "--data", "rings", "--likelihood", "discretized_normal"],
        "likelihood: .*discretized_normal, which needs a number of levels; use --likelihood normal",
    ),
    "not a run": (["terms", "{folder}"], r"expected a RUN folder with a config\.yaml"),
    "no such run": (["report", "{new}"], r"expected a RUN folder with a config\.yaml"),
    "other shape": (
        ["terms", "{run}", "--data", "two_moons"],
        r"(data of shape \[8, 8\]|continuous data have scaling)",
    ),
    "odd suffix": (["sample", "{run}", "--out", "{folder}/a.gif"], r"ending in \.png or .*got 'a.gif'"),
    "no folder": (["sample", "{run}", "--out", "{folder}/no/a.png"], "expected an existing folder for a.png"),
    "file there": (["sample", "{run}", "--out", "{folder}/there.png"], r"there\.png exists: .*--force"),
    "too many tiles": (["sample", "{run}", "-n", "2000", "--out", "{folder}/a.png"], r"at most 1024 .*\.npz"),
    "posterior there": (["posterior", "{run}", "--out", "{folder}/there.nc"], r"there\.nc exists"),
}


@pytest.fixture
def places(tmp_path, trained):
    """Where bad calls point to: a run, a folder with files in the way, a name that is free."""
    for name in ("there.png", "there.nc"):
        (tmp_path / name).write_text("kept")
    (tmp_path / "tag.yaml").write_text("epochs: !!python/object/apply:os.system ['touch pwned']\n")
    np.savez(tmp_path / "plain.npz", train=np.zeros((2, 3)))
    np.save(tmp_path / "cut.npy", np.zeros((2, 3)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    (tmp_path / "words.csv").write_text("a,b\n1,x\n")
    return {"run": trained, "folder": tmp_path, "new": tmp_path / "new"}


@pytest.mark.parametrize(("arguments", "match"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_refused_in_one_line(arguments, match, places, capsys):
    refuse(capsys, *(argument.format(**places) for argument in arguments), match=match)
    assert not places["new"].exists(), "nothing was begun"
    assert (places["folder"] / "there.png").read_text() == "kept"


def _archive(path, name, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)


def _truncated_mnist(path):
    images = write_mnist(path) / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-7])


GREY = np.arange(12, dtype=np.float64).reshape(3, 4)
NORMAL = ["--likelihood", "normal"]
BAD_FILES = {
    "NaN": (lambda p: np.savez(p, train=np.where(GREY == 5, np.nan, GREY / 10)), NORMAL, r"train\[1, 1\] = nan"),
    "infinity": (lambda p: np.savez(p, train=np.where(GREY == 5, np.inf, GREY / 10)), NORMAL, r"train\[1, 1\] = inf"),
    "no rows": (lambda p: np.savez(p, train=np.zeros((0, 4))), NORMAL, r"expected data \[N, .*got shape \[0, 4\]"),
    "strings": (lambda p: np.savez(p, train=np.array(["a", "b"])), NORMAL, "expected floating point.*got.*dtype <U1"),
    "complex": (lambda p: np.savez(p, train=GREY * 1j), NORMAL, "got an array of dtype complex128"),
    "pickled": (
        lambda p: np.savez(p, train=np.array([object()], dtype=object)),
        NORMAL,
        "pickled objects, which are never loaded",
    ),
    "other test shape": (
        lambda p: np.savez(p, train=GREY / 10, test=np.zeros((3, 5))),
        NORMAL,
        r"test: expected data of shape \[4\], got \[5\]",
    ),
    "unscaled": (lambda p: np.savez(p, train=GREY * 20), NORMAL, "look like unscaled counts"),
    "unstated": (lambda p: np.savez(p, train=GREY / 10), [], "likelihood: expected to be stated for continuous data"),
    "beyond its levels": (lambda p: np.savez(p, train=GREY.astype(int), levels=5), [], "expected counts in 0..4"),
    "0..255 as unit": (
        lambda p: np.savez(p, train=GREY * 20),
        [*NORMAL, "--scaling", "unit"],
        r"scaling 'unit' states values in \[0, 1\]",
    ),
    "labels": (
        lambda p: np.savez(p, train=GREY / 10, train_labels=np.zeros(2, dtype=int)),
        NORMAL,
        r"train_labels: expected one int64 label a datum",
    ),
    "not an archive": (lambda p: p.write_bytes(b"PK\x03\x04 nonsense"), NORMAL, "cannot be read"),
    "missing": (lambda p: None, NORMAL, "cannot be read"),
    "leaves the archive": (lambda p: _archive(p, "../x.npy", b""), NORMAL, "leaves the archive"),
    "other members": (lambda p: _archive(p, "x.pkl", b""), NORMAL, r"is no \.npy array"),
}


@pytest.mark.parametrize(("make", "options", "match"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_in_one_line(make, options, match, tmp_path, capsys):
    make(tmp_path / "x.npz")
    data = ["--data", f"npz:{tmp_path / 'x.npz'}", *options]
    refuse(capsys, "train", "vae", *data, "--out", tmp_path / "run", match=match)
    assert not (tmp_path / "run").exists()


def test_good_files_are_taken(files, tmp_path, capsys):
    succeed(capsys, "train", "vae", "--data", f"npz:{files['floats']}", *NORMAL, "--out", tmp_path / "run", *TINY)


def test_bad_image_folders_and_mnist_are_refused(tmp_path, capsys):
    train = ("train", "vae", "--out", tmp_path / "run", "--data")
    (tmp_path / "empty").mkdir()
    refuse(capsys, *train, f"images:{tmp_path / 'empty'}", match="no png or jpg files")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    refuse(capsys, *train, f"images:{tmp_path / 'bad'}", match="cannot be read as png or jpg")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "a.png").symlink_to(tmp_path / "bad" / "a.png")
    refuse(capsys, *train, f"images:{tmp_path / 'link'}", match="a link that leaves")
    refuse(capsys, *train, f"mnist:{tmp_path / 'empty'}", match="expected train-images-idx3-ubyte")
    _truncated_mnist(tmp_path / "short")
    refuse(capsys, *train, f"mnist:{tmp_path / 'short'}", match="header states.*found 89")


def test_damaged_runs_are_refused(capsys, trained, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    weights = damaged / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refuse(capsys, "terms", damaged, match="SHA-256.*damaged")
    (damaged / "config.yaml").write_text("format: 1\npair: {class: os.system}\n")
    refuse(capsys, "terms", damaged, match="does not describe a pair|expected a class among")
    (damaged / "config.yaml").write_text("format: 1\npair: !!python/name:os.system\n")
    refuse(capsys, "terms", damaged, match="has the tag")


# --- failures of its own: one line, status 1 ---------------------------------------------------------------------------


def fail_with(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("inference.training.runs.load_run", fail)


def test_divergence_is_a_failure(capsys, tmp_path):
    call_ = (
        "train",
        "vae",
        "--data",
        "rings",
        "--out",
        tmp_path / "run",
        *TINY,
        "--epochs",
        "20",
        "--learning-rate",
        "1e9",
    )
    status, _, err = call(capsys, *call_)
    assert status == 1
    assert re.search(r"ppl: expected .* in step \d+", err.splitlines()[-1])
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "status", "match"),
    [
        (KeyError("lost"), 1, "unexpected KeyError: 'lost'; this is a fault of ppl, PPL_DEBUG=1 shows where"),
        (RuntimeError("one\ntwo"), 1, "unexpected RuntimeError: two; "),
        (ValueError("from elsewhere"), 1, "unexpected ValueError: from elsewhere"),
        (StorageError("cannot write x: no space left", OSError(errno.ENOSPC, "")), 1, "^ppl: cannot write x"),
        (StorageError("cannot write x: denied", OSError(errno.EACCES, "")), 2, "^ppl: cannot write x"),
    ],
)
def test_whose_fault_it_is_decides_the_status(error, status, match, capsys, tmp_path, monkeypatch):
    fail_with(monkeypatch, error)
    refuse(capsys, "sample", tmp_path, "--out", tmp_path / "a.png", status=status, match=match)


def test_the_traceback_is_there_on_request(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PPL_DEBUG", "1")
    fail_with(monkeypatch, KeyError("lost"))
    status, _, err = call(capsys, "sample", tmp_path, "--out", tmp_path / "a.png")
    assert status == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("ppl: unexpected KeyError")


# --- signals -----------------------------------------------------------------------------------------------------------


def test_interruption_passes_through(capsys, tmp_path, monkeypatch):
    call_ = ["train", "vae", "--data", "digits", "--out", str(tmp_path / "run"), *TINY]

    def stop(error):
        def fit(*_, **__):
            raise error

        monkeypatch.setattr("inference.training.loop.fit", fit)

    stop(KeyboardInterrupt())
    assert run(call_) == 130
    assert "--resume goes on, and ppl report" in capsys.readouterr().err
    stop(SystemExit(143))
    with pytest.raises(SystemExit) as left:
        run(call_)
    assert left.value.code == 143


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_to_the_same_end(number, status, tmp_path):
    def command(folder, *more):
        code = "from ppl_models.launcher import main; main()"
        options = [
            "--data",
            "digits",
            "--out",
            str(tmp_path / folder),
            "--hidden",
            "16",
            "--epochs",
            "30",
            "--threads",
            "1",
        ]
        return [sys.executable, "-c", code, "train", "vae", *options, *more]

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command("whole"), check=True, capture_output=True, env=environment)
    stopped = subprocess.Popen(command("cut"), stderr=subprocess.PIPE, text=True, env=environment)
    assert stopped.stderr is not None
    while not stopped.stderr.readline().startswith("1/30"):
        pass
    stopped.send_signal(number)
    _, err = stopped.communicate(timeout=30)
    assert stopped.returncode == status
    assert "Traceback" not in err
    subprocess.run(command("cut", "--resume"), check=True, capture_output=True, env=environment)
    for file in ("model/model.safetensors", "metrics.csv"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
