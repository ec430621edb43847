"""The pictures of a report: which ones suit a run, and how each is drawn.

    every system                learning curve, terms of the bound, samples, the two programs
    learned latents             + reconstructions, traversals, latent map, posterior
    several learned layers      + redraws with the upper layers held
    a guide of points           without posterior and, as nothing is known of z, traversals
    diffusion                   + film strip of x_t and the predicted x_0; the bound is drawn by t
    text                        samples as text in place of pictures

The one constraint: pictures depend on the run, the data and torch's random state, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from inference.bounds.diffusion import DiffusionDecomposition
from inference.bounds.terms import Decomposition
from inference.training.runs import Run
from inference.views.bounds import has_point_guide
from inference.views.chain_programs import pair_svg
from inference.views.images import Array, Range, is_image, value_range_of
from inference.views.latent_data import latent_map, traversal
from inference.views.plot_data import bound_terms, learning_curve, reconstructions, samples
from inference.views.progressive import draw_progressive, progressive
from ppl_models.diffusion import Diffusion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_SAMPLES = 64
NUM_RECONSTRUCTED_IMAGES, NUM_RECONSTRUCTED_POINTS = 20, 200
NUM_POSTERIOR_DATA, NUM_POSTERIOR_DRAWS = 2, 1000
TRACED_DATA = 4  # rows that the programs are shown on

OF_LATENTS = ("reconstructions.png", "traversal.png", "latent_map.svg", "posterior.png")
OF_DRAWN_LATENTS = ("traversal.png", "posterior.png")


def pictures_of(run: Run, standard: Mapping[str, Entry]) -> dict[str, Entry]:
    """The pictures that mean something for a run, by file name, in the page's order.

    Args:
        run: what is reported.
        standard: those of one layer of learned latents, :data:`PICTURES`.
    """
    pair = run.pair
    if run.config["data"].get("alphabet") is not None:
        dropped: tuple[str, ...] = (*OF_LATENTS, "samples.png")
    elif isinstance(pair, Diffusion):
        dropped = OF_LATENTS
    else:
        dropped = OF_DRAWN_LATENTS if has_point_guide(pair) else ()
    chosen = {}
    for file, entry in standard.items():
        if file not in dropped:
            chosen[file] = BOUND_BY_T if file == "terms.svg" and isinstance(pair, Diffusion) else entry
        if file == "samples.png" and file in chosen and len(pair.latent_sites) > 1:
            chosen |= FILM if isinstance(pair, Diffusion) else PROGRESSIVE
    if pair.num_labels is None:
        return chosen
    return {
        file: (title, caption.replace(UNSEEN, "") + GIVEN_LABELS.get(file, ""), draw)
        for file, (title, caption, draw) in chosen.items()
    }


def shown_range(data: Mapping[str, Any], x: Tensor | Array) -> Range | None:
    """What is black and what is white in pictures of the data: by their scaling, or their extremes where it states none.

    Args:
        data: the run's statement of its data, ``run.config["data"]``.
        x: the data, for their extremes.

    Returns:
        (low, high); None for points.

    Example:
        >>> import torch
        >>> shown_range({"scaling": "symmetric", "levels": 17}, torch.zeros(3, 8, 8))
        (-1.0, 1.0)
    """
    if not is_image(x.shape[1:]):
        return None
    if data["scaling"] in ("unit", "symmetric") or data["levels"] is not None:
        return value_range_of(data["scaling"], data["levels"])
    return float(x.min()), float(x.max())


@dataclass(frozen=True)
class Shown:
    """What pictures are drawn from."""

    run: Run
    x: Tensor
    labels: Tensor | None
    label_names: Sequence[str] | None
    d: Decomposition
    value_range: Range | None


Entry = tuple[str, str, Callable[[Shown], "Figure | bytes"]]  # title, caption, and what draws it


def _learning_curve(shown: Shown) -> Figure:
    from inference.views.figures import draw_learning_curve

    rows = shown.run.metrics
    held_out = not str(shown.run.config["validation"]).startswith("the training data themselves")
    name = "validation" if held_out else "train, after each epoch"  # the same data, by the weights of the epoch's end
    return draw_learning_curve(learning_curve(rows[len(rows) // 20 :], name))


def _posterior(shown: Shown) -> Figure:
    from inference.posterior import first_scalars, plot_posterior, to_datatree

    pair = shown.run.pair.of_rows(slice(NUM_POSTERIOR_DATA))
    tree = to_datatree(pair, shown.x[:NUM_POSTERIOR_DATA], num_samples=NUM_POSTERIOR_DRAWS, groups=("posterior",))
    return plot_posterior(tree, var_names=pair.latent_sites, coords=first_scalars(tree, pair.latent_sites))


def _bound_terms(shown: Shown) -> Figure:
    from inference.views.figures import draw_bound_terms

    return draw_bound_terms(bound_terms(shown.d))


def _samples(shown: Shown) -> Figure:
    from inference.views.figures import draw_samples

    count = NUM_SAMPLES if shown.value_range is not None else max(NUM_SAMPLES, len(shown.x))
    return draw_samples(samples(shown.run.pair, count, shown.x), shown.value_range)


def _reconstructions(shown: Shown) -> Figure:
    from inference.views.figures import draw_reconstructions

    count = NUM_RECONSTRUCTED_POINTS if shown.value_range is None else NUM_RECONSTRUCTED_IMAGES
    pair = shown.run.pair.of_rows(slice(count))
    return draw_reconstructions(reconstructions(pair, shown.x[:count]), shown.value_range)


def _traversal(shown: Shown) -> Figure:
    from inference.views.figures import draw_traversal

    return draw_traversal(traversal(shown.run.pair, shown.x), shown.value_range)


def _latent_map(shown: Shown) -> Figure:
    from inference.views.figures import draw_latent_map

    return draw_latent_map(latent_map(shown.run.pair, shown.x, shown.labels, label_names=shown.label_names))


def _graph(shown: Shown) -> bytes:
    return pair_svg(shown.run.pair.of_rows(slice(TRACED_DATA)), shown.x[:TRACED_DATA])


UNSEEN = " Labels, where there are any, were not seen in training."
GIVEN_LABELS = {  # of a run that is conditioned on labels
    "samples.png": " Each is drawn at the label of the datum in its place.",
    "traversal.png": " At the label of the first datum.",
    "progressive.png": " At the label of the first datum.",
    "latent_map.svg": " The guide knows the label, so that z need not tell it: where labels part the plane, z still does.",
    "film.png": " At the labels of the first data.",
}

PICTURES: dict[str, Entry] = {
    "learning_curve.svg": (
        "Learning curve",
        "Left: what was minimised, over each epoch's steps and after them. Right: where each epoch stands in the plane of rate "
        "and distortion, whose sum is −ELBO; moving along a dotted line trades one for the other at the same bound. Of "
        "many epochs the first twentieth is left out: it would set the scale.",
        _learning_curve,
    ),
    "terms.svg": (
        "The bound, term by term",
        "Each site's E_q[log p − log q]. Where both bars are there, closed form and draws estimate the same number.",
        _bound_terms,
    ),
    "samples.png": (
        "Samples",
        "What the model draws, beside data; for images also the means at the same z, without the likelihood's own noise.",
        _samples,
    ),
    "reconstructions.png": (
        "Reconstructions",
        "Held against the data: the mean of x at the guide's mean of z, with the bound of each datum.",
        _reconstructions,
    ),
    "traversal.png": (
        "Traversals",
        "What each dimension of z does, most active first. Activity is the variance of the guide's mean over data: near 0, "
        "the guide says the same for all.",
        _traversal,
    ),
    "latent_map.svg": (
        "Latent map",
        f"Where the guide puts each datum, on the two most active dimensions.{UNSEEN}",
        _latent_map,
    ),
    "posterior.png": (
        "Posterior",
        "What the guide says of each latent dimension for the first two data. ppl posterior writes the draws themselves, with "
        "prior and predictive ones, for ArviZ.",
        _posterior,
    ),
    "programs.svg": (
        "The two programs",
        "Each site with its law in the model and in the guide, and who is computed from whom; shown on the first four data.",
        _graph,
    ),
}


def _bound_by_t(shown: Shown) -> Figure:
    from inference.views.diffusion import bound_by_t, draw_bound_by_t

    assert isinstance(shown.d, DiffusionDecomposition)
    return draw_bound_by_t(bound_by_t(shown.d))


def _film(shown: Shown) -> Figure:
    from inference.views.diffusion import draw_film

    assert isinstance(shown.run.pair, Diffusion)
    return draw_film(shown.run.pair, value_range=shown.value_range)


def _progressive(shown: Shown) -> Figure:
    return draw_progressive(progressive(shown.run.pair), shown.value_range)


BOUND_BY_T: Entry = (
    "The bound, term by term",
    "L_t by t, and how the terms add up: L_T, what the noise still knows of the data; the steps between; L_0, the last one.",
    _bound_by_t,
)
FILM: dict[str, Entry] = {
    "film.png": (
        "On the way down",
        "Samples from noise to data: x_t, and the x_0 that the network predicts from it.",
        _film,
    )
}
PROGRESSIVE: dict[str, Entry] = {
    "progressive.png": (
        "Layer by layer",
        "What is left to chance once the upper layers are held: E[x | z] with the lower ones redrawn. Coarse is what the "
        "leading principal components hold, fine the rest.",
        _progressive,
    )
}
