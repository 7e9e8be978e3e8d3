"""The layers that a block is made of: `ImageGPTProjection`, `ImageGPTLayerNorm`, `QuickGELU`, and how their weights start.

What training keeps for the backward pass is what PyTorch keeps for these modules, and nothing is recomputed. Per block and
token of width D: the input of each norm (2 D) and its output, which is the input of a projection (2 D), queries, keys, values
and attention's output (4 D), the scaled input of the activation (4 D) and its output (4 D); 16 widths in all. On CPUs, PyTorch's
norms keep 2 more.

`--gradient_checkpointing` (`model.gradient_checkpointing_enable()`) keeps the input of each block alone, 1 width, and computes
the block a second time in the backward pass. A training step of 8 blocks of width 256 on 4 images of 1,024 tokens, float32,
two CPU cores, all measured in one run; memory is the peak beyond weights and gradients:

    transformers' own ImageGPT                   1284 MiB   1.00   3.23 s
    x · sigmoid(1.702 x) as written               741 MiB   0.58   1.25 s
    silu(1.702 x) / 1.702, as here                613 MiB   0.48   1.18 s
    the same with --gradient_checkpointing        136 MiB   0.11   1.51 s
"""

import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .configuration_imagegpt import ImageGPTConfig


def set_initial_std(layer: nn.Module, std: float) -> None:
    """Note on `layer` the standard deviation of its initial weight, which the model's `_init_weights` draws."""
    layer.init_std = std


def initial_std(config: ImageGPTConfig, openai: float, residual: bool = False) -> float:
    """The standard deviation of an initial weight: `openai`, or transformers' value if the config asks for that.

    residual: the layer writes into the residual stream. transformers scales both such layers of a block by 1/sqrt(2L);
    OpenAI's code scales attention's only, which is part of `openai`.
    """
    if config.initialization == "openai":
        return openai
    return config.initializer_range / (math.sqrt(2 * config.n_layer) if residual else 1)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or unchanged if its type is larger."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ImageGPTProjection(Conv1D):
    """x -> x W + b with W stored [in, out]: (..., in) -> (..., out). Without trained biases, b is a saved buffer of zeros.

    The buffer gives both kinds of model the same files: transformers' class, which has biases, reads the zeros, where a
    missing key would leave uninitialised memory. The buffer is not added: FSDP with bfloat16 weights would need it in
    another shape and type.
    """

    def __init__(self, config: ImageGPTConfig, n_out: int, n_in: int, std: float):
        super().__init__(n_out, n_in)
        self.in_features = n_in
        self.use_bias = config.use_bias
        if not config.use_bias:
            del self.bias
            self.register_buffer("bias", torch.zeros(n_out))
        set_initial_std(self, std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.t(), self.bias if self.use_bias else None)


class ImageGPTLayerNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension: no mean subtraction, no bias [code norm].

    PyTorch computes it in float32 if the input has a smaller type: squares of float16 overflow beyond 256.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x) [code gelu], computed as silu(1.702 x) / 1.702: autograd keeps one tensor instead of two.

    Three roundings in the type of x; in float16, |x| beyond 38,490 overflows.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(1.702 * x) / 1.702
