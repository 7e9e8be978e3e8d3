"""Features: against a naive loop over hidden states, OpenAI's classifier, and of many images."""

import weakref
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import randomized, small_config
from PIL import Image

from hf_igpt import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTForMaskedImageModeling,
    ImageGPTImageProcessorPil,
    ImageGPTModel,
)
from hf_igpt.evaluation.feature_files import read_features, write_features
from hf_igpt.features_imagegpt import attention_of_tokens, check_layers, extract, features_of_tokens, layers_around
from hf_igpt.modeling_imagegpt import draw_mask, shift_right
from hf_igpt.presets import MASK_PROBABILITY


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
        masks = {"bool_masked_pos": draw_mask(tokens.shape, torch.Generator().manual_seed(0))}
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
    with pytest.raises(ValueError, match=r"No layer is named: this model has layers 0\.\.3"):
        check_layers(config, [])


def test_layers_around_the_best():
    assert layers_around(5, 12, 5) == [3, 4, 5, 6, 7] and layers_around(5, 12, 4) == [3, 4, 5, 6]
    assert layers_around(0, 12, 5) == layers_around(1, 12, 5) == [0, 1, 2, 3, 4]
    assert layers_around(12, 12, 5) == layers_around(11, 12, 5) == [8, 9, 10, 11, 12]
    assert layers_around(7, 12, 1) == [7] and layers_around(1, 3, 4) == [0, 1, 2, 3]
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"Between 1 and 4 layers can be concatenated; found {count}"):
            layers_around(1, 3, count)


def test_no_layers_hidden_states_are_kept(model, tokens):
    """When the last norm is reached, of the earlier ones' outputs (B, N, D) only the means are left."""
    norms = [*(block.ln_1 for block in model.base_model.h), model.base_model.ln_f]
    outputs, alive = [], []
    for norm in norms[:-1]:
        norm.register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    norms[-1].register_forward_hook(lambda *_: alive.append(sum(output() is not None for output in outputs)))
    features = features_of_tokens(model, tokens)
    unpooled = features_of_tokens(model, tokens, pool=False)
    assert alive == [0, 3] and len(unpooled) == 4  # the second call shows that the first could have failed
    assert {feature.shape for feature in features.values()} == {(4, 32)}
    assert {feature.untyped_storage().nbytes() for feature in features.values()} == {4 * 32 * 4}


# -- of many images ----------------------------------------------------------------------------------------------------


@pytest.fixture
def masked():
    return randomized(ImageGPTForMaskedImageModeling(small_config(objective="masked")))


@pytest.fixture
def many():
    """(11, 64) random tokens: no batch size but 1 and 11 divides them."""
    return torch.randint(0, 16, (11, 64))


def assert_close(found, expected, atol=1e-5):
    assert list(found) == list(expected)
    for layer, feature in found.items():
        assert feature.dtype == torch.float32 and feature.shape == expected[layer].shape
        assert (feature - expected[layer]).abs().max() < atol


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_extracted_features_are_those_of_one_batch(batch_size, model, many):
    assert_close(extract(model, many, batch_size=batch_size), features_of_tokens(model, many))
    some = extract(model, many, [-1, 1], batch_size=batch_size)
    assert_close(some, features_of_tokens(model, many, [3, 1]))


def test_tokens_may_be_arrays_and_columns_of_datasets(model, many):
    expected = extract(model, many)
    for inputs in (many.numpy().astype(np.uint8), many.numpy().astype(np.uint16), many.tolist()):
        assert_close(extract(model, inputs), expected, atol=1e-9)
    rows = datasets.Dataset.from_dict({"input_ids": many.numpy().astype(np.uint8)})
    assert_close(extract(model, rows["input_ids"]), expected, atol=1e-9)
    assert_close(extract(model, rows.with_format("numpy")["input_ids"]), expected, atol=1e-9)


def test_features_of_images_are_those_of_their_tokens(model, palette):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)) for _ in range(5)]
    processor = ImageGPTImageProcessorPil(clusters=palette[:16], size=8)
    tokens = processor(images, return_tensors="pt")["input_ids"]
    assert_close(extract(model, images, processor=processor, batch_size=2), features_of_tokens(model, tokens))


