"""The command line of every script: flags from dataclasses, recipes in files, and errors in one line."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import transformers
import yaml
from transformers import HfArgumentParser

import hf_igpt


if TYPE_CHECKING:
    import torch


# What safetensors, archives of torch and numpy say of a full disk.
NO_ROOM = (
    "os error 28",
    "os error 122",
    "PytorchStreamWriter failed writing",
    "unexpected pos",
    " requested and ",
    "iostream error",
)


def parse_arguments(*dataclasses: Any, description: str, first: str | None = None) -> tuple[Any, ...]:
    """Command-line flags as instances of `dataclasses`. A first argument FILE.json, .yaml or .yml gives their defaults.

    first: the flag whose values may stand at the beginning without it.
    """
    parser = HfArgumentParser(
        dataclasses, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags = sys.argv[1:]
    if flags and flags[0].endswith((".json", ".yaml", ".yml")):
        flags = read_recipe(Path(flags[0]), {action.dest for action in parser._actions} - {"help"}) + flags[1:]
    if first and flags and not flags[0].startswith("-"):
        flags = [f"--{first}", *flags]
    *arguments, unknown = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
    if unknown:
        names = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1)
        raise ValueError(f"There is no flag {' '.join(unknown)}" + (f"; did you mean {close[0]}?" if close else "."))
    return tuple(arguments)


def read_recipe(file: Path, known: set[str]) -> list[str]:
    """A recipe file as flags, so that argparse checks it like flags; those that follow on the command line win.

    What cannot be read, or has names that are not `known`, is a ValueError.
    """
    try:
        recipe = yaml.safe_load(file.read_text())  # JSON is YAML
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {file} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {file} does not hold names and values.")
    if unknown := sorted(str(name) for name in set(recipe) - known):
        raise ValueError(f"{file} has unknown names: {', '.join(unknown)}.")
    flags = []
    for name, value in recipe.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def run_script(function: str, *dataclasses: Any, description: str, first: str | None = None) -> None:
    """Call a function, named "module:function", with what `parse_arguments` gives.

    The module is imported after the flags are parsed, so that --help loads no model. A refusal ends the program with one
    line and status 2.
    """
    name = Path(sys.argv[0]).name
    os.environ.pop("HF_IGPT_REGISTER", None)  # it was for this process, not for those that it starts
    try:
        arguments = parse_arguments(*dataclasses, description=description, first=first)
        hf_igpt.register()
        quiet_libraries()
        module, _, called = function.partition(":")
        getattr(import_module(module), called)(*arguments)
    except (ValueError, OSError, ImportError) as error:  # the last of packages that an argument needs
        end(name, error)
    except KeyboardInterrupt:
        print(
            f"{name}: interrupted. The same command continues from the last checkpoint, if there is one.",
            file=sys.stderr,
        )
        sys.exit(130)
    except Exception as error:
        if not is_disk_full(error):
            raise
        end(name, error)
    finally:
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # or its threads abort the process at exit


def end(name: str, error: Exception) -> NoReturn:
    """End the program `name` with one line and status 2."""
    what = f"the disk is full; make room and repeat the command ({error})" if is_disk_full(error) else str(error)
    print(f"{name}: error: {' '.join(what.split())}", file=sys.stderr)
    sys.exit(2)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is of a file that found no room; libraries have errors of their own for it."""
    while error is not None:
        said = str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(words in said for words in NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


def quiet_libraries() -> None:
    """Show our own progress bars alone: not those of loading and writing files, and none where output is captured."""
    import datasets

    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def find_device(name: str | None) -> torch.device:
    """The `torch.device` called `name`, or by default an accelerator if there is one. One that is not there: ValueError."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
