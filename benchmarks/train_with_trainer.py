"""`Trainer` from end to end: what the training suite runs on a GPU."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import timer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from arguments import BenchmarkArguments
from hf_igpt import ImageGPTConfig
from hf_igpt.evaluation.records import Record
from hf_igpt.training.costs import training_flops
from hf_igpt.training.trainer import ImageGPTTrainer
from limits import PEAK_TFLOPS, find_peak
from side_by_side import build_models, check_same, draw_tokens, shift_after_sos
from stages import LIMIT, OURS, THEIRS, Contender, Stage


@dataclass(order=True)
class Run:
    """A training run: the seconds of a step, and the settings it had. The fastest compares lowest."""

    seconds: float
    micro_batch: int
    compiled: bool


def time_trainers(
    args: BenchmarkArguments, size: str, batch_size: int = 128, steps: int = 30, config: ImageGPTConfig | None = None
) -> list[Record]:
    """Time `Trainer` on our model and theirs, each in its fastest setting that works.

    config: the model; by default the preset of `size`.
    """
    config = config or ImageGPTConfig.from_preset(size)
    shape = {name: getattr(config, name) for name in ("n_layer", "n_embd", "n_head", "n_positions")}
    ours, theirs = build_models(args.device, config.vocab_size - 1, **shape)
    with torch.no_grad():
        inputs = shift_after_sos(draw_tokens(config, 2, args.device), config)
        check_same("Logits", ours(input_ids=inputs).logits, theirs(input_ids=inputs).logits, 1e-3)
    our_run = find_fastest_run(ImageGPTTrainer, ours, ("labels",), batch_size, steps, args.compile)
    their_run = find_fastest_run(Trainer, theirs, ("input_ids", "labels"), batch_size, steps, args.compile)
    stage = Stage(
        f"Trainer, {size}",
        batch_size,
        "random tokens",
        batch_size=batch_size,
        size=size,
        image_size=math.isqrt(config.n_positions),
        precision="bfloat16 autocast" if args.device == "cuda" else "float32",
        details={
            "micro-batch": our_run.micro_batch,
            "compiled": our_run.compiled,
            "their micro-batch": their_run.micro_batch,
            "their compilation": their_run.compiled,
        },
    )
    flops, peak = training_flops(config, batch_size), find_peak(PEAK_TFLOPS)
    seconds = {Contender(OURS): [our_run.seconds], Contender(THEIRS): [their_run.seconds]}
    if peak is not None:
        seconds[Contender(LIMIT)] = [flops / (peak * 1e12)]
    images_per_second, tflops = batch_size / our_run.seconds, flops / our_run.seconds / 1e12
    return [
        *stage.record_times(seconds),
        stage.record("images_per_second", images_per_second, "images/s", Contender(OURS)),
        stage.record("tflops_per_second", tflops, "TFLOP/s", Contender(OURS)),
    ]


def find_fastest_run(
    trainer: type[Trainer], model: PreTrainedModel, fields: tuple[str, ...], batch_size: int, steps: int, compile: bool
) -> Run:
    """Return the fastest run: compiled or not, each with the largest micro-batch that fits into memory."""
    runs = []
    for compiled in (True, False) if compile else (False,):
        micro_batch = batch_size
        while micro_batch:
            try:
                seconds = measure_step(trainer, model, fields, batch_size, micro_batch, steps, compiled)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                micro_batch //= 2
            else:
                runs.append(Run(seconds, micro_batch, compiled))
                break
        torch.compiler.reset()
    return min(runs)


def measure_step(
    trainer: type[Trainer],
    model: PreTrainedModel,
    fields: tuple[str, ...],
    batch_size: int,
    micro_batch: int,
    steps: int,
    compiled: bool,
) -> float:
    """Return the seconds of a step of `batch_size` images in `Trainer`, from uint16 tokens in a memory map.

    fields: what the model is called with; each is the tokens. The first third of the steps warms up.
    """
    on_gpu = model.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokens.npy")
        np.save(path, draw_tokens(model.config, 4 * batch_size, "cpu").numpy().astype(np.uint16))
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=batch_size // micro_batch,
            max_steps=steps,
            bf16=on_gpu,
            torch_compile=compiled,
            use_cpu=not on_gpu,
            dataloader_num_workers=4 if on_gpu else 0,
            dataloader_pin_memory=on_gpu,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        stopwatch = Stopwatch(steps // 3)
        trainer(
            model=model,
            args=arguments,
            train_dataset=np.load(path, mmap_mode="r"),
            data_collator=build_collator(fields),
            callbacks=[stopwatch],
        ).train()
    return stopwatch.seconds_per_step


def build_collator(fields: tuple[str, ...]) -> Callable[[list[np.ndarray]], dict[str, torch.Tensor]]:
    """Return a collator that gives the tokens under each of the names."""

    def collate(rows: list[np.ndarray]) -> dict[str, torch.Tensor]:
        return dict.fromkeys(fields, torch.from_numpy(np.stack(rows)).long())

    return collate


class Stopwatch(TrainerCallback):
    """Measures the steps after the first `warm_up`."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.start, self.seconds_per_step = warm_up, math.nan, math.nan

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.warm_up:
            self.start = timer()
        elif state.global_step == state.max_steps:
            self.seconds_per_step = (timer() - self.start) / (state.max_steps - self.warm_up)
