"""Whole images drawn pixel by pixel, beside transformers' `generate` with its own cache."""

from collections.abc import Iterator
from functools import partial

import torch
from transformers import PreTrainedModel

from arguments import BenchmarkArguments
from hf_igpt import ImageGPTConfig
from hf_igpt.cache_imagegpt import drawing_cache
from hf_igpt.evaluation.records import Record
from limits import PEAK_BANDWIDTH, build_matrix_products, find_peak
from side_by_side import build_models, read_shape
from stages import LIMIT, OURS, THEIRS, Contender, Stage
from timing import take_turns, time_alone


def time_generation(args: BenchmarkArguments) -> Iterator[list[Record]]:
    """Time drawing one image and many; on a GPU with the weights of iGPT-S in bfloat16."""
    on_gpu = args.device == "cuda"
    shape = read_shape(args)
    if on_gpu:
        preset = ImageGPTConfig.from_preset("s", image_size=args.image_size)
        shape = {name: getattr(preset, name) for name in shape}
    ours, theirs = (model.eval() for model in build_models(args.device, initializer_range=0.2, **shape))
    n_positions = ours.config.n_positions
    _check_greedy_tokens(ours, theirs, min(64, n_positions))
    if on_gpu:
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
    for batch_size in (1, 64) if on_gpu else (1, 16):
        new_tokens = args.max_tokens or n_positions
        contenders = {
            Contender(THEIRS): partial(draw_images, theirs, batch_size, new_tokens),
            Contender(OURS): partial(
                draw_images, ours, batch_size, new_tokens, cache_implementation=drawing_cache(ours)
            ),
        }
        stage = Stage(
            f"whole images, {batch_size} at once",
            batch_size,
            "random weights",
            shape,
            batch_size=batch_size,
            details={"tokens": new_tokens},
        )
        seconds = take_turns(contenders, min(3, args.repeats))
        seconds[Contender(LIMIT)] = _time_limit(ours, batch_size, new_tokens, args.repeats)
        yield stage.record_times(seconds)


def draw_images(model: PreTrainedModel, batch_size: int, new_tokens: int, **options) -> torch.Tensor:
    """Draw the first `new_tokens` pixels of images, the same in every call."""
    torch.manual_seed(1)
    prompt = torch.full((batch_size, 1), model.config.vocab_size - 1, device=model.device)  # SOS
    return model.generate(prompt, max_length=1 + new_tokens, **({"do_sample": True, "top_k": 0} | options))


def _check_greedy_tokens(ours: PreTrainedModel, theirs: PreTrainedModel, new_tokens: int) -> None:
    expected = draw_images(theirs, 2, new_tokens, do_sample=False)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        if not torch.equal(draw_images(ours, 2, new_tokens, do_sample=False, **options), expected):
            raise ValueError(
                f"Greedy tokens differ from transformers' with {options}: these timings would mean nothing."
            )


def _time_limit(model: PreTrainedModel, batch_size: int, new_tokens: int, repeats: int) -> list[float]:
    """Return the seconds of reading weights and cache from a known GPU's memory, else of the bare matrix products."""
    bandwidth = find_peak(PEAK_BANDWIDTH)
    if bandwidth is None:
        run = build_matrix_products(model, batch_size, 1, new_tokens // 2)
        return [new_tokens * seconds for seconds in time_alone(run, repeats)]
    # Weights and, on average, half a cache are read once per token, in bfloat16.
    weights = 2 * sum(p.numel() for name, p in model.named_parameters() if "wte" not in name and "wpe" not in name)
    cache = 2 * 2 * model.config.n_layer * model.config.n_embd * batch_size * new_tokens / 2
    return [new_tokens * (weights + cache) / bandwidth]
