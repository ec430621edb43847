"""Compiled objectives: the loss itself is the reference, on the same draws; broken compilers show what would be caught.

On matched draws values and gradients agree to rounding, so those tests cannot fail by chance. z-tests hold 6.5 standard errors
of at most a hundred means each: a false failure below 1e-8 for the family.
"""

import copy
import logging
import os
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from inference import DiffusionLoss, ElboLoss, EnumeratedLoss, ImportanceWeightedLoss
from inference.training import compilation
from inference.training.compilation import NotTraceableError, compile_objective
from inference.training.flat_graph import InPlaceError
from inference.training.inductor import Boxed
from inference.training.relaxed_objective import GumbelSoftmaxLoss, StraightThroughLoss
from ppl_models import VAE, CategoricalVAE, ModelGuidePair
from ppl_models.likelihoods import Bernoulli
from tests.cases import CASES
from tests.training.training_pairs import noisy_vae

Z_MAX = 6.5
READS_VALUES = {
    "linear-exact",
    "linear-orthogonal",
    "linear-mean-field",
}  # whether W'W is diagonal decides on the guide

QUICK = {  # one pair of each family; the others run with the slow tests
    "vae-bernoulli",
    "ae-denoising",
    "hvae-bottom-up",
    "linear-diffusion-exact",
    "d3pm-uniform",
    "categorical-exact",
    "vq-vae",
}
OBJECTIVES = [
    *((name, "bound", case.objective, "forward") for name, case in CASES.items() if name not in READS_VALUES),
    ("vae-bernoulli", "draws", lambda p: ElboLoss(p, 3, closed_form=False), "forward"),
    ("vae-normal", "step", ElboLoss, "step"),
    ("vae-normal", "iwae", lambda p: ImportanceWeightedLoss(p, 3), "forward"),
    ("vae-normal", "dreg", lambda p: ImportanceWeightedLoss(p, 3, "doubly_reparameterized"), "forward"),
    ("categorical-vae", "gumbel", GumbelSoftmaxLoss, "forward"),
    ("categorical-vae", "straight-through", StraightThroughLoss, "step"),
    ("ddpm-normal", "one-t", DiffusionLoss, "step"),
    ("ddpm-normal", "uniform", lambda p: DiffusionLoss(p, timesteps="uniform"), "forward"),
    ("ddpm-normal", "second-moment", lambda p: DiffusionLoss(p, "simple", "loss_second_moment"), "forward"),
    ("ddpm-discretized-learned", "hybrid", lambda p: DiffusionLoss(p, "hybrid", auxiliary_weight=0.1), "step"),
]
QUICK_OBJECTIVES = {"dreg", "gumbel", "second-moment"}


def parameters():
    for name, what, objective, method in OBJECTIVES:
        quick = name in QUICK if what == "bound" else what in QUICK_OBJECTIVES
        marks = [] if quick else [pytest.mark.slow]
        yield pytest.param(name, objective, method, id=f"{name}-{what}", marks=marks)


def run(objective, x, loss, seed=3):
    """Values, gradients of a weighted sum and buffers after one call on the draws of a seed; buffers are put back."""
    before = [buffer.clone() for buffer in loss.buffers()]
    torch.manual_seed(seed)
    values = [leaf for leaf in tree_leaves(objective(x)) if leaf is not None]
    total = sum(i * v.sum() for i, v in enumerate(values, 1))  # an objective and its terms would cancel
    gradients = torch.autograd.grad(total, list(loss.parameters()), allow_unused=True)
    after = [buffer.clone() for buffer in loss.buffers()]
    for buffer, old in zip(loss.buffers(), before, strict=True):
        buffer.copy_(old)
    return [[v.detach() for v in values], [g for g in gradients if g is not None], after]


def agree(found, expected, rtol=1e-9):
    """Whether all tensors of two runs agree to rounding, on the scale of the largest of their kind."""
    for a, b in zip(found, expected, strict=True):
        scale = max([0.0, *(float(q.double().nan_to_num().abs().sum()) for q in b)])
        if len(a) != len(b) or not all(
            torch.allclose(p.double(), q.double(), rtol, rtol * scale, equal_nan=True)
            for p, q in zip(a, b, strict=True)
        ):
            return False
    return True


def same(fast, loss, x, method="forward"):
    return agree(run(fast, x, loss), run(getattr(loss, method), x, loss))


def summed(objective, x):
    return torch.stack([leaf.detach().sum() for leaf in tree_leaves(objective(x)) if leaf is not None])


