r"""Diffusion models as pairs of programs: a fixed guide, a learned chain back (lecture notes 001, 002, 003).

    model            p(x_T) prod_{t=2..T} p(x_{t-1} | x_t) p(x_0 | x_1)
    guide            q(x_1 | x_0) prod_{t=2..T} q(x_t | x_{t-1})                the forward factorisation
    posterior_guide  q(x_T | x_0) prod_{t=2..T} q(x_{t-1} | x_t, x_0)           the same q, from the top (Bayes' rule, 003)

and with the second, by Bayes' rule at every step and a telescoping product,

    -ELBO = L_T + L_{T-1} + ... + L_1 + L_0            (notes 001, last page, and its indices; 003's L_t is L_{t-1} here)
    L_T = KL(q(x_T | x_0) || p(x_T))
    L_t = E_q KL(q(x_t | x_{t+1}, x_0) || p(x_t | x_{t+1})),  1 <= t < T
    L_0 = -E_q log p(x_0 | x_1)

of which ``term_model`` and ``term_guide`` are any one, at a cost that does not grow with T: x_{t+1} is drawn at once from
q(x_{t+1} | x_0). Trace_ELBO of ``model`` has one expectation under ``guide`` and ``posterior_guide``, -ELBO; of ``term_model``
under ``term_guide`` it is L_t.

Convention: sites ``x_T`` .. ``x_1`` are latent, ``x_0`` is observed, each name with its number; t runs over 1..T and
t = 0 is the data. The process q has no parameters; the network is the only thing learned, except a likelihood's scale.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ppl_models.evaluation_mode import evaluating
from ppl_models.networks.denoiser import Denoiser
from ppl_models.networks.labels import labelled, probe_label, spread_labels
from ppl_models.pair import ModelGuidePair
from ppl_models.shortcuts import give_way

__all__ = ["Diffusion", "Process", "where"]


class Process(Protocol):
    """What runs forward, a module: the laws of q, and the prior that they end in; see :mod:`ppl_models.processes`."""

    data_shape: torch.Size
    num_timesteps: int

    def transition(self, x_previous: Tensor, t: Tensor) -> dist.TorchDistribution:
        """q(x_t | x_{t-1})."""

    def marginal(self, x_0: Tensor, t: Tensor) -> dist.TorchDistribution:
        """q(x_t | x_0)."""

    def posterior(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> dist.TorchDistribution:
        """q(x_{t-1} | x_t, x_0), t >= 2."""

    def prior(self) -> dist.TorchDistribution:
        """p(x_T)."""

    def sample_marginal(self, x_0: Tensor, t: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0)."""

    def prior_divergence(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || p(x_T)), ``[*batch]`` nats."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Moves its tensors."""


