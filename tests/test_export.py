"""At home in other tools: torch.export, ONNX, LoRA by PEFT, transformers' pipelines."""

import copy

import numpy as np
import pytest
import torch
from conftest import randomized, small_config
from PIL import Image
from transformers import pipeline

from hf_igpt import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTImageProcessorPil,
    ImageGPTModel,
)


class FirstOutput(torch.nn.Module):
    """`input_ids` in, the model's first output out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False)[0]


@pytest.fixture(params=["features", "classes", "classes, SOS first"])
def network(request):
    if request.param == "features":
        return FirstOutput(randomized(ImageGPTModel(small_config()))).eval()
    config = small_config(num_labels=5, sos_inputs="SOS" in request.param)
    return FirstOutput(randomized(ImageGPTForImageClassification(config))).eval()


def test_torch_export(network, tokens):
    exported = torch.export.export(network, (tokens,), strict=False)
    assert torch.allclose(exported.module()(tokens), network(tokens), atol=1e-4)


def test_onnx(network, tokens, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="make test installs it")
    file = str(tmp_path / "model.onnx")
    shapes = {"input_ids": {0: "batch"}}
    torch.onnx.export(network, (tokens[:2],), file, dynamo=True, input_names=["input_ids"], dynamic_shapes=shapes)
    (found,) = onnxruntime.InferenceSession(file).run(None, {"input_ids": tokens.numpy()})
    assert np.abs(found - network(tokens).detach().numpy()).max() < 1e-4


def test_the_older_onnx_exporter(network, tokens, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="make test installs it")
    file = str(tmp_path / "model.onnx")
    axes = {"input_ids": {0: "batch"}}
    torch.onnx.export(network, (tokens[:2],), file, dynamo=False, input_names=["input_ids"], dynamic_axes=axes)
    (found,) = onnxruntime.InferenceSession(file).run(None, {"input_ids": tokens.numpy()})
    assert np.abs(found - network(tokens).detach().numpy()).max() < 1e-4


@pytest.mark.parametrize("kind", ["dynamo", "onnx"])
def test_export_of_generation(kind, model, tokens):
    """The graphs of the first and of each further step give the model's logits, whatever the cache has room for."""
    pytest.importorskip("onnxscript", reason="make test installs it")  # transformers imports it for all exporters
    exporters = pytest.importorskip("transformers.exporters")
    from transformers.exporters.utils import decompose_for_generation

    prompt = torch.nn.functional.pad(tokens[:, :9], (1, 0), value=model.config.sos_token_id)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    exporter = exporters.DynamoExporter() if kind == "dynamo" else exporters.OnnxExporter()
    options = exporters.DynamoConfig() if kind == "dynamo" else exporters.OnnxConfig()
    exported = exporter.export_for_generation(model, dict(inputs), options)
    if kind == "onnx" and not hasattr(exported, "runners"):
        pytest.skip("this version of transformers exports to ONNX, but runs nothing")
    steps = decompose_for_generation(model, dict(inputs))
    assert set(steps) == {"prefill", "decode"}
    for name, (network, call) in steps.items():
        expected = network(**copy.deepcopy(dict(call))).logits
        call = {key: value for key, value in call.items() if not isinstance(value, bool)}
        if hasattr(exported, "runners"):
            found = exported.runners[name](**copy.deepcopy(call)).logits
        else:
            found = exported[name].module()(**copy.deepcopy(call)).logits
        assert torch.allclose(found, expected, atol=1e-4)


def test_biases_of_adapters_are_not_lost(tokens):
    peft = pytest.importorskip("peft", reason="make test installs it")
    options = peft.LoraConfig(target_modules=["c_attn", "c_fc"], lora_bias=True, fan_in_fan_out=True)
    model = randomized(ImageGPTForCausalImageModeling(small_config()))
    expected = model(labels=tokens).loss.item()
    with pytest.raises(ValueError, match=r"lora_bias=True: this model has no biases \(use_bias=False\)"):
        peft.get_peft_model(model, options)
    assert model(labels=tokens).loss.item() == expected
    first = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match=r"lora_bias=True: this model has no biases \(use_bias=False\)"):
        first.add_adapter("second", options)
    assert first(labels=tokens).loss.item() == pytest.approx(expected)
    copied = copy.deepcopy(first.merge_and_unload())
    assert copied(labels=tokens).loss.item() == pytest.approx(expected)
    adapted = peft.get_peft_model(randomized(ImageGPTForCausalImageModeling(small_config(use_bias=True))), options)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    expected = adapted(labels=tokens).loss.item()
    assert adapted.merge_and_unload()(labels=tokens).loss.item() == pytest.approx(expected, rel=1e-5)


def test_lora_trains_and_merges(model, tokens):
    peft = pytest.importorskip("peft", reason="make test installs it")
    untrained = model(labels=tokens).loss.item()
    targets = ["c_attn", "c_fc", "mlp.c_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=4, fan_in_fan_out=True))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(5):
        adapted(labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = adapted(labels=tokens).loss.item()
    assert after < untrained - 0.01
    assert adapted.merge_and_unload()(labels=tokens).loss.item() == pytest.approx(after, rel=1e-5)


@pytest.fixture
def saved_classifier(palette, tmp_path):
    config = small_config(num_labels=3, sos_inputs=True)
    config.id2label = {0: "cat", 1: "dog", 2: "ship"}
    randomized(ImageGPTForImageClassification(config)).save_pretrained(tmp_path)
    ImageGPTImageProcessorPil(clusters=palette[:16], size=8).save_pretrained(tmp_path)
    return tmp_path


def test_image_classification_pipeline(saved_classifier):
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)) for i in range(3)]
    images[0].save(saved_classifier / "photo.png")
    classify = pipeline("image-classification", str(saved_classifier))
    assert type(classify.model) is ImageGPTForImageClassification
    for image in (images[0], images[0].convert("L"), str(saved_classifier / "photo.png")):
        answer = classify(image)
        assert {entry["label"] for entry in answer} == {"cat", "dog", "ship"}
        assert sum(entry["score"] for entry in answer) == pytest.approx(1, abs=1e-5)
    singly, batched = [classify(image) for image in images], classify(images, batch_size=3)
    for one, other in zip(singly, batched, strict=True):
        assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
        assert [e["score"] for e in one] == pytest.approx([e["score"] for e in other], abs=1e-5)
