"""The least that a model's work takes: its matrix products alone, or what a GPU's data sheet promises."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel


PEAK_TFLOPS = {"H100": 990.0, "H200": 990.0}  # dense bfloat16, from their data sheets
PEAK_BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes per second, likewise


def find_peak(figures: dict[str, float]) -> float | None:
    """Return this GPU's figure; None without a GPU and for GPUs that have none."""
    if not torch.cuda.is_available():
        return None
    return next((value for name, value in figures.items() if name in torch.cuda.get_device_name()), None)


def build_matrix_products(
    model: PreTrainedModel, batch_size: int, length: int, keys: int, *, backward: bool = False, head: bool = True
) -> Callable:
    """Return a function that multiplies `batch_size` x `length` rows by every weight matrix and attends to `keys` positions.

    backward: also the products of the backward pass. head: also those of `lm_head`.
    """
    config, device = model.config, model.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = [weight for weight in model.transformer.h.parameters() if weight.ndim == 2]  # [in, out]
    weights = [weight.detach().to(dtype) for weight in weights + [model.lm_head.weight.t()] * head]
    rows = {n: torch.randn(batch_size * length, n, device=device, dtype=dtype) for w in weights for n in w.shape}
    heads, size = batch_size * config.n_head, config.n_embd // config.n_head
    query = torch.randn(heads, length, size, device=device, dtype=dtype)
    key, chance = query.new_empty(heads, keys, size).normal_(), query.new_empty(heads, length, keys).normal_()

    @torch.no_grad()
    def multiply() -> None:
        for weight in weights:
            inputs, outputs = (rows[n] for n in weight.shape)
            inputs @ weight
            if backward:
                outputs @ weight.t()
                inputs.t() @ outputs
        for _ in range(config.n_layer * (3 if backward else 1)):
            query @ key.transpose(1, 2)
            chance @ key

    return multiply


def build_causal_products(model: PreTrainedModel, batch_size: int, **options) -> Callable:
    """Return the matrix products of whole images, with attention to half of all positions: a kernel skips the masked ones."""
    n_positions = model.config.n_positions
    return build_matrix_products(model, batch_size, n_positions, n_positions // 2, **options)
