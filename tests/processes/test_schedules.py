"""Schedule tables against 60-digit recursions, for T from 1 to 4000, and what is refused."""

import json
import math
import re

import mpmath
import numpy as np
import pytest
import torch

from ppl_models.processes import NoiseSchedule

mp = mpmath.mp.clone()
mp.dps = 60
RTOL = 1e-11  # 4000 rounded additions, each 1e-16, times log alpha-bar of about 20

NAMED = {
    "linear-21": NoiseSchedule.linear(21),
    "linear-100": NoiseSchedule.linear(100),
    "linear-1000": NoiseSchedule.linear(1000),
    "linear-4000": NoiseSchedule.linear(4000),
    "linear-1": NoiseSchedule.linear(1, last=0.99),
    "linear-10": NoiseSchedule.linear(10, first=1e-3, last=0.9),
    "geometric-1": NoiseSchedule.geometric(1),
    "geometric-2": NoiseSchedule.geometric(2),
    "geometric-4000": NoiseSchedule.geometric(4000),
    "cosine-1": NoiseSchedule.cosine(1),
    "cosine-2": NoiseSchedule.cosine(2),
    "cosine-10": NoiseSchedule.cosine(10),
    "cosine-1000": NoiseSchedule.cosine(1000),
    "cosine-4000": NoiseSchedule.cosine(4000),
    "betas": NoiseSchedule.from_betas([0.3, 0.1, 0.7]),
    "one": NoiseSchedule([0.5]),
    "near-zero": NoiseSchedule([1e-30, 1e-20, 1e-10, 0.5, 1e-3]),
    "near-one": NoiseSchedule([1 - 1e-12, 0.5, 1 - 1e-15]),
    "stds": NoiseSchedule.from_stds([0.1, 0.2, 0.3]),
    "ends-at-zero": NoiseSchedule([0.1, 0.2, 1.0]),
    "only-zero": NoiseSchedule([1.0]),
    "linear-1000-zero": NoiseSchedule.linear(1000).with_zero_terminal_snr(),
    "cosine-4000-zero": NoiseSchedule.cosine(4000).with_zero_terminal_snr(),
}


@pytest.fixture(params=NAMED)
def schedule(request):
    return NAMED[request.param]


def by_hand(betas: list[float], kept: set[int] | None = None) -> dict[str, list]:
    """Every table by its definition, in 60 digits, from the float64 betas; only the entries in `kept` if given."""
    rows: dict[str, list] = {}
    previous = mp.mpf(1)
    for i, number in enumerate(betas):
        beta = mp.mpf(number)
        alpha = 1 - beta
        bar = previous * alpha
        if kept is not None and i not in kept:
            previous = bar
            continue
        entry = {
            "beta": beta,
            "alpha": alpha,
            "alpha_bar": bar,
            "alpha_bar_previous": previous,
            "marginal_variance": 1 - bar,
            "marginal_variance_previous": 1 - previous,
            "posterior_variance": beta * (1 - previous) / (1 - bar),
            "posterior_weight_x_0": mp.sqrt(previous) * beta / (1 - bar),
            "posterior_weight_x_t": mp.sqrt(alpha) * (1 - previous) / (1 - bar),
            "snr": bar / (1 - bar),
        }
        entry |= {
            "log_alpha": mp.log(alpha) if alpha else -mp.inf,
            "log_alpha_bar": mp.log(bar) if bar else -mp.inf,
            "log_beta": mp.log(beta),
            "log_snr": mp.log(bar / (1 - bar)) if bar else -mp.inf,
            "log_variance_ratio": mp.log((1 - previous) / (1 - bar)) if previous != 1 else -mp.inf,
            "log_posterior_variance": mp.log(beta * (1 - previous) / (1 - bar)) if previous != 1 else -mp.inf,
        }
        for name, value in entry.items():
            rows.setdefault(name, []).append(value)
        previous = bar
    return rows


def worst(table: torch.Tensor, exact: list) -> float:
    """Largest relative error; zeros and infinities must be hit exactly."""
    errors = []
    for got, want in zip(table.tolist(), exact, strict=True):
        if want in (0, -mp.inf):
            errors.append(0.0 if got == want else math.inf)
        else:
            errors.append(float(abs((mp.mpf(got) - want) / want)))
    return max(errors, default=0.0)


