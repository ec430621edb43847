"""Results print as their tables, and what the tables say are the numbers that they hold."""

import dataclasses
import pickle
import re

import pytest
import torch

from inference import (
    active_units,
    annealed_evidence,
    bidirectional_evidence,
    decompose_elbo,
    elbo_surgery,
    inference_gap,
    log_evidence,
    simulation_based_calibration,
)
from inference.printed import Printed
from ppl_models import LinearGaussian

QUICK = {"num_temperatures": 3, "num_leapfrog": 2, "num_chains": 4, "seed": 0}


@pytest.fixture(scope="module")
def results():
    torch.manual_seed(0)
    pair = LinearGaussian.random(data_dim=3, latent_dim=2, guide="mean_field")
    x = pair.model(size=15).detach()
    programs = pair.model, pair.guide
    return {
        "log_evidence": log_evidence(*programs, x, num_particles=50),
        "annealed_evidence": annealed_evidence(*programs, x, **QUICK),
        "bidirectional_evidence": bidirectional_evidence(pair, 15, **QUICK),
        "decompose_elbo": decompose_elbo(*programs, x, num_particles=50),
        "elbo_surgery": elbo_surgery(pair, x),
        "inference_gap": inference_gap(pair, x, steps=8, num_particles=50),
        "active_units": active_units(pair, x),
        "calibration": simulation_based_calibration(pair, num_simulations=100),
    }


def test_a_result_prints_as_its_table(results):
    for name, result in results.items():
        assert isinstance(result, Printed), name
        assert repr(result) == str(result) == result.table(), name
        assert not re.search(r"tensor\(|array\(", repr(result)), name
        fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        listed = dataclasses.make_dataclass("Listed", fields)(**fields)
        lists = name != "elbo_surgery"  # numbers alone
        assert lists == bool(re.search(r"tensor\(|array\(", repr(listed))), (
            name
        )  # control: a dataclass's own lists its fields


def test_a_result_can_be_kept_as_a_pickle(results):
    for name, result in results.items():
        again = pickle.loads(pickle.dumps(result))
        assert again.table() == result.table(), name
    gap = pickle.loads(pickle.dumps(results["inference_gap"]))  # and what it holds still runs
    dtype = gap.refinement.guide.pair.weight.dtype
    assert gap.refinement.guide(torch.zeros(15, 3, dtype=dtype)).shape == (15, 2)


def cells(text, first):
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [first]]
    return [float(cell) for cell in line.split()[1:] if cell.lstrip("+-").replace(".", "").isdigit()]


def test_the_annealed_table_has_the_mean_and_the_largest_errors(results):
    found = results["annealed_evidence"]
    text = found.table()
    assert cells(text, "mean")[:2] == [round(found.mean, 4), round(found.mean_std_error, 4)]
    worst, best = int(found.std_error.argmax()), int(found.std_error.argmin())
    assert cells(text, str(worst))[:2] == [round(float(t[worst]), 4) for t in (found.log_lower, found.std_error)]
    assert not [line for line in text.splitlines() if line.split()[:1] == [str(best)]]
    assert "15 data; the 10 largest errors; 4 chains, 3 steps" in text


def test_the_bidirectional_table_has_both_bounds(results):
    found = results["bidirectional_evidence"]
    widest = int(found.gap.argmax())
    want = [float(t[widest]) for t in (found.lower.log_lower, found.log_upper, found.gap)]
    assert cells(found.table(), str(widest)) == [round(number, 4) for number in want]
    assert cells(found.table(), "mean")[2] == round(found.mean_gap, 4)
