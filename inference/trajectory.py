"""What sampling returns: samples, what was kept on the way down to them, and in words which law they come from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Trajectory", "joined"]


@dataclass(frozen=True)
class Trajectory:
    """Samples, and what was kept on the way down to them.

    Attributes:
        x_0: the samples, ``[N, *data_shape]``.
        states: x_t by t, for the t asked for; t as in the pair, also if respaced.
        predictions: x_0-hat(x_t, t) by t, before any clipping, for those of them with t >= 1.
        timesteps: the t that were visited, falling, 0 included; empty for a pair that is no diffusion.
        eta: as given.
        clip: the range that x_0-hat was clamped to, or None.
        clipped: by t, the share of the entries of x_0-hat that the clamp moved.
    """

    x_0: Tensor
    states: dict[int, Tensor] = field(default_factory=dict)
    predictions: dict[int, Tensor] = field(default_factory=dict)
    timesteps: tuple[int, ...] = ()
    eta: float = 1.0
    clip: tuple[float, float] | None = None
    clipped: dict[int, float] = field(default_factory=dict)

    @property
    def law(self) -> str:
        """In a sentence, which law the samples come from."""
        changes = []
        if self.timesteps and self.timesteps != tuple(range(self.timesteps[0], -1, -1)):
            changes.append(f"respaced to {len(self.timesteps) - 1} of {self.timesteps[0]} steps")
        if self.eta != 1:
            changes.append(f"DDIM with eta = {self.eta:g}")
        if self.clip is not None:
            worst = max(self.clipped.values(), default=0.0)
            low, high = self.clip
            changes.append(f"x_0-hat clipped to [{low:g}, {high:g}], {100 * worst:.3g} % of it at most")
        return "the model's own law" if not changes else "not the model's own law: " + ", ".join(changes)


def joined(runs: list[Trajectory], counts: list[int]) -> Trajectory:
    """The batches, of ``counts`` samples each, as one trajectory."""
    first = runs[0]
    if len(runs) == 1:
        return first
    total = sum(counts)
    return Trajectory(
        torch.cat([run.x_0 for run in runs]),
        {t: torch.cat([run.states[t] for run in runs]) for t in first.states},
        {t: torch.cat([run.predictions[t] for run in runs]) for t in first.predictions},
        first.timesteps,
        first.eta,
        first.clip,
        {t: sum(run.clipped[t] * n for run, n in zip(runs, counts, strict=True)) / total for t in first.clipped},
    )
