"""Structure of the pictures (axes, labels, what is drawn where) and of the files they are saved to."""

import io
import subprocess
import sys
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from inference.bounds import decompose_elbo
from inference.training.storage import StorageError
from inference.views.drawing import style
from inference.views.figures import (
    draw_bound_terms,
    draw_latent_map,
    draw_learning_curve,
    draw_reconstructions,
    draw_samples,
    draw_traversal,
    figure_bytes,
    save_figure,
)
from inference.views.latent_data import LatentMap, latent_map, traversal
from inference.views.plot_data import BoundTerms, Samples, bound_terms, learning_curve, reconstructions, samples
from inference.views.report_pictures import PICTURES
from ppl_models.likelihoods import Normal
from ppl_models.linear_gaussian import LinearGaussian
from ppl_models.vae import VAE

RANGE = (-3.0, 3.0)


def image_vae(shape=(4, 6), latent_dim=3) -> VAE:
    return VAE.preset(shape, Normal(scale=0.5), latent_dim=latent_dim, hidden=(8,))


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


def rendered(figure):
    """The figure, after a drawing pass: layout and tick labels are final then, and warnings are errors."""
    figure.draw_without_rendering()
    return figure


def assert_nothing_overlaps_or_leaves(figure) -> None:
    """Tick labels of one axis are apart, and every text lies within the figure."""
    rendered(figure)
    frame = figure.bbox
    for axes in figure.axes:
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [label.get_window_extent() for label in labels if label.get_text() and label.get_visible()]
            seen = [box for box in boxes if axes.bbox.padded(40).overlaps(box)]
            assert not any(a.overlaps(b) for i, a in enumerate(seen) for b in seen[i + 1 :])
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            if text.get_text():
                box = text.get_window_extent()
                assert box.x0 >= frame.x0 - 1
                assert box.x1 <= frame.x1 + 1
                assert box.y0 >= frame.y0 - 1
                assert box.y1 <= frame.y1 + 1


class TestImages:
    def test_traversal_has_a_row_per_dimension(self):
        data = traversal(image_vae(), torch.randn(5, 4, 6), steps=7)
        figure = draw_traversal(data, RANGE)
        assert_nothing_overlaps_or_leaves(figure)
        (axes,) = figure.axes
        assert axes.images[0].get_array().shape == (3 * 5 - 1, 7 * 7 - 1, 3)
        assert texts(axes.get_xticklabels()) == ["−3", "−2", "−1", "0", "+1", "+2", "+3"]
        assert texts(axes.get_yticklabels())[0].startswith(f"z[{data.dims[0]}]")
        assert "standard deviations" in axes.get_xlabel()
        assert "prior's mean" in axes.get_title()

    def test_the_title_says_how_many_of_all_dimensions_are_shown(self):
        vae, x = image_vae(), torch.randn(5, 4, 6)
        few, all_ = (draw_traversal(traversal(vae, x, max_dims=n), RANGE) for n in (1, 99))
        assert (
            few.axes[0].get_title().startswith(f"E[x | z] along the 1 most active of {vae.latent_dim} dimensions of z")
        )
        assert all_.axes[0].get_title().startswith("E[x | z] along each dimension of z")

    def test_tile_of_the_traversal_is_the_mean(self):
        data = traversal(image_vae(), torch.randn(5, 4, 6), steps=3)
        pixels = draw_traversal(data, RANGE).axes[0].images[0].get_array()
        np.testing.assert_allclose(pixels[5:9, 14:20, 0], np.clip((data.means[1, 2] + 3) / 6, 0, 1))

    @pytest.mark.parametrize(("count", "rows"), [(1, 1), (10, 1), (11, 2)])
    def test_reconstructions_have_their_elbo_below(self, count, rows):
        data = reconstructions(image_vae(), torch.randn(count, 4, 6), num_particles=5)
        figure = draw_reconstructions(data, RANGE)
        assert_nothing_overlaps_or_leaves(figure)
        assert len(figure.axes) == rows
        labels = [label for axes in figure.axes for label in texts(axes.get_xticklabels())]
        assert labels == [f"{value:.1f}".replace("-", "−") for value in data.elbo]
        assert texts(figure.axes[0].get_yticklabels()) == ["x", "E[x | z]"]
        assert "ELBO(x), nats" in figure.axes[-1].get_xlabel()

    def test_samples_beside_data_and_means(self):
        figure = draw_samples(samples(image_vae(), 5, torch.randn(9, 4, 6)), RANGE)
        assert_nothing_overlaps_or_leaves(figure)
        assert texts(a.title for a in figure.axes) == ["data", "samples x ~ p(x | z), z ~ p(z)", "their means E[x | z]"]
        assert {a.images[0].get_array().shape for a in figure.axes} == {(9, 20, 3)}

    def test_colour_images_and_draws_alone(self):
        figure = draw_samples(Samples(np.random.default_rng(0).random((1, 3, 2, 2))), (0, 1))
        assert len(rendered(figure).axes) == 1

    def test_range_is_demanded(self):
        with pytest.raises(ValueError, match="expected value_range"):
            draw_samples(samples(image_vae(), 2))


