r"""The bound of a diffusion in its first, forward form (lecture notes 000): reconstruction, prior matching, consistency.

    ELBO = E log p(x_0 | x_1)                                            reconstruction
         + E log p(x_T) / q(x_T | x_{T-1})                               prior matching: minus an expected KL, <= 0
         + sum_{t=1}^{T-1} E log p(x_t | x_{t+1}) / q(x_t | x_{t-1})     consistency

The expectation is over q(x_1..T | x_0), drawn forward. The sum is the bound of 001 and 003, term by term it is not: each
factor of q goes with another factor of p.

*The sign of the consistency terms.* Notes 000 print >= 0. Minus a KL would be <= 0, but a consistency term is no KL: x_{t+1}
is drawn after x_t and depends on it, so that x_t given x_{t-1} and x_{t+1} does not have the law q(x_t | x_{t-1}). With
I the mutual information under q given x_0, and p exact, p(x_t | x_{t+1}) = q(x_t | x_{t+1}, x_0), it is
I(x_t; x_{t+1}) - I(x_{t-1}; x_t): positive at t = 1, where the second is zero. In general it has no sign. Only the sum
over t, with the prior matching term, is bounded: it is at most zero, being minus KL(q(x_1..T | x_0) || p(x_1..T)).

The one constraint: with x_{t+1} below x_t in q, no closed form of a KL equals a consistency term; they are all drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from inference.bounds.diffusion_terms import refuse_other_data
from inference.bounds.moments import Moments
from inference.bounds.seeded_draws import Streams, row_seeds, widened
from inference.bounds.sites import NotANumberError
from inference.bounds.terms import Decomposition, SiteTerm
from inference.progress import Progress
from ppl_models.arguments import seed_number, whole_count
from ppl_models.diffusion import Diffusion
from ppl_models.evaluation_mode import evaluating

ROWS_AT_ONCE = 1024


@dataclass(frozen=True, repr=False)
class ForwardForm(Decomposition):
    """A :class:`Decomposition` of the forward form: site ``x_0`` is the reconstruction, ``x_T`` prior matching."""

    @property
    def reconstruction(self) -> Tensor:
        """E log p(x_0 | x_1), nats ``[B]``."""
        return self["x_0"].value

    @property
    def prior_matching(self) -> Tensor:
        """-E KL(q(x_T | x_{T-1}) || p(x_T)), nats ``[B]``, never positive."""
        return self[self.sites[0]].value

    @property
    def consistency(self) -> Tensor:
        """E log p(x_t | x_{t+1}) / q(x_t | x_{t-1}) for t = 1..T-1, nats ``[T-1, B]``, of either sign."""
        terms = [self[site].value for site in reversed(self.sites[1:-1])]
        return torch.stack(terms) if terms else self.elbo.new_zeros(0, *self.elbo.shape)


def decompose_forward(
    pair: Diffusion, x_0: Tensor, num_particles: int = 100, *, chunk_size: int = ROWS_AT_ONCE, seed: int | None = None
) -> ForwardForm:
    """The terms of the forward form, from whole chains drawn forward, with one network call per step and chunk.

    The same terms as ``decompose_elbo(pair.model, pair.guide, x_0)``, without T Pyro sites: O(T) calls, memory constant in T
    but for the result. Networks are in evaluation mode for the time of the call.

    Args:
        pair: a diffusion.
        x_0: data ``[B, *data_shape]``.
        num_particles: chains per datum.
        chunk_size: network rows (chain, datum) at a time.
        seed: of the draws; None takes one from torch's generator. No number depends on the chunk size.

    Returns:
        :class:`ForwardForm`, nats; errors are computed from whole chains, so correlations between terms are in them.

    Raises:
        TypeError: not a diffusion.
        ValueError: data of another shape or outside the support, counts below one, or a seed below zero.
        NotANumberError: the network returns NaN; the message names the step.

    Example:
        >>> from ppl_models.ddpm import DDPM
        >>> from ppl_models.likelihoods import Normal
        >>> from ppl_models.processes import NoiseSchedule
        >>> class Zero(torch.nn.Module):
        ...     def forward(self, x_t, t):
        ...         return 0 * x_t
        >>> ddpm = DDPM(Zero(), NoiseSchedule.cosine(8), data_shape=(2,), likelihood=Normal())
        >>> d = decompose_forward(ddpm, torch.randn(3, 2), seed=0)
        >>> d.consistency.shape, bool((d.prior_matching <= 0).all())
        (torch.Size([7, 3]), True)
    """
    if not isinstance(pair, Diffusion):
        raise TypeError(
            f"expected a diffusion such as DDPM, got {type(pair).__name__}: use decompose_elbo for other pairs"
        )
    refuse_other_data(pair, x_0)
    num_particles, chunk_size = whole_count("num_particles", num_particles), whole_count("chunk_size", chunk_size)
    seeds = row_seeds(int(torch.randint(2**62, ())) if seed is None else seed_number(seed), (), num_particles)
    at_once = max(1, chunk_size // len(x_0))
    sums = _Sums(pair)
    with torch.no_grad(), evaluating(pair), Progress("decomposing the bound", num_particles, unit="chains") as progress:
        for start in range(0, num_particles, at_once):
            chunk = seeds[start : start + at_once]
            sums.add(*_chains(pair, x_0, len(chunk), Streams([chunk], x_0.device)))
            progress.advance(len(chunk))
    return sums.result()


def _chains(pair: Diffusion, x_0: Tensor, count: int, streams: Streams) -> tuple[dict[int, Tensor], Tensor]:
    """log p - log q by t for chains x_1..x_T drawn forward, ``[count, B]`` each, and the closed form of the term at T."""
    process, last = pair.process, pair.num_timesteps
    wide = x_0.double() if x_0.is_floating_point() else x_0
    x_t = x_start = wide.expand(1, count, *wide.shape)
    log_q = torch.zeros(())
    terms: dict[int, Tensor] = {}
    for t in range(1, last + 1):
        step = torch.full((), t, device=x_0.device)
        x_below, law = x_t, widened(process.transition(x_t, step))
        x_t = streams.draw(law)
        output = pair.denoise(x_t.to(x_0.dtype), step)
        if bool(output.isnan().any()):
            raise NotANumberError(f"expected a finite output of the network, got NaN at step {t}: look at its training")
        output = output.double() if output.is_floating_point() else output
        if t == 1:
            terms[0] = pair.reconstruction_law(output, x_t).log_prob(x_start)[0]
        else:
            terms[t - 1] = (widened(pair.reverse_law(output, x_t, step)).log_prob(x_below) - log_q)[0]
        log_q = law.log_prob(x_t)
    prior = widened(process.prior())
    terms[last] = (prior.log_prob(x_t) - log_q)[0]
    return terms, -kl_divergence(law, prior)[0]


class _Sums:
    """Running moments of each term and of the sums."""

    def __init__(self, pair: Diffusion) -> None:
        self.last = pair.num_timesteps
        self.terms = {t: Moments() for t in range(self.last, -1, -1)}
        self.exact, self.best, self.drawn, self.best_mean, self.drawn_mean = (Moments() for _ in range(5))

    def add(self, terms: dict[int, Tensor], exact: Tensor) -> None:
        """Takes chains in, ``[count, B]`` each."""
        for t, term in terms.items():
            self.terms[t].add(term.cpu())
        total = torch.stack(list(terms.values())).sum(0).cpu()
        best = total - terms[self.last].cpu() + exact.cpu()
        self.exact.add(exact.cpu())
        self.drawn.add(total)
        self.best.add(best)
        self.drawn_mean.add(total.mean(1))
        self.best_mean.add(best.mean(1))

    def result(self) -> ForwardForm:
        """The moments as terms, the top of the chain first."""
        terms = {}
        for t, moments in self.terms.items():
            top = t == self.last
            terms[f"x_{t}"] = SiteTerm(
                f"x_{t}",
                "latent" if t else "observed",
                moments.mean,
                moments.std_error,
                self.exact.mean if top else None,
                self.exact.std_error if top else None,
                self._reason(t),
            )
        return ForwardForm(
            terms=terms,
            elbo=self.best.mean,
            std_error=self.best.std_error,
            monte_carlo=self.drawn.mean,
            monte_carlo_std_error=self.drawn.std_error,
            mean_std_error=float(self.best_mean.std_error),
            monte_carlo_mean_std_error=float(self.drawn_mean.std_error),
            plates=("data",),
            num_particles=self.best.count,
            note="forward form (notes 000): whole chains drawn forward",
        )

    def _reason(self, t: int) -> str:
        if t == 0:
            return "observed: log p(x_0 | x_1) at draws of x_1"
        if t == self.last:
            below = "x_0" if t == 1 else f"x_{t - 1}"
            return f"closed form: KL(q(x_{t} | {below}) || p(x_{t})), with {below} " + ("given" if t == 1 else "drawn")
        return f"refused: x_{t + 1}, above x_{t} in the model, descends from it in q, so the term is no KL"
