"""A system's own choices, read from its preset: their names, defaults and types, and a pair from stated ones.

The options that many systems share (--latent-dim, --hidden, --activation) and the rest (--pair KEY=VALUE) are all arguments
of the preset; this is where they meet.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, Union

from pydantic import TypeAdapter, ValidationError

from inference.commands.options import TrainOptions
from inference.training.config import ConfigError
from ppl_models.registry import system

SHARED = ("latent_dim", "hidden", "activation")
_PLAIN = (int, float, str, bool, types.NoneType)


def choices_of(name: str) -> dict[str, tuple[Any, Any]]:
    """Type and default of each choice that can be written as text, by name, in the preset's order.

    Raises:
        ValueError: no such system; the message lists those there are.

    Example:
        >>> list(choices_of("vae")), choices_of("vae")["activation"][1]
        (['latent_dim', 'hidden', 'activation', 'num_labels'], 'tanh')
    """
    preset = system(name)
    hints = typing.get_type_hints(preset)
    parameters = list(inspect.signature(preset).parameters.values())[2:]  # after data_shape and likelihood
    return {p.name: (hints[p.name], p.default) for p in parameters if _is_plain(hints[p.name])}


def pair_arguments(name: str, options: TrainOptions) -> dict[str, Any]:
    """The preset's arguments: what is stated, and its defaults.

    Raises:
        ConfigError: a choice that this system does not have, or of another type; one sentence.

    Example:
        >>> pair_arguments("ddpm", TrainOptions(data="digits", pair={"num_timesteps": 50}))["num_timesteps"]
        50
    """
    known = choices_of(name)
    stated = dict(options.pair)
    for key in SHARED:
        value = getattr(options, key)
        if value is not None:
            if key in stated:
                raise ConfigError(f"{key}: given twice, by itself and in pair; leave one of them out")
            stated[key] = value
    for key in stated:
        if key not in known:
            raise ConfigError(f"{key}: expected a choice of {name}, which are {', '.join(known)}; leave it out")
    return {key: _checked(key, kind, stated.get(key, default)) for key, (kind, default) in known.items()}


def _checked(key: str, kind: Any, value: Any) -> Any:
    if (
        isinstance(value, tuple) and len(value) == 1 and kind in (int, int | None)
    ):  # a width that --hidden reads as a list of one
        value = value[0]
    value = list(value) if isinstance(value, tuple) else value  # as a YAML file has it
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        fault = error.errors()[0]["msg"]
        raise ConfigError(f"{key}: {fault[0].lower()}{fault[1:]}, got {value!r}") from None


def _is_plain(kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType) or origin in (Sequence, tuple, list, typing.get_origin(Sequence[int])):
        return all(_is_plain(part) for part in typing.get_args(kind) if part is not Ellipsis)
    return kind in _PLAIN
