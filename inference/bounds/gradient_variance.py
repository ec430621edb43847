"""How noisy the gradients of several losses are, by site and by block of parameters.

For a loss with gradient g (of the batch mean) over a block of parameters, g and g' two independent draws of it,

    tr Cov(g)   = E[ |g - g'|^2 / 2 ]        variance, summed over the block's parameters
    |E g|^2     = E[ g . g' ]                signal
    snr         = |E g| / sqrt(tr Cov(g))    signal-to-noise ratio (Rainforth et al. 2018, arXiv:1802.04537, eq. 5,
                                             for the block as a whole)

Both expectations are estimated without bias from R pairs of draws, whose values are independent, so each comes with an
honest standard error; and nothing but two gradients is held at a time. Units: nats^2 over the parameters' units squared.

Parameters are grouped in two ways. By *site*: the parameters of a site are those that its own law in guide or model depends
on at given values of its parents, found by autograd of its log-density; sites are called ``q(z_2 | z_1)`` in the guide (x, on
which any guide law may depend, is left out) and ``p(x | z)`` in the model. A parameter that several sites' laws use counts
in each of them, with the loss's whole gradient; a site without parameters is left out; parameters of no site's law stand
under ``(no site)``. By *block*: what a pair's program announces by one name (``encoder``, ``decoder``, a bare parameter), the
first part of a parameter's name without the losses' own prefix ``pair``. The one constraint: losses are compared on the same
data, with the same parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from inference.bounds.dependencies import parents
from inference.bounds.moments import Moments
from inference.bounds.particles import forked_rng
from inference.bounds.sites import bare_law, is_deterministic, sample_sites
from inference.printed import Printed
from inference.progress import Progress
from ppl_models.pair import ModelGuidePair

GROUPINGS = ("site", "block")

Groups = dict[str, list[nn.Parameter]]


@dataclass(frozen=True)
class BlockVariance:
    """One loss's gradient over one group of parameters: variance and signal with their standard errors."""

    variance: float
    variance_std_error: float
    signal: float
    signal_std_error: float
    num_parameters: int

    @property
    def snr(self) -> float:
        """|E g| / sqrt(tr Cov(g)); zero where the estimated signal is not positive, infinite without noise."""
        if self.variance == 0:
            return float("inf") if self.signal > 0 else 0.0
        return (max(0.0, self.signal) / self.variance) ** 0.5


@dataclass(frozen=True, repr=False)
class GradientVariance(Printed, Mapping[str, dict[str, BlockVariance]]):
    """``report[loss][group]`` is a :class:`BlockVariance`; losses in the order given, sites before blocks."""

    losses: dict[str, dict[str, BlockVariance]]
    num_pairs: int

    def __getitem__(self, loss: str) -> dict[str, BlockVariance]:
        if loss not in self.losses:
            raise KeyError(f"expected a loss among {', '.join(self.losses)}, got {loss!r}")
        return self.losses[loss]

    def __iter__(self) -> Iterator[str]:
        return iter(self.losses)

    def __len__(self) -> int:
        return len(self.losses)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the groups of parameters: guide sites, model sites, blocks, as far as asked for."""
        return tuple(next(iter(self.losses.values())))

    def table(self) -> str:
        """Variance, its ratio to the first loss's, and signal-to-noise ratio as text, group by group."""
        from inference.views.tables import text_table

        first = next(iter(self.losses.values()))
        rows = [
            [
                block,
                name,
                f"{found[block].variance:.4g}",
                f"{found[block].variance_std_error:.2g}",
                f"{found[block].variance / first[block].variance:.3f}" if first[block].variance else "-",
                f"{found[block].snr:.3g}",
                f"{found[block].num_parameters} parameters",
            ]
            for block in self.blocks
            for name, found in self.losses.items()
        ]
        header = ["parameters of", "loss", "tr Cov(g)", "+- SE", "ratio", "snr", ""]
        return f"Gradient of the batch mean, nats^2; {self.num_pairs} pairs of draws\n{text_table(header, rows)}"


