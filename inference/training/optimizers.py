"""Optimiser, learning-rate schedule, clipping and averaged weights of a run, all torch's own, as one state.

    learning rate at step s = learning_rate * factor(s),  s = 0, 1, ..., total - 1
    averaged weights  a <- decay * a + (1 - decay) * w  after each step, starting at the weights after the first

The one constraint: the state depends on the steps done and on nothing else, so that it goes on from a checkpoint bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from inference.training.config import ConfigError, TrainConfig
from inference.training.processes import sum_gradients

LAST_FACTOR_EXPONENTIAL = 0.01


class Optimization:
    """What turns gradients into steps.

    Args:
        module: whose parameters are stepped, in place.
        config: how.
        total_steps: of the whole run, for the schedule.

    Raises:
        ConfigError: no parameter requires a gradient.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> optimization = Optimization(module, TrainConfig(), total_steps=1)
        >>> module(torch.ones(3, 2)).sum().backward()
        >>> round(float(optimization.gradient_norm()), 4)  # three times the norm of (1, 1, 1)
        5.1962
        >>> optimization.step()
    """

    def __init__(self, module: nn.Module, config: TrainConfig, total_steps: int) -> None:
        self.module, self.config = module, config
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("expected a pair with parameters to train, got none that requires a gradient")
        self.optimizer = make_optimizer(self.parameters, config)
        self.schedule = LambdaLR(self.optimizer, lambda step: learning_rate_factor(step, config, total_steps))
        self.average = None
        if config.ema is not None:
            self.average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        self._norm: Tensor | None = None

    @property
    def model(self) -> Any:
        """The module with averaged weights where ``ema`` is given, else the stepped one."""
        return self.module if self.average is None else self.average.module

    def clear(self) -> None:
        """Forgets the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, after summing it over processes: a scalar."""
        sum_gradients(self.parameters)
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return self._norm

    def step(self) -> None:
        """One step along the gradient, scaled down to norm ``gradient_clip`` where that is given and it is larger."""
        if self.config.gradient_clip is not None and self._norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.gradient_clip, self._norm)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.module)

    def state(self) -> dict[str, Any]:
        """Everything that later steps depend on, the weights included."""
        return {
            "weights": dict(self.module.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "average": None if self.average is None else dict(self.average.state_dict()),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes back to a state.

        Raises:
            ValueError: it is the state of another module.
        """
        try:
            self.module.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict({**state["schedule"], "lr_lambdas": [None]})
            if self.average is not None:
                self.average.load_state_dict(state["average"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(str(error).splitlines()[-1].strip()) from error


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> Optimizer:
    """Adam (Kingma and Ba 2014, arXiv:1412.6980) or AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101)."""
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def learning_rate_factor(step: int, config: TrainConfig, total_steps: int) -> float:
    """Learning rate at a step over its nominal value: a linear rise over ``warmup_steps``, then the chosen shape.

    Args:
        step: steps done before, from 0.
        config: with ``schedule`` and ``warmup_steps``.
        total_steps: of the whole run.

    Example:
        >>> learning_rate_factor(50, TrainConfig(schedule="cosine"), total_steps=100)
        0.5
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "linear":
        return 1 - done
    if config.schedule == "exponential":
        return LAST_FACTOR_EXPONENTIAL**done
    return 1.0
