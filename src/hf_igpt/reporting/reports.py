"""Reports of several runs: the paper's figures and a comparison with its numbers, from records alone."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from jinja2 import Environment, PackageLoader
from PIL import Image

from ..configuration_imagegpt import ImageGPTConfig
from ..evaluation.records import (
    MILESTONES,
    PROBE,
    RECORDS,
    SCORE,
    Record,
    describe_images,
    describe_model,
    escape_markdown,
    format_value,
    markdown_rows,
    markdown_table,
    own_file,
    read_json,
    read_records,
    record_published,
    save_picture,
    whole_file,
)
from ..modeling_imagegpt import ImageGPTForCausalImageModeling
from ..presets import PUBLISHED, SIZES, Published
from . import plots


REPORT, STATE = "report.md", "trainer_state.json"
FIGURES = {  # file -> title, what it needs
    "layers.png": ("Probe accuracy by layer (paper, Figure 2)", "probes: run_linear_probe.py"),
    "loss-and-probe.png": (
        "Generative loss against probe accuracy over training (paper, Figure 3)",
        "run_pretrain.py --milestones, then run_linear_probe.py --milestones or run_report.py --probe_milestones",
    ),
    "objectives.png": (
        "Autoregressive against BERT (paper, Figure 4)",
        "probes or fine-tuned models of a causal and a masked run",
    ),
    "epochs.png": ("Fine-tuned from pretrained weights, and from scratch", "run_finetune.py, with and without a model"),
}


@dataclass
class Run:
    """A run's folder and what was measured in it; `milestones` are the records of its checkpoints, in their order."""

    folder: Path
    name: str
    records: list[Record]
    milestones: list[list[Record]]


def write_report(folders: Sequence[str | Path], target: str | Path) -> tuple[Path, list[Run]]:
    """Write `report.md`, its figures, and below `pictures/` copies of the runs' own pictures to the folder `target`.

    folders: where runs are; what lies in them is found. Returns the page and the runs. Folders without records are a
    ValueError before anything is written.
    """
    runs = find_runs(folders)
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    drawn = draw_figures(runs)
    figures: list[dict[str, str]] = []
    for file, (title, needs) in FIGURES.items():
        (target / file).unlink(missing_ok=True)  # it is from an earlier report
        if file in drawn:
            save_picture(drawn[file], target / file)
        figures.append({"title": title, "needs": needs, "file": file if file in drawn else ""})
    described = [
        {
            "name": escape_markdown(run.name),
            "table": markdown_table(run.records),
            "pictures": copy_pictures(run, target),
        }
        for run in runs
    ]
    environment = Environment(loader=PackageLoader("hf_igpt.reporting"), keep_trailing_newline=True, autoescape=False)
    page = target / REPORT
    text = environment.get_template(f"{REPORT}.jinja").render(
        comparison=compare_with_paper(runs),
        figures=figures,
        runs=described,
        hardware=sorted({escape_markdown(record.hardware) for run in runs for record in run.records}),
    )
    with whole_file(page) as partial:
        partial.write_text(text, encoding="utf-8")
    return page, runs


# -- runs --------------------------------------------------------------------------------------------------------------


def find_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Runs below folders, by their paths; a run is the folder whose own, probe's and score's records belong together."""
    files: set[Path] = set()  # each once, also if one folder holds another
    for folder in map(Path, folders):
        files_below = [file for name in (RECORDS, PROBE, SCORE) for file in folder.rglob(name)]
        below = {own_file(folder, file.relative_to(folder).as_posix()).resolve() for file in files_below}
        if not below:
            raise ValueError(f"There are no records ({RECORDS}, {PROBE}, {SCORE}) in {folder}.")
        files |= below
    found: dict[Path, dict[str | None, list[Record]]] = {}
    for file in sorted(files, key=lambda file: (file.name != RECORDS, str(file))):
        home = file.parent.parent if file.parent.name in ("probe", "score") else file.parent
        milestone = home.name if home.parent.name == MILESTONES else None
        home = home.parent.parent if milestone else home
        found.setdefault(home, {}).setdefault(milestone, []).extend(read_records(file))
    runs = []
    for home, name in shorten_names(sorted(found)).items():
        own = found[home].pop(None, [])
        runs.append(Run(home, name, own, [found[home][step] for step in sorted(found[home], key=str)]))
    return runs


def shorten_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder's own name, with as many of its parents' as distinguish it from the others."""
    names = {}
    for folder in folders:
        length = 1
        while sum(other.parts[-length:] == folder.parts[-length:] for other in folders) > 1:
            length += 1
        names[folder] = "/".join(folder.parts[-length:])
    return names


