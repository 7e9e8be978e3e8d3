"""Runs that are interrupted, changed, doubled or diverging: nothing silently wrong, nothing lost."""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as distributed
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from test_training import greys, history, run, weights  # noqa: F401 (a fixture)
from transformers import TrainerCallback, TrainerState

from hf_igpt.commands.finetune import finetune
from hf_igpt.data import DataArguments, load_images, load_labelled_images
from hf_igpt.evaluation.held_out import find_split_seed, select_held_out
from hf_igpt.evaluation.records import read_records
from hf_igpt.training import checkpoints, resuming, runs
from hf_igpt.training.arguments import FinetuningArguments, ModelArguments
from hf_igpt.training.checkpoints import SEAL
from hf_igpt.training.trainer import ImageGPTTrainer, NotFinite


SAVING = {
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 2,
    "eval_steps": 2,
    "save_total_limit": None,
}
IMAGES = {"random_flip": True, "max_train_samples": 40}  # 3 steps an epoch
AVERAGED = {"max_steps": 6, "images": IMAGES, "ema_decay": 0.6} | SAVING


def kill_after_training(whole, folder, step=None):
    """A copy of a finished run as it is if it was killed before its model and records were written."""
    for place in whole.glob("checkpoint-*"):
        if step is None or int(place.name.split("-")[1]) <= step:
            shutil.copytree(place, folder / place.name)
    for name in ("run.json", "preprocessor_config.json", "palette.png"):
        shutil.copy(whole / name, folder)


# -- killed after the last checkpoint ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length",
    [
        {"max_steps": 6},
        {"max_steps": 5},
        {"max_steps": -1, "num_train_epochs": 1.5},
        {"max_steps": -1, "num_train_epochs": 2},
        {"max_steps": 10**6, "max_minutes": 0.05},
    ],
    ids=str,
)
def test_what_was_trained_is_not_trained_further(tmp_path, greys, length, monkeypatch):  # noqa: F811
    options = length | SAVING | {"images": IMAGES}
    expected = run(tmp_path / "whole", greys, **options)
    last = max(int(path.name.split("-")[1]) for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert last == json.loads((tmp_path / "whole" / "trainer_state.json").read_text())["global_step"]
    (tmp_path / "killed").mkdir()
    kill_after_training(tmp_path / "whole", tmp_path / "killed")
    monkeypatch.setattr(ImageGPTTrainer, "training_step", lambda *_, **__: pytest.fail("trained on"))
    records = run(tmp_path / "killed", greys, **options)
    assert records == expected == read_records(tmp_path / "killed" / "records.json")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "killed")[name])
    assert history(tmp_path / "killed") == history(tmp_path / "whole")


def fine_tune(folder, greys, **options):  # noqa: F811
    arguments = FinetuningArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, **({"num_train_epochs": 30, "seed": 1} | options)
    )
    model = ModelArguments(image_processor_name=greys, config_overrides="n_layer=2,n_embd=32,n_head=2")
    return finetune(model, DataArguments(max_train_samples=40, max_eval_samples=50), arguments)


def test_early_stopping_is_not_undone(tmp_path, greys, monkeypatch):  # noqa: F811
    options = {"early_stopping_patience": 1, "learning_rate": 1e-9, "save_total_limit": None}
    expected = fine_tune(tmp_path / "whole", greys, **options)
    assert len(list((tmp_path / "whole").glob("checkpoint-*"))) < 30  # it stopped early
    (tmp_path / "killed").mkdir()
    kill_after_training(tmp_path / "whole", tmp_path / "killed")
    monkeypatch.setattr(ImageGPTTrainer, "training_step", lambda *_, **__: pytest.fail("trained on"))
    assert fine_tune(tmp_path / "killed", greys, **options) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classifier_inputs": "raw"}, "has --classifier_inputs = sos, this run raw"),
        ({"objective": "masked"}, "has --objective = causal, this run masked"),
        ({"generative_loss_weight": 0.5}, "has generative_loss_weight = 1.0, this run 0.5"),
    ],
    ids=str,
)
def test_another_classifier_is_refused_by_its_flag(tmp_path, greys, changed, message, tuned):  # noqa: F811
    kill_after_training(tuned, tmp_path)
    with pytest.raises(ValueError, match=message):
        fine_tune(tmp_path, greys, **changed)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, greys):  # noqa: F811
    folder = tmp_path_factory.mktemp("tuned") / "whole"
    fine_tune(folder, greys, num_train_epochs=1, save_total_limit=None)
    return folder


