"""Bounds as plain data, as ``ppl terms`` and ``ppl evidence`` write them to JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.bounds.diffusion import DiffusionDecomposition
    from inference.bounds.terms import Decomposition


def terms_record(d: Decomposition) -> dict[str, Any]:
    """A decomposition as plain data, averaged over data; None where there is no closed form.

    Example:
        >>> import torch
        >>> from inference.bounds import decompose_elbo
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> record = terms_record(decompose_elbo(pair.model, pair.guide, torch.zeros(4, 3), num_particles=10))
        >>> list(record["terms"]), record["units"]
        (['z', 'x', 'ELBO'], 'nats, mean over 4 data')
    """
    from inference.views.plot_data import bound_terms

    shown = bound_terms(d)
    columns = {
        "best": shown.best,
        "best_std_error": shown.best_error,
        "monte_carlo": shown.monte_carlo,
        "monte_carlo_std_error": shown.monte_carlo_error,
    }
    rows: dict[str, dict[str, Any]] = {
        name: {key: float(values[i]) if math.isfinite(values[i]) else None for key, values in columns.items()}
        for i, name in enumerate(shown.names)
    }
    for name, term in d.terms.items():
        best, best_error = rows[name].pop("best"), rows[name].pop("best_std_error")
        half = "log_p_drawn_entropy_closed" if term.with_entropy is not None else "closed_form"
        rows[name] |= {
            half: best,
            f"{half}_std_error": best_error,
            "kind": term.kind,
            "z_score": term.z_score,
            "reason": term.reason,
        }
    return {"units": shown.per, "num_particles": d.num_particles, "note": d.note, "terms": rows}


def by_t_record(d: DiffusionDecomposition) -> dict[str, Any]:
    """A diffusion's bound as plain data: L_t for t = 0..T with its standard error, nats, averaged over data, and their sum.

    Example:
        >>> import torch
        >>> from inference.bounds.diffusion import decompose_diffusion
        >>> from ppl_models.processes import NoiseSchedule
        >>> class Zero(torch.nn.Module):
        ...     def forward(self, x_t, t):
        ...         return 0 * x_t
        >>> from ppl_models import DDPM
        >>> from ppl_models.likelihoods import Normal
        >>> pair = DDPM(Zero(), NoiseSchedule.cosine(5), (2,), likelihood=Normal())
        >>> record = by_t_record(decompose_diffusion(pair, torch.zeros(3, 2), num_particles=2))
        >>> record["t"], len(record["loss"])
        ([0, 1, 2, 3, 4, 5], 6)
    """
    curve = d.curve()
    bits, bits_error = d.bits_per_dim()
    return {
        "units": f"nats, mean over {len(d.elbo)} data",
        "num_particles": d.num_particles,
        "note": d.note,
        "t": curve.t.flip(0).tolist(),
        "loss": curve.loss.flip(0).tolist(),
        "std_error": curve.std_error.flip(0).tolist(),
        "rate": float(d.rate.mean()),
        "distortion": float(d.distortion.mean()),
        "elbo": float(d.elbo.mean()),
        "elbo_std_error": d.mean_std_error,
        "bits_per_dim": bits,
        "bits_per_dim_std_error": bits_error,
    }
