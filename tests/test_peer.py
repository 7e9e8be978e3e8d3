"""transformers' own common tests, fetched by `make test`, on our classes: see tests/peer/README.md."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = os.environ.get("HF_IGPT_PEER")  # where `make test` puts transformers' tests
HERE = Path(__file__).parent
STUBS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "distributed_testing_utils.py": "def __getattr__(name):\n    return None\n",
}
# Why a test of theirs may be skipped. Anything else fails this one.
REASONS = (
    r"requires (multiple )?accelerators?|requires Flash Attention|requires the kernels library|requires MPS|requires deepspeed",
    r"composite|No subconfigs|RoPE|sparse experts|router_logits|sliding window|grouped_mm|keep_in_fp32|sequence-to-sequence",
    r"test is slow|Not a prioritized model|No conversion found",  # theirs alone
    r"Model does not support output_attentions",  # of sdpa: eager does
    r"No decoder-only language modeling head",  # by transformers' list of names
    r"Model does not have position embeddings",  # that could be resized: an image has its pixels
    r"TP plan",  # not yet
    r"asks for a tester that the source package lacks",
    r"does not support SDPA",  # in a test of composite models, whatever the model
)


@pytest.mark.skipif(not FOLDER, reason="transformers' tests are fetched by `make test`")
def test_transformers_common_tests(tmp_path):
    tests = tmp_path / "tests"
    shutil.copytree(FOLDER, tests)
    for name, text in STUBS.items():
        (tests / name).parent.mkdir(exist_ok=True)
        (tests / name).write_text(text)
    shutil.copy(HERE / "peer" / "test_ours.py", tests)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", "-rs", "tests/test_ours.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    print(done.stdout.strip().splitlines()[-1])
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 100
    for reason in re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", done.stdout, flags=re.MULTILINE):
        assert any(re.search(known, reason) for known in REASONS), reason
