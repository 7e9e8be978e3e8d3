"""`ImageGPTTrainer`: a `Trainer` that computes metrics per image, logs images seen and the terms of the loss, and can follow a clock."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction, has_length

from ..data import CLASS, MASK, TOKENS, ImageTokens, collate_classified, collate_tokens
from ..evaluation.metrics import BITS_PER_NAT, accuracy, nats_per_image
from ..image_processing_imagegpt import AnyImageProcessor
from ..modeling_imagegpt import ImageGPTForImageClassification, ImageGPTPreTrainedModel
from .arguments import WARMUP_SHARE, count_steps
from .callbacks import AverageWeights, Clock, DrawAnew
from .checkpoints import refusing_states


class NotFinite(ValueError):
    """Training has diverged: a loss or a weight is NaN or infinite."""


class ImageGPTTrainer(Trainer):
    """`Trainer` for all Image GPTs with a head. The model's class decides the default collator and metrics.

    clock: ends training after a time, and makes a cosine schedule follow the clock if it is ahead of the steps. average: what
    is evaluated and saved is the average of the weights that it keeps. publish:
    called as `publish(folder, repo_id, message=…, token=…, revision=…)` for each folder that is pushed; required with
    --push_to_hub. `kwargs` are the other arguments of `Trainer`.
    """

    model: ImageGPTPreTrainedModel
    processing_class: AnyImageProcessor
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: ImageGPTPreTrainedModel,
        *,
        clock: Clock | None = None,
        average: AverageWeights | None = None,
        publish: Callable[..., Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        if publish is None and kwargs.get("args") is not None and kwargs["args"].push_to_hub:
            raise ValueError(
                "--push_to_hub requires a function that publishes: pass publish=hf_igpt.publishing.hub.push."
            )
        self.clock, self.publish, self.average = clock, publish, average
        self.classifies = isinstance(model, ImageGPTForImageClassification)
        defaults = {
            "data_collator": collate_classified if self.classifies else collate_tokens,
            "compute_metrics": compute_classification_metrics if self.classifies else compute_held_out_metrics,
        }
        rows = kwargs.get("train_dataset")
        ours: list[TrainerCallback] = [DrawAnew(rows)] if isinstance(rows, ImageTokens) else []
        # The average first: it completes a checkpoint, which others read.
        ours = [*([average] if average else []), *callbacks, *ours, *([clock] if clock else [])]
        super().__init__(model, callbacks=ours, **(defaults | kwargs))
        self._parts: dict[str, torch.Tensor] = {}  # the terms of the loss, summed over the steps since `_parts_since`
        self._parts_since = 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the loss as `Trainer` does, and sum up the terms of a joint loss for the next log entry."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.classifies and outputs.classification_loss is not None:
            if not self._parts:
                self._parts_since = self.state.global_step
            averaged = self.args.average_tokens_across_devices and num_items_in_batch is not None
            scale = self.accelerator.num_processes if averaged else 1  # as Trainer does with the loss
            for name in ("classification_loss", "generative_loss"):
                part = outputs[name].detach().mean() * scale
                self._parts[name] = self._parts[name] + part if name in self._parts else part
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """Return `Trainer`'s loader, except for a stream, which is already a process's share and must not be sharded again."""
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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As `Trainer`'s, but of all images: it would drop the last ones with --dataloader_drop_last."""
        with self.dropping_nothing():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `Trainer`'s, but of all images: it would drop the last ones with --dataloader_drop_last."""
        with self.dropping_nothing():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def dropping_nothing(self) -> Iterator[None]:
        """Within it loaders are built for all images."""
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drops

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, during training, the model has the weights that are evaluated and saved."""
        return self.average.applied() if self.average else nullcontext()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer`'s, with averaged weights if there are any."""
        with self.averaged():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s, with averaged weights if there are any."""
        with self.averaged():
            return super().predict(*args, **kwargs)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """As `Trainer`'s; a loss that is not finite ends the run with a `NotFinite` error and the images it came from."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            what = f"The loss is {loss.item()}"
            if self.processing_class is not None:
                folder = Path(str(self.args.output_dir)) / f"not-finite-{self.args.process_index}"
                folder.mkdir(parents=True, exist_ok=True)
                tokens = inputs[TOKENS if self.classifies else "labels"]
                for index, image in enumerate(self.processing_class.decode(tokens)):
                    image.save(folder / f"{index}.png")
                what += f"; the images it came from are in {folder}"
            self.stop_diverged(what)
        return loss

    def stop_diverged(self, what: str) -> NoReturn:
        """End the run with a `NotFinite` error that begins with `what`."""
        rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler else self.args.learning_rate
        raise NotFinite(
            f"{what}. The run has diverged after step {self.state.global_step}, at a learning rate of {rate:.3g}: the "
            "checkpoints before are kept. Give another --output_dir and a lower --learning_rate, or more --warmup_steps."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `Trainer` does, or, if weights are sharded, save what it would leave out.

        In a checkpoint, whose shards are written with the optimiser's, that is everything but the weights; elsewhere it is
        the whole model, for `from_pretrained`.
        """
        if self.state.global_step and not all(weight.isfinite().all() for weight in self.model.parameters()):
            self.stop_diverged("Weights are not finite")
        if not self.saves_shards:
            with self.averaged():
                return super().save_model(output_dir, _internal_call)
        run = Path(str(self.args.output_dir))
        folder = Path(output_dir or run)
        is_checkpoint = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name) is not None
        if not (is_checkpoint and folder.parent == run):
            with self.averaged():
                self._save(str(folder), state_dict=self.accelerator.get_state_dict(self.model))
        elif self.args.should_save:
            self.model.config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds all weights, so that the model runs only if all processes take part."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    @property
    def saves_shards(self) -> bool:
        """Whether a checkpoint's weights are one file per process (FSDP's SHARDED_STATE_DICT)."""
        return self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return the loss, a value for each image (B,), and labels (B,), which are classes if there are any.

        The value is the image's nats per pixel; for a classifier it is the predicted class, and for a classifier with a joint
        loss (class, nats per pixel). The logits of all images would not fit into memory.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        labels = inputs["labels"]
        if not self.classifies:
            nats = nats_per_image(outputs.logits, labels, inputs.get(MASK))
            return outputs.loss, nats, inputs.get(CLASS, labels[:, 0])
        classes = outputs.logits.argmax(dim=-1)
        if outputs.generative_nats is None:
            return outputs.loss, classes, labels
        return outputs.loss, (classes, outputs.generative_nats), labels

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log as `Trainer` does, and add images seen, minutes, bits per pixel and the terms of a joint loss.

        Left out is the mean loss that it logs when training ends, which in a resumed run is that of the last process alone.
        """
        logs = {name: value for name, value in logs.items() if name != "train_loss"}
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
                logs[bits] = logs[name] * BITS_PER_NAT
        super().log(logs, start_time)

    def images_seen(self, step: int) -> int:
        """Return the number of images in the first `step` steps. The last step of an epoch may have fewer than the others."""
        args = self.args
        per_batch = args.train_batch_size * args.world_size
        per_step = per_batch * args.gradient_accumulation_steps
        if not has_length(self.train_dataset):
            return step * per_step
        n_images = len(self.train_dataset)
        epochs, steps = divmod(step, count_steps(args, n_images))
        if args.dataloader_drop_last:
            n_images -= n_images % per_batch
        return epochs * n_images + steps * per_step

    @property
    def measured_step(self) -> int:
        """The step whose weights the model has after training: that of the best model, if it was loaded, or the last."""
        state = self.state
        is_best = self.args.load_best_model_at_end and state.best_model_checkpoint
        return (is_best and state.best_global_step) or state.global_step

    def push_to_hub(  # type: ignore[override]  # always waits, and takes no arguments for a model card
        self, commit_message: str = "End of training", *, token: str | None = None, revision: str | None = None
    ) -> Any:
        """Save the model and publish `output_dir` as a complete repository, rather than upload the folder itself.

        token, revision: override --hub_token and --hub_revision. Returns what `publish` returns, in the main process. A
        Trainer without `publish` raises ValueError.
        """
        if self.publish is None:
            raise ValueError("This Trainer cannot publish: build it with publish=hf_igpt.publishing.hub.push.")
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return self.publish_folder(Path(str(self.args.output_dir)), commit_message, token, revision)

    def publish_folder(self, folder: Path, message: str, token: str | None = None, revision: str | None = None) -> Any:
        """Publish a folder of this run to --hub_model_id, in one commit. Other arguments as in `push_to_hub`."""
        if self.publish is None:
            raise ValueError("This Trainer cannot publish: build it with publish=hf_igpt.publishing.hub.push.")
        args = self.args
        return self.publish(
            folder,
            self.hub_model_id,
            message=message,
            token=token or args.hub_token,
            revision=revision or args.hub_revision,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with refusing_states(resume_from_checkpoint, "*model*"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with refusing_states(checkpoint, "optimizer*", "scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and not self.is_sharded:
                check_moments(self.optimizer)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with refusing_states(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with refusing_states(checkpoint, "rng_state*.pth"):
            super()._load_rng_state(checkpoint)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Create `Trainer`'s scheduler, or a cosine that follows the clock whenever that is ahead of the steps."""
        timer = self.clock
        if timer is None or self.args.lr_scheduler_type != "cosine":
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            clock = timer.fraction()
            warmed = max((step + 1) / (warmup + 1), clock / WARMUP_SHARE)
            return min(1, warmed) * 0.5 * (1 + math.cos(math.pi * min(1, max(step / num_training_steps, clock))))

        owner: Any = optimizer or self.optimizer  # Trainer creates it first
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(owner, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler


def check_moments(optimizer: Any) -> None:
    """ValueError if one of torch's optimizers holds a tensor of another shape than its weight: its kernels would not look."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if type(optimizer).__module__.startswith("torch.optim"):
        for weight, state in optimizer.state.items():
            for name, value in state.items():
                if torch.is_tensor(value) and value.ndim and value.shape != weight.shape:
                    raise ValueError(f"{name} has shape {tuple(value.shape)}, its weight {tuple(weight.shape)}")


def compute_held_out_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return the mean over images, gathered over all processes, which is exact even if the last batches are ragged."""
    return {"nats_per_pixel": float(np.mean(prediction.predictions, dtype=np.float64))}


def compute_classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return the accuracy in 0..1, and the mean nats per pixel if the loss is joint."""
    values: Any = prediction.predictions
    classes, nats = values if isinstance(values, tuple) else (values, None)
    metrics = {"accuracy": accuracy(classes, prediction.label_ids)}
    return metrics if nats is None else metrics | {"nats_per_pixel": float(np.mean(nats, dtype=np.float64))}
