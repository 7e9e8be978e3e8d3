"""OpenAI's TensorFlow checkpoints <-> our weights: names and layouts as data, sizes from the variables' shapes.

The released checkpoints (`model.ckpt-1000000` and its shards) hold the variables that src/model.py makes under `model/`,
next to Adam's slots. H heads, E = D / H their width.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configuration_imagegpt import ImageGPTConfig
from ..modeling_imagegpt import ImageGPTForCausalImageModeling


# OpenAI's name -> ours; in a block also how the array changes: None (as it is), "heads" (H, E, D) -> (D, D).
# wte, sos and the three of q, k, v have parts of a weight each; they are joined in `from_openai`.
WHOLE = {
    "wpe": "transformer.wpe.weight",
    "wtet": "lm_head.weight",
    "ln_f/g": "transformer.ln_f.weight",
    "clf/wclf": "score.weight",
}
OF_BLOCK = {
    "ln_1/g": ("ln_1.weight", None),
    "ln_2/g": ("ln_2.weight", None),
    "attn/c_proj": ("attn.c_proj.weight", "heads"),
    "mlp/c_fc/w": ("mlp.c_fc.weight", None),
    "mlp/c_proj/w": ("mlp.c_proj.weight", None),
}
QKV = [f"attn/{part}_proj" for part in "qkv"]
MOST_VARIABLES = 100_000  # in an index; iGPT-L has about 1,200, with Adam's slots
SKIPPED = re.compile(r"(.*/)?(Adam(_\d+)?|adam_[mv])(/.*)?$|(.*/)?(beta[12]_power|global_step)$")


def read_openai(checkpoint: str | Path) -> dict[str, np.ndarray]:
    """Variables of a TensorFlow checkpoint by name, without `model/` and without the optimiser's.

    checkpoint: the path without suffix, as `DIR/model.ckpt-1000000`; any number of data shards. A missing or truncated
    file is a ValueError that names it. Needs TensorFlow: pip install "hf_igpt[openai]".
    """
    try:
        from tensorflow.core.protobuf import tensor_bundle_pb2  # type: ignore[import-untyped,import-not-found,unused-ignore]
        from tensorflow.python.training import py_checkpoint_reader  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError('Reading OpenAI\'s checkpoints needs TensorFlow: pip install "hf_igpt[openai]"') from error

    index = Path(f"{checkpoint}.index")
    if not index.is_file():
        raise ValueError(f"There is no {index}: give the checkpoint's path without suffix, as DIR/model.ckpt-1000000.")
    name = re.compile(re.escape(index.stem) + r"\.data-\d{5}-of-\d{5}")
    shards = sorted(file for file in index.parent.iterdir() if name.fullmatch(file.name))
    expected = int(shards[0].name.rsplit("-", 1)[1]) if shards else 1
    if len(shards) != expected:
        raise ValueError(f"{checkpoint} has {len(shards)} of its {expected} data files: download all of them.")
    try:
        check_index(index, [file.stat().st_size for file in shards], tensor_bundle_pb2.BundleEntryProto)
    except Exception as error:  # whatever a broken index makes of its parts
        raise ValueError(f"{index} and the data files do not fit; one is damaged or cut short: {error}") from error
    try:
        reader = py_checkpoint_reader.NewCheckpointReader(str(checkpoint))
        names = [name for name in reader.get_variable_to_shape_map() if not SKIPPED.match(name)]
        return {name.removeprefix("model/"): reader.get_tensor(name) for name in sorted(names)}
    except Exception as error:  # TensorFlow's own errors
        raise ValueError(f"{checkpoint} cannot be read; a file is damaged or cut short: {error}") from error


def check_index(index: Path, data_sizes: list[int], entry_type: Any) -> None:
    """ValueError unless every variable that an index names is of float32 and lies, whole, in the data files (bytes of each).

    Where an index lies, TensorFlow's reader ends the process or takes all memory, so it is read here before. It is a table as
    LevelDB's: blocks of keys and values; the last 48 bytes say where the block is whose values say where the others are.
    """
    table = index.read_bytes()
    left = sum(data_sizes)
    places = read_block(table, table[-48:][read_place(table[-48:])[2] :])
    entries = ((key, value) for _, place in places for key, value in read_block(table, place))
    for number, (key, value) in enumerate(entries):
        if number == MOST_VARIABLES:
            raise ValueError(f"it names more than {MOST_VARIABLES:,} variables")
        if not key:  # the header
            continue
        name, entry = key.decode(), entry_type.FromString(value)
        shape = [dim.size for dim in entry.shape.dim]
        what = f"{name} of shape {shape!s:.100}"
        if len(shape) > 8 or any(size < 0 for size in shape) or math.prod(shape) >= 2**48 or entry.slices:
            raise ValueError(f"{what} is no whole array")
        if SKIPPED.match(name):
            continue
        if entry.dtype != 1 or entry.size != 4 * math.prod(shape):
            raise ValueError(f"{what} has {entry.size} bytes of type {entry.dtype}, where float32 is type 1 of 4 bytes")
        left -= entry.size
        of_file = data_sizes[entry.shard_id] if 0 <= entry.shard_id < len(data_sizes) else 0
        if not 0 <= entry.offset <= of_file - entry.size or left < 0:
            raise ValueError(f"{what} has {entry.size:,} bytes, more than the data files hold there")


def read_block(table: bytes, place: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of the block at an (offset, size) of a table; each key is as the last one from its first bytes on."""
    offset, size, _ = read_place(place)
    block = table[offset : offset + size]
    if len(block) != size or table[offset + size] != 0:
        raise ValueError("it is cut short, or compressed")
    end, at, key = size - 4 - 4 * int.from_bytes(block[-4:], "little"), 0, b""
    while at < end:
        shared, at = read_varint(block, at)
        further, at = read_varint(block, at)
        length, at = read_varint(block, at)
        key = key[:shared] + block[at : at + further]
        at += further + length
        yield key, block[at - length : at]


