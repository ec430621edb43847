"""Pairs that are conditioned on labels: the oracle is the same thing done label by label, or a law known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from inference import (
    ElboLoss,
    EnumeratedLoss,
    ancestral_sample,
    compile_objective,
    decompose_diffusion,
    decompose_elbo,
    decompose_forward,
    evidence_ladder,
    gold_standard,
    log_evidence,
    simulation_based_calibration,
    total_error,
)
from inference.views.latent_data import traversal
from inference.views.probing import guide_means
from ppl_models import D3PM, DDPM, HVAE, VAE, VQVAE, AutoEncoder, CategoricalVAE, ModelGuidePair
from ppl_models.likelihoods import Bernoulli, Categorical, DiscretizedNormal, Normal
from ppl_models.networks import MLP, Decoder, GaussianEncoder, LabelShift, TransformerDenoiser, UNet, labelled
from ppl_models.networks.labels import label_layers
from ppl_models.processes.structured_transitions import uniform
from ppl_models.registry import build, describe

K = 3
SHAPE = (4, 3)
SYSTEMS: dict[str, Callable[[], ModelGuidePair]] = {
    "vae": lambda: VAE.preset(SHAPE, Bernoulli(), 2, (6,), num_labels=K),
    "hvae-bottom-up": lambda: HVAE.preset(SHAPE, Bernoulli(), (3, 2), (6,), num_labels=K),
    "hvae-top-down": lambda: HVAE.preset(SHAPE, Bernoulli(), (3, 2), (6,), guide="top_down", num_labels=K),
    "categorical-vae": lambda: CategoricalVAE.preset(SHAPE, Bernoulli(), 2, 4, (6,), num_labels=K),
    "vq-vae": lambda: VQVAE.preset(SHAPE, Bernoulli(), 2, 4, 2, (6,), num_labels=K).eval(),
    "ae": lambda: AutoEncoder.preset(SHAPE, Normal(), 2, (6,), num_labels=K),
    "ddpm": lambda: DDPM.preset(SHAPE, Normal(), 3, hidden=8, blocks=1, num_labels=K),
    "ddpm-grid": lambda: DDPM.preset(SHAPE, DiscretizedNormal(5), 3, hidden=8, blocks=1, num_labels=K),
    "d3pm": lambda: D3PM.preset(SHAPE, Categorical(4), 3, hidden=8, blocks=1, num_labels=K),
    "d3pm-logistic": lambda: D3PM.preset(SHAPE, Categorical(4), 3, hidden=8, blocks=1, output="logistic", num_labels=K),
}
systems = pytest.mark.parametrize("name", SYSTEMS)


def make(name: str) -> ModelGuidePair:
    """A system off its start, where a denoiser's last layer is zero."""
    pair = SYSTEMS[name]()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return pair


def log_joints(pair: ModelGuidePair, x: Tensor, values: dict[str, Tensor]) -> Tensor:
    """log p(x, z | y) and log q(z | x, y) of each datum, ``[2, B]``, at these latents."""
    rows = []
    for program in (pair.guide, pair.model):
        trace = poutine.trace(poutine.condition(program, data=values)).get_trace(x)
        trace.compute_log_prob()
        sites = [trace.nodes[name] for name in trace.stochastic_nodes + trace.observation_nodes if name != "data"]
        rows.append(sum(site["log_prob"].expand(len(x)) for site in sites if "log_prob" in site))
    return torch.stack(rows)


@systems
def test_a_batch_of_labels_is_each_datum_under_its_own(name: str) -> None:
    y = torch.tensor([0, 2, 1, 2])
    pair = make(name)
    given = pair.given(y)
    trace = poutine.trace(given.model).get_trace(size=4)
    x = trace.nodes[pair.data_site]["value"].detach()
    draws = poutine.trace(given.guide).get_trace(x)
    values = {site: draws.nodes[site]["value"].detach() for site in pair.latent_sites}
    together = log_joints(given, x, values)
    for i, label in enumerate(y.tolist()):
        alone = log_joints(pair.given(label), x[i : i + 1], {site: z[i : i + 1] for site, z in values.items()})
        torch.testing.assert_close(together[:, i : i + 1], alone)
    other = log_joints(pair.given((y + 1) % K), x, values)
    assert bool((other[1] != together[1]).all())  # the model reads them; a fixed process q does not


