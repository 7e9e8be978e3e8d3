"""`pipeline("image-completion")`, `pipeline("image-feature-extraction")` with layers and pooling, `pipeline("image-classification")`.

They read images by the image processor, where transformers' own pipelines convert them to RGB first: 16-bit images would
turn white, and transparency black.
"""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ImageClassificationPipeline, ImageFeatureExtractionPipeline, Pipeline

from .features_imagegpt import check_layers, features_of_tokens
from .generation_imagegpt import MaskSource, check_count, complete, draw_seed, find_hidden, inpaint_tokens, read_rows
from .image_processing_imagegpt import AnyImageProcessor
from .modeling_imagegpt import ImageGPTForCausalImageModeling
from .pixels_imagegpt import AnyImage, ImageSource, size_of


def _is_ours(part: Any) -> bool:
    """Whether a model or an image processor is of this code. Of a local repository, transformers loads it apart from this file."""
    return not type(part).__module__.startswith("transformers.")


def _tokenize(pipe: Pipeline, source: ImageSource, timeout: float | None, **options: Any) -> BatchFeature:
    """Turn one image into tokens (1, N); more of them are a ValueError."""
    processor: Any = pipe.image_processor
    features: BatchFeature = processor(processor.fetch_images(source, timeout), return_tensors="pt", **options)
    if len(features["input_ids"]) != 1:
        raise ValueError(f"A pipeline reads one image, or a list of images; found {len(features['input_ids'])} in one.")
    return features


def _seed_apart(iterator: Any) -> Any:
    """Let the `DataLoader` within a pipeline's iterator draw its seed now, rather than while another thread draws images."""
    loader = iterator
    while not isinstance(loader, torch.utils.data.DataLoader):
        loader = loader.loader
    loader.generator = torch.Generator().manual_seed(draw_seed())
    return iterator


class ImageCompletionPipeline(Pipeline):
    """Keep the upper rows of an image, or all but a hole in it, and draw the rest.

    Called as `pipe("cat.png", rows=16, num_completions=3)`, it returns a list of `num_completions` PIL images; for a list of
    images (anything the processor reads), a list of such lists. rows: the number of rows to keep, in pixels of the model's images
    (default: half of them; 0: none). mask: what is drawn instead of lower rows, a picture, an array or a box, as in
    `generation_imagegpt.find_hidden`; particles: as in `inpaint_tokens`. seed: makes the drawing of each batch repeatable and restores torch's random state
    afterwards. Other arguments (temperature, top_k, top_p, …) go to `generate`, whose defaults are the paper's sampling.
    Invalid arguments, and a processor that does not fit the model, are a ValueError.
    """

    # transformers declares these as None.
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = True  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    model: ImageGPTForCausalImageModeling
    image_processor: AnyImageProcessor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.image_processor.check_fits(self.model.config)

    def _sanitize_parameters(
        self,
        rows: int | None = None,
        num_completions: int | None = None,
        seed: int | None = None,
        timeout: float | None = None,
        mask: MaskSource | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        height = self.image_processor.token_grid()[0]
        if read_rows(rows, height).ndim:
            raise ValueError(
                f"A pipeline keeps one number of rows of all its images; found {rows}. `complete` takes several."
            )
        if np.ndim(generate_kwargs.get("classes", 0)):
            raise ValueError("A pipeline draws one class of all its images. `complete` takes one for each.")
        if num_completions is not None:
            check_count("num_completions", num_completions)
        options = {"rows": rows, "num_completions": num_completions, "seed": seed}
        forward = {name: value for name, value in options.items() if value is not None} | generate_kwargs
        if mask is not None and rows is not None:
            raise ValueError("rows and mask each say what is drawn: give one of them.")
        unknown = set(generate_kwargs) - {"temperature", "top_k", "top_p", "particles", "batch_size", "classes"}
        if mask is not None and unknown:
            raise ValueError(f"With a mask there is no option {', '.join(sorted(unknown))}: these are for completions.")
        preprocess = {"timeout": timeout, "mask": mask}
        return {name: value for name, value in preprocess.items() if value is not None}, forward, {}

    def get_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', for lists of images."""
        return _seed_apart(super().get_iterator(*args, **kwargs))

    def preprocess(
        self, image: ImageSource, timeout: float | None = None, mask: MaskSource | None = None
    ) -> BatchFeature:
        """Turn an image, of any kind that the processor reads, into tokens (1, N), and a mask into hidden pixels (1, N).

        timeout: in seconds, for downloads.
        """
        if mask is None:
            return _tokenize(self, image, timeout)
        image = cast(AnyImage, self.image_processor.fetch_images(image, timeout))
        features = _tokenize(self, image, timeout)
        hidden = find_hidden(self.image_processor, mask, size_of(image))
        features["bool_masked_pos"] = torch.from_numpy(hidden).view(1, -1)
        return features

    def _forward(
        self,
        model_inputs: Mapping[str, torch.Tensor],
        rows: int | None = None,
        num_completions: int = 1,
        seed: int | None = None,
        **generate_kwargs: Any,
    ) -> dict[str, Any]:
        tokens = model_inputs["input_ids"]  # (B, N)
        config = generate_kwargs.get("generation_config", self.model.generation_config)
        sampling = {"temperature": config.temperature, "top_p": config.top_p}
        options = {name: value for name, value in sampling.items() if value is not None} | generate_kwargs
        if "bool_masked_pos" in model_inputs:
            hidden = model_inputs["bool_masked_pos"].cpu()
            options |= {"seed": seed, "progress": False}
            return {"tokens": inpaint_tokens(self.model, tokens.cpu(), hidden, num_completions, **options)[0]}
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
            **options,
        )
        return {"tokens": drawn}

    def postprocess(self, model_outputs: Mapping[str, torch.Tensor]) -> list[Image.Image]:
        """Turn the tokens of one image's completions (1, num_completions, N) into PIL images."""
        return self.image_processor.decode(model_outputs["tokens"][0])


