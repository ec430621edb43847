"""Which sites a program's site depends on directly, found by running the program once.

Values drawn at sample sites are tagged (``pyro.ops.provenance``); the tags on a site's log-density name its parents.
This is what ``pyro.infer.inspect.get_dependencies`` does, with two differences that closed forms need:

- ``Delta`` sites are sites here. ``get_dependencies`` elides them, and so would not see that ``z ~ Delta(f(w))`` in a
  guide descends from ``w``, as the sites of Pyro's autoguides descend from their auxiliary latent.
- A value read into Python (``if z > 0``, ``int(z)``, ``z.item()``) or written into an untagged tensor (``t[0] = z``) loses
  its tag. From there on every later site of the program counts as its child.
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
from torch.distributions import TransformedDistribution
from torch.overrides import TorchFunctionMode

Parents = dict[str, frozenset[str]]

SCALAR_READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__"} | {
    "equal",
    "allclose",
    "is_nonzero",
}
READS = SCALAR_READS | {"numpy", "__array__", "__dlpack__"}


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
    found, _ = _tagged_run(program, args, kwargs)
    return found


def scalars_read(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> frozenset[str]:
    """Latent sites whose value either program reads into Python as a number or truth value, so that it may branch on it.

    Example:
        >>> import pyro.distributions as dist
        >>> def program():
        ...     return "positive" if pyro.sample("z", dist.Normal(0.0, 1.0)) > 0 else "negative"
        >>> sorted(scalars_read(program, program, (), {}))
        ['z']
    """
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    _, above = _tagged_run(guide, args, kwargs)
    _, below = _tagged_run(poutine.replay(model, trace=trace), args, kwargs)
    return above.scalars_read | below.scalars_read


def _tagged_run(program: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Parents, _Tagger]:
    tags = _Tagger()
    with torch.no_grad(), pyro.validation_enabled(False), _ReadWatcher(tags), tags:
        trace = poutine.trace(program).get_trace(*args, **kwargs)
        found: Parents = {}
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                reached = _reached(site) | get_provenance([site["mask"], site["scale"]])
                found[name] = frozenset(reached - {name}) | (tags.read_before[name] - {name})
    return found, tags


def _reached(site: dict[str, Any]) -> frozenset[str]:
    """The tags on a site's log-density; of a flow without an inverse, with a density at its own draw alone, those of a draw."""
    try:
        return get_provenance(site["fn"].log_prob(site["value"]))
    except (KeyError, NotImplementedError):
        if not isinstance(site["fn"], TransformedDistribution) or site["is_observed"]:
            raise
        return get_provenance(site["fn"].rsample())


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
        self.scalars_read: frozenset[str] = frozenset()
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
        name = getattr(func, "__name__", "")
        if name in READS:
            reached = get_provenance([args, kwargs or {}])
            self.tags.read |= reached
            if name in SCALAR_READS:
                self.tags.scalars_read |= reached
        result = func(*args, **(kwargs or {}))
        if name not in READS and not isinstance(args[0] if args else None, ProvenanceTensor):
            writes = (
                name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or "out" in (kwargs or {})
            )
            if writes or (isinstance(result, torch.Tensor) and not isinstance(result, ProvenanceTensor)):
                self.tags.read |= get_provenance(
                    [args, kwargs or {}]
                )  # written where no tag is kept, or lost on the way
        return result
