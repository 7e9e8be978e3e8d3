"""Records: what was measured, as data; how they are read, written and put into words; the files that accompany a model."""

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
import transformers
from PIL import Image

from .. import __version__
from ..configuration_imagegpt import ImageGPTConfig
from ..image_processing_imagegpt import AnyImageProcessor
from ..presets import N_COLORS, SIZES, Published


RECORDS = "records.json"  # with a model: what was measured. Written last, so a folder that has it holds a finished run
RUN = "run.json"  # with a model: how it was made (`recipe`), and what a resumed run must have in common (`identity`)
PROBE, SCORE = "probe.json", "score.json"  # in folders of their own: the records of `probe` and of `score`
MILESTONES = "milestones"  # folder of a run: checkpoints at fractions of its training
UNITS = {
    "nats_per_pixel": "nats/pixel",
    "accuracy": "fraction",
    "auroc": "fraction",
    "rmse_grey_levels": "grey levels",
    "psnr_db": "dB",
}


def this_machine() -> str:
    """This machine in words: accelerator or processor cores, and the versions that matter."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{os.cpu_count()} {platform.machine()} CPU cores"
    return f"{device}, torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"


@dataclass(kw_only=True)
class Record:
    """One measured number and all that is needed to know what it is; None where something does not apply.

    Everything that code asks of a record is a field; `details` are for people. Lists of records are written as JSON.
    """

    # The figure
    task: str  # "generation", "linear probe", "nearest neighbours", "fine-tuning", "scoring", "palette" or "speed"
    metric: str  # a quantity whose name says its unit, or "accuracy" and "auroc" (0..1)
    value: float
    unit: str
    split: str  # of the data: "train", "validation", "test", "held out", "scored", "compared"
    n: int  # images
    seed: int | None = None
    deviation: float | None = None  # standard deviation of the value over subsets or images
    baseline: str | None = None  # the name of what a model has to beat; None: the figure is the model's own

    # The images
    dataset: str | None = None
    image_size: tuple[int, int] | None = None  # height, width in pixels
    colors: int | None = None  # K
    classes: int | None = None

    # The model
    objective: str | None = None  # "causal" or "masked"
    size: str | None = None  # the preset that has its shape, if one has
    n_layer: int | None = None
    n_embd: int | None = None
    parameters: int | None = None
    images_seen: int | None = None  # in the training that ended with this model
    split_seed: int | None = None  # of the held-out images, if it is not `seed`
    told_classes: int | None = (
        None  # of generative models: how many classes there are, if it was told that of each image
    )
    started_from: str | None = None  # of fine-tuned models: "pretrained" or "random weights"
    checkpoint: str | None = None  # the name of its folder

    # Probes
    probe: str | None = None  # the classifier
    layers: tuple[int, ...] | None = None  # whose features it sees, together
    labels_per_class: int | None = None  # None: all
    masks: int | None = None  # of each image, if the objective is masked; the majority decides

    # Speed
    stage: str | None = None
    system: str | None = None  # "hf_igpt", "transformers" or "limit"
    variant: str | None = None  # "compiled", "compiled bf16"
    batch_size: int | None = None
    precision: str | None = None  # "float32" or "bfloat16 autocast"
    devices: int | None = None
    gradient_checkpointing: bool | None = None

    # Where it is from
    revision: str = field(default=f"hf_igpt {__version__}")
    hardware: str = field(default_factory=this_machine)
    reference: str | None = None  # the source of a figure that was published, not measured here
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("image_size", "layers"):
            found = getattr(self, name)
            if found is not None:
                if not isinstance(found, (list, tuple)) or (name == "image_size" and len(found) != 2):
                    raise ValueError(f"{name} is {found!r:.100}")
                setattr(self, name, tuple(found))


# -- files -------------------------------------------------------------------------------------------------------------


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write that becomes `path` once all is written, and vanishes if that fails.

    Links are not followed: one at `path` is replaced.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder`, which is new or empty, once all is written, and vanishes if that fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield staged
        if folder.is_dir():
            folder.rmdir()  # it is empty
        staged.chmod(0o755)
        staged.rename(folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        picture.save(partial, format="PNG")


def save_animation(frames: Sequence[Image.Image], path: Path, seconds: float = 4.0) -> None:
    """Write frames as a GIF that repeats, whole or not at all: `seconds` of them, and the last for half as long again.

    All frames share one palette: the colours of the first and the last, or 256 that are near to them.
    """
    both = np.concatenate([np.asarray(frames[0].convert("RGB")), np.asarray(frames[-1].convert("RGB"))])
    palette = Image.fromarray(both).quantize(256, dither=Image.Dither.NONE)
    reduced = [frame.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    each = int(1000 * seconds / len(frames))
    durations = [each] * (len(frames) - 1) + [int(500 * seconds)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        reduced[0].save(partial, "GIF", save_all=True, append_images=reduced[1:], duration=durations, loop=0)


def own_file(folder: str | Path, name: str) -> Path:
    """The path of `name` in a folder; ValueError if a link leads out of the folder, to what is not the model's.

    A snapshot in the Hub's cache is made of links to the blobs beside it, which are its own.
    """
    path, home = Path(folder, name), Path(folder).resolve()
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(path.resolve().is_relative_to(place) for place in homes):
        raise ValueError(f"{path} leads out of {folder} by a link: put there what it leads to, or remove it.")
    return path


def read_json(path: str | Path, kind: type, what: str) -> Any:
    """What a JSON file holds, which is of `kind`; anything else is a ValueError that names the file and `what` it should hold."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} does not hold {what}: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{path} does not hold {what}: it is a {type(found).__name__}, not a {kind.__name__}")
    return found


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """Write `records` to `path` in one piece: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{key: value for key, value in asdict(record).items() if value not in (None, {})} for record in records]
    with whole_file(path) as partial:
        partial.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_records(path: str | Path) -> list[Record]:
    """The records in `path`, also those of the first format; a file that holds anything else is a ValueError."""
    rows = read_json(path, list, "records")
    try:
        records = [Record(**(_upgrade(row) if "model" in row else row)) for row in rows]
        for record in records:
            _check_record(record)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold records: {error}") from error
    return records


# Of terminals and of the direction of text, and halves of characters.
_HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _check_record(record: Record) -> None:
    """ValueError if a field holds what its annotation does not say, no number, control characters, or a path."""
    for name, kind in get_type_hints(Record).items():
        value = getattr(record, name)
        allowed = {getattr(kind, "__origin__", kind)} | {getattr(part, "__origin__", part) for part in get_args(kind)}
        if name == "details":
            allowed = {dict}
        elif name in ("image_size", "layers"):
            allowed = {tuple, type(None)}
        if type(value) not in allowed and not (float in allowed and type(value) is int):
            raise ValueError(f"{name} is {value!r:.100}")
        for part in value if isinstance(value, tuple) else [value]:
            if isinstance(value, tuple) and type(part) is not int:
                raise ValueError(f"{name} is {value!r:.100}")
            if part != part:  # NaN
                raise ValueError(f"{name} is not a number")
            if isinstance(part, str) and _HIDDEN.search(part):
                raise ValueError(f"{name} has control characters: {part!r:.100}")
    if record.checkpoint is not None and (
        record.checkpoint == ".." or Path(record.checkpoint).name != record.checkpoint
    ):
        raise ValueError(
            f"checkpoint is the name of a folder, without those it is in; found {record.checkpoint!r:.100}"
        )


_OLD_BASELINES = {"position_unigram": "position unigram", "left": "left bigram", "left_up": "left-and-up trigram"}


def _upgrade(row: dict[str, Any]) -> dict[str, Any]:
    """Fields of a record of the first format, in which facts stood in the sentences `model` and `data`, or in `settings`."""
    known = {field.name for field in fields(Record)} - {"baseline", "details", "task"}
    settings = {key.replace(" ", "_"): value for key, value in row.get("settings", {}).items()}
    model, words = row["model"], row["data"].split(", ")
    of = settings.pop("of", None)
    if "layer" in settings:
        settings["layers"] = (settings.pop("layer"),)
    if settings.get("masks") == 0:
        del settings["masks"]
    for word in words[1:]:
        if size := re.fullmatch(r"(\d+)x(\d+)", word):
            settings["image_size"] = int(size[1]), int(size[2])
        elif counted := re.fullmatch(r"(\d+) (colours|classes)", word):
            settings["colors" if counted[2] == "colours" else "classes"] = int(counted[1])
    if row["metric"] in ("rmse_grey_levels", "psnr_db"):
        task = "palette"
        palette, _, source = model.partition(" from ")
        settings |= {"colors": int(re.sub(r"\D", "", palette) or 0), "checkpoint": source or None}
    elif row["metric"] in ("seconds", "peak_memory"):
        task = "speed"
        system, _, variant = model.partition(" ")
        settings |= {"system": system, "variant": variant or None}
    elif "started_from" in settings or model.startswith("always "):
        task = "fine-tuning"
    elif "set" in settings:
        task = "scoring"
    elif "probe" in settings:
        task = "nearest neighbours" if "neighbours" in settings["probe"] else "linear probe"
    else:
        task = "generation"
        for name, pattern in (("parameters", r"([\d,]+) parameters"), ("images_seen", r"([\d,]+) images seen")):
            if found := re.search(pattern, model):
                settings.setdefault(name, int(found[1].replace(",", "")))
        if found := re.match(r"Image GPT (masked )?(\w+),", model):
            settings.setdefault("objective", "masked" if found[1] else "causal")
            if found[2] in SIZES:
                settings.setdefault("size", found[2])
    baseline = None
    if row.get("baseline"):
        name = model.removesuffix(" counts")
        baseline = of or _OLD_BASELINES.get(name, name)
    if settings.pop("fine-tuned", False):
        settings["started_from"] = "pretrained"
    upgraded = {key: row[key] for key in row if key in known}
    upgraded |= {key: value for key, value in settings.items() if key in known}
    details = {key: value for key, value in settings.items() if key not in known}
    return upgraded | {"task": task, "dataset": words[0], "baseline": baseline, "details": details}


def read_run(folder: str | Path) -> dict[str, Any]:
    """What `run.json` says of the run that a model's folder, checkpoint or milestone is from; {} if there is none."""
    folder = Path(folder)
    places = {"checkpoint-": folder.parent, "step-": folder.parent.parent}
    of_run = [place for prefix, place in places.items() if folder.name.startswith(prefix)]
    place = next((place for place in (folder, *of_run) if (place / RUN).is_file()), None)
    try:
        run = {} if place is None else read_json(place / RUN, dict, "how a run was made")
        if not isinstance(run.get("recipe", {}), dict):
            raise ValueError(f"{place}/{RUN}: its recipe is no list of names and values")
    except ValueError as error:
        raise ValueError(
            f"{place}/{RUN} cannot be read: {error}. Give another folder, or bring the file back."
        ) from error
    return run


