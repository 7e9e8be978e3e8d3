"""Any image to 8-bit RGB: depths, channels, layouts, transparency, orientation, limits."""

import ast
import base64
import io
import os
import sys
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging as transformers_logging

from hf_igpt import pixels_imagegpt
from hf_igpt.pixels_imagegpt import (
    convert_to_rgb,
    crop_to_proportions,
    open_image,
    reduce_depth,
    to_pixels,
    to_rgb_image,
)


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


def test_arrays_of_every_layout_give_the_same_image():
    for image in (PIXELS, PIXELS.transpose(2, 0, 1), PIXELS.astype(int), PIXELS.tolist()):
        assert np.array_equal(np.asarray(to_rgb_image(image)), PIXELS)
    for image in (torch.tensor(PIXELS), torch.tensor(PIXELS).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(to_rgb_image(image)), PIXELS)
    for image in (GREY, GREY[None], GREY[..., None], torch.tensor(GREY), Image.fromarray(GREY)):
        assert np.array_equal(np.asarray(to_rgb_image(image)), np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize("height", [1, 3, 4])
def test_where_two_layouts_are_possible_the_usual_one_is_assumed_and_said(height):
    logger = transformers_logging.get_logger("hf_igpt.pixels_imagegpt")
    last = PIXELS[:height]  # (height, 9, 3)
    first = PIXELS[:, :height].transpose(2, 0, 1)  # (3, 6, height)
    for image, expected, layout in (
        (last, last, None),
        (last, last, "channels_last"),
        (torch.tensor(first.copy()), PIXELS[:, :height], None),
        (torch.tensor(last), last, "channels_last"),
        (first, PIXELS[:, :height], "channels_first"),
    ):
        type(logger).warning_once.cache_clear()
        with CaptureLogger(logger) as captured:
            assert np.array_equal(np.asarray(to_rgb_image(image, layout)), expected)
        assert ("Pass input_data_format" in captured.out) == (layout is None)
    for grey in (GREY[:height], GREY[:, :height]):  # no channels, nothing to choose
        type(logger).warning_once.cache_clear()
        with CaptureLogger(logger) as captured:
            for image in (grey, torch.tensor(grey)):
                assert np.array_equal(np.asarray(to_rgb_image(image)), np.stack([grey] * 3, axis=-1))
        assert not captured.out
    with pytest.raises(ValueError, match=r"found \(6, 9, 3\)"):
        to_rgb_image(PIXELS, "channels_first")


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
    assert np.array_equal(np.asarray(reduce_depth(Image.fromarray((GREY / 255).astype(np.float32)))), GREY)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64):
        image = PIXELS // 2
        assert torch.equal(reduce_depth(torch.tensor(image).to(dtype)), torch.tensor(image))
        numpy_dtype = np.dtype(str(dtype).removeprefix("torch."))
        for order in "<>":
            assert np.array_equal(reduce_depth(image.astype(numpy_dtype.newbyteorder(order))), image)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        image = torch.tensor(PIXELS).to(dtype).requires_grad_()
        assert torch.equal(reduce_depth(image).to(dtype), image) and not reduce_depth(image).requires_grad
    for dtype in (">f4", np.float16, np.longdouble):
        assert np.array_equal(reduce_depth(PIXELS.astype(dtype)), PIXELS)


@pytest.mark.parametrize(
    ("mode", "valid", "invalid"),
    [
        ("RGB", [(10, 20, 30), [10, 20, 30]], [b"\x00\xff", b"abc", (1, 2), "white", 0.5]),
        ("L", [20], [b"\x00\xff", (1, 2), "white", 0.5]),
        ("P", [3, b"\x00\x80\xff"], [bytes(300), (1, 2, 3), 300, "white", 0.5]),
    ],
)
def test_transparency_as_pillow_reads_it_or_a_sentence(mode, valid, invalid):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image.putpixel((0, 0), (10, 20, 30))
    image = image.convert(mode)
    for value in valid:
        image.info["transparency"] = value
        white = Image.new("RGBA", image.size, "white")
        expected = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        assert np.array_equal(to_rgb_image(image), expected)
    for value in invalid:
        image.info["transparency"] = value
        with pytest.raises(ValueError, match=rf"image of mode {mode} has no transparency such as .*delete its"):
            to_rgb_image(image)


def test_transparency_of_sixteen_bits(tmp_path):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "x.png", transparency=int(GREY[2, 3]) * 257)
    expected = np.where(GREY[2, 3] == GREY, 255, GREY)
    assert np.array_equal(np.asarray(reduce_depth(open_image(tmp_path / "x.png"))), expected)


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
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "mode F has values from nan"),
        (PIXELS.astype(complex), "booleans, integers or floats; found complex128"),
        (torch.tensor(PIXELS).to(torch.complex64), "booleans, integers or floats; found torch.complex64"),
        (PIXELS.astype(str), "booleans, integers or floats; found <U"),
        (PIXELS.astype(object), "booleans, integers or floats; found object"),
        (np.zeros((0, 5, 3), np.uint8), r"found \(0, 5, 3\)"),
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
    assert np.array_equal(crop_to_proportions(image, (8, 8)), expected)
    assert torch.equal(crop_to_proportions(torch.tensor(image), (8, 8)), torch.tensor(expected))
    assert np.array_equal(np.asarray(crop_to_proportions(Image.fromarray(image[0]), (8, 8))), expected[0])


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


