"""Costs of training: FLOPs against PyTorch's counter, memory against a measured step."""

import gc
from pathlib import Path

import pytest
import torch
from conftest import small_config
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hf_igpt import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTForMaskedImageModeling
from hf_igpt.presets import SIZES, TRAINING_V100_DAYS
from hf_igpt.training.costs import (
    executed_flops,
    forward_flops,
    measure_activations,
    step_memory,
    trace_step,
    training_flops,
)


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
    found = measure_activations(config, 5, checkpointing, precision)
    assert found == trace_step(config.to_json_string(), 5, checkpointing, precision)


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
