"""Folders that commands read and write: whether a model is there, where results go, and whether they may go there."""

from pathlib import Path
from typing import Any

from ..evaluation.records import RUN, own_file
from ..modeling_imagegpt import check_loading
from ..training.checkpoints import is_sealed, list_checkpoints


def folder_beside(model_name: str, output_dir: str | None, name: str = "") -> Path:
    """`output_dir` if it is given, else the folder `name` in the model's own (by default that itself).

    A model on the Hub has no folder of its own, and a link may not lead out of it: ValueError.
    """
    if output_dir is None and not Path(model_name).is_dir():
        raise ValueError(
            f"Give --output_dir: {model_name} is not a folder here, so there is none of its own to write to."
        )
    return Path(output_dir) if output_dir is not None else own_file(model_name, name)


def check_model_exists(model_name: str) -> None:
    """ValueError if `model_name` is the path of a folder that is not there: it would be looked for on the Hub."""
    path = Path(model_name)
    is_path = path.is_absolute() or model_name.startswith(".") or len(path.parts) != 2 or path.parts[0] == "outputs"
    if not path.exists() and (is_path or path.parent.is_dir()):
        raise ValueError(
            f"There is no folder {model_name}: scripts/run_pretrain.py and scripts/run_finetune.py make models, in outputs/ by "
            "default; a model on the Hub is named organisation/name."
        )
    if (path / RUN).is_file() and not (path / "config.json").is_file():
        last = next((checkpoint for checkpoint in list_checkpoints(path) if is_sealed(checkpoint)), None)
        remedy = f"take its last checkpoint, {last}, or finish it" if last else "it has no checkpoint yet: finish it"
        raise ValueError(f"{path} holds a run that is not finished: {remedy} by the same command.")


def check_new(folder: Path, flag: str) -> None:
    """ValueError if `folder`, given by `flag`, is a file or holds anything."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} {folder} is a file: give a new or an empty folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{flag} {folder} is not empty: give a new or an empty folder.")


def check_holds_only(folder: Path, files: set[str], flag: str = "--output_dir") -> None:
    """ValueError if `folder`, given by `flag`, holds anything but `files`, which are written anew."""
    strange = sorted(entry.name for entry in folder.iterdir() if entry.name not in files) if folder.is_dir() else []
    if strange:
        raise ValueError(f"{folder} holds other files ({', '.join(strange[:5])}): give another {flag}.")


def check_lacks(folder: Path, file: str, flag: str = "--output_dir") -> None:
    """ValueError if `folder`, given by `flag`, holds `file` already."""
    if (folder / file).exists():
        raise ValueError(f"{folder} holds {file} already: give another {flag}, or delete it.")


def load_trained(kind: Any, model_name: str, remedy: str, **options: Any) -> Any:
    """Load a model of the class `kind`; one that lacks weights for it, as its head, is a ValueError that names `remedy`.

    options: those of `from_pretrained`.
    """
    model, loading = kind.from_pretrained(model_name, output_loading_info=True, **options)
    check_loading(model, model_name, loading)
    if loading["missing_keys"]:  # a head
        missing = ", ".join(sorted(loading["missing_keys"]))
        raise ValueError(f"{model_name} is not a trained {kind.__name__}: it lacks {missing}. {remedy}")
    return model
