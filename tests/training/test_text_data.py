"""Text as data: classes and windows against plain Python, the alphabet that travels with them, and bad texts refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference import fit, load_run
from inference.training.datasets import DataError, DataSet, list_data, load_data
from inference.training.text_data import MAX_CLASSES, WINDOW, decode, encode, printable, read_text
from inference.training.texts import read_yaml, write_yaml
from ppl_models import VAE
from ppl_models.likelihoods import Categorical

AWKWARD = "\x00\x07\t\n\r\x1b '\"#:\\-?\x7f\x85\xa0é\u2028\ud7ff\ufeff\uffff😀"
PROSE = "It was the best of times, it was the worst of times.\r\n" * 40


def write(folder: Path, text: str, name: str = "text.txt") -> str:
    (folder / name).write_bytes(text.encode())
    return f"text:{folder / name}"


def by_hand(text: str, window: int) -> tuple[list[list[int]], list[list[int]]]:
    """Training and held-out windows, written out with lists."""
    alphabet = sorted(set(text))
    classes = [alphabet.index(character) for character in text]
    start = len(text) - len(text) // 10
    cut = [
        [part[i : i + window] for i in range(0, len(part) - window + 1, window)]
        for part in (classes[:start], classes[start:])
    ]
    return cut[0], cut[1]


@pytest.mark.parametrize("window", [1, 7, 64, 100])
@pytest.mark.parametrize("text", [PROSE, AWKWARD * 60], ids=["prose", "awkward"])
def test_windows_are_those_made_by_hand(text: str, window: int, tmp_path: Path) -> None:
    spec = write(tmp_path, text)
    data = load_data(spec if window == WINDOW else f"{spec}@{window}")
    train, test = by_hand(text, window)
    assert data.train.dtype == data.test.dtype == torch.int64
    assert data.train.tolist() == train
    assert data.test.tolist() == test
    assert (data.kind, data.scaling, data.binarization) == ("text", "classes", "none")
    assert (data.alphabet, data.levels) == ("".join(sorted(set(text))), len(set(text)))
    dropped = len(text) - window * (len(train) + len(test))
    assert data.split == f"the last tenth in one piece; windows of {window} characters, {dropped} left over"


def test_text_comes_back_from_its_classes_but_not_from_another_alphabet(tmp_path: Path) -> None:
    data = load_data(write(tmp_path, PROSE))
    assert PROSE.startswith("".join(decode(data.train, data.alphabet)))
    assert PROSE[-len(PROSE) // 10 :].startswith(decode(data.test, data.alphabet)[0])
    shifted = data.alphabet[1:] + "€"
    assert decode(data.test, shifted) != decode(data.test, data.alphabet)


def test_held_out_characters_are_in_no_training_window(tmp_path: Path) -> None:
    text = "".join(chr(0x100 + i) for i in range(2000))  # each character once: its class is its place
    data = load_data(write(tmp_path, text))
    assert int(data.train.max()) < 1800 <= int(data.test.min())
    assert data.train.flatten().tolist() == list(range(data.train.numel()))


def test_another_text_is_read_under_the_alphabet_it_is_given(tmp_path: Path) -> None:
    own = load_data(write(tmp_path, "abc" * 300))
    spec = write(tmp_path, "bcb" * 300, "other.txt")
    under = load_data(spec, alphabet=own.alphabet)
    assert (under.levels, under.alphabet) == (3, "abc")
    assert decode(under.test, "abc") == decode(load_data(spec).test, "bc")
    assert under.test.tolist() != load_data(spec).test.tolist()
    with pytest.raises(
        DataError, match=r"other2.txt: expected characters of the alphabet of 3 alone, got 'd' at char.* 2;"
    ):
        load_data(write(tmp_path, "bcd" * 300, "other2.txt"), alphabet="abc")


def test_a_text_of_one_character_is_one_of_a_larger_alphabet(tmp_path: Path) -> None:
    path = write(tmp_path, "a" * 200).removeprefix("text:")
    assert read_text(f"{path}@8", alphabet="abc").train.unique().tolist() == [0]
    with pytest.raises(DataError, match="2 to 32,000 distinct characters, got 1"):
        read_text(f"{path}@8")


def test_a_record_of_text_data_reads_back_from_yaml_and_json(tmp_path: Path) -> None:
    described = load_data(write(tmp_path, AWKWARD * 60)).describe()
    assert described["alphabet"] == "".join(sorted(set(AWKWARD)))
    write_yaml(tmp_path / "config.yaml", {"data": described})
    assert read_yaml(tmp_path / "config.yaml") == {"data": described}
    assert json.loads(json.dumps(described)) == described
    assert "alphabet" not in DataSet("mine", torch.zeros(3, 4)).describe()


def test_every_character_of_unicode_has_its_class_back() -> None:
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    for start in range(0, len(characters), MAX_CLASSES):
        alphabet = "".join(characters[start : start + MAX_CLASSES])
        classes = encode(alphabet, alphabet)
        assert torch.equal(classes, torch.arange(len(alphabet)))
    assert decode(classes[None], alphabet) == [alphabet]


def test_what_is_printed_holds_no_control_characters() -> None:
    shown = printable(AWKWARD)
    assert all(character in "\t\n" or character.isprintable() for character in shown)
    assert "\\x1b" in shown
    assert printable(PROSE) == PROSE.replace("\r", "\\r")
    assert "\x1b" in AWKWARD


def test_the_run_keeps_the_alphabet_and_reads_its_data_again(tmp_path: Path) -> None:
    spec = write(tmp_path, PROSE) + "@16"
    data = load_data(spec)
    pair = VAE.preset(data.data_shape, Categorical(data.levels), latent_dim=2, hidden=(8,))
    fit(pair, spec, tmp_path / "run", epochs=1, progress=False)
    run = load_run(tmp_path / "run")
    assert run.config["data"]["alphabet"] == data.alphabet
    assert torch.equal(run.data().test, data.test)
    fit(pair, spec, tmp_path / "run", epochs=1, progress=False, resume=True)


def test_list_data_says_what_is_loaded(tmp_path: Path) -> None:
    (row,) = (row for row in list_data() if row["spec"] == "text:FILE")
    data = load_data(write(tmp_path, PROSE))
    assert (row["kind"], row["scaling"], row["binarization"]) == (data.kind, [data.scaling], [data.binarization])
    assert str(data.data_shape[0]) in row["what"]


@pytest.mark.parametrize(
    ("content", "suffix", "match"),
    [
        (b"", "", "expected a text, got an empty file"),
        (b"ab" * 300, "", r"at least 640 characters, a window of 64 .* got 600; .* text:text.txt@60"),
        (b"ab" * 30, "@7", r"at least 70 characters, a window of 7 .* got 60; .*@6"),
        (b"ab\xff" * 300, "", r"expected UTF-8, got byte 0xff at 2; convert"),
        ("über".encode("latin-1") * 300, "", "expected UTF-8, got byte 0xfc at 0"),
        ("ab".encode("utf-16") * 300, "", "expected UTF-8, got byte 0xff at 0"),
        (b"\xed\xa0\x80" * 700, "", "expected UTF-8, got byte 0xed at 0"),
        (b"a" * 700, "", "expected 2 to 32,000 distinct characters, got 1; give a text with more"),
        ("".join(map(chr, range(0x4E00, 0x4E00 + 32_001))).encode(), "", "got 32,001; replace the rare ones"),
        (b"ab" * 300, "@0", "expected FILE or FILE@L with windows of L >= 1 characters"),
    ],
)
def test_bad_texts_are_refused(content: bytes, suffix: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(DataError, match=match):
        load_data(f"text:{tmp_path / 'text.txt'}{suffix}")


def test_32000_classes_are_not_too_many(tmp_path: Path) -> None:
    text = "".join(map(chr, range(0x4E00, 0x4E00 + MAX_CLASSES)))
    assert load_data(write(tmp_path, text)).levels == MAX_CLASSES


def test_places_and_options_that_are_none_are_refused(tmp_path: Path) -> None:
    spec = write(tmp_path, PROSE)
    for place in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(DataError, match="no such file; expected a text in UTF-8"):
            load_data(f"text:{place}")
    with pytest.raises(DataError, match="expected FILE or FILE@L"):
        load_data("text:@5")
    for options in ({"scaling": "unit"}, {"scaling": "none"}, {"binarization": "fixed"}):
        with pytest.raises(
            DataError, match="characters are classes, with scaling 'classes' and binarization 'none', got"
        ):
            load_data(spec, **options)
    assert load_data(spec, scaling="classes", binarization="none").scaling == "classes"
    with pytest.raises(DataError, match="alphabet: expected only with text:FILE, got it with 'digits'"):
        load_data("digits", alphabet="ab")
    for alphabet in ("ba", "aa", ""):
        with pytest.raises(DataError, match="alphabet: expected distinct characters in the order of their code points"):
            load_data(spec, alphabet=alphabet)


@pytest.mark.parametrize("classes", [[[0, 2]], [[-1, 0]]])
def test_classes_outside_the_alphabet_are_refused(classes: list[list[int]]) -> None:
    with pytest.raises(DataError, match=r"classes: expected 0\.\.1, places in the alphabet, got"):
        decode(classes, "ab")


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "text"},
        {"kind": "point", "alphabet": "ab"},
        {"kind": "text", "alphabet": "abc"},
        {"kind": "text", "alphabet": ""},
    ],
)
def test_a_data_set_of_text_has_one_character_a_level(options: dict[str, str]) -> None:
    x = torch.zeros(3, 4, dtype=torch.int64)
    DataSet("mine", x, levels=2, scaling="classes", kind="text", alphabet="ab")
    with pytest.raises(DataError, match=r"alphabet: expected as many characters as levels \(2\) with kind 'text'"):
        DataSet("mine", x, levels=2, scaling="classes", **options)


def test_uniform_text_costs_log_k_under_the_uniform_law(tmp_path: Path) -> None:
    """Bits per dimension of text are bits per character: a law that says nothing pays log2 K."""
    data = load_data(write(tmp_path, "abcd" * 300))
    law = Categorical(data.levels)(torch.zeros(data.num_test, 64, data.levels), 1)
    test: Tensor = data.test
    bits = -law.log_prob(test) / 64 / math.log(2)
    assert torch.allclose(bits, torch.full_like(bits, 2.0))