# -- fields ------------------------------------------------------------------------------------------------------------


def find_size(config: ImageGPTConfig) -> str | None:
    """The name of the preset that has a configuration's shape, if one has."""
    shape = (config.n_layer, config.n_embd, config.n_head)
    return next((name for name, size in SIZES.items() if (size.n_layer, size.n_embd, size.n_head) == shape), None)


def fields_of_model(config: ImageGPTConfig) -> dict[str, Any]:
    """What records say of a model's configuration."""
    names = {"objective": config.objective, "size": find_size(config)}
    return names | {"n_layer": config.n_layer, "n_embd": config.n_embd}


def fields_of_images(dataset: str, processor: AnyImageProcessor, classes: int | None = None) -> dict[str, Any]:
    """What records say of images and of the processor that makes tokens of them."""
    grid = {"image_size": processor.token_grid(), "colors": len(processor.palette)}
    return {"dataset": dataset} | grid | {"classes": classes}


def record_published(figure: Published) -> Record:
    """A figure that OpenAI published, as a record."""
    return Record(
        task=figure.task,
        metric="nats_per_pixel" if figure.task == "generation" else "accuracy",
        value=figure.value,
        unit="nats/pixel" if figure.task == "generation" else "fraction",
        split="validation" if figure.data == "ILSVRC-2012" else "test",
        n={"ILSVRC-2012": 50_000, "STL-10": 8_000}.get(figure.data, 10_000),
        dataset=figure.data,
        image_size=(figure.image_size, figure.image_size),
        colors=N_COLORS,
        objective=figure.objective,
        size=figure.size,
        labels_per_class=figure.labels_per_class,
        revision="openai/image-gpt",
        hardware="OpenAI's",
        reference=figure.source,
    )


