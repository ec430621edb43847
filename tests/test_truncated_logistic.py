"""The closed forms of the truncated logistic against scipy and against all K classes, value and gradient."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn.functional import softplus

from ppl_models.truncated_logistic import TruncatedLogistic, _sum_log1p, _SumLog1p


def _law(classes: int, count: int = 300) -> tuple[torch.Tensor, TruncatedLogistic]:
    parameters = (torch.randn(count, 2) * torch.tensor([1.0, 3.0])).requires_grad_()
    return parameters, TruncatedLogistic(parameters, torch.randint(classes, (count,)), classes)


def test_one_class_against_the_distribution_function():
    classes = 7
    parameters, x_t, x = 0.5 * torch.randn(50, 2), torch.randint(classes, (50,)), torch.randint(classes, (50,))
    actual = TruncatedLogistic(parameters, x_t, classes).log_prob(x)
    v, h = np.linspace(-1, 1, classes), 1 / (classes - 1)
    location, log_scale = parameters.numpy().T
    law = scipy.stats.logistic(np.tanh(location + v[x_t]), np.exp(log_scale - 2))
    mass = law.cdf(v[x] + h) - law.cdf(v[x] - h)
    exact = mass / (law.cdf(1 + h) - law.cdf(-1 - h))
    assert np.allclose(actual.exp(), exact, rtol=1e-8, atol=1e-12)
    assert not np.allclose(actual.exp(), mass, rtol=1e-3, atol=1e-12)  # not cut: another law


@pytest.mark.parametrize("classes", [2, 17, 256])
def test_the_closed_forms_against_all_classes(classes):
    parameters, law = _law(classes)
    x, log_odds = torch.randint(classes, (300,)), 12 * torch.rand(300)
    log_p = law.logits().log_softmax(-1)
    pairs = (
        (law.log_prob(x), log_p.gather(-1, x[:, None])[:, 0]),
        (law.sum_log1p(log_odds), softplus(log_p + log_odds[:, None], threshold=40).sum(-1)),
    )
    for actual, expected in pairs:
        assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-10)
        found, exact = (torch.autograd.grad(v.sum(), parameters, retain_graph=True)[0] for v in (actual, expected))
        assert torch.allclose(found, exact, rtol=1e-7, atol=1e-9)
    unnormalised = law.logits().gather(-1, x[:, None])[:, 0]
    assert not torch.allclose(pairs[0][0], unnormalised, rtol=1e-3)


def test_a_flat_law_and_a_spike_stay_finite():
    parameters = torch.tensor([[0.0, 2000.0], [0.3, -9.0], [-30.0, -12.0]], requires_grad=True)
    law = TruncatedLogistic(parameters, torch.tensor([0, 3, 6]), 7)
    values = law.log_prob(torch.tensor([5, 0, 6])), law.sum_log1p(torch.tensor(20.0))
    assert float(values[0][0].detach().exp()) == pytest.approx(1 / 7)
    for value in values:
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), parameters, retain_graph=True)[0].isfinite().all()


def test_the_gradient_by_hand():
    """First and second derivatives by differences, arguments that broadcast, and pieces that do not divide the batch."""
    edges = torch.linspace(-1, 1, 5)
    arguments = [torch.randn(3, 4), torch.rand(4) + 0.5, torch.randn(3, 1)]
    for each in arguments:
        each.requires_grad_()

    def by_hand(*given):
        return _SumLog1p.apply(*given, edges + 0.2, 0.2 - edges)

    assert torch.autograd.gradcheck(by_hand, arguments)
    assert torch.autograd.gradgradcheck(by_hand, arguments)
    wrong = [arguments[0], arguments[1], arguments[2] + 0.1]
    assert not torch.allclose(by_hand(*arguments), by_hand(*wrong), rtol=1e-3)
    many = [torch.randn(5000), torch.rand(5000), torch.randn(5000)]
    edges = torch.linspace(-1, 1, 17)
    assert torch.allclose(by_hand(*many), _sum_log1p(*many, edges + 0.2, 0.2 - edges), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_classes", [2, 17, 256])
def test_a_scale_however_small_leaves_all_finite(num_classes, dtype):
    """Below log-scale -60 the law is a point, and stays the same point."""
    x_t = torch.tensor([num_classes // 2])
    found = []
    for log_scale in (-60.0, -90.0, -1e4):
        parameters = torch.tensor([[0.01, log_scale]], dtype=dtype, requires_grad=True)
        law = TruncatedLogistic(parameters, x_t, num_classes)
        value = law.log_prob(x_t) + law.sum_log1p(torch.zeros(1, dtype=dtype))
        (gradient,) = torch.autograd.grad(value.sum(), parameters)
        assert bool(value.isfinite().all())
        assert bool(gradient.isfinite().all())
        assert bool(law.logits().isfinite().all())
        found.append(value.detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    wider = TruncatedLogistic(torch.tensor([[0.01, -2.0]], dtype=dtype), x_t, num_classes).log_prob(x_t)
    assert not torch.equal(wider, found[0])