def test_masks_come_from_their_seed_image_after_image(masked, many):
    plain = extract(masked, many)
    assert_close(plain, features_of_tokens(masked, many))
    hidden = extract(masked, many, mask_seed=3)
    mask = torch.from_numpy(np.random.default_rng(3).random((11, 64)) < MASK_PROBABILITY)
    assert_close(hidden, features_of_tokens(masked, many, bool_masked_pos=mask))
    for batch_size in (1, 4):
        assert_close(extract(masked, many, mask_seed=3, batch_size=batch_size), hidden)
    assert all(torch.equal(extract(masked, many, mask_seed=3)[layer], hidden[layer]) for layer in hidden)
    other = extract(masked, many, mask_seed=4)
    for layer, feature in hidden.items():
        assert (feature - plain[layer]).abs().max() > 1e-3 < (feature - other[layer]).abs().max()


def test_bfloat16_is_near(model, many):
    exact, near = extract(model, many), extract(model, many, bf16=True)
    assert_close(near, exact, atol=0.05)
    assert not torch.equal(near[2], exact[2])


def test_the_training_flag_is_left_as_it_was_and_dropout_is_off(many):
    model = randomized(ImageGPTForCausalImageModeling(small_config(resid_pdrop=0.5, embd_pdrop=0.5)))
    expected = extract(model, many)
    assert not model.training
    assert_close(extract(model.train(), many), expected, atol=1e-9)
    assert model.training and model.base_model.h[0].training
    with pytest.raises(ValueError, match=r"allowed are 0\.\.15"):
        extract(model, many + 16)
    assert model.training


def test_features_on_disk_are_the_extracted_ones(model, masked, many, tmp_path):
    for network, options in ((model, {}), (masked, {"mask_seed": 5})):
        path = tmp_path / "of" / f"{network.config.objective}.arrow"
        assert write_features(path, network, many, batch_size=4, **options) == path
        expected = extract(network, many, batch_size=4, **options)
        for layer, feature in expected.items():
            found = read_features(path, layer)
            assert found.dtype == np.float32 and np.array_equal(found, feature.numpy())
        table = datasets.Dataset.from_file(str(path)).with_format("numpy")
        assert table.column_names == ["layer_0", "layer_1", "layer_2", "layer_3"] and len(table) == 11
        assert np.array_equal(table["layer_2"][:], expected[2].numpy())
    assert {file.name for file in path.parent.iterdir()} == {"causal.arrow", "masked.arrow"}


def test_a_layer_that_was_not_written_is_refused(model, many, tmp_path):
    path = write_features(tmp_path / "some.arrow", model, many, [-1, 1])
    assert np.array_equal(read_features(path, 3), extract(model, many)[3].numpy())
    with pytest.raises(ValueError, match=r"some\.arrow holds layer_3, layer_1, not layer_0"):
        read_features(path, 0)


