"""Pictures have the pixels they should."""

import numpy as np
import pytest
from PIL import Image

from hf_igpt import ImageGPTImageProcessorPil
from hf_igpt.clusters import to_grey_levels
from hf_igpt.reporting.plots import (
    attention_maps,
    completions_picture,
    histogram,
    image_grid,
    palette_picture,
    pictures_seen,
    square_grid,
    surprise_maps,
    training_curve,
)


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


def test_surprise_maps_show_images_as_they_are_in_one_scale():
    images = [Image.fromarray(np.full((8, 8, 3), color, np.uint8)) for color in ((10, 200, 30), (30, 10, 200))]
    maps = np.stack([np.zeros((8, 8)), np.full((8, 8), 5.0)])
    one, two = surprise_maps(images[:1], maps[1:], ["cat\n5 nats"]), surprise_maps(images, maps, ["$a$", "b$"])
    assert two.width > 1.5 * one.width and two.height == one.height
    colors = {tuple(color) for color in np.asarray(two)[:, :-150].reshape(-1, 3)}  # without the scale
    assert {(10, 200, 30), (30, 10, 200), (0, 0, 3), (252, 254, 164)} <= colors  # images; inferno's ends
    many = surprise_maps(images * 5, np.concatenate([maps] * 5), ["title"] * 10)
    assert many.height > 2.5 * two.height and many.width < 3 * two.width
    assert surprise_maps(images[:1], np.zeros((1, 8, 8)), [""]).size == one.size


@pytest.mark.parametrize("crops", [True, False])
def test_what_is_seen_is_shown(crops, palette):
    processor = ImageGPTImageProcessorPil(clusters=palette, size=(8, 4), do_center_crop=crops)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8))
    colors = {tuple(color) for color in np.asarray(pictures_seen(processor, [image])).reshape(-1, 3)}
    seen = np.asarray(processor.decode(processor(image)["input_ids"])[0]).reshape(-1, 3)
    window = image.crop((11, 0, 21, 20)) if crops else image
    resized = np.asarray(window.resize((4, 8), Image.Resampling.BILINEAR)).reshape(-1, 3)
    for expected in (seen, resized):
        assert {tuple(color) for color in expected} <= colors
    assert ((0, 255, 255) in colors) == crops
    two = pictures_seen(processor, [image, image.resize((1000, 900))])
    assert two.height > 1.5 * pictures_seen(processor, [image]).height


def test_attention_maps_end_at_the_pixel():
    image = Image.fromarray(np.full((8, 4, 3), (10, 200, 30), np.uint8))
    shares = np.zeros((2, 3, 33), np.float32)
    shares[..., 0], shares[..., 1], shares[..., 9] = 0.5, 0.125, 0.375
    causal = np.asarray(attention_maps(image, shares, (3, 1), "cat"))

    def count(picture, color):
        return int((picture == color).all(axis=-1).sum())

    for color in (
        (10, 200, 30),
        (0, 0, 3),
        (252, 254, 164),
        (0, 255, 255),
    ):  # image; inferno's ends; the pixel's outline
        assert count(causal, color) > 20
    shares[..., 0], shares[..., 31] = 0, 0.5
    masked = np.asarray(attention_maps(image, shares, (3, 1), "$cat$"))
    assert count(causal, (204,) * 3) > 1000 > 10 * count(masked, (204,) * 3)  # pixels that come later
    assert attention_maps(image, np.zeros((12, 8, 33)) + 1 / 33, (0, 0), "").height > len(causal)


def test_histogram_of_sets_and_of_one_value():
    rng = np.random.default_rng(0)
    sets = {"in": rng.normal(1, 0.1, 300), "out": rng.normal(4, 0.2, 20)}
    for found in (sets, {"in": np.array([1.5])}, {"in": np.full(9, 1.5)}):
        assert histogram(found, "nats per pixel", {"uniform": 2.77}, "AUROC 1").size == (840, 504)
