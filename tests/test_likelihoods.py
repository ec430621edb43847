"""Likelihoods against scipy, their shapes under particles, and what they refuse."""

import json
import math

import numpy as np
import pyro
import pytest
import scipy.special
import scipy.stats
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_models.likelihoods import Bernoulli, Categorical, DiscretizedNormal, Likelihood, Normal

DATA_SHAPE = (2, 3)

LIKELIHOODS = {
    "normal": lambda: Normal(),
    "normal-learned": lambda: Normal(scale="learned", init_scale=0.7),
    "normal-decoder": lambda: Normal(scale=None),
    "bernoulli": lambda: Bernoulli(),
    "categorical": lambda: Categorical(num_classes=5),
    "discretized": lambda: DiscretizedNormal(levels=17),
    "discretized-fixed": lambda: DiscretizedNormal(levels=256, scale=0.2),
    "discretized-decoder": lambda: DiscretizedNormal(levels=4, scale=None),
}


@pytest.fixture(params=LIKELIHOODS.values(), ids=LIKELIHOODS.keys())
def likelihood(request):
    return request.param()


def decoder_output(likelihood, batch_shape, dtype=torch.float64):
    """Random parameters of the shape and kind that the likelihood asks of a decoder; locations well inside [-1, 1]."""
    classes = () if likelihood.num_classes is None else (likelihood.num_classes,)
    loc = 0.3 * torch.randn(*batch_shape, *DATA_SHAPE, *classes, dtype=dtype)
    return (loc, torch.rand_like(loc) + 0.3) if likelihood.needs_scale else loc


def densities(likelihood, parameters, x):
    """log p(x_i | parameters) per dimension by scipy, from the definitions."""
    loc, scale = parameters if likelihood.needs_scale else (parameters, getattr(likelihood, "scale", None))
    if scale == "learned":
        scale = likelihood.init_scale
    loc, x, scale = np.asarray(loc), np.asarray(x), np.asarray(scale)
    match likelihood:
        case Normal():
            return scipy.stats.norm.logpdf(x, loc, scale)
        case Bernoulli():
            return scipy.stats.bernoulli.logpmf(x, scipy.special.expit(loc))
        case Categorical():
            return np.take_along_axis(scipy.special.log_softmax(loc, -1), x[..., None], -1)[..., 0]
        case DiscretizedNormal():
            h = 1 / (likelihood.levels - 1)
            upper = np.where(x > 1 - h, 1.0, scipy.stats.norm.cdf(x + h, loc, scale))
            lower = np.where(x < -1 + h, 0.0, scipy.stats.norm.cdf(x - h, loc, scale))
            return np.log(upper - lower)


def test_log_prob_is_scipys_summed_over_one_datum(likelihood):
    parameters = decoder_output(likelihood, (7, 4))
    p = likelihood(parameters, len(DATA_SHAPE))
    x = p.sample()
    likelihood.check(x)
    with torch.no_grad():
        got = p.log_prob(x)
        want = densities(likelihood, parameters, x).sum((-1, -2))
    assert got.shape == (7, 4)
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_a_swapped_location_and_scale_would_be_seen():
    """Negative control for the comparison with scipy."""
    likelihood, (loc, scale) = Normal(scale=None), decoder_output(Normal(scale=None), (4,))
    loc = loc.abs() + 0.1
    x = torch.randn(4, *DATA_SHAPE)
    got = likelihood((scale, loc), 2).log_prob(x)
    assert not np.allclose(got, densities(likelihood, (loc, scale), x).sum((-1, -2)), rtol=1e-3)


@pytest.mark.parametrize("batch_shape", [(1,), (4,), (7, 4), (2, 7, 4)])
def test_event_is_one_datum_under_any_leading_dims(likelihood, batch_shape):
    p = likelihood(decoder_output(likelihood, batch_shape), len(DATA_SHAPE))
    assert (p.batch_shape, p.event_shape) == (batch_shape, DATA_SHAPE)


def test_shape_of_data_from_a_batch_of_parameters(likelihood):
    assert likelihood.data_shape_of(decoder_output(likelihood, (4,))) == DATA_SHAPE


@pytest.mark.parametrize("data_shape", [(), (5,), DATA_SHAPE])
def test_example_is_valid_and_has_probability(likelihood, data_shape):
    x = likelihood.example(data_shape, torch.float32)
    likelihood.check(x)
    assert x.shape == (1, *data_shape)
    assert x.dtype == (torch.int64 if likelihood.scaling == "classes" else torch.float32)
    parameters = torch.zeros(1, *data_shape, *([] if likelihood.num_classes is None else [likelihood.num_classes]))
    p = likelihood((parameters, torch.ones(1, *data_shape)) if likelihood.needs_scale else parameters, len(data_shape))
    assert p.log_prob(x).isfinite().all()


