"""The command line: --help loads no model; our classes are registered in whatever order things are imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_igpt.commands.arguments import PlanArguments
from hf_igpt.commands.cli import parse_arguments


ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("run_*.py"))
HEAVY = ["transformers.modeling_utils", "transformers.trainer", "datasets", "sklearn", "matplotlib", "evaluate"]


def run_python(code):
    # PEFT, where it is installed, makes transformers' arguments load its models.
    code = f"import sys; sys.modules['peft'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_loads_no_model(script):
    said = run_python(
        f"""
import runpy
sys.argv = [{script.name!r}, "--help"]
try:
    runpy.run_path({str(script)!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
print("LOADED", [name for name in {HEAVY} if name in sys.modules])
"""
    )
    assert "usage: " in said and "LOADED []" in said, said[-300:]


@pytest.mark.parametrize("first", ["import hf_igpt", "from transformers import AutoConfig, AutoModel, pipeline"])
def test_registration_in_any_order(first):
    run_python(
        f"""
{first}
import hf_igpt
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
config = AutoConfig.for_model("imagegpt", n_layer=1, n_embd=16, n_head=1, n_positions=4, vocab_size=3)
assert type(config) is hf_igpt.ImageGPTConfig
assert type(AutoModel.from_config(config)) is hf_igpt.ImageGPTModel
model = AutoModelForCausalLM.from_config(config)
assert type(model) is hf_igpt.ImageGPTForCausalImageModeling
assert IMAGE_PROCESSOR_MAPPING[type(config)]["pil"] is hf_igpt.ImageGPTImageProcessorPil
palette = [[-1.0, -1, -1], [1.0, 1, 1]]
processor = hf_igpt.ImageGPTImageProcessorPil(clusters=palette, size=2)
assert type(pipeline("image-completion", model, image_processor=processor)) is hf_igpt.ImageCompletionPipeline
"""
    )


def test_registration_can_wait_and_be_repeated():
    run_python(
        """
import os
os.environ["HF_IGPT_REGISTER"] = "later"
import hf_igpt
assert "transformers" not in sys.modules
assert {"ImageGPTConfig", "sample", "complete", "extract"} <= set(dir(hf_igpt))
from transformers import AutoConfig
assert type(AutoConfig.for_model("imagegpt")).__module__.startswith("transformers.")
for _ in range(2):
    hf_igpt.register()
assert type(AutoConfig.for_model("imagegpt")) is hf_igpt.ImageGPTConfig
try:
    hf_igpt.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""
    )


def test_a_flag_that_is_none_is_named_with_its_neighbour(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_plan.py", "--sise", "s", "--devices", "2"])
    with pytest.raises(ValueError, match=r"There is no flag --sise s; did you mean --size\?"):
        parse_arguments(PlanArguments, description="")
