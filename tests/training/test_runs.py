"""A RUN folder: what it holds, that it loads again as it was, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from inference import RunError, fit, load_data, load_run
from inference.training.checkpoints import CheckpointError
from inference.training.datasets import as_dataset
from inference.training.metrics import append_metrics, read_metrics, write_metrics
from inference.training.runs import Run
from inference.training.storage import RunLock, RunLocked, StorageError
from inference.training.texts import ContentError
from inference.views.report import facts, kept_epoch
from ppl_models import DDPM, VAE, LinearDiffusion, LinearGaussian, NoiseSchedule
from ppl_models.likelihoods import Bernoulli, Normal
from ppl_models.networks.residual_mlp import ResidualMLP
from ppl_models.registry import build, describe
from tests.training.saved_states import same
from tests.training.training_pairs import PointMass, linear_vae, points

OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 10, "progress": False}


def preset() -> VAE:
    return VAE.preset((5,), Normal(scale="learned"), latent_dim=2, hidden=(6,))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return fit(preset(), points(), tmp_path / "run", **OPTIONS)


def test_a_run_loads_as_it_was(run: Run) -> None:
    assert run.folder is not None
    found = {path.name for path in run.folder.iterdir()}
    names = {"config.yaml", "environment.json", "metrics.csv", "timing.csv", "checkpoints", "model", ".lock"}
    assert found == names
    state = torch.get_rng_state()
    loaded = load_run(str(run.folder))
    assert torch.equal(state, torch.get_rng_state())
    assert loaded.config == run.config
    assert loaded.metrics == run.metrics
    assert same(dict(loaded.pair.state_dict()), dict(run.pair.state_dict()))
    assert not loaded.pair.training
    x = points()
    torch.manual_seed(0)
    first = loaded.pair.guide(x)
    torch.manual_seed(0)
    assert torch.equal(first, run.pair.guide(x))


def test_a_float32_run_loads_in_float32_under_any_default(tmp_path: Path) -> None:
    fit(preset(), points(), tmp_path / "run", precision="32-true", **OPTIONS)
    assert {t.dtype for t in load_run(tmp_path / "run").pair.parameters()} == {torch.float32}


def test_a_pair_with_networks_of_its_own_is_passed_again(tmp_path: Path) -> None:
    run = fit(PointMass(), points(12, 3), tmp_path / "run", **OPTIONS)
    assert run.config["pair"] is None
    with pytest.raises(RunError, match=r"holds a pair with networks of its own: pass it, as in load_run\("):
        load_run(tmp_path / "run")
    loaded = load_run(tmp_path / "run", PointMass())
    assert same(dict(loaded.pair.state_dict()), dict(run.pair.state_dict()))
    with pytest.raises(RunError, match=r"holds another pair than the one passed .*outline.own was PointMass"):
        load_run(tmp_path / "run", linear_vae())
    with pytest.raises(CheckpointError, match="the weights do not fit the pair"):
        load_run(tmp_path / "run", PointMass(latent_dim=1))


class Denoiser(nn.Module):
    """A network of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.body(x_t)


OTHER_DDPMS: dict[str, tuple[dict[str, Any], str]] = {
    "prediction": ({"predict": "x_0"}, "predict was eps, is x_0"),
    "schedule": ({"schedule": NoiseSchedule.cosine(6)}, "schedule.num_timesteps was 5, is 6"),
    "variance": ({"variance": "posterior"}, "variance was beta, is posterior"),
    "likelihood": ({"likelihood": Normal(scale=0.3)}, "likelihood.scale was None, is 0.3"),
}


@pytest.mark.parametrize("network", ["own", "library's"])
@pytest.mark.parametrize("name", OTHER_DDPMS)
def test_the_same_weights_under_another_meaning_are_refused(name: str, network: str, tmp_path: Path) -> None:
    """All of these take the weights as they are: only what is written down of the pair tells them apart."""

    def ddpm(**options: Any) -> DDPM:
        body = Denoiser() if network == "own" else ResidualMLP((2,), hidden=4, blocks=1)
        stated = {"network": body, "schedule": NoiseSchedule.cosine(5), "data_shape": (2,), "likelihood": Normal()}
        return DDPM(**{**stated, **options})

    options, reason = OTHER_DDPMS[name]
    x = points(12, 2)
    run = fit(ddpm(), x, tmp_path / "run", **OPTIONS)
    assert (run.config["pair"] is None) == (network == "own")
    for call in (
        lambda: load_run(tmp_path / "run", ddpm(**options)),
        lambda: fit(ddpm(**options), x, tmp_path / "run", resume=True, **OPTIONS),
    ):
        with pytest.raises(RunError, match=reason):
            call()
    again = load_run(tmp_path / "run", ddpm())
    assert same(dict(again.pair.state_dict()), dict(run.pair.state_dict()))
    assert fit(ddpm(), x, tmp_path / "run", resume=True, **OPTIONS).metrics == run.metrics


