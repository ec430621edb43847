"""``ppl data`` and ``ppl models``: what there is to train, and on what."""

from __future__ import annotations

import inspect
from typing import Any


def data() -> None:
    """List the data sets that --data takes.

    Values are counts until a scaling is stated: unit makes them k / (K - 1) in 0..1, symmetric -1 .. 1, classes indices.
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
    from inference.views.tables import text_table
    from ppl_models.registry import SYSTEMS, system

    systems = [[name, _summary(getattr(system(name), "__self__", system(name)))] for name in SYSTEMS]
    print(text_table(["system", "what"], systems))
    laws = [
        [name, law.scaling, "probabilities" if law.is_discrete else "densities", _summary(law)]
        for name, law in LIKELIHOODS.items()
    ]
    print("\n" + text_table(["--likelihood", "made for --scaling", "values have", "what"], laws))


def _shown(value: Any) -> str:
    return "its own" if value is None else str(value)


def _summary(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]
