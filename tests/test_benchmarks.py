"""The benchmarks do what they say, at small sizes: outputs compared first, every contender recorded, ratios right. No times."""

import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import small_config

from hf_igpt import ImageGPTForCausalImageModeling, clusters
from hf_igpt.commands.plan import PlanArguments, plan
from hf_igpt.evaluation.records import Record, read_records, write_records


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # as for `python benchmarks/run.py`

import features
import generate
import run
import timing
import tokenize_folders
import tokenize_images
import train
import train_with_trainer
from arguments import BenchmarkArguments
from photographs import make_photographs
from stages import LIMIT, OURS, THEIRS, Contender, Stage, contender_of
from table import format_table


SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "image_size": 8, "repeats": 1, "n_images": 4, "n_pixels": 2000}


def small(**options):
    return BenchmarkArguments(compile=False, **(SMALL | options))


@pytest.fixture(autouse=True)
def _quiet():
    yield
    transformers.logging.set_verbosity_warning()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_are_compared_timed_and_recorded(tmp_path):
    for suite, stages in (("train", 2), ("generate", 2), ("features", 1)):
        run.run_suites(small(suite=suite, output=str(tmp_path / "records.json"), max_tokens=20))
        records = read_records(tmp_path / "records.json")
        assert len({record.stage for record in records}) >= stages
    times = {(record.stage, str(contender_of(record))): record for record in records if record.metric == "seconds"}
    for stage in ("training step", "whole images, 1 at once", "features of all layers"):
        assert {contender for name, contender in times if name == stage} == {"hf_igpt", "transformers", "limit"}
    memory = {(record.stage, str(contender_of(record))): record.value for record in records if record.unit == "MiB"}
    checkpointed = memory["training step, gradient checkpointing", "hf_igpt"]
    assert 0 < checkpointed < memory["training step", "hf_igpt"]
    run.run_suites(small(suite="features", output=str(tmp_path / "records.json")))
    assert len(read_records(tmp_path / "records.json")) == len(records)  # a stage's new records replace its old ones


def test_processors_and_palettes_are_compared_timed_and_recorded():
    images = make_photographs(4)
    pixels = np.asarray(images[0]).reshape(-1, 3)
    palette = clusters.to_unit_range(np.unique(pixels, axis=0)[::200][:40])
    records = list(chain.from_iterable(tokenize_images.time_processors(small(), images, palette)))
    records += tokenize_images.time_palette_fit(small())
    stages = {record.stage for record in records}
    assert len(stages) == 7 and "tokens of 224x224 PIL photos, 4 at once" in stages
    assert len(records) == 2 * 6 + 2 + 2  # the limit of photos, and scikit-learn's call
    assert all(record.value > 0 for record in records)


def test_batches_and_folders_are_timed_and_recorded():
    """The folder is tokenized by two processes and decoded by two others, which import what they need."""
    palette = tokenize_images.draw_palette(make_photographs(4))
    records = list(chain.from_iterable(tokenize_images.time_batches(small(), palette)))
    records += tokenize_folders.time_folder(small(n_files=4), palette)
    stages = {record.stage for record in records}
    assert len(stages) == 3 and "folder of JPEGs to tokens, 2 processes" in stages
    assert len(records) == 3 * 2 and {str(contender_of(record)) for record in records} == {"hf_igpt", "limit"}
    assert all(record.value > 0 for record in records)


def test_trainer_end_to_end_feeds_the_planner(tmp_path):
    """What a GPU runs, on a CPU: theirs and ours in Trainer, batches from a memory map, and a record that plans."""
    args = small(output=None)
    config = small_config(n_layer=1, n_embd=32, n_head=2, image_size=32)
    records = train_with_trainer.time_trainers(args, "xs", batch_size=4, steps=3, config=config)
    found = {(record.metric, str(contender_of(record))): record.value for record in records}
    assert found["images_per_second", "hf_igpt"] == pytest.approx(4 / found["seconds", "hf_igpt"])
    write_records(tmp_path / "records.json", records)
    (option, *_) = plan(PlanArguments(size=["xs"], images=1000, records=str(tmp_path / "records.json"), bf16=False))
    assert option.hours > 0


