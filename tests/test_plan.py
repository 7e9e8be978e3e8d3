"""Plans: hours, what fits, throughput from records, refusals."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from hf_igpt import ImageGPTConfig
from hf_igpt.commands.plan import (
    USABLE,
    PlanArguments,
    flags,
    memory_table,
    options,
    plan,
    run_table,
    simplest_that_fits,
)
from hf_igpt.evaluation.records import Record, write_records
from hf_igpt.training.costs import GIB, step_memory, training_flops


def arguments(**given):
    return PlanArguments(**({"size": ["tiny"], "image_size": 8, "num_colors": 16, "max_steps": 100} | given))


def test_hours():
    given = arguments(batch_size=32, devices=4, tflops=2e-3)
    plain, sharded, recomputing, _ = options(given)
    config = ImageGPTConfig.from_preset("tiny", image_size=8, n_colors=16)
    assert plain.hours == pytest.approx(100 * 32 * training_flops(config) / (4 * 2e9) / 3600)
    assert sharded.hours == plain.hours
    assert 1.25 < recomputing.hours / plain.hours < 4 / 3
    assert options(replace(given, tflops=4e-3))[0].hours == pytest.approx(plain.hours / 2)


def test_length_is_the_presets_or_counted_in_epochs():
    paper = options(PlanArguments(size=["xl"], devices=64))[0]
    assert (paper.steps, paper.batch_size, paper.image_size, paper.micro_batch) == (2_000_000, 64, 64, 1)
    assert paper.epochs is None and paper.hours is None and paper.fits is None
    found = options(arguments(max_steps=None, images=1000, batch_size=32))[0]
    assert found.steps == 15 * 32  # tiny's epochs of 32 steps, the last of them smaller
    assert options(arguments(max_steps=None, images=1e3, batch_size=32, epochs=2))[0].steps == 64
    assert options(arguments(images=1600, batch_size=32))[0].epochs == 2


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    config = ImageGPTConfig.from_preset("tiny", image_size=8, n_colors=16)
    limit = step_memory(config, 8).total
    for gib, fits in ((limit / GIB * 1.0001, 8), (limit / GIB * 0.999, 4), (1e-6, 0), (10, 64)):
        found = options(arguments(batch_size=64, memory_gib=gib / USABLE))[0]
        assert (found.largest_micro_batch, found.fits) == (fits, fits > 0)
        assert found.micro_batch * found.accumulation == 64
    given = options(arguments(batch_size=64, memory_gib=limit / GIB / USABLE, gradient_accumulation_steps=4))[0]
    assert (given.micro_batch, given.fits, given.largest_micro_batch) == (16, False, 8)


def test_the_simplest_that_fits():
    plans = options(arguments(batch_size=64, devices=2, memory_gib=0.012 / USABLE))
    chosen = simplest_that_fits(plans)
    assert [option.fits for option in plans].index(True) == plans.index(chosen[0])
    assert "gradient_checkpointing" in flags(plans[2]) and "FSDP2" not in flags(plans[2])
    accumulating = replace(plans[1], micro_batch=4, accumulation=8)
    assert "FSDP2" in flags(accumulating) and "sync_each_batch" in flags(accumulating)
    nothing = options(arguments(batch_size=64, devices=2, memory_gib=1e-5))
    assert simplest_that_fits(nothing) == nothing[-1:]
    assert "| no |  |  |" in run_table([replace(nothing[0], hours=1.0)])


TINY = {"size": "tiny", "image_size": (8, 8)}


def speed_record(metric, value, unit, **fields):
    return Record(task="speed", metric=metric, value=value, unit=unit, split="training", n=1, **fields)


def recorded(path, metric, value, unit, **fields):
    record = speed_record(metric, value, unit, **fields)
    write_records(path, [record, replace(record, value=value / 2), replace(record, metric="nats_per_pixel", value=9e9)])
    return str(path)


def test_throughput_from_records(tmp_path):
    file = tmp_path / "records.json"
    given = arguments(batch_size=32, devices=2)
    speed = recorded(file, "images_per_second", 400.0, "images/s", **TINY)
    plain, _, recomputing, _ = options(replace(given, records=speed))
    assert plain.hours == pytest.approx(100 * 32 / (2 * 400) / 3600)  # the faster of two
    assert recomputing.hours > plain.hours
    of_two = recorded(file, "images_per_second", 400.0, "images/s", devices=2, gradient_checkpointing=True, **TINY)
    plain, _, recomputing, _ = options(replace(given, records=of_two))
    assert recomputing.hours == pytest.approx(100 * 32 / 400 / 3600)
    config = ImageGPTConfig.from_preset("tiny", image_size=8, n_colors=16)
    any_model = recorded(file, "tflops_per_second", 0.5, "TFLOP/s")
    assert options(replace(given, records=any_model))[0].hours == pytest.approx(
        100 * 32 * training_flops(config) / (2 * 0.5e12) / 3600
    )
    for other in (
        {"size": "xs"},
        {"image_size": (16, 16)},
        {"objective": "masked"},
        {"precision": "bfloat16 autocast"},
    ):
        recorded(file, "images_per_second", 400.0, "images/s", **(TINY | other))
        with pytest.raises(ValueError, match="no images_per_second of tiny at 8 pixels, causal, float32"):
            options(replace(given, records=str(file)))


@pytest.mark.parametrize(
    ("value", "unit", "fields"),
    [
        (0.0, "images/s", {}),
        (-5.0, "images/s", {}),
        (float("nan"), "images/s", {}),
        ("100", "images/s", {}),
        (400.0, "s", {}),
        (400.0, "images/s", {"devices": 0}),
        (400.0, "images/s", {"devices": "2"}),
        (400.0, "images/s", {"gradient_checkpointing": "false"}),
    ],
)
def test_records_that_say_nothing(tmp_path, value, unit, fields):
    write_records(tmp_path / "records.json", [speed_record("images_per_second", value, unit, **(TINY | fields))])
    with pytest.raises(ValueError, match="cannot be planned with: images_per_second is a positive number of images/s"):
        options(arguments(records=str(tmp_path / "records.json")))
    (tmp_path / "records.json").write_text('[{"metric": "images_per_second"}]')
    with pytest.raises(ValueError, match="does not hold records"):
        options(arguments(records=str(tmp_path / "records.json")))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": ["huge"]}, "No preset 'huge': the sizes are tiny"),
        ({"devices": 0}, "--devices is a whole number from 1 to 1e.15; found 0"),
        ({"images": 1.5}, "--images is a whole number"),
        ({"images": float("inf")}, "--images is a whole number"),
        ({"num_colors": 70000}, "--num_colors is at most 65535"),
        ({"memory_gib": -1.0}, "--memory_gib is positive, at most 1e.15; found -1"),
        ({"tflops": float("nan")}, "--tflops is positive"),
        ({"epochs": 1.0}, "give one of them"),
        ({"tflops": 1.0, "records": "x"}, "give --tflops or --records"),
        ({"devices": 3}, "16 images cannot be shared by 3 devices"),
        ({"gradient_accumulation_steps": 5}, "shared by 1 devices and 5 accumulated steps"),
        ({"max_steps": None}, "15 epochs of how many images"),
    ],
)
def test_plans_refuse(given, message):
    with pytest.raises(ValueError, match=message):
        options(arguments(**given))


def test_plan_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "plans" / "plan.json"
    plans = plan(arguments(devices=2, tflops=1.0, memory_gib=1.0, images=100.0, output_json=str(file)))
    said = capsys.readouterr().out
    assert memory_table(plans) in said and run_table(plans) in said
    assert "100 steps of 16 images (16 epochs)" in said
    assert "tiny: --per_device_train_batch_size 8 --gradient_accumulation_steps 1, 2 processes" in said
    written = json.loads(file.read_text())
    assert written["arguments"]["devices"] == 2
    assert [found["memory_bytes"] for found in written["plans"]] == [option.memory.total for option in plans]
    assert [found["hours"] for found in written["plans"]] == [option.hours for option in plans]


def test_plans_of_images_that_are_not_square(tmp_path, capsys):
    (found,) = {option.image_size for option in plan(arguments(image_size="16x4"))}
    assert found == "16x4" and "tiny, causal, 16x4, 16 colours" in capsys.readouterr().out
    square = options(arguments())[0]
    assert (options(arguments(image_size="16x4"))[0].memory, square.image_size) == (square.memory, 8)  # as many pixels
    file = str(tmp_path / "records.json")
    speed = recorded(tmp_path / "records.json", "images_per_second", 400.0, "images/s", size="tiny", image_size=(16, 4))
    assert options(arguments(image_size="16x4", records=speed))[0].hours == pytest.approx(100 * 16 / 400 / 3600)
    for other in (8, "4x16"):
        with pytest.raises(ValueError, match=f"no images_per_second of tiny at {other} pixels"):
            options(arguments(image_size=other, records=file))


def test_the_script_says_what_the_planner_finds():
    text = (Path(__file__).parent.parent / "scripts" / "run_plan.py").read_text()
    words = re.search(r"run_plan\.py (--size xl .*?)\s+#", text)[1]
    (args,) = HfArgumentParser(PlanArguments).parse_args_into_dataclasses(shlex.split(words))
    (chosen,) = simplest_that_fits(options(args))
    assert f"sharded, {chosen.hours:.0f} hours" in text