def test_checkpoints_know_which_images_were_held_out(tmp_path, greys, capsys):  # noqa: F811
    """Before there are records, and in the folders of checkpoints, by the run's own file."""
    run(tmp_path / "run", greys, max_steps=6, images={"max_train_samples": 40}, **SAVING | {"seed": 7})
    (tmp_path / "run" / "records.json").unlink()
    expected = load_images(DataArguments(), seed=7)["validation"]["image"][:5]
    for place in ("run", "run/checkpoint-2"):
        rows, seed = select_held_out(str(tmp_path / place), DataArguments(), 5)
        assert seed == 7 and rows["image"][:] == expected
        assert find_split_seed(str(tmp_path / place), DataArguments(), 42) == 7
        with pytest.raises(ValueError, match="the default --train_val_split, not 0.5"):
            find_split_seed(str(tmp_path / place), DataArguments(train_val_split=0.5), 42)
    model = {"model_name_or_path": str(tmp_path / "run" / "checkpoint-2")}
    tuned = FinetuningArguments(str(tmp_path / "tuned"), use_cpu=True, disable_tqdm=True, num_train_epochs=1, seed=3)
    finetune(ModelArguments(**model), DataArguments(max_train_samples=40), tuned)
    (tmp_path / "tuned" / "records.json").unlink()
    (checkpoint,) = (tmp_path / "tuned").glob("checkpoint-*")
    rows, seed = select_held_out(str(checkpoint), DataArguments(), 5)
    assert seed == 7 and rows["image"][:] == load_labelled_images(DataArguments(), seed=7)["test"]["image"][:5]


# -- changed arguments -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, greys):  # noqa: F811
    whole = tmp_path_factory.mktemp("interrupted") / "whole"
    run(whole, greys, max_steps=6, images=IMAGES, **SAVING)
    return whole


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, greys):  # noqa: F811
    whole = tmp_path_factory.mktemp("averaged") / "whole"
    run(whole, greys, **AVERAGED)
    return whole


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 0.1},
        {"weight_decay": 0.5},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 1e-3},
        {"lr_scheduler_type": "linear"},
        {"warmup_steps": 3},
        {"per_device_train_batch_size": 8},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 16},
        {"bf16": True},
        {"max_grad_norm": 0.1},
        {"data_seed": 5},
        {"max_steps": 8},
        {"optim": "sgd"},
        {"max_minutes": 5.0},
        {"load_best_model_at_end": False},
        {"eval_strategy": "no"},
        {"dataloader_drop_last": True},
        {"neftune_noise_alpha": 5.0},
        {"ema_decay": 0.5},
    ],
    ids=str,
)
def test_another_recipe_is_refused_by_name(tmp_path, greys, interrupted, changed):  # noqa: F811
    kill_after_training(interrupted, tmp_path, step=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (name, *_) = changed
    named = "images_per_step" if "batch" in name or "accumulation" in name else name
    with pytest.raises(ValueError, match=rf"was trained with .*--{named} .*repeat that"):
        run(tmp_path, greys, **({"max_steps": 6, "images": IMAGES} | SAVING | changed))
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != resuming.LOCK}
    assert after == before


def test_the_same_step_may_be_shared_out_otherwise(tmp_path, greys, interrupted):  # noqa: F811
    kill_after_training(interrupted, tmp_path, step=2)
    other = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 2}
    run(tmp_path, greys, **({"max_steps": 6, "images": IMAGES} | SAVING | other))
    for name, tensor in weights(interrupted).items():
        assert (tensor - weights(tmp_path)[name]).abs().max() < 1e-5


