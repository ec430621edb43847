"""Losses of pairs with one-hot latents, whose gradient goes through a relaxed z: less variance, some bias.

    Gumbel-softmax     df(y)/dphi,  y = softmax((log q + g) / tau),  g ~ Gumbel(0, 1)
    straight-through   df/dz at z = onehot(argmax y), times dy/dphi

with f(z) the drawn part of the bound (Jang et al. 2016, arXiv:1611.01144, eqs. 1 to 3, and Maddison et al. 2016,
arXiv:1611.00712). As tau falls to 0 the bias falls and the variance grows; :class:`Annealing` takes tau there during training.

Each loss's *value* is the bound of the discrete pair, never the relaxed one's: where the gradient comes from a relaxed z, the
value comes from draws of the guide itself.

The one constraint: a relaxed z must be one-hot in the program (as in :class:`ppl_models.discrete_vae.CategoricalVAE`), and
its KL known in closed form, for a relaxed z has no probability. Latents that are reparameterised keep their pathwise gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.utils import clamp_probs

from inference.bounds.closed_forms import law_name
from inference.bounds.sites import PairError, Site, base_law
from inference.training.discrete_objective import DiscreteLoss
from ppl_models.arguments import positive_number, whole_count
from ppl_models.discrete_vae import one_hot
from ppl_models.pair import ModelGuidePair


@dataclass(frozen=True)
class Annealing:
    """Temperature by step: tau(s) = start (end / start)^(s / steps), and ``end`` from step ``steps`` on.

    The exponential schedule of Jang et al. 2016 (arXiv:1611.01144), section 4, by its end points.

    Args:
        start: tau before the first step, > 0.
        end: tau after ``steps``, > 0.
        steps: >= 1.

    Raises:
        ValueError: a temperature that is not positive and finite, or ``steps`` below one.

    Example:
        >>> tau = Annealing(start=1.0, end=0.25, steps=100)
        >>> tau(0), tau(50), tau(1000)
        (1.0, 0.5, 0.25)
    """

    start: float = 1.0
    end: float = 0.5
    steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            positive_number(f"the temperature's {name}", getattr(self, name))
        whole_count("steps", self.steps)

    def __call__(self, step: int) -> float:
        """Tau after ``step`` steps."""
        return self.start * (self.end / self.start) ** min(1.0, step / self.steps)


class GumbelSoftmaxLoss(DiscreteLoss):
    """-ELBO(x) with the gradient through a relaxed z; its value comes from draws of the discrete guide.

    y = softmax((log q + g) / tau), g ~ Gumbel(0, 1): Jang et al. 2016 (arXiv:1611.01144), eq. 2; Maddison et al. 2016
    (arXiv:1611.00712). Two evaluations of the decoder a draw, one of them without gradient.

    Args:
        pair: a pair with one-hot latents, each with its KL in closed form; its other latents are reparameterised.
        num_particles: draws per datum, averaged.
        temperature: tau > 0, or how it falls with the step; see :meth:`anneal`.

    Raises:
        ValueError: a temperature that is not positive and finite, or ``num_particles`` below one.
        PairError: at the first call, for a latent that is neither one-hot nor reparameterised, a one-hot latent that has no KL
            in closed form, or sites that do not match.

    Example:
        >>> from ppl_models.discrete_vae import CategoricalVAE
        >>> from ppl_models.likelihoods import Bernoulli
        >>> vae = CategoricalVAE.preset((3,), Bernoulli(), num_latents=30, num_classes=8, hidden=(4,))
        >>> loss = GumbelSoftmaxLoss(vae, temperature=Annealing(1.0, 0.5, steps=10))
        >>> loss.anneal(10)
        >>> float(loss.temperature), loss(torch.ones(2, 3)).shape
        (0.5, torch.Size([2]))
    """

    temperature: Tensor

    def __init__(self, pair: ModelGuidePair, num_particles: int = 1, temperature: float | Annealing = 1.0) -> None:
        super().__init__(pair, num_particles=num_particles)
        self.schedule = temperature if isinstance(temperature, Annealing) else Annealing(temperature, temperature)
        self.register_buffer(
            "temperature", torch.tensor(self.schedule(0)), False
        )  # a traced loss reads it anew each step

    def anneal(self, step: int) -> None:
        """Sets tau for the step after ``step`` steps."""
        self.temperature.fill_(self.schedule(step))

    def _check_latents(self, latents: dict[str, Site], without_closed_form: dict[str, str]) -> None:
        relaxed = {name for name, site in latents.items() if _one_hot(site["fn"]) is not None}
        for name, site in latents.items():
            if name not in relaxed and (not relaxed or not site["fn"].has_rsample):
                raise PairError(
                    f"expected one-hot latents to relax, got {law_name(site['fn'])} at site {name!r}: use OneHotCategorical, "
                    "or another estimator"
                )
        for name, reason in without_closed_form.items():
            if name in relaxed:
                raise PairError(
                    f"expected a KL in closed form at every relaxed site, got none at {name!r} ({reason}): use another "
                    "estimator"
                )

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            drawn = super()._terms(x)
        relaxed = self._relaxed_terms(x)
        return {name: drawn[name].detach() + (term - term.detach()) for name, term in relaxed.items()}

    def _relaxed_terms(self, x: Tensor) -> dict[str, Tensor]:
        """Each site's term at relaxed draws."""
        traces = self._traces(x, _Replaced(self._relax))
        return {name: self._per_datum(term) for name, term in self._site_terms(*traces).items()}

    def _relax(self, law: Any) -> Tensor:
        """y, a reparameterised stand-in for a draw of a one-hot law; its ``logits`` are log q."""
        log_q: Tensor = law.logits
        uniform = clamp_probs(torch.rand_like(log_q))
        return ((log_q - (-uniform.log()).log()) / self.temperature).softmax(-1)


