"""What ``ppl sample`` draws: samples of any pair, and the film of how they come about.

    diffusion              x_t and the predicted x_0 by t, on the way down
    chain of two layers    E[x | z] with upper layers held and lower ones redrawn
    or more

Draws depend on the seed alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inference.ancestral import ancestral_trajectory
from inference.commands.choices import seeded
from inference.progress import Progress
from inference.views import diffusion as views
from inference.views.images import Range
from inference.views.plot_data import Samples, at_labels, samples, to_array, trajectory_samples
from inference.views.progressive import draw_progressive, progressive
from ppl_models.ddpm import DDPM
from ppl_models.diffusion import Diffusion
from ppl_models.pair import ModelGuidePair

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

SAMPLES_AT_ONCE = 1024
DATA_BESIDE = 1000
Clip = tuple[float, float] | None


def check_options(pair: ModelGuidePair, steps: int | None, eta: float, clip: Clip, film: Path | None) -> None:
    """Refuses options that mean nothing for a pair, before anything is drawn.

    Raises:
        ValueError: steps, eta or a clip without Gaussian steps, or a film of a single latent layer.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> check_options(LinearGaussian.random(data_dim=3, latent_dim=2), None, 1.0, None, None)
    """
    name = type(pair).__name__
    if not isinstance(pair, DDPM) and (steps is not None or eta != 1 or clip is not None):
        raise ValueError(f"expected --steps, --eta and --clip with a ddpm only, got {name}: leave them out")
    if isinstance(pair, DDPM) and steps is not None and steps > pair.num_timesteps:
        raise ValueError(f"expected --steps of at most T = {pair.num_timesteps}, got {steps}")
    if film is None:
        return
    if len(pair.latent_sites) < 2:
        raise ValueError(
            f"expected --film with a diffusion or several latent layers, got {name} with one: leave it out"
        )
    if not isinstance(pair, Diffusion) and len(pair.data_shape) < 2:
        raise ValueError(
            f"expected images for the --film of a {name}, got data of shape {list(pair.data_shape)}: leave it out"
        )


def draw(
    pair: ModelGuidePair, num: int, steps: int | None = None, eta: float = 1.0, clip: Clip = None, seed: int = 0
) -> Samples:
    """Samples of a pair, :data:`SAMPLES_AT_ONCE` at a time; of a diffusion under ``steps``, ``eta`` and ``clip``.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> draw(LinearGaussian.random(data_dim=3, latent_dim=2), 5).draws.shape
        (5, 3)
    """
    pair = pair.in_turn(num)
    if isinstance(pair, Diffusion):
        trajectory = ancestral_trajectory(pair, num, steps, eta=eta, clip=clip, seed=seed, batch_size=SAMPLES_AT_ONCE)
        drawn = trajectory_samples(trajectory)
        return replace(drawn, law=drawn.law + at_labels(pair))
    chunks = []
    with seeded(seed), Progress("drawing samples", num, unit="samples") as progress:
        for start in range(0, num, SAMPLES_AT_ONCE):
            count = min(SAMPLES_AT_ONCE, num - start)
            chunks.append(samples(pair.of_rows(slice(start, start + count)), count))
            progress.advance(count)
    means = [chunk.means for chunk in chunks if chunk.means is not None]
    draws = np.concatenate([chunk.draws for chunk in chunks])
    return Samples(draws, np.concatenate(means) if means else None, law=chunks[0].law)


def with_data_beside(drawn: Samples, folder: Path, label: Tensor | None = None) -> Samples:
    """The samples with the run's held-out data, if these can be read again; if not, a printed line says why.

    Args:
        drawn: the samples.
        folder: the RUN folder.
        label: the one that they were drawn at, to show data of; of several, or none, any data are shown.
    """
    from inference.commands.opening import open_run

    try:
        opened = open_run(folder, num_data=DATA_BESIDE)
    except ValueError as error:
        print(f"without data beside them: {error}")
        return drawn
    one = label is not None and label.dim() == 0 and opened.labels is not None
    shown = opened.x[opened.labels == label] if one else opened.x
    return replace(drawn, data=to_array(shown) if len(shown) else None)


def draw_film(
    pair: ModelGuidePair, steps: int | None, eta: float, clip: Clip, seed: int, value_range: Range | None
) -> tuple[Figure, str]:
    """How samples come about, as a picture, and a table that goes with it or nothing.

    Args:
        pair: a diffusion, or a chain of latent layers over images.
        steps: see :func:`inference.ancestral.ancestral_trajectory`.
        eta: see there.
        clip: see there.
        seed: of the draws.
        value_range: of images; None for points.
    """
    if not isinstance(pair, Diffusion):
        shown = progressive(pair, seed=seed)
        return draw_progressive(shown, value_range), shown.table()
    return views.draw_film(pair, steps, eta, clip, seed, value_range), ""
