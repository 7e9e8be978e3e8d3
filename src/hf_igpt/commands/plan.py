"""`scripts/run_plan.py`: what training will take, before it is begun: FLOPs, memory of a device, steps, hours."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..configuration_imagegpt import ImageGPTConfig
from ..data.arguments import name_image_size, parse_image_size
from ..evaluation.records import describe_model, read_records, whole_file
from ..presets import SIZES
from ..training.costs import (
    GIB,
    Memory,
    executed_flops,
    find_largest_micro_batch,
    measure_weights,
    step_memory,
    training_flops,
)
from .arguments import MOST, PlanArguments


USABLE = 0.9  # ours, of a device's memory: its context, libraries' workspaces and fragmentation take the rest


@dataclass(frozen=True)
class Plan:
    """One way of training one size. `memory` is of `micro_batch` images; None where something was not asked for.

    image_size: as `--image_size` takes it, 32 or "32x16". flops: model FLOPs of the whole training. largest_micro_batch: the largest that fits and shares the batch evenly, 0
    if not even one image fits. hours: of training alone, without evaluation, checkpoints and waiting for data.
    """

    size: str
    image_size: int | str
    devices: int
    sharded: bool
    checkpointing: bool
    micro_batch: int
    accumulation: int
    memory: Memory
    fits: bool | None
    largest_micro_batch: int | None
    batch_size: int
    steps: int
    epochs: float | None
    flops: float
    hours: float | None


def plan(args: PlanArguments) -> list[Plan]:
    """Print `options` as tables, and return them; `--output_json` holds them too."""
    plans = options(args)
    sources = {size: find_throughput(args, size)[1] for size in args.size}
    for size in args.size:
        config, first = make_config(args, size), next(option for option in plans if option.size == size)
        epochs = "" if first.epochs is None else f" ({first.epochs:.4g} epochs)"
        print(
            f"{size}, {config.objective}, {'x'.join(map(str, parse_image_size(first.image_size)))}, {args.num_colors} colours: "
            f"{measure_weights(config.to_json_string())[0] // 4:,} parameters, {first.steps:,} steps of {first.batch_size} images{epochs}, "
            f"{training_flops(config) / 1e12:.4g} TFLOP an image, {first.flops / 86400e15:.4g} petaflop/s-days"
            + (f"; {sources[size]}" if sources[size] else "")
        )
    print(f"\nGiB on each device, {'bfloat16 autocast' if args.bf16 else 'float32'}:\n\n{memory_table(plans)}")
    print(f"\n{run_table(plans)}")
    if args.memory_gib is None:
        print("\nWhat fits: --memory_gib of a device.")
    else:
        print()
        for option in simplest_that_fits(plans):
            print(f"{option.size}: {flags(option) if option.fits else 'nothing fits; more devices, or larger ones'}")
    if not any(sources.values()):
        print("\nHours: --tflops of a device, or --records.")
    if args.output_json:
        path = Path(args.output_json)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [asdict(option) | {"memory_bytes": option.memory.total} for option in plans]
        with whole_file(path) as partial:
            partial.write_text(json.dumps({"arguments": asdict(args), "plans": found}, indent=1) + "\n")
        print(f"\nWrote {path}")
    return plans


def options(args: PlanArguments) -> list[Plan]:
    """Every way of training each size, simplest first: replicated or sharded, without recomputing and with.

    ValueErrors before any of it is worked out: batch, devices and accumulation do not go together, epochs have no number
    of images, no record tells the throughput.
    """
    for size in args.size:
        share_batch(args, size)
        find_throughput(args, size)
    return [option for size in args.size for option in list_plans_of(args, size)]


def flags(option: Plan) -> str:
    """The flags of `run_pretrain.py` that train by this plan, and what else it takes."""
    given = f"--per_device_train_batch_size {option.micro_batch} --gradient_accumulation_steps {option.accumulation}"
    given += " --gradient_checkpointing" if option.checkpointing else ""
    if option.sharded and option.accumulation > 1:  # else FSDP2 keeps whole gradients between accumulated steps
        given += """ --accelerator_config '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}'"""
    processes = f", {option.devices} processes" if option.devices > 1 else ""
    return given + processes + (", sharded (FSDP2)" if option.sharded else "")


def simplest_that_fits(plans: list[Plan]) -> list[Plan]:
    """Of each size the first plan that fits, or the last, which does not: it needs the least memory."""
    found: dict[str, Plan] = {}
    for option in plans:
        if option.size not in found or not found[option.size].fits:
            found[option.size] = option
    return list(found.values())


def memory_table(plans: list[Plan]) -> str:
    """Plans as a Markdown table: GiB on each device, by part."""
    parts = ("parameters", "gradients", "optimizer", "exchange", "activations", "logits", "backward")
    lines = [f"| size | weights | checkpointing | images at once | {' | '.join(parts)} | total |"]
    lines += ["|---" * (5 + len(parts)) + "|"]
    for option in plans:
        cells = [f"{getattr(option.memory, part) / GIB:.2f}" for part in parts]
        lines.append(
            f"| {option.size} | {name_layout(option)} | {'yes' if option.checkpointing else 'no'} | {option.micro_batch} | "
            f"{' | '.join(cells)} | {option.memory.total / GIB:.1f} |"
        )
    return "\n".join(lines)


def run_table(plans: list[Plan]) -> str:
    """Plans as a Markdown table: how the batch is shared, whether it fits, and if so hours."""
    lines = ["| size | weights | checkpointing | devices x images x accumulation | GiB | fits | hours | device-hours |"]
    lines += ["|---" * 8 + "|"]
    for option in plans:
        fits = {None: "", True: "yes", False: "no"}[option.fits]
        if option.largest_micro_batch:
            fits += f", up to {option.largest_micro_batch}"
        hours = device_hours = ""
        if option.hours is not None and option.fits is not False:
            hours = f"{option.hours:,.{1 if option.hours < 100 else 0}f}"
            device_hours = f"{option.hours * option.devices:,.0f}"
        lines.append(
            f"| {option.size} | {name_layout(option)} | {'yes' if option.checkpointing else 'no'} | "
            f"{option.devices} x {option.micro_batch} x {option.accumulation} | {option.memory.total / GIB:.1f} | {fits} | "
            f"{hours} | {device_hours} |"
        )
    return "\n".join(lines)


def name_layout(option: Plan) -> str:
    return "sharded" if option.sharded else "replicated"


def choose_grid(args: PlanArguments, size: str) -> tuple[int, int]:
    """(height, width): the given --image_size, or that of the size's recipe."""
    published = min(pixels for objective, pixels in SIZES[size].learning_rate if objective == args.objective)
    return parse_image_size(args.image_size or published)


