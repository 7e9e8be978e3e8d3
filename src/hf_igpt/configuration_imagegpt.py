"""`ImageGPTConfig`: transformers' fields and defaults, the paper's presets, and the few keys that are ours."""

import os
from typing import Any

import transformers
from packaging.version import Version


if Version(transformers.__version__) < Version("5.17"):  # before imports that older versions cannot serve
    raise ImportError(
        f"This Image GPT needs transformers >= 5.17; found {transformers.__version__}: pip install -U transformers"
    )

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .presets import IMAGE_SIZE, N_COLORS, SIZES


NEEDS_HF_IGPT = (
    "This Image GPT needs the package hf_igpt (pip install hf_igpt, then `import hf_igpt`): transformers' own ImageGPT has "
    "neither the masked objective nor classifiers that are fed SOS, and would give wrong results."
)
_FEATURES = "image-feature-extraction"


@strict
class ImageGPTConfig(PreTrainedConfig):
    r"""Configuration of an Image GPT.

    The defaults are transformers' own (biases, dropout 0.1, its initialisation), because they are what a key missing
    from one of its checkpoints means. The paper's models come from [`ImageGPTConfig.from_preset`].

    vocab_size (`int`, defaults to 513):
        K + 1: the palette's K colours, and SOS as the last token.
    n_positions (`int`, defaults to 1024):
        N = height · width, the number of pixels in an image and the longest input.
    use_bias (`bool`, defaults to `True`):
        Whether projections have trained biases. If not, as in the paper's models, zeros are saved in their place, so
        that files hold the same tensors either way. The zeros are not counted as parameters.
    initialization (`"transformers"` or `"openai"`, defaults to `"transformers"`):
        Whose random initialisation to use. OpenAI's starts with zero logits, so the loss before training is ln K.

    objective (`"causal"` or `"masked"`, defaults to `"causal"`):
        What the weights were trained to predict: the next pixel, or masked pixels (BERT-style).
    sos_inputs (`bool`, defaults to `False`):
        Whether a classifier on a causal model reads [SOS, x_0 … x_{N-2}], as in OpenAI's code, or x_0 … x_{N-1}, as
        in transformers.
    generative_loss_weight (`float`, defaults to 0):
        Weight of the generative loss that fine-tuning adds to the classification loss (paper 2.3: 1). A classifier
        keeps its colour head if the weight is positive.

    `base_model_fsdp_plan` shards all weights, block by block, in `from_pretrained(distributed_config=
    DistributedConfig(fsdp_size=...))`; it is not written to any file. There is no plan for tensor parallelism.

    All other fields are those of transformers' `ImageGPTConfig`. Cross-attention and tied embeddings are not supported; a
    value that is not supported is a ValueError. Plain transformers would load masked models and classifiers with
    `sos_inputs` and silently give wrong results, so their saved configuration makes it refuse: it holds a sentence in a
    field that transformers requires to be a boolean.
    """

    model_type = "imagegpt"
    # What `Trainer` leaves out of predictions: caches, and the parts of a joint classifier's loss.
    keys_to_ignore_at_inference = ["past_key_values", "classification_loss", "generative_loss", "generative_nats"]
    base_model_fsdp_plan = {
        "wte": "free_full_weight",
        "wpe": "free_full_weight",
        "h.*": "free_full_weight",
        "ln_f": "keep_full_weight",
    }
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = N_COLORS + 1
    n_positions: int = IMAGE_SIZE * IMAGE_SIZE
    n_embd: int = 512
    n_layer: int = 24
    n_head: int = 8
    n_inner: int | None = None
    activation_function: str = "quick_gelu"
    resid_pdrop: float | int = 0.1
    embd_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool | str = False  # has no effect here; in transformers, True changes the rounding only
    add_cross_attention: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_bias: bool = True
    initialization: str = "transformers"
    objective: str = "causal"
    sos_inputs: bool = False
    generative_loss_weight: float | int = 0.0

    @classmethod
    def from_preset(
        cls, size: str, *, image_size: int = IMAGE_SIZE, n_colors: int = N_COLORS, **overrides: Any
    ) -> "ImageGPTConfig":
        """Make the configuration for one of the paper's sizes ("s", "m", "l", "xl") or of this package's ("tiny", "xs").

        image_size: height = width in pixels, so N = image_size². n_colors: K. `overrides` are fields of the
        configuration. The model has no biases and no dropout, is initialised as in OpenAI's code (src/model.py), and has
        SOS as `bos_token_id`. An unknown size is a ValueError.
        """
        if size not in SIZES:
            raise ValueError(f"No preset {size!r}: the sizes are {', '.join(SIZES)}.")
        shape = SIZES[size]
        fields: dict[str, Any] = {
            "n_layer": shape.n_layer,
            "n_embd": shape.n_embd,
            "n_head": shape.n_head,
            "n_positions": image_size * image_size,
            "vocab_size": n_colors + 1,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "use_bias": False,
            "initialization": "openai",
        }
        fields.update(overrides)
        fields.setdefault("bos_token_id", fields["vocab_size"] - 1)
        return cls(**fields)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = fields.get("model_type", cls.model_type)
        if found != cls.model_type:  # transformers only warns, and makes a model with random weights
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {found}, not an Image GPT (imagegpt)."
            )
        return fields, kwargs

    @property
    def sos_token_id(self) -> int:
        """The start-of-sequence token, K, which follows the last colour."""
        return self.vocab_size - 1

    def __post_init__(self, **kwargs: Any) -> None:
        if __package__ == "hf_igpt":
            # A published repository's configuration names its own code; here the package's pipelines are registered.
            kwargs.pop("custom_pipelines", None)
        elif "ImageGPTForImageClassification" not in (self.architectures or []):  # which keeps its own task
            # Added here and not in config.json, because plain transformers would then refuse a task that it can serve.
            features = {
                "impl": "pipelines_imagegpt.ImageGPTFeatureExtractionPipeline",
                "pt": ["AutoModel"],
                "type": "image",
            }
            kwargs["custom_pipelines"] = {**kwargs.get("custom_pipelines", {}), _FEATURES: features}
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) is not a multiple of n_head ({self.n_head}).")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size is at least 2 (one colour and SOS); found {self.vocab_size}.")
        if self.initialization not in ("transformers", "openai"):
            raise ValueError(f'initialization is "transformers" or "openai"; found {self.initialization!r}.')
        if self.objective not in ("causal", "masked"):
            raise ValueError(
                f'objective is "causal" or "masked"; found {self.objective!r}. A newer hf_igpt may know it: pip install -U hf_igpt'
            )
        if self.sos_inputs and self.objective == "masked":
            raise ValueError("sos_inputs is for causal models: masked models have no SOS.")
        if not self.generative_loss_weight >= 0:
            raise ValueError(f"generative_loss_weight is at least 0; found {self.generative_loss_weight}.")
        if self.objective == "masked":
            self.is_causal = False  # read by transformers' attention masks
        if isinstance(self.reorder_and_upcast_attn, str):
            self.reorder_and_upcast_attn = False  # the sentence that `to_dict` wrote
        if self.add_cross_attention:
            raise ValueError("add_cross_attention=True is not supported: Image GPT has no cross-attention.")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True is not supported: Image GPT's two token matrices are untied.")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.get("custom_pipelines", {}).pop(_FEATURES, None)
        if self.objective == "masked" or self.sos_inputs:
            output["reorder_and_upcast_attn"] = NEEDS_HF_IGPT
        return output


__all__ = ["ImageGPTConfig"]
