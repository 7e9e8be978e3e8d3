"""Classes: the token in SOS's place, guidance, drawing by class, and what classes say of an image."""

import itertools
import json

import pytest
import torch
from conftest import randomized, small_config
from transformers import ImageGPTConfig as TheirConfig
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from hf_igpt import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTImageProcessorPil,
)
from hf_igpt.features_imagegpt import features_of_tokens
from hf_igpt.generation_imagegpt import complete, inpaint_tokens, sample
from hf_igpt.publishing.conversion import to_openai


NAMES = {0: "cat", 1: "dog", 2: "7"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = small_config(n_class_tokens=3, id2label=NAMES)
    return randomized(ImageGPTForCausalImageModeling(config)).eval()


@pytest.fixture
def processor(palette):
    return ImageGPTImageProcessorPil(clusters=palette[:16], size=8)


def test_a_class_stands_in_the_place_of_sos(model, tokens):
    classes = torch.tensor([2, -1, 0, 1][: len(tokens)])
    found = model(labels=tokens, class_labels=classes)
    inputs = torch.nn.functional.pad(tokens[:, :-1], (1, 0))
    inputs[:, 0] = 17 + classes
    assert torch.equal(found.logits, model(input_ids=inputs).logits)
    inputs[:, 0] = 16
    assert torch.equal(found.logits, model(input_ids=inputs, class_labels=classes).logits)
    none = model(labels=tokens, class_labels=torch.full_like(classes, -1))
    assert torch.equal(none.logits, model(labels=tokens).logits)
    assert not torch.allclose(found.logits[0], none.logits[0])
    assert torch.equal(found.logits[1], none.logits[1])


def test_the_loss_trains_the_class_that_is_named(model, tokens):
    model(labels=tokens[:2], class_labels=torch.tensor([2, -1])).loss.backward()
    changed = model.transformer.wte.weight.grad[16:].abs().sum(dim=1) > 0
    assert changed.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([3], "hold 3; this model has 3 classes"),
        ([-2], "hold -2"),
        ([0.5], "are integers"),
        ([0, 1], "one for each of 1 images"),
    ],
)
def test_labels_of_other_classes(model, tokens, classes, message):
    with pytest.raises(ValueError, match=message):
        model(labels=tokens[:1], class_labels=torch.tensor(classes))
    with pytest.raises(ValueError, match="do not hold"):
        model(input_ids=tokens[:1], class_labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="pass `input_ids`"):
        model(inputs_embeds=torch.zeros(1, 1, 32), class_labels=torch.tensor([0]))


def test_models_without_classes(tokens, processor):
    plain = ImageGPTForCausalImageModeling(small_config())
    with pytest.raises(ValueError, match="knows no classes"):
        plain(labels=tokens, class_labels=torch.zeros(len(tokens), dtype=torch.long))
    for call in (
        lambda: sample(plain, processor, 1, classes="cat"),
        lambda: sample(plain, processor, 1, classes=0),
        lambda: complete(plain, processor, tokens=tokens, classes=[0]),
        lambda: plain.generate(class_labels=[0]),
    ):
        with pytest.raises(ValueError, match="knows no classes"):
            call()
    with pytest.raises(ValueError, match="guidance is for images of classes"):
        sample(plain, processor, 1, guidance=2)
    with pytest.raises(ValueError, match="guidance_scale strengthens a class"):
        plain.generate(guidance_scale=2.0)
    with pytest.raises(ValueError, match="n_class_tokens is for causal models"):
        small_config(n_class_tokens=2, objective="masked")


def test_unknown_classes_and_guidance(model, processor):
    for wrong in ("bird", 3, -1, "-1", ["cat", "bird"]):
        with pytest.raises(ValueError, match="There is no class .*cat, dog, 7"):
            sample(model, processor, 1, classes=wrong)
    with pytest.raises(ValueError, match="No class is named"):
        sample(model, processor, 1, classes=[])
    for wrong in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="guidance is at least 1"):
            sample(model, processor, 1, classes="cat", guidance=wrong)
    with pytest.raises(ValueError, match="guidance is for images of classes"):
        sample(model, processor, 1, guidance=2)
    with pytest.raises(ValueError, match="guidance_scale strengthens a class"):
        model.generate(class_labels=[-1], guidance_scale=2.0)
    for options in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="for sampling and greedy search"):
            model.generate(class_labels=[0], guidance_scale=2.0, do_sample=False, **options)


