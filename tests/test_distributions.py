"""`DiscretizedNormal` against arbitrary-precision arithmetic, against its own samples, and inside Pyro's handlers."""

import itertools
import math

import mpmath
import pyro
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_models.distributions import DiscretizedNormal, Grid

DTYPES = [torch.float32, torch.float64]
SUM_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def exact(k, levels, loc, scale, half_width=None):
    """log p, d log p/d loc and d log p/d scale at v_k: the definition in 120 digits, edges and all."""
    with mpmath.workdps(120):
        h = mpmath.mpf(1) / (levels - 1) if half_width is None else mpmath.mpf(half_width)
        v, loc, scale = -1 + mpmath.mpf(2 * k) / (levels - 1), mpmath.mpf(loc), mpmath.mpf(scale)
        lower = -mpmath.inf if k == 0 else (v - h - loc) / scale
        upper = mpmath.inf if k == levels - 1 else (v + h - loc) / scale

        def cdf(z):
            return mpmath.erfc(-z / mpmath.sqrt(2)) / 2 if mpmath.isfinite(z) else mpmath.mpf(int(z > 0))

        def density(z):
            return mpmath.npdf(z) if mpmath.isfinite(z) else mpmath.mpf(0)

        def z_density(z):
            return z * mpmath.npdf(z) if mpmath.isfinite(z) else mpmath.mpf(0)

        mass = cdf(upper) - cdf(lower) if upper < 0 or lower == -mpmath.inf else cdf(-lower) - cdf(-upper)
        outside = cdf(lower) + cdf(-upper)
        log_p = mpmath.log(mass) if mass < 0.5 else mpmath.log1p(-outside)
        d_loc = (density(lower) - density(upper)) / (scale * mass)
        d_scale = (z_density(lower) - z_density(upper)) / (scale * mass)
        return log_p, d_loc, d_scale


def evaluate(k, levels, loc, scale, dtype):
    """The same three numbers from the implementation, and the parameters as they are in that dtype."""
    loc = torch.tensor(loc, dtype=dtype, requires_grad=True)
    scale = torch.tensor(scale, dtype=dtype, requires_grad=True)
    x = torch.tensor(-1 + 2 * k / (levels - 1), dtype=dtype)
    log_p = DiscretizedNormal(loc, scale, levels).log_prob(x)
    assert log_p.dtype == dtype
    gradients = torch.autograd.grad(log_p, (loc, scale))
    return [mpmath.mpf(number.item()) for number in (log_p, *gradients)], loc.item(), scale.item()


# Where (levels - 1) loc is exact, any scale can be asked for; elsewhere only scales well above loc's last place.
EXACT_LOCS, ANY_SCALES = (0.0, -0.5, 1.0, -48.0, 896.0), (3e-11, 1e-5, 1e-3, 0.004, 0.02, 0.1, 1.0, 30.0, 1e12)
OTHER_LOCS, SCALES = (-1 / 255, 1e-9, 0.1234, 0.999, -50.3), (1e-3, 0.004, 0.02, 0.3, 1.0, 1e6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("levels", "ks"), [(2, [0, 1]), (3, [0, 1]), (256, [0, 1, 127, 128, 254, 255]), (65536, [9])])
def test_log_prob_and_gradients_match_arbitrary_precision(levels, ks, dtype):
    """Backward stability: the error is that of inputs moved by 8 ulps, to first order; nothing looser in the tails."""
    eps, tiny = 8 * torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    cases = [*itertools.product(EXACT_LOCS, ANY_SCALES), *itertools.product(OTHER_LOCS, SCALES)]
    for k, (loc, scale) in itertools.product(ks, cases):
        got, loc_used, scale_used = evaluate(k, levels, loc, scale, dtype)
        want = exact(k, levels, loc_used, scale_used)
        distance = abs(-1 + 2 * k / (levels - 1) - loc_used)
        moved = distance + 1 / (levels - 1) + (abs(loc_used) if loc in OTHER_LOCS else 0)
        curvature = moved / scale_used**2  # |d^2 log p/d loc^2| <= 1/scale^2: the law is a log-concave smoothing
        slack = [
            abs(want[0]) + moved * abs(want[1]) + scale_used * abs(want[2]),
            abs(want[1]) + curvature,
            abs(want[2]) + (1 + distance / scale_used) * curvature,
        ]
        for name, a, b, room in zip(("log p", "d/d loc", "d/d scale"), got, want, slack, strict=True):
            assert abs(a - b) <= eps * room + tiny, (name, k, loc, scale, float(a), float(b))


