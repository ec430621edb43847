"""Linear-Gaussian programs of the kinds that strangers write, each with every term of its ELBO known exactly.

Each function returns a :class:`Case`. The exact terms are computed beside the programs, in affine forms
(:mod:`tests.oracles.linear_forms`), so that a reader can hold the two against each other line by line.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from tests.bounds.elbo_case import Case
from tests.oracles.linear_forms import Form, entropy_of_normal, expected_log_normal, normal

X = torch.tensor([0.5, -1.0, 2.0, 0.2], dtype=torch.float64)


def one_latent() -> Case:
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.3 * x, 0.7))

    z = normal(0.3, 0.7)
    terms = {
        "z": expected_log_normal(z, 0.0, 1.0) + entropy_of_normal(0.7),
        "x": expected_log_normal(1.0, z, 0.5),
    }
    return Case("one latent", model, guide, terms, frozenset("z"), (torch.tensor(1.0),))


def vae() -> Case:
    """All sites in one plate: terms by datum."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0] - 2 * z[..., 1], 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.stack([0.4 * x, -0.2 * x], -1), torch.tensor([0.5, 0.8])).to_event(1))

    z_terms, x_terms = [], []
    for x in X.tolist():
        a, b = normal(0.4 * x, 0.5), normal(-0.2 * x, 0.8)
        prior = expected_log_normal(a, 0.0, 1.0) + expected_log_normal(b, 0.0, 1.0)
        z_terms.append(prior + entropy_of_normal(0.5) + entropy_of_normal(0.8))
        x_terms.append(expected_log_normal(x, a - 2 * b, 0.5))
    return Case("one plate", model, guide, {"z": z_terms, "x": x_terms}, frozenset("z"), (X,))


def global_and_local() -> Case:
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        mu = pyro.sample("mu", dist.Normal(0.3, 0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * mu + 0.2 * x, 0.6))

    mu = normal(0.3, 0.4)
    z_term = x_term = 0.0
    for x in X.tolist():
        z = normal(0.5 * mu + 0.2 * x, 0.6)
        z_term += expected_log_normal(z, mu, 1.0) + entropy_of_normal(0.6)
        x_term += expected_log_normal(x, z, 0.5)
    terms = {"mu": expected_log_normal(mu, 0.0, 2.0) + entropy_of_normal(0.4), "z": z_term, "x": x_term}
    return Case("global and local latents", model, guide, terms, frozenset({"mu", "z"}), (X,))


def _nested(with_global: bool) -> Case:
    """Groups with members: a_i ~ N(g, 1), b_ij ~ N(a_i, 1), x_ij ~ N(b_ij, .5)."""
    data = torch.arange(6.0).reshape(2, 3) / 3  # [member, group]

    def model(x):
        g = pyro.sample("g", dist.Normal(0.0, 1.0)) if with_global else torch.tensor(0.25)
        with pyro.plate("group", 3, dim=-1):
            a = pyro.sample("a", dist.Normal(g, 1.0))
            with pyro.plate("member", 2, dim=-2):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(b, 0.5), obs=x)

    def guide(x):
        if with_global:
            pyro.sample("g", dist.Normal(0.4, 0.6))
        with pyro.plate("group", 3, dim=-1):
            a = pyro.sample("a", dist.Normal(x.mean(0), 0.7))
            with pyro.plate("member", 2, dim=-2):
                pyro.sample("b", dist.Normal(0.5 * a + 0.5 * x, 0.3))

    g = normal(0.4, 0.6) if with_global else 0.25
    a_terms, b_terms, x_terms = [], [], []
    for i in range(3):
        a = normal(float(data[:, i].mean()), 0.7)
        a_terms.append(expected_log_normal(a, g, 1.0) + entropy_of_normal(0.7))
        b_terms.append(0.0)
        x_terms.append(0.0)
        for j in range(2):
            x = float(data[j, i])
            b = normal(0.5 * a + 0.5 * x, 0.3)
            b_terms[i] += expected_log_normal(b, a, 1.0) + entropy_of_normal(0.3)
            x_terms[i] += expected_log_normal(x, b, 0.5)
    if not with_global:
        by_group = {"a": a_terms, "b": b_terms, "x": x_terms}
        return Case("nested plates, the outer shared", model, guide, by_group, frozenset("ab"), (data,))
    terms = {"g": expected_log_normal(g, 0.0, 1.0) + entropy_of_normal(0.6)}
    terms |= {"a": sum(a_terms), "b": sum(b_terms), "x": sum(x_terms)}
    return Case("nested plates under a global", model, guide, terms, frozenset("gab"), (data,))


def nested_under_global() -> Case:
    return _nested(with_global=True)


def nested_outer_shared() -> Case:
    return _nested(with_global=False)


