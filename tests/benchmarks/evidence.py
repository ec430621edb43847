"""How fast is IWAE-5000, and in how much memory: log_evidence beside plain torch and pythae's get_nll.

A Bernoulli VAE 784-200-200-50 on binary 28x28 images, the same weights for all:

    log_evidence     ours, on the pair's Pyro programs
    batched torch    the same by hand: all data and a chunk of particles at once, chunks of the same size as ours
    batched laws     the same, with the densities from torch.distributions as it comes
    loop in torch    the straightforward way: one datum after the other, all K particles of it at once
    get_nll          pythae 0.1.2, its defaults; left out, with a word, where pythae is not installed

Each measurement is a process of its own, after a warm-up; contenders take turns, and ratios are formed within a round, so
that what else the machine does cancels. Memory is the peak during the computation less what the process held before it.
Without --mnist, images are drawn at random with MNIST's share of ink, for neither time nor memory depends on them.

    python -m tests.benchmarks.evidence [--data 16] [--particles 5000] [--rounds 5] [--threads 0] [--mnist FOLDER]

Not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Independent, Normal

from ppl_models import VAE
from ppl_models.likelihoods import Bernoulli
from tests.benchmarks.other_libraries import is_installed, pythae_vae

ROOT = Path(__file__).parents[2]
INK = 0.13
ROWS = 2**21 // 892  # decoder rows at once, log_evidence's own chunk


def vae_and_data(num_data: int, mnist: str | None) -> tuple[VAE, Tensor]:
    """The same for each process; MNIST's first test images, made binary once, or random pixels."""
    torch.manual_seed(0)
    vae = VAE.preset((28, 28), Bernoulli(), latent_dim=50, hidden=(200, 200)).eval()
    if mnist is None:
        return vae, (torch.rand(num_data, 28, 28) < INK).float()
    from inference.training.datasets import load_data

    images = load_data(f"mnist:{mnist}", scaling="unit", binarization="fixed").test
    assert isinstance(images, Tensor)  # as all data in memory are
    return vae, images[:num_data].reshape(-1, 28, 28).float()


def log_evidence_of_pair(vae: VAE, x: Tensor, k: int) -> float:
    """Ours."""
    from inference import log_evidence

    return float(log_evidence(vae.model, vae.guide, x, num_particles=k).log_evidence.mean())


@torch.no_grad()
def batched_torch(vae: VAE, x: Tensor, k: int) -> float:
    """All data at once, particles in chunks."""
    loc, scale = vae.encoder(x)
    size, weights = max(1, ROWS // len(x)), []
    for start in range(0, k, size):
        weights.append(_log_weights(vae, x, loc, scale, min(size, k - start)))
    return float((torch.logsumexp(torch.cat(weights), 0) - math.log(k)).mean())


@torch.no_grad()
def batched_laws(vae: VAE, x: Tensor, k: int) -> float:
    """All data at once, particles in chunks, densities from torch.distributions."""
    loc, scale = vae.encoder(x)
    guide, prior = (Independent(law, 1) for law in (Normal(loc, scale), Normal(torch.zeros(50), torch.ones(50))))
    size, weights = max(1, ROWS // len(x)), []
    for start in range(0, k, size):
        z = guide.sample((min(size, k - start),))
        law = Independent(torch.distributions.Bernoulli(logits=vae.decoder(z)), 2)
        weights.append(prior.log_prob(z) + law.log_prob(x) - guide.log_prob(z))
    return float((torch.logsumexp(torch.cat(weights), 0) - math.log(k)).mean())


@torch.no_grad()
def loop_in_torch(vae: VAE, x: Tensor, k: int) -> float:
    """One datum after the other."""
    values = []
    for datum in x.split(1):
        loc, scale = vae.encoder(datum)
        values.append(torch.logsumexp(_log_weights(vae, datum, loc, scale, k), 0) - math.log(k))
    return float(torch.cat(values).mean())


def _log_weights(vae: VAE, x: Tensor, loc: Tensor, scale: Tensor, count: int) -> Tensor:
    noise = torch.randn(count, *loc.shape)
    z = loc + scale * noise
    logits = vae.decoder(z)
    log_x = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum((-2, -1))
    return log_x - 0.5 * (z.square() - noise.square()).sum(-1) + scale.log().sum(-1)


def get_nll(vae: VAE, x: Tensor, k: int) -> float:
    """pythae's, on the same networks."""
    return float(pythae_vae(vae).get_nll(x[:, None], n_samples=k))


CONTENDERS: dict[str, Callable[[VAE, Tensor, int], float]] = {
    "log_evidence": log_evidence_of_pair,
    "batched torch": batched_torch,
    "batched laws": batched_laws,
    "loop in torch": loop_in_torch,
    "get_nll": get_nll,
}


def measure(name: str, num_data: int, particles: int, mnist: str | None = None) -> dict[str, float]:
    """Seconds, MiB and the value of one contender, in this process."""
    vae, x = vae_and_data(num_data, mnist)
    contender = CONTENDERS[name]
    contender(vae, x[:1], 200)  # imports and warm-up
    before = _forget_peak()
    start = time.perf_counter()
    value = contender(vae, x, particles)
    return {"seconds": time.perf_counter() - start, "mebibytes": _peak() - before, "value": value}


def _forget_peak() -> float:
    """Resets the peak where the system allows it (Linux); MiB held now."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    return _peak()


def _peak() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process_of_its_own(name: str, options: argparse.Namespace) -> dict[str, float]:
    """:func:`measure` in a new interpreter."""
    command = [sys.executable, "-m", "tests.benchmarks.evidence", "--measure", name, "--threads", str(options.threads)]
    command += ["--data", str(options.data), "--particles", str(options.particles)]
    command += ["--mnist", options.mnist] if options.mnist else []
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs the contenders in turn and prints medians of their ratios to log_evidence."""
    parser = argparse.ArgumentParser(description="IWAE-K: data per second and memory")
    parser.add_argument("--data", type=int, default=16)
    parser.add_argument("--particles", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0 leaves its default")
    parser.add_argument("--mnist", metavar="FOLDER", help="use MNIST's test images, which lie there, for random ones")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(measure(options.measure, options.data, options.particles, options.mnist)))
        return
    names = list(CONTENDERS)
    if not is_installed("pythae"):
        names.remove("get_nll")
        print("get_nll is left out: pythae is not installed")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            found[name].append(in_a_process_of_its_own(name, options))
    print(f"IWAE-{options.particles}, {options.data} images, median of {options.rounds} rounds; log_evidence = 1")
    for name in names:
        ours = found["log_evidence"]
        speed = statistics.median(o["seconds"] / r["seconds"] for o, r in zip(ours, found[name], strict=True))
        memory = statistics.median(r["mebibytes"] for r in found[name])
        value = statistics.median(abs(r["value"]) for r in found[name])
        rate = options.data / statistics.median(r["seconds"] for r in found[name])
        cost = f"{rate:8.2f} data per second, x {speed:5.3f}   added memory {memory:6.1f} MiB"
        print(f"  {name:14s} {cost}   |log p| {value:.2f} nats")


if __name__ == "__main__":
    main()
