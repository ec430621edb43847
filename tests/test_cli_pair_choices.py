"""A system's own choices on the command line: checked against its preset, printed whole, read back."""

import numpy as np
import pytest
import yaml

from inference.commands.choices import build_pair, choose
from inference.commands.options import TrainOptions, gather_options
from inference.commands.pair_choices import choices_of, pair_arguments
from inference.training.config import ConfigError
from inference.training.scaling import DataError
from ppl_models.registry import SYSTEMS, build, describe


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_built_for_digits_and_its_choices_are_printed_whole(name):
    stated = {key: value for key, value in {"blocks": 1, "num_timesteps": 30}.items() if key in choices_of(name)}
    options, data = choose(name, TrainOptions(data="digits", hidden="8", pair=stated))
    pair = build_pair(name, options, data)
    assert pair.data_shape == data.data_shape
    pair.check_data(data.train[:2])
    again = gather_options(yaml.safe_load(options.text()))
    assert choose(name, again)[0] == options, "what is printed is a file for --config"
    other = build(describe(pair))
    assert describe(other) == describe(pair)


def test_pair_takes_values_in_yaml_and_one_width_for_a_network():
    options = gather_options({"data": "digits", "hidden": "32"}, [], None, ["num_timesteps=7", "variance=learned"])
    arguments = pair_arguments("ddpm", options)
    assert (arguments["num_timesteps"], arguments["variance"], arguments["hidden"]) == (7, "learned", 32)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        (
            "ddpm",
            {"pair": {"steps": 3}},
            r"steps: expected a choice of ddpm, which are num_timesteps, .*; leave it out",
        ),
        ("ddpm", {"latent_dim": 3}, r"latent_dim: expected a choice of ddpm"),
        ("ddpm", {"hidden": "8,8"}, r"hidden: .*, got \[8, 8\]"),
        ("ddpm", {"pair": {"num_timesteps": "many"}}, r"num_timesteps: .*integer.*, got 'many'"),
        ("hvae", {"pair": {"guide": "sideways"}}, r"guide: .*bottom_up.*, got 'sideways'"),
        ("vae", {"latent_dim": 3, "pair": {"latent_dim": 4}}, r"latent_dim: given twice"),
    ],
)
def test_choices_that_a_system_does_not_have_are_refused_in_one_sentence(name, options, match):
    with pytest.raises(ConfigError, match=match):
        pair_arguments(name, TrainOptions(data="digits", **options))


def test_an_assignment_without_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"--pair: expected key=value, got 'num_timesteps'"):
        gather_options({"data": "digits"}, [], None, ["num_timesteps"])


@pytest.mark.parametrize(
    ("name", "likelihood"), [("ddpm", "discretized_normal"), ("d3pm", "categorical"), ("vae", "discretized_normal")]
)
def test_the_likelihood_is_the_systems_where_it_has_one(name, likelihood):
    assert choose(name, TrainOptions(data="digits"))[0].likelihood == likelihood
    assert choose("ddpm", TrainOptions(data="two_moons"))[0].likelihood == "normal"


def test_the_number_of_classes_of_a_file_is_stated_and_never_guessed(tmp_path):
    classes = np.arange(14).reshape(7, 2) % 7
    np.savez(tmp_path / "x.npz", train=classes)
    options = TrainOptions(data=f"npz:{tmp_path / 'x.npz'}", pair={"num_timesteps": 3})
    for name, likelihood in (("d3pm", None), ("vae", "categorical")):
        with pytest.raises(DataError, match=r"number of classes .*; add to the npz file an entry 'levels', 7 or more"):
            choose(name, options.model_copy(update={"likelihood": likelihood, "pair": {}}))
    with pytest.raises(DataError, match="integers up to 6 without it, which may be 7 levels or dark 8-bit grey values"):
        choose("vae", options.model_copy(update={"pair": {}}))
    np.savez(tmp_path / "x.npz", train=classes, levels=7)
    chosen, data = choose("d3pm", options)
    assert (chosen.likelihood, data.levels, build_pair("d3pm", chosen, data).likelihood.num_classes) == (
        "categorical",
        7,
        7,
    )
