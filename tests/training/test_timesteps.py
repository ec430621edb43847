"""Samplers of t: their laws by enumeration, and that their weights undo them exactly."""

import pytest
import torch
from scipy.stats import chisquare

from inference.training.timesteps import SAMPLERS, LossSecondMoment, Stratified, Uniform

CPU = torch.device("cpu")
T = 7


def informed(scale=None):
    """A second-moment sampler that has seen enough of every t."""
    sampler = LossSecondMoment(T)
    t = torch.arange(T).repeat(12)
    sampler.observe(t, (1.0 + t) if scale is None else scale[t])
    return sampler


BUILT = {"uniform": Uniform(T), "stratified": Stratified(T), "fresh": LossSecondMoment(T), "informed": informed()}


@pytest.mark.parametrize("name", BUILT)
def test_weights_undo_the_law_exactly(name):
    """sum_t p_t (f_t / p_t) = sum_t f_t: the estimate is unbiased, by enumeration of t."""
    sampler = BUILT[name]
    p, f = sampler.probabilities(CPU), torch.randn(T)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert float((p * sampler.weight(torch.arange(T)) * f).sum()) == pytest.approx(float(f.sum()), abs=1e-12)


@pytest.mark.parametrize("name", BUILT)
def test_draws_follow_the_law(name):
    sampler = BUILT[name]
    # one datum of each batch, where those of a batch depend on each other
    t = torch.cat([sampler(3, CPU)[i % 3 : i % 3 + 1] for i in range(7000)])
    assert t.dtype == torch.int64
    assert chisquare(t.bincount(minlength=T), sampler.probabilities(CPU) * 7000).pvalue > 1e-7


def test_each_stratified_datum_is_uniform():
    """t_b = floor(T ((u + b/B) mod 1)) has every value on a share 1/T of the u, for each b: by enumeration of u."""
    u = (torch.arange(70_000) + 0.5) / 70_000
    for b in range(5):
        t = ((u + b / 5).frac() * T).long()
        assert torch.equal(t.bincount(minlength=T), torch.full((T,), 10_000))


@pytest.mark.parametrize("count", [1, 3, 7, 8, 64])
def test_a_stratified_batch_is_even(count):
    sampler = Stratified(T)
    for _ in range(50):
        seen = sampler(count, CPU).bincount(minlength=T)
        assert seen.max() - seen.min() <= 2
        assert seen.max() <= sampler.most_of_one(count)


def test_unstratified_batches_are_not_even():
    assert max(int(Uniform(T)(64, CPU).bincount(minlength=T).max()) for _ in range(50)) > Stratified(T).most_of_one(64)


def test_second_moment_law():
    """p_t is proportional to sqrt(E L_t^2), but for a share of 0.1 % that is uniform."""
    rms = torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0, 0.0, 3.0])
    p = informed(rms).probabilities(CPU)
    assert torch.allclose(p, 0.999 * rms / rms.sum() + 0.001 / T)


def test_it_gives_the_least_variance():
    """Among the samplers, by enumeration: Var f_t / p_t for losses f_t without noise."""
    f = torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0, 0.1, 3.0])

    def variance(sampler):
        p = sampler.probabilities(CPU)
        return float((f**2 / p).sum() - f.sum() ** 2)

    assert variance(informed(f)) < 0.05 * variance(Uniform(T))


def test_it_is_uniform_until_every_t_is_known():
    sampler = LossSecondMoment(T)
    t = torch.arange(T - 1).repeat(100)
    sampler.observe(t, 5.0 * t)
    assert torch.allclose(sampler.probabilities(CPU), torch.full((T,), 1 / T))
    sampler.observe(torch.full((10,), T - 1), torch.ones(10))
    assert not torch.allclose(sampler.probabilities(CPU), torch.full((T,), 1 / T))


def test_it_forgets():
    """A running mean over the first ten, exponential with rate 1/10 afterwards; all data of a batch count."""
    sampler = LossSecondMoment(1)
    for value in (1.0, 3.0):
        sampler.observe(torch.zeros(1, dtype=torch.int64), torch.tensor([value]))
    assert float(sampler.second_moment) == pytest.approx(5.0)
    for _ in range(200):
        sampler.observe(torch.zeros(1, dtype=torch.int64), torch.tensor([2.0]))
    assert float(sampler.second_moment) == pytest.approx(4.0, abs=1e-6)
    sampler.observe(torch.zeros(3, dtype=torch.int64), torch.tensor([0.0, 0.0, 0.0]))
    assert float(sampler.second_moment) == pytest.approx(4.0 * 0.9**3, abs=1e-6)


def test_the_state_is_saved_and_stays_in_float64():
    sampler = informed().to(torch.float32)
    assert sampler.second_moment.dtype == torch.float64
    other = LossSecondMoment(T)
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.probabilities(CPU), sampler.probabilities(CPU))


def test_the_registry_names_them_all():
    assert set(SAMPLERS) == {"uniform", "stratified", "loss_second_moment"}


def test_what_is_not_finite_is_not_taken_note_of():
    t, loss = torch.tensor([0, 1]).repeat(20), torch.tensor([1.0, 3.0]).repeat(20)
    clean, spoiled = LossSecondMoment(2), LossSecondMoment(2)
    clean.observe(t, loss)
    spoiled.observe(t, loss)
    spoiled.observe(torch.tensor([0, 1, 1]), torch.tensor([torch.nan, torch.inf, -torch.inf]))
    for sampler in (clean, spoiled):
        assert sampler.probabilities(torch.device("cpu")).tolist() == pytest.approx([0.25, 0.75], abs=1e-3)
    spoiled.observe(torch.tensor([0, 0]), torch.tensor([torch.nan, 9.0]))
    assert float(spoiled.probabilities(torch.device("cpu"))[0]) > 0.4  # the finite one is
