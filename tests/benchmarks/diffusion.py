"""What a diffusion costs beside its network: training step, sampler step, bound by t, and how they grow with T.

    growth      a training step, Adam included, at T = 10, 100, 1000, 4000: the same work whatever T
    step        gradient of DiffusionLoss beside the network's own forward and backward, L_simple by hand, Pyro's Trace_ELBO on
                the single terms, and diffusers' loop (DDPMScheduler.add_noise, mse) on the same network
    sampler     a step of ancestral_sample beside one forward of the network, and beside DDPMScheduler.step
    bound       decompose_diffusion beside the obvious loop over t, one draw per term and datum
    program     Trace_ELBO on the full chain of T sites beside a single term: why one trains on single terms

Contenders take turns, in an order drawn for each round, and a ratio is formed within a round, so that other work on the machine
cancels; medians, with the quartiles of the ratio behind. But for growth a step here is zero_grad, loss and gradient, without an
optimiser, for what a loss costs beside its network does not depend on one. What needs diffusers is left out, with a word, where
it is not installed.

    python -m tests.benchmarks.diffusion [--blocks growth step sampler bound program] [--networks mlp small unet]
        [--rounds 20] [--batch 128] [--threads 1] [--device cpu] [--clock wall|cpu] [--compiled]

Networks: "mlp" is ResidualMLP as its defaults make it (four blocks of 256), "small" two such blocks, "unet" a U-Net of widths
16 and 32. A measurement of a training step is of eight steps, because L_0 costs something in those that draw it alone.

Not a test: nothing here passes or fails. ``--clock cpu`` counts this process's own seconds, for machines that others use, too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import pyro.infer
import torch
from torch import Tensor, nn

from inference import DiffusionLoss, ancestral_sample, decompose_diffusion
from inference.training.compilation import compile_objective
from ppl_models import DDPM
from ppl_models.likelihoods import DiscretizedNormal
from ppl_models.networks.diffusers import DiffusersUNet
from ppl_models.networks.residual_mlp import ResidualMLP
from ppl_models.networks.unet import UNet
from ppl_models.processes import NoiseSchedule
from tests.benchmarks.steps import machine

SHAPE = (28, 28)
LENGTHS = (10, 100, 1000, 4000)
LEAST_SECONDS = 2e-3  # of one measurement: short calls are repeated
STEPS = 8  # a measurement of training steps, whose cost depends on the t drawn, has at least as many
Call = Callable[[], Any]


def make_network(name: str) -> nn.Module:
    """The same weights for each contender."""
    torch.manual_seed(0)
    if name == "unet":
        return UNet(SHAPE, (16, 32), blocks=1)
    if name == "diffusers":
        sizes = {"sample_size": 28, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 8}
        kinds = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
        return DiffusersUNet.from_config(SHAPE, {**sizes, **kinds, "block_out_channels": [16, 32]})
    return ResidualMLP(SHAPE, blocks=2) if name == "small" else ResidualMLP(SHAPE)


def make_pair(network: str, num_timesteps: int, options: argparse.Namespace) -> DDPM:
    """A DDPM of the notes: eps-prediction, variance beta_t, 256 levels."""
    schedule = NoiseSchedule.linear(max(num_timesteps, 25))  # which is too steep for fewer
    schedule = schedule if num_timesteps >= 25 else NoiseSchedule.cosine(num_timesteps)
    pair = DDPM(make_network(network), schedule, SHAPE, likelihood=DiscretizedNormal(levels=256))
    return pair.to(options.device)


def make_data(size: int, options: argparse.Namespace) -> Tensor:
    """Pixels at random: their values cost nothing."""
    torch.manual_seed(1)
    return (torch.randint(256, (size, *SHAPE)) / 127.5 - 1).to(options.device)


def gradient_of(pair: nn.Module, loss: Callable[[], Tensor]) -> Call:
    """zero_grad, loss, backward."""

    def step() -> None:
        pair.zero_grad()
        loss().mean().backward()

    return step


def training_step(pair: nn.Module, loss: Callable[[], Tensor]) -> Call:
    """:func:`gradient_of`, and Adam in one fused operation as ``fit`` has it."""
    adam = torch.optim.Adam(pair.parameters(), lr=1e-4, fused=True)
    gradient = gradient_of(pair, loss)

    def step() -> None:
        gradient()
        adam.step()

    return step


def growth(options: argparse.Namespace) -> None:
    """DiffusionLoss by T."""
    for network in options.networks:
        size = batch_of(network, options)
        x = make_data(size, options)
        for weights in ("simple", "vlb"):
            losses = {
                last: DiffusionLoss(make_pair(network, last, options), weights=weights)  # type: ignore[arg-type]
                for last in LENGTHS
            }
            title = f"growth, {weights}, {network}, batch {size}"
            calls = {f"T = {last}": training_step(loss, partial(loss, x)) for last, loss in losses.items()}
            compare(title, calls, "T = 100", options, least=STEPS)
            if options.compiled:
                fast = {last: compile_objective(loss, x) for last, loss in losses.items()}
                calls = {f"T = {last}": training_step(losses[last], partial(fast[last], x)) for last in LENGTHS}
                compare(f"{title}, compiled", calls, "T = 100", options, least=STEPS)


def batch_of(network: str, options: argparse.Namespace) -> int:
    """U-Nets take an eighth of the batch."""
    return options.batch if network in ("mlp", "small") else options.batch // 8


def simple_by_hand(ddpm: DDPM, x: Tensor) -> Tensor:
    """L_simple of Ho et al. 2020, algorithm 1."""
    t = torch.randint(1, ddpm.num_timesteps + 1, (len(x),), device=x.device)
    level = ddpm.process.coefficient("alpha_bar", t, x)
    eps = torch.randn_like(x)
    return (eps - ddpm.network(level.sqrt() * x + (1 - level).sqrt() * eps, t)).square().sum((-1, -2))


def diffusers_loop(ddpm: DDPM, x: Tensor) -> Callable[[], Tensor]:
    """The training loop of diffusers' tutorials, on the model inside the adapter."""
    scheduler: Any = importlib.import_module("diffusers").DDPMScheduler(num_train_timesteps=ddpm.num_timesteps)
    images = x[:, None]

    def loss() -> Tensor:
        eps = torch.randn_like(images)
        t = torch.randint(0, ddpm.num_timesteps, (len(images),), device=x.device)
        unet: Any = ddpm.network.unet
        return (unet(scheduler.add_noise(images, eps, t), t).sample - eps).square()

    return loss