@pytest.mark.parametrize("change", ["added", "removed", "replaced"])
def test_other_images_are_refused(tmp_path, greys, change):  # noqa: F811
    """The split is drawn over all files: with others, images that were trained on would be held out."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)

    def draw(name):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{name}.png")

    for i in range(40):
        draw(i)
    options = {"max_steps": 6, "images": {"train_dir": str(tmp_path / "photos"), "train_val_split": 0.3}} | SAVING
    run(tmp_path / "whole", greys, **options)
    (tmp_path / "killed").mkdir()
    kill_after_training(tmp_path / "whole", tmp_path / "killed", step=2)
    if change == "added":
        draw("new")
    elif change == "removed":
        (tmp_path / "photos" / "7.png").unlink()
    else:
        (tmp_path / "photos" / "7.png").write_bytes((tmp_path / "photos" / "8.png").read_bytes() + b" ")
    with pytest.raises(ValueError, match="files were added, removed or replaced"):
        run(tmp_path / "killed", greys, **options)


@pytest.mark.parametrize("kind", ["bmp", "parquet"])
def test_other_images_of_the_same_names_and_sizes_are_refused(tmp_path, greys, kind):  # noqa: F811
    """Two that swap their names swap their splits too."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(40)]

    def write():
        for i, photo in enumerate(photos):
            photo.save(tmp_path / "photos" / f"{i:02}.bmp")
        if kind == "parquet":
            files = [str(tmp_path / "photos" / f"{i:02}.bmp") for i in range(40)]
            rows = Dataset.from_dict({"image": files}).cast_column("image", ImageFeature())
            rows.to_parquet(tmp_path / "photos.parquet")

    write()
    source = tmp_path / ("photos" if kind == "bmp" else "photos.parquet")
    options = {"max_steps": 6, "images": {"train_dir": str(source), "train_val_split": 0.3, "image_size": 8}} | SAVING
    run(tmp_path / "whole", greys, **options)
    for name in ("same", "swapped"):
        (tmp_path / name).mkdir()
        kill_after_training(tmp_path / "whole", tmp_path / name, step=2)
    write()  # the same again, but at another time
    assert run(tmp_path / "same", greys, **options) == read_records(tmp_path / "whole" / "records.json")
    photos.reverse()
    write()
    with pytest.raises(
        ValueError, match=r"The images \(validation and train\) are not those .* trained on: what they show"
    ):
        run(tmp_path / "swapped", greys, **options)


# -- two runs in one folder --------------------------------------------------------------------------------------------


def test_a_folder_has_one_run_at_a_time(tmp_path, greys, interrupted):  # noqa: F811
    """Held by another process, which then is killed."""
    kill_after_training(interrupted, tmp_path, step=2)
    holder = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from hf_igpt.training.resuming import own_folder
        own_folder(Path({str(tmp_path)!r}), None)
        print("held", flush=True)
        time.sleep(60)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="Another run is writing to"):
            run(tmp_path, greys, max_steps=6, images=IMAGES, **SAVING)
    finally:
        process.kill()
        process.wait()
    run(tmp_path, greys, max_steps=6, images=IMAGES, **SAVING)  # the lock died with its process
    assert (tmp_path / "records.json").is_file() and not (tmp_path / resuming.LOCK).exists()


def test_a_run_that_ends_badly_releases_its_folder(tmp_path, greys, interrupted):  # noqa: F811
    kill_after_training(interrupted, tmp_path, step=2)
    with pytest.raises(ValueError, match="--learning_rate"):
        run(tmp_path, greys, max_steps=6, images=IMAGES, learning_rate=0.5, **SAVING)
    assert not resuming.OWNED and not (tmp_path / resuming.LOCK).exists()


def test_a_folder_has_one_run_in_one_process_too(tmp_path):
    one, other = object(), object()
    resuming.own_folder(tmp_path, one)
    resuming.own_folder(tmp_path, one)
    with pytest.raises(ValueError, match="Another run is writing to"):
        resuming.own_folder(tmp_path, other)
    resuming.release_folder(tmp_path, other)  # not its own
    with pytest.raises(ValueError, match="Another run is writing to"):
        resuming.own_folder(tmp_path, other)
    resuming.release_folder(tmp_path, one)
    resuming.own_folder(tmp_path, other)
    resuming.release_folder(tmp_path, other)


def test_a_folder_in_which_another_run_ended_meanwhile_is_not_overwritten(tmp_path, greys, interrupted, monkeypatch):  # noqa: F811
    """Between the first look at a folder and the first file lies the reading of all images."""
    begin = runs.begin

    def begin_and_wait(args):
        checkpoint = begin(args)
        shutil.copytree(interrupted, args.output_dir)
        return checkpoint

    monkeypatch.setattr(runs, "begin", begin_and_wait)
    with pytest.raises(ValueError, match="Another run has written to .* meanwhile"):
        run(tmp_path / "run", greys, max_steps=6, images=IMAGES, **SAVING)
    assert read_records(tmp_path / "run" / "records.json") == read_records(interrupted / "records.json")


