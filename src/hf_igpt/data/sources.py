"""The sources of images: the splits of a source, with undecoded images.

Sources are scikit-learn's digits (the embedded default), a Hub dataset, folders of images and parquet files, memory-mapped from
disk or streamed. `images.py` decodes the cells of the image column.
"""

import glob
import io
import os
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image
from tqdm.auto import tqdm

from ..presets import DIGITS_HELD_OUT_FRACTION, HELD_OUT_FRACTION, LABELLED_HELD_OUT_FRACTION, SEED
from .arguments import DataArguments
from .images import find_image_files


IMAGE = "image"  # our name for the image column, and below for the label column, whatever the source calls them
LABEL = "label"
_SPLITS = {  # our name -> names that sources give to a split, in any case
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_STREAM_HELD_OUT = 1000  # images held out from a stream without a validation split

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset
Splits: TypeAlias = dict[str, AnyDataset]


def digits() -> datasets.Dataset:
    """Return scikit-learn's 1,797 scanned digits in their order: 8x8 images with 17 grey levels, 10 classes."""
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
    args: DataArguments,
    seed: int = SEED,
    process: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    classes: bool = False,
) -> Splits:
    """Load `{"train": …, "validation": …}`, datasets with undecoded `image` cells and, if the source has labels, `label`.

    Each is a `Dataset`; with --streaming, "train" is an `IterableDataset` in the order of the source. Without a validation
    split, a random part of train, drawn with `seed`, is held out; from a stream, its first images. An empty source, an
    unknown column and a source that cannot be loaded are ValueErrors.

    With --streaming, "train" is the share of process number `process` of `num_processes`: whole files if they divide evenly,
    or else every k-th image. The shares are disjoint and together make up the stream. num_workers: the workers of the
    `DataLoader` that will read it; more than one is a ValueError if the first images of the stream are left out, because
    each worker would leave out its own first images.

    classes: return labels as `label_classes` does.
    """
    raw = _load_raw(args)
    splits: Splits = {name: _standardize_columns(raw[name], args) for name in ("train", "validation") if name in raw}
    if args.streaming:
        splits = _split_stream(splits, args, process, num_processes, num_workers)
    if classes:
        splits = label_classes(splits, args.name())  # before any are left out
    if args.streaming:
        return splits
    if "validation" not in splits:
        splits["train"], splits["validation"] = _hold_out(splits["train"], args, seed)
    return _limit_sizes(splits, args, seed)


def load_labelled_images(args: DataArguments, seed: int = SEED) -> dict[str, datasets.Dataset]:
    """Load `{"train": …, "validation": …, "test": …}`, datasets with undecoded `image` cells and the `label`s of train's classes.

    test: the source's labelled test split, or its validation split, or the part that `load_images` holds out for the same
    seed, which a model pretrained with that seed has not seen. validation: the source's own, unless that is the test split,
    or a tenth of train [V2 3.1], drawn with `seed`. Images without labels, classes that train does not have, and fewer than
    two classes are ValueErrors.
    """
    if args.streaming:
        raise ValueError("Labelled images are not streamed: leave --streaming out.")
    splits = {name: _standardize_columns(split, args) for name, split in _load_raw(args).items()}
    if LABEL not in splits["train"].features:
        raise ValueError(
            f"The images of {args.name()} have no labels: name their column by --label_column_name, or sort the image files "
            "into one folder per class."
        )
    if args.validation_dir is not None and not _is_labelled(splits["validation"]):
        raise ValueError(f"The images of --validation_dir have no labels, unlike those of {args.name()}.")
    if not _is_labelled(splits.get("test")):
        splits.pop("test", None)
        if _is_labelled(splits.get("validation")):
            splits["test"] = splits.pop("validation")
        else:
            splits.pop("validation", None)
            splits["train"], splits["test"] = _hold_out(splits["train"], args, seed)
    names = _find_class_names(splits["train"])
    splits = {split: _set_classes(dataset, names, split) for split, dataset in splits.items()}
    if "validation" not in splits:
        n_held_out = round(len(splits["train"]) * LABELLED_HELD_OUT_FRACTION)
        counts = np.bincount(splits["train"][LABEL], minlength=len(names))
        stratify = LABEL if counts.min() >= 2 and n_held_out >= len(names) else None
        parts = splits["train"].train_test_split(
            max(1, n_held_out), seed=seed, stratify_by_column=stratify, load_from_cache_file=False
        )
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    return _limit_sizes({split: splits[split] for split in ("train", "validation", "test")}, args, seed)


def label_classes(splits: Splits, name: str) -> Splits:
    """Return splits with their labels as `ClassLabel`s with the class names of train, −1 for images without a label.

    name: the images' name, for the ValueErrors: train has no labels, fewer than two classes, or, as a stream, labels without
    names; another split has a class that train does not have.
    """
    train = splits["train"]
    if LABEL not in train.features:
        raise ValueError(
            f"The images of {name} have no labels: name their column by --label_column_name, sort the image files into one "
            "folder per class, or leave --class_conditional out."
        )
    if isinstance(train, datasets.IterableDataset):
        feature = train.features[LABEL]
        if not isinstance(feature, datasets.ClassLabel):
            raise ValueError(f"The labels of a stream are of the type ClassLabel; those of {name} are {feature}.")
        names = feature.names
    else:
        names = _find_class_names(train)
    return {
        split: dataset
        if isinstance(dataset, datasets.IterableDataset)
        else _set_classes(dataset, names, split, required=False)
        for split, dataset in splits.items()
    }


