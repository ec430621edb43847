"""The vector-quantised autoencoder as a pair: uniform prior over codes, and a guide that is sure of the nearest one.

    p(z) = prod_m Uniform(z_m; c_1..c_K)      p_theta(x | z) = likelihood(decoder(z))
    q_phi(z | x) = prod_m delta(z_m - c_k(m)),    k(m) = argmin_k |e_m - c_k|^2,    e = encoder(x)

    ELBO(x) = log p_theta(x | z) - M log K      (KL(q || p) = M log K: a point mass against a uniform law over K codes)

(van den Oord et al. 2017, arXiv:1711.00937). Site ``z`` holds M code vectors, ``[B, M, D]``. The gradient that reaches z
is copied to e (straight-through): in the value, z is the code exactly.

In training mode the guide adds the paper's two other terms (eq. 3) as named factors, minus which they enter the bound:

    codebook      |sg[e] - c|^2            its minimiser is followed by moving averages, not by gradients
    commitment    beta |e - sg[c]|^2       a gradient for the encoder alone

In evaluation mode there are none, and the terms of ``z`` and ``x`` sum to the ELBO.

The codebook is a buffer. It moves in a training step (training mode with gradients on), before the codes are chosen, so that
model and guide see the same one. With n_k the share of the batch's encodings nearest to code k, s_k their sum over the
batch's number of encodings, and u_k the running share ("usage"; 1/K at the start),

    u_k' = g u_k + (1 - g) n_k        c_k' = (g u_k c_k + (1 - g) s_k) / u_k'

(appendix A.1 there, in shares instead of counts, so that the batch size does not matter). A code whose share falls below a
fraction of 1/K is dead: it restarts at a random encoding of the batch (Dhariwal et al. 2020, arXiv:2005.00341, section 3.1),
with the share 1/K.

The one constraint: the codebook follows the batch that its own process sees; it is not averaged over processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions.kl import register_kl

from ppl_models.arguments import sizes
from ppl_models.discrete_vae import check_encoding, check_sizes, one_hot, zeros_like_parameters
from ppl_models.likelihoods import Likelihood, known_likelihood
from ppl_models.networks.arrays import mirrored
from ppl_models.networks.mlp import Activation
from ppl_models.networks.precision import at_least_float32
from ppl_models.pair import ModelGuidePair
from ppl_models.probing import evaluate_once
from ppl_models.registry import describe


class _OneOf(constraints.Constraint):
    """M vectors, each equal to one of the code vectors."""

    is_discrete = True
    event_dim = 2

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return (value[..., None, :] == self.codebook).all(-1).any(-1).all(-1)

    def __repr__(self) -> str:
        return f"each row one of {len(self.codebook)} code vectors"


class UniformCodes(TorchDistribution):
    """M vectors, each drawn uniformly from K code vectors: log p(z) = -M log K.

    Args:
        codebook: c, ``[K, D]``; a vector that several codes share counts as one of them.
        num_latents: M.

    Example:
        >>> law = UniformCodes(torch.eye(4), num_latents=3)
        >>> law.sample((5,)).shape, round(float(law.log_prob(law.sample())), 4)  # -3 log 4
        (torch.Size([5, 3, 4]), -4.1589)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, codebook: Tensor, num_latents: int, validate_args: bool | None = None) -> None:
        self.codebook = codebook
        super().__init__(torch.Size(), torch.Size((num_latents, codebook.shape[1])), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> constraints.Constraint:
        """M rows, each a code vector."""
        return _OneOf(self.codebook)

    def expand(self, batch_shape: Sequence[int], _instance: TorchDistribution | None = None) -> UniformCodes:
        """The same law for a batch."""
        new = self._get_checked_instance(UniformCodes, _instance)
        new.codebook = self.codebook
        super(UniformCodes, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, ``[*sample_shape, *batch_shape, M, D]``."""
        shape = self._extended_shape(torch.Size(sample_shape))[:-1]
        return self.codebook[torch.randint(len(self.codebook), shape, device=self.codebook.device)]

    def log_prob(self, value: Tensor) -> Tensor:
        """-M log K nats, of the batch shape.

        Raises:
            ValueError: with validation, a row that is no code vector.
        """
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        return value.new_full(shape, -self.event_shape[0] * math.log(len(self.codebook)))


@register_kl(dist.Delta, UniformCodes)
def _kl_code_uniform(q: dist.Delta, p: UniformCodes) -> Tensor:
    """M log K: log 1 - log p(z) at the codes that the guide fixes, whichever they are."""
    return q.log_density - p.log_prob(q.v)


class VQVAE(ModelGuidePair):
    """Vector-quantised VAE: ``VQVAE(encoder, decoder, num_latents, num_codes, code_dim, likelihood)``.

    -ELBO + codebook + commitment terms = van den Oord et al. 2017 (arXiv:1711.00937), eq. 3, plus the constant M log K.

    The two terms are factors of the guide in training mode alone. There the sum over sites, the row "ELBO" of
    :func:`inference.decompose_elbo` too, is the objective, which is below the ELBO by them; the ELBO is that of ``eval()``,
    and in either mode -(rate + distortion).

    Args:
        encoder: module, x ``[..., *data_shape]`` -> e ``[..., M, D]``.
        decoder: module, z ``[..., M, D]`` -> the likelihood's parameters.
        num_latents: M >= 1, codes per datum.
        num_codes: K >= 2, size of the codebook.
        code_dim: D >= 1, width of a code vector.
        likelihood: decoder output -> distribution of x; see :mod:`ppl_models.likelihoods`.
        commitment: beta > 0, nats per squared distance; the paper's 0.25 goes with a reconstruction of its scale.
        decay: g in (0, 1) of the moving averages.
        restart_below: in (0, 1): a code restarts when its share falls below this fraction of 1/K.

    Raises:
        ValueError: a number out of range, a size that is no int, or encoder or decoder return arrays of another shape than
            the above; found at construction by one pass of a single datum.
        TypeError: the encoder does not return a tensor.

    Example:
        >>> from ppl_models.likelihoods import Bernoulli
        >>> vq = VQVAE.preset((8, 8), Bernoulli(), num_latents=4, num_codes=16, code_dim=2, hidden=(32,)).eval()
        >>> vq.codes(torch.zeros(5, 8, 8)).shape, vq.model(size=5).shape
        (torch.Size([5, 4]), torch.Size([5, 8, 8]))
        >>> from pyro import poutine
        >>> trace = poutine.trace(vq.model).get_trace(size=5)
        >>> round(float(-trace.nodes["z"]["fn"].log_prob(trace.nodes["z"]["value"])[0]), 4)  # M log K = 4 log 16
        11.0904
    """

    codebook: Tensor
    usage: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        num_latents: int,
        num_codes: int,
        code_dim: int,
        likelihood: Likelihood,
        commitment: float = 0.25,
        decay: float = 0.99,
        restart_below: float = 0.1,
    ) -> None:
        check_sizes(num_latents=(num_latents, 1), num_codes=(num_codes, 2), code_dim=(code_dim, 1))
        if not 0 < commitment < math.inf:
            raise ValueError(
                f"expected a finite commitment > 0, got {commitment}: nothing else keeps encodings at codes"
            )
        for name, value in (("decay", decay), ("restart_below", restart_below)):
            if not 0 < value < 1:
                raise ValueError(f"expected {name} between 0 and 1, got {value}")
        z = zeros_like_parameters(decoder, num_latents, code_dim)
        output = evaluate_once("decoder", decoder, z)
        data_shape = likelihood.data_shape_of(output)
        likelihood(output, len(data_shape))  # refuses output that it cannot take
        super().__init__(data_shape, latent_sites=("z",))
        self.encoder = encoder
        self.decoder = decoder
        self.num_latents = num_latents
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.likelihood = likelihood
        self.commitment = commitment
        self.decay = decay
        self.restart_below = restart_below
        self.register_buffer("codebook", torch.randn_like(z[0, :1].expand(num_codes, code_dim)))
        self.register_buffer("usage", torch.full_like(self.codebook[:, 0], 1 / num_codes))
        encoding = evaluate_once("encoder", encoder, likelihood.example(data_shape, z.dtype, z.device))
        check_encoding(encoding, self.data_shape, {"num_latents": num_latents, "code_dim": code_dim})

    @classmethod
    def preset(
        cls,
        data_shape: Sequence[int],
        likelihood: Likelihood,
        num_latents: int = 16,
        num_codes: int = 64,
        code_dim: int = 8,
        hidden: Sequence[int] = (200, 200),
        activation: Activation = "tanh",
        commitment: float = 0.25,
        num_labels: int | None = None,
    ) -> VQVAE:
        """A VQ-VAE with MLP encoder and decoder, mirror images of each other.

        Args:
            data_shape: shape of one datum.
            likelihood: decoder output -> distribution of x.
            num_latents: M.
            num_codes: K.
            code_dim: D.
            hidden: the encoder's hidden widths; the decoder has them reversed.
            activation: see :class:`ppl_models.networks.MLP`.
            commitment: beta.
            num_labels: of codes of x given a label, which encoder and decoder read; see :meth:`given`.
        """
        check_sizes(num_latents=(num_latents, 1), num_codes=(num_codes, 2), code_dim=(code_dim, 1))
        data_shape, hidden, likelihood = (
            sizes("data_shape", data_shape),
            sizes("hidden", hidden),
            known_likelihood(likelihood),
        )
        shape, classes = [num_latents, code_dim], likelihood.num_classes
        laws = (classes, likelihood.needs_scale, likelihood.takes_counts, num_labels)
        encoder, decoder = mirrored(data_shape, shape, hidden, activation, *laws)
        return cls(encoder, decoder, num_latents, num_codes, code_dim, likelihood, commitment)

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """p(z) p_theta(x | z): sites ``z`` ``[B, M, D]`` and ``x`` ``[B, *data_shape]``; see the base class."""
        self.announce("decoder", "likelihood")
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", UniformCodes(self.codebook, self.num_latents))
            return pyro.sample("x", self.likelihood(self.decoder(z), len(self.data_shape)), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q_phi(z | x), a point mass at the nearest codes: site ``z`` ``[B, M, D]``; in training mode also the factors.

        The factors' values are added to log q, so that minus them is their term of the bound.
        """
        self.announce("encoder")
        with pyro.plate("data", self.batch_size(x)):
            encoding = self._encode(x)
            if self.training and torch.is_grad_enabled():
                self._follow(encoding.detach().reshape(-1, self.code_dim))
            code = self.codebook[self._nearest(encoding)]
            if self.training:
                pyro.factor("codebook", _squared_distance(encoding.detach(), code), has_rsample=True)
                pyro.factor("commitment", self.commitment * _squared_distance(encoding, code), has_rsample=True)
            straight_through = code + (
                encoding - encoding.detach()
            )  # the code's value, exactly; the encoding's gradient
            return pyro.sample("z", dist.Delta(straight_through, event_dim=2))

    def codes(self, x: Tensor) -> Tensor:
        """k(m) = argmin_k |e_m - c_k|^2, LongTensor ``[*particles, B, M]`` in 0..K-1; of codes equally near, the first."""
        self.batch_size(x)
        return self._nearest(self._encode(x))

    def codebook_perplexity(self, x: Tensor) -> Tensor:
        """exp(-sum_k p_k log p_k), with p_k the share of code k among the codes of ``x``: from 1 to K, a scalar.

        How many codes are in use, in effect (van den Oord et al. 2017, and its public implementation).

        Args:
            x: ``[B, *data_shape]``.

        Example:
            >>> from ppl_models.likelihoods import Bernoulli
            >>> vq = VQVAE.preset((4,), Bernoulli(), num_latents=2, num_codes=8, hidden=(4,))
            >>> float(vq.codebook_perplexity(torch.zeros(3, 4))) <= 2
            True
        """
        share = torch.bincount(self.codes(x).flatten(), minlength=self.num_codes).to(self.codebook.dtype)
        return torch.special.entr(share / share.sum()).sum().exp()

    def check_data(self, x: Tensor, name: str = "x") -> None:
        """Refuses data that the likelihood gives no probability to; see the base class."""
        self.likelihood.check(x, name)

    def config(self) -> dict[str, Any]:
        """Constructor arguments as nested descriptions; see :func:`ppl_models.registry.describe`."""
        return {
            "encoder": describe(self.encoder),
            "decoder": describe(self.decoder),
            "num_latents": self.num_latents,
            "num_codes": self.num_codes,
            "code_dim": self.code_dim,
            "likelihood": describe(self.likelihood),
            "commitment": self.commitment,
            "decay": self.decay,
            "restart_below": self.restart_below,
        }

    def _encode(self, x: Tensor) -> Tensor:
        return self.encoder(x).to(self.codebook.dtype)  # not in half precision: distances cancel

    def _nearest(self, encoding: Tensor) -> Tensor:
        rows, codes = at_least_float32(encoding.detach().reshape(-1, self.code_dim)), at_least_float32(self.codebook)
        # Not float32's |e|^2 - 2 e.c + |c|^2, which cancels far from the origin, differently in each batch. In float64 products
        # of float32 numbers are exact, and their sums finer than any difference of such numbers: a third of cdist's time.
        if rows.dtype == torch.float64 or rows.device.type == "mps":  # which has no float64
            scores = torch.cdist(rows, codes, compute_mode="donot_use_mm_for_euclid_dist")
        else:
            rows, codes = rows.double(), codes.double()
            scores = codes.square().sum(-1) / 2 - rows @ codes.T  # (|e - c|^2 - |e|^2) / 2
        return scores.argmin(-1).reshape(encoding.shape[:-1])

    @torch.no_grad()
    def _follow(self, encodings: Tensor) -> None:
        """One step of the codebook towards encodings ``[n, D]``, and restarts of dead codes."""
        nearest = one_hot(self._nearest(encodings), self.num_codes).to(encodings.dtype)
        share, total = nearest.mean(0), nearest.T @ encodings / len(encodings)
        usage = self.decay * self.usage + (1 - self.decay) * share
        moved = (self.decay * self.usage[:, None] * self.codebook + (1 - self.decay) * total) / usage[:, None]
        dead = usage < self.restart_below / self.num_codes
        restarted = encodings[torch.randint(len(encodings), (self.num_codes,), device=encodings.device)]
        self.codebook.copy_(torch.where(dead[:, None], restarted, moved))
        self.usage.copy_(torch.where(dead, torch.full_like(usage, 1 / self.num_codes), usage))


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Sum over latents and their dims: ``[..., M, D]`` to ``[...]``."""
    return (a - b).square().sum((-2, -1))
