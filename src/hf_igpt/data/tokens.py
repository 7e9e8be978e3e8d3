"""Images as tokens: cached on disk, as rows of a dataset with augmentation and masks, as a stream, in batches.

Without random crops, images are tokenised once and `datasets` caches the tokens on disk as uint8 or uint16. With random crops, an
image is cropped and tokenised every time it is read.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import datasets
import numpy as np
import PIL
import pyarrow
import torch
import transformers
from PIL.Image import Image
from pyarrow.compute import struct_field
from tqdm.auto import tqdm

from ..clusters import lookup_table
from ..image_processing_imagegpt import AnyImageProcessor
from ..presets import IMAGE_SIZE, MASK_PROBABILITY, PAD_CROP_PIXELS
from .arguments import DataArguments
from .images import random_crop, read_images, report_bad_images
from .sources import IMAGE, LABEL


TOKENS = "input_ids"
MASK = "bool_masked_pos"
CLASS = "class_labels"  # as the model is told, or −1 for none
_CACHE_VERSION = 2  # to be raised when the same image and processor give other tokens
SHUFFLE_BUFFER = 10_000  # images in the shuffle buffers of a stream, over all processes
BATCH = 32  # images tokenised between two writes to the cache

Row: TypeAlias = dict[str, Any]  # a row of `ImageTokens`


def tokenize_cells(
    processor: AnyImageProcessor,
    cells: Iterable[Any],
    indices: Iterable[int],
    on_bad_image: str,
    then: Callable[[Image, int], Image] = lambda image, index: image,
) -> tuple[list[np.ndarray], list[str]]:
    """Tokenise the readable cells: a list of (N,) int64, and for every cell the reason why it is unreadable, or "".

    The arguments other than `processor` are those of `read_images`.
    """
    tokens: list[np.ndarray] = []
    all_reasons: list[str] = []
    for images, reasons in read_images(cells, indices, on_bad_image, then):
        tokens += list(processor(images)[TOKENS]) if images else []
        all_reasons += reasons
    return tokens, all_reasons


def tokenize(
    dataset: datasets.Dataset,
    processor: AnyImageProcessor,
    on_bad_image: str = "error",
    num_proc: int | None = None,
    desc: str | None = None,
) -> datasets.Dataset:
    """Tokenise a dataset from `load_images`: the column `input_ids` holds uint8 or uint16 (N,), and `label` is kept.

    `datasets` caches the result on disk, keyed by the images and the processor. An unreadable image is a ValueError; with
    `on_bad_image="skip"` it is left out and reported. num_proc: processes that share the work. desc: the progress bar's title.
    """
    n_tokens = int(np.prod(processor.token_grid()))
    dtype = "uint8" if len(processor.palette) <= 256 else "uint16"
    features = {TOKENS: datasets.List(datasets.Value(dtype), length=n_tokens), "bad": datasets.Value("string")}
    if LABEL in dataset.features:
        features[LABEL] = dataset.features[LABEL]

    def to_tokens(batch: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        rows, reasons = tokenize_cells(processor, batch[IMAGE], indices, on_bad_image)
        tokens = np.zeros((len(reasons), n_tokens), dtype)
        if rows:
            tokens[[not reason for reason in reasons]] = rows
        return {TOKENS: tokens, "bad": reasons}

    if num_proc is not None:
        lookup_table(processor.palette)  # built before the processes fork, which then share it
    dataset = _map_all(
        dataset,
        to_tokens,
        remove_columns=[IMAGE],
        features=datasets.Features(features),
        num_proc=num_proc,
        new_fingerprint=_cache_key(dataset, processor.to_json_string(), processor.backend, on_bad_image),
        desc=desc or "Tokenising",
    )
    if on_bad_image == "skip":
        dataset = _drop_bad_rows(dataset, dataset["bad"])
    return dataset.remove_columns("bad")


def _map_all(dataset: datasets.Dataset, work: Callable[..., dict[str, Any]], **options: Any) -> datasets.Dataset:
    """`dataset.map` of `work` on batches with their indices, one row for each; a cache that is damaged or cut short is made anew."""
    options |= {"batched": True, "batch_size": BATCH, "with_indices": True}
    try:
        done = dataset.map(work, **options)
        if len(done) == len(dataset):
            return done
        damage = f"it has {len(done)} of {len(dataset)} images"
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        damage = str(error)
    tqdm.write(f"The cache of an earlier run is damaged ({damage}): it is made anew.")
    return dataset.map(work, load_from_cache_file=False, **options)


def _cache_key(dataset: datasets.Dataset, *work: object) -> str:
    """Return the fingerprint of a result computed from images: of the images, the work's options and the code's versions."""
    versions = (_CACHE_VERSION, PIL.__version__, transformers.__version__)
    key = (dataset._fingerprint, _describe_files(dataset), work, versions)
    return datasets.fingerprint.Hasher.hash(key)


def _drop_bad_rows(dataset: datasets.Dataset, reasons: list[str]) -> datasets.Dataset:
    """Return `dataset` without the rows that have a reason why they cannot be read, and report these."""
    bad = [reason for reason in reasons if reason]
    if not bad:
        return dataset
    report_bad_images(bad, len(dataset))
    return dataset.select([row for row, reason in enumerate(reasons) if not reason])


def fingerprint_images(dataset: datasets.Dataset) -> str:
    """Describe which images a dataset has, in its order: their number, and the paths and sizes of files if cells name them."""
    files = [line.rsplit("\0", 1)[0] for line in _describe_files(dataset).splitlines()]
    return datasets.fingerprint.Hasher.hash((len(dataset), files))


def _describe_files(dataset: datasets.Dataset) -> str:
    """Return path, size and modification time of the files that cells name: a changed file does not change the dataset's table."""
    cells = dataset[:1][IMAGE]
    if not cells or not isinstance(cells[0], dict) or cells[0].get("bytes") is not None:
        return ""
    states = []
    for path in struct_field(dataset.with_format("arrow")[:][IMAGE], "path").to_pylist():
        try:
            state = os.stat(path)
            states.append(f"{path}\0{state.st_size}\0{state.st_mtime_ns}")
        except (OSError, TypeError):  # a name within an archive, or None
            states.append(str(path))
    return "\n".join(states)  # one string: a list of thousands is slow to hash


