"""Structured transitions against dense matrices built entry by entry, and logarithms against exact arithmetic."""

import itertools
import json
import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import scipy.linalg
import torch

from ppl_models import registry
from ppl_models.processes.dense_transitions import DenseTransitions, discretized_gaussian, log_matmul
from ppl_models.processes.neighbour_transitions import nearest_neighbour
from ppl_models.processes.structured_transitions import absorbing, uniform
from ppl_models.processes.transitions import Transitions, betas, log_add_exp
from tests.oracles.categorical_diffusion import absorbing_matrices, gaussian_matrices, uniform_matrices

K, T = 5, 6
SOME = [0.05, 0.2, 0.1, 0.6, 0.3, 1.0]
HALF_ABSORBED = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
POINTS = torch.tensor([[0.0, 0.0], [1.0, 0.1], [0.3, 1.0], [2.0, 2.0], [1.2, 1.4]])

KINDS = {
    "uniform": (lambda: uniform(K, T, SOME), lambda: uniform_matrices(K, SOME)),
    "uniform-cosine": (lambda: uniform(K, T), lambda: uniform_matrices(K, betas("cosine", T).tolist())),
    "absorbing": (lambda: absorbing(K, T, SOME), lambda: absorbing_matrices(K, SOME)),
    "absorbing-reciprocal": (
        lambda: absorbing(K, T),
        lambda: absorbing_matrices(K, [1 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 1]),
    ),
    "gaussian": (lambda: discretized_gaussian(K, T, SOME), lambda: gaussian_matrices(K, SOME)),
    "neighbours": (lambda: nearest_neighbour(POINTS, T, 2, SOME), lambda: _neighbours(2, SOME)),
    "dense": (lambda: DenseTransitions(torch.as_tensor(uniform_matrices(K, SOME))), lambda: uniform_matrices(K, SOME)),
}


def _neighbours(k: int, exponents: list[float]) -> np.ndarray:
    """exp(alpha R) by SciPy, with R from the definition in loops."""
    points = POINTS.numpy()
    near = np.zeros((K, K))
    for j in range(K):
        distance = [np.linalg.norm(points[i] - points[j]) if i != j else np.inf for i in range(K)]
        for i in np.argsort(distance)[:k]:
            near[i, j] = 1
    a = (near + near.T) / (2 * k)
    rate = a - np.diag(a.sum(1))
    return np.stack([scipy.linalg.expm(alpha * rate) for alpha in exponents])


@pytest.fixture(params=KINDS, ids=str)
def kind(request) -> tuple[Transitions, torch.Tensor]:
    build, matrices = KINDS[request.param]
    return build(), torch.as_tensor(matrices())


def test_steps_and_their_products_against_matrices(kind):
    transitions, steps = kind
    product = torch.eye(K)
    assert torch.equal(transitions.cumulative(0), product)
    for t in range(1, T + 1):
        assert torch.allclose(transitions.dense(t), steps[t - 1], rtol=1e-12, atol=1e-15)
        product = product @ steps[t - 1]
        assert torch.allclose(transitions.cumulative(t), product, rtol=1e-11, atol=1e-14)
        assert torch.allclose(transitions.dense(t).sum(-1), torch.ones(K), rtol=1e-14)


def test_rows_columns_and_marginals_are_those_of_the_matrices(kind):
    transitions, _ = kind
    x, t = torch.randint(K, (7, 3)), torch.randint(1, T + 1, (7, 1))
    for i, j in np.ndindex(7, 3):
        state, step = int(x[i, j]), int(t[i, 0])
        q, qbar = transitions.dense(step), transitions.cumulative(step)
        assert torch.allclose(transitions.log_transition(x, t)[i, j].exp(), q[state], rtol=1e-13)
        assert torch.allclose(transitions.log_marginal(x, t)[i, j].exp(), qbar[state], rtol=1e-13)
        column = transitions.log_column(x, t)[i, j].exp()
        if float(q[:, state].sum()) > 0:  # up to a constant, as promised; at beta = 1 it is that of the limit
            assert torch.allclose(column / column.sum(), q[:, state] / q[:, state].sum(), rtol=1e-12)


