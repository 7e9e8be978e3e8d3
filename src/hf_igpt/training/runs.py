"""The stages of a run: begin or resume it, build its model, train, and finish. `run.json` is the first file that a run writes.

`run.json` holds `recipe` (a description of how the model is made, for its card), `identity` (arguments that must not change when
the run resumes), `train_val_split` and `split_seed`, by which images are held out, `tokens` (the hash of each split's), and `arguments` (the resolved arguments of training). A folder that is not empty and has no
`run.json` was not written by this package.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from ..configuration_imagegpt import ImageGPTConfig
from ..data import ImageTokens, TrainingImages, read_processor
from ..evaluation.records import RECORDS, RUN, UNITS, Record, fields_of_model, find_size, whole_file
from ..image_processing_imagegpt import AnyImageProcessor
from ..inputs_imagegpt import class_names
from ..modeling_imagegpt import (
    GENERATIVE_MODELS,
    ImageGPTForImageClassification,
    ImageGPTModel,
    ImageGPTPreTrainedModel,
    check_loading,
)
from .arguments import FinetuningArguments, ModelArguments, PretrainingArguments, RecipeArguments
from .callbacks import AverageWeights, Clock, ImageProgress, PushCheckpoints, log_main
from .checkpoints import SealCheckpoints, delete_cut_short, is_sealed, list_checkpoints
from .resuming import (
    arguments_of,
    collect_identity,
    find_checkpoint,
    is_finished,
    load_finished,
    load_finished_shards,
    own_folder,
)
from .trainer import ImageGPTTrainer


# -- begin and resume --------------------------------------------------------------------------------------------------


def begin(args: RecipeArguments) -> str | None:
    """Check the output folder and --report_to, and seed all random generators; return the checkpoint to continue from.

    Invalid arguments are a ValueError.
    """
    found: list[str | None] = [None, None]  # the checkpoint, or what is wrong
    if PartialState().is_main_process:  # the others would read all of it too
        try:
            found[0] = find_checkpoint(args)
        except (ValueError, OSError) as error:
            found[1] = str(error)
    checkpoint, wrong = broadcast_object_list(found)
    if wrong is not None:
        raise ValueError(wrong)
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()  # fails if its package is not installed
    except (ValueError, RuntimeError, ImportError) as error:
        names: Any = args.report_to  # a list, once the arguments are made
        raise ValueError(f"--report_to {' '.join(names)}: {error}") from error
    set_seed(args.seed)
    log_main(f"Process {args.process_index} of {args.world_size} on {args.device}, seed {args.seed}")
    return checkpoint


def write_run(
    args: RecipeArguments,
    model_args: ModelArguments,
    images: TrainingImages,
    model: ImageGPTPreTrainedModel,
    n_images: int | None,
    checkpoint: str | None,
) -> None:
    """Write `run.json` and the image processor, once all arguments have been checked. n_images: None for a stream.

    A folder that another run holds, or has begun meanwhile, is a ValueError.
    """
    if not args.should_save:
        return
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    own_folder(folder, args)
    begun = any(map(is_sealed, list_checkpoints(folder)))
    if (folder / RECORDS).exists() or (checkpoint is None and begun):
        raise ValueError(f"Another run has written to {folder} meanwhile: give another --output_dir.")
    run = {
        "identity": collect_identity(model_args, images, args),
        "train_val_split": images.identity()["train_val_split"],
        "split_seed": images.split_seed,
        "tokens": images.hash_tokens(),
        "recipe": describe_recipe(args, model_args, images, model, n_images),
        "arguments": arguments_of(args),
    }
    with whole_file(folder / RUN) as partial:
        partial.write_text(json.dumps(run, indent=1, default=str) + "\n")
    images.processor.save_pretrained(folder)


def describe_recipe(
    args: RecipeArguments,
    model_args: ModelArguments,
    images: TrainingImages,
    model: ImageGPTPreTrainedModel,
    n_images: int | None,
) -> dict[str, Any]:
    """Describe how a model is made for its card, in plain values without paths on this machine."""
    config = model.config
    head: dict[str, str] = {}
    if isinstance(args, FinetuningArguments):
        weight = args.generative_loss_weight
        head = {
            "classes": f"{config.num_labels}",
            "loss": f"classification + {weight:g} x generative" if weight else "classification",
        }
        if config.objective == "causal":
            words = {"sos": "SOS first, as in pretraining", "raw": "raw pixels"}
            head["classifier inputs"] = words[args.classifier_inputs]
    if isinstance(args, PretrainingArguments) and args.class_conditional:
        dropped = f"{100 * (args.class_dropout or 0):.3g} %"
        head["classes"] = f"{config.n_class_tokens}; for {dropped} of the images the class was left out"
    if model_args.image_processor_name:
        palette = "given"
    else:
        palette = "the checkpoint's" if model_args.model_name_or_path else "fitted to the training images"
    return (
        head
        | {"objective": config.objective, "size": find_size(config) or "custom"}
        | images.recipe(n_images)
        | {
            "palette": palette,
            "started from": "an earlier checkpoint" if model_args.model_name_or_path else "random weights",
        }
        | args.recipe(n_images)
    )


# -- models ------------------------------------------------------------------------------------------------------------


def load_config(model_args: ModelArguments, objective: str | None) -> ImageGPTConfig | None:
    """Load the configuration of the checkpoint that a run starts from; return None for a new model.

    objective: the requested one; a checkpoint trained for another is a ValueError.
    """
    name = model_args.model_name_or_path
    if not name:
        return None
    if model_args.config_overrides:
        raise ValueError("--config_overrides is for new models: leave it or --model_name_or_path out.")
    config = ImageGPTConfig.from_pretrained(name, **model_args.hub_source())
    for field in ("auto_map", "custom_pipelines"):  # a published repository names its code, which is not copied
        vars(config).pop(field, None)
    if objective not in (None, config.objective):
        raise ValueError(f"--objective {objective}: the weights of {name} are {config.objective}.")
    return config


def new_config(
    model_args: ModelArguments, args: RecipeArguments, processor: AnyImageProcessor, **overrides: Any
) -> ImageGPTConfig:
    """Make the configuration of a new model of --size for the processor's images, with `overrides` and --config_overrides."""
    overrides = {"objective": args.objective or "causal"} | overrides
    config = ImageGPTConfig.from_preset(
        args.size, image_size=processor.token_grid(), n_colors=len(processor.palette), **overrides
    )
    if model_args.config_overrides:
        known = config.to_dict()
        config.update_from_string(model_args.config_overrides)
        changed = {name: getattr(config, name) for name in known if hasattr(config, name)}
        config = ImageGPTConfig.from_dict(changed)  # which validates all fields again
    return config


