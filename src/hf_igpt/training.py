"""Training: arguments as dataclasses, and `pretrain()` and `finetune()`, which assemble transformers' `Trainer`.

What is ours here: recipes from `presets`, metrics (nats per pixel and classes of each image), progress in images, an end by
the clock, milestones, a picture at each evaluation.
"""

import argparse
import json
import math
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
import yaml
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.image_utils import SizeDict
from transformers.integrations import get_reporting_integration_callbacks, is_deepspeed_zero3_enabled
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SchedulerType, has_length
from transformers.utils.hub import PushInProgress

from . import clusters, data, evaluation, generation_imagegpt, hub, plots
from .configuration_imagegpt import ImageGPTConfig
from .modeling_imagegpt import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTForMaskedImageModeling,
)
from .presets import (
    ADAM_BETAS,
    DIGITS_IMAGE_SIZE,
    DIGITS_N_COLORS,
    EVALUATION_MASKS,
    FINETUNING_EPOCHS,
    FINETUNING_PATIENCE,
    FINETUNING_RATE,
    FINETUNING_SCHEDULE,
    GENERATIVE_LOSS_WEIGHT,
    IMAGE_SIZE,
    N_COLORS,
    SIZES,
    WARMUP_EPOCHS,
    WARMUP_FRACTION,
    WEIGHT_DECAY,
)


# What a run writes before its first checkpoint, the picture first; and what its end writes before the records.
_BEGUN = {evaluation.RUN, "palette.png", "preprocessor_config.json", "samples", "milestones", "runs"}
_ENDED = {"config.json", "generation_config.json", "model.safetensors", "training_args.bin", "training.png"}
_ENDED |= {"trainer_state.json", "confusion.png"}
_MODELS = {"causal": ImageGPTForCausalImageModeling, "masked": ImageGPTForMaskedImageModeling}
_PALETTE_PIXELS = 1_000_000  # sampled from all images, for a palette
_WARMUP_SHARE = 0.1  # of training, at most, unless an argument says otherwise
_CHANGES_NOTHING = (
    "preprocessing_num_workers",
    "data_cache_dir",
    "cache_dir",
    "attn_implementation",
    "config_overrides",
)
_BASELINE_TOKENS = 20_000_000  # training tokens that are counted, at most


@dataclass
class ModelArguments:
    """Which model, and with which palette."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to go on from. Default: a new model of --size."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": 'Fields of the new model\'s configuration: "n_layer=6,n_embd=128".'}
    )
    image_processor_name: str | None = field(
        default=None,
        metadata={
            "help": "Image processor (folder or Hub name) or palette (.npy, .json). Default: fitted on the images."
        },
    )
    num_colors: int | None = field(
        default=None, metadata={"help": "Colours K of a palette fitted here. Default: 512; 16 for the digits."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention: eager, sdpa, flash_attention_2, flex_attention. Default: sdpa."}
    )
    model_revision: str = field(default="main", metadata={"help": "Revision of the checkpoint: branch, tag or commit."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded checkpoints are kept."})


@dataclass
class PretrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the paper's recipe as defaults; None means the preset of --size."""

    output_dir: str | None = field(default="outputs/pretrain", metadata={"help": "Where everything is written."})
    size: str = field(
        default="tiny",
        metadata={"help": "Shape and recipe; any flag overrides a part of it.", "choices": list(SIZES)},
    )
    objective: str | None = field(
        default=None,
        metadata={
            "help": "causal: each pixel from those before it. masked: hidden pixels from all others, as BERT. Default: the "
            "checkpoint's, or causal.",
            "choices": list(_MODELS),
        },
    )
    max_minutes: float | None = field(
        default=None,
        metadata={"help": "End after this many minutes; a cosine decays by the clock if that is ahead of the steps."},
    )
    milestones: str | None = field(
        default=None,
        metadata={
            "help": 'Fractions of training at which the model is kept in milestones/: "0.065,0.131,0.262,0.524,1" (paper, '
            "Figure 3)."
        },
    )
    warmup_steps: float | None = field(
        default=None, metadata={"help": "Steps of linear warm-up, or a fraction of all. Default: --warmup_epochs."}
    )
    warmup_epochs: float | None = field(
        default=None,
        metadata={"help": "Epochs of linear warm-up. Default: 1 (paper A.1), but no more than a tenth of training."},
    )
    num_samples: int = field(default=16, metadata={"help": "Images drawn at each evaluation; 0 draws none."})
    learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate. Default: the preset's."})
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Images per process and forward. Default: the preset's batch over processes and accumulation."
        },
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per process in evaluation."})
    num_train_epochs: float | None = field(default=None, metadata={"help": "Epochs. Default: the preset's."})
    max_steps: int | None = field(default=None, metadata={"help": "Optimiser steps. Default: the preset's."})
    adam_beta1: float = field(default=ADAM_BETAS[0], metadata={"help": "Adam's first beta (paper A.1)."})
    adam_beta2: float = field(default=ADAM_BETAS[1], metadata={"help": "Adam's second beta (paper A.1)."})
    weight_decay: float = field(default=WEIGHT_DECAY, metadata={"help": "Weight decay (paper A.1: none)."})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Schedule after warm-up (paper A.1: cosine to 0)."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps, epoch."})
    eval_steps: float | None = field(
        default=None,
        metadata={"help": "Steps between evaluations, or a fraction of all. Default: --save_steps, or 0.1."},
    )
    save_steps: float | None = field(
        default=None,
        metadata={"help": "Steps between checkpoints, or a fraction of all. Default: --eval_steps, or 0.1."},
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept: the best and the last by default."}
    )
    logging_steps: float = field(default=0.02, metadata={"help": "Steps between log lines, or a fraction of all."})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Write the best model, not the last, to output_dir."}
    )
    metric_for_best_model: str | None = field(default="nats_per_pixel", metadata={"help": "Metric of the best model."})
    greater_is_better: bool | None = field(default=False, metadata={"help": "Whether a greater metric is better."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Left to the collator."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "All parameters are always used."})
    use_cache: bool = field(
        default=True, metadata={"help": "What checkpoints' configurations say; training itself never caches."}
    )

    def __post_init__(self):
        if self.size not in SIZES:
            raise ValueError(f"No preset {self.size!r}: the sizes are {', '.join(SIZES)}.")
        recipe = SIZES[self.size]
        self._batch_from_preset = self.per_device_train_batch_size is None
        if self.num_train_epochs is None and self.max_steps is None:
            self.num_train_epochs, self.max_steps = recipe.num_epochs, recipe.max_steps
        # Trainer's own way of saying "unset".
        self.num_train_epochs = 1.0 if self.num_train_epochs is None else self.num_train_epochs
        self.max_steps = -1 if self.max_steps is None else self.max_steps
        self.label_names = ["labels"]
        if self._batch_from_preset:
            self.per_device_train_batch_size = recipe.batch_size
        if self.eval_strategy == "no" or self.save_strategy == "no":
            self.load_best_model_at_end = False
        # Checkpoints are chosen by their evaluation, so both come together unless told otherwise.
        self.eval_steps, self.save_steps = (
            next(steps for steps in (one, other, 0.1) if steps is not None)
            for one, other in ((self.eval_steps, self.save_steps), (self.save_steps, self.eval_steps))
        )
        self.use_cpu |= not torch.accelerator.is_available()
        self._warmup_unset = self.warmup_steps is None
        self.warmup_steps = 0 if self._warmup_unset else self.warmup_steps
        super().__post_init__()
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"--hub_strategy {self.hub_strategy.value} would publish training_args.bin, with paths and tokens: use end or "
                "every_save."
            )
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        if self.label_smoothing_factor:
            raise ValueError("--label_smoothing_factor is not supported: the loss is the model's exact likelihood.")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"--max_minutes is positive; found {self.max_minutes}.")
        if self.max_minutes is not None and self.lr_scheduler_type not in ("cosine", "constant"):
            raise ValueError("--max_minutes decays the learning rate by a cosine: leave --lr_scheduler_type out.")
        self.milestone_fractions = _fractions(self.milestones)
        if self.prediction_loss_only:
            raise ValueError("--prediction_loss_only is not supported: nats per pixel are taken from the predictions.")
        if self.dataloader_persistent_workers:
            raise ValueError("--dataloader_persistent_workers is not supported: such workers repeat an epoch's crops.")
        if self._batch_from_preset:
            self.share_batch(recipe.batch_size)

    def share_batch(self, batch_size: int):
        """Give each process and accumulation step its part of `batch_size` images."""
        parts = self.world_size * self.gradient_accumulation_steps * max(1, self.n_gpu)
        if batch_size % parts:
            raise ValueError(
                f"The preset's batch of {batch_size} images cannot be shared by {parts} (processes x "
                "accumulation steps): give --per_device_train_batch_size."
            )
        self.per_device_train_batch_size = batch_size // parts


