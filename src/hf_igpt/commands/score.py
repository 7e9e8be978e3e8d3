"""`scripts/run_score.py`: how surprising images are to a causal model, as a whole and pixel by pixel."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm

from ..configuration_imagegpt import ImageGPTConfig
from ..data import (
    IMAGE,
    LABEL,
    TOKENS,
    DataArguments,
    named_images,
    processor_of,
    read_image,
    read_labels,
    report_bad_images,
)
from ..evaluation.baselines import UNIFORM
from ..evaluation.held_out import record_of_training, select_held_out
from ..evaluation.metrics import (
    BITS_PER_NAT,
    accuracy,
    check_causal,
    measure_class_likelihoods,
    measure_surprise,
)
from ..evaluation.records import (
    SCORE,
    UNITS,
    Record,
    fields_of_images,
    fields_of_model,
    save_picture,
    whole_file,
    write_records,
)
from ..features_imagegpt import attention_of_tokens
from ..image_processing_imagegpt import AnyImageProcessor
from ..inputs_imagegpt import class_names
from ..modeling_imagegpt import ImageGPTForCausalImageModeling
from ..reporting import plots
from .arguments import ScoreArguments
from .cli import find_device
from .folders import check_model_exists, folder_beside, load_trained


@dataclass
class ImageSet:
    """Images of one kind: names, tokens (n, N), the seed of their split if there is one, and once scored −log p in nats (n, N).

    labels: the names of the classes of those whose class is known, by the names of the images. posterior: (n, C) p(c | x).
    """

    kind: str  # "scored" or "compared"
    split: str
    dataset: str
    names: list[str]
    tokens: np.ndarray
    seed: int | None = None
    labels: dict[str, str] = field(default_factory=dict)
    surprise: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    posterior: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    @property
    def nats_per_pixel(self) -> np.ndarray:
        """(n,) float64."""
        return self.surprise.mean(axis=1, dtype=np.float64)


def score(args: ScoreArguments, data_args: DataArguments) -> list[Record]:
    """Score images with a causal model: nats per pixel of each, and how surprising each pixel is.

    Writes `scores.csv`, `surprise.png`, `histogram.png`, with `by_class` also `classes.csv` and, if classes are known,
    `confusion.png`, and, last, `score.json`, whose records it returns; with `attention` also `attention-1.png` and so on, one
    for each image of `surprise.png` in its order. What is wrong with the model, the folders or the images is a ValueError
    before any forward pass.
    """
    name = args.model_name_or_path
    check_model_exists(name)
    folder = folder_beside(name, args.output_dir, "score")
    device = find_device(args.device)
    config = ImageGPTConfig.from_pretrained(name)
    check_causal(config)
    if args.by_class and not config.n_class_tokens:
        raise ValueError(
            f"--by_class: {name} knows no classes. Train a model with run_pretrain.py --class_conditional."
        )
    processor = processor_of(name, config)
    height, width = processor.token_grid()
    if args.attention and not (args.attention[0] < height and args.attention[1] < width):
        raise ValueError(
            f"--attention: the model's images have {height}x{width} pixels, rows 0..{height - 1} and columns 0..{width - 1}; found "
            f"row {args.attention[0]}, column {args.attention[1]}."
        )
    sets = [read_scored_set(args, data_args, processor)]
    if args.compare:
        names, tokens = read_images(name_images(args.compare), processor, data_args.on_bad_image)
        sets.append(ImageSet("compared", "compared", summarize_places(args.compare), names, tokens))
    model = load_trained(ImageGPTForCausalImageModeling, name, "Score with the model it was made from.")
    model.to(device)
    tokens = np.concatenate([images.tokens for images in sets])
    surprise = measure_surprise(model, tokens, batch_size=args.batch_size, bf16=args.bf16).numpy()
    border = [len(sets[0].names)]
    for images, part in zip(sets, np.split(surprise, border), strict=False):
        images.surprise = part
    if args.by_class:
        options: dict[str, Any] = {"batch_size": args.batch_size, "bf16": args.bf16}
        posterior = measure_class_likelihoods(model, tokens, **options).softmax(dim=1).numpy()
        for images, part in zip(sets, np.split(posterior, border), strict=False):
            images.posterior = part

    records = record_scores(args, model, processor, sets)
    shown = choose_shown(args.num_maps, sets)
    pictures = {
        "surprise.png": draw_maps(processor, shown),
        "histogram.png": draw_histogram(config, records, sets),
    }
    if args.attention:
        for number, (images, row) in enumerate(shown, start=1):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                picture = draw_attention(model, processor, images, row, *args.attention)
            pictures[f"attention-{number}.png"] = picture
    tables = {"scores.csv": tabulate_scores(sets)}
    if args.by_class:
        tables["classes.csv"] = tabulate_classes(sets, class_names(config))
        labels, found = known_classes(sets[0], class_names(config))
        if len(labels):
            pictures["confusion.png"] = plots.confusion_matrix(labels, found, class_names(config))
    folder.mkdir(parents=True, exist_ok=True)
    for former in (SCORE, "classes.csv", "confusion.png"):  # these would be of other files than those that follow
        (folder / former).unlink(missing_ok=True)
    for earlier in folder.glob("attention-*.png"):  # of other images, or of another pixel
        if earlier.stem.removeprefix("attention-").isdecimal():
            earlier.unlink()
    for table_name, table in tables.items():
        with whole_file(folder / table_name) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(table)
    for picture_name, picture in pictures.items():
        save_picture(picture, folder / picture_name)
    write_records(folder / SCORE, records)
    print_scores(sets, records, config.n_class_tokens > 0)
    print(f"Wrote {', '.join([*tables, *pictures])} and {SCORE} to {folder}")
    return records


def known_classes(images: ImageSet, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The classes, and those that the posterior finds likeliest, of the images whose class is known, (m,) numbers each."""
    known = [row for row in range(len(images.posterior)) if images.labels.get(images.names[row]) in names]
    labels = [names.index(images.labels[images.names[row]]) for row in known]
    found = [int(images.posterior[row].argmax()) for row in known]
    return np.array(labels, dtype=int), np.array(found, dtype=int)


