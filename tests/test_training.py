"""Pretraining: what a run leaves behind, invariants of the trajectory, and refusals. All on the digits, on the CPU."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForCausalLM, TrainerControl, TrainerState, pipeline

from hf_igpt import ImageGPTImageProcessorPil, complete, data
from hf_igpt.clusters import to_unit_range
from hf_igpt.commands.cli import parse_arguments
from hf_igpt.commands.clusters import ClustersArguments, fit_clusters
from hf_igpt.commands.finetune import finetune
from hf_igpt.commands.pretrain import pretrain
from hf_igpt.commands.probe import ProbeArguments, probe
from hf_igpt.commands.report import ReportArguments, report
from hf_igpt.commands.sample import SampleArguments
from hf_igpt.commands.sample import draw as sample_images
from hf_igpt.commands.score import ScoreArguments, score
from hf_igpt.data import DataArguments
from hf_igpt.evaluation.metrics import nats_per_image
from hf_igpt.evaluation.records import describe_images, describe_model, describe_network, read_records
from hf_igpt.generation_imagegpt import find_hidden
from hf_igpt.presets import SIZES
from hf_igpt.publishing.hub import write_repository
from hf_igpt.training.arguments import FinetuningArguments, ModelArguments, PretrainingArguments
from hf_igpt.training.callbacks import Clock, PushCheckpoints
from hf_igpt.training.trainer import ImageGPTTrainer


SCRIPTS = Path(__file__).parent.parent / "scripts"
SMALL = "n_layer=2,n_embd=32,n_head=2"


@pytest.fixture(scope="module")
def greys(tmp_path_factory):
    """A palette of 16 greys, so that runs need not fit one."""
    path = tmp_path_factory.mktemp("palette") / "greys.npy"
    np.save(path, to_unit_range(np.repeat(np.linspace(0, 255, 16)[:, None], 3, axis=1)))
    return str(path)


def run(folder, greys, model=None, images=None, **options):
    """A small run; returns its records."""
    defaults = {"use_cpu": True, "disable_tqdm": True, "max_steps": 6, "num_samples": 0, "logging_steps": 1, "seed": 1}
    defaults |= {"eval_strategy": "no", "save_strategy": "no"}
    arguments = PretrainingArguments(output_dir=str(folder), **(defaults | options))
    model = {"image_processor_name": greys, "config_overrides": SMALL} | (model or {})
    return pretrain(ModelArguments(**model), DataArguments(**({"max_eval_samples": 50} | (images or {}))), arguments)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def history(folder):
    """The last checkpoint's log entries of training."""
    last = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return [entry for entry in json.loads((last / "trainer_state.json").read_text())["log_history"] if "loss" in entry]


