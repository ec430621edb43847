"""What :mod:`tests.benchmarks.steps` takes steps of: a pair of each family, data, our loss, and the same loss by hand.

    vae               Gaussian VAE 784-200-200-50, Bernoulli likelihood
    hvae              two layers of it, 784-200-50-200-20, bottom-up
    ddpm              784 pixels, MLP denoiser, T = 1000, variance beta_t, one t per datum, L_simple
    categorical-vae   20 latents of 10 classes, 784-200-200-200, straight-through Gumbel-softmax
    vq-vae            16 latents of 64 codes of width 8, 784-200-200-128, codes that follow moving averages
    d3pm              8x8 pixels of 17 grey levels, uniform transitions, MLP denoiser, T = 100, one t per datum, the bound

"By hand" is plain PyTorch on the pair's own networks and tables, KLs in closed form where they have one: no Pyro, and none of
this library's laws or losses. ``test_families`` holds its value and gradient to those of our loss, in expectation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference import DiffusionLoss, ElboLoss
from inference.training.relaxed_objective import StraightThroughLoss
from ppl_models import D3PM, DDPM, HVAE, VAE, VQVAE, CategoricalVAE, ModelGuidePair
from ppl_models.likelihoods import Bernoulli, Categorical, DiscretizedNormal

INK = 0.13
IMAGE, LEVELS = (28, 28), 17


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        pair: makes the pair.
        data: random data of a size: their values cost nothing.
        objective: our loss of a pair.
        by_hand: ``(pair, x) -> [B]``, the same loss in plain PyTorch.
        is_diffusion: whether it trains on single terms, with one network.
        jit: whether ``JitTrace_ELBO`` can take it.
    """

    pair: Callable[[], ModelGuidePair]
    data: Callable[[int], Tensor]
    objective: Callable[[Any], nn.Module]
    by_hand: Callable[[Any, Tensor], Tensor]
    is_diffusion: bool = False
    jit: bool = False


def binary_images(size: int) -> Tensor:
    """MNIST's share of ink, at random."""
    return (torch.rand(size, *IMAGE) < INK).float()


def grey_images(size: int) -> Tensor:
    """256 levels on [-1, 1]."""
    return torch.randint(256, (size, *IMAGE)) / 127.5 - 1


def grey_levels(size: int) -> Tensor:
    """Classes, as in the digits of scikit-learn."""
    return torch.randint(LEVELS, (size, 8, 8))


def distortion(logits: Tensor, x: Tensor) -> Tensor:
    """-log p(x | z) of a Bernoulli likelihood."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(-1)


def vae_by_hand(vae: Any, x: Tensor) -> Tensor:
    """-ELBO of the VAE."""
    loc, scale = vae.encoder(x)
    z = loc + scale * torch.randn_like(loc)
    return (0.5 * (loc.square() + scale.square() - 1) - scale.log()).sum(-1) + distortion(vae.decoder(z), x)


def hvae_by_hand(hvae: Any, x: Tensor) -> Tensor:
    """-ELBO of the two-layer HVAE with its bottom-up guide, whose KL has a closed form at z_2 alone."""
    loc_1, scale_1 = hvae.encoders[0](x)
    noise = torch.randn_like(loc_1)
    z_1 = loc_1 + scale_1 * noise
    loc_2, scale_2 = hvae.encoders[1](z_1)
    prior_loc, prior_scale = hvae.decoders[1](loc_2 + scale_2 * torch.randn_like(loc_2))
    error = (z_1 - prior_loc) / prior_scale
    rate_1 = 0.5 * (error.square() - noise.square()) + prior_scale.log() - scale_1.log()
    rate_2 = 0.5 * (loc_2.square() + scale_2.square() - 1) - scale_2.log()
    return rate_1.sum(-1) + rate_2.sum(-1) + distortion(hvae.decoders[0](z_1), x)


def ddpm_by_hand(ddpm: Any, x: Tensor) -> Tensor:
    """L_simple of Ho et al. 2020, algorithm 1."""
    t = torch.randint(1, ddpm.num_timesteps + 1, (len(x),), device=x.device)
    eps = torch.randn_like(x)
    level = ddpm.process._alpha_bar[t].to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return (eps - ddpm.network(level.sqrt() * x + (1 - level).sqrt() * eps, t)).square().flatten(1).sum(-1)


def categorical_by_hand(vae: Any, x: Tensor) -> Tensor:
    """-ELBO with straight-through Gumbel-softmax at temperature 1 (Jang et al. 2016, section 2.2)."""
    logits = vae.encoder(x)
    log_q = logits.log_softmax(-1)
    rate = (log_q.exp() * (log_q + torch.tensor(logits.shape[-1]).log())).flatten(1).sum(-1)
    return rate + distortion(vae.decoder(F.gumbel_softmax(logits, tau=1.0, hard=True)), x)


def vq_by_hand(vq: Any, x: Tensor) -> Tensor:
    """Eq. 3 of van den Oord et al. 2017 and M log K, after a step of the codebook's moving averages."""
    encoding = vq.encoder(x)
    _follow(vq, encoding.detach().flatten(0, 1))
    code = vq.codebook[torch.cdist(encoding.detach().flatten(0, 1), vq.codebook).argmin(-1)].view_as(encoding)
    z = encoding + (code - encoding).detach()
    codebook = (encoding.detach() - code).square().flatten(1).sum(-1)
    commitment = vq.commitment * (encoding - code).square().flatten(1).sum(-1)
    rate = vq.num_latents * torch.tensor(vq.num_codes).log()
    return distortion(vq.decoder(z), x) + codebook + commitment + rate