def tabulate_scores(sets: list[ImageSet]) -> list[list[str]]:
    """The rows of `scores.csv`, with their head."""
    rows = [["image", "set", "nats_per_pixel", "bits_per_pixel"]]
    for images in sets:
        for image, nats in zip(images.names, images.nats_per_pixel, strict=True):
            rows.append([image, images.kind, f"{nats:.6f}", f"{nats * BITS_PER_NAT:.6f}"])
    return rows


def tabulate_classes(sets: list[ImageSet], names: list[str]) -> list[list[str]]:
    """The rows of `classes.csv`, with their head: the class if it is known, the likeliest, and p(c | x) of each."""
    rows = [["image", "set", "class", "likeliest", *names]]
    for images in sets:
        for image, chances in zip(images.names, images.posterior, strict=True):
            likeliest = names[int(chances.argmax())]
            rows.append([image, images.kind, images.labels.get(image, ""), likeliest, *(f"{p:.6f}" for p in chances)])
    return rows


def read_scored_set(args: ScoreArguments, data_args: DataArguments, processor: AnyImageProcessor) -> ImageSet:
    """The images to score: those that are named, and held-out ones of the data that the model was trained on."""
    cells, datasets, seed = name_images(args.images), [summarize_places(args.images)] if args.images else [], None
    labels: dict[str, str] = {}
    if args.num_held_out:
        held_out, seed = select_held_out(args.model_name_or_path, data_args, args.num_held_out, args.split_seed)
        classes = read_labels(held_out) if LABEL in held_out.features else [None] * len(held_out)
        for index, (cell, label) in enumerate(zip(held_out[IMAGE], classes, strict=True)):
            path = cell.get("path") if isinstance(cell, dict) else None
            name = f"held out {index}" + (f", {Path(path).name}" if path else "")
            cells.append((name, cell))
            labels |= {} if label is None else {name: label}
        datasets.append(data_args.name())
    names, tokens = read_images(cells, processor, data_args.on_bad_image)
    split = "scored" if args.images else "held out"
    return ImageSet("scored", split, " and ".join(datasets), names, tokens, seed, labels)


