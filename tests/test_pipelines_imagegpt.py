"""`pipeline("image-completion")`, and layers in `pipeline("image-feature-extraction")`."""

import base64
import io

import numpy as np
import pytest
import torch
from conftest import randomized, small_config
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel, pipeline

from hf_igpt import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTImageProcessorPil,
    ImageGPTModel,
)
from hf_igpt.data import read_image
from hf_igpt.features_imagegpt import features_of_tokens
from hf_igpt.generation_imagegpt import complete, inpaint
from hf_igpt.pipelines_imagegpt import ImageCompletionPipeline


@pytest.fixture
def processor(palette):
    return ImageGPTImageProcessorPil(clusters=palette[:16], size=8)


@pytest.fixture
def folder(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return str(tmp_path)


def photo(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def upper(image, rows):
    return np.asarray(image)[:rows]


def test_completions_keep_the_rows_given(folder, processor):
    completer = pipeline("image-completion", folder)
    assert type(completer) is ImageCompletionPipeline
    image = photo(0)
    (seen,) = processor.decode(processor(image)["input_ids"])
    for rows in (0, 3, 8):
        pictures = completer(image, rows=rows, num_completions=2, seed=0)
        assert len(pictures) == 2 and all(picture.size == (8, 8) for picture in pictures)
        assert all(np.array_equal(upper(picture, rows), upper(seen, rows)) for picture in pictures)
    assert np.array_equal(upper(completer(image)[0], 4), upper(seen, 4))  # half by default
    pictures = completer(image, seed=1, num_completions=2)
    assert not np.array_equal(*map(np.asarray, pictures))


def test_a_seed_repeats_and_is_that_of_complete(folder, model, processor):
    completer = pipeline("image-completion", folder)
    before = torch.get_rng_state()
    one = completer(photo(0), rows=2, num_completions=3, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    (other,) = complete(model, processor, photo(0), rows=2, num_completions=3, seed=7)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_batches_files_and_options(folder, tmp_path):
    completer = pipeline("image-completion", folder, num_completions=2)
    photo(0).save(tmp_path / "a.png")
    answers = completer([str(tmp_path / "a.png"), photo(1), photo(2)], batch_size=2, top_k=1)
    assert [len(pictures) for pictures in answers] == [2, 2, 2]
    for pictures, source in zip(
        answers, range(3), strict=True
    ):  # greedy: the two are one, and batching changes nothing
        assert np.array_equal(*map(np.asarray, pictures))
        assert np.array_equal(pictures[0], completer(photo(source), top_k=1)[0])


def test_holes(folder, model, processor):
    completer, given, box = pipeline("image-completion", folder), [photo(0), photo(1)], (0.25, 0.25, 0.75, 0.75)
    pictures = completer(given, mask=box, num_completions=2, particles=4, seed=3)
    expected = inpaint(model, processor, given, box, 2, particles=4, seed=3)
    for row, others in zip(pictures, expected, strict=True):
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(row, others, strict=True))
    together = completer(given, mask=box, num_completions=2, particles=4, seed=3, batch_size=2)
    assert np.array_equal(np.asarray(together[1][1]), np.asarray(expected[1][1]))
    for options, message in (
        ({"rows": 2}, "give one of them"),
        ({"num_beams": 2}, "no option num_beams"),
        ({"mask": np.ones((3, 3))}, "The mask has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            completer(given[0], **{"mask": box} | options)


def test_refusals(folder, model, palette):
    completer = pipeline("image-completion", folder)
    with pytest.raises(ValueError, match="between 0 and the image's height, 8"):
        completer(photo(0), rows=9)
    with pytest.raises(ValueError, match="between 0 and the image's height, 8; found 0.5"):
        completer(photo(0), rows=0.5)
    with pytest.raises(ValueError, match="one number of rows of all its images"):
        completer([photo(0), photo(1)], rows=[2, 3])
    with pytest.raises(ValueError, match="at least 1"):
        completer(photo(0), num_completions=0)
    for processor in (ImageGPTImageProcessorPil(clusters=palette[:9], size=8), ImageGPTImageProcessorPil(size=8)):
        with pytest.raises(ValueError, match="use the processor the model was trained with"):
            pipeline("image-completion", model=model, image_processor=processor)


def test_checkpoints_of_transformers(palette, tmp_path):
    config = small_config(use_bias=True, bos_token_id=None)
    randomized(ImageGPTForCausalImageModeling(config)).save_pretrained(tmp_path)
    ImageGPTImageProcessorPil(clusters=palette[:16], size=8).save_pretrained(tmp_path)
    assert len(pipeline("image-completion", str(tmp_path))(photo(0))) == 1


# -- images -----------------------------------------------------------------------------------------------------------


def kinds_of_images():
    """Images that PIL's plain conversion to RGB, or a missing rotation, would change, by name."""
    pixels = np.random.default_rng(5).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    grey = pixels[..., 0]
    turned = Image.Exif()
    turned[0x0112] = 6
    images = {
        "RGB": (Image.fromarray(pixels[..., :3]), {}),
        "upright by its tag": (Image.fromarray(pixels[..., :3]), {"exif": turned}),
        "transparent": (Image.fromarray(pixels), {}),
        "transparent and turned": (Image.fromarray(pixels), {"exif": turned}),
        "grey and transparent": (Image.fromarray(pixels).convert("LA"), {}),
        "palette with a transparent colour": (Image.fromarray(pixels[..., :3]).quantize(16), {"transparency": 3}),
        "16 bits": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "16 bits, one grey transparent": (Image.fromarray(grey.astype(np.uint16) * 257), {"transparency": 257}),
        "1 bit": (Image.fromarray(grey > 99), {}),
    }
    for name, (image, options) in images.items():
        image.save(buffer := io.BytesIO(), "PNG", **options)
        yield name, buffer.getvalue()
    for name, image in {
        "floats in [0, 1]": Image.fromarray((grey / 255).astype(np.float32)),
        "floats in 0..255": Image.fromarray(grey.astype(np.float32)),
        "32 bits": Image.fromarray(grey.astype(np.int32) * 257),
        "CMYK": Image.fromarray(pixels[..., :3]).convert("CMYK"),
    }.items():
        image.save(buffer := io.BytesIO(), "TIFF")
        yield name, buffer.getvalue()


@pytest.fixture(scope="module")
def pipelines():
    """The three pipelines with one processor, by task; each as a function that returns an image's tokens."""
    palette = np.random.default_rng(0).uniform(-1, 1, (16, 3))
    processor = ImageGPTImageProcessorPil(clusters=palette, size=8)
    classes = (ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel)
    tasks = ("image-completion", "image-classification", "image-feature-extraction")
    return {
        task: pipeline(task, model=kind(small_config()).eval(), image_processor=processor)
        for task, kind in zip(tasks, classes, strict=True)
    }


@pytest.mark.parametrize(
    ("name", "content"), list(kinds_of_images()), ids=lambda value: value if type(value) is str else ""
)
def test_every_entrance_gives_the_same_tokens(pipelines, name, content, tmp_path):
    processor = pipelines["image-completion"].image_processor
    path = tmp_path / "image [1].png"
    path.write_bytes(content)
    image = read_image({"bytes": content, "path": None})  # as in training
    expected = processor(np.asarray(image), return_tensors="pt")["input_ids"]
    assert len(set(expected[0].tolist())) > 1  # neither white nor black
    text = base64.b64encode(content).decode()
    sources = {
        "path": str(path),
        "Path": path,
        "bytes": content,
        "base64": text,
        "data": f"data:image/png;base64,{text}",
    }
    sources["PIL"] = Image.open(path)
    for kind, source in sources.items():
        for entrance in (processor, *(pipe.preprocess for pipe in pipelines.values())):
            assert torch.equal(torch.as_tensor(entrance(source)["input_ids"]), expected), kind
        assert np.array_equal(processor([source, source])["input_ids"], expected.repeat(2, 1))
    assert torch.equal(
        torch.as_tensor(processor(read_image({"bytes": None, "path": str(path)}))["input_ids"]), expected
    )


def test_pipelines_refuse_what_cannot_be_read_by_name(pipelines, tmp_path, monkeypatch):
    photo(0).save(tmp_path / "photo.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "photo.png").read_bytes()[:60])
    (tmp_path / "._photo.png").write_bytes(b"\0\5\26\7")
    for pipe in pipelines.values():
        for name in ("torn.png", "._photo.png", "none.png"):
            for source in (tmp_path / name, str(tmp_path / name)):
                with pytest.raises(ValueError, match=f"Image .*{name} cannot be read: "):
                    pipe(source)
        with pytest.raises(ValueError, match=r"torn\.png cannot be read: "):
            pipe([photo(0), Image.open(tmp_path / "torn.png")])
        with pytest.raises(ValueError, match="one image, or a list of images; found 2 in one"):
            pipe(np.zeros((2, 8, 8, 3), np.uint8))
        with monkeypatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
            with (
                pytest.warns(Image.DecompressionBombWarning),
                pytest.raises(ValueError, match=r"photo\.png .* = 600 pixels"),
            ):
                pipe(tmp_path / "photo.png")
            with pytest.raises(ValueError, match="30 x 20 = 600 pixels. At most 599 are read"):
                pipe(photo(0))


def test_classification_of_other_models_is_unchanged():
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    classify = pipeline("image-classification", model=ViTForImageClassification(config), image_processor=processor)
    assert len(classify(Image.new("RGB", (20, 20)))) == 2


# -- features ---------------------------------------------------------------------------------------------------------


def test_pipeline_with_layer_and_pooling(folder, model, tmp_path):
    extract = pipeline("image-feature-extraction", folder)
    file = str(tmp_path / "photo.png")
    photo(0).save(file)
    tokens = extract.image_processor(file, return_tensors="pt")["input_ids"]
    # transformers' own result: the tokens as they are
    raw = model.transformer(tokens).last_hidden_state
    assert torch.allclose(extract(file, return_tensors=True), raw, atol=1e-5)
    for layer in (0, 2, 3):
        expected = features_of_tokens(model, tokens, layer)[layer]
        assert torch.allclose(extract(file, layer=layer, pool=True, return_tensors=True), expected, atol=1e-5)
    last = extract(file, pool=True)
    assert np.shape(last) == (1, 32) and np.allclose(last, expected.numpy(), atol=1e-5)
    assert np.shape(extract(file, layer=1)) == (1, 64, 32)
    images = [Image.open(file), Image.new("L", (9, 9), 80), file]
    singly, batched = (
        [extract(i, layer=1, pool=True) for i in images],
        extract(images, layer=1, pool=True, batch_size=3),
    )
    assert np.allclose(singly, batched, atol=1e-5)
    with pytest.raises(ValueError, match="no layer 7"):
        extract(file, layer=7)
    at_start = pipeline("image-feature-extraction", folder, layer=2, pool=True)
    assert np.shape(at_start(file)) == (1, 32)


def test_completions_follow_the_checkpoints_temperature(model, processor):
    """As cold as this, sampling is greedy; an argument wins over the checkpoint."""
    completer = ImageCompletionPipeline(model=model, image_processor=processor)
    image = photo(1)
    warm = completer(image, seed=0)[0]
    cold = complete(model, processor, image, seed=0, temperature=1e-4)[0][0]
    assert not np.array_equal(warm, cold)
    model.generation_config.temperature = 1e-4
    cooled = ImageCompletionPipeline(model=model, image_processor=processor)
    assert np.array_equal(cooled(image, seed=0)[0], cold)
    assert np.array_equal(cooled(image, seed=0, temperature=1.0)[0], warm)


def test_pipeline_of_other_models_is_unchanged(tmp_path):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    extract = pipeline(
        "image-feature-extraction",
        model=ViTModel(config),
        image_processor=ViTImageProcessorPil(size={"height": 16, "width": 16}),
    )
    assert np.shape(extract(Image.new("RGB", (20, 20)))) == (1, 2, 8)
    assert np.shape(extract(Image.new("RGB", (20, 20)), pool=True)) == (1, 8)
    with pytest.raises(ValueError, match="option for Image GPTs"):
        extract(Image.new("RGB", (20, 20)), layer=1)
