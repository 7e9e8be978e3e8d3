"""Image processors: transformers' tokens, every kind of image, the inverse, and bad input.

Run for the backend that is installed; tests/test_torchvision_backend.py runs it again for torchvision's.
"""

import io
import json
import pickle

import numpy as np
import pytest
import torch
import transformers.models.imagegpt as upstream
from PIL import Image
from transformers import AutoImageProcessor
from transformers.testing_utils import CaptureLogger
from transformers.utils import is_torchvision_available
from transformers.utils import logging as transformers_logging

from hf_igpt import ImageGPTImageProcessor, ImageGPTImageProcessorPil, image_processing_imagegpt
from hf_igpt.clusters import to_unit_range
from hf_igpt.data import read_processor
from hf_igpt.pixels_imagegpt import to_channels_first


BACKEND = "torchvision" if is_torchvision_available() else "pil"
Processor, Theirs = {
    "pil": (ImageGPTImageProcessorPil, lambda **o: upstream.ImageGPTImageProcessorPil(**o)),
    "torchvision": (ImageGPTImageProcessor, lambda **o: upstream.ImageGPTImageProcessor(**o)),
}[BACKEND]
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS).resize((90, 60), Image.Resampling.BICUBIC)


def assert_same_tokens(ours, theirs, pixels, palette):
    """Equal, except where transformers' rounding picked a colour that is farther from the pixel than ours."""
    differ = ours != theirs
    assert differ.mean() < 0.01
    distance = [((pixels - palette[tokens]) ** 2).sum(-1) for tokens in (ours, theirs)]
    assert (distance[0] <= distance[1] + 1e-6)[differ].all()


@pytest.mark.parametrize(
    "options",
    [
        {"size": 8},
        {"size": {"height": 16, "width": 12}},
        {"size": 32, "resample": Image.Resampling.BICUBIC},
        {"size": 32, "resample": Image.Resampling.NEAREST},
        {"do_resize": False},
        {"size": 16, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.6, 0.5, 0.7]},
        {"size": 16, "do_normalize": False},
        {"size": 16, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ],
)
def test_same_tokens_as_transformers(options, palette):
    ours, theirs = Processor(clusters=palette, **options), Theirs(clusters=palette, **options)
    for image in (PHOTO, np.asarray(PHOTO), np.asarray(PHOTO).transpose(2, 0, 1), torch.tensor(np.asarray(PHOTO))):
        a, b = (np.asarray(p(image, return_tensors="pt")["input_ids"]) for p in (ours, theirs))
        assert a.shape == b.shape and a.dtype == np.int64
        pixels = theirs(image, do_color_quantize=False, return_tensors="pt")["pixel_values"]
        pixels = np.asarray(pixels, dtype=np.float64).transpose(0, 2, 3, 1).reshape(1, -1, 3)
        assert_same_tokens(a, b, pixels, palette)


def test_same_pixel_values_as_transformers(palette):
    ours, theirs = (kind(clusters=palette, size=8, do_color_quantize=False) for kind in (Processor, Theirs))
    a, b = (p([PHOTO, PHOTO], return_tensors="pt")["pixel_values"] for p in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-6)


def test_crop_size_keeps_transformers_meaning(palette):
    options = {"size": 16, "do_center_crop": True, "crop_size": 8}
    tokens = Processor(clusters=palette, **options)(PHOTO, return_tensors="pt")["input_ids"]
    assert tokens.shape == (1, 64)
    if BACKEND == "torchvision":  # transformers' PIL processor ignores the crop
        assert torch.equal(tokens, Theirs(clusters=palette, **options)(PHOTO, return_tensors="pt")["input_ids"])


