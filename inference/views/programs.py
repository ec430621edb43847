"""A pair of programs as a table and as a graph: what ``ppl trace`` shows.

The table has one row per sample site, the model's laws beside the guide's, from one draw of the guide on which the model is
replayed. The graph has the same sites; see :mod:`inference.views.program_graph`. Looking leaves torch's random state as it
was. Any Pyro programs will do.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch
from torch import Tensor

from inference.bounds.closed_forms import law_name
from inference.bounds.decomposition import decompose_elbo
from inference.bounds.particles import Program, Site, forked_rng, prototype_draw
from inference.views.program_graph import dot_text, mermaid_text, program_graph
from inference.views.tables import text_table

REASON_PARTICLES = 100  # enough for a closed form to be held against the draws
DOT_SECONDS = 60


class GraphvizError(RuntimeError):
    """Graphviz's ``dot`` is not installed, or failed."""


def program_table(model: Program, guide: Program, *args: Any, **kwargs: Any) -> str:
    """Sites of model and guide side by side: plates, laws, shapes, log-densities, and whether the KL is closed.

    Log-densities are those of one draw z ~ q(z | x), summed over all of the site, in nats; shapes are "batch | event". A site
    is reparameterised if gradients pass through its guide's draw. The reasons for using a closed form or not stand below.

    Args:
        model: Pyro program p(x, z), any.
        guide: Pyro program q(z | x).
        args: passed to both.
        kwargs: passed to both.

    Raises:
        PairError: the programs' sites do not match; the message names the site.
        NotANumberError: a log-density is NaN; the message names the site.

    Example:
        >>> from ppl_models.linear_gaussian import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> program_table(pair.model, pair.guide, torch.zeros(4, 3)).splitlines()[0].split("  ")[0]
        'site'
    """
    with forked_rng(), torch.no_grad():
        particles = prototype_draw(model, guide, args, kwargs)
        decomposition = decompose_elbo(model, guide, *args, num_particles=REASON_PARTICLES, **kwargs)
    header = [
        "site",
        "plates",
        "p law",
        "p shape",
        "log p",
        "q law",
        "q shape",
        "log q",
        "reparameterised",
        "KL closed",
    ]
    rows = []
    names = [*particles.model, *(name for name in particles.guide if name not in particles.model)]
    for name in names:
        p, q = particles.model.get(name), particles.guide.get(name)
        site = particles.guide[name] if p is None else p
        plates = " > ".join(f"{frame.name}: {frame.size}" for frame in site["cond_indep_stack"])
        latent = q is not None and p is not None and not p["is_observed"]
        closed = _yes_or_no(decomposition[name].analytic is not None) if latent else "-"
        reparameterised = "-" if q is None else _yes_or_no(q["fn"].has_rsample)
        rows.append([name, plates or "-", *_columns(p), *_columns(q), reparameterised, closed])
    reasons = [f"  {name}: {decomposition[name].reason}" for name in names if name in decomposition]
    words = "  log p, log q: nats at one draw of the latents, summed over all of a site"
    return "\n".join([text_table(header, rows), words, *reasons])


def mermaid(model: Program, guide: Program, *args: Any, **kwargs: Any) -> str:
    """Both programs as one Mermaid flowchart: the model's edges solid, the guide's dashed, observed sites shaded.

    Args:
        model: Pyro program p(x, z), any.
        guide: Pyro program q(z | x).
        args: passed to both.
        kwargs: passed to both.

    Raises:
        PairError: the programs' sites do not match; the message names the site.

    Example:
        >>> from ppl_models.linear_gaussian import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> print(mermaid(pair.model, pair.guide, torch.zeros(4, 3)))
        flowchart TD
        %% solid: model p, dashed: guide q, shaded: observed
          subgraph plate0["data: 4"]
            n0(["z<br/>p: Normal<br/>q: MultivariateNormal"])
            n1(["x<br/>p: Normal"])
          end
          n0 --> n1
          n1 -.-> n0
          classDef observed fill:#d9d9d9,stroke:#333333,color:#000000
          class n1 observed
    """
    return mermaid_text(program_graph(model, guide, args, kwargs))


def graph_svg(model: Program, guide: Program, *args: Any, **kwargs: Any) -> bytes:
    """The graph of :func:`mermaid` as an SVG file, laid out by Graphviz's ``dot`` program.

    Args:
        model: Pyro program p(x, z), any.
        guide: Pyro program q(z | x).
        args: passed to both.
        kwargs: passed to both.

    Returns:
        The file's content.

    Raises:
        GraphvizError: ``dot`` is not on the path, fails, or takes over a minute.
        PairError: the programs' sites do not match; the message names the site.
    """
    return dot_svg(dot_text(program_graph(model, guide, args, kwargs)))


def dot_svg(text: str) -> bytes:
    """A graph in the dot language as an SVG file.

    Raises:
        GraphvizError: ``dot`` is not on the path, fails, or takes over a minute.
    """
    program = shutil.which("dot")
    if program is None:
        raise GraphvizError(
            "expected Graphviz's dot program on the path for an SVG, found none: install graphviz, or use the Mermaid text"
        )
    try:
        done = subprocess.run(
            [program, "-Tsvg"], input=text.encode(), capture_output=True, timeout=DOT_SECONDS, check=True
        )
    except subprocess.TimeoutExpired:
        raise GraphvizError(
            f"expected dot to lay the graph out within {DOT_SECONDS} s, it did not: use the Mermaid text"
        ) from None
    except subprocess.CalledProcessError as error:
        message = error.stderr.decode(errors="replace").strip()
        raise GraphvizError(f"expected dot to draw the graph, it failed: {message}; use the Mermaid text") from None
    return done.stdout


def _columns(site: Site | None) -> list[str]:
    """Law, shape and summed log-density of a site in one program."""
    if site is None:
        return ["-", "-", "-"]
    shape = f"{_sizes(site['fn'].batch_shape)} | {_sizes(site['fn'].event_shape)}".strip()
    law = f"{law_name(site['fn'])}{' (observed)' if site['is_observed'] else ''}"
    return [law, shape, f"{float(_total(site['log_prob'])):.4f}"]


def _sizes(shape: torch.Size) -> str:
    return " ".join(map(str, shape))


def _total(log_prob: Tensor) -> Tensor:
    return log_prob.to(torch.float64).sum()


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"
