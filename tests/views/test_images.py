"""Pixels, ranges and tiles, each against an array written out by hand."""

import numpy as np
import pytest

from inference.views.images import Mosaic, is_image, to_rgb, value_range_of


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), False), ((2,), False), ((64,), False), ((8, 8), True), ((1, 8, 8), True), ((8, 8, 3), True)],
)
def test_is_image(shape, expected):
    assert is_image(shape) is expected


@pytest.mark.parametrize("shape", [(5, 4, 4), (2, 3, 8, 8)])
def test_neither_image_nor_point(shape):
    with pytest.raises(ValueError, match=r"expected data of shape \(H, W\), \(C, H, W\) or \(H, W, C\)"):
        is_image(shape)


def test_grey_and_rgb_layouts_agree():
    grey = np.random.default_rng(0).random((2, 4, 5))
    expected = np.stack([grey] * 3, axis=-1)
    for layout in (grey, grey[:, None], grey[..., None], expected, np.moveaxis(expected, -1, 1)):
        np.testing.assert_array_equal(to_rgb(layout, (0, 1)), expected)


def test_colours_keep_their_channel():
    red = np.zeros((1, 3, 2, 2))
    red[:, 0] = 1
    np.testing.assert_array_equal(to_rgb(red, (0, 1))[0, 0, 0], [1, 0, 0])


@pytest.mark.parametrize(
    ("value_range", "expected"), [((0, 16), [0, 0.5, 1]), ((-16, 16), [0.5, 0.75, 1]), ((4, 8), [0, 1, 1])]
)
def test_range_says_what_is_black_and_white(value_range, expected):
    assert to_rgb(np.array([[[0.0, 8.0, 16.0]]]), value_range)[0, 0, :, 0].tolist() == expected


@pytest.mark.parametrize("value_range", [None, (1, 1), (1, 0), (0, float("nan"))])
def test_range_must_be_stated(value_range):
    with pytest.raises(ValueError, match=r"expected value_range=\(low, high\) with low < high"):
        to_rgb(np.zeros((1, 2, 2)), value_range)


@pytest.mark.parametrize(
    ("values", "match"),
    [(np.zeros((3, 4)), "expected images, got data of shape"), (np.full((1, 2, 2), np.nan), "finite pixel values")],
)
def test_bad_images(values, match):
    with pytest.raises(ValueError, match=match):
        to_rgb(values, (0, 1))


def test_value_ranges_of_scalings():
    assert [value_range_of(s, 17) for s in ("unit", "symmetric", "none", "classes")] == [
        (0, 1),
        (-1, 1),
        (0, 16),
        (0, 16),
    ]
    with pytest.raises(ValueError, match="expected a scaling among unit, symmetric, got 'none' with levels=None"):
        value_range_of("none", None)


def test_mosaic_puts_each_tile_in_its_place():
    tiles = np.arange(3.0)[:, None, None, None] * np.ones((3, 2, 2, 3)) / 10
    mosaic = Mosaic.of(tiles, columns=2)
    expected = np.array(
        [
            [0.0, 0.0, 1.0, 0.1, 0.1],
            [0.0, 0.0, 1.0, 0.1, 0.1],
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [0.2, 0.2, 1.0, 1.0, 1.0],
            [0.2, 0.2, 1.0, 1.0, 1.0],
        ]
    )
    np.testing.assert_array_equal(mosaic.pixels[..., 1], expected)
    assert mosaic.x.tolist() == [0.5, 3.5]
    assert mosaic.y.tolist() == [0.5, 3.5]
