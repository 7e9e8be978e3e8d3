"""The arguments that name images. Importing this module loads nothing heavy, so that flags can be printed at once."""

from dataclasses import dataclass, field
from pathlib import Path


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
    image_size: int | None = field(
        default=None, metadata={"help": "Height = width of the token grid in pixels. Default: 32; 8 for the digits."}
    )
    center_crop: bool | None = field(
        default=None,
        metadata={
            "help": "Crop the largest central square before resizing, so that images keep their proportions. Default: the "
            "setting of the given image processor, or true."
        },
    )
    random_crop: bool = field(
        default=False,
        metadata={
            "help": "Augment with the paper's ImageNet crops: shorter side drawn from 256..384, random 224 x 224 crop."
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