@systems
def test_each_network_reads_the_label_and_each_vector_gets_a_gradient(name: str) -> None:
    pair = make(name)
    given = pair.given([0, 1, 2, 0, 1])
    x = given.model(size=5).detach()
    guide = poutine.trace(given.guide).get_trace(x)
    model = poutine.trace(poutine.replay(given.model, trace=guide)).get_trace(x)
    (model.log_prob_sum() - guide.log_prob_sum()).backward()
    layers = label_layers(pair)
    assert layers
    for layer in layers:
        assert layer.weight.grad is not None
        assert bool((layer.weight.grad.abs().sum(1) > 0).all())


@systems
def test_a_description_rebuilds_it_with_its_labels(name: str) -> None:
    pair = make(name)
    again = build(describe(pair))
    again.load_state_dict(pair.state_dict())
    assert again.num_labels == K
    x = pair.given(1).model(size=2).detach()
    torch.manual_seed(0)
    first = log_joints(pair.given(1), x, {})
    torch.manual_seed(0)
    torch.testing.assert_close(log_joints(again.given(1).train(pair.training), x, {}), first)


def test_descriptions_without_labels_say_nothing_of_them() -> None:
    pair = VAE.preset((6,), Bernoulli(), latent_dim=2, hidden=(4,))
    assert "num_labels" not in str(describe(pair))
    assert pair.num_labels is None
    assert pair.labels is None


def test_a_shift_is_a_one_hot_label_beside_the_input() -> None:
    net = MLP([3, 5, 2], num_labels=4)
    with torch.no_grad():
        net[1].weight.normal_()
    x, y = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 3, 1, 1, 2, 0])
    with labelled(net, y):
        net(x).square().sum().backward()
    plain = MLP([3 + 4, 5, 2])
    with torch.no_grad():
        plain[0].weight.copy_(torch.cat([net[0].weight, net[1].weight.T], 1))
        plain[0].bias.copy_(net[0].bias)
        plain[2].load_state_dict(net[3].state_dict())
    beside = torch.cat([x.detach(), torch.eye(4)[y]], 1).requires_grad_()
    plain(beside).square().sum().backward()
    torch.testing.assert_close(x.grad, beside.grad[:, :3])
    torch.testing.assert_close(net[1].weight.grad, plain[0].weight.grad[:, 3:].T)


