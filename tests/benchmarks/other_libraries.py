"""The losses of pythae and diffusers on this library's networks, as their own users write them; neither is needed elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["diffusers_loss", "is_installed", "pythae_loss", "pythae_vae"]


def pythae_vae(vae: Any) -> Any:
    """pythae's VAE (0.1.2) with the networks of a Bernoulli VAE, on images with a channel axis."""
    from pythae.models import VAE as PythaeVAE  # type: ignore[import-not-found]
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput  # type: ignore[import-not-found]
    from pythae.models.nn import BaseDecoder, BaseEncoder  # type: ignore[import-not-found]

    class Encoder(BaseEncoder):
        def __init__(self, network: nn.Module) -> None:
            BaseEncoder.__init__(self)
            self.network = network

        def forward(self, images: Tensor) -> Any:
            loc, scale = self.network(images[:, 0])
            return ModelOutput(embedding=loc, log_covariance=2 * scale.log())

    class Decoder(BaseDecoder):
        def __init__(self, network: nn.Module) -> None:
            BaseDecoder.__init__(self)
            self.network = network

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.network(z).sigmoid()[:, None])

    config = VAEConfig(input_dim=(1, *vae.data_shape), latent_dim=vae.latent_dim, reconstruction_loss="bce")
    return PythaeVAE(config, Encoder(vae.encoder), Decoder(vae.decoder))


def pythae_loss(vae: Any) -> Callable[[Tensor], Tensor]:
    """What pythae's trainer calls: the batch mean of -ELBO."""
    model = pythae_vae(vae)
    return lambda x: model({"data": x[:, None]}).loss


def diffusers_loss(ddpm: Any) -> Callable[[Tensor], Tensor]:
    """The training loop of diffusers' tutorials, on a DDPM's own network; the sum over pixels, where they take the mean."""
    scheduler: Any = importlib.import_module("diffusers").DDPMScheduler(num_train_timesteps=ddpm.num_timesteps)

    def loss(x: Tensor) -> Tensor:
        eps = torch.randn_like(x)
        t = torch.randint(0, ddpm.num_timesteps, (len(x),), device=x.device)
        return (ddpm.network(scheduler.add_noise(x, eps, t), t + 1) - eps).square().flatten(1).sum(-1)

    return loss


def is_installed(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None