def name_images(places: list[str]) -> list[tuple[str, Any]]:
    """(name, undecoded image) of each image file: its path in the folder that was named, or just the file's name."""
    cells: list[tuple[str, Any]] = []
    for place in map(Path, places):
        for file in named_images([str(place)]):
            name = file.relative_to(place).as_posix() if place.is_dir() else file.name
            cells.append((name, {"bytes": None, "path": str(file)}))
    return cells


def summarize_places(places: list[str]) -> str:
    """Files and folders in words, without the folders they are in."""
    names = [Path(place).absolute().name for place in places]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_images(
    cells: list[tuple[str, Any]], processor: AnyImageProcessor, on_bad_image: str
) -> tuple[list[str], np.ndarray]:
    """Names and tokens (n, N) of the images that can be read; the others are a ValueError, or with "skip" reported."""
    names, tokens, bad = [], [], []
    for name, cell in tqdm(cells, desc="Reading images", unit="image", leave=False, disable=None):
        try:
            image = read_image(cell)
        except ValueError as error:
            if on_bad_image != "skip":
                raise ValueError(f"{name} cannot be read ({error}). Remove it, or pass --on_bad_image skip.") from error
            bad.append(f"{name}: {error}")
        else:
            names.append(name)
            tokens.append(np.asarray(processor(image)[TOKENS][0]))
    if bad:
        report_bad_images(bad, len(cells))
    return names, np.stack(tokens)


def record_scores(
    args: ScoreArguments, model: ImageGPTForCausalImageModeling, processor: AnyImageProcessor, sets: list[ImageSet]
) -> list[Record]:
    """The mean of each set, and how well two sets are told apart."""
    trained = record_of_training(args.model_name_or_path)
    common = fields_of_model(model.config) | {
        "task": "scoring",
        "parameters": model.num_parameters(),
        "images_seen": trained.images_seen if trained else None,
        "checkpoint": Path(args.model_name_or_path).absolute().name,
        "precision": "bfloat16 autocast" if args.bf16 else "float32",
    }
    records = [
        Record(
            **common,
            **fields_of_images(images.dataset, processor),
            metric="nats_per_pixel",
            value=float(images.nats_per_pixel.mean()),
            unit=UNITS["nats_per_pixel"],
            split=images.split,
            n=len(images.names),
            seed=images.seed,
            deviation=float(np.std(images.nats_per_pixel, ddof=len(images.names) > 1)),
        )
        for images in sets
    ]
    labels, found = known_classes(sets[0], class_names(model.config))
    if len(labels):
        records.append(
            Record(
                **common,
                **fields_of_images(sets[0].dataset, processor, model.config.n_class_tokens),
                metric="accuracy",
                value=accuracy(found, labels),
                unit=UNITS["accuracy"],
                split=sets[0].split,
                n=len(labels),
                seed=sets[0].seed,
                probe="class likelihoods",
            )
        )
    if len(sets) == 2:
        nats = np.concatenate([images.nats_per_pixel for images in sets])
        is_compared = np.repeat([0, 1], [len(images.names) for images in sets])
        means = {f"{images.kind} nats per pixel": record.value for images, record in zip(sets, records, strict=True)}
        records.append(
            Record(
                **common,
                **fields_of_images(f"{sets[0].dataset} against {sets[1].dataset}", processor),
                metric="auroc",
                value=float(roc_auc_score(is_compared, nats)),
                unit=UNITS["auroc"],
                split=f"{sets[0].split} against compared",
                n=len(nats),
                seed=sets[0].seed,
                details={"told apart by": "nats per pixel, which compared images have more of"} | means,
            )
        )
    return records


