"""Autocasting in a compiled objective: networks in bfloat16, every log-density in float32, the numbers of the loss itself.

Both draw the same noise under the same casts, so that nothing here can fail by chance.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from inference import compile_objective, fit
from inference.training import stepping
from ppl_models import VAE
from ppl_models.likelihoods import Normal
from tests.cases import CASES

NAMES = [
    "vae-bernoulli",
    "hvae-bottom-up",
    "hvae-categorical-top-down",
    "ddpm-normal",
    "d3pm-uniform",
    "categorical-exact",
    "vq-vae",
]
ROUNDING = 2**-7  # of bfloat16: gradients of products are summed in another order


def run(objective, loss, x):
    """What ``step`` returns and the gradient of a weighted sum, on the draws of a seed; buffers are put back."""
    before = [buffer.clone() for buffer in loss.buffers()]
    torch.manual_seed(3)
    values = [leaf for leaf in tree_leaves(objective(x)) if isinstance(leaf, torch.Tensor)]
    total = sum(i * v.sum() for i, v in enumerate(values, 1))  # an objective and its terms would cancel
    gradients = torch.autograd.grad(total, list(loss.parameters()), allow_unused=True)
    for buffer, old in zip(loss.buffers(), before, strict=True):
        buffer.copy_(old)
    return [v.detach() for v in values], [g for g in gradients if g is not None]


def distance(found, expected):
    """The largest difference of two lists of tensors, on the scale of the largest of the second."""
    scale = max(float(t.double().abs().max()) for t in expected) + 1e-30
    return max(float((a - b).double().abs().max()) / scale for a, b in zip(found, expected, strict=True))


@pytest.fixture
def single():
    torch.set_default_dtype(torch.float32)  # conftest puts float64 back


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("name", NAMES)
def test_casts_are_the_loss_s_own_and_log_densities_are_float32(name):
    pair = CASES[name].build()
    x = CASES[name].data(pair)
    loss = CASES[name].objective(pair)
    with torch.autocast("cpu", torch.bfloat16):
        fast = compile_objective(loss, x, method="step", backend="eager")
        found, expected = run(fast, loss, x), run(loss.step, loss, x)
    assert distance(found[0], expected[0]) < 1e-5
    assert distance(found[1], expected[1]) < ROUNDING
    assert all(value.dtype == torch.float32 for value in found[0] if value.is_floating_point())
    assert all(gradient.dtype == torch.float32 for gradient in found[1])
    graph = next(iter(fast._graphs.values())).graph.forward.graph
    dtypes = {node.meta["val"].dtype for node in graph.nodes if getattr(node.meta.get("val"), "dtype", None)}
    assert torch.bfloat16 in dtypes, "the networks run in half precision"
    assert distance(found[0], run(loss.step, loss, x)[0]) > 3e-5, "the twin: without casts"
    assert distance([1.1 * g for g in found[1]], expected[1]) > ROUNDING


@pytest.mark.slow
@pytest.mark.usefixtures("single")
def test_the_compiler_keeps_the_casts():
    """Inductor rounds to bfloat16 less often than eager torch does."""
    pair = CASES["vae-bernoulli"].build()
    x, loss = CASES["vae-bernoulli"].data(pair), CASES["vae-bernoulli"].objective(pair)
    with torch.autocast("cpu", torch.bfloat16):
        fast = compile_objective(loss, x)
        found, expected = run(fast, loss, x), run(loss, loss, x)
    assert fast.history[-1].startswith("compiled")
    assert found[0][0].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 4 * ROUNDING
        assert distance([1.1 * t for t in a], b) > 4 * ROUNDING


def test_fit_in_mixed_precision_is_the_same_compiled(monkeypatch):
    monkeypatch.setattr(stepping, "BACKEND", "eager")
    x = torch.randn(20, 3, dtype=torch.float32)
    outcomes = []
    for precision, compile_ in (("bf16-mixed", "off"), ("bf16-mixed", "on"), ("32-true", "on")):
        torch.manual_seed(0)
        pair = VAE.preset((3,), Normal(scale=0.5), latent_dim=2, hidden=(4,))
        options = {"epochs": 2, "batch_size": 8, "progress": False, "gradient_clip": 1.0}
        outcomes.append(fit(pair, x, precision=precision, compile=compile_, **options).metrics)
    plain, cast, full = outcomes
    for row, other in zip(cast, plain, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    assert abs(full[-1]["train_elbo"] / cast[-1]["train_elbo"] - 1) > 1e-4, "the twin: without casts"