def test_names_come_before_numbers(model, processor):
    drawn = [sample(model, processor, 2, classes=each, return_tokens=True) for each in ("7", 2, "2", "dog", 1)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2]) and torch.equal(drawn[3], drawn[4])
    assert not torch.equal(drawn[0], drawn[3])


def greedy(model, starts, scale, n_pixels=64):
    """Images (B, N) of the likeliest colours under guidance, by two forward passes without a cache for each pixel."""
    rows = starts[:, None]
    for _ in range(n_pixels):
        given = model(input_ids=rows).logits[:, -1]
        none = model(input_ids=torch.cat([torch.full_like(rows[:, :1], 16), rows[:, 1:]], dim=1)).logits[:, -1]
        rows = torch.cat([rows, (none + scale * (given - none)).argmax(dim=-1, keepdim=True)], dim=1)
    return rows[:, 1:]


@pytest.mark.parametrize("cache", [None, "static", "none"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_guidance_is_that_of_two_streams(model, cache, scale):
    classes = torch.tensor([0, 2, 1])
    options = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    found = model.generate(class_labels=classes, guidance_scale=scale, do_sample=False, **options)
    assert found[:, 0].tolist() == [17, 19, 18]
    assert torch.equal(found[:, 1:], greedy(model, 17 + classes, scale))


@torch.no_grad()
def test_guidance_with_prompts_of_different_lengths(model, tokens):
    prompts = torch.full((2, 6), 0)
    prompts[0], prompts[1, 2:] = torch.tensor([16, *tokens[0, :5]]), torch.tensor([16, *tokens[1, :3]])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    options = {"guidance_scale": 3.0, "do_sample": False, "max_new_tokens": 20}
    found = model.generate(prompts, attention_mask=mask, class_labels=[1, 2], **options)
    alone = model.generate(prompts[1:, 2:], class_labels=[2], **options)
    assert torch.equal(found[1, 2:], alone[0])
    both = model.generate(prompts[1:, 2:], class_labels=[2], num_return_sequences=2, **options | {"do_sample": True})
    assert both.shape == (2, 24)


def test_guidance_that_a_checkpoint_asks_for(model, tmp_path):
    model.generation_config.guidance_scale = 3.0
    model.save_pretrained(tmp_path)
    model = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    found = model.generate(class_labels=[0], do_sample=False)
    assert torch.equal(found[:, 1:], greedy(model, torch.tensor([17]), 3.0))


@torch.no_grad()
def test_guidance_before_other_processors(model):
    penalized = model.generate(class_labels=[1], guidance_scale=2.0, do_sample=False, repetition_penalty=1.5)
    rows = torch.tensor([[18]])
    penalty = RepetitionPenaltyLogitsProcessor(1.5)
    for _ in range(64):
        given = model(input_ids=rows).logits[:, -1]
        none = model(input_ids=rows.clamp(max=16)).logits[:, -1]
        scores = torch.nn.functional.pad(2 * given - none, (0, 4), value=-torch.inf)
        rows = torch.cat([rows, LogitsProcessorList([penalty])(rows, scores).argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(penalized, rows)


def test_images_of_several_classes(model, processor):
    drawn = sample(model, processor, 2, classes=["dog", "cat"], batch_size=3, progress=False)
    assert len(drawn) == 4
    state = torch.random.get_rng_state()
    options = {"seed": 5, "return_tokens": True, "progress": False}
    guided = [sample(model, processor, 3, classes="cat", guidance=scale, **options) for scale in (1, 4, 4)]
    assert torch.equal(guided[1], guided[2]) and not torch.equal(guided[0], guided[1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_completions_of_a_class(model, processor, tokens):
    tokens = tokens[:2]
    options = {"rows": 4, "seed": 1, "return_tokens": True, "progress": False}
    of_each = complete(model, processor, tokens=tokens, classes=["dog", "cat"], num_completions=2, **options)
    assert torch.equal(of_each[:, :, :32], tokens[:, None, :32].expand(-1, 2, -1))
    hidden = torch.arange(64).expand(2, -1) >= 32
    filled, _ = inpaint_tokens(model, tokens, hidden, 2, classes=["dog", "cat"], seed=1, progress=False)
    assert torch.equal(filled, of_each)
    one = complete(model, processor, tokens=tokens, classes="dog", num_completions=2, **options)
    assert torch.equal(one, complete(model, processor, tokens=tokens, classes=[1, 1], num_completions=2, **options))
    with pytest.raises(ValueError, match="one for each image; found 3 for 2"):
        complete(model, processor, tokens=tokens, classes=[0, 1, 2], **options)
    assert complete(model, processor, tokens=tokens, classes=0, guidance=2, **options).shape == (2, 1, 64)


def test_holes_of_a_class_are_drawn_by_its_posterior():
    torch.manual_seed(1)
    config = small_config(vocab_size=4, n_positions=6, n_class_tokens=2)
    model = randomized(ImageGPTForCausalImageModeling(config)).eval()
    rows = torch.tensor(list(itertools.product(range(3), repeat=6)))
    hidden = torch.tensor([[False, True, True, False, True, False]])
    given = torch.tensor([[1, 0, 0, 2, 0, 1]])
    fits = ((rows == given) | hidden).all(dim=1)
    with torch.no_grad():
        logits = model(labels=rows, class_labels=torch.ones(len(rows), dtype=torch.long)).logits
    chances = logits.log_softmax(-1).gather(-1, rows[..., None]).sum(dim=(1, 2))
    expected = chances.masked_fill(~fits, -torch.inf).softmax(0)
    drawn, evidence = inpaint_tokens(model, given, hidden, 400, classes=1, particles=64, batch_size=6400, progress=False)
    counts = torch.tensor([(drawn[0] == row).all(dim=1).sum() for row in rows]) / 400
    assert (counts - expected).abs().sum() / 2 < 0.08
    assert abs(evidence[0] * 3 - chances[fits].logsumexp(0)) < 0.05


def test_features_and_classifiers_use_no_class(model, tokens, tmp_path):
    plain = ImageGPTForCausalImageModeling(small_config()).eval()
    state = model.state_dict()
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:17]
    plain.load_state_dict(state)
    assert torch.equal(plain(labels=tokens).logits, model(labels=tokens).logits)
    for layer, feature in features_of_tokens(model, tokens).items():
        assert torch.equal(feature, features_of_tokens(plain, tokens)[layer])
    model.save_pretrained(tmp_path)
    classifier = ImageGPTForImageClassification.from_pretrained(tmp_path)
    assert classifier.config.num_labels == 3 and classifier(tokens).logits.shape == (len(tokens), 3)


def test_plain_transformers_refuse_and_sizes_are_kept(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["n_class_tokens"] == 3
    with pytest.raises(Exception, match="hf_igpt"):
        TheirConfig.from_pretrained(tmp_path)
    again = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    assert again.config.id2label == NAMES and again.transformer.wte.num_embeddings == 20
    assert ImageGPTConfig.from_preset("xs", n_class_tokens=7).num_labels == 7
    assert again.resize_token_embeddings(17).num_embeddings == 20
    with pytest.raises(ValueError, match="cannot be resized"):
        again.transformer.resize_token_embeddings(30)
    with pytest.raises(ValueError, match="knows no classes; this one has 3"):
        to_openai(again.config, again.state_dict())
    with pytest.raises(ValueError, match="n_class_tokens is an integer"):
        ImageGPTConfig(n_class_tokens=-1)
