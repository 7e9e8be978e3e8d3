"""Features: what "layer l" means, and how features of all layers come out of one forward pass.

Layer l of L blocks is the normalised input of block l (the output of its `ln_1`) for l < L, and the output of `ln_f` for
l = L; an image's feature is the mean over its N positions [V2 3.3, blog footnote E]. A causal model is fed
[SOS, x_0 … x_{N-2}], as in training; a masked one all N pixels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline

from .modeling_imagegpt import ImageGPTPreTrainedModel, check_tokens, shift_right
from .presets import MASK_PROBABILITY


def check_layers(config, layers: int | Sequence[int] | None) -> list[int]:
    """`layers` as a list of 0..L; None means all of them, negative numbers count from the end (−1 is L)."""
    n_layer = config.n_layer
    if layers is None:
        return list(range(n_layer + 1))
    layers = [layers] if isinstance(layers, int) else list(layers)
    if not layers:
        raise ValueError(f"No layer is named: this model has layers 0..{n_layer}.")
    for layer in layers:
        if not -n_layer - 1 <= layer <= n_layer:
            raise ValueError(
                f"There is no layer {layer}: this model has layers 0..{n_layer}, of which {n_layer} is the last norm."
            )
    return [layer % (n_layer + 1) for layer in layers]


@torch.no_grad()
def features_of_tokens(
    model: ImageGPTPreTrainedModel,
    tokens: torch.LongTensor,
    layers: int | Sequence[int] | None = None,
    *,
    pool: bool = True,
    bool_masked_pos: torch.BoolTensor | None = None,
) -> dict[int, torch.Tensor]:
    """Features of one batch by layer, of one forward pass: (B, D) each, or without `pool` (B, N, D).

    model: any Image GPT, as it is (in evaluation mode for reproducible features). tokens: (B, N) colours 0..K-1.
    layers: see `check_layers`. bool_masked_pos: (B, N), of masked models: pixels that are hidden. Only the pooled means are
    kept of each layer, in float32.
    """
    config = model.config
    layers = check_layers(config, layers)
    check_tokens(tokens, config.vocab_size - 1, "tokens", config)
    backbone = model.base_model
    found = {}

    def keep(layer):
        def hook(module, inputs, output):
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


def extract(
    model: ImageGPTPreTrainedModel,
    inputs,
    layers: int | Sequence[int] | None = None,
    *,
    processor=None,
    batch_size: int = 64,
    bf16: bool = False,
    mask_seed: int | None = None,
    progress: bool = True,
) -> dict[int, torch.Tensor]:
    """Features of many images by layer, each (n, D) float32 on the CPU, of one forward pass for all layers.

    inputs: tokens (n, N) of colours 0..K-1 (torch, numpy, a column of a tokenised dataset), or with `processor` a list of
    images as it takes them. layers: see `check_layers`. bf16: run the model in bfloat16 autocast; means are of float32.
    mask_seed: of masked models: hide pixels as in training [V2 4.6], drawn image after image from this seed; None hides
    nothing. Beside the model and one batch, only the features themselves take memory: `write_features` puts these on disk.
    """
    layers = check_layers(model.config, layers)
    n_images = _count(inputs)
    found = {layer: torch.empty(n_images, model.config.n_embd) for layer in layers}
    start = 0
    for batch in _batches(model, inputs, layers, processor, batch_size, bf16, mask_seed, progress):
        for layer, feature in batch.items():
            found[layer][start : start + len(feature)] = feature
        start += len(next(iter(batch.values())))
    return found


def write_features(
    path: str | Path, model: ImageGPTPreTrainedModel, inputs, layers: int | Sequence[int] | None = None, **options
) -> Path:
    """Write what `extract` returns to an Arrow file, batch by batch, whatever the number of images; returns `path`.

    Columns `layer_0` … hold D float32 a row; `read_features` reads one of them, `datasets.Dataset.from_file` all. The
    file appears whole or not at all. `options` are those of `extract`.
    """
    import pyarrow as pa

    path = Path(path)
    layers = check_layers(model.config, layers)
    _count(inputs)
    options = {"processor": None, "batch_size": 64, "bf16": False, "mask_seed": None, "progress": True} | options
    row = pa.list_(pa.float32(), model.config.n_embd)
    schema = pa.schema([(f"layer_{layer}", row) for layer in dict.fromkeys(layers)])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in _batches(model, inputs, layers, **options):
                columns = [
                    pa.FixedSizeListArray.from_arrays(pa.array(batch[layer].numpy().reshape(-1)), model.config.n_embd)
                    for layer in dict.fromkeys(layers)
                ]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_features(path: str | Path, layer: int) -> np.ndarray:
    """Features (n, D) float32 of one layer, 0..L, of a file of `write_features`; the other layers are not read."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()
        name = f"layer_{layer}"
        if name not in table.column_names:
            raise ValueError(f"{path} holds {', '.join(table.column_names)}, not {name}.")
        return np.concatenate([chunk.flatten().to_numpy() for chunk in table[name].chunks]).reshape(len(table), -1)


