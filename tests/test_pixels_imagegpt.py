"""Any image to 8-bit RGB: depths, channels, layouts, transparency, orientation, limits."""

import ast
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_igpt import pixels_imagegpt
from hf_igpt.pixels_imagegpt import convert_to_rgb, crop_to_square, open_image, reduce_depth, to_pixels, to_rgb_image


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


def test_arrays_of_every_layout_give_the_same_image():
    for image in (PIXELS, PIXELS.transpose(2, 0, 1), PIXELS.astype(int), PIXELS.tolist()):
        assert np.array_equal(np.asarray(to_rgb_image(image)), PIXELS)
    for image in (torch.tensor(PIXELS), torch.tensor(PIXELS).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(to_rgb_image(image)), PIXELS)
    for image in (GREY, GREY[None], GREY[..., None], torch.tensor(GREY), Image.fromarray(GREY)):
        assert np.array_equal(np.asarray(to_rgb_image(image)), np.stack([GREY] * 3, axis=-1))
    cube = PIXELS[:3, :3]  # channels first unless the layout is given
    assert np.array_equal(np.asarray(to_rgb_image(cube)), cube.transpose(1, 2, 0))
    assert np.array_equal(np.asarray(to_rgb_image(cube, "channels_last")), cube)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_transparent_arrays_are_composited_like_pil_images(library):
    rgba = np.dstack([PIXELS, GREY[::-1]])
    expected = np.asarray(to_rgb_image(Image.fromarray(rgba))).astype(int)
    for image in (rgba, rgba.transpose(2, 0, 1)):
        image = torch.tensor(image) if library == "torch" else image
        assert np.abs(np.asarray(to_rgb_image(image)) - expected).max() <= 1  # PIL rounds otherwise
        floats = to_pixels(convert_to_rgb(image / 255))
        assert np.abs(floats * 255 - expected).max() <= 1
    with pytest.raises(ValueError, match=r"RGBA floats lie in \[0, 1\]"):
        convert_to_rgb(rgba.astype(np.float32))


def test_depths():
    sixteen = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    for image in (sixteen, Image.fromarray(GREY.astype(np.int32)), Image.fromarray(GREY.astype(np.float32))):
        assert np.array_equal(np.asarray(reduce_depth(image)), GREY)
    assert np.array_equal(np.asarray(reduce_depth(Image.fromarray(GREY.astype(np.int32) * 257))), GREY)
    assert np.array_equal(reduce_depth(PIXELS > 127), (PIXELS > 127) * 255)
    assert torch.equal(reduce_depth(torch.tensor(PIXELS) > 127), torch.tensor(PIXELS > 127).to(torch.uint8) * 255)
    floats = PIXELS / 255
    assert reduce_depth(floats) is floats


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS / 255, "integer grey levels 0..255; found an array of float64"),
        (PIXELS.astype(int) + 1000, "outside the grey levels 0..255"),
        (PIXELS.astype(int) - 256, "outside the grey levels 0..255"),
        (PIXELS[..., :2], r"found \(6, 9, 2\)"),
        (np.zeros(5, np.uint8), r"found \(5,\)"),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), "mode I has values from -1"),
        (Image.fromarray(np.full((4, 4), 300, np.float32)), "mode F has values from 300 to 300, outside 0..255"),
    ],
)
def test_limits(image, message):
    with pytest.raises(ValueError, match=message):
        to_rgb_image(image)


@pytest.mark.parametrize(("height", "width"), [(6, 9), (9, 6), (7, 4), (5, 5)])
def test_the_square_is_central_and_the_largest(height, width):
    image = np.arange(height * width).reshape(1, height, width).astype(np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    expected = image[:, top : top + side, left : left + side]
    assert np.array_equal(crop_to_square(image), expected)
    assert torch.equal(crop_to_square(torch.tensor(image)), torch.tensor(expected))
    assert np.array_equal(np.asarray(crop_to_square(Image.fromarray(image[0]))), expected[0])


def test_files_are_turned_upright_and_keep_their_mode(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    for mode in ("RGB", "RGBA", "L", "I;16"):
        image = Image.fromarray(GREY.astype(np.uint16)) if mode == "I;16" else Image.fromarray(PIXELS).convert(mode)
        image.save(tmp_path / "image.png", exif=exif)
        image.save(buffer := io.BytesIO(), "PNG")
        upright, unturned = open_image(tmp_path / "image.png"), open_image(buffer)
        assert upright.mode == unturned.mode == mode
        assert np.array_equal(np.asarray(unturned), np.asarray(image))
        assert np.array_equal(np.asarray(upright), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_the_file_imports_what_a_published_repository_has():
    """It travels: numpy, torch, PIL, transformers and the standard library, by public names."""
    for node in ast.walk(ast.parse(Path(pixels_imagegpt.__file__).read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {module.split(".")[0] for module in modules} <= {
                "numpy",
                "torch",
                "PIL",
                "transformers",
                "os",
                "typing",
            }
            assert not any(
                part.startswith("_") for name in [*modules, *(a.name for a in node.names)] for part in name.split(".")
            )
