"""transformers' own common tests, fetched by `make test`, on our classes: see tests/peer/README.md."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sklearn
import transformers
from transformers.utils import is_torchvision_available


FOLDER = os.environ.get("HF_IGPT_PEER")  # where `make test` puts transformers' tests
TORCHVISION = os.environ.get("HF_IGPT_TORCHVISION")  # where it puts torchvision: see test_torchvision_backend.py
THEIRS = os.environ.get("THEIRS")  # transformers' classes instead of ours, to compare
HERE = Path(__file__).parent / "peer"
PHOTO = Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg"  # for the photos that theirs fetch
# The package has only the frame of the pipelines' tests: it loads the models named here with the processors named here,
# and `pipeline_tasks.py` runs them.
TINY = {
    name: {"tokenizer_classes": [], "processor_classes": ["ImageGPTImageProcessorPil", "ImageGPTImageProcessor"]}
    for name in ("ImageGPTModel", "ImageGPTForImageClassification")
}
PIPELINE_TESTS = (
    "def __getattr__(name):\n    from tests import pipeline_tasks\n\n    return getattr(pipeline_tasks, name)\n"
)
# What their tests import or read that the package lacks.
STUBS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/pipelines/__init__.py": "",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "tests/utils/tiny_model_summary.json": json.dumps(TINY),
    "utils/fetch_hub_objects_for_ci.py": f"def url_to_local_path(url):\n    return {str(PHOTO)!r}\n",
}
# Why a test of theirs may be skipped. Anything else fails this one.
REASONS = (
    # Needs what this machine or environment lacks.
    r"^test requires (multiple )?accelerators?$",
    r"^test requires (Flash Attention( [34])?|the kernels library|MPS|deepspeed|torch GPU)$",
    r"^test is slow$",  # compiles for accelerators; or reads a processor in plain transformers, as test_hub.py does
    r"^asks for a tester that the source package lacks$",  # of generation
    # Is of models of another kind: Image GPT is one decoder with learned positions and dense layers.
    r"not (a )?composite|^No subconfigs|does not support SDPA$",  # the last in a test of composite models alone
    r"RoPE|no sparse experts|`output_router_logits`|sliding window|grouped_mm",
    r"no `base_model_class` defined",  # the same tests of RoPE, where classifiers are tested alone
    r"^No sequence-to-sequence language modeling head|^No decoder-only language modeling head",  # by lists of names
    r"^Model does not have position embeddings$",  # that could be resized: an image has its pixels
    r"^Not a prioritized model for now",  # by the age of models, until 5.17 at least; now it runs
    r"^No validation found for `preprocess` method$",  # the old way to check options, which v5's processors have left
    # Pipelines of other tasks, their packages, and two that transformers itself has given up.
    r"is not in `self.pipeline_model_mapping`",
    r"^test requires (Timm|PyTesseract|av)$",
    r"`run_pipeline_test` is currently not implemented",
    # Image GPT has none of it.
    r"^Model does not support output_attentions$",  # with SDPA, which makes no weights; eager does
    r"^Model does not have a TP plan",
    r"^test_resize_embeddings is set to `False`$",  # classifiers fed SOS, which refuse the last token as a pixel
)


def lay_out(folder):
    """transformers' tests, ours and what they look for around them, in `folder`, as transformers' repository has it."""
    shutil.copytree(FOLDER, folder / "tests")
    stubs = dict(STUBS)
    for name in re.findall(r"test_pipelines_\w+", (folder / "tests" / "test_pipeline_mixin.py").read_text()):
        stubs[f"tests/pipelines/{name}.py"] = PIPELINE_TESTS
    for name, text in stubs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for path in HERE.glob("*.py"):
        shutil.copy(path, folder / "tests")
    (folder / "src").mkdir()
    (folder / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)


def environment():
    paths = [".", *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {"OMP_NUM_THREADS": "1"}  # small shapes, on which threads would only wait for one another
    if not is_torchvision_available():
        paths.append(TORCHVISION)
        found["HF_IGPT_STUB_TORCHVISION"] = "1"
    return os.environ | found | {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.skipif(not FOLDER, reason="transformers' tests are fetched by `make test`")
@pytest.mark.skipif(not (TORCHVISION or is_torchvision_available()), reason="torchvision is set up by `make test`")
def test_transformers_common_tests(tmp_path):
    lay_out(tmp_path)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", "-rfs", "tests/test_ours.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    summary = (done.stdout.strip().splitlines() or [""])[-1].strip("= ")
    print(summary)
    if THEIRS:
        pytest.skip(f"transformers' own: {summary}")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", summary)[1]) >= 300
    for reason in re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", done.stdout, flags=re.MULTILINE):
        assert any(re.search(known, reason) for known in REASONS), reason
