"""Threads, full disks, and memory over a long time. Also a program for a child: python load.py MEASURE, whose number is printed.

What grows is measured from where caches are warm: an eighth of the whole work comes before.
"""

import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np


TESTS = Path(__file__).parent.parent
N_THREADS = 6
MIB = 2**20
# What is done, how often in a whole soak, and how many MiB it may take for good.
MEASURES = {"training steps": (1000, 24), "generated images": (200, 24), "tokenised images": (20_000, 24)}


# -- threads -----------------------------------------------------------------------------------------------------------


def threads(rounds: int) -> Iterator[tuple[str, str, str]]:
    """What a thread does, alone and beside others on one model: the outcome of each call."""
    import torch
    from conftest import randomized, small_config

    from hf_igpt import ImageGPTForCausalImageModeling, ImageGPTImageProcessorPil
    from hf_igpt.evaluation.metrics import measure_surprise
    from hf_igpt.features_imagegpt import extract
    from hf_igpt.generation_imagegpt import complete, sample

    rng = np.random.default_rng(0)
    process = ImageGPTImageProcessorPil(clusters=rng.uniform(-1, 1, (16, 3)), size={"height": 8, "width": 8})
    torch.manual_seed(0)
    model = randomized(ImageGPTForCausalImageModeling(small_config())).train()
    pictures = [rng.integers(0, 256, (n + 1, 9, 11, 3), dtype=np.uint8) for n in range(N_THREADS)]
    tokens = [torch.from_numpy(rng.integers(0, 16, (n + 1, 64))) for n in range(N_THREADS)]
    drawn = {"seed": 0, "progress": False, "return_tokens": True}
    calls: dict[str, Callable[[int], Any]] = {
        "extract": lambda n: extract(model, tokens[n], batch_size=2, progress=False),
        "sample": lambda n: sample(model, process, 2, **(drawn | {"seed": n})),
        "complete": lambda n: complete(model, process, list(pictures[n]), 3, **(drawn | {"seed": n})),
        "tokenise": lambda n: process(list(pictures[n]))["input_ids"],
        "surprise": lambda n: measure_surprise(model, tokens[n], progress=False),
    }
    jobs = [(name, n) for n in range(N_THREADS) for name in calls]
    expected = {job: values(calls[job[0]](job[1])) for job in jobs}
    for _ in range(rounds):
        rng.shuffle(jobs)
        with ThreadPoolExecutor(N_THREADS) as pool:
            found = [pool.submit(calls[name], n) for name, n in map(tuple, jobs)]
        for (name, n), future in zip(jobs, found, strict=True):
            if error := future.exception():
                yield "traceback", f"{name} {n}", f"{type(error).__name__}: {error}"
                continue
            one, other = values(future.result()), expected[str(name), int(n)]
            same = len(one) == len(other) and all(
                np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True)
            )
            yield (
                "equal" if same else "silent",
                f"{name} {n}",
                "" if same else f"{name} beside others differs from alone",
            )
    yield (
        ("equal" if model.training else "silent"),
        "model.training",
        "" if model.training else "the model's mode has changed",
    )


def values(result: Any) -> list[np.ndarray]:
    if isinstance(result, dict):
        return [np.asarray(result[key]) for key in sorted(result)]
    return [np.asarray(item) for item in result] if isinstance(result, (list, tuple)) else [np.asarray(result)]


