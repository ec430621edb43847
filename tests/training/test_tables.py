"""CSV files: what is in them comes back value for value; what is no table of numbers is refused by column and row."""

from pathlib import Path

import numpy as np
import pytest
import torch

from inference.training.datasets import DataError, as_dataset, load_data

NAMED = "a,b,kind\n1,2.5,x\n3,-4e-2,y\n5,6,x\n"


def csv(folder: Path, text: str, name: str = "t.csv") -> str:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return f"csv:{folder / name}"


@pytest.mark.parametrize("between", [",", ";", "\t", ", "])
def test_values_come_back(tmp_path, between):
    x = np.random.default_rng(0).normal(size=(5, 3))
    lines = [between.join(["one", "two", "three"]), *(between.join(map(repr, map(float, row))) for row in x)]
    data = load_data(csv(tmp_path, "\n".join(lines) + "\n"))
    np.testing.assert_array_equal(data.train.numpy(), x.astype(data.train.numpy().dtype))
    assert (data.levels, data.kind, data.test, data.train_labels) == (None, "point", None, None)


def test_one_column_and_quoted_names(tmp_path):
    quoted = '"a, in m",b\n1.5,2\n"2",3\n'
    assert load_data(csv(tmp_path, "name\n1.5\n2\n")).train.tolist() == [[1.5], [2.0]]
    assert load_data(csv(tmp_path, quoted)).train.tolist() == [[1.5, 2.0], [2.0, 3.0]]


def test_a_column_of_labels(tmp_path):
    data = load_data(csv(tmp_path, NAMED) + "@kind")
    assert data.train.shape == (3, 2)
    assert data.train_labels.tolist() == [0, 1, 0]


def test_zeros_and_ones_have_two_levels_and_other_whole_numbers_none(tmp_path):
    assert load_data(csv(tmp_path, "a,b\n0,1\n1,1\n"), scaling="unit").levels == 2
    whole = load_data(csv(tmp_path, "a,b\n0,1\n1,2\n"))
    assert (whole.levels, whole.train.tolist()) == (None, [[0.0, 1.0], [1.0, 2.0]])


def test_zeros_and_ones_are_continuous_where_they_are_standardised(tmp_path):
    """As one row of other data under a run's statistics may happen to be."""
    data = load_data(csv(tmp_path, "a,b\n0,1\n1,1\n1,0\n"), scaling="standard")
    assert data.levels is None
    np.testing.assert_allclose(data.train.mean(0), 0, atol=1e-12)