@torch.no_grad()
def _follow(vq: Any, rows: Tensor) -> None:
    nearest = F.one_hot(torch.cdist(rows, vq.codebook).argmin(-1), vq.num_codes).to(rows.dtype)
    share, total = nearest.mean(0), nearest.T @ rows / len(rows)
    usage = vq.decay * vq.usage + (1 - vq.decay) * share
    moved = (vq.decay * vq.usage[:, None] * vq.codebook + (1 - vq.decay) * total) / usage[:, None]
    dead = usage < vq.restart_below / vq.num_codes
    restarted = rows[torch.randint(len(rows), (vq.num_codes,), device=rows.device)]
    vq.codebook.copy_(torch.where(dead[:, None], restarted, moved))
    vq.usage.copy_(torch.where(dead, 1 / vq.num_codes, usage))


def d3pm_by_hand(d3pm: Any, x: Tensor) -> Tensor:
    """T L_t + L_T with uniform transitions (Austin et al. 2021, eqs. 2 and 4), in O(K): Q p = s p + (1 - s)/K."""
    chain, last, num_classes = d3pm.process.transitions, d3pm.num_timesteps, d3pm.num_classes
    t = torch.randint(1, last + 1, (len(x),), device=x.device)
    tables = torch.stack([chain.log_stay, chain.log_kept, chain.log_kept.roll(1)], -1).exp()  # s_t, a_t, a_{t-1}
    stay, kept, before = tables[t].float().reshape(-1, *[1] * (x.dim() - 1), 3).unbind(-1)
    noise = torch.randint(num_classes, x.shape, device=x.device)
    x_t = torch.where(torch.rand(x.shape, device=x.device) < kept, x, noise)
    log_p_0 = d3pm.network(x_t, t).log_softmax(-1)
    to_x_t = (1 - stay)[..., None] / num_classes + stay[..., None] * F.one_hot(x_t, num_classes)
    q = to_x_t * (before[..., None] * F.one_hot(x, num_classes) + (1 - before)[..., None] / num_classes)
    p = to_x_t * (before[..., None] * log_p_0.exp() + (1 - before)[..., None] / num_classes)
    q, p = q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
    first = (t == 1).reshape(-1, *[1] * (x.dim() - 1))  # where L_0 is -log p(x_0 | x_1)
    kl = (q * (q.clamp(min=1e-30).log() - p.clamp(min=1e-30).log())).sum(-1)
    term = torch.where(first, -log_p_0.gather(-1, x[..., None])[..., 0], kl)
    a = chain.log_kept[-1].exp()
    high, low = a + (1 - a) / num_classes, (1 - a) / num_classes
    prior = high * (num_classes * high).log() + (num_classes - 1) * low * (num_classes * low).log()
    return last * term.flatten(1).sum(-1) + (prior * x[0].numel()).to(term.dtype)


def network_alone(pair: Any, x: Tensor) -> Tensor:
    """A diffusion's network at one t, its output summed."""
    t = torch.full((len(x),), pair.num_timesteps // 2, device=x.device)
    return pair.network(x, t).flatten(1).sum(-1)


FAMILIES = {
    "vae": Family(
        lambda: VAE.preset(IMAGE, Bernoulli(), latent_dim=50, hidden=(200, 200)),
        binary_images,
        ElboLoss,
        vae_by_hand,
        jit=True,
    ),
    "hvae": Family(
        lambda: HVAE.preset(IMAGE, Bernoulli(), latent_dims=(50, 20), hidden=(200,)),
        binary_images,
        ElboLoss,
        hvae_by_hand,
        jit=True,
    ),
    "ddpm": Family(
        lambda: DDPM.preset(
            IMAGE,
            DiscretizedNormal(levels=256),
            num_timesteps=1000,
            schedule="linear",
            network="mlp",
            hidden=256,
            blocks=2,
            variance="beta",
        ),
        grey_images,
        lambda pair: DiffusionLoss(pair, weights="simple"),
        ddpm_by_hand,
        is_diffusion=True,
    ),
    "categorical-vae": Family(
        lambda: CategoricalVAE.preset(IMAGE, Bernoulli(), num_latents=20, num_classes=10, hidden=(200, 200)),
        binary_images,
        StraightThroughLoss,
        categorical_by_hand,
    ),
    "vq-vae": Family(
        lambda: VQVAE.preset(IMAGE, Bernoulli(), num_latents=16, num_codes=64, code_dim=8, hidden=(200, 200)),
        binary_images,
        ElboLoss,
        vq_by_hand,
    ),
    "d3pm": Family(
        lambda: D3PM.preset((8, 8), Categorical(LEVELS), num_timesteps=100, hidden=256, blocks=2),
        grey_levels,
        DiffusionLoss,
        d3pm_by_hand,
        is_diffusion=True,
    ),
}
