"""Keys and values while images are drawn: `RoomyLayer`, and which cache to ask `generate` for.

Nothing here changes a token. Training and features use no cache.
"""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import PreTrainedModel


def drawing_cache(model: PreTrainedModel) -> str | None:
    """The `cache_implementation` with which `model` draws whole images fastest; None leaves the choice to `generate`.

    On a GPU it is a static cache, with which transformers compiles each step to CUDA graphs; the first call of a batch size
    takes longer. FlexAttention does not work with one.
    """
    compiles = model.device.type == "cuda" and model.config._attn_implementation != "flex_attention"
    return "static" if compiles else None


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` with room for `length` positions: new keys and values are written behind the old ones.

    transformers' layer copies everything it holds for every token. Here `keys` and `values` are views of the filled part, so
    attention reads no more than that. For generation only: what is written in place has no gradient. A compiled model
    copies, because compilers refuse views of a tensor that is written into.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length
        self._room = None  # keys and values (B, heads, length, D/heads)
        self._filled = None, None  # the views of them that were last handed out

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
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

    def without_room(self) -> DynamicLayer:
        """A `DynamicLayer` with the same keys and values, which nothing will write into, without the room behind them."""
        layer = DynamicLayer()
        if self.is_initialized:
            layer.lazy_initialization(self.keys, self.values)
            layer.keys, layer.values = self.keys.contiguous(), self.values.contiguous()
        return layer

    __copy__ = without_room  # two layers cannot write into the same room


def add_room(cache: Cache, length: int) -> None:
    """Give every layer of `cache`, if it is an empty `DynamicCache` that stays on its device, room for `length` positions."""
    if type(cache) is DynamicCache and not cache.offloading:
        cache.layers = [RoomyLayer(length) for _ in cache.layers]


def remove_room(cache: Cache | None) -> None:
    """Make the layers of `cache` that have room plain ones, so that the cache can be continued from in any way."""
    if isinstance(cache, DynamicCache):
        cache.layers = [layer.without_room() if isinstance(layer, RoomyLayer) else layer for layer in cache.layers]
