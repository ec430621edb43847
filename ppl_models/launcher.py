"""The ``ppl`` command's first step: make sure that the package ``inference`` is this project's, then hand over.

The check lives here, not in ``inference``, because another distribution's package of that generic name, found first on
the path or installed over ours, would never run a check of ours.
"""

from __future__ import annotations

import importlib
import sys


def check_inference() -> None:
    """Raises unless ``import inference`` finds this project's package.

    Raises:
        ImportError: it finds another distribution's package, or none; the message says where and what to do.

    Example:
        >>> check_inference()
    """
    try:
        package = importlib.import_module("inference")
    except ImportError as error:
        raise ImportError(f"expected the package 'inference' of ppl-models, found none ({error}): {_REMEDY}") from None
    if getattr(package, "__distribution__", None) != "ppl-models":
        place = package.__file__ or next(iter(package.__path__), "an unknown place")
        raise ImportError(
            f"expected 'inference' to be the package of ppl-models, found another one at {place}: {_REMEDY}"
        )


_REMEDY = "install ppl-models into an environment of its own (or run from a folder that holds no 'inference')"


def main() -> None:
    """Entry point of the console script."""
    try:
        check_inference()
    except ImportError as error:
        print(f"ppl: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    importlib.import_module("inference.cli").main()
