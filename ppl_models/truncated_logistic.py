r"""A logistic law, cut to [-1 - h, 1 + h] and rounded to K evenly spaced values (D3PM, arXiv:2107.03006, A.8).

With v_k = -1 + 2k/(K - 1), h = 1/(K - 1), mu = tanh(location + v_{x_t}) and precision 1/s = exp(2 - log-scale):

    p(k) prop. to sigmoid((v_k + h - mu)/s) - sigmoid((v_k - h - mu)/s)
         =        sigmoid((v_k + h - mu)/s) sigmoid(-(v_k - h - mu)/s) (1 - e^(-2h/s))

The product is exact however far in the tails, without the epsilon that a difference needs. The differences telescope, so that
their sum over k is the same product between the ends, (1 + h - mu)/s and (-1 - h - mu)/s:

    sum_k ... = sigmoid((1 + h - mu)/s) sigmoid((1 + h + mu)/s) (1 - e^(-(2 + 2h)/s))

and the probability of one class costs nothing for the others. Convention: (location, log-scale) are on the last axis of the
parameters; laws are independent for each entry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ppl_models.processes.transitions import shapes_are_fixed

__all__ = ["TruncatedLogistic", "logistic_logits"]

_SCALE_SHIFT = 2.0  # so that a network that returns zero means a scale of e^-2 on [-1, 1], neither a spike nor flat
_PIECE = 2**16  # numbers at a time, which stay in a core's cache and in memory that is in use already
_SHARPEST = -60.0  # log-scale below which nothing changes: a point on one value, long before float32 overflows
_FLAT = 1e-30  # a precision at which all classes have the same probability, in float64 too


class TruncatedLogistic:
    """The laws of all entries of a batch.

    Args:
        parameters: (location, log-scale) on the last axis, ``[*x.shape, 2]``.
        x_t: int64 in 0..K-1.
        num_classes: K >= 2.

    A log-scale below -60 counts as -60, of which all probability is on one value for every K and precision.

    Example:
        >>> law = TruncatedLogistic(torch.zeros(1, 2), torch.tensor([1]), 3)
        >>> law.logits().softmax(-1)
        tensor([[0.0242, 0.9515, 0.0242]])
        >>> law.log_prob(torch.tensor([0])).exp()
        tensor([0.0242])
    """

    def __init__(self, parameters: Tensor, x_t: Tensor, num_classes: int) -> None:
        location, log_scale = parameters.unbind(-1)
        self.num_classes = num_classes
        self.half = 1 / (num_classes - 1)
        self.values = 2 * self.half * torch.arange(num_classes, dtype=parameters.dtype, device=parameters.device) - 1
        self.mean = torch.tanh(location + self.values[x_t])
        self.precision = (_SCALE_SHIFT - log_scale.clamp(min=_SHARPEST)).exp()

    def logits(self) -> Tensor:
        """log p(k) of all k, ``[*x.shape, K]``, unnormalised."""
        offset = self.values - self.mean[..., None]
        precision = self.precision[..., None]
        return logsigmoid((offset + self.half) * precision) + logsigmoid(-(offset - self.half) * precision)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), ``[*x.shape]`` nats."""
        offset = self.values[x] - self.mean
        upper, lower = (self.half + offset) * self.precision, (self.half - offset) * self.precision
        return logsigmoid(upper) + logsigmoid(lower) - self._log_norm()

    def sum_log1p(self, log_odds: Tensor) -> Tensor:
        """sum_k log(1 + e^log_odds p(k)), ``[*x.shape]``.

        Of probabilities, not of their logarithms: one that underflows adds nothing that could be seen.

        Args:
            log_odds: broadcastable to x; finite with room to spare, e^log_odds < 1e30.
        """
        shift, log_factor = self.mean * self.precision, log_odds - self._log_norm()
        of_edges = _sum_log1p if shapes_are_fixed() else _SumLog1p.apply
        return of_edges(shift, self.precision, log_factor, self.values + self.half, self.half - self.values)

    def _log_norm(self) -> Tensor:
        """log of the sum over k of the exponentials of :meth:`logits`."""
        precision = self.precision.clamp(min=_FLAT)  # 0/0 below
        ratio = torch.expm1(-(2 + 2 * self.half) * precision) / torch.expm1(-2 * self.half * precision)
        end = 1 + self.half
        return ratio.log() + logsigmoid((end - self.mean) * precision) + logsigmoid((end + self.mean) * precision)


