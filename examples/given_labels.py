"""Digits given what they are: a VAE and a DDPM of x | y, samples by label, and a classifier by Bayes' rule.

Both programs of a pair may be conditioned on a label y, p(x, z | y) and q(z | x, y): the chain of lecture notes 004, once
for each y. With log p(x | y) to be had at any label,

    p(y | x) = p(x | y) / sum_k p(x | k),      I(x; y) >= log K + mean log p(y | x)

for labels that are equally likely (Barber and Agakov 2003): a classifier that was never trained to tell digits apart.
"""

import argparse
import math
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure

from inference import ancestral_sample, fit, load_data, log_evidence
from inference.views.drawing import draw_mosaic
from inference.views.figures import save_figure
from inference.views.images import to_rgb
from ppl_models import DDPM, VAE
from ppl_models.likelihoods import DiscretizedNormal

K = 10
ROWS = 6


def main(
    epochs: int = 200, ddpm_epochs: int = 150, num_particles: int = 500, num_test: int = 297, out: Path | None = None
) -> dict[str, float]:
    """Trains both, classifies held-out digits with the VAE, and draws both systems' samples, a column a label."""
    digits = load_data("digits", scaling="symmetric")  # labels come with them
    pyro.set_rng_seed(0)
    vae = VAE.preset((8, 8), DiscretizedNormal(levels=17), latent_dim=16, num_labels=K)
    told = {"learning_rate": 2e-3, "schedule": "cosine", "validation_fraction": 0.1}  # a tenth chooses the epoch
    fit(vae, digits, epochs=epochs, patience=epochs, **told)
    ddpm = DDPM.preset((8, 8), DiscretizedNormal(levels=17), num_labels=K)
    fit(ddpm, digits, epochs=ddpm_epochs, patience=ddpm_epochs, ema=0.995, **told)

    x, y = digits.test[:num_test], digits.test_labels[:num_test]
    estimates = [log_evidence(at.model, at.guide, x, num_particles=num_particles) for at in map(vae.given, range(K))]
    log_p = torch.stack([e.log_evidence for e in estimates], -1)  # log p(x | y), [N, K] nats
    own = log_p.gather(-1, y[:, None])[:, 0]
    log_marginal = log_p.logsumexp(-1) - math.log(K)
    information = own - log_marginal
    accuracy = float((log_p.argmax(-1) == y).double().mean())
    error = float(information.std()) / math.sqrt(len(y))
    print(f"mean log p(x | y) = {float(own.mean()):.2f} nats, mean log p(x) = {float(log_marginal.mean()):.2f} nats")
    print(f"I(x; y) >= {float(information.mean()):.3f} +- {error:.3f} nats of log {K} = {math.log(K):.3f}")
    print(f"most probable label is the digit's own: {accuracy:.1%} of {len(y)} held-out digits")

    panels = {
        "a VAE's means E[x | z, y]": _means(vae),
        "a DDPM's samples of x | y": ancestral_sample(ddpm.given(list(range(K)) * ROWS), K * ROWS, seed=0),
    }
    figure = Figure(figsize=(10.0, 3.4), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        mosaic = draw_mosaic(axes, to_rgb(images.numpy(), (-1.0, 1.0)), K)
        axes.set_xticks(mosaic.x[:K], [f"y = {k}" if k == 0 else str(k) for k in range(K)])
        axes.set_title(title)
    path = out or Path("given_labels.png")
    save_figure(figure, path, overwrite=True)
    print(f"wrote {path}")
    return {"accuracy": accuracy, "information": float(information.mean()), "log_p_given": float(own.mean())}


def _means(vae: VAE) -> torch.Tensor:
    """E[x | z, y] for a z of its own in each row, which its labels share."""
    torch.manual_seed(0)
    z = torch.randn(ROWS, 1, vae.latent_dim).expand(ROWS, K, -1).reshape(ROWS * K, -1)
    with torch.no_grad():
        return vae.likelihood(vae.given(list(range(K)) * ROWS).decoder(z), 2).mean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200, help="of the VAE")
    parser.add_argument("--ddpm-epochs", type=int, default=150)
    parser.add_argument("--num-particles", type=int, default=500)
    parser.add_argument("--num-test", type=int, default=297)
    parser.add_argument("--out", type=Path, default=None, help="a picture; given_labels.png by default")
    main(**vars(parser.parse_args()))