def test_every_table_has_its_definition_to_full_accuracy(schedule):
    kept = sorted({int(i) for i in np.linspace(0, len(schedule) - 1, 200)})
    exact = by_hand(schedule.beta.tolist(), set(kept))
    for name, values in exact.items():
        table = getattr(schedule, name)
        assert table.dtype == torch.float64
        assert table.shape == (schedule.num_timesteps,) == (len(schedule),)
        if name == "log_snr":  # passes through zero, where no relative accuracy is to be had
            finite = [(got, want) for got, want in zip(table[kept].tolist(), values, strict=True) if want != -mp.inf]
            assert all(abs(got - want) < RTOL * max(1, abs(want)) for got, want in finite)
            assert (table[kept].isinf()).sum() == len(kept) - len(finite)
        else:
            assert worst(table[kept], values) < RTOL, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_naive_tables_would_fail(dtype):
    """Negative control: 1 - cumprod(1 - beta) loses digits at the first steps, all of them in float32."""
    betas = torch.tensor([1e-10, 2e-10, 3e-10], dtype=dtype)
    naive = 1 - (1 - betas).cumprod(0)
    assert worst(naive, by_hand(betas.tolist())["marginal_variance"]) > 1e3 * RTOL


def test_smallest_variance_kl_needs_the_log_tables():
    """KL(N(., beta-tilde_t) || N(., beta_t)) at T = 1000: exact from `log_variance_ratio`, 24 % off in naive float32."""
    schedule = NoiseSchedule.linear(1000)
    exact = [(r - 1 - mp.log(r)) / 2 for r in map(mp.exp, by_hand(schedule.beta.tolist())["log_variance_ratio"][1:])]
    log_ratio = schedule.log_variance_ratio[1:]
    assert worst((torch.expm1(log_ratio) - log_ratio) / 2, exact) < 1e-8
    beta = schedule.beta.float()
    bar = (1 - beta).cumprod(0)
    ratio = (1 - bar[:-1]) / (1 - bar[1:])
    assert worst((ratio - 1 - ratio.log()) / 2, exact) > 0.1


def test_signal_to_noise_falls_and_tables_are_finite(schedule):
    assert (schedule.snr.diff() <= 0).all()
    assert (schedule.log_alpha_bar.diff() < 0).all()
    for name in (
        "beta",
        "alpha",
        "alpha_bar",
        "posterior_variance",
        "posterior_weight_x_0",
        "posterior_weight_x_t",
        "snr",
    ):
        assert getattr(schedule, name).isfinite().all(), name
    assert schedule.posterior_variance[0] == 0
    assert (schedule.posterior_variance[1:] > 0).all()
    assert (schedule.posterior_variance <= schedule.beta).all()


@pytest.mark.parametrize("num_timesteps", [21, 100, 1000, 4000])
def test_linear_is_the_schedule_of_ddpm(num_timesteps):
    schedule = NoiseSchedule.linear(num_timesteps)
    np.testing.assert_allclose(
        schedule.beta, np.linspace(0.1 / num_timesteps, 20 / num_timesteps, num_timesteps), rtol=1e-14
    )
    assert 1e-11 < schedule.alpha_bar[-1] < 1e-4


def test_linear_goes_between_given_ends():
    schedule = NoiseSchedule.linear(10, first=1e-3, last=0.9)
    np.testing.assert_allclose(schedule.beta, np.linspace(1e-3, 0.9, 10), rtol=1e-14)
    assert torch.equal(NoiseSchedule.from_config(**json.loads(json.dumps(schedule.config()))).beta, schedule.beta)
    assert repr(schedule) == "NoiseSchedule.linear(10, first=0.001, last=0.9)"
    assert NoiseSchedule.linear(1, 0.1, 0.9).beta.tolist() == [0.9]


def test_a_single_geometric_step_ends_where_many_do():
    """log SNR -7.5 is alpha-bar_T = sigmoid(-7.5), by hand."""
    for steps in (1, 2, 4000):
        assert float(NoiseSchedule.geometric(steps).alpha_bar[-1]) == pytest.approx(1 / (1 + math.exp(7.5)), rel=1e-9)
    assert float(NoiseSchedule.geometric(1, -1, -2).alpha_bar[-1]) != pytest.approx(1 / (1 + math.exp(1)), rel=1e-2)


@pytest.mark.parametrize("num_timesteps", [1, 2, 10, 1000, 4000])
def test_cosine_is_the_schedule_of_improved_ddpm(num_timesteps):
    def f(t: int):
        return mp.cos((mp.mpf(t) / num_timesteps + mp.mpf("0.008")) / mp.mpf("1.008") * mp.pi / 2) ** 2

    schedule = NoiseSchedule.cosine(num_timesteps)
    exact = [1 - f(t) / f(t - 1) for t in range(1, num_timesteps)] + [mp.mpf("0.999")]
    assert worst(schedule.beta, exact) < RTOL
    unclipped = [f(t) / f(0) for t in range(1, num_timesteps)]
    if unclipped:
        assert worst(schedule.alpha_bar[:-1], unclipped) < 1e-9
    assert schedule.alpha_bar[-1] > 0


