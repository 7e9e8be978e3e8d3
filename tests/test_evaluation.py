"""Records and the counting baselines."""

import itertools

import numpy as np
import pytest
import torch

from hf_igpt.evaluation import (
    Record,
    _smoothed,
    baselines,
    majority_vote,
    markdown_table,
    nats_per_image,
    read_records,
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
