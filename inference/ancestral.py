r"""Ancestral sampling: down the generative chain, from p(x_T) to x_0, with one network call a step.

    x_T ~ p(x_T),    x_{t-1} ~ p(x_{t-1} | x_t) for t = T..2,    x_0 ~ p(x_0 | x_1)

which for a DDPM is the notes' update (003; 004's with its bars corrected)

    x_{t-1} = (x_t - beta_t / sqrt(1 - alpha-bar_t) eps(x_t, t)) / sqrt(alpha_t) + sigma_t z
            = A_t x_t + B_t x_0-hat + sigma_t z.

These are the draws of ``pair.model()`` run forward: the same noise gives the same numbers. Three departures from it, for
Gaussian diffusions, each of them another law than the model's:

- *respaced*: a sub-sequence of the steps, with the posterior of that coarser chain (:mod:`inference.respacing`).
- *eta* < 1 (Song et al. 2021, *Denoising Diffusion Implicit Models*, arXiv:2010.02502, eqs. 12 and 16): with
  s^2 = eta^2 beta-tilde_t,  x_{t-1} = sqrt(alpha-bar_{t-1}) x_0-hat + sqrt(1 - alpha-bar_{t-1} - s^2) eps-hat + s z,
  and x_0 = x_0-hat(x_1, 1) at the end: no draw, and not rounded to a grid. eta = 0 is deterministic given x_T; eta = 1 is the
  pair's own reverse law, with its own variance.
- *clip*: x_0-hat is clamped to a range before each step down to x_1. The result says so.

The one constraint: memory holds one state of the chain, and what ``keep`` asks for, whatever T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from inference.bounds.particles import forked_rng
from inference.progress import Progress
from inference.respacing import respaced
from inference.training.noise import noise_seed, seed_noise
from ppl_models.ddpm import DDPM
from ppl_models.diffusion import Diffusion
from ppl_models.pair import ModelGuidePair
from ppl_models.processes import GaussianProcess

__all__ = ["Interpolation", "Trajectory", "ancestral_sample", "ancestral_trajectory", "interpolation"]


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


def ancestral_sample(
    pair: ModelGuidePair,
    num_samples: int,
    steps: int | Sequence[int] | None = None,
    *,
    eta: float = 1.0,
    clip: tuple[float, float] | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Draws data from a pair, ``[num_samples, *data_shape]``: the x_0 of :func:`ancestral_trajectory`.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> ancestral_sample(LinearGaussian.random(data_dim=3, latent_dim=2), 4, seed=0).shape
        torch.Size([4, 3])
    """
    return ancestral_trajectory(pair, num_samples, steps, eta=eta, clip=clip, seed=seed, batch_size=batch_size).x_0


def ancestral_trajectory(
    pair: ModelGuidePair,
    num_samples: int,
    steps: int | Sequence[int] | None = None,
    *,
    eta: float = 1.0,
    clip: tuple[float, float] | None = None,
    keep: Sequence[int] = (),
    seed: int | None = None,
    batch_size: int | None = None,
) -> Trajectory:
    """Draws data from a pair, and keeps what it went through at chosen t.

    The networks are in evaluation mode for the time of the call, without gradients.

    Args:
        pair: any pair; ``steps``, ``eta``, ``clip`` and ``keep`` are for diffusions, all but ``keep`` for Gaussian ones.
        num_samples: N.
        steps: how many steps to take, spread evenly over 1..T with T among them, or the timesteps themselves, each in
            1..T and T among them; None: all.
        eta: in [0, 1]; see the module.
        clip: (low, high) for x_0-hat, such as (-1, 1); None: the model as it is.
        keep: which t in 0..T to keep x_t and x_0-hat of.
        seed: of the draws, the caller's random state being restored; None goes on with torch's generators.
        batch_size: samples at a time; None: all at once. The samples depend on it, their law does not.

    Returns:
        :class:`Trajectory`; its ``law`` says in a sentence what the samples were drawn from.

    Raises:
        ValueError: counts below one, ``steps`` or ``keep`` outside the chain, eta outside [0, 1], a range that is empty; or an
            option that the pair has no meaning for.

    Example:
        >>> from ppl_models.likelihoods import Normal
        >>> from ppl_models.processes import NoiseSchedule
        >>> class Zero(torch.nn.Module):
        ...     def forward(self, x_t, t):
        ...         return 0 * x_t
        >>> ddpm = DDPM(Zero(), NoiseSchedule.cosine(50), data_shape=(2,), likelihood=Normal())
        >>> run = ancestral_trajectory(ddpm, 3, steps=5, eta=0.0, keep=[50, 1], seed=0)
        >>> run.timesteps, sorted(run.states), run.law
        ((50, 38, 26, 13, 1, 0), [1, 50], "not the model's own law: respaced to 5 of 50 steps, DDIM with eta = 0")
    """
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"expected a whole {name} >= 1, got {value!r}")
    chain = _chain(pair, steps, eta, clip, keep)
    counts = [len(part) for part in torch.arange(num_samples).split(batch_size or num_samples)]
    device = next(pair.parameters(), torch.empty(0)).device
    modes = [(module, module.training) for module in pair.modules()]
    pair.eval()
    runs = []
    try:
        with torch.no_grad(), Progress("sampling", len(counts) * chain.length, unit="steps") as progress:
            for b, count in enumerate(counts):
                if seed is None:
                    runs.append(chain.run(count, progress))
                else:
                    with forked_rng():
                        seed_noise(noise_seed(seed, b), device)
                        runs.append(chain.run(count, progress))
    finally:
        for module, mode in modes:
            module.training = mode
    return _joined(runs, counts)