def token_array(dataset: datasets.Dataset) -> np.ndarray:
    """Return all tokens of a tokenised dataset as one array (n, N) of uint16."""
    return np.asarray(dataset.with_format("numpy", columns=[TOKENS], dtype=np.uint16)[:][TOKENS])


def hash_tokens(dataset: datasets.Dataset) -> str:
    """The SHA-256 of all tokens of a tokenised dataset, and of its labels."""
    digest = hashlib.sha256()
    for start in range(0, len(dataset), SHUFFLE_BUFFER):
        digest.update(token_array(dataset.select(range(start, min(start + SHUFFLE_BUFFER, len(dataset))))).tobytes())
    if LABEL in dataset.column_names:
        digest.update(np.asarray(dataset[LABEL], np.int64).tobytes())
    return digest.hexdigest()


class ImageTokens(torch.utils.data.Dataset[Row]):
    """Rows `{"input_ids": (N,)}` for a `DataLoader`, with augmentation and masks that are drawn anew in every epoch.

    dataset: from `tokenize`, or, with `random_crop`, from `load_images`. pad_crop and random_flip work on tokens, because
    moving the pixels of a small image moves its tokens. Rows have a `label` if the dataset does, and with `masked` a
    `bool_masked_pos` (N,), True where a pixel is hidden [V2 2.1]. With a `class_dropout` they have `class_labels`, the label
    or, with that probability, −1 for no class. Random draws depend only on (seed, epoch, index), so they
    are the same for any number of processes and workers, and after resuming. Only `begin_epoch` says which epoch it is:
    accelerate, which calls a `set_epoch` of datasets, does so in some of its loaders only, and with numbers of its own.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        processor: AnyImageProcessor,
        random_crop: bool = False,
        random_flip: bool = False,
        pad_crop: bool = False,
        masked: bool = False,
        class_dropout: float | None = None,
        seed: int = 0,
    ) -> None:
        self.class_dropout = class_dropout
        self.processor, self.random_crop, self.random_flip = processor, random_crop, random_flip
        self.pad_crop, self.masked, self.seed = pad_crop, masked, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self.grid = processor.token_grid()
        self.labels = np.asarray(dataset[LABEL]) if LABEL in dataset.column_names else None
        self.dataset = dataset if random_crop else dataset.with_format("numpy", columns=[TOKENS], dtype=np.uint16)

    @property
    def epoch(self) -> int:
        """The epoch that rows are drawn for."""
        return int(self._epoch)

    def begin_epoch(self, epoch: int) -> None:
        """From now on draw crops, flips and masks for `epoch`, also in workers that are running already."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        if self.random_crop:
            cells = self.dataset[indices][IMAGE]
            crop = lambda image, index: random_crop(image, self._rng(index), self.grid)  # noqa: E731
            tokens = np.stack(tokenize_cells(self.processor, cells, indices, "error", then=crop)[0])
        else:
            tokens = np.asarray(self.dataset[indices][TOKENS])  # (B, N)
        if self.pad_crop:
            tokens = np.stack(
                [_pad_and_crop(row, self.grid, self._rng(i, 2)) for row, i in zip(tokens, indices, strict=True)]
            )
        if self.random_flip:
            flip = np.array([self._rng(index, 1).random() < 0.5 for index in indices])
            tokens = _mirror(tokens, self.grid[1], flip)
        rows: list[Row] = [{TOKENS: row} for row in tokens]
        for row, index in zip(rows, indices, strict=True):
            if self.labels is not None:
                row[LABEL] = self.labels[index]
            if self.class_dropout is not None and self.labels is not None:
                drops = self._rng(index, 4).random() < self.class_dropout
                row[CLASS] = np.int64(-1 if drops else self.labels[index])
            if self.masked:
                row[MASK] = self._rng(index, 3).random(tokens.shape[1]) < MASK_PROBABILITY
        return rows

    def _rng(self, index: int, draw: int = 0) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.epoch, int(index), draw))