# -- checkpoints that cannot be continued ------------------------------------------------------------------------------


def test_checkpoints_without_an_optimiser_are_not_continued(tmp_path, greys, interrupted):  # noqa: F811
    options = {"max_steps": 6, "images": IMAGES, "save_only_model": True} | SAVING
    run(tmp_path / "whole", greys, **options)
    (tmp_path / "killed").mkdir()
    kill_after_training(tmp_path / "whole", tmp_path / "killed", step=2)
    with pytest.raises(ValueError, match=r"has no optimizer state \(--save_only_model\?\)"):
        run(tmp_path / "killed", greys, **options)
    (tmp_path / "ended").mkdir()
    kill_after_training(tmp_path / "whole", tmp_path / "ended")  # of which only measuring is left
    assert run(tmp_path / "ended", greys, **options) == read_records(tmp_path / "whole" / "records.json")


def test_the_best_and_the_last_checkpoint_are_kept(tmp_path, greys):  # noqa: F811
    """With a limit of one, the last would give way to the best, and a killed run would be trained again."""
    options = {"max_steps": 6, "images": IMAGES} | SAVING | {"save_total_limit": 1, "greater_is_better": True}
    run(tmp_path / "run", greys, **options)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}


def test_a_best_checkpoint_elsewhere_is_found_or_missed_by_name(tmp_path, greys, interrupted):  # noqa: F811
    options = {"images": IMAGES} | SAVING | {"greater_is_better": True}  # the first is the best
    run(tmp_path / "one", greys, max_steps=6, **options)
    more = {"max_steps": 8, "resume_from_checkpoint": str(tmp_path / "one" / "checkpoint-6")} | options
    expected = run(tmp_path / "two", greys, **more)
    (tmp_path / "killed").mkdir()
    kill_after_training(tmp_path / "two", tmp_path / "killed")
    del more["resume_from_checkpoint"]
    assert run(tmp_path / "killed", greys, **more) == expected
    (tmp_path / "again").mkdir()
    kill_after_training(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "one" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"the best checkpoint, .*one/checkpoint-2, is not there"):
        run(tmp_path / "again", greys, **more)


def test_a_checkpoint_past_the_end_is_refused(tmp_path, greys, interrupted):  # noqa: F811
    elsewhere = {"max_steps": 4, "resume_from_checkpoint": str(interrupted / "checkpoint-6")}
    with pytest.raises(ValueError, match="has been trained for 6 steps, more than the 4 of this run"):
        run(tmp_path / "run", greys, **({"images": IMAGES} | SAVING | elsewhere))


