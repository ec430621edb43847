"""A Gaussian VAE on real digits, from data to posterior: lecture notes 004, "Gaussian VAE".

Encoder and decoder are your own modules; the pair makes them Pyro programs. SVI with progress, then the bound term by
term on held-out images, then the posterior in ArviZ.
"""

import argparse
import tempfile
from pathlib import Path

import pyro
from torch import Tensor, nn

from inference import decompose_elbo, fit, load_data, save_posterior, to_datatree
from inference.posterior import summary
from ppl_models import VAE
from ppl_models.likelihoods import DiscretizedNormal


class Encoder(nn.Module):
    """x -> (mu_phi(x), sigma_phi(x))."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.SiLU())
        self.loc, self.log_scale = nn.Linear(128, latent_dim), nn.Linear(128, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Any leading dims are batch dims."""
        hidden = self.body(x.flatten(-2))
        return self.loc(hidden), self.log_scale(hidden).exp()


def main(epochs: int = 60, num_particles: int = 500, out: Path | None = None) -> dict[str, float]:
    """Trains, prints the terms of the held-out bound, and saves the posterior of ten images."""
    pyro.set_rng_seed(0)
    digits = load_data("digits", scaling="symmetric")  # 8x8 images of 17 grey levels on the grid in [-1, 1]
    decoder = nn.Sequential(nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 64), nn.Unflatten(-1, (8, 8)))
    pair = VAE(Encoder(latent_dim=16), decoder, latent_dim=16, likelihood=DiscretizedNormal(levels=17))
    run = fit(pair, digits, epochs=epochs, learning_rate=2e-3, schedule="cosine")

    d = decompose_elbo(pair.model, pair.guide, digits.test, num_particles=num_particles)
    print(d.table())

    tree = to_datatree(pair, digits.test[:10], num_samples=500, dims={"z": ["unit"], "x": ["row", "column"]})
    path = (out or Path(tempfile.mkdtemp())) / "posterior.nc"
    save_posterior(tree, path)
    print(f"\nposterior of the first image (of ten, saved as {path.name}):")
    print(summary(tree, coords={"data": [0]}).head(5))
    return {"elbo": float(d.elbo.mean()), "std_error": d.mean_std_error, "trained": run.metrics[-1]["validation_elbo"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--num-particles", type=int, default=500)
    parser.add_argument("--out", type=Path, default=None, help="folder for posterior.nc; a temporary one by default")
    main(**vars(parser.parse_args()))