def test_center_crop_takes_the_largest_central_square(palette):
    processor = Processor(clusters=palette, size=8, do_center_crop=True)
    square = PHOTO.crop((15, 0, 75, 60))
    for image in (PHOTO, np.asarray(PHOTO)):
        expected = Processor(clusters=palette, size=8)(square, return_tensors="pt")["input_ids"]
        assert torch.equal(processor(image, return_tensors="pt")["input_ids"], expected)
    tall = PHOTO.rotate(90, expand=True)
    assert torch.equal(
        processor(tall, return_tensors="pt")["input_ids"],
        Processor(clusters=palette, size=8)(square.rotate(90, expand=True), return_tensors="pt")["input_ids"],
    )


@pytest.mark.parametrize(("height", "width"), [(8, 4), (4, 8)])
def test_grids_that_are_not_square(height, width, palette, tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8))
    processor = ImageGPTImageProcessor(clusters=palette, size=(height, width), do_center_crop=True)
    window = photo.crop((11, 0, 21, 20) if height > width else (0, 2, 33, 18))  # of the grid's proportions
    squashing = ImageGPTImageProcessor(clusters=palette, size=(height, width))
    assert squashing(window)["input_ids"][0].tolist() == processor(photo)["input_ids"][0].tolist()
    assert squashing(photo)["input_ids"][0].tolist() != processor(photo)["input_ids"][0].tolist()
    array = np.asarray(photo)
    assert np.array_equal(processor(array)["input_ids"][0], processor(photo)["input_ids"][0])
    (picture,) = processor.decode(processor(photo)["input_ids"])
    assert picture.size == (width, height) and processor(picture)["input_ids"][0].tolist() == list(
        processor(photo)["input_ids"][0]
    )
    processor.save_pretrained(tmp_path)
    again = read_processor(str(tmp_path))
    assert again.token_grid() == (height, width) and again.crop_size is None
    assert np.array_equal(again(photo)["input_ids"][0], processor(photo)["input_ids"][0])


def converted(mode):
    if mode == "I;16":
        return Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257)
    if mode in ("1", "LA", "I", "F"):
        return PHOTO.convert("L").convert(mode)
    if mode == "PA":
        return PHOTO.convert("P").convert("PA")
    return PHOTO.convert(mode)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]
)
def test_every_pil_mode(mode, palette):
    image = converted(mode)
    assert image.mode == mode
    tokens = Processor(clusters=palette, size=8)(image, return_tensors="pt")["input_ids"]
    grey = mode in ("L", "LA", "I", "I;16", "F")
    same_picture = PHOTO.convert("L").convert("RGB") if grey else image.convert("RGB")
    assert torch.equal(tokens, Processor(clusters=palette, size=8)(same_picture, return_tensors="pt")["input_ids"])


def test_transparency_lies_on_white():
    palette = to_unit_range(np.array([[0, 0, 0], [255, 255, 255]]))
    processor = Processor(clusters=palette, size=8)
    for image in (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), np.zeros((8, 8, 4), np.uint8)):
        assert (np.asarray(processor(image)["input_ids"]) == 1).all()
    paletted = Image.new("P", (8, 8), 0)
    paletted.info["transparency"] = 0
    assert (np.asarray(processor(paletted)["input_ids"]) == 1).all()


def test_every_kind_of_array(palette):
    processor = Processor(clusters=palette, size=8)
    hwc = np.asarray(PHOTO)
    expected = processor(PHOTO, return_tensors="pt")["input_ids"]
    for image in (hwc, hwc.transpose(2, 0, 1), torch.tensor(hwc), torch.tensor(hwc).permute(2, 0, 1), hwc.astype(int)):
        assert torch.equal(processor(image, return_tensors="pt")["input_ids"], expected)
        assert torch.equal(processor([image, image], return_tensors="pt")["input_ids"], expected.repeat(2, 1))
    assert torch.equal(processor(np.stack([hwc] * 3), return_tensors="pt")["input_ids"], expected.repeat(3, 1))
    grey = np.asarray(PHOTO.convert("L"))
    expected = processor(PHOTO.convert("L"), return_tensors="pt")["input_ids"]
    for image in (grey, grey[None], grey[..., None], torch.tensor(grey), [grey]):
        assert torch.equal(processor(image, return_tensors="pt")["input_ids"], expected)
    assert (np.asarray(processor(grey > 300)["input_ids"]) == np.asarray(processor(grey * 0)["input_ids"])).all()