HESSIAN_CASES = [
    (256, 128, 0.0, 0.3),  # narrow, its lower edge at the centre
    (257, 128, 0.0, 0.3),  # narrow, its middle at the centre
    (257, 128, 0.0, 1e-3),  # central, its middle at the centre
    (256, 127, 0.0, 1e-3),  # central, its upper edge at the centre
    (256, 130, 0.01, 1e-3),  # tail
    (256, 3, 0.2, 0.05),  # far tail
    (256, 0, -0.9, 0.2),  # open
    (256, 255, -0.9, 0.2),  # open, far
    (3, 1, 0.2, 0.5),  # wide
]


def hessian_by_arbitrary_precision(k, levels, loc, scale):
    """Central differences of the exact first derivatives, with steps of 1e-30 in 120 digits."""
    with mpmath.workdps(120):
        h, loc, scale = mpmath.mpf(10) ** -30, mpmath.mpf(loc), mpmath.mpf(scale)
        by_loc = [
            (a - b) / (2 * h) for a, b in zip(*(exact(k, levels, loc + s * h, scale) for s in (1, -1)), strict=True)
        ]
        by_scale = [
            (a - b) / (2 * h) for a, b in zip(*(exact(k, levels, loc, scale + s * h) for s in (1, -1)), strict=True)
        ]
        return by_loc[1], by_loc[2], by_scale[2]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func's own
@pytest.mark.parametrize(("levels", "k", "loc", "scale"), HESSIAN_CASES)
def test_second_derivatives_match_arbitrary_precision(levels, k, loc, scale):
    """To 1e-10 of z^4/scale^2, z the number of standard deviations: they are of size z^2/scale^2, and erfcx' cancels."""
    parameters = torch.tensor([loc, scale], dtype=torch.float64)
    x = torch.tensor(-1 + 2 * k / (levels - 1), dtype=torch.float64)
    want = hessian_by_arbitrary_precision(k, levels, loc, scale)
    by_transform = torch.func.hessian(lambda v: DiscretizedNormal(v[0], v[1], levels, validate_args=False).log_prob(x))
    by_backward = torch.autograd.functional.hessian(
        lambda v: DiscretizedNormal(v[0], v[1], levels).log_prob(x), parameters
    )
    z = max(1.0, abs(x.item() - loc) / scale)
    for got in (by_backward, by_transform(parameters)):
        entries = got[0, 0], got[0, 1], got[1, 0], got[1, 1]
        for a, b in zip(entries, (want[0], want[1], want[1], want[2]), strict=True):
            assert abs(float(a - float(b))) <= 1e-10 * z**4 / scale**2, (entries, want)
    wrong = hessian_by_arbitrary_precision(k, levels, loc, scale * 1.001)  # negative control
    assert any(abs(float(got[i, j] - float(wrong[i + j]))) > 1e-10 * z**4 / scale**2 for i in (0, 1) for j in (0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 0.02, 0.05, 0.3])