def _mirror(tokens: np.ndarray, width: int, which: np.ndarray) -> np.ndarray:
    """Mirror the images of `tokens` (B, N) for which `which` (B,) is True, left to right."""
    grid = tokens.reshape(len(tokens), -1, width)
    return np.where(which[:, None, None], grid[:, :, ::-1], grid).reshape(tokens.shape)


def _pad_and_crop(tokens: np.ndarray, grid: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Add a border of reflected pixels to an image of tokens (N,), and cut out a random window of its old size [V2 3.1].

    The border is as wide in proportion to the shorter side of `grid`, (height, width), as the paper's.
    """
    border = max(1, round(PAD_CROP_PIXELS * min(grid) / IMAGE_SIZE))
    top, left = rng.integers(0, 2 * border + 1, size=2)
    padded = np.pad(tokens.reshape(grid), border, mode="reflect")
    return padded[top : top + grid[0], left : left + grid[1]].reshape(-1)


def drop_unreadable(dataset: datasets.Dataset, num_proc: int | None = None) -> datasets.Dataset:
    """Return `dataset` without the images that cannot be decoded, and report these. Cached like `tokenize`."""

    def check(batch: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        return {"bad": [reason for _, reasons in read_images(batch[IMAGE], indices, "skip") for reason in reasons]}

    checked = _map_all(
        dataset,
        check,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        new_fingerprint=_cache_key(dataset, "readable"),
        desc="Checking images",
    )
    return _drop_bad_rows(dataset, checked["bad"])


def repeat_stream(dataset: datasets.IterableDataset, seed: int = 0, num_processes: int = 1) -> datasets.IterableDataset:
    """Repeat a process's share of a stream from `load_images` endlessly, each pass in another order.

    The stream is repeated, then shuffled, which makes one endless epoch, and a resumed run skips what it has already read.
    The shuffle buffer holds at most one pass, whose images are counted first, and at most 10,000 images over all processes.
    """
    n_images = sum(1 for _ in dataset.take(max(1, SHUFFLE_BUFFER // num_processes)))
    return dataset.repeat(None).shuffle(seed=seed, buffer_size=n_images)


def stream_tokens(
    dataset: datasets.IterableDataset,
    processor: AnyImageProcessor,
    args: DataArguments,
    masked: bool = False,
    class_dropout: float | None = None,
    seed: int = 0,
    process: int = 0,
) -> datasets.IterableDataset:
    """Turn a stream of images into a stream of rows like those of `ImageTokens`, augmented, masked and with classes.

    Random draws depend only on the seed, the process, the `DataLoader`'s worker and the position in its stream, so a resumed
    run, which reads the stream from its beginning, draws the same.
    """
    grid = processor.token_grid()

    def to_tokens(batch: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((seed, process, worker.id if worker else 0, indices[0]))
        crop = {"then": lambda image, index: random_crop(image, rng, grid)} if args.random_crop else {}
        found, reasons = tokenize_cells(processor, batch[IMAGE], indices, args.on_bad_image, **crop)
        for reason in filter(None, reasons):
            tqdm.write(f"Left out {reason}")
        if not found:
            return {name: [] for name in (TOKENS, *[MASK] * masked, *[CLASS] * (class_dropout is not None))}
        tokens = np.stack(found)
        if args.random_flip:
            tokens = _mirror(tokens, grid[1], rng.random(len(tokens)) < 0.5)
        rows = {TOKENS: list(tokens)}
        if masked:
            rows[MASK] = list(rng.random(tokens.shape) < MASK_PROBABILITY)
        if class_dropout is not None:
            labels = [label for label, reason in zip(batch[LABEL], reasons, strict=True) if not reason]
            drops = rng.random(len(labels)) < class_dropout
            rows[CLASS] = [-1 if drop or label is None else label for drop, label in zip(drops, labels, strict=True)]
        return rows

    columns = list(dataset.features)
    return dataset.map(to_tokens, batched=True, batch_size=BATCH, with_indices=True, remove_columns=columns)


def _stack(rows: Sequence[Row], name: str) -> torch.Tensor:
    return torch.from_numpy(np.stack([row[name] for row in rows]))


def collate_tokens(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Make a batch for pretraining from rows of `ImageTokens`.

    Returns `{"labels": (B, N) int64}`, for a masked model also `bool_masked_pos` (B, N), and for one that is told classes
    `class_labels` (B,) int64.
    """
    batch = {"labels": _stack(rows, TOKENS).long()}
    return batch | {name: _stack(rows, name) for name in (MASK, CLASS) if name in rows[0]}


def collate_classified(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Make a batch for classification from labelled rows of `ImageTokens`.

    Returns `{"input_ids": (B, N), "labels": (B,)}` int64, and for a masked model also `bool_masked_pos` (B, N).
    """
    batch = {TOKENS: _stack(rows, TOKENS).long(), "labels": _stack(rows, LABEL).long()}
    return batch | {MASK: _stack(rows, MASK)} if MASK in rows[0] else batch
