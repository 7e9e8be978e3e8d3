"""Records: files of both formats, and words."""

import json
from dataclasses import fields, replace

import pytest
from PIL import Image

from hf_igpt.commands.report import ReportArguments, report
from hf_igpt.data import DataArguments
from hf_igpt.evaluation.held_out import find_split_seed, record_of_training
from hf_igpt.evaluation.records import (
    Record,
    describe_images,
    describe_model,
    escape_markdown,
    format_value,
    markdown_table,
    own_file,
    read_records,
    read_run,
    save_picture,
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("value", float("nan")),
        ("value", "1.25"),
        ("value", None),
        ("value", True),
        ("n", 3.5),
        ("n", [1]),
        ("seed", "42"),
        ("task", 3),
        ("unit", ["a"]),
        ("dataset", {"a": 1}),
        ("dataset", "\x1b[2Jgone"),
        ("dataset", "\u202etxt.exe"),
        ("hardware", "\ud800"),
        ("image_size", [8]),
        ("image_size", ["8", "8"]),
        ("image_size", 8),
        ("layers", "12"),
        ("layers", 3),
        ("layers", [1.5]),
        ("deviation", float("nan")),
        ("details", []),
        ("checkpoint", "../../x"),
        ("checkpoint", "/etc/passwd"),
        ("checkpoint", ".."),
        ("gradient_checkpointing", "yes"),
        ("no_such_field", 1),
    ],
)
def test_fields_that_cannot_be_are_refused(field, value, tmp_path):
    (tmp_path / "records.json").write_text(json.dumps([{**GENERATION, field: value}]))
    with pytest.raises(ValueError, match=rf"records\.json does not hold records: .*{field}"):
        read_records(tmp_path / "records.json")


def test_fields_that_may_be_are_read(tmp_path):
    """Whole numbers for fractions; the distortion of a lossless palette; names of any script."""
    fields = {"value": 1, "deviation": 0, "dataset": "été\u00a0日本 👩\u200d🔬\n", "image_size": [8, 9], "layers": [1]}
    (tmp_path / "records.json").write_text(json.dumps([GENERATION | fields, GENERATION | {"value": float("inf")}]))
    one, lossless = read_records(tmp_path / "records.json")
    assert (one.value, one.image_size, one.layers, lossless.value) == (1, (8, 9), (1,), float("inf"))


@pytest.mark.parametrize("text", ["[" * 100_000, "\ufeff", "3", '"x"', '[{"metric": ' + "[" * 5000 + "]" * 5000 + "}]"])
def test_deep_and_other_json_is_refused(text, tmp_path):
    for name, read in (
        ("records.json", lambda: read_records(tmp_path / "records.json")),
        ("run.json", lambda: read_run(tmp_path)),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=name):
            read()
    (tmp_path / "run.json").write_text('{"recipe": ["a"]}')
    with pytest.raises(ValueError, match=r"run\.json.* its recipe"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, 8x8 (hf_igpt x86_64)", "plain, 8x8 (hf_igpt x86_64)"),
        ("a | b\nc\r\n# d", "a \\| b c # d"),
        ("\\|", "\\\\\\|"),  # not an escaped backslash and a cell's end
        ("<script>&lt;", "&lt;script>&amp;lt;"),
        ("![x](http://y)", "!\\[x\\](http:&#47;/y)"),
        ("[x](javascript:1)", "\\[x\\](javascript:1)"),
        ("https://x.y", "https:&#47;/x.y"),
        ("`code` $x$ ~~y~~", "\\`code\\` \\$x\\$ \\~\\~y\\~\\~"),
        ("**b** _i_ a_b", "\\*\\*b\\*\\* \\_i\\_ a_b"),
        ("\x1b[31mred", "\\[31mred"),
    ],
)
def test_strangers_words_are_text(text, shown):
    assert escape_markdown(text) == shown


def test_links_are_neither_followed_nor_written_through(tmp_path):
    folder, secret = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("mine")
    for name in ("samples.png", "samples.png.partial"):
        (folder / name).symlink_to(secret)
    save_picture(Image.new("RGB", (4, 4)), folder / "samples.png")
    assert secret.read_text() == "mine" and not (folder / "samples.png").is_symlink()
    assert [file.name for file in folder.iterdir()] == ["samples.png"]
    (folder / "elsewhere").symlink_to(tmp_path)
    (folder / "last.png").symlink_to("samples.png")
    assert own_file(folder, "last.png") == folder / "last.png"  # within the folder
    for name in ("elsewhere", "elsewhere/secret", "elsewhere/new", "../secret"):
        with pytest.raises(ValueError, match="leads out of .*model by a link"):
            own_file(folder, name)
    (tmp_path / "link").symlink_to(folder)  # the folder that is named may be one
    assert own_file(tmp_path / "link", "samples.png").is_file()


def test_snapshots_of_the_hubs_cache_are_made_of_links(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a").write_text("{}")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/0a")
    (snapshot / "run.json").symlink_to("../../secret")
    assert own_file(snapshot, "config.json").is_file()
    with pytest.raises(ValueError, match="leads out"):
        own_file(snapshot, "run.json")


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