def test_numbers_keep_their_digits_until_they_are_standardised(tmp_path):
    """Times in seconds need more than float32 has; what is left after standardising does not."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        data = load_data(csv(tmp_path, "t\n" + "".join(f"{1.7e9 + i}\n" for i in range(8))), scaling="standard")
        array = as_dataset(1.7e9 + np.arange(8.0)[:, None], scaling="standard")
    finally:
        torch.set_default_dtype(default)
    want = (np.arange(8) - 3.5) / np.arange(8).std()
    for got in (data, array):
        assert got.train.dtype == torch.float32
        np.testing.assert_allclose(got.train[:, 0], want, rtol=1e-6)
    assert (
        len(np.unique((1.7e9 + np.arange(8)).astype(np.float32))) == 1
    )  # control: rounded first, they are all the same


def test_what_stands_between_quotes_separates_nothing(tmp_path):
    lines = load_data(csv(tmp_path, 'a,y\n1.5,"u\nv"\n2,uv\n3,w\n') + "@y")
    assert lines.train_labels.tolist() == [0, 1, 2]
    names = load_data(csv(tmp_path, '"weight (g; mean)","height, a;b;c"\n1.5,2\n2.5,3\n'))
    assert names.train.tolist() == [[1.5, 2.0], [2.5, 3.0]]
    odd = load_data(csv(tmp_path, "a,y\n1.5,Z\u0085x\n2,uv\n") + "@y")  # a line end to some, none to csv
    assert odd.num_train == 2


REFUSED = {
    "a word": ("a,b\n1,2\n3,x\n", r"column 'b', row 2: expected a finite number, got 'x'.*csv:t\.csv@b"),
    "a gap": ("a,b\n1,\n3,4\n", "column 'b', row 1: .* got nothing"),
    "an infinity": ("a,b\n1,1e400\n3,4\n", "column 'b', row 1: .* got '1e400'"),
    "not a number": ("a\nnan\n", "column 'a', row 1"),
    "no names": ("1,2\n3,4\n", "a name for each column in the first line, found numbers: 1,2"),
    "a name twice": ("a,a\n1,2\n", "found 'a' twice"),
    "an empty name": ("a,\n1,2\n", "found an empty name"),
    "a longer row": ("a,b\n1,2\n1,2,3\n", "row 2: expected 2 cells as there are names, got 3"),
    "no rows": ("a,b\n", "found 1 lines"),
    "nothing": ("", "found 0 lines"),
}


@pytest.mark.parametrize(("text", "match"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_table_is_refused(tmp_path, text, match):
    with pytest.raises(DataError, match=match):
        load_data(csv(tmp_path, text))


def test_files_and_columns_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"no\.csv: cannot be read"):
        load_data(f"csv:{tmp_path / 'no.csv'}")
    with pytest.raises(DataError, match="a column 'z' of labels, found a, b, kind"):
        load_data(csv(tmp_path, NAMED) + "@z")
    with pytest.raises(DataError, match="columns of numbers beside the labels, found none"):
        load_data(csv(tmp_path, "a\n1\n2\n") + "@a")
    (tmp_path / "latin.csv").write_bytes("naïve\n1\n".encode("latin-1"))
    with pytest.raises(DataError, match="expected a UTF-8 table"):
        load_data(f"csv:{tmp_path / 'latin.csv'}")


def test_a_part_held_out_goes_with_its_labels(tmp_path):
    rows = "".join(f"{i},{i},{'odd' if i % 2 else 'even'}\n" for i in range(2, 42))
    spec = csv(tmp_path, "a,b,kind\n" + rows) + "@kind"
    data = load_data(spec, scaling="none", test_fraction=0.25)
    assert (data.num_train, data.num_test, data.split) == (30, 10, "seed-0 permutation, 30/10")
    for x, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        assert torch.equal(x[:, 0].long() % 2, labels)
    both = torch.cat([data.train, data.test])[:, 0]
    assert sorted(both.tolist()) == list(range(2, 42))
    assert torch.equal(load_data(spec, scaling="none", test_fraction=0.25).test, data.test)
    for wrong in (float("nan"), "0.25", 2):
        with pytest.raises(DataError, match=r"test_fraction: expected a number in \(0, 1\)"):
            load_data(spec, test_fraction=wrong)
    with pytest.raises(DataError, match="digits has a held-out part"):
        load_data("digits", test_fraction=0.25)


def test_columns_are_chosen_and_ordered_by_name_and_keep_their_names(tmp_path):
    file = csv(tmp_path, "id,a,b,who\n7,1.5,10.25,x\n8,2.5,20.25,y\n9,3.5,30.25,x\n")
    data = load_data(f"{file}@who", columns=["b", "a"])
    assert data.train.tolist() == [[10.25, 1.5], [20.25, 2.5], [30.25, 3.5]]
    assert data.columns == ("b", "a")
    assert data.label_names == ("x", "y")
    assert data.describe()["columns"] == ["b", "a"]
    assert load_data(f"{file}@who").columns == ("id", "a", "b")
    assert "tensor(" not in repr(data)
    assert "columns=['b', 'a']" in repr(data)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (["a", "c"], "expected a column 'c' of numbers, found id, a, b, who"),
        (["a", "a"], "expected columns named once"),
        (["a", "who"], "expected columns named once and apart from the labels"),
        ([], "expected columns of numbers beside the labels, found none"),
    ],
)
def test_columns_that_cannot_be_meant(tmp_path, columns, match):
    file = csv(tmp_path, "id,a,b,who\n7,1.5,10.25,x\n8,2.5,20.25,y\n")
    with pytest.raises(DataError, match=match):
        load_data(f"{file}@who", columns=columns)


def test_a_blank_label_a_decimal_comma_and_a_constant_column_are_named(tmp_path):
    with pytest.raises(DataError, match="column 'who', row 2: expected a label, got nothing"):
        load_data(csv(tmp_path, "a,who\n1.5,x\n2.5,\n") + "@who")
    with pytest.raises(DataError, match="got '2,5'; write it with a decimal point"):
        load_data(csv(tmp_path, "a;b\n1.5;1\n2,5;2\n"))
    with pytest.raises(
        DataError, match=r"the same in all 2 data in column 'b'; name the others with columns \(--columns\)"
    ):
        load_data(csv(tmp_path, "a,b\n1.5,1\n2.5,1\n"), scaling="standard")
    with pytest.raises(DataError, match="columns: expected only with csv:FILE"):
        load_data("digits", columns=["a"])
