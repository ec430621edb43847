r"""What a denoiser predicts: four parameterisations of one mean mu(x_t, t), each affine in the others given x_t.

    eps    mu = (x_t - beta_t / sqrt(1 - alpha-bar_t) eps) / sqrt(alpha_t)                            eq. 11, notes 003
    x_0    mu = [sqrt(alpha-bar_{t-1}) beta_t x_0 + sqrt(alpha_t) (1 - alpha-bar_{t-1}) x_t] / (1 - alpha-bar_t)   eq. 7
    v      mu of x_0 = sqrt(alpha-bar_t) x_t - sqrt(1 - alpha-bar_t) v
    mean   mu itself

(Ho et al. 2020, arXiv:2006.11239; v = sqrt(alpha-bar_t) eps - sqrt(1 - alpha-bar_t) x_0: Salimans and Ho 2022,
arXiv:2202.00512, section 4 and appendix D.) Notes 003 print sqrt(1 - alpha_t) in the first and 001 another form of the second;
both are slips. With alpha-bar_T = 0, eps says nothing of x_0; the others do.

The one constraint: coefficients come from a function of their names, :meth:`GaussianProcess.coefficient` with its tensors or
:meth:`GaussianProcess.number` with numbers, so that training and sampling share the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Prediction", "eps_of", "error_factor", "gain", "mean_of", "target_of", "weight_x_t", "x_0_of"]

Prediction = Literal["eps", "x_0", "v", "mean"]
Coefficients = Callable[[str], Any]


def mean_of(predict: Prediction, prediction: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """mu(x_t, t)."""
    match predict:
        case "eps":
            return (x_t - c("beta") / c("sqrt_marginal_variance") * prediction) / c("sqrt_alpha")
        case "mean":
            return prediction
    x_0 = x_0_of(predict, prediction, x_t, c)
    return c("posterior_weight_x_0") * x_0 + c("posterior_weight_x_t") * x_t


def weight_x_t(predict: Prediction, c: Coefficients) -> Any:
    """How far mu moves with x_t at a fixed prediction."""
    match predict:
        case "eps":
            return 1 / c("sqrt_alpha")
        case "x_0":
            return c("posterior_weight_x_t")
        case "v":
            return c("posterior_weight_x_t") + c("posterior_weight_x_0") * c("sqrt_alpha_bar")
    return 0.0


def gain(predict: Prediction, c: Coefficients) -> Any:
    """How far mu moves with the prediction."""
    match predict:
        case "eps":
            return -c("beta") / (c("sqrt_marginal_variance") * c("sqrt_alpha"))
        case "x_0":
            return c("posterior_weight_x_0")
        case "v":
            return -c("posterior_weight_x_0") * c("sqrt_marginal_variance")
    return 1.0


def x_0_of(predict: Prediction, prediction: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """The x_0 of which mu is the posterior mean mu-tilde(x_t, x_0)."""
    match predict:
        case "eps":
            return (x_t - c("sqrt_marginal_variance") * prediction) / c("sqrt_alpha_bar")
        case "x_0":
            return prediction
        case "v":
            return c("sqrt_alpha_bar") * x_t - c("sqrt_marginal_variance") * prediction
    return (prediction - c("posterior_weight_x_t") * x_t) / c("posterior_weight_x_0")


def eps_of(predict: Prediction, prediction: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """The eps of x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) eps that goes with mu."""
    match predict:
        case "eps":
            return prediction
        case "x_0":
            return (x_t - c("sqrt_alpha_bar") * prediction) / c("sqrt_marginal_variance")
        case "v":
            return c("sqrt_marginal_variance") * x_t + c("sqrt_alpha_bar") * prediction
    return (x_t - c("sqrt_alpha") * prediction) * c("sqrt_marginal_variance") / c("beta")


def target_of(predict: Prediction, x_0: Tensor, x_t: Tensor, noise: Tensor | None, c: Coefficients) -> Tensor:
    """What a perfect network returns; ``noise`` is the eps of x_t, where it is known."""
    match predict:
        case "eps":
            if noise is not None:
                return noise
            return torch.addcmul(x_t, c("sqrt_alpha_bar"), x_0, value=-1).div_(c("sqrt_marginal_variance"))
        case "x_0":
            return x_0.expand(x_t.shape)
        case "v":
            if noise is not None:
                return c("sqrt_alpha_bar") * noise - c("sqrt_marginal_variance") * x_0
            return (c("sqrt_alpha_bar") * x_t - x_0) / c("sqrt_marginal_variance")
    return c("posterior_weight_x_0") * x_0 + c("posterior_weight_x_t") * x_t


def error_factor(predict: Prediction, c: Coefficients) -> Any:
    """What makes of the squared error of the prediction that of eps."""
    match predict:
        case "eps":
            return 1.0
        case "x_0":
            return c("snr")
        case "v":
            return c("alpha_bar")
    return c("alpha") * c("marginal_variance") / c("beta").square()
