"""Reading images with PIL: files in folders, undecoded cells, unreadable images, and the paper's random crop."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from ..pixels_imagegpt import open_image, to_rgb_image
from ..presets import CROP_SHORTER_SIDE, CROP_SIZE


HELD_PIXELS = 1_000_000  # pixels of decoded photos held in memory at a time


def find_image_files(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders whose names are those of images, sorted.

    Hidden files, such as macOS's `._x.png`, and folders that are hidden or left behind by systems are passed over, as
    `datasets` does. It does not follow links to folders either, which are a ValueError.
    """
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in folders:
            if Path(place, name).is_symlink():
                raise ValueError(f"{Path(place, name)} is a link to a folder: put the folder itself there.")
        files += [
            Path(place, name) for name in names if Path(name).suffix.lower() in known and not name.startswith(".")
        ]
    return sorted(files)


def named_images(names: list[str]) -> list[Path]:
    """Return the image files among `names`, files and folders, in their order. Folders without any are a ValueError."""
    files = [file for path in map(Path, names) for file in (find_image_files(path) if path.is_dir() else [path])]
    if names and not files:
        raise ValueError(f"There are no image files in {', '.join(names)}.")
    return files


def read_image(cell: Any) -> Image.Image:
    """Turn an undecoded cell, or an array of grey levels, into an RGB image, upright by its EXIF tag, transparency on white.

    cell: a dictionary of `bytes` and `path`, as `datasets.Image(decode=False)` gives, or an array as in `to_rgb_image`.
    An image that cannot be read is a ValueError that names it.
    """
    if not isinstance(cell, dict):
        cell = {"bytes": cell, "path": None}
    path, content = cell.get("path"), cell.get("bytes")
    if path is None and content is None:
        raise ValueError("the cell is empty")
    try:
        if content is None:
            content = Path(path)
        return to_rgb_image(open_image(np.asarray(content) if isinstance(content, list) else content))
    except ValueError as error:
        raise ValueError(f"{path or 'no path'}: {error}") from error


def read_images(
    cells: Iterable[Any],
    indices: Iterable[int],
    on_bad_image: str,
    then: Callable[[Image.Image, int], Image.Image] = lambda image, index: image,
) -> Iterator[tuple[list[Image.Image], list[str]]]:
    """Read cells in portions: yield `then(image, index)` of the readable images, and for every cell why it is unreadable, or "".

    indices: the cells' indices in their dataset, for `then` and for messages. on_bad_image: "error" raises ValueError for an
    unreadable image, "skip" leaves it out. A portion ends once its images, as read, have `HELD_PIXELS` pixels, so many small
    images are in memory at a time but only few large ones.
    """
    images: list[Image.Image] = []
    reasons: list[str] = []
    n_pixels = 0
    for cell, index in zip(cells, indices, strict=True):
        try:
            image = read_image(cell)
        except ValueError as error:
            if on_bad_image != "skip":
                raise ValueError(
                    f"Image {index} cannot be read ({error}). Remove it, or pass --on_bad_image skip."
                ) from error
            reasons.append(f"image {index}: {error}")
            continue
        n_pixels += image.width * image.height
        images.append(then(image, index))
        reasons.append("")
        if n_pixels >= HELD_PIXELS:
            yield images, reasons
            images, reasons, n_pixels = [], [], 0
    if reasons:
        yield images, reasons


def report_bad_images(reasons: list[str], n_images: int, tell: bool = True) -> None:
    """Print, in the main process, how many of `n_images` images were left out, and why. If none is left, raise ValueError.

    tell: False if they will be reported when they are read again.
    """
    if tell and PartialState().is_main_process:
        listing = "\n  ".join(reasons)
        tqdm.write(f"Left out {len(reasons)} of {n_images} images that cannot be read:\n  {listing}")
    if len(reasons) == n_images:
        raise ValueError(f"None of the {n_images} images can be read; the first: {reasons[0]}")


def random_crop(image: Image.Image, rng: np.random.Generator, grid: tuple[int, int] = (1, 1)) -> Image.Image:
    """Crop an RGB image as in the paper [V2 3.1].

    Its shorter side is resized to 256..384 pixels, then a 224 x 224 window is cut out, both drawn uniformly. Where the
    proportions of `grid`, (height, width), are other than a square's, the window has them and 224 pixels as its longer side.
    """
    shorter = int(rng.integers(CROP_SHORTER_SIDE[0], CROP_SHORTER_SIDE[1] + 1))
    scale = shorter / min(image.size)
    width, height = (max(CROP_SIZE, round(side * scale)) for side in image.size)
    tall, wide = (max(1, round(CROP_SIZE * side / max(grid))) for side in grid)
    left, top = int(rng.integers(0, width - wide + 1)), int(rng.integers(0, height - tall + 1))
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + wide, top + tall))