# -- words -------------------------------------------------------------------------------------------------------------


def describe_network(record: Record) -> str:
    """The network alone: "Image GPT masked tiny"."""
    shape = record.size or ("" if record.n_layer is None else f"{record.n_layer} x {record.n_embd}")
    words = ["Image GPT", "masked" if record.objective == "masked" else "", shape]
    return " ".join(word for word in words if word)


def describe_model(record: Record) -> str:
    """What was measured: a network with its training or its probe, or a baseline."""
    if record.reference is not None:
        labels = f" with {record.labels_per_class} labels per class" if record.labels_per_class else ""
        return f"iGPT-{(record.size or '').upper()}, {record.task}{labels}: OpenAI's figure ({record.reference})"
    if record.task == "palette":
        source = f" from {record.checkpoint}" if record.checkpoint else ""
        return f"palette of {record.colors} colours{source}"
    if record.task == "speed":
        return " ".join(filter(None, (record.system, record.variant)))
    if record.baseline is None or record.baseline == "untrained":
        words = [describe_network(record)]
    else:
        words = [record.baseline]
    if record.probe is None:
        if record.baseline is None:
            words += [f"{record.parameters:,} parameters"] if record.parameters is not None else []
            words += [f"{record.images_seen:,} images seen"] if record.images_seen is not None else []
            words += ["told the class"] if record.told_classes else []
    else:
        words += ["untrained"] if record.baseline == "untrained" else []
        words += ["fine-tuned"] if record.started_from else []
        words += [describe_layers(record), record.probe] if record.layers else [record.probe]
    if record.masks:
        words.append(f"{record.masks} mask{'s' if record.masks > 1 else ''}")
    if record.labels_per_class:
        words.append(f"{record.labels_per_class} labels per class")
    return ", ".join(words)


