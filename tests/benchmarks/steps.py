"""How long is a training step: compiled objectives beside Pyro's SVI and the same losses written by hand in PyTorch.

The families, their data and their losses by hand are in :mod:`tests.benchmarks.families`. Each step: gradient and
Adam, in one fused operation as ``fit`` has it.

    ours compiled, ours flat, ours eager    compile_objective(loss, x), the same without a compiler, and the loss itself
    by hand, by hand compiled               plain PyTorch on the same networks; torch.compile of it, with eager random numbers
                                            as ours has them (inductor's own are slower on a CPU)
    network alone, network compiled         diffusions: the denoiser's forward and backward, no loss
    SVI ...                                 pyro.infer.SVI with Pyro's Adam, as its users write it, and with a fused one;
                                            diffusions: on their single terms; categorical latents: Pyro's score function
    pythae, diffusers                       their losses on the same networks, where they are installed

JitTrace_ELBO needs parameters in Pyro's global store, where no pair here has them: it is given them there, for the VAEs of
continuous latents. On the single-term programs it compiled for ten seconds at every call, so others go without it.

Contenders take turns, in an order drawn for each round, and a ratio is formed within its round, so that other work on
the machine cancels; medians, with the quartiles of the ratio behind. Every contender works on a copy of the same pair, so
its mean loss shows whether it trains alike (a diffusion's SVI shows the mean of a single term of the bound). With --memory
also the peak of a process of its own, less what it held before the step; on CUDA the peak that torch allocates.

    python -m tests.benchmarks.steps [--families vae hvae ddpm ...] [--batches 20 128 512] [--rounds 30] [--threads 0]
        [--device cpu] [--mode reduce-overhead] [--clock wall|cpu] [--memory] [--only NAME ...]

Not a test: nothing here passes or fails. ``--clock cpu`` counts this process's own seconds, for machines that others use, too;
take one thread with it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.infer
import pyro.optim
import torch
from torch import Tensor, nn

from inference.training.compilation import compile_objective
from tests.benchmarks.evidence import ROOT, _forget_peak, _peak
from tests.benchmarks.families import FAMILIES, Family, network_alone
from tests.benchmarks.other_libraries import diffusers_loss, is_installed, pythae_loss

Step = Callable[[], Tensor]
RATIOS = (  # what the aims are about
    ("ours compiled", "by hand"),
    ("ours compiled", "by hand compiled"),
    ("SVI Trace_ELBO", "ours compiled"),
    ("ours compiled", "network alone"),
)


def with_adam(pair: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    """A step of torch's Adam, fused as in ``fit``."""
    optimizer = torch.optim.Adam(pair.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(x).mean()
        value.backward()
        optimizer.step()
        return value

    return step


def with_svi(family: Family, pair: Any, elbo: Any, x: Tensor, fused: bool = False) -> Step:
    """A step of SVI; a diffusion's t are drawn here, over all terms."""
    adam = pyro.optim.Adam({"lr": 1e-3, "fused": fused})
    if not family.is_diffusion:
        svi = pyro.infer.SVI(pair.model, pair.guide, adam, elbo)
        return lambda: torch.tensor(svi.step(x) / len(x))
    svi = pyro.infer.SVI(pair.term_model, pair.term_guide, adam, elbo)
    return lambda: torch.tensor(svi.step(x, torch.randint(pair.num_timesteps + 1, (len(x),), device=x.device)) / len(x))


def with_jit(pair: Any, x: Tensor) -> Step:
    """A step of SVI with JitTrace_ELBO, on parameters that are in the global store."""

    def stored(program: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(data: Tensor) -> Tensor:
            pyro.module("pair", pair)
            with pair.unannounced():
                return program(data)

        return run

    pyro.clear_param_store()
    elbo = pyro.infer.JitTrace_ELBO(ignore_jit_warnings=True)
    svi = pyro.infer.SVI(stored(pair.model), stored(pair.guide), pyro.optim.Adam({"lr": 1e-3}), elbo)
    return lambda: torch.tensor(svi.step(x) / len(x))


def compiled(loss: Callable[[Tensor], Tensor], mode: str | None) -> Callable[[Tensor], Tensor]:
    """torch.compile at one shape, without what it kept of other contenders."""
    import torch._inductor

    torch._dynamo.reset()
    options: dict[str, Any] = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    return torch.compile(loss, dynamic=False, options={"fallback_random": True, **options})


def contenders(name: str, mode: str | None) -> dict[str, Callable[[Any, Tensor], Step]]:
    """Each by name: of a pair and data, a step."""
    family = FAMILIES[name]
    ours, by_hand = family.objective, family.by_hand
    found: dict[str, Callable[[Any, Tensor], Step]] = {
        "ours compiled": lambda p, x: with_adam(p, compile_objective(ours(p), x, mode=mode), x),
        "ours flat": lambda p, x: with_adam(p, compile_objective(ours(p), x, backend="eager"), x),
        "ours eager": lambda p, x: with_adam(p, ours(p), x),
        "by hand": lambda p, x: with_adam(p, lambda data: by_hand(p, data), x),
        "by hand compiled": lambda p, x: with_adam(p, compiled(lambda data: by_hand(p, data), mode), x),
        "SVI Trace_ELBO": lambda p, x: with_svi(family, p, pyro.infer.Trace_ELBO(), x),
        "SVI with fused Adam": lambda p, x: with_svi(family, p, pyro.infer.Trace_ELBO(), x, fused=True),
        "SVI TraceMeanField": lambda p, x: with_svi(family, p, pyro.infer.TraceMeanField_ELBO(), x),
    }
    if family.jit:
        found["SVI JitTrace_ELBO"] = with_jit
    if family.is_diffusion:
        found["network alone"] = lambda p, x: with_adam(p, lambda data: network_alone(p, data), x)
        found["network compiled"] = lambda p, x: with_adam(p, compiled(lambda data: network_alone(p, data), mode), x)
    if name == "vae" and is_installed("pythae"):
        found["pythae"] = lambda p, x: with_adam(p, pythae_loss(p), x)
    if name == "ddpm" and is_installed("diffusers"):
        found["diffusers"] = lambda p, x: with_adam(p, diffusers_loss(p), x)
    return found


def prepared(family: str, size: int, name: str, options: argparse.Namespace) -> tuple[Any, Step | None]:
    """The pair and a contender's step after its first calls; None, with a word, where it does not run."""
    torch.manual_seed(0)
    pair: Any = FAMILIES[family].pair().to(options.device)
    torch.manual_seed(1)
    x = FAMILIES[family].data(size).to(options.device)
    try:
        step = contenders(family, options.mode)[name](pair, x)
        for _ in range(4):
            step()
    except Exception as error:
        print(f"  {name} is left out: {type(error).__name__}: {' '.join(str(error).split())[:100]}")
        return pair, None
    return pair, step


def measure(family: str, size: int, options: argparse.Namespace) -> dict[str, float]:
    """One block: prints it, and returns the median ratio of each contender to "by hand"."""
    wanted = [n for n in contenders(family, options.mode) if not options.only or n in options.only or n == "by hand"]
    steps = {name: prepared(family, size, name, options)[1] for name in wanted}
    running = {name: step for name, step in steps.items() if step is not None}
    names = list(running)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    shuffle = random.Random(0)
    for _ in range(options.rounds):
        for name in shuffle.sample(names, len(names)):
            _wait(options.device)
            start = clock()
            value = running[name]()
            _wait(options.device)
            seconds[name].append(clock() - start)
            losses[name].append(float(value.detach()))
    for name in names:
        low, middle, high = quartiles(seconds, name, "by hand")
        memory = f"  {memory_of(family, size, name, options):8.1f} MiB" if options.memory else ""
        time_of = f"{1e3 * statistics.median(seconds[name]):8.2f} ms   x {middle:5.2f} ({low:.2f} - {high:.2f})"
        print(f"  {name:19s} {time_of}{memory}   loss {statistics.mean(losses[name]):9.1f}", flush=True)
    for name, other in RATIOS:
        if name in seconds and other in seconds:
            low, middle, high = quartiles(seconds, name, other)
            print(f"  {name} / {other}: {middle:.2f} ({low:.2f} - {high:.2f})", flush=True)
    return {name: quartiles(seconds, name, "by hand")[1] for name in names}


def quartiles(seconds: dict[str, list[float]], name: str, reference: str) -> list[float]:
    """Of the ratio of two contenders, formed within rounds."""
    return statistics.quantiles([a / b for a, b in zip(seconds[name], seconds[reference], strict=True)], n=4)


def print_table(found: dict[str, dict[str, float]]) -> None:
    """All ratios to "by hand", as Markdown."""
    names = list(dict.fromkeys(name for ratios in found.values() for name in ratios))
    print(f"\n| family, batch | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
    for block, ratios in found.items():
        print(f"| {block} | {' | '.join(f'{ratios[n]:.2f}' if n in ratios else '' for n in names)} |")


def memory_of(family: str, size: int, name: str, options: argparse.Namespace) -> float:
    """MiB of a contender's steps, in a new interpreter."""
    command = [sys.executable, "-m", "tests.benchmarks.steps", "--measure", family, str(size), name]
    command += ["--threads", str(options.threads), "--device", options.device]
    command += ["--mode", options.mode] if options.mode else []
    # Freed memory goes back to the system at once, or a step would find that of its warm-up and seem to need none.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure_memory(family: str, size: int, name: str, options: argparse.Namespace) -> float:
    """Peak MiB of some steps in this process above weights and moments: activations and gradients."""
    pair, step = prepared(family, size, name, options)
    assert step is not None
    pair.zero_grad()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    before = _forget_peak()
    for _ in range(5):
        step()
    return _peak() - before


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def machine(options: argparse.Namespace) -> str:
    """Where and with what this was measured."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT).stdout
    device = torch.cuda.get_device_name() if options.device == "cuda" else _processor()
    return (
        f"{device}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}, Pyro "
        f"{pyro.__version__}; commit {commit.strip() or 'unknown'}; {options.clock} clock, {options.rounds} rounds"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Prints the table of ratios."""
    parser = argparse.ArgumentParser(description="milliseconds of a training step, and the ratio to plain PyTorch")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--batches", nargs="+", type=int, default=[20, 128, 512])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0 leaves its default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--mode", help="of the compilers, as reduce-overhead")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--memory", action="store_true", help="also the peak of a process of its own, for each")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders, and by hand")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")  # of torch.jit's age, which is JitTrace_ELBO's
    pyro.enable_validation(False)  # for all alike
    if options.measure:
        family, size, name = options.measure
        print(json.dumps(measure_memory(family, int(size), name, options)))
        return
    print(machine(options))
    for name, family in (("pythae", "vae"), ("diffusers", "ddpm")):
        if family in options.families and not is_installed(name):
            print(f"{name} is left out: it is not installed")
    found = {}
    for family in options.families:
        for size in options.batches:
            print(f"{family}, batch {size}; by hand = 1", flush=True)
            found[f"{family}, {size}"] = measure(family, size, options)
    print_table(found)


if __name__ == "__main__":
    main()
