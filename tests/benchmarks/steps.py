"""How long is a training step: compiled objectives beside Pyro's SVI and the same losses written by hand in PyTorch.

    vae    Gaussian VAE 784-200-200-50, Bernoulli likelihood             hvae   two layers of it, 784-200-50-200-20, bottom-up
    ddpm   784 pixels, MLP denoiser, T = 1000, one t per datum           each step: gradient and Adam

    ours compiled, ours flat, ours eager    compile_objective(loss, x), the same without a compiler, and the loss itself
    by hand, by hand compiled               plain PyTorch on the same networks, KL in closed form; torch.compile of it
    network alone                           ddpm: the denoiser's forward and backward, no loss
    SVI ...                                 pyro.infer.SVI with Pyro's Adam, as its users write it; ddpm: on its single terms

Contenders take turns within a round, and a ratio is formed within its round, so that what else the machine does cancels;
medians, with the quartiles of the ratio behind. Every contender works on a copy of the same pair, so its mean loss shows
whether it trains alike (the ddpm's SVI minimises the bound, the others L_simple). With --memory also the peak of a process
of its own, less what it held before the steps counted; on CUDA the peak that torch allocates.

    python -m tests.benchmarks.steps [--families vae hvae ddpm] [--batches 20 128 512] [--rounds 30] [--threads 0]
        [--device cpu] [--mode reduce-overhead] [--clock wall|cpu] [--memory] [--only NAME ...]

Not a test: nothing here passes or fails. ``--clock cpu`` counts this process's own seconds, for machines that others use, too;
take one thread with it.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
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
import torch.nn.functional as F
from torch import Tensor, nn

from inference import DiffusionLoss, ElboLoss
from inference.training.compilation import compile_objective
from ppl_models import DDPM, HVAE, VAE, ModelGuidePair
from ppl_models.likelihoods import Bernoulli, DiscretizedNormal
from tests.benchmarks.evidence import ROOT, _forget_peak, _peak

INK = 0.13
Step = Callable[[], Tensor]


def make_pair(family: str) -> ModelGuidePair:
    """The same weights for each contender."""
    torch.manual_seed(0)
    if family == "vae":
        return VAE.preset((28, 28), Bernoulli(), latent_dim=50, hidden=(200, 200))
    if family == "hvae":
        return HVAE.preset((28, 28), Bernoulli(), latent_dims=(50, 20), hidden=(200,))
    return DDPM.preset((28, 28), DiscretizedNormal(levels=256), num_timesteps=1000, hidden=256, blocks=2)


def make_data(family: str, size: int) -> Tensor:
    """Pixels at random: their values cost nothing."""
    torch.manual_seed(1)
    if family == "ddpm":
        return torch.randint(256, (size, 28, 28)) / 127.5 - 1
    return (torch.rand(size, 28, 28) < INK).float()


def vae_by_hand(vae: Any, x: Tensor) -> Tensor:
    """-ELBO of the VAE."""
    loc, scale = vae.encoder(x)
    z = loc + scale * torch.randn_like(loc)
    log_x = -F.binary_cross_entropy_with_logits(vae.decoder(z), x, reduction="none").sum((-1, -2))
    return (0.5 * (loc.square() + scale.square() - 1) - scale.log()).sum(-1) - log_x


def hvae_by_hand(hvae: Any, x: Tensor) -> Tensor:
    """-ELBO of the two-layer HVAE with its bottom-up guide."""
    loc_1, scale_1 = hvae.encoders[0](x)
    noise_1 = torch.randn_like(loc_1)
    z_1 = loc_1 + scale_1 * noise_1
    loc_2, scale_2 = hvae.encoders[1](z_1)
    noise_2 = torch.randn_like(loc_2)
    z_2 = loc_2 + scale_2 * noise_2
    prior_loc, prior_scale = hvae.decoders[1](z_2)
    error = (z_1 - prior_loc) / prior_scale
    rate_1 = 0.5 * (error.square() - noise_1.square()) + prior_scale.log() - scale_1.log()
    rate_2 = 0.5 * (z_2.square() - noise_2.square()) - scale_2.log()
    log_x = -F.binary_cross_entropy_with_logits(hvae.decoders[0](z_1), x, reduction="none").sum((-1, -2))
    return rate_1.sum(-1) + rate_2.sum(-1) - log_x


def ddpm_by_hand(ddpm: Any, x: Tensor) -> Tensor:
    """L_simple of Ho et al. 2020, algorithm 1."""
    alpha_bar = ddpm.process._alpha_bar
    t = torch.randint(1, ddpm.num_timesteps + 1, (len(x),), device=x.device)
    eps = torch.randn_like(x)
    level = alpha_bar[t].to(x.dtype)[:, None, None]
    return (eps - ddpm.network(level.sqrt() * x + (1 - level).sqrt() * eps, t)).square().sum((-1, -2))


BY_HAND = {"vae": vae_by_hand, "hvae": hvae_by_hand, "ddpm": ddpm_by_hand}


def network_alone(ddpm: Any, x: Tensor) -> Tensor:
    """The denoiser's output, summed."""
    t = torch.full((len(x),), 500, device=x.device)
    return ddpm.network(x, t).sum((-1, -2))


