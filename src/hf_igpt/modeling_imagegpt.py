"""The Image GPT transformer: `ImageGPTModel`, and with heads `ImageGPTForCausalImageModeling`,
`ImageGPTForMaskedImageModeling` and `ImageGPTForImageClassification`.

Follows OpenAI's code (src/model.py): pre-norm blocks of attention and MLP around a residual stream, norms without mean
subtraction, untied token matrices. Names, shapes and layouts of the weights are those of transformers' ImageGPT.
Shape letters: B images, N pixels = tokens of an image, K colours, D width.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch._C._autograd import _saved_tensors_hooks_is_enabled
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, PackedColwiseParallel, RowwiseParallel
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_imagegpt import ImageGPTConfig
from .presets import INIT_EMBEDDING_STD, INIT_MLP_STD, INIT_POSITION_STD, MASK_PROBABILITY


logger = logging.get_logger(__name__)

IGNORE_INDEX = -100  # a label that is not scored
_WORTH_REPEATING = 2**18  # elements of a tensor from which on its memory is worth the time of computing it again
_WITHOUT_STATIC_CACHE = (  # options of `generate` that say so, cannot have one, or would return it
    "cache_implementation",
    "disable_compile",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "return_dict_in_generate",
    "output_attentions",
)


def initialized(layer: nn.Module, std: float) -> nn.Module:
    """Note on `layer` the standard deviation its weight starts with; `_init_weights` draws it."""
    layer.init_std = std
    return layer


class ImageGPTProjection(Conv1D):
    """x -> x W + b with W stored [in, out]: (..., in) -> (..., out). Without trained biases b is a saved buffer of zeros.

    The buffer keeps files the same either way: transformers' class, which has biases, reads them as zeros, where a
    missing key would leave it uninitialised memory. It takes no part in the computation, where sharded or bfloat16 weights
    would ask for another shape or type of it.
    """

    def __init__(self, config: ImageGPTConfig, n_out: int, n_in: int, std: float):
        super().__init__(n_out, n_in)
        self.in_features = n_in
        initialized(self, std)
        self.use_bias = config.use_bias
        if not config.use_bias:
            del self.bias
            self.register_buffer("bias", torch.zeros(n_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.t(), self.bias if self.use_bias else None)


class ColumnsParallel(PackedColwiseParallel):
    """Tensor parallelism of projections by columns of W [in, out], where the library's styles read [out, in].

    split_factor: how many parts stand side by side in the columns, of each of which a process takes its share.
    """

    def shard_param(self, module, param, mesh):
        weight = module._parameters[param]
        if weight.shape[-1] // self.split_factor % (mesh.size() * getattr(module, "head_dim", 1)):
            raise ValueError(
                f"{mesh.size()} processes cannot share {weight.shape[-1]} columns of {self.split_factor} parts evenly"
                f"{', by whole heads' if hasattr(module, 'head_dim') else ''}: lower tp_size."
            )
        placement = _StridedShard(-1, split_factor=self.split_factor) if self.split_factor > 1 else Shard(-1)
        sharded = distribute_tensor(weight, mesh, [placement], src_data_rank=None)
        module._parameters[param] = nn.Parameter(sharded, requires_grad=weight.requires_grad)


class RowsParallel(RowwiseParallel):
    """Tensor parallelism of projections by rows of W [in, out]; the bias is added once, to the sum over processes."""

    def should_use_local_tensors(self, module):
        return True

    def shard_param(self, module, param, mesh):
        weight = module._parameters[param]
        placement = Replicate() if param == "bias" else Shard(0)
        sharded = distribute_tensor(weight, mesh, [placement], src_data_rank=None)
        module._parameters[param] = nn.Parameter(sharded, requires_grad=weight.requires_grad)


# Named by the plan in the configuration.
ALL_PARALLEL_STYLES.register("imagegpt_columns", ColumnsParallel(split_factor=1))
ALL_PARALLEL_STYLES.register("imagegpt_qkv_columns", ColumnsParallel(split_factor=3))
ALL_PARALLEL_STYLES.register("imagegpt_rows", RowsParallel())


def _std(config: ImageGPTConfig, openai: float, residual: bool = False) -> float:
    """Standard deviation of an initial weight: `openai`'s, or transformers' where the config says so.

    transformers scales both layers that write into the residual stream by 1/sqrt(2L); OpenAI only attention's.
    """
    if config.initialization == "openai":
        return openai
    return config.initializer_range / (math.sqrt(2 * config.n_layer) if residual else 1)


class ImageGPTLayerNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension: no mean subtraction, no bias [code norm].

    Computed in float32 where the input is of a smaller type: squares of float16 overflow beyond 256.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _normalized(x, self.weight, self.eps)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x) [code gelu]: without gradients in one new tensor, where two would be a block's peak."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = 1.702 * x
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return x * torch.sigmoid(gate)
        return gate.sigmoid_().mul_(x)


def _normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if x.dtype == weight.dtype == torch.float32:  # nothing to convert, which takes time where one token is drawn
        return nn.functional.rms_norm(x, weight.shape, weight, eps)
    return nn.functional.rms_norm(_precise(x), weight.shape, _precise(weight), eps).to(x.dtype)


def _precise_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _precise(x: torch.Tensor) -> torch.Tensor:
    """In float32, or the larger type that `x` has."""
    return x.to(_precise_dtype(x))


def _is_plain(module: nn.Module, kind: type) -> bool:
    """Whether calling `module` is `kind.forward` and nothing else: nobody has derived from it or hooked into it."""
    return type(module) is kind and not (
        "forward" in vars(module)
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def _dropped(x: torch.Tensor, dropout: nn.Module) -> torch.Tensor:
    """`dropout(x)`, not called where it does nothing: that takes time where one token is drawn."""
    idle = _is_plain(dropout, nn.Dropout) and not (dropout.training and dropout.p)
    return x if idle else dropout(x)


def _projected(cheap: nn.Module, projection: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`projection(cheap(x))`. In training only x is kept for the backward pass, which repeats `cheap`, a norm or activation.

    The repetition ends before the matrix product, so it costs little, while what norms and activations give is most of what
    a block would keep. All is kept where that is little, or where repeating might not be the same: where a module is not
    this file's own, as with adapters, tensor parallelism and hooks; in torch.func, which has no hooks on saved tensors; and
    norms where a compiler decides what is kept.
    """
    if not (projection.training and torch.is_grad_enabled() and _is_plain(projection, ImageGPTProjection)):
        return projection(cheap(x))
    is_norm, is_activation = _is_plain(cheap, ImageGPTLayerNorm), _is_plain(cheap, QuickGELU)
    if torch.compiler.is_compiling():
        if is_activation and not torch.compiler.is_exporting():
            return checkpoint(lambda x: projection(cheap(x)), x, use_reentrant=False)
        return projection(cheap(x))
    if (
        not (is_norm or is_activation)
        or x.numel() < _WORTH_REPEATING
        or torch.is_inference_mode_enabled()
        or not _saved_tensors_hooks_is_enabled()
    ):
        return projection(cheap(x))

    def compute(x, gain, weight, bias):
        y = cheap.forward(x) if gain is None else _normalized(x, gain, cheap.eps)
        return nn.functional.linear(y, weight.t(), bias)

    # Of tensors, not of modules: these may hold other weights, or do something else, when backward comes.
    gain, bias = cheap.weight if is_norm else None, projection.bias if projection.use_bias else None
    return checkpoint(compute, x, gain, projection.weight, bias, use_reentrant=False, preserve_rng_state=False)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q kᵀ · scaling + mask) v with all weights materialised; softmax in float32 at least. q, k, v: (B, heads, N, D/heads)."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=_precise_dtype(scores)).to(value.dtype)
    output = nn.functional.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2), weights  # (B, N, heads, D/heads), (B, heads, N, N)