def test_standard_deviations_give_the_bars_of_notes_004():
    stds = [0.1, 0.25, 0.5, 0.9]
    schedule = NoiseSchedule.from_stds(stds)
    bar = 1.0
    for std, ours in zip(stds, schedule.alpha_bar.sqrt().tolist(), strict=True):
        bar *= math.sqrt(1 - std**2)  # 004: alpha-bar_i = prod sqrt(1 - beta_i^2)
        assert ours == pytest.approx(bar, rel=1e-14)
    swapped = NoiseSchedule.from_betas(stds)  # control: the two conventions are not the same schedule
    assert not torch.allclose(swapped.alpha_bar, schedule.alpha_bar, rtol=1e-2)


@pytest.mark.parametrize("name", ["linear-100", "linear-4000", "cosine-2", "cosine-1000", "betas", "stds"])
def test_zero_terminal_snr_is_the_affine_map_of_the_root(name):
    schedule = NAMED[name]
    rescaled = schedule.with_zero_terminal_snr()
    roots = [mp.sqrt(v) for v in by_hand(schedule.beta.tolist())["alpha_bar"]]
    wanted = [((s - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 for s in roots]
    assert worst(rescaled.alpha_bar, wanted) < 1e-9
    assert rescaled.beta[-1] == 1
    assert rescaled.beta[0] == schedule.beta[0]
    assert rescaled.zero_terminal_snr
    assert not schedule.zero_terminal_snr
    assert rescaled.alpha_bar[-1] == rescaled.snr[-1] == 0
    assert torch.equal(rescaled.with_zero_terminal_snr().beta[-1:], rescaled.beta[-1:])


def test_respacing_composes_the_kernels_in_between():
    schedule = NoiseSchedule.linear(50)
    steps = [3, 4, 20, 50]
    respaced = schedule.respaced(steps)
    assert torch.allclose(respaced.alpha_bar, schedule.alpha_bar[[t - 1 for t in steps]], rtol=1e-13)
    previous = 0
    for step, beta in zip(steps, respaced.beta.tolist(), strict=True):
        variance = 0.0
        for t in range(previous + 1, step + 1):  # x -> sqrt(alpha) x + sqrt(beta) eps, one step after the other
            variance = float(schedule.alpha[t - 1]) * variance + float(schedule.beta[t - 1])
        assert beta == pytest.approx(variance, rel=1e-12)
        previous = step
    assert torch.allclose(schedule.respaced(range(1, 51)).beta, schedule.beta, rtol=1e-12)
    zero = NoiseSchedule.cosine(20).with_zero_terminal_snr()
    assert zero.respaced([10, 20]).zero_terminal_snr
    assert not torch.allclose(respaced.beta, schedule.beta[[t - 1 for t in steps]], rtol=1e-2)  # control: picked betas


def test_config_goes_through_json(schedule):
    config = json.loads(json.dumps(schedule.config()))
    again = NoiseSchedule.from_config(**config)
    assert torch.equal(again.beta, schedule.beta)
    assert again.config() == schedule.config()
    assert repr(again) == repr(schedule)


def test_betas_are_read_in_float64_and_copied():
    torch.set_default_dtype(torch.float32)
    assert NoiseSchedule([0.1, 0.2]).beta.tolist() == [0.1, 0.2]
    betas = torch.tensor([0.1, 0.2], dtype=torch.float64)
    schedule = NoiseSchedule.from_betas(betas)
    betas.fill_(0.5)
    assert schedule.beta.tolist() == [0.1, 0.2]
    for other in (np.array([0.1, 0.2]), (0.1, 0.2), torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)):
        assert torch.equal(NoiseSchedule(other).beta, schedule.beta)
    assert not schedule.beta.requires_grad


REFUSED = [
    (lambda: NoiseSchedule([0.1, 1.2]), r"beta_t in \(0, 1\).*got beta_2 = 1.2: pass variances; standard deviations"),
    (lambda: NoiseSchedule([0.1, 1.0, 0.2]), r"or 1 at the last step alone, got beta_2 = 1"),
    (lambda: NoiseSchedule([0.0, 0.1]), r"got beta_1 = 0"),
    (lambda: NoiseSchedule([0.1, -0.1]), r"got beta_2 = -0.1"),
    (lambda: NoiseSchedule([0.1, math.nan]), r"got beta_2 = nan"),
    (lambda: NoiseSchedule([0.1, math.inf]), r"got beta_2 = inf"),
    (lambda: NoiseSchedule([]), r"shape \[T\], T >= 1, got \[0\]"),
    (lambda: NoiseSchedule(torch.full((2, 2), 0.1)), r"got \[2, 2\]: pass one number per step"),
    (
        lambda: NoiseSchedule.from_stds([0.5, 1.5]),
        r"std_t in \(0, 1\).*got std_2 = 1.5: pass standard deviations; variances",
    ),
    (lambda: NoiseSchedule.linear(20), r"num_timesteps >= 21 for DDPM's linear schedule.*got 20 \(beta_T = 1\)"),
    (lambda: NoiseSchedule.linear(1), r"got 1 \(beta_T = 20\): take more steps, the cosine schedule, or give first"),
    (lambda: NoiseSchedule.linear(9, first=0.1, last=1.5), r"beta_t in \(0, 1\), .*got beta_7 = "),
    (lambda: NoiseSchedule.linear(9, first=0.0, last=0.5), r"beta_t in \(0, 1\), .*got beta_1 = 0"),
    (lambda: NoiseSchedule.linear(0), r"num_timesteps >= 1, got 0"),
    (lambda: NoiseSchedule.cosine(-3), r"num_timesteps >= 1, got -3"),
    (lambda: NoiseSchedule.geometric(0), r"num_timesteps >= 1, got 0"),
    (lambda: NoiseSchedule.geometric(9, -1, 1), r"first_log_snr > last_log_snr, got -1 and 1: swap them"),
    (lambda: NoiseSchedule([1e-40, 0.1]), r"beta_t >= 1.2e-38.*got beta_1 = 1e-40"),
    (lambda: NoiseSchedule.from_stds([1e-30]), r"std_t >= 1.1e-19.*got std_1 = 1e-30"),
    (lambda: NoiseSchedule([0.5, 1e-20]), r"signal-to-noise ratio to fall.*beta_2 = 1e-20 does not change it"),
    (lambda: NoiseSchedule([0.9] * 4000), r"alpha_bar_t >= 1.2e-38.*at t = 38: take fewer steps"),
    (lambda: NoiseSchedule([0.5]).with_zero_terminal_snr(), r"at least two steps.*T = 1"),
    (lambda: NoiseSchedule.linear(50).respaced([]), r"increasing timesteps in 1..50, got \[\]"),
    (lambda: NoiseSchedule.linear(50).respaced([0, 50]), r"got \[0, 50\]"),
    (lambda: NoiseSchedule.linear(50).respaced([10, 51]), r"got \[10, 51\]"),
    (lambda: NoiseSchedule.linear(50).respaced([10, 10]), r"got \[10, 10\]"),
    (
        lambda: NoiseSchedule.from_config("sigmoid", num_timesteps=3),
        r"among linear, cosine, geometric, betas, got 'sigmoid'",
    ),
]


@pytest.mark.parametrize(("build", "match"), REFUSED, ids=range(len(REFUSED)))
def test_bad_schedules_are_refused_in_one_sentence(build, match):
    with pytest.raises(ValueError, match=match) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [10.0, "10", True, None])
