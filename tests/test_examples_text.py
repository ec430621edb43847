"""The text example at tiny size, and its n-gram models against a count with dictionaries."""

import importlib.util
import itertools
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
NUM_CLASSES = 3


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _by_counting(train: str, history: str, character: str, strengths: tuple[Fraction, ...]) -> Fraction:
    """p(character | history) in exact fractions, from counts of substrings."""
    p = Fraction(1, NUM_CLASSES)
    for n, s in enumerate(strengths[: len(history) + 1], 1):
        context = history[len(history) - n + 1 :]
        grams = Counter(train[i : i + n] for i in range(len(train) - n + 1))
        known = sum(grams[context + c] for c in "abc")
        p = (grams[context + character] + s * p) / (known + s)
    return p


def _classes(text: str) -> torch.Tensor:
    return torch.tensor(["abc".index(c) for c in text])


TRAIN = "abcabcaabbcacabcabca"
STRENGTHS = (Fraction(1, 2), Fraction(2), Fraction(1, 4))


def test_n_grams_are_those_of_a_count_with_dictionaries():
    model = _load("text_d3pm").NGram(_classes(TRAIN), NUM_CLASSES, [float(s) for s in STRENGTHS])
    windows = ["".join(w) for w in itertools.product("abc", repeat=4)]
    found = model.probabilities(torch.stack([_classes(w) for w in windows]))
    expected = [[float(_by_counting(TRAIN, w[:i], w[i], STRENGTHS)) for i in range(4)] for w in windows]
    assert torch.allclose(found, torch.tensor(expected), rtol=1e-14, atol=0)
    other = [[float(_by_counting(TRAIN, w[:i], w[i], STRENGTHS[:2])) for i in range(4)] for w in windows]
    assert not torch.allclose(found, torch.tensor(other), rtol=1e-2, atol=0)  # twin: another order is seen


def test_n_grams_sum_to_one_over_all_windows():
    for length in (1, 2, 5):
        model = _load("text_d3pm").NGram(_classes(TRAIN), NUM_CLASSES, (0.3, 1.7, 4.0))
        windows = torch.cartesian_prod(*[torch.arange(NUM_CLASSES)] * length).reshape(-1, length)
        assert float(model.probabilities(windows).prod(-1).sum()) == pytest.approx(1, rel=1e-13)


def test_n_grams_of_a_chain_come_to_its_entropy_rate():
    """Flip with probability 0.1: H = 0.469 bits. The bound on the error has a false-failure rate of 1e-6."""
    torch.manual_seed(0)
    flip = 0.1
    stream = (torch.rand(200_000) < flip).long().cumsum(0) % 2
    train, test = stream[:150_000], stream[None, 150_000:]
    entropy = -flip * math.log2(flip) - (1 - flip) * math.log2(1 - flip)
    spread = math.sqrt(flip * (1 - flip)) * math.log2((1 - flip) / flip)  # of -log2 p of one character
    example = _load("text_d3pm")
    strengths = example.choose_strengths(train, 2, 3)
    tolerance = 5 * spread / math.sqrt(test.numel()) + 1e-3  # 5 errors, and what 150,000 characters leave unknown
    bits = [example.NGram(train, 2, strengths[:n]).bits(test) for n in (1, 2, 3)]
    assert abs(bits[1] - entropy) < tolerance
    assert abs(bits[2] - entropy) < tolerance
    assert bits[0] > 1 - 0.01  # twin: without its context a character is a fair coin


def test_orders_that_do_not_fit_into_a_number_are_refused():
    with pytest.raises(ValueError, match=r"expected K\^n < 2\^63, got 32000\^5: ask for a smaller order"):
        _load("text_d3pm").NGram(torch.arange(10), 32_000, [1.0] * 5)


@pytest.mark.filterwarnings("ignore:the bound has 4 terms")  # two windows are put aside
def test_text_d3pm(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    (tmp_path / "text.txt").write_text("she sells sea shells on the sea shore;\n" * 60)
    example = _load("text_d3pm")
    sizes = "--window 16 --num-timesteps 4 --width 16 --layers 1 --epochs 2 --num-curve 4 --num-samples 2 --order 3"
    options = example.parse([str(tmp_path / "text.txt"), "--out", str(tmp_path / "runs"), *sizes.split()])
    numbers = example.main(options.text, options.out, options)
    assert numbers["3-gram"] < numbers["2-gram"] < numbers["1-gram"]
    assert all(math.isfinite(numbers[kind]) for kind in ("absorbing", "uniform"))
    assert (tmp_path / "runs" / "text_d3pm.png").is_file()
    out = capsys.readouterr().out
    assert "D3PM, absorbing" in out
    assert "--- uniform, sample 2" in out
    written = (tmp_path / "runs" / "absorbing" / "metrics.csv").stat().st_mtime_ns
    assert example.main(options.text, options.out, options) == numbers, "the same call reads what is there"
    assert (tmp_path / "runs" / "absorbing" / "metrics.csv").stat().st_mtime_ns == written