def test_what_is_not_the_same_is_not_timed(monkeypatch):
    build_models = train.build_models

    def build_different(*args, **shape):
        ours, theirs = build_models(*args, **shape)
        with torch.no_grad():
            ours.transformer.wpe.weight[3] += 1
        return ours, theirs

    for module in (train, generate, features):
        monkeypatch.setattr(module, "build_models", build_different)
    for time_suite in (train.time_training, generate.time_generation, features.time_features):
        with pytest.raises(ValueError, match="would mean nothing"):
            list(time_suite(small(max_tokens=8)))


def test_what_is_not_the_same_with_checkpointing_is_not_timed(monkeypatch):
    enable = ImageGPTForCausalImageModeling.gradient_checkpointing_enable

    def broken(self, *args, **kwargs):
        enable(self, *args, **kwargs)
        self.transformer.h = torch.nn.ModuleList(self.transformer.h[:1])

    monkeypatch.setattr(ImageGPTForCausalImageModeling, "gradient_checkpointing_enable", broken)
    with pytest.raises(ValueError, match="would mean nothing"):
        list(train.time_training(small()))


def test_batches_are_tokenised_one_after_another():
    seen = []
    read_next = tokenize_images.cycle_through(seen.append, [1, 2])
    for _ in range(3):
        read_next()
    assert seen == [1, 2, 1]


def test_table_of_ratios():
    stage = Stage("a stage", 1, "x")
    times = {
        Contender(THEIRS): [0.03],
        Contender(OURS): [0.01],
        Contender(OURS, "compiled"): [0.005],
        Contender(THEIRS, "compiled"): [0.02],
        Contender(OURS, "compiled bf16"): [0.002],
        Contender(LIMIT): [0.004],
    }
    records = stage.record_times(times) + stage.record_memory({Contender(THEIRS): 100, Contender(OURS): 25})
    assert {contender_of(record) for record in records} == set(times)
    assert format_table(records).splitlines()[2:] == [
        "| a stage | 10 ms | 30 ms | 3.00 | 0.40 | 0.25 |",
        "| a stage, compiled | 5 ms | 20 ms | 4.00 | 0.80 |  |",  # against theirs compiled
        "| a stage, compiled bf16 | 2 ms | 30 ms | 15 | 2.00 |  |",
    ]


def test_memory_is_the_peak_not_what_is_left():
    def add():
        once = torch.ones(2**20)  # 4 MiB
        twice = once + 1
        del once
        return twice.sum()

    assert timing.measure_peak_memory(add) == pytest.approx(8, rel=0.1)


def test_what_cannot_be_written_to_is_said_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setitem(run.FUNCTIONS, "features", lambda args: pytest.fail("work was begun"))
    (tmp_path / "other.json").write_text('{"metric": "seconds"}')
    with pytest.raises(ValueError, match="other.json does not hold records"):
        run.run_suites(small(suite="features", output=str(tmp_path / "other.json")))
    assert (tmp_path / "other.json").read_text() == '{"metric": "seconds"}'
    with pytest.raises(OSError):
        run.run_suites(small(suite="features", output=str(tmp_path / "other.json" / "records.json")))


def test_records_of_something_else_are_kept(monkeypatch, tmp_path):
    (kept, new) = (
        Record(task="speed", metric="seconds", value=1.0, unit="s", split="made here", n=1, system="hf_igpt", **fields)
        for fields in ({"size": "tiny"}, {"stage": "features of all layers"})
    )
    write_records(tmp_path / "records.json", [kept])
    monkeypatch.setitem(run.FUNCTIONS, "features", lambda args: [[new]])
    run.run_suites(small(suite="features", output=str(tmp_path / "records.json")))
    assert read_records(tmp_path / "records.json") == [kept, new]


def test_bad_arguments():
    with pytest.raises(ValueError, match="repeats is at least 1"):
        BenchmarkArguments(repeats=0)
    with pytest.raises(ValueError, match="n_images is at least 1"):
        BenchmarkArguments(n_images=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            BenchmarkArguments(device="cuda")
