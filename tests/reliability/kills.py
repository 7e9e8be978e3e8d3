"""Runs that are killed and started again by the same command, against the same run undisturbed.

`SCENARIOS` are commands of the real scripts on a network of one block and images of 4x4 pixels: the faults are in files and
states, which are those of large models. All comparisons are bit by bit, on the CPU.
"""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from outcomes import Count
from trials import SCRIPTS, Trial, Trials, environment


SHAPE = "n_layer=1,n_embd=16,n_head=1"
COMMON = "--output_dir run --image_size 4 --use_cpu --disable_tqdm True --seed 1 --logging_steps 1 --max_eval_samples 8"
STEPS = f"{COMMON} --max_steps 6 --save_steps 2 --eval_steps 2 --num_samples 1"
GREYS = "--image_processor_name ../greys.npy"
FEW = "--max_train_samples 40"  # three steps an epoch
PRETRAIN = f"run_pretrain.py {STEPS} --config_overrides {SHAPE}"
SCENARIOS = {
    "causal, flips": f"{PRETRAIN} --num_colors 4 {FEW} --random_flip",
    "masked": f"{PRETRAIN} {GREYS} {FEW} --objective masked --random_flip",
    "pad-crop, milestones": f"{PRETRAIN} {GREYS} {FEW} --pad_crop --milestones 0.4,0.5,1",
    "two workers": f"{PRETRAIN} {GREYS} {FEW} --random_flip --dataloader_num_workers 2",
    "dropout, accumulation": f"run_pretrain.py {STEPS} {GREYS} {FEW} --per_device_train_batch_size 8"
    f" --gradient_accumulation_steps 2 --config_overrides {SHAPE},resid_pdrop=0.1,embd_pdrop=0.1,attn_pdrop=0.1",
    "half epochs, every checkpoint": f"run_pretrain.py {COMMON} {GREYS} {FEW} --num_train_epochs 2.5 --save_steps 1 --num_samples 0"
    f" --save_total_limit 20 --config_overrides {SHAPE}",
    "fine-tuning, early stopping": f"run_finetune.py {COMMON} {GREYS} {FEW} --num_train_epochs 9 --early_stopping_patience 2"
    f" --learning_rate 1e-9 --random_flip --config_overrides {SHAPE}",
    "stream": f"{PRETRAIN} {GREYS} --train_dir ../train.parquet --validation_dir ../valid.parquet --streaming --random_flip",
    "folder, token cache": f"{PRETRAIN} --num_colors 4 --train_dir ../photos --data_cache_dir cache --random_flip"
    " --train_val_split 0.2",
}
# Neither time nor place is part of a run; the state of random generators is proved by what follows from it.
TIMES = re.compile(r".*(_runtime|_per_second)$|minutes$")
UNREAD = ("training_args.bin", "rng_state.pth", "checksums.json")  # the last: hashes of files with times and paths


def prepare(folder: Path) -> None:
    """Write what the scenarios read: a palette of 4 greys, images as parquet files, and images as files."""
    import io

    import datasets
    from PIL import Image

    datasets.disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "greys.npy", np.repeat(np.linspace(-1, 1, 4)[:, None], 3, axis=1))
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir(exist_ok=True)
    cells = []
    for index in range(60):
        image, buffer = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)), io.BytesIO()
        image.save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
        if index < 40:
            image.save(folder / "photos" / f"{index:02}.png")
    images = datasets.Dataset.from_dict(
        {"image": cells}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )
    images.select(range(48)).to_parquet(folder / "train.parquet")
    images.select(range(48, 60)).to_parquet(folder / "valid.parquet")


