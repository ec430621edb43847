"""What one does with a pair: bounds by site, training, posteriors, pictures, and the ``ppl`` command.

Names load on first use, so that importing this package is cheap and changes no global state.

``inference`` is a generic import name. :func:`ppl_models.check_inference` says whether Python finds this package or
another distribution's of the same name.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.ancestral import Trajectory, ancestral_sample, ancestral_trajectory, interpolation
    from inference.bounds import Decomposition, NotANumberError, PairError, SiteTerm, decompose_elbo
    from inference.bounds.active_units import ActiveUnits, active_units
    from inference.bounds.annealing import AnnealedEvidence, annealed_evidence
    from inference.bounds.bidirectional import BidirectionalEvidence, bidirectional_evidence
    from inference.bounds.calibration import Calibration, simulation_based_calibration
    from inference.bounds.denoising_theorem import DenoisingTheorem, GaussianMixture, denoising_theorem
    from inference.bounds.diffusion import decompose_diffusion
    from inference.bounds.diffusion_terms import DiffusionDecomposition
    from inference.bounds.evidence import Evidence
    from inference.bounds.forward_form import ForwardForm, decompose_forward
    from inference.bounds.gaps import InferenceGap, inference_gap
    from inference.bounds.gradient_variance import GradientVariance, gradient_variance
    from inference.bounds.importance import EvidenceError, log_evidence
    from inference.bounds.ladder import Ladder, evidence_ladder
    from inference.bounds.refinement import NotRefinableError, refine_guide
    from inference.bounds.surgery import ElboSurgery, elbo_surgery
    from inference.bounds.total_error import TotalError, total_error
    from inference.nuts import GoldStandardError, GuideComparison, compare_guide, gold_standard
    from inference.posterior import load_posterior, save_posterior, to_datatree
    from inference.respacing import respaced
    from inference.training.compilation import CompiledObjective, compile_objective
    from inference.training.config import ConfigError, TrainConfig
    from inference.training.datasets import DataError, DataSet, as_dataset, load_data
    from inference.training.diffusion_objective import DiffusionLoss
    from inference.training.discrete_objective import ScoreFunctionLoss
    from inference.training.divergence import TrainingDiverged
    from inference.training.enumerated_objective import EnumeratedLoss
    from inference.training.importance_objective import ImportanceWeightedLoss
    from inference.training.loop import fit
    from inference.training.objectives import ElboLoss
    from inference.training.relaxed_objective import GumbelSoftmaxLoss, StraightThroughLoss
    from inference.training.runs import Run, RunError, load_run
    from inference.training.traceability import NotTraceableError
    from inference.views.progressive import draw_progressive, progressive

__distribution__ = "ppl-models"

_HOMES = {
    "ActiveUnits": "inference.bounds.active_units",
    "AnnealedEvidence": "inference.bounds.annealing",
    "BidirectionalEvidence": "inference.bounds.bidirectional",
    "Calibration": "inference.bounds.calibration",
    "CompiledObjective": "inference.training.compilation",
    "ConfigError": "inference.training.config",
    "DataError": "inference.training.datasets",
    "DataSet": "inference.training.datasets",
    "Decomposition": "inference.bounds",
    "DenoisingTheorem": "inference.bounds.denoising_theorem",
    "DiffusionDecomposition": "inference.bounds.diffusion_terms",
    "DiffusionLoss": "inference.training.diffusion_objective",
    "ElboLoss": "inference.training.objectives",
    "ElboSurgery": "inference.bounds.surgery",
    "EnumeratedLoss": "inference.training.enumerated_objective",
    "Evidence": "inference.bounds.evidence",
    "EvidenceError": "inference.bounds.importance",
    "ForwardForm": "inference.bounds.forward_form",
    "GaussianMixture": "inference.bounds.denoising_theorem",
    "GoldStandardError": "inference.nuts",
    "GradientVariance": "inference.bounds.gradient_variance",
    "GuideComparison": "inference.nuts",
    "GumbelSoftmaxLoss": "inference.training.relaxed_objective",
    "ImportanceWeightedLoss": "inference.training.importance_objective",
    "InferenceGap": "inference.bounds.gaps",
    "Ladder": "inference.bounds.ladder",
    "NotANumberError": "inference.bounds",
    "NotRefinableError": "inference.bounds.refinement",
    "NotTraceableError": "inference.training.traceability",
    "PairError": "inference.bounds",
    "Run": "inference.training.runs",
    "RunError": "inference.training.runs",
    "ScoreFunctionLoss": "inference.training.discrete_objective",
    "SiteTerm": "inference.bounds",
    "StraightThroughLoss": "inference.training.relaxed_objective",
    "TotalError": "inference.bounds.total_error",
    "TrainConfig": "inference.training.config",
    "TrainingDiverged": "inference.training.divergence",
    "Trajectory": "inference.ancestral",
    "active_units": "inference.bounds.active_units",
    "ancestral_sample": "inference.ancestral",
    "ancestral_trajectory": "inference.ancestral",
    "annealed_evidence": "inference.bounds.annealing",
    "as_dataset": "inference.training.datasets",
    "bidirectional_evidence": "inference.bounds.bidirectional",
    "compare_guide": "inference.nuts",
    "compile_objective": "inference.training.compilation",
    "decompose_diffusion": "inference.bounds.diffusion",
    "decompose_elbo": "inference.bounds",
    "decompose_forward": "inference.bounds.forward_form",
    "denoising_theorem": "inference.bounds.denoising_theorem",
    "draw_progressive": "inference.views.progressive",
    "elbo_surgery": "inference.bounds.surgery",
    "evidence_ladder": "inference.bounds.ladder",
    "fit": "inference.training.loop",
    "gold_standard": "inference.nuts",
    "gradient_variance": "inference.bounds.gradient_variance",
    "inference_gap": "inference.bounds.gaps",
    "interpolation": "inference.ancestral",
    "load_data": "inference.training.datasets",
    "load_posterior": "inference.posterior",
    "load_run": "inference.training.runs",
    "log_evidence": "inference.bounds.importance",
    "progressive": "inference.views.progressive",
    "refine_guide": "inference.bounds.refinement",
    "respaced": "inference.respacing",
    "save_posterior": "inference.posterior",
    "simulation_based_calibration": "inference.bounds.calibration",
    "to_datatree": "inference.posterior",
    "total_error": "inference.bounds.total_error",
}

__all__ = [
    "ActiveUnits",
    "AnnealedEvidence",
    "BidirectionalEvidence",
    "Calibration",
    "CompiledObjective",
    "ConfigError",
    "DataError",
    "DataSet",
    "Decomposition",
    "DenoisingTheorem",
    "DiffusionDecomposition",
    "DiffusionLoss",
    "ElboLoss",
    "ElboSurgery",
    "EnumeratedLoss",
    "Evidence",
    "EvidenceError",
    "ForwardForm",
    "GaussianMixture",
    "GoldStandardError",
    "GradientVariance",
    "GuideComparison",
    "GumbelSoftmaxLoss",
    "ImportanceWeightedLoss",
    "InferenceGap",
    "Ladder",
    "NotANumberError",
    "NotRefinableError",
    "NotTraceableError",
    "PairError",
    "Run",
    "RunError",
    "ScoreFunctionLoss",
    "SiteTerm",
    "StraightThroughLoss",
    "TotalError",
    "TrainConfig",
    "TrainingDiverged",
    "Trajectory",
    "active_units",
    "ancestral_sample",
    "ancestral_trajectory",
    "annealed_evidence",
    "as_dataset",
    "bidirectional_evidence",
    "compare_guide",
    "compile_objective",
    "decompose_diffusion",
    "decompose_elbo",
    "decompose_forward",
    "denoising_theorem",
    "draw_progressive",
    "elbo_surgery",
    "evidence_ladder",
    "fit",
    "gold_standard",
    "gradient_variance",
    "inference_gap",
    "interpolation",
    "load_data",
    "load_posterior",
    "load_run",
    "log_evidence",
    "progressive",
    "refine_guide",
    "respaced",
    "save_posterior",
    "simulation_based_calibration",
    "to_datatree",
    "total_error",
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