def test_mean_is_the_mean_of_samples(likelihood):
    """z-test in each dimension, false-failure rate 1e-6 over all by Bonferroni."""
    n, parameters = 20_000, decoder_output(likelihood, (1,))
    with torch.no_grad():
        x = likelihood(parameters, 2).sample((n,)).double()
        mean = likelihood.mean(parameters, 2)
    assert mean.shape == (1, *DATA_SHAPE)
    z = (x.mean(0) - mean) / (x.std(0) / math.sqrt(n))
    bound = scipy.stats.norm.isf(0.5e-6 / z.numel())
    assert z.abs().max() < bound
    assert (z + 0.3 * math.sqrt(n)).abs().max() > bound  # a mean that is wrong by 0.3 standard deviations is seen


@pytest.mark.parametrize(
    ("make", "stated", "scale"),
    [
        (lambda: Normal(), False, 0.1),
        (lambda: Normal(scale="default"), False, 0.1),
        (lambda: Normal(scale=0.1), True, 0.1),
        (lambda: Normal(scale=None), True, None),
        (lambda: Normal(scale="learned"), True, "learned"),
        (lambda: DiscretizedNormal(levels=4), False, "learned"),
        (lambda: DiscretizedNormal(levels=4, init_scale=0.2), True, "learned"),
        (lambda: DiscretizedNormal(levels=4, scale="learned"), True, "learned"),
        (lambda: DiscretizedNormal(levels=4, scale=0.3), True, 0.3),
    ],
)
def test_a_scale_left_out_is_told_from_the_same_scale_stated(make, stated, scale):
    likelihood = make()
    assert (likelihood.scale_stated, likelihood.scale) == (stated, scale)
    again = type(likelihood)(**json.loads(json.dumps(likelihood.config())))
    assert (again.scale_stated, again.scale, again.config()) == (stated, scale, likelihood.config())
    assert ("default" in likelihood.config().values()) is not stated


def test_config_rebuilds_it_through_json(likelihood):
    again = type(likelihood)(**json.loads(json.dumps(likelihood.config())))
    assert again.config() == likelihood.config()
    again.load_state_dict(likelihood.state_dict())
    parameters = decoder_output(likelihood, (4,))
    x = likelihood(parameters, 2).sample()
    torch.testing.assert_close(again(parameters, 2).log_prob(x), likelihood(parameters, 2).log_prob(x), rtol=0, atol=0)


def test_print_shows_the_arguments():
    assert repr(DiscretizedNormal(levels=4, scale=0.5)) == "DiscretizedNormal(levels=4, scale=0.5)"
    assert repr(Categorical(3)) == "Categorical(num_classes=3)"


def test_class_attributes():
    facts = {type(make()): (make().scaling, make().is_discrete) for make in LIKELIHOODS.values()}
    assert facts == {
        Normal: ("none", False),
        Bernoulli: ("unit", True),
        Categorical: ("classes", True),
        DiscretizedNormal: ("symmetric", True),
    }
    with pytest.raises(TypeError, match="abstract"):
        Likelihood()


@pytest.mark.parametrize(
    "make", [lambda: Normal("learned"), lambda: DiscretizedNormal(17)], ids=["normal", "discretized"]
)
def test_learned_scale_starts_at_its_initial_value_and_gets_its_gradient(make):
    """The gradient in log sigma against a central difference of scipy's value."""
    likelihood = make()
    assert likelihood.log_scale.exp().item() == pytest.approx(0.1)
    parameters = decoder_output(likelihood, (4,))
    x = likelihood(parameters, 2).sample()
    likelihood(parameters, 2).log_prob(x).sum().backward()
    values = []
    for step in (1e-5, -1e-5):
        likelihood.init_scale = 0.1 * math.exp(step)
        values.append(densities(likelihood, parameters, x).sum())
    assert likelihood.log_scale.grad.item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_fixed_scale_has_no_parameters():
    for likelihood in (
        Normal(scale=0.1),
        DiscretizedNormal(scale=0.1),
        Normal(scale=None),
        Bernoulli(),
        Categorical(3),
    ):
        assert list(likelihood.parameters()) == []


