"""`scripts/run_finetune.py`: fine-tune an Image GPT to classify images."""

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import EarlyStoppingCallback

from ..data import LABEL, DataArguments, TrainingImages
from ..evaluation.held_out import find_split_seed
from ..evaluation.metrics import accuracy, majority_vote
from ..evaluation.records import (
    RECORDS,
    Record,
    describe_network,
    fields_of_images,
    find_size,
    format_value,
    save_picture,
    write_records,
)
from ..presets import FINETUNING_RATE
from ..publishing.hub import push
from ..reporting import plots
from ..training import resuming, runs
from ..training.arguments import FinetuningArguments, ModelArguments
from ..training.callbacks import log_main
from ..training.trainer import ImageGPTTrainer
from .folders import check_model_exists


@resuming.releasing_folder
def finetune(model_args: ModelArguments, data_args: DataArguments, args: FinetuningArguments) -> list[Record]:
    """Fine-tune an Image GPT to classify, by L_CLF + weight · L_GEN [V2 2.3], and write it to `args.output_dir`.

    Without `model_name_or_path` it starts from random weights, the paper's baseline. The model with the best validation
    accuracy is kept, and the test split is evaluated once, at the end. The folder holds the model,
    its image processor, `confusion.png`, `training.png` and the records. Returns the records of the results. Invalid arguments are a ValueError before training starts.
    """
    if model_args.model_name_or_path and not model_args.config_overrides:  # which are for new models: refused below
        check_model_exists(model_args.model_name_or_path)
    checkpoint = runs.begin(args)
    folder, source = Path(args.output_dir), model_args.model_name_or_path
    images = TrainingImages(
        data_args,
        args.seed,
        labelled=True,
        split_seed=find_split_seed(source, data_args, args.seed) if source else args.seed,
        processor=checkpoint or model_args.image_processor_name or source,
        num_colors=model_args.num_colors,
        hub_source=model_args.hub_source(),
        progress=not args.disable_tqdm,
    )
    config = runs.classifier_config(model_args, args, images.classes)  # None: a new model
    processor = images.processor
    model = runs.build_classifier(model_args, args, processor, config, images.classes)
    if checkpoint:
        resuming.check_same_run(checkpoint, model.config, resuming.collect_identity(model_args, images, args))
    size = find_size(model.config) or args.size
    images.check_enough(args.images_per_step(size))
    masked = model.config.objective == "masked"
    validation, train, test = images.rows("validation", masked), images.training_rows(masked), images.tokens("test")
    rate = 1.0 if config is None else FINETUNING_RATE
    args.resolve(size, model.config.objective, math.sqrt(model.config.n_positions), len(train), rate)
    if checkpoint:
        resuming.check_same_arguments(checkpoint, args, images.is_stream)
        resuming.check_same_tokens(checkpoint, images)
    runs.write_run(args, model_args, images, model, len(train), checkpoint)
    if args.should_save:
        save_picture(plots.palette_picture(processor.palette), folder / "palette.png")

    patience = args.early_stopping_patience if args.load_best_model_at_end else None
    callbacks = [EarlyStoppingCallback(patience)] if patience else []
    trainer = runs.build_trainer(args, model, train, validation, processor, push, callbacks)
    runs.log_plan(trainer, images, f"{len(validation):,} for validation, {len(test):,} for the test")
    runs.train(trainer, checkpoint)

    draws = predict_test(trainer, images, args.num_masks if masked else 1)
    labels = np.asarray(test[LABEL])
    votes = majority_vote(np.stack([classes for classes, _ in draws]), args.seed)
    records = make_finetuning_records(trainer, images, config is None, draws, votes, len(validation))
    if args.should_save:
        save_picture(plots.confusion_matrix(labels, votes, images.classes), folder / "confusion.png")
        save_picture(plots.accuracy_curve(trainer.state.log_history), folder / "training.png")
        write_records(folder / RECORDS, records)
    log_summary(args, records)
    runs.finish(trainer)
    return records


def predict_test(
    trainer: ImageGPTTrainer, images: TrainingImages, n_draws: int
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Classify the test images `n_draws` times, each with other masks (once if the model is causal).

    Returns for each draw the class of each image (n,), and its nats per pixel (n,) or None.
    """
    draws: list[tuple[np.ndarray, np.ndarray | None]] = []
    for draw in range(n_draws):
        rows = images.rows("test", trainer.model.config.objective == "masked")
        rows.begin_epoch(draw)  # for other masks
        values: Any = trainer.predict(rows, metric_key_prefix="test").predictions
        draws.append(values if isinstance(values, tuple) else (values, None))
    return draws


def make_finetuning_records(
    trainer: ImageGPTTrainer,
    images: TrainingImages,
    is_new: bool,
    draws: list[tuple[np.ndarray, np.ndarray | None]],
    votes: np.ndarray,
    n_validation: int,
) -> list[Record]:
    """Make the records for test and validation images, and for the baseline that always predicts the most common class."""
    args = cast(FinetuningArguments, trainer.args)
    labels = np.asarray(images.tokens("test")[LABEL])
    predicted: Any = trainer.predict(trainer.eval_dataset, metric_key_prefix="validation")
    validation = predicted.metrics["validation_accuracy"]
    about: dict[str, Any] = fields_of_images(images.name, images.processor, len(images.classes)) | {
        "task": "fine-tuning",
        "started_from": "random weights" if is_new else "pretrained",
        "split_seed": images.split_seed,
        "details": {
            "generative loss weight": args.generative_loss_weight,
            "classifier inputs": args.classifier_inputs,
        },
    }
    masks = len(draws) if trainer.model.config.objective == "masked" else None

    def record(metric: str, value: float, split: str, n: int, masks: int | None) -> Record:
        found: dict[str, Any] = {"metric": metric, "value": value, "split": split, "n": n, "masks": masks}
        return runs.record_training(trainer, trainer.measured_step, **found, **about)

    records = [record("accuracy", accuracy(votes, labels), "test", len(labels), masks)]
    if masks is not None and masks > 1:
        records.append(record("accuracy", accuracy(draws[0][0], labels), "test", len(labels), 1))
    records.append(record("accuracy", validation, "validation", n_validation, None if masks is None else 1))
    if draws[0][1] is not None:
        nats = float(np.mean([nats for _, nats in draws if nats is not None], dtype=np.float64))
        records.append(record("nats_per_pixel", nats, "test", len(labels), masks))
    commonest = np.bincount(images.splits["train"][LABEL]).argmax()
    share, name = float(np.mean(labels == commonest)), images.classes[commonest]
    records.append(runs.record_baseline(records[0], f'always "{name}"', share))
    return records


def log_summary(args: FinetuningArguments, records: list[Record]) -> None:
    """Print the results, the files written, and the next step."""
    log_main("")
    for record in records:
        masks = f", {record.masks} mask{'s' if record.masks > 1 else ''}" if record.masks else ""
        name = record.baseline or describe_network(record)
        log_main(f"  {format_value(record, 2):>18}  {record.split}{masks}: {name}")
    log_main(f"\nWrote the classifier, confusion.png, training.png and records to {args.output_dir}")
    log_main(f'Next: pipeline("image-classification", "{args.output_dir}")("picture.png"), after import hf_igpt')
