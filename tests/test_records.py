"""Records: files of both formats, and words."""

import json
from dataclasses import fields, replace

import pytest

from hf_igpt.commands.report import ReportArguments, report
from hf_igpt.data import DataArguments
from hf_igpt.evaluation.held_out import find_split_seed, record_of_training
from hf_igpt.evaluation.records import (
    Record,
    describe_images,
    describe_model,
    format_value,
    markdown_table,
    read_records,
    whole_file,
    write_records,
)


GENERATION = {
    "task": "generation",
    "metric": "nats_per_pixel",
    "value": 1.25,
    "unit": "nats/pixel",
    "split": "held out",
    "n": 359,
    "seed": 42,
    "dataset": "digits",
    "objective": "causal",
    "size": "tiny",
}


def test_records_round_trip(tmp_path):
    """Every field, with a value and without."""
    record = Record(**GENERATION, hardware="2 cores")
    values = {int: 3, str: "word", float: 0.5, bool: True}
    filled = {
        field.name: next((value for kind, value in values.items() if kind.__name__ in str(field.type)), None)
        for field in fields(Record)
    } | {"image_size": (8, 9), "layers": (1, 2), "details": {"C": 0.1}}
    assert None not in filled.values()
    for one in (record, Record(**filled)):
        write_records(tmp_path / "deep" / "records.json", [one])
        assert read_records(tmp_path / "deep" / "records.json") == [one]
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["records.json"]
    assert "null" not in (tmp_path / "deep" / "records.json").read_text()
    assert "| Image GPT tiny | digits, held out | 359 | 1.25 nats/pixel |" in markdown_table([record])


def test_what_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"a": 1}', '[{"metric": "accuracy"}]', '[{"settings": {}}]', '["x"]', "null"]
)
def test_files_of_other_things_are_refused(tmp_path, text):
    (tmp_path / "records.json").write_text(text)
    with pytest.raises(ValueError, match=r"records\.json does not hold records"):
        read_records(tmp_path / "records.json")


def old(**changes):
    """A record as it was written when most facts stood in sentences."""
    return {
        "metric": "nats_per_pixel",
        "value": 1.5,
        "unit": "nats/pixel",
        "split": "held out",
        "n": 359,
        "seed": 7,
        "model": "Image GPT tiny, 800,000 parameters, 960 images seen",
        "data": "scikit-learn digits, 8x8, 16 colours",
        "revision": "hf_igpt 0.1.0",
        "hardware": "2 cores",
        "reference": None,
        "baseline": False,
        "settings": {"objective": "causal", "size": "tiny", "parameters": 800_000, "images seen": 960},
    } | changes


def test_records_of_the_first_format_say_what_readers_ask_for(tmp_path):
    """The split, the training and what a model's features were probed for; reports can be made of them."""
    probe = {"objective": "causal", "of": "trained", "layer": 2, "probe": "logistic regression", "labels per class": 4}
    tuned = {"objective": "masked", "started from": "pretrained", "split seed": 3, "masks": 0}
    rows = [
        old(),
        old(model="left counts", baseline=True, settings={}),
        old(metric="accuracy", unit="fraction", settings=probe | {"deviation": 0.01, "C": 0.1}),
        old(metric="accuracy", unit="fraction", settings=probe | {"of": "raw pixels"}, baseline=True),
        old(metric="accuracy", unit="fraction", settings=tuned),
        old(metric="accuracy", unit="fraction", model='always "horse"', baseline=True, settings={}),
        old(metric="psnr_db", unit="dB", model="palette of 64 colours from a.npy", settings={}),
        old(metric="seconds", unit="s", model="hf_igpt compiled", data="random tokens", settings={"stage": "a step"}),
        {key: value for key, value in old().items() if key not in ("settings", "baseline")},  # both had defaults
    ]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    nats, counted, probed, raw, fine_tuned, always, palette, speed, plain = read_records(tmp_path / "records.json")
    assert (nats.task, nats.dataset, nats.images_seen, nats.parameters) == (
        "generation",
        "scikit-learn digits",
        960,
        800_000,
    )
    assert (counted.baseline, raw.baseline, probed.baseline) == ("left bigram", "raw pixels", None)
    assert (probed.task, probed.layers, probed.labels_per_class, probed.deviation) == ("linear probe", (2,), 4, 0.01)
    assert probed.details["C"] == 0.1
    assert (fine_tuned.task, fine_tuned.split_seed, fine_tuned.masks) == ("fine-tuning", 3, None)
    assert (always.task, always.baseline, palette.task, palette.colors) == (
        "fine-tuning",
        'always "horse"',
        "palette",
        64,
    )
    assert (speed.stage, speed.system, speed.variant, speed.task) == ("a step", "hf_igpt", "compiled", "speed")
    assert describe_model(nats) == describe_model(plain) == "Image GPT tiny, 800,000 parameters, 960 images seen"
    assert describe_images(nats) == "scikit-learn digits, 8x8, 16 colours" and nats.image_size == (8, 8)
    assert find_split_seed(str(tmp_path), DataArguments(), 42) == 7
    assert record_of_training(tmp_path) == nats
    page = report(ReportArguments([str(tmp_path)], output_dir=str(tmp_path / "report")), DataArguments())
    assert "| Image GPT tiny, 800,000 parameters, 960 images seen |" in page.read_text()


def test_words():
    trained = Record(**GENERATION, parameters=1_000, images_seen=96, image_size=(8, 9), colors=16, classes=10)
    assert describe_model(trained) == "Image GPT tiny, 1,000 parameters, 96 images seen"
    assert describe_images(trained) == "digits, 8x9, 16 colours, 10 classes"
    assert format_value(trained) == "1.25 nats/pixel"
    assert describe_model(replace(trained, size=None, n_layer=2, n_embd=32, parameters=None)) == (
        "Image GPT 2 x 32, 96 images seen"
    )
    probe = replace(trained, task="linear probe", probe="logistic regression", layers=(3,), masks=1, objective="masked")
    probe = replace(probe, value=0.5, unit="fraction", deviation=0.0123)
    assert describe_model(probe) == "Image GPT masked tiny, layer 3, logistic regression, 1 mask"
    assert (format_value(probe), format_value(probe, 2)) == ("50.0 ± 1.2 %", "50.00 ± 1.23 %")
    assert describe_model(replace(probe, baseline="untrained", masks=5, layers=(1, 2, 3), labels_per_class=4)) == (
        "Image GPT masked tiny, untrained, layers 1 to 3, logistic regression, 5 masks, 4 labels per class"
    )
    assert ", fine-tuned, layer 3" in describe_model(replace(probe, started_from="random weights"))
    assert describe_model(replace(probe, baseline="raw pixels", layers=None, masks=None)) == (
        "raw pixels, logistic regression"
    )
    assert describe_model(replace(trained, baseline="left bigram")) == "left bigram"
