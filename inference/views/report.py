"""A run on one page: ``report.html``, to open offline or to send, and its pictures in ``figures/``.

What was trained on what; the learning curve split in rate and distortion; the bound by site; samples, reconstructions,
traversals, the map of the latents; the two programs. All of it is computed from the run and the data handed in, and drawn
by :mod:`inference.views.figures`.

The one constraint: the page is one file. Pictures are inside it as data, and its content security policy forbids it to
load anything or to run a script. Everything a page shows is escaped. The pictures depend on torch's random state; nothing
carries a date, so equal runs give equal bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from torch import Tensor

from inference.bounds.decomposition import decompose_elbo
from inference.progress import Progress
from inference.training.runs import Run
from inference.training.storage import make_folder, write_atomic
from inference.views.images import Array, Range, is_image, value_range_of
from inference.views.latent_data import latent_map, traversal
from inference.views.plot_data import bound_terms, learning_curve, reconstructions, samples
from inference.views.programs import GraphvizError, graph_svg, mermaid, program_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from inference.bounds.terms import Decomposition

TEMPLATE = Path(__file__).with_name("report.html")
MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}
NUM_SAMPLES = 64
NUM_RECONSTRUCTED_IMAGES, NUM_RECONSTRUCTED_POINTS = 20, 200
NUM_POSTERIOR_DATA, NUM_POSTERIOR_DRAWS = 2, 1000
TRACED_DATA = 4  # rows that the programs are shown on


@dataclass(frozen=True)
class Picture:
    """A picture of the report: its file under ``figures/``, or the reason why there is none."""

    file: str
    title: str
    caption: str
    content: bytes | None = None
    reason: str = ""

    @property
    def uri(self) -> str:
        """The content as a ``data:`` URI."""
        assert self.content is not None
        return f"data:{MEDIA[Path(self.file).suffix]};base64,{base64.b64encode(self.content).decode()}"


def write_report(
    run: Run,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    words: str = "",
    num_particles: int = 200,
    overwrite: bool = False,
) -> list[Path]:
    """Writes ``report.html`` and ``figures/`` into a run's folder.

    Args:
        run: from :func:`inference.fit` or :func:`inference.load_run`, with a folder.
        x: the data to show and to compute the bound on, ``[N, *data_shape]``; held-out data, if there are any.
        labels: what colours the latent map, ``[N]``.
        words: what ``x`` is, for the reader.
        num_particles: draws per datum for the bound.
        overwrite: whether files of these names may be replaced.

    Returns:
        The files written, the page first.

    Raises:
        ValueError: the run is in memory only.
        FileExistsError: a file exists and ``overwrite`` is False; nothing is written.
        StorageError: the file system refused.
    """
    if run.folder is None:
        raise ValueError(
            "expected a run with a folder to write the report into, got one in memory: fit with out=FOLDER"
        )
    page, figures = run.folder / "report.html", run.folder / "figures"
    for path in [page, *(figures / file for file in PICTURES)]:
        if path.exists() and not overwrite:
            raise FileExistsError(
                f"expected to write a new {path}, but it exists: replace it with --force (overwrite=True)"
            )
    d = decompose_elbo(run.pair.model, run.pair.guide, x, num_particles=num_particles)
    pictures = make_pictures(run, x, labels, d)
    content = report_html(run, x, d, pictures, words or f"{len(x)} data").encode()
    make_folder(figures)
    written = [page]
    for picture in pictures.values():
        if picture.content is not None:
            write_atomic(figures / picture.file, picture.content)
            written.append(figures / picture.file)
    write_atomic(page, content)
    return written


def make_pictures(run: Run, x: Tensor, labels: Tensor | None, d: Decomposition) -> dict[str, Picture]:
    """All pictures of a run by file name; one that is not defined for this pair or these data says why instead."""
    from inference.views.figures import figure_bytes

    pictures = {}
    with Progress("drawing pictures", len(PICTURES), unit="pictures") as progress:
        for file, (title, caption, draw) in PICTURES.items():
            try:
                drawn = draw(_Shown(run, x, labels, d, shown_range(run.config["data"], x)))
                content = drawn if isinstance(drawn, bytes) else figure_bytes(drawn, Path(file).suffix)
                pictures[file] = Picture(file, title, caption, content)
            except (ValueError, GraphvizError) as error:  # a view that does not apply: said on the page
                pictures[file] = Picture(file, title, caption, reason=str(error))
            progress.advance()
    return pictures


def report_html(run: Run, x: Tensor, d: Decomposition, pictures: Mapping[str, Picture], words: str) -> str:
    """The page as text.

    Args:
        run: what is reported.
        x: data ``[N, *data_shape]``; the programs are traced on the first few.
        d: the bound on them.
        pictures: from :func:`make_pictures`.
        words: what ``x`` is.
    """
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))
    pair, few = run.pair, x[:TRACED_DATA]
    return template.render(
        title=f"{type(pair).__name__} on {run.config['data']['name']}",
        headline=headline(run),
        facts=facts(run),
        words=words,
        terms=list(term_rows(d)),
        num_particles=d.num_particles,
        note=d.note,
        pictures=pictures,
        program=program_table(pair.model, pair.guide, few),
        mermaid=mermaid(pair.model, pair.guide, few),
        configuration=yaml.safe_dump(run.config, sort_keys=False, default_flow_style=None).strip(),
    )


def headline(run: Run) -> list[tuple[str, str, str]]:
    """The figures of the epoch whose weights the run has, on the validation data, as (value, unit, what it is).

    Example:
        >>> from ppl_models import LinearGaussian
        >>> headline(Run(LinearGaussian.random(data_dim=3, latent_dim=2), {}, []))
        []
    """
    if not run.metrics:
        return []
    last = kept_epoch(run)
    return [
        (f"{last['validation_elbo']:.2f}", f"± {last['validation_std_error']:.2f} nats", "ELBO, validation"),
        (f"{last['validation_bits_per_dim']:.3f}", "bits/dim", "−ELBO by dimension"),
        (f"{last['validation_rate']:.2f}", "nats", "rate: KL(q || p)"),
        (f"{last['validation_distortion']:.2f}", "nats", "distortion: −log p(x | z)"),
        (f"{last['active_units']:.0f}", "", "active latent units"),
    ]


def kept_epoch(run: Run) -> dict[str, float]:
    """The metrics of the epoch whose weights the run has: the last, or the best where training stopped for want of one.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> rows = [{"epoch": 1.0, "validation_elbo": -2.0}, {"epoch": 2.0, "validation_elbo": -3.0}]
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> [kept_epoch(Run(pair, {"train": {"patience": patience}}, rows))["epoch"] for patience in (None, 1)]
        [2.0, 1.0]
    """
    if run.config["train"]["patience"] is None:
        return run.metrics[-1]
    return max(run.metrics, key=lambda row: row["validation_elbo"])


def facts(run: Run) -> list[tuple[str, str]]:
    """What was trained on what, in a few lines."""
    data, training, pair = run.config["data"], run.config["train"], run.pair
    shape = " × ".join(map(str, data["data_shape"]))
    levels = "continuous" if data["levels"] is None else f"{data['levels']} levels"
    count = sum(p.numel() for p in pair.parameters())
    lines = [
        (
            "data",
            f"{data['name']}: {data['num_train']} for training, {data['num_test']} held out ({data['split']}); {shape}, "
            f"{levels}",
        ),
        ("numbers", f"scaling {data['scaling']}, binarisation {data['binarization']}"),
        ("validated on", str(run.config["validation"])),
        ("pair", f"{type(pair).__name__}, latent sites {', '.join(pair.latent_sites)}; {count:,} parameters"),
    ]
    lines += [(name, _inline(value)) for name, value in (run.config["pair"] or {}).items() if name != "class"]
    lines.append(
        (
            "training",
            f"{len(run.metrics)} epochs in batches of {training['batch_size']}, {training['optimizer']}, learning rate "
            f"{training['learning_rate']:g} ({training['schedule']}), seed {training['seed']}",
        )
    )
    return lines


def term_rows(d: Decomposition) -> Iterator[dict[str, str]]:
    """The bound as rows of text, the sum last: site, closed form, Monte Carlo, z and the reason."""
    shown = bound_terms(d)
    for i, name in enumerate(shown.names):
        term = d.terms.get(name)
        yield {
            "site": name,
            "best": _number(shown.best[i], shown.best_error[i]),
            "monte_carlo": _number(shown.monte_carlo[i], shown.monte_carlo_error[i]),
            "z": "" if term is None or term.z_score is None else f"{term.z_score:+.2f}".replace("-", "−"),
            "reason": "the sum; left: of the best estimate of each term" if term is None else term.reason,
        }


def shown_range(data: Mapping[str, Any], x: Tensor | Array) -> Range | None:
    """What is black and what is white in pictures of the data: by their scaling, or their extremes where it states none.

    Args:
        data: the run's statement of its data, ``run.config["data"]``.
        x: the data, for their extremes.

    Returns:
        (low, high); None for points.

    Example:
        >>> shown_range({"scaling": "symmetric", "levels": 17}, np.zeros((3, 8, 8)))
        (-1.0, 1.0)
    """
    if not is_image(x.shape[1:]):
        return None
    if data["scaling"] in ("unit", "symmetric") or data["levels"] is not None:
        return value_range_of(data["scaling"], data["levels"])
    return float(x.min()), float(x.max())


@dataclass(frozen=True)
class _Shown:
    """What pictures are drawn from."""

    run: Run
    x: Tensor
    labels: Tensor | None
    d: Decomposition
    value_range: Range | None


def _learning_curve(shown: _Shown) -> Figure:
    from inference.views.figures import draw_learning_curve

    rows = shown.run.metrics
    return draw_learning_curve(learning_curve(rows[len(rows) // 20 :]))


def _posterior(shown: _Shown) -> Figure:
    from inference.posterior import plot_posterior, to_datatree

    pair = shown.run.pair
    tree = to_datatree(pair, shown.x[:NUM_POSTERIOR_DATA], num_samples=NUM_POSTERIOR_DRAWS, groups=("posterior",))
    return plot_posterior(tree, var_names=pair.latent_sites)


def _bound_terms(shown: _Shown) -> Figure:
    from inference.views.figures import draw_bound_terms

    return draw_bound_terms(bound_terms(shown.d))


def _samples(shown: _Shown) -> Figure:
    from inference.views.figures import draw_samples

    count = NUM_SAMPLES if shown.value_range is not None else max(NUM_SAMPLES, len(shown.x))
    return draw_samples(samples(shown.run.pair, count, shown.x), shown.value_range)


def _reconstructions(shown: _Shown) -> Figure:
    from inference.views.figures import draw_reconstructions

    count = NUM_RECONSTRUCTED_POINTS if shown.value_range is None else NUM_RECONSTRUCTED_IMAGES
    return draw_reconstructions(reconstructions(shown.run.pair, shown.x[:count]), shown.value_range)


def _traversal(shown: _Shown) -> Figure:
    from inference.views.figures import draw_traversal

    return draw_traversal(traversal(shown.run.pair, shown.x), shown.value_range)


def _latent_map(shown: _Shown) -> Figure:
    from inference.views.figures import draw_latent_map

    return draw_latent_map(latent_map(shown.run.pair, shown.x, shown.labels))


def _graph(shown: _Shown) -> bytes:
    return graph_svg(shown.run.pair.model, shown.run.pair.guide, shown.x[:TRACED_DATA])


PICTURES: dict[str, tuple[str, str, Callable[[_Shown], Figure | bytes]]] = {
    "learning_curve.svg": (
        "Learning curve",
        "Left: what was minimised, on both parts of the data. Right: where each epoch stands in the plane of rate and "
        "distortion, whose sum is −ELBO; moving along a dotted line trades one for the other at the same bound. The first "
        "twentieth of the epochs is left out: it would set the scale.",
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
        "What each dimension of z does, most active first. A dimension with activity near 0 is not used by the guide, and "
        "moving it changes little.",
        _traversal,
    ),
    "latent_map.svg": (
        "Latent map",
        "Where the guide puts each datum, on the two most active dimensions; the labels were not seen in training.",
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


def _inline(value: Any) -> str:
    """A part's description on one line."""
    if isinstance(value, dict):
        stated = {key: item for key, item in value.items() if key != "class" and item not in (None, False)}
        return f"{value.get('class', '')}({', '.join(f'{key} {_inline(item)}' for key, item in stated.items())})"
    return str(value)


def _number(value: float, error: float) -> str:
    if not np.isfinite(value):
        return "–"
    text = f"{value:.3f}" + (f" ± {error:.2g}" if error > 0 else "")
    return text.replace("-", "−")
