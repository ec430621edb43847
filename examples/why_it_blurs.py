"""Why a VAE blurs: the optimal Gaussian decoder is a conditional mean. Lecture notes 004, "Drawbacks of Standard VAE".

With the encoder q(z | x) fixed, the reconstruction term of N(x; mu(z), sigma^2 I) is largest at

    mu*(z) = E_q[x | z] = E_data[q(z | x) x] / E_data[q(z | x)],      q(x | z) = q(z | x) p_data(x) / q(z)

with q(z) = E_data[q(z | x)] (the notes print the prior p(z) in its place; the last form there is the right one). Where two
images share z, mu*(z) is a mixture of both. For data that are a list of images every number is exact, and a decoder
trained through the VAE's bound must come out at mu*: its excess error is E_q||mu(z) - mu*(z)||^2. A sharp decoder, which
answers z with a single image, must have a larger error by just that term.
"""

import argparse
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from inference import fit, load_data
from inference.views.drawing import draw_mosaic, mosaic_inches, save_figure, style
from inference.views.images import to_rgb
from ppl_models import VAE
from ppl_models.likelihoods import Normal
from ppl_models.networks import Decoder


class FixedEncoder(nn.Module):
    """q(z | x) = N(z; whitened first principal components of x, s^2 I): nothing in it is trained."""

    mean: Tensor
    axes: Tensor

    def __init__(self, x: Tensor, latent_dim: int, scale: float) -> None:
        super().__init__()
        flat = x.flatten(1)
        _, singular, axes = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("axes", axes[:latent_dim].T / singular[:latent_dim] * len(x) ** 0.5)
        self.scale = scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Any leading dims are batch dims."""
        loc = (x.flatten(-2) - self.mean) @ self.axes
        return loc, torch.full_like(loc, self.scale)


def conditional_mean(z: Tensor, loc: Tensor, scale: float, x: Tensor) -> Tensor:
    """mu*(z) = sum_n w_n(z) x_n, w_n proportional to q(z | x_n) = N(z; loc_n, scale^2 I), exactly: ``[*z batch, *data]``."""
    weights = (-torch.cdist(z, loc).square() / (2 * scale**2)).softmax(-1)
    return (weights @ x.flatten(1)).unflatten(-1, x.shape[1:])


def nearest(z: Tensor, loc: Tensor, x: Tensor) -> Tensor:
    """A sharp decoder: the one image whose code is nearest to z."""
    return x[torch.cdist(z, loc).argmin(-1)]


def errors(decode: dict[str, Tensor], best: Tensor, x: Tensor) -> dict[str, tuple[float, float]]:
    """By decoder: E||x - mu(z)||^2, and its excess E||mu(z) - mu*(z)||^2."""
    square = {name: (x - mean).flatten(1).square().sum(1).mean() for name, mean in decode.items()}
    excess = {name: (mean - best).flatten(1).square().sum(1).mean() for name, mean in decode.items()}
    return {name: (float(square[name]), float(excess[name])) for name in decode}


def draw(rows: dict[str, list[Tensor]], scales: list[float]) -> Figure:
    """One row of images a decoder, one block of columns a noise scale of the encoder, with a blank between blocks."""
    each = len(next(iter(rows.values()))[0])
    blank = torch.ones(1, *next(iter(rows.values()))[0].shape[1:])
    tiles = torch.cat([torch.cat([block, blank]) for blocks in rows.values() for block in blocks])
    columns = len(scales) * (each + 1)
    with style():
        width, height = mosaic_inches(len(rows), columns, tiles.shape[1:])
        figure = Figure(figsize=(width + 1.4, height + 1.0), layout="constrained")
        axes = figure.add_subplot()
        mosaic = draw_mosaic(axes, to_rgb(tiles.double().numpy(), (0.0, 1.0)), columns)
        axes.set_yticks(mosaic.y, list(rows))
        middles = [(mosaic.x[i] + mosaic.x[i + each - 1]) / 2 for i in range(0, columns, each + 1)]
        axes.set_xticks(middles, [f"s = {scale:g}" for scale in scales])
        axes.set_title("What z ~ q(z | x) = N(f(x), s² I) tells of x: more overlap, more blur")
    return figure


def main(num_data: int = 300, epochs: int = 200, out: Path | None = None) -> dict[str, float]:
    """Trains a decoder for each noise scale, prints its error beside the exact one, and draws all of them."""
    pyro.set_rng_seed(0)
    digits, latent_dim, scales = load_data("digits", scaling="unit"), 3, [0.3, 0.6, 1.5]
    x = digits.train[:num_data]
    seen = torch.stack([(digits.train_labels[:num_data] == c).nonzero()[0, 0] for c in range(5)])  # a zero, a one, ...
    rows: dict[str, list[Tensor]] = {"x": [], "nearest image": [], "trained decoder": [], "E[x | z], exact": []}
    numbers: dict[str, float] = {}
    print("E||x - mu(z)||² = E||x - mu*(z)||² + E||mu(z) - mu*(z)||²        (notes 004: mu*(z) = E_q[x | z])")
    for scale in scales:
        encoder = FixedEncoder(x, latent_dim, scale)
        pair = VAE(encoder, Decoder(latent_dim, (8, 8), (128, 128), "silu"), latent_dim, Normal(scale=0.2))
        options = {"learning_rate": 3e-3, "schedule": "cosine", "num_particles": 8, "batch_size": 100}
        fit(pair, x, scaling="unit", epochs=epochs, progress=False, **options)
        with torch.no_grad():
            loc, _ = encoder(x)
            z = (loc + scale * torch.randn(20, *loc.shape)).flatten(0, 1)  # 20 draws an image
            best = conditional_mean(z, loc, scale, x)
            means = {"trained decoder": pair.decoder(z), "nearest image": nearest(z, loc, x), "E[x | z], exact": best}
        for name, (square, excess) in errors(means, best, x.repeat(20, 1, 1)).items():
            print(f"s = {scale:<4g} {name:<16} {square:8.4f}  of which excess {excess:8.4f}")
            numbers[f"{name} {scale:g}"], numbers[f"{name} {scale:g} excess"] = square, excess
        for name, values in {"x": x, **means}.items():
            rows[name].append(values[seen])
    if out is not None:
        print(f"wrote {save_figure(draw(rows, scales), out, overwrite=True)}")
    return numbers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-data", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=None, help="picture (.png, .svg, .pdf)")
    main(**vars(parser.parse_args()))
