"""The README is true: its commands and snippets run, its tree exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from script_server import Scripts

from hf_igpt.commands.cli import parse_arguments
from hf_igpt.commands.clusters import ClustersArguments
from hf_igpt.commands.convert import ConvertArguments
from hf_igpt.commands.plan import PlanArguments
from hf_igpt.commands.probe import ProbeArguments
from hf_igpt.commands.publish import PublishArguments
from hf_igpt.commands.report import ReportArguments
from hf_igpt.commands.sample import SampleArguments
from hf_igpt.commands.score import ScoreArguments
from hf_igpt.data import DataArguments
from hf_igpt.training.arguments import FinetuningArguments, ModelArguments, PretrainingArguments


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DATACLASSES = {
    "run_pretrain.py": (ModelArguments, DataArguments, PretrainingArguments),
    "run_clusters.py": (ClustersArguments, DataArguments),
    "run_sample.py": (SampleArguments, DataArguments),
    "run_convert.py": (ConvertArguments,),
    "run_publish.py": (PublishArguments,),
    "run_finetune.py": (ModelArguments, DataArguments, FinetuningArguments),
    "run_linear_probe.py": (ProbeArguments, DataArguments),
    "run_score.py": (ScoreArguments, DataArguments),
    "run_report.py": (ReportArguments, DataArguments),
    "run_plan.py": (PlanArguments,),
}
ELSEWHERE = (
    "--checkpoint",
    "--dataset_name",
    "--train_dir",
    "--images",
    "recipe.json",
)  # what these need is not in the repository


def commands(text):
    """Lines that call a script, continuation lines joined, comments dropped."""
    lines = re.sub(r"\\+\n\s*", " ", text).splitlines()
    lines = [line.split("#")[0].strip() for line in lines]
    return [line for line in lines if re.match(r"(python|accelerate launch|torchrun) .*scripts/run_\w+\.py", line)]


ALL = {
    command: None
    for text in [README, *(p.read_text() for p in ROOT.glob("scripts/*.py"))]
    for command in commands(text)
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the scripts in it, where the commands are run as they are written."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    return folder


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "ACCELERATE_USE_CPU": "true"}


def run(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_commands():
    assert len(ALL) >= 8
    assert {Path(script).name for script in re.findall(r"scripts/\w+\.py", " ".join(ALL))} == set(DATACLASSES)


@pytest.mark.parametrize("command", ALL)
def test_flags_of_every_command_exist(command, monkeypatch):
    script, flags = re.match(r".*scripts/(run_\w+\.py)\s*(.*)", command).groups()
    if flags.endswith((".json", ".yaml")):
        return
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(flags.replace("--bf16", ""))])
    parse_arguments(*DATACLASSES[script], description="", first="folders" if script == "run_report.py" else None)


def test_flags_of_the_whole_story_exist(monkeypatch):
    lines = re.sub(r"\\+\n\s*", " ", (ROOT / "scripts" / "pipeline.sh").read_text().replace("$objective", "causal"))
    steps = re.findall(r'^\s*step "\S+" (run_\w+\.py) (.*)$', lines, flags=re.MULTILINE)
    assert {script for script, _ in steps} == set(DATACLASSES) - {"run_convert.py", "run_publish.py", "run_plan.py"}
    for script, flags in steps:
        monkeypatch.setattr(sys, "argv", [script, *shlex.split(flags)])
        parse_arguments(*DATACLASSES[script], description="", first="folders" if script == "run_report.py" else None)


def test_commands_and_snippets_run_in_their_order(workplace):
    """Commands without outside data, as written but for the length of training and probing; then the python snippets."""
    run_here = [command for command in commands(README) if not any(word in command for word in ELSEWHERE)]
    run_here = [command for command in run_here if "run_publish.py" not in command or "--local_only" in command]
    trained = 0
    with Scripts(ENVIRONMENT, workplace) as scripts:
        for command in run_here:
            words = shlex.split(command)
            launched = words[0] != "python"
            words = words[words.index(next(w for w in words if w.startswith("scripts/"))) :]
            if "run_pretrain.py" in command:
                trained += 1
                named = trained == 1 or "--output_dir" in words
                words += [] if named else ["--output_dir", f"outputs/pretrain{trained}"]
            if "run_pretrain.py" in command or "run_finetune.py" in command:
                words += ["--max_steps", "30", "--eval_strategy", "steps", "--eval_steps", "30"]
                words += ["--save_strategy", "steps", "--save_steps", "30", "--use_cpu"]
            if "run_linear_probe.py" in command:
                words += ["--max_train_samples", "300", "--max_eval_samples", "100"]
            if launched:
                run([sys.executable, "-m", "accelerate.commands.launch", *words], workplace)
            else:
                scripts.run(*words)
    assert (workplace / "outputs/pretrain/samples.png").is_file()
    assert (workplace / "outputs/pretrain/completions.png").is_file()
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert snippets
    run([sys.executable, "-c", "\n".join(snippets)], workplace)


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([\w-]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_links_and_tree_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    tree = re.search(r"```text\n(.*?)```", README, flags=re.DOTALL).group(1)
    paths = [line.split()[0] for line in tree.splitlines() if line.strip()]
    assert len(paths) > 10
    folder = ""
    for line, path in zip([line for line in tree.splitlines() if line.strip()], paths, strict=True):
        if not line.startswith(" "):
            folder = path if path.endswith("/") else ""
        full = ROOT / (folder + path if line.startswith(" ") else path)
        assert full.exists(), full