def make_config(args: PlanArguments, size: str) -> ImageGPTConfig:
    grid = choose_grid(args, size)
    return ImageGPTConfig.from_preset(size, image_size=grid, n_colors=args.num_colors, objective=args.objective)


def share_batch(args: PlanArguments, size: str) -> tuple[int, int, int, float | None]:
    """Images in a batch, and on one device at a time; optimiser steps; epochs where the number of images is known."""
    recipe = SIZES[size]
    batch_size = args.batch_size or recipe.batch_size
    share, rest = divmod(batch_size, args.devices * (args.gradient_accumulation_steps or 1))
    if rest:
        accumulated = args.gradient_accumulation_steps
        raise ValueError(
            f"A batch of {batch_size} images cannot be shared by {args.devices} devices"
            + (f" and {accumulated} accumulated steps" if accumulated else "")
            + ": give another --batch_size, of which they take equal parts."
        )
    epochs, steps = args.epochs, args.max_steps
    if epochs is None and steps is None:
        epochs, steps = recipe.num_epochs, recipe.max_steps
    if steps is None:
        epochs = epochs or 1.0
        if args.images is None:
            raise ValueError(f"{epochs:g} epochs of how many images? Give --images, or --max_steps.")
        steps = math.ceil(epochs * math.ceil(args.images / batch_size))
    return batch_size, share, steps, None if args.images is None else steps * batch_size / args.images