def choose_shown(count: int, sets: list[ImageSet]) -> list[tuple[ImageSet, int]]:
    """(set, row) of images of each set, evenly chosen from its least to its most surprising, all in that order."""
    shown = []
    shares = [count] if len(sets) == 1 else [-(-count // 2), count // 2]
    for images, share in zip(sets, shares, strict=True):
        nats = images.nats_per_pixel
        share = min(share, len(nats))
        ranks = np.rint(np.linspace(0, len(nats) - 1, share)).astype(int) if share > 1 else [len(nats) // 2] * share
        shown += [(images, int(row)) for row in np.argsort(nats, kind="stable")[ranks]]
    return sorted(shown, key=lambda item: item[0].nats_per_pixel[item[1]])


def draw_maps(processor: AnyImageProcessor, shown: list[tuple[ImageSet, int]]) -> Image.Image:
    """The images and the maps of their pixels' surprise."""
    titles = []
    for images, row in shown:
        of = ", compared" if images.kind == "compared" else ""
        titles.append(f"{shorten(images.names[row])}\n{images.nats_per_pixel[row]:.2f} nats/pixel{of}")
    pictures = processor.decode(np.stack([images.tokens[row] for images, row in shown]))
    maps = [images.surprise[row].reshape(processor.token_grid()) for images, row in shown]
    return plots.surprise_maps(pictures, np.stack(maps), titles)


def draw_attention(
    model: ImageGPTForCausalImageModeling,
    processor: AnyImageProcessor,
    images: ImageSet,
    image: int,
    row: int,
    column: int,
) -> Image.Image:
    """What the pixel at (row, column) of one image looks at."""
    tokens = torch.from_numpy(images.tokens[image : image + 1].astype(np.int64)).to(model.device)
    shares = attention_of_tokens(model, tokens, row * processor.token_grid()[1] + column)[0].cpu().numpy()
    (picture,) = processor.decode(tokens)
    return plots.attention_maps(picture, shares, (row, column), shorten(images.names[image]))


def draw_histogram(config: ImageGPTConfig, records: list[Record], sets: list[ImageSet]) -> Image.Image:
    """How the nats per pixel of each set spread."""
    values = {f"{images.kind}: {shorten(images.dataset)}": images.nats_per_pixel for images in sets}
    levels = {UNIFORM: float(np.log(config.vocab_size - 1))}
    found = [record.value for record in records if record.metric == "auroc"]
    title = f"AUROC {found[0]:.3f} of telling the sets apart by nats per pixel" if found else None
    return plots.histogram(values, "nats per pixel", levels=levels, title=title)


def shorten(name: str, length: int = 30) -> str:
    """`name` if it is not longer than `length`, else its end, where files differ."""
    return name if len(name) <= length else "…" + name[1 - length :]


def print_scores(sets: list[ImageSet], records: list[Record], has_classes: bool) -> None:
    """The mean and the extremes of each set, and how well they are told apart. has_classes: whether the model knows any."""
    untold = ", without being told a class" if has_classes else ""
    print(f"\nNats per pixel (bits per pixel){untold}, lower is less surprising:")
    for images in sets:
        nats = images.nats_per_pixel
        print(f"  {images.kind}: {images.dataset}, {len(nats):,} image{'s' if len(nats) > 1 else ''}")
        lines = {"mean": (nats.mean(), "")}
        lines |= {
            word: (nats[row], images.names[row])
            for word, row in (("lowest", nats.argmin()), ("highest", nats.argmax()))
        }
        for word, (value, image) in lines.items():
            print(f"    {word:<7} {value:7.4f} ({value * BITS_PER_NAT:.4f})  {image}".rstrip())
    for record in records:
        if record.metric == "accuracy":
            print(f"  accuracy {record.value:.4f}: how often an image is likeliest under its own class, n = {record.n}")
        if record.metric == "auroc":
            print(f"  AUROC {record.value:.4f}: how often a compared image has more nats per pixel than a scored one")
