r"""Theorem 2.2.1 of notes 004: learning p(x_{t-1} | x_t) from p(x_{t-1} | x_t, x_0), where the former is known.

    E_{p(x_t)} KL(p(x_{t-1} | x_t) || p_phi)  =  E_{p(x_0, x_t)} KL(p(x_{t-1} | x_t, x_0) || p_phi)  +  C   (2.2.3)
         marginal KL                                 conditional KL = E L_{t-1}

    C = -E_{p(x_0, x_t)} KL(p(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) = -I(x_{t-1}; x_0 | x_t) <= 0

C holds no phi, so both have the same minimiser, p* = E_{p(x_0 | x_t)} p(x_{t-1} | x_t, x_0) = p(x_{t-1} | x_t).

For data from a Gaussian mixture sum_j w_j N(m_j, s_j^2 I) all of it is known. Every law is again a mixture: with
a = sqrt(alpha-bar) and v = 1 - alpha-bar at t,

    p(x_t)           = sum_j w_j N(a m_j, (a^2 s_j^2 + v) I)
    p(j | x_t)       = r_j, the component's share of that density
    p(x_0 | x_t, j)  = N(m_j + g_j (x_t - a m_j), (1 - g_j a) s_j^2 I),    g_j = a s_j^2 / (a^2 s_j^2 + v)
    p(x_{t-1} | x_t) = sum_j r_j N(A x_t + B E[x_0 | x_t, j], (B^2 (1 - g_j a) s_j^2 + beta-tilde_t) I)

with A x_t + B x_0 the posterior mean mu-tilde_t. Among Gaussians N(mu(x_t), sigma^2 I) the minimiser has
mu = A x_t + B E[x_0 | x_t]: the "blurry" prediction of 004's remarks on sampling.

It is no Gaussian itself, and less so for larger beta_t (004's remark 4 on sampling).

The one constraint: the data are draws of that mixture. Here p is 004's true law of data and noise together, which the code
calls q elsewhere, and p_phi the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from inference.bounds.moments import Moments
from inference.bounds.particles import forked_rng, seed_generators
from inference.printed import Printed
from ppl_models.arguments import seed_number, whole_count, whole_numbers
from ppl_models.ddpm import DDPM
from ppl_models.evaluation_mode import evaluating
from ppl_models.processes import GaussianProcess

__all__ = ["DenoisingTheorem", "GaussianMixture", "OptimalDenoiser", "denoising_theorem"]

AT_ONCE = 4096


class GaussianMixture(nn.Module):
    """p(x_0) = sum_j w_j N(m_j, s_j^2 I), and what a Gaussian process makes of it.

    Args:
        locs: m, ``[J, D]``.
        scales: s > 0, ``[J]``.
        weights: w > 0, ``[J]``; scaled to sum to one; None: equal.

    Raises:
        ValueError: shapes that do not fit, or scales or weights that are not positive.

    Example:
        >>> mixture = GaussianMixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.1, 0.1]))
        >>> mixture.law().sample((5,)).shape, round(float(mixture.law().variance), 3)
        (torch.Size([5, 1]), 1.01)
    """

    locs: Tensor
    scales: Tensor
    weights: Tensor

    def __init__(self, locs: Tensor, scales: Tensor, weights: Tensor | None = None) -> None:
        super().__init__()
        weights = torch.ones_like(scales) if weights is None else weights
        for name, value in (("locs", locs), ("scales", scales), ("weights", weights)):
            if not value.is_floating_point() or not bool(value.isfinite().all()):
                raise ValueError(f"expected {name} as finite floats, got {value.dtype} {value.tolist()}")
        if locs.dim() != 2 or scales.shape != locs.shape[:1] or weights.shape != scales.shape:
            raise ValueError(
                f"expected locs [J, D], scales [J] and weights [J], got {list(locs.shape)}, {list(scales.shape)} and "
                f"{list(weights.shape)}: give one mean, one scale and one weight per component"
            )
        if not bool((scales > 0).all() and (weights > 0).all()):
            raise ValueError("expected positive scales and weights: leave out components that have none")
        self.register_buffer("locs", locs)
        self.register_buffer("scales", scales)
        self.register_buffer("weights", weights / weights.sum())

    def law(self) -> dist.TorchDistribution:
        """p(x_0), event ``[D]``."""
        return _mixture(self.weights.log(), self.locs, self.scales)

    def marginal(self, process: GaussianProcess, t: Tensor) -> dist.TorchDistribution:
        """p(x_t), batch shape of ``t``, event ``[D]``."""
        a, variance = self._at(process, t)
        return _mixture(self.weights.log(), a[..., None] * self.locs, variance.sqrt())

    def posterior_mean(self, process: GaussianProcess, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t], ``[*batch, D]``: what the best denoiser predicts."""
        log_shares, locs, _ = self._posterior(process, x_t, t)
        return (log_shares.exp()[..., None] * locs).sum(-2)

    def reverse(self, process: GaussianProcess, x_t: Tensor, t: Tensor) -> dist.TorchDistribution:
        """p(x_{t-1} | x_t) for t >= 2, the minimiser of both KLs: batch ``[*batch]``, event ``[D]``."""
        log_shares, locs, variances = self._posterior(process, x_t, t)
        weight_x_0 = process.coefficient("posterior_weight_x_0", t, x_t)
        own = process.coefficient("posterior_variance", t, x_t)
        mean = process.posterior_mean(x_t, torch.zeros_like(x_t), t)[..., None, :] + weight_x_0[..., None] * locs
        return _mixture(log_shares, mean, (weight_x_0.square() * variances + own).sqrt())

    def _at(self, process: GaussianProcess, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha-bar_t) ``[*t, 1]``, and the variance of each component of p(x_t) ``[*t, J]``."""
        reference = self.locs[0]
        a = process.coefficient("sqrt_alpha_bar", t, reference)
        return a, a.square() * self.scales.square() + process.coefficient("marginal_variance", t, reference)

    def _posterior(self, process: GaussianProcess, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(j | x_t) ``[*batch, J]``; mean ``[*batch, J, D]`` and variance ``[*t, J]`` of p(x_0 | x_t, j)."""
        a, variance = self._at(process, t)
        residual = x_t[..., None, :] - a[..., None] * self.locs
        dims = self.locs.shape[1]
        joint = self.weights.log() - 0.5 * (residual.square().sum(-1) / variance + dims * variance.log())
        gain = a * self.scales.square() / variance
        return joint.log_softmax(-1), self.locs + gain[..., None] * residual, (1 - gain * a) * self.scales.square()


