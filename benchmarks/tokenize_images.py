"""Images to tokens: processors, tables of nearest colours, palettes, and batches read from the token cache."""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.cluster import KMeans
from transformers.models.imagegpt import ImageGPTImageProcessorPil as TheirProcessor

from arguments import BenchmarkArguments
from hf_igpt import ImageGPTImageProcessorPil, clusters, data
from hf_igpt.evaluation.records import Record
from hf_igpt.presets import N_COLORS
from photographs import PHOTOGRAPHS, load_photographs, make_photographs
from side_by_side import check_same
from stages import LIMIT, OURS, THEIRS, Contender, Stage
from timing import measure_seconds, take_turns, time_alone
from tokenize_folders import time_folder, time_processes


N_BATCHES = 8  # batches of images that are tokenized one after another


def time_tokenization(args: BenchmarkArguments) -> Iterator[list[Record]]:
    """Time all that makes tokens, in one thread unless processes are what is timed."""
    images = make_photographs(N_BATCHES * args.n_images)
    palette = draw_palette(images[: args.n_images])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from time_processors(args, images, palette)
        yield from time_tables(args, palette)
    finally:
        torch.set_num_threads(threads)
    yield from time_batches(args, palette)
    yield time_palette_fit(args)
    yield time_folder(args, palette)
    yield time_processes(args, palette)


def draw_palette(images: list[Image.Image]) -> np.ndarray:
    """Return as many colours of the images as the paper's palettes have, each moved a little, so that all differ."""
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in images])
    rng = np.random.default_rng(0)
    colors = clusters.to_unit_range(pixels[rng.permutation(len(pixels))[:N_COLORS]])
    return np.clip(colors + rng.uniform(-1e-3, 1e-3, (N_COLORS, 3)), -1, 1)


def time_processors(args: BenchmarkArguments, images: list[Image.Image], palette: np.ndarray) -> Iterator[list[Record]]:
    """Time both processors on images of the model's size and on photographs, in batches and one at a time."""
    side = args.image_size
    size = {"height": side, "width": side}
    ours, theirs = (kind(clusters=palette, size=size) for kind in (ImageGPTImageProcessorPil, TheirProcessor))
    small = [resize(image, side) for image in images]

    def resize_all(batch: list[Image.Image]) -> None:
        for image in batch:
            resize(image, side)

    inputs: list[tuple[str, list, dict[Contender, Callable]]] = [
        (f"{side}x{side} PIL images", small, {}),
        (f"{side}x{side} arrays", [np.asarray(image) for image in small], {}),
        ("224x224 PIL photos", images, {Contender(LIMIT): resize_all}),
    ]
    for what, everything, limit in inputs:
        for count in dict.fromkeys((args.n_images, 1)):
            batches = [everything[start : start + count] for start in range(0, len(everything), count)]
            found, expected = (
                np.asarray(processor(batches[0], return_tensors="pt")["input_ids"]) for processor in (ours, theirs)
            )
            check_equally_near(found, expected, palette, batches[0], side)
            contenders = {
                Contender(THEIRS): partial(theirs, return_tensors="pt"),
                Contender(OURS): partial(ours, return_tensors="pt"),
            }
            turns = {name: cycle_through(run, batches) for name, run in (contenders | limit).items()}
            stage = Stage(f"tokens of {what}, {count} at once", count, PHOTOGRAPHS, batch_size=count)
            yield stage.record_times(take_turns(turns, args.repeats))


def resize(image: Image.Image, side: int) -> Image.Image:
    """Resize as the processors do."""
    return image.resize((side, side), Image.Resampling.BILINEAR)


def cycle_through(run: Callable, batches: list) -> Callable[[], object]:
    """Return a function that calls `run` on the next batch each time, round and round.

    What a processor's caches hold after one batch is then not at hand for the next.
    """
    following = itertools.cycle(batches)
    return lambda: run(next(following))


def check_equally_near(
    ours: np.ndarray, theirs: np.ndarray, palette: np.ndarray, images: list, image_size: int
) -> None:
    """Check that tokens equal transformers', except where two colours are equally near up to its rounding."""
    pixels = np.stack(
        [image if isinstance(image, np.ndarray) else np.asarray(resize(image, image_size)) for image in images]
    )
    pixels = clusters.to_unit_range(pixels.reshape(len(images), -1, 3))
    our_distances, their_distances = (
        torch.from_numpy(np.square(pixels - palette[tokens]).sum(axis=-1)) for tokens in (ours, theirs)
    )
    check_same("Distances of colours", our_distances, their_distances, 1e-6)