def test_propagation_against_the_matrix_product_in_value_and_gradient(kind):
    transitions, _ = kind
    logits = torch.randn(7, 3, K, requires_grad=True)
    t, weight = torch.randint(0, T + 1, (7, 1)), torch.rand(7, 3, K)
    result = transitions.log_propagate(logits.log_softmax(-1), t).exp()
    qbar = torch.stack([transitions.cumulative(int(s)) for s in t])
    expected = logits.softmax(-1) @ qbar
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-15)
    for value in (result, expected):
        assert value.requires_grad
    (actual_gradient,) = torch.autograd.grad((weight * result).sum(), logits)
    (gradient,) = torch.autograd.grad((weight * expected).sum(), logits)
    assert torch.allclose(actual_gradient, gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (7, 1, 1), (2, 1, 1, 1), (7, 3, 4)])
def test_propagation_broadcasts_t(kind, shape):
    transitions, _ = kind
    log_p = torch.randn(2, 7, 3, 4, K).log_softmax(-1)
    t = torch.randint(0, T + 1, shape)
    if shape == (7,):
        t = t[:, None, None]
    result = transitions.log_propagate(log_p, t)
    full = transitions.log_propagate(log_p, t.expand(2, 7, 3, 4).clone())
    assert torch.allclose(result, full, rtol=1e-12)


def test_stationary_law_is_left_alone_and_reached(kind):
    transitions, steps = kind
    for step in steps:
        assert torch.allclose(transitions.stationary @ step, transitions.stationary, atol=1e-14)
    distances = [(transitions.cumulative(t) - transitions.stationary).abs().sum(-1).max() for t in range(T + 1)]
    assert all(b <= a + 1e-14 for a, b in itertools.pairwise(distances))
    assert distances[-1] < distances[0]


def test_schedules_of_the_paper():
    kept = torch.cumprod(1 - betas("cosine", 1000), 0)
    t = torch.arange(1, 1001) / 1000
    cosine = torch.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    assert torch.allclose(kept[:-1], cosine[:-1], rtol=1e-9)
    assert float(betas("cosine", 1000)[-1]) == 0.999
    masked = torch.stack([absorbing(4, 50).cumulative(t)[0, 3] for t in range(51)])
    assert torch.allclose(masked, torch.arange(51) / 50, atol=1e-14)  # exactly t/T
    linear = betas("linear", 1000)
    assert (float(linear[0]), float(linear[-1])) == (pytest.approx(1e-4), pytest.approx(0.02))


def test_mutual_information_falls_linearly():
    n = 40
    transitions = nearest_neighbour(torch.randn(9, 2), n, 3)
    for t in (1, 10, 25, 39, 40):
        q = transitions.cumulative(t)
        information = float((q * (q * 9).log()).sum() / 9)
        assert information == pytest.approx((1 - 0.999 * t / n) * math.log(9), rel=1e-6)


def test_logarithms_hold_where_probabilities_do_not():
    """Two Gaussian steps from one end to the other, in 60 digits: about 1e-500, far below the smallest float64."""
    getcontext().prec = 60
    classes, beta = 3, 0.003
    transitions = discretized_gaussian(classes, 2, [beta, beta])
    e = [(Decimal(-4 * n * n) / (Decimal(4) * Decimal(beta))).exp() for n in range(classes)]
    total = e[0] + 2 * e[1] + 2 * e[2]
    q = [[e[abs(i - j)] / total for j in range(classes)] for i in range(classes)]
    for i in range(classes):
        q[i][i] = 1 - sum(q[i][j] for j in range(classes) if j != i)
    two = [[sum(q[i][k] * q[k][j] for k in range(classes)) for j in range(classes)] for i in range(classes)]
    exact = torch.tensor([[float(v.ln()) for v in row] for row in two])
    actual = transitions.log_marginal(torch.arange(3), torch.tensor(2))
    assert torch.allclose(actual, exact, rtol=1e-12, atol=1e-250)
    assert float(exact.min()) < -600
    naive = transitions.dense(1) @ transitions.dense(2)
    assert 0 < float(naive[0, 2]) < 1e-280 or float(naive[0, 2]) == 0  # what a product of matrices makes of it


def test_log_matmul_in_the_deep():
    a, b = -1000 * torch.rand(6, 6), -1000 * torch.rand(6, 6)
    exact = (a[:, :, None] + b).logsumexp(1)
    assert torch.allclose(log_matmul(a, b), exact, rtol=1e-12)
    assert not torch.isfinite((a.exp() @ b.exp()).log()).all()
    impossible = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    assert torch.equal(log_matmul(impossible, impossible), impossible)