def read_place(data: bytes) -> tuple[int, int, int]:
    """(offset, size) of a block, and where they end in `data`."""
    offset, at = read_varint(data, 0)
    return offset, *read_varint(data, at)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, 7 bits in each byte until one is below 128, and where it ends."""
    number = shift = 0
    while data[at] >= 128:
        number, at, shift = number | (data[at] & 127) << shift, at + 1, shift + 7
    return number | data[at] << shift, at + 1


def from_openai(variables: dict[str, np.ndarray]) -> tuple[ImageGPTConfig, dict[str, torch.Tensor]]:
    """Variables of `read_openai` -> configuration and state dict, all sizes taken from the shapes.

    A model without `sos` is the masked one; `clf/wclf` makes a classifier fed as OpenAI's code does (`sos_inputs`). The
    state dict has both heads, so one folder serves both classes. An unknown or a missing variable is a ValueError.
    """
    left = dict(variables)

    def take(name: str, dimensions: int) -> torch.Tensor:
        if name not in left:
            raise ValueError(f"The checkpoint has no variable {name}: it is no Image GPT, or an incomplete one.")
        array = np.array(left.pop(name), dtype=np.float32)
        if array.ndim != dimensions or 0 in array.shape:
            raise ValueError(f"{name} has {dimensions} dimensions in an Image GPT; found the shape {array.shape}.")
        return torch.from_numpy(array)

    n_layer = len({match[1] for name in variables if (match := re.match(r"h(\d+)/", name))})
    if n_layer == 0:
        raise ValueError("The checkpoint has no blocks (h0/…): it is no Image GPT.")
    masked = "sos" not in left
    wte = take("wte", 2)
    n_colors, d = wte.shape
    sos = torch.zeros(d) if masked else take("sos", 1)
    widths = {name: np.shape(variables[name])[-1:] for name in ("wpe", "wtet", "sos", "ln_f/g") if name in variables}
    if wrong := {name: width for name, width in widths.items() if width != (d,)}:
        raise ValueError(f"wte has width {d}, but {wrong}: the checkpoint's variables do not fit together.")
    state = {"transformer.wte.weight": torch.cat([wte, sos[None]])}
    for name, ours in WHOLE.items():
        if name != "clf/wclf" or name in left:
            state[ours] = take(name, 1 if name == "ln_f/g" else 2)
    n_head = None
    for i in range(n_layer):
        qkv = [take(f"h{i}/{name}", 3) for name in QKV]
        if len({part.shape for part in qkv}) > 1:
            raise ValueError(
                f"h{i}/attn/q_proj, k_proj and v_proj have different shapes: {[*map(tuple, (part.shape for part in qkv))]}."
            )
        n_head = qkv[0].shape[0]
        state[f"transformer.h.{i}.attn.c_attn.weight"] = torch.cat([part.flatten(0, 1).T for part in qkv], dim=1)
        for name, (ours, layout) in OF_BLOCK.items():
            weight = take(f"h{i}/{name}", {"heads": 3, None: 1 if name.endswith("/g") else 2}[layout])
            state[f"transformer.h.{i}.{ours}"] = weight.flatten(0, 1) if layout == "heads" else weight
    if left:
        raise ValueError(f"The checkpoint has variables that Image GPT does not have: {', '.join(sorted(left))}.")
    config = ImageGPTConfig.from_preset(
        "s",
        n_colors=n_colors,
        n_positions=len(state["transformer.wpe.weight"]),
        n_embd=d,
        n_layer=n_layer,
        n_head=n_head,
        n_inner=state["transformer.h.0.mlp.c_fc.weight"].shape[1],
        objective="masked" if masked else "causal",
    )
    if config.n_inner == 4 * d:
        config.n_inner = None
    if "score.weight" in state:
        config.num_labels = len(state["score.weight"])
        config.sos_inputs = not masked
    with torch.device("meta"):
        whole = ImageGPTForCausalImageModeling(
            ImageGPTConfig(**config.to_dict() | {"objective": "causal", "is_causal": True})
        ).state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in whole.items()} | {"score.weight": (config.num_labels, d)}
    for name, weight in state.items():
        if tuple(weight.shape) != shapes[name]:
            raise ValueError(
                f"{name} would have the shape {tuple(weight.shape)}, not {shapes[name]}: the checkpoint's variables do not fit "
                "together."
            )
    for name, weight in list(state.items()):  # saved as zeros: see `ImageGPTProjection`
        if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name):
            state[name.replace(".weight", ".bias")] = torch.zeros(weight.shape[1])
    return config, state


def to_openai(config: ImageGPTConfig, state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The inverse of `from_openai`. Biases other than zeros, and classes, have no place there: ValueError."""
    if config.n_class_tokens:
        raise ValueError(f"OpenAI's model knows no classes; this one has {config.n_class_tokens}.")
    state = {name: weight.detach().float().cpu() for name, weight in state.items()}
    d, heads = config.n_embd, (config.n_head, config.n_embd // config.n_head)
    wte = state.pop("transformer.wte.weight")
    variables = {"wte": wte[:-1]}
    if config.objective == "causal":
        variables["sos"] = wte[-1]
    for name, ours in WHOLE.items():
        if ours in state:
            variables[name] = state.pop(ours)
    for i in range(config.n_layer):
        qkv = state.pop(f"transformer.h.{i}.attn.c_attn.weight").split(d, dim=1)
        for name, part in zip(QKV, qkv, strict=True):
            variables[f"h{i}/{name}"] = part.T.unflatten(0, heads)
        for name, (ours, layout) in OF_BLOCK.items():
            weight = state.pop(f"transformer.h.{i}.{ours}")
            variables[f"h{i}/{name}"] = weight.unflatten(0, heads) if layout == "heads" else weight
    for name, weight in state.items():
        if not name.endswith(".bias") or weight.any():
            raise ValueError(f"{name} has no place in OpenAI's model, which has no biases.")
    return {name: weight.contiguous().numpy() for name, weight in variables.items()}
