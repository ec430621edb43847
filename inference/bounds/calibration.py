"""Simulation-based calibration: is the guide the posterior, on data of the model's own making?

    (z*, x) ~ p(z, x)      z_1..z_L ~ q(z | x)      rank of f(z*, x) among f(z_1, x)..f(z_L, x), in 0..L

If q(z | x) = p(z | x), then z* and the draws have one law given x, so every rank is uniform (Talts, Betancourt, Simpson,
Vehtari and Gelman 2018, arXiv:1804.06788, Theorem 1; for guides Yao et al. 2018, arXiv:1802.02538, section 4). f is each
latent dimension in turn, and last log p(x, z): this *joint* check sees a wrong correlation under right marginals.

Reading. Ranks at both ends: the guide is too narrow; in the middle: too wide; to one side: it is shifted. Ties, as of
discrete latents, are broken at random, which keeps the ranks uniform.

The one constraint: this tests the guide on data from the *model*. On other data a guide may be better or worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from inference.bounds.joint import data_plan, latent_values, log_joint, refuse_point_masses
from inference.bounds.particles import ELEMENTS_AT_ONCE, collect
from inference.bounds.uniformity import chi_square
from inference.generated import generate
from inference.printed import Printed
from inference.progress import Progress
from inference.views.tables import text_table
from ppl_models.pair import ModelGuidePair, refuse_other_than_pair

JOINT = "log p(x, z)"
LEVEL = 0.01


@dataclass(frozen=True, repr=False)
class Calibration(Printed):
    """Ranks of the truth among the guide's draws, and whether they are uniform.

    ``ranks`` ``[S, Q]`` in 0..num_draws for the Q quantities in ``names``: each latent dimension, as in ``z[3]``, and the
    log joint last. ``chi_square`` and ``p_value`` ``[Q]`` are over ``num_bins`` equal bins.
    """

    names: tuple[str, ...]
    ranks: NDArray[np.int64]
    num_draws: int
    num_bins: int
    chi_square: NDArray[np.float64]
    p_value: NDArray[np.float64]

    @property
    def num_simulations(self) -> int:
        """S."""
        return len(self.ranks)

    def rejected(self, level: float = LEVEL) -> tuple[str, ...]:
        """Names of the quantities that are not calibrated.

        Args:
            level: probability that an exact guide has any name here (Bonferroni over the quantities).
        """
        return tuple(n for n, p in zip(self.names, self.p_value, strict=True) if p < level / len(self.names))

    def words(self, level: float = LEVEL) -> str:
        """The verdict in sentences, one for each quantity that is rejected."""
        wrong = self.rejected(level)
        if not wrong:
            return (
                f"calibrated as far as {self.num_simulations} simulations can tell: none of {len(self.names)} quantities "
                f"is rejected at level {level:g}"
            )
        return "\n".join(self._diagnosis(name) for name in wrong)

    def table(self) -> str:
        """Statistic, p-value and verdict of each quantity as text."""
        wrong = self.rejected()
        rows = [
            [name, f"{c:.1f}", f"{p:.2g}", "REJECTED" if name in wrong else "ok"]
            for name, c, p in zip(self.names, self.chi_square, self.p_value, strict=True)
        ]
        text = text_table(["quantity", f"chi2({self.num_bins - 1})", "p", "uniform ranks?"], rows)
        said = f"{len(wrong)} of {len(rows)} quantities rejected: p below {LEVEL / len(rows):.2g}, {LEVEL:g} for all together"
        return f"{text}\n{said}\n{self.words()}"

    def _diagnosis(self, name: str) -> str:
        """What the shape of the histogram says: the z-scores of the ranks' mean and spread against uniform ones."""
        u = (self.ranks[:, self.names.index(name)] + 0.5) / (self.num_draws + 1)
        scale = math.sqrt(len(u))
        shift = (u.mean() - 0.5) * math.sqrt(12) * scale
        spread = (((u - 0.5) ** 2).mean() - 1 / 12) * math.sqrt(180) * scale  # Var (U - 1/2)^2 = 1/180
        if name == JOINT:
            side = "less" if shift > 0 else "more"
            cause = "too wide, misplaced or wrongly correlated" if shift > 0 else "too narrow, or drawn to the mode"
            return f"{name}: the guide's draws are {side} probable than the truth is: {cause} (z = {shift:+.1f})"
        findings = []
        if abs(shift) > 3:
            findings.append(f"too {'low' if shift > 0 else 'high'} (z = {shift:+.1f})")
        if abs(spread) > max(3, abs(shift)):  # a shift alone also moves ranks outwards, but less than to the side
            findings.append(f"too {'narrow' if spread > 0 else 'wide'} (z = {spread:+.1f})")
        return f"{name}: the guide is {' and '.join(findings) or 'of another shape than the posterior'}"