# -- what a run has left -----------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, object]:
    """What the files of a run mean, by name: two runs are the same if and only if this is."""
    return {
        path.relative_to(folder).as_posix(): meaning(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in UNREAD and path.name != ".lock"
    }


def meaning(path: Path) -> object:
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    if path.name == "trainer_state.json":
        state = json.loads(path.read_text())
        state["log_history"] = [
            {name: value for name, value in entry.items() if not TIMES.match(name)}
            for entry in state["log_history"]
            if "train_runtime" not in entry  # which a run that had ended does not log again
        ]
        return state
    return path.read_bytes()


def plain(value: object) -> object:
    """Tensors as bytes, so that == compares bit by bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def differences(expected: dict[str, object], found: dict[str, object], left: bool = True) -> str:
    """Which files differ, in words; "" if none does. left: whether files count that should not be there."""
    words = [f"{name} is missing" for name in expected.keys() - found.keys()]
    words += [f"{name} is left" for name in found.keys() - expected.keys()] if left else []
    for name in sorted(expected.keys() & found.keys()):
        one, other = expected[name], found[name]
        if one != other:
            parts = [key for key in one if one[key] != other.get(key)] if isinstance(one, dict) else []
            if "log_history" in parts:
                log, its = one["log_history"], other["log_history"]
                keys = {
                    key
                    for a, b in zip(log, its, strict=False)
                    for key in a.keys() | b.keys()
                    if a.get(key) != b.get(key)
                }
                parts += sorted(keys) or [f"{len(its)} entries rather than {len(log)}"]
            words.append(f"{name} differs" + (f" ({', '.join(map(str, parts))})" if parts else ""))
    return "; ".join(sorted(words))


def whole_checkpoints(folder: Path, expected: dict[str, object]) -> list[int]:
    """The steps of the checkpoints in a killed run's folder that are sealed and all there, by a run that kept all of its own."""
    steps = []
    for place in folder.glob("checkpoint-*"):
        names = {name for name in expected if name.startswith(f"{place.name}/")}
        try:
            found = {f"{place.name}/{name}": value for name, value in contents(place).items()}
        except Exception:  # whatever a torn file is read as
            continue
        if (place / "checksums.json").is_file() and names and all(found.get(name) == expected[name] for name in names):
            steps.append(int(place.name.split("-")[1]))
    return steps


def resumed_step(said: str) -> int:
    """The step of the checkpoint that a run continued from; 0: from the beginning."""
    steps = re.findall(r"(?:[Rr]esum\w+ from|had ended with) \S*checkpoint-(\d+)", said)
    return int(steps[-1]) if steps else 0


# -- trials ------------------------------------------------------------------------------------------------------------


class Scenario:
    """A command, what an undisturbed run of it leaves, and how that looks while it lasts."""

    def __init__(self, trials: Trials, name: str, folder: Path, remains: "Remains | None" = None) -> None:
        self.trials, self.name, self.folder, self.remains = trials, name, folder, remains or Remains()
        self.words = shlex.split(SCENARIOS[name])
        self.numbers = itertools.count()
        start = time.monotonic()
        whole = self.run(folder / "whole")
        self.seconds = time.monotonic() - start
        if whole.status:
            raise RuntimeError(f"{name}, undisturbed: {whole.said[-3000:]}")
        self.events, self.expected = whole.events, contents(folder / "whole" / "run")
        keeping = self.run(folder / "keeping", "--save_total_limit", 100)  # every checkpoint, to compare with
        self.checkpoints = contents(folder / "keeping" / "run")
        assert keeping.status == 0, keeping.said

    def run(self, folder: Path, *more: object, fault: dict | None = None, **options: object) -> Trial:
        script, *words = self.words
        return self.trials.run(folder, script, *words, *more, fault=fault, **options)

    def new_folder(self) -> Path:
        return self.folder / f"trial-{next(self.numbers)}"

    def judge(self, folder: Path, again: Trial, whole: list[int]) -> tuple[str, str]:
        """The outcome of a run that was started again, when the checkpoints of the steps `whole` were there, and why."""
        if again.error and "holds a finished run" not in again.error:
            return ("lost" if whole or "Another run" in again.error else "refused"), again.error
        if again.status and not again.error:
            return "traceback", f"{again.status}: {again.last_line}"
        try:
            found = contents(folder / "run")
        except Exception as error:
            return "silent", f"{type(error).__name__}: {error}"
        if different := differences(self.expected, found, left=False):
            return "silent", different
        if again.status == 0 and whole and resumed_step(again.said) < max(whole):
            return "lost", f"checkpoint-{max(whole)} was whole, continued from {resumed_step(again.said)}"
        self.remains.look(self, folder / "run")
        return "equal", ""

    def kill(self, fault: dict) -> tuple[str, str, str]:
        """Run with a fault, then again without: the outcome, where the fault struck, and what was wrong."""
        folder = self.new_folder()
        first = self.run(folder, fault=fault)
        where = f"{fault}, {first.events[-1] if first.events else 'before any file'}"
        if first.status >= 0 and "full" not in fault:
            outcome, said = self.judge(folder, first, [])  # it had ended before
        else:
            whole = whole_checkpoints(folder / "run", self.checkpoints)
            again = self.run(folder)
            for _ in range(
                20
            ):  # workers, which hold what their parent had opened, notice within seconds that it is gone
                if again.error is None or "Another run is writing" not in again.error:
                    break
                time.sleep(0.5)
                again = self.run(folder)
            outcome, said = self.judge(folder, again, whole)
        shutil.rmtree(folder)
        return outcome, where, said


class Remains:
    """What is counted apart from all else in runs that ended equal, so that it hides nothing."""

    def __init__(self) -> None:
        self.litter = Count("kills", "no part of a checkpoint left behind, in all of these that ended equal")

    def look(self, scenario: Scenario, run: Path) -> None:
        names = {path.name for path in last_checkpoint(scenario.folder / "keeping" / "run").iterdir()}
        parts = [
            place.name
            for place in run.glob("checkpoint-*")
            if place.is_dir() and {path.name for path in place.iterdir()} < names
        ]
        self.litter.add("silent" if parts else "equal", scenario.name, f"a part of {', '.join(parts)}" if parts else "")


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint's folder."""
    return max(run.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))


