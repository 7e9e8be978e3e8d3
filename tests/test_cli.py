"""The command line: --help loads no model; our classes are registered in whatever order things are imported."""

import errno
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import hf_igpt
from hf_igpt.commands import cli, score
from hf_igpt.commands.arguments import (
    ClustersArguments,
    PlanArguments,
    ProbeArguments,
    SampleArguments,
    ScoreArguments,
)
from hf_igpt.commands.cli import find_device, parse_arguments, run_script
from hf_igpt.data.arguments import DataArguments
from hf_igpt.training.arguments import FinetuningArguments, ModelArguments, PretrainingArguments


ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("run_*.py"))
HEAVY = ["transformers.modeling_utils", "transformers.trainer", "datasets", "sklearn", "matplotlib", "evaluate"]


def run_python(code):
    # PEFT, where it is installed, makes transformers' arguments load its models.
    code = f"import sys; sys.modules['peft'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_loads_no_model(script):
    said = run_python(
        f"""
import runpy
sys.argv = [{script.name!r}, "--help"]
try:
    runpy.run_path({str(script)!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
print("LOADED", [name for name in {HEAVY} if name in sys.modules])
"""
    )
    assert "usage: " in said and "LOADED []" in said, said[-300:]


@pytest.mark.parametrize("first", ["import hf_igpt", "from transformers import AutoConfig, AutoModel, pipeline"])
def test_registration_in_any_order(first):
    run_python(
        f"""
{first}
import hf_igpt
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
config = AutoConfig.for_model("imagegpt", n_layer=1, n_embd=16, n_head=1, n_positions=4, vocab_size=3)
assert type(config) is hf_igpt.ImageGPTConfig
assert type(AutoModel.from_config(config)) is hf_igpt.ImageGPTModel
model = AutoModelForCausalLM.from_config(config)
assert type(model) is hf_igpt.ImageGPTForCausalImageModeling
assert IMAGE_PROCESSOR_MAPPING[type(config)]["pil"] is hf_igpt.ImageGPTImageProcessorPil
palette = [[-1.0, -1, -1], [1.0, 1, 1]]
processor = hf_igpt.ImageGPTImageProcessorPil(clusters=palette, size=2)
assert type(pipeline("image-completion", model, image_processor=processor)) is hf_igpt.ImageCompletionPipeline
"""
    )


