r"""Denoising diffusion: the Gaussian chain and its reverse (lecture notes 001, 002, 003, second half of 004).

    q(x_t | x_{t-1}) = N(sqrt(alpha_t) x_{t-1}, beta_t I)                  fixed
    p(x_T)           = N(0, I)
    p(x_{t-1} | x_t) = N(mu(x_t, t), diag(sigma^2(x_t, t))),  t >= 2       learned
    p(x_0 | x_1)     = likelihood(mu(x_1, 1)), of scale sigma(x_1, 1) unless the likelihood states its own

with sigma^2 = beta_t or beta-tilde_t in every dimension (at t = 1 beta_1), or learned for each entry of x_t.

The network predicts eps, x_0, v or the mean itself, four parameterisations of one mean: :mod:`ppl_models.predictions`. Nothing
here clips the x_0 that the network stands for: that would be another model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ppl_models.arguments import sizes
from ppl_models.diffusion import Diffusion
from ppl_models.likelihoods import DiscretizedNormal, Likelihood, LocationScale
from ppl_models.networks.grid_denoiser import GridDenoiser
from ppl_models.networks.residual_mlp import ResidualMLP
from ppl_models.networks.unet import UNet
from ppl_models.predictions import Prediction, eps_of, error_factor, gain, mean_of, target_of, weight_x_t, x_0_of
from ppl_models.processes.gaussian import GaussianProcess
from ppl_models.processes.schedules import NoiseSchedule
from ppl_models.registry import describe
from ppl_models.shortcuts import give_way

__all__ = ["DDPM"]

Variance = Literal["beta", "posterior", "learned"]

_LOG_SNR_OF_17_LEVELS = 7.8  # tried on digits
_FEW_LEVELS = 32  # a network that writes a number for each level of each pixel is small then
_LARGE_SIDE = 16


class DDPM(Diffusion):
    """Denoising diffusion of real data by Gaussian steps: ``DDPM(network, schedule, data_shape)``.

    Sites ``x_T`` .. ``x_1`` and ``x_0``, programs as in `Diffusion`.

    Args:
        network: ``network(x_t, t)``, x_t ``[..., *data_shape]`` and t int64 in 1..T of shape ``[...]`` -> an array of the
            shape of x_t. With ``variance="learned"`` it has one more axis, the last, of length 2: the prediction and u.
        schedule: beta_1 .. beta_T.
        data_shape: shape of one datum.
        predict: what the network predicts, ``"eps"``, ``"x_0"``, ``"v"`` or ``"mean"``; see :mod:`ppl_models.predictions`.
        variance: sigma_t^2. ``"beta"``: beta_t. ``"posterior"``: beta-tilde_t, at t = 1 (where it is 0) beta_1.
            ``"learned"``: between the two on a log scale, exp(w log beta_t + (1 - w) log beta-tilde_t) with
            w = sigmoid(u), so that no u leaves the interval, and beta-tilde_2 in place of beta-tilde_1 = 0 (Nichol and
            Dhariwal 2021, arXiv:2102.09672, eq. 15, which leaves w free).
        likelihood: of x_0 given x_1; location mu(x_1, 1). Its scale is sigma_1 if ``scale`` is left out or None.
            `DiscretizedNormal(levels=256)` if None, for data in [-1, 1] (notes 003); `Normal()` for continuous data.

    Raises:
        ValueError: an unknown ``predict`` or ``variance``; a network whose output has another shape; eps-prediction with
            alpha-bar_T = 0, where x_T holds no x_0 and eps says nothing of it.
        TypeError: the likelihood is not one with a location and a scale.
        ValueError: a :class:`GridDenoiser` made for another schedule, prediction, variance or number of levels.

    Example:
        >>> from ppl_models.likelihoods import Normal
        >>> network = ResidualMLP((2,), hidden=16, blocks=1)
        >>> ddpm = DDPM(network, NoiseSchedule.cosine(10), data_shape=(2,), likelihood=Normal())
        >>> ddpm.model(size=4).shape, ddpm.latent_sites[:2]
        (torch.Size([4, 2]), ('x_10', 'x_9'))
    """

    law_methods = ("reverse_law", "mean", "scale")
    process: GaussianProcess

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        give_way(cls, "reconstruction_law", DDPM._reconstruction_of_mean, ["mean"])

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        data_shape: Sequence[int],
        predict: Prediction = "eps",
        variance: Variance = "beta",
        likelihood: Likelihood | None = None,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(f"expected the network as a torch module, got {type(network).__name__}: wrap it in one")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"expected a NoiseSchedule, got {type(schedule).__name__}: NoiseSchedule.from_betas takes variances"
            )
        data_shape = sizes("data_shape", data_shape)
        if predict not in get_args(Prediction):
            raise ValueError(f"expected predict 'eps', 'x_0', 'v' or 'mean', got {predict!r}")
        if variance not in ("beta", "posterior", "learned"):
            raise ValueError(f"expected variance 'beta', 'posterior' or 'learned', got {variance!r}")
        if predict == "eps" and schedule.zero_terminal_snr:
            raise ValueError(
                "expected alpha_bar_T > 0 with predict='eps', got 0: x_T is then eps itself and says nothing of x_0; use "
                "predict='v', 'x_0' or 'mean', or a schedule that ends above zero signal"
            )
        likelihood = DiscretizedNormal(levels=256) if likelihood is None else likelihood
        if not isinstance(likelihood, LocationScale):
            raise TypeError(
                f"expected a likelihood with a location and a scale, got {type(likelihood).__name__}: use "
                "DiscretizedNormal(levels) or Normal()"
            )
        if isinstance(network, GridDenoiser):
            _refuse_other_grid(network, schedule, predict, variance, getattr(likelihood, "levels", None))
        if not likelihood.scale_stated:
            likelihood = likelihood.with_given_scale()
        output_shape = [*data_shape, 2] if variance == "learned" else data_shape
        super().__init__(network, GaussianProcess(schedule, data_shape), output_shape)
        self.predict = predict
        self.variance = variance
        self.likelihood = likelihood
        if variance != "learned":
            self._tabulate_divergence(schedule)

    @classmethod
    def preset(
        cls,
        data_shape: Sequence[int],
        likelihood: Likelihood,
        num_timesteps: int = 100,
        schedule: Literal["linear", "cosine", "geometric"] = "geometric",
        network: Literal["auto", "mlp", "unet", "grid"] = "auto",
        hidden: int | None = None,
        blocks: int | None = None,
        predict: Prediction = "eps",
        variance: Variance = "learned",
        zero_terminal_snr: bool = False,
        num_labels: int | None = None,
    ) -> DDPM:
        """A DDPM with one of the library's denoisers.

        Args:
            data_shape: shape of one datum.
            likelihood: of x_0 given x_1, see the class.
            num_timesteps: T.
            schedule: "geometric", "cosine" or "linear", see :class:`ppl_models.processes.NoiseSchedule`. The geometric one
                begins where the noise of x_1 is 0.16 of the step between two levels: log SNR 7.8 for 17 levels, 13.3 for 256.
            network: "mlp" for vectors and small images, "unet" for images, "grid" for small images of few levels, see
                :class:`ppl_models.networks.grid_denoiser.GridDenoiser`; "auto": "grid" where the likelihood has at most 32
                levels and the prediction and variance are those that it needs, else "unet" for images from 16x16, else "mlp".
            hidden: width of the network, 128; of a U-Net at the highest resolution, 32, and twice that below.
            blocks: residual blocks, 3; of a U-Net at each resolution, 1.
            predict: see the class.
            variance: see the class.
            zero_terminal_snr: bend the schedule to alpha-bar_T = 0, see :meth:`NoiseSchedule.with_zero_terminal_snr`; for
                ``predict="v"``, ``"x_0"`` and ``"mean"``.
            num_labels: K, of a diffusion of x given a label, which the network reads beside t; see :meth:`given`.

        Raises:
            ValueError: an unknown name, images with their channels last, or what schedule and network refuse.
        """
        schedules = {name: getattr(NoiseSchedule, name) for name in ("linear", "cosine", "geometric")}
        if schedule not in schedules:
            raise ValueError(f"expected a schedule among {', '.join(schedules)}, got {schedule!r}")
        learned = variance == "learned"
        levels = getattr(likelihood, "levels", None)
        if schedule == "geometric" and levels is not None:
            steps = NoiseSchedule.geometric(num_timesteps, _LOG_SNR_OF_17_LEVELS + 2 * math.log((levels - 1) / 16))
        else:
            steps = schedules[schedule](num_timesteps)
        steps = steps.with_zero_terminal_snr() if zero_terminal_snr else steps
        on_grid = predict == "eps" and learned and levels is not None
        shape = sizes("data_shape", data_shape)
        last = len(shape) == 3 and shape[-1] in (1, 3, 4) and shape[0] not in (1, 3, 4)
        if network in ("auto", "unet") and last and min(shape[:2]) >= 8:
            raise ValueError(
                f"expected images with their channels first, {[shape[2], *shape[:2]]}, got {shape}: permute the data, or take "
                "network='mlp', for which their order does not matter"
            )
        if network == "auto":
            few = levels is not None and levels <= _FEW_LEVELS
            large = len(data_shape) in (2, 3) and min(data_shape[-2:]) >= _LARGE_SIDE
            network = "grid" if on_grid and few and num_timesteps > 1 else "unet" if large else "mlp"
        hidden = hidden if hidden is not None else 32 if network == "unet" else 128
        blocks = blocks if blocks is not None else 1 if network == "unet" else 3
        denoiser: nn.Module
        match network:
            case "grid" if on_grid:
                log_prior = ResidualMLP(data_shape, hidden, blocks, outputs=levels, num_labels=num_labels)
                denoiser = GridDenoiser(log_prior, steps)
            case "grid":
                raise ValueError(
                    "expected predict='eps', variance='learned' and a DiscretizedNormal likelihood with network='grid', got "
                    f"{predict!r}, {variance!r} and {type(likelihood).__name__}"
                )
            case "mlp":
                denoiser = ResidualMLP(data_shape, hidden, blocks, with_variance=learned, num_labels=num_labels)
            case "unet":
                widths = (hidden, 2 * hidden)
                denoiser = UNet(data_shape, widths, blocks, with_variance=learned, num_labels=num_labels)
            case _:
                raise ValueError(f"expected a network among auto, mlp, unet, grid, got {network!r}")
        return cls(denoiser, steps, data_shape, predict, variance, likelihood)

    @property
    def variance_has_own_output(self) -> bool:
        """Whether the variance is learned from numbers of which a loss of the prediction alone says nothing."""
        return self.variance == "learned" and not isinstance(self.network, GridDenoiser)

    def announce_parameters(self) -> None:
        """Announces the network's parameters and the likelihood's."""
        self.announce("network", "likelihood")

    def reverse_law(self, output: Tensor, x_t: Tensor, t: Tensor) -> dist.TorchDistribution:
        """N(mu(x_t, t), diag(sigma^2(x_t, t))); see the base class."""
        return dist.Normal(self.mean(output, x_t, t), self.scale(output, x_t, t)).to_event(len(self.data_shape))

    def draw_marginal(self, x_0: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """x_t, and its eps where a network that predicts eps or v has use for it: it need not be computed back."""
        if self.predict not in ("eps", "v"):
            return super().draw_marginal(x_0, t)
        x_t, noise = self.process.sample_marginal_with_noise(x_0, t)
        return x_t, {"noise": noise}

    def step_divergence(
        self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        r"""sum_i (mu_i - mu-tilde_i)^2 / (2 sigma_i^2) + (r_i - 1 - log r_i)/2, with r_i = beta-tilde_t / sigma_i^2."""
        n, c = len(self.data_shape), partial(self.process.coefficient, t=t, like=x_t)
        error = self._squared_error(output, x_0, x_t, t, noise)
        if self.variance == "learned":
            scale = self.scale(output, x_t, t)
            ratio = (c("sqrt_posterior_variance") / scale).square()
            spreads, means = ratio - 1 - ratio.log(), (gain(self.predict, c) / scale).square()
            return 0.5 * sum_rightmost(torch.addcmul(spreads, means, error), n)  # spreads + means * error
        weight, excess = c("error_weight").reshape(t.shape), c("variance_excess").reshape(t.shape)
        return torch.addcmul(excess, weight, sum_rightmost(error, n))

    def draw_previous(self, output: Tensor, x_t: Tensor, t: int) -> Tensor:
        """mu(x_t, t) + sigma_t z, its coefficients numbers; see the base class."""
        if self.variance == "learned":
            return super().draw_previous(output, x_t, t)
        prediction, c = self._prediction(output), partial(self.process.number, t=t)
        dtype = torch.promote_types(x_t.dtype, prediction.dtype)
        std = c("sqrt_beta") if self.variance == "beta" else c("sqrt_posterior_variance")
        x = torch.empty(x_t.shape, dtype=dtype, device=x_t.device).normal_(0, std)
        if self.predict != "mean":
            x.add_(x_t, alpha=weight_x_t(self.predict, c))
        return x.add_(prediction, alpha=gain(self.predict, c))

    def reconstruction_law(self, output: Tensor, x_1: Tensor) -> dist.TorchDistribution:
        """likelihood(mu(x_1, 1)), its scale sigma_1 unless it states its own; see the base class."""
        mean, c = self._prediction(output), partial(self.process.number, t=1)
        if self.predict != "mean":
            mean = torch.add(weight_x_t(self.predict, c) * x_1, mean, alpha=gain(self.predict, c))
        return self.reconstruction_at(mean, output, x_1)

    def _reconstruction_of_mean(self, output: Tensor, x_1: Tensor) -> dist.TorchDistribution:
        """:meth:`reconstruction_law` by way of :meth:`mean`."""
        return self.reconstruction_at(self.mean(output, x_1, self._time(1, x_1)), output, x_1)

    def reconstruction_at(self, mean: Tensor, output: Tensor, x_1: Tensor) -> dist.TorchDistribution:
        """:meth:`reconstruction_law` with another location, such as a mu(x_1, 1) = x_0-hat(x_1, 1) that was clipped."""
        if not self.likelihood.needs_scale:
            return self.likelihood(mean, len(self.data_shape))
        if self.variance == "learned":
            scale = self.scale(output, x_1, self._time(1, x_1))
        else:
            scale = x_1.new_full((), self.process.number("sqrt_beta", 1))
        return self.likelihood((mean, scale), len(self.data_shape))

    def mean(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """mu(x_t, t), ``[*batch, *data_shape]``, from the network's output there."""
        return mean_of(self.predict, self._prediction(output), x_t, partial(self.process.coefficient, t=t, like=x_t))

    def scale(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """sigma_t, broadcastable to ``[*batch, *data_shape]``; for t >= 2, and for t = 1 where it is learned."""
        c = partial(self.process.coefficient, t=t, like=x_t)
        match self.variance:
            case "beta":
                return c("sqrt_beta")
            case "posterior":
                return c("sqrt_posterior_variance")
        high, low = c("log_beta"), c("log_beta")
        if self.num_timesteps > 1:
            low = self.process.coefficient("log_posterior_variance", t.clamp(min=2), x_t)
        weight = output[..., 1].sigmoid()
        return (0.5 * (weight * high + (1 - weight) * low)).exp()

    def predict_x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 of which mu(x_t, t) is the posterior mean mu-tilde(x_t, x_0); not clipped."""
        return x_0_of(self.predict, self._prediction(output), x_t, partial(self.process.coefficient, t=t, like=x_t))

    def predict_eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The eps of x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) eps that goes with mu(x_t, t)."""
        return eps_of(self.predict, self._prediction(output), x_t, partial(self.process.coefficient, t=t, like=x_t))

    def step_losses(
        self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        divergence = self.step_divergence(output, x_0, x_t, t.clamp(min=2), noise)
        return divergence, self.auxiliary_loss(output, x_0, x_t, t, noise)

    def auxiliary_loss(
        self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        r"""\|eps - eps_theta(x_t, t)\|^2, the loss L_simple of notes 003 (arXiv:2006.11239, eq. 14), ``[*batch]``."""
        n, c = len(self.data_shape), partial(self.process.coefficient, t=t, like=x_t)
        error = sum_rightmost(self._squared_error(output, x_0, x_t, t, noise), n)
        if self.predict == "eps":
            return error
        return error_factor(self.predict, c).reshape(t.shape) * error

    def _squared_error(
        self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """(prediction - what a perfect network returns)^2 in each dimension; ``noise``: the eps of x_t, where it is known."""
        prediction, c = self._prediction(output), partial(self.process.coefficient, t=t, like=x_t)
        target = target_of(self.predict, x_0, x_t, noise, c)
        return mse_loss(prediction.to(target.dtype), target, reduction="none")  # one pass, and one backwards

    def _tabulate_divergence(self, schedule: NoiseSchedule) -> None:
        """What :meth:`step_divergence` needs of each t, in float64: r - 1 - log r, of second order, cancels in float32."""
        c = partial(_table, schedule)
        log_variance = schedule.log_beta if self.variance == "beta" else schedule.log_posterior_variance
        log_ratio = schedule.log_posterior_variance - log_variance
        log_ratio[0] = 0.0  # at t = 1 there is no such step
        self.process.tabulate(
            error_weight=0.5 * gain(self.predict, c) ** 2 * (-log_variance).exp(),
            variance_excess=0.5 * self.data_shape.numel() * (log_ratio.expm1() - log_ratio),
        )

    def check_data(self, x: Tensor, name: str = "x") -> None:
        """Refuses data that the likelihood gives no probability to; see the base class."""
        self.likelihood.check(x, name)

    def config(self) -> dict[str, Any]:
        """Constructor arguments as nested descriptions; see :func:`ppl_models.registry.describe`."""
        return {
            "network": describe(self.network),
            "schedule": {"class": "NoiseSchedule", **self.process.schedule.config()},
            "data_shape": list(self.data_shape),
            "predict": self.predict,
            "variance": self.variance,
            "likelihood": describe(self.likelihood),
        }

    def _prediction(self, output: Tensor) -> Tensor:
        return output[..., 0] if self.variance == "learned" else output


def _table(schedule: NoiseSchedule, name: str) -> Tensor:
    """A coefficient of every step, float64 ``[T]``."""
    table: Tensor = getattr(schedule, name.removeprefix("sqrt_"))
    return table.sqrt() if name.startswith("sqrt_") else table


def _refuse_other_grid(
    network: GridDenoiser, schedule: NoiseSchedule, predict: Prediction, variance: Variance, levels: int | None
) -> None:
    """Raises ValueError unless the DDPM reads a :class:`GridDenoiser`'s output as it was meant."""
    if (predict, variance) != ("eps", "learned"):
        raise ValueError(
            f"expected predict='eps' and variance='learned' with a GridDenoiser, which returns the noise and u, got "
            f"predict={predict!r} and variance={variance!r}"
        )
    own = network.schedule.alpha_bar
    if own.shape != schedule.alpha_bar.shape or not bool(
        (own.to(schedule.alpha_bar.device) == schedule.alpha_bar).all()
    ):
        raise ValueError(
            f"expected a GridDenoiser made with the DDPM's own schedule, {schedule!r}, got one with {network.schedule!r}: "
            "pass both the same"
        )
    if levels is not None and network.levels != levels:
        raise ValueError(
            f"expected a GridDenoiser of the likelihood's {levels} levels, got {network.levels}: make its network with "
            f"outputs={levels}"
        )