def test_mixed_sizes_and_single_images(palette):
    processor = Processor(clusters=palette, size=8)
    images = [PHOTO, PHOTO.crop((0, 0, 11, 7)), np.asarray(PHOTO)[:40], PHOTO.convert("L")]
    batch = np.asarray(processor(images)["input_ids"])
    assert batch.shape == (4, 64) and batch.dtype == np.int64
    for image, row in zip(images, batch, strict=True):
        assert np.array_equal(np.asarray(processor(image)["input_ids"]), row[None])


def test_paths(palette, tmp_path):
    processor = Processor(clusters=palette, size=8)
    PHOTO.save(tmp_path / "photo.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert np.array_equal(processor(str(tmp_path / "photo.png"))["input_ids"], processor(PHOTO)["input_ids"])
    for mode in ("RGBA", "I;16"):  # opened as they are, not by way of a conversion to RGB
        image = converted(mode)
        if mode == "RGBA":
            image.putalpha(100)
        image.save(tmp_path / "other.png")
        assert np.array_equal(processor(str(tmp_path / "other.png"))["input_ids"], processor(image)["input_ids"])
    with pytest.raises(ValueError, match="broken.png"):
        processor([str(tmp_path / "photo.png"), str(tmp_path / "broken.png")])


def test_decode_inverts_the_processor(palette):
    processor = Processor(clusters=palette, size=8)
    tokens = torch.randint(0, 64, (3, 64))
    images = processor.decode(tokens)
    assert [image.size for image in images] == [(8, 8)] * 3 and images[0].mode == "RGB"
    assert torch.equal(processor(images, return_tensors="pt")["input_ids"], tokens)
    with_sos = torch.nn.functional.pad(tokens, (1, 0), value=64)  # as generate() returns them
    assert np.array_equal(np.asarray(processor.decode(with_sos)[1]), np.asarray(images[1]))
    assert np.array_equal(np.asarray(processor.decode(tokens[1].tolist())[0]), np.asarray(images[1]))
    for size in ((4, 16), {"height": 4, "width": 16}, np.array([4, 16])):
        assert processor.decode(tokens, size=size)[0].size == (16, 4)
    assert processor.decode(tokens[:, :16], size=np.int64(4))[0].size == (4, 4)
    assert processor.decode(tokens[:0]) == []


def test_decode_knows_the_grid_that_the_options_make(palette):
    cropped = Processor(clusters=palette, size=16, do_center_crop=True, crop_size=8)
    assert cropped.decode(cropped(PHOTO)["input_ids"])[0].size == (8, 8)
    with pytest.raises(ValueError, match="do not fix the height and width"):
        Processor(clusters=palette, do_resize=False).decode(torch.zeros(1, 64, dtype=torch.long))


def test_decode_of_partial_images(palette):
    processor = Processor(clusters=palette, size=8)
    tokens = torch.randint(0, 64, (1, 24))
    tokens[0, 2] = -100
    transparent = np.asarray(processor.decode(tokens)[0])
    assert transparent.shape == (8, 8, 4)
    missing = np.ones(64, bool)
    missing[:24] = False
    missing[2] = True
    assert np.array_equal(transparent[..., 3].ravel() == 0, missing)
    grey = np.asarray(processor.decode(tokens, missing="grey")[0]).reshape(64, 3)
    assert (grey[missing] == 128).all()
    assert np.array_equal(grey[~missing], transparent.reshape(64, 4)[~missing, :3])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saving_keeps_every_bit_of_the_palette(palette, dtype, tmp_path):
    processor = Processor(clusters=palette.astype(dtype), size=8, do_center_crop=True)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is Processor and loaded.do_center_crop
    assert np.array_equal(loaded.clusters, palette.astype(dtype).astype(np.float64))
    assert loaded.to_dict() == processor.to_dict()
    theirs = upstream.ImageGPTImageProcessor if BACKEND == "torchvision" else upstream.ImageGPTImageProcessorPil
    theirs = theirs.from_pretrained(tmp_path)  # ours reads in plain transformers
    assert np.allclose(np.asarray(theirs.clusters), palette, atol=1e-6)
    at_load = Processor.from_pretrained(tmp_path, size={"height": 4, "width": 4})
    square = PHOTO.crop((15, 0, 75, 60))
    expected = Processor(clusters=loaded.clusters, size=4)(square)["input_ids"]
    for tokens in (loaded(PHOTO, size=4)["input_ids"], at_load(PHOTO)["input_ids"]):  # another size, the same square
        assert np.array_equal(tokens, expected)
    for image, same in ((PHOTO.crop((0, 0, 60, 60)), True), (PHOTO, False)):  # theirs squashes what is not square
        a, b, c = (np.asarray(p(image, return_tensors="np")["input_ids"]) for p in (processor, loaded, theirs))
        assert np.array_equal(a, b) and np.array_equal(b, c) == same


def test_openai_hub_configuration(palette, tmp_path):
    """The old form of OpenAI's files on the Hub: a number as size, a feature extractor's name."""
    import json

    config = {"clusters": palette.tolist(), "do_normalize": True, "do_resize": True, "resample": 2, "size": 32}
    config["feature_extractor_type"] = "ImageGPTFeatureExtractor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert np.asarray(AutoImageProcessor.from_pretrained(tmp_path)(PHOTO)["input_ids"]).shape == (1, 1024)


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        (np.zeros((64, 4)), r"shape \(64, 4\)"),
        (np.full((4, 3), 200.0), r"\[-1, 1\]"),
        (None, "no palette"),
    ],
)
def test_bad_palettes(clusters, message):
    with pytest.raises(ValueError, match=message):
        Processor(clusters=clusters)(PHOTO)


