"""ELBO <= IWAE-K <= log p(x) <= reverse AIS, and AIS <= log p(x), each with its error: lecture notes 000, 004.

"What is its log-likelihood?" has one exact answer for a linear-Gaussian pair, so every estimate can be seen to bound it.
The data are simulated from the model, which is what gives reverse annealing its upper bound. Then the gap log p(x) - ELBO
is split into what the guide's family cannot do and what its amortisation loses.
"""

import argparse
from pathlib import Path

import torch

from inference import evidence_ladder, inference_gap
from inference.views.figures import save_figure
from inference.views.ladder import draw_ladder, ladder_picture
from ppl_models import LinearGaussian


def main(num_data: int = 50, num_temperatures: int = 50, steps: int = 300, out: Path | None = None) -> dict[str, float]:
    """Prints the ladder and the gap; draws the ladder into ``out`` if given."""
    torch.set_default_dtype(torch.float64)
    pair = LinearGaussian.random(data_dim=8, latent_dim=6, noise_scale=1.0, guide="mean_field")
    ladder = evidence_ladder(
        pair, num_data=num_data, num_particles=[10, 100, 1000], num_temperatures=num_temperatures, seed=0
    )
    print(ladder.table(), "\n")
    torch.manual_seed(0)
    with torch.no_grad():
        x = pair.model(size=num_data)
    gap = inference_gap(pair, x, pair.log_evidence(x).detach(), steps=steps)
    print("notes 004, 'inference error': log p(x) - ELBO = KL(q(z|x) || p(z|x))")
    print(gap.table())
    if out is not None:
        print(f"wrote {save_figure(draw_ladder(ladder_picture(ladder)), out, overwrite=True)}")
    return {rung.name: rung.mean for rung in ladder.rungs} | {"holds": float(ladder.check().holds)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-data", type=int, default=50)
    parser.add_argument("--num-temperatures", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=None, help="picture of the ladder (.png, .svg, .pdf)")
    main(**vars(parser.parse_args()))