class OptimalDenoiser(nn.Module):
    """The network that no other beats on a mixture: E[x_0 | x_t], for a DDPM with ``predict="x_0"``.

    Args:
        mixture: the law of the data.
        process: the forward process.
    """

    def __init__(self, mixture: GaussianMixture, process: GaussianProcess) -> None:
        super().__init__()
        self.mixture, self.process = mixture, process

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t], ``[..., D]``."""
        return self.mixture.posterior_mean(self.process, x_t, t)


@dataclass(frozen=True, repr=False)
class DenoisingTheorem(Printed):
    """Both sides of (2.2.3) for one pair on one mixture, by t; nats, ``[n]``, each with its standard error.

    ``gap`` is C, estimated without the network; ``residual`` is marginal - conditional - gap, zero in expectation, of which
    the same draws leave only the difference between drawn and closed-form conditional KL.
    """

    t: Tensor
    marginal: Tensor
    marginal_std_error: Tensor
    conditional: Tensor
    conditional_std_error: Tensor
    gap: Tensor
    gap_std_error: Tensor
    residual: Tensor
    residual_std_error: Tensor

    def table(self) -> str:
        """One row per t."""
        from inference.views.tables import text_table

        names = ("marginal", "conditional", "gap", "residual")
        rows = [
            [str(int(t)), *(f"{getattr(self, n)[i]:.5f} +- {getattr(self, f'{n}_std_error')[i]:.5f}" for n in names)]
            for i, t in enumerate(self.t)
        ]
        return text_table(["t", "marginal KL", "conditional KL", "C", "marginal - conditional - C"], rows)


def denoising_theorem(
    pair: DDPM, mixture: GaussianMixture, timesteps: Sequence[int], num_particles: int = 10_000, *, seed: int = 0
) -> DenoisingTheorem:
    """Theorem 2.2.1 of notes 004 on data from a Gaussian mixture, for the step from t to t - 1.

    From draws x_0 ~ p(x_0), x_t ~ q(x_t | x_0), x_{t-1} ~ q(x_{t-1} | x_t, x_0); given x_t alone, x_{t-1} then has the law
    p(x_{t-1} | x_t):

        marginal     log p(x_{t-1} | x_t) - log p_phi(x_{t-1} | x_t)
        conditional  KL(q(x_{t-1} | x_t, x_0) || p_phi(x_{t-1} | x_t)) in closed form
        gap C        log p(x_{t-1} | x_t) - log q(x_{t-1} | x_t, x_0), which no pair enters

    The network is in evaluation mode for the time of the call.

    Args:
        pair: the DDPM, on data of shape [D].
        mixture: the law of the data.
        timesteps: each t in 2..T.
        num_particles: draws per t.
        seed: of the draws; the same draws for every pair on the same process, so gaps of two pairs are equal to the bit.

    Raises:
        ValueError: a t outside 2..T, data of another shape, no draws, or a seed below zero.

    Example:
        >>> from ppl_models.likelihoods import Normal
        >>> from ppl_models.processes import NoiseSchedule
        >>> process = GaussianProcess(NoiseSchedule.cosine(10), (1,))
        >>> mixture = GaussianMixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.1, 0.1]))
        >>> network = OptimalDenoiser(mixture, process)
        >>> pair = DDPM(network, process.schedule, (1,), predict="x_0", variance="posterior", likelihood=Normal())
        >>> result = denoising_theorem(pair, mixture, [5], num_particles=1000)
        >>> bool(result.gap < 0), bool(result.residual.abs() < 5 * result.residual_std_error)
        (True, True)
    """
    steps = whole_numbers("timesteps", timesteps)
    if not steps or min(steps) < 2 or max(steps) > pair.num_timesteps:
        raise ValueError(
            f"expected timesteps in 2..{pair.num_timesteps}, of the steps from t to t - 1 >= 1, got {steps}"
        )
    if pair.data_shape != mixture.locs.shape[1:]:
        raise ValueError(
            f"expected a pair on data of shape {list(mixture.locs.shape[1:])}, that of the mixture, got {list(pair.data_shape)}"
        )
    num_particles, seed = whole_count("num_particles", num_particles), seed_number(seed)
    rows = []
    with torch.no_grad(), forked_rng(), evaluating(pair):
        seed_generators(seed)
        for t in steps:
            moments = {name: Moments() for name in ("marginal", "conditional", "gap", "residual")}
            for start in range(0, num_particles, AT_ONCE):
                for name, draws in _draw(pair, mixture, t, min(AT_ONCE, num_particles - start)).items():
                    moments[name].add(draws)
            rows.append(moments)
    columns = {
        name: torch.stack([row[name].mean for row in rows]) for name in ("marginal", "conditional", "gap", "residual")
    }
    errors = {f"{name}_std_error": torch.stack([row[name].std_error for row in rows]) for name in columns}
    return DenoisingTheorem(t=torch.tensor(steps), **columns, **errors)


def _draw(pair: DDPM, mixture: GaussianMixture, step: int, count: int) -> dict[str, Tensor]:
    process = pair.process
    t = torch.tensor(step, device=mixture.locs.device)
    x_0 = mixture.law().sample((count,))
    x_t = process.marginal(x_0, t).sample()
    q = process.posterior(x_t, x_0, t)
    x_below = q.sample()
    p = pair.reverse(x_t, t)
    true = mixture.reverse(process, x_t, t).log_prob(x_below)
    marginal, conditional, gap = true - p.log_prob(x_below), kl_divergence(q, p), true - q.log_prob(x_below)
    return {"marginal": marginal, "conditional": conditional, "gap": gap, "residual": marginal - conditional - gap}


def _mixture(log_weights: Tensor, locs: Tensor, scales: Tensor) -> dist.TorchDistribution:
    """sum_j w_j N(loc_j, scale_j^2 I): weights and scales ``[..., J]``, locs ``[..., J, D]``."""
    log_weights, scales = log_weights.expand(locs.shape[:-1]), scales.expand(locs.shape[:-1])
    components = dist.Normal(locs, scales[..., None]).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(logits=log_weights), components)