ABSURD = [
    ({"size": 10**6}, "size: height is a whole number from 1 to 4096; found 1000000"),
    ({"size": 0}, "size: height"),
    ({"size": -3}, "size: height"),
    ({"size": True}, "size: height"),
    ({"size": {"height": 8, "width": "8"}}, "size: width"),
    ({"size": {"shortest_edge": 10**6}}, "size: shortest_edge"),
    ({"size": "big"}, "size"),
    ({"size": 8.5}, "size"),
    ({"do_center_crop": True, "crop_size": {"height": 10**6, "width": 1}}, "crop_size: height"),
    ({"image_std": 0}, "image_std is a positive number, or one for each channel; found 0"),
    ({"image_std": [0.5, 0.5, 0]}, "image_std"),
    ({"image_std": [0.5, 0.5]}, "image_std"),
    ({"image_std": float("nan")}, "image_std"),
    ({"image_mean": [0.5, 0.5, float("inf")]}, "image_mean"),
    ({"image_mean": "x"}, "image_mean"),
    ({"rescale_factor": float("nan")}, "rescale_factor is a positive number"),
    ({"rescale_factor": 0}, "rescale_factor"),
    ({"rescale_factor": [1, 2, 3]}, "rescale_factor"),
    ({"do_resize": "false"}, "do_resize is true or false; found 'false'"),
    ({"do_color_quantize": 1}, "do_color_quantize"),
    ({"resample": 99}, "resampling filters"),
    ({"resample": "x"}, "resampling filters"),
    ({"clusters": {"a": 1}}, "palette"),
]