def _hold_out(dataset: datasets.Dataset, args: DataArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split a dataset without a validation split into (train, held out)."""
    default = DIGITS_HELD_OUT_FRACTION if args.is_embedded else HELD_OUT_FRACTION
    fraction = default if args.train_val_split is None else args.train_val_split
    n_images = len(dataset)
    if not 0 < fraction < 1 or n_images < 2:
        raise ValueError(
            f"A held-out split needs a fraction between 0 and 1 and at least 2 images; found {fraction} of {n_images}."
        )
    # Drawn anew: a cached file of indices that was cut short would be another split, or an error without a name.
    parts = dataset.train_test_split(
        test_size=max(1, round(fraction * n_images)), seed=seed, load_from_cache_file=False
    )
    return parts["train"], parts["test"]


def _limit_sizes(splits: Splits, args: DataArguments, seed: int) -> Splits:
    """Reduce each split to the number of images that the arguments allow, drawn at random."""
    limits = dict.fromkeys(splits, args.max_eval_samples) | {"train": args.max_train_samples}
    for split, limit in limits.items():
        if limit is not None and limit < len(splits[split]):
            splits[split] = splits[split].shuffle(seed=seed, load_from_cache_file=False).select(range(limit))
    return splits


def _is_labelled(dataset: datasets.Dataset | None) -> bool:
    """Whether there is a dataset with labels; Hub datasets hold −1 or None for labels that are withheld."""
    return (
        dataset is not None and LABEL in dataset.features and any(label not in (-1, None) for label in dataset[LABEL])
    )


def read_labels(dataset: datasets.Dataset) -> list[str | None]:
    """Return the class name of every image, None for an image without a label, which may be marked by −1."""
    feature, labels = dataset.features[LABEL], dataset[LABEL]
    if isinstance(feature, datasets.ClassLabel):
        return [None if label in (None, -1) else feature.names[label] for label in labels]
    return [None if label is None or str(label) == "-1" else str(label) for label in labels]


def _find_class_names(dataset: datasets.Dataset) -> list[str]:
    feature = dataset.features[LABEL]
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
    elif getattr(feature, "dtype", "").startswith(("int", "uint", "string", "large_string", "bool")):
        known = {label for label in dataset[LABEL] if label is not None and str(label) != "-1"}
        names = [str(label) for label in sorted(known)]
    else:
        raise ValueError(f"The labels are {feature}: classes are integers or strings, one per image.")
    if len(names) < 2:
        raise ValueError(
            f"The images have {len(names)} class{'' if names else 'es'}; classification requires at least 2."
        )
    return names


def _set_classes(dataset: datasets.Dataset, names: list[str], split: str, required: bool = True) -> datasets.Dataset:
    """Return `dataset` with its labels as `ClassLabel` with the class names `names`; without `required`, some are −1."""
    found = read_labels(dataset) if LABEL in dataset.features or required else [None] * len(dataset)
    for row, name in enumerate(found):
        if name is None and not required:
            continue
        if name is None:
            raise ValueError(f"Image {row} of the {split} split has no label: leave it out.")
        if name not in names:
            raise ValueError(f"The {split} split has a class {name!r} that the training images do not have.")
    feature = datasets.ClassLabel(names=names)
    if dataset.features.get(LABEL) == feature and None not in dataset[LABEL]:
        return dataset
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)} | {None: -1}
    labels = [numbers[name] for name in found]
    others = dataset.remove_columns(LABEL) if LABEL in dataset.features else dataset
    return others.add_column(LABEL, labels, feature=feature)


def _load_raw(args: DataArguments) -> Splits:
    options = {"streaming": args.streaming, "cache_dir": args.data_cache_dir}
    try:
        if args.dataset_name is not None:
            raw = datasets.load_dataset(args.dataset_name, args.dataset_config_name, **options)
        elif args.train_dir is not None:
            raw = _load_files(args.train_dir, options)
            if args.validation_dir is not None:
                raw["validation"] = _load_files(args.validation_dir, options)["train"]
        else:
            return {"train": digits()}
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        source = args.dataset_name or args.train_dir
        raise ValueError(f"No images could be loaded from {source}: {error}") from error
    splits = {}
    for split, names in _SPLITS.items():
        name = next((name for name in names if name in raw), None)
        if name is not None:
            splits[split] = raw[name]
    if "train" not in splits:
        source = args.dataset_name or args.train_dir
        raise ValueError(f"{source} has no train split; its splits are {', '.join(raw)}.")
    return splits


def _load_files(place: str, options: dict[str, Any]) -> Splits:
    """Load the splits at `place`: by their names if it is a folder of parquet files or of splits, or else all as "train"."""
    path = Path(place)
    if path.is_dir() and place:
        splits = _load_folder(path, options)
    else:
        files = place if "://" in place else _find_parquet_files(place)
        splits = datasets.load_dataset("parquet", data_files={"train": files}, **options)
    if not options["streaming"] and len(splits["train"]) == 0:
        raise ValueError("it holds no images.")
    return dict(splits)


def _load_folder(path: Path, options: dict[str, Any]) -> Splits:
    if "::" in str(path):
        raise ValueError("`datasets` takes :: in a name for the border of an archive: rename the folder.")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        raise ValueError("save_to_disk wrote this folder: write parquet files with to_parquet, and name their folder.")
    if any(path.rglob("*.parquet")):
        return datasets.load_dataset("parquet", data_dir=glob.escape(str(path)), **options)
    files = find_image_files(path)
    if not files:
        raise ValueError("the folder holds no image files.")
    unread = [file.name for file in files if file.suffix.lower() not in ImageFolder.EXTENSIONS]
    if unread:
        tqdm.write(
            f"{len(unread)} files of {path}, as {unread[0]}, are left out: `datasets` does not read their format."
        )
    folders = _find_split_folders(path)
    patterns = {split: f"{glob.escape(str(folder))}/**" for split, folder in (folders or {"train": path}).items()}
    if folders:  # the classes are the folders within; images directly in a split's folder would be of a class "train"
        direct = {folder.name for folder in folders.values()}
        options = options | {"drop_labels": any(file.parent.name in direct for file in files)}
    return datasets.load_dataset("imagefolder", data_files=patterns, **options)


def _find_parquet_files(place: str) -> list[str]:
    """Return the parquet file, or those that a pattern matches, escaped for `datasets`; other files are a ValueError."""
    files = [place] if Path(place).is_file() else sorted(filter(os.path.isfile, glob.glob(place, recursive=True)))
    if not files:
        raise ValueError("there is no such file or folder.")
    for file in files:
        with open(file, "rb") as start:
            if start.read(4) != b"PAR1":
                raise ValueError(
                    f"{Path(file).name} is not a parquet file. Name the folder of images rather than an image, unpack an archive, "
                    "or name parquet files: one, their folder, or a pattern."
                )
    return [glob.escape(file) for file in files]


def _find_split_folders(path: Path) -> dict[str, Path]:
    """Find the folders of `path` that are splits, by our names for them; {} if its folders are classes.

    They are splits if one is named as training images are and every other as another split, in any case; hidden folders and
    those that systems leave behind do not count. Two of the same split, or splits next to other folders, are ValueErrors.
    """
    folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))]
    found: dict[str, Path] = {}
    others = []
    for folder in sorted(folders):
        split = next((split for split, names in _SPLITS.items() if folder.name.lower() in names), None)
        if split is None:
            others.append(folder.name)
        elif split in found:
            raise ValueError(f"{found[split].name}/ and {folder.name}/ are both the {split} split: leave one.")
        else:
            found[split] = folder
    if "train" not in found or (len(found) == 1 and others):  # a class may have such a name
        return {}
    if others:
        names = ", ".join(f"{folder.name}/" for folder in found.values())
        raise ValueError(
            f"{names} are splits, but {', '.join(sorted(others)[:5])} is none and lies next to them: move it elsewhere, or name "
            "the training images' own folder."
        )
    return found


def _standardize_columns(dataset: AnyDataset, args: DataArguments) -> AnyDataset:
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


def _split_stream(splits: Splits, args: DataArguments, process: int, num_processes: int, num_workers: int) -> Splits:
    train, validation = splits["train"], splits.get("validation")
    is_cut = validation is None or args.max_train_samples is not None
    if is_cut and num_workers > 1:
        raise ValueError(
            f"--dataloader_num_workers {num_workers}: only one worker can read a stream whose first images are held out, or "
            "that --max_train_samples limits. Name --validation_dir or a dataset with a validation split, or lower it to 1."
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
    if not rows or n_first < num_processes:  # every process raises this
        raise ValueError(
            f"The stream is too short: {len(rows)} images are held out, and {n_first} are left for training with "
            f"{num_processes} processes, each of which needs at least one."
        )
    names = getattr(validation.features.get(LABEL), "names", [])
    if is_cut and "validation" not in splits and len(names) > 1 and len({row[LABEL] for row in rows}) == 1:
        raise ValueError(
            f"The first {len(rows)} images of the stream, which would be held out, are all of the class "
            f"{names[rows[0][LABEL]]!r}: the stream is sorted. Name --validation_dir, or shuffle the dataset."
        )
    if not is_cut and train.num_shards % num_processes == 0:
        train = train.shard(num_processes, process)
    elif num_processes > 1:  # a process reads all images and decodes only its own
        train = train.filter(lambda row, index: index % num_processes == process, with_indices=True)
    return {"train": train, "validation": datasets.Dataset.from_list(rows, features=validation.features)}
