"""The Image GPT transformer, `ImageGPTModel`, and the models with a head: `ImageGPTForCausalImageModeling`,
`ImageGPTForMaskedImageModeling` and `ImageGPTForImageClassification`.

Follows OpenAI's code (src/model.py): pre-norm blocks of attention and MLP around a residual stream, norms without mean
subtraction, untied token matrices. The weights have the names, shapes and layouts of transformers' ImageGPT.
Shape letters: B images, N pixels, which are the tokens of an image, T tokens of an input, K colours, D width.
"""

import copy
import math
import re
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import ClassifierFreeGuidanceLogitsProcessor, LogitsProcessorList
from transformers.generation.utils import GenerateOutput
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_imagegpt import add_room, cut_candidates, remove_room, with_sos
from .configuration_imagegpt import ImageGPTConfig
from .inputs_imagegpt import (
    IGNORE_INDEX,
    check_flash_attention,
    check_length,
    check_mask,
    check_tokens,
    has_values,
    name_classes,
    number_images,
    refuse_packed_images,
    same_image,
    shift_right,
)
from .layers_imagegpt import (
    ImageGPTLayerNorm,
    ImageGPTProjection,
    ImageGPTSublayer,
    QuickGELU,
    at_least_float32,
    choose_initial_std,
    set_initial_std,
)
from .presets import INIT_EMBEDDING_STD, INIT_MLP_STD, INIT_POSITION_STD, MASK_PROBABILITY


_HEADS = ("lm_head.weight", "score.weight")

AnyImageGPT = TypeVar("AnyImageGPT", bound="ImageGPTPreTrainedModel")

logger = logging.get_logger(__name__)


# -- the block ---------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax(q kᵀ · scaling + mask) v with all weights materialised, the softmax in at least float32.

    query, key, value: (B, heads, T, D/heads). Returns the output (B, T, heads, D/heads) and the weights (B, heads, T, T).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = at_least_float32(scores).softmax(dim=-1).to(value.dtype)
    output = nn.functional.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2), weights  # (B, T, heads, D/heads), (B, heads, T, T)


