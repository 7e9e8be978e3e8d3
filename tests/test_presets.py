"""The paper's numbers, against the paper (Table 5, A.1) and the official README."""

import pytest

from hf_igpt.presets import ADAM_BETAS, PUBLISHED, SIZES


@pytest.mark.parametrize(
    ("size", "objective", "image_size", "rate"),
    [
        ("s", "causal", 32, 0.003),
        ("m", "causal", 32, 0.003),
        ("l", "causal", 32, 0.001),
        ("l", "causal", 48, 0.01),
        ("xl", "causal", 64, 0.0003),
        ("s", "masked", 32, 0.01),
        ("m", "masked", 32, 0.003),
        ("l", "masked", 32, 0.001),
    ],
)
def test_learning_rates_of_table_5(size, objective, image_size, rate):
    assert SIZES[size].learning_rate_for(objective, image_size) == rate


def test_other_image_sizes_use_the_nearest_row():
    assert SIZES["l"].learning_rate_for("causal", 8) == 0.001
    assert SIZES["l"].learning_rate_for("causal", 64) == 0.01


def test_recipe():
    assert ADAM_BETAS == (0.9, 0.95)
    assert {SIZES[size].batch_size for size in "sml"} == {128} and SIZES["xl"].batch_size == 64
    assert {SIZES[size].max_steps for size in "sml"} == {1_000_000} and SIZES["xl"].max_steps == 2_000_000
    assert all((size.max_steps is None) != (size.num_epochs is None) for size in SIZES.values())


def test_published_figures():
    nats = {figure.size: figure.value for figure in PUBLISHED if figure.task == "generation"}
    assert nats == {"s": 2.0895, "m": 2.0614, "l": 2.0466}
    probes = {
        (figure.size, figure.data): figure.value
        for figure in PUBLISHED
        if figure.task == "linear probe" and figure.image_size == 32 and figure.labels_per_class is None
    }
    assert probes["l", "CIFAR-10"] == 0.963 and probes["m", "ILSVRC-2012"] == 0.545
