"""The model's inputs: tokens, which are checked before any work is done, and the one shift between inputs and targets."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import is_tracing

from .configuration_imagegpt import ImageGPTConfig


IGNORE_INDEX = -100  # a label that is not scored


def has_values(tensor: torch.Tensor) -> bool:
    """Whether values can be read: not while compiling, exporting or tracing, on the meta device or inside `vmap`."""
    if torch.compiler.is_compiling():  # first, because compilers cannot follow the rest
        return False
    return not (is_tracing(tensor) or tensor.is_meta or torch.func.debug_unwrap(tensor) is not tensor)


def as_tokens(tokens: Any) -> torch.Tensor:
    """Turn a tensor, an array or a column of rows into int64; floats stay as they are, for `check_tokens` to refuse."""
    tensor = tokens if torch.is_tensor(tokens) else torch.from_numpy(np.asarray(tokens))
    return tensor if tensor.is_floating_point() else tensor.long()


def check_tokens(tokens: torch.Tensor, limit: int, name: str, config: ImageGPTConfig, ignore: bool = False) -> None:
    """Raise ValueError unless all `tokens` (B, T) are integers in 0..limit-1, or −100 if `ignore` is set.

    name: the argument's name, for the message. Tensors whose values cannot be read (`has_values`) pass.
    """
    if tokens.is_floating_point() or tokens.ndim != 2:
        raise ValueError(
            f"`{name}` are integer tokens of shape (B, T); found {tokens.dtype} of shape {tuple(tokens.shape)}. "
            "The image processor turns images into tokens."
        )
    if tokens.numel() == 0 or not has_values(tokens):
        return
    tokens = tokens.long()  # a limit may not fit into the tokens' own type
    bad = (tokens < 0) | (tokens >= limit)
    if ignore:
        bad &= tokens != IGNORE_INDEX
    if bad.any():
        found = int(tokens[bad][0])
        raise ValueError(
            f"`{name}` hold the token {found}; allowed are 0..{limit - 1}. The model has K = {config.vocab_size - 1} colours "
            f"(SOS, {config.sos_token_id}, is only an input): use the image processor that it was trained with."
            + (" Greater tokens name classes, of which it knows no such one." if found > config.sos_token_id else "")
        )


def check_length(
    shape: torch.Size, seen: torch.Tensor | int, position_ids: torch.Tensor | None, config: ImageGPTConfig
) -> None:
    """Raise ValueError unless inputs of `shape` (B, T, …), after `seen` others, have positions in 0..n_positions-1."""
    if len(shape) < 2 or (len(shape) == 2 and shape[1] == 0):
        raise ValueError(f"Tokens have shape (B, T), T >= 1; found {tuple(shape)}.")
    if torch.compiler.is_compiling() or (position_ids is not None and not has_values(position_ids)):
        return
    first, last = 0, int(seen) + shape[1]
    if position_ids is not None:
        first, last = int(position_ids.min()), int(position_ids.max()) + 1
    if first < 0:
        raise ValueError(
            f"`position_ids` hold {first}; a position is a pixel of an image, 0..{config.n_positions - 1}."
        )
    if last > config.n_positions:
        raise ValueError(
            f"{last} tokens exceed n_positions = {config.n_positions}. An image has {config.n_positions} pixels; its inputs "
            "are SOS and all pixels but the last. Resize images to the model's size."
        )


def number_images(
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Number the images that are packed into the rows of `position_ids` (B, T): 0, 1, … (B, T), or None if none are.

    A row in which a position occurs twice holds several images, each of which begins where positions do not grow. Positions
    whose values cannot be read (`has_values`) are numbered in any case. With a cache, rows are one image: `generate` pads
    them with a mask, and without one packed images are a ValueError.
    """
    if (
        position_ids is None
        or position_ids.shape[-1] == 1
        or (past_key_values is not None and attention_mask is not None)
    ):
        return None
    repeats = (position_ids.sort(dim=-1).values.diff(dim=-1) == 0).any(dim=-1, keepdim=True)
    known = has_values(position_ids)
    if not repeats.any() if known else past_key_values is not None:
        return None
    if known and past_key_values is not None:
        raise ValueError("Rows of several images, whose `position_ids` start anew, have no cache.")
    return nn.functional.pad(((position_ids.diff(dim=-1) <= 0) & repeats).cumsum(dim=-1), (1, 0))


def check_flash_attention(images: torch.Tensor, position_ids: torch.Tensor, batch: int, masked: bool) -> None:
    """Raise ValueError for packed `images` that FlashAttention does not keep apart: it has positions in place of a mask."""
    if has_values(images) and (batch > 1 or masked or int((position_ids == 0).sum()) != int(images.max()) + 1):
        raise ValueError(
            "FlashAttention keeps packed images apart only in a batch of one row, without an `attention_mask`, and if the "
            'positions of each begin with 0: put all images into one row, or use attn_implementation="sdpa".'
        )


