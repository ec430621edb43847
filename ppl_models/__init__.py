"""Deep latent-variable models as explicit pairs of Pyro programs: what p and q are.

Names load on first use, so ``import ppl_models`` itself is cheap and changes no global state.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_models.launcher import check_inference
    from ppl_models.linear_gaussian import LinearGaussian
    from ppl_models.pair import ModelGuidePair
    from ppl_models.vae import VAE

__version__ = "0.1.0"

_HOMES = {
    "LinearGaussian": "ppl_models.linear_gaussian",
    "ModelGuidePair": "ppl_models.pair",
    "VAE": "ppl_models.vae",
    "check_inference": "ppl_models.launcher",
}

__all__ = ["VAE", "LinearGaussian", "ModelGuidePair", "check_inference"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ppl_models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