def assert_same_run(one, other, weight_tolerance=1e-4):
    for a, b in zip(history(one), history(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    other_weights = weights(other)
    for name, tensor in weights(one).items():
        assert (tensor - other_weights[name]).abs().max() <= weight_tolerance, name


# -- a whole run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with nothing named but its length: palette fitted, five evaluations."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = PretrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        max_steps=100,
        eval_steps=20,
        save_steps=20,
        num_samples=4,
    )
    records = pretrain(ModelArguments(config_overrides=SMALL), DataArguments(), arguments)
    return folder, records


def test_a_run_learns_and_beats_counting_pixels(finished):
    folder, records = finished
    found = {record.baseline or describe_network(record): record.value for record in records}
    assert found["Image GPT 2 x 32"] < found["unigram"] < found["uniform"]
    assert all(record.n == 359 and record.unit == "nats/pixel" for record in records)
    assert read_records(folder / "records.json") == records


def test_the_log_has_no_mean_that_resuming_would_change(finished):
    log = json.loads((finished[0] / "checkpoint-100" / "trainer_state.json").read_text())["log_history"]
    log += json.loads((finished[0] / "trainer_state.json").read_text())["log_history"]
    assert any("train_runtime" in entry for entry in log) and not any("train_loss" in entry for entry in log)


def test_what_a_run_leaves_behind(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "preprocessor_config.json"} <= names
    assert {"palette.png", "training.png", "records.json", "samples", "checkpoint-100"} <= names
    assert [path.name for path in sorted((folder / "samples").iterdir())][-1] == "step-0000100.png"
    assert Image.open(folder / "samples" / "step-0000100.png").size == (204, 204)
    for place in [folder, *folder.glob("checkpoint-*")]:  # the best and the last, each with its processor
        model = AutoModelForCausalLM.from_pretrained(place)
        processor = AutoImageProcessor.from_pretrained(place)
        assert len(processor.clusters) == model.config.vocab_size - 1 == 16
        assert model.config.use_cache and model.generate().shape == (1, 65)


def test_the_recorded_loss_is_the_saved_models(finished):
    folder, records = finished
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    held_out = data.load_images(DataArguments(), seed=42)["validation"]
    tokens = torch.tensor(processor([data.read_image(cell) for cell in held_out["image"]])["input_ids"])
    with torch.no_grad():
        nats = nats_per_image(model(labels=tokens).logits, tokens).mean().item()
    assert nats == pytest.approx(records[0].value, rel=1e-5)


def test_the_best_model_is_kept(tmp_path, greys):
    """So few images that the last model has learnt them by heart and is worse than an earlier one."""
    options = {"max_steps": 240, "learning_rate": 0.01, "lr_scheduler_type": "constant", "logging_steps": 40}
    options |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 40}
    records = run(tmp_path, greys, images={"max_train_samples": 20}, per_device_train_batch_size=16, **options)
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    evaluated = {e["step"]: e["eval_nats_per_pixel"] for e in state["log_history"] if "eval_nats_per_pixel" in e}
    best = min(evaluated, key=evaluated.get)
    assert len(evaluated) == 6 and best < 240 and evaluated[240] > evaluated[best] + 0.01
    assert records[0].value == pytest.approx(evaluated[best], rel=1e-5)
    assert f"{best * 10:,} images seen" in describe_model(records[0])  # two steps make an epoch of 20
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-240", f"checkpoint-{best}"}
    kept = weights(tmp_path / f"checkpoint-{best}")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(tmp_path).items())