def step(options: argparse.Namespace) -> None:
    """A training step beside the network's own forward and backward."""
    for network in networks(options):
        step_of(network, options)


def step_of(network: str, options: argparse.Namespace) -> None:
    """:func:`step` for one network."""
    size = batch_of(network, options)
    x, pair = make_data(size, options), make_pair(network, 1000, options)
    t = torch.randint(1, 1001, (size,), device=x.device)
    losses = {weights: DiffusionLoss(pair, weights=weights) for weights in ("simple", "vlb")}
    elbo = pyro.infer.Trace_ELBO()
    calls = {
        "network alone": gradient_of(pair, lambda: pair.network(x, t)),
        "simple": gradient_of(pair, lambda: losses["simple"](x)),
        "vlb": gradient_of(pair, lambda: losses["vlb"](x)),
        "simple by hand": gradient_of(pair, lambda: simple_by_hand(pair, x)),
        "Trace_ELBO of terms": gradient_of(pair, lambda: elbo.differentiable_loss(*programs_of(pair), x, t - 1)),
    }
    if network == "diffusers":
        calls["diffusers' loop"] = gradient_of(pair, diffusers_loop(pair, x))
    compare(f"step, {network}, T = 1000, batch {size}", calls, "network alone", options, least=STEPS)
    if options.compiled:
        alone = torch.compile(lambda: pair.network(x, t))
        hand = torch.compile(lambda: simple_by_hand(pair, x))
        fast = {weights: compile_objective(loss, x) for weights, loss in losses.items()}
        calls = {
            "network alone": gradient_of(pair, alone),
            "simple": gradient_of(pair, lambda: fast["simple"](x)),
            "vlb": gradient_of(pair, lambda: fast["vlb"](x)),
            "simple by hand": gradient_of(pair, hand),
        }
        compare(f"step, {network}, T = 1000, batch {size}, compiled", calls, "network alone", options, least=STEPS)