def build_model(
    model_args: ModelArguments, args: PretrainingArguments, processor: AnyImageProcessor, classes: Sequence[str]
) -> ImageGPTPreTrainedModel:
    """Build a generative model for --objective, new or from a checkpoint.

    classes: those that it is told of with --class_conditional, or none. A checkpoint of other classes, and a model that does
    not fit the processor, are a ValueError.
    """
    config = load_config(model_args, args.objective)
    if config is None:
        overrides = {"n_class_tokens": len(classes), **fields_of_classes(classes)} if classes else {}
        config = new_config(model_args, args, processor, **overrides)
        model = GENERATIVE_MODELS[config.objective]._from_config(config, **model_args.attention())
    else:
        model = GENERATIVE_MODELS[config.objective].from_pretrained(
            model_args.model_name_or_path, **model_args.hub_source(), **model_args.attention()
        )
        if classes and config.objective == "masked":
            raise ValueError(f"--class_conditional is for causal models; {model_args.model_name_or_path} is masked.")
        known = class_names(model.config)
        if known and known != list(classes):
            given = f"the images have {summarize_names([*classes])}" if classes else "--class_conditional is not given"
            raise ValueError(f"{model_args.model_name_or_path} draws {summarize_names(known)}; {given}: give the same.")
        if classes and not known:
            set_classes(model, classes)
    processor.check_fits(model.config)
    check_same_grid(model_args, processor)
    return model


def check_same_grid(model_args: ModelArguments, processor: AnyImageProcessor) -> None:
    """Raise ValueError if a checkpoint's own processor, where it has one, makes images of as many pixels in another shape."""
    name = model_args.model_name_or_path
    if not (name and model_args.image_processor_name):  # else it is the checkpoint's own
        return
    try:
        own = read_processor(name, **model_args.hub_source()).token_grid()
    except ValueError:
        return
    if own != processor.token_grid():
        shapes = ["x".join(map(str, grid)) for grid in (own, processor.token_grid())]
        raise ValueError(
            f"{name} was trained on images of {shapes[0]}, --image_processor_name makes {shapes[1]} (height x width): leave it "
            "out, or name one of the same shape."
        )


