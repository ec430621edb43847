r"""The categorical forward process q of a discrete diffusion (D3PM, Austin et al. 2021, arXiv:2107.03006, section 3).

    transition   q(x_t | x_{t-1})      = Cat([Q_t]_{x_{t-1}, .})
    marginal     q(x_t | x_0)          = Cat([Qbar_t]_{x_0, .})                                             (eq. 3)
    posterior    q(x_{t-1} | x_t, x_0) = Cat(prop. to [Q_t]_{., x_t} [Qbar_{t-1}]_{x_0, .})                 (eq. 3)
    reverse      p(x_{t-1} | x_t)      = Cat(prop. to [Q_t]_{., x_t} sum_{x_0} p(x_0 | x_t) [Qbar_{t-1}]_{x_0, .})   (eq. 4)
    prior        p(x_T)                = Cat(pi), pi the stationary law

independently in each dimension of x: the same interface as :class:`ppl_models.processes.gaussian.GaussianProcess`.
Matrices are row-stochastic, see :mod:`ppl_models.processes.transitions`.

Convention: x is int64 ``[*batch, *data_shape]`` with states 0..K-1; t is a LongTensor in 1..T that broadcasts against the
batch shape; a law's event is one whole datum. Constraint: everything is done with logarithms, so that an event of
probability 1e-400 is as good as any other and an impossible one is minus infinity.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn

from ppl_models.arguments import sizes
from ppl_models.processes.class_law import ClassLaw
from ppl_models.processes.transitions import Transitions

__all__ = ["CategoricalProcess"]


class CategoricalProcess(nn.Module):
    """q(x_1..T | x_0) of a discrete diffusion, one law at a time.

    Args:
        transitions: Q_1..Q_T.
        data_shape: shape of one datum.

    Attributes:
        num_classes: K.
        num_timesteps: T.

    Raises:
        TypeError: ``transitions`` are not :class:`Transitions`.

    Example:
        >>> from ppl_models.processes.structured_transitions import uniform
        >>> process = CategoricalProcess(uniform(17, num_timesteps=100), data_shape=(8, 8))
        >>> x_0 = torch.zeros(5, 8, 8, dtype=torch.int64)
        >>> x_t = process.marginal(x_0, torch.tensor(50)).sample()
        >>> x_t.dtype, process.posterior(x_t, x_0, torch.tensor([1, 2, 50, 99, 100])).batch_shape
        (torch.int64, torch.Size([5]))
    """

    def __init__(self, transitions: Transitions, data_shape: Sequence[int]) -> None:
        super().__init__()
        if not isinstance(transitions, Transitions):
            raise TypeError(
                f"expected transitions from uniform, absorbing, discretized_gaussian or nearest_neighbour, got "
                f"{type(transitions).__name__}: wrap matrices [T, K, K] in DenseTransitions"
            )
        self.transitions = transitions
        self.data_shape = torch.Size(sizes("data_shape", data_shape))
        self.num_classes = transitions.num_classes
        self.num_timesteps = transitions.num_timesteps

    def transition(self, x_previous: Tensor, t: Tensor) -> dist.TorchDistribution:
        """q(x_t | x_{t-1}), row x_{t-1} of Q_t.

        Args:
            x_previous: x_{t-1}, int64 ``[*batch, *data_shape]``.
            t: LongTensor in 1..T, broadcasting against ``batch``.

        Returns:
            A Categorical with batch shape ``batch``, event shape ``data_shape``, in the module's dtype.

        Raises:
            TypeError: x or t is not an int64 tensor.
            ValueError: with validation on, a state outside 0..K-1 or t outside 1..T.
        """
        return self._law(self.transitions.log_transition(*self._aligned(x_previous, t)))

    def marginal(self, x_0: Tensor, t: Tensor) -> dist.TorchDistribution:
        """q(x_t | x_0), row x_0 of Qbar_t; see :meth:`transition`."""
        return self._law(self.transitions.log_marginal(*self._aligned(x_0, t)))

    def posterior(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> dist.TorchDistribution:
        """q(x_{t-1} | x_t, x_0); at t = 1 a point mass on x_0. See :meth:`transition`.

        There is no such law where q(x_t | x_0) = 0: its logits are NaN, which Pyro's validation refuses.
        """
        column = self.transitions.log_column(*self._aligned(x_t, t))
        return self._law(column + self.transitions.log_marginal(*self._aligned(x_0, t - 1)))

    def posterior_logits(self, x_t: Tensor, x_0_logits: Tensor, t: Tensor) -> Tensor:
        """log sum_{x_0} q(x_{t-1}, x_t | x_0) p(x_0 | x_t), up to a constant in x_{t-1} (eq. 4).

        The weights are joint probabilities, not q(x_{t-1} | x_t, x_0): as in the paper, p(x_0 | x_t) is *not* yet
        weighted by how well x_0 explains x_t. At t = 1 this is p(x_0 | x_1) q(x_1 | x_0), normalised.

        Args:
            x_t: int64 ``[*batch, *data_shape]``.
            x_0_logits: ``[*batch, *data_shape, K]``, log p(x_0 | x_t) up to a constant; minus infinity allowed.
            t: LongTensor in 1..T, broadcasting against ``batch``.

        Returns:
            ``[*batch, *data_shape, K]``, unnormalised, in the dtype of ``x_0_logits``, at least float32; NaN where those
            are.

        Raises:
            ValueError: logits of another shape; see also :meth:`transition`.
        """
        x_t, t = self._aligned(x_t, t)
        log_p = self._widened(x_0_logits).log_softmax(-1)
        likelihood = self.transitions.log_column(x_t, t, log_p.dtype)
        return likelihood + self.transitions.log_propagate(log_p, t - 1)

    def sample_marginal(self, x_0: Tensor, t: Tensor) -> Tensor:
        """A draw from :meth:`marginal`, without the law's K numbers where the transitions can do without."""
        return self.transitions.sample_marginal(*self._aligned(x_0, t))

    def step_losses(self, x_t: Tensor, x_0: Tensor, x_0_logits: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) and -log p(x_0 | x_t), ``[*batch]`` nats; t in 2..T.

        p as in :meth:`posterior_logits`, given ``x_0_logits`` of which ``transitions.restrict`` has taken away what x_t
        excludes, or will. The KL is that of the two laws, with fewer passes over the classes where the transitions can.
        """
        x_t, steps = self._aligned(x_t, t)
        x_0, _ = self._aligned(x_0, t)
        divergence, surprisal = self.transitions.step_losses(x_t, x_0, self._widened(x_0_logits), steps)
        n = len(self.data_shape)
        return sum_rightmost(divergence, n), sum_rightmost(surprisal, n)

    def prior_divergence(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || p(x_T)), ``[*batch]`` nats in the module's dtype."""
        x_0, _ = self._aligned(x_0, x_0.new_ones(()))
        divergence = self.transitions.prior_divergence(x_0)
        return sum_rightmost(divergence, len(self.data_shape)).to(self.transitions.dtype)

    def prior(self) -> dist.TorchDistribution:
        """p(x_T) = pi in every dimension: batch shape ``()``, event shape ``data_shape``."""
        logits = self.transitions.log_stationary.to(self.transitions.dtype)
        return self._law(logits.expand(*self.data_shape, self.num_classes))

    def _aligned(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x, and t with as many dims as x has, so that they broadcast against each other."""
        for name, value in (("x", x), ("t", t)):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"expected {name} as an int64 tensor, got {type(value).__name__}: convert with torch.as_tensor"
                )
            if value.dtype != torch.int64:
                raise TypeError(
                    f"expected {name} as int64, got {value.dtype}: class indices and steps are whole numbers"
                )
        n = len(self.data_shape)
        if x.dim() < n or x.shape[x.dim() - n :] != self.data_shape:
            raise ValueError(
                f"expected data of shape [*batch, {', '.join(map(str, self.data_shape))}], got {list(x.shape)}: "
                "keep the data's own dimensions last"
            )
        return x, t.reshape((*t.shape, *[1] * n))

    def _widened(self, x_0_logits: Tensor) -> Tensor:
        """The logits in at least float32."""
        shape = (*self.data_shape, self.num_classes)
        if x_0_logits.shape[max(x_0_logits.dim() - len(shape), 0) :] != shape:
            raise ValueError(
                f"expected x_0_logits of shape [*batch, {', '.join(map(str, shape))}], one for each class last, got "
                f"{list(x_0_logits.shape)}"
            )
        return x_0_logits.to(torch.promote_types(x_0_logits.dtype, torch.float32))

    def _law(self, logits: Tensor) -> dist.TorchDistribution:
        return ClassLaw(logits=logits).to_event(len(self.data_shape))
