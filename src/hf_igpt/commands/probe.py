"""`scripts/run_linear_probe.py`: probe trained models on labelled images [V2 3.4, 4.2-4.4]."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from ..configuration_imagegpt import ImageGPTConfig
from ..data import LABEL, DataArguments, load_labelled_images, processor_of, tokenize
from ..evaluation.held_out import find_split_seed, record_of_training
from ..evaluation.probes import Probing, Protocol
from ..evaluation.records import (
    MILESTONES,
    PROBE,
    Record,
    describe_model,
    fields_of_images,
    format_value,
    save_picture,
    write_records,
)
from ..features_imagegpt import check_layers, layers_around
from ..image_processing_imagegpt import AnyImageProcessor
from ..modeling_imagegpt import ImageGPTModel
from ..reporting import plots
from .arguments import ProbeArguments
from .cli import find_device
from .folders import check_lacks, check_model_exists, folder_beside


@dataclass
class Subject:
    """A model to probe, where its records go, and what they say of it."""

    name: str
    folder: Path
    config: ImageGPTConfig
    processor: AnyImageProcessor
    layers: list[int]
    about: dict[str, Any]


def probe(args: ProbeArguments, data_args: DataArguments) -> list[Record]:
    """Probe models on labelled images; writes `probe.json` and `probe.png` for each and returns all records.

    What is wrong with models, layers, labels or folders is a ValueError before any forward pass.
    """
    device = find_device(args.device)
    names = list_models(args)
    subjects = [prepare_subject(name, args, len(names)) for name in names]
    folders = [subject.folder for subject in subjects]
    if len(set(folders)) < len(folders):
        raise ValueError(
            f"Several models would be written to {max(folders, key=folders.count)}: leave --output_dir out."
        )
    seeds = {find_split_seed(subject.name, data_args, args.seed) for subject in subjects}
    if len(seeds) > 1:
        raise ValueError(
            f"The models were trained on splits of different seeds, {sorted(seeds)}: probe them one by one."
        )
    splits = load_labelled_images(data_args, seed=seeds.pop())
    tokenizing: dict[str, Any] = {
        "on_bad_image": data_args.on_bad_image,
        "num_proc": data_args.preprocessing_num_workers,
    }
    tokens_of = [
        {split: tokenize(images, subject.processor, **tokenizing) for split, images in splits.items()}
        for subject in subjects
    ]
    classes = splits["train"].features[LABEL].names
    check_labels(tokens_of[0], classes, args.labels_per_class)
    protocol = Protocol(**{option.name: getattr(args, option.name) for option in fields(Protocol)})
    records = []
    for subject, tokens in zip(subjects, tokens_of, strict=True):
        print(f"Probing {subject.name}")
        model = ImageGPTModel.from_pretrained(subject.name)
        model.to(device)  # type: ignore[arg-type]  # its decorator hides the signature
        about = fields_of_images(data_args.name(), subject.processor, len(classes))
        palette = subject.processor.palette
        found = []
        for record in Probing(model, tokens, palette, subject.layers, protocol, about, subject.about).run():
            tqdm.write(f"  {format_value(record, 2)}  {describe_model(record)}, {record.split}")
            found.append(record)
        print_tested(found)
        subject.folder.mkdir(parents=True, exist_ok=True)
        save_picture(plots.layer_curves({subject.name: found}), subject.folder / "probe.png")
        write_records(subject.folder / PROBE, found)
        print(f"Wrote {subject.folder / PROBE} and probe.png")
        records += found
    return records


def check_labels(tokens: dict[str, Dataset], classes: list[str], labels_per_class: list[int]) -> None:
    """A ValueError if there are fewer than two classes, or a class has fewer images than are asked for."""
    train, validation = (np.asarray(tokens[split][LABEL]) for split in ("train", "validation"))
    if len(np.unique(train)) < 2:
        raise ValueError(
            f"All {len(train)} training images are of the class {classes[train[0]]!r}; a probe needs at least 2 classes: raise "
            "--max_train_samples."
        )
    counts = np.bincount(np.concatenate([train, validation]), minlength=len(classes))
    for per_class in labels_per_class:
        if per_class > counts.min():
            raise ValueError(
                f"--labels_per_class {per_class}: the class {classes[counts.argmin()]!r} has {counts.min()} training images."
            )


def list_models(args: ProbeArguments) -> list[str]:
    """The models that are named, each followed by its milestones if they are asked for."""
    names = []
    for name in args.model_name_or_path:
        milestones = sorted(map(str, (Path(name) / MILESTONES).glob("step-*"))) if args.milestones else []
        if args.milestones and not milestones:
            raise ValueError(f"{name} has no milestones: train it with run_pretrain.py --milestones.")
        names += [name, *milestones]
    return names


def prepare_subject(name: str, args: ProbeArguments, n_models: int) -> Subject:
    """Everything about a model but its weights; what is wrong with it or its folder is a ValueError."""
    check_model_exists(name)
    folder = folder_beside(name, args.output_dir, "probe")
    if args.output_dir and n_models > 1:
        folder = folder / Path(name).absolute().name
    check_lacks(folder, PROBE)
    config = ImageGPTConfig.from_pretrained(name)
    layers = sorted(set(check_layers(config, args.layers)))
    if args.num_concatenated > 1:
        layers_around(0, config.n_layer, args.num_concatenated)
    about: dict[str, Any] = {"checkpoint": Path(name).absolute().name}
    trained = record_of_training(name)
    if trained is not None:
        about |= {"parameters": trained.parameters, "images_seen": trained.images_seen}
        about |= {"started_from": trained.started_from}
        if trained.metric == "nats_per_pixel":
            about["details"] = {"pretraining nats per pixel": trained.value}
    return Subject(name, folder, config, processor_of(name, config), layers, about)


def print_tested(records: list[Record]) -> None:
    """The figures of the test images."""
    print("\nTest accuracy; layers and strengths were chosen on validation images:")
    for record in records:
        if record.split == "test":
            print(f"  {format_value(record, 2):>8}  {describe_model(record)}")
