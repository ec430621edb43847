"""The categorical process: Bayes' rule, composition, and eq. 4 of arXiv:2107.03006, by sums over explicit matrices."""

import pytest
import scipy.stats
import torch

from ppl_models.processes.categorical import CategoricalProcess
from ppl_models.processes.dense_transitions import discretized_gaussian
from ppl_models.processes.neighbour_transitions import nearest_neighbour
from ppl_models.processes.structured_transitions import absorbing, uniform

K, T = 4, 5
KINDS = {
    "uniform": lambda: uniform(K, T),
    "absorbing": lambda: absorbing(K, T),
    "gaussian": lambda: discretized_gaussian(K, T),
    "neighbours": lambda: nearest_neighbour(torch.tensor([[0.0], [1.0], [2.5], [3.0]]), T, 2),
}
STATES = torch.arange(K)


@pytest.fixture(params=KINDS, ids=str)
def process(request) -> CategoricalProcess:
    return CategoricalProcess(KINDS[request.param](), data_shape=())


def _probs(law) -> torch.Tensor:
    return law.base_dist.probs if hasattr(law, "base_dist") else law.probs


def test_marginal_composes_transitions(process):
    """q(x_t | x_0) = sum over x_{t-1} of q(x_t | x_{t-1}) q(x_{t-1} | x_0)."""
    for t in range(2, T + 1):
        before = _probs(process.marginal(STATES, torch.tensor(t - 1)))
        step = _probs(process.transition(STATES, torch.tensor(t)))
        assert torch.allclose(_probs(process.marginal(STATES, torch.tensor(t))), before @ step, rtol=1e-12, atol=1e-15)


def test_posterior_is_bayes_rule(process):
    """q(x_{t-1} | x_t, x_0) q(x_t | x_0) = q(x_t | x_{t-1}) q(x_{t-1} | x_0), each side from its own methods."""
    for t in range(2, T + 1):
        before = _probs(process.marginal(STATES, torch.tensor(t - 1)))
        step = _probs(process.transition(STATES, torch.tensor(t)))
        after = _probs(process.marginal(STATES, torch.tensor(t)))
        x_0, x_t = (after > 0).nonzero(as_tuple=True)
        posterior = _probs(process.posterior(x_t, x_0, torch.tensor(t)))
        left = posterior * after[x_0, x_t][:, None]
        right = step[:, x_t].T * before[x_0]
        assert torch.allclose(left, right, rtol=1e-11, atol=1e-15)
        wrong = step[x_t] * before[x_0]  # the row where the column is meant
        if not torch.allclose(step, step.T):
            assert not torch.allclose(left, wrong, atol=1e-3)


def test_posterior_at_one_is_the_datum(process):
    x_0 = torch.arange(K - 1)
    law = process.posterior(x_0, x_0, torch.tensor(1))
    assert torch.allclose(_probs(law), torch.eye(K)[:-1])


def test_reverse_logits_against_the_sum_over_x_0(process):
    """Eq. 4 by loops; the twin with q(x_{t-1} | x_t, x_0) for q(x_{t-1}, x_t | x_0) is another law."""
    logits = torch.randn(K, K, requires_grad=True)
    differs = False
    for t in range(2, T + 1):
        q, before = process.transitions.dense(t), process.transitions.cumulative(t - 1)
        after, p = process.transitions.cumulative(t), logits.softmax(-1)
        reachable = (after[:-1] > 0).any(0).nonzero()[:, 0]
        actual = process.posterior_logits(reachable, logits[reachable], torch.tensor(t)).softmax(-1)
        rows, twins = [], []
        for s in reachable.tolist():
            joint = torch.stack([sum(p[s, k] * before[k, j] * q[j, s] for k in range(K)) for j in range(K)])
            each = [p[s, k] * before[k] * q[:, s] / after[k, s] for k in range(K) if after[k, s] > 0]
            rows.append(joint / joint.sum())
            twins.append(sum(each) / sum(each).sum())
        expected = torch.stack(rows)
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-14)
        weight = torch.rand_like(expected)
        (a,) = torch.autograd.grad((actual * weight).sum(), logits, retain_graph=True)
        (b,) = torch.autograd.grad((expected * weight).sum(), logits, retain_graph=True)
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)
        differs |= not torch.allclose(actual, torch.stack(twins), atol=1e-3)
    assert differs


def test_posterior_logits_of_a_known_x_0_are_the_posterior(process):
    """With all mass on one x_0 the reverse law is q(x_{t-1} | x_t, x_0)."""
    for t in range(2, T + 1):
        after = _probs(process.marginal(STATES, torch.tensor(t)))
        x_0, x_t = (after > 0).nonzero(as_tuple=True)
        point = torch.where(x_0[:, None] == STATES, 0.0, -torch.inf)
        actual = process.posterior_logits(x_t, point, torch.tensor(t)).softmax(-1)
        assert torch.allclose(actual, _probs(process.posterior(x_t, x_0, torch.tensor(t))), rtol=1e-12, atol=1e-15)


