r"""One batch on its way from x_T to x_0, and the options that say which way: steps, eta, clip, keep.

The laws are those of :mod:`inference.ancestral`, which this serves. The one constraint is its shape: a step is one call of
the network and one of :meth:`_Walk.step`, which ``torch.compile`` leaves alone, so that a compiled sampler is one graph,
the network's, used at every t. What lies between is a few operations on one state, with numbers that change from t to t.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from inference.bounds.sites import NotANumberError
from inference.generated import generate
from inference.progress import Progress
from inference.respacing import respaced
from inference.trajectory import Trajectory
from inference.uncompiled import left_alone
from ppl_models.arguments import whole_number, whole_numbers
from ppl_models.ddpm import DDPM
from ppl_models.diffusion import Diffusion
from ppl_models.pair import ModelGuidePair

__all__ = ["make_chain"]


class _Whole:
    """A pair that is no diffusion: its model, run forward."""

    length = 1

    def __init__(self, pair: ModelGuidePair) -> None:
        self.pair = pair

    @left_alone
    def run(self, count: int, progress: Progress) -> Trajectory:
        x = generate(self.pair, count)[1]
        progress.advance()
        return Trajectory(x)


class _Chain:
    """A diffusion's chain, step by step; ``timesteps`` are the fine chain's t_1 < t_2 < ... of the steps of ``pair``."""

    def __init__(
        self,
        pair: Diffusion,
        timesteps: Sequence[int],
        eta: float,
        clip: tuple[float, float] | None,
        keep: Sequence[int],
    ) -> None:
        self.pair, self.timesteps = pair, (0, *timesteps)
        self.eta, self.clip, self.keep = eta, clip, frozenset(keep)
        self.length = len(timesteps)

    def run(self, count: int, progress: Progress) -> Trajectory:
        """One batch from x_T to x_0."""
        walk = _begin(self, count, progress)
        while walk.i > 0:
            walk.step(self.pair.denoise(walk.x_t, walk.t))
        return walk.end()

    def down(self, output: Tensor, x_t: Tensor, t: Tensor, i: int) -> Tensor:
        """x_{t-1} given x_t, t >= 2; i is t as a number."""
        if self.eta == 1 and self.clip is None:
            return self.pair.draw_previous(output, x_t, i)
        process: Any = self.pair.process
        x_0 = self.pair.predict_x_0(output, x_t, t)
        if self.clip is not None:
            x_0 = x_0.clamp(*self.clip)
        if self.eta == 1:
            own = self.pair.reverse_law(output, x_t, t)
            return dist.Normal(process.posterior_mean(x_t, x_0, t), own.base_dist.scale)()
        c = {
            name: process.coefficient(name, t, x_t)
            for name in ("posterior_variance", "marginal_variance", "marginal_variance_previous", "alpha_bar_previous")
        }
        variance = self.eta**2 * c["posterior_variance"]
        eps = (x_t - process.coefficient("sqrt_alpha_bar", t, x_t) * x_0) / c["marginal_variance"].sqrt()
        mean = c["alpha_bar_previous"].sqrt() * x_0 + (c["marginal_variance_previous"] - variance).sqrt() * eps
        return mean if self.eta == 0 else dist.Normal(mean, variance.sqrt().expand_as(mean))()

    def last(self, output: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        """x_0 given the chain's last latent."""
        if self.eta == 1 and self.clip is None:
            return self.pair.reconstruction_law(output, x_1)()
        x_0 = self.pair.predict_x_0(output, x_1, t)
        if self.clip is not None:
            x_0 = x_0.clamp(*self.clip)
        pair: Any = self.pair
        return pair.reconstruction_at(x_0, output, x_1)() if self.eta == 1 else x_0


