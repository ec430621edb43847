"""A RUN opened for looking at: the trained pair and the data to look at it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.training.datasets import DataError, DataSet, load_data
from inference.training.inputs import fingerprint
from inference.training.items import first_entry, num_items
from inference.training.runs import Run, load_run
from inference.training.scaling import binarize_fixed
from inference.training.standardizing import Standardization
from inference.views.bounds import has_point_guide
from ppl_models.diffusion import Diffusion
from ppl_models.networks.labels import refuse_other_labels
from ppl_models.pair import ModelGuidePair


@dataclass(frozen=True)
class Opened:
    """A run, data ``x`` ``[N, *data_shape]`` in the pair's dtype with their labels if any, and what ``x`` is in words.

    The pair of a run that is conditioned on labels has been given those of ``x``.
    """

    run: Run
    folder: Path
    x: Tensor
    labels: Tensor | None
    words: str
    data: DataSet

    @property
    def pair(self) -> ModelGuidePair:
        """The run's pair, in evaluation mode."""
        return self.run.pair


def open_run(folder: Path, spec: str | None = None, num_data: int | None = None) -> Opened:
    """The run in a folder, with held-out data (training data where there are none).

    Args:
        folder: the RUN folder.
        spec: other data than the run's own, under the run's scaling and binarisation.
        num_data: how many data to take, the first ones; None: all.

    Raises:
        RunError: not a run, or one whose data are not on record and none are given.
        DataError: data of another shape, that the pair gives no probability to, or that are no longer those of the run.
    """
    run = load_run(folder)
    data = _data(run, spec)
    if data.data_shape != run.pair.data_shape:
        raise DataError(
            f"data: expected data of shape {list(run.pair.data_shape)} as {folder} was trained on, got "
            f"{list(data.data_shape)}; give data of that shape with --data"
        )
    held_out = data.test is not None
    source = data.train if data.test is None else data.test
    labels = data.test_labels if held_out else data.train_labels
    total = num_items(source)
    count = total if num_data is None else min(num_data, total)
    x = source[:count] if isinstance(source, Tensor) else torch.stack([first_entry(source[i]) for i in range(count)])
    if x.is_floating_point():
        x = x.to(next(run.pair.parameters()).dtype)
    if data.binarization == "dynamic" and not held_out:
        x = binarize_fixed(x, 0)
    run.pair.check_data(x, "test" if held_out else "train")
    labels = None if labels is None else labels[:count]
    if run.pair.num_labels is not None:
        known = _by_name(labels, data.label_names, run.config["data"].get("label_names"), run.pair.num_labels)
        run = replace(run, pair=run.pair.given(_all_known(known, run.pair.num_labels, data.name)))
    own = "training " if spec is None else ""  # of other data nobody said what they are for
    part = "held-out " if held_out else own
    words = f"{total if count == total else f'the first {count} of {total}'} {part}data of {data.name}"
    if data.standardization is not None:
        words += f", standardised ({offset_in_words(data.standardization)})"
    return Opened(run, folder, x, labels, words, data)


def _by_name(
    labels: Tensor | None, names: Sequence[str] | None, known: Sequence[str] | None, count: int
) -> Tensor | None:
    """Labels numbered as the run has them, for other data number their names by themselves; a number's name is the number."""
    if labels is None or (names is None and known is None):
        return labels
    own = list(map(str, range(int(labels.max()) + 1))) if names is None else list(names)
    place = {name: i for i, name in enumerate(map(str, range(count)) if known is None else known)}
    strange = [own[i] for i in labels.unique().tolist() if own[i] not in place]
    if strange:
        raise DataError(
            f"labels: expected those of the run, {', '.join(place)}, got {strange[0]!r}; leave its rows out"
        )
    return torch.tensor([place.get(name, -1) for name in own])[labels]


def _all_known(labels: Tensor | None, num_labels: int, name: str) -> Tensor:
    """The data's labels, which a run is conditioned on."""
    if labels is None:
        raise DataError(
            f"labels: expected one for each datum of {name}, for the run is conditioned on {num_labels} labels, got none: look "
            "at data that have them, as csv:FILE@COLUMN or an npz file with train_labels"
        )
    try:
        refuse_other_labels(labels, num_labels, "labels")
    except ValueError as error:
        raise DataError(str(error)) from None
    return labels


def offset_in_words(standardization: Standardization) -> str:
    """How log-densities of standardised data become those of the data in their own units."""
    return f"add {standardization.log_density_offset:.2f} nats a datum for densities in the data's own units"


def check_draws(pair: ModelGuidePair, purpose: str, of_a_diffusion: str) -> None:
    """Refuses pairs whose guide is not learned or draws nothing, for what compares or shows its draws.

    Args:
        pair: the programs.
        purpose: what the guide is wanted for, as in "draw a posterior from".
        of_a_diffusion: what to do instead with a diffusion.

    Raises:
        ValueError: a diffusion, or a guide of point masses.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> check_draws(LinearGaussian.random(data_dim=3, latent_dim=2), "draw a posterior from", "")
    """
    name = type(pair).__name__
    if isinstance(pair, Diffusion):
        raise ValueError(
            f"expected a learned guide to {purpose}, got {name}, whose guide is the fixed process q(x_t | x_0): "
            f"{of_a_diffusion}"
        )
    if has_point_guide(pair):
        raise ValueError(
            f"expected a guide that draws its latents to {purpose}, got {name}, whose guide is one point for each datum: "
            "ppl terms and ppl report show what it says"
        )


def _data(run: Run, spec: str | None) -> DataSet:
    stated = run.config["data"]
    if spec is not None:
        return load_data(
            spec,
            scaling=stated["scaling"],
            binarization=stated["binarization"],
            alphabet=stated.get("alphabet"),
            columns=stated.get("columns") if spec.startswith("csv:") else None,
            standardization=run.standardization,
        )
    data = run.data()
    if fingerprint(data, run.pair.num_labels is not None) != stated["sha256"]:
        raise DataError(
            f"data: expected the data that the run was trained on, but {stated['spec']} holds other values now; put them "
            "back, or say with --data what to look at"
        )
    return data


def units_of(data: DataSet) -> dict[str, Any]:
    """What the numbers of a file of draws are, as attributes for it.

    Example:
        >>> from inference.training.datasets import load_data
        >>> units_of(load_data("digits", scaling="symmetric"))
        {'scaling': 'symmetric', 'levels': 17}
    """
    found: dict[str, Any] = {"scaling": data.scaling}
    if data.levels is not None:
        found["levels"] = data.levels
    if data.standardization is not None:
        found["center"] = data.standardization.center.flatten().numpy()
        found["spread"] = data.standardization.spread.flatten().numpy()
        found["data_units"] = "standardised: value * spread + center, entry by entry, is in the data's own units"
    return found
