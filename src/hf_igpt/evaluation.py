"""What is measured and how it is recorded: likelihoods, counting baselines, and records as JSON."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers

from . import __version__


RECORDS = "records.json"  # beside a model: what was measured. Written last: a folder that holds it holds a finished run
RUN = "run.json"  # beside a model: how it was made (`recipe`), and what a resumed run must have in common (`identity`)
BITS_PER_NAT = 1 / np.log(2)
_STRENGTHS = (0.3, 1, 3, 10, 30, 100, 300)  # of smoothing, in counts


@dataclass
class Record:
    """One measured number and all that is needed to know what it is. Lists of them are written as JSON.

    metric names its unit's quantity ("nats_per_pixel"; "accuracy", in the unit "fraction"); n counts images; data names the images, revision the version of
    the code; reference is the source of a figure that was published, not measured here. A baseline is what a model must
    beat. settings are what else tells it from its like: objective, layer, probe.
    """

    metric: str
    value: float
    unit: str
    split: str
    n: int
    seed: int | None
    model: str
    data: str
    revision: str = field(default=f"hf_igpt {__version__}")
    hardware: str = field(default_factory=lambda: this_machine())
    reference: str | None = None
    baseline: bool = False
    settings: dict = field(default_factory=dict)


def this_machine() -> str:
    """This machine in words: accelerator or processor cores, and the versions that matter."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{os.cpu_count()} {platform.machine()} CPU cores"
    return f"{device}, torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"


def write_records(path: str | Path, records: list[Record]):
    """Write `records` to `path` in one piece: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([asdict(record) for record in records], indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)


def read_records(path: str | Path) -> list[Record]:
    """The records of `path`."""
    return [Record(**fields) for fields in json.loads(Path(path).read_text())]


def markdown_table(records: list[Record]) -> str:
    """Records as a Markdown table: model, data, metric, value."""
    lines = ["| what | data | images | value |", "|---|---|---|---|"]
    for record in records:
        value = f"{100 * record.value:.1f} %" if record.unit == "fraction" else f"{record.value:.5g} {record.unit}"
        lines.append(f"| {record.model} | {record.data}, {record.split} | {record.n:,} | {value} |")
    return "\n".join(lines)


def nats_per_image(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean −log p of the pixels of each image: (B, N, K) logits, (B, N) tokens -> (B,), nats per pixel."""
    return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none").mean(dim=1)


def majority_vote(predictions: np.ndarray, seed: int = 0) -> np.ndarray:
    """The class that most of several predictions name, ties drawn at random [V2 4.6]: (votes, n) integers -> (n,)."""
    predictions = np.asarray(predictions)
    counts = np.stack([(predictions == label).sum(axis=0) for label in range(predictions.max() + 1)], axis=1)
    best = counts == counts.max(axis=1, keepdims=True)  # (n, classes)
    return np.where(best, np.random.default_rng(seed).random(best.shape), -1).argmax(axis=1)


def data_of(name: str, processor, what: str = "") -> str:
    """How records name data: the images, their size, the number of colours, and `what` else."""
    height, width = processor.token_grid()
    return f"{name}, {height}x{width}, {len(processor.clusters)} colours" + (f", {what}" if what else "")


# -- counting baselines ------------------------------------------------------------------------------------------------


def baselines(train: np.ndarray, held_out: np.ndarray, width: int, n_colors: int) -> dict[str, float]:
    """Held-out nats per pixel of models that only count, on the same tokens: what a network must beat.

    train, held_out: (n, N) tokens; width: pixels in a row. Keys: `uniform`, `unigram`, `position_unigram`, `left` (the
    pixel to the left; a border symbol in column 0), `left_up` (left and above). Counts are smoothed towards the next
    simpler model with a strength chosen by leave-one-out likelihood of train; contexts that never occurred fall back to it.
    """
    train, held_out = np.asarray(train, dtype=np.int64), np.asarray(held_out, dtype=np.int64)
    n_pixels = train.shape[1]

    def contexts(tokens):
        grid = tokens.reshape(len(tokens), -1, width)
        left = np.full_like(grid, n_colors)
        left[:, :, 1:] = grid[:, :, :-1]
        up = np.full_like(grid, n_colors)
        up[:, 1:] = grid[:, :-1]
        position = np.broadcast_to(np.arange(n_pixels).reshape(grid.shape[1:]), grid.shape)
        return [part.reshape(-1) for part in (grid, left, up, position)]

    x_train, left_train, up_train, position_train = contexts(train)
    x_test, left_test, up_test, position_test = contexts(held_out)
    ones = np.full(len(x_train), 1 / n_colors), np.full(len(x_test), 1 / n_colors)
    unigram = _smoothed(np.zeros_like(x_train), x_train, np.zeros_like(x_test), x_test, n_colors, *ones)
    position = _smoothed(position_train, x_train, position_test, x_test, n_colors, *unigram)
    left = _smoothed(left_train, x_train, left_test, x_test, n_colors, *unigram)
    up = _smoothed(up_train, x_train, up_test, x_test, n_colors, *unigram)
    either = [(a + b) / 2 for a, b in zip(left, up, strict=True)]
    both_train, both_test = (a * (n_colors + 1) + b for a, b in ((left_train, up_train), (left_test, up_test)))
    left_up = _smoothed(both_train, x_train, both_test, x_test, n_colors, *either)
    models = {"unigram": unigram, "position_unigram": position, "left": left, "left_up": left_up}
    return {"uniform": float(np.log(n_colors))} | {
        name: float(-np.log(probabilities).mean()) for name, (_, probabilities) in models.items()
    }


def _smoothed(context, x, context_test, x_test, n_colors, fallback, fallback_test):
    """p(x | context) = (count + s · fallback) / (total + s): leave-one-out on train, and on test.

    fallback: the simpler model's probability of each x. Returns both arrays of probabilities; s maximises the first's
    likelihood.
    """
    pairs, pair_counts = np.unique(context * n_colors + x, return_counts=True)
    totals = np.bincount(context)

    def counts(of_context, of_x):
        code = of_context * n_colors + of_x
        at = np.minimum(np.searchsorted(pairs, code), len(pairs) - 1)
        pair = np.where(pairs[at] == code, pair_counts[at], 0)
        total = np.where(of_context < len(totals), totals[np.minimum(of_context, len(totals) - 1)], 0)
        return pair, total

    pair, total = counts(context, x)
    best, strength, left_out = -np.inf, None, None
    for candidate in _STRENGTHS:
        probabilities = (pair - 1 + candidate * fallback) / (total - 1 + candidate)
        likelihood = np.log(probabilities).mean()
        if likelihood > best:
            best, strength, left_out = likelihood, candidate, probabilities
    pair_test, total_test = counts(context_test, x_test)
    return left_out, (pair_test + strength * fallback_test) / (total_test + strength)
