"""Random streams of a run: each place of a run (epoch, batch, process, ...) has a seed of its own.

A stream is a function of the run's seed and of its place, never of what was drawn before: the same after a resume, and
independent from place to place.

The one constraint: what is seeded are torch's default generators, so callers restore them (`forked_rng`).
"""

from __future__ import annotations

import numpy as np
import torch

VALIDATION, TRAINING, BINARIZATION = 1, 2, 3  # what a stream is for


def noise_seed(seed: int, *place: int) -> int:
    """A 63-bit seed for one place of a run.

    Example:
        >>> noise_seed(0, TRAINING, 1, 2) == noise_seed(0, TRAINING, 1, 2), noise_seed(0, 1) == noise_seed(0, 2)
        (True, False)
    """
    return int(np.random.SeedSequence(seed, spawn_key=place).generate_state(1, np.uint64)[0]) >> 1


def seed_noise(seed: int, device: torch.device) -> None:
    """Seeds the default generators of the CPU and of one device.

    ``torch.manual_seed`` also does it for accelerators that are not in use, which costs more than a small step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