def test_every_way_to_differentiate_gives_the_same(scale, dtype):
    """Also where the datum is the centre, or an edge of its bin is: backwards, forwards, and by torch's own tracer."""
    levels = 17
    x = torch.linspace(-1, 1, levels, dtype=dtype)
    places = torch.cat([x, x + 1 / 16, x + 0.013])
    values, locs = (each.flatten() for each in torch.meshgrid(x, places, indexing="ij"))
    scales = torch.full_like(locs, scale)

    def log_p(loc, scale):
        return DiscretizedNormal(loc, scale, levels, validate_args=False).log_prob(values)

    backward = torch.autograd.grad(
        log_p(*(inputs := [t.clone().requires_grad_() for t in (locs, scales)])).sum(), inputs
    )
    one = torch.ones_like(locs)
    forward = [
        torch.func.jvp(lambda loc: log_p(loc, scales), (locs,), (one,))[1],
        torch.func.jvp(lambda scale: log_p(locs, scale), (scales,), (one,))[1],
    ]
    inputs = [t.clone().requires_grad_() for t in (locs, scales)]
    traced = torch.autograd.grad(torch.compile(log_p, backend="eager")(*inputs).sum(), inputs)
    # To the rounding of loc and scale, as the comparison with arbitrary precision has it, and of erfcx' in the tails.
    z = (values - locs).abs() / scale
    room = 64 * torch.finfo(dtype).eps * (1 + z.square()) * (1 + z + z**3) / scale
    for other in (forward, traced):
        for a, b, extra in zip(backward, other, (1.0, 1.0), strict=True):
            assert bool(((a - b).abs() <= extra * room + 1e-30).all())


def test_the_comparison_above_would_catch_a_wrong_half_width():
    """Negative control: half-widths 1/levels and 1/256 for 256 levels are off by 0.4 %, log p by 0.004."""
    (log_p, *_), loc, scale = evaluate(100, 256, 0.1234, 0.3, torch.float32)
    assert abs(log_p - exact(100, 256, loc, scale, half_width=1 / 256)[0]) > 1e-3
    assert abs(log_p - exact(100, 256, loc, scale)[0]) < 1e-5


@pytest.mark.parametrize("k", [0, 1, 128, 254, 255])
def test_integral_with_the_limits_printed_in_the_notes(k):
    """Notes 003: delta_+ = inf if x = 1 else x + 1/255; delta_- = -inf if x = -1 else x - 1/255."""
    x, loc, scale = -1 + 2 * k / 255, 0.3, 0.4
    delta_minus, delta_plus = (-mpmath.inf if k == 0 else x - 1 / 255), (mpmath.inf if k == 255 else x + 1 / 255)
    mass = mpmath.quad(lambda y: mpmath.npdf(y, loc, scale), [delta_minus, delta_plus])
    p = DiscretizedNormal(loc, scale, 256).log_prob(torch.tensor(x)).exp()
    assert p.item() == pytest.approx(float(mass), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", [2, 3, 17, 256, 65536])
def test_bins_sum_to_one(levels, dtype):
    locs = torch.tensor([-50.0, -1.0, -0.7, -1 / 255, 0.0, 1e-9, 0.1234, 0.999, 3.7, 900.0], dtype=dtype)
    for scale in (3e-11, 1e-8, 1e-5, 1e-4, 1e-3, 0.004, 1 / 127.5, 0.02, 0.1, 0.5, 1.0, 30.0, 1e6, 1e12):
        total = DiscretizedNormal(locs, torch.tensor(scale, dtype=dtype), levels).probs.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=SUM_TOLERANCE[dtype])


def test_each_branch_meets_its_neighbour():
    """Across the switches between quadrature, tail and central form the value and the slope do not jump."""
    scale = torch.linspace(0.2, 40.0, 4001).reciprocal().requires_grad_()
    for levels, x, loc in [(3, 0.0, 0.0), (3, 0.0, 0.3), (4, 1 / 3, -0.9), (3, -1.0, -0.4), (3, 1.0, 1.5)]:
        log_p = DiscretizedNormal(torch.tensor(loc), scale, levels).log_prob(torch.tensor(x))
        (slope,) = torch.autograd.grad(log_p.sum(), scale)
        secant = log_p.detach().diff() / scale.detach().diff()
        middle = (slope[1:] + slope[:-1]) / 2
        curvature = (slope.diff().abs() + 1e-6 * (1 + slope[1:].abs())).clamp(min=1e-9)
        assert ((secant - middle).abs() <= curvature).all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    data=st.data(),
    levels=st.sampled_from([2, 3, 5, 256, 1000]),
    dtype=st.sampled_from(DTYPES),
    loc=st.floats(-1000, 1000) | st.floats(-1.1, 1.1),
    exponent=st.floats(-10.6, 12),
)
def test_finite_for_every_admissible_scale(data, levels, dtype, loc, exponent):
    k = data.draw(st.integers(0, levels - 1))
    numbers, *_ = evaluate(k, levels, loc, 10.0**exponent, dtype)
    assert all(map(mpmath.isfinite, numbers))
    assert numbers[0] <= 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-20, 1e20, 0.0, -1.0, math.nan, math.inf])
