"""What `generate` needs for images: the cache of keys and values, `RoomyLayer`, and which cache to request; candidates that
end with the image; scores for processors that count SOS as a token.

No cache changes a token. Training and feature extraction use none.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.logits_process import (
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    WatermarkLogitsProcessor,
)
from transformers.modeling_utils import PreTrainedModel


def drawing_cache(model: PreTrainedModel) -> str | None:
    """Return the `cache_implementation` with which `model` draws whole images fastest; None leaves the choice to `generate`.

    On a GPU it is a static cache, with which transformers compiles each step to CUDA graphs; the first call with a given
    batch size takes longer. FlexAttention does not work with a static cache.
    """
    compiles = model.device.type == "cuda" and model.config._attn_implementation != "flex_attention"
    return "static" if compiles else None


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` that reserves memory for `length` positions and appends new keys and values in place.

    transformers' layer copies everything it holds for every token. Here `keys` and `values` are views of the filled part, so
    attention reads no more than that. This is for generation only, because writing in place has no gradient. A compiled
    model copies instead, because compilers refuse views of a tensor that is modified.
    """

    keys: torch.Tensor  # (B, heads, positions so far, D/heads); set by `lazy_initialization`
    values: torch.Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values (B, heads, length, D/heads)
        self._filled: tuple[torch.Tensor | None, torch.Tensor | None] = (
            None,
            None,
        )  # the views that were last returned

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, heads, T, D/heads); return all so far."""
        if torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        seen = self.get_seq_length()
        total = seen + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        is_ours = self.keys is self._filled[0] and self.values is self._filled[1]
        if self._room is None or not is_ours or total > self._room[0].shape[-2]:
            # The first call, a call after beams were reordered or tokens removed, or one that exceeds the room.
            length = max(total, self.length)
            keys, values = (new.new_empty((*new.shape[:2], length, new.shape[3])) for new in (key_states, value_states))
            if seen:
                keys[:, :, :seen] = self.keys
                values[:, :, :seen] = self.values
            self._room = keys, values
        keys, values = self._room
        keys[:, :, seen:total] = key_states
        values[:, :, seen:total] = value_states
        self.keys, self.values = self._filled = keys[:, :, :total], values[:, :, :total]
        return self.keys, self.values

    def without_room(self) -> DynamicLayer:
        """Return a `DynamicLayer` with the same keys and values, and no room for more."""
        layer = DynamicLayer()
        if self.is_initialized:
            layer.lazy_initialization(self.keys, self.values)
            layer.keys, layer.values = self.keys.contiguous(), self.values.contiguous()
        return layer

    __copy__ = without_room  # two layers cannot write into the same room

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicLayer:
        """Copy what is filled: exporters trace a copy, and would take the room, which is not filled yet, for values."""
        return copy.deepcopy(self.without_room(), memo)


def add_room(cache: Cache | None, length: int) -> None:
    """Reserve room for `length` positions in every layer of an empty `DynamicCache` that is not offloaded; skip others."""
    if type(cache) is DynamicCache and not cache.offloading:
        cache.layers = [RoomyLayer(length) for _ in cache.layers]


def remove_room(cache: Cache | None) -> None:
    """Replace the layers of `cache` that have room by plain ones, from which any use of the cache can continue."""
    if isinstance(cache, DynamicCache):
        cache.layers = [layer.without_room() if isinstance(layer, RoomyLayer) else layer for layer in cache.layers]


def cut_candidates(generator: CandidateGenerator, length: int) -> CandidateGenerator:
    """Make `generator` propose no more than `length` tokens in all: transformers' looks further in a prompt."""
    find = generator.get_candidates

    def find_within(input_ids: Any, **options: Any) -> tuple[Any, Any]:
        found, logits = find(input_ids, **options)
        return found[:, :length], None if logits is None else logits[:, : length - input_ids.shape[1]]

    generator.get_candidates = find_within  # type: ignore[method-assign]
    return generator


class _WithSOS(LogitsProcessor):
    """A processor that takes the scores of all tokens that inputs hold, on those of the K colours."""

    def __init__(self, processor: LogitsProcessor, n_others: int) -> None:
        self.processor = processor
        self.n_others = n_others

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        padded = nn.functional.pad(scores, (0, self.n_others), value=-torch.inf)
        return self.processor(input_ids, padded)[:, : -self.n_others]


_COUNT_SOS = (
    EncoderRepetitionPenaltyLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    WatermarkLogitsProcessor,
)


def with_sos(processors: LogitsProcessorList, n_class_tokens: int = 0) -> LogitsProcessorList:
    """Give processors that index scores by prompts or by `vocab_size` those of SOS and of classes, −inf: the model has none."""
    others = 1 + n_class_tokens
    return LogitsProcessorList(
        [_WithSOS(each, others) if isinstance(each, _COUNT_SOS) else each for each in processors]
    )
