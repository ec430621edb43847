"""D3PM on the characters of a text, absorbing against uniform transitions ("D3PM", outline of lecture notes 004).

One small transformer, one budget, two ways of forgetting (Austin et al. 2021, arXiv:2107.03006, section 5.1): characters turn
into a mask, or into other characters. The bound of both on the last tenth of the text, in bits per character, stands beside
n-gram models that are read off by counting. A diffusion sees each window alone, so the n-grams do, too; that they gain by
reading on from one window to the next is shown beside it.

    python examples/text_d3pm.py FILE --out runs/text        the same call again goes on where it was stopped
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor

from inference import ancestral_sample, decompose_diffusion, fit, load_data
from inference.bounds.diffusion_terms import TermCurve
from inference.training.evaluation import Evaluation, evaluate
from inference.training.objective_choice import DiffusionBound
from inference.training.runs import Run
from inference.training.text_data import decode, printable
from inference.views.drawing import BLUE, GREY, VERMILION, save_figure, style
from inference.views.tables import text_table
from ppl_models import D3PM
from ppl_models.networks import TransformerDenoiser
from ppl_models.processes import absorbing, uniform

TRANSITIONS = {
    "absorbing": lambda num_characters, num_timesteps: absorbing(num_characters + 1, num_timesteps),  # and the mask
    "uniform": uniform,
}
STRENGTHS = tuple(2.0**k for k in range(-4, 13))


class NGram:
    r"""p_n(c | h) = (N(hc) + s_n p_{n-1}(c | h')) / (N(h) + s_n), h' being h without its oldest character and p_0 = 1/K.

    Counts N, smoothed towards the shorter context with the weight of s_n characters (MacKay and Peto 1995, *A hierarchical
    Dirichlet language model*). Where a window has fewer than n - 1 characters before c, the longest context that it has.

    Args:
        train: a text as classes, ``[n]``.
        num_classes: K.
        strengths: s_1, s_2, ..., as many as orders.

    Raises:
        ValueError: K^n does not fit into 64 bits.
    """

    def __init__(self, train: Tensor, num_classes: int, strengths: Sequence[float]) -> None:
        if num_classes ** len(strengths) >= 2**63:
            raise ValueError(f"expected K^n < 2^63, got {num_classes}^{len(strengths)}: ask for a smaller order")
        self.num_classes, self.strengths = num_classes, list(strengths)
        orders = range(1, len(strengths) + 1)
        self.grams = [torch.unique(self._codes(train, n), return_counts=True) for n in orders]
        self.contexts = [torch.unique(self._codes(train, n) // num_classes, return_counts=True) for n in orders]

    def probabilities(self, x: Tensor) -> Tensor:
        """p(x_i | what comes before it in its window), float64, of the shape of ``x`` ``[N, L]``."""
        p = torch.full(x.shape, 1 / self.num_classes, dtype=torch.float64)
        for n, (grams, contexts, s) in enumerate(zip(self.grams, self.contexts, self.strengths, strict=True), 1):
            if n <= x.shape[-1]:
                code, shorter = self._codes(x, n), p[..., n - 1 :]
                known = _count(contexts, code // self.num_classes)
                p[..., n - 1 :] = (_count(grams, code) + s * shorter) / (known + s)
        return p

    def bits(self, x: Tensor) -> float:
        """Mean of -log2 p over the characters of windows ``x`` ``[N, L]``: exact."""
        return -float(self.probabilities(x).log2().mean())

    def _codes(self, x: Tensor, n: int) -> Tensor:
        """Each n characters in a row as one number, the last as its last digit in base K."""
        return sum(x[..., i : x.shape[-1] - n + 1 + i] * self.num_classes ** (n - 1 - i) for i in range(n))


def _count(table: tuple[Tensor, Tensor], codes: Tensor) -> Tensor:
    """How often each code is in a table of values, sorted, and their counts."""
    values, counts = table
    place = torch.searchsorted(values, codes).clamp(max=len(values) - 1)
    return torch.where(values[place] == codes, counts[place], 0)


def choose_strengths(train: Tensor, num_classes: int, order: int) -> list[float]:
    """s_1..s_n, one after the other, the best of `STRENGTHS` on the last tenth of a training text ``[n]``."""
    start = len(train) - len(train) // 10
    chosen: list[float] = []
    for _ in range(order):
        tried = [NGram(train[:start], num_classes, [*chosen, s]).bits(train[None, start:]) for s in STRENGTHS]
        chosen.append(STRENGTHS[tried.index(min(tried))])
    return chosen


def draw(runs: dict[str, Run], curves: dict[str, TermCurve], grams: dict[int, float]) -> Figure:
    """Bits per character by epoch above the n-grams' lines, and where in t they are paid."""
    with style():
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (kind, run), colour in zip(runs.items(), (BLUE, VERMILION), strict=True):
            rows, curve = run.metrics, curves[kind]
            bits = [row["validation_bits_per_dim"] for row in rows]
            left.plot([row["epoch"] for row in rows], bits, color=colour, marker="o", markersize=3, label=kind)
            inner = curve.t < curve.t.max()
            right.plot(curve.t[inner], curve.loss_bits_per_dim[inner], color=colour, label=kind)
        for n, bits in grams.items():
            left.axhline(bits, color=GREY, linewidth=0.8, linestyle="--")
            beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 7}
            left.annotate(f"{n}-gram", (1, bits), (3, -2), color=GREY, **beside)
        left.set(
            xlabel="epoch", ylabel="bits per character", title="−ELBO while training, n-grams on the held-out part"
        )
        right.set(xlabel="t", ylabel="L_t, bits per character", title="Where the bits are paid")
        left.legend(loc="center right")
        right.legend()
    return figure


def train(kind: str, spec: str, folder: Path, options: argparse.Namespace) -> Run:
    """The run in ``folder``: begun, gone on with, or only read, by what is there."""
    torch.manual_seed(0)
    num_characters = len(load_data(spec).alphabet)
    transitions = TRANSITIONS[kind](num_characters, options.num_timesteps)
    network = TransformerDenoiser((options.window,), transitions.num_classes, options.width, options.layers)
    return fit(
        D3PM(network, transitions, (options.window,), transitions.num_classes),
        spec,
        folder,
        resume=True,
        epochs=options.epochs,
        batch_size=16,
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=100,
        gradient_clip=1.0,
        ema=0.999,
        validation_fraction=0.02,  # of the training part: the held-out tenth is looked at once, below
        device=options.device,
    )


def held_out(pair: D3PM, x: Tensor, num_curve: int) -> tuple[Evaluation, TermCurve]:
    """The bound on windows ``x``, by 16 draws of t for each of them; and its terms by t on the first ``num_curve``."""
    device = next(pair.parameters()).device
    bound = evaluate(DiffusionBound(pair), x, batch_size=64, seed=0, device=device)
    return bound, decompose_diffusion(pair, x[:num_curve].to(device), num_particles=2, seed=0).curve()


def main(text: Path, out: Path, options: argparse.Namespace) -> dict[str, float]:
    """Counts, trains, and prints bits per character and samples; the runs and a picture go into ``out``."""
    pyro.set_rng_seed(0)
    spec = f"text:{text}@{options.window}"
    data = load_data(spec)
    stream, windows = data.train.flatten(), data.test
    print(f"{data.name}: {data.num_train} windows for training, {data.num_test} held out ({data.split})")

    strengths = choose_strengths(stream, len(data.alphabet), options.order)
    models = {n: NGram(stream, len(data.alphabet), strengths[:n]) for n in range(1, options.order + 1)}
    grams = {n: model.bits(windows) for n, model in models.items()}
    rows = [
        [f"{n}-gram", f"{grams[n]:.3f}", "exact", f"{model.bits(windows.reshape(1, -1)):.3f}"]
        for n, model in models.items()
    ]

    runs = {kind: train(kind, spec, out / kind, options) for kind in TRANSITIONS}
    bits, curves = {}, {}
    for kind, run in runs.items():
        bound, curves[kind] = held_out(run.pair, windows, options.num_curve)
        bits[kind] = bound.bits_per_dim
        error = bound.std_error / (options.window * math.log(2))
        rows.append([f"D3PM, {kind}", f"{bits[kind]:.3f}", f"bound, +- {error:.3f} SE", "-"])
    header = ["model", "bits/char", "", "reading on across windows"]
    print(text_table(header, rows))
    for kind, run in runs.items():
        samples = ancestral_sample(run.pair, options.num_samples, seed=0).cpu()
        for i, sample in enumerate(decode(samples, data.alphabet), 1):
            print(f"--- {kind}, sample {i}\n{printable(sample)}")
    print(f"wrote {save_figure(draw(runs, curves, grams), out / 'text_d3pm.png', overwrite=True)}")
    return {**bits, **{f"{n}-gram": value for n, value in grams.items()}}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="FILE", help="a text in UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two runs and the picture")
    parser.add_argument("--window", type=int, default=64, help="characters in a datum")
    parser.add_argument("--order", type=int, default=5, help="of the longest n-gram")
    parser.add_argument("--num-timesteps", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--num-curve", type=int, default=200, help="held-out windows for the terms by t")
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    stated = parse()
    main(stated.text, stated.out, stated)
