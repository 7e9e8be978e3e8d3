"""What is measured and how it is recorded: likelihoods, scores of images, counting baselines, and records as JSON."""

import csv
import json
import os
import platform
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
import transformers
from sklearn.metrics import accuracy_score, roc_auc_score
from tqdm.auto import tqdm

from . import __version__, data, plots
from .configuration_imagegpt import ImageGPTConfig
from .features_imagegpt import evaluation_mode
from .modeling_imagegpt import ImageGPTForCausalImageModeling, check_tokens, masked_nats, pixel_nats
from .presets import SIZES


RECORDS = "records.json"  # beside a model: what was measured. Written last: a folder that holds it holds a finished run
RUN = "run.json"  # beside a model: how it was made (`recipe`), and what a resumed run must have in common (`identity`)
BITS_PER_NAT = 1 / np.log(2)
_STRENGTHS = (0.3, 1, 3, 10, 30, 100, 300)  # of smoothing, in counts


@dataclass
class Record:
    """One measured number and all that is needed to know what it is. Lists of them are written as JSON.

    metric names its unit's quantity ("nats_per_pixel"; "accuracy", in the unit "fraction"); n counts images; data names the
    images, revision the version of the code; reference is the source of a figure that was published, not measured here. A
    baseline is what a model must beat. settings hold what else distinguishes this record: objective, layer, probe.
    """

    metric: str
    value: float
    unit: str
    split: str
    n: int
    seed: int | None
    model: str
    data: str
    revision: str = field(default=f"hf_igpt {__version__}")
    hardware: str = field(default_factory=lambda: this_machine())
    reference: str | None = None
    baseline: bool = False
    settings: dict = field(default_factory=dict)


def this_machine() -> str:
    """This machine in words: accelerator or processor cores, and the versions that matter."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{os.cpu_count()} {platform.machine()} CPU cores"
    return f"{device}, torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"


def device_of(name: str | None) -> torch.device:
    """The device called `name`, or by default an accelerator if there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def split_seed(model_name: str, data_args: data.DataArguments, seed: int) -> int:
    """The seed that held-out images are told apart by: the model's own where it was trained on the same images, else `seed`.

    With another seed or fraction, images that the model was trained on would be among those it is tested on: another
    --train_val_split than in training is a ValueError. A model without records beside it says nothing of its seed.
    """
    folder = Path(model_name)
    if not (folder / RECORDS).is_file():
        return seed
    record = read_records(folder / RECORDS)[0]
    if record.data.split(", ")[0] != data_args.name() or record.seed is None:
        return seed
    fraction = read_run(folder).get("train_val_split", data_args.train_val_split)
    if fraction != data_args.train_val_split:
        raise ValueError(
            f"{model_name} was trained with --train_val_split {fraction}, not {data_args.train_val_split}: test images would be "
            "among those it was trained on. Give the same."
        )
    found = record.settings.get("split seed", record.seed)
    if found != seed:
        print(f"Splits are drawn by seed {found}, as when {folder.name} was trained.")
    return found


def read_run(folder: str | Path) -> dict:
    """What `run.json` says of the run that a model's folder, checkpoint or milestone is from; {} if there is none."""
    folder = Path(folder)
    places = {"checkpoint-": folder.parent, "step-": folder.parent.parent}
    of_run = [place for prefix, place in places.items() if folder.name.startswith(prefix)]
    file = next((place / RUN for place in (folder, *of_run) if (place / RUN).is_file()), None)
    return json.loads(file.read_text()) if file else {}


def size_of(config) -> str | None:
    """The preset that has a configuration's shape, if one has."""
    shape = (config.n_layer, config.n_embd, config.n_head)
    return next((name for name, size in SIZES.items() if (size.n_layer, size.n_embd, size.n_head) == shape), None)


