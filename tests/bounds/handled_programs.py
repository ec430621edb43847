"""Programs under Pyro's effect handlers, and sites that are no plain draws, each with its ELBO known term by term.

Masks, scales, subsampling, factors, deterministic sites, point masses and a full covariance, on linear-Gaussian programs, so
that the exact terms are affine forms (:mod:`tests.oracles.linear_forms`) as in :mod:`tests.bounds.gaussian_programs`.
"""

from __future__ import annotations

from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

from tests.bounds.elbo_case import Case
from tests.bounds.gaussian_programs import X, global_and_local, one_latent
from tests.oracles.linear_forms import entropy_of_normal, expected_log_normal, normal


def masked() -> Case:
    """Data 2 and 3 are missing: their latents and observations are masked out by a handler on both sides."""
    mask = torch.tensor([True, False, False, True])

    def model(x):
        with pyro.plate("data", 4), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", 4), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.5 * x, 0.6))

    z_terms, x_terms = [], []
    for x, kept in zip(X.tolist(), mask.tolist(), strict=True):
        z = normal(0.5 * x, 0.6)
        z_terms.append(kept * (expected_log_normal(z, 0.0, 1.0) + entropy_of_normal(0.6)))
        x_terms.append(kept * expected_log_normal(x, z, 0.5))
    return Case("poutine.mask", model, guide, {"z": z_terms, "x": x_terms}, frozenset("z"), (X,))


def masked_laws() -> Case:
    """The same by ``.mask`` on the laws, where a masked datum is NaN, which must not surface."""
    mask = torch.tensor([True, False, False, True])
    data = torch.where(mask, X, torch.tensor(float("nan")))

    def model(x):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).mask(mask))
            pyro.sample("x", dist.Normal(z, 0.5, validate_args=False).mask(mask), obs=x)

    def guide(x):
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(0.5 * torch.where(mask, x, torch.zeros(4)), 0.6).mask(mask))

    return Case("distribution.mask", model, guide, masked().terms, frozenset("z"), (data,))


def mask_in_the_model_only() -> Case:
    """A masked prior under an unmasked guide leaves the guide's entropy: no KL of any two laws."""

    def model(x):
        with poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.5, 0.8))

    z = normal(0.5, 0.8)
    terms = {"z": entropy_of_normal(0.8), "x": expected_log_normal(1.0, z, 1.0)}
    return Case("mask in the model only", model, guide, terms, args=(torch.tensor(1.0),))


def scaled() -> Case:
    case = global_and_local()
    scale = poutine.scale(scale=0.25)
    terms = {site: 0.25 * term for site, term in case.terms.items()}
    return Case("poutine.scale", scale(case.model), scale(case.guide), terms, case.closed, case.args)


def scaled_in_the_model_only() -> Case:
    case = one_latent()
    z = normal(0.3, 0.7)
    terms = {
        "z": 3 * expected_log_normal(z, 0.0, 1.0) + entropy_of_normal(0.7),
        "x": 3 * expected_log_normal(1.0, z, 0.5),
    }
    model = poutine.scale(case.model, scale=3.0)
    return Case("scale in the model only", model, case.guide, terms, args=case.args)


