"""Images made ready: `TrainingImages` answers everything that a run asks about its images, and nobody below it sees the arguments.

Here too: reading a saved image processor, and sampling the pixels that a palette is fitted to.
"""

from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers.image_utils import SizeDict

from .. import clusters
from ..image_processing_imagegpt import ImageGPTImageProcessorPil, InstalledProcessor
from ..presets import DIGITS_IMAGE_SIZE, DIGITS_N_COLORS, IMAGE_SIZE, N_COLORS
from .images import read_images, report_bad_images
from .sources import IMAGE, LABEL, DataArguments, load_images, load_labelled_images
from .tokens import BATCH, SHUFFLE_BUFFER, ImageTokens, endless, readable, stream_tokens, tokenize


PALETTE_PIXELS = 1_000_000  # pixels sampled from all images to fit a palette to
_STREAM_PALETTE = 10_000  # images of a stream that a palette is fitted to
_CHANGES_NOTHING = ("preprocessing_num_workers", "data_cache_dir")  # arguments that change neither images nor splits


class TrainingImages:
    """The images of a run: its splits, its image processor and its tokens, each made once, in every process alike.

    splits: `{"train": …, "validation": …}` of undecoded images, and with `labelled` also "test", as `load_images` and
    `load_labelled_images` return them. Splits are drawn by `split_seed`; the palette and augmentation by `seed`.

    processor: the folder or Hub name of an image processor, or a bare palette (.npy, .json); None fits a palette of
    `num_colors` colours to the training images, in the main process alone. hub_source: `revision` and `cache_dir` of that
    processor. num_workers: of the `DataLoader` that reads a stream. Whatever is wrong with the arguments is a ValueError.
    """

    def __init__(
        self,
        args: DataArguments,
        seed: int,
        *,
        labelled: bool = False,
        split_seed: int | None = None,
        processor: str | None = None,
        num_colors: int | None = None,
        hub_source: dict | None = None,
        num_workers: int = 0,
        progress: bool = True,
    ):
        self._args, self.seed, self.progress = args, seed, progress
        self.split_seed = seed if split_seed is None else split_seed
        self._processor_source, self._num_colors, self._hub_source = processor, num_colors, hub_source or {}
        self._tokens: dict[str, datasets.Dataset] = {}
        self.is_stream = args.streaming
        state = PartialState()
        with _main_process_first():
            if labelled:
                self.splits = load_labelled_images(args, seed=self.split_seed)
            else:
                share = (state.process_index, state.num_processes, num_workers)
                self.splits = load_images(args, self.split_seed, *share)

    @property
    def name(self) -> str:
        """The name that records give the images: no path of this machine."""
        return self._args.name()

    @property
    def classes(self) -> list[str]:
        """Names of the classes of labelled images."""
        return self.splits["train"].features[LABEL].names

    @property
    def image_size(self) -> int:
        """Height = width, in pixels, of images whose processor does not say another size."""
        return image_size_of(self._args)

    def recipe(self, n_training_images: int | None) -> dict:
        """What a model card says about the images: plain values, no path of this machine. None: a stream."""
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

    def identity(self) -> dict:
        """The arguments that decide which images are in which split; a resumed run must have the same."""
        return {name: value for name, value in vars(self._args).items() if name not in _CHANGES_NOTHING}

    def check_enough(self, images_per_step: int):
        """ValueError if there are fewer training images than one optimiser step takes."""
        n_images = None if self.is_stream else len(self.splits["train"])
        if n_images is not None and n_images < images_per_step:
            raise ValueError(
                f"{n_images} training images are fewer than one step's {images_per_step}: lower "
                "--per_device_train_batch_size or give more images."
            )

    # -- palette and processor -----------------------------------------------------------------------------------------

    @cached_property
    def processor(self):
        """The image processor, read from where the arguments say or made with a palette fitted to the training images."""
        source, num_colors = self._processor_source, self._num_colors
        if source is None:
            palette = None
            if PartialState().is_main_process:
                palette, pixels = self.fit_palette(num_colors)
                log_distortion(palette, clusters.distortion(pixels, palette), "the pixels it was fitted to")
            return self.make_processor(broadcast_object_list([palette])[0])
        processor = load_processor(source, self._args, self._hub_source)
        if processor.clusters is None:
            raise ValueError(
                f"The image processor of {source} has no palette: name another, or leave it out to fit one."
            )
        if num_colors not in (None, len(processor.clusters)):
            raise ValueError(
                f"--num_colors {num_colors}: the palette of {source} has {len(processor.clusters)} colours."
            )
        return processor

    def make_processor(self, palette: np.ndarray):
        """A processor for these images, with `palette` and of the backend that is installed."""
        return _processor_for(palette, self._args)

    def fit_palette(self, num_colors: int | None = None, num_pixels: int = PALETTE_PIXELS):
        """(palette (K, 3), pixels (n, 3) it was fitted to) of training images; None: the default number of colours."""
        num_colors = num_colors or (DIGITS_N_COLORS if self._args.is_embedded else N_COLORS)
        pixels = self.sample_pixels("train", num_pixels)
        tqdm.write(f"Fitting {num_colors} colours to {len(pixels):,} pixels")
        return clusters.fit_palette(pixels, num_colors, self.seed, progress=self.progress), pixels

    def sample_pixels(self, split: str, num_pixels: int = PALETTE_PIXELS) -> np.ndarray:
        """About `num_pixels` pixels (n, 3) uint8, evenly from all images of a split at the size of the model's images."""
        args = self._args
        crop = args.center_crop is not False
        return sample_pixels(self.splits[split], num_pixels, self.image_size, crop, self.seed, args.on_bad_image)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def tokens(self, split: str) -> datasets.Dataset:
        """The tokens of a split, as `tokenize` returns them; of a stream, those of its held-out images alone."""
        if split not in self._tokens:
            args = self._args
            options = {"on_bad_image": args.on_bad_image, "num_proc": args.preprocessing_num_workers}
            what = {"train": "training", "validation": "held-out"}.get(split, split)
            processor = self.processor  # all processes take part in making it
            with _main_process_first():
                images = self.splits[split]
                self._tokens[split] = tokenize(images, processor, desc=f"Tokenising {what} images", **options)
        return self._tokens[split]

    @property
    def has_training_tokens(self) -> bool:
        """Whether the training images are tokenised once; else they are cropped, or streamed, as they are read."""
        return not (self.is_stream or self._args.random_crop)

    def rows(self, split: str, masked: bool) -> ImageTokens:
        """Rows of a held-out split for a `DataLoader`, not augmented; with a mask each for a masked model."""
        return ImageTokens(self.tokens(split), self.processor, masked=masked, seed=self.seed)

    def training_rows(self, masked: bool):
        """Rows of the training images, augmented as the arguments say; of a stream, this process's share of it."""
        args, state = self._args, PartialState()
        if self.is_stream:
            train = endless(self.splits["train"], self.seed, state.num_processes)
            return stream_tokens(train, self.processor, args, masked, self.seed, state.process_index)
        if self.has_training_tokens:
            images = self.tokens("train")
        else:
            images = self.splits["train"]
            if args.on_bad_image == "skip":
                with _main_process_first():
                    images = readable(images, args.preprocessing_num_workers)
        augmentation = {name: getattr(args, name) for name in ("random_crop", "random_flip", "pad_crop")}
        return ImageTokens(images, self.processor, masked=masked, seed=self.seed, **augmentation)