@dataclass(frozen=True)
class Interpolation:
    """The update as an interpolation, x_{t-1} = A_t x_t + B_t x_0-hat + s_t z (notes 004), for t = 1..T.

    A_t and B_t are the weights of the posterior mean mu-tilde_t, s_t^2 = beta-tilde_t. In the letters of 004, whose alpha is
    the square root of this one's, A = 1/alpha - (1 - alpha^2) / (alpha (1 - alpha-bar^2)) and
    B = (1 - alpha^2) alpha-bar / (alpha (1 - alpha-bar^2)); its printed bars are slips.

    Attributes:
        t: 1..T.
        x_t: A_t, ``[T]`` float64; 0 at t = 1.
        x_0: B_t; 1 at t = 1.
        noise: s_t; 0 at t = 1.
    """

    t: Tensor
    x_t: Tensor
    x_0: Tensor
    noise: Tensor


def interpolation(process: GaussianProcess) -> Interpolation:
    """The weights of x_t, of x_0-hat and of the noise in each step.

    Example:
        >>> from ppl_models.processes import NoiseSchedule
        >>> weights = interpolation(GaussianProcess(NoiseSchedule.from_betas([0.1, 0.5]), ()))
        >>> [round(w, 3) for w in weights.x_t.tolist()], [round(w, 3) for w in weights.x_0.tolist()]
        ([0.0, 0.129], [1.0, 0.862])
    """
    schedule = process.schedule
    return Interpolation(
        torch.arange(1, schedule.num_timesteps + 1),
        schedule.posterior_weight_x_t,
        schedule.posterior_weight_x_0,
        schedule.posterior_variance.sqrt(),
    )


class _Whole:
    """A pair that is no diffusion: its model, run forward."""

    length = 1

    def __init__(self, pair: ModelGuidePair) -> None:
        self.pair = pair

    def run(self, count: int, progress: Progress) -> Trajectory:
        x = self.pair.model(size=count)
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
        states: dict[int, Tensor] = {}
        predictions: dict[int, Tensor] = {}
        clipped: dict[int, Tensor] = {}
        x_t = self.pair.process.prior().expand((count,))()
        for i in range(self.length, 0, -1):
            fine = self.timesteps[i]
            t = torch.full(
                (1,), i, device=x_t.device
            )  # of one dim, so that no table is indexed by a number on the host
            output = self.pair.denoise(x_t, t)
            if fine in self.keep:
                states[fine] = x_t
                predictions[fine] = self.pair.predict_x_0(output, x_t, t)
            if self.clip is not None and i > 1:
                x_0 = self.pair.predict_x_0(output, x_t, t)
                clipped[fine] = (x_0 != x_0.clamp(*self.clip)).double().mean()
            x_t = self._down(output, x_t, t, i) if i > 1 else self._last(output, x_t, t)
            progress.advance()
        if 0 in self.keep:
            states[0] = x_t
        shares = {step: float(share) for step, share in clipped.items()}
        return Trajectory(x_t, states, predictions, self.timesteps[::-1], self.eta, self.clip, shares)

    def _down(self, output: Tensor, x_t: Tensor, t: Tensor, i: int) -> Tensor:
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

    def _last(self, output: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        """x_0 given the chain's last latent."""
        if self.eta == 1:
            return self.pair.reconstruction_law(output, x_1)()
        x_0 = self.pair.predict_x_0(output, x_1, t)
        return x_0 if self.clip is None else x_0.clamp(*self.clip)


def _chain(
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
    if not 0 <= eta <= 1:
        raise ValueError(f"expected eta in [0, 1], from deterministic to ancestral, got {eta}")
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"expected clip=(low, high) with low < high, got {clip}")
    timesteps = _timesteps(steps, pair.num_timesteps)
    strangers = sorted(set(keep) - {0, *timesteps})
    if strangers:
        raise ValueError(
            f"expected keep among the steps that are visited, 0 and {', '.join(map(str, timesteps[:8]))}"
            f"{', ...' if len(timesteps) > 8 else ''}, got {strangers}"
        )
    coarse = pair if steps is None else respaced(pair, timesteps)  # type: ignore[arg-type]
    return _Chain(coarse, timesteps, eta, clip, keep)


def _timesteps(steps: int | Sequence[int] | None, last: int) -> list[int]:
    """The t that are visited, rising."""
    if steps is None:
        return list(range(1, last + 1))
    if isinstance(steps, int):
        if not 1 <= steps <= last:
            raise ValueError(f"expected between 1 and T = {last} steps, got {steps}")
        return [last] if steps == 1 else torch.linspace(1, last, steps, dtype=torch.float64).round().long().tolist()
    chosen = sorted(int(t) for t in steps)
    if not chosen or chosen[-1] != last or chosen[0] < 1 or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"expected steps as a number or as distinct timesteps in 1..{last} with {last} among them, where the prior is, "
            f"got {list(steps)}"
        )
    return chosen


def _joined(runs: list[Trajectory], counts: list[int]) -> Trajectory:
    """The batches as one trajectory."""
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