def programs_of(pair: DDPM) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The single-term programs."""
    return pair.term_model, pair.term_guide


def sampler(options: argparse.Namespace) -> None:
    """A step of the ancestral sampler beside one network call; T calls of each, so that what is done once is counted."""
    for network in networks(options):
        sampler_of(network, 50, options)


def sampler_of(network: str, last: int, options: argparse.Namespace) -> None:
    """:func:`sampler` for one network and T."""
    size = batch_of(network, options)
    x, pair = make_data(size, options), make_pair(network, last, options).eval()
    t = torch.full((size,), 1, device=x.device)

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(last):
            pair.network(x, t)

    calls = {"network alone": forwards, "ancestral_sample": lambda: ancestral_sample(pair, size)}
    if network == "diffusers":
        calls["DDPMScheduler.step"] = scheduler_sampler(pair, x)
    compare(f"sampler, {network}, {last} steps, {size} samples", calls, "network alone", options, last)


def scheduler_sampler(pair: DDPM, x: Tensor) -> Call:
    """diffusers' sampling loop on the model inside the adapter."""
    scheduler: Any = importlib.import_module("diffusers").DDPMScheduler(num_train_timesteps=pair.num_timesteps)

    @torch.no_grad()
    def draw() -> None:
        x_t = torch.randn_like(x[:, None])
        for t in scheduler.timesteps:
            unet: Any = pair.network.unet
            x_t = scheduler.step(unet(x_t, t).sample, t, x_t).prev_sample

    return draw


def bound(options: argparse.Namespace) -> None:
    """Every L_t once, by decompose_diffusion and by a loop over t."""
    last, size = 100, 16
    for network in networks(options):
        x, pair = make_data(size, options), make_pair(network, last, options).eval()
        calls: dict[str, Call] = {
            "loop over t": partial(loop_over_t, pair, x),
            "decompose_diffusion": partial(decompose_diffusion, pair, x, num_particles=1),
        }
        compare(f"bound, {network}, T = {last}, {size} data, one draw", calls, "loop over t", options)


@torch.no_grad()
def loop_over_t(pair: DDPM, x: Tensor) -> Tensor:
    """-ELBO, as research codes have it: one t after the other, float32."""
    schedule = pair.process.schedule
    a, v = float(schedule.alpha_bar[-1]), float(schedule.marginal_variance[-1])
    total = 0.5 * (a * x.square() + v - 1 - math.log(v)).sum((-1, -2))
    for step_number in range(1, pair.num_timesteps + 1):
        a, v, beta, alpha, rate = (
            float(getattr(schedule, name)[step_number - 1])
            for name in ("alpha_bar", "marginal_variance", "beta", "alpha", "posterior_variance")
        )
        eps = torch.randn_like(x)
        x_t = a**0.5 * x + v**0.5 * eps
        t = torch.full((len(x),), step_number, device=x.device)
        predicted = pair.network(x_t, t)
        if step_number == 1:
            total -= pair.reconstruction_law(predicted, x_t).log_prob(x)
            continue
        error = (eps - predicted).square().sum((-1, -2)) * beta**2 / (alpha * v)
        total += error / (2 * beta) + 0.5 * x[0].numel() * (rate / beta - 1 - math.log(rate / beta))
    return total