class ImageGPTAttention(ImageGPTSublayer):
    """Multi-head self-attention, with one projection to queries, keys and values."""

    def __init__(self, config: ImageGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.is_causal = True
        d = config.n_embd
        self.c_attn = ImageGPTProjection(config, 3 * d, d, choose_initial_std(config, d**-0.5))
        std = choose_initial_std(config, (d * config.n_layer) ** -0.5, residual=True)
        self.c_proj = ImageGPTProjection(config, d, d, std)
        self.attn_dropout = config.attn_pdrop
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> queries, keys and values, each (B, heads, T, D/heads), in one tensor."""
        qkv = self.c_attn(x).view(*x.shape[:-1], 3, -1, self.head_dim)
        return qkv.permute(2, 0, 3, 1, 4)

    def forward(
        self,
        x: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the attention weights (B, heads, T, T) if the implementation returns them."""
        query, key, value = self.project(x)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attn_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        output = self.c_proj(output.reshape(*x.shape[:-1], -1))
        return self.resid_dropout(output), weights


class ImageGPTMLP(ImageGPTSublayer):
    """Two projections with an activation between them, of width 4 D unless the config says otherwise."""

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        n_inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = ImageGPTProjection(config, n_inner, config.n_embd, choose_initial_std(config, INIT_MLP_STD))
        std = choose_initial_std(config, INIT_MLP_STD, residual=True)
        self.c_proj = ImageGPTProjection(config, config.n_embd, n_inner, std)
        self.act = QuickGELU() if config.activation_function == "quick_gelu" else ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class ImageGPTBlock(GradientCheckpointingLayer):
    """A pre-norm residual block: attention, then an MLP [V2 2.2]."""

    def __init__(self, config: ImageGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = ImageGPTAttention(config, layer_idx)
        self.ln_2 = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = ImageGPTMLP(config)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, T, D) -> (B, T, D); `kwargs` are passed to attention."""
        x = x + self.attn(self.ln_1(x), **kwargs)[0]
        return x + self.mlp(self.ln_2(x))


# -- the transformer ---------------------------------------------------------------------------------------------------


class ImageGPTPreTrainedModel(PreTrainedModel):
    """Loading, saving, the choice of attention and initialisation, for all Image GPT classes."""

    config: ImageGPTConfig
    config_class = ImageGPTConfig
    base_model_prefix = "transformer"
    input_modalities = ("image",)  # type: ignore[assignment]  # a tuple in transformers' own models too
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ImageGPTBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": ImageGPTBlock,
        "attentions": OutputRecorder(ImageGPTAttention, index=1, layer_name=".attn"),
    }
    # Causal masks, which old versions of transformers saved in every block, and the heads of other classes: a converted
    # checkpoint holds both.
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$", r"^lm_head\.", r"^score\."]

    @classmethod
    def from_pretrained(cls: type[AnyImageGPT], *args: Any, **kwargs: Any) -> AnyImageGPT:
        """Load a model as transformers does, but a configuration that its weights do not fit is a ValueError.

        transformers would draw blocks that are missing at random, leave out those that are too many, and raise an error that
        names no tensor. Heads may be missing, and are then new. With `ignore_mismatched_sizes` or a `state_dict` it does as it
        is told, and with `output_loading_info` the caller learns what is missing and judges it. Weights that cannot be read,
        and trained biases that `use_bias=False` would drop, are ValueErrors too.
        """
        wants_loading_info = kwargs.pop("output_loading_info", False)
        trusted = kwargs.get("ignore_mismatched_sizes") or kwargs.get("state_dict") is not None
        options = kwargs if trusted else kwargs | {"ignore_mismatched_sizes": True}  # they are refused below, by name
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        try:
            loaded: Any = super().from_pretrained(*args, **options, output_loading_info=True)
        except Exception as error:
            if type(error).__name__ not in ("SafetensorError", "UnpicklingError"):
                raise
            said = str(error).partition("\n")[0]
            raise ValueError(f"The weights of {source} are damaged or cut short: {said}") from error
        model, loading = loaded
        if not trusted:
            told = {"missing_keys": (), "unexpected_keys": ()} if wants_loading_info else {}
            check_loading(model, str(source), loading | told)
        for name, module in model.named_modules():
            if isinstance(module, ImageGPTProjection) and not module.use_bias and module.bias.any():
                raise ValueError(
                    f"The weights hold biases ({name}), which use_bias=False would leave out: load them with use_bias=True."
                )
        return loaded if wants_loading_info else model

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Resize the embeddings of a model without a colour head, as transformers does.

        With a colour head, other numbers of colours are a ValueError: SOS is the last row, so that new rows would take its
        place, and they would be drawn although they are no colours.
        """
        config = self.config
        has_colors = getattr(self, "lm_head", None) is not None or config.sos_inputs or config.n_class_tokens
        if has_colors:
            if new_num_tokens in (None, config.vocab_size) and not kwargs.get("pad_to_multiple_of"):
                return self.get_input_embeddings()  # transformers would resize the head, which has a row less
            raise ValueError(
                f"This model has K = {config.vocab_size - 1} colours, and SOS after them in its embeddings: they cannot be "
                f"resized to {new_num_tokens}. Make a model with `ImageGPTConfig(vocab_size=K + 1, …)` and copy into it the rows "
                "of `transformer.wte` (SOS to row K) and of `lm_head`."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _refuse_flex_attention(self) -> None:
        """Raise ValueError for FlexAttention with a static cache: transformers 5.23 gives wrong logits, as for its own models."""
        if self.config._attn_implementation == "flex_attention":
            raise ValueError('A static cache does not work with flex_attention: use attn_implementation="sdpa".')

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Each layer carries its own standard deviation, because transformers does not call this for modules without
        # parameters of their own, so a parent cannot draw its children's weights. Layers that transformers makes, such as
        # resized embeddings, have none.
        if isinstance(module, ImageGPTLayerNorm):
            init.ones_(module.weight)
        elif isinstance(module, (ImageGPTProjection, nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=getattr(module, "init_std", self.config.initializer_range))
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                init.zeros_(module.bias)


class ImageGPTModel(ImageGPTPreTrainedModel):
    """The transformer without a head: tokens (B, T) -> hidden states (B, T, D) after the final norm, T <= N."""

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size + config.n_class_tokens, config.n_embd)  # row K is SOS
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        set_initial_std(self.wte, choose_initial_std(config, INIT_EMBEDDING_STD))
        set_initial_std(self.wpe, choose_initial_std(config, INIT_POSITION_STD))
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([ImageGPTBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]  # no other module will do
        self.wte = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the plain forward pass, without a shift, on `input_ids` (B, T), tokens 0..K + C, or `inputs_embeds` (B, T, D).

        bool_masked_pos: (B, T), for masked models; where it is True, the pixel's embedding is zeroed and its position kept
        [code bert]. `hidden_states` (with `output_hidden_states=True`) are the inputs of all blocks, followed by the output
        of `ln_f`. A token out of range, or more tokens than n_positions, is a ValueError.
        """
        if "pixel_values" in kwargs:
            raise ValueError("Image GPT reads tokens: pass the `input_ids` that its image processor returns.")
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Pass either `input_ids` or `inputs_embeds`, and not both.")
        wants_attentions = kwargs.pop("output_attentions", None)  # the decorator has already read both
        kwargs.pop("output_hidden_states", None)
        if wants_attentions is None:
            wants_attentions = self.config.output_attentions
        if wants_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True: {self.config._attn_implementation} attention does not compute its weights. Use "
                '`model.set_attn_implementation("eager")`.'
            )
        images = number_images(position_ids, past_key_values, attention_mask)
        if self.config.objective == "masked" or (images is not None and has_values(images)):
            use_cache = False  # there is no past: every position attends to all others, or the row is complete
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if getattr(past_key_values, "is_compileable", False):
            self._refuse_flex_attention()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        check_length(inputs.shape, seen, position_ids, self.config)
        if inputs_embeds is None:
            check_tokens(inputs, self.config.vocab_size + self.config.n_class_tokens, "input_ids", self.config)
            inputs_embeds = self.wte(inputs.long())
        if bool_masked_pos is not None:
            check_mask(bool_masked_pos, inputs.shape[:2], self.config)
            inputs_embeds = inputs_embeds * ~bool_masked_pos[..., None]
        if position_ids is None:
            position_ids = (torch.arange(inputs.shape[1], device=inputs.device) + seen).unsqueeze(0)
        hidden = inputs_embeds + self.wpe(position_ids)
        if token_type_ids is not None:
            hidden = hidden + self.wte(token_type_ids)
        hidden = self.drop(hidden)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            and_mask_function=None if images is None else same_image(images.expand(len(inputs_embeds), -1)),
        )
        if images is not None and "flash" in str(self.config._attn_implementation):
            check_flash_attention(images, position_ids, len(inputs_embeds), attention_mask is not None)
            kwargs["position_ids"] = position_ids  # by which it tells images apart
        for block in self.h[: self.config.n_layer]:  # fewer while an assistant exits early
            hidden = block(hidden, past_key_values=past_key_values, attention_mask=mask, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden), past_key_values=past_key_values if use_cache else None
        )


# -- heads -------------------------------------------------------------------------------------------------------------


class ImageGPTForCausalImageModeling(ImageGPTPreTrainedModel, GenerationMixin):
    """Autoregressive image model: logits at position i are for the K colours of pixel i, given SOS and the pixels before it.

    `model(labels=tokens)` is the training call: the inputs are [SOS, x_0 … x_{N-2}], all N pixels are scored, and `loss` is
    in nats per pixel [code gen_loss]. `model(input_ids=...)` is the plain forward pass. With both, transformers' contract
    holds: logits at i are scored against labels at i + 1. Weights of a masked model are a ValueError.

    With `config.n_class_tokens` classes it is also a model of the images of each: a token of the class then stands in the
    place of SOS. These tokens, K + 1 and the class, follow SOS in the one table of embeddings, so that a class is a part of
    the prompt like any token, for `generate`, for all caches, and in `input_ids` that pack several images into a row.
    """

    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config)
        _check_objective(self, config, "causal")
        self.transformer = ImageGPTModel(config)
        self.lm_head = _color_head(config)
        if config.bos_token_id is not None:
            # The paper's sampling [code run.py sample], in plain transformers too, whose default is top_k = 50.
            self.generation_config = GenerationConfig(
                bos_token_id=config.bos_token_id,
                max_length=config.n_positions + 1,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return `logits` (B, T, K) and, if labels are given, `loss` in nats per pixel.

        labels: (B, N) colours in 0..K-1. −100 marks pixels that are not scored, and requires `input_ids`. class_labels: (B,)
        the class of each image, 0..C-1, or −1 for none; its token takes the place of SOS, with which `input_ids` begin. A
        plain `Trainer` drops this column unless remove_unused_columns=False. num_items_in_batch: the divisor of the summed
        loss, instead of the number of scored pixels (`Trainer`'s count over accumulated steps and processes).
        logits_to_keep: compute logits only for this many last positions (0: all), or for the positions in a tensor; ignored
        if labels are given. A token or label out of range is a ValueError.
        """
        labels_alone = labels is not None and input_ids is None and inputs_embeds is None
        if labels is not None:
            n_colors = self.config.vocab_size - 1
            check_tokens(labels, n_colors, "labels", self.config, ignore=True)
            labels = labels.long()
            if labels_alone:
                if has_values(labels) and (labels == IGNORE_INDEX).any():
                    raise ValueError(
                        "`labels` with −100 do not determine the inputs: pass `input_ids` (SOS first) with them."
                    )
                input_ids = shift_right(labels, self.config.sos_token_id, number_images(position_ids))
                use_cache = bool(use_cache)
            elif input_ids is not None and not self._starts_with_sos(input_ids, attention_mask):
                logger.warning_once(
                    "`input_ids` given with `labels` do not start with SOS: pixel 0 is never scored. "
                    "`model(labels=tokens)` alone adds SOS and scores every pixel."
                )
        # Not in the signature: `Trainer` takes every argument with "label" in its name for a target.
        class_labels = kwargs.pop("class_labels", None)
        if class_labels is not None:
            if input_ids is None:
                raise ValueError("`class_labels` take the place of a token, SOS: pass `input_ids` or `labels`.")
            refuse_packed_images(position_ids, "A class")
            input_ids = name_classes(input_ids, class_labels, self.config, attention_mask)
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # (B, T, D)
        if labels is None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden = hidden[:, keep]
        logits = self.lm_head(hidden)  # (B, T, K)
        loss = None
        if labels is not None:
            scored, targets = (logits, labels) if labels_alone else (logits[:, :-1], labels[:, 1:])
            loss = _cross_entropy(scored.flatten(0, 1), targets.flatten(), num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def compute_transition_scores(
        self,
        sequences: torch.Tensor,
        scores: tuple[torch.Tensor, ...],
        beam_indices: torch.Tensor | None = None,
        normalize_logits: bool = False,
    ) -> torch.Tensor:
        """Return the score of every pixel that `generate` drew, as transformers does: (B, T) logits or logarithms.

        transformers takes the scores to have vocab_size = K + 1 columns; SOS, which is never drawn, gets −inf.
        """
        with_sos = tuple(nn.functional.pad(score, (0, 1), value=-torch.inf) for score in scores)
        return super().compute_transition_scores(  # type: ignore[misc]  # its annotations are of other classes
            sequences,
            with_sos,  # type: ignore[arg-type]  # a tuple of any length
            beam_indices,
            normalize_logits,
        )

    def _starts_with_sos(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Whether the first token that is not padding is SOS, or a class, in every row; True where values cannot be read."""
        if not has_values(input_ids):
            return True
        first = input_ids[:, :1]
        if attention_mask is not None and attention_mask.shape == input_ids.shape:
            start = attention_mask.to(input_ids.device, torch.long).argmax(dim=1, keepdim=True)
            first = input_ids.gather(1, start)
        return bool((first >= self.config.sos_token_id).all())

    @torch.no_grad()
    def generate(  # type: ignore[override]  # the other arguments are in `kwargs`
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> GenerateOutput | torch.Tensor:
        """Return tokens (B, 1 + N), SOS or a class first: whole images by default, or continuations of such `inputs` (B, T).

        Works as `GenerationMixin.generate`, except that SOS and the full length are supplied if neither the arguments nor
        the checkpoint give them, and that a length over SOS + N is a ValueError before the first step. SOS is never
        sampled.

        class_labels: (B,) the class that each image is to be of, 0..C-1, or −1 for none, whose token takes the place of SOS.
        guidance_scale: s of classifier-free guidance, for images of classes: logits are l + (s − 1) (l − l_∅), where l_∅ are
        those of no class; 1 is none. Both are computed in one batch with one cache, so that the `logits` and the hidden
        states of an output have 2 B rows, and the `scores` B. With `negative_prompt_ids` guidance is transformers' own.
        Guidance of images of no class, below 1, and with other than sampling and greedy search is a ValueError.
        """
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
        sources = [generation_config, self.generation_config]

        def given(name: str) -> Any:
            values = [kwargs.get(name)] + [getattr(source, name) for source in sources if source is not None]
            return next((value for value in values if value is not None), None)

        def supply(name: str, value: Any) -> None:
            if generation_config is not None:
                setattr(generation_config, name, value)
            else:
                kwargs[name] = value

        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        whole = self.config.n_positions + 1
        if given("bos_token_id") is None:
            supply("bos_token_id", self.config.sos_token_id)
        if given("cache_implementation") not in (None, "dynamic"):
            self._refuse_flex_attention()
        if given("max_new_tokens") is None and given("max_length") is None:
            supply("max_length", whole)
        if given("max_new_tokens") is not None:
            embeddings = kwargs.get("inputs_embeds")
            start = prompt if embeddings is None else embeddings
            length = given("max_new_tokens") + (1 if start is None else start.shape[1])
        else:
            length = given("max_length")
        if length > whole:
            raise ValueError(
                f"{length} tokens were requested; SOS and the {whole - 1} pixels of an image make {whole}. "
                "Lower max_length or max_new_tokens, or leave them out for whole images."
            )
        class_labels = kwargs.pop("class_labels", None)
        if class_labels is not None:
            if kwargs.get("inputs_embeds") is not None:
                raise ValueError(
                    "`class_labels` take the place of a token, SOS: pass tokens in place of `inputs_embeds`."
                )
            if prompt is None:
                prompt = torch.full((len(class_labels), 1), self.config.sos_token_id)
            mask = kwargs.get("attention_mask")
            inputs = prompt = name_classes(prompt.to(self.device), class_labels, self.config, mask)
            kwargs.pop("input_ids", None)
        if prompt is None and kwargs.get("inputs_embeds") is None:
            prompt = torch.tensor([[given("bos_token_id")]])
        asked = [kwargs.get("guidance_scale"), getattr(generation_config, "guidance_scale", None)]
        scale = kwargs["guidance_scale"] if "guidance_scale" in kwargs else given("guidance_scale")
        if scale not in (None, 1) and kwargs.get("negative_prompt_ids") is None:  # with which transformers guides
            of_classes = prompt is not None and bool((prompt > self.config.sos_token_id).any())
            if not of_classes and asked == [None, None]:  # the checkpoint's own default is for images of classes
                scale = kwargs["guidance_scale"] = None
            elif not of_classes:
                raise ValueError(
                    "guidance_scale strengthens a class: give `class_labels`, to a model that knows classes."
                )
            elif not 1 < scale < math.inf:
                raise ValueError(f"guidance_scale is at least 1, which is none, and finite; found {scale}.")
            else:
                kwargs["guided"] = True
        if prompt is not None and prompt.ndim == 2 and not self._starts_with_sos(prompt, kwargs.get("attention_mask")):
            logger.warning_once(
                f"The prompt does not start with SOS ({self.config.sos_token_id}): every pixel is one position earlier "
                "than in training."
            )
        output = super().generate(inputs, generation_config=generation_config, **kwargs)  # type: ignore[misc]  # its `self`
        if not torch.is_tensor(output):
            remove_room(output.past_key_values)
        return output

    def prepare_inputs_for_generation(  # type: ignore[override]  # the other arguments are in `kwargs`
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        guided: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers' own. guided: the rows occur once more, with SOS in the place of their class, for guidance."""
        if guided:
            sos = self.config.sos_token_id
            input_ids = torch.cat([input_ids, input_ids.clamp(max=sos)])
            twice = {"attention_mask": attention_mask} | kwargs
            for name, value in twice.items():
                if torch.is_tensor(value) and value.ndim > 1 and 2 * len(value) == len(input_ids):
                    twice[name] = torch.cat([value, value])
            attention_mask, kwargs = twice.pop("attention_mask"), twice
        return super().prepare_inputs_for_generation(  # type: ignore[misc]  # its `self`
            input_ids,  # type: ignore[arg-type]  # any integers
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,  # type: ignore[arg-type]
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _get_logits_processor(
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> LogitsProcessorList:
        scale = generation_config.guidance_scale
        guided = (kwargs.get("model_kwargs") or {}).get("guided", False)  # as `generate` has decided
        if guided:  # transformers' own would run the model a second time
            generation_config = copy.copy(generation_config)
            generation_config.guidance_scale = None
        rest = super()._get_logits_processor(generation_config, *args, **kwargs)  # type: ignore[misc]  # its `self`
        guidance = [ClassifierFreeGuidanceLogitsProcessor(scale)] if guided else []
        return LogitsProcessorList([*guidance, *with_sos(rest, self.config.n_class_tokens)])

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> CandidateGenerator:
        found = super()._get_candidate_generator(generation_config, *args, **kwargs)  # type: ignore[misc]  # its `self`
        return cut_candidates(found, generation_config.max_length - 1)  # the last pixel is no input

    def _prepare_cache_for_generation(  # type: ignore[override]  # annotated as bool there, but returns nothing
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        # The dynamic cache that transformers makes, with room for the keys and values of all remaining tokens.
        given = model_kwargs.get("past_key_values")
        if model_kwargs.get("guided"):
            batch_size *= 2
            if generation_mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
                raise ValueError(f"guidance_scale is for sampling and greedy search; found {generation_mode.value}.")
        super()._prepare_cache_for_generation(  # type: ignore[misc]  # its `self`
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        beams = (generation_config.num_beams or 1) > 1  # reordering copies everything anyway
        if given is None and not beams:
            add_room(model_kwargs.get("past_key_values"), max_cache_length)


class ImageGPTForMaskedImageModeling(ImageGPTPreTrainedModel):
    """BERT-style image model: logits for the K colours of every pixel, given all pixels that are not masked.

    `model(labels=tokens, bool_masked_pos=mask)` is the training call. `loss` averages the masked pixels of each image, then
    the images, in nats per pixel [code bert]; an image without a masked pixel counts as 0. The masked objective
    (`config.objective`) has bidirectional attention, no SOS and no shift. Weights of a causal model are a ValueError.
    """

    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config)
        _check_objective(self, config, "masked")
        self.transformer = ImageGPTModel(config)
        self.lm_head = _color_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Return `logits` (B, N, K) and, if labels are given, `loss` in nats per masked pixel.

        bool_masked_pos: (B, N), True where a pixel is hidden and scored; `draw_mask` draws one. labels: (B, N) colours
        in 0..K-1, which are also the inputs if none are given. num_items_in_batch: `Trainer`'s count of labels, N per
        image, over accumulated steps and processes; the loss is then the sum of the images' means divided by that number
        of images. A token or label out of range is a ValueError.
        """
        if labels is not None:
            check_tokens(labels, self.config.vocab_size - 1, "labels", self.config)
            labels = labels.long()
            if bool_masked_pos is None:
                raise ValueError(
                    "`labels` are scored where pixels are masked: pass `bool_masked_pos` (see `draw_mask`)."
                )
            refuse_packed_images(position_ids, "The loss")
            if input_ids is None and inputs_embeds is None:
                input_ids = labels
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            bool_masked_pos=bool_masked_pos,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)  # (B, N, K)
        loss = None
        if labels is not None and bool_masked_pos is not None:
            n_images = None if num_items_in_batch is None else num_items_in_batch / labels.shape[1]
            loss = _mean(masked_nats(logits, labels, bool_masked_pos), n_images)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@dataclass
class ImageGPTClassifierOutput(SequenceClassifierOutputWithPast):
    """A classifier's output with the terms of the joint loss: `classification_loss` in nats per image, `generative_loss` in
    nats per pixel, and `generative_nats` (B,), the nats per pixel of each image, whose mean is `generative_loss`.
    """

    classification_loss: torch.Tensor | None = None
    generative_loss: torch.Tensor | None = None
    generative_nats: torch.Tensor | None = None


class ImageGPTForImageClassification(ImageGPTPreTrainedModel):
    """Image classifier: `ln_f`'s output, averaged over positions, and a linear layer without bias [code src/model.py clf].

    `input_ids` (or `inputs_embeds`) are the N pixels of each image. With `config.sos_inputs` they are shifted, as in
    pretraining and in OpenAI's code; otherwise the model reads them unshifted, as in transformers. Masked models read them
    unshifted, with the pixels in `bool_masked_pos` hidden. With `config.generative_loss_weight` > 0 the model keeps its
    colour head, and `loss` is L_CLF + weight · L_GEN [V2 2.3].
    """

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # never None once the config is made
        self.transformer = ImageGPTModel(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        set_initial_std(self.score, choose_initial_std(config, 0.0))  # zero logits [V2 3.3]
        self.lm_head = _color_head(config) if config.generative_loss_weight else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> ImageGPTClassifierOutput:
        """Return `logits` (B, classes) and, if labels (B,) are given, `loss`, the mean cross-entropy in nats.

        num_items_in_batch: the divisor of the summed loss, instead of B (`Trainer`'s count over accumulated steps and
        processes). Regression and multi-label problems (`config.problem_type`) have transformers' losses. L_GEN averages
        over the pixels of each image: all N for a causal model with `sos_inputs`, all but the first without, and the masked
        ones for a masked model. A token or label out of range is a ValueError.
        """
        refuse_packed_images(position_ids, "A class")
        joint = labels is not None and self.lm_head is not None
        if self.lm_head is not None and labels is None and num_items_in_batch is not None:
            raise ValueError(
                "A Trainer that computes the loss itself (label_smoothing_factor, compute_loss_func) would drop the "
                "generative loss: leave these out, or load the classifier with generative_loss_weight=0."
            )
        if joint and input_ids is None:
            raise ValueError("The joint loss scores tokens: pass `input_ids`.")
        if joint and self.config.objective == "masked" and bool_masked_pos is None:
            raise ValueError("The joint loss of a masked model scores masked pixels: pass `bool_masked_pos`.")
        pixels = input_ids
        if input_ids is not None and (self.config.sos_inputs or joint):
            check_tokens(input_ids, self.config.vocab_size - 1, "input_ids", self.config)
        if self.config.sos_inputs and input_ids is not None:
            input_ids = shift_right(input_ids, self.config.sos_token_id)
        elif self.config.sos_inputs and inputs_embeds is not None:
            sos = torch.full(inputs_embeds[:, :1, 0].shape, self.config.sos_token_id, device=inputs_embeds.device)
            inputs_embeds = torch.cat([self.transformer.wte(sos).to(inputs_embeds), inputs_embeds[:, :-1]], dim=1)
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),  # off by default: nothing follows a whole image
            bool_masked_pos=bool_masked_pos,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits = self.score(hidden.mean(dim=1))  # (B, classes)
        loss = classification_loss = generative_loss = nats = None
        if labels is not None:
            loss = self._classification_loss(logits, labels, num_items_in_batch)
            if self.lm_head is not None and pixels is not None:
                classification_loss = loss
                nats = self._generative_nats(self.lm_head(hidden), pixels.long(), bool_masked_pos)  # (B,)
                n_images = None if num_items_in_batch is None else num_items_in_batch * len(labels) / labels.numel()
                generative_loss = _mean(nats, n_images)
                loss = classification_loss + self.config.generative_loss_weight * generative_loss
        return ImageGPTClassifierOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            classification_loss=classification_loss,
            generative_loss=generative_loss,
            generative_nats=nats,
        )

    def _classification_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        integers = not labels.is_floating_point() and labels.ndim == 1 and self.num_labels > 1
        if integers and self.config.problem_type in (None, "single_label_classification"):
            self._check_labels(labels)
            return _cross_entropy(logits, labels.long(), num_items_in_batch)
        loss = self.loss_function(labels, logits, self.config)
        if num_items_in_batch is not None:  # Trainer counts all elements of all labels
            loss = loss * labels.numel() / num_items_in_batch
        return loss

    def _generative_nats(
        self, logits: torch.Tensor, pixels: torch.Tensor, bool_masked_pos: torch.Tensor | None
    ) -> torch.Tensor:
        if bool_masked_pos is not None:  # of a masked model, which requires it
            return masked_nats(logits, pixels, bool_masked_pos)
        if not self.config.sos_inputs:  # position i reads pixel i and predicts the next
            logits, pixels = logits[:, :-1], pixels[:, 1:]
        return pixel_nats(logits, pixels).mean(dim=1)

    def _check_labels(self, labels: torch.Tensor) -> None:
        if labels.numel() == 0 or not has_values(labels):
            return
        low, high = int(labels.min()), int(labels.max())
        if high >= self.num_labels or (low < 0 and low != IGNORE_INDEX):
            raise ValueError(
                f"`labels` run from {low} to {high}; this model has {self.num_labels} classes, 0..{self.num_labels - 1}: "
                "load it with your data's num_labels=."
            )


def draw_mask(
    shape: tuple[int, ...], generator: torch.Generator | None = None, probability: float = MASK_PROBABILITY
) -> torch.Tensor:
    """Draw a boolean mask of `shape` (B, N); each pixel is True with `probability`, independently [V2 2.1, code bert]."""
    return torch.rand(shape, generator=generator) < probability


def _color_head(config: ImageGPTConfig) -> nn.Linear:
    head = nn.Linear(config.n_embd, config.vocab_size - 1, bias=False)
    set_initial_std(head, choose_initial_std(config, 0.0))  # zero logits [V2 3.3]
    return head


class WeightsDoNotFit(ValueError, RuntimeError):
    """Weights are not those of the configuration. transformers raises a RuntimeError where shapes differ."""


def check_loading(model: ImageGPTPreTrainedModel, source: str, loading: dict[str, Any], *new: str) -> None:
    """Raise a ValueError if `from_pretrained` found other weights than the model's: missing, too many, or of other shapes.

    loading: its `output_loading_info`. new: heads that may have another shape. Heads and biases may be missing: heads are
    new, and biases zero.
    """
    remedy = "load them with the configuration that they were saved with"
    for name, found, expected in sorted(loading["mismatched_keys"]):
        if name not in new:
            raise WeightsDoNotFit(
                f"{name} has shape {tuple(found)} in the weights of {source}, and {tuple(expected)} by the configuration: "
                f"{remedy}, or with ignore_mismatched_sizes=True, which draws it at random."
            )
    for name in sorted(loading["missing_keys"]):
        if not name.endswith((".bias", *_HEADS)):
            raise WeightsDoNotFit(
                f"{source} lacks {name}, which its configuration requires, among its weights: {remedy}."
            )
    for name in sorted(loading["unexpected_keys"]):
        if re.match(r"(transformer\.)?h\.\d+\.", name):
            raise WeightsDoNotFit(
                f"{name} is among the weights of {source}, but the configuration has n_layer = {model.config.n_layer}, of which "
                f"it is no part: {remedy}."
            )


def _check_objective(model: ImageGPTPreTrainedModel, config: ImageGPTConfig, objective: str) -> None:
    if config.objective != objective:
        trained = {
            "masked": "trained on masked pixels given all others",
            "causal": "trained to predict each pixel from those before it",
        }
        raise ValueError(
            f"{type(model).__name__} is {objective}; these weights were {trained[config.objective]} "
            f'(objective = "{config.objective}").'
        )


# -- losses ------------------------------------------------------------------------------------------------------------


def pixel_nats(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return −log p of each pixel in nats: logits (B, N, K), tokens (B, N) -> (B, N)."""
    return nn.functional.cross_entropy(at_least_float32(logits).transpose(1, 2), tokens, reduction="none")


def masked_nats(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean −log p, in nats, of each image's masked pixels (B,), 0 for an image without any."""
    return (pixel_nats(logits, tokens) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _mean(values: torch.Tensor, count: torch.Tensor | float | None = None) -> torch.Tensor:
    """Return the mean of `values` (B,), or their sum divided by `count`."""
    return _divide(values.sum(), len(values) if count is None else count)


def _divide(total: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    """Return `total / count`, on the device of `total`: `Trainer` may keep its count elsewhere."""
    return total / (count.to(total.device) if torch.is_tensor(count) else count)


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Return the cross-entropy in nats of logits (n, K) and labels (n,), per scored label or per `num_items_in_batch`."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(at_least_float32(logits), labels, ignore_index=IGNORE_INDEX, reduction=reduction)
    return loss if num_items_in_batch is None else _divide(loss, num_items_in_batch)


GENERATIVE_MODELS: dict[str, type[ImageGPTForCausalImageModeling] | type[ImageGPTForMaskedImageModeling]] = {
    "causal": ImageGPTForCausalImageModeling,
    "masked": ImageGPTForMaskedImageModeling,
}

__all__ = [
    "ImageGPTForCausalImageModeling",
    "ImageGPTForImageClassification",
    "ImageGPTForMaskedImageModeling",
    "ImageGPTModel",
    "ImageGPTPreTrainedModel",
]