def copy_pictures(run: Run, target: Path) -> dict[str, str]:
    """Copies of the pictures in a run's folder, by caption; paths are relative to `target`."""
    masked = any(record.objective == "masked" for record in run.records)
    pictures = {}
    for name, file in plots.find_pictures(run.folder, "masked" if masked else "causal").items():
        copy = Path("pictures", run.name, name.replace("/", "-"))
        own_file(target, copy.parent.as_posix()).mkdir(parents=True, exist_ok=True)
        with whole_file(target / copy) as partial:
            shutil.copyfile(plots.check_picture(run.folder, file), partial)
        pictures[plots.CAPTIONS[name]] = quote(copy.as_posix())
    return pictures


# -- which records -----------------------------------------------------------------------------------------------------


def is_probe(record: Record, split: str, labels_per_class: int | None = None) -> bool:
    """Whether a record is of a linear probe of one layer of a model that was trained without labels."""
    of_model = record.task == "linear probe" and record.baseline is None and record.started_from is None
    of_one_layer = record.layers is not None and len(record.layers) == 1
    return of_model and of_one_layer and (record.split, record.labels_per_class) == (split, labels_per_class)


def is_fine_tuned(record: Record, split: str) -> bool:
    """Whether a record is the accuracy of a model that was fine-tuned from pretrained weights."""
    of_model = record.task == "fine-tuning" and record.baseline is None and record.started_from == "pretrained"
    return of_model and (record.metric, record.split) == ("accuracy", split)


def is_generation(record: Record) -> bool:
    """Whether a record is of all held-out images, scored by a causal model after training that is not told their classes."""
    of_model = record.task == "generation" and record.baseline is None and record.objective == "causal"
    of_model &= record.told_classes is None
    return of_model and (record.metric, record.split) == ("nats_per_pixel", "held out")


# -- the paper's figures -----------------------------------------------------------------------------------------------


def draw_figures(runs: Sequence[Run]) -> dict[str, Image.Image]:
    """The paper's figures that can be drawn from what was measured, by file name."""
    drawn = {
        "layers.png": draw_layers(runs),
        "loss-and-probe.png": draw_loss_against_probe(runs),
        "objectives.png": draw_objectives(runs),
        "epochs.png": draw_epochs(runs),
    }
    return {file: picture for file, picture in drawn.items() if picture is not None}


def draw_layers(runs: Sequence[Run]) -> Image.Image | None:
    """Validation accuracy by layer [V2 Figure 2]."""
    probed = {
        run.name: [record for record in run.records if (record.task, record.split) == ("linear probe", "validation")]
        for run in runs
    }
    probed = {name: records for name, records in probed.items() if records}
    return plots.layer_curves(probed) if probed else None


def draw_loss_against_probe(runs: Sequence[Run]) -> Image.Image | None:
    """Held-out loss and probe accuracy of milestones [V2 Figure 3]."""
    courses: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        for records in run.milestones:
            accuracy = [record.value for record in records if is_probe(record, "test")]
            loss = [record.value for record in records if is_generation(record)]
            if loss and accuracy:
                courses.setdefault(run.name, []).append((loss[0], accuracy[0]))
    return plots.loss_against_probe(courses) if courses else None


def draw_objectives(runs: Sequence[Run]) -> Image.Image | None:
    """Causal and masked models of the same size on the same images [V2 Figure 4]."""
    groups: dict[tuple[str, str, str | None], dict[str, float]] = {}
    for record in (record for run in runs for record in run.records):
        if is_probe(record, "test") or is_fine_tuned(record, "test"):
            name = record.objective or ""
            name += f", {record.masks} mask{'s' if record.masks > 1 else ''}" if record.masks else ""
            bars = groups.setdefault((record.task, describe_images(record), record.size), {})
            bars[name] = max(record.value, bars.get(name, 0))
    groups = {
        group: bars
        for group, bars in groups.items()
        if any(name.startswith("causal") for name in bars) and any(name.startswith("masked") for name in bars)
    }
    if not groups:
        return None
    # Groups are named by what distinguishes them.
    shown = [True, *(len(set(parts)) > 1 for parts in list(zip(*groups, strict=True))[1:])]
    ordered = sorted(groups, key=lambda group: group[0] != "linear probe")
    return plots.accuracy_bars({"\n".join(map(str, compress(group, shown))): groups[group] for group in ordered})


def draw_epochs(runs: Sequence[Run]) -> Image.Image | None:
    """Validation accuracy over the epochs of fine-tuning."""
    courses = {}
    for run in runs:
        start = next((record.started_from for record in run.records if record.task == "fine-tuning"), None)
        points = read_accuracies(run.folder) if start else []
        if points:
            courses[f"{run.name}: {start}"] = points
    return plots.accuracy_courses(courses) if courses else None