@pytest.mark.parametrize("before", [None, b"of an earlier run"])
def test_the_file_appears_whole_or_not_at_all(before, model, many, tmp_path):
    path = tmp_path / "features.arrow"
    if before:
        path.write_bytes(before)
    calls = []

    def fails_midway(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    model.base_model.register_forward_pre_hook(fails_midway)
    with pytest.raises(RuntimeError, match="out of memory"):
        write_features(path, model.train(), many, batch_size=4)
    assert len(calls) == 3 and model.training
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize(
    ("n_images", "options", "message"),
    [
        (0, {}, "No images: at least one is needed"),
        (2, {"mask_seed": 1}, "mask_seed is for masked models; this one is causal"),
        (2, {"batch_size": 0}, "batch_size is at least 1; found 0"),
        (2, {"batch_size": -1}, "batch_size is at least 1; found -1"),
        (2, {"layers": [4]}, "no layer 4"),
        (2, {"layers": []}, "No layer is named"),
    ],
)
def test_what_cannot_be_extracted_is_refused_before_a_forward_pass(
    n_images, options, message, model, many, tmp_path, monkeypatch
):
    monkeypatch.setattr(type(model.base_model), "forward", lambda *_, **__: pytest.fail("a forward pass"))
    with pytest.raises(ValueError, match=message):
        extract(model, many[:n_images], **options)
    with pytest.raises(ValueError, match=message):
        write_features(tmp_path / "new" / "features.arrow", model, many[:n_images], **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("photo.png", "one str"),
        (Path("photo.png"), "one PosixPath"),
        (Image.new("RGB", (8, 8)), "one Image"),
        (np.zeros((8, 8, 3), np.uint8), r"an array of shape \(8, 8, 3\)"),
        (b"bytes", "one bytes"),
    ],
)
def test_one_image_is_no_list_of_images(model, palette, inputs, message):
    processor = ImageGPTImageProcessorPil(clusters=palette[:16], size=8)
    with pytest.raises(ValueError, match=f"Features are of a list of images; found {message}"):
        extract(model, inputs, processor=processor)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            torch.zeros(64, dtype=torch.long),
            r"tokens \(n, 64\); pass `processor` with images; found an array of shape \(64,\)",
        ),
        (torch.zeros(2, 3, 64, dtype=torch.long), r"found an array of shape \(2, 3, 64\)"),
        ("photo.png", "pass `processor` with images; found one str"),
        (
            [[[1] * 64]],
            r"1 images of 64 tokens each were expected from number 0 on; found tokens of shape \(1, 1, 64\)",
        ),
        ([[1] * 63, [1] * 63], r"found tokens of shape \(2, 63\)"),
    ],
)
def test_what_are_no_tokens_is_refused(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        extract(model, inputs)


def test_nested_lists_of_images_are_refused(model, palette):
    processor = ImageGPTImageProcessorPil(clusters=palette[:16], size=8)
    images = [Image.new("RGB", (8, 8)) for _ in range(3)]
    with pytest.raises(ValueError, match="images"):
        extract(model, [images[:2], images[2:]], processor=processor)
    assert extract(model, np.zeros((3, 8, 8, 3), np.uint8), processor=processor)[0].shape == (3, 32)
    assert extract(model, images, processor=processor)[0].shape == (3, 32)


# -- what a pixel looks at ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_attention_is_eager_attentions(objective, implementation, tokens):
    kind = ImageGPTForMaskedImageModeling if objective == "masked" else ImageGPTForCausalImageModeling
    model = randomized(kind(small_config(objective=objective)))
    for pixel in (0, 1, 37, 63):
        model.set_attn_implementation("eager")
        if objective == "causal":
            whole = model.base_model(shift_right(tokens, 16), output_attentions=True).attentions
            expected = torch.stack([weights[:, :, pixel] for weights in whole], dim=1)  # SOS, then pixels 0..N-2
            expected = torch.nn.functional.pad(expected, (0, 1))
        else:
            hidden = (torch.arange(64) == pixel).expand(4, 64)
            whole = model.base_model(tokens, bool_masked_pos=hidden, output_attentions=True).attentions
            expected = torch.nn.functional.pad(torch.stack([weights[:, :, pixel] for weights in whole], dim=1), (1, 0))
        model.set_attn_implementation(implementation)
        before = model(labels=tokens).logits if objective == "causal" else model(input_ids=tokens).logits
        found = attention_of_tokens(model, tokens, pixel)
        assert found.shape == (4, 3, 2, 65)
        assert (found - expected).abs().max() < 1e-5
        assert torch.allclose(found.sum(dim=-1), torch.ones(4, 3, 2))
        assert objective == "masked" or not found[..., pixel + 1 :].any()  # neither the pixel itself nor later ones
        assert (found[..., 0] > 0).all() == (objective == "causal")
        after = model(labels=tokens).logits if objective == "causal" else model(input_ids=tokens).logits
        assert torch.equal(before, after) and model.config._attn_implementation == implementation


def test_attention_leaves_no_trace_after_errors(model, tokens, monkeypatch):
    model.train()
    monkeypatch.setattr(model.base_model.h[1].mlp, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention_of_tokens(model, tokens, 5)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.training and model.config._attn_implementation == "sdpa"


def test_attention_of_what_is_no_pixel(model, tokens, monkeypatch):
    monkeypatch.setattr(model.base_model, "forward", None)  # before any work
    for pixel in (-1, 64, 3.0, None):
        with pytest.raises(ValueError, match=r"a number in 0\.\.63, in raster order"):
            attention_of_tokens(model, tokens, pixel)
    with pytest.raises(ValueError, match=r"shape \(B, 64\)"):
        attention_of_tokens(model, tokens[:, :9], 0)
    with pytest.raises(ValueError, match="tokens"):
        attention_of_tokens(model, tokens + 16, 0)
