"""Which images a model was not trained on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data import DataArguments, load_images, load_labelled_images
from ..presets import SEED
from .records import RECORDS, Record, read_records, read_run


def record_of_training(model_name: str | Path) -> Record | None:
    """The first record in a model's folder, which says what it was trained on; None if there are no records."""
    file = Path(model_name) / RECORDS
    return read_records(file)[0] if file.is_file() else None


@dataclass
class TrainingSplit:
    """The images that a model was trained on, and which of them were held out."""

    dataset: str | None
    seed: int | None
    is_labelled: bool  # a classifier's, which has a test split
    held_out: int | None = None  # their number, if it is known


def find_split(model_name: str | Path) -> TrainingSplit | None:
    """The split that a model was trained with, by its records, or before there are any by `run.json`, as of a checkpoint."""
    record = record_of_training(model_name)
    if record is not None:
        seed = record.seed if record.split_seed is None else record.split_seed
        return TrainingSplit(record.dataset, seed, record.started_from is not None, record.n)
    run = read_run(model_name)
    recipe, seed = run.get("recipe", {}), run.get("split_seed")
    return TrainingSplit(recipe.get("data"), seed, "loss" in recipe) if isinstance(seed, int) else None


def find_split_seed(model_name: str, data_args: DataArguments, seed: int) -> int:
    """The seed that draws held-out images: the model's own if it was trained on the same images, else `seed`.

    With another seed, images that the model was trained on would be among those it is tested on. Another
    --train_val_split than in training is a ValueError. A model without records and `run.json` does not tell its seed.
    """
    split = find_split(model_name)
    if split is None or split.dataset != data_args.name() or split.seed is None:
        return seed
    check_same_split(model_name, data_args)
    if split.seed != seed:
        print(f"Splits are drawn by seed {split.seed}, as when {Path(model_name).name} was trained.")
    return split.seed


def check_same_split(model_name: str, data_args: DataArguments) -> None:
    """ValueError if --train_val_split is not the one that a model was trained with: it would be tested on training images."""
    was, now = read_run(model_name).get("train_val_split", data_args.train_val_split), data_args.train_val_split
    if was != now:
        then = "the default --train_val_split" if was is None else f"--train_val_split {was}"
        raise ValueError(
            f"{model_name} was trained with {then}, not {'the default' if now is None else now}: test images would be among "
            f"those it was trained on. {'Leave --train_val_split out.' if was is None else 'Give the same.'}"
        )


def select_held_out(
    model_name: str, data_args: DataArguments, count: int, split_seed: int | None = None
) -> tuple[Dataset, int]:
    """The first `count` rows of undecoded images that a model was not trained on, and the seed of their split.

    The split is the one that the model was trained with, unless `split_seed` is given. ValueError: it was trained on other
    data than `data_args`, or fewer images were held out.
    """
    load: Callable[..., dict[str, Any]] = load_images
    trained, name = find_split(model_name), "validation"
    if trained is not None:
        if trained.is_labelled:  # it was trained on some of what pretraining held out
            load, name = load_labelled_images, "test"
        if trained.dataset != data_args.name():
            raise ValueError(
                f"The model was trained on {trained.dataset}; --num_held_out would take images of {data_args.name()}: give the "
                "same --dataset_name or --train_dir as in training, or --images."
            )
        if trained.held_out is not None and count > trained.held_out:
            raise ValueError(f"--num_held_out {count}: only {trained.held_out} images were held out in training.")
        check_same_split(model_name, data_args)
        if split_seed is None:
            split_seed = trained.seed
    seed = SEED if split_seed is None else split_seed
    held_out = load(data_args, seed=seed)[name]
    return held_out.select(range(min(count, len(held_out)))), seed
