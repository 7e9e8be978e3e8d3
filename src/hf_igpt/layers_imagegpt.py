"""The layers of a block, and their initialisation: `ImageGPTProjection`, `ImageGPTLayerNorm`, `QuickGELU`.

Training keeps for the backward pass what PyTorch keeps for these modules, and recomputes nothing. For each block and token
these are, in units of the width D: the input of each norm (2), its output, which is the input of a projection (2), queries,
keys, values and attention's output (4), the scaled input of the activation (4) and its output (4); 16 in all. PyTorch's norms
keep 2 more on CPUs.

`--gradient_checkpointing` (`model.gradient_checkpointing_enable()`) keeps only the input of each block (1) and recomputes the
block in the backward pass. Measured in one run, for a training step with 8 blocks of width 256 and 4 images of 1,024 tokens in
float32 on two CPU cores; memory is the peak in addition to weights and gradients:

    transformers' own ImageGPT                   1284 MiB   1.00   3.23 s
    x · sigmoid(1.702 x) as written               741 MiB   0.58   1.25 s
    silu(1.702 x) / 1.702, as here                613 MiB   0.48   1.18 s
    the same with --gradient_checkpointing        136 MiB   0.11   1.51 s
"""

import math
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .configuration_imagegpt import ImageGPTConfig


def set_initial_std(layer: nn.Module, std: float) -> None:
    """Record on `layer` the standard deviation of its initial weight, for the model's `_init_weights` to draw."""
    layer.init_std = std  # type: ignore[assignment]  # nn.Module declares tensors and modules only


def choose_initial_std(config: ImageGPTConfig, openai: float, residual: bool = False) -> float:
    """Return the standard deviation of an initial weight: `openai`, or transformers' value if `config` says so.

    residual: whether the layer writes into the residual stream. transformers scales both such layers of a block by
    1/sqrt(2L); OpenAI's code scales only attention's, and `openai` includes that factor.
    """
    if config.initialization == "openai":
        return openai
    return config.initializer_range / (math.sqrt(2 * config.n_layer) if residual else 1)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Convert `x` to float32, unless its type is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ImageGPTProjection(Conv1D):
    """x -> x W + b with W stored [in, out]: (..., in) -> (..., out). Without trained biases, b is a saved buffer of zeros.

    With the buffer, models with and without biases have the same files: transformers' class, which always has biases, reads
    the zeros, whereas a missing key would leave its memory uninitialised. The buffer is not added, because FSDP with
    bfloat16 weights would need it in another shape and type.
    """

    def __init__(self, config: ImageGPTConfig, n_out: int, n_in: int, std: float) -> None:
        super().__init__(n_out, n_in)
        self.in_features = n_in
        self.use_bias = config.use_bias
        if not config.use_bias:
            del self.bias
            self.register_buffer("bias", torch.zeros(n_out))
        set_initial_std(self, std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.t(), self.bias if self.use_bias else None)


class _WithoutBiases(dict[str, bool]):
    """Which adapters of a projection have biases: none. PEFT sets an entry for each that is added."""

    def __setitem__(self, adapter: str, has_bias: bool) -> None:
        if has_bias:
            raise ValueError(
                "lora_bias=True: this model has no biases (use_bias=False), and those of the adapter would be lost on "
                "merging. Set lora_bias=False, or load the model with use_bias=True."
            )
        super().__setitem__(adapter, has_bias)


class ImageGPTSublayer(nn.Module):
    """A module that holds projections, and refuses adapters whose trained biases would be lost on merging.

    PEFT merges the biases of `LoraConfig(lora_bias=True)` into the projection's own, which nothing reads if it is a buffer.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        base = getattr(value, "base_layer", None)
        if isinstance(base, ImageGPTProjection) and not base.use_bias and hasattr(value, "lora_bias"):
            without = _WithoutBiases()
            for adapter, has_bias in value.lora_bias.items():
                without[adapter] = has_bias
            value.lora_bias = without  # those that are added later too
        super().__setattr__(name, value)


class ImageGPTLayerNorm(nn.LayerNorm):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension: no mean subtraction, no bias [code norm].

    PyTorch computes it in float32 if the input has a narrower type: the square of a float16 above 256 overflows. It is a
    `LayerNorm` so that transformers' `Trainer`, which looks for that class, does not decay its weight.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.onnx.is_in_onnx_export():  # whose older exporter does not know the function
            y = at_least_float32(x)
            return (y * (y.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt() * self.weight).to(x.dtype)
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x) [code gelu], computed as silu(1.702 x) / 1.702: autograd keeps one tensor instead of two.

    It rounds three times in the type of x. In float16, |x| > 38,490 overflows.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(1.702 * x) / 1.702