def test_what_is_logged(finished):
    last = max(finished[0].glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    evaluated = [entry["eval_nats_per_pixel"] for entry in state["log_history"] if "eval_nats_per_pixel" in entry]
    assert len(evaluated) == 5 and min(evaluated) == pytest.approx(finished[1][0].value, rel=1e-6)
    logged = next(entry for entry in state["log_history"] if "loss" in entry)
    assert logged["bits_per_pixel"] == pytest.approx(logged["loss"] / np.log(2))
    assert logged["images"] == logged["step"] * 16
    assert state["log_history"][-1]["images"] == 1438 + 10 * 16  # 90 steps are an epoch, its last of 14 images


# -- invariants --------------------------------------------------------------------------------------------------------


def test_accumulation_changes_nothing(tmp_path, greys):
    for batch, steps in ((8, 1), (1, 8)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "save_strategy": "steps"}
        run(tmp_path / str(batch), greys, save_steps=6, **options)
    assert_same_run(tmp_path / "8", tmp_path / "1")


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, greys):
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": None,
        "num_samples": 2,
        "eval_strategy": "steps",
    }
    options |= {"eval_steps": 3, "load_best_model_at_end": False}
    images = {"random_flip": True, "max_train_samples": 40}  # 3 steps an epoch: resumed in the second
    run(tmp_path / "whole", greys, images=images, **options)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    for begun in (
        "run.json",
        "palette.png",
        "preprocessor_config.json",
        "model.safetensors",
    ):  # as if stopped while writing its end
        shutil.copy(tmp_path / "whole" / begun, tmp_path / "resumed")
    run(tmp_path / "resumed", greys, images=images, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", weight_tolerance=0)


def test_each_epoch_is_augmented_anew(tmp_path, greys, monkeypatch):
    epochs = []
    fetch = data.ImageTokens.__getitems__
    monkeypatch.setattr(
        data.ImageTokens,
        "__getitems__",
        lambda self, i: epochs.append(self.epoch if self.random_flip else 0) or fetch(self, i),
    )
    run(tmp_path, greys, images={"random_flip": True, "max_train_samples": 32}, max_steps=6)
    assert epochs[:6] == [0, 0, 1, 1, 2, 2]


def test_a_resumed_stream_equals_an_uninterrupted_one(tmp_path, greys):
    (tmp_path / "digits").mkdir()
    digits = data.digits().select(range(60))
    digits.cast_column("image", digits.features["image"].__class__()).to_parquet(tmp_path / "digits" / "train.parquet")
    images = {"train_dir": str(tmp_path / "digits"), "streaming": True, "random_flip": True}
    options = {"images": images, "save_strategy": "steps", "save_steps": 4, "save_total_limit": None, "max_steps": 8}
    options |= {"per_device_train_batch_size": 5}
    for name in ("whole", "resumed"):  # 10 images are left to train on: resumed in the third pass
        if name == "resumed":
            (tmp_path / name).mkdir()
            shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / name / "checkpoint-4")
            shutil.copy(tmp_path / "whole" / "run.json", tmp_path / name)
        run(tmp_path / name, greys, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", weight_tolerance=0)


def test_the_same_seed_gives_the_same_run(tmp_path, greys):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, greys, seed=seed, max_steps=3)
    a, b, c = (weights(tmp_path / name)["lm_head.weight"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_bf16_and_compilation_train_alike(tmp_path, greys):
    variants = {
        "plain": {},
        "bf16": {"bf16": True},
        "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    }
    for name, options in variants.items():
        run(tmp_path / name, greys, save_strategy="steps", save_steps=6, **options)
    plain, bf16, compiled = ([entry["loss"] for entry in history(tmp_path / name)] for name in variants)
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert bf16 == pytest.approx(plain, rel=0.02) and bf16 != plain


def test_going_on_from_a_checkpoint(tmp_path, greys):
    first = run(tmp_path / "first", greys, max_steps=30)
    model = {"model_name_or_path": str(tmp_path / "first"), "image_processor_name": None, "config_overrides": None}
    second = run(tmp_path / "second", greys, model=model, max_steps=30)
    assert second[0].value < first[0].value


def test_random_crops_and_streams_train(tmp_path, greys):
    for i in range(24):
        image = Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30), dtype=np.uint8))
        (tmp_path / "photos").mkdir(exist_ok=True)
        image.save(tmp_path / "photos" / f"{i}.png")
    images = {"train_dir": str(tmp_path / "photos"), "image_size": 8, "random_crop": True, "random_flip": True}
    few = {"max_steps": 2, "per_device_train_batch_size": 8}
    assert run(tmp_path / "crops", greys, images=images, **few)[0].value < 3
    datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), split="train").to_parquet(
        tmp_path / "p.parquet"
    )
    images |= {"train_dir": str(tmp_path / "p.parquet"), "streaming": True}
    stream = data.load_images(DataArguments(**images, max_eval_samples=4))
    assert len(list(stream["train"])) == 20
    arguments = PretrainingArguments(
        output_dir=str(tmp_path / "stream"), use_cpu=True, disable_tqdm=True, num_samples=0, eval_strategy="no", **few
    )
    model = ModelArguments(image_processor_name=greys, config_overrides=SMALL)
    assert pretrain(model, DataArguments(**images, max_eval_samples=4), arguments)[0].value < 3


# -- recipes and the clock ---------------------------------------------------------------------------------------------


def test_presets_and_overrides():
    arguments = PretrainingArguments(size="s", use_cpu=True)
    assert (arguments.max_steps, arguments.train_batch_size, arguments.adam_beta2) == (1_000_000, 128, 0.95)
    assert arguments.lr_scheduler_type == "cosine" and arguments.weight_decay == 0
    arguments.resolve(arguments.size, "causal", 32, 1_230_000)
    assert arguments.warmup_steps == 9610  # one epoch
    arguments = PretrainingArguments(
        size="s", use_cpu=True, gradient_accumulation_steps=8, num_train_epochs=2, learning_rate=1
    )
    assert (arguments.max_steps, arguments.num_train_epochs, arguments.train_batch_size) == (-1, 2, 16)
    arguments.resolve(arguments.size, "causal", 32, 1000)
    arguments = PretrainingArguments(use_cpu=True, per_device_train_batch_size=5, warmup_steps=7)
    arguments.resolve(arguments.size, "causal", 32, 1000)
    assert (arguments.train_batch_size, arguments.warmup_steps) == (5, 7)
    assert arguments.num_train_epochs == SIZES["tiny"].num_epochs
    for options, warmup in (({"warmup_steps": 0}, 0), ({"warmup_epochs": 5}, 315), ({"num_train_epochs": 1}, 6)):
        arguments = PretrainingArguments(use_cpu=True, **options)
        arguments.resolve(arguments.size, "causal", 32, 1000)
        assert arguments.warmup_steps == warmup