def test_an_unfinished_run_has_the_figures_of_its_weights(run: Run, tmp_path: Path) -> None:
    """Killed after epochs that no checkpoint holds: metrics.csv is ahead of the weights, and is not what they reach."""
    assert run.folder is not None
    for path in (run.folder / "model").iterdir():
        path.unlink()
    ahead = (run.folder / "metrics.csv").read_text().splitlines()
    (run.folder / "metrics.csv").write_text(
        "\n".join([*ahead, ahead[-1].replace(ahead[-1].split(",")[0], "99.0", 1)]) + "\n"
    )
    with pytest.warns(UserWarning, match="is an unfinished run"):
        stopped = load_run(run.folder)
    assert stopped.metrics == run.metrics
    assert stopped.unfinished == f"after epoch {len(run.metrics)} of {run.config['train']['epochs']}"
    assert run.unfinished == ""
    best_first = [{"epoch": 1.0, "validation_elbo": -1.0}, {"epoch": 2.0, "validation_elbo": -2.0}]
    patient = replace(stopped, metrics=best_first, config={"train": {"patience": 3}})
    assert [kept_epoch(each)["epoch"] for each in (patient, replace(patient, unfinished=""))] == [2.0, 1.0]
    assert ("UNFINISHED", f"weights and figures {stopped.unfinished}; ppl train ... --resume goes on") in facts(stopped)
    assert not any(name == "UNFINISHED" for name, _ in facts(run))


def test_a_run_without_an_outline_loads(tmp_path: Path) -> None:
    """As older versions wrote it."""
    fit(PointMass(), points(12, 3), tmp_path / "run", **OPTIONS)
    config = tmp_path / "run" / "config.yaml"
    stated = yaml.safe_load(config.read_text())
    assert stated.pop("outline") == {"own": "PointMass"}
    config.write_text(yaml.safe_dump(stated))
    load_run(tmp_path / "run", PointMass())
    fit(PointMass(), points(12, 3), tmp_path / "run", resume=True, **OPTIONS)


def test_what_is_no_run_or_not_finished_says_so(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected a RUN folder with a config.yaml, got .*nowhere"):
        load_run(tmp_path / "nowhere")
    assert run.folder is not None
    for path in (run.folder / "model").iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match=r"is an unfinished run: these are its weights after epoch \d+; --resume"):
        stopped = load_run(run.folder)
    assert same(dict(stopped.pair.state_dict()), dict(run.pair.state_dict()))  # the last checkpoint is the run's end
    for path in (run.folder / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(RunError, match=r"has no model yet: its training has not reached a checkpoint"):
        load_run(run.folder)


def test_damaged_weights_are_refused(run: Run) -> None:
    assert run.folder is not None
    path = run.folder / "model" / "model.safetensors"
    data = path.read_bytes()
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b"", b"\x80\x04N."):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"expected SHA-256 .*: the file is damaged"):
            load_run(run.folder)
    path.write_bytes(data)
    load_run(run.folder)
    description = run.folder / "model" / "config.json"
    description.write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: .* is not plain JSON"):
        load_run(run.folder)


def test_a_model_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    from inference.training.runs import save_model

    pair = preset()
    with torch.no_grad():
        pair.likelihood.log_scale.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"got a NaN or infinity in likelihood.log_scale"):
        save_model(tmp_path, pair, {})
    assert [*tmp_path.iterdir()] == []


# ------------------------------------------------------------------------------------------------ foreign descriptions


def described(pair: Any) -> dict[str, Any]:
    return {"format": 1, "pair": pair, "data": {"spec": None}, "train": {}, "validation": ""}


