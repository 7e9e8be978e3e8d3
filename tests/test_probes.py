"""The classifiers of probes, against second implementations."""

import inspect

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hf_igpt.evaluation.probes import (
    Fit,
    balanced_subset,
    best_of,
    few_label_regression,
    logistic_regressions,
    nearest_neighbours,
    sgd_regressions,
)


def blobs(n, n_classes=4, width=12, spread=1.5, seed=0):
    """(n, width) float32 points around a centre for each class, of very different scales by feature, and their classes."""
    rng = np.random.default_rng(0)
    centers, scales = rng.normal(size=(n_classes, width)), 10.0 ** rng.integers(-2, 3, width)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    points = (centers[labels] + rng.normal(size=(n, width)) * spread) * scales + 5 * scales
    return points.astype(np.float32), labels


def agreement(one, other):
    return np.mean(np.asarray(one) == np.asarray(other))


@pytest.mark.parametrize("standardize", [True, False])
def test_logistic_regressions_are_scikit_learns(standardize):
    """Going on from the last C's solution changes where the search starts, not where it ends."""
    points, labels = blobs(200)
    if not standardize:
        points = points / points.std(axis=0)
    others, _ = blobs(1000, seed=1)
    others = others if standardize else others / blobs(200)[0].std(axis=0)
    fits = list(logistic_regressions(points, labels, iter([1.0, 0.01, 30.0]), standardize, 5000))
    assert [fit.strength for fit in fits] == [0.01, 1.0, 30.0] and all(fit.converged for fit in fits)
    for fit in fits:
        plain = LogisticRegression(C=fit.strength, max_iter=5000)
        plain = (make_pipeline(StandardScaler(), plain) if standardize else plain).fit(points, labels)
        assert agreement(fit.predict(others), plain.predict(others)) >= 0.995
    weakest = make_pipeline(StandardScaler(), LogisticRegression(C=0.01)) if standardize else LogisticRegression(C=0.01)
    assert np.array_equal(fits[0].predict(others), weakest.fit(points, labels).predict(others))
    assert agreement(fits[0].predict(others), fits[2].predict(others)) < 1  # the fits are not one and the same


def test_two_classes_and_classes_with_gaps():
    points, labels = blobs(120, n_classes=2, spread=0.5)
    (fit,) = logistic_regressions(points, labels * 7, [1.0])
    assert set(fit.predict(points)) == {0, 7} and agreement(fit.predict(points), labels * 7) > 0.95
    (fit,) = sgd_regressions(points, labels * 7, [0.1], steps=100)
    assert set(fit.predict(points)) == {0, 7} and agreement(fit.predict(points), labels * 7) > 0.95


def test_what_did_not_converge_says_so():
    (fit,) = logistic_regressions(*blobs(100), [10.0], max_iter=1)
    assert not fit.converged


def weights_of(fit):
    """(D + 1, classes) of a fit by SGD, the biases last."""
    return inspect.signature(fit.predict).parameters["solution"].default


