"""Metrics: majority votes, nats per pixel of images and of each pixel."""

import numpy as np
import pytest
import torch
from conftest import small_config

from hf_igpt import ImageGPTForMaskedImageModeling
from hf_igpt.evaluation.metrics import majority_vote, measure_surprise, nats_per_image


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


def test_surprise_is_the_loss_pixel_by_pixel(model, tokens):
    model.train()
    found = measure_surprise(model, tokens, progress=False)
    assert model.training and found.shape == (4, 64) and found.dtype == torch.float32
    model.eval()
    assert found.mean().item() == pytest.approx(model(labels=tokens).loss.item(), rel=1e-5)
    for batch_size in (1, 3, 4):
        assert torch.allclose(measure_surprise(model, tokens, batch_size=batch_size, progress=False), found, atol=1e-5)
    assert torch.equal(measure_surprise(model, tokens.numpy().astype(np.uint16), progress=False), found)
    assert (measure_surprise(model, tokens, bf16=True, progress=False) - found).abs().mean() < 0.1


def test_surprise_is_of_sos_and_the_pixels_before(model, tokens):
    found = measure_surprise(model, tokens, progress=False)
    first = model(input_ids=torch.full((1, 1), 16)).logits[0, 0].log_softmax(-1)  # what SOS alone predicts
    assert torch.allclose(found[:, 0], -first[tokens[:, 0]], atol=1e-5)
    for position in (0, 30, 63):  # every colour that could stand there: probabilities that sum to 1
        every = tokens[:1].repeat(16, 1)
        every[:, position] = torch.arange(16)
        surprise = measure_surprise(model, every, progress=False)
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
def test_surprise_refuses(model, bad, message):
    with pytest.raises(ValueError, match=message):
        measure_surprise(model, bad)


def test_masked_models_have_no_measure_surprise(tokens):
    masked = ImageGPTForMaskedImageModeling(small_config(objective="masked"))
    with pytest.raises(ValueError, match="score with a causal model"):
        measure_surprise(masked, tokens)
