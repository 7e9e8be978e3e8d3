"""Features: against a naive loop over hidden states, OpenAI's classifier, and in transformers' pipeline."""

import numpy as np
import pytest
import torch
from conftest import randomized, small_config
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel, pipeline

from hf_igpt import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTForMaskedImageModeling,
    ImageGPTImageProcessorPil,
    ImageGPTModel,
)
from hf_igpt.features import check_layers, features_of_tokens
from hf_igpt.modeling_imagegpt import random_mask, shift_right


def naive(model, inputs, **options):
    """ln_1 of each hidden state, one after another; the last has passed ln_f."""
    states = model.base_model(inputs, output_hidden_states=True, **options).hidden_states
    normed = [block.ln_1(state) for block, state in zip(model.base_model.h, states, strict=False)] + [states[-1]]
    return [state.mean(dim=1) for state in normed]


@pytest.mark.parametrize("kind", ["causal", "masked", "backbone"])
def test_features_are_the_naive_loops(kind, tokens):
    masks = {}
    if kind == "masked":
        model = randomized(ImageGPTForMaskedImageModeling(small_config(objective="masked")))
        masks = {"bool_masked_pos": random_mask(tokens.shape, torch.Generator().manual_seed(0))}
        expected = naive(model, tokens, **masks)
    else:
        model = randomized((ImageGPTModel if kind == "backbone" else ImageGPTForCausalImageModeling)(small_config()))
        expected = naive(model, shift_right(tokens, 16))
    found = features_of_tokens(model, tokens, **masks)
    assert list(found) == [0, 1, 2, 3]
    for layer, feature in found.items():
        assert (feature - expected[layer]).abs().max() < 1e-5
    unpooled = features_of_tokens(model, tokens, [3, 1], pool=False, **masks)
    assert list(unpooled) == [3, 1] and unpooled[1].shape == (4, 64, 32)
    assert (unpooled[1].mean(1) - expected[1]).abs().max() < 1e-5
    assert not any(m._forward_hooks for m in model.modules() if type(m).__name__ == "ImageGPTLayerNorm")


def test_the_last_layer_is_what_openais_classifier_reads(tokens):
    classifier = randomized(ImageGPTForImageClassification(small_config(sos_inputs=True, num_labels=5)))
    (feature,) = features_of_tokens(classifier, tokens, -1).values()
    assert torch.allclose(classifier.score(feature), classifier(tokens).logits, atol=1e-5)


def test_layers():
    config = small_config()
    assert check_layers(config, None) == [0, 1, 2, 3] and check_layers(config, -1) == [3]
    assert check_layers(config, (2, -4)) == [2, 0]
    for layer in (4, -5):
        with pytest.raises(ValueError, match=f"no layer {layer}: this model has layers 0..3"):
            check_layers(config, [0, layer])


@pytest.fixture
def folder(model, palette, tmp_path):
    model.save_pretrained(tmp_path)
    ImageGPTImageProcessorPil(clusters=palette[:16], size=8).save_pretrained(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    return tmp_path


def test_pipeline_with_layer_and_pooling(folder, model):
    extract = pipeline("image-feature-extraction", str(folder))
    photo = str(folder / "photo.png")
    tokens = extract.image_processor(photo, return_tensors="pt")["input_ids"]
    # transformers' own result: the tokens as they are
    raw = model.transformer(tokens).last_hidden_state
    assert torch.allclose(extract(photo, return_tensors=True), raw, atol=1e-5)
    for layer in (0, 2, 3):
        expected = features_of_tokens(model, tokens, layer)[layer]
        assert torch.allclose(extract(photo, layer=layer, pool=True, return_tensors=True), expected, atol=1e-5)
    last = extract(photo, pool=True)
    assert np.shape(last) == (1, 32) and np.allclose(last, expected.numpy(), atol=1e-5)
    assert np.shape(extract(photo, layer=1)) == (1, 64, 32)
    images = [Image.open(photo), Image.new("L", (9, 9), 80), photo]
    singly, batched = (
        [extract(i, layer=1, pool=True) for i in images],
        extract(images, layer=1, pool=True, batch_size=3),
    )
    assert np.allclose(singly, batched, atol=1e-5)
    with pytest.raises(ValueError, match="no layer 7"):
        extract(photo, layer=7)
    at_start = pipeline("image-feature-extraction", str(folder), layer=2, pool=True)
    assert np.shape(at_start(photo)) == (1, 32)


def test_pipeline_of_other_models_is_unchanged(tmp_path):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    extract = pipeline(
        "image-feature-extraction",
        model=ViTModel(config),
        image_processor=ViTImageProcessorPil(size={"height": 16, "width": 16}),
    )
    assert np.shape(extract(Image.new("RGB", (20, 20)))) == (1, 2, 8)
    assert np.shape(extract(Image.new("RGB", (20, 20)), pool=True)) == (1, 8)
    with pytest.raises(ValueError, match="option of Image GPTs"):
        extract(Image.new("RGB", (20, 20)), layer=1)
