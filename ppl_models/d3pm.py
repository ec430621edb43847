r"""D3PM: denoising diffusion of classes (Austin et al. 2021, arXiv:2107.03006); named in the outline of lecture notes 004.

    q(x_t | x_{t-1}) = Cat([Q_t]_{x_{t-1}, .})                                                     fixed
    p(x_T)           = Cat(pi), pi the stationary law of all Q_t
    p(x_{t-1} | x_t) prop. to sum_{x_0} q(x_{t-1}, x_t | x_0) p(x_0 | x_t),  t >= 2                learned     (eq. 4)
    p(x_0 | x_1)     = itself, at t = 1

where the network gives the logits of p(x_0 | x_t), in each dimension on its own. For absorbing transitions what x_t excludes
gets no probability: no x_0 is the mask, an unmasked x_t is x_0, and each term of the bound is

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) = w_t sum_{i : x_t^i = m} -log p(x_0^i | x_t),
    w_t = (a_{t-1} - a_t) / (1 - a_t)

at t = 1 too, where w_1 = 1 and it is -log p(x_0 | x_1): a weighted masked language model (A.3; Sahoo et al. 2024,
arXiv:2406.07524). Under other transitions every class may get probability, also an x_0 with q(x_t | x_0) = 0, as there are
where Q_t has zeros: the bound is then less tight than it might be, and still a bound. Programs, bound, training and sampler
are those of :mod:`ppl_models.diffusion`; nothing is copied.

Convention: x is int64 with classes 0..K-1, among which a mask is the last and never in data. Draws are draws: no argmax.

Precision: where two laws nearly agree their KL is a small difference of logarithms, of which float32 leaves about 1e-6
nats a dimension. ``pair.process.double()`` computes all laws in float64 behind a network that stays in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn

from ppl_models.arguments import sizes
from ppl_models.data_checks import refuse_other_than_tensor, refuse_where
from ppl_models.diffusion import Diffusion
from ppl_models.likelihoods import Categorical, Likelihood
from ppl_models.networks.denoiser import Denoiser
from ppl_models.networks.ordinal import OrdinalDenoiser
from ppl_models.networks.residual_mlp import ResidualMLP
from ppl_models.networks.transformer import TransformerDenoiser
from ppl_models.networks.unet import UNet
from ppl_models.processes.categorical import CategoricalProcess
from ppl_models.processes.class_law import ClassLaw
from ppl_models.processes.dense_transitions import discretized_gaussian
from ppl_models.processes.structured_transitions import AbsorbingTransitions, UniformTransitions, absorbing, uniform
from ppl_models.processes.transitions import Transitions
from ppl_models.registry import describe
from ppl_models.shortcuts import give_way
from ppl_models.truncated_logistic import TruncatedLogistic, logistic_logits

__all__ = ["D3PM", "logistic_logits"]

Output = Literal["logits", "logistic"]

_LARGEST_LOG_ODDS = 60.0


class D3PM(Diffusion):
    """Denoising diffusion of classes by Markov steps: ``D3PM(network, transitions, data_shape, num_classes)``.

    Sites ``x_T`` .. ``x_1`` and ``x_0``, programs as in `Diffusion`.

    Args:
        network: ``network(x_t, t)``, x_t int64 ``[..., *data_shape]`` and t int64 in 1..T of shape ``[...]`` -> logits of
            x_0, ``[..., *data_shape, K]``; the mask's logit, where there is a mask, is not used. With
            ``output="logistic"`` -> ``[..., *data_shape, 2]``, see :mod:`ppl_models.truncated_logistic`.
        transitions: Q_1..Q_T over K states; see :mod:`ppl_models.processes`.
        data_shape: shape of one datum.
        num_classes: K, as the transitions have it: the mask included.
        output: "logits", or "logistic" for ordered classes.

    Attributes:
        likelihood: what data look like: `Categorical` over the classes that they may have.

    Raises:
        ValueError: K is not the transitions', or leaves but one class for data; an unknown output, or a logistic one over
            states with a mask; a network whose output has another shape.
        TypeError: the network does not return a tensor, or no transitions are given.

    Example:
        >>> from ppl_models.processes.structured_transitions import uniform
        >>> class Network(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Embedding(3, 3)
        ...     def forward(self, x_t, t):
        ...         return self.table(x_t)
        >>> d3pm = D3PM(Network(), uniform(3, num_timesteps=4), data_shape=(2,), num_classes=3)
        >>> d3pm.model(size=5).shape, d3pm.latent_sites
        (torch.Size([5, 2]), ('x_4', 'x_3', 'x_2', 'x_1'))
    """

    law_methods = ("reverse_law", "x_0_logits")
    process: CategoricalProcess

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        give_way(cls, "auxiliary_loss", D3PM._auxiliary_of_logits, ["x_0_logits"])

    def __init__(
        self,
        network: nn.Module,
        transitions: Transitions,
        data_shape: Sequence[int],
        num_classes: int,
        output: Output = "logits",
    ) -> None:
        process = CategoricalProcess(transitions, data_shape)
        if num_classes != transitions.num_classes:
            raise ValueError(
                f"expected num_classes={transitions.num_classes}, as many as the transitions have (a mask included), got "
                f"{num_classes}: give both the same"
            )
        if transitions.num_data_classes < 2:
            raise ValueError(
                f"expected num_classes >= 3 with absorbing transitions, two classes of data and the mask, got {num_classes}, "
                "the mask included: count it in num_classes"
            )
        if output not in ("logits", "logistic"):
            raise ValueError(f"expected output 'logits' or 'logistic', got {output!r}")
        if output == "logistic" and transitions.num_data_classes < num_classes:
            raise ValueError(
                "expected transitions without a mask for output='logistic', where classes are places on a line and a mask has "
                "none: use output='logits'"
            )
        super().__init__(network, process, [*data_shape, num_classes if output == "logits" else 2])
        self.num_classes = num_classes
        self.output = output
        self._sums_odds = False
        if output == "logistic" and isinstance(transitions, UniformTransitions) and transitions.num_timesteps > 1:
            steps = torch.arange(2, transitions.num_timesteps + 1, device=transitions.log_stationary.device)
            # odds that float32 holds, as those of all but the smallest beta_1 are
            self._sums_odds = bool(transitions.log_odds(steps).max() < _LARGEST_LOG_ODDS)
        self.likelihood = Categorical(transitions.num_data_classes)

    @classmethod
    def preset(
        cls,
        data_shape: Sequence[int],
        likelihood: Likelihood,
        num_timesteps: int = 100,
        transitions: Literal["uniform", "absorbing", "gaussian"] = "uniform",
        network: Literal["mlp", "unet", "transformer"] = "mlp",
        hidden: int = 256,
        blocks: int = 4,
        output: Output = "logits",
        num_labels: int | None = None,
    ) -> D3PM:
        """A D3PM with one of the library's denoisers and the schedule that the paper gives each kind of transitions.

        Args:
            data_shape: shape of one datum.
            likelihood: `Categorical`, which says how many classes data have; a mask is added to them for "absorbing".
            num_timesteps: T.
            transitions: see :mod:`ppl_models.processes.structured_transitions` and
                :func:`ppl_models.processes.dense_transitions.discretized_gaussian`.
            network: "mlp" for vectors and small images, "unet" for images, "transformer" for sequences.
            hidden: width of the network; of a U-Net at the highest resolution, twice that below.
            blocks: residual blocks, blocks at each resolution, or layers.
            output: "logits", or "logistic" for ordered classes ("mlp" and "unet").
            num_labels: K, of a diffusion of x given a label, which the network reads beside t; see :meth:`given`.

        Raises:
            TypeError: a likelihood that is not `Categorical`.
            ValueError: an unknown name, or a transformer with logistic output.
        """
        data_shape = sizes("data_shape", data_shape)
        if not isinstance(likelihood, Categorical):
            raise TypeError(
                f"expected a Categorical likelihood, got {type(likelihood).__name__}: D3PM is for classes; use "
                'Categorical(num_classes) and data scaled as "classes"'
            )
        kinds = {"uniform": uniform, "absorbing": absorbing, "gaussian": discretized_gaussian}
        if transitions not in kinds:
            raise ValueError(f"expected transitions among {', '.join(kinds)}, got {transitions!r}")
        num_classes = likelihood.num_classes + (transitions == "absorbing")
        denoiser = _denoiser(network, data_shape, num_classes, hidden, blocks, output, num_labels)
        return cls(denoiser, kinds[transitions](num_classes, num_timesteps), data_shape, num_classes, output)

    def x_0_logits(self, output: Tensor, x_t: Tensor) -> Tensor:
        """Logits of p(x_0 | x_t), ``[*batch, *data_shape, K]``: see :meth:`Transitions.restrict`.

        Minus infinity, for absorbing transitions, at each x_0 that x_t excludes and at the mask; nowhere for others.

        Args:
            output: the network's, ``[*batch, *output_shape]``.
            x_t: ``[*batch, *data_shape]``.
        """
        return self.process.transitions.restrict(self._logits(output, x_t), x_t)

    def reverse_law(self, output: Tensor, x_t: Tensor, t: Tensor) -> dist.TorchDistribution:
        """Cat(prop. to sum_{x_0} q(x_{t-1}, x_t | x_0) p(x_0 | x_t)) (eq. 4); see the base class."""
        logits = self.process.posterior_logits(x_t, self.x_0_logits(output, x_t), t)
        return ClassLaw(logits=logits).to_event(len(self.data_shape))

    def step_divergence(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """See the base class; the laws themselves, K numbers for each entry, are made only where the transitions need them."""
        return self._both_losses(output, x_0, x_t, t)[0]

    def step_losses(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class; from one normalisation of p(x_0 | x_t)."""
        return self._both_losses(output, x_0, x_t, t)

    def _both_losses(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        above = t.clamp(min=2)
        if self._sums_odds:
            return self._uniform_losses(self._law(output, x_t), x_0, x_t, above)
        return self.process.step_losses(x_t, x_0, self._logits(output, x_t), above)

    def reconstruction_law(self, output: Tensor, x_1: Tensor) -> dist.TorchDistribution:
        """p(x_0 | x_1) itself; see the base class."""
        return ClassLaw(logits=self.x_0_logits(output, x_1)).to_event(len(self.data_shape))

    def predict_x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The expected class sum_k k p(x_0 = k | x_t), a float: meaningful where the classes are ordered, as grey levels."""
        probs = self.x_0_logits(output, x_t).softmax(-1)
        return probs @ torch.arange(self.num_classes, dtype=probs.dtype, device=probs.device)

    def auxiliary_loss(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """-log p(x_0 | x_t), ``[*batch]`` nats: what the hybrid loss adds lambda times (eq. 5)."""
        if self.output == "logistic":
            surprisal = -self._law(output, x_t).log_prob(x_0)
        else:
            surprisal = self.process.transitions.surprisal(x_t, x_0, self._logits(output, x_t))
        return sum_rightmost(surprisal, len(self.data_shape))

    def _auxiliary_of_logits(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """:meth:`auxiliary_loss` by way of :meth:`x_0_logits`."""
        surprisal = -ClassLaw(logits=self.x_0_logits(output, x_t)).log_prob(x_0)
        return sum_rightmost(surprisal, len(self.data_shape))

    def masked_term(self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """w_t sum_{i : x_t^i = m} -log p(x_0^i | x_t), ``[*batch]`` nats: L_{t-1} of absorbing transitions at one draw of x_t.

        Args:
            output: the network's at (x_t, t).
            x_0: data.
            x_t: drawn from q(x_t | x_0).
            t: in 1..T, broadcastable to the batch.

        Raises:
            ValueError: transitions that are not absorbing.
        """
        transitions = self.process.transitions
        if not isinstance(transitions, AbsorbingTransitions):
            raise ValueError(
                f"expected absorbing transitions, the only ones with a masked form, got {type(transitions).__name__}"
            )
        loss = self.auxiliary_loss(output, x_0, x_t, t)  # nothing from unmasked dimensions, where x_t is x_0
        return transitions.log_unmasking(t).exp().to(loss.dtype) * loss

    def check_data(self, x: Tensor, name: str = "x") -> None:
        """Refuses all but int64 classes that data may have, without the mask; see the base class."""
        refuse_other_than_tensor(x, name)
        if x.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64 class indices, got {x.dtype}; convert with .long()")
        last = self.process.transitions.num_data_classes - 1
        masked = f" (class {last + 1} is the mask, in which no datum is)" if last + 1 < self.num_classes else ""
        remedy = "raise num_classes or relabel the data"
        refuse_where(x, (x < 0) | (x > last), name, f"class indices in 0..{last}{masked}", remedy)

    def _logits(self, output: Tensor, x_t: Tensor) -> Tensor:
        """Logits of all x_0, those among them that x_t excludes."""
        return self._law(output, x_t).logits() if self.output == "logistic" else self._widened(output)

    def _law(self, output: Tensor, x_t: Tensor) -> TruncatedLogistic:
        """p(x_0 | x_t) of a logistic output."""
        return TruncatedLogistic(self._widened(output), x_t, self.num_classes)

    def _widened(self, output: Tensor) -> Tensor:
        return output.to(torch.promote_types(output.dtype, self.process.transitions.dtype))

    def _uniform_losses(self, law: TruncatedLogistic, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`step_losses` of uniform transitions, for which the classes' probabilities are all that is needed K times."""
        transitions, n = self.process.transitions, len(self.data_shape)
        assert isinstance(transitions, UniformTransitions)
        steps = t.reshape((*t.shape, *[1] * n))
        total = law.sum_log1p(transitions.log_odds(steps).to(law.mean.dtype))
        log_p_0 = law.log_prob(x_0)
        divergence = transitions.divergence_of(x_t, x_0, total, law.log_prob(x_t), log_p_0, steps)
        return sum_rightmost(divergence, n), -sum_rightmost(log_p_0, n)

    def config(self) -> dict[str, Any]:
        """Constructor arguments as nested descriptions; see :func:`ppl_models.registry.describe`."""
        return {
            "network": describe(self.network),
            "transitions": describe(self.process.transitions),
            "data_shape": list(self.data_shape),
            "num_classes": self.num_classes,
            "output": self.output,
        }


def _denoiser(
    name: str,
    data_shape: Sequence[int],
    num_classes: int,
    hidden: int,
    blocks: int,
    output: Output,
    num_labels: int | None,
) -> nn.Module:
    logistic = output == "logistic"
    classes = None if logistic else num_classes
    denoiser: Denoiser
    match name:
        case "mlp":
            denoiser = ResidualMLP(data_shape, hidden, blocks, classes, logistic, num_labels=num_labels)
        case "unet":
            widths = (hidden, 2 * hidden)
            denoiser = UNet(data_shape, widths, blocks, False, classes, logistic, num_labels)
        case "transformer" if not logistic:
            return TransformerDenoiser(data_shape, num_classes, hidden, blocks, num_labels=num_labels)
        case "transformer":
            raise ValueError(
                "expected output 'logits' with a transformer, which reads and writes classes, got 'logistic'"
            )
        case _:
            raise ValueError(f"expected a network among mlp, unet, transformer, got {name!r}")
    return OrdinalDenoiser(denoiser, num_classes) if logistic else denoiser
