r"""The bound of a diffusion, term by term: L_0 .. L_T with closed-form KLs, at a cost and memory that suit large T.

    -ELBO = L_T + L_{T-1} + ... + L_1 + L_0                                       (lecture notes 001, last page; 003)
    L_T = KL(q(x_T | x_0) || p(x_T))                                              exact, nothing is drawn
    L_t = E_{q(x_{t+1} | x_0)} KL(q(x_t | x_{t+1}, x_0) || p(x_t | x_{t+1}))      1 <= t < T, x_{t+1} drawn
    L_0 = -E_{q(x_1 | x_0)} log p(x_0 | x_1)                                      x_1 drawn

Each term has draws of its own, made at once from q(x_{t+1} | x_0), so the errors of different terms are independent and
add up in squares. Rate = L_1 + ... + L_T, distortion = L_0.

Convention: the term of site ``x_t`` is -L_t, for t = 0..T. The network sees the dtype of the data; everything around it is
computed in float64, because where the two variances of a KL nearly agree float32 has no correct digit.

The one constraint: a number depends on the seed, on the place (t, particle, datum) and on nothing else: not on the chunk size,
and not on which other timesteps are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.bounds.closed_forms import NoClosedFormError, divergence
from inference.bounds.diffusion_terms import DiffusionDecomposition, over_data, refuse_other_data
from inference.bounds.moments import Moments
from inference.bounds.seeded_draws import Streams, row_seeds, widened
from inference.bounds.sites import NotANumberError
from inference.bounds.terms import SiteTerm
from inference.progress import Progress
from ppl_models.arguments import seed_number, whole_count, whole_numbers
from ppl_models.diffusion import Diffusion
from ppl_models.evaluation_mode import evaluating

__all__ = ["DiffusionDecomposition", "decompose_diffusion"]

ROWS_AT_ONCE = 1024  # (timestep, particle, datum) triples in one network call, unless a row is large
DATA_AT_ONCE = 256  # data that share a random stream, likewise; fixed, so that no number depends on the chunk size
NUMBERS_AT_ONCE = (
    2**23
)  # of the network's output, K for each entry of a D3PM: 64 MiB in float64, of which some ten are alive


def decompose_diffusion(
    pair: Diffusion,
    x_0: Tensor,
    num_particles: int = 16,
    timesteps: Sequence[int] | None = None,
    *,
    chunk_size: int | None = None,
    seed: int | None = None,
) -> DiffusionDecomposition:
    """Every term L_t of a diffusion's bound, with closed forms where there are any and a standard error for each number.

    Source: lecture notes 001 and 003; Ho et al. 2020 (arXiv:2006.11239), eq. 5. Two numbers per term: ``monte_carlo``,
    log p - log q at draws of x_t and x_{t+1}; ``analytic``, minus the closed-form KL at the same draws of x_{t+1}. The sum
    uses the second, and the first where there is no closed form: for log p(x_0 | x_1), and for a reverse law of one's own
    whose KL is not known, which each term's ``reason`` then says. The networks are in
    evaluation mode for the time of the call.

    Args:
        pair: a DDPM, a D3PM, or another :class:`~ppl_models.diffusion.Diffusion`.
        x_0: data ``[B, *data_shape]``.
        num_particles: draws per term and datum; a single one leaves the errors infinite.
        timesteps: which t in 0..T; None: all. With some missing there is no bound, see :class:`DiffusionDecomposition`.
        chunk_size: network rows at a time: memory is bounded by it whatever T, B and num_particles. None: 1024, fewer where
            the network returns many numbers a row.
        seed: of the draws; None takes one from torch's generator.

    Returns:
        :class:`DiffusionDecomposition`, nats, terms of shape [B]; sites from ``x_T`` down to ``x_0``.

    Raises:
        TypeError: not a diffusion, or data that are no tensor.
        ValueError: data of another shape or outside the support, timesteps outside 0..T or repeated, or counts below one.
        NotANumberError: a term is NaN; the message names site and datum.

    Example:
        >>> from ppl_models.ddpm import DDPM
        >>> from ppl_models.processes import NoiseSchedule
        >>> from ppl_models.likelihoods import Normal
        >>> class Zero(torch.nn.Module):
        ...     def forward(self, x_t, t):
        ...         return 0 * x_t
        >>> ddpm = DDPM(Zero(), NoiseSchedule.cosine(100), data_shape=(2,), likelihood=Normal())
        >>> d = decompose_diffusion(ddpm, torch.randn(5, 2), num_particles=4, seed=0)
        >>> len(d), d["x_100"].analytic_std_error.tolist(), bool((d["x_7"].analytic < 0).all())
        (101, [0.0, 0.0, 0.0, 0.0, 0.0], True)
        >>> bool(torch.allclose(-d.elbo, d.rate + d.distortion))
        True
    """
    if not isinstance(pair, Diffusion):
        raise TypeError(
            f"expected a diffusion such as DDPM, got {type(pair).__name__}: use decompose_elbo for other pairs"
        )
    refuse_other_data(pair, x_0)
    rows = max(1, NUMBERS_AT_ONCE // max(1, pair.output_shape.numel()))
    data_at_once = min(DATA_AT_ONCE, rows)
    chunk_size = min(ROWS_AT_ONCE, rows) if chunk_size is None else chunk_size
    num_particles, chunk_size = whole_count("num_particles", num_particles), whole_count("chunk_size", chunk_size)
    chosen = _falling(timesteps, pair.num_timesteps)
    seed = int(torch.randint(2**62, ())) if seed is None else seed_number(seed)
    blocks = x_0.split(data_at_once)
    progress = Progress("decomposing the bound", len(blocks) * len(chosen), unit="terms")
    with torch.no_grad(), evaluating(pair), progress:
        parts = []
        for b, block in enumerate(blocks):
            first = b * data_at_once
            own = pair.of_rows(slice(first, first + len(block)))
            terms = _Terms(own, block, num_particles, chunk_size, (seed, b), first, progress)
            parts.append(terms.of(chosen))
    return _joined(pair, chosen, parts, num_particles)


@dataclass
class _Estimate:
    """Mean and standard error of one term by datum; of its closed form, if any; and of the two's difference."""

    drawn: tuple[Tensor, Tensor]
    exact: tuple[Tensor, Tensor] | None = None
    difference: tuple[Tensor, Tensor] | None = None
    reason: str = ""  # why there is no closed form of a latent's term


