"""Estimators side by side: the derived numbers, the table, and what is drawn where."""

import pytest

from inference.views.estimators import Estimator, draw_estimators, estimators_table

FOUND = [Estimator("dear", 4, 1.0, 0.5, 3.0, 100), Estimator("cheap", 1, 1.02, 2.0, 1.0, 400)]


def test_derived_numbers():
    dear, cheap = FOUND
    assert dear.std_error == pytest.approx(0.05)
    assert dear.scatter_error == pytest.approx(0.5 / 198**0.5)
    assert dear.per_call == pytest.approx(1.0)
    assert dear.gradient_per_call == pytest.approx(6.0)
    assert (cheap.per_call, cheap.gradient_per_call) == (2.0, 1.0)


def test_table():
    assert "dear" in estimators_table(FOUND)
    assert estimators_table(FOUND).splitlines()[2].split()[1:] == [
        "1.000",
        "0.050",
        "4",
        "0.500",
        "0.036",
        "1.000",
        "3.000",
        "6.000",
    ]


def test_picture():
    figure = draw_estimators(FOUND, "title")
    figure.draw_without_rendering()
    means, values, gradients = figure.axes
    assert [label.get_text() for label in means.get_yticklabels()] == ["dear (4 calls)", "cheap (1 call)"]
    assert [list(line.get_xdata()) for line in values.lines] == [[0.5, 2.0], [1.0, 2.0]]
    assert [list(line.get_xdata()) for line in gradients.lines] == [[3.0, 1.0], [6.0, 1.0]]
    assert values.get_xscale() == "log"
