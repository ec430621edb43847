"""When the loss or a gradient is not finite: stop before the step, and say which site, datum and step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inference.training.noise import seed_noise
from inference.training.objectives import ElboLoss
from ppl_models.networks.labels import labelled

REMEDY = "lower the learning rate, clip the gradient, or look at that datum"


class TrainingDiverged(RuntimeError):
    """A bound, gradient or parameter that is NaN or infinite; the message names the first bad site, datum and step."""


def diagnose(loss: ElboLoss, x: Tensor, rows: Tensor, step: int, seed: int) -> str | None:
    """Computes the step's terms again on the same draws and finds the first that is not finite, or whose gradient is not.

    Args:
        loss: the objective that went wrong.
        x: the batch, as it entered the objective.
        rows: the data's indices in the training set.
        step: number of the step, from 1.
        seed: of the step's draws.

    Returns:
        What to tell; None where each datum is in order by itself.
    """
    seed_noise(seed, x.device)
    terms = loss.terms(x)
    found = first_bad_term(terms)
    if found:
        site, position, value = found
        datum = int(rows[position])
        return f"expected a finite loss, got {value} at site {site!r} for datum {datum} in step {step}: {REMEDY}"
    found_gradient = _first_bad_gradient(loss, x, terms, seed)
    if found_gradient:
        site, parameter, place = found_gradient
        datum_text = f"datum {int(rows[place])}" if place is not None else "a datum that alone does not show it"
        return (
            f"expected finite gradients, got a NaN or infinity in that of {parameter} from site {site!r} for {datum_text} "
            f"in step {step}: {REMEDY}"
        )
    return None


def first_bad_term(terms: dict[str, Tensor]) -> tuple[str, int, float] | None:
    """Site, position in the batch and value of the first term that is not finite.

    Example:
        >>> first_bad_term({"z": torch.zeros(2), "x": torch.tensor([0.0, float("inf")])})
        ('x', 1, inf)
    """
    for site, term in terms.items():
        bad = (~torch.isfinite(term)).nonzero().flatten()
        if len(bad):
            return site, int(bad[0]), term[bad[0]].item()
    return None


def first_bad_parameter(module: nn.Module) -> str | None:
    """The name of the first parameter with a NaN or an infinity.

    Example:
        >>> first_bad_parameter(nn.Linear(2, 2)) is None
        True
    """
    return next((name for name, p in module.named_parameters() if not bool(torch.isfinite(p).all())), None)


def _first_bad_gradient(
    loss: ElboLoss, x: Tensor, terms: dict[str, Tensor], seed: int
) -> tuple[str, str, int | None] | None:
    """Site, parameter and position of the first gradient that is not finite; no position where no datum shows it alone.

    An infinite derivative at one datum makes every datum's gradient NaN, as zero times infinity, when they are computed
    together. So if all are bad, each is computed by itself, with draws of its own.
    """
    for site, term in terms.items():
        bad = [_bad_parameter(loss.pair, term[i]) for i in range(len(term) if term.requires_grad else 0)]
        places = [i for i, name in enumerate(bad) if name is not None]
        if places and (len(places) < len(bad) or len(bad) == 1):
            return site, str(bad[places[0]]), places[0]
        if places:
            alone = _first_bad_alone(loss, x, site, seed)
            return (site, *alone) if alone else (site, str(bad[0]), None)
    return None


def _first_bad_alone(loss: ElboLoss, x: Tensor, site: str, seed: int) -> tuple[str, int] | None:
    labels = loss.pair.labels
    for i in range(len(x)):
        seed_noise(seed, x.device)
        try:
            with labelled(loss, labels if labels is None or labels.dim() == 0 else labels[i : i + 1]):
                name = _bad_parameter(loss.pair, loss.terms(x[i : i + 1])[site][0])
        except (RuntimeError, ValueError):  # batch normalisation, for one, takes no single datum
            return None
        if name is not None:
            return name, i
    return None


def _bad_parameter(module: nn.Module, term: Tensor) -> str | None:
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(term, [p for _, p in named], retain_graph=True, allow_unused=True)
    for (name, _), gradient in zip(named, gradients, strict=True):
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            return name
    return None
