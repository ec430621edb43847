"""Terms of diffusions whose reverse law is the user's own: drawn where no KL is known, and never the KL of a base class.

The oracle is quadrature in numpy and scipy: one dimension, T = 2, L_1 = E_{q(x_2 | x_0)} int q(x_1 | x_2, x_0) log q/p dx_1.
z-tests hold at most 6 standard errors of 4000 draws: below 1e-6 for each of the few numbers.
"""

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn

from inference import DiffusionLoss, decompose_diffusion, decompose_elbo, decompose_forward
from inference.bounds.seeded_draws import widened
from ppl_models import DDPM, NoiseSchedule
from ppl_models.likelihoods import Normal

BETAS = (0.3, 0.6)
Z_MAX = 6.0


class Shifted(nn.Module):
    """eps_theta(x_t, t) = 0.4 x_t + 0.1."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4))

    def forward(self, x_t, t):
        return self.slope * x_t + 0.1


class HeavyTailed(DDPM):
    """A reverse step with Student's t."""

    def reverse_law(self, output, x_t, t):
        return dist.StudentT(4.0, self.mean(output, x_t, t), 0.7).to_event(1)


class Narrowed(dist.Normal):
    """A Normal whose density is not Normal's: that of a quarter of the scale, which torch's table of KLs knows nothing of."""

    def log_prob(self, value):
        return dist.Normal(self.loc, 0.25 * self.scale).log_prob(value)


class Narrow(DDPM):
    def reverse_law(self, output, x_t, t):
        return Narrowed(self.mean(output, x_t, t), torch.full_like(x_t, 1.4)).to_event(1)


LAWS = {
    HeavyTailed: lambda x, mean: scipy.stats.t(4.0, mean, 0.7).logpdf(x),
    Narrow: lambda x, mean: scipy.stats.norm(mean, 0.35).logpdf(x),
}


def make(kind):
    schedule = NoiseSchedule.from_betas(BETAS)
    return kind(Shifted(), schedule, data_shape=(1,), variance="beta", likelihood=Normal())


def first_term(kind, x_0):
    """L_1 by quadrature on a grid of x_2 and x_1."""
    beta_1, beta_2 = BETAS
    alpha_bar = (1 - beta_1) * (1 - beta_2)
    q_2 = scipy.stats.norm(np.sqrt(alpha_bar) * x_0, np.sqrt(1 - alpha_bar))
    x_2 = q_2.mean() + q_2.std() * np.linspace(-8, 8, 401)
    mean = (np.sqrt(1 - beta_1) * beta_2 * x_0 + np.sqrt(1 - beta_2) * beta_1 * x_2) / (1 - alpha_bar)
    std = np.sqrt(beta_1 * beta_2 / (1 - alpha_bar))
    x_1 = mean[:, None] + std * np.linspace(-8, 8, 401)
    eps = 0.4 * x_2 + 0.1
    p_mean = (x_2 - beta_2 / np.sqrt(1 - alpha_bar) * eps) / np.sqrt(1 - beta_2)
    log_q = scipy.stats.norm(mean[:, None], std).logpdf(x_1)
    inner = np.trapezoid(np.exp(log_q) * (log_q - LAWS[kind](x_1, p_mean[:, None])), x_1, axis=1)
    return float(np.trapezoid(q_2.pdf(x_2) * inner, x_2))


@pytest.mark.parametrize("kind", LAWS)
def test_a_law_without_a_known_divergence_is_drawn(kind):
    pair, x = make(kind), torch.tensor([[-0.7], [1.2]])
    d = decompose_diffusion(pair, x, num_particles=4000, seed=0)
    term = d["x_1"]
    exact = torch.tensor([first_term(kind, v) for v in (-0.7, 1.2)])
    assert term.analytic is None
    assert "no closed form is known for KL(Normal || " in term.reason
    assert (term.value + exact).abs().div(term.value_std_error).max() < Z_MAX
    assert "drawn: no closed form" in d.table()
    other = [decompose_elbo(pair.model, pair.posterior_guide, x, num_particles=4000), decompose_forward(pair, x, 4000)]
    for e in other:
        assert ((d.elbo - e.elbo).abs() / torch.hypot(d.std_error, e.std_error)).max() < Z_MAX


def test_the_divergence_of_the_base_class_would_be_seen():
    """The twin: KL(q || Normal of the whole scale), which a lookup by base class finds, is far from the term."""
    pair, x = make(Narrow), torch.tensor([[-0.7], [1.2]])
    d = decompose_diffusion(pair, x, num_particles=4000, seed=0)
    x_2 = pair.process.sample_marginal(x.expand(4000, 2, 1), torch.tensor(2))
    step = torch.tensor(2)
    p = pair.reverse_law(pair.denoise(x_2, step), x_2, step)
    wrong = torch.distributions.kl_divergence(pair.process.posterior(x_2, x, step), p).mean(0)
    assert ((d["x_1"].value + wrong).abs() / d["x_1"].value_std_error).min() > 3 * Z_MAX


def test_training_on_it_says_what_to_override():
    with pytest.raises(TypeError, match=r"closed form of KL\(Normal \|\| p\), got StudentT: override step_divergence"):
        DiffusionLoss(make(HeavyTailed))(torch.zeros(3, 1))


def test_widened_laws_keep_their_density_in_float64():
    torch.manual_seed(0)
    loc = torch.randn(3, 2, dtype=torch.float32)
    mixing = dist.Categorical(logits=torch.randn(3, 2, dtype=torch.float32))
    squash = [dist.transforms.AffineTransform(loc[:, 0], torch.tensor(2.0, dtype=torch.float32))]
    for law in (
        dist.StudentT(torch.tensor(4.0, dtype=torch.float32), loc, 0.7).to_event(1),
        dist.MixtureSameFamily(mixing, dist.Normal(loc, 1.0)),
        dist.TransformedDistribution(dist.Laplace(loc[:, 0], torch.ones_like(loc[:, 0])), squash),
        Narrowed(loc, torch.ones_like(loc)).to_event(1),
    ):
        x = law.sample()
        wide = widened(law).log_prob(x.double())
        assert wide.dtype == torch.float64
        torch.testing.assert_close(wide, law.log_prob(x).double(), rtol=1e-5, atol=1e-5)
        assert law.log_prob(x).dtype == torch.float32  # the law itself is left as it was
