"""Model cards, and reports of several runs: templates filled from records, recipes and configurations, and nothing else."""

import base64
import json
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import compress
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment

from . import data, plots, probing
from .configuration_imagegpt import NEEDS_HF_IGPT, ImageGPTConfig
from .evaluation import RECORDS, SCORE, Record, markdown_table, read_records
from .modeling_imagegpt import ImageGPTForCausalImageModeling
from .presets import ADAM_BETAS, IMAGE_SIZE, N_COLORS, PUBLISHED, SIZES, WEIGHT_DECAY, Published


_METRICS = {"nats_per_pixel": "nats per pixel", "accuracy": "accuracy"}  # those that model-index shows
_TASKS = {  # head -> the Hub's name of its task, its Auto class
    "ImageGPTForCausalImageModeling": ("unconditional-image-generation", "AutoModelForCausalLM"),
    "ImageGPTForMaskedImageModeling": ("image-feature-extraction", "AutoModelForMaskedImageModeling"),
    "ImageGPTForImageClassification": ("image-classification", "AutoModelForImageClassification"),
    "ImageGPTModel": ("image-feature-extraction", "AutoModel"),
}
_OPENAI = {
    "license": "other",
    "license_name": "modified-mit",
    "license_link": "https://github.com/openai/image-gpt/blob/master/LICENSE",
}

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ summary }}
{% for caption, picture in shown.items() %}
![{{ caption }}]({{ folder }}{{ picture }})
{% endfor %}
## How to load it

{% if plain -%}
With transformers alone, nothing else installed:

```python
from transformers import AutoImageProcessor, AutoModel{{ ", pipeline" if classes else "" }}

processor = AutoImageProcessor.from_pretrained("{{ repo_id }}")
{% if classes -%}
classify = pipeline("image-classification", "{{ repo_id }}")
{% endif -%}
backbone = AutoModel.from_pretrained("{{ repo_id }}")
```

That runs transformers' own Image GPT on these weights: the same outputs, but without likelihoods of whole images and
without a correct static cache{% if crops %}; photos that are not square it squashes, where the model was made for central squares: crop
them yourself{% endif %}. Without these limits, this repository's own code:
{%- else -%}
{{ needs }} Or use the code in this repository:
{%- endif %}

```python
from transformers import AutoImageProcessor, {{ auto_class }}, pipeline

processor = AutoImageProcessor.from_pretrained("{{ repo_id }}", trust_remote_code=True)
model = {{ auto_class }}.from_pretrained("{{ repo_id }}", trust_remote_code=True)
{% if causal -%}
pictures = processor.decode(model.generate())  # whole images, by the paper's sampling
complete = pipeline("image-completion", "{{ repo_id }}", trust_remote_code=True)
completions = complete("photo.png", num_completions=3)  # the upper half is kept
{% endif -%}
{% if classes -%}
classify = pipeline("image-classification", "{{ repo_id }}", trust_remote_code=True)
{% endif -%}
```

With the package (`pip install hf_igpt`, then `import hf_igpt`) the same lines work without `trust_remote_code`, and there are
training, fine-tuning and more.

## What it is for

Study of generative pretraining, features for linear probes, fine-tuning on small images, completing and scoring images.
Not for decisions about people, and not for pictures that must be true: it draws what is likely among its training images,
with whatever these over- and under-represent, and nothing filters what it draws.
It sees {{ height }}x{{ width }} pixels in {{ n_colors }} colours: detail beyond that is lost before the model starts.

## Data and palette

{{ data }} Every pixel becomes the nearest of {{ n_colors }} colours{% if palette_picture %}:

![The palette, and a rainbow drawn with it]({{ folder }}palette.png)
{%- else %}.{% endif %}

## How it was made