def test_extreme_scales_are_finite_or_refused(scale, dtype):
    if scale == 1e-20 and dtype == torch.float64:
        numbers, *_ = evaluate(3, 256, 0.5, scale, dtype)
        assert all(map(mpmath.isfinite, numbers))
        return
    with pytest.raises(
        ValueError, match=r"parameter scale .*scale in \[2.3e-11 \(float32\) or 2.8e-101 \(float64\), 1e"
    ):
        DiscretizedNormal(torch.tensor(0.0, dtype=dtype), torch.tensor(scale, dtype=dtype), 256)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((0.0, 1.0, 1), ValueError, "levels to be an int >= 2, got 1"),
        ((0.0, 1.0, 2.0), ValueError, r"levels to be an int >= 2, got 2\.0"),
        ((0.0, 1.0, True), ValueError, "levels to be an int >= 2, got True"),
        ((math.inf, 1.0, 4), ValueError, "parameter loc .* finite real"),
        ((math.nan, 1.0, 4), ValueError, "parameter loc .* finite real"),
        ((torch.zeros(2, dtype=torch.bfloat16), 1.0, 4), TypeError, r"loc in float32 or float64, got torch.bfloat16"),
        ((torch.zeros(2), torch.ones(2, dtype=torch.float16), 4), TypeError, r"scale in float32 or float64"),
    ],
)
def test_refused_parameters(arguments, error, match):
    with pytest.raises(error, match=match):
        DiscretizedNormal(*arguments)


@pytest.mark.parametrize("value", [0.0, 0.5, 128.0, -1.01, math.nan, math.inf])
def test_values_off_the_grid_are_refused(value):
    with pytest.raises(ValueError, match="one of 256 evenly spaced values"):
        DiscretizedNormal(0.0, 1.0, 256).log_prob(torch.tensor(value))


@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
def test_the_grid_in_float32_passes_in_either_dtype(levels):
    values = (torch.arange(levels, dtype=torch.float32) / (levels - 1)) * 2 - 1
    assert Grid(levels).check(values).all()
    assert Grid(levels).check(values.double()).all()
    assert not Grid(levels).check(values + 2e-6).any()


SAMPLE_SIZE = 200_000


def chi_square(levels, loc, scale, half_width):
    """Pearson's statistic of the samples' frequencies against probabilities with the given half-width; its dof."""
    values = DiscretizedNormal(loc, scale, levels).sample((SAMPLE_SIZE,))
    counts = torch.bincount(((values + 1) * (levels - 1) / 2).round().long(), minlength=levels)
    masses = torch.tensor([float(mpmath.exp(exact(k, levels, loc, scale, half_width)[0])) for k in range(levels)])
    expected = SAMPLE_SIZE * masses / masses.sum()
    assert expected.min() > 50
    return ((counts - expected).square() / expected).sum().item(), levels - 1


def test_samples_follow_the_probabilities():
    """False-failure rate 1e-6."""
    statistic, dof = chi_square(8, 0.3, 0.6, None)
    assert statistic < scipy.stats.chi2.isf(1e-6, dof)


def test_samples_reject_a_wrong_half_width():
    """Half-width 1/8 for 1/7 takes 1/8 of the mass from each inner bin: non-centrality about 900, threshold 42."""
    statistic, dof = chi_square(8, 0.3, 0.6, 1 / 8)
    assert statistic > 5 * scipy.stats.chi2.isf(1e-6, dof)


