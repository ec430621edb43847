"""Results as text tables, aligned, one row per term or datum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from inference.bounds.terms import Decomposition, SiteTerm


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under a header; the first and last columns flush left, the others flush right.

    Example:
        >>> print(text_table(["site", "nats", "used"], [["z", "-1.5", "yes"], ["x", "-20.0", "no"]]))
        site   nats  used
        ----  -----  ----
        z      -1.5  yes
        x     -20.0  no
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        last = len(cells) - 1
        return "  ".join(
            c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def decomposition_table(d: Decomposition) -> str:
    """A decomposition as text: nats, averaged over the shared plates; errors are Monte Carlo standard errors."""
    rows = []
    for name, term in d.terms.items():
        rows.append(
            [
                name,
                "-" if term.analytic is None else f"{_mean(term.analytic):.4f}",
                f"{_mean(term.monte_carlo):.4f}",
                f"{_error(term.std_error):.4f}",
                "-" if term.z_score is None else f"{term.z_score:+.2f}",
                _used(term),
            ]
        )
    rows.append(
        [
            "ELBO",
            f"{_mean(d.elbo):.4f}",
            f"{_mean(d.monte_carlo):.4f}",
            f"{d.monte_carlo_mean_std_error:.4f}",
            "",
            f"their sum: {_mean(d.elbo):.4f} +- {d.mean_std_error:.4f}",
        ]
    )
    per = (
        f"mean over {' x '.join(f'{n} {p}' for p, n in zip(d.plates, d.elbo.shape, strict=True))}"
        if d.plates
        else "total"
    )
    text = text_table(["site", "closed form", "Monte Carlo", "+- SE", "z", "used in the sum"], rows)
    reasons = "\n".join(f"  {name}: {term.reason}" for name, term in d.terms.items())
    head = f"E_q[log p - log q] by site, nats, {per}; {d.num_particles} particles, SE: of the draws, at these data"
    closer = ""
    if d.monte_carlo_mean_std_error < 0.9 * d.mean_std_error:
        closer = "\n  (the draws alone have the smaller error here: errors of their terms cancel)"
    return f"{head}\n{text}\n{reasons}\n  ({d.note}){closer}"


def _used(term: SiteTerm) -> str:
    if term.analytic is not None:
        return "closed form"
    return (
        "Monte Carlo" if term.with_entropy is None else f"log p drawn, entropy closed: {_mean(term.with_entropy):.4f}"
    )


def _mean(values: torch.Tensor) -> float:
    return float(values.mean())


def _error(std_errors: torch.Tensor) -> float:
    """Standard error of the mean over independent data."""
    return float(std_errors.square().sum().sqrt() / max(1, std_errors.numel()))
