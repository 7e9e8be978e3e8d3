"""Seconds and MiB: the only place where a benchmark reads a clock or asks for memory.

The clock is `torch.utils.benchmark.timer`, which waits for the accelerator to finish before it is read.
"""

import gc
import json
import math
import tempfile
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer, timer


Name = TypeVar("Name", bound=Hashable)
TURN_SECONDS = 0.1


def measure_seconds(run: Callable, calls: int = 1) -> float:
    """Return the mean seconds of `calls` calls, without any call to warm up."""
    start = timer()
    for _ in range(calls):
        run()
    return (timer() - start) / calls


def take_turns(contenders: Mapping[Name, Callable], repeats: int) -> dict[Name, list[float]]:
    """Return the seconds per call of each contender in `repeats` turns, after one call each to warm up.

    Contenders take turns because the speed of a shared machine drifts: what slows one down slows them all. In its turn a
    short function is called again and again for `TURN_SECONDS`, and the mean counts: the first call after another's turn
    finds its data gone from the processor's caches, which is not what the next of many batches finds.
    """
    calls = {name: math.ceil(TURN_SECONDS / measure_seconds(run)) for name, run in contenders.items()}
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            seconds[name].append(measure_seconds(run, calls[name]))
    return seconds


def time_alone(run: Callable, repeats: int) -> list[float]:
    """Return the seconds per call of a function that has no opponent: `repeats` medians of `TURN_SECONDS` each."""
    alone = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return [alone.blocked_autorange(min_run_time=TURN_SECONDS).median for _ in range(repeats)]


def measure_peak_memory(run: Callable, device: str = "cpu") -> float:
    """Return the MiB that PyTorch's allocator holds at the peak of a call, beyond what it held before."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # A trace has an event for each allocation and, with negative bytes, for each release.
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    allocations = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    held = np.cumsum([event["args"]["Bytes"] for event in allocations])
    return float(held.max(initial=0)) / 2**20
