"""What became of what was injected: counts, the records that the soak writes, and the table made of them."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


# Besides `equal`, which is what should come of everything that is not refused.
MEANINGS = {
    "equal": "right: bit by bit what an undisturbed run, one thread, or a second call gives",
    "refused": "one sentence that says why, nothing else",
    "silent": "accepted, and something else came of it",
    "traceback": "an error that is not a sentence, a crash, or no end",
    "lost": "right in the end, but work was lost: trained again although a whole checkpoint was there, or blocked",
}
EXAMPLES = 12  # of each kind that are kept in a record


@dataclass
class Count:
    """How often one kind of fault was injected, and what came of it."""

    kind: str  # "kills", "damaged checkpoints", "fuzzing", …
    what: str
    injected: int = 0
    equal: int = 0
    refused: int = 0
    silent: int = 0
    traceback: int = 0
    lost: int = 0
    seconds: float = 0.0
    allowed: tuple[str, ...] = ("equal",)  # outcomes that are as they should be
    part: str = ""  # of the soak
    examples: list[dict[str, Any]] = field(default_factory=list)  # of the others

    def add(self, outcome: str, fault: object, said: str = "") -> None:
        """Count an outcome. If it should not be, it is kept as an example, or one of the same words is counted up."""
        self.injected += 1
        setattr(self, outcome, getattr(self, outcome) + 1)
        if outcome in self.allowed:
            return
        same = [one for one in self.examples if alike(one["outcome"], one["said"]) == alike(outcome, said)]
        if same:
            same[0]["times"] += 1
        elif len(self.examples) < EXAMPLES:
            self.examples.append({"outcome": outcome, "times": 1, "fault": str(fault), "said": said})

    @property
    def wrong(self) -> int:
        """How many outcomes are not as they should be."""
        return self.injected - sum(getattr(self, outcome) for outcome in self.allowed)


def alike(outcome: str, said: str) -> tuple[str, str]:
    """The same for what is wrong in the same way: of an error its type and place, else the words without numbers."""
    return outcome, said.partition(": ")[0] if outcome == "traceback" else re.sub(r"\d+", "0", said)


def write_counts(path: Path, about: dict[str, str], counts: Iterable[Count]) -> None:
    """Write what the soak found, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps({"about": about, "counts": [asdict(count) for count in counts]}, indent=1) + "\n")
    partial.replace(path)


def read_counts(path: Path) -> list[Count]:
    return [Count(**row | {"allowed": tuple(row["allowed"])}) for row in json.loads(path.read_text())["counts"]]


def summed(counts: list[Count]) -> list[Count]:
    """One count for each kind."""
    sums: dict[str, Count] = {}
    for count in counts:
        total = sums.setdefault(count.kind, Count(count.kind, "all", allowed=count.allowed))
        for name in ("injected", *MEANINGS):
            setattr(total, name, getattr(total, name) + getattr(count, name))
    return list(sums.values())


def rows(counts: list[Count]) -> list[tuple[str, ...]]:
    """The head of a table, a row for each count, and their sums. What should not be has a "✗"; "–" is none."""
    names = tuple(MEANINGS)
    head = ("kind", "what", "injected", *names)
    body = []
    for count in counts:
        cells = []
        for name in names:
            number = getattr(count, name)
            cells.append("–" if not number else f"{number:,}" if name in count.allowed else f"{number:,} ✗")
        body.append((count.kind, count.what, f"{count.injected:,}", *cells))
    sums = [sum(getattr(count, name) for count in counts) for name in ("injected", *names)]
    return [head, *body, ("all", "", *(f"{number:,}" for number in sums))]