def is_fresh(objective, x):
    return bool((objective(x) != objective(x)).all())


def said(caplog):
    return [r.message for r in caplog.records if r.name == compilation.__name__]


def vae_loss():
    case = CASES["vae-normal"]
    pair = case.build()
    return ElboLoss(pair), case.data(pair)


@pytest.mark.filterwarnings("ignore:weights 'simple' leave a learned variance")
@pytest.mark.parametrize(("case", "objective", "method"), list(parameters()))
def test_values_gradients_and_buffers_are_the_loss_s_own_on_the_same_draws(case, objective, method):
    pair = CASES[case].build()
    x, loss = CASES[case].data(pair), objective(pair)
    fast = compile_objective(loss, x, method=method, backend="eager")
    assert same(fast, loss, x, method)
    alike = [torch.equal(*(summed(call, x) for _ in range(2))) for call in (fast, getattr(loss, method))]
    assert alike[0] == alike[1]  # fresh noise, unless nothing is drawn


@pytest.mark.parametrize("name", sorted(READS_VALUES))
def test_a_registered_pair_that_decides_on_values_is_refused_with_the_line(name):
    pair = CASES[name].build()
    with pytest.raises(NotTraceableError, match=r"linear_gaussian.py:\d+ .* reads a tensor's value"):
        compile_objective(ElboLoss(pair), CASES[name].data(pair), backend="eager")
    assert all(isinstance(p, nn.Parameter) for p in (pair.weight, pair.bias))


def test_the_mean_of_compiled_draws_is_the_exact_bound():
    pair = CASES["linear-diffusion-exact"].build()
    pair.guide_kind = "process"
    x = pair.model(size=4).detach()
    loss = DiffusionLoss(pair)
    many = x.repeat(50, 1)
    with torch.no_grad():
        fast = compile_objective(loss, many, backend="eager")
        draws = torch.stack([fast(many).reshape(50, 4).mean(0) for _ in range(100)])
    error = draws.std(0) / 10
    assert bool(((draws.mean(0) + pair.elbo(x).detach()).abs() < Z_MAX * error).all())
    assert bool(((draws.mean(0) + 1.1 * pair.elbo(x).detach()).abs() > Z_MAX * error).any())


def frozen_noise(graph, example):
    """A compiler that keeps the draws of its first run."""
    outputs = graph(*example)
    return lambda *_: [output.clone() for output in outputs]


def stale_parameters(graph, example):
    """A compiler that bakes its first arguments in."""
    return lambda *_: graph(*example)


def moved(loss):
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("backend", "fresh", "follows"),
    [("eager", True, True), (frozen_noise, False, False), (stale_parameters, True, False)],
)
def test_noise_is_fresh_and_parameters_are_read_anew_and_a_compiler_that_breaks_either_is_caught(
    backend, fresh, follows
):
    loss, x = vae_loss()
    fast = compile_objective(loss, x, backend=backend)
    assert is_fresh(fast, x) == fresh
    moved(loss)
    assert same(fast, loss, x) == follows


def test_every_way_to_change_parameters_is_followed():
    loss, x = vae_loss()
    fast = compile_objective(loss, x, backend="eager")
    optimizer = torch.optim.Adam(fast.parameters(), lr=0.1)
    fast(x).mean().backward()
    optimizer.step()
    assert same(fast, loss, x)
    other = copy.deepcopy(loss)
    moved(other)
    loss.load_state_dict(other.state_dict(), assign=True)
    assert same(fast, loss, x)
    loss.float()
    assert fast(x.float()).dtype == torch.float32


def test_gradients_accumulate_as_in_the_loss_itself():
    loss, x = vae_loss()
    fast = compile_objective(loss, x, backend="eager")
    found = []
    for objective in (fast, loss):
        loss.zero_grad()
        torch.manual_seed(1)
        for weight in (1.0, 0.5):
            (weight * objective(x)).mean().backward()
        found.append([p.grad.clone() for p in loss.parameters()])
    assert agree([found[0]], [found[1]])


def boxed(graph, example):
    """A compiler whose functions take a list and empty it, as inductor's do."""

    def call(tensors):
        arguments = list(tensors)
        tensors.clear()
        return graph(*arguments)

    return Boxed(call)


