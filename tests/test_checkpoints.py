"""The models that ship with the repository: small, whole, and as good as their records say."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, pipeline

import hf_igpt
from hf_igpt import ImageGPTForCausalImageModeling
from hf_igpt.data import DataArguments, load_images, read_image
from hf_igpt.evaluation.metrics import accuracy, measure_class_likelihoods, measure_surprise
from hf_igpt.evaluation.records import read_records, read_run
from hf_igpt.publishing.hub import check_model


ROOT = Path(__file__).parent.parent
FOLDERS = sorted((ROOT / "checkpoints").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_checkpoints_are_small_and_whole(folder):
    config, processor = check_model(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12 * 2**20
    assert {"README.md", "records.json", "run.json", "samples.png"} <= {file.name for file in folder.iterdir()}
    assert read_run(folder)["recipe"]["objective"] == config.objective
    assert type(AutoConfig.from_pretrained(folder)) is type(config)
    assert AutoImageProcessor.from_pretrained(folder).token_grid() == processor.token_grid()


@pytest.fixture(scope="module")
def digits():
    """The digits' model in float32, and its held-out digits as tokens (359, 64) and labels (359,)."""
    folder = ROOT / "checkpoints" / "digits"
    model = AutoModelForCausalLM.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    held_out = load_images(DataArguments(), seed=read_records(folder / "records.json")[0].seed)["validation"]
    tokens = processor([read_image(cell) for cell in held_out["image"]], return_tensors="pt")["input_ids"]
    return model, processor, tokens, torch.tensor(held_out["label"])


def test_the_digits_are_as_recorded(digits):
    model, _, tokens, labels = digits
    assert isinstance(model, ImageGPTForCausalImageModeling) and model.dtype == torch.float32
    record = read_records(ROOT / "checkpoints" / "digits" / "records.json")[0]
    nats = measure_surprise(model, tokens, labels, progress=False).mean().item()
    assert nats == pytest.approx(record.value, abs=2e-3)  # the weights are rounded to bfloat16
    posterior = measure_class_likelihoods(model, tokens, progress=False)
    assert accuracy(posterior.argmax(dim=1), labels) > 0.95


def test_the_digits_draw(digits):
    model, processor, tokens, _ = digits
    drawn = hf_igpt.sample(model, processor, 8, classes=["3", "8"], guidance=2.0, progress=False, return_tokens=True)
    expected = torch.tensor([3] * 8 + [8] * 8)
    assert accuracy(measure_class_likelihoods(model, drawn, progress=False).argmax(dim=1), expected) > 0.8
    complete = pipeline("image-completion", model=model, image_processor=processor)
    (completion,) = complete(processor.decode(tokens[:1])[0], rows=4, seed=0)
    assert completion.size == (8, 8)
