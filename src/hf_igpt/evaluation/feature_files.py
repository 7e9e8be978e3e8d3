"""Features of many images in Arrow files, for sets that do not fit in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..features_imagegpt import check_layers, feature_batches
from ..modeling_imagegpt import ImageGPTPreTrainedModel
from .records import whole_file


def write_features(
    path: str | Path,
    model: ImageGPTPreTrainedModel,
    inputs: Any,
    layers: int | Sequence[int] | None = None,
    **options: Any,
) -> Path:
    """Write what `extract` returns to an Arrow file, batch by batch, whatever the number of images; returns `path`.

    Columns `layer_0` … hold D float32 a row; `read_features` reads one of them, `datasets.Dataset.from_file` all. The
    file appears whole or not at all. `options` are those of `extract`.
    """
    path = Path(path)
    layers = check_layers(model.config, layers)
    batches = feature_batches(model, inputs, layers, **options)
    row = pa.list_(pa.float32(), model.config.n_embd)
    schema = pa.schema([(f"layer_{layer}", row) for layer in dict.fromkeys(layers)])
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        whole_file(path) as partial,
        pa.OSFile(str(partial), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        for batch in batches:
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(batch[layer].numpy().reshape(-1)), model.config.n_embd)
                for layer in dict.fromkeys(layers)
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return path


def read_features(path: str | Path, layer: int) -> np.ndarray:
    """Features (n, D) float32 of one layer, 0..L, of a file of `write_features`; the other layers are not read."""
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()
        name = f"layer_{layer}"
        if name not in table.column_names:
            raise ValueError(f"{path} holds {', '.join(table.column_names)}, not {name}.")
        return np.concatenate([chunk.flatten().to_numpy() for chunk in table[name].chunks]).reshape(len(table), -1)
