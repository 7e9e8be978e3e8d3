"""Room for keys and values: the same tokens as with transformers' own cache, and which cache is asked for."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from hf_igpt.cache_imagegpt import RoomyLayer, drawing_cache


def test_returned_caches_can_be_continued_from(model):
    """Taken back, with gradients, and without changing what was read from them before."""
    sos = torch.full((2, 1), model.config.sos_token_id)
    with torch.inference_mode():
        cache = model.generate(sos, max_new_tokens=9, return_dict_in_generate=True).past_key_values
    before = cache.layers[0].keys
    kept = before.clone()
    cache.crop(-4)
    new = torch.randint(16, (2, 3))
    with torch.no_grad():
        model(new, past_key_values=cache, use_cache=True)
    assert torch.equal(before, kept) and type(cache.layers[0]) is DynamicLayer
    cache = model.generate(sos, max_new_tokens=4, return_dict_in_generate=True).past_key_values
    first = model(new, past_key_values=cache, use_cache=True).logits
    (first.sum() + model(new, past_key_values=cache, use_cache=True).logits.sum()).backward()


def test_room_for_keys_and_values_is_a_dynamic_cache():
    """Against transformers' layer, over everything that generation does to one."""
    roomy, plain = RoomyLayer(6), DynamicLayer()

    def update(count, batch=2):
        new = torch.randn(2, batch, 3, count, 4)
        found, expected = roomy.update(*new), plain.update(*new)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert roomy.get_seq_length() == plain.get_seq_length() and roomy.get_mask_sizes(1) == plain.get_mask_sizes(1)

    update(3)
    room = roomy.keys.data_ptr()
    update(1)
    assert roomy.keys.data_ptr() == room  # nothing was copied
    alone = roomy.without_room().keys
    assert torch.equal(alone, roomy.keys) and alone.untyped_storage().nbytes() == alone.nbytes  # no room is left
    for layer in (roomy, plain):
        layer.crop(-2)
    update(1)
    for layer in (roomy, plain):
        layer.values = layer.values * 2
    update(1)
    for layer in (roomy, plain):
        layer.reorder_cache(torch.tensor([1, 1]))
    update(2)
    update(5)  # beyond the room
    for layer in (roomy, plain):
        layer.batch_repeat_interleave(2)
    update(1, batch=4)
    for layer in (roomy, plain):
        layer.batch_select_indices(torch.tensor([0, 3]))
    update(1)
    branches = [copy.copy(layer) for layer in (roomy, roomy, plain, plain)]
    new = torch.randn(4, 2, 3, 1, 4)
    for one, other in ((0, 2), (1, 3)):
        branches[one].update(*new[one : one + 2]), branches[other].update(*new[one : one + 2])
    for one, other in ((0, 2), (1, 3)):  # neither wrote into the other
        assert torch.equal(branches[one].keys, branches[other].keys)
    deep = copy.deepcopy(roomy)
    assert type(deep) is DynamicLayer and torch.equal(deep.keys, roomy.keys) and torch.equal(deep.values, roomy.values)
    assert deep.keys.data_ptr() != roomy.keys.data_ptr() and not copy.deepcopy(RoomyLayer(6)).is_initialized
    for layer in (roomy, plain):
        layer.reset()
    update(2)


@pytest.mark.parametrize(
    ("device", "attention", "expected"),
    [("cpu", "sdpa", None), ("cuda", "sdpa", "static"), ("cuda", "eager", "static"), ("cuda", "flex_attention", None)],
)
def test_which_cache_draws_fastest(device, attention, expected):
    config = SimpleNamespace(_attn_implementation=attention)
    assert drawing_cache(SimpleNamespace(device=torch.device(device), config=config)) == expected
