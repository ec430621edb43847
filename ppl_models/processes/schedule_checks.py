"""What a noise schedule refuses: numbers that are no variances, and steps that the dtypes in use cannot tell apart.

Convention: entry t - 1 of a table is step t, which is what messages name. Constraint: tables are float64 on the CPU, but are
cast to float32 in use, so none of their entries may vanish there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_num_timesteps", "refuse_out_of_range", "refuse_unusable", "to_table"]

_SMALLEST = torch.finfo(torch.float32).tiny


def to_table(name: str, values: Sequence[float] | Tensor) -> Tensor:
    """[T] float64 on the CPU, a copy."""
    try:
        table = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"expected {name} to be numbers, one per step, got {type(values).__name__} ({error}): pass a list or a tensor"
        ) from error
    if table.dim() != 1 or not len(table):
        raise ValueError(f"expected {name} of shape [T], T >= 1, got {list(table.shape)}: pass one number per step")
    return table


def refuse_out_of_range(symbol: str, table: Tensor, remedy: str) -> None:
    """Raises ValueError unless all entries are in (0, 1), the last in (0, 1], and none too small for float32."""
    inside = (table > 0) & (table < 1)
    inside[-1] |= table[-1] == 1
    if not inside.all():
        t = int((~inside).nonzero()[0]) + 1
        raise ValueError(
            f"expected every {symbol}_t in (0, 1), or 1 at the last step alone, got {symbol}_{t} = {table[t - 1]:.6g}: {remedy}"
        )
    smallest = _SMALLEST if symbol == "beta" else math.sqrt(_SMALLEST)
    if bool((table < smallest).any()):
        t = int((table < smallest).nonzero()[0]) + 1
        raise ValueError(
            f"expected every {symbol}_t >= {smallest:.2g}, below which float32 has no normal variance, got {symbol}_{t} = "
            f"{table[t - 1]:.3g}: leave that step out or make it larger"
        )


def check_num_timesteps(num_timesteps: int) -> None:
    """Raises TypeError or ValueError unless T is an int of at least one."""
    if not isinstance(num_timesteps, int) or isinstance(num_timesteps, bool):
        raise TypeError(
            f"expected num_timesteps to be an int, got {type(num_timesteps).__name__}: pass the number of steps T"
        )
    if num_timesteps < 1:
        raise ValueError(f"expected num_timesteps >= 1, got {num_timesteps}: a diffusion has at least one step")


def refuse_unusable(beta: Tensor, alpha_bar: Tensor, log_alpha_bar: Tensor) -> None:
    """Raises ValueError where a step changes nothing in float64, or leaves less signal than float32 can hold but some."""
    flat = (log_alpha_bar.diff() >= 0).nonzero()
    if len(flat):
        t = int(flat[0]) + 2
        raise ValueError(
            f"expected the signal-to-noise ratio to fall at every step, but beta_{t} = {beta[t - 1]:.3g} does not "
            "change it in float64: leave that step out or make it larger"
        )
    vanished = ((alpha_bar < _SMALLEST) & (log_alpha_bar > -math.inf)).nonzero()
    if len(vanished):
        t = int(vanished[0]) + 1
        raise ValueError(
            f"expected alpha_bar_t >= {_SMALLEST:.2g} (float32's smallest) at every step but an exact zero at T, got "
            f"exp({log_alpha_bar[t - 1]:.4g}) at t = {t}: take fewer steps or smaller betas"
        )