# -- memory, in a child ------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory, once what is free has been given back."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def growth(work: Callable[[int], object], number: int) -> float:
    """MiB by which the process grows over `number` pieces of work, after an eighth as many."""
    for index in range(number // 8):
        work(index)
    before = resident()
    for index in range(number):
        work(index)
    return (resident() - before) / MIB


def measure(name: str, number: int) -> float:
    import torch
    from conftest import randomized, small_config
    from PIL import Image

    from hf_igpt import ImageGPTForCausalImageModeling, ImageGPTImageProcessorPil
    from hf_igpt.generation_imagegpt import sample

    rng = np.random.default_rng(0)
    process = ImageGPTImageProcessorPil(clusters=rng.uniform(-1, 1, (16, 3)), size={"height": 8, "width": 8})
    model = randomized(ImageGPTForCausalImageModeling(small_config()))
    if name == "generated images":
        return growth(lambda seed: sample(model, process, 1, seed=seed, progress=False), number)
    if name == "tokenised images":
        return growth(
            lambda n: process(Image.fromarray(rng.integers(0, 256, (20 + n % 9, 24, 3), dtype=np.uint8))), number
        )
    from transformers import TrainerCallback

    from hf_igpt.training.arguments import PretrainingArguments
    from hf_igpt.training.trainer import ImageGPTTrainer

    marks = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (number // 8, number // 8 + number):
                marks[state.global_step] = resident()

    rows = [{"input_ids": row} for row in rng.integers(0, 16, (64, 64))]
    args = PretrainingArguments(
        output_dir="run", use_cpu=True, max_steps=number // 8 + number, logging_steps=50, disable_tqdm=True,
        eval_strategy="no", save_strategy="no", per_device_train_batch_size=4, learning_rate=1e-4,
    )  # fmt: skip
    args.warmup_steps = 0
    collate = lambda batch: {"labels": torch.from_numpy(np.stack([row["input_ids"] for row in batch]))}  # noqa: E731
    trainer = ImageGPTTrainer(model.train(), args=args, train_dataset=rows, data_collator=collate, processing_class=process,
                              callbacks=[Watch()])  # fmt: skip
    trainer.train()
    first, last = (marks[step] for step in sorted(marks))
    return (last - first) / MIB


def in_threads(trials: Any, folder: Path, seed: int, times: float) -> Iterator[Any]:
    """Threads that share a model, in a child."""
    from outcomes import Count

    count, start = Count("threads", f"calls of {N_THREADS} threads on one model"), time.monotonic()
    trial = trials.run(folder / "threads", __file__, "threads", max(1, round(30 * times)))
    for outcome, call, said in re.findall(r"^(\w+)\t(.*)\t(.*)$", trial.said, re.MULTILINE):
        count.add(outcome, call, said)
    if trial.status:
        count.add("traceback", "threads", trial.last_line)
    count.seconds = round(time.monotonic() - start, 1)
    yield count


def on_full_disks(trials: Any, folder: Path, seed: int, times: float) -> Iterator[Any]:
    """Disks that are full from a file event on, and small file systems that fill."""
    from kills import Scenario, prepare, spread
    from outcomes import Count

    for name in ("causal, flips", "fine-tuning, early stopping", "folder, token cache"):
        place = folder / re.sub(r"\W+", "-", name)
        prepare(place)
        scenario = Scenario(trials, name, place)
        count, start = Count("full disks", f"{name}: from a file event on, then room again"), time.monotonic()
        for n in spread(max(1, round(15 * times)), len(scenario.events) - 1):
            count.add(*disk_full(scenario, {"full": n}))
        count.seconds = round(time.monotonic() - start, 1)
        yield count
        if name == "causal, flips":
            count, start = Count("full disks", f"{name}: a tmpfs of some size, then room again"), time.monotonic()
            for kib in np.linspace(8, 280, max(1, round(20 * times))).astype(int):
                if outcome := small_disk(scenario, int(kib)):
                    count.add(*outcome)
            if count.injected:  # only root may mount
                count.seconds = round(time.monotonic() - start, 1)
                yield count
        shutil.rmtree(place)


def over_time(trials: Any, folder: Path, seed: int, times: float) -> Iterator[Any]:
    """What a process keeps of long work."""
    from outcomes import Count

    for name, (number, limit) in MEASURES.items():
        number = max(8, round(number * times))
        count, start = Count("memory", f"{number:,} {name}, growth of at most {limit} MiB"), time.monotonic()
        trial = trials.run(folder / "memory" / name, __file__, name, number)
        grown = re.search(r"^grown (\S+)$", trial.said, re.MULTILINE)
        if grown is None:
            count.add("traceback", name, trial.last_line)
        else:
            count.add("equal" if float(grown[1]) <= limit else "lost", name, f"{float(grown[1]):.1f} MiB")
        count.seconds = round(time.monotonic() - start, 1)
        yield count


def disk_full(
    scenario: Any, fault: dict, between: Callable[[Path], object] = lambda folder: None, folder: Path | None = None
) -> tuple[str, str, str]:
    """A run whose disk fills, and the same command with room: the first must end with a sentence, the second as undisturbed."""
    from kills import whole_checkpoints

    folder = folder or scenario.new_folder()
    first = scenario.run(folder, fault=fault)
    where = f"{fault}, {first.events[-1] if first.events else 'before any file'}"
    if first.status == 0:
        outcome, said = scenario.judge(folder, first, [])  # there was room after all, or what is missing was not missed
        return outcome, where, said
    if first.error is None:
        return "traceback", where, f"{first.status}: {first.last_line}"
    between(folder)
    whole = whole_checkpoints(folder / "run", scenario.checkpoints)
    outcome, said = scenario.judge(folder, scenario.run(folder), whole)
    return outcome, where, said


def small_disk(scenario: Any, kib: int) -> tuple[str, str, str] | None:
    """As `disk_full`, in a tmpfs that is made larger between; None where this user may not mount one."""
    folder = scenario.new_folder()
    folder.mkdir()
    mount = shlex.split(f"mount -t tmpfs -o size={kib}k tmpfs {folder}")
    if subprocess.run(mount, capture_output=True).returncode:
        return None
    try:
        enlarge = lambda place: subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)  # noqa: E731
        outcome, _, said = disk_full(scenario, {}, enlarge, folder)
        return outcome, f"{kib} KiB", said
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    what, number = sys.argv[1], int(sys.argv[2])
    if what == "threads":
        for outcome in threads(number):
            print(*outcome, sep="\t")
    else:
        print(f"grown {measure(what, number)}")
