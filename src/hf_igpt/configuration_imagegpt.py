"""`ImageGPTConfig`: transformers' fields and defaults, the paper's presets, and the few keys that are ours."""

import copy
import dataclasses
import os
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from packaging.version import Version


if Version(transformers.__version__) < Version("5.17"):  # before imports that older versions cannot serve
    raise ImportError(
        f"This Image GPT needs transformers >= 5.17; found {transformers.__version__}: pip install -U transformers"
    )

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .presets import IMAGE_SIZE, N_COLORS, SIZES


NEEDS_HF_IGPT = (
    "This Image GPT needs the package hf_igpt (pip install hf_igpt, then `import hf_igpt`): transformers' own ImageGPT has "
    "no masked objective, no classes and no classifiers that are fed SOS, and would give wrong results."
)
# Tasks of transformers for which a published repository has pipelines of its own: they read images as its processor does.
_PIPELINES = {
    "image-classification": {
        "impl": "pipelines_imagegpt.ImageGPTClassificationPipeline",
        "pt": ["AutoModelForImageClassification"],
        "type": "image",
    },
    "image-feature-extraction": {
        "impl": "pipelines_imagegpt.ImageGPTFeatureExtractionPipeline",
        "pt": ["AutoModel"],
        "type": "image",
    },
}
_MAX_PARAMETERS = 10**12

Allowed = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and which ones are, in words


def _number(kind: type[int] | type[float], least: int, most: int) -> Allowed:
    kinds = (int, kind)
    words = f"{'an integer' if kind is int else 'a number'} of at least {least} and at most {most:,}"
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most, words


def _instance(*kinds: type, words: str) -> Allowed:
    return lambda value: isinstance(value, kinds), words


def _choice(*choices: str, words: str = "") -> Allowed:
    named = " or ".join(f'"{choice}"' for choice in choices)
    return lambda value: isinstance(value, str) and value in choices, words or named


def _optional(allowed: Allowed) -> Allowed:
    return lambda value: value is None or allowed[0](value), allowed[1]