@contextmanager
def _main_process_first():
    """The main process of each machine does the work; the others then find it in the cache of `datasets`."""
    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:  # also if it fails, or the others would wait for it for ever; accelerate's own way has no such release
        if state.is_local_main_process:
            state.wait_for_everyone()


def log_distortion(palette: np.ndarray, lost: dict[str, float], what: str):
    """Write what a palette loses, as `clusters.distortion` measures it."""
    rmse, psnr = lost["rmse_grey_levels"], lost["psnr_db"]
    tqdm.write(f"Palette: {len(palette)} colours; on {what}: {rmse:.3f} grey levels RMSE, {psnr:.2f} dB PSNR")


def image_size_of(args: DataArguments) -> int:
    """Height = width, in pixels, that the arguments ask for, or the default of their source."""
    return args.image_size or (DIGITS_IMAGE_SIZE if args.is_embedded else IMAGE_SIZE)


def _processor_for(palette: np.ndarray, args: DataArguments):
    side = image_size_of(args)
    return InstalledProcessor(
        clusters=palette, size={"height": side, "width": side}, do_center_crop=args.center_crop is not False
    )


def load_processor(name: str, args: DataArguments, hub_source: dict | None = None):
    """The image processor `name`: the folder or Hub name of one, or a bare palette (.npy, .json).

    A processor keeps its own size and crop unless --image_size or --center_crop say otherwise.
    """
    if Path(name).suffix in (".npy", ".json"):
        return _processor_for(clusters.load_palette(name), args)
    processor = read_processor(name, **(hub_source or {}))
    if args.image_size:
        processor.size = SizeDict(height=args.image_size, width=args.image_size)
    if args.center_crop is not None:
        processor.do_center_crop = args.center_crop
    return processor


def read_processor(name: str, **source):
    """The image processor of a folder or Hub name; ValueError where there is none. source: `revision`, `cache_dir`."""
    try:
        return InstalledProcessor.from_pretrained(name, **source)
    except OSError as error:
        raise ValueError(
            f"{name} has no image processor: save the one that the model was trained with there, as preprocessor_config.json."
        ) from error


def processor_of(model_name: str, config):
    """The image processor that is saved beside a model; one that is missing or does not fit it is a ValueError."""
    processor = read_processor(model_name)
    processor.check_fits(config)
    return processor


def sample_pixels(
    dataset, n_pixels: int, image_size: int, center_crop: bool = True, seed: int = 0, on_bad_image="error"
):
    """About `n_pixels` pixels (n, 3) uint8 drawn evenly from all images of a dataset of `load_images`, seeded.

    Images are first brought to `image_size`, as they will be for their tokens. Fewer pixels than asked: all of them.
    """
    if isinstance(dataset, datasets.IterableDataset):
        rows = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).take(_STREAM_PALETTE)
        dataset = datasets.Dataset.from_list(list(rows), features=dataset.features)
    resize = ImageGPTImageProcessorPil(size=image_size, do_center_crop=center_crop)
    rng = np.random.default_rng(seed)
    per_image = min(image_size * image_size, -(-n_pixels // len(dataset)))
    sampled, bad = [], []
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
        report_bad_images(bad, len(dataset))
    pixels = np.concatenate(sampled).astype(np.uint8)
    return pixels if len(pixels) <= n_pixels else pixels[rng.permutation(len(pixels))[:n_pixels]]
