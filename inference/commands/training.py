"""``ppl train``: options in, a RUN folder out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from pydantic_core import PydanticUndefined

from inference.commands.options import OPTIONS_FILE, TrainOptions, gather_options
from inference.training.config import TrainConfig

if TYPE_CHECKING:
    from inference.training.data_set import DataSet
    from ppl_models.pair import ModelGuidePair

RUN = "The run"
PAIR = "The pair"
TRAINING = "Training"
KEYS = ", ".join(TrainConfig.model_fields)


def _option(key: str, metavar: str, panel: str, *, default: str = "", text: str = "") -> Any:
    """An option described by its field of :class:`TrainOptions`; left out, it is None and the field's default holds."""
    field = TrainOptions.model_fields[key]
    names = [
        name for kind in get_args(field.annotation) for name in (get_args(kind) or (kind,)) if isinstance(name, str)
    ]
    shown = default or (None if field.default in (None, PydanticUndefined) else field.default)
    parts = [text or field.description or "", f"({', '.join(names)})" if names else ""]
    parts.append(f"[dim]\\[default: {shown}][/dim]" if shown is not None else "")
    return typer.Option(help=" ".join(filter(None, parts)), metavar=metavar, show_default=False, rich_help_panel=panel)


def train(
    system: Annotated[str, typer.Argument(metavar="SYSTEM", help="which pair to train; `ppl models` lists them")],
    out: Annotated[
        Path, typer.Option(metavar="RUN", help="folder for the run; made if it is not there", rich_help_panel=RUN)
    ],
    data: Annotated[str | None, _option("data", "SPEC", RUN)] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="go on with the run in RUN, under the same options; --epochs may be more",
            rich_help_panel=RUN,
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="options as YAML; the command line wins over it", rich_help_panel=RUN),
    ] = None,
    start_from: Annotated[str | None, _option("start_from", "RUN", RUN)] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help=f"any option by its key: {KEYS}", rich_help_panel=RUN),
    ] = None,
    likelihood: Annotated[str | None, _option("likelihood", "NAME", PAIR, default="by the data")] = None,
    scaling: Annotated[str | None, _option("scaling", "NAME", PAIR, default="the likelihood's")] = None,
    binarization: Annotated[
        str | None, _option("binarization", "NAME", PAIR, default="none; dynamic for mnist under bernoulli")
    ] = None,
    test_fraction: Annotated[float | None, _option("test_fraction", "PART", RUN)] = None,
    columns: Annotated[str | None, _option("columns", "A,B,...", RUN, default="all")] = None,
    given_labels: Annotated[
        bool | None,
        typer.Option(
            "--given-labels",
            help="condition both programs on the data's labels: p(x, z | y) and q(z | x, y)",
            show_default=False,
            rich_help_panel=PAIR,
        ),
    ] = None,
    latent_dim: Annotated[int | None, _option("latent_dim", "D", PAIR, default="16 for images, 2 for points")] = None,
    hidden: Annotated[str | None, _option("hidden", "W1,W2,...", PAIR, default="the system's: 200,200 or 256")] = None,
    activation: Annotated[str | None, _option("activation", "NAME", PAIR, default="tanh")] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="a choice of the system's own, such as num_timesteps=200 for ddpm; `ppl models` lists them",
            rich_help_panel=PAIR,
        ),
    ] = None,
    objective: Annotated[str | None, _option("objective", "NAME", TRAINING)] = None,
    epochs: Annotated[int | None, _option("epochs", "N", TRAINING)] = None,
    batch_size: Annotated[int | None, _option("batch_size", "N", TRAINING)] = None,
    learning_rate: Annotated[
        float | None, _option("learning_rate", "RATE", TRAINING, text="of Adam, or of --set optimizer=...")
    ] = None,
    seed: Annotated[
        int | None, _option("seed", "N", TRAINING, text="of the initial weights, the batches and the draws")
    ] = None,
    device: Annotated[str | None, _option("device", "NAME", TRAINING, text="auto, cpu, cuda, cuda:1 or mps")] = None,
    compile_: Annotated[
        str | None, typer.Option("--compile", metavar="WHEN", help="auto, on or off", rich_help_panel=TRAINING)
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1024,
            help="of the CPU; for small networks 1 is often fastest, and by far so where the cores are shared "
            "[dim]\\[default: torch's choice][/dim]",
            rich_help_panel=TRAINING,
        ),
    ] = None,
) -> None:
    """Train a pair on data by stochastic variational inference.

    What you leave out is chosen from the data, and printed before the first step together with everything else;
    RUN/options.yaml keeps that text, a valid FILE for --config. The same options give the same numbers, bit for bit, on the
    same machine. A run that was stopped can be looked at like any other, and --resume goes on with it; --resume --epochs N
    gives it more epochs.
    """
    given = {
        "data": data,
        "likelihood": likelihood,
        "scaling": scaling,
        "columns": columns,
        "binarization": binarization,
        "test_fraction": test_fraction,
        "start_from": start_from,
        "given_labels": given_labels,
        "latent_dim": latent_dim,
        "hidden": hidden,
        "activation": activation,
        "objective": objective,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "device": device,
        "compile": compile_,
    }
    if resume:
        _check_run_to_resume(system, out, start_from, needs_options=config is None and data is None)
        if config is None and data is None:
            config = out / OPTIONS_FILE
    options = gather_options(given, assignments or [], config, pair or [])
    with cpu_threads(threads):
        run_training(system, options, out, resume=resume)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Torch's number of CPU threads within the block; None leaves it alone."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_training(system: str, options: TrainOptions, out: Path, *, resume: bool = False) -> None:
    """Trains, with the resolved configuration printed before and the final bound after."""
    from inference.commands.choices import build_pair, choose
    from inference.commands.opening import offset_in_words
    from inference.commands.options_file import kept_beside_run
    from inference.training.loop import fit
    from inference.training.standardizing import size_hint
    from inference.views.report import kept_epoch
    from ppl_models.registry import system as known_system

    known_system(system)
    chosen, dataset = choose(system, options)
    pair = build_pair(system, chosen, dataset)
    is_new = not (out / "config.yaml").exists()
    if resume and not is_new and (out / OPTIONS_FILE).is_file():
        chosen = chosen.model_copy(update={"start_from": gather_options({}, [], out / OPTIONS_FILE).start_from})
    if chosen.start_from is not None and (is_new or not resume):  # a run that goes on has weights of its own
        _start_from(pair, Path(chosen.start_from), dataset)
    hint = size_hint(dataset)
    if hint:
        warnings.warn(hint, stacklevel=1)
    print(f"# configuration of ppl train {system} --out {out}\n{chosen.text()}\n", flush=True)
    try:
        with kept_beside_run(out, chosen.text()) if is_new or resume else nullcontext():
            run = fit(pair, dataset, out, config=chosen.train_config(), resume=resume, spec=chosen.data)
    except (KeyboardInterrupt, SystemExit):
        print(
            f"ppl: stopped; {out} keeps what was done: --resume goes on, and ppl report {out} shows it", file=sys.stderr
        )
        raise
    row = kept_epoch(run)
    # A diffusion's latents are the process's; no unit of them is learned.
    units = "" if pair.data_site == "x_0" else f"; {row['active_units']:.0f} active units"
    at = f"at epoch {row['epoch']:.0f}"
    meaning = (
        f"; {row['validation_bits_per_dim']:.3f} bits/dim) {at} = -(rate {row['validation_rate']:.2f} + distortion "
        f"{row['validation_distortion']:.2f}){units}"
        if pair.bounds_evidence
        else f") {at}{units}; no bound of log p(x), for an autoencoder has no p(z)"
    )
    print(
        f"\n{'ELBO' if pair.bounds_evidence else 'minus the loss'} on {run.config['validation']}: "
        f"{row['validation_elbo']:.2f} +- {row['validation_std_error']:.2f} nats (SE: over data{meaning}\n"
        f"{'' if run.standardization is None else f'of standardised data: {offset_in_words(run.standardization)}{chr(10)}'}"
        f"{overfit_hint(run.metrics, run.config)}"
        f"the run is in {out}; look at it: ppl report {out}"
    )


