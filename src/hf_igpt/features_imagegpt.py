"""Features: what "layer l" means, and features of all layers from one forward pass; and what a pixel attends to.

In a model of L blocks, layer l is the normalised input of block l (the output of its `ln_1`) for l < L, and the output of
`ln_f` for l = L. An image's feature is the mean over its N positions [V2 3.3, blog footnote E]. A causal model reads
[SOS, x_0 … x_{N-2}], as in training; a masked model reads all N pixels.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from tqdm.auto import tqdm

from .configuration_imagegpt import ImageGPTConfig
from .image_processing_imagegpt import AnyImageProcessor
from .inputs_imagegpt import as_tokens, check_tokens, shift_right
from .modeling_imagegpt import ImageGPTPreTrainedModel, eager_attention_forward
from .presets import MASK_PROBABILITY


def check_layers(config: ImageGPTConfig, layers: int | Sequence[int] | None) -> list[int]:
    """Return `layers` as a list of numbers in 0..L, or raise ValueError.

    None means all layers; negative numbers count from the end (−1 is L).
    """
    n_layer = config.n_layer
    if layers is None:
        return list(range(n_layer + 1))
    layers = [layers] if isinstance(layers, int) else list(layers)
    if not layers:
        raise ValueError(f"No layer is named: this model has layers 0..{n_layer}.")
    for layer in layers:
        if not -n_layer - 1 <= layer <= n_layer:
            raise ValueError(
                f"There is no layer {layer}: this model has layers 0..{n_layer}, of which {n_layer} is the final norm."
            )
    return [layer % (n_layer + 1) for layer in layers]


@torch.no_grad()
def features_of_tokens(
    model: ImageGPTPreTrainedModel,
    tokens: torch.Tensor,
    layers: int | Sequence[int] | None = None,
    *,
    pool: bool = True,
    bool_masked_pos: torch.Tensor | None = None,
) -> dict[int, torch.Tensor]:
    """Compute the features of one batch in one forward pass, by layer: (B, D) each, or (B, N, D) without `pool`.

    model: any Image GPT; its mode is left as it is, so put it into evaluation mode for reproducible features.
    tokens: (B, N) colours in 0..K-1. layers: see `check_layers`. bool_masked_pos: (B, N), for masked models, the pixels to
    hide. With `pool`, only the mean of each layer is kept, in float32. A token out of range, or a layer that does not
    exist, is a ValueError.
    """
    config = model.config
    layers = check_layers(config, layers)
    check_tokens(tokens, config.vocab_size - 1, "tokens", config)
    backbone: Any = model.base_model
    found: dict[int, torch.Tensor] = {}
    thread = threading.get_ident()

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if threading.get_ident() == thread:  # others may run the same model
                found[layer] = output.float().mean(dim=1) if pool else output

        return hook

    norms = [*(block.ln_1 for block in backbone.h), backbone.ln_f]
    hooks = [norms[layer].register_forward_hook(keep(layer)) for layer in dict.fromkeys(layers)]
    try:
        inputs = tokens if config.objective == "masked" else shift_right(tokens, config.sos_token_id)
        backbone(inputs, bool_masked_pos=bool_masked_pos, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: found[layer] for layer in layers}


@torch.no_grad()
def attention_of_tokens(model: ImageGPTPreTrainedModel, tokens: torch.Tensor, pixel: int) -> torch.Tensor:
    """Compute how much each head attends to each pixel when `pixel` is predicted: (B, L, heads, 1 + N) float32.

    tokens: (B, N) colours in 0..K-1. pixel: 0..N-1, in raster order: row · width + column. Of the last dimension, entry 0 is
    the share of SOS and entry 1 + p that of pixel p; together they are 1. A causal model predicts the pixel at a position
    that reads SOS and the pixels before it, so the shares of the pixel itself and of later ones are 0. A masked model, from
    which the pixel alone is hidden, has no SOS: its share is 0.

    Only the weights of this one position are computed, as eager attention computes them, beside the forward pass: the
    model's own implementation of attention runs, and stays. A pixel or a token out of range is a ValueError.
    """
    config, n_pixels = model.config, model.config.n_positions
    if not (isinstance(pixel, int) and 0 <= pixel < n_pixels):
        raise ValueError(f"A pixel of an image is a number in 0..{n_pixels - 1}, in raster order; found {pixel!r}.")
    if tokens.ndim != 2 or tokens.shape[1] != n_pixels:
        raise ValueError(f"Tokens of images have shape (B, {n_pixels}); found {tuple(tokens.shape)}.")
    check_tokens(tokens, config.vocab_size - 1, "tokens", config)
    backbone: Any = model.base_model
    shares = torch.zeros(len(tokens), config.n_layer, config.n_head, 1 + n_pixels, device=tokens.device)
    thread = threading.get_ident()
    inputs, hidden = tokens, None
    if config.objective == "masked":
        hidden = (torch.arange(n_pixels, device=tokens.device) == pixel).expand(tokens.shape)
        seen = shares[..., 1:]
    else:
        inputs = shift_right(tokens, config.sos_token_id)[:, : pixel + 1]  # the last of which predicts the pixel
        seen = shares[..., : pixel + 1]

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            if threading.get_ident() == thread:  # others may run the same model
                query, key, value = module.project(inputs[0])
                of_pixel = query[:, :, pixel : pixel + 1]
                _, weights = eager_attention_forward(module, of_pixel, key, value, None, module.scaling)
                seen[:, layer] = weights[:, :, 0]

        return hook

    hooks = [block.attn.register_forward_pre_hook(keep(layer)) for layer, block in enumerate(backbone.h)]
    try:
        with evaluation_mode(model):
            backbone(inputs, bool_masked_pos=hidden, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return shares


def extract(
    model: ImageGPTPreTrainedModel,
    inputs: Sequence[Any] | np.ndarray | torch.Tensor,
    layers: int | Sequence[int] | None = None,
    *,
    processor: AnyImageProcessor | None = None,
    batch_size: int = 64,
    bf16: bool = False,
    mask_seed: int | None = None,
    progress: bool = True,
) -> dict[int, torch.Tensor]:
    """Compute the features of many images by layer, each (n, D) float32 on the CPU. Each image takes one forward pass.

    inputs: tokens (n, N) in 0..K-1 (torch, numpy, a column of a tokenised dataset), or, with `processor`, a list of images
    that it accepts. layers: see `check_layers`. batch_size: images per forward pass. bf16: run the model in bfloat16
    autocast; means are computed in float32. mask_seed: for masked models, hide pixels as in training [V2 4.6], drawn for
    one image after the other from this seed; None hides nothing. In addition to the model and one batch, only the features
    take memory. Invalid arguments are a ValueError.
    """
    layers = check_layers(model.config, layers)
    found: dict[int, torch.Tensor] = {}
    start = 0
    for batch in feature_batches(
        model,
        inputs,
        layers,
        processor=processor,
        batch_size=batch_size,
        bf16=bf16,
        mask_seed=mask_seed,
        progress=progress,
    ):
        for layer, feature in batch.items():
            if layer not in found:
                found[layer] = torch.empty(len(inputs), feature.shape[1])
            found[layer][start : start + len(feature)] = feature
        start += len(next(iter(batch.values())))
    return found


def layers_around(layer: int, n_layer: int, count: int) -> list[int]:
    """Return `count` consecutive layers in 0..L, centred on `layer` as far as the ends allow.

    The paper's 15,360 features of iGPT-XL come from 5 layers around the best one [V2 Table 2]. A count that does not fit is
    a ValueError.
    """
    if not 1 <= count <= n_layer + 1:
        raise ValueError(f"Between 1 and {n_layer + 1} layers can be concatenated; found {count}.")
    first = min(max(0, layer - count // 2), n_layer + 1 - count)
    return list(range(first, first + count))


# model -> how many contexts of `evaluation_mode` it is in, and its mode before the first
_MODES: WeakKeyDictionary[torch.nn.Module, tuple[int, bool]] = WeakKeyDictionary()
_MODES_LOCK = threading.Lock()


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode, and back into its former mode when the last thread leaves such a context."""
    with _MODES_LOCK:
        count, training = _MODES.get(model, (0, model.training))
        _MODES[model] = count + 1, training
        if count == 0:
            model.eval()
    try:
        yield
    finally:
        with _MODES_LOCK:
            count, training = _MODES.pop(model)
            if count > 1:
                _MODES[model] = count - 1, training
            else:
                model.train(training)


