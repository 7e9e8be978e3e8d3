"""OpenAI's checkpoints: their outputs after conversion, the mapping as a bijection, damaged files. Needs TensorFlow."""

import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomized, small_config
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
)

from hf_igpt import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTForMaskedImageModeling,
)
from hf_igpt.commands.convert import ConvertArguments, convert
from hf_igpt.publishing.conversion import from_openai, read_block, read_openai, to_openai


pytest.importorskip("tensorflow", reason="make test installs it")
FIXTURES = Path(__file__).parent / "fixtures"
AR, BERT = (FIXTURES / f"openai-{kind}" / "model.ckpt-1000" for kind in ("ar", "bert"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    np.save(folder / "kmeans_centers.npy", np.random.default_rng(0).uniform(-1, 1, (16, 3)).astype(np.float32))
    return convert(ConvertArguments(str(AR), str(folder / "ar"), str(folder / "kmeans_centers.npy")))


def test_converted_autoregressive_model_is_openais(converted):
    golden = np.load(FIXTURES / "openai-ar.npz")
    tokens = torch.tensor(golden["golden/tokens"])
    model, report = ImageGPTForCausalImageModeling.from_pretrained(converted, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        output = model(labels=tokens)
    assert (output.logits - torch.tensor(golden["golden/gen_logits"])).abs().max() < 1e-4
    assert abs(output.loss - float(golden["golden/gen_loss"])) < 1e-5
    assert AutoModelForCausalLM.from_pretrained(converted).generate().shape == (1, 65)
    assert AutoImageProcessor.from_pretrained(converted).token_grid() == (8, 8)


def test_the_same_folder_is_a_classifier(converted):
    golden = np.load(FIXTURES / "openai-ar.npz")
    model, report = ImageGPTForImageClassification.from_pretrained(converted, output_loading_info=True)
    assert not any(report.values()) and model.config.sos_inputs and model.config.num_labels == 10
    with torch.no_grad():
        output = model(torch.tensor(golden["golden/tokens"]), labels=torch.tensor(golden["golden/labels"]))
    assert abs(output.loss - float(golden["golden/clf_loss"])) < 1e-5
    joint = ImageGPTForImageClassification.from_pretrained(converted, generative_loss_weight=1)
    with torch.no_grad():
        output = joint(torch.tensor(golden["golden/tokens"]), labels=torch.tensor(golden["golden/labels"]))
    assert abs(output.loss - float(golden["golden/clf_loss"] + golden["golden/gen_loss"])) < 1e-5
    assert abs(output.generative_loss - float(golden["golden/gen_loss"])) < 1e-5
    assert type(AutoModelForImageClassification.from_pretrained(converted)) is ImageGPTForImageClassification


def test_converted_masked_model_is_openais(tmp_path):
    golden = {name: torch.tensor(value) for name, value in np.load(FIXTURES / "openai-bert" / "golden.npz").items()}
    folder = convert(ConvertArguments(str(BERT), str(tmp_path / "bert")))
    model, report = ImageGPTForMaskedImageModeling.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()) and not model.config.sos_inputs
    assert type(AutoModelForMaskedImageModeling.from_pretrained(folder)) is ImageGPTForMaskedImageModeling
    with torch.no_grad():
        output = model(labels=golden["tokens"], bool_masked_pos=golden["masked"])
    assert (output.logits - golden["gen_logits"]).abs().max() < 1e-4
    assert abs(output.loss - golden["gen_loss"]) < 1e-5
    for weight in (0, 1):  # the joint loss is the plain sum [code run.py]
        classifier, report = ImageGPTForImageClassification.from_pretrained(
            folder, generative_loss_weight=weight, output_loading_info=True
        )
        assert not any(report.values())
        with torch.no_grad():
            output = classifier(golden["tokens"], labels=golden["labels"], bool_masked_pos=golden["masked"])
        assert abs(output.loss - (golden["clf_loss"] + weight * golden["gen_loss"])) < 1e-5
    with pytest.raises(ValueError, match="trained on masked pixels"):
        ImageGPTForCausalImageModeling.from_pretrained(folder)


@pytest.mark.parametrize("checkpoint", [AR, BERT])
def test_the_mapping_is_a_bijection(checkpoint):
    variables = read_openai(checkpoint)
    again = to_openai(*from_openai(variables))
    assert again.keys() == variables.keys()
    assert all(np.array_equal(again[name], variables[name]) for name in variables)


def test_our_weights_there_and_back():
    model = randomized(ImageGPTForCausalImageModeling(small_config()))
    config, state = from_openai(to_openai(model.config, model.state_dict()))
    for name in ("n_layer", "n_embd", "n_head", "n_inner", "n_positions", "vocab_size", "objective", "sos_inputs"):
        assert getattr(config, name) == getattr(model.config, name), name
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
    biased = randomized(ImageGPTForCausalImageModeling(small_config(use_bias=True)))
    with pytest.raises(ValueError, match="has no biases"):
        to_openai(biased.config, biased.state_dict())


def test_any_number_of_shards_and_the_optimisers_slots(tmp_path):
    import tensorflow as tf

    variables = read_openai(AR)
    named = {f"model/{name}": value for name, value in variables.items()}
    named |= {f"model/{name}/Adam": value for name, value in variables.items()}
    named |= {"global_step": np.int64(1000), "beta1_power": np.float32(0.1)}
    names, prefixes = sorted(named), [str(tmp_path / f"part{i}") for i in range(3)]
    for i, prefix in enumerate(prefixes):
        part = names[i::3]
        tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=part,
            shape_and_slices=[""] * len(part),
            tensors=[tf.constant(named[n]) for n in part],
        )
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=prefixes, destination_prefix=str(tmp_path / "model.ckpt-7"))
    found = read_openai(tmp_path / "model.ckpt-7")
    assert found.keys() == variables.keys() and all(np.array_equal(found[n], variables[n]) for n in variables)
    next(tmp_path.glob("*.data-00001-of-00003")).unlink()
    with pytest.raises(ValueError, match="2 of its 3 data files"):
        read_openai(tmp_path / "model.ckpt-7")


