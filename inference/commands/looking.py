"""What one looks at a RUN with: ``ppl terms``, ``sample``, ``posterior``, ``trace`` and ``report``.

Each opens the RUN, calls the library and prints. Draws depend on ``--seed`` alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inference.commands.writing import FORCE, check_new, check_suffix, keep_record

if TYPE_CHECKING:
    from ppl_models.pair import ModelGuidePair

MAX_TILES = 1024  # of a picture of samples
SAMPLES_AT_ONCE = 1024
SUMMARY_ROWS = 10
TRACED_DATA = 4


def _draws(default: str) -> Any:
    shown = f"{default}; 4 a term for a diffusion, 2 for a guide that draws nothing"
    return typer.Option(metavar="N", min=2, help="draws from the guide per datum", show_default=shown)


Particles = Annotated[int | None, _draws("1000")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a trained run", show_default=False)]
Spec = Annotated[
    str | None,
    typer.Option("--data", metavar="SPEC", help="other data than the run's own, under its scaling", show_default=False),
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, max=2**63 - 1, help="seed of the draws")]
Force = Annotated[bool, FORCE]


def terms(
    run: RunFolder,
    particles: Particles = None,
    num_data: Annotated[int, typer.Option(metavar="N", min=1, help="how many held-out data, the first ones")] = 1000,
    data: Spec = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Print the bound term by term, on held-out data: closed form beside Monte Carlo, and which of them is used.

    ELBO(x) = sum over sites of E_q[log p - log q], nats per datum; of a diffusion by t. What the terms do not say is said
    below: active units and collapsed layers, codes in use. The figures are also written to RUN/terms.json, and of a
    diffusion drawn in RUN/figures/terms.png.
    """
    from inference.bounds.diffusion import DiffusionDecomposition
    from inference.commands.choices import seeded
    from inference.commands.opening import open_run
    from inference.commands.records import by_t_record, terms_record
    from inference.views.bounds import decompose, remarks

    opened = open_run(run, data, num_data)
    with seeded(seed):
        d = decompose(opened.pair, opened.x, particles)
        said = remarks(opened.pair, opened.x, d)
    print("\n".join([opened.words, d.table(), *(f"  {remark}" for remark in said)]))
    figures = by_t_record(d) if isinstance(d, DiffusionDecomposition) else terms_record(d)
    record = {"data": opened.words, "seed": seed, **figures, "remarks": said}
    print(keep_record(run / "terms.json", record, force=force))
    if isinstance(d, DiffusionDecomposition):
        from inference.training.storage import make_folder
        from inference.views.diffusion import bound_by_t, draw_bound_by_t
        from inference.views.figures import save_figure

        picture = run / "figures" / "terms.png"
        make_folder(picture.parent)
        if picture.exists() and not force:
            print(f"{picture} was left as it is; --force replaces it")
        else:
            save_figure(draw_bound_by_t(bound_by_t(d)), picture, overwrite=force)
            print(f"wrote {picture}")


