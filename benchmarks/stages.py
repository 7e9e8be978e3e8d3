"""What is compared, and the records that a comparison leaves."""

import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from hf_igpt.evaluation import Record


OURS, THEIRS, LIMIT = "hf_igpt", "transformers", "limit"


class Contender(NamedTuple):
    """What takes part in a stage: a system, and how it is run when not as it comes."""

    system: str
    variant: str | None = None  # "compiled", "compiled bf16"

    def __str__(self) -> str:
        return self.system if self.variant is None else f"{self.system} {self.variant}"


@dataclass
class Stage:
    """What all records of one stage share.

    n: images in a call, 0 when images are not what is timed. dataset: what is worked on, in words. shape: the model's
    n_layer, n_embd, n_head and n_positions. details: anything else that a reader of the record may want to know.
    """

    name: str
    n: int
    dataset: str
    shape: dict[str, int] = field(default_factory=dict)
    batch_size: int | None = None
    size: str | None = None
    image_size: int | None = None
    precision: str | None = None
    colors: int | None = None
    details: dict = field(default_factory=dict)

    def record(self, metric: str, value: float, unit: str, contender: Contender, details: dict | None = None) -> Record:
        """Make one record. Every record of the benchmarks is made here."""
        named = {
            "batch size": self.batch_size,
            "size": self.size,
            "image size": self.image_size,
            "precision": self.precision,
            "colors": self.colors,
        }
        settings = {"stage": self.name, **self.shape}
        settings |= {name: found for name, found in named.items() if found is not None}
        settings |= self.details | {"threads": torch.get_num_threads()} | (details or {})
        return Record(metric, value, unit, "made here", self.n, 0, str(contender), self.dataset, settings=settings)

    def record_times(self, seconds: dict[Contender, list[float]]) -> list[Record]:
        """Make a record of each contender's median time."""
        return [
            self.record(
                "seconds",
                statistics.median(times),
                "s",
                contender,
                {"fastest": min(times), "slowest": max(times), "repeats": len(times)},
            )
            for contender, times in seconds.items()
        ]

    def record_memory(self, memory: dict[Contender, float]) -> list[Record]:
        """Make a record of each contender's peak memory."""
        return [self.record("peak_memory", mib, "MiB", contender) for contender, mib in memory.items()]


# Readers of records ask through these alone.


def stage_of(record: Record) -> str | None:
    """Return the stage's name; None for a record that is not of a benchmark."""
    return record.settings.get("stage")


def system_of(record: Record) -> str:
    """Return what was timed: ours, transformers' or the limit."""
    return record.model.partition(" ")[0]


def variant_of(record: Record) -> str | None:
    """Return how the system was run; None when as it comes."""
    return record.model.partition(" ")[2] or None


def contender_of(record: Record) -> Contender:
    """Return what was timed and how it was run."""
    return Contender(system_of(record), variant_of(record))


def dataset_of(record: Record) -> str:
    """Return what the stage worked on."""
    return record.data