@pytest.mark.parametrize(("options", "message"), ABSURD)
def test_absurd_options_are_refused_by_name_and_file(options, message, palette, tmp_path):
    with pytest.raises(ValueError, match=message):
        Processor(**({"clusters": palette} | options))
    saved = {"image_processor_type": "ImageGPTImageProcessor", "clusters": palette.tolist()} | options
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    for load in (AutoImageProcessor.from_pretrained, read_processor):
        with pytest.raises(ValueError, match=rf"{tmp_path}, preprocessor_config\.json: .*{message}"):
            load(tmp_path)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "3", '{"clusters": ' + "[" * 5000 + "]" * 5000 + "}", "\x00"])
def test_files_of_no_processor_are_named(text, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        read_processor(tmp_path)


def test_absurd_options_of_a_call_are_refused(palette):
    processor = Processor(clusters=palette, size=8)
    for options, message in (
        ({"size": 10**6}, "size: "),
        ({"image_std": 0}, "image_std"),
        ({"resample": 99}, "filter"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(PHOTO, **options)
    assert processor(PHOTO, size={"height": 4, "width": 4}, image_std=[0.5, 0.5, 0.5])["input_ids"].shape == (1, 16)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 3, 3), np.uint8), "Image 0 is empty"),
        ([], "No images"),
        ([[]], "No images"),
        (np.zeros((0, 8, 8, 3), np.uint8), "No images"),
        (None, "found NoneType"),
        (PIXELS.tolist(), "^.{1,300}$"),  # not all of the pixels
        (np.full((5, 5, 3), 300), "0..255"),
        (np.zeros((5, 5, 2), np.uint8), "channels"),
        ("/no/such/image.png", "/no/such/image.png"),
    ],
)
def test_bad_images(image, message, palette):
    with pytest.raises(ValueError, match=message):
        Processor(clusters=palette, size=8)(image)


def test_bad_calls(palette):
    small = PHOTO.resize((8, 8))
    for resample in (99, -1):  # also where nothing is resized
        with pytest.raises(ValueError, match="resampling filter"):
            Processor(clusters=palette, size=8, resample=resample)(small)
    with pytest.raises(TypeError):
        Processor(clusters=palette, size=8)(small, "pt")
    buffer = io.BytesIO()
    PHOTO.save(buffer, "PNG")
    broken = Image.open(io.BytesIO(buffer.getvalue()[:-40]))
    with pytest.raises(ValueError, match="cannot be read: image file is truncated"):
        Processor(clusters=palette, size=8)([small, broken])


def test_bad_tokens(palette):
    processor = Processor(clusters=palette, size=8)
    with pytest.raises(ValueError, match=r"0\.\.63"):
        processor.decode(torch.full((1, 64), 65))
    with pytest.raises(ValueError, match="do not fit"):
        processor.decode(torch.zeros(1, 80, dtype=torch.long))
    with pytest.raises(ValueError, match="integers"):
        processor.decode(torch.full((1, 64), 1.9))
    with pytest.raises(ValueError, match="missing"):
        processor.decode(torch.zeros(1, 8, dtype=torch.long), missing="black")
    with pytest.raises(ValueError, match="no palette"):
        Processor(size=8).decode(torch.zeros(1, 8, dtype=torch.long))


