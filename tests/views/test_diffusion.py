"""Pictures of a diffusion: the arrays add up, and axes, labels and panels are what they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from inference.ancestral import Trajectory, ancestral_trajectory, interpolation
from inference.bounds.diffusion import decompose_diffusion
from inference.views.diffusion import bound_by_t, diffusion_table, draw_bound_by_t, draw_film_strip, film_strip
from ppl_models.ddpm import DDPM
from ppl_models.likelihoods import DiscretizedNormal
from ppl_models.processes import NoiseSchedule
from tests.bounds import diffusion_pairs as pairs


class Shrink(nn.Module):
    def forward(self, x_t, t):
        return 0.5 * x_t


def images(num_timesteps=6):
    return DDPM(Shrink(), NoiseSchedule.cosine(num_timesteps), (4, 4), "x_0", likelihood=DiscretizedNormal(levels=5))


def rendered(figure):
    """The figure, after a drawing pass in which warnings are errors; every text lies within it."""
    figure.draw_without_rendering()
    frame = figure.bbox
    texts = [t for axes in figure.axes for t in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    for text in [*texts, *figure.texts]:
        box = text.get_window_extent()
        assert not text.get_text() or (box.x0 >= frame.x0 - 1 and box.x1 <= frame.x1 + 1)
    return figure


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("num_timesteps", [1, 6, 60])
def test_the_curve(num_timesteps, num_particles):
    pair = pairs.tanh_ddpm(num_timesteps=num_timesteps)
    d = decompose_diffusion(pair, pairs.pixels(), num_particles=num_particles, seed=0)
    data = bound_by_t(d)
    assert data.t.tolist() == list(range(num_timesteps + 1))
    assert sum(data.parts.values()) == pytest.approx(data.total[0])
    assert data.loss[0] == pytest.approx(float(d.distortion.mean()) / (2 * np.log(2)))
    assert data.total[0] == pytest.approx(d.bits_per_dim()[0])
    figure = rendered(draw_bound_by_t(data))
    curve, sums = figure.axes
    assert curve.get_yscale() == "log"
    assert curve.get_xlabel() == "t"
    if num_timesteps > 1:
        assert np.allclose(curve.lines[0].get_ydata(), data.loss[1:-1])
    assert sums.patches[-1].get_width() == pytest.approx(data.total[0])
    starts, widths = ([getattr(p, f"get_{k}")() for p in sums.patches] for k in ("x", "width"))
    assert starts[1] == pytest.approx(widths[0])
    assert starts[2] == pytest.approx(widths[0] + widths[1])


@pytest.mark.parametrize("spread", [1.5, 4.0, 20.0, 1e4])
def test_values_can_be_read_off_the_axis(spread):
    """Two labelled ticks at least within what is shown, also where no power of ten is, or one."""
    d = decompose_diffusion(pairs.tanh_ddpm(num_timesteps=6), pairs.pixels(), num_particles=2, seed=0)
    loss = 0.4 * np.geomspace(1, spread, 7)
    figure = rendered(draw_bound_by_t(replace(bound_by_t(d), loss=loss, std_error=0 * loss)))
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    labelled = [t for t, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True) if text.get_text()]
    assert sum(low <= t <= high for t in labelled) >= 2


def test_a_negative_distortion_is_said():
    pair = pairs.linear()
    d = decompose_diffusion(pair, torch.full((3, 2), 0.5) * torch.tensor([1.0, -2.0]), num_particles=4, seed=0)
    data = bound_by_t(d)
    data = type(data)(data.t, np.concatenate([[-1.0], data.loss[1:]]), data.std_error, data.total, data.num_data)
    figure = rendered(draw_bound_by_t(data))
    assert "$L_0$ ≤ 0: see below" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_parts_of_a_bound_have_no_curve_but_a_table():
    d = decompose_diffusion(pairs.tanh_ddpm(), pairs.pixels(), timesteps=[2], num_particles=2)
    with pytest.raises(ValueError, match="expected all 5 terms, got 1: call it without timesteps"):
        bound_by_t(d)
    assert "x_2" in diffusion_table(d)


def test_a_film_strip_of_images():
    pair = images()
    run = ancestral_trajectory(pair, 5, keep=[6, 3, 1, 0], seed=0)
    data = film_strip(run, 2, interpolation(pair.process))
    assert data.t == (6, 3, 1, 0)
    assert data.states.shape == data.predictions.shape == (4, 2, 4, 4)
    assert np.allclose(data.states[1], run.states[3][:2])
    assert np.isnan(data.predictions[-1]).all()
    assert np.allclose(data.weights[2], [0, 1])
    figure = rendered(draw_film_strip(data, (-1, 1)))
    (axes,) = figure.axes
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels[0].startswith("t = 6\nA 0.")
    assert labels[-1] == "t = 0"
    assert len(axes.get_yticklabels()) == 4
    shown = np.asarray(axes.images[0].get_array())
    assert np.allclose(shown[:4, :4, 0], (run.states[6][0].clamp(-1, 1) + 1) / 2)


def test_a_film_strip_of_points():
    run = ancestral_trajectory(pairs.continuous_ddpm(), 30, keep=[4, 2, 0], seed=0)
    figure = rendered(draw_film_strip(film_strip(run, 30)))
    assert len(figure.axes) == 6
    assert np.allclose(figure.axes[1].collections[0].get_offsets(), run.states[2])
    assert np.allclose(figure.axes[4].collections[0].get_offsets(), run.predictions[2])
    assert not figure.axes[5].collections


def test_a_film_strip_of_another_law_says_so():
    run = ancestral_trajectory(images(), 3, steps=3, eta=0.0, clip=(-1, 1), keep=[6, 1], seed=0)
    figure = rendered(draw_film_strip(film_strip(run), (-1, 1)))
    title = figure.get_suptitle().replace("\n", " ")
    assert "not the model's own law: respaced to 3 of 6 steps, DDIM with eta = 0, x_0-hat clipped to [-1, 1]" in title


def test_a_film_strip_of_classes():
    run = ancestral_trajectory(pairs.d3pm(), 9, keep=[3, 1, 0], seed=0)
    rendered(draw_film_strip(film_strip(run, 9)))


def test_bad_strips_are_refused():
    with pytest.raises(ValueError, match=r"expected a trajectory with states, got none: pass keep"):
        film_strip(Trajectory(torch.zeros(1, 2)))
    pair = images()
    run = ancestral_trajectory(pair, 3, steps=3, keep=[6], seed=0)
    with pytest.raises(ValueError, match="weights of the steps taken"):
        film_strip(run, weights=interpolation(pair.process))
