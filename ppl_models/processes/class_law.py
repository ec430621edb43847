r"""A categorical law over many small classes: draws by inversion, and a divergence that underflow does not make infinite.

    draw    k with  sum_{j < k} p_j <= u < sum_{j <= k} p_j,   u uniform on [0, 1)
    KL      sum_{k : q_k > 0} q_k (log q_k - log p_k)

PyTorch's own Categorical draws one exponential variable for each class, where one uniform for each law is enough, and its
KL is infinite as soon as p_k underflows, although log p_k is at hand. In float32 that is at e^-104, which a diffusion over
256 grey levels meets in every batch.

Constraint: probabilities are those of the logits' dtype, their sums run in float64, and a class of probability zero is
never drawn.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import register_kl

__all__ = ["ClassLaw"]


class ClassLaw(dist.Categorical):
    """Cat(softmax(logits)), see above; otherwise :class:`pyro.distributions.Categorical`.

    Example:
        >>> law = ClassLaw(logits=torch.tensor([[0.0, -torch.inf, 0.0]]))
        >>> 1 in law.sample((1000,))
        False
    """

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        """Draws by inversion, ``[*sample_shape, *batch_shape]`` int64."""
        with torch.no_grad():
            below = self.logits.exp().double().cumsum_(-1)
            total = below[..., -1]  # one up to rounding; u total < total, so that the last class is never passed
            u = torch.rand((*sample_shape, *total.shape), dtype=total.dtype, device=total.device)
            draws = (u * total).reshape(-1, *total.shape).movedim(0, -1).contiguous()  # a row of draws for each law
            k = torch.searchsorted(below, draws, right=True).clamp(max=below.shape[-1] - 1)  # K only where all is NaN
            return k.movedim(-1, 0).reshape(u.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(k), nats.

        Raises:
            TypeError: values that are no int64.
            ValueError: with validation on, a class outside 0..K-1.
        """
        if value.dtype != torch.int64:
            raise TypeError(f"expected class indices as int64, got {value.dtype}: convert with .long()")
        return super().log_prob(value)

    def expand(self, batch_shape: torch.Size, _instance: ClassLaw | None = None) -> ClassLaw:
        """The same law for each entry of a larger batch."""
        return ClassLaw(logits=self.logits.expand(*batch_shape, self.logits.shape[-1]), validate_args=False)


@register_kl(ClassLaw, ClassLaw)
def _kl_class_law(q: ClassLaw, p: ClassLaw) -> Tensor:
    possible = q.logits > -torch.inf
    difference = torch.where(possible, q.logits - torch.where(possible, p.logits, 0.0), 0.0)
    return (q.logits.exp() * difference).sum(-1)