def test_damaged_files_are_named(tmp_path):
    for file in AR.parent.glob("model.ckpt-1000.*"):
        shutil.copy(file, tmp_path)
    data = next(tmp_path.glob("*.data-*"))
    data.write_bytes(data.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged or cut short"):
        convert(ConvertArguments(str(tmp_path / "model.ckpt-1000"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="without suffix"):
        read_openai(tmp_path / "model.ckpt-1")


def crc32c(data):
    """As tables have it, which is masked."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(number):
    number &= 2**64 - 1
    return bytes([number & 127]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def index_of(entries):
    """An index as TensorFlow writes it, of (key, value)."""

    def block(entries):
        rows = (b"\0" + varint(len(key)) + varint(len(value)) + key + value for key, value in entries)
        return b"".join(rows) + struct.pack("<II", 0, 1)

    table, places = b"", []
    for content in (block(entries), block([]), None):
        content = block([(b"\xff", places[0])]) if content is None else content
        places.append(varint(len(table)) + varint(len(content)))
        table += content + b"\0" + crc32c(content + b"\0")
    return table + (places[1] + places[2]).ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def entry_of(shape, size=2048, **fields):
    from tensorflow.core.protobuf import tensor_bundle_pb2

    return tensor_bundle_pb2.BundleEntryProto(
        shape={"dim": [{"size": side} for side in shape]}, size=size, **({"dtype": 1} | fields)
    ).SerializeToString()


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda: entry_of([2**34, 32]), r"model/wte of shape \[17179869184, 32\] has 2048 bytes"),
        (lambda: entry_of([2**34, 32], 2**41), "more than the data files hold"),
        (lambda: entry_of([2**62, 2**62], 0), "is no whole array"),  # from here on TensorFlow ended the process
        (lambda: entry_of([-1, 32]), r"shape \[-1, 32\] is no whole array"),
        (lambda: entry_of([1] * 300, 4), "is no whole array"),
        (lambda: entry_of([16, 32], dtype=19), "bytes of type 19"),
        (lambda: b"\xff" * 20, "Error parsing message"),
        (lambda: b"", "0 bytes of type 0"),
        (lambda: entry_of([16, 32], offset=2**50), "more than the data files hold"),
        (lambda: entry_of([16, 32], offset=-5), "more than the data files hold"),
        (lambda: entry_of([16, 32], shard_id=9), "more than the data files hold"),
        (lambda: entry_of([16, 32], slices=[{"extent": [{"start": 0, "length": 5}]}]), "is no whole array"),
    ],
)
def test_indexes_that_lie_are_refused_before_tensorflow_reads_them(lie, message, tmp_path):
    from tensorflow.core.protobuf import tensor_bundle_pb2

    shutil.copy(f"{AR}.data-00000-of-00001", tmp_path)
    file = tmp_path / "model.ckpt-1000.index"
    table = Path(f"{AR}.index").read_bytes()
    entries = dict(read_block(table, varint(0) + varint(1058)))
    assert tensor_bundle_pb2.BundleEntryProto.FromString(entries[b"model/wte"]).size == 2048
    file.write_bytes(index_of(entries.items()))
    assert read_openai(tmp_path / "model.ckpt-1000").keys() == read_openai(AR).keys()
    file.write_bytes(index_of((entries | {b"model/wte": lie()}).items()))
    with pytest.raises(ValueError, match=rf"model\.ckpt-1000\.index .*{message}"):
        read_openai(tmp_path / "model.ckpt-1000")


def test_damaged_indexes_are_named(tmp_path):
    shutil.copy(f"{AR}.data-00000-of-00001", tmp_path)
    table = Path(f"{AR}.index").read_bytes()
    rng = np.random.default_rng(0)
    damaged = [table[:length] for length in (0, 1, 47, 48, 500, 1143)]
    for _ in range(50):
        bytes_of = bytearray(table)
        for place in rng.integers(0, len(table), 3):
            bytes_of[place] ^= int(rng.integers(1, 256))
        damaged.append(bytes(bytes_of))
    for content in damaged:
        (tmp_path / "model.ckpt-1000.index").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.ckpt-1000.* damaged or cut short"):
            read_openai(tmp_path / "model.ckpt-1000")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("wte", (512,)),
        ("wte", (0, 32)),
        ("sos", (1, 32)),
        ("wpe", (64, 32, 1)),
        ("wtet", (9, 32)),
        ("h0/attn/q_proj", (8, 32, 4)),
        ("h1/attn/k_proj", (32, 32)),
        ("h1/attn/c_proj", ()),
        ("h0/ln_1/g", (31,)),
        ("h0/mlp/c_fc/w", (32, 5)),
        ("h2/mlp/c_proj/w", (32, 128)),
        ("clf/wclf", (10, 31)),
        ("ln_f/g", (1,)),
    ],
)
def test_variables_of_other_shapes_are_named(name, shape):
    with pytest.raises(ValueError, match=r"dimensions|shape|do not fit together"):
        from_openai(read_openai(AR) | {name: np.zeros(shape, np.float32)})


def test_unknown_and_missing_variables_are_named():
    variables = read_openai(AR)
    with pytest.raises(ValueError, match="does not have: h0/attn/rotary"):
        from_openai(variables | {"h0/attn/rotary": np.zeros(3)})
    with pytest.raises(ValueError, match="no blocks"):
        from_openai({name: value for name, value in variables.items() if not name.startswith("h")})
    with pytest.raises(ValueError, match="do not fit together"):
        from_openai(variables | {"wpe": variables["wpe"][:, :5]})
    for name in ("wpe", "h2/mlp/c_fc/w"):
        with pytest.raises(ValueError, match=f"no variable {name}"):
            from_openai({n: v for n, v in variables.items() if n != name})


def test_refusals(tmp_path, monkeypatch):
    np.save(tmp_path / "palette.npy", np.zeros((5, 3)))
    with pytest.raises(ValueError, match="has 5 colours, the model 16"):
        convert(ConvertArguments(str(AR), str(tmp_path / "out"), str(tmp_path / "palette.npy")))
    with pytest.raises(ValueError, match="not empty"):
        convert(ConvertArguments(str(AR), str(tmp_path)))
    monkeypatch.setitem(sys.modules, "tensorflow.python.training", None)
    with pytest.raises(ImportError, match=r"hf_igpt\[openai\]"):
        read_openai(AR)
