"""Estimators of one number side by side: their means with errors, and how much they scatter per draw and per network call.

    scatter per call = standard deviation of one estimate * sqrt(network calls that it takes)

is what is left after a fixed budget of calls, so that cheap noisy estimators and dear quiet ones can be compared. The same
for the gradient, whose scatter is the square root of its variance summed over all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from inference.views.drawing import BLUE, GREY, ORANGE, VERMILION, style
from inference.views.tables import text_table

BAR = 2.0  # standard errors each way


@dataclass(frozen=True)
class Estimator:
    """What repeated draws of one estimator say.

    Attributes:
        name: what it is.
        calls: network calls for one estimate.
        mean: nats per datum.
        scatter: standard deviation of one estimate.
        gradient_scatter: the same of its gradient, over all parameters together.
        repeats: how many draws mean and scatter come from.
    """

    name: str
    calls: int
    mean: float
    scatter: float
    gradient_scatter: float
    repeats: int

    @property
    def std_error(self) -> float:
        """Standard error of :attr:`mean`."""
        return self.scatter / math.sqrt(self.repeats)

    @property
    def scatter_error(self) -> float:
        """Standard error of :attr:`scatter`, as of normal draws: scatter / sqrt(2 (repeats - 1))."""
        return self.scatter / math.sqrt(2 * (self.repeats - 1))

    @property
    def per_call(self) -> float:
        """Scatter at a budget of one network call."""
        return self.scatter * math.sqrt(self.calls)

    @property
    def gradient_per_call(self) -> float:
        """Scatter of the gradient at a budget of one network call."""
        return self.gradient_scatter * math.sqrt(self.calls)


def estimators_table(estimators: Sequence[Estimator]) -> str:
    """One row per estimator."""
    rows = [
        [
            e.name,
            f"{e.mean:.3f}",
            f"{e.std_error:.3f}",
            str(e.calls),
            f"{e.scatter:.3f}",
            f"{e.scatter_error:.3f}",
            f"{e.per_call:.3f}",
            f"{e.gradient_scatter:.3f}",
            f"{e.gradient_per_call:.3f}",
        ]
        for e in estimators
    ]
    header = [
        "estimator",
        "nats",
        "+- SE",
        "calls",
        "SD",
        "+- SE",
        "SD per call",
        "gradient SD",
        "gradient SD per call",
    ]
    return text_table(header, rows)


def draw_estimators(estimators: Sequence[Estimator], title: str) -> Figure:
    """Left: means with error bars, which must agree. Middle and right: scatter of value and gradient, on log axes."""
    with style():
        figure = Figure(figsize=(10.2, 1.5 + 0.42 * len(estimators)), layout="constrained")
        means, values, gradients = figure.subplots(1, 3, sharey=True)
        places = np.arange(len(estimators))
        weights = np.array([1 / max(e.std_error, 1e-12) ** 2 for e in estimators])
        common = float((weights * [e.mean for e in estimators]).sum() / weights.sum())
        means.errorbar(
            [e.mean for e in estimators],
            places,
            xerr=[BAR * e.std_error for e in estimators],
            color=BLUE,
            marker="o",
            linewidth=0,
            elinewidth=1.4,
            capsize=3,
        )
        means.axvline(common, color=GREY, linestyle="--", linewidth=0.8)
        means.set_yticks(places, [f"{e.name} ({e.calls} call{'s' if e.calls > 1 else ''})" for e in estimators])
        means.set(title=f"-ELBO, nats per datum\n± {BAR:g} standard errors", xlabel="nats")
        _draw_scatter(values, [(e.scatter, e.per_call) for e in estimators], "standard deviation\nof the value, nats")
        pairs = [(e.gradient_scatter, e.gradient_per_call) for e in estimators]
        _draw_scatter(gradients, pairs, "standard deviation\nof the gradient")
        figure.legend(*values.get_legend_handles_labels(), loc="outside lower right", ncols=2)
        means.grid(True)
        means.invert_yaxis()
        figure.suptitle(title, fontsize=10)
    return figure


def _draw_scatter(axes: Axes, pairs: Sequence[tuple[float, float]], title: str) -> None:
    places = np.arange(len(pairs))
    axes.plot([one for one, _ in pairs], places, color=ORANGE, marker="s", linewidth=0, label="one estimate")
    axes.plot([one for _, one in pairs], places, color=VERMILION, marker="D", linewidth=0, label="per network call")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(title=title)
    axes.grid(True)