@pytest.mark.parametrize("distance", [20, 33, 40, 60])
def test_propagation_of_a_sharp_law_is_the_sum_in_log_space(distance):
    transitions = discretized_gaussian(256, 3, [1e-4] * 3)
    log_p = torch.full((256,), -5000.0, dtype=torch.float64)
    log_p[100 + distance] = 0.0
    log_p = log_p.log_softmax(-1)
    found = transitions.log_propagate(log_p[None], torch.tensor([1]))[0]
    log_q = transitions.log_marginal(torch.arange(256), torch.full((256,), 1), torch.float64)
    expected = (log_p[:, None] + log_q).logsumexp(0)
    near = expected > -4900  # beyond, all other classes together weigh as much
    assert near.sum() > 80
    assert torch.allclose(found[near], expected[near], rtol=1e-9)
    assert ((found - expected).abs()[~near] < math.log(3)).all()
    if expected[100] < math.log(1e-280):  # what would be left without the likeliest class
        assert log_p[100] + log_q[100, 100] < 2 * expected[100]


def test_a_permutation_carries_a_sharp_law_on():
    cycle = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    transitions = DenseTransitions(torch.stack([cycle, cycle, torch.full((3, 3), 1 / 3, dtype=torch.float64)]))
    x_t, x_0, logits = torch.tensor([0]), torch.tensor([1]), torch.tensor([[600.0, 0.0, 0.0]], dtype=torch.float64)
    losses = [transitions.step_losses(x_t, x_0, logits, torch.tensor([t]))[0].item() for t in (2, 3)]
    assert losses == pytest.approx([0.0, 600.0])


def test_log_add_exp_has_finite_gradients_where_both_are_impossible():
    a = torch.tensor([-torch.inf, 0.0, -torch.inf, -1e4], requires_grad=True)
    b = torch.tensor([-torch.inf, -torch.inf, 2.0, -1e4])
    result = log_add_exp(a, b)
    assert torch.allclose(result, torch.tensor([-torch.inf, 0.0, 2.0, math.log(2) - 1e4]))
    (gradient,) = torch.autograd.grad(result[1:].sum() + torch.where(b > 0, result, 0.0).sum(), a)
    assert torch.allclose(gradient, torch.tensor([0.0, 1.0, 0.0, 0.5]))
    (naive,) = torch.autograd.grad(torch.logaddexp(a, b).sum(), a)
    assert naive.isnan().any()