VALID = {"class": "Normal", "scale": 0.5}
HOSTILE: dict[str, tuple[Any, str]] = {
    "a module to import": ({"class": "os:system", "command": "touch MARKER"}, "got 'os:system'"),
    "a class that is not in the registry": ({"class": "Sequential"}, "got 'Sequential'"),
    "a nested one": ({"class": "VAE", "encoder": {"class": "subprocess.run"}}, "got 'subprocess.run'"),
    "no class": ({"encoder": 1}, "got None"),
    "a text": ("VAE", "does not describe a pair"),
    "a list as class": ({"class": ["VAE"]}, "does not describe a pair"),
    "a part that is no pair": ({"class": "MLP", "widths": [2, 3]}, "describes a MLP: expected a pair"),
    "arguments of another name": ({"class": "LinearGaussian", "dims": 3}, "does not describe a pair"),
    "arguments of another type": ({"class": "LinearGaussian", "data_dim": "3", "latent_dim": 2}, "does not describe"),
    "arguments out of range": (
        {"class": "VAE", "encoder": VALID, "decoder": VALID, "latent_dim": 0, "likelihood": VALID},
        "expected a whole latent_dim >= 1, got 0",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_description_of_something_else_is_refused_and_not_run(name: str, run: Run, tmp_path: Path) -> None:
    pair, reason = HOSTILE[name]
    assert run.folder is not None
    marker = tmp_path / "marker"
    text = json.dumps(described(pair)).replace("MARKER", str(marker))
    (run.folder / "config.yaml").write_text(text)
    loaded = set(sys.modules)
    with pytest.raises(RunError, match=re.escape(reason)):
        load_run(run.folder)
    assert not marker.exists()
    assert set(sys.modules) - loaded == set()


def test_a_yaml_tag_is_refused_and_not_run(run: Run, tmp_path: Path) -> None:
    assert run.folder is not None
    marker = tmp_path / "marker"
    (run.folder / "config.yaml").write_text(f"pair: !!python/object/apply:os.system ['touch {marker}']")
    with pytest.raises(ContentError, match="has the tag"):
        load_run(run.folder)
    assert not marker.exists()


def test_another_pairs_description_does_not_fit_the_weights(run: Run) -> None:
    assert run.folder is not None
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    config["pair"]["encoder"]["hidden"] = [7]
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match="the weights do not fit the pair"):
        load_run(run.folder)


# ----------------------------------------------------------------------------------------------- one run, one folder


def test_an_existing_run_is_not_overwritten(run: Run) -> None:
    assert run.folder is not None
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(RunError, match=r"already holds a run: go on with --resume"):
        fit(preset(), points(), run.folder, **OPTIONS)
    assert before == {path: path.read_bytes() for path in before}


def test_resuming_a_finished_run_returns_it(run: Run) -> None:
    again = fit(preset(), points(), run.folder, resume=True, **OPTIONS)
    assert again.metrics == run.metrics
    assert same(dict(again.pair.state_dict()), dict(run.pair.state_dict()))


OTHER: dict[str, tuple[Any, dict[str, Any], str]] = {
    "option": (points(), {"learning_rate": 0.5}, r"train.learning_rate was 0.001, is 0.5"),
    "two options": (points(), {"seed": 1, "ema": 0.5}, r"train.ema was None, is 0.5; train.seed was 0, is 1"),
    "one datum": (points() + 1e-9 * torch.eye(37, 5), {}, r"data.sha256 was \w+, is \w+"),
    "held-out data": ("held out", {}, r"data.num_test was 0, is 3; data.sha256"),
    "fewer data": (points()[:-1], {}, r"data.num_train was 37, is 36; data.sha256"),
    "precision": (points(), {"precision": "32-true"}, "dtype was float64, is float32"),
}


@pytest.mark.parametrize("name", OTHER)
def test_another_configuration_or_other_data_are_refused(name: str, run: Run) -> None:
    from inference.training.datasets import as_dataset

    data, options, reason = OTHER[name]
    data = as_dataset(points(), test=points()[:3]) if isinstance(data, str) else data
    with pytest.raises(RunError, match=rf"was started under another configuration \(.*{reason}.*\): resume with the"):
        fit(preset(), data, run.folder, resume=True, **{**OPTIONS, **options})


def test_another_pair_is_refused(run: Run, tmp_path: Path) -> None:
    other = VAE.preset((5,), Normal(scale="learned"), latent_dim=2, hidden=(7,))
    with pytest.raises(RunError, match=r"pair.decoder.hidden was \[6\], is \[7\]"):
        fit(other, points(), run.folder, resume=True, **OPTIONS)
    # Of networks of one's own nothing is written down; then the weights tell.
    fit(PointMass(), points(12, 3), tmp_path / "own", **OPTIONS)
    (tmp_path / "own" / "model" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="the checkpoint is of another pair"):
        fit(PointMass(latent_dim=1), points(12, 3), tmp_path / "own", resume=True, **OPTIONS)


def test_remains_of_something_else_are_refused(tmp_path: Path) -> None:
    for name in ("checkpoints", "metrics.csv"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("epoch\n1.0\n")
        for resume in (False, True):
            with pytest.raises(RunError, match=rf"holds {name} but no config.yaml"):
                fit(preset(), points(), folder, resume=resume, **OPTIONS)


def test_resuming_where_nothing_was_yet_starts(tmp_path: Path, run: Run) -> None:
    torch.manual_seed(0)
    first = fit(preset(), points(), tmp_path / "a", **OPTIONS)
    torch.manual_seed(0)
    second = fit(preset(), points(), tmp_path / "b", resume=True, **OPTIONS)
    assert first.metrics == second.metrics


CHILD = """
import sys, time
from pathlib import Path
from inference.training.storage import RunLock
with RunLock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_two_writers_are_refused(run: Run) -> None:
    assert run.folder is not None
    with RunLock(run.folder), pytest.raises(RunLocked, match=r"is being written by process \d+"):
        fit(preset(), points(), run.folder, resume=True, **OPTIONS)
    other = subprocess.Popen([sys.executable, "-c", CHILD, str(run.folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunLocked, match=f"is being written by process {other.pid}"):
            fit(preset(), points(), run.folder, resume=True, **OPTIONS)
    finally:
        other.kill()
        other.communicate()


def test_the_data_can_be_read_again_or_not(tmp_path: Path, run: Run) -> None:
    with pytest.raises(RunError, match="was trained on data in memory: pass the data themselves"):
        run.data()
    again = fit(VAE.preset((2,), Normal(), latent_dim=1, hidden=(4,)), "two_moons", epochs=1, progress=False)
    assert again.data().num_train == again.config["data"]["num_train"]
    named = fit(
        VAE.preset((8, 8), Bernoulli(), latent_dim=1, hidden=(4,)),
        __import__("inference").load_data("digits", scaling="unit", binarization="fixed"),
        spec="digits",
        epochs=1,
        progress=False,
    )
    assert torch.equal(named.data().train.unique(), torch.tensor([0.0, 1.0]))


# ----------------------------------------------------------------------------------------------------- metrics files


def test_metrics_read_back_bit_for_bit_and_a_half_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    rows = [{"epoch": 1.0, "elbo": -0.1 - 0.2}, {"epoch": 2.0, "elbo": float("inf")}, {"epoch": 3.0, "elbo": 5e-324}]
    for row in rows:
        append_metrics(path, row)
    assert path.read_text().splitlines()[0] == "epoch,elbo"
    assert same(read_metrics(path), rows)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        assert same(read_metrics(path), rows[: max(0, complete - 1)])
    write_metrics(path, rows)
    assert path.read_bytes() == whole
    assert read_metrics(tmp_path / "absent") == []


@pytest.mark.parametrize("line", ["1.0", "1.0,2.0,3.0", "1.0,x", "1.0,"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.csv").write_text(f"epoch,elbo\n0.0,1.0\n{line}\n")
    with pytest.raises(ContentError, match=r"metrics.csv, line 3: expected one number a column, got \["):
        read_metrics(tmp_path / "metrics.csv")


def test_metrics_that_cannot_be_written_are_loud(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*metrics.csv: No such file or directory; make room"):
        append_metrics(tmp_path / "absent" / "metrics.csv", {"epoch": 1.0})


def test_a_diffusion_that_learned_its_own_law_loads(tmp_path):
    pair = LinearDiffusion(NoiseSchedule.cosine(4), [0.5, -1.0], [0.8, 0.3]).double()
    assert describe(build(describe(pair))) == describe(pair)
    x = torch.randn(16, 2, dtype=torch.float64)
    trained = fit(pair, x, tmp_path / "run", epochs=2, progress=False).pair
    assert not torch.equal(trained.network.loc, torch.tensor([0.5, -1.0], dtype=torch.float64))
    again = load_run(tmp_path / "run").pair
    assert torch.equal(again.terms(x), trained.terms(x))


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda text: text.replace("format: 1", "format: 99"), "expected format 1, got 99"),
        (lambda text: text.replace("guide: exact", "guide: mean_field"), "describe different pairs"),
    ],
)
def test_an_edited_description_is_refused(edit, match, tmp_path):
    pair = LinearGaussian.random(3, 2)
    fit(pair, pair.model(size=8).detach(), tmp_path / "run", epochs=1, progress=False)
    config = tmp_path / "run" / "config.yaml"
    assert edit(config.read_text()) != config.read_text()
    config.write_text(edit(config.read_text()))
    with pytest.raises(RunError, match=match):
        load_run(tmp_path / "run")


def test_data_that_came_by_name_are_read_again_by_it(tmp_path: Path) -> None:
    digits = load_data("digits", scaling="symmetric")
    pair = VAE.preset((8, 8), Normal(), latent_dim=2, hidden=(4,))
    run = fit(pair, digits, tmp_path / "run", epochs=1, batch_size=500, progress=False)
    assert torch.equal(load_run(tmp_path / "run").data().test, digits.test)
    other = fit(pair, as_dataset(digits.train), epochs=1, batch_size=500, progress=False)
    assert run.config["data"]["spec"] == "digits"
    assert other.config["data"]["spec"] is None


def test_what_no_number_depends_on_may_change_when_a_run_goes_on(run: Run) -> None:
    assert fit(preset(), points(), run.folder, resume=True, checkpoint_seconds=7.0, **OPTIONS).metrics == run.metrics
    with pytest.raises(RunError, match=r"train.learning_rate was 0.001, is 0.5"):
        fit(preset(), points(), run.folder, resume=True, learning_rate=0.5, **OPTIONS)
