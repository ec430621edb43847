"""Which loss estimates the gradient of -ELBO, by the estimator's name."""

from __future__ import annotations

from inference.training.discrete_objective import ScoreFunctionLoss
from inference.training.enumerated_objective import EnumeratedLoss
from inference.training.objectives import ElboLoss
from inference.training.relaxed_objective import Annealing, GumbelSoftmaxLoss, StraightThroughLoss
from ppl_models.pair import ModelGuidePair

ESTIMATORS = ("pathwise", "enumeration", "score_function", "gumbel_softmax", "straight_through")


def training_loss(
    pair: ModelGuidePair, estimator: str, num_particles: int = 1, temperature: float | Annealing = 1.0
) -> ElboLoss:
    """The loss that trains a pair by the named estimator of the gradient.

    Args:
        pair: the model/guide pair.
        estimator: one of :data:`ESTIMATORS`; ``"pathwise"`` is :class:`ElboLoss`, for reparameterised latents.
        num_particles: draws per datum; of the latents that are not enumerated, with ``"enumeration"``.
        temperature: of the relaxed estimators.

    Raises:
        ValueError: an unknown estimator, or a number of draws that it cannot take.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> type(training_loss(LinearGaussian.random(3, 2), "pathwise")).__name__
        'ElboLoss'
    """
    if estimator == "pathwise":
        return ElboLoss(pair, num_particles)
    if estimator == "enumeration":
        return EnumeratedLoss(pair, num_particles)
    if estimator == "score_function":
        return ScoreFunctionLoss(pair, num_particles)
    if estimator == "gumbel_softmax":
        return GumbelSoftmaxLoss(pair, num_particles, temperature)
    if estimator == "straight_through":
        return StraightThroughLoss(pair, num_particles, temperature)
    raise ValueError(f"expected an estimator among {', '.join(ESTIMATORS)}, got {estimator!r}")
