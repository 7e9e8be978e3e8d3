"""Counting models are as good as what they see allows."""

import itertools

import numpy as np
import pytest

from hf_igpt.evaluation.baselines import (
    LEFT_BIGRAM,
    LEFT_UP_TRIGRAM,
    POSITION_UNIGRAM,
    UNIFORM,
    UNIGRAM,
    measure_counting_models,
    smooth_counts,
)


def test_baselines_of_independent_pixels_are_the_entropy():
    rng = np.random.default_rng(0)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    train, held_out = (rng.choice(4, (3000, 16), p=p) for _ in range(2))
    found = measure_counting_models(train, held_out, width=4, n_colors=4)
    entropy = -(p * np.log(p)).sum()
    assert found[UNIFORM] == pytest.approx(np.log(4))
    for name in (UNIGRAM, POSITION_UNIGRAM, LEFT_BIGRAM, LEFT_UP_TRIGRAM):
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

    found = measure_counting_models(draw(2000, "left"), draw(2000, "left"), 4, 4)
    assert found[LEFT_BIGRAM] == pytest.approx(np.log(4) / 4, abs=0.02)  # one free pixel in a row of four
    assert found[UNIGRAM] == pytest.approx(np.log(4), abs=0.02)
    found = measure_counting_models(draw(2000, "up"), draw(2000, "up"), 4, 4)
    assert found[LEFT_BIGRAM] > 1.3 and found[LEFT_UP_TRIGRAM] == pytest.approx(np.log(4) / 4, abs=0.03)


@pytest.mark.parametrize("context", [0, 1, 7])  # 7 never occurred in training
def test_smoothed_counts_are_probabilities(context):
    rng = np.random.default_rng(0)
    contexts, colors = rng.integers(0, 3, 200), rng.integers(0, 3, 200)  # of 5 colours, two never occurred
    fallback = np.array([0.1, 0.2, 0.3, 0.25, 0.15])
    _, probabilities = smooth_counts(contexts, colors, np.full(5, context), np.arange(5), 5, fallback[colors], fallback)
    assert probabilities.sum() == pytest.approx(1) and (probabilities > 0).all()
    if context == 7:
        assert np.allclose(probabilities, fallback)