class LinearOnLabels:
    """x | y ~ N(b + V_y, W W' + s^2 I), z | x, y exact: by numpy, from the weights that the pair is then given."""

    scale = 0.7

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.w, self.b = np.array([[1.5], [-0.8]]), rng.normal(size=2)
        self.v = np.array([[-2.0], [0.0], [2.0]]) @ self.w.T + rng.normal(
            size=(K, 2)
        )  # along w, and so for z to explain
        self.covariance = self.w @ self.w.T + self.scale**2 * np.eye(2)

    def log_evidence(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        error = x - self.b - self.v[y]
        quadratic = np.einsum("ni,ij,nj->n", error, np.linalg.inv(self.covariance), error)
        return -0.5 * (quadratic + np.log(np.linalg.det(self.covariance)) + 2 * math.log(2 * math.pi))

    def pair(self) -> VAE:
        encoder = GaussianEncoder((2,), 1, hidden=(), num_labels=K)
        decoder = Decoder(1, (2,), hidden=(), num_labels=K)
        gain = self.w.T @ np.linalg.inv(self.covariance)
        spread = math.sqrt(float(1 - (gain @ self.w)[0, 0]))
        with torch.no_grad():
            decoder.body[0].weight.copy_(torch.from_numpy(self.w))
            decoder.body[0].bias.copy_(torch.from_numpy(self.b))
            decoder.body[1].weight.copy_(torch.from_numpy(self.v))
            rows = np.concatenate([gain, np.zeros((1, 2))])
            encoder.body[0].weight.copy_(torch.from_numpy(rows))
            encoder.body[0].bias.copy_(torch.tensor([float(-(gain @ self.b)[0]), math.log(spread)]))
            encoder.body[1].weight.copy_(torch.from_numpy(-(rows @ self.v.T).T))
        return VAE(encoder, decoder, 1, Normal(scale=self.scale))


def test_the_evidence_at_labels_is_the_exact_one() -> None:
    oracle = LinearOnLabels()
    pair = oracle.pair()
    x, y = torch.randn(7, 2), torch.tensor([0, 1, 2, 2, 1, 0, 1])
    exact = torch.from_numpy(oracle.log_evidence(x.numpy(), y.numpy()))
    given = pair.given(y)
    for estimate in (  # the guide is the posterior: each draw gives the evidence
        decompose_elbo(given.model, given.guide, x, num_particles=3).monte_carlo,
        log_evidence(given.model, given.guide, x, num_particles=5).log_evidence,
        -ElboLoss(given, closed_form=False)(x).detach(),
    ):
        torch.testing.assert_close(estimate, exact)
    wrong = pair.given((y + 1) % K)
    assert (log_evidence(wrong.model, wrong.guide, x, num_particles=5).log_evidence - exact).abs().min() > 0.01


def test_calibration_holds_at_the_labels_and_fails_with_the_encoder_at_others() -> None:
    pair = LinearOnLabels().pair()
    assert not simulation_based_calibration(pair.given([0, 1, 2]), num_simulations=400).rejected()
    with torch.no_grad():
        pair.encoder.body[1].weight.mul_(-1)
    assert simulation_based_calibration(pair.given([0, 1, 2]), num_simulations=400).rejected()


def test_a_ladder_stands_on_the_exact_evidence_at_the_labels() -> None:
    oracle = LinearOnLabels()
    rungs = evidence_ladder(
        oracle.pair().given([0, 1, 2]), num_data=7, num_particles=[1, 10], num_temperatures=3, num_leapfrog=2, seed=0
    )
    exact = oracle.log_evidence(rungs.data.numpy(), np.arange(7) % K)
    for rung in rungs.rungs:
        np.testing.assert_allclose(
            rung.values.numpy(), exact, atol=1e-9
        )  # the guide is the posterior, and no weight differs


def test_svi_takes_a_step_at_labels() -> None:
    pair = LinearOnLabels().pair()
    x, y = torch.randn(5, 2), torch.tensor([0, 1, 2, 2, 1])
    svi = SVI(pair.model, pair.guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    with labelled(pair, y):
        loss = svi.step(x)
    assert loss == pytest.approx(-LinearOnLabels().log_evidence(x.numpy(), y.numpy()).sum(), rel=1e-9)


class LawOfLabel(nn.Module):
    """A denoiser of one's own that looks at the label alone: p(x_0 | x_t, y) = softmax(V_y)."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = LabelShift(K, 3)
        with torch.no_grad():
            self.shift.weight.normal_()

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits ``[N, 1, 3]``."""
        return self.shift(torch.zeros(len(x_t), 3))[:, None]


def test_a_bound_over_blocks_of_data_keeps_labels_and_data_together() -> None:
    pair = D3PM(LawOfLabel(), uniform(3, 1), (1,), 3)
    y, x = torch.randint(K, (600,)), torch.randint(3, (600, 1))
    log_law = pair.network.shift.weight.detach().log_softmax(-1)
    d = decompose_diffusion(pair.given(y), x, 3, seed=0)  # 256 data at a time
    torch.testing.assert_close(d.terms["x_0"].value, log_law[y, x[:, 0]])


@pytest.mark.parametrize("batch_size", [None, 7])
def test_samples_are_drawn_at_their_own_labels(batch_size: int | None) -> None:
    pair = D3PM(LawOfLabel(), uniform(3, 2), (1,), 3)
    with torch.no_grad():
        pair.network.shift.weight.copy_(1000 * torch.eye(3))  # x_0 = y
    y = torch.randint(K, (20,))
    assert torch.equal(ancestral_sample(pair.given(y), 20, seed=0, batch_size=batch_size)[:, 0], y)
    assert ancestral_sample(pair.given(2), 5, seed=0).eq(2).all()
    with pytest.raises(ValueError, match="as many samples as labels, got 19 and 20"):
        ancestral_sample(pair.given(y), 19)


@pytest.mark.parametrize(
    "network",
    [
        lambda: UNet((8, 8), (4, 4), 1, num_labels=K),
        lambda: TransformerDenoiser((6,), 4, 8, 1, 2, num_labels=K),
        lambda: TransformerDenoiser((6,), 4, 8, 1, 2, time_conditioned=False, num_labels=K),
    ],
    ids=["unet", "transformer", "transformer-without-time"],
)
def test_denoisers_read_labels_under_more_axes(network: Callable[[], nn.Module]) -> None:
    net = network()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 5, *net.data_shape) if net.num_classes is None else torch.randint(4, (2, 5, *net.data_shape))
    y = torch.tensor([0, 1, 2, 2, 0])
    with labelled(net, y):
        out = net(x, torch.tensor(2))
    for i, label in enumerate(y.tolist()):
        with labelled(net, label):
            torch.testing.assert_close(out[:, i], net(x[:, i], torch.tensor(2)))
    with labelled(net, (y + 1) % K):
        assert not torch.allclose(net(x, torch.tensor(2)), out)


def test_a_compiled_loss_follows_its_labels() -> None:
    loss = ElboLoss(LinearOnLabels().pair(), closed_form=False)
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    with labelled(loss, y):
        fast = compile_objective(loss, x, backend="eager")
    for labels in (y, (y + 1) % K):
        values, gradients = [], []
        for objective in (loss, fast):
            torch.manual_seed(1)
            with labelled(loss, labels):
                value = objective(x)
            values.append(value.detach())
            gradients.append(torch.autograd.grad(value.sum(), list(loss.parameters())))
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*gradients)
    assert len(fast.history) == 1  # the labels are read, as buffers are, and not traced anew


