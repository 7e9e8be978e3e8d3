"""Where images come from, and how they become batches of tokens. One way in, for every script.

Sources: scikit-learn's digits (the embedded default), a Hub dataset, folders of images, parquet files; held in memory
maps on disk or streamed. Without random crops, images are tokenised once and `datasets` caches the tokens on disk as
uint8 or uint16; with them, each image is cropped and tokenised anew each time it is read.
"""

import io
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import PIL
import torch
import transformers
from PIL import Image, ImageOps, UnidentifiedImageError
from pyarrow.compute import struct_field
from tqdm.auto import tqdm

from .clusters import lookup_table
from .image_processing_imagegpt import ImageGPTImageProcessorPil, InstalledProcessor
from .pixels_imagegpt import to_rgb_image
from .presets import (
    CROP_SHORTER_SIDE,
    CROP_SIZE,
    DIGITS_HELD_OUT_FRACTION,
    HELD_OUT_FRACTION,
    IMAGE_SIZE,
    LABELLED_HELD_OUT_FRACTION,
    MASK_PROBABILITY,
    PAD_CROP_PIXELS,
)


IMAGE = "image"  # the image column's name, and below the label's, whatever the source called them
LABEL = "label"
TOKENS = "input_ids"
MASK = "bool_masked_pos"
_VALIDATION = ("validation", "valid", "val")  # names of such splits
_CACHE_VERSION = 1  # raise it when the same image and processor give other tokens
_SHUFFLE_BUFFER = 10_000  # images, when streaming, of all processes together
_BATCH = 32  # images tokenised between two writes to the cache
_HELD = 1_000_000  # pixels of decoded photos held at once
_STREAM_HELD_OUT = 1000  # images kept for evaluation from a stream without a validation split
_STREAM_PALETTE = 10_000  # images of a stream that a palette is fitted on


@dataclass
class DataArguments:
    """Which images, and what is done to them before they become tokens."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Dataset on the Hub, or a path `load_dataset` reads. Without it and --train_dir: the digits."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    train_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images (subfolders are classes, or train/ and test/ that hold these), or parquet file, folder or "
            "glob pattern."
        },
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Like --train_dir, for the held-out images."})
    image_column_name: str | None = field(
        default=None,
        metadata={"help": 'Column of the images. Default: "image", "img", or the first that holds images.'},
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": 'Column of the classes, if any. Default: "label", "labels" or "fine_label".'}
    )
    train_val_split: float | None = field(
        default=None,
        metadata={"help": "Fraction of train held out where no validation split exists. Default: 0.04 (paper 3.1)."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many training images at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use this many held-out images at most."})
    streaming: bool = field(default=False, metadata={"help": "Stream instead of downloading; needs --max_steps."})
    image_size: int | None = field(
        default=None, metadata={"help": "Height = width of the token grid in pixels. Default: 32; 8 for the digits."}
    )
    center_crop: bool | None = field(
        default=None,
        metadata={
            "help": "Crop the largest central square before resizing, so nothing is squashed. Default: as the image "
            "processor that is named, else true."
        },
    )
    random_crop: bool = field(
        default=False,
        metadata={"help": "The paper's ImageNet crops: shorter side drawn from 256..384, random 224 x 224 crop."},
    )
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the training images, left to right."})
    pad_crop: bool = field(
        default=False,
        metadata={"help": "The paper's CIFAR crops: a border of 4 reflected pixels (at 32x32), random window."},
    )
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "What an unreadable image does: stop with its name, or be left out.",
            "choices": ["error", "skip"],
        },
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    data_cache_dir: str | None = field(default=None, metadata={"help": "Where `datasets` keeps its cache."})

    def __post_init__(self):
        if self.on_bad_image not in ("error", "skip"):
            raise ValueError(f"--on_bad_image is error or skip; found {self.on_bad_image!r}.")
        if self.dataset_name is not None and self.train_dir is not None:
            raise ValueError("Give --dataset_name or --train_dir, not both.")
        if self.validation_dir is not None and self.train_dir is None:
            raise ValueError("--validation_dir goes with --train_dir.")
        if self.streaming and self.is_embedded:
            raise ValueError("--streaming needs --dataset_name or --train_dir; the digits are in memory.")
        if self.pad_crop and (self.random_crop or self.streaming):
            raise ValueError("--pad_crop goes neither with --random_crop, another way to crop, nor with --streaming.")

    @property
    def is_embedded(self) -> bool:
        """Whether the images are the embedded default."""
        return self.dataset_name is None and self.train_dir is None

    def name(self) -> str:
        """A name for records: no path of this machine."""
        if self.is_embedded:
            return "scikit-learn digits"
        if self.dataset_name is not None:
            return self.hub_dataset() or Path(self.dataset_name).name
        path = Path(self.train_dir)
        return path.parent.name if "*" in path.name else path.stem

    def hub_dataset(self) -> str | None:
        """The dataset's name on the Hub, if that is where the images are from."""
        return None if self.dataset_name is None or Path(self.dataset_name).exists() else self.dataset_name


