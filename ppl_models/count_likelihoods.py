r"""Likelihoods of things counted: words of a text, molecules of a gene, visits of a page.

    x_i | z ~ Poisson(e^{l_i})                       variance e^{l_i}
    x_i | z ~ NegativeBinomial(e^{l_i}, r)           variance e^{l_i} + e^{2 l_i}/r: counts that vary more than a Poisson's

with the log means l the decoder's output. Convention: counts are floating point numbers that hold whole numbers >= 0, scaling
"counts"; the presets' encoders read log(1 + x), because counts span orders of magnitude.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

import ppl_models.count_distributions as extra
from ppl_models.data_checks import refuse_other_than_floats, refuse_where
from ppl_models.likelihood import Likelihood, Parameters, check_dims, log_positive, single_tensor, value_and_scale

__all__ = ["NegativeBinomial", "Poisson"]


class _Counts(Likelihood):
    scaling = "counts"
    is_discrete = True

    def check(self, x: Tensor, name: str = "x") -> None:
        """Floats, each a whole number >= 0; see `Likelihood.check`."""
        refuse_other_than_floats(x, name)
        law = type(self).__name__
        remedy = "numbers that are no counts take a normal likelihood"
        refuse_where(x, (x < 0) | (x != x.round()), name, f"whole numbers >= 0 under {law}", remedy)

    def start_at_mean(self, decoder: nn.Module, x: Tensor) -> None:
        """Sets the bias of a decoder's last linear layer such that the law's means begin near those of data.

        Log means of zero, where networks begin, are far from counts in the hundreds: the latents would be taken up with them.

        Args:
            decoder: with a ``torch.nn.Linear`` whose output, flattened, begins with the log means, as a preset's has.
            x: data ``[N, *data_shape]``.

        Raises:
            ValueError: there is no such layer.

        Example:
            >>> decoder = nn.Linear(2, 3)
            >>> Poisson().start_at_mean(decoder, torch.tensor([[0.0, 5.0, 200.0], [2.0, 5.0, 300.0]]))
            >>> [round(mean) for mean in decoder.bias.exp().tolist()]
            [1, 5, 250]
        """
        means = x.mean(0).flatten()
        last = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
        if not last or last[-1].bias is None or len(last[-1].bias) not in (len(means), 2 * len(means)):
            raise ValueError(f"expected a decoder that ends in a linear layer of {len(means)} log means, found none")
        with torch.no_grad():
            last[-1].bias[: len(means)] = means.clamp(min=1 / len(x)).log()


class Poisson(_Counts):
    """x_i | z ~ Poisson(e^{l_i}), with the log means l the decoder's output.

        log p(x | z) = sum_i x_i l_i - e^{l_i} - log x_i!

    Source: the classical law of counts; in this use Gopalan, Hofman and Blei 2013 (arXiv:1311.1704), section 2.

    Example:
        >>> Poisson()(torch.zeros(5, 4), data_dim=1).log_prob(torch.zeros(5, 4))    # means of one: e^-1 each
        tensor([-4., -4., -4., -4., -4.])
    """

    def forward(self, parameters: Parameters, data_dim: int) -> TorchDistribution:
        """Poisson in each dimension; see `Likelihood.forward`."""
        log_mean = single_tensor(parameters, "log means", "return the log means alone")
        check_dims(log_mean, data_dim)
        return extra.Poisson(log_mean).to_event(data_dim)


class NegativeBinomial(_Counts):
    """x_i | z ~ NegativeBinomial with mean mu_i = e^{l_i} and variance mu_i + mu_i^2/r; l is the decoder's output.

    Source: Lopez et al. 2018 (*Deep generative modeling for single-cell transcriptomics*), who take r by dimension.

    Args:
        size: r: "learned" (one parameter for all dimensions), a positive number (fixed), or None (the decoder returns the
            pair (l, r), an r for each dimension).
        init_size: where a learned r starts; 10 unless given.

    Raises:
        ValueError: a size that is not positive and finite.

    Example:
        >>> p = NegativeBinomial(size=1.0)(torch.zeros(5, 4), data_dim=1)    # mean and size one: 1/2 each at zero
        >>> p.log_prob(torch.zeros(5, 4)).exp()
        tensor([0.0625, 0.0625, 0.0625, 0.0625, 0.0625])
    """

    def __init__(self, size: float | str | None = "learned", init_size: float | None = None) -> None:
        super().__init__()
        self.needs_scale = size is None
        self.size = size
        if size == "learned":
            self.init_size = 10.0 if init_size is None else init_size
            self.log_size = nn.Parameter(torch.tensor(log_positive("init_size", self.init_size)))
        elif init_size is not None:
            raise ValueError(f'expected init_size only with size="learned", got size={size!r}; leave one of them out')
        elif size is not None:
            log_positive("size", size)

    def forward(self, parameters: Parameters, data_dim: int) -> TorchDistribution:
        """Negative binomial in each dimension; see `Likelihood.forward`."""
        if self.size is None:
            log_mean, size = value_and_scale(parameters, "(log mean, size)", "size")
        else:
            log_mean = single_tensor(
                parameters, "log means", "build the likelihood with size=None to use the decoder's"
            )
            size = self.log_size.exp() if self.size == "learned" else log_mean.new_full((), float(self.size))
        check_dims(log_mean, data_dim)
        return extra.NegativeBinomial(log_mean, size).to_event(data_dim)

    def config(self) -> dict[str, Any]:
        """See `Likelihood.config`."""
        return {"size": self.size} | ({"init_size": self.init_size} if self.size == "learned" else {})
