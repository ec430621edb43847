"""What ``ppl train`` can be told, from which places, and how a choice is written down. Imports no torch.

A run is told by a YAML file (``--config``) and by the command line, which wins over the file. On the command line a key
is either an option of its own (``--epochs 50``) or an assignment (``--set epochs=50``); the two are checked alike, and
giving a key in both ways is refused. What nobody states is chosen by :mod:`inference.commands.choices`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from inference.training.config import ConfigError, TrainConfig, explain
from inference.training.texts import read_yaml

OPTIONS_FILE = "options.yaml"  # in a RUN: what it was told, as --config reads it


class TrainOptions(TrainConfig):
    """The data, the parts of the pair, and every field of :class:`~inference.training.config.TrainConfig`.

    None for a part means that the data decide; see :func:`inference.commands.choices.choose`.

    Example:
        >>> TrainOptions(data="digits", hidden="64,32").hidden
        (64, 32)
    """

    data: str = Field(description="what to train on; `ppl data` lists what there is")
    likelihood: (
        Literal["bernoulli", "normal", "categorical", "discretized_normal", "poisson", "negative_binomial"] | None
    ) = Field(None, description="law of x given z")
    scaling: Literal["none", "unit", "symmetric", "classes", "standard", "counts"] | None = Field(
        None,
        description="what the numbers are: grey levels as they are, in 0..1, in -1..1, or class indices; standard: continuous "
        "data less their mean, in standard deviations; counts: numbers of things",
    )
    test_fraction: float | None = Field(
        None, gt=0, lt=1, description="part of the data to hold out, where they have no held-out part"
    )
    columns: tuple[str, ...] | None = Field(
        None, description="of a table, the columns to model, by name; the others are left out"
    )
    binarization: Literal["none", "dynamic", "fixed"] | None = Field(
        None, description="grey values read as probabilities of 0 or 1: drawn anew at each use, or once"
    )
    given_labels: bool = Field(
        False, description="condition both programs on the data's labels y: p(x, z | y) and q(z | x, y)"
    )
    latent_dim: int | None = Field(None, ge=1, le=1_000_000, description="width of z, where the system has one")
    hidden: tuple[int, ...] | None = Field(
        None, description="hidden widths of the encoder, which the decoder mirrors; one width for a diffusion's network"
    )
    activation: Literal["tanh", "relu", "silu", "gelu"] | None = Field(None, description="between the layers")
    start_from: str | None = Field(None, description="a RUN of the same pair, whose weights to begin with")
    pair: dict[str, Any] = Field(default_factory=dict, description="the system's other choices, by name")

    @field_validator("hidden", "columns", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        value = [value] if isinstance(value, int) else value
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("hidden")
    @classmethod
    def _positive_widths(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and any(not 1 <= width <= 1_000_000 for width in value):
            raise ValueError(f"hidden: expected widths in 1..1000000 such as 256,128, got {','.join(map(str, value))}")
        return value

    def train_config(self) -> TrainConfig:
        """The part that :func:`inference.fit` takes."""
        return TrainConfig(**{name: getattr(self, name) for name in TrainConfig.model_fields})

    def text(self) -> str:
        """All options as YAML, the data and the pair's parts first; ``--config`` reads it back.

        Example:
            >>> print(TrainOptions(data="digits").text().splitlines()[0])
            data: digits
        """
        values = self.model_dump(mode="json")
        parts = [name for name in values if name not in TrainConfig.model_fields]
        ordered = {name: values[name] for name in [*parts, *TrainConfig.model_fields]}
        return yaml.safe_dump(ordered, sort_keys=False, default_flow_style=None).strip()


def gather_options(
    given: Mapping[str, Any],
    assignments: Sequence[str] = (),
    file: Path | None = None,
    choices: Sequence[str] = (),
) -> TrainOptions:
    """The options of one call, checked.

    Args:
        given: options of the command line by key; None where an option was left out.
        assignments: ``key=value`` each, the values in YAML.
        file: a YAML mapping of keys to values.
        choices: ``key=value`` each, of the system's own choices.

    Raises:
        ConfigError: a key given twice, no such key, a value out of range, or no data; one sentence.
        ContentError: the file is not a plain YAML mapping.

    Example:
        >>> gather_options({"data": "digits", "epochs": None}, ["epochs=7"]).epochs
        7
    """
    stated = {key: value for key, value in given.items() if value is not None}
    _assign("--set", "epochs=50", assignments, stated)
    told = read_yaml(file) if file is not None else {}
    if "format" in told:
        raise ConfigError(
            f"{file}: expected a file of options, got the record of a run: {OPTIONS_FILE} beside it is one, and --resume goes "
            "on with the run"
        )
    options = {**told, **stated}
    if choices:
        chosen: dict[str, Any] = {}
        _assign("--pair", "num_timesteps=100", choices, chosen)
        options["pair"] = {**(options.get("pair") or {}), **chosen}
    if options.get("data") is None:
        raise ConfigError("data: expected --data and what to train on, got none; --data digits, say (`ppl data` lists)")
    try:
        return TrainOptions(**options)
    except ValidationError as error:
        raise ConfigError(explain(error, TrainOptions)) from None


def _assign(option: str, example: str, assignments: Sequence[str], stated: dict[str, Any]) -> None:
    """Adds ``key=value`` assignments to what was stated before."""
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign or not key:
            raise ConfigError(f"{option}: expected key=value, got {assignment!r}; write {option} {example}, say")
        if key in stated:
            raise ConfigError(f"{key}: given twice on the command line; leave one of them out")
        stated[key] = _value(key, value)


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: expected a plain value, got {text!r}; quote strings that look odd") from None
