"""The variational autoencoder with categorical latents (Discrete-VAE, named in the outline of lecture notes 004).

    p(z) = prod_m Uniform(z_m; 1..K)      p_theta(x | z) = likelihood(decoder(z))
    q_phi(z | x) = prod_m Categorical(z_m; softmax(encoder(x)_m))

    ELBO(x) = E_q[log p_theta(x | z)] - sum_m [log K - H(q_phi(z_m | x))]

The chain of the hierarchical VAE with L = 1 and categories in place of Gaussians. Site ``z`` holds M one-hot rows,
``[B, M, K]`` floats, so that the same decoder takes a relaxed z; site ``x`` the data. The prior is fixed at the uniform
one. Draws of z carry no gradient: train with :mod:`inference.training.gradient_estimators`, or with
``pyro.infer.TraceEnum_ELBO`` and ``config_enumerate``, which sums over all K^M values of ``z``.

The one constraint: enumeration, and with it the exact evidence, needs K^M <= 65,536.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.arguments import sizes
from ppl_models.likelihoods import Likelihood, known_likelihood
from ppl_models.networks.arrays import mirrored
from ppl_models.networks.mlp import Activation
from ppl_models.pair import ModelGuidePair
from ppl_models.probing import evaluate_once
from ppl_models.registry import describe

MAX_STATES = 2**16
STATES_AT_ONCE = 1024


class TooManyStatesError(ValueError):
    """A discrete latent with more values than can be summed over; the message says how many."""


class IndependentOneHot(dist.Independent):
    """M independent one-hot vectors as one variable, which can be enumerated: K^M values of shape ``[M, K]``.

    log p(z) = sum_m sum_k z_mk log p_mk. Made as ``IndependentOneHot(OneHotCategorical(logits=...), 1)``; Pyro's own
    ``Independent`` is the same law but refuses to enumerate, and its draws cannot be traced to a graph.

    Args:
        base_distribution: ``OneHotCategorical`` of batch shape ``[..., M]``.
        reinterpreted_batch_ndims: 1.

    Example:
        >>> law = IndependentOneHot(dist.OneHotCategorical(logits=torch.zeros(5, 2, 3)), 1)
        >>> law.event_shape, law.enumerate_support(expand=False).shape
        (torch.Size([2, 3]), torch.Size([9, 1, 2, 3]))
    """

    has_enumerate_support = True  # too many values are refused by name when they are asked for, never drawn instead

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, ``[*sample_shape, *batch_shape, M, K]``."""
        classes = dist.Categorical(logits=self.base_dist.logits).sample(torch.Size(sample_shape))
        return one_hot(classes, self.event_shape[-1]).to(self.base_dist.logits.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All values, the last latent's class running fastest: ``[K^M, *batch_shape, M, K]``, or ones for the batch.

        Raises:
            TooManyStatesError: K^M is above :data:`MAX_STATES`.
        """
        states = all_one_hot(*self.event_shape).to(self.base_dist.probs)
        states = states.reshape(len(states), *[1] * len(self.batch_shape), *self.event_shape)
        return states.expand(len(states), *self.batch_shape, *self.event_shape) if expand else states


def refuse_too_many(num_latents: int, num_classes: int) -> None:
    """Refuses K^M values that are too many to sum over.

    Raises:
        TooManyStatesError: K^M is above :data:`MAX_STATES`.
    """
    if num_classes**num_latents > MAX_STATES:
        exponent, leading = math.floor(digits := num_latents * math.log10(num_classes)), 10 ** (digits % 1)
        raise TooManyStatesError(
            f"expected at most {MAX_STATES} values to sum over, got K^M = {num_classes}^{num_latents} = "
            f"{leading:.2f}e+{exponent:02d}: make num_latents or num_classes smaller, or use an estimator that draws"
        )


def all_one_hot(num_latents: int, num_classes: int) -> Tensor:
    """All values of M one-hot vectors of length K, booleans ``[K^M, M, K]``.

    Raises:
        TooManyStatesError: K^M is above :data:`MAX_STATES`.

    Example:
        >>> all_one_hot(2, 2).long().argmax(-1).tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    refuse_too_many(num_latents, num_classes)
    digits = num_classes ** torch.arange(num_latents - 1, -1, -1)
    classes = torch.arange(num_classes**num_latents)[:, None] // digits % num_classes
    return one_hot(classes, num_classes)


def one_hot(classes: Tensor, num_classes: int) -> Tensor:
    """Booleans ``[..., K]`` of classes ``[...]``: torch's own ``one_hot`` reads values, which a traced graph cannot."""
    return classes[..., None] == torch.arange(num_classes, device=classes.device)


class CategoricalVAE(ModelGuidePair):
    """VAE with M latents of K classes: ``CategoricalVAE(encoder, decoder, num_latents, num_classes, likelihood)``.

    ELBO(x) = E_{q(z|x)}[log p(x | z)] - KL(q(z | x) || p(z)) with KL = sum_m [log K - H(q(z_m | x))], exact; lecture notes 004,
    Theorem 1, with categories for Gaussians; Jang et al. 2016 (arXiv:1611.01144).

    Args:
        encoder: module, x ``[..., *data_shape]`` -> logits ``[..., M, K]``.
        decoder: module, z ``[..., M, K]`` (one-hot rows, or rows on the simplex) -> the likelihood's parameters.
        num_latents: M >= 1.
        num_classes: K >= 2.
        likelihood: decoder output -> distribution of x; see :mod:`ppl_models.likelihoods`.

    Raises:
        ValueError: M or K too small or no int, or encoder or decoder return arrays of another shape than the above; found
            at construction by one pass of a single datum.
        TypeError: the encoder does not return a tensor.

    Example:
        >>> from ppl_models.likelihoods import Bernoulli
        >>> vae = CategoricalVAE.preset((8, 8), Bernoulli(), num_latents=3, num_classes=4, hidden=(32,))
        >>> vae.data_shape, vae.latent_sites
        (torch.Size([8, 8]), ('z',))
        >>> vae.model(size=5).shape, vae.guide(torch.zeros(5, 8, 8)).shape
        (torch.Size([5, 8, 8]), torch.Size([5, 3, 4]))
    """

    default_objective: ClassVar[str] = "straight_through"
    prior_logits: Tensor

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, num_latents: int, num_classes: int, likelihood: Likelihood
    ) -> None:
        check_sizes(num_latents=(num_latents, 1), num_classes=(num_classes, 2))
        z = zeros_like_parameters(decoder, num_latents, num_classes)
        output = evaluate_once("decoder", decoder, z)
        data_shape = likelihood.data_shape_of(output)
        likelihood(output, len(data_shape))  # refuses output that it cannot take
        super().__init__(data_shape, latent_sites=("z",))
        self.encoder = encoder
        self.decoder = decoder
        self.num_latents = num_latents
        self.num_classes = num_classes
        self.likelihood = likelihood
        self.register_buffer("prior_logits", torch.zeros_like(z[0]), False)
        logits = evaluate_once("encoder", encoder, likelihood.example(data_shape, z.dtype, z.device))
        check_encoding(logits, self.data_shape, {"num_latents": num_latents, "num_classes": num_classes})

    @classmethod
    def preset(
        cls,
        data_shape: Sequence[int],
        likelihood: Likelihood,
        num_latents: int = 20,
        num_classes: int = 10,
        hidden: Sequence[int] = (200, 200),
        activation: Activation = "tanh",
        num_labels: int | None = None,
    ) -> CategoricalVAE:
        """A categorical VAE with MLP encoder and decoder, mirror images of each other.

        Args:
            data_shape: shape of one datum.
            likelihood: decoder output -> distribution of x.
            num_latents: M.
            num_classes: K.
            hidden: the encoder's hidden widths; the decoder has them reversed.
            activation: see :class:`ppl_models.networks.MLP`.
            num_labels: of a VAE of x given a label (not a class of z): p(z) p(x | z, y) and q(z | x, y); see :meth:`given`.
        """
        check_sizes(num_latents=(num_latents, 1), num_classes=(num_classes, 2))
        data_shape, hidden, likelihood = (
            sizes("data_shape", data_shape),
            sizes("hidden", hidden),
            known_likelihood(likelihood),
        )
        shape, classes = [num_latents, num_classes], likelihood.num_classes
        laws = (classes, likelihood.needs_scale, likelihood.takes_counts, num_labels)
        encoder, decoder = mirrored(data_shape, shape, hidden, activation, *laws)
        return cls(encoder, decoder, num_latents, num_classes, likelihood)

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """p(z) p_theta(x | z): sites ``z`` ``[B, M, K]`` and ``x`` ``[B, *data_shape]``; see the base class."""
        self.announce("decoder", "likelihood")
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", IndependentOneHot(dist.OneHotCategorical(logits=self.prior_logits), 1))
            return pyro.sample("x", self.likelihood(self.decoder(z), len(self.data_shape)), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q_phi(z | x) = prod_m Categorical(z_m; softmax(encoder(x)_m)): site ``z`` ``[B, M, K]``, one-hot rows."""
        self.announce("encoder")
        with pyro.plate("data", self.batch_size(x)):
            return pyro.sample("z", self.guide_distribution(x))

    def guide_distribution(self, x: Tensor) -> IndependentOneHot:
        """q_phi(z | x), batch ``[B]``, event ``[M, K]``; in float32 at least."""
        logits = self.encoder(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return IndependentOneHot(dist.OneHotCategorical(logits=logits), 1)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) = log sum_z K^-M p_theta(x | z), ``[B]`` nats, exact: the sum over all K^M values of z.

        Args:
            x: ``[B, *data_shape]``.

        Raises:
            TooManyStatesError: K^M is above :data:`MAX_STATES`; use ``inference.log_evidence`` then.

        Example:
            >>> from ppl_models.likelihoods import Bernoulli
            >>> vae = CategoricalVAE.preset((2,), Bernoulli(), num_latents=2, num_classes=3, hidden=(4,))
            >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
            >>> round(float(vae.log_evidence(x).exp().sum().detach()), 5)
            1.0
        """
        self.batch_size(x)
        states = all_one_hot(self.num_latents, self.num_classes).to(self.prior_logits)[:, None]
        log_likelihood = torch.cat(
            [
                self.likelihood(self.decoder(z), len(self.data_shape)).log_prob(x)  # [states, B]
                for z in states.split(STATES_AT_ONCE)
            ]
        )
        return log_likelihood.logsumexp(0) - self.num_latents * math.log(self.num_classes)

    def check_data(self, x: Tensor, name: str = "x") -> None:
        """Refuses data that the likelihood gives no probability to; see the base class."""
        self.likelihood.check(x, name)

    def config(self) -> dict[str, Any]:
        """Constructor arguments as nested descriptions; see :func:`ppl_models.registry.describe`."""
        return {
            "encoder": describe(self.encoder),
            "decoder": describe(self.decoder),
            "num_latents": self.num_latents,
            "num_classes": self.num_classes,
            "likelihood": describe(self.likelihood),
        }


def zeros_like_parameters(module: nn.Module, *shape: int) -> Tensor:
    """One latent of zeros, ``[1, *shape]``, in the dtype and on the device of a module's parameters."""
    reference = next(module.parameters(), torch.empty(0))
    return torch.zeros(1, *shape, dtype=reference.dtype, device=reference.device)


def check_sizes(**sizes: tuple[Any, int]) -> None:
    """Refuses a size that is no int, or below its least: ``name=(size, least)``.

    Raises:
        ValueError: says which.

    Example:
        >>> check_sizes(num_latents=(3, 1), num_codes=(2, 2))
    """
    for name, (size, least) in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise ValueError(f"expected {name} to be an int >= {least}, got {size!r}: state how many")


def check_encoding(encoding: Any, data_shape: torch.Size, sizes: dict[str, int]) -> None:
    """Refuses what an encoder returns for one datum unless it is a tensor ``[1, *sizes.values()]``.

    Raises:
        TypeError: no tensor.
        ValueError: another shape.
    """
    names = ", ".join(sizes)
    if not isinstance(encoding, Tensor):
        raise TypeError(
            f"expected the encoder to return one tensor, got {type(encoding).__name__}: return [..., {names}]"
        )
    expected = [1, *sizes.values()]
    if list(encoding.shape) != expected:
        raise ValueError(
            f"expected the encoder to return shape [B, {names}] = {expected} for one datum of shape {list(data_shape)}, "
            f"got {list(encoding.shape)}: match the encoder's last layer"
        )