def damage_file(file, how):
    """Damage a file as disks, interruptions and people do."""
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "flipped":
        file.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    else:
        file.write_bytes({"empty": b"", "half": data[: len(data) // 2]}[how])


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json")


@pytest.mark.parametrize("how", ["missing", "flipped", "empty", "half"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, greys, interrupted, how, capsys):  # noqa: F811
    """Whatever file is damaged."""
    for file in FILES:
        folder = tmp_path / file
        shutil.copytree(interrupted, folder)
        damage_file(folder / "checkpoint-6" / file, how)
        assert resuming.find_last(folder, with_best=False) == str(folder / "checkpoint-4")
        what = "is missing" if how == "missing" else "has changed since it was written"
        assert f"Passing over checkpoint-6: {folder / 'checkpoint-6' / file} {what}." in capsys.readouterr().out


def test_a_run_continues_from_the_checkpoint_before_a_damaged_one(tmp_path, greys, interrupted, capsys):  # noqa: F811
    kill_after_training(interrupted, tmp_path, step=4)
    damage_file(tmp_path / "checkpoint-4" / "model.safetensors", "flipped")
    records = run(tmp_path, greys, max_steps=6, images=IMAGES, **SAVING)
    assert records == read_records(interrupted / "records.json")
    assert f"Resuming from {tmp_path / 'checkpoint-2'}" in capsys.readouterr().out
    after, before = weights(tmp_path), weights(interrupted)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_checkpoint_that_was_cut_short_does_not_count(tmp_path, greys, interrupted, capsys):  # noqa: F811
    shutil.copytree(interrupted, tmp_path / "run")
    for step in (2, 4, 6):
        (tmp_path / "run" / f"checkpoint-{step}" / SEAL).unlink()
    (tmp_path / "run" / "checkpoint-abc").mkdir()
    assert resuming.find_last(tmp_path / "run", with_best=True) is None  # the run starts again
    assert capsys.readouterr().out.count("was not written to its end") == 3


def test_nothing_is_left_of_a_checkpoint_whose_deletion_was_interrupted(tmp_path, greys, interrupted):  # noqa: F811
    kill_after_training(interrupted, tmp_path)
    for file in (SEAL, "model.safetensors"):
        (tmp_path / "checkpoint-2" / file).unlink()
    run(tmp_path, greys, max_steps=6, images=IMAGES, **SAVING)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


def test_a_run_without_any_good_checkpoint_is_not_overwritten(tmp_path, greys, interrupted):  # noqa: F811
    shutil.copytree(interrupted, tmp_path / "run")
    for step in (2, 4, 6):
        damage_file(tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt", "flipped")
    with pytest.raises(ValueError, match="No checkpoint in .* can be continued: .*optimizer.pt has changed since"):
        resuming.find_last(tmp_path / "run", with_best=True)
    given = {"max_steps": 8, "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-4")}
    with pytest.raises(ValueError, match=r"optimizer.pt has changed since it was written: give another --resume"):
        run(tmp_path / "other", greys, images=IMAGES, **SAVING, **given)


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("code was run",)


def narrowed(file):
    """An optimiser's state with moments that are narrower than their weights, over which torch's kernels read past the end."""
    state = torch.load(file, weights_only=True)
    for moments in state["state"].values():
        moments["exp_avg"] = moments["exp_avg"][..., :1].clone()
    torch.save(state, file)


FORGED = {
    "text": lambda file: file.write_bytes(b"hello"),
    "empty": lambda file: file.write_bytes(b""),
    "code": lambda file: file.write_bytes(pickle.dumps(Code())),
    "archived code": lambda file: torch.save(Code(), file),
    "other names": lambda file: torch.save({"state": 7, "param_groups": [], "python": 3}, file),
    "narrowed": narrowed,
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_sealed_checkpoint_with_forged_states_is_refused_by_file(tmp_path, greys, averaged, forgery):  # noqa: F811
    files = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    if forgery in ("text", "empty"):
        files |= {"model.safetensors", "training_weights.safetensors", "trainer_state.json"}
    for file in ["optimizer.pt"] if forgery == "narrowed" else sorted(files):
        (tmp_path / file).mkdir()
        kill_after_training(averaged, tmp_path / file, step=4)
        FORGED[forgery](tmp_path / file / "checkpoint-4" / file)
        checkpoints.seal_checkpoint(tmp_path / file / "checkpoint-4")
        with pytest.raises(ValueError, match=rf"checkpoint-4/{file}\b.* does not hold the state of this training \("):
            run(tmp_path / file, greys, **AVERAGED)
        assert not list((tmp_path / file).rglob("checkpoint-6"))


def test_the_index_of_shards_and_their_objects_run_nothing(tmp_path):
    """PyTorch unpickles both, the index and objects between the tensors."""
    state = {"weight": torch.zeros(3, dtype=torch.bfloat16), "group": {"lr": 0.1, "betas": (0.9, 0.95), "name": "x"}}
    distributed.save(state, checkpoint_id=tmp_path / "model")
    wanted = {"weight": torch.ones(3, dtype=torch.bfloat16), "group": {"lr": 0, "betas": (0, 0), "name": ""}}
    with checkpoints.refusing_states(str(tmp_path), "model"):
        distributed.load(wanted, checkpoint_id=tmp_path / "model")
    assert wanted["group"] == state["group"] and torch.equal(wanted["weight"], state["weight"])
    assert checkpoints.WEIGHTS_ALONE not in os.environ
    distributed.save({"group": Code()}, checkpoint_id=tmp_path / "model")
    with (
        pytest.raises(ValueError, match=r"model does not hold the state of this training \(CheckpointException"),
        checkpoints.refusing_states(str(tmp_path), "model"),
    ):
        distributed.load({"group": None}, checkpoint_id=tmp_path / "model")
    for protocol in range(6):
        (tmp_path / "model" / ".metadata").write_bytes(pickle.dumps(Code(), protocol))
        with pytest.raises(ValueError, match=r"names \S+, which is no part of an index"):
            checkpoints.check_index(tmp_path / "model" / ".metadata")
    # The name is pushed first, and something else is pushed and popped in between.
    for trick in (
        b"\x8c\x02os\x8c\x06systemN0\x93.",
        b"\x8c\x02os\x94\x8c\x06system\x94N0h\x00h\x01\x93.",
        b"\x82\x01.",
    ):
        (tmp_path / "model" / ".metadata").write_bytes(b"\x80\x04" + trick)
        with pytest.raises(ValueError, match="which is no part of an index"):
            checkpoints.check_index(tmp_path / "model" / ".metadata")


def test_one_process_looks_for_the_checkpoint(tmp_path, monkeypatch):
    """The others are told what it found, or what was wrong."""
    monkeypatch.setattr(runs, "find_checkpoint", lambda args: pytest.fail("another process has done it"))
    monkeypatch.setattr(runs, "PartialState", lambda: argparse.Namespace(is_main_process=False))
    arguments = FinetuningArguments(str(tmp_path), use_cpu=True)
    for told in (["checkpoint-4", None], [None, None]):
        monkeypatch.setattr(runs, "broadcast_object_list", lambda found, told=told: told)
        assert runs.begin(arguments) == told[0]
    monkeypatch.setattr(runs, "broadcast_object_list", lambda found: [None, "it is damaged"])
    with pytest.raises(ValueError, match="it is damaged"):
        runs.begin(arguments)


def test_a_damaged_best_checkpoint_is_made_again(tmp_path, greys, interrupted):  # noqa: F811
    options = {"max_steps": 6, "images": IMAGES} | SAVING
    state = json.loads((interrupted / "checkpoint-6" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"]).name
    assert best != "checkpoint-2"  # there is an earlier one to continue from
    kill_after_training(interrupted, tmp_path)
    damage_file(tmp_path / best / "model.safetensors", "flipped")
    assert run(tmp_path, greys, **options) == read_records(interrupted / "records.json")


def test_old_checkpoints_go_once_the_new_one_is_sealed(tmp_path, greys, interrupted):  # noqa: F811
    shutil.copytree(interrupted, tmp_path / "run")
    state = TrainerState(global_step=4, best_model_checkpoint=str(tmp_path / "elsewhere" / "checkpoint-2"))
    (tmp_path / "run" / "checkpoint-3").mkdir()  # cut short
    checkpoints.delete_old(tmp_path / "run", state, limit=1)  # keeps the last and the best
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-2"}


def test_files_of_no_concern_do_not_block_a_run(tmp_path, greys):  # noqa: F811
    for name in (".DS_Store", "nohup.out", "slurm-17.out", "train.log", "run.json.partial"):
        (tmp_path / name).write_text("")
    assert run(tmp_path, greys, max_steps=1, images=IMAGES)


# -- averaged weights --------------------------------------------------------------------------------------------------


class Steps(TrainerCallback):
    """Keeps a copy of the weights at the beginning and after each step."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: weight.detach().clone() for name, weight in model.named_parameters()})

    on_step_end = on_train_begin


@pytest.mark.parametrize("shares", [1, 2])
def test_what_is_saved_and_evaluated_is_the_average(tmp_path, greys, shares, monkeypatch):  # noqa: F811
    """Of the weights after each step, by the definition of a moving average; training itself does not change."""
    build, seen, records = runs.build_trainer, {None: Steps(), 0.6: Steps()}, {}
    options = AVERAGED | {"load_best_model_at_end": False, "gradient_accumulation_steps": shares}
    for decay, steps in seen.items():

        def build_and_watch(*args, steps=steps):
            trainer = build(*args)
            trainer.add_callback(steps)
            return trainer

        monkeypatch.setattr(runs, "build_trainer", build_and_watch)
        records[decay] = run(tmp_path / str(decay), greys, **options | {"ema_decay": decay})
    first, *others = seen[0.6].weights
    assert len(others) == 6
    for now, without in zip(seen[0.6].weights, seen[None].weights, strict=True):
        assert all(torch.equal(now[name], without[name]) for name in now)
    expected = first
    for step, now in enumerate(others):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in now}
    saved = weights(tmp_path / "0.6")
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor)
    last = tmp_path / "0.6" / "checkpoint-6"
    raw = load_file(last / "training_weights.safetensors")
    assert all(torch.equal(weights(last)[name], saved[name]) for name in saved)
    assert all(torch.equal(raw[name], others[-1][name]) for name in raw)
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    assert [entry["eval_nats_per_pixel"] for entry in log if "eval_nats_per_pixel" in entry][-1] == records[0.6][
        0
    ].value
    assert records[0.6][0].value != records[None][0].value


def test_a_resumed_run_continues_its_average(tmp_path, greys):  # noqa: F811
    expected = run(tmp_path / "whole", greys, **AVERAGED)
    for step in (4, 6):
        folder = tmp_path / f"killed-{step}"
        folder.mkdir()
        kill_after_training(tmp_path / "whole", folder, step=step)
        assert run(folder, greys, **AVERAGED) == expected
        for place in ("", "checkpoint-6"):
            after, before = weights(folder / place), weights(tmp_path / "whole" / place)
            assert all(torch.equal(after[name], before[name]) for name in before)


# -- divergence --------------------------------------------------------------------------------------------------------


def test_a_diverging_run_ends_with_what_it_had(tmp_path, greys):  # noqa: F811
    with pytest.raises(
        NotFinite, match=r"The run has diverged after step \d+, at a learning rate of .*lower --learning"
    ):
        run(tmp_path / "run", greys, max_steps=200, learning_rate=1e30, warmup_steps=0, max_grad_norm=0, **SAVING)
    assert not (tmp_path / "run" / "records.json").exists()
    for file in (tmp_path / "run").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in weights(file.parent).values())


def test_the_images_of_a_loss_that_is_not_finite_are_kept(tmp_path, greys, monkeypatch):  # noqa: F811
    step, rows = ImageGPTTrainer.compute_loss, []

    def spoiled(self, model, inputs, *args, **kwargs):
        loss = step(self, model, inputs, *args, **kwargs)
        if model.training and self.state.global_step == 3:
            rows.append(inputs["labels"])
            return loss * float("nan")
        return loss

    monkeypatch.setattr(ImageGPTTrainer, "compute_loss", spoiled)
    with pytest.raises(NotFinite, match="The loss is nan; the images it came from are in .*not-finite-0"):
        run(tmp_path / "run", greys, max_steps=6, images=IMAGES, **SAVING)
    pictures = sorted((tmp_path / "run" / "not-finite-0").glob("*.png"), key=lambda path: int(path.stem))
    shown = np.stack([np.asarray(Image.open(path))[:, :, 0] for path in pictures]).reshape(len(pictures), -1)
    assert np.array_equal(shown, rows[0].numpy() * 17)  # 16 greys
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2"}


# -- the last images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_held_out", [50, 5])
def test_evaluation_drops_no_image(tmp_path, greys, n_held_out):  # noqa: F811
    """--dataloader_drop_last is of training."""
    records = []
    for name, drops in (("all", False), ("dropping", True)):
        images = {"max_train_samples": 48, "max_eval_samples": n_held_out}
        options = {"dataloader_drop_last": drops, "per_device_eval_batch_size": 16, "eval_strategy": "steps"}
        arguments = {"max_steps": 4, "eval_steps": 2} | options
        records.append(run(tmp_path / name, greys, images=images, **arguments)[0])
    assert records[0] == records[1] and records[0].n == n_held_out


def test_training_drops_what_is_left_over(tmp_path, greys):  # noqa: F811
    """40 images by 16: epochs of two whole steps; a schedule, a count of images and a report that know it."""
    options = {"max_steps": -1, "num_train_epochs": 3, "dataloader_drop_last": True, "save_strategy": "epoch"}
    (record, *_) = run(tmp_path / "run", greys, images=IMAGES, **options)
    assert record.images_seen == 3 * 32
    assert [entry["images"] for entry in history(tmp_path / "run")] == [16, 32, 48, 64, 80, 96]
    assert json.loads(Path(tmp_path / "run" / "run.json").read_text())["recipe"]["steps"] == "6 (3 epochs)"
