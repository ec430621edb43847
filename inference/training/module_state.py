"""Where a module's parameters and buffers live: read as they are now, or replaced for a while.

A tensor that is registered twice (tied weights), or through a module that is registered twice, is one tensor with several
places, and all of them change together. ``torch.func.functional_call`` puts back the first of these places alone.

The one constraint: the modules stay the ones that they were, and so do the ties; tensors in them may be replaced. Whether it
holds is told by :meth:`ModuleState.is_current`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["ModuleState"]


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
        self._children = [(m._modules, name, child) for m in module.modules() for name, child in m._modules.items()]

    def is_current(self) -> bool:
        """Whether modules and ties are those that there were when this was made, and no tensor was taken away."""
        for home, name, child in self._children:
            if home.get(name) is not child:
                return False
        for (home, key), *_ in self._places:
            if home.get(key) is None:
                return False
        return all(len({id(home.get(key)) for home, key in places}) == 1 for places in self._tied)

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