@pytest.mark.parametrize("standardize", [True, False])
def test_sgd_is_torchs(standardize):
    """Each rate, though all run together, follows momentum 0.9 and a cosine to 0 of torch.optim on a linear layer."""
    points, labels = blobs(150)
    points = points.astype(np.float64)  # whatever comes in, float32 is computed in
    if not standardize:
        points = (points - points.mean(axis=0)) / points.std(axis=0)
    rates, steps, batch_size, seed = [0.5, 0.02], 60, 32, 5
    fits = list(sgd_regressions(points, labels, iter(rates), standardize, steps, batch_size, "cpu", seed))
    assert [fit.strength for fit in fits] == sorted(rates)
    inputs = (points - points.mean(axis=0)) / points.std(axis=0) if standardize else points
    inputs, targets = torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels)
    for fit in fits:
        linear = torch.nn.Linear(12, 4)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        optimizer = torch.optim.SGD(linear.parameters(), lr=fit.strength, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            rows = torch.randint(len(inputs), (batch_size,), generator=generator)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(linear(inputs[rows]), targets[rows]).backward()
            optimizer.step()
            schedule.step()
        expected = torch.cat([linear.weight.T, linear.bias[None]]).detach().numpy()
        assert np.abs(weights_of(fit) - expected).max() < 1e-4
        assert np.array_equal(fit.predict(points), linear(inputs).argmax(dim=1).numpy())


def test_sgd_comes_to_what_lbfgs_finds():
    (points, labels), (others, expected) = blobs(400, spread=0.8), blobs(1000, spread=0.8, seed=1)
    lbfgs = best_of(logistic_regressions(points, labels, [0.01, 0.1, 1.0, 10.0]), others, expected)
    sgd = best_of(sgd_regressions(points, labels, [1.0, 0.1, 0.01], steps=500), others, expected)
    assert lbfgs.accuracy > 0.9 and sgd.accuracy > lbfgs.accuracy - 0.02


def test_a_rate_that_diverges_says_so_and_spoils_no_other():
    points, labels = blobs(100)
    points = 1e18 * (points / points.std(axis=0))
    with np.errstate(all="ignore"):
        low, high = sgd_regressions(points, labels, [1e-38, 1e30], standardize=False, steps=20)
    assert low.converged and not high.converged
    assert np.array_equal(
        weights_of(low), weights_of(next(sgd_regressions(points, labels, [1e-38], standardize=False, steps=20)))
    )


@pytest.mark.parametrize("n_images", [300, 150])
def test_nearest_neighbours_are_the_naive_ones(n_images):
    """The nearest 200, or all where there are fewer, vote with exp(cosine / 0.07): the field's usual rule."""
    rng = np.random.default_rng(0)
    (points, labels), (others, _) = blobs(n_images, n_classes=5, spread=3.0), blobs(60, n_classes=5, seed=1)
    scales = rng.uniform(0.1, 10, (len(points), 1)).astype(np.float32)  # a length does not matter
    found = nearest_neighbours(points * scales, labels)(others)
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (points.astype(float), others.astype(float))]
    expected = []
    for similarities in unit[1] @ unit[0].T:
        nearest = np.argsort(-similarities)[:200]
        votes = np.zeros(5)
        np.add.at(votes, labels[nearest], np.exp(similarities[nearest] / 0.07))
        expected.append(votes.argmax())
    assert np.array_equal(found, expected) and len(set(expected)) > 2


def test_the_best_fit_is_the_first_of_equals():
    answers = {"a": [0, 0, 0, 0], "b": [0, 1, 2, 0], "c": [0, 1, 2, 1], "d": [1, 1, 2, 3]}
    fits = [Fit(lambda _, found=found: np.array(found), name) for name, found in answers.items()]
    best = best_of(iter(fits), np.zeros((4, 1)), np.array([0, 1, 2, 3]))
    assert best is fits[1] and best.accuracy == 0.75  # c and d have as many
    assert [fit.accuracy for fit in fits] == [0.25, 0.75, 0.75, 0.75]


def test_balanced_subsets():
    labels = np.repeat([0, 1, 2, 5], [10, 3, 40, 7])
    rows = balanced_subset(labels, 3, seed=1)
    assert len(set(rows)) == 12 and dict(zip(*np.unique(labels[rows], return_counts=True), strict=True)) == {
        0: 3,
        1: 3,
        2: 3,
        5: 3,
    }
    assert np.array_equal(rows, balanced_subset(labels, 3, seed=1))
    assert not np.array_equal(rows, balanced_subset(labels, 3, seed=2))


@pytest.mark.parametrize("spread", [0.3, 6.0])
def test_few_labels_choose_their_strength_among_themselves(spread):
    points, labels = blobs(60, n_classes=3, spread=spread)
    strengths = [10.0, 1e-4, 0.1]
    folds = list(StratifiedKFold(5, shuffle=True, random_state=7).split(points, labels))
    right = {}
    for strength in sorted(strengths):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        right[strength] = sum(
            np.sum(model.fit(points[fitted], labels[fitted]).predict(points[out]) == labels[out])
            for fitted, out in folds
        )
    expected = max(right, key=right.get)
    assert len(set(right.values())) > 1
    fit = few_label_regression(points, labels, strengths, True, 1000, seed=7)
    assert fit.strength == expected
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=expected, max_iter=1000)).fit(points, labels)
    others, _ = blobs(500, n_classes=3, spread=spread, seed=1)
    assert np.array_equal(fit.predict(others), plain.predict(others))


def test_of_one_label_a_class_nothing_can_be_left_out():
    points, labels = blobs(60, n_classes=3)
    rows = balanced_subset(labels, 1, seed=0)
    assert few_label_regression(points[rows], labels[rows], [10.0, 0.1, 1.0], True, 1000, seed=0).strength == 1.0
    with_two = balanced_subset(labels, 2, seed=0)  # two folds
    assert few_label_regression(points[with_two], labels[with_two], [0.1, 1.0], True, 1000, seed=0).strength in (0.1, 1)