def program(options: argparse.Namespace) -> None:
    """The chain of T sites as a Pyro program beside one single term."""
    x = make_data(options.batch, options)
    elbo = pyro.infer.Trace_ELBO()
    calls: dict[str, Call] = {}
    for last in (10, 100):
        pair = make_pair("mlp", last, options)
        t = torch.randint(last, (len(x),), device=x.device)
        one, chain = (*programs_of(pair), x, t), (pair.model, pair.posterior_guide, x)
        calls[f"one term of {last}"] = gradient_of(pair, partial(elbo.differentiable_loss, *one))
        calls[f"all {last} sites"] = gradient_of(pair, partial(elbo.differentiable_loss, *chain))
    compare(f"program, Trace_ELBO, mlp, batch {options.batch}", calls, "one term of 10", options)


def networks(options: argparse.Namespace) -> list[str]:
    """Those asked for, and diffusers' own where it is installed."""
    if importlib.util.find_spec("diffusers") is None:
        return options.networks
    return [*options.networks, "diffusers"]


def compare(
    title: str, calls: dict[str, Call], reference: str, options: argparse.Namespace, per: int = 1, least: int = 1
) -> dict[str, float]:
    """Measures contenders in turn and prints the table; the median ratio of each to the reference.

    Args:
        title: of the block.
        calls: contenders by name.
        reference: which of them is 1.
        options: ``rounds``, ``clock`` and ``device``.
        per: how many steps a call takes.
        least: how many calls a measurement has at least.
    """
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    repeats = {name: max(least, _repeats(call, options.device)) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    shuffle = random.Random(0)
    for _ in range(options.rounds):
        for name in shuffle.sample(names, len(names)):  # what one leaves in caches and heap falls on all others
            _wait(options.device)
            start = clock()
            for _ in range(repeats[name]):
                calls[name]()
            _wait(options.device)
            seconds[name].append((clock() - start) / repeats[name] / per)
    print(f"{title}; {reference} = 1")
    ratios = {}
    for name in names:
        within = [a / b for a, b in zip(seconds[name], seconds[reference], strict=True)]
        low, ratios[name], high = statistics.quantiles(within, n=4) if len(within) > 1 else 3 * within
        middle = 1e3 * statistics.median(seconds[name])
        print(f"  {name:22s} {middle:9.3f} ms   x {ratios[name]:6.3f} ({low:.3f} - {high:.3f})", flush=True)
    return ratios


def _repeats(call: Call, device: str) -> int:
    for _ in range(3):
        call()
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return max(1, round(LEAST_SECONDS / (time.perf_counter() - start)))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def parser(description: str, blocks: Sequence[str]) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--blocks", nargs="+", choices=blocks, default=list(blocks))
    found.add_argument("--rounds", type=int, default=20)
    found.add_argument("--batch", type=int, default=128)
    found.add_argument("--threads", type=int, default=1, help="torch's threads; 0 leaves its default")
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    found.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    found.add_argument(
        "--compiled", action="store_true", help="also through compile_objective and torch.compile: minutes"
    )
    return found


def begin(options: argparse.Namespace) -> None:
    """Threads, warnings, validation; prints where this is measured."""
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    pyro.enable_validation(False)  # for all alike
    print(machine(options), flush=True)


BLOCKS = {"growth": growth, "step": step, "sampler": sampler, "bound": bound, "program": program}


def main() -> None:
    """Prints the tables."""
    options_of = parser("a diffusion's cost beside its network's", list(BLOCKS))
    options_of.add_argument("--networks", nargs="+", choices=["mlp", "small", "unet"], default=["mlp", "unet"])
    options = options_of.parse_args()
    begin(options)
    if importlib.util.find_spec("diffusers") is None:
        print("diffusers' loop and scheduler are left out: diffusers is not installed")
    for name in options.blocks:
        BLOCKS[name](options)


if __name__ == "__main__":
    main()
