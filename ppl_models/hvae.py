"""The hierarchical variational autoencoder (lecture notes 004, "From VAE to Hierarchical VAEs"; 000, latents h_1..h_T).

    p(x, z_1..L) = p(z_L) prod_{l=2..L} p(z_{l-1} | z_l)  p(x | z_1),      p(z_L) = N(0, I)

    bottom-up guide    q(z_1..L | x) = q(z_1 | x) prod_{l=2..L} q(z_l | z_{l-1})                     (notes 004, 000)
    top-down guide     q(z_1..L | x) = q(z_L | x) prod_{l=2..L} q(z_{l-1} | z_l, x)                  (ladder models)

All layers are diagonal Gaussians whose means and scales are networks. The top-down guide corrects each layer's prior by
what the data say of it, a Gaussian message N(m_l(x), s_l(x)^2) read off deterministic features that the layers share:

    q(z_l | z_{l+1}, x)  is proportional to  p(z_l | z_{l+1}) N(z_l; m_l(x), s_l(x)^2),       q(z_L | x) = N(m_L, s_L^2)

(Sonderby et al. 2016, arXiv:1602.02282, eqs. 18 and 19), so that it has the form of the exact posterior, which is
p(z_l | z_{l+1}) p(x | z_l), wherever the messages of the layers below are Gaussian.

Sites ``z_L`` .. ``z_1``, ``x``, in the model's order. One layer is the VAE, with site ``z_1``. The closed-form KL of a
bottom-up guide's lower sites is *not* their term of the bound (``inference.decompose_elbo`` says so); that of a top-down
guide is, at every site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.arguments import sizes
from ppl_models.likelihoods import Bernoulli, Likelihood, known_likelihood
from ppl_models.networks.gaussian_layers import LadderEncoder
from ppl_models.networks.mlp import Activation, Decoder, GaussianEncoder
from ppl_models.pair import ModelGuidePair
from ppl_models.probing import evaluate_once
from ppl_models.registry import describe

Guide = Literal["bottom_up", "top_down"]


class HVAE(ModelGuidePair):
    """Gaussian VAE with L layers of latents: ``HVAE(encoders, decoders, latent_dims, likelihood, guide)``.

    ELBO(x) = E_q[log p(z_L) + sum_{l=2..L} log p(z_{l-1} | z_l) + log p(x | z_1) - log q(z_1..L | x)], lecture notes 004,
    "HVAE's ELBO". With one layer it is :class:`ppl_models.VAE`, bit for bit.

    All lists start at the data: entry l - 1 belongs to layer l.

    Args:
        encoders: L modules. For a bottom-up guide ``encoders[0]`` maps x ``[..., *data_shape]`` to ``(loc, scale)`` of
            z_1, and ``encoders[l-1]`` maps z_{l-1} to ``(loc, scale)`` of z_l. For a top-down guide they are the upward
            pass: ``encoders[l-1]`` maps the features h_{l-1} (h_0 = x) to ``(loc, scale, h_l)``, loc and scale being those
            of the message to z_l; the last one returns ``(loc, scale)`` of q(z_L | x) alone. Each loc and scale is
            ``[..., latent_dims[l-1]]``, scale > 0; features have any width.
        decoders: L modules. ``decoders[0]`` maps z_1 to the likelihood's parameters, ``decoders[l-1]`` maps z_l to
            ``(loc, scale)`` of z_{l-1}.
        latent_dims: widths of z_1, .., z_L.
        likelihood: decoder output -> distribution of x; see :mod:`ppl_models.likelihoods`.
        guide: ``"bottom_up"`` or ``"top_down"``.

    Raises:
        ValueError: lists of different lengths, an unknown guide, or networks that take or return arrays of another shape
            than the above; found at construction by one pass of a single datum.
        TypeError: a layer that is no module, or does not return a tuple of the length above.

    Example:
        >>> from ppl_models.likelihoods import Bernoulli
        >>> hvae = HVAE.preset((8, 8), Bernoulli(), latent_dims=(6, 3), hidden=(32,), guide="top_down")
        >>> hvae.data_shape, hvae.latent_sites
        (torch.Size([8, 8]), ('z_2', 'z_1'))
        >>> hvae.model(size=5).shape
        torch.Size([5, 8, 8])
    """

    prior_loc: Tensor
    prior_scale: Tensor

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        decoders: Sequence[nn.Module],
        latent_dims: Sequence[int],
        likelihood: Likelihood,
        guide: Guide = "bottom_up",
    ) -> None:
        _check_layers(encoders, decoders, latent_dims, guide)
        data_shape = _check_decoders(decoders, latent_dims, likelihood)
        super().__init__(data_shape, latent_sites=tuple(f"z_{layer}" for layer in range(len(latent_dims), 0, -1)))
        self.encoders = nn.ModuleList(encoders)
        self.decoders = nn.ModuleList(decoders)
        self.latent_dims = tuple(latent_dims)
        self.likelihood = likelihood
        self.guide_kind = guide
        prior = _zeros(decoders[-1], latent_dims[-1])[0]
        self.register_buffer("prior_loc", prior, False)
        self.register_buffer("prior_scale", torch.ones_like(prior), False)
        self._check_encoders()

    @classmethod
    def preset(
        cls,
        data_shape: Sequence[int],
        likelihood: Likelihood,
        latent_dims: Sequence[int] = (32, 16),
        hidden: Sequence[int] | Sequence[Sequence[int]] = (200, 200),
        guide: Guide = "bottom_up",
        activation: Activation = "tanh",
        num_labels: int | None = None,
    ) -> HVAE:
        """An HVAE of MLPs, each layer's decoder the mirror image of its encoder.

        Args:
            data_shape: shape of one datum.
            likelihood: decoder output -> distribution of x.
            latent_dims: widths of z_1, .., z_L.
            hidden: hidden widths of each layer's encoder, from the data up; one list for all layers, or a list a layer.
            guide: ``"bottom_up"`` or ``"top_down"``.
            activation: see :class:`ppl_models.networks.MLP`.
            num_labels: K, of an HVAE of x given a label, which every layer but the prior's reads; see :meth:`given`.

        Raises:
            ValueError: not as many lists of hidden widths as layers.
        """
        data_shape, latent_dims = sizes("data_shape", data_shape), sizes("latent_dims", latent_dims)
        likelihood, depth = known_likelihood(likelihood), len(latent_dims)
        if not isinstance(hidden, Sequence) or isinstance(hidden, str):
            raise TypeError(f"expected hidden as a list of widths, or one a layer, got {hidden!r}")
        widths: Sequence[Any] = hidden if any(isinstance(each, Sequence) for each in hidden) else [hidden] * depth
        if len(widths) != depth or not all(isinstance(each, Sequence) for each in widths):
            raise ValueError(
                f"expected hidden widths for each of {depth} layers, got {list(hidden)}: give one list for all of them, or "
                "one a layer"
            )
        classes = likelihood.num_classes
        encoders: list[nn.Module] = []
        decoders: list[nn.Module] = []
        inputs = list(data_shape)
        for layer, (dim, width) in enumerate(zip(latent_dims, map(list, widths), strict=True), start=1):
            encoder = LadderEncoder if guide == "top_down" and layer < depth else GaussianEncoder
            entries = (classes, likelihood.takes_counts) if layer == 1 else (None, False)
            encoders.append(encoder(inputs, dim, width, activation, *entries, num_labels))
            if layer == 1:
                outputs = [*data_shape] if classes is None else [*data_shape, classes]
                decoders.append(Decoder(dim, outputs, width[::-1], activation, likelihood.needs_scale, num_labels))
            else:
                decoders.append(Decoder(dim, [latent_dims[layer - 2]], width[::-1], activation, True, num_labels))
            inputs = [width[-1]] if guide == "top_down" else [dim]
        return cls(encoders, decoders, latent_dims, likelihood, guide)

    @classmethod
    def burda(cls, data_shape: Sequence[int] = (28, 28)) -> HVAE:
        """The two-layer net of Burda, Grosse and Salakhutdinov 2016 (arXiv:1509.00519), section 5.

        x - 200 - 200 - (100) - 100 - 100 - (50), mirrored downwards; tanh, standard deviations through exp, Bernoulli
        pixels, bottom-up guide, weights initialised as by Glorot and Bengio 2010.

        Args:
            data_shape: shape of one binary image.

        Example:
            >>> pair = HVAE.burda()
            >>> pair.latent_dims, [list(e.hidden) for e in pair.encoders]
            ((100, 50), [[200, 200], [100, 100]])
        """
        pair = cls.preset(data_shape, Bernoulli(), latent_dims=(100, 50), hidden=((200, 200), (100, 100)))
        for module in pair.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        return pair

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """p(z_L) prod p(z_{l-1} | z_l) p(x | z_1): sites ``z_L`` .. ``z_1`` ``[B, d_l]`` and ``x``; see the base class."""
        self.announce("decoders", "likelihood")
        depth = len(self.latent_dims)
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample(f"z_{depth}", dist.Normal(self.prior_loc, self.prior_scale).to_event(1))
            for layer in range(depth, 1, -1):
                z = pyro.sample(f"z_{layer - 1}", dist.Normal(*self.decoders[layer - 1](z)).to_event(1))
            return pyro.sample("x", self.likelihood(self.decoders[0](z), len(self.data_shape)), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(z_1..L | x), bottom-up or top-down: sites ``z_l`` ``[B, d_l]`` in the order in which they are drawn.

        Returns:
            The latent drawn last.
        """
        return self._bottom_up(x) if self.guide_kind == "bottom_up" else self._top_down(x)

    def _bottom_up(self, x: Tensor) -> Tensor:
        """q(z_1 | x) prod_{l=2..L} q(z_l | z_{l-1})."""
        self.announce("encoders")
        with pyro.plate("data", self.batch_size(x)):
            z = x
            for layer, encoder in enumerate(self.encoders, start=1):
                z = pyro.sample(f"z_{layer}", dist.Normal(*encoder(z)).to_event(1))
            return z

    def _top_down(self, x: Tensor) -> Tensor:
        """q(z_L | x) prod_{l=L..2} q(z_{l-1} | z_l, x), each proportional to prior times message."""
        self.announce("encoders", "decoders")
        depth = len(self.latent_dims)
        with pyro.plate("data", self.batch_size(x)):
            messages, h = [], x
            for layer in range(1, depth):
                loc, scale, h = self.encoders[layer - 1](h)
                messages.append((loc, scale))
            z = pyro.sample(f"z_{depth}", dist.Normal(*self.encoders[depth - 1](h)).to_event(1))
            for layer in range(depth - 1, 0, -1):
                posterior = combine_gaussians(self.decoders[layer](z), messages[layer - 1])
                z = pyro.sample(f"z_{layer}", dist.Normal(*posterior).to_event(1))
            return z

    def check_data(self, x: Tensor, name: str = "x") -> None:
        """Refuses data that the likelihood gives no probability to; see the base class."""
        self.likelihood.check(x, name)

    def config(self) -> dict[str, Any]:
        """Constructor arguments as nested descriptions; see :func:`ppl_models.registry.describe`."""
        return {
            "encoders": [describe(encoder) for encoder in self.encoders],
            "decoders": [describe(decoder) for decoder in self.decoders],
            "latent_dims": list(self.latent_dims),
            "likelihood": describe(self.likelihood),
            "guide": self.guide_kind,
        }

    def _check_encoders(self) -> None:
        """One datum through the guide's networks, at the means."""
        reference = self.prior_loc
        h = self.likelihood.example(self.data_shape, reference.dtype, reference.device)
        depth = len(self.latent_dims)
        for layer, (encoder, dim) in enumerate(zip(self.encoders, self.latent_dims, strict=True), start=1):
            name = f"encoders[{layer - 1}], of z_{layer},"
            output = evaluate_once(name, encoder, h)
            if self.guide_kind == "bottom_up" or layer == depth:
                _check_gaussian(name, output, dim)
                h = output[0]
            else:
                _check_rung(name, output, dim)
                h = output[2]