def gradient_variance(
    losses: Mapping[str, nn.Module], x: Tensor, num_pairs: int = 50, by: Collection[str] = GROUPINGS
) -> GradientVariance:
    """Variance and signal of each loss's gradient by site and by block of parameters, on the same data.

    Args:
        losses: modules that map ``x`` to ``[B]`` nats, by name; all of the same parameters (one pair's).
        x: ``[B, *data_shape]``.
        num_pairs: R >= 2 pairs of draws, that is 2 R gradients of each loss.
        by: which groups of parameters: ``"site"`` (the programs are run once, every site of them), ``"block"``, or both.

    Returns:
        :class:`GradientVariance`. The parameters' own ``.grad`` is left alone.

    Raises:
        TypeError: no mapping.
        ValueError: no loss, fewer than two pairs, a loss without parameters, losses of different parameters, an unknown
            grouping, or grouping by site of a loss that has no :class:`ModelGuidePair` within.

    Example:
        >>> from inference import ElboLoss
        >>> from ppl_models import VAE
        >>> from ppl_models.likelihoods import Bernoulli
        >>> vae = VAE.preset((4,), Bernoulli(), latent_dim=2, hidden=(8,))
        >>> x = vae.model(size=5).detach()
        >>> losses = {"closed form": ElboLoss(vae), "drawn": ElboLoss(vae, closed_form=False)}
        >>> report = gradient_variance(losses, x, num_pairs=20)
        >>> report.blocks, report["drawn"]["q(z)"].variance > 0
        (('q(z)', 'p(x | z)', 'encoder', 'decoder'), True)
    """
    if not isinstance(losses, Mapping):
        raise TypeError(f"expected losses by name, got a {type(losses).__name__}: pass {{'elbo': ElboLoss(pair)}}")
    if not losses:
        raise ValueError("expected at least one loss, got none: pass {'name': loss}")
    if num_pairs < 2:
        raise ValueError(f"expected num_pairs >= 2, got {num_pairs}: an error needs two values at least")
    if isinstance(by, str) or not by or not set(by) <= set(GROUPINGS):
        raise ValueError(f"expected by to hold 'site', 'block' or both, got {by!r}: write by=('site',)")
    blocks = {name: _blocks(name, loss) for name, loss in losses.items()}
    reference_name, reference = next(iter(blocks.items()))
    for name, own in blocks.items():
        if {id(p) for ps in own.values() for p in ps} != {id(p) for ps in reference.values() for p in ps}:
            raise ValueError(
                f"expected losses of the same parameters, got others in {name!r} than in {reference_name!r}: build all "
                "losses from one pair"
            )
    parameters = [p for block in reference.values() for p in block]
    groups: Groups = {}
    if "site" in by:
        groups |= _parameters_of_sites(_pair(reference_name, losses[reference_name]), x, parameters)
    if "block" in by:
        groups |= reference
    result = {}
    with Progress("comparing gradients", num_pairs * len(losses), unit="pairs") as progress:
        for name, loss in losses.items():
            variance, signal = ({group: Moments() for group in groups} for _ in range(2))
            for _ in range(num_pairs):
                one, other = _gradients(loss, x, parameters), _gradients(loss, x, parameters)
                noise = {p: (one[p] - other[p]).square().sum() / 2 for p in parameters}
                product = {p: (one[p] * other[p]).sum() for p in parameters}
                for group, members in groups.items():
                    variance[group].add(torch.stack([noise[p] for p in members]).sum()[None])
                    signal[group].add(torch.stack([product[p] for p in members]).sum()[None])
                progress.advance()
            result[name] = {
                group: BlockVariance(
                    float(variance[group].mean),
                    float(variance[group].std_error),
                    float(signal[group].mean),
                    float(signal[group].std_error),
                    sum(p.numel() for p in members),
                )
                for group, members in groups.items()
            }
    return GradientVariance(result, num_pairs)


def _blocks(name: str, loss: nn.Module) -> Groups:
    """Trainable parameters by the first part of their name, ``pair`` left out."""
    blocks: Groups = {}
    for path, parameter in loss.named_parameters():
        if parameter.requires_grad:
            blocks.setdefault(path.removeprefix("pair.").split(".")[0], []).append(parameter)
    if not blocks:
        raise ValueError(f"expected a loss with trainable parameters, got none in {name!r}: build it from a pair")
    return blocks


def _pair(name: str, loss: nn.Module) -> ModelGuidePair:
    pairs = [module for module in loss.modules() if isinstance(module, ModelGuidePair)]
    if not pairs:
        raise ValueError(
            f"expected a loss of a ModelGuidePair, got none within {name!r}: build it from a pair, or ask for by=('block',)"
        )
    return pairs[0]


def _parameters_of_sites(pair: ModelGuidePair, x: Tensor, parameters: list[nn.Parameter]) -> Groups:
    """The parameters that reach each site's own law, guide first; then those that reach none."""
    with forked_rng():
        with torch.enable_grad(), _WithoutPaths():
            guide = poutine.trace(pair.guide).get_trace(x)
            model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
        links = {"q": parents(pair.guide, (x,), {}), "p": parents(pair.model, (x,), {})}
    groups: Groups = {}
    for program, trace in (("q", guide), ("p", model)):
        for site, node in sample_sites(trace).items():
            if is_deterministic(node):
                continue
            above = [name for name in links[program] if name in links[program][site]]  # in the program's order
            members = _reaching(node["fn"], node["value"], parameters)
            if members:
                groups[f"{program}({site} | {', '.join(above)})" if above else f"{program}({site})"] = members
    reached = {p for members in groups.values() for p in members}
    rest = [p for p in parameters if p not in reached]
    return groups | {"(no site)": rest} if rest else groups


class _WithoutPaths(Messenger):
    """Cuts gradients at each site's value, so that only the site's own parameters reach its law."""

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def _reaching(law: Any, value: Tensor, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters with a path to the law: to its log-density, or to a point mass's place, which has no density."""
    base = bare_law(law)
    outputs = [law.log_prob(value), *([base.v] if hasattr(base, "v") else [])]
    outputs = [output.sum() for output in outputs if output.requires_grad]
    if not outputs:
        return []
    gradients = torch.autograd.grad(outputs, parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def _gradients(loss: nn.Module, x: Tensor, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """One draw of the gradient of the batch mean; float64. Parameters that the loss does not use: zero."""
    gradients = torch.autograd.grad(loss(x).mean(), parameters, allow_unused=True, materialize_grads=True)
    return {p: g.detach().to(torch.float64) for p, g in zip(parameters, gradients, strict=True)}
