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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from torch import Tensor

from inference.bounds.active_units import active_units
from inference.bounds.diffusion import DiffusionDecomposition
from inference.progress import Progress
from inference.training.evaluation import layers
from inference.training.runs import Run
from inference.training.storage import make_folder, write_atomic
from inference.views.bounds import decompose, remarks
from inference.views.chain_programs import pair_mermaid, pair_table
from inference.views.plot_data import bound_terms
from inference.views.programs import GraphvizError
from inference.views.report_pictures import PICTURES, TRACED_DATA, Shown, pictures_of, shown_range
from ppl_models.diffusion import Diffusion
from ppl_models.vq_vae import VQVAE

if TYPE_CHECKING:
    from inference.bounds.terms import Decomposition

__all__ = [
    "PICTURES",
    "Picture",
    "facts",
    "headline",
    "kept_epoch",
    "report_html",
    "shown_range",
    "term_rows",
    "write_report",
]

TEMPLATE = Path(__file__).with_name("report.html")
MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}
PARTICLES = 200
NUM_TEXTS = 8


_UNITS = "Figures are nats per datum unless they say otherwise."
INTRODUCTION = (
    "A model p(x, z) and a guide q(z | x), trained by maximising the evidence lower bound "
    f"ELBO = E_q[log p(x, z) − log q(z | x)] = −(rate + distortion). {_UNITS}"
)
_DIFFUSION = (
    "A chain p(x_T) ∏ p(x_{t−1} | x_t) p(x_0 | x_1), trained to run the fixed process q(x_t | x_{t−1}) backwards by "
    f"maximising the evidence lower bound: −ELBO = L_T + … + L_1 + L_0 = rate + distortion. {_UNITS}"
)
_AUTOENCODER = (
    "A decoder p(x | z) and a code z = f(x), trained by maximising log p(x | z) less its penalties. There is no p(z), so what "
    f"stands below under ELBO is minus that loss and bounds no log p(x). {_UNITS}"
)
_GIVEN = " All networks are given the label y of each datum: every law here is one given y, and the bound one of log p(x | y)."
INTRODUCTIONS = {"DDPM": _DIFFUSION, "D3PM": _DIFFUSION, "AutoEncoder": _AUTOENCODER}


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
    label_names: Sequence[str] | None = None,
    words: str = "",
    num_particles: int | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes ``report.html`` and ``figures/`` into a run's folder.

    Args:
        run: from :func:`inference.fit` or :func:`inference.load_run`, with a folder.
        x: the data to show and to compute the bound on, ``[N, *data_shape]``; held-out data, if there are any.
        labels: what colours the latent map, ``[N]``.
        label_names: what each label stands for, by its number; None shows the numbers.
        words: what ``x`` is, for the reader.
        num_particles: draws per datum for the bound; None: see :func:`inference.views.bounds.decompose`, 200 by default.
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
    for path in [page, *(figures / file for file in pictures_of(run, PICTURES))]:
        if path.exists() and not overwrite:
            raise FileExistsError(
                f"expected to write a new {path}, but it exists: replace it with --force (overwrite=True)"
            )
    d = decompose(run.pair, x, num_particles, default=PARTICLES)
    pictures = make_pictures(run, x, labels, d, label_names)
    content = report_html(run, x, d, pictures, words or f"{len(x)} data").encode()
    make_folder(figures)
    written = [page]
    for picture in pictures.values():
        if picture.content is not None:
            write_atomic(figures / picture.file, picture.content)
            written.append(figures / picture.file)
    write_atomic(page, content)
    return written


def make_pictures(
    run: Run, x: Tensor, labels: Tensor | None, d: Decomposition, label_names: Sequence[str] | None = None
) -> dict[str, Picture]:
    """All pictures of a run by file name; one that is not defined for this pair or these data says why instead."""
    from inference.views.figures import figure_bytes

    pictures, entries = {}, pictures_of(run, PICTURES)
    with Progress("drawing pictures", len(entries), unit="pictures") as progress:
        for file, (title, caption, draw) in entries.items():
            try:
                drawn = draw(Shown(run, x, labels, label_names, d, shown_range(run.config["data"], x)))
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
    traced = pair.of_rows(slice(TRACED_DATA))
    by_t = isinstance(d, DiffusionDecomposition)
    return template.render(
        title=f"{type(pair).__name__} on {run.config['data']['name']}",
        headline=headline(run, x),
        introduction=INTRODUCTIONS.get(type(pair).__name__, INTRODUCTION) + ("" if pair.num_labels is None else _GIVEN),
        facts=facts(run),
        words=words,
        terms=[] if by_t else list(term_rows(d)),
        bound_table=d.table() if by_t else "",
        remarks=remarks(pair, x, d),
        texts=_texts(run),
        num_particles=d.num_particles,
        note=d.note,
        pictures=pictures,
        program=pair_table(traced, few),
        mermaid=pair_mermaid(traced, few),
        configuration=yaml.safe_dump(run.config, sort_keys=False, default_flow_style=None).strip(),
    )


