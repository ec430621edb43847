"""How good a RUN is: ``ppl evidence`` (likelihood with its error, ladder of bounds, gaps) and ``ppl calibrate``.

Each opens the RUN, calls the library and prints. Draws depend on ``--seed`` alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inference.commands.looking import Force, RunFolder, Seed, Spec
from inference.commands.writing import check_new, check_suffix, keep_record, write_rows

if TYPE_CHECKING:
    from torch import Tensor

    from inference.bounds.diffusion import DiffusionDecomposition
    from inference.bounds.evidence import Evidence
    from inference.bounds.gaps import InferenceGap
    from inference.commands.opening import Opened

PICTURES = (".png", ".svg", ".pdf")
FEW_STEPS = 5  # of a diffusion, up to which whole chains are weighted
EXACT_ROWS = 2**20  # (datum, z) pairs, up to which the evidence of discrete latents is summed as well


def evidence(
    run: RunFolder,
    particles: Annotated[
        int | None,
        typer.Option(
            metavar="K", min=1, help="draws from the guide per datum", show_default="5000; 4 a term for a diffusion"
        ),
    ] = None,
    se: Annotated[
        float | None,
        typer.Option(metavar="NATS", min=1e-6, help="draw on until each datum's standard error is below this"),
    ] = None,
    num_data: Annotated[int, typer.Option(metavar="N", min=1, help="how many held-out data, the first ones")] = 1000,
    gaps: Annotated[
        bool, typer.Option("--gaps", help="also split log p(x) - ELBO by refining the guide per datum")
    ] = False,
    gap_steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="of the refining, at most", show_default="8000"),
    ] = None,
    ladder: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="also draw the ladder of bounds, on data simulated from the model"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="also write each datum's numbers, a row each in the data's order"),
    ] = None,
    ladder_data: Annotated[int, typer.Option(metavar="N", min=2, help="how many data to simulate for the ladder")] = 50,
    data: Spec = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Estimate log p(x) of held-out data by importance weighting, per datum with its error, and say how far to trust it.

    IWAE-K bound, standard error, effective sample size and Pareto k-hat; nats and bits/dim. The means, and those of the gaps,
    are also written to RUN/evidence.json. With --ladder: ELBO, IWAE-K, AIS and reverse AIS, which bound log p(x) from both
    sides. Where the latents can be summed over, log p(x) is also exact; of a diffusion of many steps it is the ELBO, a lower
    bound, and said to be one.
    """
    from inference.bounds.diffusion import decompose_diffusion
    from inference.commands.choices import seeded
    from inference.commands.opening import open_run
    from inference.views.bounds import PARTICLES_A_TERM, has_point_guide
    from ppl_models.diffusion import Diffusion

    if ladder is not None:
        check_suffix(ladder, *PICTURES)
        check_new(ladder, force=force)
    if out is not None:
        check_suffix(out, ".csv")
        check_new(out, force=force)
    opened = open_run(run, data, num_data)
    pair, x = opened.pair, opened.x
    if not pair.bounds_evidence:
        raise ValueError(
            "expected a model with a prior p(z), got an autoencoder: it has no p(x) to estimate; ppl terms shows its loss"
        )
    if has_point_guide(pair):
        raise ValueError(
            f"expected a guide that draws z, got {type(pair).__name__}, whose guide is one point for each datum: there are no "
            "importance weights to average; ppl terms shows its bound"
        )
    if isinstance(pair, Diffusion) and pair.num_timesteps > FEW_STEPS:
        if se is not None or gaps or ladder is not None:
            raise ValueError(
                f"expected no --se, --gaps or --ladder for a diffusion of more than {FEW_STEPS} steps, got T = "
                f"{pair.num_timesteps}: weights of whole chains are too uneven for them; leave them out"
            )
        d = decompose_diffusion(pair, x, particles or PARTICLES_A_TERM, seed=seed)
        _bound(d, opened.words, seed, run / "evidence.json", force=force)
        numbers = {name: getattr(d, name) for name in ("elbo", "std_error", "rate", "distortion")}
    else:
        numbers = _weighted(opened, run, particles, se, gaps, gap_steps, seed, force=force)
    if out is not None:
        columns: dict[str, list[Any]] = {name: values.tolist() for name, values in numbers.items()}
        names = opened.data.label_names
        if opened.labels is not None:
            labels = opened.labels.tolist()
            columns["label"] = labels if names is None else [names[i] for i in labels]
        print(write_rows(out, columns))
    if ladder is not None:
        with seeded(seed):
            _ladder(pair, ladder_data, ladder, force=force)