class TestPoints:
    @pytest.mark.parametrize("dims", [1, 2, 5])
    def test_every_picture_of_points(self, dims):
        pair = LinearGaussian.random(data_dim=dims, latent_dim=2)
        x = pair.model(size=12).detach()
        figures = (
            draw_traversal(traversal(pair, x)),
            draw_reconstructions(reconstructions(pair, x, num_particles=5)),
            draw_samples(samples(pair, 20, x)),
        )
        for figure in figures:
            assert_nothing_overlaps_or_leaves(figure)
            label = figure.axes[0].get_xlabel()
            assert label.startswith("x: PC 1") if dims > 2 else label == "x[0]"

    def test_traversal_is_one_curve_per_dimension(self):
        pair = LinearGaussian.random(data_dim=2, latent_dim=2)
        data = traversal(pair, pair.model(size=12).detach())
        axes = draw_traversal(data).axes[0]
        np.testing.assert_allclose(axes.lines[1].get_xydata(), data.means[1])
        assert [text.split(",")[0] for text in texts(axes.get_figure().legends[0].texts)] == [
            "data",
            *(f"z[{d}]" for d in data.dims),
        ]

    def test_reconstruction_arrows_end_at_the_means(self):
        pair = LinearGaussian.random(data_dim=2, latent_dim=1)
        data = reconstructions(pair, pair.model(size=7).detach(), num_particles=5)
        figure = draw_reconstructions(data)
        arrows, dots = figure.axes[0].collections
        np.testing.assert_allclose(arrows.get_offsets() + np.column_stack([arrows.U, arrows.V]), data.means)
        np.testing.assert_allclose(dots.get_array(), data.elbo)
        assert "nats" in figure.axes[1].get_ylabel()

    def test_samples_are_where_they_were_drawn(self):
        data = samples(LinearGaussian.random(data_dim=2, latent_dim=1), 9, torch.zeros(4, 2))
        left, right = draw_samples(data).axes
        np.testing.assert_allclose(left.collections[0].get_offsets(), data.data)
        np.testing.assert_allclose(right.collections[0].get_offsets(), data.draws)
        assert left.get_xlim() == right.get_xlim()


SIGNS = {"elbo": -3, "rate": 1, "distortion": 2}
ROWS = tuple(
    {"epoch": e, **{f"{part}_{key}": sign * 9 / e for part in ("train", "validation") for key, sign in SIGNS.items()}}
    for e in range(1, 6)
)


def test_no_picture_of_points_is_cut_at_its_edges():
    """Axes of equal units leave the layout's bounds; of what is drawn nothing touches the border of the file."""
    rng = np.random.default_rng(0)
    data = Samples(rng.normal(size=(200, 6)), None, rng.normal(size=(200, 6)), "x ~ p(x | z), z ~ p(z)")
    pixels = np.asarray(Image.open(io.BytesIO(figure_bytes(draw_samples(data), ".png"))).convert("L"))
    for border in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
        assert (border > 250).all()