def write_records(path: str | Path, records: list[Record]):
    """Write `records` to `path` in one piece: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps([asdict(record) for record in records], indent=1, ensure_ascii=False) + "\n")


@contextmanager
def whole_file(path: Path):
    """A file to write that becomes `path` when all is written, and vanishes where that fails."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_records(path: str | Path) -> list[Record]:
    """The records of `path`; a file that holds anything else is a ValueError."""
    try:
        return [Record(**fields) for fields in json.loads(Path(path).read_text())]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold records: {error}") from error


def markdown_table(records: list[Record]) -> str:
    """Records as a Markdown table: model, data, metric, value."""
    lines = ["| what | data | images | value |", "|---|---|---|---|"]
    for record in records:
        value = f"{100 * record.value:.1f} %" if record.unit == "fraction" else f"{record.value:.5g} {record.unit}"
        lines.append(f"| {record.model} | {record.data}, {record.split} | {record.n:,} | {value} |")
    return "\n".join(lines)


class Accuracy(evaluate.Metric):
    """Share of `predictions` that are their `references`, both (n,) integers: `{"accuracy": …}` in 0..1.

    `evaluate`'s own would be fetched from the Hub at run time.
    """

    def _info(self):
        integer = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Share of predictions that are right.",
            citation="",
            inputs_description="predictions, references: integers",
            features=datasets.Features({"predictions": integer, "references": integer}),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(accuracy_score(references, predictions))}


def accuracy(predictions, labels) -> float:
    """Share of `predictions` that are the `labels`, both (n,) integers, in 0..1."""
    return Accuracy(keep_in_memory=True).compute(predictions=predictions, references=labels)["accuracy"]