@pytest.mark.parametrize("kind_name", ["uniform", "absorbing", "gaussian"])
def test_extreme_logits_stay_finite_in_float32(kind_name):
    """Logits 1e4 apart, at every t: finite values, finite gradients."""
    build = {"uniform": uniform, "absorbing": absorbing, "gaussian": discretized_gaussian}[kind_name]
    transitions = build(8, 1000).float()
    logits = torch.full((1000, 8), -1e4, dtype=torch.float32)
    logits[:, 2] = 0
    logits.requires_grad_()
    t = torch.arange(1000)
    result = transitions.log_propagate(logits.log_softmax(-1), t)
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    (gradient,) = torch.autograd.grad(result.sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("build", [uniform, absorbing, discretized_gaussian])
def test_float32_against_float64(build):
    """The tables stay float64 through .half() and .float(): a law in float32 is the float64 law, rounded."""
    exact, rounded = build(17, 1000), build(17, 1000).half().to(torch.float32)
    x, t = torch.randint(17, (400,)), torch.randint(1, 1001, (400,))
    for method in ("log_transition", "log_column", "log_marginal"):
        a, b = getattr(exact, method)(x, t), getattr(rounded, method)(x, t)
        assert (a.dtype, b.dtype) == (torch.float64, torch.float32)
        assert torch.allclose(b.double(), a, rtol=1e-6, atol=1e-10)
    assert all(v.dtype == torch.float64 for k, v in rounded._buffers.items() if k != "_reference")
    assert build(17, 4).half().dtype == torch.float32  # laws are never in half precision


@pytest.mark.parametrize("build", [uniform, absorbing])
def test_a_vocabulary_needs_no_matrix(build):
    """K = 32,000: 8 GB for one dense matrix in float64; here rows only."""
    transitions = build(32_000, 1000)
    assert sum(v.numel() for v in transitions._buffers.values()) < 40_000
    x, t = torch.randint(31_999, (2, 3)), torch.tensor([[1], [700]])
    assert torch.allclose(transitions.log_marginal(x, t).logsumexp(-1), torch.zeros(2, 3), atol=1e-10)
    assert transitions.log_propagate(torch.randn(2, 3, 32_000).log_softmax(-1), t).shape == (2, 3, 32_000)


def test_rows_sum_to_one_in_large_alphabets_and_small_steps():
    """The Gaussian diagonal is a sum of positive terms: 1 - sum would leave no digit of log Q_ii."""
    transitions = discretized_gaussian(64, 3, [1e-7, 1e-4, 50.0])
    for t in (1, 2, 3):
        assert torch.allclose(transitions.dense(t).sum(-1), torch.ones(64), rtol=1e-14)
    assert float(transitions.log_transition(torch.tensor(0), torch.tensor(1))[0]) == 0
    assert float(transitions.log_transition(torch.tensor(5), torch.tensor(2)).min()) < -20_000


def test_wrong_matrices_are_told_apart():
    """Twins of the identity tests: transposed, and with the factors of a product in the wrong order."""
    transitions = absorbing(K, T, SOME)
    assert not torch.allclose(transitions.dense(2).T, torch.as_tensor(absorbing_matrices(K, SOME))[1], atol=0.05)
    reordered = absorbing(K, T, [0.2, 0.05, *SOME[2:]])
    assert not torch.allclose(reordered.cumulative(1), transitions.cumulative(1), atol=0.05)
    not_cosine = torch.cumprod(1 - betas("cosine", 100), 0).square()
    assert not torch.allclose(not_cosine, torch.cumprod(1 - betas("cosine", 100), 0), atol=0.05)


def test_config_rebuilds():
    for build, _ in KINDS.values():
        first = build()
        again = type(first)(**{k: _tensor(v) for k, v in first.config().items()})
        assert torch.allclose(again.cumulative(T), first.cumulative(T), rtol=1e-13)


def _same_tables(a: Transitions, b: Transitions) -> bool:
    return all(torch.equal(a._buffers[name].nan_to_num(9), b._buffers[name].nan_to_num(9)) for name in a._buffers)


def test_dense_transitions_take_what_their_config_gives():
    """Tensors, arrays, nested lists, lists of matrices: the same tables to the last bit, also from JSON."""
    matrices = np.random.default_rng(0).dirichlet(np.ones(3), size=(3,))
    chain = torch.as_tensor(np.stack([matrices, matrices @ matrices]))
    law = torch.linalg.matrix_power(chain[0], 200)[0]
    first = DenseTransitions(chain, law)
    for given, stationary in [
        (chain.tolist(), law.tolist()),
        (chain.numpy(), law.numpy()),
        (list(chain), tuple(law)),
        (tuple(chain.numpy()), law.tolist()),
    ]:
        assert _same_tables(DenseTransitions(given, stationary), first)
    again = registry.build(json.loads(json.dumps(registry.describe(first))))
    assert _same_tables(again, first)
    assert again.config() == first.config()
    assert not _same_tables(DenseTransitions(chain.flip(0), law), first)
    rounded = DenseTransitions(chain.float().tolist(), law.tolist())
    assert not _same_tables(rounded, first)
    uniform_law = DenseTransitions([[[0.9, 0.1], [0.1, 0.9]]], [0.5, 0.5])
    assert _same_tables(uniform_law, DenseTransitions(torch.tensor([[[0.9, 0.1], [0.1, 0.9]]])))


def test_dense_transitions_keep_what_they_were_given():
    """A change of the caller's tensor afterwards changes neither tables nor config."""
    matrices = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]])
    transitions = DenseTransitions(matrices)
    matrices.fill_(0.5)
    assert transitions.config()["matrices"] == [[[0.9, 0.1], [0.1, 0.9]]]
    assert transitions.dense(1)[0, 0] == 0.9


def test_a_nan_is_not_an_impossible_event(kind):
    """NaN in, NaN out, where an impossible class is minus infinity."""
    transitions, _ = kind
    t = torch.arange(T)
    assert transitions.log_propagate(torch.full((T, K), torch.nan), t).isnan().all()
    point = torch.tensor([0.0, *[-torch.inf] * (K - 1)]).expand(T, K)
    assert not transitions.log_propagate(point, t).isnan().any()
    assert log_add_exp(torch.tensor(torch.nan), torch.tensor(-torch.inf)).isnan()
    assert log_add_exp(torch.tensor(-torch.inf), torch.tensor(-torch.inf)) == -torch.inf


