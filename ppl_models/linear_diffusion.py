r"""The diffusion of Gaussian data, with everything known: the oracle of the diffusion programs.

    x_0 ~ N(m, diag(s^2))    =>    x_0 | x_t ~ N(m + k_t (x_t - sqrt(alpha-bar_t) m), V_t)
    k_t = sqrt(alpha-bar_t) s^2 / (alpha-bar_t s^2 + 1 - alpha-bar_t)
    V_t = s^2 (1 - alpha-bar_t) / (alpha-bar_t s^2 + 1 - alpha-bar_t)

so that the true reverse kernel of notes 004, Theorem 2.2.1, q(x_{t-1} | x_t) = E[q(x_{t-1} | x_t, x_0) | x_t], is Gaussian:

    q(x_{t-1} | x_t) = N(w_0 E[x_0 | x_t] + w_t x_t, beta-tilde_t + w_0^2 V_t),      mu-tilde = w_0 x_0 + w_t x_t

at t = 1 too. The model runs these kernels from p(x_T) = N(0, I). The density of its x_0, its posterior and each L_t have
closed forms. At zero terminal SNR the process q *is* the posterior, and the bound is log N(x_0; m, s^2) for every draw.

Convention: all dimensions are independent; coefficients of all steps are stacked, entry t - 1 being step t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn

from ppl_models.diffusion import Diffusion
from ppl_models.processes.gaussian import GaussianProcess
from ppl_models.processes.schedules import NoiseSchedule

__all__ = ["LinearDiffusion"]

Guide = Literal["process", "exact"]


class _GaussianDenoiser(nn.Module):
    """E[x_0 | x_t] of Gaussian data, with its mean and scale as parameters."""

    def __init__(self, process: GaussianProcess, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.process = process
        self.loc = nn.Parameter(loc.clone())
        self.log_scale = nn.Parameter(scale.log())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        gain, _ = self.gain_and_variance(x_t, t)
        return self.loc + gain * (x_t - self.process.coefficient("sqrt_alpha_bar", t, x_t) * self.loc)

    def gain_and_variance(self, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """k_t and V_t."""
        variance = (2 * self.log_scale).exp()
        noise = self.process.coefficient("marginal_variance", t, like)
        total = self.process.coefficient("alpha_bar", t, like) * variance + noise
        return self.process.coefficient("sqrt_alpha_bar", t, like) * variance / total, variance * noise / total


class LinearDiffusion(Diffusion):
    """The diffusion whose reverse kernels are those of data N(loc, diag(scale^2)): evidence, posterior and terms known.

    Args:
        schedule: beta_1 .. beta_T.
        loc: m, of the shape of one datum; a tensor or nested lists.
        scale: s > 0, of the same shape.
        guide: what :meth:`guide` is: ``"process"``, the diffusion q; or ``"exact"``, the model's posterior
            p(x_1 | x_0) prod p(x_t | x_{t-1}), with which every draw gives log p(x_0).

    Raises:
        ValueError: shapes that differ, a scale that is not positive, or an unknown guide.

    Example:
        >>> pair = LinearDiffusion(NoiseSchedule.cosine(10), loc=[0.5, -1.0], scale=[0.8, 0.3])
        >>> x = pair.model(size=3).detach()
        >>> bool((pair.elbo(x) <= pair.log_evidence(x)).all())
        True
    """

    network: _GaussianDenoiser
    process: GaussianProcess

    def __init__(
        self,
        schedule: NoiseSchedule,
        loc: Tensor | Sequence[Any],
        scale: Tensor | Sequence[Any],
        guide: Guide = "process",
    ) -> None:
        m, s = (torch.as_tensor(value).detach() for value in (loc, scale))
        if m.shape != s.shape:
            raise ValueError(f"expected loc and scale of one shape, got {list(m.shape)} and {list(s.shape)}")
        if not bool((s > 0).all()):
            raise ValueError(f"expected every scale > 0, got {float(s.min())}")
        if guide not in ("process", "exact"):
            raise ValueError(f"expected guide 'process' or 'exact', got {guide!r}")
        process = GaussianProcess(schedule, m.shape)
        super().__init__(_GaussianDenoiser(process, m, s), process, m.shape)
        self.guide_kind = guide
        # as they were given: training moves the network's
        self._given = [torch.as_tensor(value, dtype=torch.float64).tolist() for value in (loc, scale)]

    def guide(self, x: Tensor) -> Tensor:
        """The process q, or the exact posterior p(x_1 | x_0) prod p(x_t | x_{t-1}): sites ``x_1`` .. ``x_T``."""
        if self.guide_kind == "process":
            return super().guide(x)
        self.announce_parameters()
        gain, offset, variance = self._kernels()
        locs, variances = self._marginals()
        with pyro.plate("data", self.batch_size(x)):
            x_t = x
            for i in range(self.num_timesteps):  # Bayes: p(x_t | x_{t-1}) is proportional to p(x_t) p(x_{t-1} | x_t)
                precision = 1 / variances[i] + gain[i].square() / variance[i]
                loc = (locs[i] / variances[i] + gain[i] * (x_t - offset[i]) / variance[i]) / precision
                x_t = pyro.sample(f"x_{i + 1}", dist.Normal(loc, precision.rsqrt()).to_event(len(self.data_shape)))
            return x_t

    def reverse_law(self, output: Tensor, x_t: Tensor, t: Tensor) -> dist.TorchDistribution:
        """q(x_{t-1} | x_t) of the data's own diffusion, at t = 1 too; see the base class."""
        _, variance = self.network.gain_and_variance(x_t, t)
        weight = self.process.coefficient("posterior_weight_x_0", t, x_t)
        own = self.process.coefficient("posterior_variance", t, x_t)
        scale = (own + weight.square() * variance).sqrt()
        return dist.Normal(self.process.posterior_mean(x_t, output, t), scale).to_event(len(self.data_shape))

    def reconstruction_law(self, output: Tensor, x_1: Tensor) -> dist.TorchDistribution:
        """N(E[x_0 | x_1], V_1); see the base class."""
        return self.reverse_law(output, x_1, self._time(1, x_1))

    def predict_x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t], the network's output itself."""
        return output

    def auxiliary_loss(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        r"""\|eps - eps_theta\|^2 = alpha-bar_t / (1 - alpha-bar_t) \|x_0 - E[x_0 | x_t]\|^2, ``[*batch]``."""
        error = self.process.coefficient("snr", t, x_t) * (x_0 - output).square()
        return sum_rightmost(error, len(self.data_shape))

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x_0) of the chain, ``[B]`` nats, exact; log N(x_0; m, s^2) where alpha-bar_T = 0."""
        locs, variances = self._marginals()
        gain, offset, variance = (each[0] for each in self._kernels())
        loc, total = gain * locs[0] + offset, gain.square() * variances[0] + variance
        return dist.Normal(loc, total.sqrt()).to_event(len(self.data_shape)).log_prob(x)

    def terms(self, x: Tensor) -> Tensor:
        """L_0, .., L_T of the process q, ``[T + 1, B]`` nats, exact: entry t is L_t of notes 001 (003's L_{t+1}).

        With x_{t+1} ~ N(sqrt(alpha-bar) x_0, 1 - alpha-bar), the two means of L_t differ by an affine function of it, whose
        second moment is a square plus a variance; L_0 likewise.
        """
        steps, like = self._steps(), self._stacked()
        c = {name: self.process.coefficient(name, steps, like).unsqueeze(1) for name in _NAMES}
        gain, offset, variance = (each.unsqueeze(1) for each in self._kernels())
        slope = gain - c["posterior_weight_x_t"]
        constant = (c["posterior_weight_x_0"] - slope * c["sqrt_alpha_bar"]) * x - offset
        squared = (constant.square() + slope.square() * c["marginal_variance"]) / variance
        ratio = c["posterior_variance"][1:] / variance[1:]
        reconstruction = 0.5 * (squared[:1] + (2 * math.pi * variance[:1]).log())
        steps_between = 0.5 * (squared[1:] + ratio - 1 - ratio.log())
        last = c["marginal_variance"][-1:]
        prior = 0.5 * (c["sqrt_alpha_bar"][-1:].square() * x.square() + last - 1 - last.log())
        return sum_rightmost(torch.cat([reconstruction, steps_between, prior]), len(self.data_shape))

    def elbo(self, x: Tensor) -> Tensor:
        """ELBO(x) under :meth:`guide`, ``[B]`` nats, exact."""
        return -self.terms(x).sum(0) if self.guide_kind == "process" else self.log_evidence(x)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able; see :func:`ppl_models.registry.describe`."""
        return {
            "schedule": {"class": "NoiseSchedule", **self.process.schedule.config()},
            "loc": self._given[0],
            "scale": self._given[1],
            "guide": self.guide_kind,
        }

    def _kernels(self) -> tuple[Tensor, Tensor, Tensor]:
        """All p(x_{t-1} | x_t) = N(gain x_t + offset, variance), each ``[T, *data_shape]``."""
        steps, zeros = self._steps(), self._stacked()
        law = self.reverse(zeros, steps)
        gain = self.reverse(torch.ones_like(zeros), steps).mean - law.mean
        return gain, law.mean, law.variance

    def _marginals(self) -> tuple[Tensor, Tensor]:
        """Means and variances of p(x_1) .. p(x_T), each ``[T, *data_shape]``."""
        gain, offset, variance = self._kernels()
        locs, variances = [torch.zeros_like(offset[0])], [torch.ones_like(offset[0])]
        for i in range(self.num_timesteps - 1, 0, -1):
            locs.append(gain[i] * locs[-1] + offset[i])
            variances.append(gain[i].square() * variances[-1] + variance[i])
        return torch.stack(locs[::-1]), torch.stack(variances[::-1])

    def _steps(self) -> Tensor:
        return torch.arange(1, self.num_timesteps + 1, device=self.network.loc.device)

    def _stacked(self) -> Tensor:
        return self.network.loc.new_zeros(self.num_timesteps, *self.data_shape)


_NAMES = ("marginal_variance", "posterior_variance", "posterior_weight_x_0", "posterior_weight_x_t", "sqrt_alpha_bar")
