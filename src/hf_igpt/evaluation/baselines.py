"""Counting models: the nats per pixel that a network must beat, on the same tokens."""

import numpy as np


STRENGTHS = (0.3, 1, 3, 10, 30, 100, 300)  # of smoothing, in counts


UNIFORM, UNIGRAM, POSITION_UNIGRAM = "uniform", "unigram", "position unigram"
LEFT_BIGRAM, LEFT_UP_TRIGRAM = "left bigram", "left-and-up trigram"  # the pixel to the left; that and the one above


def measure_counting_models(train: np.ndarray, held_out: np.ndarray, width: int, n_colors: int) -> dict[str, float]:
    """Held-out nats per pixel of five models by their names, from `UNIFORM` to `LEFT_UP_TRIGRAM`.

    train, held_out: (n, N) tokens; width: pixels in a row. Outside the image there is a border symbol. Counts are smoothed
    towards the next simpler model, with a strength chosen by the leave-one-out likelihood of train; a context that never
    occurred falls back to the simpler model.
    """
    train, held_out = np.asarray(train, dtype=np.int64), np.asarray(held_out, dtype=np.int64)
    n_pixels = train.shape[1]

    def contexts(tokens: np.ndarray) -> list[np.ndarray]:
        grid = tokens.reshape(len(tokens), -1, width)
        left = np.full_like(grid, n_colors)
        left[:, :, 1:] = grid[:, :, :-1]
        up = np.full_like(grid, n_colors)
        up[:, 1:] = grid[:, :-1]
        position = np.broadcast_to(np.arange(n_pixels).reshape(grid.shape[1:]), grid.shape)
        return [part.reshape(-1) for part in (grid, left, up, position)]

    x_train, left_train, up_train, position_train = contexts(train)
    x_test, left_test, up_test, position_test = contexts(held_out)
    ones = np.full(len(x_train), 1 / n_colors), np.full(len(x_test), 1 / n_colors)
    unigram = smooth_counts(np.zeros_like(x_train), x_train, np.zeros_like(x_test), x_test, n_colors, *ones)
    position = smooth_counts(position_train, x_train, position_test, x_test, n_colors, *unigram)
    left = smooth_counts(left_train, x_train, left_test, x_test, n_colors, *unigram)
    up = smooth_counts(up_train, x_train, up_test, x_test, n_colors, *unigram)
    either = [(a + b) / 2 for a, b in zip(left, up, strict=True)]
    both_train, both_test = (a * (n_colors + 1) + b for a, b in ((left_train, up_train), (left_test, up_test)))
    left_up = smooth_counts(both_train, x_train, both_test, x_test, n_colors, *either)
    models = {UNIGRAM: unigram, POSITION_UNIGRAM: position, LEFT_BIGRAM: left, LEFT_UP_TRIGRAM: left_up}
    return {UNIFORM: float(np.log(n_colors))} | {
        name: float(-np.log(probabilities).mean()) for name, (_, probabilities) in models.items()
    }


def smooth_counts(
    context: np.ndarray,
    x: np.ndarray,
    context_test: np.ndarray,
    x_test: np.ndarray,
    n_colors: int,
    fallback: np.ndarray,
    fallback_test: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """p(x | context) = (count + s · fallback) / (total + s): leave-one-out on train, and on test, (n,) each.

    context, x: (n,) integers. fallback: (n,), the simpler model's probability of each x. s maximises the likelihood of
    train.
    """
    pairs, pair_counts = np.unique(context * n_colors + x, return_counts=True)
    totals = np.bincount(context)

    def counts(of_context: np.ndarray, of_x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        code = of_context * n_colors + of_x
        at = np.minimum(np.searchsorted(pairs, code), len(pairs) - 1)
        pair = np.where(pairs[at] == code, pair_counts[at], 0)
        total = np.where(of_context < len(totals), totals[np.minimum(of_context, len(totals) - 1)], 0)
        return pair, total

    pair, total = counts(context, x)
    best, strength, left_out = -np.inf, STRENGTHS[0], fallback
    for candidate in STRENGTHS:
        probabilities = (pair - 1 + candidate * fallback) / (total - 1 + candidate)
        likelihood = np.log(probabilities).mean()
        if likelihood > best:
            best, strength, left_out = likelihood, candidate, probabilities
    pair_test, total_test = counts(context_test, x_test)
    return left_out, (pair_test + strength * fallback_test) / (total_test + strength)
