"""Photographs to tokenize, made from the two that scikit-learn brings along.

Without torch, because processes that only decode files import this module.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


PHOTOGRAPHS = "windows of photographs"  # as the records call them


def make_photographs(count: int, width: int = 224, height: int = 224) -> list[Image.Image]:
    """Return windows of the two photographs, each with colours scaled at random, so that no two are alike."""
    rng = np.random.default_rng(0)
    sources = load_photographs()
    made = []
    for _ in range(count):
        source = sources[rng.integers(len(sources))]
        scale = rng.uniform(0.5, 1) * min(source.width / width, source.height / height)
        left, top = rng.uniform(0, (source.width - scale * width, source.height - scale * height))
        box = (left, top, left + scale * width, top + scale * height)
        window = source.resize((width, height), Image.Resampling.BICUBIC, box=box)
        colors = np.asarray(window) * rng.uniform(0.6, 1.2, 3)
        made.append(Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8)))
    return made


def load_photographs() -> list[Image.Image]:
    """Return the two photographs as they are."""
    return [Image.fromarray(image) for image in load_sample_images().images]


def write_files(folder: Path, count: int) -> list[str]:
    """Write JPEG files of up to 50 photographs, again and again, and return their paths."""
    folder.mkdir()
    encoded = []
    for image in make_photographs(min(50, count), 500, 375):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        encoded.append(buffer.getvalue())
    paths = [folder / f"{index:06}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(encoded[index % len(encoded)])
    return [str(path) for path in paths]


def decode_files(paths: list[str], image_size: int) -> None:
    """Decode and resize files: what making tokens from them cannot leave out."""
    for path in paths:
        Image.open(path).resize((image_size, image_size), Image.Resampling.BILINEAR)
