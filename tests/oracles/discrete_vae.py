"""A categorical VAE by hand: every state listed, every density written out, nothing imported of what is judged.

Bernoulli data. ``decoder`` maps one-hot rows ``[M, K]`` to logits of one datum; ``logits`` ``[M, K]`` are the guide's.
"""

import itertools
import math

import torch
from torch import Tensor, nn


def states(num_latents: int, num_classes: int) -> list[Tensor]:
    """All one-hot ``[M, K]``."""
    return [
        torch.stack([torch.eye(num_classes)[k] for k in classes])
        for classes in itertools.product(range(num_classes), repeat=num_latents)
    ]


def bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """sum_i x_i log s(l_i) + (1 - x_i) log(1 - s(l_i))."""
    p = 1 / (1 + torch.exp(-logits))
    return (x * p.log() + (1 - x) * (1 - p).log()).sum()


def guide_probability(logits: Tensor, z: Tensor) -> Tensor:
    """prod_m sum_k z_mk softmax(l_m)_k."""
    weights = logits.exp()
    return ((weights / weights.sum(-1, keepdim=True)) * z).sum(-1).prod()


def log_evidence(decoder: nn.Module, x: Tensor, num_latents: int, num_classes: int) -> Tensor:
    """log sum_z K^-M p(x | z) of one datum."""
    total = sum(bernoulli(decoder(z), x).exp() for z in states(num_latents, num_classes))
    return (total / num_classes**num_latents).log()


def elbo(logits: Tensor, decoder: nn.Module, x: Tensor) -> Tensor:
    """sum_z q(z) [log p(z) + log p(x | z) - log q(z)] of one datum."""
    num_latents, num_classes = logits.shape
    total = torch.zeros(())
    for z in states(num_latents, num_classes):
        q = guide_probability(logits, z)
        total = total + q * (bernoulli(decoder(z), x) - num_latents * math.log(num_classes) - q.log())
    return total


def gap(logits: Tensor, decoder: nn.Module, x: Tensor) -> Tensor:
    """KL(q(z) || p(z | x)) of one datum."""
    num_latents, num_classes = logits.shape
    joint = torch.stack([bernoulli(decoder(z), x).exp() for z in states(num_latents, num_classes)])
    posterior = joint / joint.sum()
    q = torch.stack([guide_probability(logits, z) for z in states(num_latents, num_classes)])
    return (q * (q / posterior).log()).sum()


class BlockDecoder(nn.Module):
    """Latent m alone speaks of row m of x: logits ``[..., M, D]`` = z_m @ W_m, W ``[M, K, D]``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z: Tensor) -> Tensor:
        return torch.einsum("...mk,mkd->...md", z, self.weight)


class PosteriorEncoder(nn.Module):
    """Logits of p(z_m = k | x), ``[..., M, K]``, under a :class:`BlockDecoder` and a uniform prior; or wrong ones.

    Args:
        decoder: whose posterior.
        power: 1 is exact; 0.8 is too wide.
        shift: added to the first class's logit.
    """

    def __init__(self, decoder: BlockDecoder, power: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.decoder, self.power, self.shift = decoder, power, shift

    def forward(self, x: Tensor) -> Tensor:
        w = self.decoder.weight
        x = x.unsqueeze(-2)
        log_joint = (x * nn.functional.logsigmoid(w) + (1 - x) * nn.functional.logsigmoid(-w)).sum(-1)
        first = torch.zeros_like(log_joint)
        first[..., 0] = self.shift
        return self.power * log_joint + first


class Table(nn.Module):
    """An encoder that returns a row of its own for each datum, whatever x is: ``[n, M, K]``, n = 1 or B."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(*x.shape[:-1], *self.logits.shape[1:])


def relaxed_binary_gradient(logits: Tensor, decoder: nn.Module, x: Tensor, temperature: float, hard: bool) -> Tensor:
    """Gradient in ``logits`` ``[1, 2]`` of E[log p(x | y)], y the relaxed z, by quadrature over the difference of the Gumbels.

    That difference is logistic: g_1 - g_0 = log u - log(1 - u), u uniform. ``hard``: the derivative is taken at
    z = onehot(argmax y) instead of y. The interval is cut where argmax y changes.
    """
    delta = float(logits[0, 1] - logits[0, 0])
    cut = 1 / (1 + math.exp(delta))  # below: class 0
    nodes, weights = _legendre(60)
    total = torch.zeros_like(logits)
    for low, high in ((0.0, cut), (cut, 1.0)):
        # u = low + (high - low) s(t), s smooth at both ends, so that the logistic's tails are resolved
        t = (nodes + 1) / 2
        s = t**2 * (3 - 2 * t)
        for u, w in zip(low + (high - low) * s, weights / 2 * 6 * t * (1 - t) * (high - low), strict=True):
            noise = torch.stack([torch.zeros(()), u.log() - torch.log1p(-u)])
            leaf = logits.detach().clone().requires_grad_()
            y = torch.softmax((leaf + noise) / temperature, -1)
            at = torch.eye(2)[int(u > cut)][None] if hard else y.detach()
            at = at.requires_grad_()
            (slope,) = torch.autograd.grad(bernoulli(decoder(at), x), at)
            (gradient,) = torch.autograd.grad(y, leaf, slope)
            total = total + w * gradient
    return total


def _legendre(n: int) -> tuple[Tensor, Tensor]:
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.as_tensor(nodes), torch.as_tensor(weights)