def _weighted(
    opened: Opened,
    run: Path,
    particles: int | None,
    se: float | None,
    gaps: bool,
    gap_steps: int | None,
    seed: int,
    *,
    force: bool,
) -> dict[str, Tensor]:
    """Prints and keeps the evidence by importance weights; each datum's numbers."""
    import torch

    from inference.bounds.importance import log_evidence
    from inference.commands.choices import seeded
    from ppl_models.discrete_vae import CategoricalVAE

    pair, x = opened.pair, opened.x
    with seeded(seed):
        estimate = log_evidence(pair.model, pair.guide, x, num_particles=particles or 5000, target_std_error=se)
        print(f"{opened.words}\n{estimate.table()}")
        record = {"data": opened.words, "seed": seed, **evidence_record(estimate)}
        if isinstance(pair, CategoricalVAE) and len(x) * pair.num_classes**pair.num_latents <= EXACT_ROWS:
            with torch.no_grad():
                exact = float(pair.log_evidence(x).double().mean())
            record["exact_log_evidence"] = exact
            states = f"{pair.num_classes}^{pair.num_latents}"
            print(f"  exact, summed over all {states} values of z: mean log p(x) = {exact:.4f} nats")
        print(keep_record(run / "evidence.json", record, force=force))
        if gaps:
            from inference.bounds.gaps import inference_gap

            gap = inference_gap(pair, x, max_steps=gap_steps)
            print(f"\n{gap.table()}")
            print(keep_record(run / "evidence.json", record | {"gaps": gap_record(gap)}, force=True))
    columns = ("log_evidence", "std_error", "elbo", "ess", "k_hat", "doubtful", "bits_per_dim")
    return {name: getattr(estimate, name) for name in columns}


def calibrate(
    run: RunFolder,
    simulations: Annotated[int, typer.Option(metavar="N", min=100, help="data simulated from the model")] = 1000,
    figure: Annotated[Path | None, typer.Option(metavar="FILE.png", help="also draw the ranks")] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Check the guide against the model by simulation: ranks of the true z among the guide's draws must be uniform.

    Simulation-based calibration (Talts et al. 2018, arXiv:1804.06788), each latent dimension and the log joint. A run that is
    conditioned on labels is simulated at each of them in turn.
    """
    from inference.bounds.calibration import simulation_based_calibration
    from inference.commands.choices import seeded
    from inference.commands.opening import check_draws
    from inference.training.runs import load_run

    if figure is not None:
        check_suffix(figure, *PICTURES)
        check_new(figure, force=force)
    opened = load_run(run)
    check_draws(opened.pair, "hold against the model", "ppl terms shows by t how far the model is from it")
    pair = opened.pair
    if pair.num_labels is not None:
        pair = pair.given(list(range(pair.num_labels)))
    with seeded(seed):
        calibration = simulation_based_calibration(pair, num_simulations=simulations)
    print(calibration.table())
    if figure is not None:
        from inference.views.calibration import draw_calibration, rank_plot
        from inference.views.figures import save_figure

        save_figure(draw_calibration(rank_plot(calibration)), figure, overwrite=force)
        print(f"wrote {figure}")


def gap_record(gap: InferenceGap) -> dict[str, Any]:
    """An inference gap as plain data: means over data in nats, with their errors, and whether the search converged."""
    parts = {
        "amortisation_gap": (gap.amortisation_gap, gap.amortisation_gap_std_error),
        "approximation_gap": (gap.approximation_gap, gap.approximation_gap_std_error),
        "gap": (gap.gap, gap.gap_std_error),
    }
    record: dict[str, Any] = {"num_data": len(gap.elbo), "converged": bool(gap.refinement.converged)}
    for name, (value, error) in parts.items():
        record[name] = float(value.double().mean())
        record[f"{name}_std_error"] = float(error.double().square().sum().sqrt()) / len(error)
    return record


def evidence_record(estimate: Evidence) -> dict[str, Any]:
    """An evidence estimate as plain data: means over data, in nats unless the name says otherwise.

    A number that is not finite (the standard error of one particle) is None, for JSON has none.

    Example:
        >>> import torch
        >>> from inference.bounds.importance import log_evidence
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> record = evidence_record(log_evidence(pair.model, pair.guide, torch.zeros(4, 3), num_particles=100))
        >>> record["num_particles"], record["num_bad_k_hat"]
        (100, 0)
    """
    means = {
        "log_evidence": float(estimate.log_evidence.mean()),
        "std_error": estimate.mean_std_error,
        "largest_std_error": float(estimate.std_error.max()),
        "bits_per_dim": float(estimate.bits_per_dim.mean()),
        "elbo": float(estimate.elbo.mean()),
        "median_ess": float(estimate.ess.median()),
    }
    return {
        **{name: value if math.isfinite(value) else None for name, value in means.items()},
        "num_bad_k_hat": estimate.num_bad_k_hat,
        "num_particles": estimate.num_particles,
        "note": estimate.note,
        "warnings": list(estimate.warnings),
    }


def _bound(d: DiffusionDecomposition, words: str, seed: int, path: Path, *, force: bool) -> None:
    """Prints and keeps a diffusion's ELBO in place of its evidence."""
    from inference.commands.records import by_t_record

    elbo, error = float(d.elbo.mean()), d.mean_std_error
    print(
        f"{words}\n{d.table()}\n  log p(x_0) >= {elbo:.4f} +- {error:.4f} nats: the ELBO, a lower bound. How far "
        "below log p(x_0) it lies is not known: weights of whole chains are too uneven to say"
    )
    dropped = ("t", "loss", "std_error")
    record = {key: value for key, value in by_t_record(d).items() if key not in dropped}
    print(keep_record(path, {"data": words, "seed": seed, "bound": "lower: the ELBO", **record}, force=force))


def _ladder(pair: Any, num_data: int, path: Path, *, force: bool) -> None:
    from inference.bounds.ladder import evidence_ladder
    from inference.views.figures import save_figure
    from inference.views.ladder import draw_ladder, ladder_picture

    rungs = evidence_ladder(pair, num_data=num_data)
    print(f"\n{rungs.table()}")
    save_figure(draw_ladder(ladder_picture(rungs)), path, overwrite=force)
    print(f"wrote {path}")