def test_eight_bit_images_give_the_tokens_of_the_general_path(palette, monkeypatch):
    """8-bit images stay PIL images until they are looked up; as arrays, and as normalised floats, they give the same."""
    rgba = np.dstack([PIXELS, RNG.integers(0, 256, PIXELS.shape[:2], dtype=np.uint8)])
    images = [
        PHOTO,
        PHOTO.convert("L"),
        PHOTO.convert("P"),
        Image.fromarray(rgba),
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        rgba,
        PIXELS[..., :1],
        PIXELS[..., 0],
        PIXELS[:1],  # (1, 30, 3): channels last, as in the others
        PIXELS[:3],
        torch.tensor(PIXELS),
        torch.tensor(PIXELS.transpose(2, 0, 1)),
    ]
    as_given = Processor.process_image
    crop = {"do_center_crop": True}
    sizes = [{"height": height, "width": width} for height, width in ((8, 8), (20, 30), (3, 30))]
    for options in [{"size": size} | more for size in sizes for more in ({}, crop)]:
        processor = Processor(clusters=palette, **options)
        short = [processor(image)["input_ids"] for image in images]
        together = np.concatenate([processor(batch)["input_ids"] for batch in (images[:4], images[4:5] * 3)])
        assert np.array_equal(together, np.concatenate([*short[:4], *[short[4]] * 3]))
        with monkeypatch.context() as patch:
            patch.setattr(Processor, "process_image", lambda *a, **o: to_channels_first(as_given(*a, **o)))
            for image, tokens in zip(images, short, strict=True):
                assert np.array_equal(processor(image)["input_ids"], tokens)
            patch.setattr(image_processing_imagegpt, "_normalizes_to_palette_range", lambda *options: False)
            for image, tokens in zip(images, short, strict=True):
                assert np.array_equal(processor(image)["input_ids"], tokens)


def test_changed_options_count_and_are_checked(palette):
    processor = Processor(clusters=palette, size=8)
    assert processor(PHOTO)["input_ids"].shape == (1, 64)
    processor.size = {"height": 4, "width": 4}
    assert processor(PHOTO)["input_ids"].shape == (1, 16)
    processor.clusters = palette[:1]
    assert not processor(PHOTO)["input_ids"].any()
    processor.clusters = palette + 2
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        processor(PHOTO)
    processor.clusters = None
    with pytest.raises(ValueError, match="no palette"):
        processor(PHOTO)
    assert processor.to_dict().keys() == Processor(clusters=palette, size=8).to_dict().keys() - {"clusters"}


def test_options_changed_in_place_count(palette):
    processor = Processor(clusters=palette, size=4)
    processor.size = {"height": 4, "width": 4}
    assert processor(PHOTO)["input_ids"].shape == (1, 16)
    processor.size["height"] = 2
    assert processor(PHOTO)["input_ids"].shape == (1, 8)
    processor.image_mean = [0.5, 0.5, 0.5]
    before = processor(PHOTO)["input_ids"]
    processor.image_mean[0] = 0.1
    assert not np.array_equal(processor(PHOTO)["input_ids"], before)


def test_use_leaves_no_trace(palette):
    processor = Processor(clusters=palette, size=4)
    before = pickle.dumps(processor)
    processor(PHOTO)
    assert pickle.dumps(processor) == before  # what caches of `datasets` are keyed by


def test_mixed_kinds_and_shapes_of_as_many_pixels(palette):
    assert Processor(clusters=palette, size=4)([PHOTO, np.asarray(PHOTO)])["input_ids"].shape == (2, 16)
    upright = [PIXELS[:6, :10], PIXELS[:10, :6]]
    assert Processor(clusters=palette, do_resize=False)(upright)["input_ids"].shape == (2, 60)


@pytest.mark.parametrize("options", [{}, {"do_rescale": False}, {"do_normalize": False}, {"do_resize": False}])
def test_images_of_levels_and_of_floats_in_one_batch(palette, options):
    levels = PIXELS[:8, :8]
    floats = levels / (1 if options.get("do_resize") is False else 255)
    batch = [Image.fromarray(levels), floats.astype(np.float32), levels]
    processor = Processor(clusters=palette, size=8, **options)
    for image, tokens in zip(batch, processor(batch)["input_ids"], strict=True):
        assert np.array_equal(tokens, processor(image)["input_ids"][0])


def test_floats_that_are_rescaled_already_are_warned_of(palette):
    logger = transformers_logging.get_logger("hf_igpt.image_processing_imagegpt")
    for image, options, warns in (
        (PIXELS / 255, {}, True),
        (torch.tensor(PIXELS) / 255, {}, True),
        (PIXELS / 255, {"do_rescale": False}, False),
        (PIXELS.astype(float), {}, False),
        (np.zeros(PIXELS.shape), {}, False),
    ):
        type(logger).warning_once.cache_clear()
        with CaptureLogger(logger) as captured:
            Processor(clusters=palette, size=8)(image, **options)
        assert ("do_rescale=False" in captured.out) == warns