def layers_around(layer: int, n_layer: int, count: int) -> list[int]:
    """`count` neighbouring layers of 0..L with `layer` in their middle, or as near to it as the ends allow.

    The paper's 15,360 features of iGPT-XL are of 5 layers around the best [V2 Table 2].
    """
    if not 1 <= count <= n_layer + 1:
        raise ValueError(f"Between 1 and {n_layer + 1} layers can be concatenated; found {count}.")
    first = min(max(0, layer - count // 2), n_layer + 1 - count)
    return list(range(first, first + count))


def _count(inputs) -> int:
    if len(inputs) == 0:
        raise ValueError("No images: features need one at least.")
    return len(inputs)


@torch.no_grad()
def _batches(model, inputs, layers, processor, batch_size, bf16, mask_seed, progress) -> Iterator[dict]:
    """Pooled features of batch after batch, on the CPU."""
    config, device = model.config, model.device
    if mask_seed is not None and config.objective != "masked":
        raise ValueError("mask_seed is of masked models; this one is causal.")
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1; found {batch_size}.")
    rng = None if mask_seed is None else np.random.default_rng(mask_seed)
    training = model.training
    model.eval()
    try:
        with tqdm(total=len(inputs), desc="Features", unit="image", disable=None if progress else True) as bar:
            for start in range(0, len(inputs), batch_size):
                batch = inputs[start : start + batch_size]
                batch = batch if processor is None else processor(batch)["input_ids"]
                tokens = np.asarray(batch.cpu() if torch.is_tensor(batch) else batch)
                mask = None if rng is None else torch.from_numpy(rng.random(tokens.shape) < MASK_PROBABILITY).to(device)
                tokens = torch.from_numpy(tokens).to(device)
                tokens = tokens if tokens.is_floating_point() else tokens.long()
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    features = features_of_tokens(model, tokens, layers, bool_masked_pos=mask)
                yield {layer: feature.cpu() for layer, feature in features.items()}
                bar.update(len(tokens))
    finally:
        model.train(training)


class ImageGPTFeatureExtractionPipeline(ImageFeatureExtractionPipeline):
    """`pipeline("image-feature-extraction")` with two more options for Image GPTs; other models pass through unchanged.

    layer: 0..L as this module defines it, or negative from the end. pool=True: the mean over positions, (1, D), of that
    layer (the last unless `layer` is given). Without either, transformers' own result: the last hidden states (1, N, D)
    of the tokens as they are, SOS not put before them.
    """

    def _sanitize_parameters(self, layer=None, pool=None, **kwargs):
        if not isinstance(self.model, ImageGPTPreTrainedModel):
            if layer is not None:
                raise ValueError(f"layer= is an option of Image GPTs; this is a {type(self.model).__name__}.")
            return super()._sanitize_parameters(pool=pool, **kwargs)
        options = {"layer": layer, "pool": pool}
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if layer is not None:
            check_layers(self.model.config, layer)
        return preprocess, forward | {k: v for k, v in options.items() if v is not None}, postprocess

    def _forward(self, model_inputs, layer=None, pool=False):
        if layer is None and not pool:
            return super()._forward(model_inputs)
        (feature,) = features_of_tokens(
            self.model, model_inputs["input_ids"], -1 if layer is None else layer, pool=pool
        ).values()
        return {"features": feature}

    def postprocess(self, model_outputs, **kwargs):
        if "features" in model_outputs:
            model_outputs = [model_outputs["features"]]
        return super().postprocess(model_outputs, **kwargs)
