"""What :func:`inference.decompose_diffusion` returns: the terms L_0 .. L_T of a diffusion's bound, and their curve by t.

    -ELBO = L_T + ... + L_1 + L_0 = rate + distortion,    rate = L_1 + ... + L_T,    distortion = L_0

The term of site ``x_t`` is -L_t, nats, shape [B]. The one constraint: the terms' draws are independent of each other and
from datum to datum, so that errors add up in squares over t and over data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.bounds.terms import Decomposition
from ppl_models.data_checks import refuse_other_than_tensor
from ppl_models.diffusion import Diffusion
from ppl_models.pair import refuse_other_dtype


@dataclass(frozen=True)
class TermCurve:
    """-L_t's counterpart by t: L_t averaged over data, nats, with the standard error that the draws leave.

    Attributes:
        t: int64 ``[n]``, falling from T to 0.
        loss: L_t, ``[n]``.
        std_error: its standard error, ``[n]``.
        data_dim: D, what bits per dimension are divided by.
    """

    t: Tensor
    loss: Tensor
    std_error: Tensor
    data_dim: int

    @property
    def loss_bits_per_dim(self) -> Tensor:
        """L_t / (D log 2)."""
        return self.loss / (self.data_dim * math.log(2))

    @property
    def std_error_bits_per_dim(self) -> Tensor:
        """Standard error of :attr:`loss_bits_per_dim`."""
        return self.std_error / (self.data_dim * math.log(2))


@dataclass(frozen=True, repr=False)
class DiffusionDecomposition(Decomposition):
    """A :class:`Decomposition` whose sites are ``x_T`` .. ``x_0``; the term of ``x_t`` is -L_t.

    With only some timesteps asked for there is no bound: ``elbo``, ``monte_carlo``, their errors, ``rate``, and
    ``distortion`` unless t = 0 is among them, are NaN, and ``note`` says so.
    """

    num_timesteps: int = 0
    data_dim: int = 1

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The t of each site, falling."""
        return tuple(int(site.removeprefix("x_")) for site in self.terms)

    @property
    def is_partial(self) -> bool:
        """Whether some of the T + 1 terms were not asked for."""
        return len(self.terms) <= self.num_timesteps

    @property
    def rate(self) -> Tensor:
        """L_1 + ... + L_T, nats ``[B]``; NaN if partial."""
        return torch.full_like(self.elbo, math.nan) if self.is_partial else super().rate

    @property
    def distortion(self) -> Tensor:
        """L_0, nats ``[B]``; NaN if t = 0 was not asked for."""
        return super().distortion if "x_0" in self.terms else torch.full_like(self.elbo, math.nan)

    def bits_per_dim(self) -> tuple[float, float]:
        """-ELBO / (D log 2), averaged over data, and its standard error; lower is better."""
        unit = self.data_dim * math.log(2)
        return -float(self.elbo.mean()) / unit, self.mean_std_error / unit

    def curve(self) -> TermCurve:
        """L_t by t, from the better estimate of each term."""
        terms = list(self.terms.values())
        errors = torch.stack([over_data(term.value_std_error) for term in terms])
        losses = -torch.stack([term.value.mean() for term in terms])
        return TermCurve(torch.tensor(self.timesteps), losses, errors, self.data_dim)

    def table(self) -> str:
        """The bound as text: L_0, L_T, and the terms between summed over ranges of t, so that the rows add up."""
        from inference.views.diffusion import diffusion_table

        return diffusion_table(self)


def over_data(std_errors: Tensor) -> Tensor:
    """Standard error of the mean over independent data."""
    return std_errors.square().sum().sqrt() / std_errors.numel()


def refuse_other_data(pair: Diffusion, x_0: Tensor) -> None:
    """Raises TypeError or ValueError unless ``x_0`` is ``[B, *data_shape]``, of the network's dtype, and data of the pair."""
    refuse_other_than_tensor(x_0, "x_0")
    if x_0.dim() != len(pair.data_shape) + 1:
        raise ValueError(f"expected x_0 of shape [B, {', '.join(map(str, pair.data_shape))}], got {list(x_0.shape)}")
    pair.batch_size(x_0)
    pair.check_data(x_0, "x_0")
    reference = next(pair.network.parameters(), None)
    if reference is not None:
        refuse_other_dtype(x_0, reference)