def sample(
    run: RunFolder,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="a picture (.png, .svg, .pdf) or arrays (.npz: x, mean, counts 0..K-1 of data with levels); text goes to the "
            "screen, or to a .txt or .npz",
            show_default=False,
        ),
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", metavar="N", min=1, help="how many samples")] = 64,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="of a ddpm: N of the T steps, spread evenly", show_default="all"),
    ] = None,
    eta: Annotated[
        float,
        typer.Option(
            metavar="ETA", min=0.0, max=1.0, help="of a ddpm: DDIM's, from 1 (the model's own law) to 0 (no noise)"
        ),
    ] = 1.0,
    clip: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="of a ddpm: clamp the predicted x_0 before each step", show_default="no"),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="of a run that is conditioned on labels: draw at this one, its number or name",
            show_default="each in turn",
        ),
    ] = None,
    film: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="also draw how samples come about: x_t and the predicted x_0 by t; of several layers, redraws below held ones",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Draw from the model: z ~ p(z), x ~ p(x | z), and of images the means E[x | z] at the same z; of text, print the draws.

    Of a diffusion, down the chain from x_T to x_0; whatever changes the law of the samples is said with them.
    """
    from inference.commands.labels import given_label, in_words, names_in_turn
    from inference.training.runs import load_run

    suffix = None if out is None else check_suffix(out, ".png", ".svg", ".pdf", ".npz", ".txt")
    if film is not None:
        check_suffix(film, ".png", ".svg", ".pdf")
    for path in (out, film):
        if path is not None:
            check_new(path, force=force)
    if suffix not in (None, ".npz", ".txt") and num > MAX_TILES:
        raise ValueError(f"expected at most {MAX_TILES} samples in a picture, got {num}: write them to a .npz file")
    opened = load_run(run)
    at_labels = given_label(opened, label)
    alphabet = opened.config["data"].get("alphabet")
    if alphabet is not None:
        if film is not None or steps is not None or eta != 1 or clip is not None:
            raise ValueError("expected no --film, --steps, --eta or --clip for text, drawn as it is: leave them out")
        _sample_text(at_labels, alphabet, out, num, seed, force=force)
        return
    if out is None or suffix == ".txt":
        raise ValueError(
            f"expected --out with a picture (.png, .svg, .pdf) or arrays (.npz), got {out or 'none'}: this is no text"
        )
    from inference.commands.sampling import check_options, draw, draw_film

    pair, stated = at_labels, opened.config["data"]
    check_options(pair, steps, eta, clip, film)
    drawn = draw(pair, num, steps, eta, clip, seed)
    drawn = replace(drawn, law=in_words(opened, drawn.law, pair))
    if suffix == ".npz":
        import torch

        from inference.training.scaling import counts

        arrays = {"x": drawn.draws} | ({} if drawn.means is None else {"mean": drawn.means})
        written = {name: opened.in_own_units(torch.as_tensor(x)).numpy() for name, x in arrays.items()}
        if stated["levels"] is not None and stated["binarization"] == "none":  # what integers in a data file mean
            written["counts"] = counts(torch.as_tensor(drawn.draws), stated["levels"], stated["scaling"]).numpy()
        _write_arrays(out, written, force=force)
    else:
        from inference.views.figures import draw_samples, save_figure
        from inference.views.report import shown_range

        if len(pair.data_shape) < 2:  # points mean little without the data's own beside them, and their axes
            from inference.commands.sampling import with_data_beside

            drawn = with_data_beside(drawn, run, pair.labels)
        elif label is None:
            drawn = replace(drawn, columns=names_in_turn(opened, num))
        save_figure(draw_samples(drawn, shown_range(stated, drawn.draws)), out, overwrite=force)
    print(f"wrote {num} samples to {out}: {drawn.law}")
    if film is not None:
        from inference.views.figures import save_figure
        from inference.views.report import shown_range

        figure, table = draw_film(pair, steps, eta, clip, seed, shown_range(stated, drawn.draws))
        if table:
            print(table)
        save_figure(figure, film, overwrite=force)
        print(f"wrote {film}")


def posterior(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.nc", help="netCDF file", show_default="RUN/posterior.nc")
    ] = None,
    num_samples: Annotated[int, typer.Option(metavar="N", min=1, help="independent draws of each group")] = 1000,
    num_data: Annotated[int, typer.Option(metavar="N", min=1, help="how many held-out data, the first ones")] = 16,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="also draw z of the first data: intervals as a forest")
    ] = None,
    data: Spec = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Draw from the guide q(z | x) on held-out data into an ArviZ DataTree, with prior and predictive draws.

    Prints the head of ArviZ's summary. Read the file with inference.load_posterior, or with xarray.open_datatree.
    """
    from inference.commands.choices import seeded
    from inference.commands.opening import check_draws, open_run, units_of
    from inference.posterior import GROUPS, first_scalars, plot_posterior, save_posterior, summary, to_datatree

    out = run / "posterior.nc" if out is None else out
    check_suffix(out, ".nc")
    opened = open_run(run, data, num_data)
    check_draws(
        opened.pair, "draw a posterior from", "ppl sample --film shows the chain, ppl terms what each step costs"
    )
    for path in (out, figure):
        if path is not None:
            check_new(path, force=force)
    dims = {opened.pair.data_site: ["row", "column"]} if len(opened.pair.data_shape) == 2 else None
    coords = None
    if opened.data.columns is not None:
        dims, coords = {opened.pair.data_site: ["column"]}, {"column": list(opened.data.columns)}
    with seeded(seed):
        tree = to_datatree(opened.pair, opened.x, num_samples=num_samples, coords=coords, dims=dims)
    tree.attrs |= units_of(opened.data)
    save_posterior(tree, out, overwrite=force)
    sites = [site for site in opened.pair.latent_sites if site in tree["posterior"].data_vars]
    first = summary(tree, var_names=sites, coords={"data": [0]})
    rows = first.groupby(first.index.str.partition("[").get_level_values(0), sort=False)
    shown = rows.head(max(2, SUMMARY_ROWS // len(sites)))  # some of each layer
    print(f"{opened.words}; {num_samples} draws of each group\n{shown.to_string()}")
    if len(first) > len(shown):
        print(f"... and {len(first) - len(shown)} more of datum 0")
    print(f"wrote {out}: {', '.join(group for group in GROUPS if group in tree.children)}")
    if figure is not None:
        from inference.views.figures import save_figure

        forest = plot_posterior(tree, var_names=sites, coords=first_scalars(tree, sites))
        save_figure(forest, figure, overwrite=force)
        print(f"wrote {figure}")


def trace(
    run: RunFolder,
    svg: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="also draw the graph, with Graphviz")] = None,
    data: Spec = None,
    force: Force = False,
) -> None:
    """Show model and guide site by site: plates, laws, shapes, log-densities, closed forms; and their graph as Mermaid.

    A diffusion's chain of many steps is shown by its ends.
    """
    from inference.commands.choices import seeded
    from inference.commands.opening import open_run
    from inference.training.storage import write_atomic
    from inference.views.chain_programs import pair_mermaid, pair_svg, pair_table

    if svg is not None:
        check_suffix(svg, ".svg")
        check_new(svg, force=force)
    opened = open_run(run, data, TRACED_DATA)
    pair, x = opened.pair, opened.x
    with seeded(0):
        print(f"{opened.words}\n{pair_table(pair, x)}\n\n{pair_mermaid(pair, x)}")
        if svg is not None:
            write_atomic(svg, pair_svg(pair, x))
            print(f"\nwrote {svg}")