def test_the_clock_ends_a_run_with_its_learning_rate_decayed(tmp_path, greys):
    run(tmp_path, greys, max_steps=10**6, max_minutes=0.1, warmup_steps=1, save_strategy="steps", save_steps=10**6)
    steps = history(tmp_path)
    assert 3 < len(steps) < 10_000
    assert steps[-1]["learning_rate"] < 0.05 * max(step["learning_rate"] for step in steps)
    assert (tmp_path / "records.json").is_file()


@pytest.mark.parametrize(("step", "clock"), [(0, 0.0), (500, 0.1), (500, 0.9), (900, 0.1), (0, 0.5)])
def test_the_schedule_follows_the_steps_or_the_clock_whichever_is_ahead(step, clock, monkeypatch):
    trainer = ImageGPTTrainer.__new__(ImageGPTTrainer)
    trainer.args = PretrainingArguments(use_cpu=True, warmup_steps=99, learning_rate=1)
    trainer.clock = Clock(1.0, "cpu")
    trainer.clock.elapsed = clock
    schedule = trainer.create_scheduler(1000, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1))
    done = max(step / 1000, clock)
    warmed = min(1, max((step + 1) / 100, clock / 0.1))
    assert schedule.lr_lambdas[0](step) == pytest.approx(warmed * (1 + np.cos(np.pi * done)) / 2)


def test_a_resumed_run_has_the_time_that_was_left(tmp_path, greys):
    options = {
        "max_minutes": 0.1,
        "warmup_steps": 1,
        "save_strategy": "steps",
        "save_steps": 20,
        "save_total_limit": None,
    }
    run(tmp_path / "whole", greys, max_steps=10**6, **options)
    last = history(tmp_path / "whole")[-1]
    assert last["minutes"] >= 0.1
    (tmp_path / "resumed").mkdir()
    step = f"checkpoint-{last['step'] // 20 * 20}"
    shutil.copytree(tmp_path / "whole" / step, tmp_path / "resumed" / step)
    shutil.copy(tmp_path / "whole" / "run.json", tmp_path / "resumed")
    run(tmp_path / "resumed", greys, max_steps=10**6, **options)
    assert history(tmp_path / "resumed")[-1]["step"] < last["step"] + 40  # not a whole budget again


@pytest.mark.parametrize("kind", ["json", "yaml", "flags", "both"])
def test_a_file_instead_of_flags(tmp_path, kind, monkeypatch):
    options = {"size": "xs", "output_dir": "somewhere", "learning_rate": 0.1, "image_size": 16, "use_cpu": True}
    if kind == "flags":
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    else:
        kind, flags = ("json", ["--learning_rate", "0.1"]) if kind == "both" else (kind, [])
        recipe = options | {"learning_rate": 0.2} if flags else options  # flags win
        (tmp_path / f"recipe.{kind}").write_text(json.dumps(recipe))  # JSON is YAML
        arguments = [str(tmp_path / f"recipe.{kind}"), *flags]
    monkeypatch.setattr(sys, "argv", ["run_pretrain.py", *arguments])
    _, images, arguments = parse_arguments(ModelArguments, DataArguments, PretrainingArguments, description="")
    assert (arguments.size, arguments.learning_rate, images.image_size) == ("xs", 0.1, 16)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{bad", "cannot be read"),
        ("[1]", "names and values"),
        ('{"sise": "s"}', "unknown names: sise"),
    ],
)
def test_bad_recipes(tmp_path, recipe, message, monkeypatch):
    (tmp_path / "recipe.json").write_text(recipe)
    monkeypatch.setattr(sys, "argv", ["run_pretrain.py", str(tmp_path / "recipe.json")])
    with pytest.raises(ValueError, match=message):
        parse_arguments(ModelArguments, DataArguments, PretrainingArguments, description="")


