"""The programs of a pair as ``ppl trace`` shows them, a long diffusion's chain by its ends and what lies between in one row.

    x_T .. x_1, x_0        shown: x_T, x_{T-1}, (x_{T-2} .. x_2), x_1, x_0        three network calls, whatever T

The guide's side is the factorisation from the top, q(x_T | x_0) prod q(x_{t-1} | x_t, x_0), which is what each term L_t
compares the model with; each row is one draw of that term.

The one constraint: a chain of up to :data:`LONG` steps, and any other pair, is shown in full by
:mod:`inference.views.programs`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from inference.bounds.closed_forms import law_name
from inference.bounds.particles import forked_rng
from inference.views import programs
from inference.views.program_graph import Node, ProgramGraph, dot_text, mermaid_text
from inference.views.tables import text_table
from ppl_models.diffusion import Diffusion
from ppl_models.pair import ModelGuidePair

LONG = 8  # steps of a chain, above which it is folded

HEADER = ("site", "p law", "p shape", "log p", "q law", "q shape", "log q", "KL")


def pair_table(pair: ModelGuidePair, x: Tensor) -> str:
    """:func:`inference.views.programs.program_table` of a pair, a long chain folded.

    Args:
        pair: the programs.
        x: data ``[B, *data_shape]``; log-densities are summed over them.
    """
    chain = _long_chain(pair)
    return programs.program_table(pair.model, pair.guide, x) if chain is None else _chain_table(chain, x)


def pair_mermaid(pair: ModelGuidePair, x: Tensor) -> str:
    """:func:`inference.views.programs.mermaid` of a pair, a long chain folded."""
    chain = _long_chain(pair)
    return programs.mermaid(pair.model, pair.guide, x) if chain is None else mermaid_text(_chain_graph(chain, x))


def pair_svg(pair: ModelGuidePair, x: Tensor) -> bytes:
    """:func:`inference.views.programs.graph_svg` of a pair, a long chain folded.

    Raises:
        GraphvizError: ``dot`` is not on the path, fails, or takes over a minute.
    """
    chain = _long_chain(pair)
    if chain is None:
        return programs.graph_svg(pair.model, pair.guide, x)
    return programs.dot_svg(dot_text(_chain_graph(chain, x)))


def _long_chain(pair: ModelGuidePair) -> Diffusion | None:
    return pair if isinstance(pair, Diffusion) and pair.num_timesteps > LONG else None


def _chain_table(pair: Diffusion, x: Tensor) -> str:
    last = pair.num_timesteps
    rows = [_row(pair, x, t) for t in (last, last - 1, 1, 0)]
    rows.insert(
        2, [f"x_{last - 2} .. x_2", "as above", "", "", "as above", "", "", f"{last - 3} more such KLs, in closed form"]
    )
    title = (
        f"model p(x_{last}) prod p(x_(t-1) | x_t) p(x_0 | x_1), guide q(x_{last} | x_0) prod q(x_(t-1) | x_t, x_0); "
        f"T = {last}, plate data: {len(x)}"
    )
    return (
        f"{title}\n{text_table(HEADER, rows)}\n  each row: one draw of its own term, given x_(t+1) ~ q(x_(t+1) | x_0)"
    )


def _row(pair: Diffusion, x: Tensor, t: int) -> list[str]:
    """Laws of both programs at site x_t, with log-densities at a draw, summed over the data."""
    process = pair.process
    with forked_rng(), torch.no_grad():
        if t == pair.num_timesteps:
            p, q, what = process.prior(), process.marginal(x, _time(t, x)), "closed form, exact"
            p = p.expand(x.shape[:1])
        else:
            x_next = process.marginal(x, _time(t + 1, x)).sample()
            if t == 0:
                p, q, what = pair.reconstruction(x_next), None, "observed"
            else:
                p, q = pair.reverse(x_next, _time(t + 1, x)), process.posterior(x_next, x, _time(t + 1, x))
                what = f"closed form given x_{t + 1}"
        x_t = x if q is None else q.sample()
        own = ["-", "-", "-"] if q is None else [law_name(q), _shape(q), f"{float(q.log_prob(x_t).double().sum()):.4f}"]
        return [f"x_{t}", law_name(p), _shape(p), f"{float(p.log_prob(x_t).double().sum()):.4f}", *own, what]


def _chain_graph(pair: Diffusion, x: Tensor) -> ProgramGraph:
    last, plates = pair.num_timesteps, (("data", len(x)),)
    between = f"x_{last - 1} .. x_2"
    rows = {t: _row(pair, x, t) for t in (last, last - 1, 1, 0)}
    laws = {f"x_{last}": rows[last], between: rows[last - 1], "x_1": rows[1], "x_0": rows[0]}
    nodes = {
        name: Node(name, row[1], None if name == "x_0" else row[4], name == "x_0", plates) for name, row in laws.items()
    }
    names = list(nodes)
    model_edges = tuple(itertools.pairwise(names))
    guide_edges = tuple(("x_0", name) for name in names[:-1]) + model_edges[:-1]
    return ProgramGraph(nodes, model_edges, guide_edges)


def _time(t: int, x: Tensor) -> Tensor:
    return torch.full((1,), t, device=x.device)


def _shape(law: torch.distributions.Distribution) -> str:
    return f"{' '.join(map(str, law.batch_shape))} | {' '.join(map(str, law.event_shape))}".strip()
