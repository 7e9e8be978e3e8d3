"""Model cards: one template, filled from a configuration, a recipe and records, and from nothing else."""

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration_imagegpt import NEEDS_HF_IGPT, ImageGPTConfig
from .evaluation import Record, markdown_table
from .presets import ADAM_BETAS, IMAGE_SIZE, PUBLISHED, SIZES, WEIGHT_DECAY


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
    records = [*records, *(_published(figure) for figure in PUBLISHED if figure.size == openai)]
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


def _published(figure) -> Record:
    return Record(
        metric="nats_per_pixel" if figure.task == "generation" else "accuracy",
        value=figure.value,
        unit="nats/pixel" if figure.task == "generation" else "fraction",
        split="validation" if figure.data == "ILSVRC-2012" else "test",
        n={"ILSVRC-2012": 50_000, "STL-10": 8_000}.get(figure.data, 10_000),
        seed=None,
        model=f"iGPT-{figure.size.upper()}, {figure.task}: OpenAI's figure ({figure.source})",
        data=f"{figure.data}, 32x32, 512 colours",
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
        "causal": "learned to predict each pixel from those before it, without labels, and so draws and completes images",
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
