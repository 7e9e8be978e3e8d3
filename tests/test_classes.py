"""Classes: the token in SOS's place, guidance, drawing by class, and what classes say of an image."""

import csv
import itertools
import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from conftest import randomized, small_config
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    Trainer,
    TrainingArguments,
)
from transformers import ImageGPTConfig as TheirConfig

from hf_igpt import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTImageProcessorPil,
)
from hf_igpt.commands.arguments import SampleArguments, ScoreArguments
from hf_igpt.commands.finetune import finetune
from hf_igpt.commands.pretrain import pretrain
from hf_igpt.commands.publish import describe_loading
from hf_igpt.commands.sample import draw
from hf_igpt.commands.score import score
from hf_igpt.data import (
    DataArguments,
    ImageTokens,
    collate_tokens,
    digits,
    label_classes,
    load_images,
    read_image,
    stream_tokens,
    tokenize,
)
from hf_igpt.evaluation.held_out import find_split
from hf_igpt.evaluation.metrics import measure_class_likelihoods, measure_surprise
from hf_igpt.evaluation.records import describe_model
from hf_igpt.features_imagegpt import features_of_tokens
from hf_igpt.generation_imagegpt import complete, inpaint, inpaint_tokens, sample
from hf_igpt.inputs_imagegpt import find_classes
from hf_igpt.pipelines_imagegpt import ImageCompletionPipeline
from hf_igpt.publishing.conversion import to_openai
from hf_igpt.reporting.reports import is_generation
from hf_igpt.training.arguments import FinetuningArguments, ModelArguments, PretrainingArguments


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
        ([True], "are integers"),
        ([0, 1], "one for each of 1 images"),
    ],
)
def test_labels_of_other_classes(model, tokens, classes, message):
    with pytest.raises(ValueError, match=message):
        model(labels=tokens[:1], class_labels=torch.tensor(classes))
    with pytest.raises(ValueError, match="do not begin"):
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
    for wrong in ("bird", 3, -1, "-1", "2", ["cat", "bird"]):
        with pytest.raises(ValueError, match="There is no class .*cat, dog, 7"):
            sample(model, processor, 1, classes=wrong)
    with pytest.raises(ValueError, match="No class is named"):
        sample(model, processor, 1, classes=[])
    for wrong in (0.5, float("nan"), float("inf"), "2", None):
        with pytest.raises(ValueError, match="guidance is a number of at least 1"):
            sample(model, processor, 1, classes="cat", guidance=wrong)
    with pytest.raises(ValueError, match="guidance is for images of classes"):
        sample(model, processor, 1, guidance=2)
    with pytest.raises(ValueError, match="guidance_scale strengthens a class"):
        model.generate(class_labels=[-1], guidance_scale=2.0)
    for options in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="for sampling and greedy search"):
            model.generate(class_labels=[0], guidance_scale=2.0, do_sample=False, **options)


