"""What training will take, before it is begun: FLOPs, memory of a device, steps, hours, cost. Nothing here is measured.

Memory is what PyTorch would hold: a training step is run on tensors without storage, and every byte is counted. Conventions:
a multiply-add is two FLOPs; backward is twice forward; GiB are 2³⁰ bytes, of which a device has less than its name says.
"""

import json
import math
import warnings
import weakref
from bisect import bisect
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .clusters import MAX_COLORS
from .configuration_imagegpt import ImageGPTConfig
from .evaluation.records import describe_model, read_records
from .layers_imagegpt import ImageGPTLayerNorm
from .modeling_imagegpt import ImageGPTForCausalImageModeling, ImageGPTForMaskedImageModeling
from .presets import N_COLORS, SIZES


GIB = 2**30
_MOST = 1e15  # of anything that is counted
USABLE = 0.9  # ours, of a device's memory: its context, libraries' workspaces and fragmentation take the rest
_MODELS = {"causal": ImageGPTForCausalImageModeling, "masked": ImageGPTForMaskedImageModeling}


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def forward_flops(config: ImageGPTConfig, n_images: int = 1) -> float:
    """FLOPs of the matrix products of one forward pass over `n_images` images of N pixels.

    2 · parameters · N for the blocks' matrices and the colour head (embeddings are looked up, not multiplied), and
    4 · L · D · N² for attention: q·k and weights·v, every pixel with every other. Of a causal model half of that, which is
    what a kernel that skips the masked half does. Norms, activations and softmax are left out, as is usual.
    """
    n_pixels, head = config.n_positions, config.n_embd * (config.vocab_size - 1)
    attention = 4 * config.n_layer * config.n_embd * n_pixels**2 / (2 if config.objective == "causal" else 1)
    return float(n_images * (2 * (_block_matrices(config) + head) * n_pixels + attention))


def training_flops(config: ImageGPTConfig, n_images: int = 1) -> float:
    """FLOPs of forward and backward, three times `forward_flops`: what "model FLOPs" means; recomputing is not counted."""
    return 3 * forward_flops(config, n_images)


def executed_flops(config: ImageGPTConfig, n_images: int = 1, checkpointing: bool = False) -> float:
    """`training_flops`, and with gradient checkpointing a second forward pass of all blocks."""
    head = 2 * config.n_embd * (config.vocab_size - 1) * config.n_positions * n_images
    return training_flops(config, n_images) + (forward_flops(config, n_images) - head if checkpointing else 0)


