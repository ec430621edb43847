"""Optimiser, learning-rate schedule and averaged weights of a run, all torch's own."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from inference.training.config import TrainConfig

LAST_FACTOR_EXPONENTIAL = 0.01


def make_optimizer(module: nn.Module, config: TrainConfig) -> Optimizer:
    """Adam or AdamW over all parameters that require gradients."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def make_schedule(optimizer: Optimizer, config: TrainConfig, total_steps: int) -> LambdaLR:
    """The learning rate by step: a linear rise over ``warmup_steps``, then the chosen shape down to the last step."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, config, total_steps))


def learning_rate_factor(step: int, config: TrainConfig, total_steps: int) -> float:
    """Learning rate at a step over its nominal value.

    Example:
        >>> learning_rate_factor(50, TrainConfig(schedule="cosine"), total_steps=100)
        0.5
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    if config.schedule == "cosine":
        return round(0.5 * (1 + math.cos(math.pi * done)), 15)
    if config.schedule == "linear":
        return 1 - done
    if config.schedule == "exponential":
        return LAST_FACTOR_EXPONENTIAL**done
    return 1.0


def make_average(module: nn.Module, config: TrainConfig) -> AveragedModel | None:
    """Exponentially averaged weights and buffers, or None without ``ema``."""
    if config.ema is None:
        return None
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
