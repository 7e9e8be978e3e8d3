"""Several processes, on CPUs with gloo: loading in shards, FSDP, DDP, streams, and resuming with fewer of them.

One launch of two processes and one of one serve all tests; `processes.py` is what they run.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from conftest import randomized, small_config
from processes import interrupt, launch_settings, pretrain
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoImageProcessor, AutoModelForCausalLM, Trainer

from hf_igpt import ImageGPTConfig, ImageGPTForCausalImageModeling
from hf_igpt.clusters import to_unit_range
from hf_igpt.data import digits
from hf_igpt.evaluation.records import read_records


TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "scripts" / "accelerate"
FLOAT32 = {"ACCELERATE_MIXED_PRECISION": "no"}
SMALL = "n_layer=2,n_embd=32,n_head=2"
STEPS, AT = 6, 3  # of a run, and where it is interrupted
RUN = {"max_steps": STEPS, "save_steps": AT, "eval_steps": AT, "logging_steps": 1, "seed": 1, "save_total_limit": None}
STREAM_STEPS, PER_PROCESS = 8, 4
# Masks and flips over four epochs of three steps of 16 images, with a checkpoint in the middle of the second.
PER_EPOCH, IN_EPOCH = 3, 4
EPOCHS = {
    "objective": "masked",
    "images": {"max_train_samples": 48, "max_eval_samples": 16, "random_flip": True},
    "max_steps": 10,
    "save_steps": IN_EPOCH,
    "eval_steps": IN_EPOCH,
    "dataloader_num_workers": 1,
    "record": True,
}


def launch(folder, n_processes, jobs):
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    done = subprocess.run(
        [*command, str(TESTS / "processes.py"), str(folder / "jobs.json")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where all runs are, by name; "said" is what the launch of two processes printed."""
    folder = tmp_path_factory.mktemp("processes")
    greys = to_unit_range(np.repeat(np.linspace(0, 255, 16)[:, None], 3, axis=1))
    np.save(folder / "greys.npy", greys)
    torch.manual_seed(0)
    randomized(ImageGPTForCausalImageModeling(small_config(use_bias=True))).save_pretrained(folder / "whole")

    for name, rows in (
        ("train-0", (0, 6)),
        ("train-1", (6, 12)),
        ("train-2", (12, 18)),
        ("train-3", (18, 24)),
        ("valid", (24, 29)),
    ):
        (folder / "files").mkdir(exist_ok=True)
        images = digits().select(range(*rows)).cast_column("image", datasets.Image(decode=False))
        images.to_parquet(folder / "files" / f"{name}.parquet")
    stream = run(folder, "stream") | {
        "images": {
            "train_dir": f"{folder}/files/train-*.parquet",
            "validation_dir": f"{folder}/files/valid.parquet",
            "streaming": True,
            "random_flip": True,
            "image_size": 8,
        },
        "record": True,
        "per_device_train_batch_size": PER_PROCESS,
        "dataloader_num_workers": 2,
        "max_steps": STREAM_STEPS,
    }
    fitting = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    fitting["model"] = {"num_colors": 4, "config_overrides": SMALL}
    fsdp, ddp = (launch_settings(CONFIGS / name) for name in ("fsdp2_8gpu.yaml", "ddp_8gpu.yaml"))
    unsaved = {"ema_decay": 0.6, "eval_steps": 1, "save_strategy": "no"}
    said = launch(
        folder,
        2,
        [
            ["load_sharded", {"source": str(folder / "whole"), "report": str(folder / "report")}],
            ["refuse", {"report": str(folder / "refused"), "train_dir": str(folder / "nowhere")}],
            ["pretrain", run(folder, "ddp", ddp | FLOAT32)],
            ["pretrain", run(folder, "fsdp", fsdp | FLOAT32, num_samples=2, milestones="0.5")],
            ["pretrain", run(folder, "checkpoints of bf16", fsdp, max_steps=2, save_steps=2, eval_steps=2)],
            ["pretrain", run(folder, "averaged ddp", ddp | FLOAT32, ema_decay=0.6)],
            ["pretrain", run(folder, "averaged unsaved", fsdp | FLOAT32, **unsaved)],
            ["pretrain", run(folder, "averaged fsdp", fsdp | FLOAT32, ema_decay=0.6, milestones="0.5")],
            ["pretrain", run(folder, "palette", ddp | FLOAT32, **fitting)],
            ["pretrain", run(folder, "epochs", ddp | FLOAT32, **EPOCHS)],
            ["interrupt", {"folder": f"{folder}/epochs", "step": IN_EPOCH, "to": f"{folder}/epochs resumed"}],
            ["pretrain", run(folder, "epochs resumed", ddp | FLOAT32, **EPOCHS)],
            ["pretrain", stream],
            ["interrupt", {"folder": f"{folder}/stream", "step": AT, "to": f"{folder}/stream resumed"}],
            ["pretrain", stream | {"folder": f"{folder}/stream resumed"}],
        ],
    )
    (folder / "said").write_text(said)
    for name in ("fsdp", "ddp", "averaged fsdp"):
        interrupt(folder / name, AT, folder / f"{name} resumed")
    for name in ("fsdp", "averaged fsdp"):
        interrupt(folder / name, STEPS, folder / f"{name} ended")
    jobs = [["pretrain", run(folder, name, fsdp | FLOAT32)] for name in ("fsdp resumed", "fsdp ended")]
    for name in ("averaged fsdp resumed", "averaged fsdp ended"):
        jobs.append(["pretrain", run(folder, name, fsdp | FLOAT32, ema_decay=0.6)])
    launch(folder, 1, jobs)
    return folder