class ImageGPTClassificationPipeline(ImageClassificationPipeline):
    """`pipeline("image-classification")` that reads images as Image GPTs' processors do; nothing changes for other models."""

    def get_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', for lists of images."""
        return _seed_apart(super().get_iterator(*args, **kwargs))

    def preprocess(self, image: ImageSource, timeout: float | None = None) -> Any:
        """Turn one image into the model's inputs. timeout: in seconds, for downloads."""
        if self.model.config.model_type == "imagegpt" and _is_ours(self.image_processor):
            return _tokenize(self, image, timeout)
        return super().preprocess(image, timeout=timeout)


class ImageGPTFeatureExtractionPipeline(ImageFeatureExtractionPipeline):
    """`pipeline("image-feature-extraction")` with two more options for Image GPTs; nothing changes for other models.

    layer: 0..L as defined in `features_imagegpt`, or negative from the end; another layer is a ValueError. pool=True: return
    the mean over positions, (1, D), of that layer (by default the last). With neither, the result is transformers' own: the
    last hidden states (1, N, D) of the unshifted tokens, without SOS.
    """

    model: Any

    def _reads_tokens(self) -> bool:
        """Whether the model is an Image GPT with this code."""
        return self.model.config.model_type == "imagegpt" and _is_ours(self.model)

    def get_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', for lists of images."""
        return _seed_apart(super().get_iterator(*args, **kwargs))

    def preprocess(self, image: ImageSource, timeout: float | None = None, **options: Any) -> Any:
        """Turn one image into the model's inputs. timeout: in seconds, for downloads; options: the processor's."""
        if self.model.config.model_type == "imagegpt" and _is_ours(self.image_processor):
            return _tokenize(self, image, timeout, **options)
        return super().preprocess(image, timeout=timeout, **options)

    def _sanitize_parameters(
        self, layer: int | None = None, pool: bool | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if not self._reads_tokens():
            if layer is not None:
                raise ValueError(f"layer= is an option for Image GPTs; this is a {type(self.model).__name__}.")
            return super()._sanitize_parameters(pool=pool, **kwargs)
        options = {"layer": layer, "pool": pool}
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if layer is not None:
            check_layers(self.model.config, layer)
        return preprocess, forward | {k: v for k, v in options.items() if v is not None}, postprocess

    def _forward(
        self, model_inputs: Mapping[str, torch.Tensor], layer: int | None = None, pool: bool = False
    ) -> Mapping[str, Any]:
        if not self._reads_tokens() or (layer is None and not pool):
            return super()._forward(model_inputs)
        (feature,) = features_of_tokens(
            self.model, model_inputs["input_ids"], -1 if layer is None else layer, pool=pool
        ).values()
        return {"features": feature}

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> Any:
        """Return the features as nested lists, or as a tensor with `return_tensors=True`."""
        if "features" in model_outputs:
            model_outputs = [model_outputs["features"]]
        return super().postprocess(model_outputs, **kwargs)