def test_given_shares_parameters_and_leaves_the_pair_as_it_was() -> None:
    pair = LinearOnLabels().pair()
    given = pair.given([0, 1])
    assert given is not pair
    assert type(given) is VAE
    assert pair.labels is None
    assert [id(p) for p in given.parameters()] == [id(p) for p in pair.parameters()]
    again = given.given(2)
    assert again.labels.tolist() == 2
    assert given.labels.tolist() == [0, 1]
    with labelled(pair, 1):
        assert pair.labels.tolist() == 1
    assert pair.labels is None
    assert "labels" not in "".join(pair.state_dict())


@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        ([0.5], TypeError, "labels as whole numbers 0..2, got torch.float"),
        ([True], TypeError, "labels as whole numbers"),
        ([3, 0], ValueError, r"labels: expected whole numbers in 0..2, got 3"),
        (-1, ValueError, r"labels: expected whole numbers in 0..2, got -1"),
        ([[0, 1]], ValueError, r"labels of shape \[B\], one a datum, or one number for all, got \[1, 2\]"),
        ([], (TypeError, ValueError), "expected labels"),
        ("1", TypeError, "labels as whole numbers 0..2, got '1'"),
        (["a"], TypeError, "labels as whole numbers 0..2"),
    ],
)
def test_bad_labels_are_refused(labels: object, error: type[Exception], match: str) -> None:
    pair = LinearOnLabels().pair()
    with pytest.raises(error, match=match):
        pair.given(labels)
    with pytest.raises(error, match=match), labelled(pair, labels):
        pass


def test_missing_and_mismatched_labels_are_refused() -> None:
    pair = LinearOnLabels().pair()
    with pytest.raises(ValueError, match=r"expected labels in 0..2 beside the data.*got none: use pair.given\(y\)"):
        pair.model(size=3)
    with pytest.raises(ValueError, match="expected a label for each of 3 data, got 2 labels"):
        pair.given([0, 1]).model(size=3)
    with pytest.raises(ValueError, match="expected a label for each of 1 data, got 2 labels"):
        pair.given([0, 1]).guide(torch.zeros(1, 2))
    for module in (pair, ElboLoss(pair)):
        with (
            labelled(module, [0, 1]),
            pytest.raises(ValueError, match="expected a label for each of 1 data, got 2 labels"),
        ):
            pair.guide(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="conditioned on labels, got VAE without: make it with num_labels=K"):
        VAE.preset((2,), Normal(), 1, (4,)).given(0)
    mixed = VAE(GaussianEncoder((2,), 1, num_labels=2), Decoder(1, (2,), num_labels=3), 1, Normal())
    with pytest.raises(ValueError, match=r"one number of labels in all networks, got \[2, 3\]"):
        mixed.given(0)


