"""`pipeline("image-completion")`, and `pipeline("image-feature-extraction")` with layers and pooling."""

from transformers import ImageFeatureExtractionPipeline, Pipeline
from transformers.image_utils import load_image

from .features_imagegpt import check_layers, features_of_tokens
from .generation_imagegpt import complete
from .modeling_imagegpt import ImageGPTPreTrainedModel


class ImageCompletionPipeline(Pipeline):
    """Keeps the upper rows of an image and draws the rest.

    `complete("cat.png", rows=16, num_completions=3)` returns `num_completions` PIL images; a list of images (PIL, paths,
    URLs) a list of such lists. rows: rows kept, in pixels of the model's images (default: half of them; 0: none). seed: makes
    each batch's drawing repeatable and leaves torch's random state as it was. Other arguments (temperature, top_k, top_p, …)
    go to `generate`, whose defaults are the paper's sampling.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.image_processor.check_fits(self.model.config)

    def _sanitize_parameters(self, rows=None, num_completions=None, seed=None, timeout=None, **generate_kwargs):
        height = self.image_processor.token_grid()[0]
        if rows is not None and not 0 <= rows <= height:
            raise ValueError(f"rows is between 0 and the image's height, {height}; found {rows}.")
        if num_completions is not None and num_completions < 1:
            raise ValueError(f"num_completions is at least 1; found {num_completions}.")
        options = {"rows": rows, "num_completions": num_completions, "seed": seed}
        forward = {name: value for name, value in options.items() if value is not None} | generate_kwargs
        return ({} if timeout is None else {"timeout": timeout}), forward, {}

    def preprocess(self, image, timeout=None):
        return self.image_processor(load_image(image, timeout=timeout), return_tensors="pt")

    def _forward(self, model_inputs, rows=None, num_completions=1, seed=None, **generate_kwargs):
        tokens = model_inputs["input_ids"]  # (B, N)
        config = generate_kwargs.get("generation_config", self.model.generation_config)
        sampling = {"temperature": config.temperature, "top_p": config.top_p}
        drawn = complete(
            self.model,
            self.image_processor,
            None,
            rows,
            num_completions,
            tokens=tokens,
            seed=seed,
            batch_size=len(tokens) * num_completions,
            progress=False,
            return_tokens=True,
            **{name: value for name, value in sampling.items() if value is not None} | generate_kwargs,
        )
        return {"tokens": drawn}

    def postprocess(self, model_outputs):
        return self.image_processor.decode(model_outputs["tokens"][0])


class ImageGPTFeatureExtractionPipeline(ImageFeatureExtractionPipeline):
    """`pipeline("image-feature-extraction")` with two more options for Image GPTs; other models pass through unchanged.

    layer: 0..L as `features_imagegpt` defines it, or negative from the end. pool=True: the mean over positions, (1, D), of that
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
