"""Deep latent-variable models as explicit pairs of Pyro programs: what p and q are.

Names load on first use, so ``import ppl_models`` itself is cheap and changes no global state.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_models.autoencoder import AutoEncoder
    from ppl_models.d3pm import D3PM
    from ppl_models.ddpm import DDPM
    from ppl_models.discrete_vae import CategoricalVAE
    from ppl_models.hvae import HVAE
    from ppl_models.launcher import check_inference
    from ppl_models.linear_diffusion import LinearDiffusion
    from ppl_models.linear_gaussian import LinearGaussian
    from ppl_models.linear_hierarchy import LinearHierarchy
    from ppl_models.pair import ModelGuidePair
    from ppl_models.processes.schedules import NoiseSchedule
    from ppl_models.vae import VAE
    from ppl_models.vq_vae import VQVAE

__version__ = "0.1.0"

_HOMES = {
    "AutoEncoder": "ppl_models.autoencoder",
    "CategoricalVAE": "ppl_models.discrete_vae",
    "D3PM": "ppl_models.d3pm",
    "DDPM": "ppl_models.ddpm",
    "HVAE": "ppl_models.hvae",
    "LinearDiffusion": "ppl_models.linear_diffusion",
    "LinearGaussian": "ppl_models.linear_gaussian",
    "LinearHierarchy": "ppl_models.linear_hierarchy",
    "ModelGuidePair": "ppl_models.pair",
    "NoiseSchedule": "ppl_models.processes.schedules",
    "VAE": "ppl_models.vae",
    "VQVAE": "ppl_models.vq_vae",
    "check_inference": "ppl_models.launcher",
}

__all__ = [
    "D3PM",
    "DDPM",
    "HVAE",
    "VAE",
    "VQVAE",
    "AutoEncoder",
    "CategoricalVAE",
    "LinearDiffusion",
    "LinearGaussian",
    "LinearHierarchy",
    "ModelGuidePair",
    "NoiseSchedule",
    "check_inference",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ppl_models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
