"""The image processor's tests once more, with the torchvision backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import is_torchvision_available


FOLDER = os.environ.get("HF_IGPT_TORCHVISION")  # where `make test` puts torchvision, outside the environment


@pytest.mark.skipif(
    is_torchvision_available(), reason="with torchvision in the environment the tests use it as they are"
)
@pytest.mark.skipif(not FOLDER, reason="torchvision is set up by `make test`")
def test_image_processor_with_torchvision():
    """In a process of its own, because torchvision beside a CPU build of torch breaks unrelated imports."""
    paths = os.pathsep.join(filter(None, [FOLDER, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "HF_IGPT_STUB_TORCHVISION": "1"}
    tests = [
        str(Path(__file__).parent / name) for name in ("test_image_processing_imagegpt.py", "test_pixels_imagegpt.py")
    ]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout
    probe = "import conftest; from transformers.utils import is_torchvision_available as a; assert a()"
    subprocess.run([sys.executable, "-c", probe], env=environment, cwd=Path(__file__).parent, check=True)
