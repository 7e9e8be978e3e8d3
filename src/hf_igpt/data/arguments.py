"""The arguments that name images. Importing this module loads nothing heavy, so that flags can be printed at once."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..presets import MAX_COLORS, MAX_SIDE


# What numbers may be, in the words of the error; other numbers are at least 0.
RANGES: dict[str, Callable[[float], bool]] = {
    "at least 0": lambda number: number >= 0,
    "at least 1": lambda number: number >= 1,
    "at least 1, or -1 for none": lambda number: number >= 1 or number == -1,
    "positive": lambda number: number > 0,
    "between 0 and 1": lambda number: 0 < number < 1,
    "above 0 and at most 1": lambda number: 0 < number <= 1,
    "at least 0 and below 1": lambda number: 0 <= number < 1,
    "from 0 to 4294967295": lambda number: 0 <= number < 2**32,  # the seeds that numpy takes
    f"from 1 to {MAX_COLORS}": lambda number: 1 <= number <= MAX_COLORS,
    "any number": lambda number: True,
}
SEEDS = ("seed", "data_seed", "split_seed")
IMAGE_SIZE_HELP = "Height x width in pixels, 32x16 for example, or one number for a square."


def parse_image_size(size: int | str | Sequence[int]) -> tuple[int, int]:
    """The (height, width) that `--image_size` says: "32x16", (32, 16), or one number for a square. Other values: ValueError."""
    text = "x".join(map(str, size)) if isinstance(size, (tuple, list)) else str(size)
    found = re.fullmatch(r"([0-9]{1,4})(?:x([0-9]{1,4}))?", text)
    sides = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not all(1 <= side <= MAX_SIDE for side in sides):
        raise ValueError(
            f"--image_size is a whole number from 1 to {MAX_SIDE}, or two of them, height x width, such as 32x16; found {text:.50}."
        )
    return sides


def name_image_size(size: tuple[int, int]) -> int | str:
    """The shortest form of (height, width) that `parse_image_size` reads: 32, or "32x16"."""
    return size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"


def check_numbers(arguments: Any, ranges: dict[str, tuple[str, ...]]) -> None:
    """ValueError unless all numbers of a dataclass of arguments, and those in its lists, are finite and in their range.

    ranges: names of fields by what they may be, a key of `RANGES`. Seeds are numpy's; all others are at least 0.
    """
    of_field = dict.fromkeys(SEEDS, "from 0 to 4294967295")
    of_field |= {name: words for words, names in ranges.items() for name in names}
    for name in (option.name for option in fields(arguments)):
        value = getattr(arguments, name, None)
        words = of_field.get(name, "at least 0")
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not (math.isfinite(number) and RANGES[words](number)):
                many = isinstance(value, (list, tuple))
                words = f"{words} numbers" if many and words == "positive" else words
                words += "" if math.isfinite(number) else " and finite"
                raise ValueError(f"--{name} {'are' if many else 'is'} {words}; found {value}.")


@dataclass
class DataArguments:
    """Which images to use, and what to do with them before they become tokens."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Dataset on the Hub, or a path that `load_dataset` reads. Without it and --train_dir: the digits."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    train_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images (its subfolders are classes, or train/ and test/, which hold the classes), or parquet "
            "file, folder or glob pattern."
        },
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Like --train_dir, for the held-out images."})
    image_column_name: str | None = field(
        default=None,
        metadata={"help": 'Image column. Default: "image", "img", or the first column that holds images.'},
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": 'Class column, if any. Default: "label", "labels" or "fine_label".'}
    )
    train_val_split: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of the training images to hold out if there is no validation split. Default: 0.04 (paper 3.1)."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most this many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use at most this many held-out images."})
    streaming: bool = field(
        default=False, metadata={"help": "Stream the images instead of downloading them; requires --max_steps."}
    )
    image_size: int | str | None = field(
        default=None, metadata={"help": f"The token grid. {IMAGE_SIZE_HELP} Default: 32; 8 for the digits."}
    )
    center_crop: bool | None = field(
        default=None,
        metadata={
            "help": "Crop the largest central window of the grid's proportions before resizing, so that images keep theirs. "
            "Default: the setting of the given image processor, or true."
        },
    )
    random_crop: bool = field(
        default=False,
        metadata={
            "help": "Augment with the paper's ImageNet crops: shorter side drawn from 256..384, random 224 x 224 crop, or of "
            "the grid's proportions within it."
        },
    )
    random_flip: bool = field(
        default=False, metadata={"help": "Augment by mirroring half of the training images, left to right."}
    )
    pad_crop: bool = field(
        default=False,
        metadata={
            "help": "Augment with the paper's CIFAR crops: a border of 4 reflected pixels (at 32x32), then a random window."
        },
    )
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "What to do with an unreadable image: stop with an error that names it, or leave it out.",
            "choices": ["error", "skip"],
        },
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Number of processes that tokenise images."}
    )
    data_cache_dir: str | None = field(default=None, metadata={"help": "Folder in which `datasets` keeps its cache."})

    def __post_init__(self) -> None:
        if self.image_size is not None:  # one form of each size, which runs that are resumed compare
            self.image_size = name_image_size(parse_image_size(self.image_size))
        check_numbers(
            self,
            {
                "at least 1": ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"),
                "between 0 and 1": ("train_val_split",),
            },
        )
        if self.on_bad_image not in ("error", "skip"):
            raise ValueError(f"--on_bad_image is error or skip; found {self.on_bad_image!r}.")
        if self.dataset_name is not None and self.train_dir is not None:
            raise ValueError("Give --dataset_name or --train_dir, not both.")
        if self.validation_dir is not None and self.train_dir is None:
            raise ValueError("--validation_dir requires --train_dir.")
        if self.streaming and self.is_embedded:
            raise ValueError("--streaming requires --dataset_name or --train_dir; the digits are in memory.")
        if self.pad_crop and (self.random_crop or self.streaming):
            raise ValueError("--pad_crop can be combined neither with --random_crop nor with --streaming.")

    @property
    def is_embedded(self) -> bool:
        """Whether the images are the embedded default, the digits."""
        return self.dataset_name is None and self.train_dir is None

    def name(self) -> str:
        """Return the name of the images for records, which is never a path on this machine."""
        if self.dataset_name is not None:
            return self.hub_dataset() or Path(self.dataset_name).name
        if self.train_dir is None:
            return "scikit-learn digits"
        path = Path(self.train_dir)
        return path.parent.name if "*" in path.name else path.stem

    def hub_dataset(self) -> str | None:
        """Return the dataset's name on the Hub, or None if the images come from elsewhere."""
        return None if self.dataset_name is None or Path(self.dataset_name).exists() else self.dataset_name
