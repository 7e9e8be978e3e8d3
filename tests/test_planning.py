"""Planning: FLOPs against PyTorch's counter, memory against a measured step, the tables of docs/scaling.md."""

import gc
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_config
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser

from hf_igpt import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTForMaskedImageModeling, planning
from hf_igpt.evaluation.records import Record, write_records
from hf_igpt.planning import (
    GIB,
    PlanArguments,
    executed_flops,
    flags,
    forward_flops,
    memory_table,
    options,
    plan,
    run_table,
    simplest_that_fits,
    step_memory,
    training_flops,
)
from hf_igpt.presets import SIZES, TRAINING_V100_DAYS


ROOT = Path(__file__).parent.parent
SCALING = (ROOT / "docs" / "scaling.md").read_text()


# -- FLOPs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {"n_inner": 80}, {"n_layer": 1, "n_embd": 48}])
def test_flops_are_those_of_pytorchs_counter(overrides):
    """Eager attention multiplies the masked half too: a masked model's count, and a causal one's plus that half."""
    tokens = torch.randint(0, 16, (3, 64))
    for objective, cls in (("causal", ImageGPTForCausalImageModeling), ("masked", ImageGPTForMaskedImageModeling)):
        config = small_config(objective=objective, **overrides)
        model = cls._from_config(config, attn_implementation="eager")
        masks = {"bool_masked_pos": torch.rand(3, 64) < 0.5} if objective == "masked" else {}
        with FlopCounterMode(display=False) as forward:
            loss = model(labels=tokens, **masks).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        skipped = 2 * config.n_layer * config.n_embd * 64**2 * 3 if objective == "causal" else 0
        assert forward.get_total_flops() == forward_flops(config, 3) + skipped
        assert backward.get_total_flops() == 2 * forward.get_total_flops()
        assert training_flops(config, 3) == 3 * forward_flops(config, 3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_runs_the_blocks_once_more():
    config = small_config(objective="masked")
    model = ImageGPTForMaskedImageModeling._from_config(config, attn_implementation="eager")
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with FlopCounterMode(display=False) as counter:
        model(
            labels=torch.zeros(2, 64, dtype=torch.long), bool_masked_pos=torch.ones(2, 64, dtype=torch.bool)
        ).loss.backward()
    # PyTorch stops recomputing when it has the last tensor it needs: the last product of each block is not repeated.
    last = 2 * 2 * 64 * config.n_embd * 4 * config.n_embd * config.n_layer
    assert counter.get_total_flops() == executed_flops(config, 2, checkpointing=True) - last


def test_the_papers_compute_is_plausible():
    """OpenAI's blog: iGPT-L took about 2500 V100-days. NVIDIA's V100 peaks at 15.7 TFLOP/s in float32 [data sheet]."""
    config = ImageGPTConfig.from_preset("l")
    flops = training_flops(config, SIZES["l"].max_steps * SIZES["l"].batch_size)
    utilization = flops / (TRAINING_V100_DAYS["l"] * 86400) / 15.7e12
    assert 0.2 < utilization < 0.6
    assert f"{utilization:.0%}".replace("%", " %") in SCALING
    assert f"{flops / 86400e15:.1f} petaflop/s-days" in SCALING


# -- memory ------------------------------------------------------------------------------------------------------------


def train(config, batch_size, bf16, checkpointing):
    """Two steps of AdamW, the second of two micro-batches."""
    model = ImageGPTForCausalImageModeling(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, config.vocab_size - 1, (batch_size, config.n_positions))
    for accumulated in (1, 2):
        for _ in range(accumulated):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(labels=tokens).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# Few images in bfloat16, in which processors are slow.
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("pixels", "images", "bf16"), [(16, 8, False), (8, 4, True)])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_memory_is_what_a_real_run_takes(pixels, images, bf16, checkpointing):
    """From nothing to trained, on the CPU: the allocator's peak, by PyTorch's profiler."""
    config = ImageGPTConfig.from_preset("tiny", image_size=pixels)
    gc.collect()  # or other tests' tensors are freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(config, images, bf16, checkpointing)
    allocations = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    measured = now = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        now += event.nbytes()  # of a freed tensor below 0
        measured = max(measured, now)
    found = step_memory(config, images, checkpointing=checkpointing, bf16=bf16).total
    print(f"{pixels} pixels, {images} images, bf16 {bf16}, checkpointing {checkpointing}: {found:,} for {measured:,}")
    assert found == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_activations_of_a_block(objective):
    """Counted by hand, float32: two residual streams and their norms, queries, keys and values, attention's output, and the
    inner 4 D before and after the activation."""
    few, many = (small_config(objective=objective, n_layer=n_layer) for n_layer in (2, 5))
    found = step_memory(many, 128).activations - step_memory(few, 128).activations
    row = 4 * many.n_embd + 3 * many.n_embd + many.n_embd + 8 * many.n_embd
    assert found == 3 * 4 * 128 * 64 * (row + many.n_head + 2)  # and one number for each head's softmax and each norm


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_deep_models_follow_from_two_blocks(precision, checkpointing):
    config = small_config(n_layer=7)
    found = planning._activations(config, 5, checkpointing, precision)
    assert found == planning._trace(config.to_json_string(), 5, checkpointing, precision)