def _block_matrices(config) -> int:
    """Entries of all blocks' weight matrices."""
    n_inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
    return config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * n_inner)


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a training step.

    parameters: float32, with buffers. gradients: float32, all of them. optimizer: AdamW's two moments. exchange: what
    processes send each other. activations: what autograd keeps of the embeddings and blocks when the head is reached,
    without checkpointing 16 widths per pixel and block. logits: the head and the loss. backward: how much
    higher backward rises, with checkpointing by a block that is recomputed.
    """

    parameters: int
    gradients: int
    optimizer: int
    exchange: int
    activations: int
    logits: int
    backward: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def step_memory(
    config: ImageGPTConfig,
    micro_batch: int,
    *,
    devices: int = 1,
    sharded: bool = False,
    checkpointing: bool = False,
    bf16: bool = False,
) -> Memory:
    """Memory of one of `devices` that trains on `micro_batch` images at a time, by `Trainer` with fused AdamW.

    sharded: parameters, gradients and moments split over the devices, one unit for each block (FSDP2, ZeRO-3), gradients
    also between accumulated steps (accelerate's `sync_each_batch`); else replicated (DDP). bf16: `--bf16`, autocast over float32 weights; sharded, the
    blocks' weights are gathered in bfloat16 and so is the residual stream. Attention is a fused kernel's, without N²
    matrices. Gradients are counted in full: a step without accumulation starts without them, and its peak may be lower
    by no more than that.
    ValueError: no micro-batch, no device, or sharding over a single one.
    """
    if micro_batch < 1 or devices < 1:
        raise ValueError(f"A micro-batch and devices are at least 1; found {micro_batch} and {devices}.")
    if sharded and devices == 1:
        raise ValueError("Sharding splits a model over several devices; found 1: leave `sharded` out.")
    parameters, buffers, block = _weights(config.to_json_string())
    rest = parameters - config.n_layer * block
    precision = "float32" if not bf16 else "bfloat16" if sharded else "autocast"
    activations, forward, backward = _activations(config, micro_batch, checkpointing, precision)
    share = devices if sharded else 1
    if sharded:  # of gathered weights: the root's, a block's, the next one's; of gradients: a block's, and what is sent
        exchange = (rest + 2 * block + 2 * block) // (2 if bf16 else 1)
    else:  # DDP's buckets are as large as the gradients
        exchange = parameters if devices > 1 else 0
    return Memory(
        parameters=math.ceil(parameters / share) + buffers,
        gradients=math.ceil(parameters / share),
        optimizer=2 * math.ceil(parameters / share),
        exchange=exchange,
        activations=activations,
        logits=forward - activations,
        backward=max(0, backward - forward),
    )


@lru_cache(maxsize=64)
def _weights(config_json: str) -> tuple[int, int, int]:
    """Bytes in float32 of all parameters, all buffers, and one block's parameters."""
    config = ImageGPTConfig(**json.loads(config_json))
    with torch.device("meta"):
        model = _MODELS[config.objective](config)

    def size(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    return size(model.parameters()), size(model.buffers()), size(model.transformer.h[0].parameters())


def _activations(config, micro_batch, checkpointing, precision) -> tuple[int, int, int]:
    """Bytes beyond weights, gradients and moments: before the head, at forward's peak, at backward's peak.

    All blocks are alike: each beyond the first adds the same to each of the three.
    """
    one, two = (
        _trace(
            ImageGPTConfig(**(json.loads(config.to_json_string()) | {"n_layer": n_layer})).to_json_string(),
            micro_batch,
            checkpointing,
            precision,
        )
        for n_layer in (1, 2)
    )
    return tuple(first + (config.n_layer - 1) * (second - first) for first, second in zip(one, two, strict=True))


@lru_cache(maxsize=1024)
def _trace(config_json: str, micro_batch: int, checkpointing: bool, precision: str):
    """One forward and backward pass on tensors without storage, as `Trainer` runs it; bytes as in `_activations`."""
    config = ImageGPTConfig(**json.loads(config_json))
    with FakeTensorMode():
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        model = _MODELS[config.objective]._from_config(config, dtype=dtype).train()
        if checkpointing:
            with warnings.catch_warnings():  # it has another name from transformers 5.23 on
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, ImageGPTLayerNorm):
                module.forward = lambda x, weight=module.weight: _FusedNorm.apply(x, weight)
        batch = {"labels": torch.zeros(micro_batch, config.n_positions, dtype=torch.long)}
        if config.objective == "masked":
            batch["bool_masked_pos"] = torch.zeros(micro_batch, config.n_positions, dtype=torch.bool)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        known = [*batch.values(), *model.buffers()]
        known += [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
        forward = model.forward
        if precision != "float32":
            forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(forward))
        before_head = []
        with _LiveBytes(known) as live:
            model.lm_head.register_forward_pre_hook(lambda *_: before_head.append(live.now))
            loss = forward(**batch).loss
            forward_peak, live.peak = live.peak, live.now
            loss.backward()
    return before_head[0], forward_peak, live.peak


class _FusedNorm(torch.autograd.Function):
    """The memory of a norm in CUDA's kernel. CPUs', which a trace would take, keep their output a second time, in float32."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes that operations allocate, until they are freed: `now`, and at their `peak`."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, storage, size):
        self.known.discard(storage)
        self.now -= size


# -- plans -------------------------------------------------------------------------------------------------------------


@dataclass
class PlanArguments:
    """What is to be trained, on what. None means the preset of --size."""

    size: list[str] = field(default_factory=lambda: ["s"], metadata={"help": f"Sizes to plan for: {', '.join(SIZES)}."})
    objective: str = field(
        default="causal",
        metadata={"help": "causal or masked: half of a causal model's attention is masked.", "choices": list(_MODELS)},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Height = width in pixels. Default: of the paper's recipe, 64 for xl, else 32."}
    )
    num_colors: int = field(default=N_COLORS, metadata={"help": "Colours K of the palette."})
    images: float | None = field(
        default=None, metadata={"help": "Images in the dataset, 1.28e6 for example. Needed where epochs are counted."}
    )
    epochs: float | None = field(default=None, metadata={"help": "Epochs. Default: the preset's."})
    max_steps: int | None = field(default=None, metadata={"help": "Optimiser steps. Default: the preset's."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Images in an optimiser step, over all devices. Default: the preset's."}
    )
    devices: int = field(default=1, metadata={"help": "Devices, one process each."})
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Default: the fewest that --memory_gib holds, or 1."}
    )
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast over float32 weights, as run_pretrain.py."})
    memory_gib: float | None = field(
        default=None, metadata={"help": "Memory of a device in GiB: says what fits. An H100 of 80 GB reports 79."}
    )
    usable: float = field(default=USABLE, metadata={"help": "Fraction of the memory that tensors may take."})
    tflops: float | None = field(
        default=None, metadata={"help": "Achieved TFLOP/s per device, including recomputation."}
    )
    peak_tflops: float | None = field(
        default=None, metadata={"help": "Or what a device could at most, of which --utilization is achieved."}
    )
    utilization: float | None = field(default=None, metadata={"help": "Fraction of --peak_tflops, 0.4 for example."})
    records: str | None = field(
        default=None,
        metadata={"help": "Or a file of measured records: images_per_second of such a model, or tflops_per_second."},
    )
    cost_per_device_hour: float | None = field(default=None, metadata={"help": "Price, in any currency."})
    output_json: str | None = field(default=None, metadata={"help": "File to which the plans are written too."})

    def __post_init__(self):
        for size in self.size:
            if size not in SIZES:
                raise ValueError(f"No preset {size!r}: the sizes are {', '.join(SIZES)}.")
        counts = (
            "image_size",
            "num_colors",
            "images",
            "max_steps",
            "batch_size",
            "devices",
            "gradient_accumulation_steps",
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and not (1 <= value <= _MOST and value == int(value)):
                raise ValueError(f"--{name} is a whole number from 1 to {_MOST:g}; found {value:g}.")
        for name in ("epochs", "memory_gib", "tflops", "peak_tflops", "cost_per_device_hour"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _MOST:
                raise ValueError(f"--{name} is positive, at most {_MOST:g}; found {value:g}.")
        if self.num_colors > MAX_COLORS:
            raise ValueError(f"--num_colors is at most {MAX_COLORS}; found {self.num_colors}.")
        for name in ("usable", "utilization"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"--{name} is a fraction, over 0 and up to 1; found {value:g}.")
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("--epochs and --max_steps both say how long to train: give one of them.")
        if (self.peak_tflops is None) != (self.utilization is None):
            raise ValueError("--peak_tflops and --utilization go together: give both, or --tflops.")
        given = [name for name in ("tflops", "peak_tflops", "records") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"One throughput is enough: give one of {', '.join(f'--{name}' for name in given)}.")
        if self.cost_per_device_hour is not None and not given:
            raise ValueError("A cost needs hours: give --tflops, --peak_tflops with --utilization, or --records.")


@dataclass(frozen=True)
class Plan:
    """One way of training one size. `memory` is of `micro_batch` images; None where something was not asked for.

    flops: model FLOPs of the whole training. largest_micro_batch: the largest that fits and shares the batch evenly, 0
    if not even one image fits. hours: of training alone, without evaluation, checkpoints and waiting for data.
    """

    size: str
    image_size: int
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
    cost: float | None


def plan(args: PlanArguments) -> list[Plan]:
    """Print `options` as tables, and return them; `--output_json` holds them too."""
    plans = options(args)
    sources = {size: _throughput(args, size)[1] for size in args.size}
    for size in args.size:
        config, first = _config(args, size), next(option for option in plans if option.size == size)
        epochs = "" if first.epochs is None else f" ({first.epochs:.4g} epochs)"
        print(
            f"{size}, {config.objective}, {first.image_size}x{first.image_size}, {args.num_colors} colours: "
            f"{_weights(config.to_json_string())[0] // 4:,} parameters, {first.steps:,} steps of {first.batch_size} images{epochs}, "
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
        print("\nHours: --tflops of a device, --peak_tflops and --utilization, or --records.")
    if args.output_json:
        path = Path(args.output_json)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [asdict(option) | {"memory_bytes": option.memory.total} for option in plans]
        path.write_text(json.dumps({"arguments": asdict(args), "plans": found}, indent=1) + "\n")
        print(f"\nWrote {path}")
    return plans


def options(args: PlanArguments) -> list[Plan]:
    """Every way of training each size, simplest first: replicated or sharded, without recomputing and with.

    ValueErrors before any of it is worked out: batch, devices and accumulation do not go together, epochs have no number
    of images, no record tells the throughput.
    """
    for size in args.size:
        _shares(args, size)
        _throughput(args, size)
    return [option for size in args.size for option in _options(args, size)]


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
    found = {}
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
            f"| {option.size} | {_weights_word(option)} | {'yes' if option.checkpointing else 'no'} | {option.micro_batch} | "
            f"{' | '.join(cells)} | {option.memory.total / GIB:.1f} |"
        )
    return "\n".join(lines)


def run_table(plans: list[Plan]) -> str:
    """Plans as a Markdown table: how the batch is shared, whether it fits, and if so hours and cost."""
    lines = [
        "| size | weights | checkpointing | devices x images x accumulation | GiB | fits | hours | device-hours | cost |"
    ]
    lines += ["|---" * 9 + "|"]
    for option in plans:
        fits = {None: "", True: "yes", False: "no"}[option.fits]
        if option.largest_micro_batch:
            fits += f", up to {option.largest_micro_batch}"
        hours = device_hours = cost = ""
        if option.hours is not None and option.fits is not False:
            hours = f"{option.hours:,.{1 if option.hours < 100 else 0}f}"
            device_hours = f"{option.hours * option.devices:,.0f}"
            cost = "" if option.cost is None else f"{option.cost:,.0f}"
        lines.append(
            f"| {option.size} | {_weights_word(option)} | {'yes' if option.checkpointing else 'no'} | "
            f"{option.devices} x {option.micro_batch} x {option.accumulation} | {option.memory.total / GIB:.1f} | {fits} | "
            f"{hours} | {device_hours} | {cost} |"
        )
    return "\n".join(lines)


def _weights_word(option: Plan) -> str:
    return "sharded" if option.sharded else "replicated"


def _config(args: PlanArguments, size: str) -> ImageGPTConfig:
    image_size = args.image_size
    if image_size is None:
        image_size = min(pixels for objective, pixels in SIZES[size].learning_rate if objective == args.objective)
    return ImageGPTConfig.from_preset(size, image_size=image_size, n_colors=args.num_colors, objective=args.objective)


def _shares(args: PlanArguments, size: str) -> tuple[int, int, int, float | None]:
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
        if args.images is None:
            raise ValueError(f"{epochs:g} epochs of how many images? Give --images, or --max_steps.")
        steps = math.ceil(epochs * math.ceil(args.images / batch_size))
    return batch_size, share, steps, None if args.images is None else steps * batch_size / args.images


def _options(args: PlanArguments, size: str) -> list[Plan]:
    config = _config(args, size)
    batch_size, share, steps, epochs = _shares(args, size)
    rate = _throughput(args, size)[0]
    plans = []
    for checkpointing, sharded in ((False, False), (False, True), (True, False), (True, True)):
        if sharded and args.devices == 1:
            continue
        layout = {"devices": args.devices, "sharded": sharded, "checkpointing": checkpointing, "bf16": args.bf16}
        largest = None
        if args.memory_gib is not None:
            largest = _largest(config, batch_size // args.devices, args.memory_gib * GIB * args.usable, layout)
        micro_batch = share
        if args.gradient_accumulation_steps is None and largest is not None:
            micro_batch = max(1, largest)
        hours = None
        if rate is not None:
            flops = steps * executed_flops(config, batch_size, checkpointing)
            hours = flops / (args.devices * rate) / 3600
        price = args.cost_per_device_hour
        plans.append(
            Plan(
                size=size,
                image_size=math.isqrt(config.n_positions),
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
                cost=None if price is None else hours * args.devices * price,
            )
        )
    return plans


def _largest(config, share: int, limit: float, layout: dict) -> int:
    """The largest divisor of `share` images whose step takes at most `limit` bytes; 0 if one image takes more."""

    def fits(size):
        return step_memory(config, size, **layout).total <= limit

    divisors = [size for size in range(1, share + 1) if share % size == 0]
    if not fits(1):
        return 0
    if fits(share):
        return share
    return divisors[bisect(divisors, False, lo=1, hi=len(divisors) - 1, key=lambda size: not fits(size)) - 1]


def _throughput(args: PlanArguments, size: str) -> tuple[float | None, str]:
    """FLOPs that one device executes a second, and where that is from."""
    if args.tflops is not None:
        return args.tflops * 1e12, f"{args.tflops:g} TFLOP/s achieved"
    if args.peak_tflops is not None:
        return args.peak_tflops * args.utilization * 1e12, f"{args.utilization:g} of {args.peak_tflops:g} TFLOP/s"
    if args.records is None:
        return None, ""
    return _recorded(args, size)


def _recorded(args: PlanArguments, size: str) -> tuple[float, str]:
    """The fastest record that tells of such training.

    `images_per_second`, unit images/s, whose fields name size, image size, objective, precision, devices and gradient
    checkpointing (by default causal, the plan's, 1 and False); or `tflops_per_second`, unit TFLOP/s, per device, in
    `training_flops`, of any model.
    """
    config, precision = _config(args, size), "bfloat16 autocast" if args.bf16 else "float32"
    side = math.isqrt(config.n_positions)
    rates = []
    for record in read_records(args.records):
        model = (record.size, record.image_size, record.objective or "causal")
        wanted = (size, (side, side), config.objective)
        speed = record.metric == "tflops_per_second" or (record.metric == "images_per_second" and model == wanted)
        if not speed or (record.precision or precision) != precision:
            continue
        devices, checkpointing = record.devices or 1, bool(record.gradient_checkpointing)
        unit = {"images_per_second": "images/s", "tflops_per_second": "TFLOP/s"}[record.metric]
        number = isinstance(record.value, (int, float)) and 0 < record.value <= _MOST
        if not (number and record.unit == unit and type(devices) is int and devices >= 1):
            raise ValueError(
                f"A record of {args.records} cannot be planned with: {record.metric} is a positive number of {unit}, devices a "
                f"number from 1 on; found {record.value!r} {record.unit}, {devices!r}."
            )
        recomputed = executed_flops(config, 1, checkpointing)
        if record.metric == "images_per_second":
            rates.append((record.value / devices * recomputed, record))
        else:
            rates.append((record.value * 1e12 * recomputed / training_flops(config), record))
    if not rates:
        raise ValueError(
            f"{args.records} has no images_per_second of {size} at {math.isqrt(config.n_positions)} pixels, {config.objective}, "
            f"{precision}, nor tflops_per_second: measure one, or give --tflops."
        )
    rate, record = max(rates, key=lambda pair: pair[0])
    return rate, f"{record.value:.4g} {record.unit} measured, {describe_model(record)}, {record.hardware}"