def test_nan_logits_stay_nan(process):
    """Of the one entry whose logits hold a NaN; its neighbour, with an impossible class, has a law."""
    logits = torch.tensor([[0.0, torch.nan, 0.0, 0.0], [0.0, -torch.inf, 0.0, -torch.inf]])
    for t in range(2, T + 1):
        actual = process.posterior_logits(torch.tensor([K - 1, K - 1]), logits, torch.tensor(t))
        assert actual[0].isnan().all()
        assert not actual[1].isnan().any()
        assert actual[1].softmax(-1).isfinite().all()


def test_prior_is_what_the_last_marginal_nearly_is():
    for build in (uniform, absorbing):
        process = CategoricalProcess(build(K, 200), data_shape=(3,))
        prior, last = process.prior(), process.marginal(torch.zeros(3, dtype=torch.long), torch.tensor(200))
        assert (prior.batch_shape, prior.event_shape) == (torch.Size(), torch.Size([3]))
        assert torch.allclose(_probs(prior), _probs(last), atol=1e-4)
    early = CategoricalProcess(uniform(K, 200), data_shape=(3,)).marginal(
        torch.zeros(3, dtype=torch.long), torch.tensor(50)
    )
    assert not torch.allclose(_probs(prior), _probs(early), atol=1e-1)


@pytest.mark.parametrize(("particles", "batch", "data_shape"), [((), (5,), (2, 3)), ((4,), (5,), (6,)), ((), (5,), ())])
def test_laws_have_batch_and_event_shapes_and_dtype(particles, batch, data_shape):
    process = CategoricalProcess(uniform(K, T), data_shape)
    x = torch.randint(K, (*particles, *batch, *data_shape))
    for t in (torch.tensor(3), torch.randint(1, T + 1, batch), torch.randint(1, T + 1, (*particles, *batch))):
        for law in (process.transition(x, t), process.marginal(x, t), process.posterior(x, x, t)):
            assert (law.batch_shape, law.event_shape) == ((*particles, *batch), data_shape)
            draw = law.sample()
            assert draw.dtype == torch.int64
            assert law.log_prob(draw).dtype == torch.float64
        logits = torch.randn(*particles, *batch, *data_shape, K, dtype=torch.float32)
        assert process.posterior_logits(x, logits, t).shape == logits.shape
    assert process.float().marginal(x, torch.tensor(1)).log_prob(x).dtype == torch.float32


def test_draws_have_the_law():
    """Frequencies of 40,000 draws by chi-square at 1e-6; against the law one step on they are refused."""
    process, n = CategoricalProcess(discretized_gaussian(K, T), data_shape=()), 40_000
    draws = process.marginal(torch.zeros(n, dtype=torch.long), torch.tensor(2)).sample()
    counts = torch.bincount(draws, minlength=K)
    limit = scipy.stats.chi2.isf(1e-6, K - 1)

    def statistic(t: int) -> float:
        expected = n * process.transitions.cumulative(t)[0]
        return float(((counts - expected).square() / expected).sum())

    assert statistic(2) < limit
    assert statistic(3) > limit


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda p: CategoricalProcess(torch.eye(2), ()), TypeError, "wrap matrices .* in DenseTransitions"),
        (lambda p: p.marginal(torch.zeros(2, 3), torch.tensor(1)), TypeError, "x as int64, got torch.float64"),
        (lambda p: p.marginal(torch.zeros(2, 3).long(), torch.tensor(1.0)), TypeError, "t as int64, got torch.float64"),
        (lambda p: p.marginal(torch.zeros(2, 3).long(), 2), TypeError, "t as an int64 tensor, got int: convert"),
        (lambda p: p.marginal([[0, 0, 0]], torch.tensor(1)), TypeError, "x as an int64 tensor, got list: convert"),
        *(
            (
                lambda p, s=s: p.posterior_logits(torch.zeros(2, 3).long(), torch.zeros(s), torch.tensor(2)),
                ValueError,
                m,
            )
            for s, m in (
                ((2, 3, 7), r"\[\*batch, 3, 4\], .* got \[2, 3, 7\]"),
                ((4,), r"\[\*batch, 3, 4\], .* got \[4\]"),
            )
        ),
        (
            lambda p: p.step_losses(*[torch.zeros(2, 3).long()] * 2, torch.zeros(2, 3, 7), torch.tensor(2)),
            ValueError,
            r"x_0_logits of shape \[\*batch, 3, 4\], .* got \[2, 3, 7\]",
        ),
        (lambda p: p.marginal(torch.zeros(2, 4).long(), torch.tensor(1)), ValueError, r"\[\*batch, 3\], got \[2, 4\]"),
        (lambda p: p.marginal(torch.full((2, 3), 4), torch.tensor(1)), ValueError, r"x in 0..3, got 4"),
        (lambda p: p.transition(torch.zeros(2, 3).long(), torch.tensor(0)), ValueError, r"t in 1..5, got 0"),
        (lambda p: p.posterior(*[torch.zeros(2, 3).long()] * 2, torch.tensor(6)), ValueError, r"t in 1..5, got 6"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, error, match):
    with pytest.raises(error, match=match):
        call(CategoricalProcess(uniform(K, T), data_shape=(3,)))
