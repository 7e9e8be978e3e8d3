"""Features: what "layer l" means, and how features of all layers come out of one forward pass.

Layer l of L blocks is the normalised input of block l (the output of its `ln_1`) for l < L, and the output of `ln_f` for
l = L; an image's feature is the mean over its N positions [V2 3.3, blog footnote E]. A causal model is fed
[SOS, x_0 … x_{N-2}], as in training; a masked one all N pixels.
"""

from collections.abc import Sequence

import torch
from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline

from .modeling_imagegpt import ImageGPTPreTrainedModel, check_tokens, shift_right


def check_layers(config, layers: int | Sequence[int] | None) -> list[int]:
    """`layers` as a list of 0..L; None means all of them, negative numbers count from the end (−1 is L)."""
    n_layer = config.n_layer
    if layers is None:
        return list(range(n_layer + 1))
    layers = [layers] if isinstance(layers, int) else list(layers)
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