def overfit_hint(rows: Sequence[Mapping[str, float]], config: Mapping[str, Any]) -> str:
    """A line on an earlier epoch that was better by far on held-out data, where nothing was to be done about it; or nothing.

    Example:
        >>> rows = [{"epoch": e, "validation_elbo": v, "validation_std_error": 1.0} for e, v in ((1, -9.0), (2, -20.0))]
        >>> print(overfit_hint(rows, {"train": {"patience": None}, "validation": "the held-out part"}), end="")
        it was -9.00 at epoch 1: --set validation_fraction=0.1 --set patience=20 would stop near the best epoch and keep it
    """
    best, last = max(rows, key=lambda row: row["validation_elbo"]), rows[-1]
    if config["train"]["patience"] is not None or str(config["validation"]).startswith("the training data themselves"):
        return ""
    if best["validation_elbo"] - last["validation_elbo"] <= 3 * last["validation_std_error"]:
        return ""
    return (
        f"it was {best['validation_elbo']:.2f} at epoch {best['epoch']:.0f}: --set validation_fraction=0.1 --set patience=20 "
        "would stop near the best epoch and keep it\n"
    )


def _check_run_to_resume(system: str, out: Path, start_from: str | None, needs_options: bool) -> None:
    """Refuses a folder that holds no run, or another system's, and other weights to begin with than the run's own."""
    from inference.training.runs import RunError
    from inference.training.texts import read_yaml
    from ppl_models.registry import system as known_system

    preset, options = known_system(system), out / OPTIONS_FILE
    if needs_options and not options.is_file():
        raise RunError(
            f"expected a run to resume in {out}, with its {OPTIONS_FILE}, found none: say what to train on with --data, or "
            "look for the folder's name"
        )
    if (out / "config.yaml").is_file():
        kind = (read_yaml(out / "config.yaml").get("pair") or {}).get("class")
        expected = getattr(preset, "__self__", None)
        if kind is not None and expected is not None and kind != expected.__name__:
            raise RunError(f"{out} is a run of {kind}, not of {system}: resume it with its own system")
    began = gather_options({}, [], options).start_from if options.is_file() else None
    if start_from is not None and str(Path(start_from).expanduser().absolute()) != began:
        raise RunError(
            f"start_from: {out} began with {'weights of its own' if began is None else began}, and goes on with those it has; "
            "leave --start-from out, or train into another folder"
        )


def _start_from(pair: ModelGuidePair, folder: Path, data: DataSet) -> None:
    from inference.training.config import ConfigError
    from inference.training.runs import comparable, differences, identity_of, load_run

    run = load_run(folder)
    try:
        pair.load_state_dict(run.pair.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"start_from: the weights of {folder} do not fit this pair ({str(error).splitlines()[-1].strip()}); state the "
            f"options that it was trained with, as in {folder / OPTIONS_FILE}"
        ) from None
    differing = differences(*comparable(run.config, identity_of(pair)))
    before, after = run.config["data"], data.describe()
    if before.get("scaling") != after["scaling"]:
        differing.append(f"data.scaling was {before.get('scaling')}, is {after['scaling']}")
    elif before.get("standardization") != after.get("standardization"):
        differing.append("data.standardization was by another mean and other standard deviations")
    if differing:
        warnings.warn(
            f"start_from: the weights of {folder} go into another pair ({'; '.join(differing)}): they fit, but may mean "
            "something else there",
            stacklevel=2,
        )