def list_plans_of(args: PlanArguments, size: str) -> list[Plan]:
    config = make_config(args, size)
    batch_size, share, steps, epochs = share_batch(args, size)
    rate = find_throughput(args, size)[0]
    plans = []
    for checkpointing, sharded in ((False, False), (False, True), (True, False), (True, True)):
        if sharded and args.devices == 1:
            continue
        layout: dict[str, Any] = {
            "devices": args.devices,
            "sharded": sharded,
            "checkpointing": checkpointing,
            "bf16": args.bf16,
        }
        largest = None
        if args.memory_gib is not None:
            largest = find_largest_micro_batch(
                config, batch_size // args.devices, args.memory_gib * GIB * USABLE, **layout
            )
        micro_batch = share
        if args.gradient_accumulation_steps is None and largest is not None:
            micro_batch = max(1, largest)
        hours = None
        if rate is not None:
            flops = steps * executed_flops(config, batch_size, checkpointing)
            hours = flops / (args.devices * rate) / 3600
        plans.append(
            Plan(
                size=size,
                image_size=name_image_size(choose_grid(args, size)),
                devices=args.devices,
                sharded=sharded,
                checkpointing=checkpointing,
                micro_batch=micro_batch,
                accumulation=batch_size // args.devices // micro_batch,
                memory=step_memory(config, micro_batch, **layout),
                fits=None if largest is None else micro_batch <= largest,
                largest_micro_batch=largest,
                batch_size=batch_size,
                steps=steps,
                epochs=epochs,
                flops=training_flops(config, steps * batch_size),
                hours=hours,
            )
        )
    return plans


def find_throughput(args: PlanArguments, size: str) -> tuple[float | None, str]:
    """FLOPs that one device executes a second, and where that is from."""
    if args.tflops is not None:
        return args.tflops * 1e12, f"{args.tflops:g} TFLOP/s achieved"
    if args.records is None:
        return None, ""
    return read_throughput(args, size, args.records)


def read_throughput(args: PlanArguments, size: str, file: str) -> tuple[float, str]:
    """The fastest record that tells of such training.

    `images_per_second`, unit images/s, whose fields name size, image size, objective, precision, devices and gradient
    checkpointing (by default causal, the plan's, 1 and False); or `tflops_per_second`, unit TFLOP/s, per device, in
    `training_flops`, of any model.
    """
    config, precision = make_config(args, size), "bfloat16 autocast" if args.bf16 else "float32"
    grid = choose_grid(args, size)
    rates = []
    try:
        records = read_records(file)
    except ValueError as error:
        raise ValueError(
            f"{error}. It cannot be planned with: images_per_second is a positive number of images/s, devices a number"
        ) from error
    for record in records:
        model = (record.size, record.image_size, record.objective or "causal")
        wanted = (size, grid, config.objective)
        speed = record.metric == "tflops_per_second" or (record.metric == "images_per_second" and model == wanted)
        if not speed or (record.precision or precision) != precision:
            continue
        devices = 1 if record.devices is None else record.devices
        checkpointing = False if record.gradient_checkpointing is None else record.gradient_checkpointing
        unit = {"images_per_second": "images/s", "tflops_per_second": "TFLOP/s"}[record.metric]
        number = isinstance(record.value, (int, float)) and 0 < record.value <= MOST
        counts = type(devices) is int and devices >= 1 and type(checkpointing) is bool
        if not (number and record.unit == unit and counts):
            raise ValueError(
                f"A record of {args.records} cannot be planned with: {record.metric} is a positive number of {unit}, devices a "
                f"number from 1 on, gradient_checkpointing true or false; found {record.value!r} {record.unit}, {devices!r}, "
                f"{checkpointing!r}."
            )
        recomputed = executed_flops(config, 1, checkpointing)
        if record.metric == "images_per_second":
            rates.append((record.value / devices * recomputed, record))
        else:
            rates.append((record.value * 1e12 * recomputed / training_flops(config), record))
    if not rates:
        raise ValueError(
            f"{args.records} has no images_per_second of {size} at {name_image_size(grid)} pixels, {config.objective}, "
            f"{precision}, nor tflops_per_second: measure one, or give --tflops."
        )
    rate, record = max(rates, key=lambda pair: pair[0])
    return rate, f"{record.value:.4g} {record.unit} measured, {describe_model(record)}, {record.hardware}"
