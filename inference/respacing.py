r"""Respacing: a DDPM's chain over some of its steps only, with the same network and the same q(x_t | x_0) at each step left.

    q(x_{t_i} | x_{t_{i-1}}) = N(sqrt(1 - beta'_i) x_{t_{i-1}}, beta'_i I)
    beta'_i = 1 - alpha-bar_{t_i} / alpha-bar_{t_{i-1}},    t_0 = 0

by composition of kernels (lecture notes 001). What a network predicts of x_0 or of eps at t does not depend on the
spacing; a mean mu does, so a network that predicts it is read as a prediction of x_0.

The one constraint: steps of Gaussian kernels compose in closed form, so the pair is a DDPM.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppl_models.ddpm import DDPM
from ppl_models.networks.grid_denoiser import GridDenoiser
from ppl_models.shortcuts import is_overridden

__all__ = ["respaced"]


def respaced(pair: DDPM, timesteps: Sequence[int]) -> DDPM:
    r"""The diffusion that visits only some of a DDPM's steps, with the same network: a pair in its own right.

    Its step i goes from t_i to t_{i-1} at once, with the posterior of that chain and the pair's kind of variance (Nichol and
    Dhariwal 2021, arXiv:2102.09672, section 4); q(x_t | x_0) is the same at each t that is left, and so is x_0-hat(x_t, t).
    It has a bound of its own, which :func:`inference.decompose_diffusion` gives.

    Args:
        pair: the DDPM.
        timesteps: t_1 < t_2 < ... in 1..T; end with T to start from the same prior.

    Raises:
        ValueError: steps outside 1..T or not increasing.
        TypeError: not a DDPM, or one of a subclass with a reverse law of its own.

    Example:
        >>> from ppl_models.likelihoods import Normal
        >>> from ppl_models.processes import NoiseSchedule
        >>> class Zero(nn.Module):
        ...     def forward(self, x_t, t):
        ...         return 0 * x_t
        >>> ddpm = DDPM(Zero(), NoiseSchedule.cosine(100), data_shape=(2,), likelihood=Normal())
        >>> coarse = respaced(ddpm, [1, 50, 100])
        >>> coarse.num_timesteps, bool(torch.isclose(coarse.process.schedule.alpha_bar[1], ddpm.process.schedule.alpha_bar[49]))
        (3, True)
    """
    if not isinstance(pair, DDPM):
        raise TypeError(
            f"expected a DDPM, whose steps compose in closed form, got {type(pair).__name__}: use all steps"
        )
    if is_overridden(type(pair), (*pair.law_methods, "reconstruction_law", "reconstruction_at"), DDPM):
        raise TypeError(
            f"expected a DDPM's own reverse law, whose steps compose in closed form, got that of {type(pair).__name__}: use "
            "all steps"
        )
    schedule = pair.process.schedule.respaced(timesteps)
    predict = "x_0" if pair.predict == "mean" else pair.predict
    network: nn.Module = _Respaced(pair, timesteps)
    if isinstance(pair.network, GridDenoiser) and len(schedule) > 1:  # which knows the coarse chain's own variance
        network = pair.network.respaced(schedule, timesteps)
    coarse = DDPM(network, schedule, pair.data_shape, predict, pair.variance, pair.likelihood)
    reference = next(pair.parameters(), None)
    return coarse if reference is None else coarse.to(reference.device, reference.dtype)


class _Respaced(nn.Module):
    """The network of the coarse chain: step i is step t_i of the fine one."""

    timesteps: Tensor

    def __init__(self, pair: DDPM, timesteps: Sequence[int]) -> None:
        super().__init__()
        self.pair = pair
        device = next(pair.parameters(), torch.empty(0)).device
        self.register_buffer("timesteps", torch.tensor([0, *timesteps], device=device), persistent=False)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        fine = self.timesteps[t]
        output = self.pair.denoise(x_t, fine)
        if self.pair.predict != "mean":
            return output
        x_0 = self.pair.predict_x_0(output, x_t, fine)
        return torch.stack([x_0, output[..., 1]], -1) if self.pair.variance == "learned" else x_0