def subsampled() -> Case:
    """Minibatches of 2 from 4: each of the two positions holds, in expectation, half of the full ELBO."""

    def model(x):
        with pyro.plate("data", 4, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

    def guide(x):
        with pyro.plate("data", 4, subsample_size=2) as index:
            pyro.sample("z", dist.Normal(0.5 * x[index], 0.6))

    z_sum = x_sum = 0.0
    for x in X.tolist():
        z = normal(0.5 * x, 0.6)
        z_sum += expected_log_normal(z, 0.0, 1.0) + entropy_of_normal(0.6)
        x_sum += expected_log_normal(x, z, 0.5)
    terms = {"z": [z_sum / 2] * 2, "x": [x_sum / 2] * 2}
    return Case("subsampled plate", model, guide, terms, frozenset("z"), (X,), fast=False, num_particles=600)


def subsampled_under_global() -> Case:
    """Minibatches below a global latent: SVI's classic, one number."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 4, subsample_size=2), pyro.poutine.scale(scale=1.0):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=pyro.subsample(x, event_dim=0))

    def guide(x):
        pyro.sample("mu", dist.Normal(0.3, 0.4))

    mu = normal(0.3, 0.4)
    terms = {
        "mu": expected_log_normal(mu, 0.0, 2.0) + entropy_of_normal(0.4),
        "x": sum(expected_log_normal(x, mu, 1.0) for x in X.tolist()),
    }
    return Case(
        "subsampled data, global latent", model, guide, terms, frozenset({"mu"}), (X,), False, num_particles=600
    )


def factors() -> Case:
    """A factor 0.7 z in the model and one 0.2 z in the guide, the latter subtracted as a log-density of q is."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("tilt", 0.7 * z)
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        z = pyro.sample("z", dist.Normal(0.3 * x, 0.7))
        pyro.factor("correction", 0.2 * z, has_rsample=True)

    terms = {**one_latent().terms, "tilt": 0.7 * 0.3, "correction": -0.2 * 0.3}
    return Case("factors on both sides", model, guide, terms, frozenset("z"), (torch.tensor(1.0),))


def deterministic() -> Case:
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        doubled = pyro.deterministic("doubled", 2 * z)
        pyro.sample("x", dist.Normal(doubled / 2, 0.5), obs=x)

    def guide(x):
        loc = pyro.deterministic("loc", 0.3 * x)
        pyro.sample("z", dist.Normal(loc, 0.7))

    return Case("deterministic sites", model, guide, one_latent().terms, frozenset("z"), (torch.tensor(1.0),))


def point_mass() -> Case:
    """MAP: the guide puts all mass at one point, and the latent's term is log p there."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        pyro.sample("z", dist.Delta(0.8 * x))

    terms = {"z": expected_log_normal(0.8, 0.0, 1.0), "x": expected_log_normal(1.0, 0.8, 0.5)}
    return Case("Delta guide", model, guide, terms, args=(torch.tensor(1.0),))


def conditioned() -> Case:
    """The data come by a handler instead of ``obs=``."""
    case = one_latent()

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5))

    def conditioned_model(x):
        return poutine.condition(model, data={"x": x})(x)

    return replace(case, name="poutine.condition", model=conditioned_model)


def reparametrised() -> Case:
    """A non-centred model: its latent is the standardised one, and z itself a deterministic function of it."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.5, 2.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        pyro.sample("z_decentered", dist.Normal(0.2, 0.3))

    standard = normal(0.2, 0.3)
    terms = {
        "z_decentered": expected_log_normal(standard, 0.0, 1.0) + entropy_of_normal(0.3),
        "x": expected_log_normal(1.0, 0.5 + 2.0 * standard, 0.5),
    }
    model = poutine.reparam(model, config={"z": LocScaleReparam(0.0)})
    return Case("LocScaleReparam", model, guide, terms, frozenset({"z_decentered"}), (torch.tensor(1.0),))


def full_covariance() -> Case:
    """A full Gaussian guide against a diagonal prior: z = m + L e."""
    loc, tril = torch.tensor([0.5, -0.3, 0.1]), torch.tensor([[0.8, 0.0, 0.0], [0.3, 0.6, 0.0], [-0.2, 0.1, 0.9]])

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 0.5])).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)

    def guide(x):
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

    unit = [normal(0.0, 1.0) for _ in range(3)]
    z = [sum((tril[i, j].item() * unit[j] for j in range(3)), loc[i].item()) for i in range(3)]
    prior = sum(expected_log_normal(z[i], m, s) for i, (m, s) in enumerate([(0.0, 1.0), (1.0, 2.0), (0.0, 0.5)]))
    terms = {
        "z": prior + sum(entropy_of_normal(tril[i, i].item()) for i in range(3)),  # log |L| is on its diagonal
        "x": expected_log_normal(1.0, z[0] + z[1] + z[2], 0.5),
    }
    return Case("full guide, diagonal prior", model, guide, terms, frozenset("z"), (torch.tensor(1.0),))


PROGRAMS = (
    masked,
    masked_laws,
    mask_in_the_model_only,
    scaled,
    scaled_in_the_model_only,
    subsampled,
    subsampled_under_global,
    factors,
    deterministic,
    point_mass,
    conditioned,
    reparametrised,
    full_covariance,
)
