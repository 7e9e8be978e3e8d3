"""Which images a model was not trained on."""

from dataclasses import replace

import pytest

from hf_igpt.data import DataArguments, digits, load_images
from hf_igpt.evaluation.held_out import select_held_out
from hf_igpt.evaluation.records import Record, write_records


def test_held_out_images_are_of_the_split_that_was_trained_with(tmp_path):
    train, held_out = (load_images(DataArguments(), seed=7)[name]["image"] for name in ("train", "validation"))
    record = Record(
        task="generation",
        metric="nats_per_pixel",
        value=1.0,
        unit="nats/pixel",
        split="held out",
        n=359,
        seed=7,
        dataset="scikit-learn digits",
    )
    write_records(tmp_path / "model" / "records.json", [record])
    rows, seed = select_held_out(str(tmp_path / "model"), DataArguments(), 5)
    assert seed == 7 and list(rows["image"]) == list(held_out[:5])
    assert len(train) + len(held_out) == len(digits())
    with pytest.raises(ValueError, match="only 359 images were held out"):
        select_held_out(str(tmp_path / "model"), DataArguments(), 360)
    with pytest.raises(ValueError, match="trained on scikit-learn digits"):
        select_held_out(str(tmp_path / "model"), DataArguments(train_dir=str(tmp_path / "photos")), 1)


def test_held_out_images_are_not_those_of_another_split(tmp_path):
    record = Record(
        task="generation", metric="nats_per_pixel", value=1.0, unit="nats/pixel", split="held out", n=359, seed=42
    )
    write_records(tmp_path / "records.json", [replace(record, dataset="scikit-learn digits")])
    (tmp_path / "run.json").write_text('{"train_val_split": 0.2}')
    with pytest.raises(ValueError, match="trained with --train_val_split 0.2, not 0.5: .* Give the same"):
        select_held_out(str(tmp_path), DataArguments(train_val_split=0.5), 5)
    assert len(select_held_out(str(tmp_path), DataArguments(train_val_split=0.2), 5)[0]) == 5
    (tmp_path / "run.json").write_text('{"train_val_split": null}')
    with pytest.raises(ValueError, match="the default --train_val_split, not 0.5: .* Leave --train_val_split out"):
        select_held_out(str(tmp_path), DataArguments(train_val_split=0.5), 5)
