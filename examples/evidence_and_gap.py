"""log p(x) = ELBO(x) + KL(q(z | x) || p(z | x)): lecture notes 000 (evidence and its gap) and 004 ("inference error").

A linear-Gaussian pair knows every number of that line in closed form. Beside each stands what the Pyro programs give:
the bound by draws, and the zero-variance certificate, where the guide is the posterior and every draw gives log p(x).
"""

import argparse

import pyro
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from inference import decompose_elbo
from ppl_models import LinearGaussian


def main(num_particles: int = 2000) -> dict[str, float]:
    """Prints the identity's numbers, exact beside drawn; returns them."""
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pair = LinearGaussian.random(data_dim=5, latent_dim=3, guide="mean_field")
    exact = LinearGaussian.random(data_dim=5, latent_dim=3, guide="exact")
    with torch.no_grad():
        x = pair.model(size=1)
        guide, posterior = pair.guide_distribution(x), pair.posterior(x)
        q = MultivariateNormal(guide.mean, torch.diag_embed(guide.variance))
        gap = float(kl_divergence(q, posterior))
        evidence = float(pair.log_evidence(x))
        bound = decompose_elbo(pair.model, pair.guide, x, num_particles=num_particles)
        certificate = decompose_elbo(exact.model, exact.guide, x, num_particles=10)

    print("notes 000:   log p(x) = E_q[log p(x,h)/q(h|x)] + E_q[log q(h|x)/p(h|x)]")
    print(f"             {evidence:.4f} = {evidence - gap:.4f} + {gap:.4f}      (closed forms)")
    print(f"by draws     ELBO = {float(bound.elbo):.4f} +- {float(bound.std_error):.4f}\n")
    print(bound.table(), "\n")
    print("with the posterior itself as guide, each draw of log p(x,z) - log q(z|x) is log p(x):")
    print(f"             {float(certificate.monte_carlo):.10f} +- {float(certificate.monte_carlo_std_error):.1e}")
    return {
        "evidence": evidence,
        "gap": gap,
        "elbo": float(bound.elbo),
        "elbo_std_error": float(bound.std_error),
        "certificate": float(certificate.monte_carlo),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-particles", type=int, default=2000)
    main(**vars(parser.parse_args()))
