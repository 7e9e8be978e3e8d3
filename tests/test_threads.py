"""Threads that share a model get what one thread gets."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import randomized, small_config
from PIL import Image

from hf_igpt import ImageGPTForMaskedImageModeling, ImageGPTImageProcessorPil
from hf_igpt.evaluation.metrics import measure_surprise
from hf_igpt.features_imagegpt import evaluation_mode, extract
from hf_igpt.generation_imagegpt import fill_in, sample
from hf_igpt.pipelines_imagegpt import ImageGPTFeatureExtractionPipeline


N_THREADS = 6


def in_threads(function, jobs):
    """Results in the order of jobs, whose threads all begin together."""
    barrier = threading.Barrier(N_THREADS)

    def run(job):
        barrier.wait()
        return function(job)

    with ThreadPoolExecutor(N_THREADS) as pool:
        return list(pool.map(run, jobs))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 16, (n + 1, 64), generator=generator) for n in range(N_THREADS)]


def test_features(model, batches):
    model.train()
    expected = [extract(model, batch, progress=False) for batch in batches]
    for _ in range(4):
        found = in_threads(lambda batch: extract(model, batch, batch_size=2, progress=False), batches)
        for one, other in zip(found, expected, strict=True):
            assert all(torch.allclose(one[layer], other[layer], atol=1e-5) for layer in other)
    assert model.training


def test_seeded_drawing(model, palette):
    processor = ImageGPTImageProcessorPil(clusters=palette[:16], size=8)
    model.train()

    def draw(seed):
        return sample(model, processor, 2, seed=seed, progress=False, return_tokens=True)

    expected = [draw(seed) for seed in range(N_THREADS)]
    state = torch.random.get_rng_state()
    for one, other in zip(in_threads(draw, range(N_THREADS)), expected, strict=True):
        assert torch.equal(one, other)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)


def test_lists_of_images_in_pipelines_do_not_disturb_drawing(model, palette):
    """Their loaders draw a seed from the random state from which another thread draws images."""
    processor = ImageGPTImageProcessorPil(clusters=palette[:16], size=8)
    extractor = ImageGPTFeatureExtractionPipeline(model=model.transformer, image_processor=processor)
    images = [Image.new("RGB", (8, 8), (40 * n, 90, 7)) for n in range(3)]

    def call(seed):
        if seed % 2:
            for _ in range(20):
                found = torch.tensor(extractor(images, layer=1, pool=True))
            return found
        return sample(model, processor, 2, seed=seed, progress=False, return_tokens=True)

    expected = [call(seed) for seed in range(N_THREADS)]
    for one, other in zip(in_threads(call, range(N_THREADS)), expected, strict=True):
        assert torch.allclose(one, other)
    torch.manual_seed(0)
    extractor(images)
    after = torch.random.get_rng_state()
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()  # as a loader without a generator
    assert torch.equal(torch.random.get_rng_state(), after)


def test_surprise_and_hidden_pixels(model, batches):
    expected = [measure_surprise(model, batch, progress=False) for batch in batches]
    found = in_threads(lambda batch: measure_surprise(model, batch, progress=False), batches)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))
    masked = randomized(ImageGPTForMaskedImageModeling(small_config(objective="masked"))).train()
    jobs = [(batch, batch % 2 == 0) for batch in batches]
    expected = [fill_in(masked, *job, seed=3) for job in jobs]
    found = in_threads(lambda job: fill_in(masked, *job, seed=3), jobs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert masked.training


def test_the_mode_returns_when_the_last_one_leaves(model):
    model.train()
    with evaluation_mode(model):
        with evaluation_mode(model):
            assert not model.training
        assert not model.training
        with pytest.raises(RuntimeError), evaluation_mode(model):
            raise RuntimeError
        assert not model.training
    assert model.training
