"""Fine-tuning and the masked objective: what runs leave behind, invariants of the joint loss, refusals. On the digits."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_training import SCRIPTS, SMALL, assert_same_run, greys, history, run, weights  # noqa: F401 - a fixture
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_igpt import ImageGPTForMaskedImageModeling, data
from hf_igpt.commands.finetune import finetune
from hf_igpt.data import DataArguments
from hf_igpt.evaluation.held_out import find_split_seed
from hf_igpt.evaluation.records import describe_model, describe_network, read_records
from hf_igpt.presets import SIZES
from hf_igpt.training.arguments import FinetuningArguments, ModelArguments


def fit(folder, model=None, images=None, **options):
    """A small fine-tuning run; returns its records."""
    defaults = {"use_cpu": True, "disable_tqdm": True, "max_steps": 6, "logging_steps": 1, "seed": 1}
    defaults |= {"eval_strategy": "no", "save_strategy": "no"}
    arguments = FinetuningArguments(output_dir=str(folder), **(defaults | options))
    images = {"max_eval_samples": 60} | (images or {})
    return finetune(ModelArguments(**(model or {})), DataArguments(**images), arguments)


@pytest.fixture(scope="module")
def pretrained(greys, tmp_path_factory):  # noqa: F811
    """Folders of a small causal and a small masked model."""
    root = tmp_path_factory.mktemp("pretrained")
    for objective in ("causal", "masked"):
        options = {"max_steps": 60, "milestones": "0.1,0.5,1", "num_samples": 2, "eval_strategy": "steps"}
        options |= {"save_strategy": "steps", "save_steps": 30, "eval_steps": 30}
        run(root / objective, greys, objective=objective, **options)
    return root


def from_folder(folder):
    return {"model_name_or_path": str(folder)}


# -- the masked objective ----------------------------------------------------------------------------------------------


def test_a_masked_run_learns_and_its_records_say_what_it_is(pretrained):
    records = read_records(pretrained / "masked" / "records.json")
    found = {record.baseline or describe_network(record): record.value for record in records}
    assert set(found) == {"Image GPT masked 2 x 32", "uniform", "unigram", "position unigram"}
    assert found["Image GPT masked 2 x 32"] < found["uniform"]
    assert records[0].objective == "masked"
    assert json.loads((pretrained / "masked" / "run.json").read_text())["recipe"]["objective"] == "masked"
    picture = Image.open(max((pretrained / "masked" / "samples").iterdir()))
    assert picture.size[0] > picture.size[1]  # two triples side by side


def test_the_recorded_masked_loss_is_the_saved_models(pretrained):
    """Masks of held-out images come from the run's seed and the image's number alone."""
    folder = pretrained / "masked"
    model = ImageGPTForMaskedImageModeling.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    held_out = data.load_images(DataArguments(max_eval_samples=50), seed=1)["validation"]
    rows = data.ImageTokens(data.tokenize(held_out, processor), processor, masked=True, seed=1)
    batch = data.collate_tokens(rows.__getitems__(range(50)))
    assert 0.1 < batch["bool_masked_pos"].float().mean() < 0.2
    with torch.no_grad():
        logits = model(input_ids=batch["labels"], bool_masked_pos=batch["bool_masked_pos"]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    per_image = [row[mask].mean() for row, mask in zip(losses, batch["bool_masked_pos"], strict=True)]
    assert torch.stack(per_image).mean().item() == pytest.approx(
        read_records(folder / "records.json")[0].value, rel=1e-5
    )


def test_masked_accumulation_changes_nothing(tmp_path, greys):  # noqa: F811
    for batch, steps in ((8, 1), (1, 8)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "save_strategy": "steps"}
        run(tmp_path / str(batch), greys, objective="masked", save_steps=6, **options)
    assert_same_run(tmp_path / "8", tmp_path / "1")


def test_milestones_are_kept_and_change_nothing(pretrained, tmp_path, greys):  # noqa: F811
    folder = pretrained / "causal"
    steps = [path.name for path in sorted((folder / "milestones").iterdir())]
    assert steps == ["step-0000006", "step-0000030", "step-0000060"]
    values = [read_records(folder / "milestones" / step / "records.json")[0] for step in steps]
    assert values[0].value > values[1].value and "96 images seen" in describe_model(values[0])
    assert json.loads((folder / "milestones" / steps[0] / "config.json").read_text())["model_type"] == "imagegpt"
    AutoImageProcessor.from_pretrained(folder / "milestones" / steps[0])
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert values[1].value == pytest.approx(
        next(
            entry["eval_nats_per_pixel"] for entry in log if entry.get("step") == 30 and "eval_nats_per_pixel" in entry
        )
    )
    options = {"max_steps": 60, "eval_strategy": "steps", "save_strategy": "steps"}
    run(tmp_path, greys, save_steps=30, eval_steps=30, **options)
    assert_same_run(folder, tmp_path, weight_tolerance=0)


# -- fine-tuning -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finetuned"
    options = {
        "max_steps": -1,
        "num_train_epochs": 6,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_steps": 20,
    }
    options |= {"learning_rate": 3e-3, "early_stopping_patience": 3}
    return folder, fit(folder, from_folder(pretrained / "causal"), **options)


def test_what_fine_tuning_leaves_behind(finished):
    folder, records = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "confusion.png", "training.png"} <= names
    assert read_records(folder / "records.json") == records
    accuracy = {(record.split, record.baseline): record.value for record in records if record.metric == "accuracy"}
    assert (
        accuracy["test", None]
        > 2 * max(value for (split, name), value in accuracy.items() if split == "test" and name)
        > 0
    )
    assert {record.metric for record in records} == {"accuracy", "nats_per_pixel"}
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {str(digit): str(digit) for digit in range(10)}
    assert config["sos_inputs"] and config["generative_loss_weight"] == 1.0
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in log if "loss" in entry]
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["classification_loss"] + entry["generative_loss"], rel=1e-4)
        assert entry["learning_rate"] == pytest.approx(3e-3)  # constant
    evaluated = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    best = next(record.value for record in records if record.split == "validation")
    assert best == pytest.approx(max(evaluated))


def test_the_recorded_accuracy_is_the_pipelines(finished):
    folder, records = finished
    classify = pipeline("image-classification", str(folder))
    splits = data.load_labelled_images(DataArguments(max_eval_samples=60), seed=1)
    images = [data.read_image(cell) for cell in splits["test"]["image"]]
    said = [int(answers[0]["label"]) for answers in classify(images, batch_size=16)]
    assert np.mean(np.array(said) == splits["test"]["label"]) == pytest.approx(records[0].value)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("causal", {"classifier_inputs": "raw"}),
        ("causal", {"generative_loss_weight": 0.0}),
        ("masked", {"num_masks": 3}),
    ],
)
def test_variants(objective, options, pretrained, tmp_path):
    records = fit(tmp_path / "run", from_folder(pretrained / objective), **options)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.objective == objective and model.config.num_labels == 10
    assert model.config.sos_inputs == (objective == "causal" and options.get("classifier_inputs") != "raw")
    assert (model.lm_head is None) == (options.get("generative_loss_weight") == 0.0)
    tested = [
        record for record in records if (record.metric, record.split, record.baseline) == ("accuracy", "test", None)
    ]
    assert [record.masks for record in tested] == ([3, 1] if objective == "masked" else [None])


def test_from_random_weights_the_head_starts_at_zero(pretrained, greys, tmp_path):  # noqa: F811
    model = {"image_processor_name": greys, "config_overrides": SMALL}
    records = fit(tmp_path, model, save_strategy="steps", save_steps=6)
    assert history(tmp_path)[0]["classification_loss"] == pytest.approx(np.log(10), rel=1e-4)
    assert history(tmp_path)[0]["generative_loss"] == pytest.approx(np.log(16), rel=1e-4)
    assert records[0].started_from == "random weights"


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_joint_accumulation_changes_nothing(objective, pretrained, tmp_path):
    for batch, steps in ((8, 1), (1, 8)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "save_strategy": "steps"}
        fit(tmp_path / str(batch), from_folder(pretrained / objective), save_steps=6, learning_rate=1e-3, **options)
    assert_same_run(tmp_path / "8", tmp_path / "1")
    for one, other in zip(history(tmp_path / "8"), history(tmp_path / "1"), strict=True):
        for part in ("classification_loss", "generative_loss"):
            assert one[part] == pytest.approx(other[part], rel=1e-4)


def test_two_processes_fine_tune_as_one(pretrained, tmp_path):
    """Two by the script and torchrun, one by the function that the script calls."""
    options = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 6, "num_masks": 2}
    images = {"pad_crop": True, "max_eval_samples": 51}
    fit(tmp_path / "1", from_folder(pretrained / "masked"), images, **options)
    flags = (
        f"--model_name_or_path {pretrained / 'masked'} --use_cpu --max_steps 6 --logging_steps 1 --seed 1 --pad_crop "
    )
    flags += "--learning_rate 1e-3 --eval_strategy no --save_strategy steps --save_steps 6 --max_eval_samples 51 --num_masks 2"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(SCRIPTS / "run_finetune.py"), "--output_dir", str(tmp_path / "2"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(tmp_path / "1", tmp_path / "2")
    for one, other in zip(history(tmp_path / "1"), history(tmp_path / "2"), strict=True):
        assert one["generative_loss"] == pytest.approx(other["generative_loss"], rel=1e-4)
    one, two = (read_records(tmp_path / str(n) / "records.json") for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a.n == b.n == 51 and a.value == pytest.approx(b.value, rel=1e-4)


def test_recipes():
    assert FinetuningArguments().lr_scheduler_type == "constant" and FinetuningArguments().adam_beta2 == 0.95
    assert FinetuningArguments().num_train_epochs == 20 and FinetuningArguments().warmup_steps == 0


def test_learning_rates_of_objectives(pretrained, tmp_path):
    recipe = json.loads((pretrained / "masked" / "run.json").read_text())["recipe"]
    assert recipe["learning rate"].startswith(f"{SIZES['tiny'].learning_rate_for('masked', 8):g},")
    fit(tmp_path, from_folder(pretrained / "causal"), max_steps=1)
    recipe = json.loads((tmp_path / "run.json").read_text())["recipe"]
    assert recipe["learning rate"].startswith("0.0001,")  # a tenth


def test_early_stopping(pretrained, tmp_path):
    """A learning rate of nothing never gets better."""
    options = {"max_steps": -1, "num_train_epochs": 9, "eval_strategy": "epoch", "save_strategy": "epoch"}
    options |= {"learning_rate": 1e-12, "early_stopping_patience": 2}
    fit(tmp_path, from_folder(pretrained / "causal"), {"max_train_samples": 64}, **options)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["epoch"] == 3


def test_a_resumed_run_stops_where_an_uninterrupted_one_does(pretrained, tmp_path):
    options = {"max_steps": -1, "num_train_epochs": 9, "eval_strategy": "epoch", "save_strategy": "epoch"}
    options |= {"learning_rate": 1e-12, "early_stopping_patience": 3, "save_total_limit": None}
    start, images = from_folder(pretrained / "causal"), {"max_train_samples": 64}
    fit(tmp_path / "whole", start, images, **options)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "resumed" / "checkpoint-8")
    for begun in ("palette.png", "preprocessor_config.json", "run.json"):
        shutil.copy(tmp_path / "whole" / begun, tmp_path / "resumed")
    fit(tmp_path / "resumed", start, images, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", weight_tolerance=0)
    (tmp_path / "resumed" / "records.json").unlink()
    with pytest.raises(
        ValueError, match="with --image_processor_name None, not"
    ):  # a run from random weights does not go on with this one
        fit(tmp_path / "resumed", {"image_processor_name": str(pretrained / "causal")}, images, **options)


def test_test_images_are_of_the_split_that_pretraining_held_out(pretrained, tmp_path, capsys):
    records = fit(tmp_path / "run", from_folder(pretrained / "causal"), seed=7, max_steps=2)
    assert "Splits are drawn by seed 1" in capsys.readouterr().out
    assert records[0].seed == 7 and records[0].split_seed == 1
    assert find_split_seed(str(tmp_path / "run"), DataArguments(), 3) == 1
    with pytest.raises(ValueError, match="the default --train_val_split, not 0.5"):
        fit(tmp_path / "other", from_folder(pretrained / "causal"), {"train_val_split": 0.5}, max_steps=2)


def test_the_best_model_follows_its_metric(pretrained, tmp_path):
    options = {
        "max_steps": 30,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 10,
        "learning_rate": 1e-3,
    }
    fit(tmp_path, from_folder(pretrained / "causal"), metric_for_best_model="nats_per_pixel", **options)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    evaluated = {e["step"]: e["eval_nats_per_pixel"] for e in state["log_history"] if "eval_nats_per_pixel" in e}
    assert state["best_global_step"] == min(evaluated, key=evaluated.get)


def test_warm_up_before_a_constant_rate(pretrained, tmp_path):
    fit(
        tmp_path,
        from_folder(pretrained / "causal"),
        save_strategy="steps",
        save_steps=6,
        warmup_steps=4,
        learning_rate=1e-3,
    )
    assert [entry["learning_rate"] for entry in history(tmp_path)] == pytest.approx(
        [0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3]
    )


# -- refusals ----------------------------------------------------------------------------------------------------------


def unlabelled(folder):
    (folder / "photos").mkdir()
    for i in range(20):
        Image.new("L", (8, 8), 10 * i).save(folder / "photos" / f"{i}.png")
    return {"train_dir": str(folder / "photos")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generative_loss_weight": -1.0}, "generative_loss_weight is at least 0"),
        ({"num_masks": 0}, "num_masks is at least 1"),
        ({"metric_for_best_model": "nats_per_pixel", "generative_loss_weight": 0.0}, "metric_for_best_model is one of"),
        ({"damaged": True}, "bare lacks transformer.h.0.mlp.c_fc.weight"),
        ({"images": unlabelled}, "have no labels"),
        ({"images": {"streaming": True, "train_dir": "x"}}, "not streamed"),
        ({"images": {"label_column_name": "kind"}}, "kind is not in the dataset"),
        ({"objective": "masked"}, "are causal"),
        ({"no processor": True}, "bare has no image processor"),
    ],
)
def test_refusals_leave_nothing_behind(options, message, pretrained, tmp_path):
    folder = pretrained / "causal"
    if "no processor" in options or "damaged" in options:
        folder = tmp_path / "bare"
        folder.mkdir()
        for name in (
            "config.json",
            "model.safetensors",
            *(["preprocessor_config.json"] if "damaged" in options else []),
        ):
            shutil.copy(pretrained / "causal" / name, folder)
        if "damaged" in options:
            found = load_file(folder / "model.safetensors")
            del found["transformer.h.0.mlp.c_fc.weight"]
            save_file(found, folder / "model.safetensors", {"format": "pt"})
        options = {}
    if callable(options.get("images")):
        options["images"] = options["images"](tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "run", from_folder(folder), **options)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_flags_of_pretraining_alone_are_none_of_fine_tuning():
    assert not {"milestones", "num_samples"} & {field.name for field in fields(FinetuningArguments)}


def test_a_head_of_other_classes_is_refused(finished, tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (8, 8), 10 * i).save(tmp_path / "pets" / label / f"{i}.png")
    with pytest.raises(
        ValueError, match=r"classifies 10 classes \(0, 1, 2, 3, 4, …\); the images have 2 classes \(cat, dog\)"
    ):
        fit(tmp_path / "run", from_folder(finished[0]), {"train_dir": str(tmp_path / "pets")}, max_steps=1)
