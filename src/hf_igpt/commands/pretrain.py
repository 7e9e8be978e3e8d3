"""`scripts/run_pretrain.py`: pretrain an Image GPT, causal or masked, on images without labels, or told their classes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from PIL import Image

from ..data import MASK, TOKENS, DataArguments, ImageTokens, TrainingImages, collate_tokens, token_array
from ..evaluation.baselines import POSITION_UNIGRAM, UNIFORM, UNIGRAM, measure_counting_models
from ..evaluation.metrics import BITS_PER_NAT
from ..evaluation.records import (
    MILESTONES,
    RECORDS,
    Record,
    describe_network,
    fields_of_images,
    own_file,
    save_picture,
    write_records,
)
from ..generation_imagegpt import fill_in, sample
from ..image_processing_imagegpt import AnyImageProcessor
from ..publishing.hub import push
from ..reporting import plots
from ..training import resuming, runs
from ..training.arguments import ModelArguments, PretrainingArguments
from ..training.callbacks import Milestones, SamplePictures, log_main
from .folders import check_model_exists


BASELINE_TOKENS = 20_000_000  # the most training tokens that counting models are fitted to


@resuming.releasing_folder
def pretrain(model_args: ModelArguments, data_args: DataArguments, args: PretrainingArguments) -> list[Record]:
    """Pretrain an Image GPT, causal or masked, and write it to `args.output_dir`; return the records of its results.

    The folder holds the best model with its processor, checkpoints (the last and the best) and milestones in the same form,
    `samples/` with a picture for each evaluation, `palette.png`, `training.png`, and `records.json`, which is written last.
    An unfinished run in `output_dir` is resumed. Invalid arguments are a ValueError before training starts.
    """
    if model_args.model_name_or_path and not model_args.config_overrides:  # which are for new models: refused below
        check_model_exists(model_args.model_name_or_path)
    checkpoint = runs.begin(args)
    folder = Path(args.output_dir)
    images = TrainingImages(
        data_args,
        args.seed,
        processor=checkpoint or model_args.image_processor_name or model_args.model_name_or_path,
        num_colors=model_args.num_colors,
        hub_source=model_args.hub_source(),
        class_dropout=args.class_dropout,
        num_workers=args.dataloader_num_workers,
        progress=not args.disable_tqdm,
    )
    images.check_enough(args.images_per_step())
    processor = images.processor
    classes = images.classes if args.class_conditional else []
    model = runs.build_model(model_args, args, processor, classes)
    if checkpoint:
        resuming.check_same_run(checkpoint, model.config, resuming.collect_identity(model_args, images, args))
    masked = model.config.objective == "masked"
    held_out = images.rows("validation", masked)
    train = images.training_rows(masked)
    n_images = None if images.is_stream else len(train)
    args.resolve(args.size, model.config.objective, math.sqrt(model.config.n_positions), n_images)
    if checkpoint:
        resuming.check_same_arguments(checkpoint, args, images.is_stream)
        resuming.check_same_tokens(checkpoint, images)
    runs.write_run(args, model_args, images, model, n_images, checkpoint)
    reference = measure_counting_baselines(images, masked) if args.should_log else {}
    if args.should_save:
        save_picture(plots.palette_picture(processor.palette), folder / "palette.png")

    trainer = runs.build_trainer(args, model, train, held_out, processor, push)
    if args.num_samples and trainer.is_sharded:
        log_main("No samples are drawn during training, because the weights are sharded over processes.")
    elif args.num_samples:
        trainer.add_callback(
            SamplePictures(make_picture_drawer(args, processor, held_out), own_file(folder, "samples"))
        )
    about = {"task": "generation", "split": "held out"} | fields_of_images(images.name, processor)

    def measure(prefix: str, step: int) -> Record:
        # Not `evaluate`, which would log, plot and draw samples as for a training step.
        found = trainer.predict(held_out, metric_key_prefix=prefix)
        nats = cast(dict[str, float], found.metrics)[f"{prefix}_nats_per_pixel"]
        told: dict[str, Any] = {}
        if classes:
            by_class = average_by_class(found.predictions, found.label_ids, classes)
            told = {"details": {"nats per pixel by class": by_class}}
            if (n_told := int((found.label_ids >= 0).sum())) == len(held_out):
                told["told_classes"] = len(classes)
            else:  # some have no label
                told["details"]["images whose class was told"] = n_told
        about_model = about | told
        return runs.record_training(trainer, step, metric="nats_per_pixel", value=nats, n=len(held_out), **about_model)

    def keep_milestone() -> None:
        step = trainer.state.global_step
        place = own_file(folder, f"{MILESTONES}/step-{step:07d}")
        with torch.random.fork_rng(devices=[]):  # measuring does not change what training draws
            record = measure("milestone", step)
        trainer.save_model(str(place), _internal_call=True)
        if args.should_save:
            write_records(place / RECORDS, [record])

    if args.milestone_fractions:
        trainer.add_callback(Milestones(args.milestone_fractions, trainer.clock, keep_milestone))
    runs.log_plan(trainer, images, f"{len(held_out)} held out")
    runs.train(trainer, checkpoint)
    records = [measure("final", trainer.measured_step)]
    untold = replace(records[0], told_classes=None)  # models that only count
    records += [runs.record_baseline(untold, name, value) for name, value in reference.items()]
    if args.should_save:
        curve_baselines = {name: value for name, value in reference.items() if name != UNIFORM}
        save_picture(plots.training_curve(trainer.state.log_history, curve_baselines), folder / "training.png")
        write_records(folder / RECORDS, records)
    log_summary(args, records, model.config.objective)
    runs.finish(trainer)
    return records


def average_by_class(nats: Any, labels: Any, classes: list[str]) -> dict[str, float]:
    """Return the mean of `nats` (n,) over the images of each class, by name. labels: (n,) numbers of classes, −1 for none."""
    return {
        name: float(np.mean(nats[labels == number], dtype=np.float64))
        for number, name in enumerate(classes)
        if (labels == number).any()
    }


def measure_counting_baselines(images: TrainingImages, masked: bool) -> dict[str, float]:
    """Measure the held-out nats per pixel of counting models; {} if the training images are not tokenised.

    masked: only the models that do not see a pixel's neighbours, which are those comparable with a masked model.
    """
    if not images.has_training_tokens:
        log_main("Counting models are not fitted: the training images have no tokens that stay the same.")
        return {UNIFORM: math.log(len(images.processor.palette))}
    processor = images.processor
    counted = [subsample_rows(images.tokens(split), BASELINE_TOKENS) for split in ("train", "validation")]
    width, n_colors = processor.token_grid()[1], len(processor.palette)
    train, held_out = map(token_array, counted)
    reference = measure_counting_models(train, held_out, width, n_colors)
    if masked:  # these know nothing, or only the place, of what is known around a hidden pixel
        reference = {name: reference[name] for name in (UNIFORM, UNIGRAM, POSITION_UNIGRAM)}
    return reference


def subsample_rows(tokens: datasets.Dataset, n_tokens: int) -> datasets.Dataset:
    """Take every k-th row of a tokenised dataset, so that at most `n_tokens` tokens come from all parts of it."""
    n_pixels = tokens.features[TOKENS].length
    step = -(-len(tokens) * n_pixels // n_tokens)
    return tokens.select(range(0, len(tokens), step))


def make_picture_drawer(
    args: PretrainingArguments, processor: AnyImageProcessor, held_out: ImageTokens
) -> Callable[[Any], Image.Image]:
    """Make a function that turns a model into a picture.

    A causal model draws images, evenly of its classes if it knows any; a masked model fills in the hidden pixels of held-out
    images.
    """

    def draw(model: Any) -> Image.Image:
        if model.config.objective == "causal":
            n_classes, count = model.config.n_class_tokens, args.num_samples
            classes = [number * n_classes // count for number in range(count)] if n_classes else None
            images: Any = sample(
                model, processor, 1 if classes else count, classes=classes, seed=args.seed, progress=False
            )
            return plots.square_grid(images)
        batch = collate_tokens(held_out.__getitems__(range(min(args.num_samples, len(held_out)))))
        filled = fill_in(model, batch["labels"], batch[MASK], seed=args.seed)
        return plots.image_grid(plots.picture_of_masks(processor, batch["labels"], batch[MASK], filled))

    return draw


def log_summary(args: PretrainingArguments, records: list[Record], objective: str) -> None:
    """Print the results, the files written, and the next command to run."""
    of = " of hidden pixels" if objective == "masked" else ""
    log_main(f"\nHeld-out nats per pixel (bits per pixel){of}, lower is better:")
    for record in sorted(records, key=lambda record: record.value):
        name = record.baseline or describe_network(record)
        log_main(f"  {record.value:8.4f} ({record.value * BITS_PER_NAT:.4f})  {name}")
    log_main(f"\nWrote the model, its palette, pictures (samples/, training.png) and records to {args.output_dir}")
    if objective == "causal":
        known = [f'"{name}"' for name in records[0].details.get("nats per pixel by class", {})]
        classes = " ".join([" --classes", *known[:2]]) if known else ""
        log_main(f"Next: python scripts/run_sample.py --model_name_or_path {args.output_dir} --num_images 16{classes}")
    else:
        log_main(f"Next: python scripts/run_finetune.py --model_name_or_path {args.output_dir}")
