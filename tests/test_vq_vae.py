"""The VQ-VAE by hand: nearest codes, M log K, straight-through gradients, eq. 3 of the paper, moving averages and restarts."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from torch.func import functional_call

from inference import ElboLoss, decompose_elbo, fit
from ppl_models import registry
from ppl_models.likelihoods import Bernoulli, Categorical, Normal
from ppl_models.networks.arrays import ArrayMLP
from ppl_models.vq_vae import VQVAE, UniformCodes

M, K, D = 3, 5, 2


def _preset(**options: float) -> VQVAE:
    pair = VQVAE.preset((4,), Normal(scale=0.5), num_latents=M, num_codes=K, code_dim=D, hidden=(6,))
    for name, value in options.items():
        setattr(pair, name, value)
    return pair


class _Rows(nn.Module):
    """An encoder whose code vectors are the data themselves, with a parameter so that there is one."""

    def __init__(self, num_latents: int, code_dim: int) -> None:
        super().__init__()
        self.shape, self.scale = (num_latents, code_dim), nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x.reshape(*x.shape[:-1], *self.shape)


class _Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.gain * z.flatten(-2)


def _by_rows(num_latents: int = 1, num_codes: int = K, **options: float) -> VQVAE:
    """Data ``[num_latents * D]`` that are their own encodings and reconstructions."""
    return VQVAE(_Rows(num_latents, D), _Flat(), num_latents, num_codes, D, Normal(scale=0.5), **options)


def _nearest_by_hand(encoding: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    index = [
        [min(range(len(codebook)), key=lambda k, e=e: float((e - codebook[k]).square().sum())) for e in row]
        for row in encoding
    ]
    return torch.tensor(index)


def test_the_guide_is_sure_of_the_nearest_codes():
    pair = _preset().eval()
    pair.codebook.mul_(0.2)  # among the encodings
    x = torch.randn(7, 4)
    index = _nearest_by_hand(pair.encoder(x).detach(), pair.codebook)
    assert torch.equal(pair.codes(x), index)
    assert torch.equal(pair.guide(x).detach(), pair.codebook[index])  # the value is the code, to the last bit
    assert len(index.unique()) > 1


def _excess(index: torch.Tensor, encoding: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """|e - c_index| / min_k |e - c_k| - 1, from differences in float64: zero where the index is right."""
    distance = (encoding.double()[..., None, :] - codebook.double()).square().sum(-1).sqrt()
    return distance.gather(-1, index[..., None])[..., 0] / distance.amin(-1) - 1


@pytest.mark.parametrize(
    "places",
    [(1000.0,), (-1000.0, 1000.0), (-3e4, 1.0, 1e4)],
    ids=["offset", "two clusters, of mean zero", "three, of many sizes"],
)
def test_the_nearest_code_is_the_nearest_one_far_from_the_origin(places):
    torch.set_default_dtype(torch.float32)
    pair = _by_rows(num_codes=64).eval()
    centre = torch.tensor(places)
    pair.codebook.copy_(torch.randn(64, D) + centre[torch.arange(64) % len(places), None])
    x = torch.randn(500, D) + centre[torch.arange(500) % len(places), None]
    assert _excess(pair.codes(x), x[:, None], pair.codebook).max() < 1e-5  # rounding; a wrong code is farther by more
    by_product = torch.cdist(x, pair.codebook).argmin(-1, keepdim=True)  # |e|^2 - 2 e.c + |c|^2 cancels
    assert (_excess(by_product, x[:, None], pair.codebook) > 1e-2).float().mean() > 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_codes", [3, 7, 64, 130])
def test_of_codes_equally_near_the_first_is_taken(dtype, num_codes):
    """Codes that are there twice, at the second place too; and numbers half-way between two codes, on either side."""
    torch.set_default_dtype(dtype)
    pair = _by_rows(num_codes=2 * num_codes).eval()
    pair.codebook.copy_((torch.randn(num_codes, D) + 300).repeat(2, 1))
    assert int(pair.codes(torch.randn(200, D) + 300).max()) < num_codes
    line = _by_rows(num_codes=num_codes).eval()
    line.codebook.copy_(torch.arange(num_codes)[:, None].expand(num_codes, D) + 4096.0)
    half = torch.arange(num_codes - 1)[:, None].expand(num_codes - 1, D) + 4096.5
    assert torch.equal(line.codes(half)[:, 0], torch.arange(num_codes - 1))


def test_the_nearest_code_does_not_depend_on_the_batch():
    torch.set_default_dtype(torch.float32)
    pair = _by_rows(num_codes=8).eval()
    pair.codebook.copy_(torch.randn(8, D) + 3000)
    x = torch.randn(500, D) + 3000
    assert torch.equal(pair.codes(x), torch.cat([pair.codes(row[None]) for row in x]))
    by_product = [torch.cdist(rows, pair.codebook).argmin(-1) for rows in (x, *x[:, None])]
    assert not torch.equal(by_product[0], torch.cat(by_product[1:]))  # which switches above 25 rows


def test_terms_are_m_log_k_and_the_reconstruction():
    pair = _preset().eval()
    x = pair.model(size=6).detach()
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=20)
    assert d.sites == ("z", "x")
    assert torch.allclose(d["z"].analytic, torch.full((6,), -M * math.log(K)), rtol=1e-12)
    assert torch.allclose(d["z"].value, torch.full((6,), -M * math.log(K)), rtol=1e-12)
    mean = pair.decoder(pair.codebook[pair.codes(x)])
    log_p = -(x - mean).square().sum(-1) / (2 * 0.25) - 2 * math.log(2 * math.pi * 0.25)
    assert torch.allclose(d["x"].value, log_p.detach(), rtol=1e-12)
    assert torch.allclose(d.elbo, (log_p - M * math.log(K)).detach(), rtol=1e-12)
    assert (d.std_error < 1e-12).all()
    assert not torch.allclose(d.elbo, log_p.detach(), rtol=1e-3)  # without the rate it would be no bound


def test_in_training_mode_the_papers_other_two_terms_are_named_factors():
    pair = _preset(commitment=0.7)
    x = pair.model(size=6).detach()
    codebook = pair.codebook.clone()
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=3)
    assert torch.equal(pair.codebook, codebook)  # no step without gradients
    assert d.sites == ("z", "x", "codebook", "commitment")
    squares = (pair.encoder(x) - codebook[pair.codes(x)]).square().sum((-2, -1)).detach()
    assert torch.allclose(d["codebook"].value, -squares, rtol=1e-10)
    assert torch.allclose(d["commitment"].value, -0.7 * squares, rtol=1e-10)
    assert torch.allclose(d.rate, torch.full((6,), M * math.log(K)), rtol=1e-12)
    bound = decompose_elbo(pair.eval().model, pair.guide, x, num_particles=3).elbo
    assert torch.allclose(-(d.rate + d.distortion), bound, rtol=1e-12)
    assert torch.allclose(d.elbo, bound - 1.7 * squares, rtol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_straight_through_and_commitment(training):
    """d loss / d e = d(-log p)/dz at z = c, plus 2 beta (e - c) in training mode; checked through the encoder by hand."""
    pair = _preset(commitment=0.7).train(training)
    pair._follow = lambda encodings: None  # the codebook stands still
    x = pair.model(size=6).detach()
    loss = ElboLoss(pair)(x).sum()
    found = torch.autograd.grad(loss, list(pair.encoder.parameters()))
    encoding = pair.encoder(x)
    code = pair.codebook[pair.codes(x)].clone().requires_grad_()
    distortion = (x - pair.decoder(code)).square().sum() / (2 * 0.25)
    (slope,) = torch.autograd.grad(distortion, code)
    copied = torch.autograd.grad(encoding, list(pair.encoder.parameters()), slope, retain_graph=True)
    commitment = torch.autograd.grad(
        0.7 * (encoding - code.detach()).square().sum(), list(pair.encoder.parameters()), retain_graph=True
    )
    for a, b, c in zip(found, copied, commitment, strict=True):
        assert torch.allclose(a, b + c if training else b, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(a, b if training else b + c, rtol=1e-3, atol=1e-6)  # each part would be missed
    assert not any(name.startswith("codebook") for name, _ in pair.named_parameters())


def test_svi_and_the_objective_have_the_same_gradient():
    pair = _preset()
    pair._follow = lambda encodings: None
    x = pair.model(size=6).detach()
    parameters = list(pair.parameters())
    ours = torch.autograd.grad(ElboLoss(pair)(x).sum(), parameters)
    theirs = torch.autograd.grad(Trace_ELBO().differentiable_loss(pair.model, pair.guide, x), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)


def _moving_averages(batches: list[torch.Tensor], codebook: torch.Tensor, decay: float) -> torch.Tensor:
    """Appendix A.1 of the paper, in counts: N <- g N + (1-g) n, m <- g m + (1-g) sum of e, c = m / N; no restarts."""
    size = len(batches[0])
    counts = [size / len(codebook)] * len(codebook)
    sums = [c * n for c, n in zip(codebook, counts, strict=True)]
    for encodings in batches:
        index = _nearest_by_hand(encodings[None], torch.stack([m / n for m, n in zip(sums, counts, strict=True)]))[0]
        for k in range(len(codebook)):
            mine = encodings[index == k]
            counts[k] = decay * counts[k] + (1 - decay) * len(mine)
            sums[k] = decay * sums[k] + (1 - decay) * mine.sum(0)
    return torch.stack([m / n for m, n in zip(sums, counts, strict=True)])


def test_the_codebook_follows_moving_averages():
    pair = _by_rows(decay=0.8, restart_below=1e-9)
    start = pair.codebook.clone()
    batches = [torch.randn(20, D) for _ in range(6)]
    for x in batches:
        pair.guide(x)
    assert torch.allclose(pair.codebook, _moving_averages(batches, start, 0.8), rtol=1e-10)
    assert not torch.allclose(pair.codebook, _moving_averages(batches, start, 0.9), rtol=1e-3)
    assert pair.usage.sum() == pytest.approx(1.0)


def test_codes_are_chosen_after_the_codebook_has_moved():
    """So the drawn codes are codes of the book that the model sees, and have probability under it."""
    pair = _by_rows(decay=0.5)
    x = torch.randn(20, D)
    z = pair.guide(x)
    assert torch.equal(z.detach()[:, 0], pair.codebook[_nearest_by_hand(x[:, None], pair.codebook)][:, 0])
    trace = poutine.trace(poutine.replay(pair.model, poutine.trace(pair.guide).get_trace(x))).get_trace(x)
    trace.compute_log_prob()  # validation is on: a vector that is no code would raise
    with pytest.raises(ValueError, match="code vectors"):
        UniformCodes(pair.codebook, 1).log_prob(z + 1e-3)


@pytest.mark.parametrize("mode", ["evaluation", "no gradients"])
def test_nothing_moves_outside_of_training_steps(mode):
    pair = _by_rows(decay=0.5)
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    with torch.set_grad_enabled(mode == "evaluation"):
        pair.train(mode == "no gradients").guide(torch.randn(20, D))
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())
    pair.train().guide(torch.randn(20, D))
    assert not torch.equal(pair.codebook, before["codebook"])


def test_dead_codes_restart_at_encodings_and_used_ones_do_not():
    pair = _by_rows(num_codes=4, decay=0.5, restart_below=0.5)
    pair.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0], [-50.0, 50.0]]))
    pair.usage.copy_(torch.tensor([0.4, 0.4, 0.15, 0.6]))  # 0.15 falls below 0.5/4 = 0.125, the last 0.6 does not
    x = torch.cat([0.1 * torch.randn(10, D), 1 + 0.1 * torch.randn(10, D)])
    pair.guide(x)
    assert any(torch.equal(pair.codebook[2], row) for row in x)
    assert torch.allclose(pair.codebook[3], torch.tensor([-50.0, 50.0]))
    assert torch.allclose(pair.usage, torch.tensor([0.45, 0.45, 0.25, 0.3]))
    assert not any(torch.equal(code, row) for code in pair.codebook[:2] for row in x)


def test_perplexity_counts_the_codes_in_use():
    pair = _by_rows(num_codes=4)
    pair.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [9.0, 9.0]]))
    x = pair.codebook[[0, 0, 1, 2]]
    assert float(pair.codebook_perplexity(x)) == pytest.approx(math.exp(1.5 * math.log(2)))  # entropy of 1/2, 1/4, 1/4
    assert float(pair.codebook_perplexity(x[:2])) == pytest.approx(1.0)
    assert float(pair.codebook_perplexity(pair.codebook)) == pytest.approx(4.0)


def test_training_finds_clusters_and_restarts_bring_every_code_into_use():
    centres = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0], [0.0, -5.0]])
    x = centres.repeat(20, 1) + 0.1 * torch.randn(80, D)
    pair = _by_rows(num_codes=4, decay=0.9, restart_below=0.6)  # half a cluster's share is dead
    pair.codebook.copy_(centres[0] + 0.01 * torch.randn(4, D))  # all codes in one cluster
    assert float(pair.codebook_perplexity(x)) < 3.9
    for _ in range(400):
        pair.guide(x)
    assert float(pair.codebook_perplexity(x)) == pytest.approx(4.0, rel=1e-6)
    assert torch.allclose(pair.codebook[pair.codes(x)][:, 0], centres.repeat(20, 1), atol=0.15)


def test_fit_trains_it_and_reports_the_plain_bound():
    pair = VQVAE.preset((6,), Bernoulli(), num_latents=2, num_codes=4, code_dim=2, hidden=(8,))
    x = torch.eye(6)[torch.arange(60) % 3]
    run = fit(pair, x, epochs=15, batch_size=20, learning_rate=2e-2, scaling="none", progress=False)
    first, last = run.metrics[0], run.metrics[-1]
    assert last["train_elbo"] > first["train_elbo"] + 0.5
    d = decompose_elbo(pair.model, pair.guide, x, num_particles=2)
    assert d.sites == ("z", "x")
    assert last["validation_rate"] == pytest.approx(2 * math.log(4))
    assert last["validation_elbo"] == pytest.approx(float(d.elbo.mean()))


def test_the_same_state_gives_the_same_programs():
    pair, other = _preset(), _preset()
    SVI(pair.model, pair.guide, Adam({"lr": 1e-2}), Trace_ELBO()).step(torch.randn(9, 4))
    assert len(pyro.get_param_store()) == 0
    other.load_state_dict(pair.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(ElboLoss(pair.eval())(x), ElboLoss(other.eval())(x))


def test_particles_predictive_and_float32():
    torch.set_default_dtype(torch.float32)
    pair = _preset().eval()
    x = torch.randn(5, 4)
    loss = ElboLoss(pair, num_particles=3)(x)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, ElboLoss(pair)(x))
    assert Predictive(pair.model, num_samples=3)(size=2)["z"].shape == (3, 2, M, D)


@pytest.mark.parametrize("likelihood", [Bernoulli, lambda: Categorical(num_classes=3), lambda: Normal(scale=None)])
def test_presets_of_any_likelihood_rebuild(monkeypatch, likelihood):
    for name, home in (("VQVAE", "ppl_models.vq_vae:VQVAE"), ("ArrayMLP", "ppl_models.networks.arrays:ArrayMLP")):
        monkeypatch.setitem(registry.PARTS, name, home)
    pair = VQVAE.preset((4,), likelihood(), num_latents=2, num_codes=3, code_dim=2, hidden=(5,), commitment=0.5)
    other = registry.build(registry.describe(pair))
    other.load_state_dict(pair.state_dict())
    assert registry.describe(other) == registry.describe(pair)
    x = pair.model(size=3).detach()
    pair.check_data(x)
    assert torch.equal(ElboLoss(other.eval())(x), ElboLoss(pair.eval())(x))


def test_losses_trace_to_one_graph_and_its_steps_move_the_codebook():
    from torch.fx.experimental.proxy_tensor import make_fx

    pair = _preset()
    x = torch.randn(6, 4)
    loss = ElboLoss(pair)
    with pyro.validation_enabled(False):
        loss(x)
        state = dict(loss.named_parameters()) | dict(loss.named_buffers())
        spare = {name: value.detach().clone() for name, value in state.items()}
        graph = make_fx(lambda state, x: functional_call(loss, state, (x,)))(spare, x)
        before = pair.codebook.clone()
        spare = {name: value.detach().clone() for name, value in state.items()}
        pyro.set_rng_seed(3)
        traced = graph(spare, x)
        pyro.set_rng_seed(3)
        direct = loss(x)
    assert torch.allclose(traced, direct, rtol=1e-10)
    assert torch.equal(spare["pair.codebook"], pair.codebook)
    assert not torch.equal(pair.codebook, before)


class _Pair(nn.Module):
    def forward(self, x):
        return x, x


def _encoder(*shape: int) -> nn.Module:
    return ArrayMLP((4,), shape, (5,))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((_encoder(2, 3), 0, 4, 3), ValueError, "num_latents to be an int >= 1, got 0"),
        ((_encoder(2, 3), 2, 1, 3), ValueError, "num_codes to be an int >= 2, got 1"),
        ((_encoder(2, 3), 2, 4.0, 3), ValueError, r"num_codes to be an int >= 2, got 4\.0"),
        ((_encoder(2, 3), 2, 4, 0), ValueError, "code_dim to be an int >= 1, got 0"),
        ((_encoder(2, 4), 2, 4, 3), ValueError, r"= \[1, 2, 3\].*got \[1, 2, 4\]"),
        ((_Pair(), 2, 4, 3), TypeError, "one tensor, got tuple"),
        ((_encoder(5, 3), 5, 4, 3), ValueError, r"decoder to take .*\[1, 5, 3\]"),
    ],
)
def test_bad_parts_are_refused_at_construction(arguments, error, match):
    encoder, *sizes = arguments
    with pytest.raises(error, match=match):
        VQVAE(encoder.double(), ArrayMLP((2, 3), (4,), (5,)), *sizes, Normal())


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"num_latents": 2.5}, r"num_latents to be an int >= 1, got 2\.5"),
        ({"num_latents": 0}, "num_latents to be an int >= 1, got 0"),
        ({"num_codes": 8.0}, r"num_codes to be an int >= 2, got 8\.0"),
        ({"num_codes": True}, "num_codes to be an int >= 2, got True"),
        ({"code_dim": "2"}, "code_dim to be an int >= 1, got '2'"),
    ],
)
def test_bad_sizes_of_presets_are_refused_in_one_sentence(option, match):
    with pytest.raises(ValueError, match=match):
        VQVAE.preset((4,), Bernoulli(), **{"hidden": (4,), **option})
    VQVAE.preset((4,), Bernoulli(), num_latents=2, num_codes=8, code_dim=2, hidden=(4,))


@pytest.mark.parametrize(("x", "match"), [(torch.zeros(0, 4), "at least one datum"), (torch.zeros(3, 5), r"\[3, 5\]")])
def test_codes_are_asked_of_data_alone(x, match):
    pair = _preset()
    with pytest.raises(ValueError, match=match):
        pair.codes(x)
    assert pair.codes(torch.zeros(2, 3, 4)).shape == (2, 3, M)  # particles in front are welcome


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"commitment": 0.0}, "finite commitment > 0, got 0.0"),
        ({"decay": 1.0}, "decay between 0 and 1, got 1.0"),
        ({"restart_below": 0.0}, "restart_below between 0 and 1, got 0.0"),
    ],
)
def test_bad_options_are_refused_at_construction(option, match):
    with pytest.raises(ValueError, match=match):
        _by_rows(**option)
