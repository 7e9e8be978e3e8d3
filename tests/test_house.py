"""The rules of the house that a program can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from hf_igpt.publishing.hub import CODE


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
