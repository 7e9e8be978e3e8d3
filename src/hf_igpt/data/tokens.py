"""Images as tokens: cached on disk, as rows of a dataset with augmentation and masks, as a stream, in batches.

Without random crops, images are tokenised once and `datasets` caches the tokens on disk as uint8 or uint16; with them, each image is
cropped and tokenised each time it is read.
"""

import os

import datasets
import numpy as np
import PIL
import torch
import transformers
from pyarrow.compute import struct_field
from tqdm.auto import tqdm

from ..clusters import lookup_table
from ..presets import IMAGE_SIZE, MASK_PROBABILITY, PAD_CROP_PIXELS
from .images import random_crop, read_images, report_bad_images
from .sources import IMAGE, LABEL, DataArguments


TOKENS = "input_ids"
MASK = "bool_masked_pos"
_CACHE_VERSION = 1  # raise it when the same image and processor give other tokens
SHUFFLE_BUFFER = 10_000  # images in the shuffle buffers of a stream, over all processes
BATCH = 32  # images tokenised between two writes to the cache


def tokens_of_cells(processor, *cells_and_options, **options):
    """Tokens of the readable cells, a list of (N,) int64, and for every cell the reason it is not readable, or "".

    Further arguments are those of `read_images`.
    """
    tokens, all_reasons = [], []
    for images, reasons in read_images(*cells_and_options, **options):
        tokens += list(processor(images)[TOKENS]) if images else []
        all_reasons += reasons
    return tokens, all_reasons


def tokenize(dataset: datasets.Dataset, processor, on_bad_image: str = "error", num_proc: int | None = None, desc=None):
    """Tokens of a dataset of `load_images`: column `input_ids` of uint8 or uint16 (N,), `label` kept.

    Cached on disk by `datasets`, keyed by the images and the processor. Unreadable images stop it, or with "skip" are
    left out and reported.
    """
    n_tokens = int(np.prod(processor.token_grid()))
    dtype = "uint8" if len(processor.clusters) <= 256 else "uint16"
    features = {TOKENS: datasets.List(datasets.Value(dtype), length=n_tokens), "bad": datasets.Value("string")}
    if LABEL in dataset.features:
        features[LABEL] = dataset.features[LABEL]

    def to_tokens(batch, indices):
        rows, reasons = tokens_of_cells(processor, batch[IMAGE], indices, on_bad_image)
        tokens = np.zeros((len(reasons), n_tokens), dtype)
        if rows:
            tokens[[not reason for reason in reasons]] = rows
        return {TOKENS: tokens, "bad": reasons}

    if num_proc is not None:
        lookup_table(processor.clusters)  # before the processes part, which then share it
    dataset = dataset.map(
        to_tokens,
        batched=True,
        batch_size=BATCH,
        with_indices=True,
        remove_columns=[IMAGE],
        features=datasets.Features(features),
        num_proc=num_proc,
        new_fingerprint=_cache_key(dataset, processor.to_json_string(), processor.backend, on_bad_image),
        desc=desc or "Tokenising",
    )
    if on_bad_image == "skip":
        dataset = _without_bad(dataset, dataset["bad"])
    return dataset.remove_columns("bad")


def _cache_key(dataset, *of_the_work) -> str:
    """Fingerprint of what is made from a dataset's images: of them, of the work done, and of the code that does it."""
    versions = (_CACHE_VERSION, PIL.__version__, transformers.__version__)
    key = (dataset._fingerprint, _states_of_files(dataset), of_the_work, versions)
    return datasets.fingerprint.Hasher.hash(key)


def _without_bad(dataset, reasons: list[str]):
    """`dataset` without the rows that have a reason why they cannot be read; these are reported."""
    bad = [reason for reason in reasons if reason]
    if not bad:
        return dataset
    report_bad_images(bad, len(dataset))
    return dataset.select([row for row, reason in enumerate(reasons) if not reason])


