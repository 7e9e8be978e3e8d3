"""Records of the benchmarks as a Markdown table, here, in the README and in docs/speed.md."""

from hf_igpt.evaluation.records import Record
from photographs import PHOTOGRAPHS
from stages import LIMIT, OURS, THEIRS, Contender, contender_of


HEADER = ["stage", "hf_igpt", "transformers", "times faster", "limit / hf_igpt", "memory / theirs"]


def format_table(records: list[Record], summary: bool = False) -> str:
    """Return a line for each stage and each of our variants in it, with times and ratios.

    A variant is compared with the same variant of transformers, or with transformers as it comes when there is none.

    summary: only stages in which transformers takes part, without those that tokenize photographs one at a time.
    """
    if summary:
        compared = {record.stage for record in records if record.system == THEIRS}
        records = [record for record in records if record.stage in compared and not _is_single_photograph(record)]
    lines = [_format_row(HEADER), "|---" * len(HEADER) + "|"]
    for stage in dict.fromkeys(record.stage for record in records):
        own = [record for record in records if record.stage == stage]
        seconds, memory = _values_of(own, "seconds"), _values_of(own, "peak_memory")
        limit = seconds.get(Contender(LIMIT))
        for ours in seconds:
            if ours.system != OURS:
                continue
            theirs = Contender(THEIRS, ours.variant)
            if theirs not in seconds:
                theirs = Contender(THEIRS)
            our_time, their_time = seconds[ours], seconds.get(theirs)
            our_memory, their_memory = memory.get(ours), memory.get(theirs)
            cells = [
                stage if ours.variant is None else f"{stage}, {ours.variant}",
                format_seconds(our_time),
                "" if their_time is None else format_seconds(their_time),
                "" if their_time is None else f"{their_time / our_time:.{2 if their_time < 10 * our_time else 0}f}",
                "" if limit is None else f"{limit / our_time:.2f}",
                "" if our_memory is None or their_memory is None else f"{our_memory / their_memory:.2f}",
            ]
            lines.append(_format_row(cells))
    return "\n".join(lines)


def format_seconds(seconds: float) -> str:
    """Return three digits in the largest unit of which there is at least one."""
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _values_of(records: list[Record], metric: str) -> dict[Contender, float]:
    return {contender_of(record): record.value for record in records if record.metric == metric}


def _is_single_photograph(record: Record) -> bool:
    return record.dataset == PHOTOGRAPHS and record.n == 1


def _format_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