@pytest.mark.parametrize("backend", ["eager", boxed, pytest.param("inductor", marks=pytest.mark.slow)])
def test_activations_live_until_the_gradient_unless_they_are_to_be_kept(backend):
    loss, x = vae_loss()
    fast = compile_objective(loss, x, backend=backend)
    kept = []
    for objective in (fast, loss):
        torch.manual_seed(0)
        value = objective(x).sum()
        first = torch.autograd.grad(value, list(loss.parameters()), retain_graph=True)
        again = torch.autograd.grad(value, list(loss.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(value, list(loss.parameters()))
        kept.append(first)
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*kept, strict=True))


def test_data_may_take_a_gradient_and_a_second_derivative_is_refused():
    loss, x = vae_loss()
    x = x.clone().requires_grad_()
    fast = compile_objective(loss, x, backend="eager")
    gradients = []
    for objective in (fast, loss):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(objective(x).sum(), x)[0])
    assert torch.allclose(*gradients)
    with pytest.raises(RuntimeError, match="differentiable once; use the loss itself"):
        torch.autograd.grad(fast(x).sum(), x, create_graph=True)


def test_a_partial_batch_is_traced_anew_and_one_graph_for_all_sizes_is_caught(monkeypatch, caplog):
    loss, x = vae_loss()
    fast = compile_objective(loss, x, backend="eager")
    with caplog.at_level(logging.WARNING):
        for size in (3, 1, 3, 5):
            assert same(fast, loss, x[:size])
    assert [m.split(":")[0] for m in said(caplog)] == [
        f"traced ElboLoss.forward for x of shape {[size, 4, 3]}" for size in (3, 1)
    ]
    key = fast._signature([*fast._state.read(), x])
    monkeypatch.setattr(fast, "_signature", lambda inputs: key)
    with pytest.raises(RuntimeError):
        fast(x[:3])


def test_strided_data_are_taken_too():
    loss, x = vae_loss()
    fast = compile_objective(loss, x, backend="eager")
    assert same(fast, loss, x.transpose(1, 2).contiguous().transpose(1, 2))


def test_another_size_is_compiled_once_it_is_met_often(monkeypatch):
    monkeypatch.setattr(compilation, "COMPILE_AFTER", 3)
    compiled = []

    def backend(graph, example):
        compiled.append(example)
        return graph

    loss, x = vae_loss()
    fast = compile_objective(loss, x, backend=backend)
    assert len(compiled) == 2  # forward and backward
    for calls, halves in ((1, 2), (2, 2), (3, 4), (4, 4)):
        fast(x[:2])
        assert len(compiled) == halves, calls
    assert same(fast, loss, x[:2])


def test_too_many_sizes_fall_back_to_the_loss_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(compilation, "MAX_GRAPHS", 2)
    loss, x = vae_loss()
    fast = compile_objective(loss, x, backend="eager")
    for size in (4, 3, 2, 3):
        assert same(fast, loss, x[:size])
    assert [m for m in said(caplog) if "uncompiled" in m] == [fast.history[-1]]


def test_training_and_evaluation_mode_dropout_and_running_statistics():
    pair = noisy_vae()
    x = (torch.rand(6, 4) < 0.5).double()
    loss = ElboLoss(pair)
    state = torch.get_rng_state()
    statistics = pair.encoder.body[1].running_mean.clone()
    fast = compile_objective(loss, x, backend="eager")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pair.encoder.body[1].running_mean, statistics)
    assert same(fast, loss, x)
    fast(x)
    assert not torch.equal(pair.encoder.body[1].running_mean, statistics)
    fast.eval()
    assert same(fast, loss, x)
    pair.encoder.body[1].train()  # part of the pair in another mode
    assert same(fast, loss, x)
    assert len(fast.history) == 3


def test_without_gradients_there_is_no_backward_graph():
    loss, x = vae_loss()
    fast = compile_objective(loss, x, backend="eager")
    with torch.no_grad():
        torch.manual_seed(0)
        value = fast(x)
        torch.manual_seed(0)
        assert torch.allclose(value, loss(x))
    assert not value.requires_grad
    assert "without gradients" in fast.history[-1]


def test_frozen_parameters_get_no_gradient():
    loss, x = vae_loss()
    loss.pair.decoder.requires_grad_(False)
    fast = compile_objective(loss, x, backend="eager")
    fast(x).sum().backward()
    assert all(p.grad is None for p in loss.pair.decoder.parameters())
    assert all(p.grad is not None for p in loss.pair.encoder.parameters())