def combine_gaussians(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and scale of the Gaussian proportional to N(z; m_a, s_a^2) N(z; m_b, s_b^2), entry by entry.

        1/s^2 = 1/s_a^2 + 1/s_b^2,      m/s^2 = m_a/s_a^2 + m_b/s_b^2

    Sonderby et al. 2016 (arXiv:1602.02282), eqs. 18 and 19; written without the precisions, which overflow first.

    Args:
        a: (m_a, s_a), mean and standard deviation > 0 of one factor.
        b: (m_b, s_b), those of the other.

    Returns:
        ``(loc, scale)``.

    Example:
        >>> loc, scale = combine_gaussians((torch.zeros(1), torch.ones(1)), (2 * torch.ones(1), torch.ones(1)))
        >>> round(float(loc), 4), round(float(scale) ** 2, 4)
        (1.0, 0.5)
    """
    (loc_a, scale_a), (loc_b, scale_b) = a, b
    total = torch.hypot(scale_a, scale_b)
    return loc_a + (scale_a / total).square() * (loc_b - loc_a), scale_a * (scale_b / total)


def _check_layers(
    encoders: Sequence[nn.Module], decoders: Sequence[nn.Module], latent_dims: Sequence[int], guide: str
) -> None:
    counts = {"encoders": len(encoders), "decoders": len(decoders), "latent_dims": len(latent_dims)}
    if len(set(counts.values())) != 1 or not latent_dims:
        raise ValueError(
            "expected encoders, decoders and latent_dims of the same length L >= 1, got "
            f"{', '.join(f'{n} {name}' for name, n in counts.items())}: give one of each a layer"
        )
    if any(isinstance(dim, bool) or not isinstance(dim, int) or dim < 1 for dim in latent_dims):
        raise ValueError(f"expected latent_dims of whole numbers >= 1, got {list(latent_dims)}")
    if guide not in get_args(Guide):
        raise ValueError(f"expected guide 'bottom_up' or 'top_down', got {guide!r}")
    for name, modules in (("encoders", encoders), ("decoders", decoders)):
        for i, module in enumerate(modules):
            if not isinstance(module, nn.Module):
                raise TypeError(f"expected {name}[{i}] to be a torch.nn.Module, got {type(module).__name__}")


def _check_decoders(decoders: Sequence[nn.Module], latent_dims: Sequence[int], likelihood: Likelihood) -> torch.Size:
    """One latent through each decoder; the shape of a datum."""
    for layer in range(len(latent_dims), 1, -1):
        name = f"decoders[{layer - 1}], of z_{layer - 1} given z_{layer},"
        output = evaluate_once(name, decoders[layer - 1], _zeros(decoders[layer - 1], latent_dims[layer - 1]))
        _check_gaussian(name, output, latent_dims[layer - 2])
    output = evaluate_once("decoders[0], of x given z_1,", decoders[0], _zeros(decoders[0], latent_dims[0]))
    data_shape = likelihood.data_shape_of(output)
    likelihood(output, len(data_shape))  # refuses output that it cannot take
    return data_shape


def _check_rung(name: str, output: Any, dim: int) -> None:
    """Refuses what is not (loc, scale, features)."""
    if not (isinstance(output, tuple) and len(output) == 3 and isinstance(output[2], Tensor)):
        raise TypeError(
            f"expected {name} to return (loc, scale, features), as the guide is top-down and layers stand above, got "
            f"{_kind(output)}: return the features for the next encoder as well"
        )
    _check_gaussian(name, output[:2], dim)


def _check_gaussian(name: str, output: Any, dim: int) -> None:
    """Refuses what is not (loc, scale), each [1, dim] for one row, scale > 0."""
    if not (isinstance(output, tuple) and len(output) == 2):
        raise TypeError(
            f"expected {name} to return a pair (loc, scale), got {_kind(output)}: return two tensors of shape [..., {dim}]"
        )
    for part, value in zip(("loc", "scale"), output, strict=True):
        if value.shape != (1, dim):
            raise ValueError(
                f"expected {name} to return a {part} of shape [B, {dim}], [1, {dim}] for one row, got "
                f"{list(value.shape)}: match its last layer to latent_dims"
            )
    if not bool((output[1] > 0).all()):
        raise ValueError(f"expected {name} to return a scale > 0: pass its last layer through exp or softplus")


def _kind(output: Any) -> str:
    return f"a tuple of {len(output)}" if isinstance(output, tuple) else type(output).__name__


def _zeros(module: nn.Module, dim: int) -> Tensor:
    """One latent, in a network's dtype and on its device."""
    reference = next(module.parameters(), torch.empty(0))
    return torch.zeros(1, dim, dtype=reference.dtype, device=reference.device)