@pytest.mark.parametrize(
    "recipe", ['{"size": "h"}', '{"max_steps": [1, 2]}', '{"num_samples": 3.5}', '{"learning_rate": "x"}']
)
def test_recipes_are_checked_like_flags(tmp_path, recipe, monkeypatch):
    (tmp_path / "recipe.json").write_text(recipe)
    monkeypatch.setattr(sys, "argv", ["run_pretrain.py", str(tmp_path / "recipe.json")])
    with pytest.raises((SystemExit, ValueError), match=r"2|not used"):
        parse_arguments(ModelArguments, DataArguments, PretrainingArguments, description="")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "AdamW, betas 0.9 and 0.95, weight decay 0"),
        ({"optim": "sgd", "optim_args": "momentum=0.9"}, "SGD, weight decay 0, momentum=0.9"),
        ({"optim": "adafactor", "weight_decay": 0.1}, "Adafactor, weight decay 0.1"),
    ],
    ids=str,
)
def test_cards_name_the_optimiser_that_was_used(options, words, tmp_path):
    arguments = PretrainingArguments(str(tmp_path), use_cpu=True, **options)
    arguments.resolve("tiny", "causal", 8, 1000)
    assert arguments.recipe(1000)["optimiser"] == words


def test_evaluations_and_checkpoints_come_together():
    assert (PretrainingArguments().eval_steps, PretrainingArguments().save_steps) == (0.1, 0.1)
    arguments = PretrainingArguments(save_steps=20)
    assert (arguments.eval_steps, arguments.save_steps) == (20, 20)
    arguments.resolve(arguments.size, "causal", 32, 1600)
    assert (arguments.eval_steps, arguments.save_steps, arguments.logging_steps) == (20, 20, 30)
    arguments = PretrainingArguments(eval_steps=0.1, save_steps=0.2, max_steps=33)
    arguments.resolve(arguments.size, "causal", 32, 1600)
    assert (arguments.eval_steps, arguments.save_steps) == (4, 4)  # or the best might be one that was not saved


# -- palettes ----------------------------------------------------------------------------------------------------------