def run(folder, name, environment=None, **options):
    """The arguments of `pretrain` for the run called `name`."""
    model = {"image_processor_name": f"{folder}/greys.npy", "config_overrides": SMALL}
    images = {"max_eval_samples": 51, "random_flip": True}
    run = {"folder": f"{folder}/{name}", "environment": environment, "model": model, "images": images}
    return run | RUN | {"num_samples": 0} | options


@pytest.fixture(scope="module")
def one(place):
    """The run that was never interrupted, on one process and without any launcher."""
    pretrain(**run(place, "one"))
    return place / "one"


def largest_difference(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


# -- loading in shards -------------------------------------------------------------------------------------------------


def test_a_sharded_model_is_the_whole_one(place):
    found = json.loads((place / "report").read_text())
    assert found["logits"] <= 1e-5 and found["gradients"] <= 1e-5
    whole = {name: list(tensor.shape) for name, tensor in load_file(place / "whole" / "model.safetensors").items()}
    halved = {name for name, shape in found["shapes"].items() if np.prod(shape) * 2 == np.prod(whole[name])}
    assert halved == {name for name in whole if "wte" not in name} and "transformer.wte.weight" in found["shapes"]
    assert largest_difference(place / "whole", place / "report-model") == 0


def test_the_plan_is_in_no_file(place):
    config = ImageGPTConfig.from_pretrained(place / "whole")
    assert not any("plan" in name for name in config.to_dict())
    assert not any("plan" in name for name in json.loads((place / "report-model" / "config.json").read_text()))
    model = ImageGPTForCausalImageModeling(config)
    modules = dict(model.named_modules())
    assert model.fsdp_plan
    for name in model.fsdp_plan:
        assert name.replace("*", "0") in modules, name


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddp", "fsdp", "ddp resumed", "fsdp resumed"])
def test_runs_are_one(place, one, name):
    """Two processes, and one that goes on from what two have left, against one that was never interrupted."""
    if name == "ddp resumed":
        pretrain(**run(place, name))
    assert losses(place / name) == pytest.approx(losses(one), rel=1e-5)
    assert largest_difference(one, place / name) <= 1e-5
    found, expected = (read_records(folder / "records.json")[0] for folder in (place / name, one))
    assert found.value == pytest.approx(expected.value, rel=1e-5) and found == replace(expected, value=found.value)


def test_averages_of_weights_are_one(place):
    """Evaluated and saved as with one process: replicated, in shards, and after resuming shards with one process."""
    pretrain(**run(place, "averaged", ema_decay=0.6))
    for name in ("averaged ddp", "averaged fsdp", "averaged fsdp resumed", "averaged fsdp ended"):
        assert losses(place / name) == pytest.approx(losses(place / "averaged"), rel=1e-5)
        assert largest_difference(place / "averaged", place / name) <= 1e-5
        found, expected = (read_records(place / each / "records.json")[0].value for each in (name, "averaged"))
        assert found == pytest.approx(expected, rel=1e-5)
    assert losses(place / "averaged unsaved") == pytest.approx(losses(place / "averaged"), rel=1e-5)
    milestone = place / "averaged fsdp" / "milestones" / f"step-{AT:07d}"
    assert largest_difference(place / "averaged" / f"checkpoint-{AT}", milestone) <= 1e-5


@pytest.mark.parametrize("name", ["fsdp", "fsdp resumed"])
def test_the_optimisers_state_is_one(place, one, name):
    dcp_to_torch_save(place / name / f"checkpoint-{STEPS}" / "optimizer_0", place / "optimizer.pt")
    found = torch.load(place / "optimizer.pt", weights_only=False)["optimizer"]["state"]
    model = AutoModelForCausalLM.from_pretrained(one)
    decayed = Trainer.get_decay_parameter_names(None, model)
    names = sorted((name for name, _ in model.named_parameters()), key=lambda name: name not in decayed)
    expected = torch.load(one / f"checkpoint-{STEPS}" / "optimizer.pt")["state"]
    assert len(expected) == len(found) == len(names)
    for index, name in enumerate(names):
        for part in ("exp_avg", "exp_avg_sq", "step"):
            assert (found[name][part] - expected[index][part]).abs().max() <= 1e-5, (name, part)


def test_what_a_sharded_run_leaves_behind(place):
    folder = place / "fsdp"
    checkpoint = {path.name for path in (folder / f"checkpoint-{AT}").iterdir()}
    assert {"pytorch_model_fsdp_0", "optimizer_0", "config.json", "preprocessor_config.json"} <= checkpoint
    assert "model.safetensors" not in checkpoint
    for whole in (folder, folder / "milestones" / f"step-{AT:07d}"):
        assert AutoModelForCausalLM.from_pretrained(whole).generate().shape == (1, 65)
    assert "No samples are drawn during training" in (place / "said").read_text()
    assert not (folder / "samples").exists()


def test_a_sharded_run_that_had_ended_is_not_trained_further(place):
    """It was killed after its last checkpoint: what is left is to load the best model and to measure."""
    records = [read_records(place / name / "records.json") for name in ("fsdp", "fsdp ended")]
    for one, other in zip(*records, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-6) and one.images_seen == other.images_seen
    assert largest_difference(place / "fsdp", place / "fsdp ended") == 0
    assert losses(place / "fsdp") == losses(place / "fsdp ended")


def test_bfloat16_shards_train(place, one):
    """In a folder whose name begins as those of checkpoints do, which hold no whole model."""
    assert AutoModelForCausalLM.from_pretrained(place / "checkpoints of bf16").generate().shape == (1, 65)
    assert losses(place / "checkpoints of bf16") == pytest.approx(losses(one)[:2], rel=1e-2)
    assert (
        json.loads((place / "checkpoints of bf16" / "run.json").read_text())["recipe"]["precision"]
        == "bfloat16 autocast"
    )


def test_gradient_checkpointing_changes_nothing(place, one):
    """With FSDP, fsdp2_8gpu.yaml switches it on, so that `test_runs_are_one` tests it."""
    pretrain(**run(place, "checkpointed", gradient_checkpointing=True))
    assert losses(place / "checkpointed") == pytest.approx(losses(one), rel=1e-6)
    assert largest_difference(one, place / "checkpointed") <= 1e-6


def test_two_processes_fit_one_palette(place):
    assert len(AutoImageProcessor.from_pretrained(place / "palette").clusters) == 4


# -- epochs ------------------------------------------------------------------------------------------------------------


def by_step(folder, n_processes):
    """step -> the rows of all processes, tokens and masks together, in an order of their own."""
    steps = {}
    for process in range(n_processes):
        for step, tokens, masks in torch.load(folder / f"seen-{process}.pt"):
            steps.setdefault(step, []).extend(torch.cat([tokens, masks.long()], dim=1).tolist())
    return {step: sorted(rows) for step, rows in steps.items()}


def test_two_processes_draw_what_one_draws_in_every_epoch(place):
    """Flips and masks, row by row; also of a run that two processes, or one, resumed in the middle of an epoch."""
    pretrain(**run(place, "epochs of one", **EPOCHS))
    expected = by_step(place / "epochs of one", 1)
    assert list(expected) == list(range(10)) and {len(rows) for rows in expected.values()} == {16}
    epochs = [[row for step in range(first, first + PER_EPOCH) for row in expected[step]] for first in (0, 3, 6)]
    for one, other in pairwise(epochs):
        masks, others = ({tuple(row[64:]) for row in rows} for rows in (one, other))
        assert len(masks) == 48 and not masks & others
        assert 0 < len({tuple(row[:64]) for row in one} & {tuple(row[:64]) for row in other}) < 48  # some are flipped
    assert by_step(place / "epochs", 2) == expected
    rest = {step: rows for step, rows in expected.items() if step >= IN_EPOCH}
    assert by_step(place / "epochs resumed", 2) == rest
    (place / "epochs of one resumed").mkdir()
    interrupt(place / "epochs of one", IN_EPOCH, place / "epochs of one resumed")
    pretrain(**run(place, "epochs of one resumed", **EPOCHS))
    assert by_step(place / "epochs of one resumed", 1) == rest
    for name in ("epochs", "epochs resumed", "epochs of one resumed"):
        assert losses(place / name)[-6:] == pytest.approx(losses(place / "epochs of one")[-6:], rel=1e-5), name
        assert largest_difference(place / "epochs of one", place / name) <= 1e-5, name


# -- streams -----------------------------------------------------------------------------------------------------------


def seen(folder):
    """What each of the two processes was trained on: [(step, tokens (B, N), masks or None), …]."""
    return [torch.load(folder / f"seen-{process}.pt") for process in range(2)]


def test_processes_train_on_shares_of_a_stream(place):
    shares = []
    for process in seen(place / "stream"):
        assert [step for step, *_ in process] == list(range(STREAM_STEPS))
        assert all(tokens.shape == (PER_PROCESS, 64) for _, tokens, _ in process)
        rows = torch.cat([tokens for _, tokens, _ in process]).reshape(-1, 8, 8)
        shares.append({min(tuple(row.flatten().tolist()), tuple(row.flip(1).flatten().tolist())) for row in rows})
    assert not shares[0] & shares[1]
    assert 8 < len(shares[0]) <= 12 and 8 < len(shares[1]) <= 12  # of the 12 images of each process's two files


def test_a_resumed_stream_goes_on_where_it_was(place):
    for whole, resumed in zip(seen(place / "stream"), seen(place / "stream resumed"), strict=True):
        assert [step for step, *_ in resumed] == list(range(AT, STREAM_STEPS))
        assert all(torch.equal(a, b) for (_, a, _), (_, b, _) in zip(whole[AT:], resumed, strict=True))
    assert largest_difference(place / "stream", place / "stream resumed") == 0


def test_an_error_while_loading_reaches_every_process(place):
    """The main process fails first; the others must not wait for it."""
    for rank in (0, 1):
        assert "No images could be loaded from" in (place / f"refused-{rank}").read_text()


# -- configurations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_configurations(file):
    command = file.read_text().splitlines()[0]
    assert command.startswith(f"# accelerate launch --config_file scripts/accelerate/{file.name} ")
    flags = command.replace("RANK", "0").replace("ADDRESS", "localhost").replace(" ...", "").split()[3:]
    flags[flags.index("--config_file") + 1] = str(file)
    arguments, config, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    assert arguments.num_processes == config.num_processes and arguments.mixed_precision == "bf16"
    kinds = {"ddp": "multi_gpu", "fsdp2": "use_fsdp", "multi": "use_fsdp", "deepspeed": "use_deepspeed", "one": None}
    kind = kinds[file.stem.split("_")[0]]
    assert [name for name in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(arguments, name)] == [kind][
        : bool(kind)
    ]
    if kind == "use_fsdp":
        settings = launch_settings(file)
        assert settings["FSDP_VERSION"] == "2" and settings["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "ImageGPTBlock"
    if kind == "use_deepspeed":
        arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        assert prepare_deepspeed_cmd_env(arguments)[1]["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