class ImageGPTAttention(nn.Module):
    def __init__(self, config: ImageGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.is_causal = True
        d = config.n_embd
        self.c_attn = ImageGPTProjection(config, 3 * d, d, _std(config, d**-0.5))
        self.c_attn.head_dim = self.head_dim  # what tensor parallelism must not divide
        self.c_proj = ImageGPTProjection(config, d, d, _std(config, (d * config.n_layer) ** -0.5, residual=True))
        self.attn_dropout = config.attn_pdrop
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, norm: nn.Module, past_key_values: Cache | None = None, attention_mask=None, **kwargs):
        qkv = _projected(norm, self.c_attn, x)
        # each (B, heads, N, D/heads)
        query, key, value = qkv.view(*x.shape[:-1], 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attn_dropout if self.training else 0.0,
            **kwargs,
        )
        output = self.c_proj(output.reshape(*x.shape[:-1], -1))
        return _dropped(output, self.resid_dropout), weights


class ImageGPTMLP(nn.Module):
    def __init__(self, config: ImageGPTConfig):
        super().__init__()
        n_inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = ImageGPTProjection(config, n_inner, config.n_embd, _std(config, INIT_MLP_STD))
        self.c_proj = ImageGPTProjection(config, config.n_embd, n_inner, _std(config, INIT_MLP_STD, residual=True))
        self.act = QuickGELU() if config.activation_function == "quick_gelu" else ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return _dropped(_projected(self.act, self.c_proj, _projected(norm, self.c_fc, x)), self.dropout)