def test_fit_clusters(tmp_path, palette, capsys):
    records = fit_clusters(ClustersArguments(output_dir=str(tmp_path / "fitted"), num_colors=12), DataArguments())
    assert {record.metric for record in records} == {"rmse_grey_levels", "psnr_db"}
    processor = AutoImageProcessor.from_pretrained(tmp_path / "fitted")
    assert len(processor.clusters) == 12 and processor.token_grid() == (8, 8)
    assert np.array_equal(np.load(tmp_path / "fitted" / "palette.npy"), processor.clusters)
    assert Image.open(tmp_path / "fitted" / "palette.png").width > 100
    np.save(tmp_path / "kmeans_centers.npy", palette.astype(np.float32))
    arguments = ClustersArguments(output_dir=str(tmp_path / "read"), palette=str(tmp_path / "kmeans_centers.npy"))
    assert (
        describe_model(fit_clusters(arguments, DataArguments())[0]) == "palette of 64 colours from kmeans_centers.npy"
    )
    with pytest.raises(ValueError, match="17 distinct colours, fewer than the 18"):
        fit_clusters(ClustersArguments(output_dir=str(tmp_path / "many"), num_colors=18), DataArguments())
    assert not (tmp_path / "many").exists()


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": {"max_train_samples": 10}}, "10 training images are fewer than one step's 16"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing"),
        ({"fp16_full_eval": True}, "--fp16_full_eval is not supported: .* give --fp16"),
        ({"bf16_full_eval": True}, "--bf16_full_eval is not supported: .* give --bf16"),
        ({"use_liger_kernel": True}, "--use_liger_kernel is not supported: Liger has no kernels for Image GPT"),
        ({"batch_eval_metrics": True}, "--batch_eval_metrics is not supported"),
        ({"include_for_metrics": ["inputs"]}, "--include_for_metrics is not supported"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size is not supported: the batch is part of the recipe"),
        (
            {"ignore_data_skip": True},
            "--ignore_data_skip is not supported: a run that is resumed would see other images",
        ),
        ({"enable_jit_checkpoint": True}, "--enable_jit_checkpoint is not supported: a run that it ends"),
        ({"parallelism_config": "x"}, "--parallelism_config is not supported: there is no plan"),
        ({"debug": "tpu_metrics_debug"}, "tpu_metrics_debug needs a TPU"),
        ({"torch_compile_backend": "fast"}, "--torch_compile_backend is one of .*inductor.*; found fast"),
        ({"torch_compile_mode": "fast"}, "--torch_compile_mode: .*fast"),
        ({"gradient_accumulation_steps": 3}, "per_device_train_batch_size"),
        ({"max_minutes": 0}, "max_minutes"),
        ({"model": {"num_colors": 5}}, "num_colors 5"),
        ({"model": {"image_processor_name": "no.npy"}}, "No palette at no.npy"),
        ({"model": {"config_overrides": "n_head=5"}}, "not a multiple"),
        ({"model": {"config_overrides": "n_positions=10"}}, "the processor the model was trained with"),
        ({"images": {"image_column_name": "x"}}, "its columns are image, label"),
        ({"resume_from_checkpoint": "nowhere"}, "no checkpoint"),
        ({"size": "huge"}, "tiny, xs, s, m, l, xl"),
        ({"max_minutes": 1, "lr_scheduler_type": "linear"}, "cosine"),
        ({"milestones": "0.5,2"}, "above 0 and up to 1"),
        ({"milestones": "half"}, "fractions of training, separated by commas"),
        ({"objective": "bert"}, 'objective is "causal" or "masked"'),
        ({"prediction_loss_only": True}, "prediction_loss_only"),
        (
            {"eval_strategy": "epoch", "save_strategy": "steps"},
            "--eval_strategy epoch with --save_strategy steps: .* same",
        ),
        ({"report_to": ["nonsense"]}, "--report_to nonsense: nonsense is not supported"),
        ({"report_to": ["flyte"]}, "--report_to flyte: .* flytekit"),  # not installed
        ({"images": {"validation_dir": "x"}}, "requires --train_dir"),
        ({"model": {"model_name_or_path": "x"}}, "config_overrides is for new models"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, greys, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", greys, **options)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_foreign_and_finished_folders_are_refused(tmp_path, greys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(chapter.tex\)"):
        run(tmp_path / "thesis", greys)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    for model_of_another in ("config.json", "preprocessor_config.json"):
        (tmp_path / model_of_another / "folder").mkdir(parents=True)
        (tmp_path / model_of_another / "folder" / model_of_another).write_text("{}")
        with pytest.raises(ValueError, match="holds other files"):
            run(tmp_path / model_of_another / "folder", greys)
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "model.safetensors").write_text("weights")
    (tmp_path / "converted" / "run.json").write_text('{"recipe": {"converted from": "model.ckpt-1"}}')
    with pytest.raises(ValueError, match="holds a model whose run"):
        run(tmp_path / "converted", greys)
    assert (tmp_path / "converted" / "model.safetensors").read_text() == "weights"
    run(tmp_path / "done", greys, max_steps=1)
    with pytest.raises(ValueError, match="finished run"):
        run(tmp_path / "done", greys, max_steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2}, "--seed 1, not 2"),
        ({"images": {"train_val_split": 0.5}}, "--train_val_split None, not 0.5"),
        ({"model": {"config_overrides": "n_layer=1"}}, "n_embd = 32, this run 128"),
        ({"objective": "masked"}, "has --objective = causal, this run masked"),
    ],
)
def test_another_run_does_not_resume(tmp_path, greys, options, message):
    run(tmp_path, greys, max_steps=2, save_strategy="steps", save_steps=1)
    (tmp_path / "records.json").unlink()  # as if interrupted at its very end
    (tmp_path / "checkpoint-9").mkdir()  # and one that was never finished writing
    with pytest.raises(ValueError, match=message):
        run(tmp_path, greys, max_steps=2, **options)
    run(tmp_path, greys, max_steps=2)