def read_accuracies(folder: Path) -> list[tuple[float, float]]:
    """(epoch, validation accuracy) of each evaluation that a run's `trainer_state.json` tells of; a broken one: ValueError."""
    if not (folder / STATE).is_file():
        return []
    log = read_json(own_file(folder, STATE), dict, "the log of a run").get("log_history", [])
    try:
        points = [(entry["epoch"], entry["eval_accuracy"]) for entry in log if "eval_accuracy" in entry]
        return [(float(epoch), float(share)) for epoch, share in points]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / STATE} does not hold the log of a run: {error!r}") from error


# -- the paper's numbers -----------------------------------------------------------------------------------------------


def compare_with_paper(runs: Sequence[Run]) -> str:
    """A Markdown table: each kind of figure that was published, the best of ours for each data, and how its setting differs."""
    records = [record for run in runs for record in run.records]
    kinds: dict[str, list[Published]] = {}
    for figure in PUBLISHED:
        kinds.setdefault(name_kind(figure), []).append(figure)
    rows = []
    for kind, figures in kinds.items():
        best: dict[str | None, Record] = {}
        for record in records:
            if is_of_kind(record, figures[0]):
                held = best.setdefault(record.dataset, record)
                if (record.value < held.value) == (figures[0].task == "generation"):
                    best[record.dataset] = record
        for record in best.values():
            same = [figure for figure in figures if is_same_data(record, figure)]
            ours = f"{describe_model(record)}; {describe_images(record)}"
            cited, differences = cite(same or figures), describe_differences(record, (same or figures)[-1])
            rows.append([kind, format_value(record), ours, cited, differences])
        if not best:
            rows.append([kind, "not measured", "", cite(figures), ""])
    head = ["what", "ours", "which of ours", "OpenAI's", "what differs from the last of these"]
    return markdown_rows(head, rows)


def name_kind(figure: Published) -> str:
    """What a published figure is of, whatever the size and the data."""
    kind = {"generation": "generation, held out"}.get(figure.task, f"{figure.task}, test")
    kind += " (BERT)" if figure.objective == "masked" else ""
    kind += f", {figure.num_concatenated} layers together" if figure.num_concatenated > 1 else ""
    return kind + (f", {figure.labels_per_class} labels per class" if figure.labels_per_class else "")


def is_of_kind(record: Record, figure: Published) -> bool:
    """Whether a record measures what a published figure does, on whatever data."""
    if record.objective != figure.objective or record.baseline is not None:
        return False
    if figure.task == "generation":
        return is_generation(record)
    if figure.task == "fine-tuning":
        return is_fine_tuned(record, "test")
    if figure.num_concatenated > 1:
        together = record.layers is not None and len(record.layers) == figure.num_concatenated
        return together and (record.task, record.split) == ("linear probe", "test")
    return is_probe(record, "test", figure.labels_per_class)


def is_same_data(record: Record, figure: Published) -> bool:
    """Whether both are of the same images, whoever's copy: "uoft-cs/cifar10" is "CIFAR-10"."""
    ours, theirs = (name.split("/")[-1].lower().replace("-", "") for name in (record.dataset or "", figure.data))
    return ours == theirs


def cite(figures: Iterable[Published]) -> str:
    """Published figures with their sources."""
    return "; ".join(
        f"iGPT-{figure.size.upper()} {format_value(record_published(figure))} ({figure.data} at "
        f"{figure.image_size}x{figure.image_size}, {figure.source})"
        for figure in figures
    )


def describe_differences(record: Record, figure: Published) -> str:
    """How the setting of a record of ours differs from a published figure's, in numbers."""
    size = SIZES[figure.size]
    found = [] if is_same_data(record, figure) else [f"data {record.dataset}, not {figure.data}"]
    if record.image_size != (figure.image_size, figure.image_size):
        ours = "x".join(map(str, record.image_size or ("unknown",)))
        found.append(f"{ours} pixels, not {figure.image_size}x{figure.image_size}")
    theirs: dict[str, Any] = {"parameters": count_parameters(figure.size)}
    if record.task != "fine-tuning":  # of which the paper does not state how many images it saw
        theirs["images_seen"] = size.batch_size * (size.max_steps or 0)
    for name, number in theirs.items():
        if (own := getattr(record, name)) is not None:
            found.append(f"{own:,} {name.replace('_', ' ')}, not {number:,}")
    return "; ".join(found)


@lru_cache
def count_parameters(size: str) -> int:
    """Trainable parameters of a preset with its head."""
    with torch.device("meta"):
        return ImageGPTForCausalImageModeling(ImageGPTConfig.from_preset(size)).num_parameters()
