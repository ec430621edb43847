r"""What all likelihoods are: a law of x made of what a decoder returns, with what belongs to x alone.

A likelihood says which data are valid (`check`), how they must be scaled before (`scaling`), which number a picture shows
(`mean`) and, where it is learned, holds the scale shared by all dimensions. The laws are in :mod:`ppl_models.likelihoods`.

Convention: parameters have shape ``[*particles, B, *data_shape]`` (a class axis last for classes), and the distribution's
event is one whole datum, so `log_prob` returns nats per datum, shape ``[*particles, B]``. Parameters in half precision are
widened to float32 first: a sum of log-probabilities over pixels needs it.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.networks.precision import at_least_float32

__all__ = [
    "Likelihood",
    "LocationScale",
    "Parameters",
    "check_dims",
    "known_likelihood",
    "log_positive",
    "single_tensor",
    "value_and_scale",
]

_DEFAULT_INIT_SCALE = 0.1

Parameters = Tensor | tuple[Tensor, Tensor]


class Likelihood(nn.Module, ABC):
    """Decoder output -> distribution of one datum. Subclasses say which; all are called alike.

    Attributes:
        scaling: the data scaling it expects: "none" (any reals), "unit" (in [0, 1]), "symmetric" (in [-1, 1]),
            "classes" (class indices) or "counts" (whole numbers >= 0).
        is_discrete: whether x has probabilities (log-likelihoods <= 0, bits per dimension) or densities.
        num_classes: K, size of the last axis of the decoder's output if x is a class index, else None.
        needs_scale: whether the decoder must return (loc, scale) rather than one tensor.
    """

    scaling: ClassVar[str]
    is_discrete: ClassVar[bool]
    num_classes: int | None = None
    needs_scale: bool = False

    @property
    def takes_counts(self) -> bool:
        """Whether x are numbers of things counted."""
        return self.scaling == "counts"

    @abstractmethod
    def forward(self, parameters: Parameters, data_dim: int) -> dist.TorchDistribution:
        """The distribution of x.

        Args:
            parameters: decoder output ``[*batch, *data_shape]``, or a pair of such, or with a class axis.
            data_dim: number of dimensions of one datum, ``len(data_shape)``.

        Returns:
            A Pyro distribution with ``batch_shape = batch`` and ``event_shape = data_shape``.

        Raises:
            TypeError: one tensor where (loc, scale) is expected, or the reverse.
            ValueError: shapes that do not fit.
        """

    @abstractmethod
    def check(self, x: Tensor, name: str = "x") -> None:
        """Refuses data that the distribution gives no probability, before any of it reaches a program.

        Args:
            x: data as the program will see them, any shape.
            name: how to call them in the message.

        Raises:
            ValueError: names the first bad entry, what was expected, and the remedy.
            TypeError: `x` is not a tensor.
        """

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able: ``type(self)(**self.config())`` makes it again, weights aside."""
        return {}

    def extra_repr(self) -> str:
        """The constructor arguments, for ``print(likelihood)``."""
        return ", ".join(f"{key}={value!r}" for key, value in self.config().items())

    def mean(self, parameters: Parameters, data_dim: int) -> Tensor:
        """E[x | parameters] in data units, shape ``[*batch, *data_shape]``: what a picture shows."""
        return self(parameters, data_dim).mean

    def data_shape_of(self, parameters: Parameters) -> torch.Size:
        """Shape of one datum, from decoder output with exactly one leading batch dimension."""
        tensor = parameters[0] if isinstance(parameters, tuple) else parameters
        return tensor.shape[1:]

    def example(self, data_shape: Sequence[int], dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        """One valid datum as a batch, shape ``[1, *data_shape]``, to try shapes with.

        Args:
            data_shape: shape of one datum.
            dtype: floating dtype, torch's default if None; class indices are int64 whatever it is.
            device: where to put it, the CPU if None.
        """
        return torch.zeros(1, *data_shape, dtype=dtype, device=device)


class LocationScale(Likelihood):
    """What `Normal` and `DiscretizedNormal` share: a location from the decoder, a scale from one of three places.

    Attributes:
        scale: the scale in use: a number, "learned" or None.
        scale_stated: False where scale="default", for systems that have a better default of their own
            (:class:`ppl_models.ddpm.DDPM`: the variance of the last step).
    """

    default_scale: ClassVar[float | str]

    def __init__(self, scale: float | str | None, init_scale: float | None) -> None:
        super().__init__()
        self.scale_stated = scale != "default" or init_scale is not None
        scale = self.default_scale if scale == "default" else scale
        self.scale = scale if scale is None or scale == "learned" else _positive("scale", scale)
        self.needs_scale = scale is None
        if self.scale == "learned":
            self.init_scale = _positive("init_scale", _DEFAULT_INIT_SCALE if init_scale is None else init_scale)
            self.log_scale = nn.Parameter(torch.tensor(math.log(self.init_scale)))
        elif init_scale is not None:
            raise ValueError(
                f'expected init_scale only with scale="learned", got scale={scale!r}; leave one of them out'
            )

    def with_given_scale(self) -> LocationScale:
        """The same likelihood with ``scale=None``: the decoder returns (loc, scale)."""
        new = copy.deepcopy(self)
        if "log_scale" in new._parameters:
            del new.log_scale, new.init_scale
        new.scale, new.scale_stated, new.needs_scale = None, True, True
        return new

    def config(self) -> dict[str, Any]:
        """See `Likelihood.config`."""
        if not self.scale_stated:
            return {"scale": "default"}
        return {"scale": self.scale} | ({"init_scale": self.init_scale} if self.scale == "learned" else {})

    def _loc_and_scale(self, parameters: Parameters, data_dim: int) -> tuple[Tensor, Tensor]:
        if self.scale is None:
            loc, scale = value_and_scale(parameters, "(loc, scale)", "scale")
        else:
            loc = single_tensor(
                parameters, "location", "build the likelihood with scale=None to use the decoder's scale"
            )
            # A fixed scale stays a Python number until here, so no dtype or device of its own can fall out of step.
            scale = loc.new_full((), self.scale) if isinstance(self.scale, float) else self.log_scale.exp()
        check_dims(loc, data_dim)
        return loc, scale


def value_and_scale(parameters: Parameters, pair: str, scale_name: str) -> tuple[Tensor, Tensor]:
    """The decoder's two tensors, at least float32, the second broadcastable to the first.

    Args:
        parameters: what the decoder returned.
        pair: what was expected of it, such as "(loc, scale)".
        scale_name: what the second is called, and the likelihood's argument that is None.
    """
    if not (isinstance(parameters, tuple) and len(parameters) == 2):
        raise TypeError(
            f"expected the decoder to return a pair {pair}, as the likelihood has {scale_name}=None, got "
            f"{_describe(parameters)}; return both, or give the likelihood a {scale_name}"
        )
    loc, scale = map(at_least_float32, parameters)
    pairs = zip(scale.shape[::-1], loc.shape[::-1], strict=False)
    if scale.dim() > loc.dim() or any(a not in (1, b) for a, b in pairs):
        first = pair.strip("(").partition(",")[0]
        raise ValueError(
            f"expected {scale_name} to broadcast to the shape of {first}, {list(loc.shape)}, got {list(scale.shape)}; "
            f"return one {scale_name} per entry of {first}, or per datum with trailing ones"
        )
    return loc, scale


def known_likelihood(value: Any) -> Likelihood:
    """``value`` if it is a likelihood.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, Likelihood):
        got = f"the class {value.__name__}" if isinstance(value, type) else repr(value)[:60]
        raise TypeError(f"expected a likelihood such as Normal() or Bernoulli(), got {got}: make one")
    return value


def log_positive(name: str, value: Any) -> float:
    """The log of a positive finite number; ValueError for all else."""
    return math.log(_positive(name, value))


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        also = {"scale": ', "learned", "default" or None', "size": ', "learned" or None'}.get(name, "")
        raise ValueError(f"expected {name} to be a positive finite number{also}, got {value!r}")
    return float(value)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"one tensor of shape {list(value.shape)}"
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__


def single_tensor(parameters: Parameters, what: str, remedy: str) -> Tensor:
    """The decoder's one tensor, at least float32."""
    if not isinstance(parameters, Tensor):
        raise TypeError(f"expected the decoder to return one tensor, the {what}, got {_describe(parameters)}; {remedy}")
    return at_least_float32(parameters)


def check_dims(tensor: Tensor, least: int) -> None:
    """Refuses decoder output of fewer dims than one datum has."""
    if tensor.dim() < least:
        raise ValueError(
            f"expected decoder output with at least {least} dimensions, those of one datum, got shape "
            f"{list(tensor.shape)}; let the decoder end in a reshape to the data's shape"
        )
