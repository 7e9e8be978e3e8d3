"""Configuration: the paper's parameter counts, transformers' defaults, refusals."""

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


def test_unknown_preset():
    with pytest.raises(ValueError, match="tiny, xs, s, m, l, xl"):
        ImageGPTConfig.from_preset("huge")


def test_other_model_types_are_refused(tmp_path):
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    for loader in (ImageGPTConfig, ImageGPTForCausalImageModeling):
        with pytest.raises(ValueError, match="type gpt2, not an Image GPT"):
            loader.from_pretrained(tmp_path)
