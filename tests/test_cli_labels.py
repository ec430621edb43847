"""Runs that are conditioned on labels, on the command line: from the data's labels to every command that looks at a RUN."""

import csv

import numpy as np
import pytest
import torch

from inference import load_run
from inference.cli import run
from inference.commands.opening import open_run
from tests.test_cli import refuse, succeed


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two kinds of rows, far apart; and other files of rows of one kind, of none named, and of a third."""
    folder, rng = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    kinds = ["old", "new"] * 40
    rows = [(k, *(np.array([5.0, -5.0]) * (k == "new") + rng.normal(size=2)).tolist()) for k in kinds]
    for name, chosen in (("t.csv", rows), ("old.csv", rows[::2]), ("odd.csv", [("odd", 0.0, 0.0), *rows])):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([("kind", "a", "b"), *chosen])
    (folder / "none.csv").write_text("a,b\n1,2\n3,4\n")
    return folder


@pytest.fixture(scope="module")
def trained(table):
    call = ["train", "vae", "--data", f"csv:{table / 't.csv'}@kind", "--given-labels", "--scaling", "none"]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # as in each test
    try:
        told = ["--hidden", "16", "--epochs", "60", "--learning-rate", "0.02", "--batch-size", "16", "--threads", "1"]
        assert run([*call, *told, "--out", str(table / "run")]) == 0
    finally:
        torch.set_default_dtype(default)
    return table / "run"


def test_the_number_of_labels_is_that_of_the_data(trained):
    assert load_run(trained).pair.num_labels == 2
    options = (trained / "options.yaml").read_text()
    assert "given_labels: true" in options
    assert "num_labels: 2" in options


def test_samples_are_drawn_at_a_label_by_name_or_number_and_at_all_in_turn(capsys, table, trained):
    x = {}
    for label in ("new", "1", "old", None):
        file = table / f"{label}.npz"
        succeed(capsys, "sample", trained, "--out", file, "-n", 100, *(() if label is None else ("--label", label)))
        x[label] = np.load(file)["x"]
    # names in sorted order: new is 0, old is 1
    assert np.array_equal(x["1"], x["old"])
    assert abs(x["new"][:, 0].mean() - 5) < 2
    assert abs(x["old"][:, 0].mean()) < 2
    assert abs(x[None][::2, 0].mean() - 5) < 2
    assert abs(x[None][1::2, 0].mean()) < 2
    succeed(capsys, "sample", trained, "--out", table / "s.png", "-n", 20, "--label", "new")
    refuse(
        capsys,
        "sample",
        trained,
        "--out",
        table / "no.npz",
        "--label",
        "newer",
        match="--label: expected one of the run's 2 labels, new, old, got 'newer'",
    )
    assert not (table / "no.npz").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["terms", "--particles", "20"],
        ["evidence", "--particles", "50", "--num-data", "10", "--out", "{}/e.csv"],
        ["posterior", "--num-samples", "20", "--figure", "{}/p.png"],
        ["trace"],
        ["calibrate", "--simulations", "100"],
        ["report", "--particles", "20", "--force"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_looks_at_such_a_run(capsys, table, trained, command):
    name, *options = command
    said = succeed(capsys, name, trained, *(option.format(table) for option in options))
    assert said
    if name == "report":
        assert "expected a label" not in (trained / "report.html").read_text()


def test_labels_of_other_files_go_by_name(capsys, table, trained):
    """Rows of one kind alone have label 0 in their own file, which is the other kind in the run's."""
    opened = open_run(trained, f"csv:{table / 'old.csv'}@kind")
    assert opened.pair.labels.tolist() == [1] * 40
    match = "labels: expected those of the run, new, old, got 'odd'"
    refuse(capsys, "terms", trained, "--data", f"csv:{table / 'odd.csv'}@kind", match=match)
    match = "conditioned on 2 labels, got none.*@COLUMN"
    refuse(capsys, "terms", trained, "--data", f"csv:{table / 'none.csv'}", match=match)


def test_labels_that_are_numbers_are_those_numbers(capsys, table):
    """Labels 9, 10 and 11 of a table have places 0, 1 and 2, in the order of numbers; other files and --label name them so."""
    rng = np.random.default_rng(1)
    y = np.array([9, 10, 11] * 20)
    x = np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])[y - 9] + rng.normal(size=(60, 2))
    with (table / "n.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("k", "a", "b"), *((k, *row) for k, row in zip(y, x.tolist(), strict=True))])
    np.savez(table / "n.npz", train=x, train_labels=y)
    np.savez(table / "low.npz", train=x, train_labels=y - 9)
    call = [
        "train",
        "vae",
        "--data",
        f"csv:{table / 'n.csv'}@k",
        "--given-labels",
        "--scaling",
        "none",
        "--epochs",
        "1",
    ]
    succeed(capsys, *call, "--hidden", "4", "--threads", "1", "--out", table / "numbers")
    for data in (f"csv:{table / 'n.csv'}@k", f"npz:{table / 'n.npz'}"):
        assert open_run(table / "numbers", data).pair.labels.tolist() == (y - 9).tolist()
    refuse(capsys, "terms", table / "numbers", "--data", f"npz:{table / 'low.npz'}", match="9, 10, 11, got '0'")
    np.savez(table / "gaps.npz", train=x, train_labels=(y - 9) * 100)
    call = ["train", "vae", "--data", f"npz:{table / 'gaps.npz'}", "--likelihood", "normal", *call[4:]]
    with pytest.warns(UserWarning, match="198 of the labels 0..200 never occur in training"):
        succeed(capsys, *call, "--hidden", "4", "--threads", "1", "--out", table / "gaps")
    told = ["--out", table / "nine.npz", "-n", "5", "--label"]
    assert "at y\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}9" in succeed(capsys, "sample", table / "numbers", *told, "9")
    refuse(capsys, "sample", table / "numbers", *told[2:], "0", "--out", table / "0.npz", match="9, 10, 11, got '0'")


def test_labels_are_asked_for_where_there_are_none(capsys, table):
    call = ["train", "vae", "--data", f"csv:{table / 'none.csv'}", "--given-labels", "--out", table / "new"]
    refuse(capsys, *call, match="given_labels: expected data with labels.*csv:FILE@COLUMN")
    assert not (table / "new").exists()


def test_a_label_means_nothing_to_a_run_without(capsys, tmp_path):
    call = ["train", "vae", "--data", "two_moons", "--epochs", "1", "--hidden", "4", "--batch-size", "4000"]
    assert run([*call, "--threads", "1", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    match = r"expected --label with a run that is conditioned on labels \(ppl train --given-labels\)"
    refuse(capsys, "sample", tmp_path / "run", "--out", tmp_path / "x.npz", "--label", "1", match=match)