def time_tables(args: BenchmarkArguments, palette: np.ndarray) -> Iterator[list[Record]]:
    """Time building tables of nearest colours, for palettes of images and for two that are hard."""
    line = np.linspace(-1, 1, N_COLORS)
    palettes = {
        "of images": palette,
        "on a line": np.stack([line, 0.5 * line, -0.3 * line], axis=1),
        "greys": np.repeat(line[:, None], 3, axis=1),
    }
    for name, colors in palettes.items():
        build = partial(build_table, colors, itertools.count(1))
        stage = Stage(f"table of nearest colours, 512 colours {name}", 0, "2^24 colours", colors=N_COLORS)
        yield stage.record_times({Contender(OURS): time_alone(build, args.repeats)})


def build_table(colors: np.ndarray, calls: Iterator[int]) -> None:
    """Build the table of a palette that is new in each call, by a billionth, because tables are kept for each palette."""
    clusters.lookup_table(colors * (1 - 1e-9 * next(calls)))


def time_batches(args: BenchmarkArguments, palette: np.ndarray) -> Iterator[list[Record]]:
    """Time training batches read from the token cache in random order, beside reading them from a memory map."""
    rng = np.random.default_rng(0)
    batch_size, n_tokens = 128, args.image_size**2
    tokens = rng.integers(0, len(palette), (16 * batch_size, n_tokens), dtype=np.uint16)
    columns = datasets.Features({data.TOKENS: datasets.List(datasets.Value("uint16"), length=n_tokens)})
    processor = ImageGPTImageProcessorPil(clusters=palette, size=args.image_size)

    def draw_indices() -> np.ndarray:
        return rng.permutation(len(tokens))[:batch_size]

    with tempfile.TemporaryDirectory() as folder:
        datasets.Dataset.from_dict({data.TOKENS: tokens}, features=columns).save_to_disk(folder)
        np.save(f"{folder}/tokens.npy", tokens)
        dataset, mapped = datasets.load_from_disk(folder), np.load(f"{folder}/tokens.npy", mmap_mode="r")

        def read(rows: data.ImageTokens) -> object:
            return data.collate_tokens(rows.__getitems__(draw_indices().tolist()))

        def read_mapped() -> torch.Tensor:
            return torch.from_numpy(mapped[draw_indices()]).long()

        for what, options in (("", {}), (" and mirrored", {"random_flip": True})):
            rows = data.ImageTokens(dataset, processor, **options)
            contenders = {Contender(OURS): partial(read, rows), Contender(LIMIT): read_mapped}
            stage = Stage(f"batches of 128 read{what}", batch_size, "random tokens", batch_size=batch_size)
            yield stage.record_times(take_turns(contenders, args.repeats))


def time_palette_fit(args: BenchmarkArguments) -> list[Record]:
    """Time a palette's fit, once, beside scikit-learn's own call, which stops before it has converged.

    The pixels are those of two photographs, doubled in size. Our palette may be 1 % further from them than scikit-learn's.
    """
    photographs = [
        image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC) for image in load_photographs()
    ]
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in photographs])
    pixels = pixels[np.random.default_rng(0).permutation(len(pixels))[: args.n_pixels]]
    n_colors = min(N_COLORS, len(pixels) // 8)
    theirs = KMeans(n_colors, n_init=1, random_state=0)
    fitted = []
    seconds = {
        Contender(LIMIT): [measure_seconds(lambda: theirs.fit(pixels.astype(np.float32)))],
        Contender(OURS): [measure_seconds(lambda: fitted.append(clusters.fit_palette(pixels, n_colors)))],
    }
    palettes = (fitted[0], clusters.to_unit_range(theirs.cluster_centers_))
    missed, their_missed = (clusters.distortion(pixels, palette)["rmse_grey_levels"] for palette in palettes)
    if missed > 1.01 * their_missed:
        raise ValueError(f"Our palette is {missed:.3g} grey levels off, scikit-learn's {their_missed:.3g}.")
    return Stage("palette of 512 colours", 0, f"{len(pixels):,} pixels", colors=n_colors).record_times(seconds)
