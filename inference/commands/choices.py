"""What system and data decide where nobody states it: likelihood, scaling, binarisation, latent width.

    data                  likelihood                      scaling      binarisation    latent width
    digits                discretized_normal, 17 levels   symmetric    none            16
    mnist:FOLDER          bernoulli                       unit         dynamic         16
    images:FOLDER         discretized_normal, 256 levels  symmetric    none            16
    toy densities         normal, learned scale           none         none            2
    npz:FILE, quantised   bernoulli for two levels, else discretized_normal            16 for images, else 2
      as classes          their number must be stated, as an entry "levels"
    npz:FILE, continuous  must be stated
    csv:FILE              bernoulli for zeros and ones, else normal, learned scale      2
      numbers of things   poisson or negative_binomial, to be stated, scaling counts
    text:FILE             categorical, a class a character classes      none            16
    hf:NAME               as images:FOLDER for a column of images, else as npz:FILE

A DDPM has discretized_normal for all data with levels and normal for others, with the variance of its own last step; a D3PM
has categorical, and on text a transformer unless another network is stated.

With --given-labels the networks read the data's labels, and their number is taken from the data.

A scaling that is not stated is the one that the likelihood is made for. The one exception is a normal likelihood of
quantised data: it is valid on any scaling, so whether counts 0..255 are meant must be stated.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from inference.bounds.particles import forked_rng
from inference.commands.options import TrainOptions
from inference.commands.pair_choices import SHARED, choices_of, pair_arguments
from inference.training.config import ConfigError
from inference.training.datasets import TOY_DENSITIES, DataSet, list_data, load_data
from ppl_models.hvae import HVAE
from ppl_models.likelihoods import (
    Bernoulli,
    Categorical,
    DiscretizedNormal,
    Likelihood,
    NegativeBinomial,
    Normal,
    Poisson,
)
from ppl_models.pair import ModelGuidePair
from ppl_models.registry import system

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "normal": Normal,
    "categorical": Categorical,
    "discretized_normal": DiscretizedNormal,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}
LATENT_DIMS = {"image": 16, "point": 2, "text": 16}


def choose(name: str, options: TrainOptions) -> tuple[TrainOptions, DataSet]:
    """The options with nothing left open, and the data under them.

    Args:
        name: the system.
        options: as stated; paths in ``data`` are made absolute, so that a run finds its data again from any folder.

    Raises:
        ConfigError: what cannot be chosen for these data and must be stated.
        DataError: data that cannot be read, or that are not as stated.

    Example:
        >>> chosen, data = choose("vae", TrainOptions(data="digits"))
        >>> chosen.likelihood, chosen.scaling, chosen.latent_dim, data.levels
        ('discretized_normal', 'symmetric', 16, 17)
    """
    spec = _absolute(options.data)
    counts = options.likelihood in LIKELIHOODS and LIKELIHOODS[options.likelihood].scaling == "counts"
    stated = "counts" if counts and options.scaling is None else options.scaling
    levels, kind = _levels_and_kind(spec, stated, options.columns)
    likelihood = options.likelihood or _likelihood_of_system(name, levels) or _likelihood(spec, levels, kind)
    if kind == "text" and likelihood != "categorical":
        raise ConfigError(
            f"likelihood: expected categorical, the law of characters, for {options.data}, got {likelihood}; leave "
            "--likelihood out, or train a system that takes classes, such as d3pm"
        )
    if likelihood in ("categorical", "discretized_normal") and levels is None:
        raise ConfigError(
            f"likelihood: expected one of continuous data for {options.data}, got {likelihood}, which needs a number of "
            "levels; use --likelihood normal, or name the number in an entry 'levels' of the npz file"
        )
    scaling = options.scaling or _scaling(spec, likelihood, levels)
    mnist = spec.startswith("mnist:")
    binarization = options.binarization or ("dynamic" if mnist and likelihood == "bernoulli" else "none")
    data = load_data(
        spec,
        scaling=scaling,
        binarization=binarization,
        test_fraction=options.test_fraction,
        columns=options.columns,
    )
    known = choices_of(name)
    latent_dim = options.latent_dim
    if "latent_dim" in known and latent_dim is None and "latent_dim" not in options.pair:
        latent_dim = LATENT_DIMS[kind]
    labels = {"num_labels": _num_labels(data, options.data)} if options.given_labels else {}
    sequences = {"network": "transformer"} if kind == "text" and "network" in known else {}
    update = {"latent_dim": latent_dim, "pair": {**sequences, **labels, **options.pair}}
    arguments = pair_arguments(name, options.model_copy(update=update))
    hidden = arguments.get("hidden")
    flat = hidden is None or isinstance(hidden, int) or all(isinstance(width, int) for width in hidden)
    shared = {key: arguments.pop(key, None) for key in SHARED if key != "hidden" or flat}
    if "hidden" in shared:
        shared["hidden"] = (hidden,) if isinstance(hidden, int) else hidden and tuple(hidden)
    chosen = {
        "data": spec,
        "start_from": options.start_from and str(Path(options.start_from).expanduser().absolute()),
        "likelihood": likelihood,
        "scaling": data.scaling,
        "binarization": data.binarization,
        **shared,
        "pair": arguments,
    }
    return options.model_copy(update=chosen), data


def build_pair(name: str, options: TrainOptions, data: DataSet) -> ModelGuidePair:
    """The pair of a system under options that leave nothing open; its weights depend on ``options.seed`` alone.

    Raises:
        ValueError: no such system; the message lists those there are.
        ConfigError: a likelihood that the system does not take.
    """
    preset = system(name)
    likelihood = _make_likelihood(name, options.likelihood or "", data.levels)
    with seeded(options.seed):
        try:
            pair = preset(data.data_shape, likelihood, **pair_arguments(name, options))
        except TypeError as error:
            raise ConfigError(f"likelihood: {error}") from error
    assert isinstance(pair, ModelGuidePair)
    if isinstance(likelihood, Poisson | NegativeBinomial) and isinstance(data.train, torch.Tensor):
        decoder = pair.decoders[0] if isinstance(pair, HVAE) else pair.get_submodule("decoder")
        likelihood.start_at_mean(decoder, data.train)
    return pair


def _num_labels(data: DataSet, spec: str) -> int:
    """How many labels data have: names where these are known, else one more than the largest."""
    if data.train_labels is None:
        raise ConfigError(
            f"given_labels: expected data with labels, got {spec} without; name their column, as in csv:FILE@COLUMN, or add "
            "train_labels to an npz file"
        )
    if data.label_names is not None:
        return len(data.label_names)
    parts = [labels for labels in (data.train_labels, data.test_labels) if labels is not None and len(labels)]
    count = max(int(labels.max()) for labels in parts) + 1
    seen = len(data.train_labels.unique())
    if seen < count:
        warnings.warn(
            f"given_labels: {count - seen} of the labels 0..{count - 1} never occur in training, so that nothing is learned of "
            "them; number those there are without gaps",
            stacklevel=2,
        )
    return count


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random stream of a seed within the block; the stream outside is left as it was."""
    with forked_rng():
        torch.manual_seed(seed)
        yield