def _check_inputs(inputs: Any, processor: AnyImageProcessor | None, config: ImageGPTConfig) -> None:
    """ValueError if `inputs` are not many images: one image, one path, or an array of another rank."""
    is_array = isinstance(inputs, (np.ndarray, torch.Tensor))
    rank = 2 if processor is None else 4  # tokens (n, N), or images (n, H, W, 3)
    if (
        isinstance(inputs, (str, bytes, PathLike))
        or not hasattr(inputs, "__len__")
        or (is_array and inputs.ndim != rank)
    ):
        what = f"an array of shape {tuple(inputs.shape)}" if is_array else f"one {type(inputs).__name__}"
        wanted = (
            f"tokens (n, {config.n_positions}); pass `processor` with images"
            if processor is None
            else "a list of images"
        )
        raise ValueError(f"Features are of {wanted}; found {what}.")
    if len(inputs) == 0:
        raise ValueError("No images: at least one is needed.")


def feature_batches(
    model: ImageGPTPreTrainedModel,
    inputs: Sequence[Any] | np.ndarray | torch.Tensor,
    layers: int | Sequence[int] | None = None,
    *,
    processor: AnyImageProcessor | None = None,
    batch_size: int = 64,
    bf16: bool = False,
    mask_seed: int | None = None,
    progress: bool = True,
) -> Iterator[dict[int, torch.Tensor]]:
    """Yield what `extract` returns, one batch at a time. The arguments, those of `extract`, are checked on calling."""
    config, device = model.config, model.device
    _check_inputs(inputs, processor, config)
    if mask_seed is not None and config.objective != "masked":
        raise ValueError("mask_seed is for masked models; this one is causal.")
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1; found {batch_size}.")

    @torch.no_grad()
    def batches() -> Iterator[dict[int, torch.Tensor]]:
        rng = None if mask_seed is None else np.random.default_rng(mask_seed)
        bar = tqdm(total=len(inputs), desc="Features", unit="image", disable=None if progress else True)
        with evaluation_mode(model), bar:
            for start in range(0, len(inputs), batch_size):
                batch = inputs[start : start + batch_size]
                batch = batch if processor is None else processor(batch)["input_ids"]  # type: ignore[arg-type]  # any image
                rows = np.asarray(batch.cpu() if torch.is_tensor(batch) else batch)
                if rows.shape != (min(batch_size, len(inputs) - start), config.n_positions):
                    raise ValueError(
                        f"{min(batch_size, len(inputs) - start)} images of {config.n_positions} tokens each were expected from "
                        f"number {start} on; found tokens of shape {rows.shape}."
                    )
                mask = None if rng is None else torch.from_numpy(rng.random(rows.shape) < MASK_PROBABILITY).to(device)
                tokens = as_tokens(rows).to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    features = features_of_tokens(model, tokens, layers, bool_masked_pos=mask)
                yield {layer: feature.cpu() for layer, feature in features.items()}
                bar.update(len(tokens))

    return batches()
