"""What a run that is conditioned on labels is asked for by ``--label``: one of them, by number or name, or all in turn."""

from __future__ import annotations

from inference.training.runs import Run
from inference.views.plot_data import at_labels
from ppl_models.pair import ModelGuidePair

MAX_COLUMNS = 32


def given_label(run: Run, label: str | None) -> ModelGuidePair:
    """The run's pair at a label; at all of them in turn where none is asked for, and as it is where it knows of none.

    Args:
        run: from :func:`inference.load_run`.
        label: a name that the run's data give to one, or its number 0..K-1 where no name is a number itself.

    Raises:
        ValueError: a label of a run that is not conditioned on labels, or one that it does not know.

    Example:
        >>> from ppl_models import VAE
        >>> from ppl_models.likelihoods import Bernoulli
        >>> pair = VAE.preset((6,), Bernoulli(), latent_dim=2, hidden=(4,), num_labels=3)
        >>> run = Run(pair, {"data": {"label_names": ["a", "b", "c"]}})
        >>> given_label(run, "b").labels, given_label(run, None).labels
        (tensor(1), tensor([0, 1, 2]))
    """
    count = run.pair.num_labels
    if count is None:
        if label is not None:
            raise ValueError(
                f"expected --label with a run that is conditioned on labels (ppl train --given-labels), got {label!r} for one "
                "that is not: leave it out"
            )
        return run.pair
    if label is None:
        return run.pair.given(list(range(count)))
    names = _names(run, count)
    if label in names:
        return run.pair.given(names.index(label))
    if label.isdecimal() and int(label) < count and not any(name.isdecimal() for name in names):
        return run.pair.given(int(label))
    shown = ", ".join(names[:10]) + (", ..." if count > 10 else "")
    raise ValueError(f"--label: expected one of the run's {count} labels, {shown}, got {label!r}: choose one of these")


def in_words(run: Run, law: str, pair: ModelGuidePair) -> str:
    """What samples were drawn from, with the label's name in place of its number."""
    names = run.config["data"].get("label_names")
    if names is None or pair.labels is None or pair.labels.dim() == 1:
        return law
    return law.replace(at_labels(pair), at_labels(pair, names))


def names_in_turn(run: Run, num: int) -> tuple[str, ...]:
    """What stands above the columns of a picture of ``num`` samples at all labels in turn; nothing where that is no picture.

    Example:
        >>> from ppl_models import VAE
        >>> from ppl_models.likelihoods import Bernoulli
        >>> pair = VAE.preset((6,), Bernoulli(), latent_dim=2, hidden=(4,), num_labels=3)
        >>> names_in_turn(Run(pair, {"data": {}}), 6), names_in_turn(Run(pair, {"data": {}}), 2)
        (('0', '1', '2'), ())
    """
    count = run.pair.num_labels
    return () if count is None or not count <= num or count > MAX_COLUMNS else tuple(_names(run, count))


def _names(run: Run, count: int) -> list[str]:
    return list(run.config["data"].get("label_names") or map(str, range(count)))