def _absolute(spec: str) -> str:
    reader, sign, place = spec.partition(":")
    if reader not in ("mnist", "npz", "csv", "images", "text", "hf"):  # of no kind that there is
        return spec
    if reader == "hf" and not Path(place).is_dir():  # a name on the hub
        return spec
    return f"{reader}:{Path(place).expanduser().absolute()}" if sign and place else spec


def _levels_and_kind(spec: str, scaling: str | None, columns: tuple[str, ...] | None = None) -> tuple[int | None, str]:
    """The number of levels (None: continuous) and the kind of data, from the list of data or from the file."""
    rows = {row["spec"].partition(":")[:2]: row for row in list_data()}
    row = rows.get(spec.partition(":")[:2])
    if row is None or row["kind"] in (None, "text") or spec.startswith("csv:"):
        data = load_data(spec, scaling=scaling, columns=columns)  # of what is no data, this says so
        return data.levels, data.kind
    return row["levels"], row["kind"]


def _likelihood_of_system(name: str, levels: int | None) -> str | None:
    """What a system's programs ask for, whatever the data; None where the data decide."""
    match name:
        case "ddpm":
            return "normal" if levels is None else "discretized_normal"
        case "d3pm":
            return "categorical"
    return None


def _likelihood(spec: str, levels: int | None, kind: str) -> str:
    if kind == "text":
        return "categorical"
    if spec in TOY_DENSITIES or (spec.startswith("csv:") and levels is None):
        return "normal"
    if levels is None:
        raise ConfigError(
            "likelihood: expected to be stated for continuous data from a file, got none; use --likelihood normal, "
            "or --likelihood bernoulli for zeros and ones"
        )
    return "bernoulli" if spec.startswith("mnist:") or levels == 2 else "discretized_normal"


def _scaling(spec: str, likelihood: str, levels: int | None) -> str | None:
    if spec in TOY_DENSITIES:
        return None
    if likelihood == "normal" and levels is not None:
        raise ConfigError(
            f"scaling: expected to be stated for a normal likelihood of data with {levels} levels, got none; use "
            f"--scaling unit or symmetric (or none, for counts 0..{levels - 1})"
        )
    return LIKELIHOODS[likelihood].scaling


def _make_likelihood(system_name: str, name: str, levels: int | None) -> Likelihood:
    match name:
        case "bernoulli":
            return Bernoulli()
        case "normal":
            return Normal() if system_name == "ddpm" else Normal(scale="learned")
        case "poisson":
            return Poisson()
        case "negative_binomial":
            return NegativeBinomial()
        case "categorical" if levels is not None:
            return Categorical(levels)
        case "discretized_normal" if levels is not None:
            return DiscretizedNormal(levels)
    raise ConfigError(f"likelihood: expected one of {', '.join(LIKELIHOODS)} that fits the data, got {name!r}")
