"""What a D3PM costs beside its network, and structured transitions beside dense ones.

    step           gradient of DiffusionLoss beside the network's own forward and backward, K = 256 classes
    sampler        a step of ancestral_sample beside one forward of the network
    transitions    a term's KL and its gradient, and a draw of x_t, for uniform and absorbing transitions beside the same ones
                   as matrices, by K: O(K) beside O(K^2)

The networks are the library's: mlp and unet return K logits an entry, which any loss over K classes must pass over; logistic
is a U-Net of two numbers a pixel, of which the D3PM makes the K logits, so that all work over classes is the loss's. Turns,
ratios and options are those of :mod:`tests.benchmarks.diffusion`.

    python -m tests.benchmarks.discrete [--blocks step sampler transitions] [--networks mlp unet logistic] [--rounds 20]
        [--kinds uniform absorbing gaussian] [--classes 256] [--batch 32] [--threads 1] [--device cpu] [--clock wall|cpu]
        [--compiled]

Not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
from typing import Literal

import torch
from torch import Tensor, nn

from inference import DiffusionLoss, ancestral_sample
from inference.training.compilation import compile_objective
from ppl_models import D3PM
from ppl_models.networks.ordinal import OrdinalDenoiser
from ppl_models.networks.residual_mlp import ResidualMLP
from ppl_models.networks.unet import UNet
from ppl_models.processes import CategoricalProcess, Transitions, absorbing, discretized_gaussian, uniform
from ppl_models.processes.dense_transitions import DenseTransitions
from tests.benchmarks.diffusion import Call, begin, compare, gradient_of, parser

SHAPES = {"mlp": (8, 8), "unet": (28, 28), "logistic": (28, 28)}
SIZES = (16, 64, 256, 1024)
LENGTH = 100
KINDS = {"uniform": uniform, "absorbing": absorbing, "gaussian": discretized_gaussian}


def make_pair(kind: str, network: str, num_classes: int, options: argparse.Namespace) -> D3PM:
    """A D3PM over all classes, a mask among them where there is one."""
    torch.manual_seed(0)
    shape = SHAPES[network]
    body: nn.Module
    if network == "mlp":
        body = ResidualMLP(shape, hidden=256, blocks=4, num_classes=num_classes)
    elif network == "unet":
        body = UNet(shape, (32, 64), blocks=2, num_classes=num_classes)
    else:
        body = OrdinalDenoiser(UNet(shape, (32, 64), blocks=2, with_variance=True), num_classes)
    output: Literal["logits", "logistic"] = "logistic" if network == "logistic" else "logits"
    return D3PM(body, KINDS[kind](num_classes, LENGTH), shape, num_classes, output).to(options.device)


def make_data(shape: tuple[int, ...], size: int, num_classes: int, options: argparse.Namespace) -> Tensor:
    """Classes at random, the mask not among them."""
    torch.manual_seed(1)
    return torch.randint(num_classes - 1, (size, *shape)).to(options.device)


def step(options: argparse.Namespace) -> None:
    """A training step beside the network's own forward and backward."""
    for network in options.networks:
        for kind in options.kinds:
            if network == "logistic" and kind == "absorbing":  # a mask has no place on the line
                continue
            step_of(network, kind, options)