def spread(n: int, among: int) -> list[int]:
    """n of the numbers 1..among, evenly."""
    return sorted({1 + index * (among - 1) // max(1, n - 1) for index in range(min(n, among))})


def kill_runs(
    trials: Trials, folder: Path, names: list[str], at_events: int, at_random: int, seed: int
) -> Iterator[Count]:
    """Kill each scenario at `at_events` file events, whole and torn, and at `at_random` moments."""
    rng = np.random.default_rng(seed)
    remains = Remains()
    for name in names:
        place = folder / re.sub(r"\W+", "-", name)
        prepare(place)
        scenario = Scenario(trials, name, place, remains)
        events = spread(at_events, len(scenario.events))
        faults = {
            "SIGKILL at a file event": [{"kill": n} for n in events],
            "and the last file torn": [{"kill": n, "tear": True} for n in events],
            "SIGKILL at a random moment": [
                {"after": float(rng.uniform(0, scenario.seconds))} for _ in range(at_random)
            ],
        }
        for words, each in faults.items():
            count, start = Count("kills", f"{name}: {words}"), time.monotonic()
            for fault in each:
                count.add(*scenario.kill(fault))
            count.seconds = round(time.monotonic() - start, 1)
            if each:
                yield count
        shutil.rmtree(place)
    yield remains.litter


# -- several processes -------------------------------------------------------------------------------------------------

LAUNCHED = (
    f"run_pretrain.py {STEPS} {GREYS} {FEW} --random_flip --per_device_train_batch_size 8 --config_overrides {SHAPE}"
)


def launch(folder: Path) -> subprocess.Popen[bytes]:
    """Two processes by torchrun, in a session of their own; what they say goes to `said`, which is emptied first."""
    script, *words = shlex.split(LAUNCHED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    folder.mkdir(exist_ok=True)
    with open(folder / "said", "wb") as said:
        return subprocess.Popen(
            [*torchrun, str(SCRIPTS / script), *words],
            cwd=folder,
            env=environment(folder.parent),
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def living(session: int) -> list[int]:
    """The processes of a session that are not yet gone."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = (place / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(place.name))
    return found


def kill_launchers(folder: Path, number: int, seed: int) -> Iterator[Count]:
    """Kill torchrun alone, at random moments of training, and start the same command at once, and once the workers are gone.

    Its workers may live on: while they do, nobody else may write to their folder.
    """
    prepare(folder)
    count, start = Count("kills", "two processes: SIGKILL of torchrun alone"), time.monotonic()
    first = launch(folder / "whole")
    if first.wait(300):
        raise RuntimeError((folder / "whole" / "said").read_text()[-3000:])
    expected = contents(folder / "whole" / "run")
    for moment in np.random.default_rng(seed).uniform(0, 2, number):
        place = folder / "trial"
        orphaned = launch(place)
        while orphaned.poll() is None and not (place / "run" / "run.json").exists():
            time.sleep(0.01)
        time.sleep(moment)
        os.kill(orphaned.pid, signal.SIGKILL)
        orphaned.wait()
        left = len(living(orphaned.pid))
        again = launch(place)
        status = again.wait(300)
        said = (place / "said").read_text(errors="replace")
        deadline = time.monotonic() + 60
        while living(orphaned.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        if stuck := living(orphaned.pid):
            for process in stuck:
                os.kill(process, signal.SIGKILL)
        if status and "Another run" in said:
            status = launch(place).wait(300)
            said = (place / "said").read_text(errors="replace")
        refusals = re.findall(r"run_pretrain.py: error: (.*)", said)
        different = (
            differences(expected, contents(place / "run"), left=False) if (place / "run").is_dir() else "no folder"
        )
        if stuck:
            outcome, words = "lost", "the workers live on and write nothing"
        elif status and "finished run" not in "".join(refusals):
            outcome, words = ("lost", refusals[0]) if refusals else ("traceback", said.rstrip()[-300:])
        else:
            outcome, words = ("silent", different) if different else ("equal", "")
        count.add(outcome, f"{moment:.2f} s after run.json, {left} processes left", words)
        shutil.rmtree(place)
    count.seconds = round(time.monotonic() - start, 1)
    yield count
