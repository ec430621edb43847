"""The Gaussian variational autoencoder (lecture notes 004, "Gaussian VAE").

    p(z) = N(z; 0, I)      p_theta(x | z) = likelihood(decoder(z))
    q_phi(z | x) = N(z; mu_phi(x), diag(sigma_phi(x)^2))

    ELBO(x) = E_q[log p_theta(x | z)] - KL(q_phi(z | x) || p(z))

The chain of the hierarchical VAE with L = 1. Sites ``z`` and ``x``. The prior is fixed at N(0, I), because encoder and
decoder can absorb any other location and scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.arguments import sizes, whole_count
from ppl_models.likelihoods import Likelihood, known_likelihood
from ppl_models.networks.mlp import Activation, Decoder, GaussianEncoder
from ppl_models.pair import ModelGuidePair
from ppl_models.probing import evaluate_once, probe_decoder
from ppl_models.registry import describe


class VAE(ModelGuidePair):
    """Gaussian VAE with any likelihood: ``VAE(encoder, decoder, latent_dim, likelihood)``.

    ELBO(x) = E_{q(z|x)}[log p(x | z)] - KL(q(z | x) || N(0, I)), lecture notes 004, Theorem 1; Kingma and Welling 2013
    (arXiv:1312.6114), eq. 3.

    Args:
        encoder: module, x ``[..., *data_shape]`` -> ``(loc, scale)``, each ``[..., latent_dim]``, scale > 0.
        decoder: module, z ``[..., latent_dim]`` -> the likelihood's parameters.
        latent_dim: d, width of z.
        likelihood: decoder output -> distribution of x; see :mod:`ppl_models.likelihoods`.

    Raises:
        ValueError: encoder or decoder return arrays of another shape than the above; found at construction by one
            pass of a single datum.
        TypeError: the encoder does not return a pair.

    Example:
        >>> from ppl_models.likelihoods import Bernoulli
        >>> vae = VAE.preset((8, 8), Bernoulli(), latent_dim=4, hidden=(32,))
        >>> vae.data_shape, vae.latent_sites
        (torch.Size([8, 8]), ('z',))
        >>> vae.model(size=3).shape
        torch.Size([3, 8, 8])
    """

    prior_loc: Tensor
    prior_scale: Tensor

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent_dim: int, likelihood: Likelihood) -> None:
        latent_dim, likelihood = whole_count("latent_dim", latent_dim), known_likelihood(likelihood)
        output = probe_decoder(decoder, latent_dim)
        data_shape = likelihood.data_shape_of(output)
        likelihood(output, len(data_shape))  # refuses output that it cannot take
        super().__init__(data_shape, latent_sites=("z",))
        self.encoder = encoder
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.likelihood = likelihood
        reference = next(decoder.parameters(), torch.empty(0))
        self.register_buffer(
            "prior_loc", torch.zeros(latent_dim, dtype=reference.dtype, device=reference.device), False
        )
        self.register_buffer("prior_scale", torch.ones_like(self.prior_loc), False)
        self._check_encoder()

    @classmethod
    def preset(
        cls,
        data_shape: Sequence[int],
        likelihood: Likelihood,
        latent_dim: int = 16,
        hidden: Sequence[int] = (200, 200),
        activation: Activation = "tanh",
        num_labels: int | None = None,
    ) -> VAE:
        """A VAE with MLP encoder and decoder, mirror images of each other.

        Args:
            data_shape: shape of one datum.
            likelihood: decoder output -> distribution of x.
            latent_dim: d.
            hidden: the encoder's hidden widths; the decoder has them reversed.
            activation: see :class:`ppl_models.networks.MLP`.
            num_labels: K, of a VAE of x given a label: p(z) p(x | z, y) and q(z | x, y); see :meth:`given`.
        """
        data_shape, hidden = sizes("data_shape", data_shape), sizes("hidden", hidden)
        likelihood = known_likelihood(likelihood)
        laws = (likelihood.num_classes, likelihood.takes_counts)
        encoder = GaussianEncoder(data_shape, latent_dim, hidden, activation, *laws, num_labels)
        output_shape = [*data_shape] if likelihood.num_classes is None else [*data_shape, likelihood.num_classes]
        decoder = Decoder(latent_dim, output_shape, list(hidden)[::-1], activation, likelihood.needs_scale, num_labels)
        return cls(encoder, decoder, latent_dim, likelihood)

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """p(z) p_theta(x | z): sites ``z`` ``[B, d]`` and ``x`` ``[B, *data_shape]``; see the base class."""
        self.announce("decoder", "likelihood")
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", dist.Normal(self.prior_loc, self.prior_scale).to_event(1))
            return pyro.sample("x", self.likelihood(self.decoder(z), len(self.data_shape)), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q_phi(z | x) = N(z; mu_phi(x), diag(sigma_phi(x)^2)): site ``z`` ``[B, d]``."""
        self.announce("encoder")
        with pyro.plate("data", self.batch_size(x)):
            loc, scale = self.encoder(x)
            return pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def check_data(self, x: Tensor, name: str = "x") -> None:
        """Refuses data that the likelihood gives no probability to; see the base class."""
        self.likelihood.check(x, name)

    def config(self) -> dict[str, Any]:
        """Constructor arguments as nested descriptions; see :func:`ppl_models.registry.describe`."""
        return {
            "encoder": describe(self.encoder),
            "decoder": describe(self.decoder),
            "latent_dim": self.latent_dim,
            "likelihood": describe(self.likelihood),
        }

    def _check_encoder(self) -> None:
        reference = self.prior_loc
        x = self.likelihood.example(self.data_shape, reference.dtype, reference.device)
        output = evaluate_once("encoder", self.encoder, x)
        if not (isinstance(output, tuple) and len(output) == 2):
            raise TypeError(
                f"expected the encoder to return a pair (loc, scale), got {type(output).__name__}: "
                "return two tensors of shape [..., latent_dim]"
            )
        for name, value in zip(("loc", "scale"), output, strict=True):
            if value.shape != (1, self.latent_dim):
                raise ValueError(
                    f"expected the encoder's {name} to have shape [B, latent_dim] = [1, {self.latent_dim}] for one "
                    f"datum of shape {list(self.data_shape)}, got {list(value.shape)}: match the encoder's last layer"
                )
        if not bool((output[1] > 0).all()):
            raise ValueError("expected the encoder's scale to be > 0: pass its last layer through exp or softplus")