@pytest.mark.parametrize(("loc", "scale"), [(0.2, 0.3), (5.0, 2.0), (-0.3, 1e-6)])
def test_mean_and_variance_are_those_of_the_law(loc, scale):
    d = DiscretizedNormal(loc, scale, 16)
    p = [float(mpmath.exp(exact(k, 16, loc, scale)[0])) for k in range(16)]
    v = [-1 + 2 * k / 15 for k in range(16)]
    mean = sum(a * b for a, b in zip(p, v, strict=True))
    assert d.mean.item() == pytest.approx(mean, rel=1e-12)
    variance = sum(a * (b - mean) ** 2 for a, b in zip(p, v, strict=True))
    assert d.variance.item() == pytest.approx(variance, rel=1e-10, abs=1e-15)


def test_shapes_of_everything():
    d = DiscretizedNormal(torch.zeros(3, 1), torch.ones(4), 5)
    assert d.batch_shape == (3, 4)
    assert d.sample((2,)).shape == (2, 3, 4)
    assert not d.has_rsample
    assert d.probs.shape == (3, 4, 5)
    assert d.enumerate_support().shape == (5, 3, 4)
    assert d.enumerate_support(expand=False).shape == (5, 1, 1)
    torch.testing.assert_close(d.log_prob(d.enumerate_support()).exp().sum(0), torch.ones(3, 4))
    torch.testing.assert_close(d.log_prob(d.enumerate_support()).movedim(0, -1), d.logits, rtol=0, atol=0)
    wider = d.expand((2, 3, 4))
    assert isinstance(wider, DiscretizedNormal)
    assert not isinstance(wider, ExpandedDistribution)
    assert wider.sample().shape == (2, 3, 4)


def test_without_validation_a_value_counts_as_the_nearest_level():
    d = DiscretizedNormal(0.1, 0.5, 3, validate_args=False)
    assert d.log_prob(torch.tensor(0.4)) == d.log_prob(torch.tensor(0.0))


def test_no_nan_gradient_beside_extreme_neighbours():
    """One tensor that takes all branches at once: what a branch not taken computes must not leak into the gradient."""
    loc = torch.tensor([0.0, 0.0, 900.0, -900.0, 0.0, 1.0, -1.0], dtype=torch.float32, requires_grad=True)
    scale = torch.tensor([3e-11, 1e12, 3e-11, 1e-3, 0.1, 3e-11, 1.0], dtype=torch.float32, requires_grad=True)
    for x in DiscretizedNormal(loc, scale, 256).enumerate_support(expand=False)[::17]:
        gradients = torch.autograd.grad(DiscretizedNormal(loc, scale, 256).log_prob(x).sum(), (loc, scale))
        assert all(g.isfinite().all() for g in gradients)


def log_prob_sum(x, loc, log_scale):
    return DiscretizedNormal(loc, log_scale.exp(), 256, validate_args=False).log_prob(x)


def batch(size=64):
    loc = torch.randn(size)
    x = DiscretizedNormal(torch.randn(size), 1.0, 256).sample()
    return x, loc, torch.linspace(-9.0, 3.0, size)


def test_make_fx_traces_the_same_values():
    traced = make_fx(log_prob_sum)(*batch())
    again = batch()
    torch.testing.assert_close(traced(*again), log_prob_sum(*again), rtol=0, atol=0)