def _states_of_files(dataset) -> str:
    """Path, size and time of change of the files that cells name, for the key of the cache: their table has not changed."""
    cells = dataset[:1][IMAGE]
    if not cells or not isinstance(cells[0], dict) or cells[0].get("bytes") is not None:
        return ""
    states = []
    for path in struct_field(dataset.with_format("arrow")[:][IMAGE], "path").to_pylist():
        try:
            state = os.stat(path)
            states.append(f"{path}\0{state.st_size}\0{state.st_mtime_ns}")
        except (OSError, TypeError):  # a name within an archive, or none
            states.append(str(path))
    return "\n".join(states)  # one string: a list of thousands is slow to hash


def token_array(dataset) -> np.ndarray:
    """All tokens of a tokenised dataset as one array (n, N) of uint16."""
    return np.asarray(dataset.with_format("numpy", columns=[TOKENS], dtype=np.uint16)[:][TOKENS])


class ImageTokens(torch.utils.data.Dataset):
    """Rows `{"input_ids": (N,)}` for a `DataLoader`, with the augmentation and the masks that are drawn anew each epoch.

    dataset: of `tokenize` (pad-and-crop and flips, on the tokens: a moved small image has moved tokens), or of
    `load_images` where `random_crop`. Rows have a `label` where it has one, and with `masked` a `bool_masked_pos` (N,), True
    where a pixel is hidden [V2 2.1]. What is drawn depends on (seed, epoch, index) alone, so it is the same on any number
    of processes and workers, and after a resume. `begin_epoch` says which epoch it is, and nothing else does: accelerate,
    which calls a `set_epoch` of datasets, does so in some of its loaders only, and with numbers of its own.
    """

    def __init__(self, dataset, processor, random_crop=False, random_flip=False, pad_crop=False, masked=False, seed=0):
        self.processor, self.random_crop, self.random_flip = processor, random_crop, random_flip
        self.pad_crop, self.masked, self.seed = pad_crop, masked, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self.width = processor.token_grid()[1]
        self.labels = np.asarray(dataset[LABEL]) if LABEL in dataset.column_names else None
        self.dataset = dataset if random_crop else dataset.with_format("numpy", columns=[TOKENS], dtype=np.uint16)

    @property
    def epoch(self) -> int:
        """The epoch that rows are drawn for."""
        return int(self._epoch)

    def begin_epoch(self, epoch: int):
        """From now on draw crops, flips and masks for `epoch`, in workers that are at it already too."""
        self._epoch.fill_(epoch)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        if self.random_crop:
            cells = self.dataset[indices][IMAGE]
            crop = lambda image, index: random_crop(image, self._rng(index))  # noqa: E731
            tokens = np.stack(tokens_of_cells(self.processor, cells, indices, "error", then=crop)[0])
        else:
            tokens = np.asarray(self.dataset[indices][TOKENS])  # (B, N)
        if self.pad_crop:
            tokens = np.stack(
                [_pad_cropped(row, self.width, self._rng(i, 2)) for row, i in zip(tokens, indices, strict=True)]
            )
        if self.random_flip:
            flip = np.array([self._rng(index, 1).random() < 0.5 for index in indices])
            tokens = _mirrored(tokens, self.width, flip)
        rows = [{TOKENS: row} for row in tokens]
        for row, index in zip(rows, indices, strict=True):
            if self.labels is not None:
                row[LABEL] = self.labels[index]
            if self.masked:
                row[MASK] = self._rng(index, 3).random(tokens.shape[1]) < MASK_PROBABILITY
        return rows

    def _rng(self, index: int, draw: int = 0) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.epoch, int(index), draw))


def _mirrored(tokens: np.ndarray, width: int, which: np.ndarray) -> np.ndarray:
    """Tokens (B, N) with the rows of the images in `which` (B,) read from right to left."""
    grid = tokens.reshape(len(tokens), -1, width)
    return np.where(which[:, None, None], grid[:, :, ::-1], grid).reshape(tokens.shape)


