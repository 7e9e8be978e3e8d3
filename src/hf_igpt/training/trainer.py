"""`ImageGPTTrainer`: transformers' `Trainer` that evaluates image by image, logs images and loss parts, and may follow a clock."""

import math
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from ..data import MASK, TOKENS, ImageTokens, collate_classified, collate_tokens
from ..evaluation.metrics import BITS_PER_NAT, accuracy, nats_per_image
from ..modeling_imagegpt import ImageGPTForImageClassification
from .arguments import WARMUP_SHARE
from .callbacks import Clock, DrawAnew


class NotFinite(ValueError):
    """Training has diverged: a loss or a weight is NaN or infinite."""


class ImageGPTTrainer(Trainer):
    """`Trainer` for all Image GPTs with a head: collator and metrics follow the model's class unless they are given.

    clock: ends training by the clock, and lets a cosine schedule follow it if it is ahead of the steps. publish: called as
    `publish(folder, repo_id, message=…, token=…, revision=…)` with each folder that is pushed.
    """

    def __init__(self, model, *, clock: Clock | None = None, publish=None, callbacks=(), **kwargs):
        if publish is None and kwargs.get("args") is not None and kwargs["args"].push_to_hub:
            raise ValueError("--push_to_hub needs to know how: pass publish=hf_igpt.hub.push.")
        self.clock, self.publish = clock, publish
        self.classifies = isinstance(model, ImageGPTForImageClassification)
        defaults = {
            "data_collator": collate_classified if self.classifies else collate_tokens,
            "compute_metrics": classification_metrics if self.classifies else held_out_metrics,
        }
        rows = kwargs.get("train_dataset")
        ours = [DrawAnew(rows)] if isinstance(rows, ImageTokens) else []
        super().__init__(model, callbacks=[*callbacks, *ours, *([clock] if clock else [])], **(defaults | kwargs))
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

    def get_eval_dataloader(self, eval_dataset=None):
        """As `Trainer`'s, but of all images: it would drop the last ones with --dataloader_drop_last."""
        with self.dropping_nothing():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As `Trainer`'s, but of all images: it would drop the last ones with --dataloader_drop_last."""
        with self.dropping_nothing():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def dropping_nothing(self):
        """Within it loaders are built for all images."""
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drops

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As `Trainer`'s; a loss that is not finite ends the run with a `NotFinite` error and the images it came from."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            folder = Path(self.args.output_dir) / f"not-finite-{self.args.process_index}"
            folder.mkdir(parents=True, exist_ok=True)
            tokens = inputs[TOKENS if self.classifies else "labels"]
            for index, image in enumerate(self.processing_class.decode(tokens)):
                image.save(folder / f"{index}.png")
            self.stop_diverged(f"The loss is {loss.item()}; the images it came from are in {folder}")
        return loss

    def stop_diverged(self, what: str):
        """End the run with a `NotFinite` error that begins with `what`."""
        (rate, *_) = self.lr_scheduler.get_last_lr()
        raise NotFinite(
            f"{what}. The run has diverged after step {self.state.global_step}, at a learning rate of {rate:.3g}: the "
            "checkpoints before are kept. Give another --output_dir and a lower --learning_rate, or more --warmup_steps."
        )

    def save_model(self, output_dir=None, _internal_call=False):
        """As `Trainer`'s. Of sharded weights, which it would leave out: in checkpoints, whose shards are written with the
        optimiser's, all but the weights; elsewhere the whole model, as `from_pretrained` reads it."""
        if self.state.global_step and not all(weight.isfinite().all() for weight in self.model.parameters()):
            self.stop_diverged("Weights are not finite")
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
        """Whether a checkpoint's weights are one file for each process (FSDP's SHARDED_STATE_DICT)."""
        return self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(loss, values of each image (B,), labels (B,)): nats per pixel, or for classifiers the predicted class.

        A joint classifier's values are (class, nats per pixel). Whole logits of all images would not fit in memory.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        labels = inputs["labels"]
        if not self.classifies:
            nats = nats_per_image(outputs.logits, labels, inputs.get(MASK))
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
                logs[bits] = logs[name] * BITS_PER_NAT
        super().log(logs, start_time)

    def images_seen(self, step: int) -> int:
        """Images that the first `step` steps were made of; an epoch's last step may hold fewer than the others."""
        per_step = self.args.images_per_step()
        if not has_length(self.train_dataset):
            return step * per_step
        n_images = len(self.train_dataset)
        epochs, steps = divmod(step, self.args.steps_per_epoch(n_images))
        if self.args.dataloader_drop_last:
            per_batch = self.args.train_batch_size * self.args.world_size
            n_images -= n_images % per_batch
        return epochs * n_images + steps * per_step

    @property
    def measured_step(self) -> int:
        """The step whose weights the model has after training: the best one's, or the last where none was chosen."""
        state = self.state
        is_best = self.args.load_best_model_at_end and state.best_model_checkpoint
        return (is_best and state.best_global_step) or state.global_step

    def push_to_hub(self, commit_message="End of training", *, token=None, revision=None):
        """Save the model and publish `output_dir` as a complete repository, not the folder as it is.

        token, revision: instead of --hub_token and --hub_revision.
        """
        if self.publish is None:
            raise ValueError("This Trainer cannot publish: build it with publish=hf_igpt.hub.push.")
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            return self.publish_folder(Path(self.args.output_dir), commit_message, token, revision)

    def publish_folder(self, folder: Path, message: str, token: str | None = None, revision: str | None = None):
        """Publish a folder of this run under --hub_model_id, in one commit."""
        args = self.args
        return self.publish(
            folder,
            self.hub_model_id,
            message=message,
            token=token or args.hub_token,
            revision=revision or args.hub_revision,
        )

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.clock is None or self.args.lr_scheduler_type != "cosine":
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step):
            clock = self.clock.fraction()
            warmed = max((step + 1) / (warmup + 1), clock / WARMUP_SHARE)
            return min(1, warmed) * 0.5 * (1 + math.cos(math.pi * min(1, max(step / num_training_steps, clock))))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler


def held_out_metrics(prediction) -> dict[str, float]:
    """Mean over images, gathered over all processes: exact also if the last batches are ragged."""
    return {"nats_per_pixel": float(np.mean(prediction.predictions, dtype=np.float64))}


def classification_metrics(prediction) -> dict[str, float]:
    """Accuracy, and the mean nats per pixel if the loss is joint."""
    values = prediction.predictions
    classes, nats = values if isinstance(values, tuple) else (values, None)
    metrics = {"accuracy": accuracy(classes, prediction.label_ids)}
    return metrics if nats is None else metrics | {"nats_per_pixel": float(np.mean(nats, dtype=np.float64))}