def test_vmap_and_compile_give_the_same_values_and_gradients():
    x, loc, log_scale = batch()
    want = log_prob_sum(x, loc, log_scale)
    torch.testing.assert_close(torch.vmap(log_prob_sum)(x, loc, log_scale), want, rtol=1e-14, atol=0)
    loc.requires_grad_()
    compiled = torch.compile(log_prob_sum, fullgraph=True, backend="aot_eager")(x, loc, log_scale)
    torch.testing.assert_close(compiled.detach(), want, rtol=1e-13, atol=0)
    (got,) = torch.autograd.grad(compiled.sum(), loc)
    (expected,) = torch.autograd.grad(log_prob_sum(x, loc, log_scale).sum(), loc)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_inside_pyro_programs():
    """Event dims, plates, an outer vectorised plate, and masks leave the per-pixel log-probabilities as they are."""
    loc = torch.randn(5, 2, 3)
    mask = torch.tensor([True, False, True, True, False])

    def program(x=None):
        with pyro.plate("particles", 7, dim=-2), pyro.plate("data", 5, dim=-1):
            return pyro.sample("x", DiscretizedNormal(loc, 0.5, 8).to_event(2).mask(mask), obs=x)

    assert program().shape == (7, 5, 2, 3)
    x = DiscretizedNormal(loc, 0.5, 8).sample((7,))
    site = pyro.poutine.trace(program).get_trace(x).nodes["x"]
    got = site["fn"].log_prob(x)
    want = DiscretizedNormal(loc, 0.5, 8).log_prob(x).sum((-1, -2)) * mask
    torch.testing.assert_close(got, want)


class TestForwardMode:
    """Derivatives along a direction are those that reverse mode finds, also where only one of the two is asked for."""

    X, LOC, SCALE = (torch.tensor(value, dtype=torch.float64) for value in (0.25, 0.1, 0.3))

    def tangent(self, loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return forward_ad.unpack_dual(DiscretizedNormal(loc, scale, 17).log_prob(self.X)).tangent

    @pytest.mark.parametrize("which", ["loc", "scale"])
    @pytest.mark.parametrize("other_learns", [False, True])
    def test_first(self, which: str, other_learns: bool) -> None:
        given = {"loc": self.LOC.clone(), "scale": self.SCALE.clone()}
        leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
        DiscretizedNormal(leaves["loc"], leaves["scale"], 17).log_prob(self.X).backward()
        other = "scale" if which == "loc" else "loc"
        given[other].requires_grad_(other_learns)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(given[which], torch.ones_like(given[which]))
            found = self.tangent(**{**given, which: dual})
        assert torch.allclose(found, leaves[which].grad, rtol=1e-12)
        assert float(found.detach().abs()) > 0.1

    @pytest.mark.parametrize("which", ["loc", "scale"])
    def test_second(self, which: str) -> None:
        leaves = {"loc": self.LOC.clone().requires_grad_(), "scale": self.SCALE.clone().requires_grad_()}
        log_p = DiscretizedNormal(leaves["loc"], leaves["scale"], 17).log_prob(self.X)
        (slope,) = torch.autograd.grad(log_p, leaves[which], create_graph=True)
        expected = torch.autograd.grad(slope, list(leaves.values()))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaves[which], torch.ones_like(leaves[which]))
            found = torch.autograd.grad(self.tangent(**{**leaves, which: dual}), list(leaves.values()))
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-10)
            assert float(b.detach().abs()) > 0.1


@pytest.mark.parametrize("scale", [0.0017, 0.0015, 0.00134])
def test_gradient_in_scale_where_loc_is_on_the_edge_of_a_bin(scale: float) -> None:
    """Half the mass on either side, whatever the scale, up to the far edge: a slope of e^-x, which 1 - (1 - e^-x) loses."""
    x, half_bin = torch.tensor(1 / 255, dtype=torch.float32), 1 / 255
    s = torch.tensor(scale, dtype=torch.float32, requires_grad=True)
    DiscretizedNormal(torch.zeros((), dtype=torch.float32), s, 256).log_prob(x).backward()
    exact_scale, far = float(s.detach()), 2 * half_bin / float(s.detach())
    density = math.exp(-0.5 * far * far) / math.sqrt(2 * math.pi)
    exact = -far / exact_scale * density / (0.5 - 0.5 * math.erfc(far / math.sqrt(2)))
    # The edge itself is known to an ulp of one half bin's end: e^-x moves by far^2 eps.
    assert abs(float(s.grad) / exact - 1) < 8 * (far * far + 1) * torch.finfo(torch.float32).eps