def two_shared_plates() -> Case:
    data = torch.arange(6.0).reshape(3, 2) - 2

    def model(x):
        with pyro.plate("row", 3, dim=-2), pyro.plate("column", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("row", 3, dim=-2), pyro.plate("column", 2, dim=-1):
            pyro.sample("z", dist.Normal(0.8 * x, 0.4))

    z_terms, x_terms = [], []
    for row in data.tolist():
        draws = [normal(0.8 * x, 0.4) for x in row]
        z_terms.append([expected_log_normal(z, 0.0, 1.0) + entropy_of_normal(0.4) for z in draws])
        x_terms.append([expected_log_normal(x, z, 0.5) for x, z in zip(row, draws, strict=True)])
    return Case("two shared plates", model, guide, {"z": z_terms, "x": x_terms}, frozenset("z"), (data,))


def markov_chain() -> Case:
    """A state-space model under a filtering guide: every parent is drawn before its child on both sides."""

    def model(x):
        z = torch.tensor(0.0)
        for t in pyro.markov(range(1, len(x) + 1)):
            z = pyro.sample(f"z_{t}", dist.Normal(0.8 * z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[t - 1])

    def guide(x):
        z = torch.tensor(0.0)
        for t in pyro.markov(range(1, len(x) + 1)):
            z = pyro.sample(f"z_{t}", dist.Normal(0.5 * z + 0.3 * x[t - 1], 0.7))

    terms: dict[str, float] = {}
    z: Form | float = 0.0
    for t, x in enumerate(X.tolist(), 1):
        above, z = z, normal(0.5 * z + 0.3 * x, 0.7)
        terms[f"z_{t}"] = expected_log_normal(z, 0.8 * above, 1.0) + entropy_of_normal(0.7)
        terms[f"x_{t}"] = expected_log_normal(x, z, 0.5)
    return Case("markov chain, filtering guide", model, guide, terms, frozenset(f"z_{t}" for t in range(1, 5)), (X,))


def backward_chain() -> Case:
    """The same model under a guide that runs backwards: only z_1, which nothing is above in the model, has a KL."""
    case, steps = markov_chain(), len(X)

    def guide(x):
        z = torch.tensor(0.0)
        for t in range(steps, 0, -1):
            z = pyro.sample(f"z_{t}", dist.Normal(0.4 * z + 0.3 * x[t - 1], 0.7))

    draws: dict[int, Form] = {}
    below: Form | float = 0.0
    for t in range(steps, 0, -1):
        draws[t] = below = normal(0.4 * below + 0.3 * float(X[t - 1]), 0.7)
    terms = {}
    for t in range(1, steps + 1):
        above = draws[t - 1] if t > 1 else 0.0
        terms[f"z_{t}"] = expected_log_normal(draws[t], 0.8 * above, 1.0) + entropy_of_normal(0.7)
        terms[f"x_{t}"] = expected_log_normal(float(X[t - 1]), draws[t], 0.5)
    return Case("markov chain, backward guide", case.model, guide, terms, frozenset({"z_1"}), (X,))


def bottom_up_hvae() -> Case:
    """DESIGN's identity 4: z_2 -> z_1 -> x in the model, x -> z_1 -> z_2 in the guide. ELBO -1.856, not -2.356."""

    def model(x):
        z_2 = pyro.sample("z_2", dist.Normal(0.0, 1.0))
        z_1 = pyro.sample("z_1", dist.Normal(z_2, 1.0))
        pyro.sample("x", dist.Normal(z_1, 1.0), obs=x)

    def guide(x):
        z_1 = pyro.sample("z_1", dist.Normal(x / 2, 1.0))
        pyro.sample("z_2", dist.Normal(z_1 / 2, 1.0))

    z_1 = normal(0.5, 1.0)
    z_2 = normal(0.5 * z_1, 1.0)
    terms = {
        "z_2": expected_log_normal(z_2, 0.0, 1.0) + entropy_of_normal(1.0),
        "z_1": expected_log_normal(z_1, z_2, 1.0) + entropy_of_normal(1.0),
        "x": expected_log_normal(1.0, z_1, 1.0),
    }
    return Case("bottom-up hierarchy", model, guide, terms, frozenset({"z_2"}), (torch.tensor(1.0),))


def descent_through_delta() -> Case:
    """Guide w ~ N, z = .7 w + .1; model z ~ N(0, 1), w ~ N(z, 1): w's parent z is a function of w."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(z, 1.0))

    def guide():
        w = pyro.sample("w", dist.Normal(0.2, 0.8))
        pyro.sample("z", dist.Delta(0.7 * w + 0.1))

    w = normal(0.2, 0.8)
    z = 0.7 * w + 0.1
    terms = {
        "z": expected_log_normal(z, 0.0, 1.0),
        "w": expected_log_normal(w, z, 1.0) + entropy_of_normal(0.8),
    }
    return Case("descent through a Delta", model, guide, terms)


PROGRAMS = (
    one_latent,
    vae,
    global_and_local,
    nested_under_global,
    nested_outer_shared,
    two_shared_plates,
    markov_chain,
    backward_chain,
    bottom_up_hvae,
    descent_through_delta,
)
