"""Callbacks for training: a time limit, progress in images, a picture at each evaluation, milestones, pushes of checkpoints."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from ..data import ImageTokens
from ..evaluation.metrics import BITS_PER_NAT
from ..evaluation.records import save_picture
from .checkpoints import checkpoint_of, refusing_states


def log_main(text: str) -> None:
    """Print a line in the main process only, without breaking a progress bar."""
    if PartialState().is_main_process:
        tqdm.write(text)


class DrawAnew(TrainerCallback):
    """Tells the rows of training which epoch begins: their crops, flips and masks are drawn anew in each.

    The epoch is the one that the steps say, whatever the loaders count: right with any number of processes, and after
    resuming in the middle of an epoch.
    """

    def __init__(self, rows: ImageTokens) -> None:
        self.rows = rows

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        self.rows.begin_epoch(state.global_step // steps)


class Clock(TrainerCallback):
    """Ends training after `minutes`, at the same step in all processes. A resumed run has the time that was left."""

    def __init__(self, minutes: float, device: torch.device) -> None:
        self.limit, self.device, self.elapsed = minutes, device, 0.0  # minutes
        self.start = time.monotonic()  # seconds; set again when training begins

    def fraction(self) -> float:
        """Return the elapsed time as a fraction of the limit."""
        return self.elapsed / self.limit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.elapsed = next((entry["minutes"] for entry in reversed(state.log_history) if "minutes" in entry), 0.0)
        self.start = time.monotonic() - self.elapsed * 60

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.elapsed = (time.monotonic() - self.start) / 60
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            elapsed = torch.tensor(self.elapsed, device=self.device)
            torch.distributed.broadcast(elapsed, src=0)
            self.elapsed = elapsed.item()
        control.should_log |= control.should_save  # a checkpoint has the minutes of the last log entry
        if self.elapsed >= self.limit:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = args.save_strategy != "no"
            control.should_log = control.should_training_stop = True


class AverageWeights(TrainerCallback):
    """Keeps an exponential moving average of the weights, over optimiser steps.

    decay: of the average, at most; (1 + step) / (10 + step) as long as that is less, so that the first weights are forgotten.
    What is saved of a model is its average: a checkpoint holds the weights that training continues from in a file of its own.
    FSDP2 saves these itself, in shards: then the average is in a folder of its own, in shards too.
    """

    FILE = "training_weights.safetensors"
    SHARDS = "average"

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.checkpoint: str | None = None  # the one that training continues from
        self.average: list[torch.Tensor] | None = None  # only during training
        self.model: PreTrainedModel | None = None
        self.weights: dict[str, torch.Tensor] = {}
        self.swapped = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        self.model, self.weights = model, dict(model.named_parameters())
        self.average = [weight.detach().clone() for weight in self.weights.values()]
        if self.checkpoint is not None and self.is_sharded:
            self.load_average(Path(self.checkpoint), self.average)
        elif self.checkpoint is not None:  # whose model, loaded by now, is the average
            with refusing_states(self.checkpoint, self.FILE), torch.no_grad():
                saved = load_file(Path(self.checkpoint) / self.FILE)
                for name, weight in self.weights.items():
                    weight.copy_(saved[name])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.average is not None
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        weights: Any = list(self.weights.values())
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(self.average, weights, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_sharded:
            assert self.average is not None
            shards = dict(zip(self.weights, self.average, strict=True))
            save_shards(shards, checkpoint_id=checkpoint_of(args, state) / self.SHARDS)
        elif args.should_save:
            weights = {name: weight.detach().cpu().contiguous() for name, weight in self.weights.items()}
            save_file(weights, checkpoint_of(args, state) / self.FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is None:
            self.swap()
        elif self.is_sharded:  # what was loaded are the weights that training would continue from
            self.load_average(Path(best), list(self.weights.values()))
            self.forget_gathered()
        self.average, self.model, self.weights = None, None, {}

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights."""
        return any(isinstance(weight, DTensor) for weight in self.weights.values())

    def load_average(self, checkpoint: Path, into: list[torch.Tensor]) -> None:
        """Load the average that a sharded checkpoint holds into tensors, in the order of the weights."""
        shards = {name: tensor.detach() for name, tensor in zip(self.weights, into, strict=True)}
        load_shards(shards, checkpoint_id=checkpoint / self.SHARDS)

    def swap(self) -> None:
        """Exchange the weights and their average."""
        assert self.average is not None
        with torch.no_grad():
            for weight, average in zip(self.weights.values(), self.average, strict=True):
                kept = weight.clone()
                weight.copy_(average)
                average.copy_(kept)
        self.forget_gathered()

    def forget_gathered(self) -> None:
        """Let modules gather their weights anew: FSDP2 keeps some that were gathered, beside the shards that have changed."""
        for module in self.model.modules() if self.model is not None else ():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, during training, the model has the averaged weights."""
        if self.average is None or self.swapped:
            yield
            return
        self.swap()
        self.swapped = True
        try:
            yield
        finally:
            self.swap()
            self.swapped = False


class ImageProgress(ProgressCallback):
    """transformers' progress bar, but it counts images, and prints one line per log entry instead of a dictionary.

    images_seen: maps a number of steps to a number of images.
    """

    training_bar: tqdm | None
    prediction_bar: tqdm | None

    def __init__(self, images_seen: Callable[[int], int]) -> None:
        super().__init__()
        self.images_seen = images_seen

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.prediction_bar is None:
                n_batches = len(eval_dataloader)
                self.prediction_bar = tqdm(total=n_batches, desc="Evaluating", unit="batch", leave=False, disable=None)
            self.prediction_bar.update(1)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=self.images_seen(state.max_steps),
                desc="Training",
                unit="image",
                unit_scale=True,
                dynamic_ncols=True,
                disable=None,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.update(self.images_seen(state.global_step) - self.training_bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or logs is None or "images" not in logs:
            return
        line = describe_log(logs)
        if line:
            rate = f"   learning rate {logs['learning_rate']:.2e}" if "learning_rate" in logs else ""
            self.training_bar.write(f"{logs['images']:>11,} images   {line}{rate}")


def describe_log(logs: dict[str, Any]) -> str | None:
    """Return a log entry in words, or None for the summary at the end of training."""
    if "eval_accuracy" in logs:
        return f"validation {100 * logs['eval_accuracy']:.1f} % right"
    if "eval_nats_per_pixel" in logs:
        nats = logs["eval_nats_per_pixel"]
        return f"held out {nats:.4f} nats/pixel ({nats * BITS_PER_NAT:.4f} bits)"
    if "classification_loss" in logs:
        parts = f"{logs['classification_loss']:.4f} nats/image, {logs['generative_loss']:.4f} nats/pixel"
        return f"training {logs['loss']:.4f} ({parts})"
    if "bits_per_pixel" in logs:
        return f"training {logs['loss']:.4f} nats/pixel ({logs['bits_per_pixel']:.4f} bits)"
    return f"training {logs['loss']:.4f} nats/image" if "loss" in logs else None


class SamplePictures(TrainerCallback):
    """Saves the picture that `draw(model)` returns at each evaluation, as `step-0000100.png` in `folder`."""

    def __init__(self, draw: Callable[[Any], Image.Image], folder: Path) -> None:
        self.draw, self.folder = draw, folder

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            save_picture(self.draw(model), self.folder / f"step-{state.global_step:07d}.png")


class Milestones(TrainerCallback):
    """Calls `keep()` at `fractions` of training, by steps or by the clock, whichever is ahead."""

    def __init__(self, fractions: list[float], clock: Clock | None, keep: Callable[[], None]) -> None:
        self.fractions, self.clock, self.keep = fractions, clock, keep
        self.pending: list[float] = []

    def progress(self, state: TrainerState) -> float:
        """Return the fraction of training that is done."""
        return max(state.global_step / state.max_steps, self.clock.fraction() if self.clock else 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pending = [fraction for fraction in self.fractions if fraction > self.progress(state)]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        reached = [fraction for fraction in self.pending if fraction <= self.progress(state)]
        if reached:
            self.pending = self.pending[len(reached) :]
            self.keep()


class PushCheckpoints(TrainerCallback):
    """Calls `push(folder, message)` for each saved checkpoint. A push that fails is reported, and training continues."""

    def __init__(self, push: Callable[[Path, str], object]) -> None:
        self.push = push

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            try:
                self.push(checkpoint_of(args, state), f"Training in progress, step {state.global_step}")
            except Exception as error:  # the Hub's transport errors have no common class across its versions
                tqdm.write(f"Not pushed: {type(error).__name__}: {error}")
