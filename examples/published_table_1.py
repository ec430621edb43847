"""Table 1 of Burda, Grosse and Salakhutdinov 2016 (arXiv:1509.00519), with this library's own `fit` and `log_evidence`.

VAE and IWAE on dynamically binarised MNIST, one and two stochastic layers, k = 1, 5, 50: minus L_5000 on the test images,
with its error, and active units, beside the paper's. One resumable script: rows run in order of cost, each in a RUN folder
of its own; a row that is there already is not run again.

Their protocol, and ours: the same nets and initialisation, tanh, Bernoulli pixels, output bias from the train mean. They
train 3280 epochs in eight stages of falling rate, batch 20, Adam with epsilon 1e-4; here ``--epochs`` passes at batch 100
with a rate that falls to zero as a cosine, and Adam's usual epsilon. The test images are binarised once, with a fixed seed.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from inference import DataSet, Run, active_units, fit, load_data, load_run, log_evidence
from inference.views.tables import text_table
from ppl_models import HVAE, VAE, ModelGuidePair
from ppl_models.likelihoods import Bernoulli

# (layers, k) -> nats: the paper's L_5000 of VAE and of IWAE (k = 1 is both)
PUBLISHED = {
    (1, 1): (86.76, 86.76),
    (2, 1): (85.33, 85.33),
    (1, 5): (86.47, 85.54),
    (2, 5): (85.01, 83.89),
    (1, 50): (86.35, 84.78),
    (2, 50): (84.78, 82.90),
}


def build(layers: int, mean: torch.Tensor) -> ModelGuidePair:
    """784-200-200-(50), or 784-200-200-(100)-100-100-(50); output bias such that the first guess is the train mean."""
    torch.manual_seed(0)
    pair = HVAE.burda() if layers == 2 else VAE.preset((28, 28), Bernoulli(), latent_dim=50, hidden=(200, 200))
    for module in pair.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    decoder = pair.decoders[0] if isinstance(pair, HVAE) else pair.decoder
    last = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.bias.copy_(torch.logit(mean.flatten().clamp(0.001, 0.999)))
    return pair


def train(folder: Path, layers: int, k: int, iwae: bool, data: DataSet, options: dict[str, Any]) -> Run:
    """The row's run: loaded if it has ended, resumed if it was cut, begun otherwise."""
    if (folder / "model" / "config.json").is_file():
        return load_run(folder)
    options = {"objective": "iwae" if iwae else "elbo", "num_particles": k, **options}
    pair = build(layers, data.train.mean(0))
    return fit(pair, data, folder, resume=(folder / "config.yaml").exists(), **options)


def main(
    mnist: str,
    out: Path,
    epochs: int = 200,
    learning_rate: float = 2e-3,
    rows: int = 2,
    num_test: int = 10_000,
    num_particles: int = 5000,
    seed: int = 0,
) -> list[list[str]]:
    """Runs the first ``rows`` rows and prints the table."""
    data = load_data(mnist, scaling="unit", binarization="dynamic")
    plan = [(layers, k, iwae) for layers, k in PUBLISHED for iwae in ((False, True) if k > 1 else (False,))]
    options = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": 100, "schedule": "cosine", "seed": seed}
    table = []
    for layers, k, iwae in plan[:rows]:
        name = f"{'iwae' if iwae else 'vae'}-{layers}-{k}"
        run = train(out / name, layers, k, iwae, data, options)
        nats, squares = 0.0, 0.0
        for x in data.test[:num_test].split(100):
            e = log_evidence(run.pair.model, run.pair.guide, x, num_particles=num_particles)
            nats, squares = nats - float(e.log_evidence.sum()), squares + float(e.std_error.square().sum())
        units = active_units(run.pair, data.test[:num_test])
        published = PUBLISHED[layers, k][iwae]
        active = " + ".join(str(site.count) for site in reversed(units.sites.values()))
        error = squares**0.5 / num_test
        table.append([name, f"{nats / num_test:.2f} +- {error:.3f}", active, f"{published:.2f}", str(len(run.metrics))])
        header = ["row", f"-L_{num_particles}, nats", "active units", "published", "epochs"]
        print(text_table(header, table), flush=True)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mnist", help="mnist:FOLDER with the four idx files")
    parser.add_argument("--out", type=Path, default=Path("runs/table-1"))
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at the start; it falls to zero as a cosine")
    parser.add_argument("--rows", type=int, default=2, help="of 10, in order of cost: the first two are k = 1")
    parser.add_argument("--num-test", type=int, default=10_000)
    parser.add_argument("--num-particles", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
