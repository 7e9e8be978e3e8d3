"""Training: single steps on a CPU, `Trainer` from end to end on a GPU, beside transformers' model."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from arguments import BenchmarkArguments
from hf_igpt.evaluation.records import Record
from limits import build_causal_products
from side_by_side import build_models, check_same, draw_tokens, read_shape, shift_after_sos
from stages import LIMIT, OURS, THEIRS, Contender, Stage
from timing import measure_peak_memory, take_turns
from train_with_trainer import time_trainers


def time_training(args: BenchmarkArguments) -> Iterator[list[Record]]:
    """Time what trains on this device, stage by stage."""
    if args.device == "cuda":
        for size in ("s", "m"):
            yield time_trainers(args, size)
    else:
        yield from time_steps(args)


def time_steps(args: BenchmarkArguments) -> Iterator[list[Record]]:
    """Time training steps of four images: as they come, compiled, in bfloat16 and with gradient checkpointing."""
    batch_size, shape = 4, read_shape(args)
    ours, theirs = build_models("cpu", **shape)
    tokens = draw_tokens(ours.config, batch_size, "cpu")
    inputs = shift_after_sos(tokens, ours.config)

    def compute_our_loss(model: Callable) -> torch.Tensor:
        return model(labels=tokens).loss

    def compute_their_loss(model: Callable) -> torch.Tensor:
        logits = model(input_ids=inputs, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1), tokens.flatten())

    plain = {
        Contender(THEIRS): build_step(theirs, lambda: compute_their_loss(theirs)),
        Contender(OURS): build_step(ours, lambda: compute_our_loss(ours)),
    }
    compiled, in_bfloat16 = {}, {}
    if args.compile:
        our_compiled, their_compiled = torch.compile(ours, fullgraph=True), torch.compile(theirs)
        compiled = {
            Contender(THEIRS, "compiled"): build_step(theirs, lambda: compute_their_loss(their_compiled)),
            Contender(OURS, "compiled"): build_step(ours, lambda: compute_our_loss(our_compiled)),
        }
        autocast = torch.autocast("cpu", torch.bfloat16)
        in_bfloat16 = {
            Contender(OURS, "compiled bf16"): build_step(ours, lambda: compute_our_loss(our_compiled), autocast)
        }

    def check_steps(contenders: dict[Contender, Callable], tolerance: float = 1e-4) -> None:
        """Check that losses and gradients are those of transformers as it comes."""
        expected = plain[Contender(THEIRS)]()
        gradients = [parameter.grad.clone() for parameter in theirs.parameters()]
        for contender, run in contenders.items():
            check_same(f"Losses of {contender}", run(), expected, tolerance)
            model = theirs if contender.system == THEIRS else ours
            for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
                check_same(f"Gradients of {contender}, {name},", parameter.grad, gradient, tolerance)

    check_steps(plain)
    if args.compile:
        check_steps(compiled)
        check_steps(in_bfloat16, tolerance=0.05)
    stage = Stage("training step", batch_size, "random tokens", shape, batch_size=batch_size)
    memory = {contender: measure_peak_memory(run) for contender, run in (plain | compiled).items()}
    limit = {Contender(LIMIT): build_causal_products(ours, batch_size, backward=True)}
    seconds = take_turns(plain | compiled | in_bfloat16 | limit, args.repeats)
    yield stage.record_times(seconds) + stage.record_memory(memory)

    for model in (ours, theirs):
        model.gradient_checkpointing_enable()
    stage = Stage("training step, gradient checkpointing", batch_size, "random tokens", shape, batch_size=batch_size)
    check_steps(plain)
    memory = {contender: measure_peak_memory(run) for contender, run in plain.items()}
    yield stage.record_times(take_turns(plain, args.repeats)) + stage.record_memory(memory)


def build_step(
    model: PreTrainedModel,
    compute_loss: Callable[[], torch.Tensor],
    autocast: AbstractContextManager | None = None,
) -> Callable[[], torch.Tensor]:
    """Return a training step that gives its loss. Its learning rate is 0, so that all steps do the same."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with autocast or nullcontext():
            loss = compute_loss()
        loss.backward()
        optimizer.step()
        return loss

    return step
