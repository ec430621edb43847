"""The autoencoder family on digits, and what none of them can do: lecture notes 004, "AE".

Each variant is a Pyro program with the same site z and an observed x; what makes it sparse or contractive is a factor site,
so the bound of each is printed term by term. Then the notes' "key limitation": z drawn at random decodes to nothing, for
an autoencoder has no p(z); a VAE has one, and its decoder was trained to expect it.
"""

import argparse
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor

from inference import decompose_elbo, fit, load_data
from inference.views.drawing import draw_mosaic, mosaic_inches, save_figure, style
from inference.views.images import to_rgb
from ppl_models.autoencoder import AutoEncoder
from ppl_models.corruption import GaussianNoise, Masking, SaltAndPepper
from ppl_models.likelihoods import Normal
from ppl_models.pair import ModelGuidePair
from ppl_models.penalties import L1, ActivityTarget, HutchinsonContraction
from ppl_models.vae import VAE

Pairs = dict[str, ModelGuidePair]


def autoencoders(latent_dim: int, hidden: tuple[int, ...]) -> dict[str, AutoEncoder]:
    """One of each kind, with squared error: N(x; g(z), 0.2^2 I)."""
    parts = {
        "plain": {},
        "denoising": {"corruption": Masking(0.25)},
        "denoising, Gaussian": {"corruption": GaussianNoise(0.3)},
        "denoising, salt": {"corruption": SaltAndPepper(0.25)},
        "sparse, L1": {"penalties": [L1(0.3)]},
        "sparse, target": {"penalties": [ActivityTarget(0.1, weight=10.0)]},
        "k-sparse": {"k": latent_dim // 4},
        "contractive": {"penalties": [HutchinsonContraction(1.0)]},
    }
    return {n: AutoEncoder.preset((8, 8), Normal(scale=0.2), latent_dim, hidden, **p) for n, p in parts.items()}


def decoded(pair: ModelGuidePair, x: Tensor) -> Tensor:
    """E[x | z] at the code of x."""
    with torch.no_grad():
        return pair.likelihood.mean(pair.decoder(pair.encoder(x)), 2)


def table(pairs: dict[str, AutoEncoder], x: Tensor, corrupted: Tensor) -> dict[str, dict[str, float]]:
    """By kind: squared errors on clean and on corrupted x, and what the code is like."""
    rows = {}
    for name, pair in pairs.items():
        with torch.no_grad():
            z = pair.encoder(x)
            jacobian = torch.func.vmap(torch.func.jacrev(pair.encoder))(x)
        rows[name] = {
            "error": float((decoded(pair, x) - x).square().sum((1, 2)).mean()),
            "error on corrupted": float((decoded(pair, corrupted) - x).square().sum((1, 2)).mean()),
            "mean |z|": float(z.abs().mean()),
            "units not 0": float((z != 0).sum(-1).double().mean()),
            "||dz/dx||": float(jacobian.flatten(1).norm(dim=1).mean()),
        }
    return rows


def draw(rows: dict[str, Tensor]) -> Figure:
    """A row of images a name."""
    columns = len(next(iter(rows.values())))
    tiles = to_rgb(torch.cat(list(rows.values())).double().numpy(), (0.0, 1.0))
    with style():
        width, height = mosaic_inches(len(rows), columns, (8, 8))
        figure = Figure(figsize=(width + 2.0, height + 0.5), layout="constrained")
        axes = figure.add_subplot()
        axes.set_yticks(draw_mosaic(axes, tiles, columns).y, list(rows))
        axes.set_title("Autoencoders on held-out digits, and z drawn at random")
    return figure


def main(
    epochs: int = 60, hidden: tuple[int, ...] = (128,), shown: int = 12, out: Path | None = None
) -> dict[str, dict[str, float]]:
    """Trains all kinds and a VAE, prints their terms and a table, and draws reconstructions and random decodings."""
    pyro.set_rng_seed(0)
    digits, latent_dim = load_data("digits", scaling="unit"), 32
    pairs = autoencoders(latent_dim, hidden)
    vae = VAE.preset((8, 8), Normal(scale=0.2), latent_dim, hidden)
    for pair in (*pairs.values(), vae):
        fit(pair, digits, epochs=epochs, learning_rate=2e-3, schedule="cosine", progress=False)

    x = digits.test
    print("notes 004: x is -L_AE = -squared error / (2 sigma²) and a constant, z nothing, each penalty minus its value")
    for name, pair in pairs.items():
        d = decompose_elbo(pair.model, pair.guide, x, num_particles=1)
        print(f"{name:20} " + "   ".join(f"{site} {float(d[site].value.mean()):9.3f}" for site in d.sites))
    corrupted = Masking(0.25)(x)
    rows = table(pairs, x, corrupted)
    print(f"\n{'':20} " + "  ".join(next(iter(rows.values()))))
    for name, row in rows.items():
        print(f"{name:20} " + "  ".join(f"{value:{len(key)}.3f}" for key, value in row.items()))
    if out is not None:
        z = torch.randn(shown, latent_dim)
        seen, masked = x[:shown], corrupted[:shown]
        pictures = {"x": seen} | {name: decoded(pair, seen) for name, pair in pairs.items()}
        pictures |= {"x masked": masked}
        pictures |= {f"{name}, of masked": decoded(pairs[name], masked) for name in ("plain", "denoising")}
        with torch.no_grad():
            pictures |= {"plain, z ~ N(0, I)": pairs["plain"].decoder(z), "VAE, z ~ N(0, I)": vae.decoder(z)}
        print(f"wrote {save_figure(draw(pictures), out, overwrite=True)}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=None, help="picture (.png, .svg, .pdf)")
    main(**vars(parser.parse_args()))
