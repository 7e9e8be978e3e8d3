"""Pictures have the pixels they should."""

import numpy as np
from PIL import Image

from hf_igpt.clusters import to_grey_levels
from hf_igpt.plots import completions_picture, image_grid, palette_picture, square_grid, training_curve


def test_grids_show_every_image_enlarged_without_smoothing():
    images = [Image.fromarray(np.full((8, 8, 3), i * 20, np.uint8)) for i in range(5)]
    grid = np.asarray(square_grid(images))
    assert set(np.unique(grid)) == {0, 20, 40, 60, 80, 255}
    assert grid.shape == (2 * 100 + 4, 3 * 100 + 4, 3)
    assert np.asarray(image_grid([images])).shape == (104, 504, 3)


def test_palette_picture_shows_every_color(palette):
    picture = np.asarray(palette_picture(palette)).reshape(-1, 3)
    assert {tuple(color) for color in to_grey_levels(palette)} <= {tuple(color) for color in np.unique(picture, axis=0)}


def test_completions_and_curve_are_pictures():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert completions_picture([[image, image.convert("RGBA"), image]] * 2).width > 200
    history = [{"images": 16, "loss": 2.0}, {"images": 32, "loss": 1.5}, {"images": 32, "eval_nats_per_pixel": 1.6}]
    assert training_curve(history, {"unigram": 2.1}).size == (840, 480)