class TestLearningCurve:
    def test_two_panels(self):
        data = learning_curve(ROWS)
        figure = draw_learning_curve(data)
        assert_nothing_overlaps_or_leaves(figure)
        left, right = figure.axes
        assert [line.get_label() for line in left.lines] == ["train", "validation"]
        np.testing.assert_allclose(left.lines[0].get_ydata(), -data.train_elbo)
        np.testing.assert_allclose(
            right.lines[0].get_xydata(), np.column_stack([data.train_rate, data.train_distortion])
        )
        for label in (left.get_ylabel(), right.get_xlabel(), right.get_ylabel()):
            assert "nats per datum" in label

    @pytest.mark.parametrize(
        ("config", "label"),
        [
            ("the held-out part", "validation"),
            ("the training data themselves (there are no ...)", "train, after each epoch"),
        ],
    )
    def test_training_data_are_not_called_validation(self, config, label):
        run = SimpleNamespace(metrics=list(ROWS), config={"validation": config})
        figure = PICTURES["learning_curve.svg"][2](SimpleNamespace(run=run))
        assert_nothing_overlaps_or_leaves(figure)
        assert [line.get_label() for line in figure.axes[0].lines] == ["train", label]

    def test_dotted_lines_have_one_sum_each(self):
        right = draw_learning_curve(learning_curve(ROWS)).axes[1]
        dotted = [line for line in right.lines if line.get_linestyle() == ":"]
        assert len(dotted) == 7
        for line in dotted:
            np.testing.assert_allclose(np.diff(line.get_xydata().sum(1)), 0, atol=1e-9)

    @pytest.mark.parametrize("rows", [[{"epoch": 1, "train_elbo": -1.0}], [{"epoch": 1}, {"epoch": 2}], ROWS[:1]])
    def test_little_or_no_data(self, rows):
        assert len(rendered(draw_learning_curve(learning_curve(rows))).axes) == 2


class TestLatentMap:
    @pytest.mark.parametrize(("classes", "collections", "colorbar"), [(1, 1, 0), (10, 10, 0), (11, 1, 1), (None, 1, 0)])
    def test_labels(self, classes, collections, colorbar):
        labels = None if classes is None else np.arange(40) % classes
        data = LatentMap("z", np.random.default_rng(0).normal(size=(40, 2)), labels, ("a", "b"))
        figure = draw_latent_map(data)
        assert_nothing_overlaps_or_leaves(figure)
        assert len(figure.axes[0].collections) == collections
        assert len(figure.axes) == 1 + colorbar
        assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("a", "b")

    def test_legend_names_each_class(self):
        pair = LinearGaussian.random(data_dim=2, latent_dim=2)
        figure = draw_latent_map(latent_map(pair, torch.randn(6, 2), torch.tensor([3, 1, 3, 1, 7, 7])))
        assert texts(figure.axes[0].get_legend().texts) == ["1", "3", "7"]


class TestBoundTerms:
    def test_bars_are_the_terms(self):
        pair = LinearGaussian.random(data_dim=3, latent_dim=2)
        data = bound_terms(decompose_elbo(pair.model, pair.guide, torch.randn(4, 3), num_particles=100))
        figure = draw_bound_terms(data)
        assert_nothing_overlaps_or_leaves(figure)
        (axes,) = figure.axes
        widths = [bar.get_width() for bar in axes.patches]
        np.testing.assert_allclose(widths, [*data.best[[0, 2]], *data.monte_carlo])
        assert set(texts(axes.get_yticklabels())) == {"z", "x", "ELBO"}
        assert "nats" in axes.get_xlabel()
        assert len(axes.texts) == 5

    def test_numbers_stay_clear_of_the_bars_and_in_view(self):
        values = np.array([-300.0, 40.0, -260.0])
        data = BoundTerms(("z", "x", "ELBO"), values, np.ones(3), values, np.ones(3), "nats", 10)
        axes = rendered(draw_bound_terms(data)).axes[0]
        bars = {round(bar.get_y() + bar.get_height() / 2, 6): bar for bar in axes.patches}
        for text in axes.texts:
            box = text.get_window_extent()
            assert not bars[round(text.get_position()[1], 6)].get_window_extent().padded(-1).overlaps(box)
            assert axes.bbox.x0 <= box.x0
            assert box.x1 <= axes.bbox.x1

    def test_many_sites(self):
        count = 201
        values = np.linspace(-5, 1, count)
        names = (*(f"x_{t}" for t in range(count - 1)), "ELBO")
        figure = draw_bound_terms(BoundTerms(names, values, values * 0, values, values * 0, "nats", 10))
        assert_nothing_overlaps_or_leaves(figure)
        assert figure.get_figheight() <= 12
        assert texts(figure.axes[0].get_yticklabels())[0] == "ELBO"