def test_enumerated_latents_meet_the_labels_of_their_data() -> None:
    """All z at once for every datum: the exact evidence and bound are those label by label, whose sum over z is spelled out."""
    pair, y = make("categorical-vae"), [0, 2, 1, 1, 0]
    x = pair.given(y).model(size=5).detach()
    exact = pair.given(y).log_evidence(x)
    bound = -EnumeratedLoss(pair.given(y))(x)
    for i, label in enumerate(y):
        one = pair.given(label)
        torch.testing.assert_close(exact[i : i + 1], one.log_evidence(x[i : i + 1]))
        torch.testing.assert_close(bound[i : i + 1], -EnumeratedLoss(one)(x[i : i + 1]))
    assert (pair.given([1, 0, 2, 2, 1]).log_evidence(x) - exact).abs().min() > 1e-3


def test_nuts_runs_at_the_label_of_each_datum() -> None:
    """The exact posterior mean of z, within five standard errors of some sixty effective draws."""
    oracle, y = LinearOnLabels(), torch.tensor([0, 2])
    pair, x = oracle.pair(), torch.zeros(2, 2)
    tree = gold_standard(pair.given(y), x, num_chains=2, num_samples=100, warmup=50)
    with torch.no_grad():
        loc, scale = pair.given(y).encoder(x)  # set to the posterior by numpy
    drawn = torch.as_tensor(tree["posterior"]["z"].values).reshape(-1, 2, 1).mean(0)
    assert ((drawn - loc).abs() < 5 * scale / math.sqrt(60)).all()
    assert ((drawn.flip(0) - loc).abs() > 5 * scale / math.sqrt(60)).all()


@pytest.mark.parametrize("count", [3, 5, 12])
def test_as_many_labels_as_data_are_asked_for_wherever_data_are_cut(count: int) -> None:
    """12 labels are as many as rows of 4 data and 3 particles, flattened for a network of one's own."""
    y, x = torch.arange(count) % K, torch.randint(3, (4, 1))
    diffusion = D3PM(LawOfLabel(), uniform(3, 2), (1,), 3).given(y)
    vae = LinearOnLabels().pair().given(y)
    for call in (
        lambda: decompose_diffusion(diffusion, x, 3, seed=0),
        lambda: decompose_forward(diffusion, x, 3, seed=0),
        lambda: guide_means(vae, torch.zeros(4, 2)),
        lambda: decompose_elbo(vae.model, vae.guide, torch.zeros(4, 2)),
    ):
        with pytest.raises(ValueError, match=f"expected a label for each of 4 data, got {count} labels"):
            call()


def test_given_labels_are_a_copy_of_the_callers() -> None:
    pair, y = LinearOnLabels().pair(), torch.tensor([0, 1])
    given = pair.given(y)
    y[0] = 2
    assert given.labels.tolist() == [0, 1]


def test_the_mode_of_a_given_pair_is_its_own() -> None:
    encoder = nn.Sequential(nn.Dropout(0.5), GaussianEncoder((2,), 1, hidden=(), num_labels=K))
    pair = VAE(encoder, Decoder(1, (2,), hidden=(), num_labels=K), 1, Normal()).train()
    given = pair.given(1).eval()
    assert not given.encoder[0].training
    assert pair.encoder[0].training
    assert pair.given(2).encoder[0].training


def test_networks_that_call_an_original_are_refused() -> None:
    encoder = torch.compile(GaussianEncoder((2,), 1, hidden=(), num_labels=K), backend="eager")
    pair = VAE(encoder, Decoder(1, (2,), hidden=(), num_labels=K), 1, Normal())
    with pytest.raises(ValueError, match=r"not wrapped by torch.compile.*use labelled\(pair, y\)"):
        pair.given(0)


def test_a_traversal_about_a_datum_wants_its_label() -> None:
    pair, x = LinearOnLabels().pair(), torch.randn(3, 2)
    with pytest.raises(ValueError, match="one label for all with a datum"):
        traversal(pair.given([2, 1, 0]), x, datum=x[1])
    assert traversal(pair.given(1), x, datum=x[1]).means.shape[-1] == 2


def test_a_density_of_x_alone_is_no_measure_of_x_given_labels() -> None:
    with pytest.raises(ValueError, match="the density of x given its label"):
        total_error(LinearOnLabels().pair().given(1), torch.zeros(3, 2), "two_moons")