def nats_per_image(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean −log p of the pixels of each image, or of those in `mask`: (B, N, K) logits, (B, N) tokens -> (B,), nats per pixel."""
    return pixel_nats(logits, tokens).mean(dim=1) if mask is None else masked_nats(logits, tokens, mask)


def _check_causal(config):
    if config.objective != "causal":
        raise ValueError(
            "A masked model gives no likelihood of an image, only of hidden pixels given the others: score with a causal "
            "model, or take `model(labels=tokens, bool_masked_pos=mask).loss`, the nats per hidden pixel."
        )


@torch.no_grad()
def pixel_surprise(model, tokens, *, batch_size: int = 64, bf16: bool = False, progress: bool = True) -> torch.Tensor:
    """−log p of every pixel given SOS and the pixels before it, (n, N) float32 in nats, on the CPU.

    model: an `ImageGPTForCausalImageModeling`; its training flag is left as it was. tokens: (n, N) of colours 0..K-1, torch,
    numpy or a column of a tokenised dataset. A row's mean is that image's nats per pixel, the mean of all `model(labels=
    tokens).loss`. batch_size: images in a forward pass; bf16: run it in bfloat16 autocast, the logarithms stay float32.
    ValueErrors, before the first forward pass: a masked model, tokens of other shapes, colours the model does not have.
    """
    config, device = model.config, model.device
    _check_causal(config)
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1; found {batch_size}.")
    tokens = tokens if torch.is_tensor(tokens) else torch.from_numpy(np.asarray(tokens))
    tokens = tokens if tokens.is_floating_point() else tokens.long()
    if tokens.ndim != 2 or len(tokens) == 0 or tokens.shape[1] != config.n_positions:
        raise ValueError(f"Tokens of images have shape (n, {config.n_positions}), n >= 1; found {tuple(tokens.shape)}.")
    check_tokens(tokens, config.vocab_size - 1, "tokens", config)
    found = torch.empty(tokens.shape)
    bar = tqdm(total=len(tokens), desc="Scoring", unit="image", disable=None if progress else True)
    with evaluation_mode(model), bar:
        for start in range(0, len(tokens), batch_size):
            batch = tokens[start : start + batch_size].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(labels=batch).logits  # (B, N, K)
            found[start : start + len(batch)] = pixel_nats(logits, batch)
            bar.update(len(batch))
    return found


def majority_vote(predictions: np.ndarray, seed: int = 0) -> np.ndarray:
    """The class that most of several predictions name, ties drawn at random [V2 4.6]: (votes, n) integers -> (n,)."""
    predictions = np.asarray(predictions)
    counts = np.stack([(predictions == label).sum(axis=0) for label in range(predictions.max() + 1)], axis=1)
    best = counts == counts.max(axis=1, keepdims=True)  # (n, classes)
    return np.where(best, np.random.default_rng(seed).random(best.shape), -1).argmax(axis=1)


def data_of(name: str, processor, what: str = "") -> str:
    """How records name data: the images, their size, the number of colours, and `what` else."""
    height, width = processor.token_grid()
    return f"{name}, {height}x{width}, {len(processor.clusters)} colours" + (f", {what}" if what else "")


def held_out_images(model_name: str, data_args, count: int, split_seed: int | None = None) -> tuple[list, int]:
    """The first `count` undecoded images that a model was not trained on, and the seed of their split.

    The split is the one that the model's records tell of, unless `split_seed` is given. ValueError: the records tell of
    other data than `data_args` names, or of fewer images.
    """
    seed, records, load, split = split_seed, Path(model_name) / RECORDS, data.load_images, "validation"
    if records.is_file():
        record = read_records(records)[0]
        seed = record.settings.get("split seed", record.seed) if seed is None else seed
        if "started from" in record.settings:  # a classifier, which was trained on some of what pretraining held out
            load, split = data.load_labelled_images, "test"
        if record.data.split(", ")[0] != data_args.name():
            raise ValueError(
                f"The model was trained on {record.data}; --num_held_out would take images of {data_args.name()}: give the "
                "same --dataset_name or --train_dir as in training, or --images."
            )
        if count > record.n:
            raise ValueError(f"--num_held_out {count}: only {record.n} images were held out in training.")
    seed = 42 if seed is None else seed
    held_out = load(data_args, seed=seed)[split]
    return held_out.select(range(min(count, len(held_out))))[data.IMAGE], seed


# -- scores of images --------------------------------------------------------------------------------------------------


SCORE = "score.json"  # the records of `score`, written last


@dataclass
class ScoreArguments:
    """Which images to score, with which model."""

    model_name_or_path: str = field(
        metadata={"help": "Trained causal model with its image processor: folder or Hub name."}
    )
    images: list[str] = field(default_factory=list, metadata={"help": "Image files to score, or folders of them."})
    num_held_out: int = field(
        default=0, metadata={"help": "Score this many held-out images of the dataset (the digits by default)."}
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "Image files or folders of another kind: how well does nats per pixel tell them apart?"},
    )
    num_maps: int = field(
        default=8, metadata={"help": "Images with a map of each pixel's surprise, least to most surprising."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where scores and pictures go. Default: score/ in the model's folder."}
    )
    split_seed: int | None = field(
        default=None, metadata={"help": "Seed of the held-out split. Default: the one the model was trained with."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images in a forward pass."})
    bf16: bool = field(default=False, metadata={"help": "Run the model in bfloat16 autocast."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, … Default: an accelerator if there is one."})

    def __post_init__(self):
        for name, least in (("num_held_out", 0), ("num_maps", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is at least {least}; found {getattr(self, name)}.")
        if not (self.images or self.num_held_out):
            raise ValueError("There is nothing to score: give --images or --num_held_out.")


@dataclass
class _ImageSet:
    """Images of one kind: their names, their tokens (n, N), what records say of them, and then their surprise (n, N) in nats."""

    kind: str  # "scored" or "compared"
    split: str
    data: str
    names: list[str]
    tokens: np.ndarray
    seed: int | None = None
    surprise: np.ndarray | None = None

    @property
    def nats_per_pixel(self) -> np.ndarray:
        """(n,) float64."""
        return self.surprise.mean(axis=1, dtype=np.float64)


def score(args: ScoreArguments, data_args: data.DataArguments) -> list[Record]:
    """Score images by a causal model: nats per pixel of each, and how surprising each pixel was.

    Writes `scores.csv`, `surprise.png`, `histogram.png` and, last, `score.json`, whose records it returns. What is wrong
    with the model, the folders or the images is a ValueError before any forward pass.
    """
    name = args.model_name_or_path
    if args.output_dir is None and not Path(name).is_dir():
        raise ValueError(f"Give --output_dir: {name} is on the Hub, so there is no folder of its own to write to.")
    folder = Path(args.output_dir) if args.output_dir else Path(name) / "score"
    config = ImageGPTConfig.from_pretrained(name)
    _check_causal(config)
    processor = data.processor_of(name, config)
    sets = [_scored_set(args, data_args, processor)]
    if args.compare:
        cells, of = _named_cells(args.compare), _some(args.compare)
        sets.append(_ImageSet("compared", "compared", of, *_read(cells, processor, data_args.on_bad_image)))
    model, loading = ImageGPTForCausalImageModeling.from_pretrained(name, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(
            f"{name} is not a trained causal model: it lacks {', '.join(sorted(loading['missing_keys']))}. Score with the "
            "model it was made from."
        )
    model.to(device_of(args.device))
    tokens = np.concatenate([images.tokens for images in sets])
    surprise = pixel_surprise(model, tokens, batch_size=args.batch_size, bf16=args.bf16).numpy()
    for images, part in zip(sets, np.split(surprise, [len(sets[0].names)]), strict=False):
        images.surprise = part

    records = _score_records(args, model, processor, sets)
    pictures = {
        "surprise.png": _maps(args.num_maps, processor, sets),
        "histogram.png": _histogram(config, records, sets),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SCORE).unlink(missing_ok=True)  # of other files than those that follow
    with whole_file(folder / "scores.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "set", "nats_per_pixel", "bits_per_pixel"])
        for images in sets:
            for image, nats in zip(images.names, images.nats_per_pixel, strict=True):
                rows.writerow([image, images.kind, f"{nats:.6f}", f"{nats * BITS_PER_NAT:.6f}"])
    for file, picture in pictures.items():
        with whole_file(folder / file) as partial:
            picture.save(partial, format="PNG")
    write_records(folder / SCORE, records)
    _say_scores(sets, records)
    print(f"Wrote scores.csv, surprise.png, histogram.png and {SCORE} to {folder}")
    return records


def _scored_set(args: ScoreArguments, data_args, processor) -> _ImageSet:
    cells, of, seed = _named_cells(args.images), [_some(args.images)] if args.images else [], None
    if args.num_held_out:
        held_out, seed = held_out_images(args.model_name_or_path, data_args, args.num_held_out, args.split_seed)
        for index, cell in enumerate(held_out):
            path = cell.get("path") if isinstance(cell, dict) else None
            cells.append((f"held out {index}" + (f", {Path(path).name}" if path else ""), cell))
        of.append(data_args.name())
    names, tokens = _read(cells, processor, data_args.on_bad_image)
    return _ImageSet("scored", "scored" if args.images else "held out", " and ".join(of), names, tokens, seed)


def _named_cells(places: list[str]) -> list[tuple[str, dict]]:
    """(name, undecoded image) of each image file: its path in the folder that was named, or just the file's name."""
    cells = []
    for place in map(Path, places):
        for file in data.named_images([str(place)]):
            name = file.relative_to(place).as_posix() if place.is_dir() else file.name
            cells.append((name, {"bytes": None, "path": str(file)}))
    return cells


def _some(places: list[str]) -> str:
    """Files and folders in words, without the folders they are in."""
    names = [Path(place).absolute().name for place in places]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read(cells: list[tuple[str, dict]], processor, on_bad_image: str) -> tuple[list[str], np.ndarray]:
    """Names and tokens (n, N) of the images that can be read; the others stop it, or with "skip" are reported."""
    names, tokens, bad = [], [], []
    for name, cell in tqdm(cells, desc="Reading images", unit="image", leave=False, disable=None):
        try:
            image = data.read_image(cell)
        except ValueError as error:
            if on_bad_image != "skip":
                raise ValueError(f"{name} cannot be read ({error}). Remove it, or pass --on_bad_image skip.") from error
            bad.append(f"{name}: {error}")
        else:
            names.append(name)
            tokens.append(np.asarray(processor(image)[data.TOKENS][0]))
    if bad:
        data.report_bad_images(bad, len(cells))
    return names, np.stack(tokens)


def _score_records(args: ScoreArguments, model, processor, sets: list[_ImageSet]) -> list[Record]:
    config, size, parameters = model.config, size_of(model.config), model.num_parameters()
    about = {"objective": config.objective, "size": size, "parameters": parameters}
    of_training = Path(args.model_name_or_path) / RECORDS
    if of_training.is_file() and (seen := read_records(of_training)[0].settings.get("images seen")) is not None:
        about["images seen"] = seen
    words = f"Image GPT {size or f'{config.n_layer} x {config.n_embd}'}, {parameters:,} parameters"
    words += f", {about['images seen']:,} images seen" if "images seen" in about else ""
    about |= {"checkpoint": Path(args.model_name_or_path).absolute().name}
    about |= {"precision": "bfloat16 autocast" if args.bf16 else "float32"}
    means = [float(images.nats_per_pixel.mean()) for images in sets]
    records = [
        Record(
            metric="nats_per_pixel",
            value=mean,
            unit="nats/pixel",
            split=images.split,
            n=len(images.names),
            seed=images.seed,
            model=words,
            data=data_of(images.data, processor),
            settings=about
            | {
                "set": images.kind,
                "standard deviation": float(np.std(images.nats_per_pixel, ddof=len(images.names) > 1)),
            },
        )
        for images, mean in zip(sets, means, strict=True)
    ]
    if len(sets) == 2:
        nats = np.concatenate([images.nats_per_pixel for images in sets])
        is_compared = np.repeat([0, 1], [len(images.names) for images in sets])
        records.append(
            Record(
                metric="auroc",
                value=float(roc_auc_score(is_compared, nats)),
                unit="fraction",
                split=f"{sets[0].split} against compared",
                n=len(nats),
                seed=sets[0].seed,
                model=words,
                data=data_of(f"{sets[0].data} against {sets[1].data}", processor),
                settings=about
                | {"told apart by": "nats per pixel, compared images having more"}
                | {f"nats per pixel, {images.kind}": mean for images, mean in zip(sets, means, strict=True)},
            )
        )
    return records


def _maps(count: int, processor, sets: list[_ImageSet]):
    """Images of each set, evenly chosen from its least to its most surprising, and together in that order."""
    shown = []  # (nats per pixel, title, image, map)
    shares = [count] if len(sets) == 1 else [-(-count // 2), count // 2]
    for images, share in zip(sets, shares, strict=True):
        nats = images.nats_per_pixel
        share = min(share, len(nats))
        ranks = np.rint(np.linspace(0, len(nats) - 1, share)).astype(int) if share > 1 else [len(nats) // 2] * share
        rows = np.argsort(nats, kind="stable")[ranks]
        of = ", compared" if images.kind == "compared" else ""
        for row, picture in zip(rows, processor.decode(images.tokens[rows]), strict=True):
            title = f"{_shortened(images.names[row])}\n{nats[row]:.2f} nats/pixel{of}"
            shown.append((nats[row], title, picture, images.surprise[row].reshape(processor.token_grid())))
    shown.sort(key=lambda item: item[0])
    _, titles, pictures, maps = zip(*shown, strict=True)
    return plots.surprise_maps(pictures, np.stack(maps), titles)


def _histogram(config, records: list[Record], sets: list[_ImageSet]):
    of = {f"{images.kind}: {_shortened(images.data)}": images.nats_per_pixel for images in sets}
    uniform = {"uniform": float(np.log(config.vocab_size - 1))}
    title = next(
        (
            f"AUROC {record.value:.3f} of telling the sets apart by nats per pixel"
            for record in records
            if record.metric == "auroc"
        ),
        None,
    )
    return plots.histogram(of, "nats per pixel", levels=uniform, title=title)


def _shortened(name: str, length: int = 30) -> str:
    """`name` if it is not longer than `length`, else its end, where files differ."""
    return name if len(name) <= length else "…" + name[1 - length :]


def _say_scores(sets: list[_ImageSet], records: list[Record]):
    print("\nNats per pixel (bits per pixel), lower is less surprising:")
    for images in sets:
        nats = images.nats_per_pixel
        print(f"  {images.kind}: {images.data}, {len(nats):,} image{'s' if len(nats) > 1 else ''}")
        lines = {"mean": (nats.mean(), "")}
        lines |= {
            word: (nats[row], images.names[row])
            for word, row in (("lowest", nats.argmin()), ("highest", nats.argmax()))
        }
        for word, (value, image) in lines.items():
            print(f"    {word:<7} {value:7.4f} ({value * BITS_PER_NAT:.4f})  {image}".rstrip())
    for record in records:
        if record.metric == "auroc":
            print(f"  AUROC {record.value:.4f}: how often a compared image has more nats per pixel than a scored one")


# -- counting baselines ------------------------------------------------------------------------------------------------


def baselines(train: np.ndarray, held_out: np.ndarray, width: int, n_colors: int) -> dict[str, float]:
    """Held-out nats per pixel of models that only count, on the same tokens: what a network must beat.

    train, held_out: (n, N) tokens; width: pixels in a row. Keys: `uniform`, `unigram`, `position_unigram`, `left` (the
    pixel to the left; a border symbol in column 0), `left_up` (left and above). Counts are smoothed towards the next
    simpler model with a strength chosen by leave-one-out likelihood of train; contexts that never occurred fall back to it.
    """
    train, held_out = np.asarray(train, dtype=np.int64), np.asarray(held_out, dtype=np.int64)
    n_pixels = train.shape[1]

    def contexts(tokens):
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
    unigram = _smoothed(np.zeros_like(x_train), x_train, np.zeros_like(x_test), x_test, n_colors, *ones)
    position = _smoothed(position_train, x_train, position_test, x_test, n_colors, *unigram)
    left = _smoothed(left_train, x_train, left_test, x_test, n_colors, *unigram)
    up = _smoothed(up_train, x_train, up_test, x_test, n_colors, *unigram)
    either = [(a + b) / 2 for a, b in zip(left, up, strict=True)]
    both_train, both_test = (a * (n_colors + 1) + b for a, b in ((left_train, up_train), (left_test, up_test)))
    left_up = _smoothed(both_train, x_train, both_test, x_test, n_colors, *either)
    models = {"unigram": unigram, "position_unigram": position, "left": left, "left_up": left_up}
    return {"uniform": float(np.log(n_colors))} | {
        name: float(-np.log(probabilities).mean()) for name, (_, probabilities) in models.items()
    }


def _smoothed(context, x, context_test, x_test, n_colors, fallback, fallback_test):
    """p(x | context) = (count + s · fallback) / (total + s): leave-one-out on train, and on test.

    fallback: the simpler model's probability of each x. Returns both arrays of probabilities; s maximises the first's
    likelihood.
    """
    pairs, pair_counts = np.unique(context * n_colors + x, return_counts=True)
    totals = np.bincount(context)

    def counts(of_context, of_x):
        code = of_context * n_colors + of_x
        at = np.minimum(np.searchsorted(pairs, code), len(pairs) - 1)
        pair = np.where(pairs[at] == code, pair_counts[at], 0)
        total = np.where(of_context < len(totals), totals[np.minimum(of_context, len(totals) - 1)], 0)
        return pair, total

    pair, total = counts(context, x)
    best, strength, left_out = -np.inf, None, None
    for candidate in _STRENGTHS:
        probabilities = (pair - 1 + candidate * fallback) / (total - 1 + candidate)
        likelihood = np.log(probabilities).mean()
        if likelihood > best:
            best, strength, left_out = likelihood, candidate, probabilities
    pair_test, total_test = counts(context_test, x_test)
    return left_out, (pair_test + strength * fallback_test) / (total_test + strength)