def _tensor(value: object) -> object:
    return torch.tensor(value) if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: uniform(1, 5), "num_classes to be an int >= 2, got 1"),
        (lambda: uniform(3, 0), "num_timesteps to be an int >= 1, got 0"),
        (lambda: uniform(3, 2.0), "num_timesteps to be an int >= 1, got 2.0"),
        (lambda: uniform(3, 2, "cubic"), "among cosine, linear, reciprocal, or T numbers, got 'cubic'"),
        (lambda: uniform(3, 2, [0.1]), r"each of the 2 steps, got shape \[1\]"),
        (lambda: uniform(3, 2, [0.1, 0.0]), r"beta_t in \(0, 1\], got 0 at step 2"),
        (lambda: uniform(3, 2, [1.1, 0.5]), r"beta_t in \(0, 1\], got 1.1 at step 1"),
        (lambda: uniform(3, 2, [math.nan, 0.5]), "got nan at step 1"),
        (lambda: uniform(3, 10, "linear"), "got 1.11556 at step 6"),
        (lambda: absorbing(3, 2, [0.5, 0.5]), "probability 0.25: .* L_T = .* would be infinite"),
        (lambda: absorbing(3, 100, "cosine"), "infinite; let beta_T = 1"),
        (lambda: absorbing(3, 400, [0.9] * 400), r"x_0 with probability e\^-921: .* would be infinite"),
        (lambda: discretized_gaussian(3, 2, [0.5, -1.0]), "beta_t > 0 and finite, got -1 at step 2"),
        (lambda: discretized_gaussian(32_000, 10), "K = 32000: use uniform or absorbing"),
        (lambda: nearest_neighbour(torch.zeros(3), 4), r"shape \[K, d\], K >= 2, got shape \[3\]"),
        (lambda: nearest_neighbour(POINTS, 4, 5), r"num_neighbours in 1..4, .* got 5"),
        (lambda: nearest_neighbour(POINTS, 4, 1.5), "num_neighbours to be an int >= 1, got 1.5"),
        (lambda: nearest_neighbour(POINTS, 4, 0), "num_neighbours to be an int >= 1, got 0"),
        (lambda: nearest_neighbour([[0.0], [0.1], [9.0], [9.1]], 4, 1), "fall into 2 groups .* above 1"),
        (lambda: nearest_neighbour(POINTS, 4, 2, "cosine"), "mutual_information"),
        (lambda: nearest_neighbour(POINTS, 1, 2, [0.0]), "alpha_t > 0 and finite, got 0 at step 1"),
        (
            lambda: DenseTransitions([[[1.0], [0.5, 0.5]]]),
            r"matrices as a tensor or as \(nested\) sequences of numbers",
        ),
        (lambda: DenseTransitions([torch.eye(2), torch.eye(3)]), "matrices as a tensor or as .* of one length"),
        (lambda: DenseTransitions(torch.eye(2)[None], ["a", "b"]), "stationary as a tensor or as .* of numbers"),
        (lambda: DenseTransitions(torch.eye(2)[None] + 0j), "complex numbers are no probabilities"),
        (lambda: DenseTransitions(torch.ones(2, 3)), r"shape \[T, K, K\], got \[2, 3\]"),
        (lambda: DenseTransitions(torch.tensor([[[0.9, 0.2], [0.1, 0.8]]])), "row 0 of Q_1 .* sum is 1.1"),
        (lambda: DenseTransitions(torch.tensor([[[1.2, -0.2], [0.1, 0.9]]])), "row 0 of Q_1"),
        (lambda: DenseTransitions(torch.tensor([[[0.9, 0.1], [0.5, 0.5]]])), "step 1 moves it by"),
        (
            lambda: DenseTransitions(HALF_ABSORBED, torch.tensor([0.0, 1.0])),
            r"from x_0 = 0 it reaches .* would be infinite",
        ),
        (lambda: DenseTransitions(HALF_ABSORBED, torch.tensor([0.0, 1.0, 0.0])), r"law of shape \[2\], got \[3\]"),
        (lambda: DenseTransitions(HALF_ABSORBED, torch.tensor([0.0, torch.nan])), "step 1 moves it by nan"),
        (lambda: DenseTransitions(torch.eye(2)[None], torch.tensor([-0.5, 1.5])), "a stationary law of probabilities"),
        (lambda: uniform(3, 5).dense(0), "t in 1..5, got 0"),
        (lambda: uniform(3, 5).cumulative(6), "t in 0..5, got 6"),
        (lambda: uniform(3, 5).log_transition(torch.tensor([3]), torch.tensor(1)), "x in 0..2, got 3"),
        (lambda: absorbing(3, 5).log_column(torch.tensor([-1]), torch.tensor(1)), "x in 0..2, got -1"),
        (lambda: discretized_gaussian(3, 5).log_marginal(torch.tensor([0]), torch.tensor(6)), "t in 0..5, got 6"),
        (lambda: uniform(3, 5).log_marginal(torch.tensor([0.0]), torch.tensor(1)), "x as int64, got torch.float64"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, match):
    with pytest.raises(ValueError, match=match):
        call()
