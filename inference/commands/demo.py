"""``ppl demo``: the whole tour on the embedded digits, each step with the command that does it alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from inference.commands.looking import posterior, report, sample, terms, trace
from inference.commands.options import gather_options
from inference.commands.training import cpu_threads, run_training
from inference.commands.writing import FORCE

EPOCHS = 120
OPTIONS = {"data": "digits", "batch_size": 64, "learning_rate": 2e-3, "schedule": "cosine"}
# What a tour leaves in its folder, all of which --force makes anew.
LEFT = (
    "config.yaml",
    "options.yaml",
    "environment.json",
    "metrics.csv",
    "timing.csv",
    "terms.json",
    "posterior.nc",
    "report.html",
)
LEFT_FOLDERS = ("checkpoints", "model", "figures")


def demo(
    out: Annotated[Path, typer.Option(metavar="RUN", help="folder for the run that the tour makes")] = Path(
        "runs/demo"
    ),
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="fewer are quicker and look worse")] = EPOCHS,
    force: Annotated[bool, FORCE] = False,
) -> None:
    """Train a VAE on handwritten digits and look at it from every side: under two minutes on two cores."""
    if (out / "config.yaml").exists():
        if not force:
            raise FileExistsError(
                f"expected a new folder, but {out} holds a run: choose another with --out, or replace it with --force"
            )
        _remove_tour(out)
    with cpu_threads(1):  # small matrices: a second thread waits more than it computes
        _tour(out, epochs)


def _tour(out: Path, epochs: int) -> None:
    stated = " ".join(f"--set {key}={value}" for key, value in OPTIONS.items() if key != "data")
    picture = out / "figures" / "new_digits.png"
    _announce(
        f"ppl train vae --data digits --out {out} --epochs {epochs} {stated} --threads 1", "a model, a guide, and SVI"
    )
    run_training("vae", gather_options({**OPTIONS, "epochs": epochs}), out)
    _announce(f"ppl trace {out}", "the two programs, site by site")
    trace(out)
    _announce(f"ppl terms {out}", "every term of the bound, on held-out data")
    terms(out)
    _announce(f"ppl posterior {out}", "what the guide knows about z")
    posterior(out)
    _announce(f"ppl report {out}", "all of it on one page")
    report(out)
    _announce(f"ppl sample {out} -n 64 --out {picture}", "new digits")
    sample(out, picture)
    print(f"\nopen {out / 'report.html'} in a browser; what else there is: ppl --help")


def _announce(command: str, what: str) -> None:
    print(f"\n--- {what} ---\n$ {command}", flush=True)


def _remove_tour(folder: Path) -> None:
    """Removes what an earlier tour left, by name; other files in the folder stay."""
    for name in LEFT:
        (folder / name).unlink(missing_ok=True)
    for name in LEFT_FOLDERS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
