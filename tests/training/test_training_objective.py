"""What is minimised while training, by hand; and the pairs that cannot be trained, each refused by name."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import ElboLoss
from inference.bounds import PairError
from inference.training.objectives import (
    NotReparameterizedError,
    join_idle,
    rate_weight,
    training_objective,
)
from tests.training.training_pairs import Scalar, noisy_vae

TERMS = {
    site: torch.tensor(values, dtype=torch.float64)
    for site, values in {"z_2": [-1.0, -3.0], "z_1": [-0.5, -0.1], "x": [-10.0, -12.0]}.items()
}
LATENTS = ("z_2", "z_1")


@pytest.mark.parametrize(
    ("weight", "free_bits", "expected"),
    [
        (1.0, 0.0, 11 + 2 + 0.3),
        (0.25, 0.0, 11 + 0.25 * 2.3),
        (0.0, 0.0, 11.0),
        (1.0, 0.5, 11 + 2 + 0.5),
        (1.0, 5.0, 11 + 5 + 5),
        (0.5, 0.5, 11 + 0.5 * 2.5),
    ],
)
def test_the_objective_by_hand(weight: float, free_bits: float, expected: float) -> None:
    assert float(training_objective(TERMS, LATENTS, weight, free_bits)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("free_bits", [0.0, 0.5, 1.2])
def test_shares_add_up_to_the_objective(free_bits: float) -> None:
    """Also where one process has less than another, and one has nothing."""
    parts = [slice(0, 1), slice(1, 2), slice(2, 2)]
    rates = {part.start: torch.tensor([-TERMS[s][part].sum() / 2 for s in LATENTS]) for part in parts}

    def all_sum(_: Tensor) -> Tensor:
        return sum(rates.values())

    shares = [
        training_objective({s: t[part] for s, t in TERMS.items()}, LATENTS, 1.0, free_bits, 2, all_sum)
        for part in parts[:2]
    ]
    assert float(sum(shares)) == pytest.approx(float(training_objective(TERMS, LATENTS, 1.0, free_bits)), rel=1e-12)
    asked: list[Tensor] = []
    join_idle(2, lambda values: asked.append(values) or values)
    assert asked[0].shape == (2,)


def test_a_site_below_its_free_bits_is_not_pressed() -> None:
    rates = torch.tensor([2.0, 0.3], requires_grad=True)
    terms = {"z_2": -rates[0].expand(2), "z_1": -rates[1].expand(2), "x": torch.zeros(2)}
    training_objective(terms, LATENTS, 1.0, free_bits=0.5).backward()
    assert rates.grad.tolist() == [1.0, 0.0]


def test_the_rates_weight_rises_to_one() -> None:
    assert [rate_weight(step, 4.0) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate_weight(0, 0.0) == 1.0


class Discrete(Scalar):
    def guide(self, x: Tensor) -> Tensor:
        with pyro.plate("data", self.batch_size(x)):
            return pyro.sample("z", dist.Poisson(self.log_s.exp().expand(len(x))))


class Unguided(Scalar):
    def guide(self, x: Tensor) -> None:
        """Draws nothing."""


class Superfluous(Scalar):
    def guide(self, x: Tensor) -> Tensor:
        pyro.sample("other", dist.Normal(0.0, 1.0))
        return super().guide(x)


class Global(Scalar):
    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        pyro.sample("w_0", dist.Normal(0.0, 1.0))
        return super().model(x, size)

    def guide(self, x: Tensor) -> Tensor:
        pyro.sample("w_0", dist.Normal(self.a, 1.0))
        return super().guide(x)


@pytest.mark.parametrize(
    ("pair", "error", "reason"),
    [
        (Discrete, NotReparameterizedError, "got Poisson at site 'z', whose draws carry no gradient"),
        (Unguided, PairError, "latent site 'z' has no guide site"),
        (Superfluous, PairError, "'other'"),
        (Global, PairError, "inside the data plate, of size 4 at dim -1, got site 'w_0' outside it"),
    ],
)
@pytest.mark.parametrize("closed_form", [True, False])
def test_a_pair_that_cannot_be_trained_is_refused(
    pair: type[Scalar], error: type[Exception], reason: str, closed_form: bool
) -> None:
    with pytest.raises(error, match=reason):
        ElboLoss(pair(), closed_form=closed_form)(torch.zeros(4))


def test_fewer_than_one_particle_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a whole num_particles >= 1, got 0"):
        ElboLoss(Scalar(), num_particles=0)


def test_preparing_leaves_no_trace() -> None:
    """Neither the random state, nor running statistics, nor the modes of submodules."""
    pair, x = noisy_vae(), torch.ones(6, 4)
    pair.train()
    pair.encoder.body[3].eval()
    fresh, prepared = ElboLoss(pair), ElboLoss(copy.deepcopy(pair))
    prepared(x)
    prepared.pair.load_state_dict(pair.state_dict())
    outcomes = []
    for loss in (fresh, prepared):
        torch.manual_seed(6)
        outcomes.append((loss(x), torch.get_rng_state(), [b.clone() for b in loss.pair.buffers()]))
        assert [m.training for m in loss.pair.encoder.body] == [True, True, True, False]
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=0, atol=0)
