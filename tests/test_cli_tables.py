"""Tables on the command line: columns and labels by name, from the file to every command; numbers by datum back as CSV."""

import csv

import matplotlib.image
import numpy as np
import pytest
import torch
import xarray

from inference import load_run
from inference.cli import run
from inference.training.runs import comparable
from tests.test_cli import refuse, succeed


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Sixty rows of an id, three numbers on scales of their own, a constant and a word; and the same in another order."""
    folder, rng = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    z = rng.normal(size=(60, 1))
    x = np.array([3.0, 50.0, 0.1]) * (z * [1.0, -1.0, 0.5] + 0.3 * rng.normal(size=(60, 3))) + [0.0, 200.0, 1.0]
    rows = [
        {"id": i, "a": a, "b": b, "c": c, "same": 1, "who": "well" if a > 0 else "ill"}
        for i, (a, b, c) in enumerate(x.tolist())
    ]
    for name, columns in (("t.csv", list(rows[0])), ("turned.csv", ["who", "c", "b", "a"])):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def trained(table):
    call = ["train", "vae", "--data", f"csv:{table / 't.csv'}@who", "--columns", "a, b,c", "--scaling", "standard"]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # as in each test
    try:
        assert run([*call, "--hidden", "8", "--epochs", "20", "--threads", "1", "--out", str(table / "run")]) == 0
    finally:
        torch.set_default_dtype(default)
    return table / "run"


def test_columns_find_their_places_in_other_files(capsys, table, trained):
    """The same rows with columns in another order, and more or fewer of them, give the same terms; a missing one is named."""
    assert load_run(trained).config["data"]["columns"] == ["a", "b", "c"]
    shown = [
        next(
            line
            for line in succeed(capsys, "terms", trained, "--data", f"csv:{table / name}", "--force").splitlines()
            if "ELBO" in line
        )
        for name in ("t.csv", "turned.csv")
    ]
    assert shown[0] == shown[1]
    (table / "few.csv").write_text("a,b\n1,2\n3,4\n")
    refuse(
        capsys,
        "terms",
        trained,
        "--data",
        f"csv:{table / 'few.csv'}",
        match="expected a column 'c' of numbers, found a, b",
    )


def test_a_constant_column_is_named_with_the_way_out(capsys, table):
    call = ["train", "vae", "--data", f"csv:{table / 't.csv'}@who", "--scaling", "standard", "--out", table / "none"]
    refuse(capsys, *call, match="in column 'same'; name the others with columns")


def test_numbers_by_datum_come_back_as_a_table(capsys, table, trained):
    out = table / "evidence.csv"
    assert "wrote 60 rows" in succeed(capsys, "evidence", trained, "--particles", 50, "--out", out)
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["datum"]) for row in rows] == list(range(60))
    assert {row["label"] for row in rows} == {"ill", "well"}
    assert all(float(row["log_evidence"]) >= float(row["elbo"]) - 1e-9 for row in rows)
    refuse(capsys, "evidence", trained, "--out", out, match="expected a new file")


def test_draws_say_what_their_units_are(capsys, trained):
    succeed(capsys, "posterior", trained, "--num-samples", 20, "--figure", trained / "f.png", "--force")
    tree = xarray.open_datatree(trained / "posterior.nc")
    assert tree["observed_data"]["column"].to_numpy().tolist() == ["a", "b", "c"]
    assert tree.attrs["scaling"] == "standard"
    own = load_run(trained).data().standardization
    np.testing.assert_allclose(tree.attrs["center"], own.center.numpy())
    np.testing.assert_allclose(tree.attrs["spread"], own.spread.numpy())


def test_samples_are_drawn_beside_the_data_and_without_them_where_they_are_gone(capsys, table, trained, tmp_path):
    assert "without" not in succeed(capsys, "sample", trained, "-n", 30, "--out", tmp_path / "a.png")
    file = table / "t.csv"
    text = file.read_text()
    try:
        file.write_text("a,b,c\n1,2,3\n4,5,7\n")
        assert "without data beside them" in succeed(capsys, "sample", trained, "-n", 30, "--out", tmp_path / "c.png")
    finally:
        file.write_text(text)
    widths = [matplotlib.image.imread(tmp_path / name).shape[1] for name in ("a.png", "c.png")]
    assert widths[0] > 1.5 * widths[1]  # two panels and one


def test_labels_are_words_in_the_map(capsys, trained):
    succeed(capsys, "report", trained, "--particles", 5)
    assert "well" in (trained / "figures" / "latent_map.svg").read_text()


def test_runs_from_before_there_were_names_go_on():
    new = {"data": {"sha256": "1", "columns": ["a"], "label_names": ["x"]}, "train": {}}
    old = {"data": {"sha256": "1"}, "train": {}}
    recorded, stated = comparable(old, new)
    assert recorded == stated
    recorded, stated = comparable({"data": {"sha256": "1", "columns": ["b"]}, "train": {}}, new)
    assert recorded != stated
