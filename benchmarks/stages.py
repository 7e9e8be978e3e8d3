"""What is compared, and the records that a comparison leaves."""

import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from hf_igpt.evaluation.records import Record


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
        shape = dict(self.shape)
        return Record(
            task="speed",
            metric=metric,
            value=value,
            unit=unit,
            split="made here",
            n=self.n,
            seed=0,
            dataset=self.dataset,
            image_size=None if self.image_size is None else (self.image_size, self.image_size),
            colors=self.colors,
            size=self.size,
            n_layer=shape.pop("n_layer", None),
            n_embd=shape.pop("n_embd", None),
            stage=self.name,
            system=contender.system,
            variant=contender.variant,
            batch_size=self.batch_size,
            precision=self.precision,
            details=shape | self.details | {"threads": torch.get_num_threads()} | (details or {}),
        )

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


def contender_of(record: Record) -> Contender:
    """Return what was timed and how it was run."""
    return Contender(record.system or "", record.variant)