def report(
    run: RunFolder,
    particles: Annotated[int | None, _draws("200")] = None,
    num_data: Annotated[int, typer.Option(metavar="N", min=1, help="how many held-out data, the first ones")] = 1000,
    data: Spec = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Write RUN/report.html, one page to open offline or to send, and its pictures to RUN/figures.

    Configuration, learning curve split in rate and distortion, the bound term by term, samples, the two programs; of latents
    that are learned also reconstructions, traversals and a map; of several layers, of a diffusion, how samples come about.
    """
    from inference.commands.choices import seeded
    from inference.commands.opening import open_run
    from inference.views.report import write_report

    opened = open_run(run, data, num_data)
    with seeded(seed):
        written = write_report(
            opened.run,
            opened.x,
            opened.labels,
            label_names=opened.data.label_names,
            words=opened.words,
            num_particles=particles,
            overwrite=force,
        )
    print("\n".join(f"wrote {path}" for path in written))


def _sample_text(pair: ModelGuidePair, alphabet: str, out: Path | None, num: int, seed: int, *, force: bool) -> None:
    """Draws as strings: on the screen, or as they are in a .txt; or as classes in a .npz."""
    from inference.ancestral import ancestral_sample
    from inference.training.storage import write_atomic
    from inference.training.text_data import decode, printable

    if out is not None and out.suffix.lower() not in (".txt", ".npz"):
        raise ValueError(
            f"expected a .txt or .npz for samples of text, got {out.name!r}: rename it, or leave --out away"
        )
    x = ancestral_sample(pair.in_turn(num), num, seed=seed, batch_size=SAMPLES_AT_ONCE)
    titled = [f"--- {i} of {num}\n{text}\n" for i, text in enumerate(decode(x, alphabet), 1)]
    if out is None:
        print(printable("".join(titled)), end="")
    elif out.suffix.lower() == ".npz":
        _write_arrays(out, {"x": x.numpy()}, force=force)
    else:
        check_new(out, force=force)
        write_atomic(out, "".join(titled).encode())
    if out is not None:
        print(f"wrote {num} samples to {out}")


def _write_arrays(path: Path, arrays: dict[str, Any], *, force: bool) -> None:
    import io

    import numpy as np

    from inference.training.storage import write_atomic

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    check_new(path, force=force)
    write_atomic(path, buffer.getvalue())
