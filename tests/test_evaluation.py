"""Records, scores of images and the counting baselines."""

import csv
import itertools

import numpy as np
import pytest
import torch
from conftest import randomized, small_config
from PIL import Image

from hf_igpt import (
    ImageGPTForImageClassification,
    ImageGPTForMaskedImageModeling,
    ImageGPTImageProcessorPil,
    evaluation,
)
from hf_igpt.data import DataArguments, digits, load_images, read_image
from hf_igpt.evaluation.records import (
    Record,
    ScoreArguments,
    _smoothed,
    baselines,
    held_out_images,
    majority_vote,
    markdown_table,
    nats_per_image,
    pixel_surprise,
    read_records,
    score,
    write_records,
)


def test_records_round_trip(tmp_path):
    record = Record(
        "nats_per_pixel", 1.25, "nats/pixel", "held out", 359, 42, "Image GPT tiny", "digits", hardware="2 cores"
    )
    write_records(tmp_path / "deep" / "records.json", [record])
    assert read_records(tmp_path / "deep" / "records.json") == [record]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["records.json"]
    assert "| Image GPT tiny | digits, held out | 359 | 1.25 nats/pixel |" in markdown_table([record])


def test_what_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(RuntimeError), evaluation.whole_file(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]


def test_majority_vote():
    votes = np.array([[0, 2, 1, 3], [0, 2, 2, 3], [1, 2, 0, 1], [0, 1, 1, 1], [2, 2, 2, 0]])
    found = np.stack([majority_vote(votes, seed) for seed in range(200)])
    assert (found[:, 0] == 0).all() and (found[:, 1] == 2).all()
    for column, tied in ((2, (1, 2)), (3, (1, 3))):  # ties are drawn, evenly
        assert set(found[:, column]) == set(tied) and 70 < (found[:, column] == tied[0]).sum() < 130
    assert np.array_equal(majority_vote(votes, 7), majority_vote(votes, 7))
    assert np.array_equal(majority_vote(votes[:1]), votes[0])


def test_nats_per_image():
    logits, tokens = torch.randn(3, 10, 7), torch.randint(0, 7, (3, 10))
    by_hand = -logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).mean(1)
    assert torch.allclose(nats_per_image(logits, tokens), by_hand, atol=1e-6)


def test_pixel_surprise_is_the_loss_pixel_by_pixel(model, tokens):
    model.train()
    found = pixel_surprise(model, tokens, progress=False)
    assert model.training and found.shape == (4, 64) and found.dtype == torch.float32
    model.eval()
    assert found.mean().item() == pytest.approx(model(labels=tokens).loss.item(), rel=1e-5)
    for batch_size in (1, 3, 4):
        assert torch.allclose(pixel_surprise(model, tokens, batch_size=batch_size, progress=False), found, atol=1e-5)
    assert torch.equal(pixel_surprise(model, tokens.numpy().astype(np.uint16), progress=False), found)
    assert (pixel_surprise(model, tokens, bf16=True, progress=False) - found).abs().mean() < 0.1


def test_pixel_surprise_is_of_sos_and_the_pixels_before(model, tokens):
    found = pixel_surprise(model, tokens, progress=False)
    first = model(input_ids=torch.full((1, 1), 16)).logits[0, 0].log_softmax(-1)  # what SOS alone predicts
    assert torch.allclose(found[:, 0], -first[tokens[:, 0]], atol=1e-5)
    for position in (0, 30, 63):  # every colour that could stand there: probabilities that sum to 1
        every = tokens[:1].repeat(16, 1)
        every[:, position] = torch.arange(16)
        surprise = pixel_surprise(model, every, progress=False)
        assert torch.exp(-surprise[:, position]).sum().item() == pytest.approx(1, abs=1e-5)
        assert torch.allclose(surprise[:, :position], found[:1, :position], atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 63, dtype=torch.long), r"shape \(n, 64\), n >= 1; found \(2, 63\)"),
        (torch.zeros(0, 64, dtype=torch.long), "n >= 1"),
        (torch.zeros(64, dtype=torch.long), r"found \(64,\)"),
        (torch.full((1, 64), 16), "the token 16"),
        (torch.zeros(1, 64), "integer tokens"),
    ],
)
def test_pixel_surprise_refuses(model, bad, message):
    with pytest.raises(ValueError, match=message):
        pixel_surprise(model, bad)


def test_masked_models_have_no_pixel_surprise(tokens):
    masked = ImageGPTForMaskedImageModeling(small_config(objective="masked"))
    with pytest.raises(ValueError, match="score with a causal model"):
        pixel_surprise(masked, tokens)


