"""`run_score.py`, the whole of it."""

import csv

import numpy as np
import pytest
import torch
from conftest import randomized, small_config
from PIL import Image

from hf_igpt import ImageGPTForImageClassification, ImageGPTForMaskedImageModeling, ImageGPTImageProcessorPil
from hf_igpt.commands import score as command
from hf_igpt.commands.score import ScoreArguments, score
from hf_igpt.data import DataArguments, load_images, read_image
from hf_igpt.evaluation.records import describe_images, read_records


@pytest.fixture
def processor(palette):
    return ImageGPTImageProcessorPil(clusters=palette[:16], size=8)


@pytest.fixture
def place(tmp_path, model, processor):
    """A model with its processor; 5 noisy images and one that is none; 3 grey images of another kind."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    (tmp_path / "grey").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / ("deep" if i > 2 else "") / f"{i}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"not a picture")
    for i in range(3):
        Image.fromarray(np.full((9, 9), 90 * i, np.uint8)).save(tmp_path / "grey" / f"{i}.png")
    return tmp_path


def test_score_end_to_end(place, model, processor, capsys, monkeypatch):
    photos, grey = place / "photos", place / "grey"
    args = ScoreArguments(str(place / "model"), [str(photos), str(grey / "1.png")], compare=[str(grey)], num_maps=4)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"broken\.png.*not an image.*on_bad_image skip"),
    ):
        patch.setattr(command, "measure_surprise", None)  # nothing is scored before all is read
        score(args, DataArguments())
    assert not (place / "model" / "score").exists()
    for _ in range(2):  # over its own files, too
        records = score(args, DataArguments(on_bad_image="skip"))
    printed = capsys.readouterr().out
    folder = place / "model" / "score"
    assert {path.name for path in folder.iterdir()} == {"scores.csv", "score.json", "surprise.png", "histogram.png"}
    assert (
        "Left out 1 of 7 images that cannot be read" in printed and "broken.png" in printed and str(folder) in printed
    )

    files = [photos / name for name in ("0.png", "1.png", "2.png", "deep/3.png", "deep/4.png")] + [grey / "1.png"]
    files += [grey / f"{i}.png" for i in range(3)]
    nats = [model(labels=processor(Image.open(file), return_tensors="pt")["input_ids"]).loss.item() for file in files]
    with (folder / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows[:6]] == ["0.png", "1.png", "2.png", "deep/3.png", "deep/4.png", "1.png"]
    assert [row["set"] for row in rows] == ["scored"] * 6 + ["compared"] * 3
    assert [float(row["nats_per_pixel"]) for row in rows] == pytest.approx(nats, abs=1e-5)
    assert [float(row["bits_per_pixel"]) for row in rows] == pytest.approx(np.array(nats) / np.log(2), abs=1e-5)

    assert read_records(folder / "score.json") == records
    scored, compared, auroc = records
    assert (scored.metric, scored.n, scored.split, describe_images(scored)) == (
        "nats_per_pixel",
        6,
        "scored",
        "photos, 1.png, 8x8, 16 colours",
    )
    assert (compared.n, compared.split, auroc.metric, auroc.unit, auroc.n) == (3, "compared", "auroc", "fraction", 9)
    assert scored.value == pytest.approx(np.mean(nats[:6]), abs=1e-5)
    assert scored.deviation == pytest.approx(np.std(nats[:6], ddof=1), abs=1e-5)
    assert scored.objective == "causal"
    assert compared.value == pytest.approx(np.mean(nats[6:]), abs=1e-5)
    # The share of pairs in which the compared image is the more surprising, an image beside itself being half of one.
    rounded = np.array([float(row["nats_per_pixel"]) for row in rows])
    pairs = rounded[6:, None] - rounded[None, :6]
    assert auroc.value == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=1e-6)
    assert auroc.details["scored nats per pixel"] == scored.value
    assert str(place) not in (folder / "score.json").read_text() + (folder / "scores.csv").read_text()
    assert Image.open(folder / "surprise.png").width > Image.open(folder / "surprise.png").height > 100
    assert Image.open(folder / "histogram.png").size == (840, 504)


def test_what_a_pixel_looks_at_is_drawn(place, monkeypatch):
    folder, options = place / "score", {"output_dir": str(place / "score"), "num_maps": 2}
    images = [str(place / "grey")]
    for pixel, message in (([8, 0], "rows 0..7 and columns 0..7; found row 8, column 0"), ([0, 8], "column 8")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"8x8 pixels, .*{message}"):
            patch.setattr(command, "read_images", None)  # before any work
            score(ScoreArguments(str(place / "model"), images, attention=pixel, **options), DataArguments())
    for wrong in ([1], [1, 2, 3], [-1, 0]):
        with pytest.raises(ValueError, match="--attention "):
            ScoreArguments("x", images, attention=wrong)
    assert not folder.exists()
    seen = []
    monkeypatch.setattr(command.plots, "attention_maps", lambda *given: seen.append(given) or Image.new("RGB", (9, 9)))
    score(ScoreArguments(str(place / "model"), images, attention=[2, 3], compare=images, **options), DataArguments())
    assert {path.name for path in folder.glob("attention*")} == {"attention-1.png", "attention-2.png"}
    for image, shares, pixel, _ in seen:
        assert image.size == (8, 8) and shares.shape == (3, 2, 65) and pixel == (2, 3)
        assert np.allclose(shares.sum(axis=-1), 1) and shares[..., : 1 + 2 * 8 + 3].all() and not shares[..., 20:].any()
    score(ScoreArguments(str(place / "model"), images, **options), DataArguments())  # which draws none
    assert not list(folder.glob("attention*"))


def test_score_of_held_out_images(place, model, processor):
    args = ScoreArguments(str(place / "model"), num_held_out=3, num_maps=1, output_dir=str(place / "out"))
    (record,) = score(args, DataArguments())
    cells = load_images(DataArguments(), seed=42)["validation"][:3]["image"]
    tokens = torch.tensor(np.asarray(processor([read_image(cell) for cell in cells])["input_ids"]))
    assert record.value == pytest.approx(model(labels=tokens).loss.item(), rel=1e-5)
    assert (record.split, record.n, record.seed) == ("held out", 3, 42) and "AUROC" not in record.metric
    assert (place / "out" / "scores.csv").read_text().count("held out ") == 3


def test_score_refuses(place, tmp_path, processor):
    name, grey = str(place / "model"), str(place / "grey")
    for options, message in (
        ({}, "nothing to score"),
        ({"num_held_out": -1}, "--num_held_out is at least 0"),
        ({"images": [grey], "num_maps": 0}, "--num_maps is at least 1"),
        ({"images": [grey], "batch_size": 0}, "--batch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            ScoreArguments(name, **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image files in .*empty"):
        score(ScoreArguments(name, [str(tmp_path / "empty")]), DataArguments())
    with pytest.raises(ValueError, match="Give --output_dir"):
        score(ScoreArguments("org/on-the-hub", [grey]), DataArguments())
    only_bad = ScoreArguments(name, [str(place / "photos" / "broken.png")])
    with pytest.raises(ValueError, match="None of the 1 images"):
        score(only_bad, DataArguments(on_bad_image="skip"))
    for kind, objective, message in (
        (ImageGPTForMaskedImageModeling, "masked", "score with a causal model"),
        (ImageGPTForImageClassification, "causal", "it lacks lm_head.weight"),
    ):
        randomized(kind(small_config(objective=objective))).save_pretrained(tmp_path / kind.__name__)
        processor.save_pretrained(tmp_path / kind.__name__)
        with pytest.raises(ValueError, match=message):
            score(ScoreArguments(str(tmp_path / kind.__name__), [grey]), DataArguments())
        assert not (tmp_path / kind.__name__ / "score").exists()
