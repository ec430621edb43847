"""Nested state, such as an optimiser's, as tensors and plain values for a checkpoint, and back bit for bit.

A tree of plain data keeps the structure: a dict stands as ``{"dict": [[key, item], ...]}``, a tuple as ``{"tuple": [...]}``,
a tensor as ``{"tensor": its name}``, NaN and the infinities as ``{"float": their bits}``; the rest stands for itself.

The one constraint: keys are strings or integers, and no other type of value is known.
"""

import math
import struct
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from inference.training.checkpoints import CheckpointError


def flatten_state(state: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part nested state, such as an optimiser's `state_dict()`, into tensors and plain values for `save_checkpoint`.

    Args:
        state: dicts (keys strings or integers), lists and tuples, nested, of tensors, None, bool, int, float (NaN and
            infinities too) and str.

    Returns:
        The tensors (not copies), named by their place, e.g. "state['param_groups'][0]['lr']", and `{"state": tree}`,
        where the tree is plain data: a tensor stands as its name, and what JSON lacks has a word of its own.

    Raises:
        TypeError: a value or key of another type; the sentence names its place.

    Example:
        >>> import torch
        >>> tensors, values = flatten_state({"betas": (0.9, 0.999), 0: [torch.ones(1), float("inf")]})
        >>> list(tensors)
        ['state[0][0]']
        >>> restore_state(tensors, values)
        {'betas': (0.9, 0.999), 0: [tensor([1.]), inf]}
    """
    tensors: dict[str, Tensor] = {}
    return tensors, {"state": _encode(state, "state", tensors)}


def restore_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Any:
    """The inverse of `flatten_state`, bit for bit. Subclasses of dict come back as dicts, parameters as tensors.

    Args:
        tensors: at least those that the tree names.
        values: with the tree under "state"; other keys are not looked at.

    Returns:
        The state.

    Raises:
        CheckpointError: no tree, a tensor that is not there, or a word that `flatten_state` does not write.
    """
    try:
        return _decode(values["state"], tensors)
    except (KeyError, TypeError, ValueError, RecursionError, struct.error) as error:
        raise CheckpointError(
            f"the values do not describe a state ({type(error).__name__}: {error}); pass what flatten_state returned"
        ) from error


def _encode(node: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        tensors[place] = node
        return {"tensor": place}
    if isinstance(node, dict):
        for key in node:
            if type(key) not in (str, int):
                raise TypeError(f"{place} has the key {key!r}, a {type(key).__name__}; expected str or int")
        return {"dict": [[key, _encode(item, f"{place}[{key!r}]", tensors)] for key, item in node.items()]}
    if type(node) in (list, tuple):
        items = [_encode(item, f"{place}[{index}]", tensors) for index, item in enumerate(node)]
        return items if type(node) is list else {"tuple": items}
    if type(node) is float and not math.isfinite(node):
        return {"float": struct.pack(">d", node).hex()}
    # Exact types: a NumPy scalar is a float too, and would come back as another type.
    if node is None or type(node) in (bool, int, float, str):
        return node
    raise TypeError(
        f"{place} is a {type(node).__module__}.{type(node).__qualname__}; "
        "expected a tensor, dict, list, tuple, None, bool, int, float or str: convert it first"
    )


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((word, content),) = node.items()
    if word == "tensor":
        return tensors[content]
    if word == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    if word == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if word == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    raise ValueError(f"unknown word {word!r}")
