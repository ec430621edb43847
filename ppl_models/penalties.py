"""Penalties of autoencoders: what keeps z = f(x) from copying x, each a factor exp(-penalty) of the program.

    L1               lambda sum_j |z_j|                       minus log of a Laplace density, up to a constant
    activity         beta sum_j KL(rho || mean_b z_bj)        Ng 2011, CS294A lecture notes "Sparse autoencoder"
    contraction      lambda ||df/dx||_F^2                     Rifai et al. 2011, ICML, eq. 2

(lecture notes 004, "Many variants"). All are in nats per datum, so that they add to -log p(x | z): with the likelihood
N(x; g(z), sigma^2 I), a weight lambda stands beside a squared error with weight 2 sigma^2 lambda.

The one constraint: penalties see rows of data in the last batch dim, [*particles, B], and treat rows alike. All are a
datum's own but for the activity, which is a property of the batch: each datum carries its batch's value, so the mean over
a batch is the objective of the source; it depends on the batch, as a mean over few data is a poor estimate of rho-hat.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.data_checks import refuse_where
from ppl_models.networks.precision import at_least_float32


class Penalty(nn.Module, ABC):
    """A non-negative cost of z, and of the encoder at x, in nats per datum.

    Attributes:
        site: the name of its factor site.
        reads_encoder: whether it needs the encoder itself, beside z.

    Args:
        weight: factor in front, > 0.

    Raises:
        ValueError: a weight that is not positive and finite.
    """

    site: ClassVar[str]
    reads_encoder: ClassVar[bool] = False

    def __init__(self, weight: float) -> None:
        super().__init__()
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"expected weight to be a positive finite number, got {weight!r}; for none, leave it out")
        self.weight = float(weight)

    @abstractmethod
    def forward(self, z: Tensor, x: Tensor, encoder: Callable[[Tensor], Tensor]) -> Tensor:
        """The penalty, weight included.

        Args:
            z: codes, ``[*particles, B, d]``.
            x: data, ``[B, *data_shape]`` or with the particles of ``z`` in front.
            encoder: x -> z.

        Returns:
            Nats >= 0, ``[*particles, B]`` or ``[B]``.
        """

    def check(self, z: Tensor, x: Tensor) -> None:
        """Refuses codes or data that it is not defined for; by default none.

        Raises:
            ValueError: says what was expected.
        """

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {"weight": self.weight}

    def extra_repr(self) -> str:
        """The constructor arguments, for ``print``."""
        return ", ".join(f"{key}={value!r}" for key, value in self.config().items())


class L1(Penalty):
    """lambda sum_j |z_j|, a datum's own: site ``l1``.

    It can be made small by shrinking f and stretching the decoder: bound the decoder, by weight decay say.

    Args:
        weight: lambda > 0.

    Example:
        >>> L1(2.0)(torch.tensor([[1.0, -3.0]]), torch.zeros(1, 4), nn.Identity())
        tensor([8.])
    """

    site = "l1"

    def forward(self, z: Tensor, x: Tensor, encoder: Callable[[Tensor], Tensor]) -> Tensor:
        """See :meth:`Penalty.forward`."""
        return self.weight * at_least_float32(z).abs().sum(-1)


class ActivityTarget(Penalty):
    """beta sum_j KL(Bernoulli(rho) || Bernoulli(rho-hat_j)), rho-hat_j the mean of z_j over the batch: site ``activity``.

    Codes are activities in (0, 1): the encoder ends in a sigmoid. Per batch, not per datum: a cost KL(rho || z_bj) of each
    datum would press every unit to rho at *every* datum, which is no sparsity but a constant code. By Jensen's inequality
    the mean over small batches is above the whole data set's penalty.

    Args:
        target: rho in (0, 1), the mean activity wanted of each unit.
        weight: beta > 0.

    Raises:
        ValueError: a target outside (0, 1); with Pyro's validation, and at an autoencoder's construction, codes outside.

    Example:
        >>> z = torch.tensor([[0.1, 0.5], [0.3, 0.5]])    # mean activities 0.2 and 0.5
        >>> ActivityTarget(0.2, weight=1.0)(z, torch.zeros(2, 4), nn.Identity())    # KL(0.2 || 0.5) in each row
        tensor([0.1927, 0.1927])
    """

    site = "activity"

    def __init__(self, target: float, weight: float = 1.0) -> None:
        super().__init__(weight)
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < 1:
            raise ValueError(f"expected target activity in (0, 1), got {target!r}; 0.05 is usual")
        self.target = float(target)

    def forward(self, z: Tensor, x: Tensor, encoder: Callable[[Tensor], Tensor]) -> Tensor:
        """See :meth:`Penalty.forward`."""
        if dist.is_validation_enabled():
            _refuse_other_than_activities(z, (z >= 0) & (z <= 1))  # a sigmoid may round to either end
        rho, rho_hat = self.target, at_least_float32(z).mean(-2)
        minus_entropy = rho * math.log(rho) + (1 - rho) * math.log1p(-rho)
        kl = minus_entropy - rho * rho_hat.log() - (1 - rho) * torch.log1p(-rho_hat)
        return (self.weight * kl.sum(-1, keepdim=True)).expand(z.shape[:-1])

    def check(self, z: Tensor, x: Tensor) -> None:
        """Refuses codes outside (0, 1), also the zeros of a k-sparse layer; see the base class."""
        _refuse_other_than_activities(z, (z > 0) & (z < 1))

    def config(self) -> dict[str, Any]:
        """See :meth:`Penalty.config`."""
        return {"target": self.target, "weight": self.weight}


class Contraction(Penalty):
    """lambda ||J||_F^2 with J = df/dx at x, exactly: site ``contraction``; a datum's own.

    The rows e_j' J come from one pass of f and d pulled-back unit vectors (``torch.func.vjp`` under ``vmap``). Where data
    are corrupted in training, J is still taken at the clean x. f must treat rows one by one (no batch normalisation).

    Args:
        weight: lambda > 0.

    Example:
        >>> double = nn.Linear(2, 2, bias=False)
        >>> _ = double.weight.data.copy_(2 * torch.eye(2))
        >>> Contraction(1.0)(torch.zeros(3, 2), torch.zeros(3, 2), double).detach()    # ||2 I||^2 = 8
        tensor([8., 8., 8.])
    """

    site = "contraction"
    reads_encoder = True

    def forward(self, z: Tensor, x: Tensor, encoder: Callable[[Tensor], Tensor]) -> Tensor:
        """See :meth:`Penalty.forward`; ``[B]``, as J does not depend on the draw of z."""
        code, pull_back = _vjp(encoder, x)
        units = torch.eye(code.shape[-1], dtype=code.dtype, device=code.device)
        covectors = units.reshape(-1, *[1] * (code.dim() - 1), code.shape[-1]).expand(-1, *code.shape)
        (rows,) = torch.vmap(pull_back)(covectors)  # [d, *batch, *data_shape]
        return self.weight * at_least_float32(rows).square().sum(0).flatten(code.dim() - 1).sum(-1)

    def check(self, z: Tensor, x: Tensor) -> None:
        """Refuses class indices; see the base class."""
        if not x.is_floating_point():
            raise ValueError(
                f"expected floating-point data for a contraction, got {x.dtype} class indices, which have no derivative: "
                "use a sparsity penalty"
            )


class HutchinsonContraction(Contraction):
    """lambda mean_m ||v_m' J||^2 with random signs v_m, which has mean lambda ||J||_F^2: for wide codes.

    E[v v'] = I gives E||v' J||^2 = tr(J J') = ||J||_F^2 (Hutchinson 1990). Unbiased, in value and gradient; the variance
    of one probe is 2 sum_{i != j} (J J')_ij^2. One pull-back a probe, where the exact penalty takes d.

    Args:
        weight: lambda > 0.
        num_probes: M >= 1, fresh for each call, datum and particle.

    Raises:
        ValueError: fewer than one probe.

    Example:
        >>> double = nn.Linear(2, 2, bias=False)
        >>> _ = double.weight.data.copy_(2 * torch.eye(2))
        >>> HutchinsonContraction(1.0)(torch.zeros(3, 2), torch.zeros(3, 2), double).detach()  # exact: J J' is diagonal
        tensor([8., 8., 8.])
    """

    def __init__(self, weight: float, num_probes: int = 1) -> None:
        super().__init__(weight)
        if isinstance(num_probes, bool) or not isinstance(num_probes, int) or num_probes < 1:
            raise ValueError(f"expected num_probes to be a whole number >= 1, got {num_probes!r}")
        self.num_probes = num_probes

    def forward(self, z: Tensor, x: Tensor, encoder: Callable[[Tensor], Tensor]) -> Tensor:
        """See :meth:`Penalty.forward`; ``[*particles, B]``."""
        code, pull_back = _vjp(encoder, x)
        probes = (self.num_probes, *z.shape[: z.dim() - code.dim()])  # each particle has probes of its own
        signs = 2 * torch.randint(2, (math.prod(probes), *code.shape), device=code.device).to(code.dtype) - 1
        (pulled,) = torch.vmap(pull_back)(signs)  # [M * particles, *batch, *data_shape]
        norms = at_least_float32(pulled).square().flatten(code.dim()).sum(-1)
        return self.weight * norms.reshape(*probes, *code.shape[:-1]).mean(0)

    def config(self) -> dict[str, Any]:
        """See :meth:`Penalty.config`."""
        return {"weight": self.weight, "num_probes": self.num_probes}


def _refuse_other_than_activities(z: Tensor, good: Tensor) -> None:
    remedy = "let the encoder end in a sigmoid (and in no k-sparse layer)"
    refuse_where(z.detach(), ~good, "z", "activities between 0 and 1", remedy)


def _vjp(encoder: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]:
    """f(x) and the map v -> v' J, as ``torch.func.vjp`` gives them for a function of one array."""
    results: Any = torch.func.vjp(encoder, x)
    return results