class StraightThroughLoss(GumbelSoftmaxLoss):
    """-ELBO(x) at one-hot draws, with the gradient of z replaced by that of the relaxed y behind it.

    z = onehot(argmax y) forwards, dz := dy backwards; straight-through Gumbel-softmax, Jang et al. 2016 (arXiv:1611.01144),
    section 2.2. The draws are exact ones of the guide, so one evaluation of the decoder gives value and gradient.

    Args, errors: as :class:`GumbelSoftmaxLoss`.

    Example:
        >>> from ppl_models.discrete_vae import CategoricalVAE
        >>> from ppl_models.likelihoods import Bernoulli
        >>> vae = CategoricalVAE.preset((3,), Bernoulli(), num_latents=30, num_classes=8, hidden=(4,))
        >>> StraightThroughLoss(vae, num_particles=2, temperature=0.5)(torch.ones(2, 3)).shape
        torch.Size([2])
    """

    def _terms(self, x: Tensor) -> dict[str, Tensor]:
        return self._relaxed_terms(x)

    def _relax(self, law: Any) -> Tensor:
        y = super()._relax(law)
        z = one_hot(y.argmax(-1), y.shape[-1]).to(y.dtype)
        return z + (y - y.detach())  # the value of z, exactly


class _Replaced(Messenger):
    """Replaces each draw of a one-hot law by what ``replacement`` makes of that law.

    The law itself is told to draw so, because plates outside of this handler have yet to expand it; afterwards it is the
    law that it was. Outside of ``poutine.trace``, so that the trace records that one.
    """

    def __init__(self, replacement: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.drawn = {"sample": lambda law, sample_shape=(): replacement(_one_hot(law)), "has_rsample": False}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if _one_hot(msg["fn"]) is not None and not msg["is_observed"]:
            law = msg["fn"] = copy.copy(msg["fn"])
            law.__class__ = type(type(law).__name__, (type(law),), self.drawn)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if _one_hot(msg["fn"]) is not None and not msg["is_observed"]:
            msg["fn"].__class__ = type(msg["fn"]).__base__


def _one_hot(law: Any) -> Any:
    """The law of single one-hot vectors inside ``Independent``; None for another law."""
    law = base_law(law)
    return law if isinstance(law, torch.distributions.OneHotCategorical) else None
