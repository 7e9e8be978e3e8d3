"""Preparing images: `TrainingImages` answers all questions of a run about its images, so that no other code sees the arguments.

This module also reads saved image processors, and samples the pixels that a palette is fitted to.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers.image_utils import SizeDict

from .. import clusters
from ..configuration_imagegpt import ImageGPTConfig
from ..image_processing_imagegpt import (
    AnyImageProcessor,
    ImageGPTImageProcessorPil,
    ImageSize,
    InstalledProcessor,
)
from ..presets import DIGITS_IMAGE_SIZE, DIGITS_N_COLORS, IMAGE_SIZE, N_COLORS, PALETTE_PIXELS
from .arguments import DataArguments, parse_image_size
from .images import read_images, report_bad_images
from .sources import IMAGE, LABEL, AnyDataset, Splits, load_images, load_labelled_images
from .tokens import (
    BATCH,
    SHUFFLE_BUFFER,
    ImageTokens,
    drop_unreadable,
    fingerprint_images,
    hash_tokens,
    repeat_stream,
    stream_tokens,
    tokenize,
)


_STREAM_PALETTE = 10_000  # images of a stream from which these pixels are sampled
_CHANGES_NOTHING = ("preprocessing_num_workers", "data_cache_dir")  # arguments that change neither images nor splits


class TrainingImages:
    """The images of a run: its splits, its image processor and its tokens, each made once and the same in every process.

    splits: `{"train": …, "validation": …}` of undecoded images, and with `labelled` also "test", as `load_images` and
    `load_labelled_images` return them. Splits are drawn with `split_seed` (None: `seed`), the palette and augmentation with
    `seed`. With a `class_dropout`, rows name the class of their image, which is left out of those for training with that
    probability.

    processor: the folder or Hub name of an image processor, or a palette file (.npy, .json); None fits a palette of
    `num_colors` colours to the training images, in the main process only. hub_source: `revision` and `cache_dir` for that
    processor. num_workers: workers of the `DataLoader` that reads a stream. Invalid arguments are a ValueError.
    """

    splits: Splits
    seed: int
    split_seed: int
    is_stream: bool  # whether the training images are streamed, so that their number is unknown

    def __init__(
        self,
        args: DataArguments,
        seed: int,
        *,
        labelled: bool = False,
        class_dropout: float | None = None,
        split_seed: int | None = None,
        processor: str | None = None,
        num_colors: int | None = None,
        hub_source: dict[str, Any] | None = None,
        num_workers: int = 0,
        progress: bool = True,
    ) -> None:
        self._args, self.seed, self.progress, self.class_dropout = args, seed, progress, class_dropout
        self.split_seed = seed if split_seed is None else split_seed
        self._processor_source, self._num_colors, self._hub_source = processor, num_colors, hub_source or {}
        self._tokens: dict[str, datasets.Dataset] = {}
        self.is_stream, self.reads_labels = args.streaming, labelled or class_dropout is not None
        state = PartialState()
        with _main_process_first():
            if labelled:
                self.splits = load_labelled_images(args, seed=self.split_seed)
            else:
                share = (state.process_index, state.num_processes, num_workers)
                self.splits = load_images(args, self.split_seed, *share, classes=class_dropout is not None)
        if self.reads_labels and not self.is_stream:
            lacking = set(range(len(self.classes))) - set(self.splits["train"][LABEL])
            if lacking:
                names = ", ".join(self.classes[number] for number in sorted(lacking)[:5])
                tqdm.write(f"{len(lacking)} of {len(self.classes)} classes have no training images: {names}.")

    @property
    def name(self) -> str:
        """The name of the images in records, which is never a path on this machine."""
        return self._args.name()

    @property
    def classes(self) -> list[str]:
        """The names of the classes, if the images are labelled or rows name classes."""
        return self.splits["train"].features[LABEL].names

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images, in pixels, unless their processor has another size."""
        return choose_image_size(self._args)

    def recipe(self, n_training_images: int | None) -> dict[str, Any]:
        """Describe the images for a model card, in plain values without paths on this machine.

        n_training_images: None for a stream.
        """
        pieces = {
            "random crops": self._args.random_crop,
            "random windows of a reflected border": self._args.pad_crop,
            "random flips": self._args.random_flip,
        }
        return {
            "data": self.name,
            "hub dataset": self._args.hub_dataset(),
            "training images": "a stream" if n_training_images is None else f"{n_training_images:,}",
            "augmentation": ", ".join(name for name, on in pieces.items() if on) or "none",
        }

    def identity(self) -> dict[str, Any]:
        """Return what decides which images are in which split, which must not change when a run resumes.

        That is the arguments, and as `images` what `fingerprint_images` says of each split (of a stream: of held-out images)
        and which labels they have, if labels are read.
        """
        arguments = {name: value for name, value in vars(self._args).items() if name not in _CHANGES_NOTHING}
        splits = {name: split for name, split in self.splits.items() if isinstance(split, datasets.Dataset)}
        prints = {name: fingerprint_images(split) for name, split in splits.items()}
        if self.reads_labels:
            hash_labels = datasets.fingerprint.Hasher.hash
            prints |= {f"labels of {name}": hash_labels(list(split[LABEL])) for name, split in splits.items()}
        return arguments | {"images": prints}

    def check_enough(self, images_per_step: int) -> None:
        """Raise ValueError if there are fewer training images than one optimiser step uses."""
        n_images = None if self.is_stream else len(self.splits["train"])
        if n_images is not None and n_images < images_per_step:
            raise ValueError(
                f"{n_images} training images are fewer than one step's {images_per_step}: lower "
                "--per_device_train_batch_size or give more images."
            )

    # -- palette and processor -----------------------------------------------------------------------------------------

    @cached_property
    def processor(self) -> AnyImageProcessor:
        """The image processor that the arguments name, or one with a palette fitted to the training images."""
        source, num_colors = self._processor_source, self._num_colors
        if source is None:
            palette = None
            if PartialState().is_main_process:
                palette, pixels = self.fit_palette(num_colors, tell=False)  # tokenising will
                log_distortion(palette, clusters.distortion(pixels, palette), "the pixels it was fitted to")
            return self.make_processor(broadcast_object_list([palette])[0])
        processor = load_processor(source, self._args, self._hub_source)
        if processor.clusters is None:
            raise ValueError(
                f"The image processor of {source} has no palette: name another, or leave it out to fit one."
            )
        if num_colors not in (None, len(processor.clusters)):
            raise ValueError(
                f"--num_colors {num_colors}: the palette of {source} has {len(processor.clusters)} colours: leave it out."
            )
        return processor

    def make_processor(self, palette: np.ndarray) -> AnyImageProcessor:
        """Make a processor for these images with `palette` (K, 3), for the backend that is installed."""
        return _make_processor(palette, self._args)

    def fit_palette(
        self, num_colors: int | None = None, num_pixels: int = PALETTE_PIXELS, tell: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fit a palette to training images; return it (K, 3) and the pixels (n, 3) uint8 that it was fitted to.

        num_colors: None for the default. num_pixels: about how many pixels to sample. tell: whether to report unreadable images.
        """
        num_colors = num_colors or (DIGITS_N_COLORS if self._args.is_embedded else N_COLORS)
        pixels = self.sample_pixels("train", num_pixels, tell)
        tqdm.write(f"Fitting {num_colors} colours to {len(pixels):,} pixels")
        return clusters.fit_palette(pixels, num_colors, self.seed, progress=self.progress), pixels

    def sample_pixels(self, split: str, num_pixels: int = PALETTE_PIXELS, tell: bool = True) -> np.ndarray:
        """Sample about `num_pixels` pixels (n, 3) uint8, evenly from all images of a split, at the model's image size."""
        args = self._args
        crop = args.center_crop is not False
        return sample_pixels(self.splits[split], num_pixels, self.image_size, crop, self.seed, args.on_bad_image, tell)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def tokens(self, split: str) -> datasets.Dataset:
        """Return the tokens of a split, as `tokenize` does; of a stream, only held-out images can be tokenised."""
        if split not in self._tokens:
            bad, workers = self._args.on_bad_image, self._args.preprocessing_num_workers
            what = {"train": "training", "validation": "held-out"}.get(split, split)
            processor = self.processor  # all processes take part in making it
            with _main_process_first():
                images = self.splits[split]
                self._tokens[split] = tokenize(images, processor, bad, workers, desc=f"Tokenising {what} images")
        return self._tokens[split]

    def hash_tokens(self) -> dict[str, str]:
        """The hash of each split that has been tokenised, by its name."""
        return {split: hash_tokens(tokens) for split, tokens in self._tokens.items()}

    @property
    def has_training_tokens(self) -> bool:
        """Whether the training images are tokenised once, rather than cropped or streamed while they are read."""
        return not (self.is_stream or self._args.random_crop)

    def rows(self, split: str, masked: bool) -> ImageTokens:
        """Return the rows of a split for a `DataLoader`, without augmentation. masked: whether each row has a mask."""
        dropout = None if self.class_dropout is None else 0.0
        return ImageTokens(self.tokens(split), self.processor, masked=masked, class_dropout=dropout, seed=self.seed)

    def training_rows(self, masked: bool) -> ImageTokens | datasets.IterableDataset:
        """Return the rows of the training images with the requested augmentation; of a stream, this process's share."""
        args, state = self._args, PartialState()
        drawn: dict[str, Any] = {"masked": masked, "class_dropout": self.class_dropout, "seed": self.seed}
        if self.is_stream:
            train = repeat_stream(self.splits["train"], self.seed, state.num_processes)
            return stream_tokens(train, self.processor, args, **drawn, process=state.process_index)
        if self.has_training_tokens:
            images = self.tokens("train")
        else:
            images = self.splits["train"]
            if args.on_bad_image == "skip":
                with _main_process_first():
                    images = drop_unreadable(images, args.preprocessing_num_workers)
        augmentation = {name: getattr(args, name) for name in ("random_crop", "random_flip", "pad_crop")}
        return ImageTokens(images, self.processor, **drawn, **augmentation)


@contextmanager
def _main_process_first() -> Iterator[None]:
    """Let the main process of each machine do the work first; the others then find the result in the cache of `datasets`."""
    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:  # after an error too, or the others would wait forever, as with accelerate's own context manager
        if state.is_local_main_process:
            state.wait_for_everyone()


def log_distortion(palette: np.ndarray, lost: dict[str, float], what: str) -> None:
    """Print the distortion of a palette. lost: the result of `clusters.distortion`. what: the pixels it was measured on."""
    rmse, psnr = lost["rmse_grey_levels"], lost["psnr_db"]
    tqdm.write(f"Palette: {len(palette)} colours; on {what}: {rmse:.3f} grey levels RMSE, {psnr:.2f} dB PSNR")


def choose_image_size(args: DataArguments) -> tuple[int, int]:
    """Return (height, width), in pixels: the given --image_size, or the default for the source."""
    return parse_image_size(args.image_size or (DIGITS_IMAGE_SIZE if args.is_embedded else IMAGE_SIZE))


def _make_processor(palette: np.ndarray, args: DataArguments) -> AnyImageProcessor:
    height, width = choose_image_size(args)
    return InstalledProcessor(
        clusters=palette, size={"height": height, "width": width}, do_center_crop=args.center_crop is not False
    )


def load_processor(name: str, args: DataArguments, hub_source: dict[str, Any] | None = None) -> AnyImageProcessor:
    """Load an image processor from its folder or from the Hub, or make one with a palette file (.npy, .json).

    A processor keeps its own size and crop unless --image_size or --center_crop is given. hub_source: `revision` and
    `cache_dir`. A name that holds neither is a ValueError.
    """
    if Path(name).suffix in (".npy", ".json"):
        return _make_processor(clusters.load_palette(name), args)
    processor = read_processor(name, **(hub_source or {}))
    if args.image_size:
        height, width = choose_image_size(args)
        own = processor.size.get("height"), processor.size.get("width")
        if own != (height, width) and math.prod(side or 0 for side in own) == height * width:
            raise ValueError(
                f"--image_size {height}x{width}: the image processor of {name} makes images of {own[0]}x{own[1]}, which have as many "
                "pixels, so that its model would take one for the other: leave it out. Of a processor that only lends its palette, "
                "name the palette's file (.npy, .json)."
            )
        processor.size = SizeDict(height=height, width=width)
    if args.center_crop is not None:
        processor.do_center_crop = args.center_crop
    return processor


def read_processor(name: str, **source: Any) -> AnyImageProcessor:
    """Read the image processor in a folder or on the Hub. source: `revision`, `cache_dir`. If there is none: ValueError."""
    try:
        return InstalledProcessor.from_pretrained(name, **source)
    except OSError as error:
        if Path(name, "preprocessor_config.json").is_file():
            raise ValueError(f"{name}/preprocessor_config.json cannot be read: {error}") from error
        raise ValueError(
            f"{name} has no image processor: save the one that the model was trained with there, as preprocessor_config.json."
        ) from error


def processor_of(model_name: str, config: ImageGPTConfig) -> AnyImageProcessor:
    """Read the image processor that is saved with a model. If it is missing or does not fit the model: ValueError."""
    processor = read_processor(model_name)
    processor.check_fits(config)
    return processor


def sample_pixels(
    dataset: AnyDataset,
    n_pixels: int,
    image_size: ImageSize,
    center_crop: bool = True,
    seed: int = 0,
    on_bad_image: str = "error",
    tell: bool = True,
) -> np.ndarray:
    """Sample about `n_pixels` pixels (n, 3) uint8 evenly from all images of a dataset from `load_images`, with a seed.

    The images are first resized to `image_size`, as they are for tokenising. If they have fewer pixels, all are returned.
    """
    if isinstance(dataset, datasets.IterableDataset):
        rows = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).take(_STREAM_PALETTE)
        dataset = datasets.Dataset.from_list(list(rows), features=dataset.features)
    resize = ImageGPTImageProcessorPil(size=image_size, do_center_crop=center_crop)
    rng = np.random.default_rng(seed)
    per_image = min(math.prod(resize.token_grid()), -(-n_pixels // len(dataset)))
    sampled: list[np.ndarray] = []
    bad: list[str] = []
    for start in tqdm(range(0, len(dataset), BATCH), desc="Sampling pixels", unit="batch", leave=False, disable=None):
        indices = range(start, min(start + BATCH, len(dataset)))
        for images, reasons in read_images(dataset[start : indices.stop][IMAGE], indices, on_bad_image):
            bad += filter(None, reasons)
            if not images:
                continue
            resized = resize(images, do_color_quantize=False, do_rescale=False, do_normalize=False)["pixel_values"]
            for image in resized:
                pixels = np.asarray(image).reshape(3, -1).T
                sampled.append(pixels[rng.permutation(len(pixels))[:per_image]])
    if bad:
        report_bad_images(bad, len(dataset), tell)
    pixels = np.concatenate(sampled).astype(np.uint8)
    return pixels if len(pixels) <= n_pixels else pixels[rng.permutation(len(pixels))[:n_pixels]]