def test_float32_agrees_with_float64(likelihood):
    wide = decoder_output(likelihood, (4,))
    narrow = tuple(p.float() for p in wide) if likelihood.needs_scale else wide.float()
    x = likelihood(wide, 2).sample()
    narrow_x = x if x.dtype == torch.int64 else x.float()
    p = likelihood.float()(narrow, 2)
    got = p.log_prob(narrow_x)
    assert got.dtype == torch.float32
    want = likelihood.double()(wide, 2).log_prob(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_widened(likelihood, dtype):
    likelihood = likelihood.float()
    parameters = decoder_output(likelihood, (4,), dtype)
    p = likelihood(parameters, 2)
    assert p.log_prob(p.sample()).dtype == torch.float32


def test_make_fx_traces_the_same_values(likelihood):
    """Validation reads values, so it is off inside a trace; nothing else may stand in the way."""
    first, second = (decoder_output(likelihood, (4,)) for _ in range(2))
    x, again = likelihood(first, 2).sample(), likelihood(second, 2).sample()
    with pyro.validation_enabled(False), torch.no_grad():

        def log_prob(parameters, x):
            return likelihood(parameters, 2).log_prob(x)

        traced = make_fx(log_prob)(first, x)
        torch.testing.assert_close(traced(second, again), log_prob(second, again), rtol=1e-14, atol=0)


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_huge_logits_stay_finite(logit):
    for likelihood, shape, x in [
        (Bernoulli(), (1, 2), torch.ones(1, 2)),
        (Categorical(2), (1, 2, 2), torch.ones(1, 2)),
    ]:
        logits = torch.zeros(shape, dtype=torch.float32)
        logits[..., 0] = logit
        logits.requires_grad_()
        p = likelihood(logits, 1)
        log_p = p.log_prob(x.long() if likelihood.num_classes else x.float())
        (gradient,) = torch.autograd.grad(log_p.sum(), logits)
        assert log_p.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("kind", [Normal, DiscretizedNormal])
def test_extreme_fixed_scales_are_refused_in_float32(kind, scale):
    with pytest.raises(ValueError, match="scale"):
        kind(scale=scale)(torch.zeros(1, 2, dtype=torch.float32), 1)


def test_a_decoders_extreme_scale_is_refused_where_it_stands():
    scale = torch.tensor([[1.0, 0.0]])
    with pytest.raises(ValueError, match=r"scale\[0, 1\] is 0; bound the decoder's scale"):
        Normal(scale=None)((torch.zeros(1, 2), scale), 1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Normal(scale=0.0), r'scale to be a positive finite number, "learned", "default" or None, got 0\.0'),
        (lambda: Normal(scale=-1), "got -1"),
        (lambda: Normal(scale=math.nan), "got nan"),
        (lambda: Normal(scale=True), "got True"),
        (lambda: Normal(scale="fixed"), "got 'fixed'"),
        (lambda: Normal(scale=torch.tensor(0.1)), r"got tensor\(0.1000\)"),
        (lambda: Normal("learned", init_scale=0.0), r"init_scale to be a positive finite number, got 0\.0"),
        (lambda: Normal(0.1, init_scale=0.2), r'init_scale only with scale="learned", got scale=0\.1'),
        (lambda: DiscretizedNormal(levels=1), "levels to be an int >= 2, got 1"),
        (lambda: DiscretizedNormal(levels=8.0), r"levels to be an int >= 2, got 8\.0"),
        (lambda: Categorical(num_classes=1), "num_classes to be an int >= 2, got 1"),
    ],
)
def test_refused_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


ONE, PAIR = torch.zeros(4, 2), (torch.zeros(4, 2), torch.ones(4, 2))


@pytest.mark.parametrize(
    ("likelihood", "parameters", "data_dim", "error", "match"),
    [
        (Normal(scale=None), ONE, 1, TypeError, r"pair \(loc, scale\), .* got one tensor of shape \[4, 2\]"),
        (DiscretizedNormal(scale=None), (ONE,) * 3, 1, TypeError, r"pair \(loc, scale\), .* got a tuple of 3"),
        (Normal(), PAIR, 1, TypeError, "one tensor, the location, got a tuple of 2; build .* with scale=None"),
        (DiscretizedNormal(), PAIR, 1, TypeError, "one tensor, the location, got a tuple of 2"),
        (Bernoulli(), PAIR, 1, TypeError, "one tensor, the logits, got a tuple of 2; return the logits alone"),
        (Categorical(2), [1.0], 1, TypeError, "one tensor, the logits, got list"),
        (Normal(), ONE, 3, ValueError, r"at least 3 dimensions, .* got shape \[4, 2\]"),
        (Bernoulli(), ONE, 3, ValueError, r"at least 3 dimensions, .* got shape \[4, 2\]"),
        (Categorical(3), ONE, 1, ValueError, r"logits of shape \[..., \*data_shape, 3\], .* got \[4, 2\]"),
        (Categorical(2), ONE, 2, ValueError, r"at least 3 dimensions"),
        (
            Normal(None),
            (ONE, torch.ones(2, 2)),
            1,
            ValueError,
            r"broadcast to the shape of loc, \[4, 2\], got \[2, 2\]",
        ),
        (Normal(None), (ONE, torch.ones(3, 4, 2)), 1, ValueError, r"broadcast to the shape of loc"),
    ],
)
def test_refused_decoder_output(likelihood, parameters, data_dim, error, match):
    with pytest.raises(error, match=match):
        likelihood(parameters, data_dim)


