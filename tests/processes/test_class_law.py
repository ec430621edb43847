"""The class law: draws by inversion have its law, and its divergence is finite where PyTorch's is not."""

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch.distributions import kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_models.processes.class_law import ClassLaw


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_the_law(dtype):
    """100,000 draws by chi-square at 1e-6; the twin is the law of its neighbour in the batch."""
    logits = torch.randn(2, 9, dtype=dtype)
    draws = ClassLaw(logits=logits).sample((100_000,))
    assert (draws.shape, draws.dtype) == ((100_000, 2), torch.int64)
    limit = scipy.stats.chi2.isf(1e-6, 8)
    p = logits.double().softmax(-1) * len(draws)
    counts = torch.stack([torch.bincount(draws[:, b], minlength=9) for b in range(2)])
    assert bool((((counts - p).square() / p).sum(-1) < limit).all())
    assert bool((((counts - p.flip(0)).square() / p.flip(0)).sum(-1) > limit).all())


def test_impossible_classes_are_never_drawn_and_the_last_is_never_passed():
    logits = torch.full((1000, 40), -torch.inf)
    logits[:, 3] = logits[:, 7] = 0.0
    assert set(ClassLaw(logits=logits).sample((200,)).unique().tolist()) == {3, 7}
    rows = torch.randn(2000, 257, dtype=torch.float32) * 30
    assert int(ClassLaw(logits=rows).sample((20,)).max()) <= 256


def test_divergence_is_that_of_torch_in_value_and_gradient():
    a, b = torch.randn(5, 3, 6, requires_grad=True), torch.randn(5, 3, 6, requires_grad=True)
    weight = torch.rand(5)
    ours = kl_divergence(*[ClassLaw(logits=v).to_event(1) for v in (a, b)])
    torchs = kl_divergence(*[dist.Categorical(logits=v).to_event(1) for v in (a, b)])
    assert torch.allclose(ours, torchs, rtol=1e-12)
    gradients = [torch.autograd.grad((weight * kl).sum(), (a, b)) for kl in (ours, torchs)]
    for actual, expected in zip(*gradients, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(
        kl_divergence(ClassLaw(logits=b), ClassLaw(logits=a)), torchs[:, None], atol=1e-2
    )  # swapped


def test_divergence_survives_underflow():
    """log p = -105 at a class of q's: 1e-43 of the mass, which PyTorch's float32 divergence turns into infinity."""
    q = torch.tensor([[0.0, -102.0]], dtype=torch.float32)
    p = torch.tensor([[0.0, -105.0]], dtype=torch.float32, requires_grad=True)
    assert kl_divergence(dist.Categorical(logits=q), dist.Categorical(logits=p)).isinf().all()
    ours = kl_divergence(ClassLaw(logits=q), ClassLaw(logits=p))
    assert float(ours.detach()) == pytest.approx(0, abs=1e-30)
    (gradient,) = torch.autograd.grad(ours.sum(), p)
    assert gradient.isfinite().all()


def test_divergence_is_infinite_only_where_it_is():
    a = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf], [0.0, 0.0, -torch.inf]])
    b = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf], [0.0, -torch.inf, 0.0]])
    kl = kl_divergence(ClassLaw(logits=a), ClassLaw(logits=b))
    assert torch.allclose(kl, torch.tensor([1.5, 2.0, torch.inf]).log().where(torch.arange(3) < 2, torch.inf))


def test_expands_and_traces():
    law = ClassLaw(logits=torch.randn(3, 4))
    wide = law.expand((5, 3))
    assert isinstance(wide, ClassLaw)
    assert torch.allclose(wide.logits, law.logits.expand(5, 3, 4))
    assert wide.to_event(1).sample((2,)).shape == (2, 5, 3)
    graph = make_fx(lambda logits: ClassLaw(logits=logits, validate_args=False).sample())(torch.randn(3, 4))
    assert graph(torch.full((3, 4), -torch.inf).fill_diagonal_(0.0)).tolist() == [0, 1, 2]