class ImageGPTBlock(GradientCheckpointingLayer):
    def __init__(self, config: ImageGPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = ImageGPTAttention(config, layer_idx)
        self.ln_2 = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = ImageGPTMLP(config)

    def forward(self, x: torch.Tensor, past_key_values: Cache | None = None, attention_mask=None, **kwargs):
        x = x + self.attn(x, self.ln_1, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)[0]
        return x + self.mlp(x, self.ln_2)


class ImageGPTPreTrainedModel(PreTrainedModel):
    """Loading, saving, attention choice and initialisation of all Image GPT classes."""

    config: ImageGPTConfig
    config_class = ImageGPTConfig
    base_model_prefix = "transformer"
    input_modalities = ("image",)
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
    # Causal masks that old transformers versions saved in every block.
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.bias$", r"\.attn\.masked_bias$"]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        for name, module in model.named_modules():
            if isinstance(module, ImageGPTProjection) and not module.use_bias and module.bias.any():
                raise ValueError(
                    f"The weights hold biases ({name}), which use_bias=False would leave out: load them with use_bias=True."
                )
        return loaded

    def _refuse_flex_attention(self):
        """Before a static cache is used: with transformers 5.23 its logits were wrong, also of its own models."""
        if self.config._attn_implementation == "flex_attention":
            raise ValueError('A static cache does not work with flex_attention: use attn_implementation="sdpa".')

    @torch.no_grad()
    def _init_weights(self, module):
        # Each layer carries its own standard deviation: transformers does not call this for modules that hold no
        # parameter themselves, so a parent cannot set its children's.
        if isinstance(module, ImageGPTLayerNorm):
            init.ones_(module.weight)
        elif isinstance(module, (Conv1D, nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=getattr(module, "init_std", self.config.initializer_range))
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)


class ImageGPTModel(ImageGPTPreTrainedModel):
    """The transformer without a head: tokens (B, T) -> hidden states (B, T, D) after the final norm, T <= N."""

    # It reads any model's file, and leaves the heads there.
    _keys_to_ignore_on_load_unexpected = [
        *ImageGPTPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^lm_head\.",
        r"^score\.",
    ]

    def __init__(self, config: ImageGPTConfig):
        super().__init__(config)
        wte = nn.Embedding(config.vocab_size, config.n_embd)  # row K is SOS
        self.wte = initialized(wte, _std(config, INIT_EMBEDDING_STD))
        self.wpe = initialized(nn.Embedding(config.n_positions, config.n_embd), _std(config, INIT_POSITION_STD))
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([ImageGPTBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Plain forward, nothing shifted: `input_ids` (B, T) of tokens 0..K, or `inputs_embeds` (B, T, D) instead.

        bool_masked_pos: (B, T), of masked models: True where a pixel's embedding is zeroed, its position kept [code bert].
        `hidden_states` (with `output_hidden_states=True`) are the input of each block, and last the output of `ln_f`.
        A token out of range, or more tokens than n_positions, is a ValueError.
        """
        if "pixel_values" in kwargs:
            raise ValueError("Image GPT reads tokens: pass `input_ids` as its image processor returns them.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either `input_ids` or `inputs_embeds`, and not both.")
        for name in ("output_attentions", "output_hidden_states"):
            kwargs.pop(name, None)  # the decorator has recorded them
        if self.config.objective == "masked":
            use_cache = False  # every position sees every other: there is no past
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if getattr(past_key_values, "is_compileable", False):
            self._refuse_flex_attention()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        inputs = input_ids if input_ids is not None else inputs_embeds
        self._check_length(inputs.shape, seen, position_ids)
        if inputs_embeds is None:
            check_tokens(input_ids, self.config.vocab_size, "input_ids", self.config)
            inputs_embeds = self.wte(input_ids)
        if bool_masked_pos is not None:
            self._check_mask(bool_masked_pos, inputs.shape[:2])
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
        )
        for block in self.h:
            hidden = block(hidden, past_key_values, mask, position_ids=position_ids, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden), past_key_values=past_key_values if use_cache else None
        )

    def _check_mask(self, bool_masked_pos, shape):
        if self.config.objective != "masked":
            raise ValueError("`bool_masked_pos` is of masked models; this one is causal.")
        if bool_masked_pos.dtype != torch.bool or bool_masked_pos.shape != shape:
            raise ValueError(
                f"`bool_masked_pos` is boolean, of the tokens' shape {tuple(shape)}; found {bool_masked_pos.dtype} of "
                f"shape {tuple(bool_masked_pos.shape)}."
            )

    def _check_length(self, shape, seen, position_ids):
        if len(shape) < 2 or (len(shape) == 2 and shape[1] == 0):
            raise ValueError(f"Tokens have shape (B, T), T >= 1; found {tuple(shape)}.")
        if torch.compiler.is_compiling():
            return
        last = int(position_ids.max()) + 1 if position_ids is not None else int(seen) + shape[1]
        if last > self.config.n_positions:
            raise ValueError(
                f"{last} tokens exceed n_positions = {self.config.n_positions}. An image has {self.config.n_positions} "
                "pixels; its inputs are SOS and all pixels but the last. Resize images to the model's size."
            )


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether values can be looked at: not while compiling or exporting, nor of meta and fake tensors and within vmap."""
    return not (
        torch.compiler.is_compiling()
        or tensor.is_meta
        or isinstance(tensor, FakeTensor)
        or is_functorch_wrapped_tensor(tensor)
    )


def check_tokens(tokens: torch.Tensor, limit: int, name: str, config: ImageGPTConfig, ignore: bool = False):
    """ValueError unless all `tokens` are integers in 0..limit-1 (or −100, with `ignore`), where they have values."""
    if tokens.is_floating_point() or tokens.ndim != 2:
        raise ValueError(
            f"`{name}` are integer tokens of shape (B, T); found {tokens.dtype} of shape {tuple(tokens.shape)}. "
            "The image processor turns images into tokens."
        )
    if tokens.numel() == 0 or not _has_values(tokens):
        return
    bad = (tokens < 0) | (tokens >= limit)
    if ignore:
        bad &= tokens != IGNORE_INDEX
    if bad.any():
        found = int(tokens[bad][0])
        raise ValueError(
            f"`{name}` hold the token {found}; allowed are 0..{limit - 1}. The model has K = {config.vocab_size - 1} colours "
            f"(SOS is {config.sos_token_id}, an input only): use the image processor it was trained with."
        )


def shift_right(tokens: torch.LongTensor, sos_token_id: int) -> torch.LongTensor:
    """(B, N) pixels -> [SOS, x_0 … x_{N-2}], what each of them is predicted from [code src/model.py]."""
    return nn.functional.pad(tokens[:, :-1], (1, 0), value=sos_token_id)


def random_mask(shape, generator: torch.Generator | None = None, probability: float = MASK_PROBABILITY):
    """Boolean mask of `shape` (B, N), True with `probability`, each pixel drawn by itself [V2 2.1, code bert]."""
    return torch.rand(shape, generator=generator) < probability


def _compiles_decoding(device: torch.device) -> bool:
    """Whether transformers compiles the step of `generate` with a static cache on `device`, to CUDA graphs."""
    return device.type == "cuda"


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` with room for `length` positions: new keys and values are written behind the old ones.

    transformers' copies all that it has for every token. Here `keys` and `values` are views of what is filled, so that
    attention reads no more than that. For generation only: what is written in place has no gradient. A compiled model
    copies: compilers refuse views of one tensor that it writes into.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length
        self._room = None  # keys and values (B, heads, length, D/heads)
        self._filled = None, None  # the views of them that were last handed out

    def update(self, key_states, value_states, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        seen = self.get_seq_length()
        total = seen + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        ours = self._room is not None and self.keys is self._filled[0] and self.values is self._filled[1]
        if not ours or total > self._room[0].shape[-2]:
            # The first time; after beams were reordered or tokens taken back; beyond the room.
            length = max(total, self.length)
            self._room = tuple(
                new.new_empty((*new.shape[:2], length, new.shape[3])) for new in (key_states, value_states)
            )
            if seen:
                self._room[0][:, :, :seen] = self.keys
                self._room[1][:, :, :seen] = self.values
        keys, values = self._room
        keys[:, :, seen:total] = key_states
        values[:, :, seen:total] = value_states
        self.keys, self.values = self._filled = keys[:, :, :total], values[:, :, :total]
        return self.keys, self.values

    def plain(self) -> DynamicLayer:
        """A `DynamicLayer` of the same keys and values, which nothing will write into, without the room behind them."""
        layer = DynamicLayer()
        if self.is_initialized:
            layer.lazy_initialization(self.keys, self.values)
            layer.keys, layer.values = self.keys.contiguous(), self.values.contiguous()
        return layer

    __copy__ = plain  # two layers cannot write into one room


class ImageGPTForCausalImageModeling(ImageGPTPreTrainedModel, GenerationMixin):
    """Autoregressive image model: at position i, logits over the K colours of pixel i given SOS and the pixels before.

    `model(labels=tokens)` is the training call: it feeds [SOS, x_0 … x_{N-2}] and scores all N pixels; `loss` is in
    nats per pixel [code gen_loss]. `model(input_ids=...)` is the plain forward. With both, transformers' contract holds:
    logits at i are scored against labels at i + 1.
    """

    # A converted checkpoint holds both heads.
    _keys_to_ignore_on_load_unexpected = [*ImageGPTPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^score\."]
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ImageGPTConfig):
        super().__init__(config)
        _check_objective(self, config, "causal")
        self.transformer = ImageGPTModel(config)
        self.lm_head = _color_head(config)
        if config.bos_token_id is not None:
            # The paper's sampling [code run.py sample], for plain transformers too, whose default is top_k = 50.
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
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Returns `logits` (B, T, K) and, given labels, `loss` in nats per pixel.

        labels: (B, N) colours in 0..K-1. −100 is not scored; it needs `input_ids` beside it.
        num_items_in_batch: what the summed loss is divided by instead of the number of scored pixels (`Trainer`'s count
        over accumulated steps and processes). logits_to_keep: compute logits of this many last positions only (0: all),
        or of the positions in a tensor; ignored where there are labels.
        """
        labels_alone = labels is not None and input_ids is None and inputs_embeds is None
        if labels is not None:
            n_colors = self.config.vocab_size - 1
            check_tokens(labels, n_colors, "labels", self.config, ignore=True)
            labels = labels.long()
            if labels_alone:
                if _has_values(labels) and (labels == IGNORE_INDEX).any():
                    raise ValueError(
                        "`labels` with −100 say nothing of the pixels fed: pass `input_ids` (SOS first) beside them."
                    )
                input_ids = shift_right(labels, self.config.sos_token_id)
                use_cache = bool(use_cache)
            elif input_ids is not None and _has_values(input_ids) and not self._starts_with_sos(input_ids):
                logger.warning_once(
                    "`input_ids` beside `labels` do not start with SOS: pixel 0 is never scored. "
                    "`model(labels=tokens)` alone adds SOS and scores every pixel."
                )
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
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

    def _starts_with_sos(self, input_ids: torch.LongTensor) -> bool:
        return bool((input_ids[:, :1] == self.config.sos_token_id).all())

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs):
        """Tokens (B, 1 + N), SOS first: whole images by default, or continuations of `inputs` (B, T), SOS first.

        As `GenerationMixin.generate`, and: SOS and the full length are supplied where neither the arguments nor the
        checkpoint give them; a length over SOS + N is a ValueError before the first step. SOS is never sampled. Whole images
        on a GPU have a static cache, and so a compiled step (CUDA graphs), unless a `cache_implementation` is given or
        `disable_compile=True`: the first call of a batch size takes longer.
        """
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
        sources = [generation_config, self.generation_config]

        def given(name):
            values = [kwargs.get(name)] + [getattr(source, name) for source in sources if source is not None]
            return next((value for value in values if value is not None), None)

        def supply(name, value):
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
                f"{length} tokens were asked for; SOS and the {whole - 1} pixels of an image make {whole}. "
                "Lower max_length or max_new_tokens, or leave them out for whole images."
            )
        if (
            _compiles_decoding(self.device)
            and length == whole  # one shape of cache, so what was compiled serves every call of the same batch size
            and given("use_cache") is not False
            and (given("num_beams") or 1) == 1
            and not any(given(name) for name in _WITHOUT_STATIC_CACHE)
            and all(kwargs.get(name) is None for name in ("past_key_values", "assistant_model", "custom_generate"))
            and self.config._attn_implementation != "flex_attention"
        ):
            supply("cache_implementation", "static")
        if prompt is not None and prompt.ndim == 2 and not self._starts_with_sos(prompt):
            logger.warning_once(
                f"The prompt does not start with SOS ({self.config.sos_token_id}): every pixel stands one position "
                "before the one it was trained at."
            )
        output = super().generate(inputs, generation_config=generation_config, **kwargs)
        cache = getattr(output, "past_key_values", None)
        if isinstance(cache, DynamicCache):  # it may be gone on with in any way
            cache.layers = [layer.plain() if isinstance(layer, RoomyLayer) else layer for layer in cache.layers]
        return output

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get("past_key_values")
        beams = (generation_config.num_beams or 1) > 1  # reordering copies everything anyway
        if given is None and type(cache) is DynamicCache and not cache.offloading and not beams:
            cache.layers = [RoomyLayer(max_cache_length) for _ in cache.layers]


class ImageGPTForMaskedImageModeling(ImageGPTPreTrainedModel):
    """BERT-style image model: logits over the K colours of every pixel, given all pixels that are not masked.

    `model(labels=tokens, bool_masked_pos=mask)` is the training call. `loss` is the mean over images of the mean over
    each image's masked pixels, in nats per pixel [code bert]; an image without a masked pixel counts as 0. The weights
    are of the masked objective (`config.objective`): bidirectional attention, no SOS, no shift.
    """

    # A converted checkpoint holds both heads.
    _keys_to_ignore_on_load_unexpected = [*ImageGPTPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^score\."]
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ImageGPTConfig):
        super().__init__(config)
        _check_objective(self, config, "masked")
        self.transformer = ImageGPTModel(config)
        self.lm_head = _color_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Returns `logits` (B, N, K) and, given labels, `loss` in nats per masked pixel.

        bool_masked_pos: (B, N), True where a pixel is hidden and scored; `random_mask` draws one. labels: (B, N) colours
        in 0..K-1, also the inputs where none are given. num_items_in_batch: `Trainer`'s count of labels, N an image, over
        accumulated steps and processes; the loss is then the sum of the images' means over that many images.
        """
        if labels is not None:
            check_tokens(labels, self.config.vocab_size - 1, "labels", self.config)
            labels = labels.long()
            if bool_masked_pos is None:
                raise ValueError(
                    "`labels` are scored where pixels are masked: pass `bool_masked_pos` (see `random_mask`)."
                )
            if input_ids is None and inputs_embeds is None:
                input_ids = labels
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            bool_masked_pos=bool_masked_pos,
            use_cache=False,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)  # (B, N, K)
        loss = None
        if labels is not None:
            n_images = None if num_items_in_batch is None else num_items_in_batch / labels.shape[1]
            loss = _mean(masked_nats(logits, labels, bool_masked_pos), n_images)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@dataclass
class ImageGPTClassifierOutput(SequenceClassifierOutputWithPast):
    """A classifier's output; where it has a joint loss, also `loss`'s parts: nats per image, nats per pixel.

    generative_nats: (B,), nats per pixel of each image, whose mean is `generative_loss`.
    """

    classification_loss: torch.FloatTensor | None = None
    generative_loss: torch.FloatTensor | None = None
    generative_nats: torch.FloatTensor | None = None


class ImageGPTForImageClassification(ImageGPTPreTrainedModel):
    """Classes from the mean over positions of `ln_f`'s output, by a linear layer without bias [code src/model.py clf].

    `input_ids` (or `inputs_embeds`) are the N pixels of each image. With `config.sos_inputs` they are shifted, as in
    training and as OpenAI's code does; without, they are fed as they are, as transformers does. Masked models are fed
    them as they are, masked where `bool_masked_pos` says so. With `config.generative_loss_weight` > 0 the model keeps its
    colour head, and `loss` is L_CLF + weight · L_GEN [V2 2.3].
    """

    # A pretrained or converted checkpoint holds both heads.
    _keys_to_ignore_on_load_unexpected = [*ImageGPTPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^lm_head\."]

    def __init__(self, config: ImageGPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ImageGPTModel(config)
        score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.score = initialized(score, _std(config, 0.0))  # zero logits [V2 3.3]
        self.lm_head = _color_head(config) if config.generative_loss_weight else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ImageGPTClassifierOutput:
        """Returns `logits` (B, classes) and, given labels (B,), `loss`: mean cross-entropy in nats.

        num_items_in_batch: what the summed loss is divided by instead, `Trainer`'s count over accumulated steps and
        processes. Regression and multi-label problems (`config.problem_type`) have transformers' losses. Where the loss is
        joint, each image's generative part is the mean over its pixels: all N of a causal model fed SOS, all but the
        first of one fed raw pixels, the masked ones of a masked model.
        """
        joint = labels is not None and self.lm_head is not None
        if joint and input_ids is None:
            raise ValueError("The joint loss scores tokens: pass `input_ids`.")
        if joint and self.config.objective == "masked" and bool_masked_pos is None:
            raise ValueError("The joint loss of a masked model scores masked pixels: pass `bool_masked_pos`.")
        pixels = input_ids
        if input_ids is not None and (self.config.sos_inputs or joint):
            check_tokens(input_ids, self.config.vocab_size - 1, "input_ids", self.config)
        if self.config.sos_inputs and input_ids is not None:
            input_ids = shift_right(pixels, self.config.sos_token_id)
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
            use_cache=bool(use_cache),  # whole images: nothing comes after them
            bool_masked_pos=bool_masked_pos,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits = self.score(hidden.mean(dim=1))  # (B, classes)
        loss = classification_loss = generative_loss = nats = None
        if labels is not None:
            loss = self._classification_loss(logits, labels, num_items_in_batch)
        if joint:
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

    def _classification_loss(self, logits, labels, num_items_in_batch):
        integers = not labels.is_floating_point() and labels.ndim == 1 and self.num_labels > 1
        if integers and self.config.problem_type in (None, "single_label_classification"):
            self._check_labels(labels)
            return _cross_entropy(logits, labels.long(), num_items_in_batch)
        loss = self.loss_function(labels, logits, self.config)
        if num_items_in_batch is not None:  # Trainer counts all elements of all labels
            loss = loss * labels.numel() / num_items_in_batch
        return loss

    def _generative_nats(self, logits, pixels, bool_masked_pos):
        if self.config.objective == "masked":
            return masked_nats(logits, pixels, bool_masked_pos)
        if not self.config.sos_inputs:  # position i was fed pixel i: it predicts the next
            logits, pixels = logits[:, :-1], pixels[:, 1:]
        return pixel_nats(logits, pixels).mean(dim=1)

    def _check_labels(self, labels):
        if labels.numel() == 0 or not _has_values(labels):
            return
        low, high = int(labels.min()), int(labels.max())
        if high >= self.num_labels or (low < 0 and low != IGNORE_INDEX):
            raise ValueError(
                f"`labels` run from {low} to {high}; this model has {self.num_labels} classes, 0..{self.num_labels - 1}: "
                "load it with num_labels= of your data."
            )


def _color_head(config: ImageGPTConfig) -> nn.Linear:
    head = nn.Linear(config.n_embd, config.vocab_size - 1, bias=False)
    return initialized(head, _std(config, 0.0))  # zero logits [V2 3.3]


def _check_objective(model, config: ImageGPTConfig, objective: str):
    if config.objective != objective:
        trained = {
            "masked": "trained on masked pixels, seeing all others",
            "causal": "trained to predict each pixel from those before it",
        }
        raise ValueError(
            f"{type(model).__name__} is {objective}; these weights were {trained[config.objective]} "
            f'(objective = "{config.objective}").'
        )


def pixel_nats(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """−log p of each pixel: (B, N, K) logits, (B, N) tokens -> (B, N)."""
    return nn.functional.cross_entropy(_precise(logits).transpose(1, 2), tokens, reduction="none")


def masked_nats(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.BoolTensor) -> torch.Tensor:
    """Mean −log p of each image's masked pixels, 0 where there are none: (B,)."""
    return (pixel_nats(logits, tokens) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _mean(values: torch.Tensor, count=None) -> torch.Tensor:
    """Mean of (B,) `values`, or their sum over `count`."""
    count = len(values) if count is None else count
    return values.sum() / (count.to(values.device) if torch.is_tensor(count) else count)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Cross-entropy in nats of (n, K) logits against (n,) labels, per scored label or per `num_items_in_batch`."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(_precise(logits), labels, ignore_index=IGNORE_INDEX, reduction=reduction)
    if num_items_in_batch is not None:
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        loss = loss / num_items_in_batch
    return loss


__all__ = [
    "ImageGPTForCausalImageModeling",
    "ImageGPTForImageClassification",
    "ImageGPTForMaskedImageModeling",
    "ImageGPTModel",
    "ImageGPTPreTrainedModel",
]
