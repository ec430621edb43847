"""What one does with a pair: bounds by site, training, posteriors, pictures, and the ``ppl`` command.

Names load on first use, so that importing this package is cheap and changes no global state.

``inference`` is a generic import name. :func:`ppl_models.check_inference` says whether Python finds this package or
another distribution's of the same name.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.bounds import Decomposition, NotANumberError, PairError, SiteTerm, decompose_elbo
    from inference.bounds.evidence import Evidence
    from inference.bounds.gradient_variance import GradientVariance, gradient_variance
    from inference.bounds.importance import EvidenceError, log_evidence
    from inference.posterior import load_posterior, save_posterior, to_datatree
    from inference.training.config import ConfigError, TrainConfig
    from inference.training.datasets import DataError, DataSet, load_data
    from inference.training.divergence import TrainingDiverged
    from inference.training.importance_objective import ImportanceWeightedLoss
    from inference.training.loop import fit
    from inference.training.objectives import ElboLoss
    from inference.training.runs import Run, RunError, load_run

__distribution__ = "ppl-models"

_HOMES = {
    "ConfigError": "inference.training.config",
    "DataError": "inference.training.datasets",
    "DataSet": "inference.training.datasets",
    "Decomposition": "inference.bounds",
    "ElboLoss": "inference.training.objectives",
    "Evidence": "inference.bounds.evidence",
    "EvidenceError": "inference.bounds.importance",
    "GradientVariance": "inference.bounds.gradient_variance",
    "ImportanceWeightedLoss": "inference.training.importance_objective",
    "NotANumberError": "inference.bounds",
    "PairError": "inference.bounds",
    "Run": "inference.training.runs",
    "RunError": "inference.training.runs",
    "SiteTerm": "inference.bounds",
    "TrainConfig": "inference.training.config",
    "TrainingDiverged": "inference.training.divergence",
    "decompose_elbo": "inference.bounds",
    "fit": "inference.training.loop",
    "gradient_variance": "inference.bounds.gradient_variance",
    "load_data": "inference.training.datasets",
    "load_posterior": "inference.posterior",
    "load_run": "inference.training.runs",
    "log_evidence": "inference.bounds.importance",
    "save_posterior": "inference.posterior",
    "to_datatree": "inference.posterior",
}

__all__ = [
    "ConfigError",
    "DataError",
    "DataSet",
    "Decomposition",
    "ElboLoss",
    "Evidence",
    "EvidenceError",
    "GradientVariance",
    "ImportanceWeightedLoss",
    "NotANumberError",
    "PairError",
    "Run",
    "RunError",
    "SiteTerm",
    "TrainConfig",
    "TrainingDiverged",
    "decompose_elbo",
    "fit",
    "gradient_variance",
    "load_data",
    "load_posterior",
    "load_run",
    "log_evidence",
    "save_posterior",
    "to_datatree",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(
        f"module 'inference' has no attribute {name!r}; this is the package of ppl-models, found at {__path__[0]}: "
        "if you want another distribution's 'inference', use an environment without ppl-models"
    )


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