def test_arguments_of_other_types(model, processor, tokens):
    photo = Image.new("RGB", (8, 8))
    for call, message in (
        (lambda: sample(model, processor, "4"), "num_images is at least 1, a whole number; found '4'"),
        (lambda: sample(processor, model, 4), "The first argument is a model.*found ImageGPTImageProcessorPil"),
        (lambda: sample("outputs/pretrain", processor, 4), "loaded by `from_pretrained`; found str"),
        (lambda: inpaint(model, processor, photo, (0, 0, 1, 0.5), particles=[1, 4]), "particles is at least 1"),
        (lambda: inpaint(model, processor, photo, None), "A mask is a picture, an array or a box"),
        (lambda: complete(model, processor, photo, rows="4"), "found '4'"),
        (lambda: complete(model, processor), "one of them, and not both"),
        (lambda: complete(model, processor, photo, num_completions=2.0), "num_completions is at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_classes_are_found_by_name_and_number(model, processor):
    drawn = [sample(model, processor, 2, classes=each, return_tokens=True) for each in ("7", 2, np.int64(2), "dog", 1)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2]) and torch.equal(drawn[3], drawn[4])
    assert not torch.equal(drawn[0], drawn[3])
    config = small_config(n_class_tokens=3, id2label={0: "1", 1: "5", 2: "7"})
    assert find_classes(config, ["7", 0, torch.tensor(1)]) == [2, 0, 1]
    unnamed = small_config(n_class_tokens=3, num_labels=2)
    assert find_classes(unnamed, "2") == find_classes(small_config(n_class_tokens=3), "2") == [2]
    for wrong in ("0", "2", "1.0", 0.9, 1.0, True, None, "१", [0, None], 3):  # "0" and "2" are no names here
        with pytest.raises(ValueError, match="There is no class"):
            find_classes(config, wrong)


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
def test_guidance_by_another_prompt_is_transformers_own(model, tokens):
    prompt, other = (torch.tensor([[16, *row[:4]]]) for row in tokens[:2])
    found = model.generate(prompt, negative_prompt_ids=other, guidance_scale=2.0, do_sample=False, max_new_tokens=1)
    given, none = (model(input_ids=ids).logits[:, -1].log_softmax(-1) for ids in (prompt, other))
    assert found[0, -1] == (2 * given - none).argmax()


def test_where_guidance_is_asked_for(model):
    """An argument comes before a configuration; a checkpoint's own default is for images of classes alone."""
    options = {"do_sample": False}
    plain, none = model.generate(class_labels=[0], **options), model.generate(**options)
    asked = GenerationConfig(guidance_scale=3.0, do_sample=False)
    guided = model.generate(class_labels=[0], generation_config=asked)
    assert torch.equal(guided[:, 1:], greedy(model, torch.tensor([17]), 3.0)) and asked.guidance_scale == 3.0
    assert torch.equal(model.generate(class_labels=[0], generation_config=asked, guidance_scale=None), plain)
    with pytest.raises(ValueError, match="guidance_scale strengthens a class"):
        model.generate(generation_config=asked)
    model.generation_config.guidance_scale = 3.0
    assert torch.equal(model.generate(class_labels=[0], **options), guided)
    assert torch.equal(model.generate(class_labels=[0], guidance_scale=None, **options), plain)
    assert torch.equal(model.generate(**options), none)
    assert torch.equal(model.generate(generation_config=GenerationConfig(do_sample=False)), none)


@torch.no_grad()
def test_classes_stand_at_the_beginning_alone(model, tokens):
    class_labels = torch.tensor([1])
    for wrong in ([[1, 2, 16, 3]], [[16, 16, 1, 2]]):
        with pytest.raises(ValueError, match="with which `input_ids` do not begin, or which they hold several times"):
            model(input_ids=torch.tensor(wrong), class_labels=class_labels)
    padded, mask = torch.tensor([[16, 16, 16, 1]]), torch.tensor([[0, 0, 1, 1]])
    expected = model(input_ids=torch.tensor([[16, 16, 18, 1]]), attention_mask=mask).logits
    assert torch.equal(model(input_ids=padded, attention_mask=mask, class_labels=class_labels).logits, expected)
    for labels in ([1], ["dog"], np.array([1]), torch.tensor([1], dtype=torch.uint8)):
        assert torch.equal(
            model(labels=tokens[:1], class_labels=labels).loss, model(labels=tokens[:1], class_labels=class_labels).loss
        )


def test_a_plain_trainer_knows_what_is_a_target(model, tokens, tmp_path):
    rows = [{"labels": row, "class_labels": torch.tensor(number)} for number, row in enumerate(tokens[:3])]
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **options), eval_dataset=rows)
    assert trainer.label_names == ["labels"]
    told = model(labels=tokens[:3], class_labels=torch.arange(3)).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(told, rel=1e-5)