class _Walk:
    """Where a batch is: x_t, t as a tensor of one entry and as a number i; and what was kept."""

    def __init__(self, chain: _Chain, count: int, progress: Progress) -> None:
        self.chain, self.progress = chain, progress
        self.states: dict[int, Tensor] = {}
        self.predictions: dict[int, Tensor] = {}
        self.clipped: dict[int, Tensor] = {}
        self.x_t = chain.pair.process.prior().expand((count,))()
        self._at(chain.length)

    def _at(self, i: int) -> None:
        self.i = i
        self.t = torch.full((1,), i, device=self.x_t.device)  # one dim: a number would be read back to index tables

    @left_alone
    def step(self, output: Tensor) -> None:
        """From x_t to x_{t-1}, given the network's output there."""
        chain, x_t, t = self.chain, self.x_t, self.t
        if dist.is_validation_enabled() and bool(output.isnan().any()):
            raise NotANumberError(
                f"expected a finite output of the network, got NaN at step {chain.timesteps[self.i]}: look at its training"
            )
        fine = chain.timesteps[self.i]
        if fine in chain.keep:
            self.states[fine] = x_t
            self.predictions[fine] = chain.pair.predict_x_0(output, x_t, t)
        if chain.clip is not None:
            x_0 = chain.pair.predict_x_0(output, x_t, t)
            self.clipped[fine] = (x_0 != x_0.clamp(*chain.clip)).double().mean()
        self.x_t = chain.down(output, x_t, t, self.i) if self.i > 1 else chain.last(output, x_t, t)
        self._at(self.i - 1)
        self.progress.advance()

    @left_alone
    def end(self) -> Trajectory:
        """At x_0: what there is to return."""
        chain = self.chain
        if 0 in chain.keep:
            self.states[0] = self.x_t
        shares = {step: float(share) for step, share in self.clipped.items()}
        return Trajectory(self.x_t, self.states, self.predictions, chain.timesteps[::-1], chain.eta, chain.clip, shares)


@left_alone
def _begin(chain: _Chain, count: int, progress: Progress) -> _Walk:
    """At x_T, a draw from the prior."""
    return _Walk(chain, count, progress)


@left_alone
def make_chain(
    pair: ModelGuidePair,
    steps: int | Sequence[int] | None,
    eta: float,
    clip: tuple[float, float] | None,
    keep: Sequence[int],
) -> _Whole | _Chain:
    """The chain to run down, with the options checked."""
    changed = steps is not None or eta != 1 or clip is not None
    if not isinstance(pair, Diffusion):
        if changed or keep:
            raise ValueError(
                f"expected steps, eta, clip and keep with a diffusion only, got a {type(pair).__name__}: leave them out"
            )
        return _Whole(pair)
    if changed and not isinstance(pair, DDPM):
        raise ValueError(
            f"expected steps, eta and clip with a DDPM only, got a {type(pair).__name__}: its law has no Gaussian steps; "
            "leave them out"
        )
    stated = eta
    eta = _number(stated)
    if not 0 <= eta <= 1:
        raise ValueError(f"expected eta in [0, 1], from deterministic to ancestral, got {stated!r}")
    if clip is not None:
        try:
            low, high = (_number(end) for end in clip)
        except (TypeError, ValueError):
            low = high = math.nan
        if not low < high:
            raise ValueError(f"expected clip=(low, high) with low < high, got {clip!r}")
        clip = (low, high)
    timesteps = _timesteps(steps, pair.num_timesteps)
    strangers = sorted(set(whole_numbers("keep", keep)) - {0, *timesteps})
    if strangers:
        raise ValueError(
            f"expected keep among the steps that are visited, 0 and {', '.join(map(str, timesteps[:8]))}"
            f"{', ...' if len(timesteps) > 8 else ''}, got {strangers}"
        )
    coarse = pair if steps is None else respaced(pair, timesteps)  # type: ignore[arg-type]
    return _Chain(coarse, timesteps, eta, clip, keep)


def _number(value: Any) -> float:
    """A number as a float, of numpy or torch, too; anything else as NaN."""
    try:
        return math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _timesteps(steps: int | Sequence[int] | None, last: int) -> list[int]:
    """The t that are visited, rising."""
    if steps is None:
        return list(range(1, last + 1))
    if not isinstance(steps, Iterable) or getattr(steps, "ndim", 1) == 0:
        steps = whole_number("steps", steps)
        if not 1 <= steps <= last:
            raise ValueError(f"expected between 1 and T = {last} steps, got {steps}")
        return [last] if steps == 1 else torch.linspace(1, last, steps, dtype=torch.float64).round().long().tolist()
    chosen = sorted(whole_numbers("steps", steps))
    if not chosen or chosen[-1] != last or chosen[0] < 1 or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"expected steps as a number or as distinct timesteps in 1..{last} with {last} among them, where the prior is, "
            f"got {chosen}"
        )
    return chosen