# -- images ------------------------------------------------------------------------------------------------------------


def digits() -> datasets.Dataset:
    """scikit-learn's 1,797 scanned digits: 8x8 grey images of 17 levels, 10 classes, in their order."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    cells = []
    for scan in np.rint(scans.images * (255 / 16)).astype(np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(scan).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features(
        {IMAGE: datasets.Image(decode=False), LABEL: datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    return datasets.Dataset.from_dict({IMAGE: cells, LABEL: scans.target.tolist()}, features=features)


def load_images(
    args: DataArguments, seed: int = 0, process: int = 0, num_processes: int = 1, num_workers: int = 0
) -> dict:
    """`{"train": …, "validation": …}`, datasets with undecoded `image` cells and, where there are labels, `label`.

    A `Dataset` each, or for --streaming an `IterableDataset`, in its order, and a `Dataset`. Without a validation split, a
    seeded part of train is held out; of a stream, its first images. Nothing found, an unknown column and a source that
    cannot be loaded are ValueErrors.

    Of a stream, "train" is the share of `process` of `num_processes`: whole files where they divide evenly, else every
    so manieth image. Shares are disjoint and together the stream. num_workers: those of the `DataLoader` it is for; more
    than one, of a stream whose beginning is cut off, is a ValueError: each would cut off its own beginning.
    """
    raw = _load_raw(args)
    splits = {name: _standard_columns(raw[name], args) for name in ("train", "validation") if name in raw}
    if args.streaming:
        return _streaming_splits(splits, args, process, num_processes, num_workers)
    if "validation" not in splits:
        splits["train"], splits["validation"] = _hold_out(splits["train"], args, seed)
    return _limited(splits, args, seed)


def load_labelled_images(args: DataArguments, seed: int = 0) -> dict:
    """`{"train": …, "validation": …, "test": …}`, datasets with undecoded `image` cells and `label`s of train's classes.

    test: the source's labelled test split, or else its validation split, or else the part that `load_images` holds out for
    the same seed, which a model pretrained with that seed has not seen. validation: the source's where that is not the
    test, else a tenth of train [V2 3.1], seeded. Images without labels, classes that train does not have, and a single
    class are ValueErrors.
    """
    if args.streaming:
        raise ValueError("Labelled images are not streamed: leave --streaming out.")
    splits = {name: _standard_columns(split, args) for name, split in _load_raw(args).items()}
    if LABEL not in splits["train"].features:
        raise ValueError(
            f"The images of {args.name()} have no labels: name their column by --label_column_name, or sort the image files "
            "into one folder for each class."
        )
    if args.validation_dir is not None and not _is_labelled(splits["validation"]):
        raise ValueError(f"The images of --validation_dir have no labels as those of {args.name()} have.")
    if not _is_labelled(splits.get("test")):
        splits.pop("test", None)
        if _is_labelled(splits.get("validation")):
            splits["test"] = splits.pop("validation")
        else:
            splits.pop("validation", None)
            splits["train"], splits["test"] = _hold_out(splits["train"], args, seed)
    names = _class_names(splits["train"])
    splits = {split: _with_classes(dataset, names, split) for split, dataset in splits.items()}
    if "validation" not in splits:
        n_held_out = round(len(splits["train"]) * LABELLED_HELD_OUT_FRACTION)
        counts = np.bincount(splits["train"][LABEL], minlength=len(names))
        stratify = LABEL if counts.min() >= 2 and n_held_out >= len(names) else None
        parts = splits["train"].train_test_split(max(1, n_held_out), seed=seed, stratify_by_column=stratify)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    return _limited({split: splits[split] for split in ("train", "validation", "test")}, args, seed)


def _hold_out(dataset: datasets.Dataset, args: DataArguments, seed: int):
    """(train, held out) of a dataset without a validation split."""
    default = DIGITS_HELD_OUT_FRACTION if args.is_embedded else HELD_OUT_FRACTION
    fraction = default if args.train_val_split is None else args.train_val_split
    n_images = len(dataset)
    if not 0 < fraction < 1 or n_images < 2:
        raise ValueError(
            f"A held-out split needs a fraction between 0 and 1 and at least 2 images; found {fraction} of {n_images}."
        )
    parts = dataset.train_test_split(test_size=max(1, round(fraction * n_images)), seed=seed)
    return parts["train"], parts["test"]


def _limited(splits: dict, args: DataArguments, seed: int) -> dict:
    """Splits of at most as many images as the arguments allow, drawn at random."""
    limits = dict.fromkeys(splits, args.max_eval_samples) | {"train": args.max_train_samples}
    for split, limit in limits.items():
        if limit is not None and limit < len(splits[split]):
            splits[split] = splits[split].shuffle(seed=seed).select(range(limit))
    return splits


def _is_labelled(dataset) -> bool:
    """Whether there is a dataset with labels; −1 and nothing are what Hub datasets hold where labels are withheld."""
    return (
        dataset is not None and LABEL in dataset.features and any(label not in (-1, None) for label in dataset[LABEL])
    )


def _label_names(dataset) -> list:
    """The class name of every image, None where it has none."""
    feature, labels = dataset.features[LABEL], dataset[LABEL]
    if isinstance(feature, datasets.ClassLabel):
        return [None if label in (None, -1) else feature.names[label] for label in labels]
    return [None if label is None else str(label) for label in labels]


def _class_names(dataset) -> list[str]:
    feature = dataset.features[LABEL]
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
    elif getattr(feature, "dtype", "").startswith(("int", "uint", "string", "large_string", "bool")):
        names = sorted({label for label in dataset[LABEL] if label is not None})
        names = [str(name) for name in names]
    else:
        raise ValueError(f"The labels are {feature}: classes are integers or strings, one an image.")
    if len(names) < 2:
        raise ValueError(f"The images have {len(names)} class{'' if names else 'es'}; classification needs 2 at least.")
    return names


def _with_classes(dataset: datasets.Dataset, names: list[str], split: str) -> datasets.Dataset:
    """`dataset` with its labels as `ClassLabel` of `names`."""
    found = _label_names(dataset)
    for row, name in enumerate(found):
        if name is None:
            raise ValueError(f"Image {row} of the {split} split has no label: leave it out.")
        if name not in names:
            raise ValueError(f"The {split} split has a class {name!r} that the training images do not have.")
    feature = datasets.ClassLabel(names=names)
    if dataset.features[LABEL] == feature:
        return dataset
    labels = [names.index(name) for name in found]
    return dataset.remove_columns(LABEL).add_column(LABEL, labels, feature=feature)


def _load_raw(args: DataArguments) -> dict:
    if args.is_embedded:
        return {"train": digits()}
    options = {"streaming": args.streaming, "cache_dir": args.data_cache_dir}
    try:
        if args.dataset_name is not None:
            raw = datasets.load_dataset(args.dataset_name, args.dataset_config_name, **options)
        else:
            raw = _load_files(args.train_dir, options)
            if args.validation_dir is not None:
                raw["validation"] = _load_files(args.validation_dir, options)["train"]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        source = args.dataset_name or args.train_dir
        raise ValueError(f"No images could be loaded from {source}: {error}") from error
    if "train" not in raw:
        raise ValueError(f"{args.dataset_name} has no train split; its splits are {', '.join(raw)}.")
    splits = {"train": raw["train"]}
    for split, names in (("validation", _VALIDATION), ("test", ("test",))):
        name = next((name for name in names if name in raw), None)
        if name is not None:
            splits[split] = raw[name]
    return splits


def _load_files(place: str, options: dict) -> dict:
    """Splits found at `place`: by name in a folder of parquet files, else all of it as "train"."""
    path = Path(place)
    if path.is_dir() and any(path.rglob("*.parquet")):
        splits = datasets.load_dataset("parquet", data_dir=place, **options)
    elif path.is_dir():
        if not image_files(path):
            raise ValueError("the folder holds no image files.")
        named = {entry.name for entry in path.iterdir() if entry.is_dir()}
        if "train" in named and named <= {
            "train",
            "test",
            *_VALIDATION,
        }:  # splits, in which the folders are the classes
            splits = datasets.load_dataset("imagefolder", data_dir=place, **options)
        else:
            splits = datasets.load_dataset("imagefolder", data_files={"train": str(path / "**")}, **options)
    else:
        splits = datasets.load_dataset("parquet", data_files={"train": place}, **options)
    if not options["streaming"] and len(splits["train"]) == 0:
        raise ValueError("it holds no images.")
    return dict(splits)


def image_files(folder: Path) -> list[Path]:
    """Files in a folder and its subfolders that are images by their name, in order."""
    known = Image.registered_extensions()
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in known)


def named_images(names: list[str]) -> list[Path]:
    """Image files of the files and folders that are named, in their order; ValueError where there are none."""
    files = [file for path in map(Path, names) for file in (image_files(path) if path.is_dir() else [path])]
    if names and not files:
        raise ValueError(f"There are no image files in {', '.join(names)}.")
    return files


def _standard_columns(dataset, args: DataArguments):
    """Rename the image and label columns to `image` and `label`, drop the others, and leave images undecoded."""
    if dataset.features is None:
        dataset = dataset._resolve_features()
    columns = list(dataset.features)
    image = args.image_column_name
    if image is None:
        of_images = [name for name in columns if isinstance(dataset.features[name], datasets.Image)]
        image = next((name for name in ("image", "img", *of_images) if name in columns), columns[0])
    label = args.label_column_name
    if label is None:
        label = next((name for name in ("label", "labels", "fine_label") if name in columns), None)
    for option, name in (("image_column_name", image), ("label_column_name", label)):
        if name is not None and name not in columns:
            raise ValueError(f"--{option} {name} is not in the dataset; its columns are {', '.join(columns)}.")
    dataset = dataset.select_columns([name for name in (image, label) if name is not None])
    renamed = {old: new for old, new in ((image, IMAGE), (label, LABEL)) if old not in (None, new)}
    dataset = dataset.rename_columns(renamed) if renamed else dataset
    feature = dataset.features[IMAGE]
    kinds = ("string", "large_string", "binary", "large_binary", "struct")
    if isinstance(feature, (datasets.Image, dict)) or getattr(feature, "dtype", None) in kinds:
        dataset = dataset.cast_column(IMAGE, datasets.Image(decode=False))
    return dataset


def _streaming_splits(splits: dict, args: DataArguments, process: int, num_processes: int, num_workers: int) -> dict:
    train, validation = splits["train"], splits.get("validation")
    is_cut = validation is None or args.max_train_samples is not None
    if is_cut and num_workers > 1:
        raise ValueError(
            f"--dataloader_num_workers {num_workers}: a stream whose first images are held out, or that --max_train_samples "
            "limits, is read by one worker. Name --validation_dir or a dataset with a validation split, or lower it to 1."
        )
    if validation is None:
        n_held_out = args.max_eval_samples or _STREAM_HELD_OUT
        validation, train = train.take(n_held_out), train.skip(n_held_out)
    elif args.max_eval_samples is not None:
        validation = validation.take(args.max_eval_samples)
    if args.max_train_samples is not None:
        train = train.take(args.max_train_samples)
    n_first = sum(1 for _ in train.take(num_processes))
    rows = list(tqdm(validation, desc="Reading held-out images", unit="image", disable=None))
    if not rows or n_first < num_processes:  # said by all processes alike
        raise ValueError(
            f"The stream is too short: {len(rows)} images are held out, and {n_first} left for training by {num_processes} "
            "processes, of which each needs one at least."
        )
    if not is_cut and train.num_shards % num_processes == 0:
        train = train.shard(num_processes, process)
    elif num_processes > 1:  # all read, none decoded but its own
        train = train.filter(lambda row, index: index % num_processes == process, with_indices=True)
    return {"train": train, "validation": datasets.Dataset.from_list(rows, features=validation.features)}


def read_image(cell) -> Image.Image:
    """An undecoded cell, or an array of grey levels -> RGB image, upright by its EXIF tag, transparency on white.

    What cannot be read is a ValueError naming it.
    """
    if not isinstance(cell, dict):
        if cell is None:
            raise ValueError("the cell is empty")
        return to_rgb_image(cell)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"])
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb_image(image)
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, ...
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None)
        raise ValueError(f"{cell.get('path') or 'no path'}: {reason or f'{type(error).__name__}: {error}'}") from error


def _read_images(cells, indices, on_bad_image: str, then=lambda image, index: image):
    """Portions `(images, reasons)` of cells: `then(image, index)` of the readable ones, and for every cell the reason it is
    not readable, or "".

    A portion ends when its photos, as they were read, have `_HELD` pixels: many small images are held at once, large
    ones one by one.
    """
    images, reasons, n_pixels = [], [], 0
    for cell, index in zip(cells, indices, strict=True):
        try:
            image = read_image(cell)
        except ValueError as error:
            if on_bad_image != "skip":
                raise ValueError(
                    f"Image {index} cannot be read ({error}). Remove it, or pass --on_bad_image skip."
                ) from error
            reasons.append(f"image {index}: {error}")
            continue
        n_pixels += image.width * image.height
        images.append(then(image, index))
        reasons.append("")
        if n_pixels >= _HELD:
            yield images, reasons
            images, reasons, n_pixels = [], [], 0
    if reasons:
        yield images, reasons


def _tokens_of_cells(processor, *cells_and_options, **options):
    """Tokens of the readable cells, a list of (N,) int64, and for every cell the reason it is not readable, or "".

    Further arguments are those of `_read_images`.
    """
    tokens, all_reasons = [], []
    for images, reasons in _read_images(*cells_and_options, **options):
        tokens += list(processor(images)[TOKENS]) if images else []
        all_reasons += reasons
    return tokens, all_reasons


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


# -- palette -----------------------------------------------------------------------------------------------------------


def sample_pixels(
    dataset, n_pixels: int, image_size: int, center_crop: bool = True, seed: int = 0, on_bad_image="error"
):
    """About `n_pixels` pixels (n, 3) uint8 drawn evenly from all images of a dataset of `load_images`, seeded.

    Images are first brought to `image_size`, as they will be for their tokens. Fewer pixels than asked: all of them.
    """
    if isinstance(dataset, datasets.IterableDataset):
        rows = dataset.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER).take(_STREAM_PALETTE)
        dataset = datasets.Dataset.from_list(list(rows), features=dataset.features)
    resize = ImageGPTImageProcessorPil(size=image_size, do_center_crop=center_crop)
    rng = np.random.default_rng(seed)
    per_image = min(image_size * image_size, -(-n_pixels // len(dataset)))
    sampled, bad = [], []
    for start in tqdm(range(0, len(dataset), _BATCH), desc="Sampling pixels", unit="batch", leave=False, disable=None):
        indices = range(start, min(start + _BATCH, len(dataset)))
        for images, reasons in _read_images(dataset[start : indices.stop][IMAGE], indices, on_bad_image):
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


# -- tokens ------------------------------------------------------------------------------------------------------------


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
        rows, reasons = _tokens_of_cells(processor, batch[IMAGE], indices, on_bad_image)
        tokens = np.zeros((len(reasons), n_tokens), dtype)
        if rows:
            tokens[[not reason for reason in reasons]] = rows
        return {TOKENS: tokens, "bad": reasons}

    if num_proc is not None:
        lookup_table(processor.clusters)  # before the processes part, which then share it
    dataset = dataset.map(
        to_tokens,
        batched=True,
        batch_size=_BATCH,
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


def report_bad_images(reasons: list[str], n_images: int):
    """Say how many images were left out, and which."""
    listing = "\n  ".join(reasons)
    tqdm.write(f"Left out {len(reasons)} of {n_images} images that cannot be read:\n  {listing}")
    if len(reasons) == n_images:
        raise ValueError(f"None of the {n_images} images can be read; the first: {reasons[0]}")


def token_array(dataset) -> np.ndarray:
    """All tokens of a tokenised dataset as one array (n, N) of uint16."""
    return np.asarray(dataset.with_format("numpy", columns=[TOKENS], dtype=np.uint16)[:][TOKENS])


class ImageTokens(torch.utils.data.Dataset):
    """Rows `{"input_ids": (N,)}` for a `DataLoader`, with the augmentation and the masks that are drawn anew each epoch.

    dataset: of `tokenize` (pad-and-crop and flips, on the tokens: a moved small image has moved tokens), or of
    `load_images` where `random_crop`. Rows have a `label` where it has one, and with `masked` a `bool_masked_pos` (N,), True
    where a pixel is hidden [V2 2.1]. What is drawn depends on (seed, epoch, index) alone, so it is the same on any number
    of processes and workers (not persistent ones, which never learn of a new epoch), and after a resume.
    """

    def __init__(self, dataset, processor, random_crop=False, random_flip=False, pad_crop=False, masked=False, seed=0):
        self.processor, self.random_crop, self.random_flip = processor, random_crop, random_flip
        self.pad_crop, self.masked, self.seed, self.epoch = pad_crop, masked, seed, 0
        self.width = processor.token_grid()[1]
        self.labels = np.asarray(dataset[LABEL]) if LABEL in dataset.column_names else None
        self.dataset = dataset if random_crop else dataset.with_format("numpy", columns=[TOKENS], dtype=np.uint16)

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        if self.random_crop:
            cells = self.dataset[indices][IMAGE]
            crop = lambda image, index: random_crop(image, self._rng(index))  # noqa: E731
            tokens = np.stack(_tokens_of_cells(self.processor, cells, indices, "error", then=crop)[0])
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


def random_crop(image: Image.Image, rng: np.random.Generator):
    """The paper's crop [V2 3.1] of an RGB image: shorter side resized to 256..384 pixels, then a 224 x 224 window, both uniform."""
    shorter = int(rng.integers(CROP_SHORTER_SIDE[0], CROP_SHORTER_SIDE[1] + 1))
    scale = shorter / min(image.size)
    width, height = (max(CROP_SIZE, round(side * scale)) for side in image.size)
    left, top = (int(rng.integers(0, side - CROP_SIZE + 1)) for side in (width, height))
    window = (left, top, left + CROP_SIZE, top + CROP_SIZE)
    return image.resize((width, height), Image.Resampling.BILINEAR).crop(window)


def readable(dataset: datasets.Dataset, num_proc: int | None = None) -> datasets.Dataset:
    """`dataset` without the images that cannot be decoded, which are reported. Cached like `tokenize`."""

    def check(batch, indices):
        return {"bad": [reason for _, reasons in _read_images(batch[IMAGE], indices, "skip") for reason in reasons]}

    checked = dataset.map(
        check,
        batched=True,
        batch_size=_BATCH,
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
    n_images = sum(1 for _ in dataset.take(max(1, _SHUFFLE_BUFFER // num_processes)))
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
        tokens, reasons = _tokens_of_cells(processor, batch[IMAGE], indices, args.on_bad_image, **crop)
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
    return dataset.map(to_tokens, batched=True, batch_size=_BATCH, with_indices=True, remove_columns=columns)


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