class TestSaving:
    @pytest.mark.parametrize(
        ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".SVG", b"<?xml")]
    )
    def test_same_bytes_for_the_same_figure(self, tmp_path, suffix, magic):
        data = learning_curve(ROWS)
        first = save_figure(draw_learning_curve(data), tmp_path / f"a{suffix}")
        second = save_figure(draw_learning_curve(data), tmp_path / f"b{suffix}")
        assert first.read_bytes().startswith(magic)
        assert first.read_bytes() == second.read_bytes()
        other = learning_curve([*ROWS[:-1], {"epoch": 5, "train_elbo": -99.0}])
        assert figure_bytes(draw_learning_curve(other), suffix.lower()) != first.read_bytes()

    def test_nothing_is_overwritten_unless_told(self, tmp_path):
        figure = draw_learning_curve(learning_curve([{"epoch": 1}]))
        path = tmp_path / "curve.svg"
        path.write_text("precious")
        with pytest.raises(FileExistsError, match=r"expected a new file, but .*curve.svg exists"):
            save_figure(figure, path)
        assert path.read_text() == "precious"
        assert save_figure(figure, path, overwrite=True) == path
        assert path.read_bytes().startswith(b"<?xml")
        assert [p.name for p in tmp_path.iterdir()] == ["curve.svg"]

    def test_folder_must_exist(self, tmp_path):
        figure = draw_learning_curve(learning_curve([{"epoch": 1}]))
        with pytest.raises(FileNotFoundError, match="expected an existing folder for the figure"):
            save_figure(figure, tmp_path / "none" / "a.png")

    @pytest.mark.parametrize("name", ["a.jpg", "a"])
    def test_other_formats(self, tmp_path, name):
        with pytest.raises(ValueError, match=r"expected a file name ending in .png, .svg or .pdf"):
            save_figure(draw_learning_curve(learning_curve([{"epoch": 1}])), tmp_path / name)

    def test_a_refusing_file_system_is_named(self, tmp_path):
        (tmp_path / "a.png").mkdir()
        with pytest.raises(StorageError):
            save_figure(draw_learning_curve(learning_curve([{"epoch": 1}])), tmp_path / "a.png", overwrite=True)


def test_drawing_leaves_no_setting_behind(monkeypatch):
    monkeypatch.setitem(mpl.rcParams, "font.size", 31.0)
    before = dict(mpl.rcParams)
    figure = draw_learning_curve(learning_curve(ROWS))
    assert figure.axes[0].xaxis.label.get_size() == 9  # nor does the setting come in
    figure_bytes(figure, ".png")
    assert dict(mpl.rcParams) == before
    with style():
        assert mpl.rcParams["font.size"] == 9


def test_neither_pyplot_nor_an_early_matplotlib():
    code = (
        "import sys, inference, inference.views.plot_data, inference.views.latent_data, inference.views.programs\n"
        "assert 'matplotlib' not in sys.modules, 'matplotlib came too early'\n"
        "import inference.views.figures\n"
        "assert 'matplotlib.pyplot' not in sys.modules, 'pyplot was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