| | |
|---|---|
{% for key, value in facts.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
## Results
{% if table %}
{{ table }}

Nats per pixel are means of -log p over all pixels, base e, of colour tokens: not comparable with bits per dimension of models
of raw pixels.{% if counts %} "Counts" are models that only count, on the same tokens.{% endif %}
{% else %}
Nothing was measured.
{% endif %}
## Licence and citation

{{ licence }}

```bibtex
@inproceedings{chen2020generative,
  title     = {Generative Pretraining from Pixels},
  author    = {Chen, Mark and Radford, Alec and Child, Rewon and Wu, Jeffrey and Jun, Heewoo and Luan, David and Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning},
  year      = {2020}
}
```
"""


def render(
    repo_id: str,
    config: ImageGPTConfig,
    grid: tuple[int, int],
    crops: bool,
    recipe: dict,
    records: list[Record],
    pictures: dict[str, str],
    licence: str = "apache-2.0",
    folder: str = "",
    palette_picture: bool = True,
) -> str:
    """The card as Markdown with metadata.

    grid: (height, width) of the images; crops: whether they are central squares of what is given. recipe: what `run.json` says of how the model was made. records: what was
    measured; figures of OpenAI's are added where the weights are theirs. pictures: caption -> file, in `folder`, where
    `palette.png` is too unless `palette_picture` is False.
    """
    name = repo_id.split("/")[-1]
    openai = _openai_size(config, recipe)
    theirs = [f for f in PUBLISHED if (f.size, f.objective, f.image_size) == (openai, config.objective, IMAGE_SIZE)]
    records = [*records, *map(_published, theirs)]
    heads = config.architectures
    task = _TASKS[heads[0]][0]
    causal, classes = (any(head.endswith(end) for head in heads) for end in ("CausalImageModeling", "Classification"))
    metadata = ModelCardData(
        **({"license": licence} if openai is None else _OPENAI),
        library_name="transformers",
        pipeline_tag=task,
        tags=["image-gpt", "imagegpt", "hf_igpt"],
        datasets=[recipe["hub dataset"]] if recipe.get("hub dataset") else None,
        model_name=name,
        eval_results=[_result(record, task) for record in records if record.metric in _METRICS and not record.baseline],
    )
    facts = {key: value for key, value in (recipe | _recipe_of_openai(openai)).items() if value is not None}
    facts["shape"] = f"{config.n_layer} blocks of width {config.n_embd}, {config.n_head} heads"
    return ModelCard.from_template(
        metadata,
        template_str=_TEMPLATE,
        name=name,
        repo_id=repo_id,
        summary=_summary(config, grid, openai),
        shown=pictures,
        folder=folder,
        palette_picture=palette_picture,
        plain=config.objective == "causal" and not config.sos_inputs,
        crops=crops,
        needs=NEEDS_HF_IGPT,
        causal=causal,
        classes=classes,
        auto_class=auto_class(config),
        height=grid[0],
        width=grid[1],
        n_colors=config.vocab_size - 1,
        data=_data(recipe, openai),
        facts=facts,
        counts=any(record.baseline for record in records),
        table=markdown_table(records) if records else "",
        licence=f"[OpenAI's modified MIT licence]({_OPENAI['license_link']})." if openai else f"{licence}.",
    ).content


def auto_class(config: ImageGPTConfig) -> str:
    """The Auto class that loads a model of `config` with its head."""
    return _TASKS[config.architectures[0]][1]


def _openai_size(config: ImageGPTConfig, recipe: dict) -> str | None:
    """Which of OpenAI's models these weights are, if they were converted from one of that shape."""
    if "converted from" not in recipe:
        return None
    shape = (config.n_layer, config.n_embd, config.n_head)
    sizes = [name for name in "sml" if shape == (SIZES[name].n_layer, SIZES[name].n_embd, SIZES[name].n_head)]
    published = sizes and config.objective == "causal" and (config.n_positions, config.vocab_size) == (1024, 513)
    return sizes[0] if published else None


def _recipe_of_openai(size: str | None) -> dict:
    if size is None:
        return {}
    preset = SIZES[size]
    return {
        "batch": f"{preset.batch_size} images (paper A.1)",
        "steps": f"{preset.max_steps:,} (paper A.1)",
        "optimiser": f"Adam, betas {ADAM_BETAS[0]} and {ADAM_BETAS[1]}, weight decay {WEIGHT_DECAY:g} (paper A.1)",
        "learning rate": f"{preset.learning_rate_for('causal', IMAGE_SIZE):g}, one epoch of warm-up, then cosine (paper, Table 5)",
        "augmentation": "random crops (paper 3.1)",
        "precision": "float32 (paper 3.4)",
    }


def _published(figure: Published) -> Record:
    labels = f" with {figure.labels_per_class} labels per class" if figure.labels_per_class else ""
    return Record(
        metric="nats_per_pixel" if figure.task == "generation" else "accuracy",
        value=figure.value,
        unit="nats/pixel" if figure.task == "generation" else "fraction",
        split="validation" if figure.data == "ILSVRC-2012" else "test",
        n={"ILSVRC-2012": 50_000, "STL-10": 8_000}.get(figure.data, 10_000),
        seed=None,
        model=f"iGPT-{figure.size.upper()}, {figure.task}{labels}: OpenAI's figure ({figure.source})",
        data=f"{figure.data}, {figure.image_size}x{figure.image_size}, {N_COLORS} colours",
        revision="openai/image-gpt",
        hardware="OpenAI's",
        reference=figure.source,
    )


def _result(record: Record, task: str) -> EvalResult:
    dataset = record.data.split(", ")[0]
    published = (
        {} if record.reference is None else {"source_name": f"OpenAI, {record.reference}", "source_url": _OPENAI_URL}
    )
    return EvalResult(
        task_type=task if record.metric == "nats_per_pixel" else "image-classification",
        dataset_type=dataset.lower().replace(" ", "-"),
        dataset_name=record.data,
        dataset_split=record.split,
        metric_type=record.metric,
        metric_name=_METRICS[record.metric] + (f" ({record.model})" if record.reference else ""),
        metric_value=round(record.value, 6),
        **published,
    )


_OPENAI_URL = "https://github.com/openai/image-gpt"


def _summary(config: ImageGPTConfig, grid: tuple[int, int], openai: str | None) -> str:
    what = {
        "causal": "learned to predict each pixel from those before it, without labels"
        + (", and so draws and completes images" if "ImageGPTForCausalImageModeling" in config.architectures else ""),
        "masked": "learned to predict hidden pixels from all others, without labels (BERT-style)",
    }[config.objective]
    origin = f"OpenAI's iGPT-{openai.upper()}, converted from its TensorFlow checkpoint: an" if openai else "An"
    text = (
        f"{origin} [Image GPT](https://cdn.openai.com/papers/Generative_Pretraining_from_Pixels_V2.pdf) of "
        f"{config.n_layer} blocks of width {config.n_embd} for images of {grid[0]}x{grid[1]} pixels in "
        f"{config.vocab_size - 1} colours. It {what}."
    )
    if "ImageGPTForImageClassification" in config.architectures:
        text += f" Its classification head knows {config.num_labels} classes."
    return text


def _data(recipe: dict, openai: str | None) -> str:
    if openai:
        return "OpenAI trained it on ILSVRC-2012's training images, without their labels (paper 3.1)."
    if "converted from" in recipe:
        return "Converted from a TensorFlow checkpoint; its data are not known here."
    return f"Trained on {recipe['data']}." if "data" in recipe else "Nothing is known here of its data."


# -- reports -----------------------------------------------------------------------------------------------------------


_RUN_PICTURES = {  # file of a run's folder -> caption
    "samples.png": "Images drawn by the model",
    "completions.png": "Images given, their upper halves, completions",
    "masked.png": "Images, what the masked model saw of them, and what it made of that",
    "training.png": "The course of training",
    "confusion.png": "Classes of the test images, and what the model says",
    "probe/probe.png": "Validation accuracy of probes by layer",
    "score/surprise.png": "Surprise of each pixel, in nats",
    "score/histogram.png": "Nats per pixel of images",
    "palette.png": "The palette, and a rainbow drawn with it",
}
_FIGURES = {  # file -> title, what it needs
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
_MARKDOWN = """# Image GPT: what was measured

## Beside the paper

{{ beside }}
{% for figure in figures %}
## {{ figure.title }}
{% if figure.file %}
![{{ figure.title }}]({{ figure.file }})
{% else %}
Not drawn: it needs {{ figure.needs }}.
{% endif -%}
{% endfor -%}
{% for run in runs %}
## {{ run.name }}

{{ run.table }}
{% endfor %}"""
_HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Image GPT: what was measured</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top }
td.value { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
tr.baseline { color: #777 }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; max-width: 48% }
figure.wide { max-width: 100% }
img { max-width: 100%; image-rendering: auto } figcaption { font-size: 13px; color: #555 }
h2 { margin-top: 2.5rem; border-bottom: 2px solid #eee } nav a { margin-right: 1rem } .missing { color: #777 }
</style>
<h1>Image GPT: what was measured</h1>
<nav>{% for run in runs %}<a href="#run-{{ loop.index }}">{{ run.name }}</a>{% endfor %}</nav>
<h2>Beside the paper</h2>
<p>The paper's models saw ILSVRC-2012 about a hundred times. Read each row's stated difference before comparing. If several runs used
the same data, the best is shown.</p>
<table><tr>{% for head in beside_head %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in beside_rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for figure in figures %}<h2>{{ figure.title }}</h2>
{% if figure.file %}<figure class="wide"><img alt="{{ figure.title }}" src="{{ figure.data }}"></figure>
{% else %}<p class="missing">Not drawn: it needs {{ figure.needs }}.</p>
{% endif %}{% endfor %}
{% for run in runs %}<h2 id="run-{{ loop.index }}">{{ run.name }}</h2>
<table><tr><th>what</th><th>data</th><th>images</th><th>value</th></tr>
{% for record in run.records %}<tr{% if record.baseline %} class="baseline"{% endif %}><td>{{ record.model }}</td>
<td>{{ record.data }}, {{ record.split }}</td><td class="value">{{ "{:,}".format(record.n) }}</td><td class="value">{{ show(record) }}</td></tr>
{% endfor %}</table>
{% for caption, picture in run.pictures.items() %}<figure><img alt="{{ caption }}" src="{{ picture }}">
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}{% endfor %}
<p class="missing">{{ hardware | join("; ") }}</p>
</html>
"""


@dataclass
class ReportArguments:
    """Which runs, and where to."""

    folders: list[str] = field(
        metadata={"help": "Folders of runs: of pretraining, fine-tuning, probes, scores; what lies in them is found."}
    )
    output_dir: str = field(default="outputs/report", metadata={"help": "Where index.html and report.md are written."})
    probe_milestones: bool = field(
        default=False,
        metadata={"help": "First probe the milestones that were not probed yet, on the labelled images named here."},
    )


@dataclass
class _Run:
    """A run's folder and what was measured in it; `milestones` are checkpoints of it, in their order."""

    folder: Path
    name: str
    records: list[Record]
    milestones: list[list[Record]]


def report(args: ReportArguments, data_args: data.DataArguments) -> Path:
    """Gather the records below some folders into `index.html`, which holds its pictures, and `report.md` with figures beside.

    Returns the page. Folders without records are a ValueError before anything is written.
    """
    runs = _runs(args.folders)
    if args.probe_milestones:
        _probe_milestones(args.folders, data_args)
        runs = _runs(args.folders)
    target = Path(args.output_dir)
    target.mkdir(parents=True, exist_ok=True)
    drawn = _figures(runs)
    figures = []
    for file, (title, needs) in _FIGURES.items():
        (target / file).unlink(missing_ok=True)  # of an earlier report
        if file in drawn:
            drawn[file].save(target / file)
        found = {"file": file, "data": _embedded(target / file)} if file in drawn else {}
        figures.append({"title": title, "needs": needs} | found)
    head, rows = _beside_the_paper(runs)
    described = [
        {"name": run.name, "records": run.records, "table": markdown_table(run.records), "pictures": _pictures_of(run)}
        for run in runs
    ]
    fields = {"runs": described, "figures": figures, "beside_head": head, "beside_rows": rows, "show": _shown}
    fields["beside"] = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
    fields["hardware"] = sorted({record.hardware for run in runs for record in run.records})
    (target / "report.md").write_text(Environment().from_string(_MARKDOWN).render(fields), encoding="utf-8")
    page = target / "index.html"
    page.write_text(Environment(autoescape=True).from_string(_HTML).render(fields), encoding="utf-8")
    print(f"Wrote {page} and report.md: {sum(len(run.records) for run in runs)} records of {len(runs)} runs")
    return page


def _probe_milestones(folders: list[str], data_args):
    names = [path for folder in folders for path in sorted(Path(folder).rglob(f"{probing.MILESTONES}/step-*"))]
    names = [str(path) for path in names if not (path / "probe" / probing.PROBE).is_file()]
    if names:
        probing.probe(probing.ProbeArguments(names, baselines=False, knn=False), data_args)


def _runs(folders: list[str]) -> list[_Run]:
    """Runs below folders, in their order; a run is the folder whose own, probe's and score's records belong together."""
    files = set()  # each once, also where one folder holds another
    for folder in map(Path, folders):
        below = {file.resolve() for name in (RECORDS, probing.PROBE, SCORE) for file in folder.rglob(name)}
        if not below:
            raise ValueError(f"There are no records ({RECORDS}, {probing.PROBE}, {SCORE}) in {folder}.")
        files |= below
    found: dict[Path, dict] = {}
    for file in sorted(files, key=lambda file: (file.name != RECORDS, str(file))):
        home = file.parent.parent if file.parent.name in ("probe", "score") else file.parent
        milestone = home.name if home.parent.name == probing.MILESTONES else None
        home = home.parent.parent if milestone else home
        found.setdefault(home, {}).setdefault(milestone, []).extend(read_records(file))
    ordered = sorted(found)
    names = _short_names(ordered)
    return [
        _Run(home, names[home], found[home].pop(None, []), [found[home][step] for step in sorted(found[home])])
        for home in ordered
    ]


def _short_names(folders: list[Path]) -> dict[Path, str]:
    """Each folder's own name, with so many of its parents' as tell it from the others."""
    names = {}
    for folder in folders:
        length = 1
        while sum(other.parts[-length:] == folder.parts[-length:] for other in folders) > 1:
            length += 1
        names[folder] = "/".join(folder.parts[-length:])
    return names


def _is_probe(record: Record, split: str, few_labels: bool = False) -> bool:
    """Whether a record is of a linear probe of one layer of a model that was trained without labels."""
    settings = record.settings
    trained = settings.get("of") == "trained" and "fine-tuned" not in settings
    linear = trained and settings["probe"].startswith("logistic regression")
    return linear and record.split == split and "layer" in settings and ("labels per class" in settings) == few_labels


def _is_fine_tuned(record: Record, split: str) -> bool:
    settings = record.settings
    return settings.get("started from") == "pretrained" and (record.metric, record.split) == ("accuracy", split)


def _is_generation(record: Record) -> bool:
    """Whether a record is of all held-out images: `score`, whose records name a set, may have read some that are easy."""
    plain = record.metric == "nats_per_pixel" and record.split == "held out" and not record.baseline
    plain = plain and "set" not in record.settings
    return plain and record.settings.get("objective") == "causal"


def _figures(runs: list[_Run]) -> dict:
    """The paper's figures that can be drawn from what was measured, as PIL images by file name."""
    figures = {}
    probed = {}
    for run in runs:
        records = [record for record in run.records if "of" in record.settings and record.split == "validation"]
        if records:
            probed[run.name] = [record for record in records if record.settings["probe"] != probing.KNN]
    if probed:
        figures["layers.png"] = plots.layer_curves(probed)
    courses = {}
    for run in runs:
        points = []
        for records in run.milestones:
            accuracy = [record.value for record in records if _is_probe(record, "test")]
            loss = [record.value for record in records if _is_generation(record)]
            points += [(loss[0], accuracy[0])] if loss and accuracy else []
        if points:
            courses[run.name] = points
    if courses:
        figures["loss-and-probe.png"] = plots.loss_against_probe(courses)
    groups: dict[tuple, dict[str, float]] = {}  # only what is of the same images and the same size is comparable
    for run in runs:
        for record in run.records:
            kind = (
                "linear probe"
                if _is_probe(record, "test")
                else "fine-tuning"
                if _is_fine_tuned(record, "test") and not record.baseline
                else None
            )
            if kind:
                masks = record.settings.get("masks")
                name = f"masked, {masks} mask{'s' if masks > 1 else ''}" if masks else record.settings["objective"]
                bars = groups.setdefault((kind, record.data, record.settings.get("size")), {})
                bars[name] = max(record.value, bars.get(name, 0))
    groups = {group: bars for group, bars in groups.items() if len({name.split(",")[0] for name in bars}) == 2}
    if groups:
        # Groups are named by what tells them apart.
        shown = [True, *(len(set(parts)) > 1 for parts in list(zip(*groups, strict=True))[1:])]
        ordered = sorted(groups, key=lambda group: group[0] != "linear probe")
        named = {"\n".join(map(str, compress(group, shown))): groups[group] for group in ordered}
        figures["objectives.png"] = plots.accuracy_bars(named)
    epochs = {}
    for run in runs:
        start = next((r.settings["started from"] for r in run.records if "started from" in r.settings), None)
        if start:
            state = run.folder / "trainer_state.json"
            log = json.loads(state.read_text())["log_history"] if state.is_file() else []
            points = [(entry["epoch"], entry["eval_accuracy"]) for entry in log if "eval_accuracy" in entry]
            if points:
                epochs[f"{run.name}: {start}"] = points
    if epochs:
        figures["epochs.png"] = plots.accuracy_courses(epochs)
    return figures


def _beside_the_paper(runs: list[_Run]) -> tuple[list[str], list[list[str]]]:
    """A table: each kind of figure that was published, and for each of our data the best of ours and how its setting differs."""
    records = [record for run in runs for record in run.records]
    kinds: dict[str, list[Published]] = {}
    for figure in PUBLISHED:
        kind = {"generation": "generation, held out"}.get(figure.task, f"{figure.task}, test")
        kind += " (BERT)" if figure.objective == "masked" else ""
        kind += f", {figure.num_concatenated} layers together" if figure.num_concatenated > 1 else ""
        kind += f", {figure.labels_per_class} labels per class" if figure.labels_per_class else ""
        kinds.setdefault(kind, []).append(figure)
    rows = []
    for kind, figures in kinds.items():
        best: dict[str, Record] = {}
        for record in records:
            if _is_of_the_kind_of(record, figures[0]):
                held = best.setdefault(_data_of(record), record)
                if (record.value < held.value) == (figures[0].task == "generation"):
                    best[_data_of(record)] = record
        for record in best.values():
            same = [figure for figure in figures if _plain(figure.data) == _plain(_data_of(record))]
            row = [kind, _shown(record), f"{record.model}; {record.data}", _cited(same or figures)]
            rows.append([*row, _differences(record, (same or figures)[-1])])
        if not best:
            rows.append([kind, "not measured", "", _cited(figures), ""])
    return ["what", "ours", "which of ours", "OpenAI's", "what differs from the last of these"], rows


def _data_of(record: Record) -> str:
    return record.data.split(", ")[0]


def _plain(name: str) -> str:
    return name.split("/")[-1].lower().replace("-", "")


def _cited(figures: list[Published]) -> str:
    return "; ".join(
        f"iGPT-{figure.size.upper()} {_shown(_published(figure))} ({figure.data} at {figure.image_size}x{figure.image_size}, "
        f"{figure.source})"
        for figure in figures
    )


def _is_of_the_kind_of(record: Record, figure: Published) -> bool:
    if record.settings.get("objective") != figure.objective or record.baseline:
        return False
    if figure.task == "generation":
        return _is_generation(record)
    if figure.task == "fine-tuning":
        return _is_fine_tuned(record, "test")
    if figure.num_concatenated > 1:
        return len(record.settings.get("layers", [])) == figure.num_concatenated and record.split == "test"
    few = figure.labels_per_class
    return _is_probe(record, "test", bool(few)) and record.settings.get("labels per class") == few


def _differences(record: Record, figure: Published) -> str:
    """How the setting of a record of ours differs from a published figure's, in numbers."""
    parameters, batch, steps = _parameters(figure.size), SIZES[figure.size].batch_size, SIZES[figure.size].max_steps
    found = []
    name, size = record.data.split(", ")[:2]
    if _plain(name) != _plain(figure.data):
        found.append(f"data {name}, not {figure.data}")
    if size != f"{figure.image_size}x{figure.image_size}":
        found.append(f"{size} pixels, not {figure.image_size}x{figure.image_size}")
    for key, theirs in (("parameters", parameters), ("images seen", batch * steps)):
        fine_tuned = "started from" in record.settings  # of which the paper does not state how many images it saw
        if key in record.settings and not (fine_tuned and key == "images seen"):
            found.append(f"{record.settings[key]:,} {key}, not {theirs:,}")
    return "; ".join(found)


@lru_cache
def _parameters(size: str) -> int:
    with torch.device("meta"):
        return ImageGPTForCausalImageModeling(ImageGPTConfig.from_preset(size)).num_parameters()


def _shown(record: Record) -> str:
    deviation = record.settings.get("deviation")
    if record.unit == "fraction":
        return f"{100 * record.value:.1f}{f' ± {100 * deviation:.1f}' if deviation else ''} %"
    return f"{record.value:.4f} {record.unit}"


def _pictures_of(run: _Run) -> dict[str, str]:
    """Pictures that lie in a run's folder, by caption, embedded."""
    found = {caption: run.folder / file for file, caption in _RUN_PICTURES.items()}
    if not found["Images drawn by the model"].is_file():
        drawn = sorted((run.folder / "samples").glob("step-*.png"))
        masked = any(record.settings.get("objective") == "masked" for record in run.records)
        caption = _RUN_PICTURES["masked.png" if masked else "samples.png"]
        if drawn:
            found[caption] = drawn[-1]
    return {caption: _embedded(file) for caption, file in found.items() if file.is_file()}


def _embedded(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
