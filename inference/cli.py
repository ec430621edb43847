"""The ``ppl`` command: parses, calls, prints. No mathematics, and no torch until a command runs.

Exit status: 0; 2 for a bad call or bad input, with one line on stderr, "ppl: what was expected, what came, what to do";
1 for a failure of its own, with one line too. ``PPL_DEBUG=1`` adds the traceback. 143 after SIGTERM and 130 after Ctrl-C,
training saved in both cases.

What counts as bad input is decided by where an error comes from: this project's own exceptions, and the ValueErrors that
its own code raises, are sentences about what it was given, so they are status 2, but for :data:`OWN_FAILURES` and a full
disk. Whatever else is raised is a fault of ours, status 1.
"""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from rich.markup import escape

from inference.commands import demo, judging, listing, looking, training

EXAMPLES = {
    "ppl demo": "the whole tour, in under two minutes",
    "ppl train vae --data digits --out runs/vae": "data in, a RUN folder out",
    "ppl terms runs/vae": "the bound, term by term",
    "ppl sample runs/vae -n 64 --out samples.png": "pictures",
    "ppl report runs/vae": "everything on one page",
}
TRAIN_EXAMPLES = (
    "ppl train vae --data digits --out runs/vae",
    "ppl train vae --data mnist:~/mnist --out runs/mnist --latent-dim 32 --hidden 400,200 --epochs 50",
    "ppl train vae --data two_moons --out runs/moons --set schedule=cosine --set kl_warmup_epochs=5",
    "ppl train vae --data digits --likelihood bernoulli --binarization dynamic --out runs/binary",
    "ppl train vae --data npz:images.npz --config runs/options.yaml --out runs/mine --seed 1",
)
PROJECT = {"inference", "ppl_models"}
OWN_FAILURES = {"TrainingDiverged", "NotANumberError", "ProcessFailed"}  # by name, as importing them would import torch
OUT_OF_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}

app = typer.Typer(
    name="ppl",
    help="Deep latent-variable models as Pyro programs, with every term of every bound accounted for.",
    epilog="\n\n".join(["Examples:", *(f"{call}   [dim]{what}[/dim]" for call, what in EXAMPLES.items())]),
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _add(command: Callable[..., None], panel: str, examples: Sequence[str] = ()) -> None:
    """Adds a command whose help is its docstring, each paragraph wrapped to the terminal and taken literally."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    text = escape("\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))
    epilog = "\n\n".join(["Examples:", *examples]) if examples else None
    app.command(help=text, epilog=epilog, rich_help_panel=panel)(command)


_add(demo.demo, "Start here")
_add(training.train, "Start here", TRAIN_EXAMPLES)
for looking_command in (looking.terms, looking.sample, looking.posterior, looking.trace, looking.report):
    _add(looking_command, "Look at a RUN")
for judging_command in (judging.evidence, judging.calibrate):
    _add(judging_command, "Judge a RUN")
for listing_command in (listing.data, listing.models):
    _add(listing_command, "What there is")


def _print_version(wanted: bool) -> None:
    if wanted:
        from ppl_models import __version__

        print(f"ppl {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show the version and leave")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Entry point of the console script: runs the command line and exits with its status."""
    warnings.formatwarning = lambda message, *_, **__: f"ppl: warning: {message}\n"  # not the line of code that warns
    raise SystemExit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one call of ``ppl``.

    Args:
        arguments: what follows ``ppl`` on the command line.

    Returns:
        The exit status.

    Example:
        >>> run(["--version"])
        ppl 0.1.0
        0
    """
    try:
        status = typer.main.get_command(app).main(list(arguments), prog_name="ppl", standalone_mode=False)
        sys.stdout.flush()
    except typer.exceptions.TyperException as error:
        _say(f"{error.format_message().rstrip('.')}; see {_help_command(error)}")
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left; nobody to tell
        return 1
    except Exception as error:
        if os.environ.get("PPL_DEBUG") == "1":
            traceback.print_exc()
        if not _is_ours(error):
            last = (str(error).strip().splitlines() or [""])[-1]
            _say(f"unexpected {type(error).__name__}: {last}; this is a fault of ppl, PPL_DEBUG=1 shows where")
            return 1
        _say(re.split(r"\s+Trace Shapes:", str(error))[0])  # which Pyro adds to what is raised within a program
        return 1 if _is_own_failure(error) else 2
    return status or 0


def _say(text: str) -> None:
    print(f"ppl: {' '.join(text.split())}", file=sys.stderr)


def _help_command(error: typer.exceptions.TyperException) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context else 'ppl'} --help"


def _is_ours(error: Exception) -> bool:
    """Whether the error is a sentence of this project's about what it was given."""
    if _top(type(error).__module__) in PROJECT:
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = _top(frames[-1].f_globals.get("__name__", "")) if frames else ""
    return isinstance(error, ValueError | ImportError | FileExistsError | FileNotFoundError) and raised_in in PROJECT


def _top(module: str) -> str:
    return module.partition(".")[0]


def _is_own_failure(error: Exception) -> bool:
    """What went wrong in the work itself rather than in what was asked for."""
    return type(error).__name__ in OWN_FAILURES or (isinstance(error, OSError) and error.errno in OUT_OF_ROOM)
