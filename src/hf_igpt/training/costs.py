"""What a training step costs: FLOPs, and the memory of a device. Nothing here is measured.

Memory is what PyTorch would hold: a training step is run on tensors without storage, and every byte is counted. Conventions:
a multiply-add is two FLOPs; backward is twice forward; GiB are 2³⁰ bytes, of which a device has less than its name says.
"""

import json
import math
import warnings
import weakref
from bisect import bisect
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..configuration_imagegpt import ImageGPTConfig
from ..layers_imagegpt import ImageGPTLayerNorm
from ..modeling_imagegpt import GENERATIVE_MODELS


GIB = 2**30


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def forward_flops(config: ImageGPTConfig, n_images: int = 1) -> float:
    """FLOPs of the matrix products of one forward pass over `n_images` images of N pixels.

    2 · parameters · N for the blocks' matrices and the colour head (embeddings are looked up, not multiplied), and
    4 · L · D · N² for attention: q·k and weights·v, every pixel with every other. Of a causal model half of that, which is
    what a kernel that skips the masked half does. Norms, activations and softmax are left out, as is usual.
    """
    n_pixels, head = config.n_positions, config.n_embd * (config.vocab_size - 1)
    attention = 4 * config.n_layer * config.n_embd * n_pixels**2 / (2 if config.objective == "causal" else 1)
    return float(n_images * (2 * (count_block_matrices(config) + head) * n_pixels + attention))


def training_flops(config: ImageGPTConfig, n_images: int = 1) -> float:
    """FLOPs of forward and backward, three times `forward_flops`: what "model FLOPs" means; recomputing is not counted."""
    return 3 * forward_flops(config, n_images)


def executed_flops(config: ImageGPTConfig, n_images: int = 1, checkpointing: bool = False) -> float:
    """`training_flops`, and with gradient checkpointing a second forward pass of all blocks."""
    head = 2 * config.n_embd * (config.vocab_size - 1) * config.n_positions * n_images
    return training_flops(config, n_images) + (forward_flops(config, n_images) - head if checkpointing else 0)


def count_block_matrices(config: ImageGPTConfig) -> int:
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
    parameters, buffers, block = measure_weights(config.to_json_string())
    rest = parameters - config.n_layer * block
    precision = "float32" if not bf16 else "bfloat16" if sharded else "autocast"
    activations, forward, backward = measure_activations(config, micro_batch, checkpointing, precision)
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
def measure_weights(config_json: str) -> tuple[int, int, int]:
    """Bytes in float32 of all parameters, all buffers, and one block's parameters."""
    config = ImageGPTConfig(**json.loads(config_json))
    with torch.device("meta"):
        model: Any = GENERATIVE_MODELS[config.objective](config)
    first = model.transformer.h[0]

    def size(tensors: Iterable[torch.Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    return size(model.parameters()), size(model.buffers()), size(first.parameters())


def measure_activations(
    config: ImageGPTConfig, micro_batch: int, checkpointing: bool, precision: str
) -> tuple[int, int, int]:
    """Bytes beyond weights, gradients and moments: before the head, at forward's peak, at backward's peak.

    All blocks are alike: each beyond the first adds the same to each of the three.
    """
    one, two = (
        trace_step(
            ImageGPTConfig(**(json.loads(config.to_json_string()) | {"n_layer": n_layer})).to_json_string(),
            micro_batch,
            checkpointing,
            precision,
        )
        for n_layer in (1, 2)
    )
    before, forward, backward = (
        first + (config.n_layer - 1) * (second - first) for first, second in zip(one, two, strict=True)
    )
    return before, forward, backward


@lru_cache(maxsize=1024)
def trace_step(config_json: str, micro_batch: int, checkpointing: bool, precision: str) -> tuple[int, int, int]:
    """One forward and backward pass on tensors without storage, as `Trainer` runs it; bytes as in `measure_activations`."""
    config = ImageGPTConfig(**json.loads(config_json))
    with FakeTensorMode():
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        model: Any = GENERATIVE_MODELS[config.objective]._from_config(config, dtype=dtype).train()
        if checkpointing:
            with warnings.catch_warnings():  # it has another name from transformers 5.23 on
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, ImageGPTLayerNorm):
                vars(module)["forward"] = lambda x, weight=module.weight: FusedNorm.apply(x, weight)
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
        with LiveBytes(known) as live:
            model.lm_head.register_forward_pre_hook(lambda *_: before_head.append(live.now))
            loss = forward(**batch).loss
            forward_peak, live.peak = live.peak, live.now
            loss.backward()
    return before_head[0], forward_peak, live.peak


class FusedNorm(torch.autograd.Function):
    """The memory of a norm in CUDA's kernel. CPUs', which a trace would take, keep their output a second time, in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes that operations allocate, until they are freed: `now`, and at their `peak`."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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

    def _free(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


def find_largest_micro_batch(config: ImageGPTConfig, share: int, limit: float, **layout: Any) -> int:
    """The largest divisor of `share` images whose step takes at most `limit` bytes; 0 if one image takes more.

    layout: the keyword arguments of `step_memory`.
    """

    def fits(size: int) -> bool:
        return step_memory(config, size, **layout).total <= limit

    divisors = [size for size in range(1, share + 1) if share % size == 0]
    if not fits(1):
        return 0
    if fits(share):
        return share
    return divisors[bisect(divisors, False, lo=1, hi=len(divisors) - 1, key=lambda size: not fits(size)) - 1]
