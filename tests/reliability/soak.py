"""Attacks of every kind, in full, and the record of what came of them. From the root of the repository:

    make soak                                            # hours on one core; writes reports/reliability/last.json
    python tests/reliability/soak.py --only kills        # one part; the others' rows of the file stay

What fails does not stop it: the records say what was injected, how often, and what came of it, with examples. The exit status
is 1 if anything is not as it should be.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from damage import CHANGES, changed_arguments, damaged_checkpoints
from fuzz import fuzz
from kills import SCENARIOS, kill_launchers, kill_runs
from load import in_threads, on_full_disks, over_time
from outcomes import Count, read_counts, write_counts
from trials import ROOT, Trials


def kills(trials: Trials, folder: Path, seed: int, times: float) -> Iterator[Count]:
    yield from kill_runs(trials, folder, list(SCENARIOS), round(28 * times), round(8 * times), seed)
    yield from kill_launchers(folder / "launched", max(1, round(8 * times)), seed)


def damage(trials: Trials, folder: Path, seed: int, times: float) -> Iterator[Count]:
    names = ["causal, flips", "fine-tuning, early stopping", "stream"]
    return damaged_checkpoints(trials, folder, names, times)


def changes(trials: Trials, folder: Path, seed: int, times: float) -> Iterator[Count]:
    return changed_arguments(trials, folder, list(CHANGES), times)


PARTS: dict[str, Callable[[Trials, Path, int, float], Iterator[Count]]] = {
    "kills": kills,
    "damage": damage,
    "changes": changes,
    "fuzz": fuzz,
    "threads": in_threads,
    "disks": on_full_disks,
    "memory": over_time,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "reports" / "reliability" / "last.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0, help="of random moments and of all fuzzers")
    parser.add_argument(
        "--times", type=float, default=1.0, help="0.1: a tenth of all that is injected; 2: twice as much"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts: dict[str, list[Count]] = {}
    for count in read_counts(args.output) if args.output.exists() else []:
        counts.setdefault(count.part, []).append(count)
    about = {"revision": revision(), "date": str(date.today()), "seed": str(args.seed), "torch": torch.__version__}
    for part in args.only:
        counts[part], start = [], time.monotonic()
        with tempfile.TemporaryDirectory(prefix="soak-") as place, Trials(Path(place)) as trials:
            for count in PARTS[part](trials, Path(place), args.seed, args.times):
                count.part = part
                counts[part].append(count)
                print(f"{count.kind}, {count.what}: {count.injected:,} injected, {count.wrong:,} wrong", flush=True)
                for example in count.examples:
                    print("    {outcome} ({times} times), {fault}: {said}".format(**example), flush=True)
                write_counts(args.output, about, [one for name in PARTS for one in counts.get(name, [])])
        print(f"{part}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    return int(any(count.wrong for part in args.only for count in counts[part]))


def revision() -> str:
    """The commit that was attacked."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "src"]).returncode
    return commit + (" with changes" if changed else "")


if __name__ == "__main__":
    sys.exit(main())