def same_image(images: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The function of transformers' masks that lets a pixel attend to the pixels of its own image, of `images` (B, T)."""
    return lambda batch, head, query, key: images[batch, query] == images[batch, key]


def refuse_packed_images(position_ids: torch.Tensor | None, what: str) -> None:
    """Raise ValueError if `position_ids` pack several images into a row, where `what` is of one image per row."""
    images = number_images(position_ids)
    if images is not None and has_values(images):
        raise ValueError(
            f"{what} is of one image per row; here `position_ids` start anew within a row: unpack the images."
        )


def name_classes(
    input_ids: torch.Tensor, class_labels: Any, config: ImageGPTConfig, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Put the token of each row's class, K + 1 + class, in the place of SOS, with which `input_ids` (B, T) begin.

    class_labels: (B,) integers in 0..C-1, or −1 for no class, which leaves SOS; or a list of names. attention_mask: (B, T), 0 of the padding
    before SOS. Other labels, and rows with no SOS at the beginning or another one after it, are a ValueError.
    """
    count, sos = config.n_class_tokens, config.sos_token_id
    if not count:
        raise ValueError("`class_labels`: this model knows no classes. Train one with --class_conditional.")
    if not torch.is_tensor(class_labels):
        found = np.asarray(class_labels)
        class_labels = torch.from_numpy(np.asarray(find_classes(config, found)) if found.dtype.kind in "US" else found)
    labels = class_labels
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != input_ids.shape[:1]:
        raise ValueError(
            f"`class_labels` are integers, one for each of {len(input_ids)} images; found {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    labels = labels.to(input_ids.device, torch.long)
    first = torch.zeros_like(labels)
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        first = attention_mask.to(labels).argmax(dim=1)
    if has_values(labels) and has_values(input_ids):
        wrong = (labels < -1) | (labels >= count)
        if wrong.any():
            raise ValueError(
                f"`class_labels` hold {int(labels[wrong][0])}; this model has {count} classes, 0..{count - 1}, and −1 says none."
            )
        begins = input_ids.gather(1, first[:, None])[:, 0] == sos
        place = torch.arange(input_ids.shape[1], device=labels.device)
        if not begins.all() or ((input_ids == sos) & (place > first[:, None])).any():
            raise ValueError(
                "`class_labels` stand in the place of SOS, with which `input_ids` do not begin, or which they hold several "
                "times. Pass pixels alone as `labels`, and an `attention_mask` with padding."
            )
    return input_ids.long().scatter(1, first[:, None], config.vocab_size + labels[:, None])


def class_names(config: ImageGPTConfig) -> list[str]:
    """The names of the classes that a model can be told, by their numbers: those of `config.id2label`, or the numbers as text."""
    names = [str(name) for name in (config.id2label or {}).values()]
    return names if len(names) == config.n_class_tokens else [str(number) for number in range(config.n_class_tokens)]


def find_classes(config: ImageGPTConfig, classes: Any) -> list[int]:
    """Return the numbers of one class or of several, which are given by name, as in `config.id2label`, or by number.

    A number may be text, if no class is named by one. A model without classes, a class that it does not have, and an empty
    list are a ValueError.
    """
    count, names = config.n_class_tokens, class_names(config)
    if not count:
        raise ValueError("This model knows no classes: train one with --class_conditional, or leave the classes out.")
    numbers = {name: number for number, name in enumerate(names)}
    if not any(name.isdecimal() for name in numbers):
        numbers |= {str(number): number for number in range(count)}
    wanted = list(classes) if isinstance(classes, (list, tuple, range)) or np.ndim(classes) else [classes]
    if not wanted:
        raise ValueError("No class is named: leave the classes out for images of none.")
    found = []
    for each in wanted:
        try:
            number = numbers.get(each, -1) if isinstance(each, str) else operator.index(each)
        except TypeError:
            number = -1
        if isinstance(each, bool) or not 0 <= number < count:
            known = ", ".join(names[:10]) + (", …" if count > 10 else "")
            raise ValueError(f"There is no class {each!r}: this model has {count} classes: {known}.")
        found.append(number)
    return found


def check_mask(bool_masked_pos: torch.Tensor, shape: torch.Size, config: ImageGPTConfig) -> None:
    """Raise ValueError unless `bool_masked_pos` fits tokens of `shape` (B, T) and the model is masked."""
    if config.objective != "masked":
        raise ValueError("`bool_masked_pos` is for masked models; this one is causal.")
    if bool_masked_pos.dtype != torch.bool or bool_masked_pos.shape != shape:
        raise ValueError(
            f"`bool_masked_pos` is boolean and has the tokens' shape {tuple(shape)}; found {bool_masked_pos.dtype} of shape "
            f"{tuple(bool_masked_pos.shape)}."
        )


def shift_right(tokens: torch.Tensor, sos_token_id: int, images: torch.Tensor | None = None) -> torch.Tensor:
    """Turn pixels (B, N) into the inputs from which they are predicted, [SOS, x_0 … x_{N-2}] (B, N) [code src/model.py].

    images: from `number_images`, if rows hold several; SOS is the first input of each.
    """
    shifted = nn.functional.pad(tokens[:, :-1].long(), (1, 0), value=sos_token_id)
    if images is not None:
        shifted = shifted.masked_fill(nn.functional.pad(images.diff(dim=-1) != 0, (1, 0)), sos_token_id)
    return shifted
