"""Finite Markov chains against closed forms, exact rational arithmetic, brute force and their own simulation."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro import poutine

from ppl_models.processes.markov_chain import MarkovChain
from ppl_models.processes.structured_transitions import absorbing, uniform


def _random(k: int, seed: int = 0) -> torch.Tensor:
    matrix = np.random.default_rng(seed).dirichlet(np.ones(k), size=k).T
    return torch.as_tensor(matrix)


def _cycle(k: int) -> torch.Tensor:
    return torch.eye(k).roll(1, 0)


def test_two_states_in_closed_form():
    """T = [[1-a, b], [a, 1-b]]: pi = (b, a)/(a+b), second eigenvalue 1-a-b, distance max(a, b)/(a+b) |1-a-b|^t."""
    a, b = 0.1, 0.35
    chain = MarkovChain(torch.tensor([[1 - a, b], [a, 1 - b]]))
    assert torch.allclose(chain.stationary, torch.tensor([b, a]) / (a + b), rtol=1e-14)
    assert torch.allclose(chain.eigenvalues, torch.tensor([1.0, 1 - a - b]).to(torch.complex128), rtol=1e-14)
    for t in range(6):
        assert float(chain.distance(t)) == pytest.approx(max(a, b) / (a + b) * abs(1 - a - b) ** t, rel=1e-12)
    exact = math.ceil(math.log(0.01 * (a + b) / max(a, b)) / math.log(1 - a - b))
    assert chain.mixing_time(0.01) == exact


def test_columns_are_laws_of_the_next_state():
    """P(t+1) = T P(t) by the sum of notes 000; with rows for columns the same sum gives another law."""
    matrix, p = _random(4), torch.tensor([0.1, 0.2, 0.3, 0.4])
    by_hand = torch.tensor([sum(float(matrix[i, j] * p[j]) for j in range(4)) for i in range(4)])
    chain = MarkovChain(matrix)
    assert torch.allclose(chain.propagate(p), by_hand, rtol=1e-14)
    assert not torch.allclose(matrix.T @ p, by_hand, atol=1e-2)
    assert torch.allclose(chain.propagate(p, 3), chain.propagate(chain.propagate(chain.propagate(p))), rtol=1e-13)
    assert torch.equal(chain.propagate(p, 0), p)


@pytest.mark.parametrize("k", [1, 2, 5, 30])
def test_stationary_law_and_spectrum_against_numpy(k):
    matrix = _random(k)
    chain = MarkovChain(matrix)
    values, vectors = np.linalg.eig(matrix.numpy())
    leading = np.real(vectors[:, np.argmax(values.real)])
    assert np.allclose(chain.stationary.numpy(), leading / leading.sum(), rtol=1e-10)
    assert abs(complex(chain.eigenvalues[0]) - 1) < 1e-12
    assert np.allclose(np.sort(np.abs(values)), np.sort(chain.eigenvalues.abs().numpy()), atol=1e-10)
    assert bool((chain.eigenvalues.abs() <= 1 + 1e-12).all())


def test_stationary_law_is_exact_to_rounding_where_an_eigensolver_is_not():
    """Two pairs of states linked by steps of 1e-13: the balance between the pairs is 2 : 3 exactly."""
    e = Fraction(1, 2**43)
    rows = [
        [Fraction(1, 2) - 3 * e, Fraction(1, 2), 3 * e, 0],
        [Fraction(1, 2), Fraction(1, 2), 0, 0],
        [2 * e, 0, Fraction(1, 2) - 2 * e, Fraction(1, 2)],
        [0, 0, Fraction(1, 2), Fraction(1, 2)],
    ]
    matrix = torch.tensor([[float(v) for v in row] for row in rows]).T
    expected = torch.tensor([0.2, 0.2, 0.3, 0.3])  # detailed balance: 2 * 3e = 3 * 2e
    assert torch.allclose(MarkovChain(matrix).stationary, expected, rtol=1e-12)
    values, vectors = np.linalg.eig(matrix.numpy())
    leading = np.real(vectors[:, np.argmax(values.real)])
    assert not np.allclose(leading / leading.sum(), expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_a_cycle_is_periodic_and_a_loop_in_it_makes_it_aperiodic(k):
    chain = MarkovChain(_cycle(k))
    assert chain.periods == (k,)
    assert not chain.forgets
    assert f"periodic with period {k}" in chain.describe()
    assert torch.allclose(chain.stationary, torch.full((k,), 1 / k))  # there is one, but no start tends to it
    with pytest.raises(ValueError, match="no mixing time"):
        chain.mixing_time()
    loop = _cycle(k)
    loop[:, 0] = 0.5 * loop[:, 0] + 0.5 * torch.eye(k)[:, 0]
    assert MarkovChain(loop).periods == (1,)
    assert MarkovChain(loop).forgets


def test_period_is_the_gcd_of_the_cycle_lengths():
    """Cycles 0-1-2-3 and 0-1-2-3-4-5: gcd(4, 6) = 2."""
    matrix = torch.zeros(6, 6)
    for i, j in [(1, 0), (2, 1), (3, 2), (5, 4), (0, 5)]:
        matrix[i, j] = 1
    matrix[0, 3] = matrix[4, 3] = 0.5
    assert MarkovChain(matrix).periods == (2,)


def test_reducible_chains_say_so():
    ruin = MarkovChain(torch.tensor([[1.0, 0.4, 0.0], [0.0, 0.0, 0.0], [0.0, 0.6, 1.0]]))
    assert ruin.closed_classes == [(0,), (2,)]
    assert ruin.describe() == "reducible, with closed classes {0}, {2}: where it ends depends on where it starts"
    with pytest.raises(ValueError, match="one stationary law, but it is reducible, with closed classes"):
        _ = ruin.stationary
    trap = MarkovChain(torch.tensor([[0.5, 0.0], [0.5, 1.0]]))
    assert not trap.is_irreducible
    assert trap.forgets
    assert trap.stationary.tolist() == [0, 1]
    assert "the one closed class {1}" in trap.describe()


@pytest.mark.parametrize("epsilon", [0.9, 0.25, 1e-6])
def test_mixing_time_against_a_search_from_the_start(epsilon):
    matrix = 0.9 * torch.eye(5) + 0.1 * _random(5)
    chain = MarkovChain(matrix)
    power, t = torch.eye(5), 0
    while 0.5 * (power - chain.stationary[:, None]).abs().sum(0).max() > epsilon:
        power, t = matrix @ power, t + 1
    assert chain.mixing_time(epsilon) == t


def test_distance_never_rises():
    chain = MarkovChain(0.8 * torch.eye(4) + 0.2 * _random(4, seed=3))
    d = torch.stack([chain.distance(t) for t in range(30)])
    assert bool((d.diff() <= 1e-14).all())


def _two_state_power(a: float, b: float, t: int) -> list[list[mpmath.mpf]]:
    """T^t = pi 1' + (1-a-b)^t (I - pi 1') in 60 digits, entries (i, j)."""
    with mpmath.workdps(60):
        a, b = mpmath.mpf(a), mpmath.mpf(b)
        pi, left = (b / (a + b), a / (a + b)), (1 - a - b) ** t
        return [[pi[i] + left * ((i == j) - pi[i]) for j in range(2)] for i in range(2)]


@pytest.mark.parametrize("t", [10**3, 10**6, 10**9, 10**12, 10**15])
@pytest.mark.parametrize(("a", "b"), [(0.1, 0.35), (1e-9, 3e-10), (2e-12, 1e-6)])
def test_long_powers_do_not_drift(a, b, t):
    """Entry by entry against 60 digits, small ones too; the plain matrix power is the twin that drifts."""
    chain = MarkovChain(torch.tensor([[1 - a, b], [a, 1 - b]]))
    exact = torch.tensor([[float(v) for v in row] for row in _two_state_power(a, b, t)])
    assert torch.allclose(chain.power(t), exact, rtol=1e-13, atol=0)
    assert torch.allclose(chain.power(t).sum(0), torch.ones(2), rtol=1e-15)
    distance = float((exact - torch.tensor([[b], [a]]) / (a + b)).abs().sum(0).max() / 2)
    assert float(chain.distance(t)) == pytest.approx(distance, rel=1e-12, abs=1e-15)
    start = torch.tensor([0.25, 0.75])
    assert torch.allclose(chain.propagate(start, t), exact @ start, rtol=1e-13, atol=0)


def test_plain_powers_drift():
    """Twin of the test above."""
    reviewed = torch.tensor([[0.7, 0.1, 0.3], [0.2, 0.6, 0.3], [0.1, 0.3, 0.4]])
    chain, ones = MarkovChain(reviewed), torch.ones(3)
    for t in (10**9, 10**12):
        assert torch.allclose(chain.power(t).sum(0), ones, rtol=1e-15)
        assert not torch.allclose(torch.linalg.matrix_power(chain.matrix, t).sum(0), ones, rtol=1e-9)
    a, b = 1e-9, 3e-10
    plain = torch.linalg.matrix_power(torch.tensor([[1 - a, b], [a, 1 - b]]), 10**12)
    assert not torch.allclose(
        plain, torch.tensor([[float(v) for v in r] for r in _two_state_power(a, b, 10**12)]), rtol=1e-9
    )


def test_long_powers_of_nearly_separate_groups_against_exact_multiplication():
    """Four states, two by two, linked by steps of 1e-13: T^t in 60 digits, at times before and after the groups mix."""
    matrix = torch.tensor([[0.0, 0.5, 2e-13, 0.0], [0.3, 0.0, 0.0, 0.0], [0.0, 3e-13, 0.0, 0.7], [0.0, 0.0, 0.2, 0.0]])
    with mpmath.workdps(60):
        exact = mpmath.matrix(matrix.tolist())
        for j in range(4):
            exact[j, j] = 1 - sum(exact[i, j] for i in range(4))
        chain = MarkovChain(matrix + torch.diag(1 - matrix.sum(0)))
        for t in (7, 10**4, 10**11, 10**13):
            expected = torch.tensor([[float(v) for v in row] for row in (exact**t).tolist()])
            assert torch.allclose(chain.power(t), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("epsilon", "slack"), [(0.25, 0), (1e-8, 20)])
def test_mixing_time_of_a_slow_chain(epsilon, slack):
    """(1/2) (1 - 2e-9)^t = epsilon, to the step, or (1e-16 of rounding in a distance of 1e-8) within a few of 9e9."""
    with mpmath.workdps(60):
        exact = int(mpmath.ceil(mpmath.log(2 * mpmath.mpf(epsilon)) / mpmath.log1p(-2 * mpmath.mpf(1e-9))))
    chain = MarkovChain(torch.tensor([[1 - 1e-9, 1e-9], [1e-9, 1 - 1e-9]]))
    assert abs(chain.mixing_time(epsilon) - exact) <= slack
    rounded = 1 - (1 - 1e-9)  # the rate that the diagonal shows: 1e-9 to seven digits only
    assert abs(math.log(2 * epsilon) / math.log1p(-2 * rounded) - exact) > 1 + slack


def test_distance_never_rises_in_the_long_run():
    chain = MarkovChain(torch.tensor([[0.7, 0.1, 0.3], [0.2, 0.6, 0.3], [0.1, 0.3, 0.4]]))
    d = torch.stack([chain.distance(10**n) for n in range(16)])
    assert bool((d.diff() <= 1e-15).all())
    plain = [torch.linalg.matrix_power(chain.matrix, 10**n) - chain.stationary[:, None] for n in range(16)]
    assert not bool((torch.stack([0.5 * p.abs().sum(0).max() for p in plain]).diff() <= 1e-15).all())
    with pytest.raises(ValueError, match=r"distance to pi of 1e-30 within \d+ steps, got .*: raise epsilon"):
        chain.mixing_time(1e-30)


def test_program_scores_paths_exactly_and_draws_what_it_scores():
    matrix = torch.tensor([[0.5, 0.0, 0.2], [0.5, 0.3, 0.0], [0.0, 0.7, 0.8]])
    chain, initial = MarkovChain(matrix), torch.tensor([0.2, 0.5, 0.3])
    paths = torch.cartesian_prod(*[torch.arange(3)] * 3)  # all 27
    trace = poutine.trace(chain.model).get_trace(2, initial, paths)
    trace.compute_log_prob()
    log_prob = sum(trace.nodes[f"x_{t}"]["log_prob"] for t in range(3))
    by_hand = torch.tensor([float(initial[a] * matrix[b, a] * matrix[c, b]) for a, b, c in paths.tolist()])
    assert torch.allclose(log_prob.exp(), by_hand, rtol=1e-14)
    assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-14)
    assert bool((log_prob[by_hand == 0] == -torch.inf).all())  # impossible, not merely unlikely
    assert (by_hand == 0).any()

    draws = chain.model(2, initial, size=20_000)
    assert draws.shape == (20_000, 3)
    counts = torch.bincount(draws @ torch.tensor([9, 3, 1]), minlength=27)
    assert bool((counts[by_hand == 0] == 0).all())
    assert _chi_square(counts, by_hand) < _limit(by_hand)
    wrong = torch.tensor([float(initial[a] * matrix.T[b, a] * matrix.T[c, b]) for a, b, c in paths.tolist()])
    wrong = (wrong + 1e-3) / (wrong + 1e-3).sum()
    assert _chi_square(counts, wrong) > 2 * _limit(wrong)


def _chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p[p > 0] * counts.sum()
    return float(((counts[p > 0] - expected).square() / expected).sum())


def _limit(p: torch.Tensor) -> float:
    return float(scipy.stats.chi2.isf(1e-6, int((p > 0).sum()) - 1))


def _program(paths: object, size: int = 1) -> torch.Tensor:
    return MarkovChain(_random(2)).model(1, torch.tensor([1.0, 0]), paths, size)


def test_program_runs_under_particles():
    chain = MarkovChain(_random(3))
    with pyro.plate("particles", 7, dim=-2):
        assert chain.model(4, torch.full((3,), 1 / 3), size=5).shape == (7, 5, 5)


@pytest.mark.parametrize("transitions", [uniform(4, 6), absorbing(4, 6)], ids=["uniform", "absorbing"])
def test_steps_of_a_discrete_diffusion_are_instances(transitions):
    """The transpose of Q_t is a chain in the notes' convention, with the prior as its stationary law."""
    for t in range(1, 7):
        chain = MarkovChain(transitions.dense(t).T)
        assert torch.allclose(chain.stationary, transitions.stationary, atol=1e-14)
        assert chain.forgets
    with pytest.raises(ValueError, match="column 3 sums to"):
        MarkovChain(absorbing(4, 6).dense(2))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: MarkovChain([[1.0]]), TypeError, "tensor, got list"),
        (lambda: MarkovChain(torch.ones(2, 3)), ValueError, r"square matrix \[K, K\], got shape \[2, 3\]"),
        (lambda: MarkovChain(torch.tensor([[1.5, 0], [-0.5, 1]])), ValueError, r"entry \(1, 0\) is -0.5"),
        (lambda: MarkovChain(torch.tensor([[torch.nan, 0], [0, 1]])), ValueError, r"entry \(0, 0\) is nan"),
        (lambda: MarkovChain(torch.tensor([[0.9, 0.1], [0.5, 0.5]])), ValueError, "pass its transpose"),
        (lambda: MarkovChain(torch.tensor([[0.9, 0.1], [0.5, 0.1]])), ValueError, "normalise the columns"),
        (lambda: MarkovChain(torch.eye(2)).power(-1), ValueError, "t >= 0, got -1"),
        (lambda: MarkovChain(torch.eye(2)).power(0.5), ValueError, "whole number t >= 0, got 0.5"),
        (lambda: MarkovChain(torch.eye(2) + 0j), TypeError, "real probabilities, got torch.complex128"),
        (lambda: MarkovChain(_random(2)).propagate(torch.tensor([1.0, 0]) + 0j), TypeError, "real probabilities, got"),
        (lambda: _program(torch.tensor([0, 1])), ValueError, r"shape \[B, n \+ 1\], .* got \[2\]: .* paths\[None\]"),
        (lambda: _program(torch.zeros(0, 2).long()), ValueError, r"B >= 1, got \[0, 2\]"),
        (lambda: _program([[0, 1]]), TypeError, "paths as a tensor, got list: convert"),
        (lambda: _program(None, size=0), ValueError, "size >= 1, how many paths to draw, got 0"),
        (lambda: MarkovChain(_random(2)).mixing_time(0), ValueError, r"epsilon in \(0, 1\), got 0"),
        (lambda: MarkovChain(_random(2)).propagate(torch.tensor([0.5, 0.6])), ValueError, "sums from 1.1 to 1.1"),
        (lambda: MarkovChain(_random(2)).propagate(torch.tensor([1.0])), ValueError, r"got shape \[1\]"),
        (
            lambda: MarkovChain(_random(2)).model(3, torch.tensor([1.0, 0]), torch.zeros(5, 2, dtype=torch.long)),
            ValueError,
            "paths of 4 states, x_0 to x_3, got 2",
        ),
        (lambda: MarkovChain(_random(2)).model(-1, torch.tensor([1.0, 0])), ValueError, "num_steps >= 0, got -1"),
        (lambda: MarkovChain(_random(2)).model(1, torch.tensor([0.5, torch.nan])), ValueError, "summing to one"),
        *(
            (lambda path=path: _program(torch.tensor([path])), *refusal)
            for path, refusal in (
                ([2, 0], (ValueError, r"states in 0..1, got 2: recode")),
                ([0, 2], (ValueError, r"states in 0..1, got 2: recode")),
                ([-1, 0], (ValueError, r"states in 0..1, got -1: recode")),
                ([0.0, 1.0], (TypeError, r"paths of states \(int64\), got torch.float")),
            )
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_good_input_next_to_the_bad_is_taken():
    assert MarkovChain(torch.eye(2)).power(np.int64(3)).tolist() == [[1, 0], [0, 1]]
    assert _program(torch.tensor([[0, 1]])).tolist() == [[0, 1]]
    assert _program(None, size=2).shape == (2, 2)
