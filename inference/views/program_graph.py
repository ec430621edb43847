"""The graph of a model and its guide: sites, plates, and who depends on whom in which program.

One node per sample site of either program. An edge a -> b means that the law of b in that program is computed from the
value of a (:mod:`inference.bounds.dependencies`): in the model p(b | a, ...), in the guide q(b | a, ...). A guide site that
is computed from observed data, passed in as an argument, has an edge from the observed site, so amortisation shows.
Plates nest as they do at each site; plates that cross without nesting are therefore drawn more than once.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.ops.provenance import ProvenanceTensor
from torch import Tensor

from inference.bounds.closed_forms import law_name
from inference.bounds.dependencies import Parents, parents
from inference.bounds.particles import Particles, Program, Site, forked_rng, prototype_draw

Path = tuple[tuple[str, int], ...]  # (name, size) of each plate around a site, outermost first

LEGEND = "solid: model p, dashed: guide q, shaded: observed"


@dataclass(frozen=True)
class Node:
    """A sample site: its laws in the two programs (None where it is absent) and the plates around it."""

    name: str
    model_law: str | None
    guide_law: str | None
    observed: bool
    plates: Path

    @property
    def lines(self) -> tuple[str, ...]:
        """What is written on the node."""
        laws = (("p", self.model_law), ("q", self.guide_law))
        return (self.name, *(f"{symbol}: {law}" for symbol, law in laws if law is not None))


@dataclass(frozen=True)
class ProgramGraph:
    """Nodes by site name, in the model's order and then the guide's; edges (from, to) of each program."""

    nodes: dict[str, Node]
    model_edges: tuple[tuple[str, str], ...]
    guide_edges: tuple[tuple[str, str], ...]


def program_graph(model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ProgramGraph:
    """Runs both programs once each to see their sites, and once more to see their dependencies.

    Raises:
        PairError: the programs' sites do not match; the message names the site.

    Example:
        >>> from ppl_models.linear_gaussian import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> graph = program_graph(pair.model, pair.guide, (torch.zeros(4, 3),), {})
        >>> graph.model_edges, graph.guide_edges
        ((('z', 'x'),), (('x', 'z'),))
    """
    with forked_rng(), torch.no_grad():
        particles = prototype_draw(model, guide, args, kwargs)
        tagged_args, tagged_kwargs = _tagged(particles, args, kwargs)
        above_in_model = parents(model, args, kwargs)
        above_in_guide = parents(guide, tagged_args, tagged_kwargs)
    sites = particles.guide | particles.model
    names = [*particles.model, *(name for name in particles.guide if name not in particles.model)]
    nodes = {
        name: Node(
            name,
            _law(particles.model.get(name)),
            _law(particles.guide.get(name)),
            bool(sites[name]["is_observed"]),
            tuple((frame.name, frame.size) for frame in sites[name]["cond_indep_stack"]),
        )
        for name in names
    }
    return ProgramGraph(nodes, _edges(above_in_model, names), _edges(above_in_guide, names))


def mermaid_text(graph: ProgramGraph) -> str:
    """The graph in Mermaid's flowchart language (mermaid.js.org/syntax/flowchart.html)."""
    identifiers = {name: f"n{i}" for i, name in enumerate(graph.nodes)}
    lines = ["flowchart TD", f"%% {LEGEND}"]
    for kind, indent, item in _outline(graph):
        pad = "  " * (indent + 1)
        if kind == "open":
            lines.append(f'{pad}subgraph plate{item[0]}["{_mermaid_quoted(item[1])}"]')
        elif kind == "close":
            lines.append(f"{pad}end")
        else:
            label = "<br/>".join(_mermaid_quoted(line) for line in graph.nodes[item].lines)
            lines.append(f'{pad}{identifiers[item]}(["{label}"])')
    lines += [f"  {identifiers[a]} --> {identifiers[b]}" for a, b in graph.model_edges]
    lines += [f"  {identifiers[a]} -.-> {identifiers[b]}" for a, b in graph.guide_edges]
    observed = [identifiers[name] for name, node in graph.nodes.items() if node.observed]
    if observed:
        lines += [
            "  classDef observed fill:#d9d9d9,stroke:#333333,color:#000000",
            f"  class {','.join(observed)} observed",
        ]
    return "\n".join(lines)


def dot_text(graph: ProgramGraph) -> str:
    """The graph in Graphviz's dot language (graphviz.org/doc/info/lang.html)."""
    identifiers = {name: f"n{i}" for i, name in enumerate(graph.nodes)}
    lines = [
        "digraph programs {",
        f'  graph [label="{LEGEND}", labelloc=b, fontname="Helvetica", fontsize=10]',
        '  node [shape=ellipse, style=filled, fillcolor=white, fontname="Helvetica", fontsize=11]',
    ]
    for kind, indent, item in _outline(graph):
        pad = "  " * (indent + 1)
        if kind == "open":
            style = 'labeljust=r, style=rounded, color="#666666"'
            lines.append(f"{pad}subgraph cluster{item[0]} {{ graph [label={_dot_quoted(item[1])}, {style}]")
        elif kind == "close":
            lines.append(f"{pad}}}")
        else:
            fill = ', fillcolor="#d9d9d9"' if graph.nodes[item].observed else ""
            label = "\n".join(graph.nodes[item].lines)
            lines.append(f"{pad}{identifiers[item]} [label={_dot_quoted(label)}{fill}]")
    lines += [f"  {identifiers[a]} -> {identifiers[b]}" for a, b in graph.model_edges]
    # the guide runs up what the model runs down, so its edges must not take part in the ranking
    lines += [f"  {identifiers[a]} -> {identifiers[b]} [style=dashed, constraint=false]" for a, b in graph.guide_edges]
    return "\n".join([*lines, "}"])


def _tagged(
    particles: Particles, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, with each tensor that a model site observes tagged by the site's name."""
    observed = {name: site["value"] for name, site in particles.model.items() if site["is_observed"]}

    def tagged(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        names = frozenset(name for name, value in observed.items() if _same_data(argument, value))
        return ProvenanceTensor(argument, names) if names else argument

    return tuple(tagged(a) for a in args), {key: tagged(value) for key, value in kwargs.items()}


def _same_data(argument: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and argument.shape == value.shape and bool(torch.equal(argument, value))


def _law(site: Site | None) -> str | None:
    return None if site is None else law_name(site["fn"])


def _edges(above: Parents, order: list[str]) -> tuple[tuple[str, str], ...]:
    return tuple((a, b) for b in order if b in above for a in order if a in above[b])


def _outline(graph: ProgramGraph) -> Iterator[tuple[str, int, Any]]:
    """The nodes within their plates, as ("open", depth, (number, label)), ("site", depth, name), ("close", depth, None).

    Each distinct path of plates is opened once, and holds its sites in order and the plates within it.
    """
    number = 0

    def walk(path: Path) -> Iterator[tuple[str, int, Any]]:
        nonlocal number
        depth, inner = len(path), []
        for node in graph.nodes.values():
            if node.plates == path:
                yield "site", depth, node.name
            elif node.plates[:depth] == path and node.plates[: depth + 1] not in inner:
                inner.append(node.plates[: depth + 1])
        for longer in inner:
            name, size = longer[-1]
            yield "open", depth, (number, f"{name}: {size}")
            number += 1
            yield from walk(longer)
            yield "close", depth, None

    yield from walk(())


def _mermaid_quoted(text: str) -> str:
    """Text inside Mermaid's double quotes; it reads HTML entities with # for &."""
    return html.escape(text).replace("&", "#").replace("#x27;", "#39;")


def _dot_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