# -- the whole of score ------------------------------------------------------------------------------------------------


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
        patch.setattr(evaluation, "pixel_surprise", None)  # nothing is scored before all is read
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
    assert (scored.metric, scored.n, scored.split, scored.data) == (
        "nats_per_pixel",
        6,
        "scored",
        "photos, 1.png, 8x8, 16 colours",
    )
    assert (compared.n, compared.split, auroc.metric, auroc.unit, auroc.n) == (3, "compared", "auroc", "fraction", 9)
    assert scored.value == pytest.approx(np.mean(nats[:6]), abs=1e-5)
    assert scored.settings["standard deviation"] == pytest.approx(np.std(nats[:6], ddof=1), abs=1e-5)
    assert scored.settings["objective"] == "causal"
    assert compared.value == pytest.approx(np.mean(nats[6:]), abs=1e-5)
    # The share of pairs in which the compared image is the more surprising, an image beside itself being half of one.
    rounded = np.array([float(row["nats_per_pixel"]) for row in rows])
    pairs = rounded[6:, None] - rounded[None, :6]
    assert auroc.value == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=1e-6)
    assert auroc.settings["nats per pixel, scored"] == scored.value
    assert str(place) not in (folder / "score.json").read_text() + (folder / "scores.csv").read_text()
    assert Image.open(folder / "surprise.png").width > Image.open(folder / "surprise.png").height > 100
    assert Image.open(folder / "histogram.png").size == (840, 504)


def test_score_of_held_out_images(place, model, processor):
    args = ScoreArguments(str(place / "model"), num_held_out=3, num_maps=1, output_dir=str(place / "out"))
    (record,) = score(args, DataArguments())
    cells = load_images(DataArguments(), seed=42)["validation"][:3]["image"]
    tokens = torch.tensor(np.asarray(processor([read_image(cell) for cell in cells])["input_ids"]))
    assert record.value == pytest.approx(model(labels=tokens).loss.item(), rel=1e-5)
    assert (record.split, record.n, record.seed) == ("held out", 3, 42) and "AUROC" not in record.metric
    assert (place / "out" / "scores.csv").read_text().count("held out ") == 3


def test_held_out_images_are_of_the_split_that_was_trained_with(place):
    train, held_out = (load_images(DataArguments(), seed=7)[name]["image"] for name in ("train", "validation"))
    record = Record("nats_per_pixel", 1.0, "nats/pixel", "held out", 359, 7, "m", "scikit-learn digits, 8x8")
    write_records(place / "model" / "records.json", [record])
    cells, seed = held_out_images(str(place / "model"), DataArguments(), 5)
    assert seed == 7 and cells == list(held_out[:5])
    assert len(train) + len(held_out) == len(digits())
    with pytest.raises(ValueError, match="only 359 images were held out"):
        held_out_images(str(place / "model"), DataArguments(), 360)
    with pytest.raises(ValueError, match="trained on scikit-learn digits"):
        held_out_images(str(place / "model"), DataArguments(train_dir=str(place / "photos")), 1)


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


def test_baselines_of_independent_pixels_are_the_entropy():
    rng = np.random.default_rng(0)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    train, held_out = (rng.choice(4, (3000, 16), p=p) for _ in range(2))
    found = baselines(train, held_out, width=4, n_colors=4)
    entropy = -(p * np.log(p)).sum()
    assert found["uniform"] == pytest.approx(np.log(4))
    for name in ("unigram", "position_unigram", "left", "left_up"):
        assert found[name] == pytest.approx(entropy, abs=0.02), name


def test_baselines_see_what_they_should():
    """Pixels that copy their left or upper neighbour: each model is as good as its context allows."""
    rng = np.random.default_rng(0)

    def draw(n, source):
        grid = rng.integers(0, 4, (n, 4, 4))
        for row, column in itertools.product(range(4), range(4)):
            if source == "left" and column:
                grid[:, row, column] = grid[:, row, column - 1]
            if source == "up" and row:
                grid[:, row, column] = grid[:, row - 1, column]
        return grid.reshape(n, 16)

    found = baselines(draw(2000, "left"), draw(2000, "left"), 4, 4)
    assert found["left"] == pytest.approx(np.log(4) / 4, abs=0.02)  # one free pixel in a row of four
    assert found["unigram"] == pytest.approx(np.log(4), abs=0.02)
    found = baselines(draw(2000, "up"), draw(2000, "up"), 4, 4)
    assert found["left"] > 1.3 and found["left_up"] == pytest.approx(np.log(4) / 4, abs=0.03)


@pytest.mark.parametrize("context", [0, 1, 7])  # 7 never occurred in training
def test_smoothed_counts_are_probabilities(context):
    rng = np.random.default_rng(0)
    contexts, colors = rng.integers(0, 3, 200), rng.integers(0, 3, 200)  # of 5 colours, two never occurred
    fallback = np.array([0.1, 0.2, 0.3, 0.25, 0.15])
    _, probabilities = _smoothed(contexts, colors, np.full(5, context), np.arange(5), 5, fallback[colors], fallback)
    assert probabilities.sum() == pytest.approx(1) and (probabilities > 0).all()
    if context == 7:
        assert np.allclose(probabilities, fallback)