def _pad_cropped(tokens: np.ndarray, width: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens (N,) of an image after a border of reflected pixels and a random window of the old size [V2 3.1]."""
    grid = tokens.reshape(-1, width)
    border = max(1, round(PAD_CROP_PIXELS * width / IMAGE_SIZE))
    top, left = rng.integers(0, 2 * border + 1, size=2)
    padded = np.pad(grid, border, mode="reflect")
    return padded[top : top + len(grid), left : left + width].reshape(-1)


def readable(dataset: datasets.Dataset, num_proc: int | None = None) -> datasets.Dataset:
    """`dataset` without the images that cannot be decoded, which are reported. Cached like `tokenize`."""

    def check(batch, indices):
        return {"bad": [reason for _, reasons in read_images(batch[IMAGE], indices, "skip") for reason in reasons]}

    checked = dataset.map(
        check,
        batched=True,
        batch_size=BATCH,
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        new_fingerprint=_cache_key(dataset, "readable"),
        desc="Checking images",
    )
    return _without_bad(dataset, checked["bad"])


def endless(dataset: datasets.IterableDataset, seed: int = 0, num_processes: int = 1) -> datasets.IterableDataset:
    """A process's share of a stream, of `load_images`, again and again, each pass in another order.

    Repeated, then shuffled: one endless epoch, through which a resumed run skips to where it was. The buffer holds one pass
    at most, which is counted for it, up to 10,000 images.
    """
    n_images = sum(1 for _ in dataset.take(max(1, SHUFFLE_BUFFER // num_processes)))
    return dataset.repeat(None).shuffle(seed=seed, buffer_size=n_images)


def stream_tokens(
    dataset: datasets.IterableDataset,
    processor,
    args: DataArguments,
    masked: bool = False,
    seed: int = 0,
    process: int = 0,
):
    """A stream of images -> a stream of rows as `ImageTokens` gives, augmented and masked.

    What is drawn depends on the seed, the process, the `DataLoader`'s worker and the place in its stream alone, so that a
    resumed run, which reads again what was read, draws the same.
    """
    width = processor.token_grid()[1]

    def to_tokens(batch, indices):
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((seed, process, worker.id if worker else 0, indices[0]))
        crop = {"then": lambda image, index: random_crop(image, rng)} if args.random_crop else {}
        tokens, reasons = tokens_of_cells(processor, batch[IMAGE], indices, args.on_bad_image, **crop)
        for reason in filter(None, reasons):
            tqdm.write(f"Left out {reason}")
        if not tokens:
            return {TOKENS: []} | ({MASK: []} if masked else {})
        tokens = np.stack(tokens)
        if args.random_flip:
            tokens = _mirrored(tokens, width, rng.random(len(tokens)) < 0.5)
        masks = {MASK: list(rng.random(tokens.shape) < MASK_PROBABILITY)} if masked else {}
        return {TOKENS: list(tokens)} | masks

    columns = list(dataset.features)
    return dataset.map(to_tokens, batched=True, batch_size=BATCH, with_indices=True, remove_columns=columns)


def _batch(rows, name: str) -> torch.Tensor:
    return torch.from_numpy(np.stack([row[name] for row in rows]))


def collate_tokens(rows) -> dict[str, torch.Tensor]:
    """Rows of `ImageTokens` -> `{"labels": (B, N) int64}`, all a causal model is trained with, and a masked one's masks."""
    batch = {"labels": _batch(rows, TOKENS).long()}
    return batch | {MASK: _batch(rows, MASK)} if MASK in rows[0] else batch


def collate_classified(rows) -> dict[str, torch.Tensor]:
    """Rows of `ImageTokens` with labels -> `{"input_ids": (B, N), "labels": (B,)}` int64, and a masked model's masks."""
    batch = {TOKENS: _batch(rows, TOKENS).long(), "labels": _batch(rows, LABEL).long()}
    return batch | {MASK: _batch(rows, MASK)} if MASK in rows[0] else batch
