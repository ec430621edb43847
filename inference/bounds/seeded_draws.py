"""Draws that do not depend on how many are made at a time: every row of a batch of laws has a random stream of its own.

A Normal is loc + scale * eps with eps from the row's stream; a categorical is argmax_k (logits_k - log e_k) with standard
exponential e_k (the Gumbel-max trick). So the draw of a row is a function of the row's seed and of its law alone, whatever
the chunk it is in.

The one constraint: laws that are drawn from are independent Normals or Categoricals, which is what the processes of this
library return. Laws that are only evaluated, such as a reverse step of one's own, may be any.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.bounds.closed_forms import KNOWN_LAWS
from inference.bounds.sites import base_law

__all__ = ["Streams", "row_seeds", "widened"]


def row_seeds(seed: int, place: Sequence[int], count: int) -> list[int]:
    """``count`` seeds for the rows at one place; the first ones do not depend on ``count``.

    Example:
        >>> row_seeds(0, (3,), 5)[:2] == row_seeds(0, (3,), 2), row_seeds(0, (3,), 2) == row_seeds(0, (4,), 2)
        (True, False)
    """
    state = np.random.SeedSequence(seed, spawn_key=tuple(place)).generate_state(count, np.uint64)
    return [int(word) >> 1 for word in state]


class Streams:
    """One random stream per row; each draw goes on where the one before ended.

    Args:
        seeds: of the rows, nested as the rows are: ``seeds[i][j]`` is that of row (i, j).
        device: where the draws are made. The same seeds give other numbers on another kind of device.

    Example:
        >>> law = dist.Normal(torch.zeros(2, 3, 5), 1.0).to_event(1)
        >>> together = Streams([[1, 2, 3], [4, 5, 6]], "cpu").draw(law)
        >>> alone = Streams([[6]], "cpu").draw(dist.Normal(torch.zeros(1, 1, 5), 1.0).to_event(1))
        >>> bool((together[1, 2] == alone[0, 0]).all())
        True
    """

    def __init__(self, seeds: Sequence[Sequence[int]], device: torch.device | str) -> None:
        self._rows = [[torch.Generator(device).manual_seed(seed) for seed in row] for row in seeds]

    def draw(self, law: dist.TorchDistribution) -> Tensor:
        """One draw of a law whose batch shape begins with the rows' two dims.

        Raises:
            TypeError: a law that is neither an independent Normal nor an independent Categorical.
        """
        base = base_law(law)
        if _is_plain(base, torch.distributions.Normal):
            noise = torch.empty(base.batch_shape, dtype=base.loc.dtype, device=base.loc.device)
            for i, row in enumerate(self._rows):
                for j, generator in enumerate(row):
                    noise[i, j].normal_(generator=generator)
            return base.loc + base.scale * noise
        if _is_plain(base, torch.distributions.Categorical):
            noise = torch.empty(base.logits.shape, dtype=base.logits.dtype, device=base.logits.device)
            for i, row in enumerate(self._rows):
                for j, generator in enumerate(row):
                    noise[i, j].exponential_(generator=generator)
            return (base.logits - noise.log()).argmax(-1)
        raise _unknown(base)


def widened(law: dist.TorchDistribution) -> dist.TorchDistribution:
    """The same law with parameters in float64, so that differences of close log-densities keep their digits.

    A law that is no plain Normal or Categorical is copied, with all its tensors widened.

    Example:
        >>> widened(dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1)).mean.dtype
        torch.float64
    """
    base = base_law(law)
    if _is_plain(base, torch.distributions.Normal):
        wide: dist.TorchDistribution = dist.Normal(base.loc.double(), base.scale.double())
    elif _is_plain(base, torch.distributions.Categorical):
        wide = dist.Categorical(logits=base.logits.double())
    else:
        return _wide_copy(law)
    return wide.to_event(len(law.event_shape))


def _is_plain(law: object, kind: type) -> bool:
    """Whether a law is of that kind and has its density, not one of a user's subclass of it."""
    return isinstance(law, kind) and type(law).log_prob.__module__.startswith((*KNOWN_LAWS, "ppl_models."))  # type: ignore[attr-defined]


def _wide_copy(value: Any) -> Any:
    """A copy of a law with the tensors that it, its parts and its transforms hold in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)([_wide_copy(each) for each in value])
    if isinstance(value, torch.distributions.Distribution | torch.distributions.Transform):
        wide = copy.copy(value)
        for name, part in vars(value).items():
            if isinstance(
                part, Tensor | list | tuple | torch.distributions.Distribution | torch.distributions.Transform
            ):
                wide.__dict__[name] = _wide_copy(part)
        return wide
    return value


def _unknown(law: object) -> TypeError:
    return TypeError(
        f"expected an independent Normal or Categorical, got {type(law).__name__}: the process q is made of these two"
    )