def _sum_log1p(shift: Tensor, precision: Tensor, log_factor: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """sum_k log(1 + factor sigmoid(precision above_k - shift) sigmoid(precision below_k + shift))."""
    upper = torch.addcmul(-shift[..., None], above, precision[..., None]).sigmoid()
    lower = torch.addcmul(shift[..., None], below, precision[..., None]).sigmoid()
    return (upper * lower * log_factor.exp()[..., None]).log1p().sum(-1)


class _SumLog1p(torch.autograd.Function):
    """:func:`_sum_log1p` with its gradient, piece by piece, so that nothing K times as large as x is ever kept.

    With w_k = odds_k / (1 + odds_k), the derivatives of the sum are sum_k w_k in log_factor and
    sum_k w_k (1 - upper_k), sum_k w_k (1 - lower_k) weighted by how the sigmoids' arguments move.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        shift, precision, log_factor = (each.flatten() for each in torch.broadcast_tensors(*arguments[:3]))
        above, below = arguments[3:]
        ones = torch.ones_like(above)
        of_upper, of_lower = torch.stack([-ones, above]), torch.stack([ones, below])
        rows = max(1, _PIECE // len(above))
        buffers = above.new_empty(3, min(rows, len(shift)), len(above))
        results = above.new_empty(4, len(shift))
        for start in range(0, len(shift), rows):
            piece = slice(start, start + rows)
            linear = torch.stack([shift[piece], precision[piece]], -1)
            upper, lower, odds = buffers[:, : len(linear)]
            torch.mm(linear, of_upper, out=upper).sigmoid_()
            torch.mm(linear, of_lower, out=lower).sigmoid_()
            torch.mul(upper, lower, out=odds).mul_(log_factor[piece, None].exp())
            total, of_shift, of_precision, of_factor = results[:, piece]
            if any(ctx.needs_input_grad):
                w = odds / (odds + 1)
                torch.sum(w, -1, out=of_factor)
                by_upper = torch.addcmul(w, w, upper, value=-1) @ of_upper.T
                by_lower = w.addcmul_(w, lower, value=-1) @ of_lower.T
                torch.add(by_upper, by_lower, out=by_upper)
                of_shift.copy_(by_upper[:, 0])
                of_precision.copy_(by_upper[:, 1])
            torch.sum(odds.log1p_(), -1, out=total)
        shape = torch.broadcast_shapes(*(each.shape for each in arguments[:3]))
        total, *derivatives = results.reshape(4, *shape)
        ctx.save_for_backward(*arguments, *derivatives)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *arguments, of_shift, of_precision, of_factor = ctx.saved_tensors
        (gradient,) = gradients
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for
            found = torch.autograd.grad(_sum_log1p(*arguments), arguments[:3], gradient, create_graph=True)
            return (*found, None, None)
        found = (gradient * each for each in (of_shift, of_precision, of_factor))
        return (*(g.sum_to_size(x.shape) for g, x in zip(found, arguments, strict=False)), None, None)


def logistic_logits(parameters: Tensor, x_t: Tensor, num_classes: int) -> Tensor:
    """:meth:`TruncatedLogistic.logits`, ``[*x.shape, K]``.

    Example:
        >>> logistic_logits(torch.zeros(1, 2), torch.tensor([1]), 3).softmax(-1)
        tensor([[0.0242, 0.9515, 0.0242]])
    """
    return TruncatedLogistic(parameters, x_t, num_classes).logits()
