"""What runs forward: noise schedules and the Markov processes q(x_t | x_{t-1}) of the diffusion models.

Every process has one interface: ``transition``, ``marginal``, ``posterior`` and ``prior``, with t a LongTensor in 1..T.
Names load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_models.processes.categorical import CategoricalProcess
    from ppl_models.processes.dense_transitions import discretized_gaussian
    from ppl_models.processes.gaussian import GaussianProcess
    from ppl_models.processes.markov_chain import MarkovChain
    from ppl_models.processes.neighbour_transitions import nearest_neighbour
    from ppl_models.processes.schedules import NoiseSchedule
    from ppl_models.processes.structured_transitions import absorbing, uniform
    from ppl_models.processes.transitions import Transitions

_HOMES = {
    "CategoricalProcess": "ppl_models.processes.categorical",
    "GaussianProcess": "ppl_models.processes.gaussian",
    "MarkovChain": "ppl_models.processes.markov_chain",
    "NoiseSchedule": "ppl_models.processes.schedules",
    "Transitions": "ppl_models.processes.transitions",
    "absorbing": "ppl_models.processes.structured_transitions",
    "discretized_gaussian": "ppl_models.processes.dense_transitions",
    "nearest_neighbour": "ppl_models.processes.neighbour_transitions",
    "uniform": "ppl_models.processes.structured_transitions",
}

__all__ = [
    "CategoricalProcess",
    "GaussianProcess",
    "MarkovChain",
    "NoiseSchedule",
    "Transitions",
    "absorbing",
    "discretized_gaussian",
    "nearest_neighbour",
    "uniform",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ppl_models.processes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
