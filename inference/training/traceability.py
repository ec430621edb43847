"""Whether a flat graph stands for a loss: why it cannot be traced, or in what it differs.

A graph is right where it gives the loss's values, buffers and gradient on the same draws. That is checked once for each
graph, by seeding torch's generator alike; so counters in Python and the like are found out. Noise from elsewhere, which might
pass by chance, is looked for: Python's and numpy's global generators must not have moved, and no draw of torch's may have a
generator of its own.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from inference.training.flat_graph import without_autocast

__all__ = [
    "NotTraceableError",
    "check_same",
    "explain",
    "gradients_of_sum",
    "own_attributes_kept",
    "python_noise_refused",
]

_REASONS = {
    "DataDependentOutputException": "it reads a tensor's value",
    "GuardOnDataDependentSymNode": "it reads a tensor's value",
    "DynamicOutputShapeException": "it makes a tensor whose shape depends on the data",
}
_UNREGISTERED = "Please convert all Tensors to FakeTensors first"
_REMEDY = "write it with torch.where, masks and registered buffers, or train it uncompiled"


class NotTraceableError(ValueError):
    """A loss that no flat graph can stand for; the message says where and why."""


def gradients_of_sum(values: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of v_1 + 2 v_2 + ..., the differentiable values; None for a tensor that has no part in them.

    With weights that differ, for an objective and the terms that it is minus the sum of would cancel.
    """
    reached = [value for value in values if value.requires_grad]
    if not reached:
        return []
    with without_autocast(reached[0].device.type):
        weights = [torch.full_like(value, float(i)) for i, value in enumerate(reached, 1)]
        return list(torch.autograd.grad(reached, list(wanted), weights, allow_unused=True))


def check_same(what: str, found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Refuses tensors that differ by more than rounding does, on the scale of the largest of them.

    Raises:
        NotTraceableError: they differ; ``what`` they are is in the message.
    """
    largest = max([0.0, *(_largest(tensor) for tensor in expected if tensor is not None)])
    for a, b in zip(found, expected, strict=True):
        if a is None and b is None:
            continue
        if a is None or b is None or not _close(a.detach(), b.detach(), largest):
            raise NotTraceableError(
                f"expected a loss whose flat graph repeats it on the same draws, but a {what} differs: something other than "
                f"parameters, buffers, data and torch's random numbers has a say; {_REMEDY}"
            )


def explain(error: Exception) -> str:
    """Why a loss cannot be traced, and the line of the program that is to blame."""
    own = [Path(__file__).with_name(name) for name in ("compilation.py", "flat_graph.py", "module_state.py")]
    foreign = tuple(str(path) for path in (*map(_folder, (torch, pyro)), *own))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(foreign)]
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    text = " ".join(str(error).split())
    if text.startswith(_UNREGISTERED):
        reason = "it uses a tensor that is neither its argument nor a registered parameter or buffer"
        return (
            f"expected a loss that can be traced, but{where} {reason}: register it with the pair, as an nn.Parameter or buffer "
            "(pyro.param and PyroParam keep theirs in Pyro's store), or train it uncompiled"
        )
    else:
        reason = _REASONS.get(type(error).__name__) or f"tracing fails ({text[:200]})"
    return f"expected a loss that can be traced, but{where} {reason}: {_REMEDY}"


@contextmanager
def python_noise_refused() -> Iterator[None]:
    """Raises NotTraceableError where Python's or numpy's generator is drawn from inside, and puts it back."""
    python, legacy = random.getstate(), np.random.get_state()
    yield
    names = []
    if random.getstate() != python:
        names.append("random")
        random.setstate(python)
    if not all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), legacy, strict=True)):
        names.append("numpy.random")
        np.random.set_state(legacy)
    if names:
        raise NotTraceableError(
            f"expected a loss whose noise is torch's, but it draws from {' and '.join(names)}, which a graph would freeze: "
            "draw with torch, or train it uncompiled"
        )


@contextmanager
def own_attributes_kept(module: nn.Module) -> Iterator[None]:
    """Raises NotTraceableError where a module inside has kept a traced tensor as an attribute, which is put back.

    What a transform of a normalising flow keeps is its own cache of the draw that it made last: it is put back, and no reason
    to refuse, for a graph makes each draw anew.
    """
    before = [(m, {key: v for key, v in vars(m).items() if isinstance(v, Tensor)}) for m in module.modules()]
    names = []
    try:
        yield
    finally:
        for m, tensors in before:
            for key in [key for key, value in vars(m).items() if isinstance(value, FakeTensor)]:
                if not isinstance(m, torch.distributions.Transform):
                    names.append(f"{type(m).__name__}.{key}")
                if key in tensors:
                    vars(m)[key] = tensors[key]
                else:
                    del vars(m)[key]
    if names:
        raise NotTraceableError(
            f"expected a loss that keeps no tensors on its modules, but it sets {', '.join(names)}, which a graph would never "
            "renew: return the tensor, register a buffer and copy_ into it, or train it uncompiled"
        )


def _folder(package: object) -> Path:
    return Path(str(package.__file__)).parent  # type: ignore[attr-defined]


def _largest(tensor: Tensor) -> float:
    finite = tensor.detach()[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _close(a: Tensor, b: Tensor, largest: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    if torch.is_autocast_enabled(a.device.type):  # sums in half precision, in another order
        tolerance = max(tolerance, torch.finfo(torch.get_autocast_dtype(a.device.type)).eps)
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
