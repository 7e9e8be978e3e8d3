"""Checkpoints of a run: sealed with the hashes of their files once these are written, verified before one is continued.

`Trainer` writes a checkpoint file by file. One without a seal was cut short, and one that does not fit its seal is damaged;
neither is ever continued. Old checkpoints are deleted only once a newer one is sealed.
"""

import hashlib
import json
import os
import pickletools
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..evaluation.records import whole_file


SEAL = "checksums.json"  # in a checkpoint: the SHA-256 of each of its files
CHUNK = 2**24  # bytes
WEIGHTS_ALONE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # an environment variable of PyTorch
METADATA = ("BytesStorage", "ChunkStorage", "TensorStorage", "")
# What an index of shards consists of, besides types of numbers.
OF_INDEXES = {
    *(f"torch.distributed.checkpoint.metadata.{kind}Metadata" for kind in METADATA),
    *(f"torch.distributed.checkpoint.metadata.{kind}" for kind in ("MetadataIndex", "StorageMeta", "TensorProperties")),
    *(
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
    ),
    *("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict"),
    *(f"pathlib{where}.{kind}Path" for where in ("", "._local") for kind in ("Posix", "Windows")),
}


def list_checkpoints(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, whole or not, from the last step to the first."""
    found = [
        path for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if re.fullmatch(r"\d+", path.name.split("-", 1)[1])
    ]
    return sorted((path for path in found if path.is_dir()), key=step_of, reverse=True)


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint that `Trainer` saves at the present step."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.split("-")[1])


def is_sealed(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end. Its files may have changed since: see `find_damage`."""
    return (checkpoint / SEAL).is_file()


def seal_checkpoint(checkpoint: Path) -> None:
    """Write the hashes of all files of a checkpoint, which must all be written, into it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    hashes = {path.relative_to(checkpoint).as_posix(): hash_file(path) for path in files}
    with whole_file(checkpoint / SEAL) as partial:
        partial.write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def find_damage(checkpoint: Path) -> str | None:
    """Say in words why a checkpoint must not be continued; None if its files are those that were written, all of them."""
    if not is_sealed(checkpoint):
        return f"{checkpoint} was not written to its end"
    try:
        hashes = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if not (checkpoint / name).is_file():
                return f"{checkpoint / name} is missing"
            if hash_file(checkpoint / name) != expected:
                return f"{checkpoint / name} has changed since it was written"
    except (AttributeError, ValueError, OSError) as error:
        return f"{checkpoint} cannot be read: {error}"
    return None


@contextmanager
def refusing_states(checkpoint: str | None, *patterns: str) -> Iterator[None]:
    """Within it, what is saved in the files of a checkpoint that fit `patterns` is loaded: an error becomes a ValueError.

    A seal says that files are those that were written, not that this training wrote them. No code of theirs is run: shards,
    which PyTorch would unpickle, are read as weights alone, and their index is looked at first.
    """
    forced = os.environ.get(WEIGHTS_ALONE)
    os.environ[WEIGHTS_ALONE] = "1"
    try:
        for index in Path(str(checkpoint)).rglob(".metadata") if checkpoint is not None else ():
            check_index(index)
        yield
    except (Exception, CheckpointException) as error:  # of any type: a file may hold anything
        files = [str(file) for pattern in patterns for file in sorted(Path(str(checkpoint)).glob(pattern))]
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"{' or '.join(files)} does not hold the state of this training ({type(error).__name__}: {said}): continue from "
            "another checkpoint, or give another --output_dir."
        ) from error
    finally:
        if forced is None:
            del os.environ[WEIGHTS_ALONE]
        else:
            os.environ[WEIGHTS_ALONE] = forced


def check_index(file: Path) -> None:
    """ValueError unless the index of shards, a pickle, is made of nothing but what `torch.distributed.checkpoint` writes.

    Names are read without unpickling. Each is a constant, or two strings pushed right before it is looked up.
    """
    pushed: list[str | None] = []  # strings, in a row; None: something else
    memo: dict[int, str | None] = {}
    value: Any
    for operation, value, _ in pickletools.genops(file.read_bytes()):
        name = None
        if operation.name == "MEMOIZE" or "PUT" in operation.name:
            memo[len(memo) if operation.name == "MEMOIZE" else int(value)] = pushed[-1] if pushed else None
        elif "GET" in operation.name:
            pushed.append(memo.get(int(value)))
        elif "UNICODE" in operation.name:
            pushed.append(str(value))
        else:
            if operation.name == "STACK_GLOBAL":
                name = ".".join(map(str, pushed[-2:]))
            elif operation.name in ("GLOBAL", "INST"):
                name = str(value).replace(" ", ".")
            elif "EXT" in operation.name:
                name = operation.name
            pushed = []
        if name is not None and name not in OF_INDEXES and not isinstance(getattr(torch, name[6:], None), torch.dtype):
            raise ValueError(f"{file} names {name}, which is no part of an index")


def read_state(checkpoint: Path) -> TrainerState:
    """Read the `TrainerState` of a checkpoint; one that cannot be read is a ValueError."""
    with refusing_states(str(checkpoint), TRAINER_STATE_NAME):
        return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint once all processes have written it, and then deletes old ones.

    limit: the number of checkpoints to keep, the last and the best among them. None keeps all.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if args.should_save:
            checkpoint = checkpoint_of(args, state)
            seal_checkpoint(checkpoint)
            if self.limit:
                delete_old(checkpoint.parent, state, self.limit)


def delete_cut_short(run: Path) -> None:
    """Delete the checkpoints of a run that were not written, or not deleted, to the end."""
    for path in list_checkpoints(run):
        if not is_sealed(path):
            shutil.rmtree(path, ignore_errors=True)


def delete_old(run: Path, state: TrainerState, limit: int) -> None:
    """Delete checkpoints over the limit, and with them any that were cut short, and any that this run has not reached again."""
    found = list_checkpoints(run)
    past = [path for path in found if is_sealed(path) and step_of(path) <= state.global_step]
    essential = {past[0].name, Path(state.best_model_checkpoint or "").name}
    past.sort(key=lambda path: path.name not in essential)  # the others stay in their order
    kept = past[: max(limit, sum(path.name in essential for path in past))]
    for path in found:
        if path not in kept:
            (path / SEAL).unlink(missing_ok=True)  # first: what is left if this is interrupted counts as cut short
            shutil.rmtree(path, ignore_errors=True)
