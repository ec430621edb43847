"""The bound of any pair by the estimator that suits it, and what there is to say about it beside its terms.

    diffusion                 decompose_diffusion: each L_t from draws of its own, at a cost that suits large T
    guide of point masses     decompose_elbo on two draws, which are the same: there is nothing to average
    all others                decompose_elbo

The one constraint: only the number of draws is chosen here, and only where nobody states it.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from inference.bounds.active_units import NoMeanError, active_units
from inference.bounds.decomposition import decompose_elbo
from inference.bounds.diffusion import DiffusionDecomposition, decompose_diffusion
from inference.bounds.particles import forked_rng
from inference.bounds.sites import bare_law
from inference.bounds.terms import Decomposition
from inference.generated import generate
from ppl_models.diffusion import Diffusion
from ppl_models.discrete_vae import CategoricalVAE
from ppl_models.networks.labels import probe_label
from ppl_models.pair import ModelGuidePair
from ppl_models.vq_vae import VQVAE

PARTICLES = 1000
PARTICLES_A_TERM = 4  # of a diffusion, whose every term has draws of its own for every datum


def decompose(
    pair: ModelGuidePair, x: Tensor, num_particles: int | None = None, *, default: int = PARTICLES
) -> Decomposition:
    """The bound by site, or by t for a diffusion; see :func:`inference.decompose_elbo` and :func:`decompose_diffusion`.

    Args:
        pair: the programs.
        x: data ``[N, *data_shape]``.
        num_particles: draws per datum; None: :data:`PARTICLES_A_TERM` a term for a diffusion, 2 where the guide draws
            nothing, ``default`` for the others.
        default: see there.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> decompose(pair, torch.zeros(4, 3), default=10).num_particles
        10
    """
    if isinstance(pair, Diffusion):
        return decompose_diffusion(pair, x, PARTICLES_A_TERM if num_particles is None else num_particles)
    if num_particles is None:
        num_particles = 2 if has_point_guide(pair) else default
    return decompose_elbo(pair.model, pair.guide, x, num_particles=num_particles)


def has_point_guide(pair: ModelGuidePair) -> bool:
    """Whether the guide draws nothing: a point mass at each latent, as of an autoencoder or of a VQ-VAE.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> has_point_guide(LinearGaussian.random(data_dim=3, latent_dim=2))
        False
    """
    if isinstance(pair, Diffusion):
        return False
    with torch.no_grad(), forked_rng():
        label = probe_label(pair)
        one = pair if label is None else pair.given(label)
        trace = poutine.trace(one.guide).get_trace(generate(one, 1)[1])
    return all(isinstance(bare_law(trace.nodes[site]["fn"]), dist.Delta) for site in pair.latent_sites)


def remarks(pair: ModelGuidePair, x: Tensor, d: Decomposition) -> list[str]:
    """Sentences on a pair's bound that its terms do not say: units in use, collapse, codes in use, what kind of bound.

    Args:
        pair: the programs.
        x: data ``[N, *data_shape]``.
        d: from :func:`decompose`.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> remarks(pair, x := pair.model(size=50).detach(), decompose(pair, x, 10))
        ['site z: 2 of 2 units active']
    """
    if isinstance(d, DiffusionDecomposition):
        value, error = d.bits_per_dim()
        return [f"-log p(x_0) is at most -ELBO = {value:.4f} +- {error:.4f} bits/dim"]
    if not pair.bounds_evidence:
        return ["an autoencoder has no p(z): the sum is minus its loss at z = f(x), and no bound of any log p(x)"]
    if isinstance(pair, VQVAE):
        used, most = float(pair.codebook_perplexity(x)), pair.num_latents * math.log(pair.num_codes)
        return [
            f"codebook perplexity {used:.1f} of {pair.num_codes} codes",
            f"the rate of z is M log K = {most:.2f} nats whatever x, as p(z) is uniform and q(z | x) one code at each place",
        ]
    if isinstance(pair, CategoricalVAE):
        most = pair.num_latents * math.log(pair.num_classes)
        return [f"the rate of z is {-float(d['z'].value.mean()):.2f} of at most M log K = {most:.2f} nats"]
    try:
        return active_units(pair, x).words().splitlines() if len(x) > 1 else []
    except NoMeanError:  # of a latent without a mean nobody can say whether it moves
        return []