def step_of(network: str, kind: str, options: argparse.Namespace) -> None:
    """:func:`step` for one network and kind."""
    size = options.batch if network == "mlp" else max(1, options.batch // 8)
    x = make_data(SHAPES[network], size, options.classes, options)
    pair = make_pair(kind, network, options.classes, options)
    t = torch.randint(1, LENGTH + 1, (size,), device=x.device)
    vlb, hybrid = DiffusionLoss(pair), DiffusionLoss(pair, "hybrid", auxiliary_weight=0.01)
    calls = {
        "network alone": gradient_of(pair, lambda: pair.network(x, t)),
        "cross entropy": gradient_of(pair, lambda: cross_entropy(pair, x, t)),
        "vlb": gradient_of(pair, lambda: vlb(x)),
        "hybrid": gradient_of(pair, lambda: hybrid(x)),
    }
    title = f"step, {kind}, {network}, K = {options.classes}, T = {LENGTH}, batch {size}"
    compare(title, calls, "network alone", options)
    if options.compiled:
        alone = torch.compile(lambda: pair.network(x, t))
        entropy = torch.compile(lambda: cross_entropy(pair, x, t))
        fast = {"vlb": compile_objective(vlb, x), "hybrid": compile_objective(hybrid, x)}
        calls = {
            "network alone": gradient_of(pair, alone),
            "cross entropy": gradient_of(pair, entropy),
            "vlb": gradient_of(pair, lambda: fast["vlb"](x)),
            "hybrid": gradient_of(pair, lambda: fast["hybrid"](x)),
        }
        compare(f"{title}, compiled", calls, "network alone", options)


def cross_entropy(pair: D3PM, x: Tensor, t: Tensor) -> Tensor:
    """The least that a loss over K classes can be: torch's own, without noise or process."""
    logits = pair.x_0_logits(pair.network(x, t), x).flatten(0, -2)
    return nn.functional.cross_entropy(logits, x.flatten(), reduction="none")


def sampler(options: argparse.Namespace) -> None:
    """A step of the ancestral sampler beside one network call; T calls of each."""
    for network in options.networks:
        for kind in options.kinds:
            if network == "logistic" and kind == "absorbing":  # a mask has no place on the line
                continue
            sampler_of(network, kind, options)


def sampler_of(network: str, kind: str, options: argparse.Namespace) -> None:
    """:func:`sampler` for one network and kind."""
    size = options.batch if network == "mlp" else max(1, options.batch // 8)
    x = make_data(SHAPES[network], size, options.classes, options)
    pair = make_pair(kind, network, options.classes, options).eval()
    t = torch.full((size,), 1, device=x.device)

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(LENGTH):
            pair.network(x, t)

    calls: dict[str, Call] = {
        "network alone": forwards,
        "ancestral_sample": lambda: ancestral_sample(pair, size),
    }
    title = f"sampler, {kind}, {network}, K = {options.classes}, {LENGTH} steps, {size} samples"
    compare(title, calls, "network alone", options, LENGTH)


def transitions(options: argparse.Namespace) -> None:
    """The KL of one step with its gradient, and a draw of x_t, structured and as matrices."""
    for kind in ("uniform", "absorbing"):
        for num_classes in SIZES:
            structured = KINDS[kind](num_classes, 20)
            matrices = torch.stack([structured.dense(t) for t in range(1, 21)])
            dense = DenseTransitions(matrices, structured.stationary)
            x = make_data((64,), 4, num_classes, options)
            logits = torch.randn(4, 64, num_classes, device=x.device)
            calls = {}
            for name, given in (("structured", structured), ("dense", dense)):
                calls[name] = term(given.to(options.device), x, logits)
            compare(f"transitions, {kind}, K = {num_classes}, 256 entries", calls, "structured", options)


def term(given: Transitions, x: Tensor, logits: Tensor) -> Call:
    """x_t ~ q(x_t | x_0), KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and its gradient in the logits of x_0."""
    process = CategoricalProcess(given, x.shape[1:]).to(x.device)
    t = torch.full((len(x),), 10, device=x.device)

    def call() -> None:
        leaf = logits.clone().requires_grad_()
        x_t = process.sample_marginal(x, t)
        process.step_losses(x_t, x, leaf, t)[0].sum().backward()

    return call


BLOCKS = {"step": step, "sampler": sampler, "transitions": transitions}


def main() -> None:
    """Prints the tables."""
    options_of = parser("a D3PM's cost beside its network's", list(BLOCKS))
    options_of.add_argument("--networks", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    options_of.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["uniform", "absorbing"])
    options_of.add_argument("--classes", type=int, default=256)
    options_of.set_defaults(batch=32)
    options = options_of.parse_args()
    begin(options)
    for name in options.blocks:
        BLOCKS[name](options)


if __name__ == "__main__":
    main()