class Diffusion(ModelGuidePair, ABC):
    """A diffusion model: a process q that is given, and a network that is trained to run it backwards.

    Subclasses say what the network's output means: :meth:`reverse_law`, :meth:`reconstruction_law`,
    :meth:`predict_x_0` and :meth:`auxiliary_loss`. The programs are here, once for all of them. A :meth:`step_divergence`,
    :meth:`step_losses` or :meth:`draw_previous` of fewer operations belongs to the reverse law that it was made for: a
    subclass that overrides one of :attr:`law_methods` goes back to those of the laws themselves; so does, for a subclass with
    losses of its own, a :meth:`draw_marginal` that hands over more than x_t.

    Args:
        network: ``network(x_t, t)``, x_t ``[N, *data_shape]`` and t int64 in 1..T of shape ``[N]`` -> output
            ``[N, *output_shape]``.
        process: q and the prior; an ``nn.Module``.
        output_shape: shape of the network's output for one datum.

    Raises:
        ValueError: the network returns an array of another shape; found at construction by one pass of two data.
        TypeError: the network does not return a tensor.
    """

    data_site = "x_0"
    law_methods: ClassVar[tuple[str, ...]] = ("reverse_law",)  # those that make p(x_{t-1} | x_t)
    process: Process

    def __init__(self, network: nn.Module, process: Process, output_shape: Sequence[int]) -> None:
        steps = range(process.num_timesteps, 0, -1)
        super().__init__(process.data_shape, latent_sites=tuple(f"x_{t}" for t in steps))
        self.network = network
        reference = next(network.parameters(), torch.empty(0))
        process.to(reference.device, reference.dtype)  # the prior is drawn where the network runs
        self.process = process
        self.output_shape = torch.Size(output_shape)
        discrete = self.process.prior().support.is_discrete
        dtype = torch.int64 if discrete else reference.dtype
        self._check_network(torch.zeros(2, *self.data_shape, dtype=dtype, device=reference.device))

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        give_way(cls, "step_divergence", Diffusion.step_divergence, cls.law_methods)
        give_way(cls, "draw_previous", Diffusion.draw_previous, cls.law_methods)
        give_way(cls, "step_losses", Diffusion.step_losses, [*cls.law_methods, "step_divergence", "auxiliary_loss"])
        losses = ["step_divergence", "step_losses", "auxiliary_loss"]
        give_way(cls, "draw_marginal", Diffusion.draw_marginal, [*cls.law_methods, *losses])

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps of the chain."""
        return self.process.num_timesteps

    @abstractmethod
    def reverse_law(self, output: Tensor, x_t: Tensor, t: Tensor) -> dist.TorchDistribution:
        """p(x_{t-1} | x_t) for t >= 2, from the network's output at (x_t, t).

        Args:
            output: ``[*batch, *output_shape]``, as from :meth:`denoise`.
            x_t: ``[*batch, *data_shape]``.
            t: int64 in 2..T, broadcastable to the batch.
        """

    @abstractmethod
    def reconstruction_law(self, output: Tensor, x_1: Tensor) -> dist.TorchDistribution:
        """p(x_0 | x_1), from the network's output at (x_1, 1); shapes as in :meth:`reverse_law`."""

    @abstractmethod
    def predict_x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 that the network's output at (x_t, t) stands for, ``[*batch, *data_shape]``: what a picture shows."""

    @abstractmethod
    def auxiliary_loss(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The loss that training may use beside or instead of the bound's terms, ``[*batch]``, summed over dimensions."""

    def announce_parameters(self) -> None:
        """Announces what the model's programs use, see :meth:`ModelGuidePair.announce`: the network."""
        self.announce("network")

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output at (x_t, t), ``[*batch, *output_shape]``.

        Networks see one batch axis and a t for each datum, but for the library's denoisers, which take any number of axes and
        embed a t that data share only once.
        """
        if isinstance(self.network, Denoiser):
            return self.network(x_t, t)
        batch = x_t.shape[: x_t.dim() - len(self.data_shape)]
        with spread_labels(self.network, batch):
            output = self.network(x_t.reshape(-1, *self.data_shape), t.expand(batch).reshape(-1))
        self._refuse_other_output(output, math.prod(batch))
        return output.reshape(*batch, *self.output_shape)

    def draw_marginal(self, x_0: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """x_t ~ q(x_t | x_0), and what it was made of, by the names under which the losses below take it: here nothing."""
        return self.process.sample_marginal(x_0, t), {}

    def step_divergence(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), ``[*batch]`` nats, from the network's output at (x_t, t), t >= 2.

        Raises:
            TypeError: a reverse law of one's own whose KL has no closed form.
        """
        q, p = self.process.posterior(x_t, x_0, t), self.reverse_law(output, x_t, t)
        try:
            return kl_divergence(q, p)
        except NotImplementedError:
            kinds = [type(getattr(law, "base_dist", law)).__name__ for law in (q, p)]
            raise TypeError(
                f"expected a reverse law with a closed form of KL({kinds[0]} || p), got {kinds[1]}: override step_divergence, "
                "with log q - log p at a draw of q, say, or register the KL with torch.distributions.register_kl"
            ) from None

    def step_losses(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`step_divergence` and :meth:`auxiliary_loss` of one draw, ``[*batch]`` each; t in 1..T, with T >= 2.

        At t = 1, where there is no such divergence, it is that of another step: not to be used, but finite.
        """
        divergence = self.step_divergence(output, x_0, x_t, t.clamp(min=2))
        return divergence, self.auxiliary_loss(output, x_0, x_t, t)

    def draw_previous(self, output: Tensor, x_t: Tensor, t: int) -> Tensor:
        """x_{t-1} ~ p(x_{t-1} | x_t) from the network's output at (x_t, t), t >= 2: for samplers, all data at one t."""
        return self.reverse_law(output, x_t, self._time(t, x_t))()

    def reverse(self, x_t: Tensor, t: Tensor) -> dist.TorchDistribution:
        """p(x_{t-1} | x_t), t >= 2."""
        return self.reverse_law(self.denoise(x_t, t), x_t, t)

    def reconstruction(self, x_1: Tensor) -> dist.TorchDistribution:
        """p(x_0 | x_1)."""
        return self.reconstruction_law(self.denoise(x_1, self._time(1, x_1)), x_1)

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """p(x_T) prod_{t=2..T} p(x_{t-1} | x_t) p(x_0 | x_1): sites ``x_T`` .. ``x_1`` and ``x_0``; see the base class."""
        self.announce_parameters()
        with pyro.plate("data", self.batch_size(x, size)):
            x_t = pyro.sample(f"x_{self.num_timesteps}", self.process.prior())
            for t in range(self.num_timesteps, 1, -1):
                x_t = pyro.sample(f"x_{t - 1}", self.reverse(x_t, self._time(t, x_t)))
            return pyro.sample("x_0", self.reconstruction(x_t), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(x_1 | x_0) prod_{t=2..T} q(x_t | x_{t-1}) (notes 002): sites ``x_1`` .. ``x_T``."""
        with pyro.plate("data", self.batch_size(x)):
            x_t = x
            for t in range(1, self.num_timesteps + 1):
                x_t = pyro.sample(f"x_{t}", self.process.transition(x_t, self._time(t, x)))
            return x_t

    def posterior_guide(self, x: Tensor) -> Tensor:
        """q(x_T | x_0) prod_{t=2..T} q(x_{t-1} | x_t, x_0) (notes 003): the law of :meth:`guide`, from the top."""
        with pyro.plate("data", self.batch_size(x)):
            last = self.num_timesteps
            x_t = pyro.sample(f"x_{last}", self.process.marginal(x, self._time(last, x)))
            for t in range(last, 1, -1):
                x_t = pyro.sample(f"x_{t - 1}", self.process.posterior(x_t, x, self._time(t, x)))
            return x_t

    def term_model(self, x_0: Tensor, t: Tensor) -> Tensor:
        """The model's side of L_t: p(x_t | x_{t+1}), or p(x_T) at t = T, or p(x_0 | x_1) at t = 0.

        ``Trace_ELBO().loss(pair.term_model, pair.term_guide, x_0, t)`` has expectation sum_b L_{t_b}(x_0^b), nats. One
        network call, whatever T. Sites: ``x_next`` = x_{t+1} ~ q(x_{t+1} | x_0), under the same law in both programs and
        counted in neither (at t = T a stand-in); ``x_t``, counted where t >= 1; ``x_0``, observed, counted where t = 0.

        Args:
            x_0: data ``[*particles, B, *data_shape]``.
            t: int64 ``[B]``, each in 0..T.

        Raises:
            ValueError: under Pyro's validation, an entry of t outside 0..T.
            TypeError: t is not an int64 tensor.
        """
        self.announce_parameters()
        with pyro.plate("data", self.batch_size(x_0)):
            step, x_next = self._draw_next(x_0, t)
            output = self.denoise(x_next, step)
            if self.num_timesteps > 1:
                reverse = self.reverse_law(output, x_next, step.clamp(min=2))
                law = where(self._inside(t), reverse, self.process.prior())
            else:
                law = self.process.prior()
            with poutine.mask(mask=t >= 1):
                pyro.sample("x_t", law)
            with poutine.mask(mask=t == 0):
                return pyro.sample("x_0", self.reconstruction_law(output, x_next), obs=x_0)

    def term_guide(self, x_0: Tensor, t: Tensor) -> Tensor:
        """The guide's side of L_t: q(x_t | x_{t+1}, x_0), or q(x_T | x_0) at t = T; see :meth:`term_model`."""
        with pyro.plate("data", self.batch_size(x_0)):
            step, x_next = self._draw_next(x_0, t)
            law = self.process.marginal(x_0, self._time(self.num_timesteps, x_0))
            if self.num_timesteps > 1:
                law = where(self._inside(t), self.process.posterior(x_next, x_0, step.clamp(min=2)), law)
            with poutine.mask(mask=t >= 1):
                return pyro.sample("x_t", law)

    def _draw_next(self, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The step t + 1 (T where t = T) and x_{t+1} ~ q(x_{t+1} | x_0), whose density counts in neither program."""
        if not isinstance(t, Tensor) or t.dtype != torch.int64:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"expected t as an int64 tensor, got {got}: convert with torch.as_tensor(t).long()")
        last = self.num_timesteps
        if dist.is_validation_enabled() and bool(((t < 0) | (t > last)).any()):
            raise ValueError(
                f"expected t in 0..{last} (0 is the reconstruction, {last} the prior's term), got values from "
                f"{int(t.min())} to {int(t.max())}: keep t in that range"
            )
        step = (t + 1).clamp(max=last)
        with poutine.mask(mask=False):
            return step, pyro.sample("x_next", self.process.marginal(x_0, step))

    def _inside(self, t: Tensor) -> Tensor:
        """Where L_t is a KL between two steps of the chain: 1 <= t < T."""
        return (t >= 1) & (t < self.num_timesteps)

    def _time(self, t: int, like: Tensor) -> Tensor:
        """The step t for every datum of ``like``; a single number would be read back from the device to index tables."""
        return torch.full(like.shape[: like.dim() - len(self.data_shape)], t, device=like.device)

    def _check_network(self, x: Tensor) -> None:
        t = torch.tensor([1, self.num_timesteps], device=x.device)  # both ends: an embedding may hold 0..T-1
        try:
            with torch.no_grad(), evaluating(self.network), labelled(self.network, probe_label(self.network)):
                output = self.network(x, t)
        except IndexError as error:
            raise ValueError(
                f"expected network(x_t, t) to take every t in 1..{self.num_timesteps}, but it fails at t = 1 and "
                f"{self.num_timesteps} ({' '.join(str(error).split())[:120]}): give it t - 1 where it counts from 0, or a "
                "longer table"
            ) from error
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"expected network(x_t, t) to take x_t of shape {list(x.shape)} and t of shape [2], but it fails "
                f"({' '.join(str(error).split())[:120]}): match its first layer"
            ) from error
        self._refuse_other_output(output, 2)

    def _refuse_other_output(self, output: Any, count: int) -> None:
        """Raises TypeError or ValueError unless ``output`` is ``[count, *output_shape]``."""
        if not isinstance(output, Tensor):
            raise TypeError(
                f"expected the network to return one tensor of shape [..., {', '.join(map(str, self.output_shape))}], got "
                f"{type(output).__name__}: return the tensor itself"
            )
        if tuple(output.shape) != (count, *self.output_shape):
            raise ValueError(
                f"expected the network's output for {count} data to have shape {[count, *self.output_shape]}, got "
                f"{list(output.shape)}: match its last layer to the data and to what it predicts"
            )


def where(condition: Tensor, law: dist.TorchDistribution, other: dist.TorchDistribution) -> dist.TorchDistribution:
    """``law`` where the condition holds, else ``other``: two laws of one family, chosen between parameter by parameter.

    Unlike a mixture it stays in the family, so that KL divergences keep their closed form.

    Args:
        condition: bool, broadcastable to the batch shape.
        law: independent Normals or Categoricals, as ``Normal(...).to_event(n)``.
        other: the same family with the same event shape.

    Example:
        >>> a, b = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1), dist.Normal(5.0 * torch.ones(2), 2.0).to_event(1)
        >>> where(torch.tensor([True, False, True]), a, b).mean[:, 0]
        tensor([0., 5., 0.])
    """
    base, other_base = (getattr(side, "base_dist", side) for side in (law, other))  # scalar data: no event to unwrap
    event_dim = len(law.event_shape)
    parameters = {}
    for name in ("loc", "scale") if isinstance(base, dist.Normal) else ("logits",):
        value, alternative = getattr(base, name), getattr(other_base, name)
        own_dims = value.dim() - len(base.batch_shape) + event_dim
        chosen = condition.reshape(condition.shape + (1,) * own_dims)
        parameters[name] = torch.where(chosen, value, alternative)
    return type(base)(**parameters).to_event(event_dim)
