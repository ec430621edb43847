"""``ppl data`` and ``ppl models``: what there is to train, and on what."""

from __future__ import annotations

import inspect
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def data() -> None:
    """List the data sets that --data takes.

    Values are counts until a scaling is stated: unit makes them k / (K - 1) in 0..1, symmetric -1 .. 1, classes indices.
    Continuous values stay as they are, or with scaling standard are taken less their mean, in standard deviations.
    """
    from inference.training.datasets import list_data
    from inference.views.tables import text_table

    header = ["--data", "kind", "shape", "train", "held out", "levels", "what"]
    rows = [
        [
            row["spec"],
            _shown(row["kind"]),
            " x ".join(map(str, row["shape"])) if row["shape"] else "its own",
            _shown(row["num_train"]),
            _shown(row["num_test"]),
            "continuous" if row["kind"] == "point" else _shown(row["levels"]),
            row["what"],
        ]
        for row in list_data()
    ]
    print(text_table(header, rows))


def models() -> None:
    """List the systems that `ppl train` knows, and the likelihoods that go with them."""
    from inference.commands.choices import LIKELIHOODS
    from inference.commands.pair_choices import SHARED, choices_of
    from inference.views.tables import text_table
    from ppl_models.registry import SYSTEMS, system

    systems = [[name, _summary(getattr(system(name), "__self__", system(name)))] for name in SYSTEMS]
    print(text_table(["system", "what"], systems))
    shared = [key.replace("_", "-") for key in SHARED]
    own = [
        [name, key, _written(kind), _written_default(default)]
        for name in SYSTEMS
        for key, (kind, default) in choices_of(name).items()
    ]
    print("\n" + text_table(["system", "--pair", "values", "default"], own))
    print(f"(--{', --'.join(shared)} are options of their own, too)")
    laws = [
        [name, law.scaling, "probabilities" if law.is_discrete else "densities", _summary(law)]
        for name, law in LIKELIHOODS.items()
    ]
    print("\n" + text_table(["--likelihood", "made for --scaling", "values have", "what"], laws))


def _written(kind: Any) -> str:
    """A type as a user would write its values."""
    if kind in (int, float, str, bool):
        return {int: "whole number", float: "number", str: "name", bool: "true or false"}[kind]
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    parts = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_written(part) for part in parts))
    return "[" + ", ".join(_written(part) for part in parts) + ", ...]"


def _written_default(default: Any) -> str:
    return "none" if default is None else str(list(default) if isinstance(default, tuple) else default)


def _shown(value: Any) -> str:
    return "its own" if value is None else str(value)


def _summary(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]
