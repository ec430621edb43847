"""Text on the command line: a D3PM trained on characters, its samples read as text, and calls that mean nothing for text."""

import re

import numpy as np
import pytest
import torch
import yaml

from inference import load_run
from inference.cli import run
from inference.commands.choices import choose
from inference.commands.opening import open_run
from inference.commands.options import TrainOptions
from inference.training.config import ConfigError
from inference.training.text_data import decode

TEXT = "the quick brown fox jumps over the lazy dog;\nPACK MY BOX WITH FIVE DOZEN JUGS\t\x1b.\n" * 20
WINDOW = 16
TINY = ["--epochs", "1", "--threads", "1", "--hidden", "16"]
D3PM = ["--pair", "transitions=absorbing", "--pair", "num_timesteps=4", "--pair", "blocks=1"]


def call(capsys, *arguments):
    """Exit status, stdout and stderr of one call."""
    capsys.readouterr()
    status = run([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def succeed(capsys, *arguments):
    status, out, err = call(capsys, *arguments)
    assert status == 0, err
    return out


def refuse(capsys, *arguments, match):
    status, _, err = call(capsys, *arguments)
    assert status == 2, err
    assert re.fullmatch(r"ppl: [^\n]+\n", err), f"expected exactly one line, got {err!r}"
    assert re.search(match, err), err


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A --data for a text that only this module has."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_bytes(TEXT.encode())
    return f"text:{path}@{WINDOW}"


def _train(folder, *arguments):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert run(["train", *arguments, "--out", str(folder), *TINY]) == 0
    finally:
        torch.set_default_dtype(default)
    return folder


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A D3PM of one epoch on the text, made by the command itself."""
    return _train(tmp_path_factory.mktemp("runs") / "d3pm", "d3pm", "--data", text, *D3PM)


def _samples(out):
    """The strings between the lines that number them."""
    return re.findall(rf"^--- \d+ of \d+\n(.{{{WINDOW},}}?)\n(?=---|\Z)", out, re.MULTILINE | re.DOTALL)


def test_a_d3pm_of_text_gets_a_transformer_and_classes_unless_told_otherwise(trained, text):
    config = load_run(trained).config
    assert config["pair"]["network"]["class"] == "TransformerDenoiser"
    assert config["pair"]["transitions"]["num_classes"] == len(set(TEXT)) + 1
    assert (config["data"]["scaling"], config["data"]["alphabet"]) == ("classes", "".join(sorted(set(TEXT))))
    chosen, data = choose("d3pm", TrainOptions(data=text))
    assert (chosen.likelihood, chosen.scaling, chosen.pair["network"]) == ("categorical", "classes", "transformer")
    assert data.levels == len(set(TEXT))
    stated, _ = choose("d3pm", TrainOptions(data=text, pair={"network": "mlp"}))
    assert stated.pair["network"] == "mlp"
    assert choose("d3pm", TrainOptions(data="digits"))[0].pair["network"] == "mlp"


def test_what_was_chosen_is_a_configuration(text, trained, tmp_path, capsys):
    out = succeed(capsys, "train", "d3pm", "--data", text, *D3PM, "--out", tmp_path / "one", *TINY)
    printed = yaml.safe_load(out[: out.index("\n\n")])
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(printed))
    succeed(capsys, "train", "d3pm", "--config", tmp_path / "options.yaml", "--threads", "1", "--out", tmp_path / "two")
    weights = "model/model.safetensors"
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()
    assert (tmp_path / "one" / weights).read_bytes() == (trained / weights).read_bytes()


def test_samples_are_printed_as_text(trained, capsys):
    out = succeed(capsys, "sample", trained, "-n", "4")
    shown = _samples(out)
    assert len(shown) == 4
    assert set("".join(shown)) <= set(TEXT.replace("\x1b", r"\x1b"))
    assert "\x1b" not in out
    assert succeed(capsys, "sample", trained, "-n", "4") == out, "the same seed gives the same samples"
    assert succeed(capsys, "sample", trained, "-n", "4", "--seed", "1") != out


def test_samples_go_to_a_text_and_to_arrays(trained, tmp_path, capsys):
    succeed(capsys, "sample", trained, "-n", "40", "--out", tmp_path / "s.txt")
    succeed(capsys, "sample", trained, "-n", "40", "--out", tmp_path / "s.npz")
    written = (tmp_path / "s.txt").read_bytes().decode()
    with np.load(tmp_path / "s.npz") as stored:
        classes = stored["x"]
    assert (classes.shape, classes.dtype) == ((40, WINDOW), np.int64)
    for i, sample in enumerate(decode(classes, "".join(sorted(set(TEXT)))), 1):
        assert f"--- {i} of 40\n{sample}\n" in written
    assert "\x1b" in written, "a file holds the characters themselves"
    refuse(capsys, "sample", trained, "--out", tmp_path / "s.txt", match="s.txt exists: .*--force")
    refuse(capsys, "sample", trained, "--out", tmp_path / "s.png", match=r"a \.txt or \.npz .* got 's.png'")


def test_samples_need_no_text_file(text, tmp_path, capsys):
    moved = tmp_path / "moved.txt"
    moved.write_text(TEXT)
    folder = _train(tmp_path / "run", "d3pm", "--data", f"text:{moved}@{WINDOW}", *D3PM)
    moved.unlink()
    assert len(_samples(succeed(capsys, "sample", folder, "-n", "2"))) == 2


def test_a_run_on_text_can_be_looked_at(trained, capsys):
    out = succeed(capsys, "terms", trained, "--particles", "4", "--num-data", "3")
    assert "the first 3 of 10 held-out data of text:text.txt" in out
    assert all(site in out for site in ("x_4", "x_1", "x_0", "ELBO"))
    assert "x_4" in succeed(capsys, "trace", trained)
    succeed(capsys, "report", trained, "--particles", "4", "--num-data", "3")
    assert (trained / "report.html").is_file()


def test_other_text_is_looked_at_under_the_alphabet_of_the_run(trained, tmp_path, capsys):
    other = "over the dog\n" * 30  # a part of the run's characters, whose classes of their own would be others
    (tmp_path / "other.txt").write_text(other)
    spec = f"text:{tmp_path / 'other.txt'}@{WINDOW}"
    opened = open_run(trained, spec)
    shown = decode(opened.x, load_run(trained).config["data"]["alphabet"])
    assert "".join(shown) == other[-(len(other) // 10) :][: WINDOW * len(shown)]
    (tmp_path / "other.txt").write_text(other + "é" * 30)
    refuse(capsys, "terms", trained, "--data", spec, match="expected characters of the alphabet of .* got 'é'")


def test_a_vae_of_text(text, tmp_path, capsys):
    folder = _train(tmp_path / "vae", "vae", "--data", text)
    assert load_run(folder).config["pair"]["latent_dim"] == 16
    assert len(_samples(succeed(capsys, "sample", folder, "-n", "3"))) == 3


@pytest.mark.parametrize("system", ["ddpm", "vae"])
def test_likelihoods_of_other_data_are_refused(system, text):
    with pytest.raises(ConfigError, match=r"likelihood: expected categorical, .* got discretized_normal; leave .*d3pm"):
        choose(system, TrainOptions(data=text, likelihood="discretized_normal" if system == "vae" else None))


def test_bad_texts_and_calls_are_refused_in_a_line(trained, text, tmp_path, capsys):
    def train(*arguments):
        return "train", "d3pm", *arguments, "--out", tmp_path / "run", *TINY

    refuse(capsys, *train("--data", f"text:{tmp_path / 'no.txt'}"), match="no such file; expected a text in UTF-8")
    refuse(capsys, *train("--data", text, "--scaling", "unit"), match="characters are classes")
    refuse(capsys, *train("--data", text, "--binarization", "fixed"), match="characters are classes")
    refuse(capsys, *train("--data", "text:"), match="expected one of digits, .*text:FILE")
    assert not (tmp_path / "run").exists()


def test_samples_of_what_is_no_text_need_a_file(tmp_path, capsys):
    folder = _train(tmp_path / "points", "vae", "--data", "two_moons", "--set", "batch_size=4000")
    refuse(capsys, "sample", folder, match=r"expected --out with a picture \(.png, .svg, .pdf\) or arrays .*got none")
    refuse(capsys, "sample", folder, "--out", tmp_path / "s.txt", match="s.txt: this is no text")
    succeed(capsys, "sample", folder, "--out", tmp_path / "s.npz", "-n", "3")


def test_text_is_among_the_data(capsys):
    assert re.search(r"^text:FILE +text .*UTF-8", succeed(capsys, "data"), re.MULTILINE)
