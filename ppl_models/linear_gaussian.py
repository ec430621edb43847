"""Linear-Gaussian pairs: evidence, posterior and bound in closed form. The oracles of this project.

    p(z) = N(0, I)      p(x | z) = N(W z + b, s^2 I)

    evidence    p(x) = N(b, W W' + s^2 I)
    posterior   p(z | x) = N(M^-1 W' (x - b), s^2 M^-1),   M = W' W + s^2 I

(probabilistic PCA: Tipping and Bishop 1999, eqs. 4 to 8). With the exact posterior as guide,
log p(x, z) - log q(z | x) = log p(x) for *every* draw z: a zero-variance certificate of all terms.
Densities are worked out through Cholesky factors of the d x d matrix M, never by inverting the D x D covariance.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.data_checks import refuse_other_than_tensor
from ppl_models.pair import ModelGuidePair, refuse_other_dtype

Guide = Literal["exact", "mean_field"]


class LinearGaussian(ModelGuidePair):
    """The linear VAE with everything known: p(z) = N(0, I), p(x | z) = N(W z + b, s^2 I).

    Sites ``z`` ``[B, d]`` and ``x`` ``[B, D]``. The guide is computed from W, b and s:

    - ``"exact"``: the posterior itself; diagonal Normal where the columns of W are orthogonal, full otherwise;
    - ``"mean_field"``: the diagonal Gaussian nearest to it in KL(q || p): same mean, variances s^2 / diag(M)
      (Bishop 2006, section 10.1.2). Its gap KL(q || p(z|x)) = log p(x) - ELBO is known exactly.

    Args:
        weight: W, ``[D, d]``.
        bias: b, ``[D]``.
        noise_scale: s > 0, a scalar.
        guide: ``"exact"`` or ``"mean_field"``.

    Raises:
        ValueError: shapes that do not fit, a noise scale that is not positive, or an unknown guide.

    Example:
        >>> pair = LinearGaussian(torch.tensor([[1.0], [0.0]]), torch.zeros(2), noise_scale=1.0)
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> round(pair.log_evidence(x).item(), 4)  # log N(1; 0, 2) + log N(0; 0, 1)
        -2.4345
        >>> bool(torch.allclose(pair.elbo(x), pair.log_evidence(x)))
        True
    """

    prior_loc: Tensor
    prior_scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, noise_scale: float | Tensor, guide: Guide = "exact") -> None:
        refuse_other_than_tensor(weight, "weight")
        refuse_other_than_tensor(bias, "bias")
        if weight.dim() != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"expected weight [D, d] and bias [D], got {list(weight.shape)} and {list(bias.shape)}: "
                "make the bias as long as the weight has rows"
            )
        scale = torch.as_tensor(noise_scale, dtype=weight.dtype, device=weight.device)
        if scale.dim() != 0 or not bool(scale > 0):
            raise ValueError(f"expected one positive noise_scale, got {noise_scale}")
        if guide not in ("exact", "mean_field"):
            raise ValueError(f"expected guide 'exact' or 'mean_field', got {guide!r}")
        super().__init__((weight.shape[0],), latent_sites=("z",))
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())
        self.log_noise_scale = nn.Parameter(scale.log())
        self.guide_kind = guide
        self.register_buffer("prior_loc", torch.zeros_like(weight[0]), False)
        self.register_buffer("prior_scale", torch.ones_like(weight[0]), False)

    @classmethod
    def random(
        cls,
        data_dim: int,
        latent_dim: int,
        *,
        orthogonal: bool = False,
        noise_scale: float = 0.5,
        guide: Guide = "exact",
        seed: int = 0,
    ) -> LinearGaussian:
        """A pair with Gaussian W and b drawn from a generator of its own (the default one is left alone)."""
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(data_dim, latent_dim, generator=generator)
        if orthogonal:
            columns, _ = torch.linalg.qr(weight)
            weight = columns * torch.linspace(1.5, 0.5, latent_dim)
        return cls(weight, torch.randn(data_dim, generator=generator), noise_scale, guide)

    @property
    def noise_scale(self) -> Tensor:
        """s, a positive scalar."""
        return self.log_noise_scale.exp()

    def batch_size(self, x: Tensor | None = None, size: int | None = None) -> int:
        """B; see the base class. Data of another dtype than the parameters are refused."""
        refuse_other_dtype(x, self.weight)
        return super().batch_size(x, size)

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """p(z) p(x | z): sites ``z`` and ``x``."""
        self.announce("weight", "bias", "log_noise_scale")
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", dist.Normal(self.prior_loc, self.prior_scale).to_event(1))
            return pyro.sample("x", dist.Normal(z @ self.weight.T + self.bias, self.noise_scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(z | x): the exact posterior, or its nearest diagonal Gaussian."""
        self.announce("weight", "bias", "log_noise_scale")
        with pyro.plate("data", self.batch_size(x)):
            return pyro.sample("z", self.guide_distribution(x))

    def guide_distribution(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) as a distribution over ``[B, d]``; diagonal wherever that is exact."""
        posterior = self.posterior(x)
        precision = self._precision().to(self.weight.dtype)
        diagonal = torch.diagonal(precision)
        rounding = 10 * torch.finfo(precision.dtype).eps * diagonal.abs().max()
        orthogonal = bool((precision - torch.diag(diagonal)).abs().max() <= rounding)
        if self.guide_kind == "exact" and not orthogonal:
            return posterior
        return dist.Normal(posterior.loc, diagonal.rsqrt().expand_as(posterior.loc)).to_event(1)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """p(z | x) = N(M^-1 W' (x - b), s^2 M^-1), batch ``[B]``, event ``[d]``."""
        precision = self._precision().to(self.weight.dtype)
        rhs = (x - self.bias) @ self.weight / self.noise_scale**2
        loc = torch.linalg.solve(precision, rhs.unsqueeze(-1)).squeeze(-1)
        return dist.MultivariateNormal(loc, precision_matrix=precision)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) = log N(x; b, W W' + s^2 I), ``[B]`` nats, by the Woodbury and determinant identities.

        With m the posterior mean, r' C^-1 r = |r - W m|^2 / s^2 + |m|^2, a sum and no difference of large numbers; worked out
        in float64, whatever the parameters' dtype, in which the result comes.
        """
        weight, s = widened(self.weight), widened(self.log_noise_scale).exp()
        precision, residual = self._precision(), widened(x) - widened(self.bias)
        mean = torch.linalg.solve(precision, (residual @ weight / s**2).unsqueeze(-1)).squeeze(-1)
        quadratic = ((residual - mean @ weight.T) / s).square().sum(-1) + mean.square().sum(-1)
        log_det = torch.logdet(precision) + 2 * len(weight) * s.log()
        return (-0.5 * (quadratic + log_det + len(weight) * math.log(2 * math.pi))).to(self.weight.dtype)

    def elbo(self, x: Tensor) -> Tensor:
        """ELBO(x) = log p(x) - KL(q(z | x) || p(z | x)), ``[B]`` nats, exact (lecture notes 000 and 004).

        Guide and posterior have one mean; of precisions D = diag P and P, KL = (log |D| - log |P|)/2.
        """
        log_evidence = self.log_evidence(x)
        if self.guide_kind == "exact":
            return log_evidence
        precision = self._precision()
        gap = 0.5 * (torch.diagonal(precision).log().sum() - torch.logdet(precision))
        return log_evidence - gap.to(log_evidence.dtype)

    def config(self) -> dict[str, Any]:
        """Constructor arguments of the right shapes, JSON-able; the values are in the weights."""
        return {"data_dim": self.weight.shape[0], "latent_dim": self.weight.shape[1], "guide": self.guide_kind}

    def _precision(self) -> Tensor:
        """Posterior precision I + W' W / s^2 = M / s^2, ``[d, d]`` float64, symmetric to the last bit."""
        weight = widened(self.weight) / widened(self.log_noise_scale).exp()
        return symmetric(torch.diag(widened(self.prior_scale)) + weight.T @ weight)


def widened(x: Tensor) -> Tensor:
    """In float64, where the device has it: what is exact on paper loses as little as can be."""
    return x if x.device.type == "mps" else x.double()


def symmetric(matrix: Tensor) -> Tensor:
    """(A + A')/2: products of three matrices are symmetric but for rounding, and factorisations insist on it."""
    return 0.5 * (matrix + matrix.mT)
