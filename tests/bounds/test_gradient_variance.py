"""The gradient-variance report against a loss whose gradient's law is known, and between a VAE's losses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference.bounds.gradient_variance import gradient_variance
from inference.training.importance_objective import ImportanceWeightedLoss
from inference.training.objectives import ElboLoss
from ppl_models import VAE, ModelGuidePair
from ppl_models.likelihoods import Normal

BLOCKS = ("block",)


class KnownNoise(nn.Module):
    """Gradient of the batch mean: 2 + s e_i / sqrt(B) over ``encoder`` (3 parameters), exactly -1 over ``decoder``."""

    def __init__(self, pair: nn.ModuleDict, scale: float) -> None:
        super().__init__()
        self.pair = pair
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        noisy = (2.0 + self.scale * torch.randn(len(x), 3)) @ self.pair["encoder"].weight[0]
        return noisy - self.pair["decoder"].weight.sum()


def parts() -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": nn.Linear(3, 1, bias=False), "decoder": nn.Linear(2, 1, bias=False)})


def test_variance_and_signal_of_a_known_gradient():
    pair, x, pairs = parts(), torch.zeros(4), 2000
    report = gradient_variance({"once": KnownNoise(pair, 1.0), "twice": KnownNoise(pair, 2.0)}, x, pairs, BLOCKS)
    assert report.blocks == ("encoder", "decoder")
    for name, scale in (("once", 1.0), ("twice", 2.0)):
        found = report[name]["encoder"]
        exact = 3 * scale**2 / 4  # three parameters, four data
        assert abs(found.variance - exact) < 5.5 * found.variance_std_error
        assert math.isclose(found.variance_std_error, exact * math.sqrt(2 / 3 / pairs), rel_tol=0.2)
        assert abs(found.signal - 12.0) < 5.5 * found.signal_std_error
        quiet = report[name]["decoder"]
        assert (quiet.variance, quiet.signal, quiet.snr) == (0.0, 2.0, math.inf)
        assert quiet.num_parameters == 2
    once, twice = report["once"]["encoder"], report["twice"]["encoder"]
    assert twice.variance - once.variance > 10 * twice.variance_std_error, "the twin: another scale is seen"
    assert math.isclose(once.snr, math.sqrt(12 / (3 / 4)), rel_tol=0.1)


def test_a_vaes_losses_side_by_side():
    vae = VAE.preset((6,), Normal(scale=0.5), latent_dim=2, hidden=(8,))
    x = vae.model(size=8).detach()
    losses = {
        "closed form": ElboLoss(vae),
        "drawn": ElboLoss(vae, closed_form=False),
        "iwae": ImportanceWeightedLoss(vae, 10),
        "dreg": ImportanceWeightedLoss(vae, 10, "doubly_reparameterized"),
    }
    report = gradient_variance(losses, x, num_pairs=10, by=BLOCKS)
    assert list(report) == list(losses)
    assert len(report) == 4
    lines = report.table().splitlines()
    assert lines[0] == "Gradient of the batch mean, nats^2; 10 pairs of draws"
    assert [line.split()[0] for line in lines[3:]] == ["encoder"] * 4 + ["decoder"] * 4
    assert all(p.grad is None for p in vae.parameters())


class TwoLatents(ModelGuidePair):
    """z_2 -> z_1 -> x, all linear; ``shared`` is in both latents' guide laws, ``spare`` in no law."""

    def __init__(self) -> None:
        super().__init__((1,), ("z_2", "z_1"))
        for name in ("a_1", "a_2", "shared", "w_1", "w_x", "spare"):
            setattr(self, name, nn.Parameter(torch.tensor([0.5])))
        self.log_scale = nn.Parameter(torch.zeros(2))  # of x: first entry alone is used

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            z_2 = pyro.sample("z_2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z_1 = pyro.sample("z_1", dist.Normal(self.w_1 * z_2, 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.w_x * z_1, self.log_scale[:1].exp()).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)):
            z_1 = pyro.sample("z_1", dist.Normal(self.a_1 * x, self.shared.exp()).to_event(1))
            return pyro.sample("z_2", dist.Normal(self.a_2 * z_1, self.shared.exp()).to_event(1))


SITES = {
    "q(z_1)": ("a_1", "shared"),
    "q(z_2 | z_1)": ("a_2", "shared"),
    "p(z_1 | z_2)": ("w_1",),
    "p(x | z_1)": ("w_x", "log_scale"),
    "(no site)": ("spare",),
}


def test_sites_hold_the_parameters_of_their_own_law():
    """Each site's numbers are sums of those of its bare parameters, one block each, from the same draws.

    A path through a drawn parent is none of the site's: a_1 moves z_1 and so z_2's guide law, yet counts in q(z_1) alone.
    """
    pair = TwoLatents()
    report = gradient_variance({"drawn": ElboLoss(pair, closed_form=False)}, torch.ones(4, 1), num_pairs=10)
    found = report["drawn"]
    assert report.blocks == (*SITES, *dict(pair.named_parameters()))  # the prior of z_2 has no parameters: no p(z_2)
    for site, names in SITES.items():
        assert found[site].num_parameters == sum(getattr(pair, name).numel() for name in names)
        assert math.isclose(found[site].variance, sum(found[n].variance for n in names), rel_tol=1e-12)
        assert math.isclose(found[site].signal, sum(found[n].signal for n in names), rel_tol=1e-12)
    assert found["q(z_1)"].variance != found["q(z_2 | z_1)"].variance
    assert (found["(no site)"].variance, found["(no site)"].signal) == (0.0, 0.0)


def test_a_sites_gradient_has_its_known_variance():
    """-ELBO of one datum depends on w_1 by (z_1 - w_1 z_2)^2 / 2: gradient -(z_1 - w_1 z_2) z_2 at draws of the guide.

    The guide is z_1 ~ N(1/2, s^2), z_2 = z_1 / 2 + s e; moments of the product by an independent simulation.
    """
    pair, pairs, s = TwoLatents(), 800, math.exp(0.5)
    z_1 = 0.5 + s * torch.randn(400_000)
    z_2 = 0.5 * z_1 + s * torch.randn(400_000)
    exact = -(z_1 - 0.5 * z_2) * z_2
    square = (exact - exact.mean()).square()
    loss = ElboLoss(pair, closed_form=False)
    found = gradient_variance({"drawn": loss}, torch.ones(1, 1), pairs, by=("site",))["drawn"]["p(z_1 | z_2)"]
    error = math.hypot(found.variance_std_error, float(square.std()) / math.sqrt(len(square)))
    assert abs(found.variance - float(square.mean())) < 6 * error
    assert abs(found.variance / 4 - float(square.mean())) > 6 * error, "the twin: half the gradient is seen"


def test_random_state_and_gradients_are_left_alone_by_the_search_for_sites():
    pair, x = TwoLatents(), torch.ones(3, 1)
    numbers = []
    for by in (BLOCKS, ("site", "block")):
        torch.manual_seed(0)
        numbers.append(gradient_variance({"a": ElboLoss(pair)}, x, num_pairs=3, by=by)["a"]["w_1"].variance)
    assert numbers[0] == numbers[1]
    assert all(p.grad is None for p in pair.parameters())


def test_bad_input_is_named():
    x, loss = torch.zeros(4), KnownNoise(parts(), 1.0)
    with pytest.raises(ValueError, match="expected at least one loss"):
        gradient_variance({}, x)
    with pytest.raises(ValueError, match="expected num_pairs >= 2, got 1"):
        gradient_variance({"a": loss}, x, num_pairs=1)
    with pytest.raises(ValueError, match="'site', 'block' or both, got 'site'"):
        gradient_variance({"a": loss}, x, by="site")
    with pytest.raises(ValueError, match="a loss of a ModelGuidePair, got none within 'a'"):
        gradient_variance({"a": loss}, x)
    with pytest.raises(ValueError, match="others in 'b' than in 'a'"):
        gradient_variance({"a": loss, "b": KnownNoise(parts(), 1.0)}, x)
    with pytest.raises(ValueError, match="trainable parameters, got none in 'frozen'"):
        gradient_variance({"frozen": loss.requires_grad_(False)}, x)
    report = gradient_variance({"a": KnownNoise(parts(), 1.0)}, x, num_pairs=2, by=BLOCKS)
    with pytest.raises(KeyError, match="expected a loss among a, got 'b'"):
        report["b"]