def set_classes(model: ImageGPTPreTrainedModel, classes: Sequence[str]) -> None:
    """Make a trained model's classes `classes`, of which it knows nothing yet: their tokens mean what SOS means. [] for none."""
    config, backbone = model.config, cast(ImageGPTModel, model.base_model)
    rows = backbone.wte.weight.detach()[: config.vocab_size]
    table = torch.nn.Embedding.from_pretrained(
        torch.cat([rows, rows[-1:].expand(len(classes), -1)]),
        freeze=False,  # a copy
    )
    backbone.set_input_embeddings(table)
    config.n_class_tokens = len(classes)
    for name, value in fields_of_classes(classes).items() if classes else ():
        setattr(config, name, value)


def fields_of_classes(classes: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a configuration that hold the names of classes."""
    return {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}


def classifier_config(
    model_args: ModelArguments, args: FinetuningArguments, classes: list[str]
) -> ImageGPTConfig | None:
    """Load the checkpoint's configuration and add a classifier's fields; return None for a new model.

    A checkpoint whose head has other classes is a ValueError.
    """
    config = load_config(model_args, args.objective)
    if config is None:
        return None
    if is_classifier(config):
        labels = cast(dict[int, str], config.id2label)
        known = [labels[index] for index in range(len(labels))]
        generic = [f"LABEL_{index}" for index in range(len(classes))]
        if known not in (classes, generic):
            raise ValueError(
                f"{model_args.model_name_or_path} classifies {summarize_names(known)}; the images have "
                f"{summarize_names(classes)}: start from a pretrained model, whose head is new."
            )
    for name, value in _head_fields(args, config.objective, classes).items():
        setattr(config, name, value)
    return config


def build_classifier(
    model_args: ModelArguments,
    args: FinetuningArguments,
    processor: AnyImageProcessor,
    config: ImageGPTConfig | None,
    classes: list[str],
) -> ImageGPTForImageClassification:
    """Build a classifier for `classes` from a checkpoint, or a new one.

    config: the result of `classifier_config`, None for a new model. Weights that do not fit it, and a model that does not
    fit the processor, are a ValueError.
    """
    if config is None:
        head = _head_fields(args, args.objective or "causal", classes)
        config = new_config(model_args, args, processor, **head)
        model = ImageGPTForImageClassification._from_config(config, **model_args.attention())
    else:
        has_head = is_classifier(config)
        loaded: Any = ImageGPTForImageClassification.from_pretrained(
            model_args.model_name_or_path,
            config=config,
            ignore_mismatched_sizes=True,  # a converted checkpoint may hold a head for other classes
            output_loading_info=True,
            **model_args.hub_source(),
            **model_args.attention(),
        )
        model, found = loaded
        check_loading(model, str(model_args.model_name_or_path), found, "score.weight", "lm_head.weight")
        if not has_head:
            torch.nn.init.zeros_(model.score.weight)  # a new head, even if the checkpoint holds one for other classes
        if model.config.n_class_tokens:  # it is not told the class that it is to find
            set_classes(model, [])
    processor.check_fits(model.config)
    check_same_grid(model_args, processor)
    return model


def is_classifier(config: ImageGPTConfig) -> bool:
    """Whether a configuration was saved with a classifier."""
    return (config.architectures or [""])[0] == "ImageGPTForImageClassification"


def summarize_names(names: list[str]) -> str:
    """Return the number of classes and the names of the first five."""
    return f"{len(names)} classes ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"


def _head_fields(args: FinetuningArguments, objective: str, classes: list[str]) -> dict[str, Any]:
    """Return the fields that a classifier's configuration has in addition to those of a pretrained model."""
    return {
        **fields_of_classes(classes),
        "sos_inputs": objective == "causal" and args.classifier_inputs == "sos",
        "generative_loss_weight": args.generative_loss_weight,
    }


# -- train and finish --------------------------------------------------------------------------------------------------


def build_trainer(
    args: RecipeArguments,
    model: ImageGPTPreTrainedModel,
    train: ImageTokens | datasets.IterableDataset,
    held_out: ImageTokens,
    processor: AnyImageProcessor,
    publish: Callable[..., Any],
    callbacks: Sequence[TrainerCallback] = (),
) -> ImageGPTTrainer:
    """Build a run's Trainer with its clock, progress bar and pushes. publish: as in `ImageGPTTrainer`."""
    clock = None if args.max_minutes is None else Clock(args.max_minutes, args.device)
    keep_all = copy.copy(args)  # Trainer deletes old checkpoints before the new one is sealed
    keep_all.save_total_limit = None
    trainer = ImageGPTTrainer(
        model=model,
        args=keep_all,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        clock=clock,
        average=None if args.ema_decay is None else AverageWeights(args.ema_decay),
        publish=publish,
        callbacks=[*callbacks, SealCheckpoints(args.save_total_limit)],
    )
    if trainer.average and trainer.is_sharded and not trainer.accelerator.is_fsdp2:
        raise ValueError("--ema_decay is not supported with FSDP1 and ZeRO-3: use FSDP2, or leave it out.")
    if args.pushes_checkpoints and trainer.saves_shards:
        log_main("Only the finished model is pushed, because sharded checkpoints do not hold a whole model.")
    elif args.pushes_checkpoints:
        trainer.add_callback(PushCheckpoints(trainer.publish_folder))
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ImageProgress(trainer.images_seen))
    return trainer