_FLAG = _instance(bool, words="true or false")
_PROBABILITY = _number(float, 0, 1)
_TOKEN = _optional(_number(int, -1, 2**31 - 1))
_DTYPE: Allowed = (
    lambda value: isinstance(getattr(torch, value, None) if isinstance(value, str) else value, torch.dtype),
    'the name of a type in torch, such as "float32"',
)
_MAX_CLASSES = 1_000_000
_IMPLEMENTATION = _optional(_instance(str, dict, words='the name of an attention implementation, such as "sdpa"'))
_ABSENT: Allowed = (lambda value: value is None, "not supported by Image GPT, and has to be absent")
# What the fields may be. The limits lie far beyond any model that could be trained, and keep a stranger's configuration
# from taking all memory.
_FIELDS: dict[str, Allowed] = {
    "vocab_size": _number(int, 2, 2**24 + 1),  # all colours of 8 bits per channel, and SOS
    "n_class_tokens": _number(int, 0, _MAX_CLASSES),
    "n_positions": _number(int, 1, 2**24),  # 4096 x 4096 pixels
    "n_embd": _number(int, 1, 2**17),
    "n_layer": _number(int, 1, 2**12),
    "n_head": _number(int, 1, 2**17),
    "n_inner": _optional(_number(int, 1, 2**20)),
    "num_labels": _optional(_number(int, 1, _MAX_CLASSES)),
    "id2label": _optional(
        (
            lambda value: (
                isinstance(value, dict)
                and 1 <= len(value) <= _MAX_CLASSES
                and {str(key) for key in value} == {str(number) for number in range(len(value))}
            ),
            f"the names of the classes 0, 1, 2, … without a gap, at least 1 and at most {_MAX_CLASSES:,}",
        )
    ),
    "label2id": _optional(_instance(dict, words="a dictionary")),
    "architectures": _optional(_instance(list, words="a list")),
    "custom_pipelines": _instance(dict, words="a dictionary"),
    "resid_pdrop": _PROBABILITY,
    "embd_pdrop": _PROBABILITY,
    "attn_pdrop": _PROBABILITY,
    "layer_norm_epsilon": _PROBABILITY,
    "initializer_range": _number(float, 0, 1000),
    "generative_loss_weight": _number(float, 0, 1_000_000),
    "pad_token_id": _TOKEN,
    "bos_token_id": _TOKEN,
    "eos_token_id": (
        lambda value: all(_TOKEN[0](token) for token in (value if isinstance(value, list) else [value])),
        f"{_TOKEN[1]}, or a list of such",
    ),
    "scale_attn_weights": _FLAG,
    "scale_attn_by_inverse_layer_idx": _FLAG,
    "reorder_and_upcast_attn": _instance(bool, str, words="true or false"),
    "use_cache": _FLAG,
    "use_bias": _FLAG,
    "sos_inputs": _FLAG,
    "tie_word_embeddings": _FLAG,
    "add_cross_attention": _FLAG,
    "activation_function": _choice("quick_gelu", *ACT2FN, words="a name in transformers.activations.ACT2FN"),
    "initialization": _choice("transformers", "openai"),
    "objective": _choice(
        "causal",
        "masked",
        words='"causal" or "masked" (a newer hf_igpt may know others: pip install -U hf_igpt)',
    ),
    "problem_type": _optional(_choice("regression", "single_label_classification", "multi_label_classification")),
    "dtype": _optional(_DTYPE),
    "torch_dtype": _optional(_DTYPE),
    # What transformers reads from any configuration.
    "return_dict": _optional(_FLAG),
    "output_attentions": _optional(_FLAG),
    "output_hidden_states": _optional(_FLAG),
    "attn_implementation": _IMPLEMENTATION,
    "_attn_implementation": _IMPLEMENTATION,
    "is_encoder_decoder": (lambda value: value is False, "false"),
    "sliding_window": _ABSENT,
    "attention_chunk_size": _ABSENT,
    "layer_types": _ABSENT,
    "rope_parameters": _ABSENT,
    "text_config": _ABSENT,
    "transformers_weights": _optional(_instance(str, words="the name of a file")),
}
_SETTABLE = ("model_type", "num_labels", "name_or_path", "output_attentions", "torch_dtype", "_attn_implementation")


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
    n_class_tokens (`int`, defaults to 0):
        The number C of classes that a causal model can be told to draw. Input tokens K + 1 … K + C, the last rows of the
        embeddings, stand in the place of SOS and say which class an image is of; SOS itself says none. The names are
        those in `id2label`.
    sos_inputs (`bool`, defaults to `False`):
        Whether a classifier on a causal model reads [SOS, x_0 … x_{N-2}], as in OpenAI's code, or x_0 … x_{N-1}, as
        in transformers.
    generative_loss_weight (`float`, defaults to 0):
        Weight of the generative loss that fine-tuning adds to the classification loss (paper 2.3: 1). A classifier
        keeps its colour head if the weight is positive.

    `base_model_fsdp_plan` shards all weights, block by block, in `from_pretrained(distributed_config=
    DistributedConfig(fsdp_size=...))`; it is not written to any file. There is no plan for tensor parallelism.

    All other fields are those of transformers' `ImageGPTConfig`. Cross-attention and tied embeddings are not supported. A
    value that is not supported is a ValueError that names the field, before any memory is taken; so are values beyond
    4,096 blocks, a width of 131,072, an inner width of 1,048,576, 4096 x 4096 pixels, 2^24 colours, 1,000,000 classes, or
    10^12 parameters. Plain transformers would load masked models, classifiers with `sos_inputs`, and models with classes, and
    silently give wrong results, so their saved configuration makes it refuse: it holds a sentence in a field that
    transformers requires to be a boolean.
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
    layer_norm_epsilon: float | int = 1e-5
    initializer_range: float | int = 0.02
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
    n_class_tokens: int = 0
    sos_inputs: bool = False
    generative_loss_weight: float | int = 0.0

    @classmethod
    def from_preset(
        cls, size: str, *, image_size: int | Sequence[int] = IMAGE_SIZE, n_colors: int = N_COLORS, **overrides: Any
    ) -> "ImageGPTConfig":
        """Make the configuration for one of the paper's sizes ("s", "m", "l", "xl") or of this package's ("tiny", "xs").

        image_size: (height, width) in pixels, or one number for a square; N is their product. n_colors: K. `overrides` are
        fields of the configuration. The model has no biases and no dropout, is initialised as in OpenAI's code
        (src/model.py), and has SOS as `bos_token_id`. An unknown size is a ValueError.
        """
        if size not in SIZES:
            raise ValueError(f"No preset {size!r}: the sizes are {', '.join(SIZES)}.")
        shape = SIZES[size]
        sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise ValueError(f"image_size is a number of pixels, or (height, width); found {image_size!r:.50}.")
        fields: dict[str, Any] = {
            "n_layer": shape.n_layer,
            "n_embd": shape.n_embd,
            "n_head": shape.n_head,
            "n_positions": sides[0] * sides[1],
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

    def __new__(cls, **fields: Any) -> "ImageGPTConfig":
        """Check `fields` before anything is made of them: `strict`'s own errors are no ValueErrors, and come after."""
        known = {field.name for field in dataclasses.fields(cls)} | set(_SETTABLE)
        for field, value in fields.items():
            name = cls.attribute_map.get(field, field)
            is_allowed, words = _FIELDS.get(name, (lambda value: True, ""))
            if not is_allowed(value):
                raise ValueError(f"{field} is {words}; found {reprlib.repr(value)}.")
            if hasattr(cls, name) and name not in known:
                raise ValueError(f"{field} belongs to the class of configurations, and cannot be one of their fields.")
        return super().__new__(cls)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a configuration as transformers does. A ValueError says which one it is about."""
        try:
            return super().from_pretrained(*args, **kwargs)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"The configuration of {args[0] if args else 'a model'}: {error}") from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration as transformers does; `kwargs` that are fields are checked together with the others."""
        names = {name for name in kwargs if cls.attribute_map.get(name, name) in _FIELDS} - {"dtype", "torch_dtype"}
        return super().from_dict(config_dict | {name: kwargs[name] for name in names}, **kwargs)

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

    @property
    def fits_transformers(self) -> bool:
        """Whether transformers' own Image GPT gives the same results with this configuration's weights."""
        return self.objective == "causal" and not self.sos_inputs and not self.n_class_tokens

    def __post_init__(self, **kwargs: Any) -> None:
        if __package__ == "hf_igpt":
            # A published repository's configuration names its own code; here the package's pipelines are registered.
            kwargs.pop("custom_pipelines", None)
        else:
            # Added here and not in config.json, because plain transformers would then refuse tasks that it can serve.
            is_classifier = "ImageGPTForImageClassification" in (self.architectures or [])
            task = "image-classification" if is_classifier else "image-feature-extraction"  # one, which may go unnamed
            kwargs["custom_pipelines"] = {**kwargs.get("custom_pipelines", {}), task: copy.deepcopy(_PIPELINES[task])}
        for alias in self.attribute_map.keys() & kwargs.keys():  # so that what follows sees them
            setattr(self, alias, kwargs.pop(alias))
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) is not a multiple of n_head ({self.n_head}).")
        inner = self.n_inner or 4 * self.n_embd
        rows = (
            2 * self.vocab_size + self.n_class_tokens + self.n_positions + self.n_layer * (4 * self.n_embd + 2 * inner)
        )
        if rows * self.n_embd > _MAX_PARAMETERS:
            raise ValueError(
                f"n_layer ({self.n_layer}), n_embd ({self.n_embd}), n_inner ({inner}), n_positions ({self.n_positions}) and "
                f"vocab_size ({self.vocab_size}) make {rows * self.n_embd:,} parameters; at most {_MAX_PARAMETERS:,} are allowed."
            )
        for field in ("sos_inputs", "n_class_tokens"):
            if getattr(self, field) and self.objective == "masked":
                raise ValueError(f"{field} is for causal models: masked models have no SOS.")
        if self.n_class_tokens and self.id2label is None and kwargs.get("num_labels") is None:
            kwargs["num_labels"] = self.n_class_tokens
        is_causal = self.objective == "causal"  # read by transformers' attention masks
        if kwargs.get("is_causal", is_causal) is not is_causal:
            raise ValueError(
                f"is_causal is {is_causal} if objective is {self.objective!r}; found {kwargs['is_causal']!r}."
            )
        if not is_causal:
            self.is_causal = False
        if isinstance(self.reorder_and_upcast_attn, str):
            self.reorder_and_upcast_attn = False  # the sentence that `to_dict` wrote
        if self.add_cross_attention:
            raise ValueError("add_cross_attention=True is not supported: Image GPT has no cross-attention.")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True is not supported: Image GPT's two token matrices are untied.")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for task in _PIPELINES:
            output.get("custom_pipelines", {}).pop(task, None)
        if not self.fits_transformers:
            output["reorder_and_upcast_attn"] = NEEDS_HF_IGPT
        return output


__all__ = ["ImageGPTConfig"]