def test_a_run_of_an_older_version_is_not_resumed(tmp_path, greys):
    run(tmp_path, greys, max_steps=2, save_strategy="steps", save_steps=1)
    (tmp_path / "records.json").unlink()
    begun = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(begun | {"identity": "9f86d081884c7d65"}))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="started by an older version of hf_igpt"):
        run(tmp_path, greys, max_steps=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_begins_with_its_resolved_arguments(tmp_path, greys):
    run(tmp_path, greys, max_steps=4, eval_strategy="steps", eval_steps=0.5)
    begun = json.loads((tmp_path / "run.json").read_text())
    found = begun["arguments"]
    assert (found["learning_rate"], found["per_device_train_batch_size"], found["eval_steps"]) == (1e-3, 16, 2)
    assert (found["warmup_steps"], found["size"], found["seed"]) == (0, "tiny", 1)
    assert not any(name.endswith("_token") for name in found)
    assert begun["identity"]["num_colors"] is None and begun["identity"]["seed"] == 1


def test_paths_may_be_path_objects_when_resuming(tmp_path, greys):
    options = {
        "model": {"image_processor_name": Path(greys)},
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    run(tmp_path, greys, **options)
    (tmp_path / "records.json").unlink()
    run(tmp_path, greys, **options)
    assert (tmp_path / "records.json").is_file()


class NetworkDown(Exception):
    """As the transport errors of the Hub's client: no OSError."""


def test_a_failed_push_of_a_checkpoint_does_not_end_training(tmp_path, capsys):
    def push(folder, message):
        raise NetworkDown("no route")

    state, control = TrainerState(global_step=3, is_world_process_zero=True), TrainerControl()
    PushCheckpoints(push).on_save(PretrainingArguments(output_dir=str(tmp_path), use_cpu=True), state, control)
    assert "Not pushed: NetworkDown: no route" in "".join(capsys.readouterr())


def test_pushes_go_where_they_are_told(tmp_path, model, tokens):
    pushed = []

    def publish(folder, repo_id, *, message, token, revision):
        pushed.append((Path(folder), repo_id, message, token, revision))

    arguments = PretrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, eval_strategy="no", hub_token="mine", hub_revision="main"
    )
    trainer = ImageGPTTrainer(model, args=arguments, publish=publish)
    trainer.hub_model_id = "org/name"
    trainer.push_to_hub("Now", token="theirs", revision="other")
    trainer.push_to_hub()
    assert pushed == [
        (tmp_path, "org/name", "Now", "theirs", "other"),
        (tmp_path, "org/name", "End of training", "mine", "main"),
    ]
    arguments.push_to_hub = True
    with pytest.raises(ValueError, match=r"publish=hf_igpt\.publishing\.hub\.push"):
        ImageGPTTrainer(model, args=arguments)


def test_resuming_from_elsewhere_needs_a_folder_of_its_own(tmp_path, greys):
    run(tmp_path / "first", greys, max_steps=2, save_strategy="steps", save_steps=1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("mine")
    elsewhere = {"max_steps": 3, "resume_from_checkpoint": str(tmp_path / "first" / "checkpoint-2")}
    with pytest.raises(ValueError, match="holds other files"):
        run(tmp_path / "thesis", greys, **elsewhere)
    run(tmp_path / "second", greys, **elsewhere)
    assert (tmp_path / "second" / "model.safetensors").is_file()


def test_bad_flags_end_scripts_in_one_line(tmp_path, monkeypatch, capsys):
    for flags in (["--size", "huge"], ["--no_such_flag"], ["--max_minutes", "-1"], ["--train_dir", str(tmp_path)]):
        script = str(SCRIPTS / "run_pretrain.py")
        monkeypatch.setattr(sys, "argv", [script, "--output_dir", str(tmp_path / "o"), *flags])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        said = capsys.readouterr().err
        assert ended.value.code == 2 and "error: " in said.splitlines()[-1], said
        assert not (tmp_path / "o").exists()


# -- images that are not square ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tall(tmp_path_factory, greys):
    """A run on images of 8x4."""
    folder = tmp_path_factory.mktemp("tall") / "run"
    options = {"max_steps": 20, "num_samples": 4, "eval_strategy": "steps", "eval_steps": 10}
    augmentation = {"random_flip": True, "pad_crop": True}
    return folder, run(folder, greys, images={"image_size": "8x4"} | augmentation, **options)


def test_a_run_on_images_that_are_not_square(tall):
    folder, records = tall
    model, processor = AutoModelForCausalLM.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    assert (model.config.n_positions, processor.token_grid()) == (32, (8, 4))
    assert {record.image_size for record in records} == {(8, 4)}
    assert describe_images(records[0]) == "scikit-learn digits, 8x4, 16 colours"
    found = {record.baseline or describe_network(record): record.value for record in records}
    assert found["left-and-up trigram"] < found["unigram"] < found["uniform"]
    assert Image.open(folder / "samples" / "step-0000020.png").size == (2 * (48 + 4) + 4, 2 * (96 + 4) + 4)
    held_out = data.load_images(DataArguments(max_eval_samples=50), seed=1)["validation"]
    rows = torch.from_numpy(data.token_array(data.tokenize(held_out, processor)).astype(np.int64))
    assert records[0].value == pytest.approx(model(labels=rows).loss.item(), rel=1e-5)


def test_all_that_follows_on_images_that_are_not_square(tall, tmp_path, greys, capsys):
    folder, _ = tall
    (tmp_path / "photos").mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 33, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    photos = [str(tmp_path / "photos")]
    model, processor = AutoModelForCausalLM.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    tokens = processor([Image.open(tmp_path / "photos" / f"{i}.png") for i in range(2)], return_tensors="pt")[
        "input_ids"
    ]
    drawn = complete(model, processor, tokens=tokens, rows=3, num_completions=2, return_tokens=True)
    assert torch.equal(drawn[:, :, :12], tokens[:, None, :12].expand(-1, 2, -1))
    with pytest.raises(ValueError, match="between 0 and the image's height, 8; found 9"):
        complete(model, processor, tokens=tokens, rows=9)
    hidden = find_hidden(processor, (0, 0, 0.5, 0.25), (33, 20))  # of the photo, which is cropped to columns 11..20
    assert hidden.shape == (8, 4) and hidden[:2, :3].all() and hidden.sum() == 6
    with pytest.raises(ValueError, match=r"shape \(4, 8\); the image has 8x4 or 20x33 pixels \(height x width\)"):
        find_hidden(processor, np.ones((4, 8), dtype=bool), (33, 20))
    complete_from = pipeline("image-completion", model=str(folder))
    assert [image.size for image in complete_from(f"{photos[0]}/0.png", rows=5, num_completions=2)] == [(4, 8)] * 2
    options = {"output_dir": str(tmp_path / "drawn"), "images": photos, "num_completions": 2, "particles": [2]}
    sample_images(SampleArguments(str(folder), num_images=2, **options), DataArguments())
    sample_images(SampleArguments(str(folder), box=[0.0, 0.0, 0.5, 0.5], **options), DataArguments())
    scored = score(ScoreArguments(str(folder), photos, output_dir=str(tmp_path / "score")), DataArguments())
    assert scored[0].image_size == (8, 4)
    images = DataArguments(max_train_samples=150, max_eval_samples=60)
    probed = probe(ProbeArguments([str(folder)], str(tmp_path / "probe"), layers=[1], baselines=False), images)
    assert {record.image_size for record in probed} == {(8, 4)}
    fine = {"use_cpu": True, "disable_tqdm": True, "max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    for name, source, given in (
        ("tuned", {"model_name_or_path": str(folder)}, {}),
        ("new", {"image_processor_name": greys, "config_overrides": SMALL}, {"image_size": "8x4"}),
    ):
        arguments = FinetuningArguments(output_dir=str(tmp_path / name), **fine)
        records = finetune(ModelArguments(**source), DataArguments(max_eval_samples=60, **given), arguments)
        assert {record.image_size for record in records} == {(8, 4)}
        assert AutoImageProcessor.from_pretrained(tmp_path / name).token_grid() == (8, 4)
    to = str(tmp_path / "report")
    page = report(ReportArguments([str(folder), str(tmp_path / "tuned")], output_dir=to), DataArguments())
    assert "scikit-learn digits, 8x4, 16 colours" in page.read_text()
    write_repository(folder, tmp_path / "repository", "someone/tall")
    card = (tmp_path / "repository" / "README.md").read_text()
    assert "It sees 8x4 pixels" in card and "central windows\nof 8x4" in card and "squares" not in card
    ImageGPTImageProcessorPil(clusters=np.load(greys), size=(4, 8)).save_pretrained(tmp_path / "wide")
    for options, message in (
        ({"images": {"image_size": "4x8"}, "model": {"image_processor_name": None}}, "which have as many pixels"),
        ({"model": {"image_processor_name": str(tmp_path / "wide")}}, "trained on images of 8x4, .* makes 4x8"),
    ):
        source = {"model_name_or_path": str(folder), "config_overrides": None} | options["model"]
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "wrong", greys, source, options.get("images"))


def test_palettes_of_images_that_are_not_square(tmp_path):
    folder = tmp_path / "palette"
    images = DataArguments(image_size="4x8", max_train_samples=50)
    records = fit_clusters(ClustersArguments(output_dir=str(folder), num_colors=4), images)
    assert AutoImageProcessor.from_pretrained(folder).token_grid() == records[0].image_size == (4, 8)
    assert len(data.sample_pixels(data.load_images(images)["train"], 10**6, (4, 8))) == 50 * 32