def objective(family: str, pair: Any) -> nn.Module:
    """Ours."""
    return DiffusionLoss(pair, weights="simple") if family == "ddpm" else ElboLoss(pair)


def with_adam(pair: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    """A step of torch's Adam."""
    optimizer = torch.optim.Adam(pair.parameters(), lr=1e-3)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(x).mean()
        value.backward()
        optimizer.step()
        return value

    return step


def with_svi(family: str, pair: Any, elbo: Any, x: Tensor) -> Step:
    """A step of SVI; the diffusion's t are drawn here, over all terms."""
    if family != "ddpm":
        svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        return lambda: torch.tensor(svi.step(x) / len(x))
    svi = pyro.infer.SVI(pair.term_model, pair.term_guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    return lambda: torch.tensor(svi.step(x, torch.randint(pair.num_timesteps + 1, (len(x),), device=x.device)) / len(x))


def contenders(family: str, mode: str | None) -> dict[str, Callable[[Any, Tensor], Step]]:
    """Each by name: of a pair and data, a step."""
    by_hand = BY_HAND[family]
    found: dict[str, Callable[[Any, Tensor], Step]] = {
        "ours compiled": lambda p, x: with_adam(p, compile_objective(objective(family, p), x, mode=mode), x),
        "ours flat": lambda p, x: with_adam(p, compile_objective(objective(family, p), x, backend="eager"), x),
        "ours eager": lambda p, x: with_adam(p, objective(family, p), x),
        "by hand": lambda p, x: with_adam(p, lambda data: by_hand(p, data), x),
        "by hand compiled": lambda p, x: with_adam(p, torch.compile(lambda data: by_hand(p, data), mode=mode), x),
        "SVI Trace_ELBO": lambda p, x: with_svi(family, p, pyro.infer.Trace_ELBO(), x),
        "SVI TraceMeanField": lambda p, x: with_svi(family, p, pyro.infer.TraceMeanField_ELBO(), x),
        "SVI JitTrace_ELBO": lambda p, x: with_svi(family, p, pyro.infer.JitTrace_ELBO(ignore_jit_warnings=True), x),
    }
    if family == "ddpm":
        found["network alone"] = lambda p, x: with_adam(p, lambda data: network_alone(p, data), x)
    return found


def prepared(family: str, size: int, name: str, options: argparse.Namespace) -> Step | None:
    """A contender's step after its first calls; None, with a word, where it does not run."""
    pair = copy.deepcopy(make_pair(family)).to(options.device)
    x = make_data(family, size).to(options.device)
    try:
        step = contenders(family, options.mode)[name](pair, x)
        for _ in range(3):
            step()
    except Exception as error:
        print(f"  {name} is left out: {type(error).__name__}: {' '.join(str(error).split())[:100]}")
        return None
    return step


def measure(family: str, size: int, options: argparse.Namespace) -> None:
    """One block of the table."""
    steps = {
        name: prepared(family, size, name, options)
        for name in contenders(family, options.mode)
        if wanted(name, options)
    }
    running = {name: step for name, step in steps.items() if step is not None}
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in running}
    last: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(options.rounds):
        for name, step in running.items():
            _wait(options.device)
            start = clock()
            value = step()
            _wait(options.device)
            seconds[name].append(clock() - start)
            last[name].append(float(value.detach()))
    reference = seconds["by hand"]
    for name in running:
        ratios = [a / b for a, b in zip(seconds[name], reference, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        memory = f"  {memory_of(family, size, name, options):8.1f} MiB" if options.memory else ""
        loss = statistics.mean(last[name])
        milliseconds = 1e3 * statistics.median(seconds[name])
        print(
            f"  {name:19s} {milliseconds:8.2f} ms   x {middle:5.2f} ({low:.2f} - {high:.2f}){memory}   loss {loss:9.1f}",
            flush=True,
        )


def wanted(name: str, options: argparse.Namespace) -> bool:
    """Whether a contender was asked for; the reference always is."""
    return not options.only or name in options.only or name == "by hand"


def memory_of(family: str, size: int, name: str, options: argparse.Namespace) -> float:
    """MiB of a contender's steps, in a new interpreter."""
    command = [sys.executable, "-m", "tests.benchmarks.steps", "--measure", family, str(size), name]
    command += ["--threads", str(options.threads), "--device", options.device]
    command += ["--mode", options.mode] if options.mode else []
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure_memory(family: str, size: int, name: str, options: argparse.Namespace) -> float:
    """Peak MiB of some steps in this process; compilers' own memory is gone by then."""
    step = prepared(family, size, name, options)
    assert step is not None
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
    parser.add_argument("--families", nargs="+", choices=BY_HAND, default=list(BY_HAND))
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
    for family in options.families:
        for size in options.batches:
            print(f"{family}, batch {size}; by hand = 1", flush=True)
            measure(family, size, options)


if __name__ == "__main__":
    main()
