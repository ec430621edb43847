"""What there is, by name: the systems that ``ppl train`` knows and the parts that a saved pair may be rebuilt from.

A saved model is a description, ``{"class": "VAE", "encoder": {"class": "GaussianEncoder", ...}, ...}``, plus its
weights. Only the classes listed here can be named in one, so reading a description never imports or runs anything that
came with the file.

A new system is one file in ``ppl_models``, one line in :data:`SYSTEMS`, and one in :data:`PARTS` for each class of it that
a saved run is to be rebuilt from.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

SYSTEMS: dict[str, str] = {
    "vae": "ppl_models.vae:VAE.preset",
}

PARTS: dict[str, str] = {
    "VAE": "ppl_models.vae:VAE",
    "LinearGaussian": "ppl_models.linear_gaussian:LinearGaussian.random",
    "MLP": "ppl_models.networks.mlp:MLP",
    "GaussianEncoder": "ppl_models.networks.mlp:GaussianEncoder",
    "Decoder": "ppl_models.networks.mlp:Decoder",
    "Normal": "ppl_models.likelihoods:Normal",
    "Bernoulli": "ppl_models.likelihoods:Bernoulli",
    "Categorical": "ppl_models.likelihoods:Categorical",
    "DiscretizedNormal": "ppl_models.likelihoods:DiscretizedNormal",
}


class UnknownPartError(ValueError):
    """A module that a description cannot hold, or a description that names a class not in the registry."""


def system(name: str) -> Callable[..., nn.Module]:
    """The preset of a system by its command-line name.

    Raises:
        ValueError: no such system; the message lists those there are.

    Example:
        >>> system("vae").__name__
        'preset'
    """
    if name not in SYSTEMS:
        raise ValueError(f"expected a system among {', '.join(SYSTEMS)}, got {name!r}")
    return _resolve(SYSTEMS[name])


def describe(module: nn.Module) -> dict[str, Any]:
    """A JSON-able description from which :func:`build` makes the same module, weights aside.

    Raises:
        UnknownPartError: the module's class is not in :data:`PARTS` (a network of your own, say).

    Example:
        >>> from ppl_models.networks import MLP
        >>> describe(MLP([2, 3]))
        {'class': 'MLP', 'widths': [2, 3], 'activation': 'tanh'}
    """
    name = type(module).__name__
    if name not in PARTS or getattr(_resolve(PARTS[name]), "__self__", _resolve(PARTS[name])) is not type(module):
        raise UnknownPartError(
            f"expected a module made of this library's parts, got {type(module).__module__}.{type(module).__qualname__}: "
            "a network of your own cannot be rebuilt from a file; pass the pair itself when loading"
        )
    return {"class": name, **module.config()}  # type: ignore[operator]


def build(description: dict[str, Any]) -> Any:
    """The inverse of :func:`describe`: constructs the module, with fresh weights.

    Raises:
        UnknownPartError: the description names a class that is not in :data:`PARTS`.

    Example:
        >>> build({"class": "MLP", "widths": [2, 3]}).widths
        [2, 3]
    """
    name = description.get("class")
    if name not in PARTS:
        raise UnknownPartError(f"expected a class among {', '.join(PARTS)}, got {name!r}: the description is not ours")
    arguments = {
        key: build(value) if isinstance(value, dict) and "class" in value else value
        for key, value in description.items()
        if key != "class"
    }
    return _resolve(PARTS[name])(**arguments)


def _resolve(path: str) -> Any:
    module, _, attributes = path.partition(":")
    value: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        value = getattr(value, attribute)
    return value
