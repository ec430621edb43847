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
- *clip*: x_0-hat is clamped to a range before each step, the last too, where p(x_0 | x_1) keeps its scale. The result says so.

The one constraint: memory holds one state of the chain, and what ``keep`` asks for, whatever T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.bounds.particles import forked_rng
from inference.progress import Progress
from inference.reverse_chain import make_chain
from inference.training.noise import noise_seed, seed_noise
from inference.trajectory import Trajectory, joined
from ppl_models.arguments import seed_number, whole_count
from ppl_models.evaluation_mode import evaluating
from ppl_models.pair import ModelGuidePair
from ppl_models.processes import GaussianProcess

__all__ = ["Interpolation", "Trajectory", "ancestral_sample", "ancestral_trajectory", "interpolation"]


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
        eta: in [0, 1]; see the module. eta = 1 is the model's own law, and not quite the limit of those below it: only there
            is x_0 drawn from p(x_0 | x_1), which weighs where the first step visited is a long one, and only with
            ``variance="posterior"`` is sigma_t^2 the limit's beta-tilde_t.
        clip: (low, high) for x_0-hat, such as (-1, 1); None: the model as it is.
        keep: which t in 0..T to keep x_t and x_0-hat of.
        seed: of the draws, the caller's random state being restored; None goes on with torch's generators.
        batch_size: samples at a time; None: all at once. The samples depend on it, their law does not.

    Returns:
        :class:`Trajectory`; its ``law`` says in a sentence what the samples were drawn from.

    Raises:
        TypeError: steps, timesteps or a seed that are no whole numbers.
        NotANumberError: under validation, the network returns NaN; the message names the step.
        ValueError: counts below one, ``steps`` or ``keep`` outside the chain, eta outside [0, 1], a range that is empty; or an
            option that the pair has no meaning for.

    Example:
        >>> from ppl_models import DDPM
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
    num_samples = whole_count("num_samples", num_samples)
    batch_size = batch_size if batch_size is None else whole_count("batch_size", batch_size)
    seed = seed if seed is None else seed_number(seed)
    chain = make_chain(pair, steps, eta, clip, keep)
    own_labels = _has_label_each(pair, num_samples)
    parts = torch.arange(num_samples).split(batch_size or num_samples)
    counts = [len(part) for part in parts]
    device = next(pair.parameters(), torch.empty(0)).device
    runs = []
    progress = Progress("sampling", len(counts) * chain.length, unit="steps")
    with torch.no_grad(), evaluating(pair), progress:
        for b, (part, size) in enumerate(zip(parts, counts, strict=True)):
            if own_labels:
                chain = make_chain(pair.of_rows(part), steps, eta, clip, keep)
            if seed is None:
                runs.append(chain.run(size, progress))
            else:
                with forked_rng():
                    seed_noise(noise_seed(seed, b), device)
                    runs.append(chain.run(size, progress))
    return joined(runs, counts)


def _has_label_each(pair: ModelGuidePair, num_samples: int) -> bool:
    """Whether each sample is to have a label of its own."""
    labels = pair.labels
    if labels is None or labels.dim() == 0:
        return False
    if len(labels) != num_samples:
        raise ValueError(
            f"expected as many samples as labels, got {num_samples} and {len(labels)}: give a label for each, or one for all"
        )
    return True


@dataclass(frozen=True)
class Interpolation:
    """The update as an interpolation, x_{t-1} = A_t x_t + B_t x_0-hat + s_t z (notes 004), for t = 1..T.

    A_t and B_t are the weights of the posterior mean mu-tilde_t, and the same for every pair. s_t^2 = beta-tilde_t is the
    posterior's variance, which is that of the update for ``variance="posterior"`` and t >= 2; other pairs have their own. In
    the letters of 004, whose alpha is the square root of this one's, A = 1/alpha - (1 - alpha^2) / (alpha (1 - alpha-bar^2))
    and B = (1 - alpha^2) alpha-bar / (alpha (1 - alpha-bar^2)); its printed bars are slips.

    Attributes:
        t: 1..T.
        x_t: A_t, ``[T]`` float64; 0 at t = 1.
        x_0: B_t; 1 at t = 1.
        noise: s_t of the posterior; 0 at t = 1.
    """

    t: Tensor
    x_t: Tensor
    x_0: Tensor
    noise: Tensor


def interpolation(process: GaussianProcess) -> Interpolation:
    """The weights of x_t, of x_0-hat and of the posterior's noise in each step.

    Example:
        >>> from ppl_models.processes import NoiseSchedule
        >>> weights = interpolation(GaussianProcess(NoiseSchedule.from_betas([0.1, 0.5]), ()))
        >>> [round(w, 3) for w in weights.x_t.tolist()], [round(w, 3) for w in weights.x_0.tolist()]
        ([0.0, 0.129], [1.0, 0.862])

    Raises:
        TypeError: not a Gaussian process.
    """
    if not isinstance(process, GaussianProcess):
        raise TypeError(f"expected a GaussianProcess, got {type(process).__name__}: pass ddpm.process")
    schedule = process.schedule
    return Interpolation(
        torch.arange(1, schedule.num_timesteps + 1),
        schedule.posterior_weight_x_t,
        schedule.posterior_weight_x_0,
        schedule.posterior_variance.sqrt(),
    )
