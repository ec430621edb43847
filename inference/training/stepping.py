"""A training step's losses: by the loss as it is, or by its compiled graph where that pays.

Compiling costs from seconds to a minute, so "auto" compiles runs that win it back: of :data:`CPU_STEPS` steps and more, or
:data:`CUDA_STEPS` on a GPU, in one process; several, which would each compile the same, do so only if asked to. The
decision hangs on the configuration and never on a clock, and only batches of the full size are compiled, so that a resumed
run takes the very steps it would have taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inference.training.compilation import CompiledObjective, compile_objective
from inference.training.config import ConfigError, TrainConfig
from inference.training.flat_graph import InPlaceError
from inference.training.objectives import TrainingStep
from inference.training.program_checks import check_programs
from inference.training.traceability import NotTraceableError
from ppl_models.diffusion import Diffusion

CPU_STEPS, CUDA_STEPS = 40_000, 5_000
BACKEND = "inductor"


class Stepper:
    """``loss.step``, compiled for full batches where the configuration asks for it or the run is long.

    Args:
        loss: from :func:`inference.training.objective_choice.make_loss`.
        config: its ``compile`` decides.
        total_steps: of the whole run.
        full_batch: how many data this process has in a full batch.
        device: where the run computes.
        say: shows a sentence.
        warn: the same, of what runs uncompiled though compiling was meant; seen also where nothing else is shown.
    """

    def __init__(
        self,
        loss: Any,
        config: TrainConfig,
        total_steps: int,
        full_batch: int,
        device: torch.device,
        say: Callable[[str], None],
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.loss, self.full_batch, self.say, self.warn = loss, full_batch, say, warn or say
        self.required = config.compile == "on"
        enough = CUDA_STEPS if device.type == "cuda" else CPU_STEPS
        long = total_steps >= enough and config.processes == 1
        self.wanted = self.required or (config.compile == "auto" and long)
        self.fast: CompiledObjective | None = None
        self.reason = self._reason(config, total_steps, enough)
        self._announced = self._said_partial = False

    def __call__(self, x: Tensor) -> Any:
        """The objective and the terms of a batch, see :class:`TrainingStep`.

        Raises:
            ConfigError: a loss that cannot be compiled, with ``compile="on"``.
            PairError: at the first call, a parameter that the pair does not hold, or a site with a scale.
        """
        if not self._announced:
            self._announced = True
            if self.reason:
                self.say(self.reason)
            if not isinstance(self.loss.pair, Diffusion):  # whose programs are T network calls, and its own
                check_programs(self.loss.pair, x)
        if not self.wanted:
            return self.loss.step(x)
        if len(x) != self.full_batch:
            if not self._said_partial:
                self._said_partial = True
                self.warn(f"batches of {len(x)}, the last of an epoch, run uncompiled")
            return self.loss.step(x)
        if self.fast is None:
            self._compile(x)
            if self.fast is None:
                return self.loss.step(x)
        return TrainingStep(*self.fast(x))

    def _reason(self, config: TrainConfig, total_steps: int, enough: int) -> str:
        """Why a run is not compiled, in a few words; empty where it is, or was asked not to be."""
        if self.wanted or config.compile == "off":
            return ""
        why = (
            f"{total_steps:,} steps, and compiling pays from {enough:,}"
            if total_steps < enough
            else "several processes"
        )
        return f"uncompiled: {why}; compile=on compiles all the same"

    def _compile(self, x: Tensor) -> None:
        self.say("compiling the objective; compile=off does without")
        try:
            self.fast = compile_objective(self.loss, x, method="step", backend=BACKEND)
        except Exception as error:  # what cannot be compiled can still be trained
            if self.required and isinstance(error, (NotTraceableError, InPlaceError)):
                raise ConfigError(f"compile: {error}; use compile=off") from error
            if self.required:  # a fault of the loss or of the data, which compile=off would not mend
                raise
            self.wanted = False
            self.warn(f"training uncompiled: {error}")
            return
        self.say("; ".join(self.fast.history))
