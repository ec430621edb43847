"""How noisy the gradients of several losses are, by block of parameters.

For a loss with gradient g (of the batch mean) over a block of parameters, g and g' two independent draws of it,

    tr Cov(g)   = E[ |g - g'|^2 / 2 ]        variance, summed over the block's parameters
    |E g|^2     = E[ g . g' ]                signal
    snr         = |E g| / sqrt(tr Cov(g))    signal-to-noise ratio (Rainforth et al. 2018, arXiv:1802.04537, eq. 5,
                                             for the block as a whole)

Both expectations are estimated without bias from R pairs of draws, whose values are independent, so each comes with an
honest standard error; and nothing but two gradients is held at a time. Units: nats^2 over the parameters' units squared.

A block is what a pair's program announces by one name (``encoder``, ``decoder``, ``likelihood``, a bare parameter):
the first part of a parameter's name, without the losses' own prefix ``pair``. The one constraint: losses are compared on
the same data, with the same parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inference.bounds.moments import Moments
from inference.progress import Progress


@dataclass(frozen=True)
class BlockVariance:
    """One loss's gradient over one block: variance and signal with their standard errors."""

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


@dataclass(frozen=True)
class GradientVariance(Mapping[str, dict[str, BlockVariance]]):
    """``report[loss][block]`` is a :class:`BlockVariance`; losses and blocks in the order given."""

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
        """The parameter blocks."""
        return tuple(next(iter(self.losses.values())))

    def table(self) -> str:
        """Variance, its ratio to the first loss's, and signal-to-noise ratio as text, block by block."""
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
        header = ["block", "loss", "tr Cov(g)", "+- SE", "ratio", "snr", ""]
        return f"Gradient of the batch mean, nats^2; {self.num_pairs} pairs of draws\n{text_table(header, rows)}"


def gradient_variance(losses: Mapping[str, nn.Module], x: Tensor, num_pairs: int = 50) -> GradientVariance:
    """Variance and signal of each loss's gradient by block of parameters, on the same data.

    Args:
        losses: modules that map ``x`` to ``[B]`` nats, by name; all of the same parameters (one pair's).
        x: ``[B, *data_shape]``.
        num_pairs: R >= 2 pairs of draws, that is 2 R gradients of each loss.

    Returns:
        :class:`GradientVariance`. The parameters' own ``.grad`` is left alone.

    Raises:
        ValueError: no loss, fewer than two pairs, a loss without parameters, or losses of different parameters.

    Example:
        >>> from inference import ElboLoss
        >>> from ppl_models import VAE
        >>> from ppl_models.likelihoods import Bernoulli
        >>> vae = VAE.preset((4,), Bernoulli(), latent_dim=2, hidden=(8,))
        >>> x = vae.model(size=5).detach()
        >>> losses = {"closed form": ElboLoss(vae), "drawn": ElboLoss(vae, closed_form=False)}
        >>> report = gradient_variance(losses, x, num_pairs=20)
        >>> report.blocks, report["drawn"]["encoder"].variance > 0
        (('encoder', 'decoder'), True)
    """
    if not losses:
        raise ValueError("expected at least one loss, got none: pass {'name': loss}")
    if num_pairs < 2:
        raise ValueError(f"expected num_pairs >= 2, got {num_pairs}: an error needs two values at least")
    blocks = {name: _blocks(name, loss) for name, loss in losses.items()}
    reference_name, reference = next(iter(blocks.items()))
    for name, own in blocks.items():
        if {id(p) for ps in own.values() for p in ps} != {id(p) for ps in reference.values() for p in ps}:
            raise ValueError(
                f"expected losses of the same parameters, got others in {name!r} than in {reference_name!r}: build all "
                "losses from one pair"
            )
    result = {}
    with Progress("comparing gradients", num_pairs * len(losses), unit="pairs") as progress:
        for name, loss in losses.items():
            variance, signal = ({block: Moments() for block in reference} for _ in range(2))
            for _ in range(num_pairs):
                one, other = _gradients(loss, x, blocks[name]), _gradients(loss, x, blocks[name])
                for block in reference:
                    variance[block].add((one[block] - other[block]).square().sum()[None] / 2)
                    signal[block].add((one[block] * other[block]).sum()[None])
                progress.advance()
            result[name] = {
                block: BlockVariance(
                    float(variance[block].mean),
                    float(variance[block].std_error),
                    float(signal[block].mean),
                    float(signal[block].std_error),
                    sum(p.numel() for p in reference[block]),
                )
                for block in reference
            }
    return GradientVariance(result, num_pairs)


def _blocks(name: str, loss: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by the first part of their name, ``pair`` left out."""
    blocks: dict[str, list[nn.Parameter]] = {}
    for path, parameter in loss.named_parameters():
        if parameter.requires_grad:
            blocks.setdefault(path.removeprefix("pair.").split(".")[0], []).append(parameter)
    if not blocks:
        raise ValueError(f"expected a loss with trainable parameters, got none in {name!r}: build it from a pair")
    return blocks


def _gradients(loss: nn.Module, x: Tensor, blocks: Mapping[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """One draw of the gradient of the batch mean, flat, by block; float64. Parameters that the loss does not use: zero."""
    parameters = [p for block in blocks.values() for p in block]
    gradients = iter(torch.autograd.grad(loss(x).mean(), parameters, allow_unused=True, materialize_grads=True))
    return {
        block: torch.cat([next(gradients).detach().flatten().to(torch.float64) for _ in ps])
        for block, ps in blocks.items()
    }
