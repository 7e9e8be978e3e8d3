"""The benchmarks do what they say, at small sizes: outputs compared first, every contender recorded, ratios right. No times."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config

from hf_igpt.commands.plan import PlanArguments, plan
from hf_igpt.evaluation.records import Record, read_records


spec = importlib.util.spec_from_file_location("benchmarks_run", Path(__file__).parent.parent / "benchmarks" / "run.py")
benchmarks = sys.modules["benchmarks_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmarks)

SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "image_size": 8, "repeats": 1, "n_images": 4, "n_pixels": 2000}


def small(**options):
    return benchmarks.BenchmarkArguments(compile=False, **(SMALL | options))


@pytest.fixture(autouse=True)
def _quiet():
    yield
    benchmarks.transformers.logging.set_verbosity_warning()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_are_compared_timed_and_recorded(tmp_path):
    for suite, stages in (("train", 2), ("generate", 2), ("features", 1)):
        benchmarks.run(small(suite=suite, output=str(tmp_path / "records.json"), max_tokens=20))
        records = read_records(tmp_path / "records.json")
        assert len({record.settings["stage"] for record in records}) >= stages
    times = {(record.settings["stage"], record.model): record for record in records if record.metric == "seconds"}
    for stage in ("training step", "whole images, 1 at once", "features of all layers"):
        assert {model for name, model in times if name == stage} == {"hf_igpt", "transformers", "limit"}
    memory = {(record.settings["stage"], record.model): record.value for record in records if record.unit == "MiB"}
    checkpointed = memory["training step, gradient checkpointing", "hf_igpt"]
    assert 0 < checkpointed < memory["training step", "hf_igpt"]
    benchmarks.run(small(suite="features", output=str(tmp_path / "records.json")))
    assert len(read_records(tmp_path / "records.json")) == len(records)  # a stage's new records replace its old ones


def test_processors_and_palettes_are_compared_timed_and_recorded():
    images = benchmarks.photos(4)
    pixels = np.asarray(images[0]).reshape(-1, 3)
    palette = benchmarks.clusters.to_unit_range(np.unique(pixels, axis=0)[::200][:40])
    records = benchmarks._processors(small(), images, palette) + benchmarks._palette_fit(small())
    stages = {record.settings["stage"] for record in records}
    assert len(stages) == 7 and "tokens of 224x224 PIL photos, 4 at once" in stages
    assert len(records) == 2 * 6 + 2 + 2  # the limit of photos, and scikit-learn's call
    assert all(record.value > 0 for record in records)


def test_trainer_end_to_end_feeds_the_planner(tmp_path):
    """What a GPU runs, on a CPU: theirs and ours in Trainer, batches from a memory map, and a record that plans."""
    args = small(output=None)
    config = small_config(n_layer=1, n_embd=32, n_head=2, image_size=32)
    records = benchmarks.train_with_trainer(args, "xs", batch_size=4, steps=3, config=config)
    found = {(record.metric, record.model): record.value for record in records}
    assert found["images_per_second", "hf_igpt"] == pytest.approx(4 / found["seconds", "hf_igpt"])
    benchmarks.write_records(tmp_path / "records.json", records)
    (option, *_) = plan(PlanArguments(size=["xs"], images=1000, records=str(tmp_path / "records.json"), bf16=False))
    assert option.hours > 0


def test_what_is_not_the_same_is_not_timed(monkeypatch):
    models = benchmarks.models

    def different(*args, **shape):
        ours, theirs = models(*args, **shape)
        with torch.no_grad():
            ours.transformer.wpe.weight[3] += 1
        return ours, theirs

    monkeypatch.setattr(benchmarks, "models", different)
    for suite in (benchmarks.train, benchmarks.generate, benchmarks.features):
        with pytest.raises(ValueError, match="would mean nothing"):
            suite(small(max_tokens=8))


def test_what_is_not_the_same_with_checkpointing_is_not_timed(monkeypatch):
    enable = benchmarks.ImageGPTForCausalImageModeling.gradient_checkpointing_enable

    def broken(self, *args, **kwargs):
        enable(self, *args, **kwargs)
        self.transformer.h = torch.nn.ModuleList(self.transformer.h[:1])

    monkeypatch.setattr(benchmarks.ImageGPTForCausalImageModeling, "gradient_checkpointing_enable", broken)
    with pytest.raises(ValueError, match="would mean nothing"):
        benchmarks.train(small())


def test_batches_are_tokenised_one_after_another():
    seen = []
    run = benchmarks._on_one_after_another(seen.append, [1, 2])
    for _ in range(3):
        run()
    assert seen == [1, 2, 1]


def test_table_of_ratios():
    def record(value, model, metric="seconds"):
        return Record(metric, value, "s", "made here", 1, 0, model, "x", settings={"stage": "a stage"})

    records = [record(0.03, "transformers"), record(0.01, "hf_igpt"), record(0.005, "hf_igpt compiled")]
    records += [record(0.02, "transformers compiled"), record(0.002, "hf_igpt compiled bf16")]
    records += [
        record(0.004, "limit"),
        record(100, "transformers", "peak_memory"),
        record(25, "hf_igpt", "peak_memory"),
    ]
    assert benchmarks.table(records).splitlines()[2:] == [
        "| a stage | 10 ms | 30 ms | 3.00 | 0.40 | 0.25 |",
        "| a stage, compiled | 5 ms | 20 ms | 4.00 | 0.80 |  |",  # against theirs compiled
        "| a stage, compiled bf16 | 2 ms | 30 ms | 15 | 2.00 |  |",
    ]


def test_memory_is_the_peak_not_what_is_left():
    def run():
        once = torch.ones(2**20)  # 4 MiB
        twice = once + 1
        del once
        return twice.sum()

    assert benchmarks.peak_memory(run) == pytest.approx(8, rel=0.1)


def test_what_cannot_be_written_to_is_said_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks, "features", lambda args: pytest.fail("work was begun"))
    (tmp_path / "other.json").write_text('{"metric": "seconds"}')
    with pytest.raises(ValueError, match="other.json does not hold records"):
        benchmarks.run(small(suite="features", output=str(tmp_path / "other.json")))
    assert (tmp_path / "other.json").read_text() == '{"metric": "seconds"}'
    with pytest.raises(OSError):
        benchmarks.run(small(suite="features", output=str(tmp_path / "other.json" / "records.json")))


def test_records_of_something_else_are_kept(monkeypatch, tmp_path):
    (kept, new) = (
        Record("seconds", 1.0, "s", "made here", 1, 0, "hf_igpt", "x", settings=settings)
        for settings in ({"size": "tiny"}, {"stage": "features of all layers"})
    )
    benchmarks.write_records(tmp_path / "records.json", [kept])
    monkeypatch.setattr(benchmarks, "features", lambda args: [new])
    benchmarks.run(small(suite="features", output=str(tmp_path / "records.json")))
    assert read_records(tmp_path / "records.json") == [kept, new]


def test_bad_arguments():
    with pytest.raises(ValueError, match="repeats is at least 1"):
        benchmarks.BenchmarkArguments(repeats=0)
    with pytest.raises(ValueError, match="n_images is at least 1"):
        benchmarks.BenchmarkArguments(n_images=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            benchmarks.BenchmarkArguments(device="cuda")