def test_steps_are_whole_numbers(value):
    for constructor in (NoiseSchedule.linear, NoiseSchedule.cosine):
        with pytest.raises(TypeError, match="num_timesteps to be an int"):
            constructor(value)


@pytest.mark.parametrize("value", ["linear", ["a", "b"], None, [[0.1], [0.1, 0.2]]])
def test_betas_are_numbers(value):
    with pytest.raises(TypeError, match="expected betas to be numbers"):
        NoiseSchedule.from_betas(value)


def test_a_schedule_says_what_it_is():
    assert repr(NoiseSchedule.linear(1000)) == "NoiseSchedule.linear(1000)"
    assert repr(NAMED["cosine-4000-zero"]) == "NoiseSchedule.cosine(4000).with_zero_terminal_snr()"
    assert re.fullmatch(r"NoiseSchedule.from_betas\(\[0.3, ..., 0.7\], T=3\)", repr(NAMED["betas"]))


def test_geometric_schedules_have_evenly_spaced_log_snr():
    schedule = NoiseSchedule.geometric(200, first_log_snr=7.0, last_log_snr=-5.0)
    assert np.allclose(schedule.log_snr.numpy(), np.linspace(7.0, -5.0, 200), rtol=0, atol=1e-9)
    assert not np.allclose(NoiseSchedule.cosine(200).log_snr.diff().numpy(), -12 / 199, atol=1e-2)  # control
    config = json.loads(json.dumps(schedule.config()))
    assert torch.equal(NoiseSchedule.from_config(**config).beta, schedule.beta)
    assert repr(schedule) == "NoiseSchedule.geometric(200, first_log_snr=7, last_log_snr=-5)"
    assert repr(NoiseSchedule.geometric(200, 9.0)) != repr(NoiseSchedule.geometric(200))
