"""A hierarchical VAE on real digits, generating coarse to fine: lecture notes 004, Observation 2.

"Stacking layers allows the model to generate data progressively, starting with coarse details and adding finer ones at
each step." Three layers with the notes' bottom-up guide; the bound and the active units by layer on held-out images; then
samples with the upper layers held and the lower ones redrawn, and how much of the variance each layer settles: of the
coarse part, along the leading principal components, and of the fine rest.
"""

import argparse
from pathlib import Path

import pyro

from inference import active_units, decompose_elbo, fit, load_data
from inference.views.figures import save_figure
from inference.views.progressive import draw_progressive, progressive
from ppl_models.hvae import HVAE
from ppl_models.likelihoods import DiscretizedNormal


def main(
    epochs: int = 150, num_particles: int = 200, num_chains: int = 200, out: Path | None = None
) -> dict[str, float]:
    """Trains, prints rates and active units by layer and what each layer settles; draws the redraws into ``out``."""
    pyro.set_rng_seed(0)
    digits = load_data("digits", scaling="symmetric")  # 8x8 images of 17 grey levels on the grid in [-1, 1]
    hidden = ((128, 128), (64,), (64,))  # by layer, from the data up
    pair = HVAE.preset(digits.data_shape, DiscretizedNormal(levels=17), latent_dims=(24, 12, 6), hidden=hidden)
    # The rate's weight rises from 0 to 1: without, the upper layers are switched off before they learn anything.
    fit(pair, digits, epochs=epochs, learning_rate=2e-3, schedule="cosine", kl_warmup_epochs=epochs / 2)

    d = decompose_elbo(pair.model, pair.guide, digits.test, num_particles=num_particles)
    print(d.table(), "\n")
    print(active_units(pair, digits.test).words(), "\n")

    shown = progressive(pair, num_redraws=12, num_chains=num_chains)
    print("variance of E[x | z] that is left to chance, by the sites that are held:")
    print(shown.table())
    if out is not None:
        print(f"wrote {save_figure(draw_progressive(shown, value_range=(-1, 1)), out, overwrite=True)}")
    return {
        "elbo": float(d.elbo.mean()),
        "coarse_settled_by_top": float(shown.coarse_settled[1]),
        "fine_settled_by_top": float(shown.fine_settled[1]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--num-particles", type=int, default=200)
    parser.add_argument("--num-chains", type=int, default=200)
    parser.add_argument("--out", type=Path, default=None, help="picture of the redraws (.png, .svg, .pdf)")
    main(**vars(parser.parse_args()))
