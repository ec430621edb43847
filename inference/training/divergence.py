"""When the loss or a gradient is not finite: stop before the step, and say which site, datum and step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inference.training.objectives import ElboLoss


class TrainingDiverged(RuntimeError):
    """A loss or a gradient that is NaN or infinite; the message names the first bad site, datum and step."""


def diagnose(loss: ElboLoss, x: Tensor, indices: Tensor, step: int, seed: int) -> TrainingDiverged:
    """Computes the step's terms again on the same draws and finds the first that is not finite, or whose gradient is not.

    Args:
        loss: the objective that went wrong.
        x: the batch, as it entered the objective.
        indices: the data's indices in the training set.
        step: number of the step, from 1.
        seed: of the step's draws.

    Returns:
        The error to raise.
    """
    remedy = "lower the learning rate, clip the gradient, or look at that datum"
    torch.manual_seed(seed)
    terms = loss.terms(x)
    for site, term in terms.items():
        bad = (~torch.isfinite(term)).nonzero().flatten()
        if len(bad):
            value, datum = float(term[bad[0]]), int(indices[bad[0]])
            return TrainingDiverged(
                f"expected a finite loss, got {value} at site {site!r} for datum {datum} in step {step}: {remedy}"
            )
    named = [(name, p) for name, p in loss.pair.named_parameters() if p.requires_grad]
    for site, term in terms.items():
        if not term.requires_grad:
            continue
        for i in range(len(term)):
            name = _first_bad_gradient(term[i], named)
            if name:
                return TrainingDiverged(
                    f"expected finite gradients, got a NaN or infinity in {name} from site {site!r} for datum "
                    f"{int(indices[i])} in step {step}: {remedy}"
                )
    return TrainingDiverged(
        f"expected finite gradients, got a NaN or infinity in step {step}, in the sum alone: {remedy}"
    )


def _first_bad_gradient(term: Tensor, named: list[tuple[str, nn.Parameter]]) -> str | None:
    gradients = torch.autograd.grad(term, [p for _, p in named], retain_graph=True, allow_unused=True)
    for (name, _), gradient in zip(named, gradients, strict=True):
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            return name
    return None
