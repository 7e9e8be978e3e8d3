"""The arguments of training: dataclasses whose defaults are the paper's recipes, resolved once against model and images.

A default of None means "from the preset". `RecipeArguments.resolve` replaces every None before the Trainer is built, and nothing
changes an argument after that. Annotations are those of resolved values.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.trainer_utils import HubStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from ..data.arguments import check_numbers
from ..presets import (
    ADAM_BETAS,
    CLASS_DROPOUT,
    EVALUATION_MASKS,
    FINETUNING_EPOCHS,
    FINETUNING_PATIENCE,
    FINETUNING_SCHEDULE,
    GENERATIVE_LOSS_WEIGHT,
    MAX_COLORS,
    SIZES,
    WARMUP_EPOCHS,
    WARMUP_FRACTION,
    WEIGHT_DECAY,
)


# Arguments of transformers that do not fit, each with what is instead.
UNFIT = {
    "label_smoothing_factor": "the loss is the model's exact likelihood",
    "prediction_loss_only": "nats per pixel are computed from the predictions",
    "batch_eval_metrics": "each image is reduced to its nats or its class when it is predicted, which takes no memory",
    "include_for_metrics": "metrics are computed from the nats or the class of each image",
    "fp16_full_eval": "it would halve the weights that are saved, and records would not be of what was trained; give --fp16",
    "bf16_full_eval": "it would halve the weights that are saved, and records would not be of what was trained; give --bf16",
    "use_liger_kernel": "Liger has no kernels for Image GPT; give --torch_compile",
    "auto_find_batch_size": "the batch is part of the recipe; give --per_device_train_batch_size",
    "ignore_data_skip": "a run that is resumed would see other images than one that was not interrupted",
    "enable_jit_checkpoint": "a run that it ends would count as finished; give --save_steps, from which a killed run continues",
    "parallelism_config": "there is no plan for it; shard the model with FSDP (docs/launching.md)",
}
WARMUP_SHARE = 0.1  # the longest default warm-up, as a fraction of training


@dataclass
class ModelArguments:
    """Which model to train, and with which palette."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from. Default: a new model of --size."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": 'Fields of the new model\'s configuration: "n_layer=6,n_embd=128".'}
    )
    image_processor_name: str | None = field(
        default=None,
        metadata={
            "help": "Image processor (folder or Hub name) or palette file (.npy, .json). Default: a palette is fitted to "
            "the training images."
        },
    )
    num_colors: int | None = field(
        default=None, metadata={"help": "Number of colours K of the palette to fit. Default: 512; 16 for the digits."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention implementation: eager, sdpa, flash_attention_2 or flex_attention. Default: sdpa."},
    )
    model_revision: str = field(default="main", metadata={"help": "Revision of the checkpoint: branch, tag or commit."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder in which downloaded checkpoints are kept."})

    def __post_init__(self) -> None:
        check_numbers(self, {f"from 1 to {MAX_COLORS}": ("num_colors",)})

    def hub_source(self) -> dict[str, Any]:
        """Return the arguments with which `from_pretrained` finds the checkpoint on the Hub."""
        return {"revision": self.model_revision, "cache_dir": self.cache_dir}

    def attention(self) -> dict[str, Any]:
        """Return the arguments with which `from_pretrained` and `_from_config` choose the attention implementation."""
        return {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}

    def identity(self) -> dict[str, Any]:
        """Return the arguments that decide the initial weights and the palette; they must not change when a run resumes."""
        # config_overrides are compared as part of the configuration.
        changes_nothing = ("cache_dir", "attn_implementation", "config_overrides")
        return {name: value for name, value in vars(self).items() if name not in changes_nothing}


@dataclass
class RecipeArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the arguments that pretraining and fine-tuning share."""

    output_dir: str = field(default="outputs", metadata={"help": "Folder to write everything to."})
    size: str = field(
        default="tiny",
        metadata={"help": "Preset for shape and recipe; other flags override parts of it.", "choices": list(SIZES)},
    )
    objective: str | None = field(
        default=None,
        metadata={
            "help": "What to predict. causal: each pixel from those before it. masked: hidden pixels from all others, as in "
            "BERT. Default: the checkpoint's, or causal.",
            "choices": ["causal", "masked"],
        },
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Stop after this many minutes. A cosine schedule follows the clock if it is ahead of the steps."
        },
    )
    warmup_steps: float = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Steps of linear warm-up, or a fraction of all. Default: --warmup_epochs."}
    )
    warmup_epochs: float | None = field(
        default=None,
        metadata={"help": "Epochs of linear warm-up. Default: 1 (paper A.1), but at most a tenth of training."},
    )
    learning_rate: float = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Peak learning rate. Default: the preset's."}
    )
    per_device_train_batch_size: int = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Images per process and forward pass. Default: the preset's batch, divided by processes and "
            "accumulation steps."
        },
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per process in evaluation."})
    num_train_epochs: float = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Epochs. Default: the preset's."}
    )
    max_steps: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Optimiser steps. Default: the preset's."}
    )
    adam_beta1: float = field(default=ADAM_BETAS[0], metadata={"help": "Adam's first beta (paper A.1)."})
    adam_beta2: float = field(default=ADAM_BETAS[1], metadata={"help": "Adam's second beta (paper A.1)."})
    weight_decay: float = field(default=WEIGHT_DECAY, metadata={"help": "Weight decay (paper A.1: none)."})
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Keep an exponential moving average of the weights with this decay, 0.9999 for example: it is what is "
            "evaluated, drawn from and saved. Takes one more copy of the weights. Default: none."
        },
    )
    eval_steps: float = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Steps between evaluations, or a fraction of all. Default: --save_steps, or 0.1."},
    )
    save_steps: float = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Steps between checkpoints, or a fraction of all. Default: --eval_steps, or 0.1."},
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints to keep. The default keeps the best and the last."}
    )
    logging_steps: float = field(default=0.02, metadata={"help": "Steps between log lines, or a fraction of all."})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Write the best model to output_dir, rather than the last."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop columns; the collator already selects them."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for unused parameters; every step uses all of them."}
    )
    use_cache: bool = field(
        default=True, metadata={"help": "Value in the saved configuration; training itself never uses a cache."}
    )

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"No preset {self.size!r}: the sizes are {', '.join(SIZES)}.")
        ranges = {
            "at least 1": (
                *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
                *("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_timeout"),
                "num_masks",
            ),
            "at least 1, or -1 for none": ("max_steps",),
            "positive": ("num_train_epochs", "max_minutes", "eval_steps", "save_steps", "logging_steps"),
            "at least 0 and below 1": ("adam_beta1", "adam_beta2", "ema_decay"),
            "above 0 and at most 1": ("class_dropout",),
            "any number": ("local_rank", "ddp_bucket_cap_mb"),  # the launcher's and torch's own
        }
        check_numbers(self, ranges)
        recipe = SIZES[self.size]
        self.batch_given = self.per_device_train_batch_size is not None
        self.warmup_given = self.warmup_steps is not None
        if self.num_train_epochs is None and self.max_steps is None:
            self.num_train_epochs, self.max_steps = recipe.num_epochs, recipe.max_steps
        # The values by which Trainer means "unset".
        self.num_train_epochs = 1.0 if self.num_train_epochs is None else self.num_train_epochs
        self.max_steps = -1 if self.max_steps is None else self.max_steps
        self.warmup_steps = 0 if self.warmup_steps is None else self.warmup_steps
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = recipe.batch_size
        self.label_names = ["labels"]
        if self.eval_strategy == "no" or self.save_strategy == "no":
            self.load_best_model_at_end = False
        evaluates, saves = (str(getattr(each, "value", each)) for each in (self.eval_strategy, self.save_strategy))
        if self.load_best_model_at_end and saves not in (evaluates, "best"):
            raise ValueError(
                f"--eval_strategy {evaluates} with --save_strategy {saves}: the best model is chosen among checkpoints by their "
                "evaluation. Give both the same, or --no_load_best_model_at_end."
            )
        # Checkpoints are chosen by their evaluation, so both happen at the same steps by default.
        self.eval_steps, self.save_steps = (
            next(steps for steps in (one, other, 0.1) if steps is not None)
            for one, other in ((self.eval_steps, self.save_steps), (self.save_steps, self.eval_steps))
        )
        self.use_cpu |= not torch.accelerator.is_available()
        super().__post_init__()
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        self._check()
        if self.push_to_hub:
            self.pushes_checkpoints = self.hub_strategy == HubStrategy.EVERY_SAVE
            self.hub_strategy = HubStrategy.END  # our own callback pushes checkpoints, as complete repositories
        else:
            self.pushes_checkpoints = False
        if not self.batch_given:
            self.per_device_train_batch_size = self.per_device_share(recipe.batch_size)

    def _check(self) -> None:
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"--hub_strategy {HubStrategy(self.hub_strategy).value} would publish training_args.bin, with paths and "
                "tokens: use end or every_save."
            )
        for name, instead in UNFIT.items():
            if getattr(self, name):
                raise ValueError(f"--{name} is not supported: {instead}.")
        if self.max_minutes is not None and self.lr_scheduler_type not in ("cosine", "constant"):
            raise ValueError("--max_minutes decays the learning rate by a cosine: leave --lr_scheduler_type out.")
        if self.mixed_precision == "fp16" and self.use_cpu:
            raise ValueError("--fp16 needs a GPU, on a CPU it would be float32: leave it out, or give --bf16.")
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise ValueError(
                "--dataloader_persistent_workers keeps workers: give --dataloader_num_workers, at least 1."
            )
        if DebugOption.TPU_METRICS_DEBUG in self.debug:
            raise ValueError("--debug tpu_metrics_debug needs a TPU: leave it out.")
        self._check_optimizer()
        self._check_compilation()

    def _check_metric(self, *metrics: str) -> None:
        """ValueError unless the best model is chosen by one of `metrics`, which are measured."""
        name = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if name not in metrics:
            raise ValueError(f"--metric_for_best_model is one of {[*metrics]} here; found {name}.")

    def _check_optimizer(self) -> None:
        """ValueError if the package of --optim is not installed, or it or the schedule lacks an argument or has a wrong one."""
        from transformers import Trainer, get_scheduler  # not above: it takes seconds, and --help needs none

        model: Any = torch.nn.Module()
        kwargs: Any = self.lr_scheduler_kwargs
        try:
            Trainer.get_optimizer_cls_and_kwargs(self, model)
        except (ImportError, ValueError) as error:
            if isinstance(error, ImportError) or not self.optim_target_modules:  # whose names only the real model has
                given = f", --optim_args {self.optim_args}" if self.optim_args else ""
                raise ValueError(f"--optim {OptimizerNames(self.optim).value}{given}: {error}") from error
        any_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        try:
            get_scheduler(self.lr_scheduler_type, any_optimizer, 0, 1, kwargs)
        except (TypeError, ValueError) as error:
            name = SchedulerType(self.lr_scheduler_type).value
            raise ValueError(f"--lr_scheduler_type {name}, --lr_scheduler_kwargs: {error}") from error

    def _check_compilation(self) -> None:
        """ValueError if --torch_compile has a backend or a mode that there is not."""
        if self.torch_compile:
            backends = [backend.value.lower() for backend in DynamoBackend if backend != DynamoBackend.NO]
            if str(self.torch_compile_backend).lower() not in backends:
                raise ValueError(
                    f"--torch_compile_backend is one of {', '.join(backends)}; found {self.torch_compile_backend}."
                )
            try:
                torch.compile(torch.nn.Identity(), mode=self.torch_compile_mode)
            except RuntimeError as error:
                raise ValueError(f"--torch_compile_mode: {error}") from error

    def per_device_share(self, batch_size: int) -> int:
        """Return the images per process and forward pass that make `batch_size` images per optimiser step.

        A batch that cannot be divided evenly is a ValueError.
        """
        parts = self.world_size * self.gradient_accumulation_steps * max(1, self.n_gpu)
        if batch_size % parts:
            raise ValueError(
                f"The preset's batch of {batch_size} images cannot be shared by {parts} (processes x "
                "accumulation steps): give --per_device_train_batch_size."
            )
        return batch_size // parts

    def images_per_step(self, size: str | None = None) -> int:
        """Return the images per optimiser step over all processes.

        Without --per_device_train_batch_size, they are those of the preset `size` (None: --size).
        """
        if not self.batch_given and size is not None:
            share = self.per_device_share(SIZES[size].batch_size) * max(1, self.n_gpu)
        else:
            share = self.train_batch_size
        return share * self.gradient_accumulation_steps * self.world_size

    def steps_per_epoch(self, n_images: int) -> int:
        """Return the optimiser steps of an epoch; the last may have fewer images, unless --dataloader_drop_last."""
        return count_steps(self, n_images)

    def resolve(self, size: str, objective: str, image_size: float, n_images: int | None, rate: float = 1.0) -> None:
        """Fill in the defaults that depend on the model and its images. Called once, before the Trainer is built.

        size: the preset whose recipe to use. image_size: the side, in pixels, of a square of as many pixels. n_images: the number of training images, None for a stream. rate: the default
        learning rate as a fraction of the preset's. Fractions of training become steps, which is what checkpoints record.
        A stream without --max_steps is a ValueError.
        """
        recipe = SIZES[size]
        if not self.batch_given:
            self.per_device_train_batch_size = self.per_device_share(recipe.batch_size)
        if self.learning_rate is None:
            self.learning_rate = rate * recipe.learning_rate_for(objective, image_size)
        warmup: float
        if n_images is None:
            if self.max_steps <= 0:
                raise ValueError("A stream has no length: give --max_steps.")
            total, warmup = self.max_steps, WARMUP_FRACTION
        else:
            per_epoch = self.steps_per_epoch(n_images)
            total = self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * per_epoch)
            if self.warmup_epochs is not None:
                warmup = math.ceil(self.warmup_epochs * per_epoch)
            else:
                warmup = min(math.ceil(WARMUP_EPOCHS * per_epoch), int(total * WARMUP_SHARE))
        if not self.warmup_given:
            self.warmup_steps = warmup
        for name in ("eval_steps", "save_steps", "logging_steps"):
            steps = getattr(self, name)
            setattr(self, name, int(steps) if steps >= 1 else max(1, math.ceil(steps * total)))
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            self.lr_scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP  # transformers' "constant" has none
        if self.load_best_model_at_end and self.eval_strategy == self.save_strategy == "steps":
            self.save_steps = self.eval_steps  # otherwise the best model might not have been saved

    def recipe(self, n_images: int | None) -> dict[str, Any]:
        """Describe the training of a model for its card, in plain values. n_images: training images, None for a stream."""
        limit = "" if self.max_minutes is None else f", {self.max_minutes:g} minutes at most"
        if self.max_steps > 0 or n_images is None:
            steps = f"{self.max_steps:,}{limit}"
        else:
            count = math.ceil(self.num_train_epochs * self.steps_per_epoch(n_images))
            steps = f"{count:,} ({self.num_train_epochs:g} epochs){limit}"
        precision = {"bf16": "bfloat16", "fp16": "float16"}.get(self.mixed_precision)  # set by a flag or the launcher
        schedule = SchedulerType(self.lr_scheduler_type).value.replace("_", " ")
        averaged = (
            {} if self.ema_decay is None else {"weights": f"exponential moving average, decay {self.ema_decay:g}"}
        )
        return averaged | {
            "batch": f"{self.images_per_step()} images",
            "steps": steps,
            "optimiser": self.describe_optimizer(),
            "learning rate": f"{self.learning_rate:g}, {self.warmup_steps:g} steps of warm-up, then {schedule}",
            "precision": f"{precision} autocast" if precision else "float32",
            "seed": self.seed,
        }

    def describe_optimizer(self) -> str:
        """The optimiser in words: "AdamW, betas 0.9 and 0.95, weight decay 0"."""
        from transformers import Trainer  # as in `_check_optimizer`

        name, betas = OptimizerNames(self.optim).value, None
        if not self.optim_target_modules:  # whose names only the real model has
            model: Any = torch.nn.Module()
            kind, options = Trainer.get_optimizer_cls_and_kwargs(self, model)
            name, betas = kind.__name__, options.get("betas")
        words = [name, f"betas {betas[0]:g} and {betas[1]:g}" if betas else "", f"weight decay {self.weight_decay:g}"]
        return ", ".join(filter(None, [*words, self.optim_args]))


def count_steps(args: TrainingArguments, n_images: int) -> int:
    """Count the optimiser steps of an epoch of `n_images` images, with any `TrainingArguments`, as `Trainer` does."""
    per_batch = args.train_batch_size * args.world_size
    batches = n_images // per_batch if args.dataloader_drop_last else math.ceil(n_images / per_batch)
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


@dataclass
class PretrainingArguments(RecipeArguments):
    """The paper's pretraining [V2 3.4, A.1]."""

    output_dir: str = field(default="outputs/pretrain", metadata={"help": "Folder to write everything to."})
    milestones: str | None = field(
        default=None,
        metadata={
            "help": 'Fractions of training after which to keep the model in milestones/: "0.065,0.131,0.262,0.524,1" '
            "(paper, Figure 3)."
        },
    )
    class_conditional: bool = field(
        default=False,
        metadata={
            "help": "Learn what images of each class look like, from labelled images: run_sample.py --classes then draws them."
        },
    )
    class_dropout: float | None = field(
        default=None,
        metadata={
            "help": "With --class_conditional: fraction of the images whose class the model is not told, so that it also learns "
            f"what images look like in general, which guidance needs. Default: {CLASS_DROPOUT}."
        },
    )
    num_samples: int = field(default=16, metadata={"help": "Images to draw at each evaluation; 0: none."})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Learning rate schedule after warm-up (paper A.1: cosine to 0)."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps, epoch."})
    metric_for_best_model: str | None = field(
        default="nats_per_pixel", metadata={"help": "Metric by which the best model is chosen."}
    )
    greater_is_better: bool | None = field(
        default=False, metadata={"help": "Whether a higher value of that metric is better."}
    )

    def __post_init__(self) -> None:
        self.milestone_fractions = parse_fractions(self.milestones)
        if self.class_conditional and self.objective == "masked":
            raise ValueError(
                "--class_conditional is for causal models: in a masked one nothing stands before the image."
            )
        if self.class_dropout is not None and not self.class_conditional:
            raise ValueError("--class_dropout is for --class_conditional: give that too.")
        if self.class_conditional and self.class_dropout is None:
            self.class_dropout = CLASS_DROPOUT
        super().__post_init__()
        self._check_metric("nats_per_pixel", "loss")


@dataclass
class FinetuningArguments(RecipeArguments):
    """The paper's fine-tuning [V2 3.4]."""

    output_dir: str = field(default="outputs/finetune", metadata={"help": "Folder to write everything to."})
    generative_loss_weight: float = field(
        default=GENERATIVE_LOSS_WEIGHT,
        metadata={
            "help": "Weight of the generative loss that is added to the classification loss; 0: classification only."
        },
    )
    classifier_inputs: str = field(
        default="sos",
        metadata={
            "help": "What a causal model reads. sos: the shifted pixels, as in pretraining and OpenAI's code. raw: the pixels "
            "themselves, as in plain transformers, which can then load the result.",
            "choices": ["sos", "raw"],
        },
    )
    num_masks: int = field(
        default=EVALUATION_MASKS,
        metadata={"help": "Masks per test image for a masked model, which takes the majority vote (paper 4.6)."},
    )
    early_stopping_patience: int | None = field(
        default=FINETUNING_PATIENCE,
        metadata={"help": "Stop after this many evaluations without a better validation accuracy; 0: never."},
    )
    lr_scheduler_type: str = field(
        default=FINETUNING_SCHEDULE, metadata={"help": "Learning rate schedule (paper 3.4: constant)."}
    )
    learning_rate: float = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Learning rate. Default: a tenth of the preset's (paper 3.4), or the preset's from random weights."
        },
    )
    num_train_epochs: float = field(  # type: ignore[assignment]
        default=None, metadata={"help": f"Epochs. Default: {FINETUNING_EPOCHS}."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps, epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch."})
    metric_for_best_model: str | None = field(
        default="accuracy", metadata={"help": "Metric by which the best model is chosen."}
    )
    greater_is_better: bool | None = field(
        default=None,
        metadata={"help": "Whether a higher value of that metric is better. Default: true only for accuracy."},
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True,
        metadata={"help": "Whether a resumed run continues to count the evaluations for early stopping."},
    )

    def __post_init__(self) -> None:
        if self.num_train_epochs is None and self.max_steps is None:
            self.num_train_epochs = FINETUNING_EPOCHS
        if self.warmup_steps is None and self.warmup_epochs is None:
            self.warmup_steps = 0
        if self.greater_is_better is None:
            self.greater_is_better = self.metric_for_best_model == "accuracy"
        super().__post_init__()
        self._check_metric("accuracy", "loss", *(["nats_per_pixel"] if self.generative_loss_weight else []))


def parse_fractions(text: str | None) -> list[float]:
    """Parse fractions in (0, 1], such as "0.065,0.131,1", to ascending, distinct numbers; other text is a ValueError."""
    try:
        fractions = sorted({float(part) for part in text.split(",")}) if text else []
    except ValueError as error:
        raise ValueError(f"--milestones are fractions of training, separated by commas; found {text!r}.") from error
    if any(not 0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"--milestones are fractions of training, above 0 and up to 1; found {text!r}.")
    return fractions