@pytest.mark.parametrize("library", [np, torch])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_floats_are_finite(library, value):
    image = np.array(PIXELS / 255)
    image[3, 4, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        reduce_depth(image if library is np else torch.tensor(image))


def test_every_kind_of_source_is_the_same_image(tmp_path):
    image = Image.fromarray(PIXELS)
    image.save(tmp_path / "photo [1].png")
    content = (tmp_path / "photo [1].png").read_bytes()
    text = base64.b64encode(content).decode()
    sources = [image, tmp_path / "photo [1].png", str(tmp_path / "photo [1].png"), content, bytearray(content)]
    sources += [io.BytesIO(content), text, base64.encodebytes(content).decode(), f"data:image/png;base64,{text}"]
    for source in sources:
        assert np.array_equal(np.asarray(open_image(source)), PIXELS)
    for array in (PIXELS, torch.tensor(PIXELS)):
        assert open_image(array) is array


def test_urls(tmp_path):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(np.asarray(reduce_depth(open_image(f"{place}/deep.png", timeout=5))), GREY)
        with pytest.raises(ValueError, match="404"):
            open_image(f"{place}/none.png")
        server.shutdown()
    with pytest.raises(ValueError, match="refused"):
        open_image(f"{place}/deep.png")


def test_images_of_too_many_pixels_are_refused_before_they_take_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6 * 9 - 1)
    for factor in (1, 9):  # beyond twice the limit PIL itself refuses
        big = Image.new("RGB", (9 * factor, 6))
        big.save(tmp_path / "big.bmp")
        content = (tmp_path / "big.bmp").read_bytes()
        monkeypatch.setattr(ImageFile.ImageFile, "load", None)
        sources = [big, np.asarray(big), torch.zeros(3, 6, 9 * factor), np.zeros((6, 9 * factor))]
        for source in [*sources, tmp_path / "big.bmp", content, base64.b64encode(content).decode()]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with pytest.raises(ValueError, match=rf"{54 * factor} pixels.*At most 53 are read: make it smaller"):
                    open_image(source)
        monkeypatch.undo()
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6 * 9 - 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6 * 9)
    assert open_image(PIXELS) is PIXELS and open_image(Image.fromarray(PIXELS)).size == (9, 6)


def test_what_cannot_be_read_says_why(tmp_path):
    Image.fromarray(PIXELS).save(buffer := io.BytesIO(), "PNG")
    Image.fromarray(PIXELS).save(tmp_path / "x.eps")
    (tmp_path / "torn.png").write_bytes(buffer.getvalue()[:-40])
    (tmp_path / "._x.png").write_bytes(b"\0\5\26\7")
    os.mkfifo(tmp_path / "pipe")
    closed = Image.open(io.BytesIO(buffer.getvalue()))
    closed.close()
    for source, message in (
        (tmp_path / "none.png", "there is no such file"),
        (str(tmp_path / "none.png"), "there is no such file"),
        ("no such file", "there is no such file"),
        ("\0", "there is no such file"),
        ("äöü", "there is no such file"),
        ("data:image/png;base64,xyz", "it is not an image"),
        (tmp_path, "it is not a file"),
        (str(tmp_path / "pipe"), "it is not a file"),
        (tmp_path / "._x.png", "it is not an image"),
        (b"", "it is not an image"),
        (tmp_path / "torn.png", "truncated"),
        (Image.open(tmp_path / "torn.png"), "truncated"),
        (closed, "."),
        (tmp_path / "x.eps", "an EPS file is a program"),
        (7, "base64 or bytes, or lists of these; found int"),
        (None, "found NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            open_image(source)


def test_bytes_flipped_anywhere_are_an_image_or_a_value_error():
    rng = np.random.default_rng(0)
    image = Image.fromarray(PIXELS)
    formats = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "ICO", "PPM", "TGA", "PCX", "SGI", "JPEG2000")
    for name in formats:
        image.save(buffer := io.BytesIO(), name)
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for place in rng.integers(0, len(content), 3):
                content[place] = rng.integers(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for source in (content, content[: rng.integers(len(content))]):
                    try:
                        assert to_rgb_image(open_image(source)).mode == "RGB"
                    except ValueError as error:
                        assert str(error)


def test_orientation_is_obeyed_once_and_the_image_is_left_alone():
    exif = Image.Exif()
    for orientation in range(2, 9):
        exif[0x0112] = orientation
        Image.fromarray(PIXELS).save(buffer := io.BytesIO(), "PNG", exif=exif)
        image = Image.open(buffer)
        upright = open_image(image)
        for found in (upright, open_image(upright), open_image(buffer.getvalue()), open_image(image.convert("RGB"))):
            assert np.array_equal(np.asarray(found), np.asarray(ImageOps.exif_transpose(image)))
        assert upright is not image and np.array_equal(np.asarray(image), PIXELS)
    plain = Image.fromarray(PIXELS)
    assert open_image(plain) is plain


def test_the_file_imports_what_a_published_repository_has():
    """It travels: numpy, torch, PIL, transformers and the standard library, by public names."""
    for node in ast.walk(ast.parse(Path(pixels_imagegpt.__file__).read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            allowed = {
                "numpy",
                "torch",
                "PIL",
                "transformers",
                "httpx",
                *sys.stdlib_module_names,
            }
            assert {module.split(".")[0] for module in modules} <= allowed
            assert not any(
                part.startswith("_") for name in [*modules, *(a.name for a in node.names)] for part in name.split(".")
            )


def test_windows_of_other_proportions_are_central_and_the_largest():
    image = np.arange(20 * 33).reshape(1, 20, 33) % 251
    for grid, expected in (
        ((8, 4), image[:, :, 11:21]),  # all 20 rows, 10 of 33 columns
        ((4, 8), image[:, 2:18]),  # 16 of 20 rows
        ((1, 30), image[:, 9:10]),
        ((90, 1), image[:, :, 16:17]),
    ):
        assert np.array_equal(crop_to_proportions(image, grid), expected)
        found = crop_to_proportions(Image.fromarray(image[0].astype(np.uint8)), grid)
        assert np.array_equal(np.asarray(found), expected[0])
