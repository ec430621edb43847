"""What there is, by name: the systems that ``ppl train`` knows and the parts that a saved pair may be rebuilt from.

A saved model is a description, ``{"class": "VAE", "encoder": {"class": "GaussianEncoder", ...}, ...}``, plus its
weights. Only the classes listed here can be named in one, so reading a description never imports or runs anything that
came with the file.

A new system is one file in ``ppl_models``, one line in :data:`SYSTEMS`, and one in :data:`PARTS` for each class of it that
a saved run is to be rebuilt from.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import nn

SYSTEMS: dict[str, str] = {
    "ae": "ppl_models.autoencoder:AutoEncoder.preset",
    "vae": "ppl_models.vae:VAE.preset",
    "hvae": "ppl_models.hvae:HVAE.preset",
    "ddpm": "ppl_models.ddpm:DDPM.preset",
    "categorical-vae": "ppl_models.discrete_vae:CategoricalVAE.preset",
    "vq-vae": "ppl_models.vq_vae:VQVAE.preset",
    "d3pm": "ppl_models.d3pm:D3PM.preset",
}

PARTS: dict[str, str] = {
    "AutoEncoder": "ppl_models.autoencoder:AutoEncoder",
    "VAE": "ppl_models.vae:VAE",
    "HVAE": "ppl_models.hvae:HVAE",
    "DDPM": "ppl_models.ddpm:DDPM",
    "CategoricalVAE": "ppl_models.discrete_vae:CategoricalVAE",
    "VQVAE": "ppl_models.vq_vae:VQVAE",
    "D3PM": "ppl_models.d3pm:D3PM",
    "LinearGaussian": "ppl_models.linear_gaussian:LinearGaussian.random",
    "LinearHierarchy": "ppl_models.linear_hierarchy:LinearHierarchy.random",
    "LinearDiffusion": "ppl_models.linear_diffusion:LinearDiffusion",
    "NoiseSchedule": "ppl_models.processes.schedules:NoiseSchedule.from_config",
    "UniformTransitions": "ppl_models.processes.structured_transitions:UniformTransitions",
    "AbsorbingTransitions": "ppl_models.processes.structured_transitions:AbsorbingTransitions",
    "DenseTransitions": "ppl_models.processes.dense_transitions:DenseTransitions",
    "DiscretizedGaussianTransitions": "ppl_models.processes.dense_transitions:DiscretizedGaussianTransitions",
    "NearestNeighbourTransitions": "ppl_models.processes.neighbour_transitions:NearestNeighbourTransitions",
    "MLP": "ppl_models.networks.mlp:MLP",
    "GaussianEncoder": "ppl_models.networks.mlp:GaussianEncoder",
    "Decoder": "ppl_models.networks.mlp:Decoder",
    "ArrayMLP": "ppl_models.networks.arrays:ArrayMLP",
    "CodeEncoder": "ppl_models.networks.codes:CodeEncoder",
    "KSparse": "ppl_models.networks.codes:KSparse",
    "LadderEncoder": "ppl_models.networks.gaussian_layers:LadderEncoder",
    "ResidualMLP": "ppl_models.networks.residual_mlp:ResidualMLP",
    "UNet": "ppl_models.networks.unet:UNet",
    "GridDenoiser": "ppl_models.networks.grid_denoiser:GridDenoiser",
    "OrdinalDenoiser": "ppl_models.networks.ordinal:OrdinalDenoiser",
    "TransformerDenoiser": "ppl_models.networks.transformer:TransformerDenoiser",
    "DiffusersUNet": "ppl_models.networks.diffusers:DiffusersUNet.from_config",
    "Normal": "ppl_models.likelihoods:Normal",
    "Bernoulli": "ppl_models.likelihoods:Bernoulli",
    "Categorical": "ppl_models.likelihoods:Categorical",
    "DiscretizedNormal": "ppl_models.likelihoods:DiscretizedNormal",
    "Poisson": "ppl_models.likelihoods:Poisson",
    "NegativeBinomial": "ppl_models.likelihoods:NegativeBinomial",
    "GaussianNoise": "ppl_models.corruption:GaussianNoise",
    "Masking": "ppl_models.corruption:Masking",
    "SaltAndPepper": "ppl_models.corruption:SaltAndPepper",
    "L1": "ppl_models.penalties:L1",
    "ActivityTarget": "ppl_models.penalties:ActivityTarget",
    "Contraction": "ppl_models.penalties:Contraction",
    "HutchinsonContraction": "ppl_models.penalties:HutchinsonContraction",
}


_outlining: ContextVar[bool] = ContextVar("_outlining", default=False)


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


def describe(module: Any) -> dict[str, Any]:
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
        if _outlining.get():
            return {"own": name}  # without its module, which is another one where a script defined it
        raise UnknownPartError(
            f"expected a module made of this library's parts, got {type(module).__module__}.{type(module).__qualname__}: "
            "a network of your own cannot be rebuilt from a file; pass the pair itself when loading"
        )
    return {"class": name, **module.config()}


def outline(pair: Any) -> dict[str, Any]:
    """:func:`describe` with the names of one's own classes in place of what they hold: to compare, and not to build from.

    Example:
        >>> from torch import nn
        >>> from ppl_models import DDPM
        >>> from ppl_models.likelihoods import Normal
        >>> from ppl_models.processes import NoiseSchedule
        >>> class Mine(nn.Module):
        ...     def forward(self, x_t, t):
        ...         return 0 * x_t
        >>> found = outline(DDPM(Mine(), NoiseSchedule.cosine(4), (2,), predict="x_0", likelihood=Normal()))
        >>> found["network"]["own"], found["schedule"]["name"], found["predict"]
        ('Mine', 'cosine', 'x_0')
    """
    token = _outlining.set(True)
    try:
        found = describe(pair)
        if "own" in found:  # a pair of one's own: what it says of itself, if it says anything that a file can hold
            with contextlib.suppress(AttributeError, TypeError, ValueError, NotImplementedError):
                found = json.loads(json.dumps({**pair.config(), **found}))
        return found
    finally:
        _outlining.reset(token)


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
    arguments = {key: _built(value) for key, value in description.items() if key != "class"}
    return _resolve(PARTS[name])(**arguments)


def _built(value: Any) -> Any:
    if isinstance(value, list):
        return [_built(item) for item in value]
    return build(value) if isinstance(value, dict) and "class" in value else value


def _resolve(path: str) -> Any:
    module, _, attributes = path.partition(":")
    value: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        value = getattr(value, attribute)
    return value