def test_autocasting_is_in_the_graph_and_log_densities_stay_in_float32():
    torch.set_default_dtype(torch.float32)
    loss, x = vae_loss()
    with torch.autocast("cpu", torch.bfloat16):
        fast = compile_objective(loss, x, backend="eager")
        cast = run(fast, x, loss)
        expected = run(loss, x, loss)
    assert agree(cast, expected, rtol=1e-6)
    assert cast[0][0].dtype == torch.float32
    assert not agree(cast, run(fast, x, loss), rtol=1e-6)  # without autocasting: another graph, other numbers
    assert agree(run(fast, x, loss), run(loss, x, loss), rtol=1e-6)


class SharedLayer(ModelGuidePair):
    """One layer registered twice, and one weight under two names."""

    def __init__(self):
        super().__init__((2,), ("z",))
        self.first = nn.Linear(2, 2)
        self.second = nn.Sequential(self.first, nn.Linear(2, 2))
        self.second[1].weight = self.first.weight

    def model(self, x=None, size=None):
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.second(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", self.batch_size(x)):
            return pyro.sample("z", dist.Normal(self.first(x), 0.5).to_event(1))


def test_shared_layers_and_tied_weights_stay_shared():
    pair = SharedLayer()
    x = torch.randn(5, 2)
    fast = compile_objective(ElboLoss(pair), x, backend="eager")
    assert pair.second[1].weight is pair.first.weight
    assert isinstance(pair.first.weight, nn.Parameter)
    assert same(fast, fast.loss, x)


class Faulty(nn.Module):
    """A loss with one thing wrong."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.calls = fault, 0
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))
        self.unregistered = torch.ones(3)

    def forward(self, x):
        self.calls += 1
        return self.fault(self, self.weight * x)


def _branch(loss, x):
    return x if x.sum() > 0 else -x


def _replace_buffer(loss, x):
    loss.seen = loss.seen + 1
    return x


def _count_in_hook(loss, x):
    x.register_hook(lambda gradient: gradient * loss.calls)
    return x.clone()


def _write(tensor, x):
    with torch.no_grad():
        tensor.add_(1)
    return x


@pytest.mark.parametrize(
    ("fault", "error", "match"),
    [
        (_branch, NotTraceableError, r"test_compilation.py:\d+ \(return x if x.sum\(\) > 0 .*reads a tensor's value"),
        (lambda loss, x: x * float(x.detach().mean()), NotTraceableError, "reads a tensor's value"),
        (lambda loss, x: x * x.detach().tolist()[0], NotTraceableError, "reads a tensor's value"),
        (lambda loss, x: x * x.detach().numpy().mean(), NotTraceableError, r"test_compilation.py:\d+ .* tracing fails"),
        (lambda loss, x: x[x > 0], NotTraceableError, "shape depends on the data"),
        (lambda loss, x: x * loss.unregistered, NotTraceableError, "neither its argument nor a registered parameter"),
        (
            lambda loss, x: x * np.random.rand(),
            NotTraceableError,
            "draws from numpy.random, which a graph would freeze",
        ),
        (lambda loss, x: x * loss.calls, NotTraceableError, "a value differs"),
        (_count_in_hook, NotTraceableError, "a gradient differs"),
        (lambda loss, x: [y := _count_in_hook(loss, x), -y], NotTraceableError, "a gradient differs"),
        (_replace_buffer, NotTraceableError, "other tensors in their places"),
        (lambda loss, x: _write(loss.weight, x), InPlaceError, "changes one in place"),
    ],
)
def test_what_a_graph_cannot_stand_for_is_refused_with_the_reason(fault, error, match):
    loss = Faulty(fault)
    weight, seen = loss.weight, loss.seen
    with pytest.raises(error, match=match):
        compile_objective(loss, torch.tensor([1.0, 2.0, 3.0]), backend="eager")
    assert loss.weight is weight
    assert loss.seen is seen
    assert float(seen) == 0


class WritesToData(nn.Linear):
    def forward(self, x):
        x.mul_(2)
        return super().forward(x)


def test_a_loss_that_writes_to_its_data_is_refused_and_the_data_stay():
    x = torch.ones(3, 2)
    with pytest.raises(InPlaceError, match="changes one in place"):
        compile_objective(WritesToData(2, 1), x, backend="eager")
    assert torch.equal(x, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((lambda x: x, torch.ones(2)), TypeError, "torch module, got function"),
        ((nn.Linear(2, 1), [1.0, 2.0]), TypeError, "one tensor, got list"),
        ((nn.Linear(2, 1), torch.ones(2), "forward", "fast"), ValueError, "'inductor', 'eager' or a callable"),
        ((nn.Linear(2, 1), torch.ones(2), "forward", "eager", "max-autotune"), ValueError, "with backend 'inductor'"),
    ],
)
def test_bad_calls_are_refused_in_one_sentence(arguments, error, match):
    with pytest.raises(error, match=match):
        compile_objective(*arguments)


def test_a_compiler_that_fails_is_reported_and_the_flat_graph_runs(caplog):
    def broken(graph, example):
        raise RuntimeError("no working C++ compiler")

    loss, x = vae_loss()
    fast = compile_objective(loss, x, backend=broken)
    assert "runs uncompiled, for the compiler failed (RuntimeError: no working C++ compiler)" in caplog.text
    assert same(fast, loss, x)
    assert same(fast, loss, x[:2])


def compared_by_law(fast, loss, x, own=None, draws=400):
    """Largest z-score between means over many draws of a compiled loss and one by hand, values and gradients."""
    own, samples = own or loss, []
    for objective, module in ((fast, loss), (own, own)):
        rows = []
        for _ in range(draws):
            values = objective(x)
            gradients = torch.autograd.grad(values.sum(), list(module.parameters()))
            rows.append(torch.cat([values.detach(), *(g.sum()[None] for g in gradients)]))
        samples.append(torch.stack(rows))
    error = sum(s.var(0) / draws for s in samples).sqrt()
    return float(((samples[0].mean(0) - samples[1].mean(0)).abs() / error).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "objective"),
    [("categorical-exact", EnumeratedLoss), ("ddpm-normal", DiffusionLoss), ("vae-normal", ElboLoss)],
)
def test_inductor_draws_what_the_loss_draws(case, objective):
    pair = CASES[case].build()
    loss, x = objective(pair), CASES[case].data(pair)
    fast = compile_objective(loss, x)
    assert fast.history[-1].startswith("compiled")
    assert same(fast, loss, x)


def test_inductor_takes_a_softmax_of_a_quotient():
    """Which it rewrites, with a number that it makes a tensor of."""
    pair = CategoricalVAE.preset((3,), Bernoulli(), num_latents=2, num_classes=3, hidden=(4,))
    loss, x = StraightThroughLoss(pair, temperature=0.7), (torch.rand(4, 3) < 0.5).double()
    fast = compile_objective(loss, x)
    assert fast.history[-1].startswith("compiled")
    assert same(fast, loss, x)


@pytest.mark.slow
def test_inductor_gives_the_same_law_and_fresh_noise():
    loss, x = vae_loss()
    fast = compile_objective(loss, x)
    assert fast.history[-1].startswith("compiled")
    assert is_fresh(fast, x)
    moved(loss)
    assert compared_by_law(fast, loss, x) < Z_MAX
    other = copy.deepcopy(loss)
    moved(other)
    assert compared_by_law(fast, loss, x, own=other) > Z_MAX


@pytest.mark.slow
def test_without_a_cpp_compiler_the_flat_graph_runs_and_says_so(tmp_path):
    program = (
        "import torch\nfrom inference import ElboLoss\nfrom inference.training.compilation import compile_objective\n"
        "from ppl_models import VAE\nfrom ppl_models.likelihoods import Bernoulli\n"
        "x = torch.ones(5, 6)\n"
        "loss = ElboLoss(VAE.preset((6,), Bernoulli(), latent_dim=2, hidden=(4,)))\n"
        "fast = compile_objective(loss, x)\nfast(x).mean().backward()\nprint(fast.history[-1])\n"
    )
    environment = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "runs uncompiled, for the compiler failed" in done.stdout
    assert "runs uncompiled, for the compiler failed" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_on_cuda_the_law_is_the_same_and_gradients_may_be_kept(mode):
    torch.set_default_dtype(torch.float32)
    pair = VAE.preset((4, 3), Bernoulli(), latent_dim=2, hidden=(8,)).cuda()
    x = (torch.rand(5, 4, 3) < 0.5).float().cuda()
    loss = ElboLoss(pair)
    fast = compile_objective(loss, x, mode=mode)
    assert fast.history[-1].startswith("compiled")
    assert is_fresh(fast, x)
    assert compared_by_law(fast, loss, x) < Z_MAX
    kept = [fast(x).detach() for _ in range(3)]
    copies = [value.clone() for value in kept]
    fast(x).sum().backward()
    first = [p.grad.clone() for p in pair.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    fast(x).sum().backward()  # accumulates
    assert all(not torch.equal(p.grad, g) for p, g in zip(pair.parameters(), first, strict=True))