def simulation_based_calibration(
    pair: ModelGuidePair, *, num_simulations: int = 1000, num_draws: int = 99, num_bins: int = 20
) -> Calibration:
    """Ranks of true latents among the guide's draws, on data simulated from the model.

    With 1000 simulations, 99 draws and 20 bins an exact guide has chi-square(19) above 63.7 once in a million times. The
    random numbers are torch's own; seed them for the same ranks again.

    Args:
        pair: the programs; all simulations run at once, as far as memory allows. One that was given labels is simulated at
            these in turn.
        num_simulations: S, data simulated.
        num_draws: L, draws from the guide for each.
        num_bins: a divisor of L + 1.

    Returns:
        :class:`Calibration`.

    Raises:
        ValueError: fewer than 5 simulations a bin (the statistic has no chi-square law then), or bins that do not divide
            the ranks.
        PairError: sites do not match, or are not all inside the data plate.
        NotANumberError: a log-density is NaN.

    Example:
        >>> import pyro
        >>> from ppl_models import LinearGaussian
        >>> pyro.set_rng_seed(0)
        >>> calibration = simulation_based_calibration(LinearGaussian.random(data_dim=3, latent_dim=2))
        >>> calibration.names, calibration.ranks.shape
        (('z[0]', 'z[1]', 'log p(x, z)'), (1000, 3))
        >>> bool((calibration.chi_square < 63.7).all())
        True
    """
    refuse_other_than_pair(pair)
    if num_draws < 1 or num_simulations < 5 * num_bins:
        raise ValueError(
            f"expected num_draws >= 1 and at least 5 simulations a bin, got {num_draws} draws and {num_simulations} "
            f"simulations for {num_bins} bins: simulate at least {5 * num_bins} times"
        )
    chi_square(np.zeros((1, 1), np.int64), num_draws + 1, num_bins)  # refuses bins that do not divide the ranks
    names: list[str] = []
    parts: list[NDArray[np.int64]] = []
    done, size, own = 0, 1, pair.in_turn(num_simulations)
    with torch.no_grad(), Progress("simulating", num_simulations, unit="simulations") as progress:
        while done < num_simulations:
            size = min(size, num_simulations - done)
            names, ranks, elements = _simulate(own.of_rows(slice(done, done + size)), size, num_draws)
            parts.append(ranks)
            done += size
            size = max(1, ELEMENTS_AT_ONCE * size // elements)  # the first simulation tells how large one is
            progress.advance(len(ranks))
    together = np.concatenate(parts)
    return Calibration(tuple(names), together, num_draws, num_bins, *chi_square(together, num_draws + 1, num_bins))


def _simulate(pair: ModelGuidePair, size: int, num_draws: int) -> tuple[list[str], NDArray[np.int64], int]:
    """Names, ranks ``[size, Q]``, and how many elements all draws of all sites have together."""
    truth, x = generate(pair, size)
    fixed = poutine.trace(poutine.replay(pair.model, trace=truth)).get_trace(x)
    names: list[str] = []
    ranks: list[Tensor] = []
    elements = 0
    plan = data_plan(pair, x)
    refuse_point_masses(plan, "rank true latents among its draws")
    chunks = list(plan.chunks(num_draws, num_draws))
    for site in pair.latent_sites:
        draws = torch.cat([latent_values(chunk, site) for chunk in chunks]).reshape(num_draws, size, -1)
        true = truth.nodes[site]["value"].reshape(size, -1)
        elements += draws.numel()
        shape = truth.nodes[site]["fn"].event_shape
        names += [site + (f"[{', '.join(map(str, i))}]" if i else "") for i in np.ndindex(*shape)]
        ranks.append(_ranks(true, draws))
    true = log_joint(collect(fixed, poutine.Trace())).T
    draws = torch.cat([log_joint(chunk) for chunk in chunks]).unsqueeze(-1)
    elements += num_draws * x.numel()
    return [*names, JOINT], torch.cat([*ranks, _ranks(true, draws)], -1).cpu().numpy(), elements


def _ranks(true: Tensor, draws: Tensor) -> Tensor:
    """How many of draws ``[L, S, d]`` are below the truth ``[S, d]``, ties broken at random: 0..L."""
    below, ties = (draws < true).sum(0), (draws == true).sum(0)
    return below + (torch.rand(ties.shape, dtype=torch.float64, device=ties.device) * (ties + 1)).long()