def _fractions(text: str | None) -> list[float]:
    try:
        fractions = sorted({float(part) for part in text.split(",")}) if text else []
    except ValueError as error:
        raise ValueError(f"--milestones are fractions of training between commas; found {text!r}.") from error
    if any(not 0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"--milestones are fractions of training, over 0 and up to 1; found {text!r}.")
    return fractions


@dataclass
class FinetuningArguments(PretrainingArguments):
    """`PretrainingArguments` with the paper's fine-tuning as defaults [V2 3.4]."""

    output_dir: str | None = field(default="outputs/finetune", metadata={"help": "Where everything is written."})
    generative_loss_weight: float = field(
        default=GENERATIVE_LOSS_WEIGHT,
        metadata={"help": "Weight of the generative loss beside the classification loss; 0: classification alone."},
    )
    classifier_inputs: str = field(
        default="sos",
        metadata={
            "help": "What a causal model reads: sos, the shifted pixels of pretraining, as OpenAI; raw, the pixels, as plain "
            "transformers, which can then load the result.",
            "choices": ["sos", "raw"],
        },
    )
    num_masks: int = field(
        default=EVALUATION_MASKS,
        metadata={"help": "Masks of each test image of a masked model; the majority decides (paper 4.6)."},
    )
    early_stopping_patience: int | None = field(
        default=FINETUNING_PATIENCE,
        metadata={"help": "Stop after this many evaluations without a better validation accuracy; 0: never."},
    )
    lr_scheduler_type: str = field(
        default=FINETUNING_SCHEDULE, metadata={"help": "Schedule of the learning rate (paper 3.4: constant)."}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Default: a tenth of pretraining's (paper 3.4), or all of it from random weights."},
    )
    num_train_epochs: float | None = field(default=None, metadata={"help": f"Epochs. Default: {FINETUNING_EPOCHS}."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps, epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch."})
    num_samples: int = field(default=0, metadata={"help": "Not used."})
    metric_for_best_model: str | None = field(default="accuracy", metadata={"help": "Metric of the best model."})
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Whether a greater metric is better. Default: of accuracy alone."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "So that a resumed run stops early where an uninterrupted one would."}
    )

    def __post_init__(self):
        if self.num_train_epochs is None and self.max_steps is None:
            self.num_train_epochs = FINETUNING_EPOCHS
        if self.warmup_steps is None and self.warmup_epochs is None:
            self.warmup_steps = 0
        if not self.generative_loss_weight >= 0:
            raise ValueError(f"--generative_loss_weight is at least 0; found {self.generative_loss_weight}.")
        if self.num_masks < 1:
            raise ValueError(f"--num_masks is at least 1; found {self.num_masks}.")
        if self.milestones:
            raise ValueError("--milestones are of pretraining: leave them out.")
        metrics = ["accuracy", "loss", *(["nats_per_pixel"] if self.generative_loss_weight else [])]
        if self.metric_for_best_model not in metrics:
            raise ValueError(f"--metric_for_best_model is one of {metrics} here; found {self.metric_for_best_model}.")
        if self.greater_is_better is None:
            self.greater_is_better = self.metric_for_best_model == "accuracy"
        super().__post_init__()


class _Clock(TrainerCallback):
    """Ends training when the time is up, at the same step in all processes. A resumed run has the time that was left."""

    def __init__(self, minutes: float, device):
        self.limit, self.device, self.start, self.elapsed = minutes, device, None, 0.0  # minutes

    def fraction(self) -> float:
        return self.elapsed / self.limit

    def on_train_begin(self, args, state, control, **kwargs):
        self.elapsed = next((entry["minutes"] for entry in reversed(state.log_history) if "minutes" in entry), 0.0)
        self.start = time.monotonic() - self.elapsed * 60

    def on_step_end(self, args, state, control, **kwargs):
        self.elapsed = (time.monotonic() - self.start) / 60
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            elapsed = torch.tensor(self.elapsed, device=self.device)
            torch.distributed.broadcast(elapsed, src=0)
            self.elapsed = elapsed.item()
        if self.elapsed >= self.limit:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = args.save_strategy != "no"
            control.should_log = control.should_training_stop = True


class _ImageProgress(ProgressCallback):
    """transformers' progress bar, counting images, with one line of log instead of a dictionary."""

    def __init__(self, images_seen):
        super().__init__()
        self.images_seen = images_seen  # steps -> images

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.prediction_bar is None:
                n_batches = len(eval_dataloader)
                self.prediction_bar = tqdm(total=n_batches, desc="Evaluating", unit="batch", leave=False, disable=None)
            self.prediction_bar.update(1)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=self.images_seen(state.max_steps),
                desc="Training",
                unit="image",
                unit_scale=True,
                dynamic_ncols=True,
                disable=None,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar.update(self.images_seen(state.global_step) - self.training_bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or "images" not in logs:
            return
        line = _line_of(logs)
        if line:
            rate = f"   learning rate {logs['learning_rate']:.2e}" if "learning_rate" in logs else ""
            self.training_bar.write(f"{logs['images']:>11,} images   {line}{rate}")


def _line_of(logs: dict) -> str | None:
    """What log entries say in words; those of the end of training say nothing."""
    bits = evaluation.BITS_PER_NAT
    if "eval_accuracy" in logs:
        return f"validation {100 * logs['eval_accuracy']:.1f} % right"
    if "eval_nats_per_pixel" in logs:
        nats = logs["eval_nats_per_pixel"]
        return f"held out {nats:.4f} nats/pixel ({nats * bits:.4f} bits)"
    if "classification_loss" in logs:
        parts = f"{logs['classification_loss']:.4f} nats/image, {logs['generative_loss']:.4f} nats/pixel"
        return f"training {logs['loss']:.4f} ({parts})"
    if "bits_per_pixel" in logs:
        return f"training {logs['loss']:.4f} nats/pixel ({logs['bits_per_pixel']:.4f} bits)"
    return f"training {logs['loss']:.4f} nats/image" if "loss" in logs else None


class _Samples(TrainerCallback):
    """A picture at each evaluation: samples, or held-out images whose hidden pixels a masked model fills in."""

    def __init__(self, processor, held_out, folder: Path):
        self.processor, self.held_out, self.folder = processor, held_out, folder

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if not (args.num_samples and state.is_world_process_zero):
            return
        if model.config.objective == "masked":
            batch = data.collate_tokens(self.held_out.__getitems__(range(min(args.num_samples, len(self.held_out)))))
            filled = generation_imagegpt.fill_in(model, batch["labels"], batch[data.MASK], seed=args.seed)
            picture = plots.image_grid(
                plots.picture_of_masks(self.processor, batch["labels"], batch[data.MASK], filled)
            )
        else:
            images = generation_imagegpt.sample(model, self.processor, args.num_samples, seed=args.seed, progress=False)
            picture = plots.square_grid(images)
        self.folder.mkdir(parents=True, exist_ok=True)
        picture.save(self.folder / f"step-{state.global_step:07d}.png")


class _Milestones(TrainerCallback):
    """Keeps the model at fractions of training, by steps or by the clock, each with its held-out loss as a record."""

    def __init__(self, fractions: list[float], clock: _Clock | None, keep):
        self.fractions, self.clock, self.keep = fractions, clock, keep

    def _progress(self, state) -> float:
        return max(state.global_step / state.max_steps, self.clock.fraction() if self.clock else 0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.pending = [fraction for fraction in self.fractions if fraction > self._progress(state)]

    def on_step_end(self, args, state, control, **kwargs):
        reached = [fraction for fraction in self.pending if fraction <= self._progress(state)]
        if reached:
            self.pending = self.pending[len(reached) :]
            self.keep()


class ImageGPTTrainer(Trainer):
    """`Trainer` that evaluates image by image, logs both parts of a joint loss and images seen, and may follow a clock."""

    clock: _Clock | None = None

    def __init__(self, model, **kwargs):
        super().__init__(model, **kwargs)
        self.classifies = isinstance(model, ImageGPTForImageClassification)
        self._parts, self._parts_since = {}, 0  # sums over steps of the parts of the loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.classifies and outputs.classification_loss is not None:
            if not self._parts:
                self._parts_since = self.state.global_step
            averaged = self.args.average_tokens_across_devices and num_items_in_batch is not None
            scale = self.accelerator.num_processes if averaged else 1  # as Trainer does with the loss
            for name in ("classification_loss", "generative_loss"):
                self._parts[name] = self._parts.get(name, 0) + outputs[name].detach().mean() * scale
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self):
        """As `Trainer`'s; a stream is each process's own share already, which Accelerate would share out once more."""
        if has_length(self.train_dataset):
            return super().get_train_dataloader()
        loader = torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        alone = {"num_processes": 1, "process_index": 0, "dispatch_batches": False}
        return prepare_data_loader(loader, self.accelerator.device, put_on_device=True, **alone)

    def save_model(self, output_dir=None, _internal_call=False):
        """As `Trainer`'s. Of sharded weights, which it would leave out: in checkpoints, whose shards are written beside the
        optimiser's, all but the weights; elsewhere the whole model, as `from_pretrained` reads it."""
        if not self.saves_shards:
            return super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        is_checkpoint = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name) is not None
        if not (is_checkpoint and folder.parent == Path(self.args.output_dir)):
            self._save(str(folder), state_dict=self.accelerator.get_state_dict(self.model))
        elif self.args.should_save:
            self.model.config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds all weights, so that only all processes together can run the model."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    @property
    def saves_shards(self) -> bool:
        """Whether a checkpoint's weights are one file of each process (FSDP's SHARDED_STATE_DICT)."""
        return self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(loss, values of each image (B,), labels (B,)): nats per pixel, or for classifiers the class they say.

        A joint classifier's values are (class, nats per pixel). Whole logits of all images would not fit in memory.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        labels = inputs["labels"]
        if not self.classifies:
            nats = evaluation.nats_per_image(outputs.logits, labels, inputs.get(data.MASK))
            return outputs.loss, nats, labels[:, 0]
        classes = outputs.logits.argmax(dim=-1)
        if outputs.generative_nats is None:
            return outputs.loss, classes, labels
        return outputs.loss, (classes, outputs.generative_nats), labels

    def log(self, logs, start_time=None):
        logs["images"] = self.images_seen(self.state.global_step)
        if self.clock is not None:
            logs["minutes"] = self.clock.elapsed
        if "loss" in logs and self._parts:
            for name, total in self._parts.items():
                logs[name] = self.accelerator.gather(total).mean().item() / (self.state.global_step - self._parts_since)
            self._parts = {}
        names = {"eval_nats_per_pixel": "eval_bits_per_pixel"} | ({} if self.classifies else {"loss": "bits_per_pixel"})
        for name, bits in names.items():
            if name in logs:
                logs[bits] = logs[name] * evaluation.BITS_PER_NAT
        super().log(logs, start_time)

    def images_seen(self, step: int) -> int:
        """Images that the first `step` steps were made of; an epoch's last step may hold fewer than the others."""
        per_step = _images_per_step(self.args)
        if not has_length(self.train_dataset):
            return step * per_step
        epochs, steps = divmod(step, math.ceil(len(self.train_dataset) / per_step))
        return epochs * len(self.train_dataset) + steps * per_step

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Push what `scripts/run_publish.py` would push of `output_dir`, not `output_dir` itself. `kwargs` are not used."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            self._finish_current_push()
            return self._publish(self.args.output_dir, commit_message, token, revision, in_background=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        if self.push_in_progress is None or self.push_in_progress.is_done() or self.args.hub_always_push:
            self._finish_current_push()
            message = f"Training in progress, step {self.state.global_step}"
            shutil.copy(Path(self.args.output_dir) / evaluation.RUN, checkpoint_folder)
            try:
                self.push_in_progress = PushInProgress([self._publish(checkpoint_folder, message, in_background=True)])
            except (OSError, ValueError) as error:  # the next may succeed; the last push is not so lenient
                _say(self.args, f"Not pushed: {error}")

    def _publish(self, folder, message, token=None, revision=None, in_background=False):
        return hub.push(
            folder,
            self.hub_model_id,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            message=message,
            in_background=in_background,
        )

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.clock is None or self.args.lr_scheduler_type != "cosine":
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step):
            clock = self.clock.fraction()
            warmed = max((step + 1) / (warmup + 1), clock / _WARMUP_SHARE)
            return min(1, warmed) * 0.5 * (1 + math.cos(math.pi * min(1, max(step / num_training_steps, clock))))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler


def _images_per_step(args: TrainingArguments) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _steps_per_epoch(args: TrainingArguments, train) -> int:
    return math.ceil(len(train) / _images_per_step(args))


def load_processor(name: str, model_args: ModelArguments, data_args: data.DataArguments):
    """The image processor called `name`: a processor's folder or Hub name, or a bare palette (.npy, .json).

    A processor keeps its own size and crop unless --image_size or --center_crop say otherwise.
    """
    if Path(name).suffix in (".npy", ".json"):
        return make_processor(clusters.load_palette(name), _image_size(data_args), data_args.center_crop is not False)
    processor = data.read_processor(name, **_source(model_args))
    if data_args.image_size:
        processor.size = SizeDict(height=data_args.image_size, width=data_args.image_size)
    if data_args.center_crop is not None:
        processor.do_center_crop = data_args.center_crop
    return processor


def _image_size(data_args: data.DataArguments) -> int:
    return data_args.image_size or (DIGITS_IMAGE_SIZE if data_args.is_embedded else IMAGE_SIZE)


def _sample_pixels(images, data_args: data.DataArguments, n_pixels: int, seed: int) -> np.ndarray:
    center_crop = data_args.center_crop is not False
    return data.sample_pixels(images, n_pixels, _image_size(data_args), center_crop, seed, data_args.on_bad_image)


def _fit_palette(images, data_args: data.DataArguments, n_colors: int | None, n_pixels: int, seed: int, progress: bool):
    """A palette of `n_colors` (None: the default of the images) fitted on training images, and the pixels sampled."""
    n_colors = n_colors or (DIGITS_N_COLORS if data_args.is_embedded else N_COLORS)
    pixels = _sample_pixels(images, data_args, n_pixels, seed)
    data.tqdm.write(f"Fitting {n_colors} colours to {len(pixels):,} pixels")
    return clusters.fit_palette(pixels, n_colors, seed, progress=progress), pixels


def _say_distortion(palette: np.ndarray, lost: dict[str, float], of: str):
    rmse, psnr = lost["rmse_grey_levels"], lost["psnr_db"]
    data.tqdm.write(f"Palette: {len(palette)} colours; on {of}: {rmse:.3f} grey levels RMSE, {psnr:.2f} dB PSNR")


def make_processor(palette: np.ndarray, image_size: int, center_crop: bool = True):
    """A processor of the backend that is installed, for a palette and square images."""
    size = {"height": image_size, "width": image_size}
    return data.InstalledProcessor(clusters=palette, size=size, do_center_crop=center_crop)


def check_output_dir(args: PretrainingArguments) -> str | None:
    """The checkpoint to resume from, if any. A folder that holds anything but an unfinished run of ours: ValueError."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file.")
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if evaluation.RECORDS in names:
        raise ValueError(f"{folder} holds a finished run: give another --output_dir, or delete it.")
    complete = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    last = str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None
    ours = (_BEGUN if "palette.png" in names else set()) | (_ENDED if last else set())
    strange = sorted(name for name in names - ours if not name.startswith("checkpoint-"))
    if strange:
        raise ValueError(
            f"{folder} holds something else ({', '.join(strange[:5])}): give an empty or a new --output_dir."
        )
    if args.resume_from_checkpoint in (None, False, True, "False", "false", "True", "true"):
        if str(args.resume_from_checkpoint).lower() == "true" and last is None:
            raise ValueError(f"--resume_from_checkpoint: there is no checkpoint in {folder}.")
        return last
    if not Path(args.resume_from_checkpoint).is_dir():
        raise ValueError(f"There is no checkpoint at {args.resume_from_checkpoint}.")
    return args.resume_from_checkpoint


def pretrain(
    model_args: ModelArguments, data_args: data.DataArguments, args: PretrainingArguments
) -> list[evaluation.Record]:
    """Pretrain an Image GPT, causal or masked, and write it to `args.output_dir`; returns what was measured.

    Written: the best model with its processor; checkpoints (the last, the best) and milestones likewise; `samples/` with a
    picture for each evaluation; `palette.png`, `training.png`; and last `records.json`. An unfinished run in
    `output_dir` is resumed. Everything that can be wrong with the arguments is a ValueError before training starts.
    """
    checkpoint = _begin(args)
    folder = Path(args.output_dir)
    with args.main_process_first(desc="images"):
        share = (args.process_index, args.world_size, args.dataloader_num_workers)
        splits = data.load_images(data_args, args.seed, *share)
    _check_enough(args, data_args, splits["train"])
    processor = _processor(model_args, data_args, args, checkpoint, splits["train"])
    model = _model(model_args, args, processor)
    objective = model.config.objective
    identity = _identity(model_args, data_args)
    if checkpoint:
        _check_same_run(checkpoint, model.config, args, identity)
    if args.learning_rate is None:
        args.learning_rate = SIZES[args.size].learning_rate_for(objective, processor.token_grid()[0])
    train, held_out, reference = _tokens(splits, processor, data_args, args, objective == "masked")
    _set_steps(args, data_args.streaming, train)
    _write_beginning(
        args, processor, identity, data_args.train_val_split, _recipe(model_args, data_args, args, model, train)
    )

    clock = None if args.max_minutes is None else _Clock(args.max_minutes, args.device)
    samples = _Samples(processor, held_out, folder / "samples")
    trainer = _trainer(args, model, train, held_out, processor, clock, [samples])

    def measured(prefix):
        # Not `evaluate`, whose result would be logged, drawn and sampled as a step's.
        nats = trainer.predict(held_out, metric_key_prefix=prefix).metrics[f"{prefix}_nats_per_pixel"]
        step = None if prefix == "final" else trainer.state.global_step
        return _record(
            trainer,
            "nats_per_pixel",
            nats,
            evaluation.data_of(data_args.name(), processor),
            "held out",
            held_out,
            step,
        )

    def keep_milestone():
        place = folder / "milestones" / f"step-{trainer.state.global_step:07d}"
        with torch.random.fork_rng(devices=[]):  # training goes on as if nothing had been measured
            record = measured("milestone")
        trainer.save_model(str(place), _internal_call=True)
        if args.should_save:
            evaluation.write_records(place / evaluation.RECORDS, [record])

    if args.milestone_fractions:
        trainer.add_callback(_Milestones(args.milestone_fractions, clock, keep_milestone))
    _say_what(args, trainer, data_args, processor, len(held_out), "held out")
    _train(trainer, checkpoint)
    records = [measured("final")]
    records += [
        replace(records[0], value=value, model=f"{name} counts", baseline=True, settings={})
        for name, value in reference.items()
    ]
    if args.should_save:
        curve_baselines = {name: value for name, value in reference.items() if name != "uniform"}
        plots.training_curve(trainer.state.log_history, curve_baselines).save(folder / "training.png")
        evaluation.write_records(folder / evaluation.RECORDS, records)
    _summary(args, records, objective)
    _finish(trainer)
    return records


def finetune(
    model_args: ModelArguments, data_args: data.DataArguments, args: FinetuningArguments
) -> list[evaluation.Record]:
    """Fine-tune an Image GPT to classify, by L_CLF + weight · L_GEN [V2 2.3], and write it to `args.output_dir`.

    Without `model_name_or_path` it starts from random weights, the paper's baseline. The model of the best validation
    accuracy is kept; the test split is read once, at the end. Written beside what `pretrain` writes: `confusion.png`.
    Returns what was measured.
    """
    checkpoint = _begin(args)
    folder = Path(args.output_dir)
    with args.main_process_first(desc="images"):
        started_from = model_args.model_name_or_path
        seed = evaluation.split_seed(started_from, data_args, args.seed) if started_from else args.seed
        splits = data.load_labelled_images(data_args, seed=seed)
    names = splits["train"].features[data.LABEL].names
    config = _finetuned_config(model_args, args, names)  # None: a new model
    processor = _processor(model_args, data_args, args, checkpoint, splits["train"])
    model = _classifier(model_args, args, processor, config, names)
    identity = _identity(model_args, data_args)
    if checkpoint:
        _check_same_run(checkpoint, model.config, args, identity)
    _set_finetuning_recipe(args, model.config, processor.token_grid()[0], pretrained=config is not None)
    _check_enough(args, data_args, splits["train"])
    masked = model.config.objective == "masked"
    train, validation, _ = _tokens(splits, processor, data_args, args, masked, counting=False)
    test = _held_out_tokens(splits["test"], processor, data_args, "Tokenising test images")
    _set_steps(args, False, train)
    _write_beginning(
        args, processor, identity, data_args.train_val_split, _recipe(model_args, data_args, args, model, train)
    )

    clock = None if args.max_minutes is None else _Clock(args.max_minutes, args.device)
    stopping = args.load_best_model_at_end and args.early_stopping_patience
    callbacks = [EarlyStoppingCallback(args.early_stopping_patience)] if stopping else []
    trainer = _trainer(args, model, train, validation, processor, clock, callbacks)
    _say_what(args, trainer, data_args, processor, f"{len(validation):,} for validation, {len(test):,}", "for the test")
    _train(trainer, checkpoint)

    draws = []  # of masks: (class of each image, nats per pixel or None)
    for draw in range(args.num_masks if masked else 1):
        rows = data.ImageTokens(test, processor, masked=masked, seed=args.seed)
        rows.set_epoch(draw)  # other masks
        values = trainer.predict(rows, metric_key_prefix="test").predictions
        draws.append(values if isinstance(values, tuple) else (values, None))
    labels = np.asarray(test[data.LABEL])
    votes = evaluation.majority_vote(np.stack([classes for classes, _ in draws]), args.seed)
    best_validation = trainer.predict(validation, metric_key_prefix="validation").metrics["validation_accuracy"]
    data_name = evaluation.data_of(data_args.name(), processor, f"{len(names)} classes")

    def record(metric, value, split, rows, **settings):
        return _record(
            trainer,
            metric,
            value,
            data_name,
            split,
            rows,
            settings=_finetuning_settings(args, config, seed, **settings),
        )

    masks = len(draws) if masked else 0
    records = [record("accuracy", evaluation.accuracy(votes, labels), "test", test, masks=masks)]
    if masks > 1:
        records.append(record("accuracy", evaluation.accuracy(draws[0][0], labels), "test", test, masks=1))
    records.append(record("accuracy", best_validation, "validation", validation, masks=min(masks, 1)))
    if draws[0][1] is not None:
        nats = float(np.mean([nats for _, nats in draws], dtype=np.float64))
        records.append(record("nats_per_pixel", nats, "test", test, masks=masks))
    commonest = np.bincount(splits["train"][data.LABEL]).argmax()
    share = float(np.mean(labels == commonest))
    records.append(replace(records[0], value=share, model=f'always "{names[commonest]}"', baseline=True, settings={}))
    if args.should_save:
        plots.confusion_matrix(labels, votes, names).save(folder / "confusion.png")
        plots.accuracy_curve(trainer.state.log_history).save(folder / "training.png")
        evaluation.write_records(folder / evaluation.RECORDS, records)
    _say(args, "")
    for found in records:
        value = f"{100 * found.value:.2f} %" if found.unit == "fraction" else f"{found.value:.4f} {found.unit}"
        masked_by = f", {found.settings['masks']} masks" if found.settings.get("masks") else ""
        _say(args, f"  {value:>18}  {found.split}{masked_by}: {found.model.split(',')[0]}")
    _say(args, f"\nWrote the classifier, confusion.png, training.png and records to {args.output_dir}")
    _say(args, f'Next: pipeline("image-classification", "{args.output_dir}")("picture.png"), after import hf_igpt')
    _finish(trainer)
    return records


def _begin(args: PretrainingArguments) -> str | None:
    """Check the output folder and --report_to, seed, and say so; returns the checkpoint to go on from."""
    checkpoint = check_output_dir(args)
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()  # fails where its package is not installed
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"--report_to {' '.join(args.report_to)}: {error}") from error
    set_seed(args.seed)
    _say(args, f"Process {args.process_index} of {args.world_size} on {args.device}, seed {args.seed}")
    if checkpoint:
        _say(args, f"Resuming from {checkpoint}")
    return checkpoint


def _check_enough(args, data_args, images):
    if not data_args.streaming and len(images) < _images_per_step(args):
        raise ValueError(
            f"{len(images)} training images are fewer than one step's {_images_per_step(args)}: lower "
            "--per_device_train_batch_size or give more images."
        )


def _write_beginning(args, processor, identity: str, train_val_split: float | None, recipe: dict):
    """What a run leaves before its first step; from here on everything has been checked."""
    if args.should_save:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        plots.palette_picture(processor.clusters).save(folder / "palette.png")
        processor.save_pretrained(folder)
        run = {"identity": identity, "train_val_split": train_val_split, "recipe": recipe}
        (folder / evaluation.RUN).write_text(json.dumps(run, indent=1) + "\n")


def _trainer(args, model, train, held_out, processor, clock, callbacks) -> ImageGPTTrainer:
    classifies = isinstance(model, ImageGPTForImageClassification)
    trainer = ImageGPTTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=data.collate_classified if classifies else data.collate_tokens,
        processing_class=processor,
        compute_metrics=_classification_metrics if classifies else _held_out_metrics,
        callbacks=callbacks + ([clock] if clock else []),
    )
    trainer.clock = clock
    if trainer.is_sharded and args.num_samples:
        args.num_samples = 0
        _say(
            args, "No samples are drawn during training: the weights are shared out among processes (--num_samples 0)."
        )
    if trainer.saves_shards and args.push_to_hub and args.hub_strategy != HubStrategy.END:
        args.hub_strategy = HubStrategy.END
        _say(args, "Only the finished model is pushed: sharded checkpoints hold no whole one (--hub_strategy end).")
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_ImageProgress(trainer.images_seen))
    return trainer


def _say_what(args, trainer, data_args, processor, n_held_out, held_out: str):
    grid = "x".join(map(str, processor.token_grid()))
    _say(
        args,
        f"Training {trainer.model.num_parameters():,} parameters ({trainer.model.config.objective}) on {data_args.name()}: "
        f"{grid} pixels, {len(processor.clusters)} colours, {_images_per_step(args)} images a step"
        + ("" if data_args.streaming else f", {len(trainer.train_dataset):,} images, {n_held_out} {held_out}"),
    )


def _train(trainer: ImageGPTTrainer, checkpoint: str | None):
    """Train, and save the model and the log; the pushing of it is left to `_finish`, for it needs the records."""
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.clock and trainer.state.global_step < trainer.state.max_steps and trainer.clock.fraction() >= 1:
        seen, planned = map(trainer.images_seen, (trainer.state.global_step, trainer.state.max_steps))
        limit = f"--max_minutes {trainer.args.max_minutes:g}"
        _say(trainer.args, f"Stopped by {limit} after {seen:,} of {planned:,} images.")
    trainer.save_model(_internal_call=True)
    trainer.save_state()


def _finish(trainer: ImageGPTTrainer):
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()  # what the main process writes is there when any returns


def _recipe(model_args, data_args, args, model, train) -> dict:
    """How a model is trained, for its card: plain values, no path of this machine."""
    pieces = {
        "random crops": data_args.random_crop,
        "random windows of a reflected border": data_args.pad_crop,
        "random flips": data_args.random_flip,
    }
    limit = None if args.max_minutes is None else f", {args.max_minutes:g} minutes at most"
    epochs = "" if args.max_steps > 0 else f" ({args.num_train_epochs:g} epochs)"
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * _steps_per_epoch(args, train))
    precision = {"bf16": "bfloat16", "fp16": "float16"}.get(args.mixed_precision)  # by a flag or the launcher
    classification = {}
    if isinstance(args, FinetuningArguments):
        classification = {
            "classes": f"{model.config.num_labels}",
            "loss": f"classification + {args.generative_loss_weight:g} x generative"
            if args.generative_loss_weight
            else "classification",
        }
        if model.config.objective == "causal":
            classification["classifier inputs"] = {"sos": "SOS first, as in pretraining", "raw": "raw pixels"}[
                args.classifier_inputs
            ]
    return classification | {
        "objective": model.config.objective,
        "size": evaluation.size_of(model.config) or "custom",
        "data": data_args.name(),
        "hub dataset": data_args.hub_dataset(),
        "training images": f"{len(train):,}" if has_length(train) else "a stream",
        "augmentation": ", ".join(name for name, on in pieces.items() if on) or "none",
        "palette": "given"
        if model_args.image_processor_name
        else "the checkpoint's"
        if model_args.model_name_or_path
        else "fitted to the training images",
        "started from": "an earlier checkpoint" if model_args.model_name_or_path else "random weights",
        "batch": f"{_images_per_step(args)} images",
        "steps": f"{steps:,}{epochs}{limit or ''}",
        "optimiser": f"AdamW, betas {args.adam_beta1:g} and {args.adam_beta2:g}, weight decay {args.weight_decay:g}",
        "learning rate": f"{args.learning_rate:g}, {args.warmup_steps:g} steps of warm-up, then {args.lr_scheduler_type.value.replace('_', ' ')}",
        "precision": f"{precision} autocast" if precision else "float32",
        "seed": args.seed,
    }


def _identity(model_args, data_args) -> str:
    """What a resumed run must have in common with the one it resumes, hashed: images, split, palette, crops, its start."""
    fields = vars(data_args) | vars(model_args)
    fields = {name: value for name, value in fields.items() if name not in _CHANGES_NOTHING}
    return datasets.fingerprint.Hasher.hash(sorted(fields.items()))


def _check_same_run(checkpoint: str, config: ImageGPTConfig, args: PretrainingArguments, identity: str):
    """ValueError if the checkpoint is of another model, seed, data or palette: held-out images must stay held out."""
    run = Path(checkpoint).parent / evaluation.RUN
    if run.is_file() and json.loads(run.read_text())["identity"] != identity:
        raise ValueError(
            f"{checkpoint} was trained with other arguments of data or palette: repeat those, or give another --output_dir."
        )
    was = ImageGPTConfig.from_pretrained(checkpoint).to_diff_dict()
    now = config.to_diff_dict()
    for name in sorted((was.keys() | now.keys()) - {"architectures", "dtype", "transformers_version"}):
        if was.get(name) != now.get(name):
            raise ValueError(
                f"{checkpoint} has {name} = {was.get(name)}, this run {now.get(name)}: another run needs another --output_dir."
            )
    seed = torch.load(Path(checkpoint) / "training_args.bin", weights_only=False).seed
    if seed != args.seed:
        raise ValueError(
            f"{checkpoint} was trained with --seed {seed}, not {args.seed}: another run needs another folder."
        )


def _say(args, text: str):
    if args.should_log:
        data.tqdm.write(text)  # does not break a progress bar


def _processor(model_args, data_args, args, checkpoint, train_images):
    """The processor: of the checkpoint that is gone on from, or named, or with a palette fitted to the images."""
    source = checkpoint or model_args.image_processor_name or model_args.model_name_or_path
    if source:
        processor = load_processor(source, model_args, data_args)
        if processor.clusters is None:
            raise ValueError(
                f"The image processor of {source} has no palette: name another, or leave it out to fit one."
            )
        if model_args.num_colors not in (None, len(processor.clusters)):
            raise ValueError(
                f"--num_colors {model_args.num_colors}: the palette of {source} has {len(processor.clusters)} colours."
            )
        return processor
    palette = None
    if args.process_index == 0:
        progress = not args.disable_tqdm
        palette, pixels = _fit_palette(
            train_images, data_args, model_args.num_colors, _PALETTE_PIXELS, args.seed, progress
        )
        _say_distortion(palette, clusters.distortion(pixels, palette), "the pixels it was fitted to")
    palette = broadcast_object_list([palette])[0]
    return make_processor(palette, _image_size(data_args), data_args.center_crop is not False)


def _new_config(model_args, args, processor, **fields) -> ImageGPTConfig:
    """Of `args.size` for the processor's images, with `fields` and --config_overrides."""
    height, width = processor.token_grid()
    fields |= {"objective": args.objective or "causal"}
    config = ImageGPTConfig.from_preset(args.size, image_size=height, n_colors=len(processor.clusters), **fields)
    config.n_positions = height * width
    if model_args.config_overrides:
        known = config.to_dict()
        config.update_from_string(model_args.config_overrides)
        changed = {name: getattr(config, name) for name in known if hasattr(config, name)}
        config = ImageGPTConfig.from_dict(changed)  # checked again as a whole
    return config


def _source(model_args) -> dict:
    return {"revision": model_args.model_revision, "cache_dir": model_args.cache_dir}


def _trained_config(model_args, args) -> ImageGPTConfig | None:
    """The configuration of the checkpoint that is gone on from; None for a new model."""
    if not model_args.model_name_or_path:
        return None
    if model_args.config_overrides:
        raise ValueError("--config_overrides is for new models: leave it or --model_name_or_path out.")
    config = ImageGPTConfig.from_pretrained(model_args.model_name_or_path, **_source(model_args))
    for name in ("auto_map", "custom_pipelines"):  # of a published folder, whose code does not come along
        vars(config).pop(name, None)
    if args.objective not in (None, config.objective):
        raise ValueError(
            f"--objective {args.objective}: the weights of {model_args.model_name_or_path} are {config.objective}."
        )
    return config


def _attention(model_args) -> dict:
    return {} if model_args.attn_implementation is None else {"attn_implementation": model_args.attn_implementation}


def _model(model_args, args, processor):
    config = _trained_config(model_args, args)
    if config is None:
        config = _new_config(model_args, args, processor)
        model = _MODELS[config.objective]._from_config(config, **_attention(model_args))
    else:
        model = _MODELS[config.objective].from_pretrained(
            model_args.model_name_or_path, **_source(model_args), **_attention(model_args)
        )
    processor.check_fits(model.config)
    return model


def _head_fields(args, objective: str, names: list[str]) -> dict:
    """What a classifier's configuration says beside a pretrained model's."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "sos_inputs": objective == "causal" and args.classifier_inputs == "sos",
        "generative_loss_weight": args.generative_loss_weight,
    }


def _finetuned_config(model_args, args, names: list[str]) -> ImageGPTConfig | None:
    """The checkpoint's configuration, made a classifier's; None for a new model. ValueError if its head is of other classes."""
    config = _trained_config(model_args, args)
    if config is None:
        return None
    if (config.architectures or [None])[0] == "ImageGPTForImageClassification":
        known = [config.id2label[index] for index in range(config.num_labels)]
        generic = [f"LABEL_{index}" for index in range(len(names))]
        if known not in (names, generic):
            raise ValueError(
                f"{model_args.model_name_or_path} classifies {_some(known)}; the images have {_some(names)}: start from a "
                "pretrained model, whose head is new."
            )
    for name, value in _head_fields(args, config.objective, names).items():
        setattr(config, name, value)
    return config


def _some(names: list[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"


def _classifier(model_args, args, processor, config: ImageGPTConfig | None, names: list[str]):
    if config is None:
        fields = _head_fields(args, args.objective or "causal", names)
        config = _new_config(model_args, args, processor, **fields)
        model = ImageGPTForImageClassification._from_config(config, **_attention(model_args))
    else:
        is_classifier = (config.architectures or [None])[0] == "ImageGPTForImageClassification"
        model, found = ImageGPTForImageClassification.from_pretrained(
            model_args.model_name_or_path,
            config=config,
            ignore_mismatched_sizes=True,  # a converted checkpoint may hold a head of other classes
            output_loading_info=True,
            **_source(model_args),
            **_attention(model_args),
        )
        missing = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])} - {
            "score.weight",
            "lm_head.weight",
        }
        if missing:
            raise ValueError(
                f"{model_args.model_name_or_path} lacks {', '.join(sorted(missing)[:5])} of the shape its configuration says: "
                "it is damaged, or no Image GPT."
            )
        if not is_classifier:
            torch.nn.init.zeros_(model.score.weight)  # a new head, also where the checkpoint holds one of other classes
    processor.check_fits(model.config)
    return model


def _set_finetuning_recipe(args: FinetuningArguments, config: ImageGPTConfig, image_size: int, pretrained: bool):
    """Batch and learning rate from the preset of the model's shape, or else of --size."""
    recipe = SIZES[evaluation.size_of(config) or args.size]
    if args._batch_from_preset:
        args.share_batch(recipe.batch_size)
    if args.learning_rate is None:
        rate = recipe.learning_rate_for(config.objective, image_size)
        args.learning_rate = rate * FINETUNING_RATE if pretrained else rate


def _finetuning_settings(args: FinetuningArguments, config: ImageGPTConfig | None, split_seed: int, masks: int) -> dict:
    return {
        "started from": "random weights" if config is None else "pretrained",
        "split seed": split_seed,
        "generative loss weight": args.generative_loss_weight,
        "classifier inputs": args.classifier_inputs,
        "masks": masks,
    }


def _held_out_tokens(images, processor, data_args, desc: str):
    options = {"on_bad_image": data_args.on_bad_image, "num_proc": data_args.preprocessing_num_workers}
    return data.tokenize(images, processor, desc=desc, **options)


def _tokens(splits, processor, data_args, args, masked: bool, counting: bool = True):
    """Training and held-out rows of tokens, and the counting baselines where all tokens are at hand."""
    tokenizing = {"on_bad_image": data_args.on_bad_image, "num_proc": data_args.preprocessing_num_workers}
    with args.main_process_first(desc="tokens"):
        held_out = _held_out_tokens(splits["validation"], processor, data_args, "Tokenising held-out images")
        held_out_rows = data.ImageTokens(held_out, processor, masked=masked, seed=args.seed)
        if data_args.streaming:
            train = data.endless(splits["train"], args.seed, args.world_size)
            train = data.stream_tokens(train, processor, data_args, masked, args.seed, args.process_index)
            return train, held_out_rows, {}
        images = splits["train"]
        if data_args.random_crop and data_args.on_bad_image == "skip":
            images = data.readable(images, data_args.preprocessing_num_workers)
        tokens = (
            None
            if data_args.random_crop
            else data.tokenize(images, processor, desc="Tokenising training images", **tokenizing)
        )
    reference = {}
    if counting and tokens is not None and args.should_log:
        counted = [data.token_array(_evenly(part, _BASELINE_TOKENS)) for part in (tokens, held_out)]
        reference = evaluation.baselines(*counted, processor.token_grid()[1], len(processor.clusters))
    if masked:  # of what is known beside a hidden pixel, these know nothing or its place
        reference = {name: value for name, value in reference.items() if not name.startswith("left")}
    augmentation = {name: getattr(data_args, name) for name in ("random_crop", "random_flip", "pad_crop")}
    train = data.ImageTokens(
        images if tokens is None else tokens, processor, masked=masked, seed=args.seed, **augmentation
    )
    return train, held_out_rows, reference


def _evenly(tokens, n_tokens: int):
    """Every so manieth row of a tokenised dataset, so that at most `n_tokens` tokens come from all of it."""
    step = math.ceil(len(tokens) * tokens.features[data.TOKENS].length / n_tokens)
    return tokens.select(range(0, len(tokens), step))


def _set_steps(args, streaming, train):
    """Fill in what depends on the size of an epoch."""
    if streaming and args.max_steps <= 0:
        raise ValueError("A stream has no length: give --max_steps.")
    steps_per_epoch = None if streaming else _steps_per_epoch(args, train)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    if args._warmup_unset and streaming:
        args.warmup_steps = WARMUP_FRACTION
    elif args._warmup_unset and args.warmup_epochs is not None:
        args.warmup_steps = math.ceil(args.warmup_epochs * steps_per_epoch)
    elif args._warmup_unset:
        args.warmup_steps = min(math.ceil(WARMUP_EPOCHS * steps_per_epoch), int(total * _WARMUP_SHARE))
    for name in ("eval_steps", "save_steps", "logging_steps"):  # fractions become steps, as checkpoints record them
        steps = getattr(args, name)
        setattr(args, name, int(steps) if steps >= 1 else max(1, math.ceil(steps * total)))
    if args.warmup_steps and args.lr_scheduler_type == "constant":
        args.lr_scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP  # transformers' "constant" has none
    if args.load_best_model_at_end and args.eval_strategy == args.save_strategy == "steps":
        args.save_steps = args.eval_steps  # or the best model might be one that was not saved


def _held_out_metrics(prediction) -> dict[str, float]:
    """Mean over images, gathered over all processes: exact also where the last batches are ragged."""
    return {"nats_per_pixel": float(np.mean(prediction.predictions, dtype=np.float64))}


def _classification_metrics(prediction) -> dict[str, float]:
    """Accuracy, and the mean nats per pixel where the loss is joint."""
    values = prediction.predictions
    classes, nats = values if isinstance(values, tuple) else (values, None)
    metrics = {"accuracy": evaluation.accuracy(classes, prediction.label_ids)}
    return metrics if nats is None else metrics | {"nats_per_pixel": float(np.mean(nats, dtype=np.float64))}


def _record(trainer, metric, value, data_name, split, rows, step=None, settings=None) -> evaluation.Record:
    """A record of the trainer's model: as it was at `step`, or None: the best one, or the last where none was chosen."""
    state, config = trainer.state, trainer.model.config
    masks = (settings or {}).get("masks", 0)
    by = f", {masks} mask{'s' if masks > 1 else ''}" if masks else ""
    size = evaluation.size_of(config) or f"{config.n_layer} x {config.n_embd}"
    best = state.best_global_step if trainer.args.load_best_model_at_end and state.best_model_checkpoint else None
    seen, parameters = trainer.images_seen(step or best or state.global_step), trainer.model.num_parameters()
    masked = "masked " if config.objective == "masked" else ""
    return evaluation.Record(
        metric=metric,
        value=float(value),
        unit={"nats_per_pixel": "nats/pixel", "accuracy": "fraction"}[metric],
        split=split,
        n=len(rows),
        seed=trainer.args.seed,
        model=f"Image GPT {masked}{size}, {parameters:,} parameters, {seen:,} images seen{by}",
        data=data_name,
        settings={"objective": config.objective, "size": size, "parameters": parameters, "images seen": seen}
        | (settings or {}),
    )


def _summary(args, records, objective: str):
    of = " of hidden pixels" if objective == "masked" else ""
    _say(args, f"\nHeld-out nats per pixel (bits per pixel){of}, lower is better:")
    for record in sorted(records, key=lambda record: record.value):
        name = record.model.split(",")[0].replace("_", " ")
        _say(args, f"  {record.value:8.4f} ({record.value * evaluation.BITS_PER_NAT:.4f})  {name}")
    _say(args, f"\nWrote the model, its palette, pictures (samples/, training.png) and records to {args.output_dir}")
    if objective == "causal":
        _say(args, f"Next: python scripts/run_sample.py --model_name_or_path {args.output_dir} --num_images 16")
    else:
        _say(args, f"Next: python scripts/run_finetune.py --model_name_or_path {args.output_dir}")


@dataclass
class ClustersArguments:
    """Which palette."""

    output_dir: str = field(
        default="outputs/palette", metadata={"help": "Where the processor and pictures are written."}
    )
    num_colors: int | None = field(
        default=None, metadata={"help": "Colours K. Default: 512 (paper 3.2); 16 for the digits."}
    )
    num_pixels: int = field(default=_PALETTE_PIXELS, metadata={"help": "Pixels sampled, evenly from all images."})
    palette: str | None = field(
        default=None, metadata={"help": "Fit nothing: take this palette (.npy, .json or a processor's folder)."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the sampling, of k-means and of the held-out split."})


def fit_clusters(args: ClustersArguments, data_args: data.DataArguments) -> list[evaluation.Record]:
    """Fit (or read) a palette, measure its distortion on held-out images, and write it as an image processor."""
    folder = Path(args.output_dir)
    files = {"preprocessor_config.json", "palette.npy", "palette.png", evaluation.RECORDS}
    strange = {entry.name for entry in folder.iterdir()} - files if folder.is_dir() else set()
    if strange:
        raise ValueError(
            f"{folder} holds something else ({', '.join(sorted(strange)[:5])}): give another --output_dir."
        )
    palette = clusters.load_palette(args.palette) if args.palette else None
    image_size = _image_size(data_args)
    splits = data.load_images(data_args, seed=args.seed)
    if palette is None:
        palette, _ = _fit_palette(
            splits["train"], data_args, args.num_colors, args.num_pixels, args.seed, progress=True
        )
    lost = clusters.distortion(_sample_pixels(splits["validation"], data_args, args.num_pixels, args.seed), palette)
    make_processor(palette, image_size, data_args.center_crop is not False).save_pretrained(folder)
    np.save(folder / "palette.npy", palette)
    plots.palette_picture(palette).save(folder / "palette.png")
    records = [
        evaluation.Record(
            metric=metric,
            value=value,
            unit={"rmse_grey_levels": "grey levels", "psnr_db": "dB"}[metric],
            split="held out",
            n=len(splits["validation"]),
            seed=args.seed,
            model=f"palette of {len(palette)} colours" + (f" from {Path(args.palette).name}" if args.palette else ""),
            data=f"{data_args.name()}, {image_size}x{image_size}",
        )
        for metric, value in lost.items()
    ]
    evaluation.write_records(folder / evaluation.RECORDS, records)
    _say_distortion(palette, lost, "held-out images")
    print(f"Wrote the image processor, palette.npy, palette.png and records to {folder}")
    flags = {"dataset_name": data_args.dataset_name, "train_dir": data_args.train_dir, "image_processor_name": folder}
    flags = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value)
    print(f"Next: python scripts/run_pretrain.py {flags}")
    return records


def parse_arguments(*dataclasses, description: str, first: str | None = None):
    """Command-line flags as instances of `dataclasses`. A first argument FILE.json, .yaml or .yml gives their defaults.

    first: the flag whose values may stand at the beginning without it.
    """
    parser = HfArgumentParser(
        dataclasses, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags = sys.argv[1:]
    if flags and flags[0].endswith((".json", ".yaml", ".yml")):
        flags = _recipe_flags(Path(flags[0]), {action.dest for action in parser._actions} - {"help"}) + flags[1:]
    if first and flags and not flags[0].startswith("-"):
        flags = [f"--{first}", *flags]
    return parser.parse_args_into_dataclasses(flags)


def _recipe_flags(file: Path, known: set[str]) -> list[str]:
    """The recipe as flags, so that argparse checks it like flags; those that follow on the command line win."""
    recipe = _read_recipe(file)
    if unknown := sorted(set(recipe) - known):
        raise ValueError(f"{file} has unknown names: {', '.join(unknown)}.")
    flags = []
    for name, value in recipe.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _read_recipe(file: Path) -> dict:
    try:
        recipe = yaml.safe_load(file.read_text())  # JSON is YAML
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {file} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {file} does not hold names and values.")
    return recipe


def run_script(function, *dataclasses, description: str, first: str | None = None):
    """Call `function` with what `parse_arguments` gives; what it refuses ends the program in one line and status 2."""
    transformers.utils.logging.disable_progress_bar()  # of loading and writing files; ours stay
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name = Path(sys.argv[0]).name
    try:
        function(*parse_arguments(*dataclasses, description=description, first=first))
    except (ValueError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            f"{name}: interrupted. The same command goes on from the last checkpoint, if there is one.", file=sys.stderr
        )
        sys.exit(130)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # or its threads abort the process at exit
