"""`pipeline("image-completion")`, and layers in `pipeline("image-feature-extraction")`."""

import numpy as np
import pytest
import torch
from conftest import randomized, small_config
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel, pipeline

from hf_igpt import ImageGPTForCausalImageModeling, ImageGPTImageProcessorPil
from hf_igpt.features_imagegpt import features_of_tokens
from hf_igpt.generation_imagegpt import complete
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


def test_refusals(folder, model, palette):
    completer = pipeline("image-completion", folder)
    with pytest.raises(ValueError, match="between 0 and the image's height, 8"):
        completer(photo(0), rows=9)
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