@pytest.mark.parametrize("library", [np, torch])
def test_floats_of_the_wrong_scale_are_refused(palette, library):
    processor = Processor(clusters=palette, size=8)
    for floats, options in (
        (PIXELS * 1.0, {"do_rescale": False, "do_resize": False}),
        (PIXELS * 0.999, {"do_rescale": False}),
        (PIXELS * 257.0, {"do_resize": False}),
    ):
        with pytest.raises(ValueError, match="from .* to .* where the palette's colours lie|outside the range"):
            processor(floats if library is np else torch.tensor(floats), **options)
    if BACKEND == "pil":  # it resizes whole numbers as 8-bit images, which keep their scale
        whole = PIXELS * 1.0 if library is np else torch.tensor(PIXELS * 1.0)
        assert np.array_equal(processor(whole, do_rescale=False)["input_ids"], processor(whole)["input_ids"])
    for options in ({}, {"do_resize": False}):
        for value in (np.nan, np.inf):
            floats = PIXELS / 255
            floats[0, 0] = value
            with pytest.raises(ValueError, match="NaN or infinite"):
                processor(floats if library is np else torch.tensor(floats), **options)


def test_levels_keep_their_scale_without_rescaling(palette):
    """8-bit images, and floats in [0, 1], give the tokens that 8-bit images give by default."""
    processor = Processor(clusters=palette, do_resize=False)
    expected = processor(PIXELS)["input_ids"]
    for image in (PIXELS, Image.fromarray(PIXELS), torch.tensor(PIXELS), PIXELS / 255):
        assert np.array_equal(processor(image, do_rescale=False)["input_ids"], expected)
    halves = {"image_mean": [127.5] * 3, "image_std": [127.5] * 3, "do_rescale": False}
    for image in (PIXELS, PIXELS * 1.0):  # options of one's own
        assert (np.asarray(processor(image, **halves)["input_ids"]) == expected).mean() > 0.99


def test_channels_that_are_no_colours_are_refused(palette):
    for image in (np.dstack([PIXELS, PIXELS[..., 0]]), PIXELS[..., 0], PIXELS[..., :1] / 255, PHOTO.convert("L")):
        for options in ({}, {"do_resize": False}):
            with pytest.raises(ValueError, match="channels, not RGB: pass do_convert_rgb=True"):
                Processor(clusters=palette, size=8, do_convert_rgb=False, **options)(image)


def test_one_limit_of_pixels(palette, tmp_path, monkeypatch):
    PHOTO.save(tmp_path / "photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 60 - 1)
    for image in (PHOTO, np.asarray(PHOTO), torch.tensor(np.asarray(PHOTO)), np.stack([np.asarray(PHOTO)] * 2)):
        with pytest.raises(
            ValueError, match=r"Image \d cannot be read: it has .* = 5,400 pixels. At most 5,399 are read"
        ):
            Processor(clusters=palette, size=8)(image)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match=r"photo\.png .* = 5,400 pixels"):
        Processor(clusters=palette, size=8)(tmp_path / "photo.png")


if BACKEND == "pil":

    def test_without_torchvision_the_pil_backend_is_used(palette, tmp_path):
        processor = ImageGPTImageProcessor(clusters=palette, size=8)
        assert type(processor) is ImageGPTImageProcessorPil
        processor.save_pretrained(tmp_path)
        reloaded = ImageGPTImageProcessor.from_pretrained(tmp_path)
        expected = ImageGPTImageProcessorPil(clusters=palette, size=8)(PHOTO)["input_ids"]
        assert np.array_equal(processor(PHOTO)["input_ids"], expected)
        assert np.array_equal(reloaded(PHOTO)["input_ids"], expected)
