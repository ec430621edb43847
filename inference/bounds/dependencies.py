"""Which sites a program's site depends on directly, found by running the program once.

Values drawn at sample sites are tagged (``pyro.ops.provenance``); the tags on a site's log-density name its parents.
This is what ``pyro.infer.inspect.get_dependencies`` does, with two differences that closed forms need:

- ``Delta`` sites are sites here. ``get_dependencies`` elides them, and so would not see that ``z ~ Delta(f(w))`` in a
  guide descends from ``w``, as the sites of Pyro's autoguides descend from their auxiliary latent.
- A value read into Python (``if z > 0``, ``int(z)``, ``z.item()``) loses its tag. From there on every later site of the
  program counts as its child.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.overrides import TorchFunctionMode

Parents = dict[str, frozenset[str]]

READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__"} | {
    "equal",
    "allclose",
    "is_nonzero",
}


def parents(program: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parents:
    """Direct parents of each sample site, observed sites included, in the program's order.

    Example:
        >>> import pyro.distributions as dist
        >>> def program():
        ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
        ...     b = pyro.sample("b", dist.Delta(2 * a))
        ...     pyro.sample("c", dist.Normal(b, 1.0))
        >>> {site: sorted(up) for site, up in parents(program, (), {}).items()}
        {'a': [], 'b': ['a'], 'c': ['b']}
    """
    tags = _Tagger()
    with torch.no_grad(), pyro.validation_enabled(False), _ReadWatcher(tags), tags:
        trace = poutine.trace(program).get_trace(*args, **kwargs)
        found: Parents = {}
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                reached = get_provenance([site["fn"].log_prob(site["value"]), site["mask"], site["scale"]])
                found[name] = frozenset(reached - {name}) | (tags.read_before[name] - {name})
    return found


def descendants(of: str, links: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """All sites reached from ``of`` along ``links`` (child -> parents).

    Example:
        >>> sorted(descendants("a", {"a": frozenset(), "b": frozenset({"a"}), "c": frozenset({"b"})}))
        ['b', 'c']
    """
    reached: set[str] = set()
    frontier = {of}
    while frontier:
        frontier = {child for child, above in links.items() if above & frontier} - reached
        reached |= frontier
    return frozenset(reached)


class _Tagger(Messenger):
    """Tags each drawn value with its own site's name, so that only direct dependence is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.read: frozenset[str] = frozenset()
        self.read_before: dict[str, frozenset[str]] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg):
            return
        self.read_before[msg["name"]] = self.read
        if not msg["is_observed"] and isinstance(msg["value"], torch.Tensor) and msg["value"].numel():
            msg["value"] = ProvenanceTensor(detach_provenance(msg["value"]), frozenset({msg["name"]}))


class _ReadWatcher(TorchFunctionMode):
    """Notes which sites' values have been read into Python."""

    def __init__(self, tags: _Tagger) -> None:
        super().__init__()
        self.tags = tags

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.tags.read |= get_provenance([args, kwargs or {}])
        return func(*args, **(kwargs or {}))
