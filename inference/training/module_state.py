"""Where a module's parameters and buffers live: read as they are now, or replaced for a while.

A tensor that is registered twice (tied weights), or through a module that is registered twice, is one tensor with several
places, and all of them change together. ``torch.func.functional_call`` puts back the first of these places alone.

The one constraint: the modules stay the ones that they were, with as many tensors and hooks, and so do the ties; tensors in
them may be replaced. Whether it holds is told by :meth:`ModuleState.is_current`. Numbers and words that modules keep as plain
attributes, such as a dropout's p or a weight beta, are told by :meth:`ModuleState.settings`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["ModuleState"]

_HOMES = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, complex, str, type(None))
# read apart (training), without meaning once a layer is made, or torch's own
_LEFT_OUT = {"training", "in_features", "out_features", "in_channels", "out_channels", "_is_full_backward_hook"}


class ModuleState:
    """The parameters and buffers of a module, each once, parameters first.

    Args:
        module: whose state it is, submodules included.

    Attributes:
        num_parameters: how many of the tensors are parameters.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> state = ModuleState(layer)
        >>> with state.replaced([torch.zeros_like(tensor) for tensor in state.read()]):
        ...     layer(torch.ones(3, 2)).tolist()
        [[0.0], [0.0], [0.0]]
        >>> isinstance(layer.weight, nn.Parameter)
        True
    """

    def __init__(self, module: nn.Module) -> None:
        places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for kind in ("_parameters", "_buffers"):
            for owner in module.modules():
                for key, tensor in getattr(owner, kind).items():
                    if tensor is not None:
                        places.setdefault(id(tensor), []).append((getattr(owner, kind), key))
            if kind == "_parameters":
                self.num_parameters = len(places)
        self._places = list(places.values())
        self._tied = [found for found in self._places if len(found) > 1]
        modules = list(module.modules())
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._sizes = [(home, len(home)) for m in modules for home in (getattr(m, kind) for kind in (*_HOMES, *_HOOKS))]
        self._absent = [
            (home, key)
            for m in modules
            for home in (m._parameters, m._buffers)
            for key, tensor in home.items()
            if tensor is None
        ]
        self._settings = [
            (vars(m), key)
            for m in modules
            for key, value in vars(m).items()
            if isinstance(value, _PLAIN) and key not in _LEFT_OUT
        ]

    def is_current(self) -> bool:
        """Whether modules, ties and hooks are those that there were when this was made, and no tensor came or went."""
        for home, size in self._sizes:
            if len(home) != size:
                return False
        for home, name, child in self._children:
            if home.get(name) is not child:
                return False
        for home, key in self._absent:
            if home.get(key) is not None:
                return False
        for (home, key), *_ in self._places:
            if home.get(key) is None:
                return False
        return all(len({id(home.get(key)) for home, key in places}) == 1 for places in self._tied)

    def settings(self) -> tuple[Any, ...]:
        """The plain attributes of the modules as they are now, hashable: what is no number or word by its identity."""
        values = [home.get(key) for home, key in self._settings]
        return tuple([value if isinstance(value, _PLAIN) else id(value) for value in values])

    def read(self) -> list[Tensor]:
        """The tensors as they are now."""
        return [home[key] for (home, key), *_ in self._places]

    def write(self, tensors: Sequence[Tensor]) -> bool:
        """Puts tensors in all places; whether another one lay in any."""
        changed = False
        for tensor, places in zip(tensors, self._places, strict=True):
            for home, key in places:
                changed = changed or home[key] is not tensor
                home[key] = tensor
        return changed

    @contextmanager
    def replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Other tensors in these places, for a while."""
        own = self.read()
        try:
            self.write(tensors)
            yield
        finally:
            self.write(own)
