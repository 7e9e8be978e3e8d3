"""The rules of the house that a program can check."""

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import randomized, small_config

from hf_igpt import ImageGPTForCausalImageModeling, ImageGPTImageProcessorPil
from hf_igpt.commands.arguments import ReportArguments, SampleArguments, ScoreArguments
from hf_igpt.commands.report import report
from hf_igpt.commands.sample import draw
from hf_igpt.commands.score import score
from hf_igpt.data import DataArguments
from hf_igpt.publishing.hub import CODE, write_repository


ROOT = Path(__file__).parent.parent / "src" / "hf_igpt"
ALLOWED = {
    "numpy",
    "torch",
    "PIL",
    "transformers",
    "packaging",
    "tqdm",  # which transformers needs itself
    "huggingface_hub.dataclasses",
} | sys.stdlib_module_names
FILES = [path for path in sorted(ROOT.glob("*.py")) if path.stem != "__init__"]


def dotted(node: ast.AST) -> list[str]:
    """The names of `a.b.c`, or nothing if it is no such chain."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [*names, node.id][::-1] if isinstance(node, ast.Name) else []


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def allowed(module: str) -> bool:
    parts = module.split(".")
    return any(".".join(parts[: i + 1]) in ALLOWED for i in range(len(parts)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_that_travel_import_public_names_only(path):
    tree = ast.parse(path.read_text())
    travelling = {file.stem for file in FILES}
    top = set(tree.body)  # what a function imports is needed by those who call it alone
    wrong, foreign = [], set()  # names by which other packages are reached
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                foreign.add(alias.asname or alias.name.split(".")[0])
                if (node in top and not allowed(alias.name)) or any(map(is_private, alias.name.split("."))):
                    wrong.append(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level:
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            wrong += [f".{name}" for name in modules if node.level > 1 or name not in travelling]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            foreign |= {alias.asname or alias.name for alias in node.names}
            wrong += [
                name for name in names if (node in top and not allowed(name)) or any(map(is_private, name.split(".")))
            ]
    for node in ast.walk(tree):
        names = dotted(node)
        if names and names[0] in foreign and any(is_private(name) for name in names[1:]):
            wrong.append(".".join(names))
    assert not wrong, f"{path.name} names {', '.join(wrong)}"


def test_a_published_repository_carries_the_files_that_travel():
    assert sorted(CODE) == [path.name for path in FILES]


def test_imports_go_one_way():
    """The layers that setup.cfg names, from the paper's numbers to the commands."""
    lint_imports = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "1 kept, 0 broken" in done.stdout, done.stdout + done.stderr


UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def test_nothing_is_unpickled():
    """No module that does, no `torch.load` but of weights, no `numpy.load` with pickles."""
    wrong = []
    places = [*ROOT.rglob("*.py"), *(ROOT.parent.parent / "scripts").glob("*.py")]
    for path in places:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            wrong += [f"{path.name}: {name}" for name in modules if name.split(".")[0] in UNPICKLING]
            if not isinstance(node, ast.Call):
                continue
            options = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            name = ".".join(dotted(node.func))
            if name == "torch.load" and options.get("weights_only") is not True:
                wrong.append(f"{path.name}: {name}")
            if options.get("allow_pickle", False) is not False or options.get("weights_only", True) is not True:
                wrong.append(f"{path.name}: {ast.unparse(node)}")
    assert not wrong, wrong


class Spy:
    """Whoever unpickles it makes a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def test_pickles_in_a_strangers_folder_are_not_run(tmp_path):
    folder, palette = tmp_path / "model", [[x / 8 - 1] * 3 for x in range(16)]
    randomized(ImageGPTForCausalImageModeling(small_config())).save_pretrained(folder)
    ImageGPTImageProcessorPil(clusters=palette, size=8).save_pretrained(folder)
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "pytorch_model.bin",
        "palette.npy",
    ):
        (folder / name).write_bytes(pickle.dumps(Spy(tmp_path / "run")))
    draw(SampleArguments(str(folder), num_images=1, device="cpu"), DataArguments())
    score(ScoreArguments(str(folder), [str(folder / "samples.png")], device="cpu"), DataArguments())
    report(ReportArguments([str(folder)], str(tmp_path / "report")), DataArguments())
    write_repository(folder, tmp_path / "repository", "org/name")
    assert not {"training_args.bin", "pytorch_model.bin"} & {file.name for file in (tmp_path / "repository").iterdir()}
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileExistsError):  # they would have been
        pickle.loads(pickle.dumps(Spy(tmp_path)))