def test_pipelines_draw_one_class(model, processor):
    complete_image = ImageCompletionPipeline(model=model, image_processor=processor)
    photos = [Image.fromarray(np.full((8, 8), 80 * number, np.uint8)) for number in range(3)]
    drawn = complete_image(photos, classes="dog", guidance=2.0, rows=2, seed=1, batch_size=3)
    expected = complete(model, processor, photos, 2, classes="dog", guidance=2.0, seed=1)
    assert [np.array(row[0]).tolist() for row in drawn] == [np.array(row[0]).tolist() for row in expected]
    with pytest.raises(ValueError, match="A pipeline draws one class"):
        complete_image(photos, classes=["cat", "dog", "cat"])
    with pytest.raises(ValueError, match="class_labels, guidance_scale: images are drawn as a whole"):
        complete(model, processor, photos, 2, class_labels=[0], guidance_scale=2.0)


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
    drawn, evidence = inpaint_tokens(
        model, given, hidden, 400, classes=1, particles=64, batch_size=6400, progress=False
    )
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
    assert "transformers alone:      refuses" in describe_loading(model.config, "me/cats")
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


# -- data and training -------------------------------------------------------------------------------------------------


SMALL = "n_layer=2,n_embd=32,n_head=2"


def run(folder, model=None, images=None, **options):
    """A small run on the digits; returns its records."""
    defaults = {"use_cpu": True, "disable_tqdm": True, "max_steps": 6, "num_samples": 0, "logging_steps": 1, "seed": 1}
    defaults |= {"eval_strategy": "no", "save_strategy": "no", "class_conditional": True}
    arguments = PretrainingArguments(output_dir=str(folder), **(defaults | options))
    model = {"config_overrides": SMALL} if model is None else model
    return pretrain(ModelArguments(**model), DataArguments(**({"max_eval_samples": 60} | (images or {}))), arguments)


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_rows_name_classes_and_some_do_not(processor):
    dataset = tokenize(digits().select(range(200)), processor)
    rows = ImageTokens(dataset, processor, class_dropout=0.25, seed=3)
    first, again = [row["class_labels"] for row in rows], [row["class_labels"] for row in rows]
    assert first == again and 30 < first.count(-1) < 70
    assert all(label in (-1, true) for label, true in zip(first, dataset["label"], strict=True))
    rows.begin_epoch(1)
    assert [row["class_labels"] for row in rows] != first
    batch = collate_tokens([rows[0], rows[1]])
    assert batch["class_labels"].dtype == torch.int64 and batch["class_labels"].shape == (2,)
    assert ImageTokens(dataset, processor, class_dropout=1.0)[5]["class_labels"] == -1
    assert ImageTokens(dataset, processor, class_dropout=0.0)[5]["class_labels"] == dataset["label"][5]
    assert "class_labels" not in ImageTokens(dataset, processor)[0]


def test_classes_of_named_and_missing_labels():
    def images(labels, feature):
        features = datasets.Features({"image": datasets.Value("string"), "label": feature})
        return datasets.Dataset.from_dict({"image": ["x"] * len(labels), "label": labels}, features=features)

    train = images(["b", "a", None], datasets.Value("string"))
    found = label_classes({"train": train, "validation": images(["a"], datasets.Value("string"))}, "pets")
    assert found["train"].features["label"].names == ["a", "b"]
    assert list(found["train"]["label"]) == [1, 0, -1] and list(found["validation"]["label"]) == [0]
    numbers = images([0, 1, -1, 1], datasets.Value("int64"))
    found = label_classes({"train": numbers}, "pets")["train"]
    assert found.features["label"].names == ["0", "1"] and list(found["label"]) == [0, 1, -1, 1]
    named = datasets.ClassLabel(names=["a", "b"])
    found = label_classes({"train": images([1, None, -1], named), "validation": train.remove_columns("label")}, "pets")
    assert list(found["train"]["label"]) == [1, -1, -1] and list(found["validation"]["label"]) == [-1] * 3
    with pytest.raises(ValueError, match="pets have no labels"):
        label_classes({"train": train.remove_columns("label")}, "pets")
    with pytest.raises(ValueError, match="a class 'c' that the training images do not have"):
        label_classes({"train": train, "validation": images(["c"], datasets.Value("string"))}, "pets")
    stream = images(["b"], datasets.Value("string")).to_iterable_dataset()
    with pytest.raises(ValueError, match="labels of a stream are of the type ClassLabel"):
        label_classes({"train": stream}, "pets")