def log_plan(trainer: ImageGPTTrainer, images: TrainingImages, held_out: str) -> None:
    """Print which model is trained on which images. held_out: the number of held-out images, in words."""
    args, config, rows = cast(RecipeArguments, trainer.args), trainer.model.config, trainer.train_dataset
    grid = "x".join(map(str, images.processor.token_grid()))
    log_main(
        f"Training {trainer.model.num_parameters():,} parameters ({config.objective}) on {images.name}: "
        f"{grid} pixels, {config.vocab_size - 1} colours, {args.images_per_step()} images per step"
        + (f", {len(rows):,} images, {held_out}" if has_length(rows) else "")
        + (f"; told {summarize_names(images.classes)}" if config.n_class_tokens else "")
    )


def train(trainer: ImageGPTTrainer, checkpoint: str | None) -> None:
    """Train, and save the model and the log. `finish` pushes them, because a push needs the records."""
    ended = checkpoint is not None and is_finished(checkpoint, trainer)
    if ended and checkpoint is not None:
        log_main(f"Training had ended with {checkpoint}: what is left is to measure.")
        (load_finished_shards if trainer.is_sharded else load_finished)(trainer, checkpoint)
    else:
        if checkpoint is not None:
            log_main(f"Resuming from {checkpoint}")
            if trainer.average:
                trainer.average.checkpoint = checkpoint
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.clock and trainer.state.global_step < trainer.state.max_steps and trainer.clock.fraction() >= 1:
        seen, planned = map(trainer.images_seen, (trainer.state.global_step, trainer.state.max_steps))
        log_main(f"Stopped by --max_minutes {trainer.clock.limit:g} after {seen:,} of {planned:,} images.")
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    if trainer.args.should_save:
        delete_cut_short(Path(str(trainer.args.output_dir)))


def finish(trainer: ImageGPTTrainer) -> None:
    """Publish the run with --push_to_hub, make all processes wait until the main one has written its files."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()


def record_training(trainer: ImageGPTTrainer, step: int, *, metric: str, value: float, **about: Any) -> Record:
    """A record of the trainer's model as it was after `step` steps; `about` are further fields of it."""
    return Record(
        **fields_of_model(trainer.model.config),
        metric=metric,
        value=float(value),
        unit=UNITS[metric],
        seed=trainer.args.seed,
        parameters=trainer.model.num_parameters(),
        images_seen=trainer.images_seen(step),
        **about,
    )


def record_baseline(record: Record, name: str, value: float) -> Record:
    """What a baseline reaches on the same images as `record`."""
    network: dict[str, Any] = dict.fromkeys(
        ("objective", "size", "n_layer", "n_embd", "parameters", "images_seen", "started_from")
    )
    return replace(record, value=value, baseline=name, **network, masks=None, details={})