def _texts(run: Run) -> list[str]:
    """Samples as text, of a run on text; none of another."""
    alphabet = run.config["data"].get("alphabet")
    if alphabet is None:
        return []
    from inference.ancestral import ancestral_sample
    from inference.training.text_data import decode, printable

    return [printable(text) for text in decode(ancestral_sample(run.pair.in_turn(NUM_TEXTS), NUM_TEXTS), alphabet)]


def headline(run: Run, x: Tensor | None = None) -> list[tuple[str, str, str]]:
    """The figures of the epoch whose weights the run has, on the validation data, as (value, unit, what it is).

    Args:
        run: what is reported.
        x: data ``[N, *data_shape]``, for the codes that they use.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> headline(Run(LinearGaussian.random(data_dim=3, latent_dim=2), {}, []))
        []
    """
    if not run.metrics:
        return []
    last = kept_epoch(run)
    pair = run.pair
    if isinstance(pair, Diffusion):
        last_card = (f"{pair.num_timesteps}", "", "steps T")
    elif isinstance(pair, VQVAE) and x is not None:
        last_card = (f"{float(pair.codebook_perplexity(x)):.1f}", f"of {pair.num_codes}", "codebook perplexity")
    elif (
        layers(pair) and x is not None and len(x) > 1
    ):  # the epoch's own count takes the noise of draws above for activity
        found = active_units(pair, x)
        last_card = (
            f"{found.count}",
            f"of {sum(len(site.variance) for site in found.sites.values())}",
            "active latent units",
        )
    else:
        last_card = (f"{last['active_units']:.0f}", "", "active latent units")
    value, error = f"{last['validation_elbo']:.2f}", f"± {last['validation_std_error']:.2f} nats"
    if not pair.bounds_evidence:
        return [(value, error, "minus the loss, validation; ± standard error over data"), last_card]
    return [
        (value, error, "ELBO, validation; ± standard error over data"),
        (f"{last['validation_bits_per_dim']:.3f}", "bits/dim", "−ELBO by dimension"),
        (f"{last['validation_rate']:.2f}", "nats", "rate: KL(q || p)"),
        (f"{last['validation_distortion']:.2f}", "nats", "distortion: −log p(x | z)"),
        last_card,
    ]


def kept_epoch(run: Run) -> dict[str, float]:
    """The metrics of the epoch whose weights the run has: the last, or the best where a run with patience has ended.

    Example:
        >>> from ppl_models import LinearGaussian
        >>> rows = [{"epoch": 1.0, "validation_elbo": -2.0}, {"epoch": 2.0, "validation_elbo": -3.0}]
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        >>> [kept_epoch(Run(pair, {"train": {"patience": patience}}, rows))["epoch"] for patience in (None, 1)]
        [2.0, 1.0]
    """
    if run.config["train"]["patience"] is None or run.unfinished:
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
        ("pair", f"{type(pair).__name__}, latent sites {_names(pair.latent_sites)}; {count:,} parameters"),
    ]
    if run.unfinished:
        lines.append(("UNFINISHED", f"weights and figures {run.unfinished}; ppl train ... --resume goes on"))
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


def _names(sites: tuple[str, ...]) -> str:
    return ", ".join(sites) if len(sites) <= 8 else f"{sites[0]} .. {sites[-1]}"


def _inline(value: Any) -> str:
    """A part's description on one line."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return ", ".join(_inline(item) for item in value)
    if isinstance(value, dict):
        stated = {key: item for key, item in value.items() if key != "class" and item not in (None, False)}
        return f"{value.get('class', '')}({', '.join(f'{key} {_inline(item)}' for key, item in stated.items())})"
    return str(value)


def _number(value: float, error: float) -> str:
    if not np.isfinite(value):
        return "–"
    text = f"{value:.3f}" + (f" ± {error:.2g}" if error > 0 else "")
    return text.replace("-", "−")
