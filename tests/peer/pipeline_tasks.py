"""What transformers' pipeline tests, whose source package lacks them, do with a pipeline of one task."""

import numpy as np
from PIL import Image
from transformers import pipeline


class _Tests:
    """Photos of sizes and modes that differ; their own tests fetch such photos from the Hub."""

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **processors):
        noise = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
        photos = [Image.fromarray(noise).convert(mode) for mode in ("RGB", "L", "RGBA", "P")]
        return pipeline(self.task, model=model, image_processor=image_processor, dtype=dtype), photos


class ImageClassificationPipelineTests(_Tests):
    task = "image-classification"

    def run_pipeline_test(self, pipe, photos):
        labels = set(pipe.model.config.id2label.values())
        for top in [pipe(photos[0]), *pipe(photos), *pipe(photos, batch_size=2)]:
            assert {entry["label"] for entry in top} <= labels
            assert all(0 <= entry["score"] <= 1 for entry in top)
        assert len(pipe(photos[0], top_k=1)) == 1


class ImageFeatureExtractionPipelineTests(_Tests):
    task = "image-feature-extraction"

    def run_pipeline_test(self, pipe, photos):
        config, size = pipe.model.config, pipe.image_processor.size
        shape = (1, size["height"] * size["width"], config.n_embd)
        for feature in [pipe(photos[0]), *pipe(photos), *pipe(photos, batch_size=2)]:
            assert np.shape(feature) == shape
        assert pipe(photos[0], return_tensors=True).shape == shape


def __getattr__(name):
    return type(name, (), {})  # of tasks that are not Image GPT's