class _Terms:
    """The terms of one block of data, the timesteps in chunks."""

    def __init__(
        self,
        pair: Diffusion,
        x_0: Tensor,
        num_particles: int,
        chunk_size: int,
        place: tuple[int, int],
        first: int,
        progress: Progress,
    ) -> None:
        self.pair, self.process, self.x_0 = pair, pair.process, x_0
        self.num_particles, self.place, self.first, self.progress = num_particles, place, first, progress
        self.cells = max(1, chunk_size // len(x_0))  # (timestep, particle) pairs at a time
        self._no_closed_form = ""

    def of(self, timesteps: Sequence[int]) -> dict[int, _Estimate]:
        """The term of each t, as -L_t."""
        inner = [t for t in timesteps if 0 < t < self.pair.num_timesteps]
        outer = [[t] for t in (self.pair.num_timesteps, 0) if t in timesteps]
        at_once = max(1, self.cells // min(self.cells, self.num_particles))
        found: dict[int, _Estimate] = {}
        for chunk in [*outer, *(inner[i : i + at_once] for i in range(0, len(inner), at_once))]:
            found |= self._chunk(chunk)
            self.progress.advance(len(chunk))
        return found

    def _chunk(self, timesteps: list[int]) -> dict[int, _Estimate]:
        drawn, exact, difference = Moments(), Moments(), Moments()
        seeds = [row_seeds(self.place[0], (self.place[1], t), self.num_particles) for t in timesteps]
        for start in range(0, self.num_particles, self.cells):
            streams = Streams([row[start : start + self.cells] for row in seeds], self.x_0.device)
            count = len(seeds[0][start : start + self.cells])
            term, closed = self._draw(timesteps, count, streams)
            _refuse(term.isnan(), timesteps, self.first)
            drawn.add(term.transpose(0, 1))
            if closed is not None:
                _refuse(closed.isnan(), timesteps, self.first)
                exact.add(closed.transpose(0, 1))
                difference.add((term - closed).transpose(0, 1))
        moments = [drawn, exact, difference] if exact.count else [drawn]
        if exact.count and timesteps == [self.pair.num_timesteps]:  # nothing is drawn for the closed form of L_T
            moments[1] = _exactly(exact)
        estimates = {}
        for i, t in enumerate(timesteps):
            pairs = [(m.mean[i].cpu(), m.std_error[i].cpu()) for m in moments]
            closed_forms = {"exact": pairs[1], "difference": pairs[2]} if exact.count else {}
            estimates[t] = _Estimate(pairs[0], reason=self._no_closed_form, **closed_forms)
        return estimates

    def _draw(self, timesteps: list[int], count: int, streams: Streams) -> tuple[Tensor, Tensor | None]:
        """log p - log q, and its closed form, for each timestep and particle: ``[timesteps, count, b]`` each."""
        pair, process = self.pair, self.process
        x_0 = self.x_0.double() if self.x_0.is_floating_point() else self.x_0
        x_0 = x_0.expand(len(timesteps), count, *x_0.shape)
        t = torch.tensor(timesteps, device=x_0.device)[:, None, None]
        if timesteps == [pair.num_timesteps]:
            q, p = widened(process.marginal(x_0, t)), widened(process.prior())
            x_t = streams.draw(q)
            return p.log_prob(x_t) - q.log_prob(x_t), self._closed_form(q, p)
        x_next = streams.draw(widened(process.marginal(x_0, t + 1)))
        output = pair.denoise(x_next.to(self.x_0.dtype), t + 1)
        bad = output.isnan().reshape(*output.shape[:3], -1).any(-1)
        _refuse(bad, timesteps, self.first)  # before a law refuses them without a word on t
        output = output.double() if output.is_floating_point() else output
        if timesteps == [0]:
            return pair.reconstruction_law(output, x_next).log_prob(x_0).double(), None
        q = widened(process.posterior(x_next, x_0, t + 1))
        p = widened(pair.reverse_law(output, x_next, t + 1))
        x_t = streams.draw(q)
        return p.log_prob(x_t) - q.log_prob(x_t), self._closed_form(q, p)

    def _closed_form(self, q: Any, p: Any) -> Tensor | None:
        """-KL(q || p), or None, with the reason kept."""
        try:
            return -divergence(q, p)
        except NoClosedFormError as reason:
            self._no_closed_form = str(reason)
            return None


def _exactly(moments: Moments) -> Moments:
    """The moments of a number that is the same for every draw: its error is zero, also for a single draw."""
    certain = Moments()
    certain.add(moments.mean.expand(2, *moments.mean.shape))
    return certain


def _refuse(bad: Tensor, timesteps: list[int], first: int) -> None:
    """Names the first place ``[timesteps, particles, data]`` that holds a NaN; ``first`` is the block's first datum."""
    if bool(bad.any()):
        i, _, b = bad.nonzero()[0].tolist()
        raise NotANumberError(
            f"expected finite log-densities, got NaN at site 'x_{timesteps[i]}' for datum {first + b}: look at "
            f"the network's output at step {timesteps[i] + 1}"
        )


def _falling(timesteps: Sequence[int] | None, last: int) -> list[int]:
    if timesteps is None:
        return list(range(last, -1, -1))
    steps = whole_numbers("timesteps", timesteps)
    if not steps or len(set(steps)) < len(steps) or min(steps) < 0 or max(steps) > last:
        raise ValueError(
            f"expected distinct timesteps in 0..{last} (0 is the reconstruction, {last} the prior's term), got {steps}"
        )
    return sorted(steps, reverse=True)


def _joined(
    pair: Diffusion, timesteps: list[int], parts: list[dict[int, _Estimate]], num_particles: int
) -> DiffusionDecomposition:
    """The blocks' terms as one result; sums over t take errors in squares, as the terms' draws are independent."""
    terms = {f"x_{t}": _term(pair, t, [part[t] for part in parts]) for t in timesteps}
    partial = len(timesteps) <= pair.num_timesteps

    def total(values: Iterator[Tensor]) -> Tensor:
        found = torch.stack(list(values)).sum(0)
        return torch.full_like(found, math.nan) if partial else found

    elbo = total(term.value for term in terms.values())
    error = total(term.value_std_error.square() for term in terms.values()).sqrt()
    drawn = total(term.monte_carlo for term in terms.values())
    drawn_error = total(term.std_error.square() for term in terms.values()).sqrt()
    note = "each term from draws of its own, x_{t+1} at once from q(x_{t+1} | x_0)"
    if partial:
        note = f"partial: {len(timesteps)} of {pair.num_timesteps + 1} terms, so there is no bound; " + note
    return DiffusionDecomposition(
        terms=terms,
        elbo=elbo,
        std_error=error,
        monte_carlo=drawn,
        monte_carlo_std_error=drawn_error,
        mean_std_error=float(over_data(error)),
        monte_carlo_mean_std_error=float(over_data(drawn_error)),
        plates=("data",),
        num_particles=num_particles,
        note=note,
        num_timesteps=pair.num_timesteps,
        data_dim=max(1, math.prod(pair.data_shape)),
    )


def _term(pair: Diffusion, t: int, parts: list[_Estimate]) -> SiteTerm:
    def joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        means, errors = zip(*pairs, strict=True)
        return torch.cat(means), torch.cat(errors)

    mean, error = joined([part.drawn for part in parts])
    if t == 0:
        reason = "observed: log p(x_0 | x_1) at draws of x_1"
        return SiteTerm("x_0", "observed", mean, error, None, None, reason)
    if parts[0].exact is None:
        return SiteTerm(f"x_{t}", "latent", mean, error, None, None, parts[0].reason)
    exact, exact_error = joined([part.exact for part in parts if part.exact is not None])
    difference, difference_error = joined([part.difference for part in parts if part.difference is not None])
    reason = (
        f"closed form, exact: KL(q(x_{t} | x_0) || p(x_{t})), nothing is drawn"
        if t == pair.num_timesteps
        else f"closed form: KL(q(x_{t} | x_{t + 1}, x_0) || p(x_{t} | x_{t + 1})) at draws of x_{t + 1}"
    )
    return SiteTerm(
        f"x_{t}",
        "latent",
        mean,
        error,
        exact,
        exact_error,
        reason,
        _z_score(difference, difference_error, exact),
    )


def _z_score(difference: Tensor, error: Tensor, exact: Tensor) -> float | None:
    """Drawn minus closed form, averaged over data, in standard errors; 0 for two constants that agree."""
    mean, spread = float(difference.mean()), float(over_data(error))
    rounding = 1e3 * torch.finfo(torch.float64).eps * (1.0 + abs(float(exact.mean())))
    if abs(mean) <= rounding and spread <= rounding:
        return 0.0
    return mean / spread if 0 < spread < math.inf else None