def test_one_decoder_scale_per_datum_is_enough():
    loc, scale = torch.randn(4, 2), torch.rand(4, 1) + 0.1
    got = Normal(scale=None)((loc, scale), 1)
    assert (got.batch_shape, got.event_shape) == ((4,), (2,))


# Made before the tests start, so these are float32.
GREY = torch.tensor([[0.0, 1.0], [0.25, 1.0]])
BYTES = torch.tensor([[0, 1], [255, 7]])
BINARISE = 'state a binarisation \\("dynamic" or "fixed"\\)'


@pytest.mark.parametrize(
    ("likelihood", "x", "error", "match"),
    [
        (Bernoulli(), GREY, ValueError, rf"x: expected exact 0 or 1 .* x\[1, 0\] is 0\.25; .*{BINARISE}"),
        (Bernoulli(), BYTES.double(), ValueError, rf"x\[1, 0\] is 255; these look like .* 0\.\.255: .*{BINARISE}"),
        (Bernoulli(), BYTES.byte(), ValueError, r"x\[1, 0\] is 255; these look like .* 0\.\.255"),
        (Bernoulli(), BYTES % 2, ValueError, r"floating-point values, got torch.int64; convert with .float\(\)"),
        (Bernoulli(), GREY == 0, ValueError, r"floating-point values, got torch.bool"),
        (Bernoulli(), 2 * GREY - 1, ValueError, r"x\[0, 0\] is -1; scale to \[0, 1\]"),
        (Bernoulli(), torch.tensor(1 - 1e-6), ValueError, r"but x is 0\.99999\d+; "),
        (DiscretizedNormal(256), BYTES, ValueError, r'x\[1, 0\] is 255; these look like .* 0\.\.255: .*"symmetric"'),
        (DiscretizedNormal(256), BYTES.float(), ValueError, r'x\[1, 0\] is 255; these look like .*"symmetric"'),
        (DiscretizedNormal(256), GREY, ValueError, r"x\[0, 0\] is 0; values in \[0, 1\] need scaling \"symmetric\""),
        (
            DiscretizedNormal(4),
            torch.tensor([-1.0, 0.3]),
            ValueError,
            r"one of 4 .* x\[1\] is 0\.30000\d+; round to the grid",
        ),
        (DiscretizedNormal(4), torch.tensor([-1.0, -5.0]), ValueError, r"x\[1\] is -5; round to the grid"),
        (Categorical(3), BYTES, ValueError, r"class indices in 0\.\.2, but x\[1, 0\] is 255; raise num_classes"),
        (Categorical(3), -BYTES, ValueError, r"class indices in 0\.\.2, but x\[0, 1\] is -1"),
        (Categorical(3), GREY, ValueError, r"int64 class indices, got torch.float32; convert with .long\(\)"),
        (Categorical(3), BYTES.int(), ValueError, r"int64 class indices, got torch.int32"),
        (Normal(), BYTES, ValueError, "floating-point values, got torch.int64"),
        (Normal(), torch.complex(GREY, GREY), ValueError, "floating-point values, got torch.complex64"),
        (Bernoulli(), torch.complex(GREY, GREY), ValueError, "floating-point values, got torch.complex64"),
    ],
)
def test_refused_data(likelihood, x, error, match):
    with pytest.raises(error, match=match):
        likelihood.check(x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "likelihood", [Normal(), Bernoulli(), DiscretizedNormal(3)], ids=lambda one: type(one).__name__
)
def test_nan_and_infinities_are_refused_by_index_under_the_given_name(likelihood, bad):
    x = torch.ones(3, 2)
    likelihood.check(x)
    x[2, 1] = bad
    with pytest.raises(ValueError, match=rf"images: expected finite values, but images\[2, 1\] is {bad:g}; remove"):
        likelihood.check(x, name="images")


def test_anything_but_a_tensor_is_refused(likelihood):
    with pytest.raises(TypeError, match="x: expected a tensor, got ndarray; convert with"):
        likelihood.check(np.zeros(3))
