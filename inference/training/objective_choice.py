"""Which loss trains a pair, and which reports its bound, by the names that a configuration uses.

    elbo                                  the ELBO, pathwise gradients                        reparameterised latents
    iwae, dreg                            the importance-weighted bound of num_particles draws, plain or doubly
                                          reparameterised gradient                            reparameterised latents
    enumeration, score_function,          the ELBO, other estimators of its gradient          categorical latents, the
    gumbel_softmax, straight_through                                                          others reparameterised
    vlb, simple, hybrid                   the diffusion's bound at one t per datum, its reweighted form, or both

"auto" is the pair's own ``default_objective``; without one, "vlb" for a diffusion and "elbo" for all else. Whatever trains,
what is reported is the plain bound, on draws of the discrete or continuous guide itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inference.training.config import ConfigError, TrainConfig
from inference.training.diffusion_objective import DiffusionLoss
from inference.training.discrete_objective import ScoreFunctionLoss
from inference.training.enumerated_objective import EnumeratedLoss
from inference.training.gradient_estimators import training_loss
from inference.training.importance_objective import ImportanceWeightedLoss
from inference.training.objectives import ElboLoss
from inference.training.relaxed_objective import Annealing
from ppl_models.diffusion import Diffusion
from ppl_models.discrete_vae import CategoricalVAE, TooManyStatesError, refuse_too_many
from ppl_models.networks.labels import labelled
from ppl_models.pair import ModelGuidePair

DIFFUSION = ("vlb", "simple", "hybrid")
DISCRETE = ("enumeration", "score_function", "gumbel_softmax", "straight_through")
DRAWS_PER_REPORT = 16  # of t, for each datum
NUMBERS_AT_ONCE = 2**23  # 32 MiB in float32


def objective_of(pair: ModelGuidePair, config: TrainConfig) -> str:
    """The objective's name, with "auto" resolved.

    Raises:
        ConfigError: an objective that is none of this pair's, or options that mean nothing under it.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> objective_of(LinearGaussian.random(3, 2), TrainConfig())
        'elbo'
    """
    diffusion = isinstance(pair, Diffusion)
    name = config.objective
    if name == "auto":
        name = getattr(pair, "default_objective", "vlb" if diffusion else "elbo")
    if diffusion != (name in DIFFUSION):
        fitting = ", ".join(DIFFUSION) if diffusion else "elbo, iwae, dreg or an estimator for categorical latents"
        raise ConfigError(f"objective: expected {fitting} for {type(pair).__name__}, got {name!r}; or leave it at auto")
    weighted = {"kl_warmup_epochs": config.longest_warmup, "free_bits": config.free_bits}
    for option, value in weighted.items():
        if value and (diffusion or name in ("iwae", "dreg")):
            raise ConfigError(f"{option}: expected 0 with objective {name!r}, which has no rate to weight, got {value}")
    if diffusion and config.num_particles != 1:
        raise ConfigError(
            f"num_particles: expected 1 for a diffusion, got {config.num_particles}: a larger batch draws more time-steps"
        )
    if name == "enumeration" and isinstance(pair, CategoricalVAE):
        if config.num_particles != 1:
            raise ConfigError(
                f"num_particles: expected num_particles=1 with enumeration, which draws nothing, got {config.num_particles}"
            )
        try:
            refuse_too_many(pair.num_latents, pair.num_classes)
        except TooManyStatesError as error:
            raise ConfigError(f"objective: {error}") from None
    if (name == "hybrid") != (config.auxiliary_weight is not None):
        raise ConfigError(
            f"auxiliary_weight: expected with objective hybrid and only there, got {config.auxiliary_weight} with {name!r}: "
            "1000 is usual for a DDPM with learned variance, 0.001 to 0.01 for a D3PM"
        )
    if config.timesteps == "loss_second_moment" and config.processes > 1:
        raise ConfigError(
            "timesteps: expected stratified or uniform with several processes, got loss_second_moment: each would keep "
            "moments of its own, which a checkpoint does not hold"
        )
    return name


def warmup_epochs(config: TrainConfig, pair: ModelGuidePair) -> list[float]:
    """Epochs of warm-up for each latent site.

    Raises:
        ConfigError: another number of warm-ups than latent sites.
    """
    warmup, sites = config.kl_warmup_epochs, pair.latent_sites
    epochs = warmup if isinstance(warmup, tuple) else (warmup,) * len(sites)
    if len(epochs) != len(sites):
        raise ConfigError(
            f"kl_warmup_epochs: expected one number, or one for each latent site ({', '.join(sites)}), got {len(epochs)}"
        )
    return list(epochs)


def make_loss(pair: ModelGuidePair, config: TrainConfig, total_steps: int) -> Any:
    """The loss that trains ``pair``: a module with ``step(x)``, ``terms(x)`` and ``latents``.

    Args:
        pair: its parameters are the loss's parameters.
        config: how to train.
        total_steps: of the whole run, over which a temperature falls.

    Raises:
        ConfigError: see :func:`objective_of`.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> type(make_loss(LinearGaussian.random(3, 2), TrainConfig(objective="iwae", num_particles=5), 100)).__name__
        'ImportanceWeightedLoss'
    """
    name = objective_of(pair, config)
    if isinstance(pair, Diffusion):
        return DiffusionLoss(pair, name, config.timesteps, config.auxiliary_weight)  # type: ignore[arg-type]
    if name in DISCRETE:
        start, end = config.temperature, config.temperature_end or config.temperature
        draws = max(2, config.num_particles) if name == "score_function" else config.num_particles
        try:
            return training_loss(pair, name, draws, Annealing(start, end, max(1, total_steps)))
        except ValueError as error:
            raise ConfigError(f"objective: {error}") from None
    if name in ("iwae", "dreg"):
        gradient = "iwae" if name == "iwae" else "doubly_reparameterized"
        return ImportanceWeightedLoss(pair, config.num_particles, gradient)  # type: ignore[arg-type]
    return ElboLoss(pair, num_particles=config.num_particles)


def make_report(pair: ModelGuidePair, loss: Any) -> Any:
    """The loss whose terms are the plain bound of ``pair``, prepared as ``loss``, which trains it, is.

    Args:
        pair: the pair to report on, which may be an average of the one that is trained.
        loss: what trains, from :func:`make_loss`.
    """
    if isinstance(pair, Diffusion):
        return DiffusionBound(pair)
    if isinstance(loss, EnumeratedLoss):
        report: ElboLoss = EnumeratedLoss(pair)
    elif isinstance(loss, ImportanceWeightedLoss) or type(loss) is ElboLoss:
        report = ElboLoss(pair)
    else:
        # Without gradients: the mean over draws of the discrete guide.
        report = ScoreFunctionLoss(pair, num_particles=loss.reported_draws)
    if not isinstance(loss, ImportanceWeightedLoss):  # which decides on no closed forms
        report.closed_sites, report.nesting = loss.closed_sites, loss.nesting
    return report


class DiffusionBound(DiffusionLoss):
    """A diffusion's bound with several t for each datum, spread evenly over 0..T-1: what is reported of one in training.

    As many rows at a time as keep the network's output within :data:`NUMBERS_AT_ONCE`.

    Args:
        pair: a diffusion.
    """

    def __init__(self, pair: Diffusion) -> None:
        super().__init__(pair, "vlb", "stratified")
        self.draws = min(DRAWS_PER_REPORT, pair.num_timesteps)

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        """See the base class; means over the draws."""
        self._check(x)
        repeated = torch.arange(len(x), device=x.device).repeat(self.draws)
        t = self.sampler(len(repeated), x.device)
        size = max(1, NUMBERS_AT_ONCE // max(1, self.pair.output_shape.numel()))
        parts, labels = [], self.pair.labels
        for rows, steps in zip(repeated.split(size), t.split(size), strict=True):
            with labelled(self.pair, labels if labels is None or labels.dim() == 0 else labels[rows]):
                parts.append(self.terms_at(x[rows], steps))
        return {name: torch.cat([part[name] for part in parts]).reshape(self.draws, -1).mean(0) for name in parts[0]}


def loss_buffers(loss: torch.nn.Module) -> dict[str, Tensor]:
    """What a loss keeps from step to step beside the pair's own state."""
    return {name: buffer for name, buffer in loss.named_buffers() if not name.startswith("pair.")}