def test_streams_name_classes(processor, tmp_path):
    file = tmp_path / "train.parquet"
    digits().select(range(60)).to_parquet(file)
    arguments = DataArguments(train_dir=str(file), streaming=True, max_eval_samples=10)
    train = load_images(arguments)["train"]
    told = [row["class_labels"] for row in stream_tokens(train, processor, arguments, class_dropout=0.0)]
    assert told == list(digits()["label"])[10:60]
    dropped = [row["class_labels"] for row in stream_tokens(train, processor, arguments, class_dropout=0.5)]
    assert 10 < dropped.count(-1) < 40 and all(a in (-1, b) for a, b in zip(dropped, told, strict=True))
    images = {"train_dir": str(file), "streaming": True, "max_eval_samples": 10, "image_size": 8}
    records = run(tmp_path / "run", {"config_overrides": SMALL, "num_colors": 16}, images)
    assert records[0].told_classes == 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that was told of the digits' classes, until it has learnt something of them."""
    folder = tmp_path_factory.mktemp("runs") / "told"
    records = run(folder, max_steps=150, learning_rate=5e-3, per_device_train_batch_size=32, num_samples=4)
    return folder, records


def test_a_run_with_classes(trained, tmp_path, capsys):
    folder, records = trained
    model = ImageGPTForCausalImageModeling.from_pretrained(folder)
    assert model.config.n_class_tokens == 10 and model.config.id2label == {n: str(n) for n in range(10)}
    by_class = records[0].details["nats per pixel by class"]
    assert set(by_class) <= set("0123456789") and records[0].told_classes == 10
    assert describe_model(records[0]).endswith("told the class")
    assert all(record.told_classes is None for record in records[1:])
    assert json.loads((folder / "run.json").read_text())["recipe"]["classes"] == (
        "10; for 10 % of the images the class was left out"
    )

    # The records' figures, computed again; and a model that is told the class is less surprised than one that is not.
    held_out = load_images(DataArguments(max_eval_samples=60), seed=1)["validation"]
    processor = ImageGPTImageProcessorPil.from_pretrained(folder)
    tokens = torch.tensor(processor([read_image(cell) for cell in held_out["image"]])["input_ids"])
    labels = torch.tensor(held_out["label"])
    told, untold = (measure_surprise(model, tokens, each, progress=False).mean(dim=1) for each in (labels, None))
    assert told.mean().item() == pytest.approx(records[0].value, rel=1e-5) and told.mean() < untold.mean()
    for name, nats in by_class.items():
        assert told[labels == int(name)].mean().item() == pytest.approx(nats, rel=1e-5)

    # Bayes: C forward passes, a softmax over the classes.
    chances = measure_class_likelihoods(model, tokens, progress=False)
    for number in (0, 7):
        surprise = measure_surprise(model, tokens, torch.full((60,), number), progress=False)
        assert torch.allclose(chances[:, number], -surprise.double().sum(dim=1), atol=1e-9)
    posterior = chances.softmax(dim=1)
    assert torch.allclose(posterior.sum(dim=1), torch.ones(60, dtype=torch.float64))
    right = (posterior.argmax(dim=1) == labels).double().mean().item()
    assert right > 0.3

    args = ScoreArguments(str(folder), num_held_out=60, by_class=True, output_dir=str(tmp_path))
    found = score(args, DataArguments(max_eval_samples=60))
    accuracy = next(record for record in found if record.metric == "accuracy")
    assert accuracy.value == pytest.approx(right) and accuracy.n == 60 and accuracy.probe == "class likelihoods"
    rows = list(csv.reader((tmp_path / "classes.csv").open()))
    assert rows[0] == ["image", "set", "class", "likeliest", *"0123456789"] and len(rows) == 61
    assert [int(row[2]) for row in rows[1:]] == labels.tolist()
    assert np.allclose(np.array([row[4:] for row in rows[1:]], dtype=float), posterior, atol=1e-5)
    assert (tmp_path / "confusion.png").is_file() and "under its own class, n = 60" in capsys.readouterr().out

    score(ScoreArguments(str(folder), num_held_out=2, output_dir=str(tmp_path)), DataArguments(max_eval_samples=60))
    assert not (tmp_path / "classes.csv").exists() and not (tmp_path / "confusion.png").exists()  # of other images

    paths = draw(SampleArguments(str(folder), num_images=2, classes=["3", "8"], guidance=2.0), DataArguments())
    assert [path.name for path in paths] == ["samples.png"]
    for wrong, message in (
        ({"classes": ["x"]}, "There is no class 'x'"),
        ({"guidance": 2.0}, "--guidance strengthens --classes"),
        ({"classes": ["3"], "guidance": 2.0, "num_held_out": 1, "box": [0.0, 0.0, 0.5, 0.5]}, "without --guidance"),
        ({"num_held_out": 3, "classes": ["1", "2"]}, "one for each of 3 images"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(SampleArguments(str(folder), **wrong), DataArguments(max_eval_samples=60))


def test_models_without_classes_do_not_classify(tmp_path, processor):
    randomized(ImageGPTForCausalImageModeling(small_config())).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--by_class: .* knows no classes"):
        score(ScoreArguments(str(tmp_path), num_held_out=1, by_class=True), DataArguments())
    plain = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows no classes"):
        measure_class_likelihoods(plain, torch.zeros(1, 64, dtype=torch.long))


def test_a_run_that_is_told_nothing_is_that_of_a_model_without_classes(tmp_path):
    run(tmp_path / "start", class_conditional=False)
    start = {"model_name_or_path": str(tmp_path / "start")}
    plain = run(tmp_path / "plain", start, class_conditional=False)
    told = run(tmp_path / "told", start, class_dropout=1.0)
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "told")
    table = other.pop("transformer.wte.weight")
    assert torch.equal(table[:17], one.pop("transformer.wte.weight")) and table.shape[0] == 27
    assert all(torch.equal(other[name], weight) for name, weight in one.items())
    assert torch.equal(table[17:], weights(tmp_path / "start")["transformer.wte.weight"][16:].expand(10, -1))
    assert plain[0].value == pytest.approx(measured_untold(tmp_path / "told"), rel=1e-5) != told[0].value


def measured_untold(folder):
    """Held-out nats per pixel of a model that is told no class."""
    held_out = load_images(DataArguments(max_eval_samples=60), seed=1)["validation"]
    processor = ImageGPTImageProcessorPil.from_pretrained(folder)
    tokens = torch.tensor(processor([read_image(cell) for cell in held_out["image"]])["input_ids"])
    model = ImageGPTForCausalImageModeling.from_pretrained(folder)
    return measure_surprise(model, tokens, progress=False).mean().item()


def test_runs_with_classes_resume(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 16}
    run(tmp_path / "whole", **options)
    run(tmp_path / "resumed", **options)
    (tmp_path / "resumed" / "records.json").unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-6")
    run(tmp_path / "resumed", **options)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    (tmp_path / "resumed" / "records.json").unlink()
    for changed, said in (
        ({"class_dropout": 0.2}, "was trained with --class_dropout 0.1, not 0.2"),
        ({"class_conditional": False}, "has --class_conditional = True, this run False"),
    ):
        with pytest.raises(ValueError, match=said):
            run(tmp_path / "resumed", **options | changed)
    split = find_split(tmp_path / "resumed" / "checkpoint-6")
    assert split is not None and not split.is_labelled  # its held-out images are those of pretraining


def test_other_labels_are_other_images(tmp_path):
    file, images = tmp_path / "train.parquet", digits().select(range(80))
    images.to_parquet(file)
    model = {"config_overrides": SMALL, "num_colors": 16}
    options = {"images": {"train_dir": str(file), "image_size": 8}, "save_strategy": "steps", "save_steps": 3}
    run(tmp_path / "run", model, **options)
    (tmp_path / "run" / "records.json").unlink()
    moved = [(label + 1) % 10 for label in images["label"]]
    feature = images.features["label"]
    images.remove_columns("label").add_column("label", moved, feature=feature).to_parquet(file)
    with pytest.raises(ValueError, match="The images are not those .* or labels are others"):
        run(tmp_path / "run", model, **options)


def test_held_out_images_without_labels(tmp_path):
    names = [str(digit) for digit in digits()["label"]]
    images = digits().remove_columns("label").add_column("label", names)  # strings
    images.select(range(60)).to_parquet(tmp_path / "train.parquet")
    images.select(range(60, 80)).remove_columns("label").to_parquet(tmp_path / "validation.parquet")
    model = {"config_overrides": SMALL, "num_colors": 16}
    options = {"train_dir": str(tmp_path / "train.parquet"), "image_size": 8, "max_train_samples": 20}
    own = {"validation_dir": str(tmp_path / "validation.parquet")}
    records = run(tmp_path / "unlabelled", model, options | own, per_device_train_batch_size=4)
    assert records[0].told_classes is None and "told" not in describe_model(records[0])
    assert records[0].details == {"nats per pixel by class": {}, "images whose class was told": 0}
    records = run(tmp_path / "labelled", model, options, per_device_train_batch_size=4)  # classes of all 60, not of 20
    assert records[0].told_classes == 10 and not is_generation(records[0]) and is_generation(records[1]) is False


def test_models_with_classes_as_a_start(trained, tmp_path):
    folder, _ = trained
    with pytest.raises(ValueError, match="draws 10 classes .*--class_conditional is not given: give the same"):
        run(tmp_path / "more", {"model_name_or_path": str(folder)}, class_conditional=False)
    run(tmp_path / "more", {"model_name_or_path": str(folder)}, max_steps=1)
    arguments = FinetuningArguments(
        output_dir=str(tmp_path / "classifier"), use_cpu=True, disable_tqdm=True, max_steps=2, seed=1
    )
    finetune(ModelArguments(str(folder)), DataArguments(max_train_samples=40, max_eval_samples=20), arguments)
    classifier = ImageGPTForImageClassification.from_pretrained(tmp_path / "classifier")
    assert classifier.config.n_class_tokens == 0 and classifier.transformer.wte.num_embeddings == 17


def test_arguments_of_classes(tmp_path):
    with pytest.raises(ValueError, match="--class_dropout is for --class_conditional"):
        PretrainingArguments(class_dropout=0.1)
    for wrong in (0.0, 1.5):  # without any dropout, SOS would mean nothing
        with pytest.raises(ValueError, match=f"--class_dropout is above 0 and at most 1; found {wrong}"):
            PretrainingArguments(class_dropout=wrong, class_conditional=True)
    with pytest.raises(ValueError, match="--class_conditional is for causal models"):
        PretrainingArguments(class_conditional=True, objective="masked")
    run(tmp_path / "masked", class_conditional=False, objective="masked", max_steps=1)
    with pytest.raises(ValueError, match="--class_conditional is for causal models; .* is masked"):
        run(tmp_path / "told", {"model_name_or_path": str(tmp_path / "masked")})
