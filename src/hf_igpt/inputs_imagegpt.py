"""The model's inputs: tokens, which are checked before any work is done, and the one shift between inputs and targets."""

from typing import Any

import numpy as np
import torch
from torch import nn
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
        )


def shift_right(tokens: torch.Tensor, sos_token_id: int) -> torch.Tensor:
    """Turn pixels (B, N) into the inputs from which they are predicted, [SOS, x_0 … x_{N-2}] (B, N) [code src/model.py]."""
    return nn.functional.pad(tokens[:, :-1].long(), (1, 0), value=sos_token_id)
