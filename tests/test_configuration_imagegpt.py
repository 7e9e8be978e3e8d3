"""Configuration: the paper's parameter counts, transformers' defaults, refusals."""

import json
import math

import pytest
import torch
import transformers.models.imagegpt.configuration_imagegpt as theirs
from transformers import GPT2Config

from hf_igpt import ImageGPTConfig, ImageGPTForCausalImageModeling


@pytest.mark.parametrize(
    ("size", "image_size", "count"),
    [
        ("s", 32, 76_571_648),
        ("m", 32, 455_157_760),
        ("l", 32, 1_362_250_752),
        ("xl", 32, 6_801_438_720),
        ("l", 48, 1_364_216_832),
        ("xl", 64, 6_810_875_904),
    ],
)
def test_parameter_counts_of_the_official_code(size, image_size, count):
    with torch.device("meta"):
        model = ImageGPTForCausalImageModeling(ImageGPTConfig.from_preset(size, image_size=image_size))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_xs_has_the_size_of_the_run_to_beat():
    with torch.device("meta"):
        model = ImageGPTForCausalImageModeling(ImageGPTConfig.from_preset("xs"))
    assert (model.config.n_layer, model.config.n_embd, model.config.n_head) == (12, 256, 8)
    assert 9.5e6 < model.num_parameters() < 10.5e6


def test_defaults_are_transformers():
    ours, upstream = ImageGPTConfig().to_dict(), theirs.ImageGPTConfig().to_dict()
    assert {key: ours[key] for key in upstream} == upstream


def test_presets_are_the_papers(tmp_path):
    config = ImageGPTConfig.from_preset("s", n_layer=2)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions, config.vocab_size) == (
        2,
        512,
        8,
        1024,
        513,
    )
    assert not config.use_bias and config.resid_pdrop == config.attn_pdrop == config.embd_pdrop == 0
    assert config.bos_token_id == config.sos_token_id == 512
    config.save_pretrained(tmp_path)
    assert ImageGPTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 30, "n_head": 4}, "not a multiple"),
        ({"vocab_size": 1}, "vocab_size"),
        ({"initialization": "xavier"}, "initialization"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"tie_word_embeddings": True}, "untied"),
        ({"generative_loss_weight": -1}, "at least 0"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        ImageGPTConfig(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("n_layer", value) for value in (0, -1, 10**6, "4", 4.0, True, None)),
        *((name, value) for name in ("n_embd", "n_head", "n_positions", "hidden_size") for value in (0, -8, 10**9)),
        *(("vocab_size", value) for value in (1, 10**9)),
        *(("n_inner", value) for value in (0, 10**9)),
        *(("num_labels", value) for value in (0, -1, 10**9, "3", True)),
        *(("id2label", value) for value in ({}, {"a": "b"}, {"0": "a", "5": "b"}, ["a"])),
        *(("layer_norm_epsilon", value) for value in (math.nan, -1e-5, "1e-5", True)),
        *(("resid_pdrop", value) for value in (math.nan, -0.1, 2, False)),
        *(("initializer_range", value) for value in (math.nan, math.inf, -1.0)),
        *(("generative_loss_weight", value) for value in (math.nan, math.inf, "1")),
        *(("activation_function", value) for value in ("nope", 3, None)),
        *(("objective", value) for value in ("bert", 3)),
        *(("use_bias", value) for value in ("yes", 1, None)),
        *(("bos_token_id", value) for value in ("1", True, 2.0)),
        *(("eos_token_id", value) for value in ("1", ["1"])),
        *(("problem_type", "guess"), ("dtype", "float99"), ("dtype", 32), ("architectures", "x"), ("label2id", 3)),
        *(("sliding_window", 4), ("layer_types", ["sliding_attention"]), ("is_encoder_decoder", True)),
        *(("is_causal", False), ("to_dict", "x"), ("sos_token_id", 3), ("attribute_map", {})),
    ],
)
def test_absurd_fields_are_named_at_once(field, value, tmp_path):
    with pytest.raises(ValueError, match=rf"^{field} "):
        ImageGPTConfig(**{field: value})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "imagegpt", field: value}))
    for loader in (ImageGPTConfig, ImageGPTForCausalImageModeling):
        with pytest.raises(ValueError, match=rf"configuration of {tmp_path}: {field} "):
            loader.from_pretrained(tmp_path)


def test_limits_on_what_fields_make_together():
    with pytest.raises(ValueError, match=r"n_layer \(4096\), n_embd \(65536\).* at most 1,000,000,000,000"):
        ImageGPTConfig(n_layer=4096, n_embd=65536)
    with pytest.raises(ValueError, match="not a multiple"):
        ImageGPTConfig(hidden_size=12)
    with pytest.raises(ValueError, match="is_causal is False if objective is 'masked'; found True"):
        ImageGPTConfig(objective="masked", is_causal=True)


@pytest.mark.parametrize(
    "fields", [{"n_layer": 10**6}, {"hidden_size": 12}, {"num_labels": 10**9}, {"objective": "bert"}]
)
def test_fields_given_on_loading_are_checked_too(fields, tmp_path):
    ImageGPTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)):
        ImageGPTConfig.from_pretrained(tmp_path, **fields)
    found = ImageGPTConfig.from_pretrained(tmp_path, hidden_size=64, num_labels=7, dtype="auto", resid_pdrop=0)
    assert (found.n_embd, found.num_labels, found.resid_pdrop) == (64, 7, 0) and found.n_layer == 24


def test_large_but_sane_configurations():
    ImageGPTConfig(n_layer=96, n_embd=12288, n_head=96, n_positions=512 * 512, vocab_size=65536, num_labels=21841)
    ImageGPTConfig(n_layer=1000)
    ImageGPTConfig(n_embd=1, n_head=1, n_layer=1, n_inner=1, n_positions=1, vocab_size=2, num_labels=1, resid_pdrop=1)


def test_what_is_no_object_is_no_configuration(tmp_path):
    for text in ("[]", "3", "null", "[" * 5000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=str(tmp_path)):
            ImageGPTConfig.from_pretrained(tmp_path)


def test_presets_of_images_that_are_not_square():
    assert ImageGPTConfig.from_preset("s", image_size=(32, 16)).n_positions == 512
    assert ImageGPTConfig.from_preset("s", image_size=16) == ImageGPTConfig.from_preset("s", image_size=[16, 16])
    for wrong in (0, (32,), (1, 2, 3), (-4, -4), (8, 0.5), "32x16"):
        with pytest.raises(ValueError, match="image_size is a number of pixels, or"):
            ImageGPTConfig.from_preset("s", image_size=wrong)


def test_unknown_preset():
    with pytest.raises(ValueError, match="tiny, xs, s, m, l, xl"):
        ImageGPTConfig.from_preset("huge")


def test_other_model_types_are_refused(tmp_path):
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    for loader in (ImageGPTConfig, ImageGPTForCausalImageModeling):
        with pytest.raises(ValueError, match="type gpt2, not an Image GPT"):
            loader.from_pretrained(tmp_path)