def test_registration_can_wait_and_be_repeated():
    run_python(
        """
import os
os.environ["HF_IGPT_REGISTER"] = "later"
import hf_igpt
assert "transformers" not in sys.modules
assert {"ImageGPTConfig", "sample", "complete", "extract"} <= set(dir(hf_igpt))
from transformers import AutoConfig
assert type(AutoConfig.for_model("imagegpt")).__module__.startswith("transformers.")
for _ in range(2):
    hf_igpt.register()
assert type(AutoConfig.for_model("imagegpt")) is hf_igpt.ImageGPTConfig
try:
    hf_igpt.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""
    )


def test_a_flag_that_is_none_is_named_with_its_neighbour(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_plan.py", "--sise", "s", "--devices", "2"])
    with pytest.raises(ValueError, match=r"There is no flag --sise s; did you mean --size\?"):
        parse_arguments(PlanArguments, description="")


# -- arguments that cannot be, before any work -------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
NEEDED = {
    ProbeArguments: {"model_name_or_path": ["x"]},
    SampleArguments: {"model_name_or_path": "x"},
    ScoreArguments: {"model_name_or_path": "x", "num_held_out": 1},
    PretrainingArguments: {"use_cpu": True},
    FinetuningArguments: {"use_cpu": True},
}
ALL = (ClustersArguments, DataArguments, ModelArguments, PlanArguments, *NEEDED)
REFUSED = [  # (arguments, field, value, what the one sentence says)
    (ClustersArguments, "num_colors", 0, "from 1 to 65535; found 0"),
    (ClustersArguments, "num_colors", 65536, "from 1 to 65535"),
    (ClustersArguments, "num_pixels", 0, "at least 1"),
    (ClustersArguments, "seed", 2**32, "from 0 to 4294967295"),
    (DataArguments, "max_train_samples", 0, "at least 1; found 0"),
    (DataArguments, "max_eval_samples", 0, "at least 1"),
    (DataArguments, "image_size", 0, "from 1 to 4096"),
    (DataArguments, "image_size", 10**6, "from 1 to 4096"),
    (DataArguments, "train_val_split", NAN, "between 0 and 1 and finite"),
    (DataArguments, "train_val_split", 1.0, "between 0 and 1; found 1.0"),
    (DataArguments, "preprocessing_num_workers", 0, "at least 1"),
    (ModelArguments, "num_colors", 0, "from 1 to 65535"),
    (SampleArguments, "num_images", -1, "at least 0; found -1"),
    (SampleArguments, "num_held_out", -1, "at least 0"),
    (SampleArguments, "rows", -1, "at least 0"),
    (SampleArguments, "num_completions", 0, "at least 1"),
    (SampleArguments, "batch_size", 0, "at least 1"),
    (SampleArguments, "temperature", 0.0, "positive; found 0.0"),
    (SampleArguments, "temperature", NAN, "positive and finite; found nan"),
    (SampleArguments, "top_k", -1, "at least 0"),
    (SampleArguments, "top_p", 0.0, "above 0 and at most 1"),
    (SampleArguments, "top_p", 1.1, "above 0 and at most 1"),
    (SampleArguments, "split_seed", -1, "from 0 to 4294967295"),
    (ScoreArguments, "num_maps", 0, "at least 1"),
    (ScoreArguments, "batch_size", 0, "at least 1"),
    (ProbeArguments, "regularization", [1.0, INF], "positive numbers and finite"),
    (ProbeArguments, "labels_per_class", [-1], "positive numbers"),
    (ProbeArguments, "seed", -1, "from 0 to 4294967295"),
    *(
        (training, field, value, words)
        for training in (PretrainingArguments, FinetuningArguments)
        for field, value, words in (
            ("per_device_train_batch_size", 0, "at least 1; found 0"),
            ("per_device_eval_batch_size", 0, "at least 1"),
            ("gradient_accumulation_steps", 0, "at least 1"),
            ("max_minutes", NAN, "positive and finite; found nan"),
            ("max_minutes", -1.0, "positive; found -1.0"),
            ("max_steps", 0, "at least 1, or -1 for none"),
            ("max_steps", -7, "at least 1, or -1 for none"),
            ("num_train_epochs", 0.0, "positive"),
            ("learning_rate", -1.0, "at least 0"),
            ("adam_beta2", 1.0, "at least 0 and below 1"),
            ("warmup_epochs", -1.0, "at least 0"),
            ("logging_steps", 0, "positive"),
            ("eval_steps", NAN, "positive and finite"),
            ("save_total_limit", -1, "at least 0"),
            ("seed", -1, "from 0 to 4294967295"),
            ("fp16", True, "needs a GPU, on a CPU it would be float32"),
            ("optim", "adamw_bnb_8bit", "adamw_bnb_8bit.*: You need to install `bitsandbytes`"),
            ("optim", "galore_adamw", "galore_adamw: .*install"),
            ("optim_args", "x", "optim_args x"),
            ("lr_scheduler_type", "cosine_with_min_lr", "cosine_with_min_lr, .*min_lr"),
            ("dataloader_persistent_workers", True, "give --dataloader_num_workers"),
        )
    ),
    (PretrainingArguments, "lr_scheduler_kwargs", {"a": 1}, "unexpected keyword argument"),
    (PretrainingArguments, "num_samples", -1, "at least 0"),
    (PretrainingArguments, "metric_for_best_model", "accuracy", "one of .*nats_per_pixel.* here; found accuracy"),
    (FinetuningArguments, "metric_for_best_model", "f1", "one of .*accuracy.* here; found f1"),
    (FinetuningArguments, "early_stopping_patience", -1, "at least 0"),
    (FinetuningArguments, "generative_loss_weight", NAN, "at least 0 and finite"),
]


@pytest.mark.parametrize(("kind", "field", "value", "words"), REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(kind, field, value, words):
    with pytest.raises(ValueError, match=words) as refused:
        kind(**(NEEDED.get(kind, {}) | {field: value}))
    assert f"--{field}" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ALL)
def test_no_number_may_be_nan_or_absurdly_negative(kind):
    """Every field that takes numbers, also those that are added later."""
    numbers = [
        field for field in fields(kind) if field.init and ("int" in str(field.type) or "float" in str(field.type))
    ]
    assert numbers
    for field in numbers:
        many = "list" in str(field.type)
        for value in (NAN, -INF, INF):
            with pytest.raises(ValueError, match=f"--{field.name} (is|are) "):
                kind(**(NEEDED.get(kind, {}) | {field.name: [value] if many else value}))
        if field.name not in ("layers", "local_rank", "ddp_bucket_cap_mb"):
            with pytest.raises(ValueError, match=f"--{field.name} (is|are) "):
                kind(**(NEEDED.get(kind, {}) | {field.name: [-7] if many else -7}))


def test_what_may_be_is_taken():
    arguments = PretrainingArguments(
        use_cpu=True, max_steps=-1, metric_for_best_model="eval_loss", save_total_limit=0, learning_rate=0.0, bf16=True
    )
    assert (arguments.save_total_limit, arguments.learning_rate, arguments.bf16) == (0, 0.0, True)
    for optim in ("sgd", "adafactor", "adamw_torch"):
        PretrainingArguments(use_cpu=True, optim=optim)
    least = {"lr_scheduler_kwargs": {"min_lr": 1e-5}, "lr_scheduler_type": "cosine_with_min_lr"}
    assert PretrainingArguments(use_cpu=True, **least).lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert ProbeArguments(["x"], layers=[-1]).layers == [-1]


def test_devices_that_are_not_there():
    assert find_device(None).type in ("cpu", "cuda") and find_device("cpu") == torch.device("cpu")
    for name in ("nonsense", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=f"--device {name} cannot be used here"):
            find_device(name)


def end_of(monkeypatch, capsys, error):
    """Status and last words of a script that ends with `error`."""

    def fail(args):
        raise error

    monkeypatch.setattr(score, "score", fail)
    monkeypatch.setattr(hf_igpt, "register", lambda: None)
    monkeypatch.setattr(sys, "argv", ["run_score.py", "--model_name_or_path", "x", "--num_held_out", "1"])
    monkeypatch.setattr(cli, "quiet_libraries", lambda: None)
    with pytest.raises(SystemExit) as ended:
        run_script("hf_igpt.commands.score:score", ScoreArguments, description="")
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "model.png"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("basic_ios::clear: iostream error"),  # torch.save
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        OSError("100000 requested and 8176 written"),  # numpy's
    ],
)
def test_a_full_disk_is_said_in_a_sentence(error, monkeypatch, capsys):
    status, said = end_of(monkeypatch, capsys, error)
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith("run_score.py: error: the disk is full; make room and repeat the command (")


def test_a_missing_package_is_said_in_a_sentence(monkeypatch, capsys):
    status, said = end_of(monkeypatch, capsys, ImportError("this needs TensorFlow:\npip install it"))
    assert (status, said) == (2, "run_score.py: error: this needs TensorFlow: pip install it\n")


def test_faults_of_ours_keep_their_traceback(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="ours"):
        end_of(monkeypatch, capsys, RuntimeError("ours"))
