"""Digits that sort themselves: a VAE whose prior is a mixture, and whose class y nobody tells it.

    p(y) = 1/K      p(z | y) = N(z; m_y, diag(s_y^2))      p(x | z) = DiscretizedNormal(decoder(z))
    q(z | x) = N(z; mu(x), diag(sigma(x)^2))      q(y | z) = p(z | y) / sum_k p(z | k), the model's own posterior

A chain y -> z -> x as in lecture notes 004, of a discrete and a continuous latent. `objective="enumeration"` draws z and sums
over y,

    ELBO(x) = E_{q(z | x)}[log p(x | z) - log q(z | x) + sum_y q(y | z) (log p(z | y) + log p(y) - log q(y | z))]

so that y is learned without a gradient through a draw of it; the sum is log p(z) of the mixture, as q(y | z) is exact.
With K = 1 this is the plain VAE. After Jiang et al. 2017 (arXiv:1611.05148), without their pretraining.
"""

import argparse
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from inference import decompose_elbo, fit, load_data, log_evidence
from inference.views.drawing import draw_mosaic
from inference.views.figures import save_figure
from inference.views.images import to_rgb
from ppl_models import ModelGuidePair
from ppl_models.likelihoods import DiscretizedNormal
from ppl_models.networks import MLP, Decoder

ROWS = 5


class MixtureVAE(ModelGuidePair):
    """p(y) p(z | y) p(x | z) with q(z | x) q(y | z), for 8x8 images of 17 grey levels."""

    def __init__(self, num_classes: int, latent_dim: int = 16, hidden: int = 200) -> None:
        super().__init__((8, 8), latent_sites=("y", "z"))
        self.likelihood = DiscretizedNormal(levels=17)
        self.encoder = MLP([64, hidden, hidden, 2 * latent_dim])
        self.decoder = Decoder(latent_dim, [8, 8], [hidden, hidden], "tanh", self.likelihood.needs_scale)
        self.loc = nn.Parameter(torch.randn(num_classes, latent_dim))  # m
        self.log_scale = nn.Parameter(torch.zeros(num_classes, latent_dim))  # log s

    def q_z(self, x: Tensor) -> dist.Distribution:
        """q(z | x) of x ``[B, 8, 8]``."""
        loc, log_scale = self.encoder(x.flatten(-2)).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def q_y(self, z: Tensor) -> dist.Distribution:
        """q(y | z) of z ``[..., d]``, over one-hot y ``[..., K]``."""
        components = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        return dist.OneHotCategorical(logits=components.log_prob(z[..., None, :]))

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """While y is summed over it is ``[K, 1, K]``, and z given y ``[K, B, d]``: @ takes leading dims as they come."""
        with pyro.plate("data", self.batch_size(x, size)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones_like(self.loc[:, 0])))
            z = pyro.sample("z", dist.Normal(y @ self.loc, (y @ self.log_scale).exp()).to_event(1))
            return pyro.sample("x", self.likelihood(self.decoder(z), 2), obs=x)

    def guide(self, x: Tensor) -> None:
        """z first, y after it: the order of a guide need not be the model's."""
        with pyro.plate("data", self.batch_size(x)):
            z = pyro.sample("z", self.q_z(x))
            pyro.sample("y", self.q_y(z))


def main(
    epochs: int = 300, num_classes: int = 30, num_particles: int = 500, out: Path | None = None
) -> dict[str, float]:
    """Trains the mixture and the plain VAE (K = 1); asks what the mixture gains, and how far its classes are digits."""
    digits = load_data("digits", scaling="symmetric")
    log_p = {}
    for k in (1, num_classes):
        pyro.set_rng_seed(0)
        pair = MixtureVAE(k)
        told = {"learning_rate": 2e-3, "schedule": "cosine", "validation_fraction": 0.1, "patience": epochs}
        fit(pair, digits, objective="enumeration", epochs=epochs, **told)
        print(decompose_elbo(pair.model, pair.guide, digits.test, num_particles=num_particles).table())
        e = log_evidence(pair.model, pair.guide, digits.test, num_particles=num_particles)
        log_p[k] = e.log_evidence
        print(f"K = {k}: log p(x) >= {float(log_p[k].mean()):.2f} nats\n")
    gain = log_p[num_classes] - log_p[1]
    error = float(gain.std()) / math.sqrt(len(gain))
    print(
        f"the mixture's bound on log p(x) is higher by {float(gain.mean()):.2f} +- {error:.2f} nats, over held-out digits"
    )

    with torch.no_grad():
        of_train, of_test = (pair.q_y(pair.q_z(x).mean).probs.argmax(-1) for x in (digits.train, digits.test))
    counts = torch.zeros(num_classes, 10).index_put_((of_train, digits.train_labels), torch.ones(()), accumulate=True)
    digit = counts.argmax(-1)  # of each class, the commonest label; only here are labels looked at
    accuracy = float((digit[of_test] == digits.test_labels).double().mean())
    print(
        f"{int((counts.sum(-1) > 0).sum())} of {num_classes} classes are used; the commonest digit of its class is right for"
    )
    print(f"{accuracy:.1%} of {len(of_test)} held-out digits, 10% by chance")
    path = out or Path("mixture_vae.png")
    save_figure(_picture(pair, counts), path, overwrite=True)
    print(f"wrote {path}")
    return {"accuracy": accuracy, "gain": float(gain.mean()), "log_p": float(log_p[num_classes].mean())}


def _picture(pair: MixtureVAE, counts: Tensor) -> Figure:
    """A column a class that is used, by its commonest digit; ``counts`` ``[K, 10]`` are of training digits."""
    used = [y for y in range(len(counts)) if counts[y].sum() > 0]
    order = sorted(used, key=lambda y: (int(counts[y].argmax()), -float(counts[y].max())))
    noise = torch.randn(ROWS, len(order), pair.loc.shape[1])
    noise[0] = 0
    with torch.no_grad():
        z = pair.loc[order] + pair.log_scale[order].exp() * noise
        means = pair.likelihood(pair.decoder(z.flatten(0, 1)), 2).mean
    figure = Figure(figsize=(10.0, 2.5), layout="constrained")
    axes = figure.subplots()
    mosaic = draw_mosaic(axes, to_rgb(means.numpy(), (-1.0, 1.0)), len(order))
    axes.set_xticks(mosaic.x[: len(order)], [str(int(counts[y].argmax())) for y in order])
    axes.set_xlabel("commonest label of a class among the training digits, which no class was told")
    axes.set_title("E[x | z], a column a class y: at z = m_y above, at draws of p(z | y) below")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--num-classes", type=int, default=30)
    parser.add_argument("--out", type=Path, default=None, help="a picture; mixture_vae.png by default")
    main(**vars(parser.parse_args()))