@pytest.mark.parametrize("size", ["s", "l"])
def test_memory_of_weights(size):
    config = ImageGPTConfig.from_preset(size)
    count = {"s": 76_571_648, "l": 1_362_250_752}[size]  # counted from the shapes of OpenAI's code
    zeros = 4 * 9 * config.n_embd * config.n_layer  # biases that are not trained: 3 + 1 + 4 + 1 widths
    one = step_memory(config, 1)
    assert (one.parameters, one.gradients, one.optimizer) == (4 * count + zeros, 4 * count, 8 * count)
    assert one.exchange == 0
    assert step_memory(config, 1, devices=2).exchange == 4 * count
    sharded = step_memory(config, 1, devices=8, sharded=True)
    assert (sharded.parameters - zeros, sharded.gradients, sharded.optimizer) == (count // 2, count // 2, count)
    block = 12 * config.n_embd**2 + 2 * config.n_embd
    assert sharded.exchange == 4 * (count - config.n_layer * block + 4 * block)
    assert step_memory(config, 1, devices=8, sharded=True, bf16=True).exchange == sharded.exchange // 2


def test_memory_orders():
    config = ImageGPTConfig.from_preset("s")
    plain, recomputed = (step_memory(config, 4, checkpointing=checkpointing) for checkpointing in (False, True))
    assert recomputed.activations < plain.activations / 8
    assert recomputed.backward > plain.backward
    assert step_memory(config, 4, bf16=True).activations < 0.7 * plain.activations
    long = ImageGPTConfig.from_preset("s", image_size=64)
    n_squared = 4 * config.n_layer * config.n_head * long.n_positions**2  # one float32 matrix for each head
    assert step_memory(long, 1).activations < n_squared / 3  # so none is kept


def test_memory_refuses():
    config = small_config()
    with pytest.raises(ValueError, match="at least 1; found 0 and 1"):
        step_memory(config, 0)
    with pytest.raises(ValueError, match="several devices; found 1"):
        step_memory(config, 1, sharded=True)


# -- plans -------------------------------------------------------------------------------------------------------------


def arguments(**given):
    return PlanArguments(**({"size": ["tiny"], "image_size": 8, "num_colors": 16, "max_steps": 100} | given))


def test_hours_and_cost():
    given = arguments(batch_size=32, devices=4, tflops=2e-3, cost_per_device_hour=1.5)
    plain, sharded, recomputing, _ = options(given)
    config = ImageGPTConfig.from_preset("tiny", image_size=8, n_colors=16)
    assert plain.hours == pytest.approx(100 * 32 * training_flops(config) / (4 * 2e9) / 3600)
    assert plain.cost == pytest.approx(plain.hours * 4 * 1.5)
    assert (sharded.hours, sharded.cost) == (plain.hours, plain.cost)
    assert 1.25 < recomputing.hours / plain.hours < 4 / 3
    assert options(replace(given, tflops=None, peak_tflops=8e-3, utilization=0.25))[0].hours == pytest.approx(
        plain.hours
    )


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
    for gib, fits in ((limit / GIB, 8), (limit / GIB * 0.999, 4), (1e-6, 0), (10, 64)):
        found = options(arguments(batch_size=64, memory_gib=gib, usable=1.0))[0]
        assert (found.largest_micro_batch, found.fits) == (fits, fits > 0)
        assert found.micro_batch * found.accumulation == 64
    given = options(arguments(batch_size=64, memory_gib=limit / GIB, usable=1.0, gradient_accumulation_steps=4))[0]
    assert (given.micro_batch, given.fits, given.largest_micro_batch) == (16, False, 8)


def test_the_simplest_that_fits():
    plans = options(arguments(batch_size=64, devices=2, memory_gib=0.012, usable=1.0))
    chosen = simplest_that_fits(plans)
    assert [option.fits for option in plans].index(True) == plans.index(chosen[0])
    assert "gradient_checkpointing" in flags(plans[2]) and "FSDP2" not in flags(plans[2])
    accumulating = replace(plans[1], micro_batch=4, accumulation=8)
    assert "FSDP2" in flags(accumulating) and "sync_each_batch" in flags(accumulating)
    nothing = options(arguments(batch_size=64, devices=2, memory_gib=1e-5))
    assert simplest_that_fits(nothing) == nothing[-1:]
    assert "| no |  |  |  |" in run_table([replace(nothing[0], hours=1.0, cost=1.0)])


def recorded(path, metric, value, unit, **settings):
    record = Record(metric, value, unit, "training", 1, None, "Image GPT tiny", "digits", settings=settings)
    write_records(path, [record, replace(record, value=value / 2), replace(record, metric="nats_per_pixel", value=9e9)])
    return str(path)


def test_throughput_from_records(tmp_path):
    file = tmp_path / "records.json"
    of = {"size": "tiny", "image size": 8}
    given = arguments(batch_size=32, devices=2)
    speed = recorded(file, "images_per_second", 400.0, "images/s", **of)
    plain, _, recomputing, _ = options(replace(given, records=speed))
    assert plain.hours == pytest.approx(100 * 32 / (2 * 400) / 3600)  # the faster of two
    assert recomputing.hours > plain.hours
    of_two = recorded(file, "images_per_second", 400.0, "images/s", devices=2, **of | {"gradient checkpointing": True})
    plain, _, recomputing, _ = options(replace(given, records=of_two))
    assert recomputing.hours == pytest.approx(100 * 32 / 400 / 3600)
    config = ImageGPTConfig.from_preset("tiny", image_size=8, n_colors=16)
    any_model = recorded(file, "tflops_per_second", 0.5, "TFLOP/s")
    assert options(replace(given, records=any_model))[0].hours == pytest.approx(
        100 * 32 * training_flops(config) / (2 * 0.5e12) / 3600
    )
    for other in ({"size": "xs"}, {"image size": 16}, {"objective": "masked"}, {"precision": "bfloat16 autocast"}):
        recorded(file, "images_per_second", 400.0, "images/s", **(of | other))
        with pytest.raises(ValueError, match="no images_per_second of tiny at 8 pixels, causal, float32"):
            options(replace(given, records=str(file)))


@pytest.mark.parametrize(
    ("value", "unit", "settings"),
    [
        (0.0, "images/s", {}),
        (-5.0, "images/s", {}),
        (float("nan"), "images/s", {}),
        ("100", "images/s", {}),
        (400.0, "s", {}),
        (400.0, "images/s", {"devices": 0}),
        (400.0, "images/s", {"devices": "2"}),
        (400.0, "images/s", {"gradient checkpointing": "false"}),
    ],
)
def test_records_that_say_nothing(tmp_path, value, unit, settings):
    settings = {"size": "tiny", "image size": 8} | settings
    record = Record(
        "images_per_second", value, unit, "training", 1, None, "Image GPT tiny", "digits", settings=settings
    )
    write_records(tmp_path / "records.json", [record])
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
        ({"usable": 1.5}, "--usable is a fraction"),
        ({"epochs": 1.0}, "give one of them"),
        ({"peak_tflops": 10.0}, "go together"),
        ({"tflops": 1.0, "records": "x"}, "give one of --tflops, --records"),
        ({"cost_per_device_hour": 1.0}, "A cost needs hours"),
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


def test_tables_of_the_documentation():
    """<!-- plan TABLE: FLAGS --> in docs/scaling.md: what the planner says now."""
    tables = re.findall(r"<!-- plan (\w+): (.*?) -->\n(.*?)\n<!-- end -->", SCALING, flags=re.DOTALL)
    assert {name for name, _, _ in tables} == {"memory", "hours", "fits"}
    for name, words, table in tables:
        (args,) = HfArgumentParser(PlanArguments).parse_args_into_dataclasses(shlex.split(words))
        plans = options(args)
        made = {"memory": memory_table, "hours": run_table, "fits": lambda plans: run_table(simplest_that_fits(plans))}[
            name
        ](plans)
        assert table == made, f"{name}: {words}"
    (chosen,) = [option for option in simplest_that_fits(plans) if option.size == "xl"]  # of 64 devices
    assert f"sharded, {chosen.hours:.0f} hours" in (ROOT / "scripts" / "run_plan.py").read_text()
