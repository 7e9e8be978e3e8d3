"""Shared fixtures: small random models and palettes. Nothing is downloaded."""

import os
import tempfile

import numpy as np
import pytest
import torch


_home = tempfile.TemporaryDirectory()
os.environ.update(HF_HOME=_home.name, HF_HUB_OFFLINE="1")  # before anything of Hugging Face is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small shapes, on which threads would only wait for one another

if os.environ.get("HF_IGPT_STUB_TORCHVISION"):
    # torchvision's builds on PyPI are for CUDA builds of torch and do not import beside a CPU build, for want of their
    # compiled operators. The processors use its Python code alone, so empty operators are enough to test them.
    torchvision_operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        torchvision_operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from hf_igpt import ImageGPTConfig, ImageGPTForCausalImageModeling


# Those that take longest, longest first: each process of `make test` takes a file at a time, and none should be left
# alone with one of these in the end.
LONGEST = (
    *("test_hub.py", "test_readme.py", "test_peer.py", "test_training.py", "test_finetuning.py"),
    *("test_several_processes.py", "test_probe.py"),
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def palette():
    """64 distinct random colours (64, 3) in [-1, 1]."""
    return np.random.default_rng(0).uniform(-1, 1, (64, 3))


def small_config(**overrides) -> ImageGPTConfig:
    """3 blocks of width 32, 2 heads, 8x8 pixels, 16 colours.

    Heads of 16: transformers 5.17 divides by the square root rounded down, which is right for 16 alone.
    """
    shape = {"image_size": 8, "n_colors": 16, "n_layer": 3, "n_embd": 32, "n_head": 2}
    return ImageGPTConfig.from_preset("tiny", **(shape | overrides))


def randomized(model, std: float = 0.2):
    """`model` with every parameter drawn anew, norms' gains around 1, so that nothing is zero by initialisation."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if ".ln_" in name else 0.0, std=std)
    return model.eval()


@pytest.fixture
def model():
    """A small random causal model, bias-free, in evaluation mode."""
    return randomized(ImageGPTForCausalImageModeling(small_config()))


@pytest.fixture
def tokens():
    """(4, 64) random tokens of 16 colours."""
    return torch.randint(0, 16, (4, 64))
