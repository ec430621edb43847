"""Where a training step's time goes, for each family: networks, the rest of the forward pass, backward pass, Adam.

    Trace_ELBO       Pyro's own, as its users have it: what there was before
    ours eager       our loss as it is
    ours compiled    compile_objective of it; its networks are in the graph, and not seen alone
    by hand          plain PyTorch of the same loss on the same networks

Families are those of :mod:`tests.benchmarks.families`. "Networks" are the modules of the pair that hold parameters, timed by
hooks from call to return; "other" is the forward pass without them: drawing noise, laws and terms, handlers, Python.
Contenders take turns in an order drawn for each round; medians, microseconds of this process's own time.

    python -m tests.benchmarks.anatomy [--families vae hvae ...] [--batch 20] [--rounds 40] [--threads 1]

Not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.infer
import torch
from torch import Tensor, nn

from inference import compile_objective
from tests.benchmarks.families import FAMILIES, Family
from tests.benchmarks.steps import machine

Loss = Callable[[], Tensor]


class Parts(NamedTuple):
    """Seconds of one step."""

    networks: float
    other: float
    backward: float
    adam: float


class Watch:
    """Adds up the seconds that a pair's networks take in their forward passes."""

    def __init__(self, pair: nn.Module) -> None:
        self.seconds = self._since = 0.0
        for network in networks_of(pair):
            network.register_forward_pre_hook(self._start)
            network.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._since = time.process_time()

    def _stop(self, *_: Any) -> None:
        self.seconds += time.process_time() - self._since


def networks_of(pair: nn.Module) -> list[nn.Module]:
    """The outermost modules with parameters, lists of them taken apart."""
    found: list[nn.Module] = []
    for child in pair.children():
        if isinstance(child, nn.ModuleList):
            found += networks_of(child)
        elif next(child.parameters(), None) is not None:
            found.append(child)
    return found


def contenders(family: Family) -> dict[str, Callable[[Any, Tensor], Loss]]:
    """Each by name: of a pair and data, a loss."""
    return {
        "Trace_ELBO": lambda pair, x: trace_elbo(family, pair, x),
        "ours eager": lambda pair, x: mean_of(family.objective(pair), x),
        "ours compiled": lambda pair, x: mean_of(compile_objective(family.objective(pair), x), x),
        "by hand": lambda pair, x: mean_of(lambda data: family.by_hand(pair, data), x),
    }


def mean_of(loss: Callable[[Tensor], Tensor], x: Tensor) -> Loss:
    """Over the batch."""
    return lambda: loss(x).mean()


def trace_elbo(family: Family, pair: Any, x: Tensor) -> Loss:
    """Pyro's estimator; of a diffusion's single terms, at t that are drawn here."""
    elbo = pyro.infer.Trace_ELBO()
    if not family.is_diffusion:
        return lambda: elbo.differentiable_loss(pair.model, pair.guide, x) / len(x)

    def loss() -> Tensor:
        t = torch.randint(pair.num_timesteps + 1, (len(x),))
        return elbo.differentiable_loss(pair.term_model, pair.term_guide, x, t) / len(x)

    return loss


def step_of(family: Family, make: Callable[[Any, Tensor], Loss], size: int) -> Callable[[], Parts]:
    """A step that says what it took."""
    torch.manual_seed(0)
    pair, x = family.pair(), family.data(size)
    loss = make(pair, x)
    watch, adam = Watch(pair), torch.optim.Adam(pair.parameters(), lr=1e-3, fused=True)

    def step() -> Parts:
        adam.zero_grad()
        watch.seconds = 0.0
        times = [time.process_time()]
        value = loss()
        times.append(time.process_time())
        value.backward()
        times.append(time.process_time())
        adam.step()
        times.append(time.process_time())
        forward, backward, update = (b - a for a, b in itertools.pairwise(times))
        return Parts(watch.seconds, forward - watch.seconds, backward, update)

    for _ in range(4):
        step()
    return step


def anatomy(name: str, options: argparse.Namespace) -> None:
    """The rows of one family."""
    steps = {title: step_of(FAMILIES[name], make, options.batch) for title, make in contenders(FAMILIES[name]).items()}
    found: dict[str, list[Parts]] = {title: [] for title in steps}
    shuffle = random.Random(0)
    for _ in range(options.rounds):
        for title in shuffle.sample(list(steps), len(steps)):
            found[title].append(steps[title]())
    for title, rows in found.items():
        medians = [1e6 * statistics.median(column) for column in zip(*rows, strict=True)]
        total = 1e6 * statistics.median(sum(row) for row in rows)
        networks = f"{medians[0]:.0f}" if medians[0] else "in the graph"
        rest = " | ".join(f"{value:.0f}" for value in medians[1:])
        print(f"| {name} | {title} | {networks} | {rest} | {total:.0f} |", flush=True)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description="where a training step's time goes")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.set_defaults(device="cpu", clock="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    pyro.enable_validation(False)
    print(f"{machine(options)}; batch {options.batch}, microseconds\n")
    print(
        "| family | loss | networks | other forward | backward | Adam | step |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name in options.families:
        anatomy(name, options)


if __name__ == "__main__":
    main()
