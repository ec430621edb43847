"""The linear-Gaussian hierarchy: an HVAE with evidence, posterior and bound in closed form.

    p(z_L) = N(0, I)      p(z_{l-1} | z_l) = N(W_l z_l + b_l, s_l^2 I),  l = L..1,  z_0 = x

The posterior is a Markov chain both ways, and each way is a guide of the notes (004, 000):

    bottom-up   q(z_1 | x) = p(z_1 | x),    q(z_l | z_{l-1}) = p(z_l | z_{l-1})
    top-down    q(z_L | x) = p(z_L | x),    q(z_l | z_{l+1}, x) proportional to p(z_l | z_{l+1}) p(x | z_l)

because x tells nothing of z_l beyond z_{l-1}. All conditionals are Gaussian, from two recursions: the marginal prior
p(z_l) = N(m_l, C_l) downwards and the likelihood p(x | z_l) = N(A_l z_l + a_l, S_l) upwards,

    m_L = 0,  C_L = I;      m_{l-1} = W_l m_l + b_l,   C_{l-1} = W_l C_l W_l' + s_l^2 I
    A_0 = I,  a_0 = 0,  S_0 = 0;      A_l = A_{l-1} W_l,   a_l = A_{l-1} b_l + a_{l-1},   S_l = s_l^2 A_{l-1} A_{l-1}' + S_{l-1}

(Bishop 2006, eqs. 2.113 to 2.117). With the exact guides log p(x, z) - log q(z | x) = log p(x) for *every* draw: a
zero-variance certificate of all terms of a hierarchical bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.linear_gaussian import symmetric, widened
from ppl_models.pair import ModelGuidePair, refuse_other_dtype

Guide = Literal["bottom_up", "top_down"]


class LinearHierarchy(ModelGuidePair):
    """The linear HVAE with everything known. Sites ``z_L`` .. ``z_1`` ``[B, d_l]`` and ``x`` ``[B, d_0]``.

    The guide is computed from the model's parameters, in one of two directions and of two kinds:

    - exact: every conditional is the posterior's, with full covariance;
    - mean field (``exact=False``): each conditional has its exact mean and the diagonal of its exact precision, the
      diagonal Gaussian nearest to it in KL(q || p) (Bishop 2006, section 10.1.2).

    :meth:`elbo` is exact for both.

    Args:
        weights: W_1 .. W_L, from the data up, ``[d_{l-1}, d_l]``.
        biases: b_1 .. b_L, ``[d_{l-1}]``.
        noise_scales: s_1 .. s_L, each > 0.
        guide: ``"bottom_up"`` or ``"top_down"``.
        exact: whether the guide is the posterior.

    Raises:
        ValueError: lists of different lengths, shapes that do not chain, a noise scale that is not positive, or an
            unknown guide.

    Example:
        >>> pair = LinearHierarchy.random(data_dim=3, latent_dims=(2, 2), guide="top_down")
        >>> pair.latent_sites
        ('z_2', 'z_1')
        >>> x = pair.model(size=4).detach()
        >>> bool(torch.allclose(pair.elbo(x), pair.log_evidence(x), atol=1e-4))
        True
    """

    prior_loc: Tensor
    prior_scale: Tensor

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        noise_scales: Sequence[float],
        guide: Guide = "bottom_up",
        exact: bool = True,
    ) -> None:
        _check(weights, biases, noise_scales, guide)
        depth = len(weights)
        super().__init__((weights[0].shape[0],), latent_sites=tuple(f"z_{layer}" for layer in range(depth, 0, -1)))
        self.weights = nn.ParameterList([w.detach().clone() for w in weights])
        self.biases = nn.ParameterList([b.detach().clone() for b in biases])
        self.log_noise_scales = nn.Parameter(torch.as_tensor(noise_scales, dtype=weights[0].dtype).log())
        self.guide_kind = guide
        self.exact = exact
        self.register_buffer("prior_loc", torch.zeros_like(weights[-1][0]), False)
        self.register_buffer("prior_scale", torch.ones_like(weights[-1][0]), False)

    @classmethod
    def random(
        cls,
        data_dim: int,
        latent_dims: Sequence[int],
        *,
        noise_scale: float = 0.5,
        guide: Guide = "bottom_up",
        exact: bool = True,
        seed: int = 0,
    ) -> LinearHierarchy:
        """A pair with Gaussian W_l and b_l drawn from a generator of its own (the default one is left alone)."""
        generator = torch.Generator().manual_seed(seed)
        shapes = list(itertools.pairwise([data_dim, *latent_dims]))
        weights = [torch.randn(*shape, generator=generator) for shape in shapes]
        biases = [torch.randn(below, generator=generator) for below, _ in shapes]
        return cls(weights, biases, [noise_scale] * len(latent_dims), guide, exact)

    @property
    def depth(self) -> int:
        """L, the number of latent layers."""
        return len(self.weights)

    def batch_size(self, x: Tensor | None = None, size: int | None = None) -> int:
        """B; see the base class. Data of another dtype than the parameters are refused."""
        refuse_other_dtype(x, self.prior_loc)
        return super().batch_size(x, size)

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """p(z_L) prod p(z_{l-1} | z_l): sites ``z_L`` .. ``z_1`` and ``x``."""
        self.announce("weights", "biases", "log_noise_scales")
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample(f"z_{self.depth}", dist.Normal(self.prior_loc, self.prior_scale).to_event(1))
            for layer in range(self.depth, 1, -1):
                z = pyro.sample(f"z_{layer - 1}", self._below(layer, z))
            return pyro.sample("x", self._below(1, z), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(z_1..L | x), bottom-up or top-down; returns the latent drawn last."""
        self.announce("weights", "biases", "log_noise_scales")
        with pyro.plate("data", self.batch_size(x)):
            z = x
            for site, *parameters in self._conditionals(x):
                weight, loc, precision = (parameter.to(x.dtype) for parameter in parameters)
                z = pyro.sample(site, self._law(z @ weight.T + loc, precision))
            return z

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) = log N(x; m_0, C_0), ``[B]`` nats."""
        loc, covariance = self._priors()[0]
        return dist.MultivariateNormal(loc, covariance).log_prob(widened(x)).to(self.prior_loc.dtype)

    def elbo(self, x: Tensor) -> Tensor:
        """ELBO(x) = log p(x) - KL(q(z_1..L | x) || p(z_1..L | x)), ``[B]`` nats, exact.

        The KL of two chains of Gaussians is the sum over layers of E_q[KL(q(z_l | .) || p(z_l | ., x))]. Both
        conditionals have the same mean at the same z, so no layer's KL depends on z: with precisions P (exact) and D = diag P
        it is 1/2 (tr P D^-1 - d + log |D| - log |P|), whose trace is d.
        """
        log_evidence = self.log_evidence(x)
        if self.exact:
            return log_evidence
        gaps = [torch.diagonal(p).log().sum() - torch.logdet(p) for _, _, _, p in self._conditionals(x)]
        return log_evidence - 0.5 * torch.stack(gaps).sum().to(log_evidence.dtype)

    def config(self) -> dict[str, Any]:
        """Arguments of :meth:`random` of the right shapes, JSON-able; the values are in the weights."""
        return {
            "data_dim": self.data_shape[0],
            "latent_dims": [w.shape[1] for w in self.weights],
            "guide": self.guide_kind,
            "exact": self.exact,
        }

    def _below(self, layer: int, z: Tensor) -> dist.TorchDistribution:
        """p(z_{l-1} | z_l)."""
        loc = z @ self.weights[layer - 1].T + self.biases[layer - 1]
        return dist.Normal(loc, self.log_noise_scales[layer - 1].exp()).to_event(1)

    def _law(self, loc: Tensor, precision: Tensor) -> dist.TorchDistribution:
        if self.exact:
            return dist.MultivariateNormal(loc, precision_matrix=precision)
        return dist.Normal(loc, torch.diagonal(precision).rsqrt()).to_event(1)

    def _conditionals(self, x: Tensor) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        """The guide's conditionals in order: site, G, c, P of N(G y + c, P^-1), y the value before (x at first); float64."""
        return self._bottom_up() if self.guide_kind == "bottom_up" else self._top_down(x)

    def _bottom_up(self) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        """p(z_l | z_{l-1}) proportional to N(z_l; m_l, C_l) N(z_{l-1}; W_l z_l + b_l, s_l^2 I)."""
        priors, found = self._priors(), []
        for layer in range(1, self.depth + 1):
            weight, bias = widened(self.weights[layer - 1]), widened(self.biases[layer - 1])
            mean, covariance = priors[layer]
            prior_precision = torch.linalg.inv(covariance)
            gain = weight.T / self._variance(layer)
            precision = symmetric(prior_precision + gain @ weight)
            loc = torch.linalg.solve(precision, prior_precision @ mean - gain @ bias)
            found.append((f"z_{layer}", torch.linalg.solve(precision, gain), loc, precision))
        return found

    def _top_down(self, x: Tensor) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        """p(z_l | z_{l+1}, x) proportional to N(z_l; W_{l+1} z_{l+1} + b_{l+1}, s_{l+1}^2 I) N(x; A_l z_l + a_l, S_l)."""
        likelihoods, found = self._likelihoods(), []
        for layer in range(self.depth, 0, -1):
            a_weight, a_bias, noise = likelihoods[layer]
            gain = torch.linalg.solve(noise, a_weight).T  # A' S^-1
            message = (widened(x) - a_bias) @ gain.T
            if layer == self.depth:  # nothing is drawn before; x enters by the message
                prior_precision = torch.diag(widened(self.prior_scale))
                weight, bias = torch.zeros_like(gain), widened(self.prior_loc)
            else:
                prior_precision = torch.eye(len(gain), dtype=gain.dtype, device=x.device) / self._variance(layer + 1)
                weight, bias = widened(self.weights[layer]), widened(self.biases[layer])
            precision = symmetric(prior_precision + gain @ a_weight)
            loc = torch.linalg.solve(precision, (message + prior_precision @ bias).unsqueeze(-1)).squeeze(-1)
            found.append((f"z_{layer}", torch.linalg.solve(precision, prior_precision @ weight), loc, precision))
        return found

    def _priors(self) -> list[tuple[Tensor, Tensor]]:
        """(m_l, C_l) for l = 0..L, layer 0 being x; float64."""
        mean, covariance = widened(self.prior_loc), torch.diag(widened(self.prior_scale))
        found = [(mean, covariance)]
        for layer in range(self.depth, 0, -1):
            weight = widened(self.weights[layer - 1])
            mean = weight @ mean + widened(self.biases[layer - 1])
            own = self._variance(layer) * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
            covariance = symmetric(weight @ covariance @ weight.T + own)
            found.insert(0, (mean, covariance))
        return found

    def _likelihoods(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(A_l, a_l, S_l) of p(x | z_l) for l = 0..L, layer 0 being x itself; float64."""
        first = widened(self.biases[0])
        weight = torch.eye(len(first), dtype=first.dtype, device=first.device)
        bias, noise = torch.zeros_like(first), torch.zeros_like(weight)
        found = [(weight, bias, noise)]
        for layer in range(1, self.depth + 1):
            noise = symmetric(self._variance(layer) * weight @ weight.T + noise)
            bias = weight @ widened(self.biases[layer - 1]) + bias
            weight = weight @ widened(self.weights[layer - 1])
            found.append((weight, bias, noise))
        return found

    def _variance(self, layer: int) -> Tensor:
        """s_l^2, float64."""
        return widened(self.log_noise_scales[layer - 1]).exp().square()


def _check(weights: Sequence[Tensor], biases: Sequence[Tensor], noise_scales: Sequence[float], guide: str) -> None:
    counts = {"weights": len(weights), "biases": len(biases), "noise_scales": len(noise_scales)}
    if len(set(counts.values())) != 1 or not weights:
        raise ValueError(
            "expected weights, biases and noise_scales of the same length L >= 1, got "
            f"{', '.join(f'{n} {name}' for name, n in counts.items())}: give one of each a layer"
        )
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        chained = layer == 1 or (weights[layer - 2].dim() == 2 and weight.shape[:1] == weights[layer - 2].shape[1:])
        if weight.dim() != 2 or bias.shape != weight.shape[:1] or not chained:
            raise ValueError(
                f"expected W_{layer} of shape [d_{layer - 1}, d_{layer}] and b_{layer} [d_{layer - 1}], d_0 being the width "
                f"of x, got {list(weight.shape)} and {list(bias.shape)}: make each weight take what the one below needs"
            )
    if not all(scale > 0 for scale in noise_scales):
        raise ValueError(f"expected positive noise_scales, got {list(noise_scales)}")
    if guide not in get_args(Guide):
        raise ValueError(f"expected guide 'bottom_up' or 'top_down', got {guide!r}")