def describe_layers(record: Record) -> str:
    """ "layer 4", or "layers 2 to 4"."""
    layers = record.layers or ()
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def describe_images(record: Record) -> str:
    """What it was measured on: "cifar10, 16x16, 512 colours, 10 classes"."""
    words = [record.dataset or "no images"]
    words += [f"{record.image_size[0]}x{record.image_size[1]}"] if record.image_size else []
    words += [f"{record.colors} colours"] if record.colors and record.task != "palette" else []
    words += [f"{record.classes} classes"] if record.classes else []
    return ", ".join(words)


def format_value(record: Record, digits: int = 1) -> str:
    """The value with its unit: fractions in per cent with `digits` decimals and their deviation, others with 5 digits."""
    if record.unit == "fraction":
        deviation = f" ± {100 * record.deviation:.{digits}f}" if record.deviation else ""
        return f"{100 * record.value:.{digits}f}{deviation} %"
    return f"{record.value:.5g} {record.unit}"


def markdown_table(records: Sequence[Record]) -> str:
    """Records as a Markdown table: model, data, images, value."""
    rows = [
        (describe_model(record), f"{describe_images(record)}, {record.split}", f"{record.n:,}", format_value(record))
        for record in records
    ]
    return markdown_rows(["what", "data", "images", "value"], rows)


def markdown_rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; what would end a cell or begin a tag is escaped."""
    lines = ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def escape_markdown(text: str) -> str:
    """Text of which nothing ends a line or a cell of a table, begins a tag, or becomes a link, a picture, code or emphasis."""
    text = " ".join(_HIDDEN.sub(" ", text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("://", ":&#47;/")
    return re.sub(r"[\\`*~$|\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
