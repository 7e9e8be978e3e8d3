"""Model cards: a template filled from records, recipes and configurations, and nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_imagegpt import NEEDS_HF_IGPT, ImageGPTConfig
from ..evaluation.baselines import UNIFORM
from ..evaluation.records import (
    Record,
    describe_images,
    describe_model,
    escape_markdown,
    markdown_table,
    record_published,
)
from ..presets import ADAM_BETAS, IMAGE_SIZE, PUBLISHED, SIZES, WEIGHT_DECAY


TEMPLATE = Path(__file__).parent / "templates" / "card.md.jinja"
METRICS = {"nats_per_pixel": "nats per pixel", "accuracy": "accuracy"}  # those that model-index shows
TASKS = {  # head -> the Hub's name of its task, its Auto class
    "ImageGPTForCausalImageModeling": ("unconditional-image-generation", "AutoModelForCausalLM"),
    "ImageGPTForMaskedImageModeling": ("image-feature-extraction", "AutoModelForMaskedImageModeling"),
    "ImageGPTForImageClassification": ("image-classification", "AutoModelForImageClassification"),
    "ImageGPTModel": ("image-feature-extraction", "AutoModel"),
}
OPENAI_URL = "https://github.com/openai/image-gpt"
OPENAI = {
    "license": "other",
    "license_name": "modified-mit",
    "license_link": "https://github.com/openai/image-gpt/blob/master/LICENSE",
}


def render_card(
    repo_id: str,
    config: ImageGPTConfig,
    grid: tuple[int, int],
    crops: bool,
    recipe: Mapping[str, Any],
    records: Sequence[Record],
    pictures: Mapping[str, str],
    licence: str = "apache-2.0",
    folder: str = "",
    palette_picture: bool = True,
    code: bool = True,
) -> str:
    """The card as Markdown with metadata.

    grid: (height, width) of the images; crops: whether they are central windows of what is given. recipe: what `run.json`
    says of how the model was made. records: what was measured; OpenAI's figures are added if the weights are theirs.
    pictures: caption -> file in `folder`, which also holds `palette.png` unless `palette_picture` is False. code: whether the
    repository holds the code.
    """
    name = repo_id.split("/")[-1]
    openai = find_openai_size(config, recipe)
    theirs = [f for f in PUBLISHED if (f.size, f.objective, f.image_size) == (openai, config.objective, IMAGE_SIZE)]
    records = [*records, *map(record_published, theirs)]
    heads = config.architectures or ["ImageGPTModel"]
    task = TASKS[heads[0]][0]
    causal, classes = (any(head.endswith(end) for head in heads) for end in ("CausalImageModeling", "Classification"))
    rights: dict[str, Any] = {"license": licence} if openai is None else OPENAI
    metadata = ModelCardData(
        **rights,
        library_name="transformers",
        pipeline_tag=task,
        tags=["image-gpt", "imagegpt", "hf_igpt"],
        datasets=[str(recipe["hub dataset"])] if recipe.get("hub dataset") else None,
        model_name=name,
        eval_results=[
            make_eval_result(record, task) for record in records if record.metric in METRICS and record.baseline is None
        ],
    )
    facts = {**recipe, **describe_openai_recipe(openai)}
    facts = {escape_markdown(key): escape_markdown(str(value)) for key, value in facts.items() if value is not None}
    facts["shape"] = f"{config.n_layer} blocks of width {config.n_embd}, {config.n_head} heads"
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        summary=summarize(config, grid, openai),
        shown=pictures,
        folder=folder,
        palette_picture=palette_picture,
        plain=config.fits_transformers,
        code=code,
        trust=", trust_remote_code=True" if code else "",
        n_class_tokens=config.n_class_tokens,
        crops=crops,
        needs=NEEDS_HF_IGPT,
        causal=causal,
        classes=classes,
        auto_class=auto_class(config),
        height=grid[0],
        width=grid[1],
        n_colors=config.vocab_size - 1,
        data=escape_markdown(describe_data(recipe, openai)),
        facts=facts,
        counts=any(record.baseline == UNIFORM for record in records),
        table=markdown_table(records) if records else "",
        licence=f"[OpenAI's modified MIT licence]({OPENAI['license_link']})." if openai else f"{licence}.",
    ).content


def auto_class(config: ImageGPTConfig) -> str:
    """The Auto class that loads a model of `config` with its head."""
    return TASKS[(config.architectures or ["ImageGPTModel"])[0]][1]


def find_openai_size(config: ImageGPTConfig, recipe: Mapping[str, Any]) -> str | None:
    """Which of OpenAI's models these weights are, if they were converted from one of that shape."""
    if "converted from" not in recipe:
        return None
    shape = (config.n_layer, config.n_embd, config.n_head)
    sizes = [name for name in "sml" if shape == (SIZES[name].n_layer, SIZES[name].n_embd, SIZES[name].n_head)]
    published = sizes and config.objective == "causal" and (config.n_positions, config.vocab_size) == (1024, 513)
    return sizes[0] if published else None


def describe_openai_recipe(size: str | None) -> dict[str, str]:
    """How OpenAI trained a size, as far as the paper says; {} for None."""
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


def make_eval_result(record: Record, task: str) -> EvalResult:
    """A record as the Hub's model-index shows it; `task` is the model's own."""
    dataset = record.dataset or ""
    published: dict[str, Any] = (
        {} if record.reference is None else {"source_name": f"OpenAI, {record.reference}", "source_url": OPENAI_URL}
    )
    return EvalResult(
        task_type=task if record.metric == "nats_per_pixel" else "image-classification",
        dataset_type=dataset.lower().replace(" ", "-"),
        dataset_name=describe_images(record),
        dataset_split=record.split,
        metric_type=record.metric,
        metric_name=METRICS[record.metric]
        + (f" ({describe_model(record)})" if record.reference else "")
        + (", told the class" if record.told_classes else ""),
        metric_value=round(record.value, 6),
        **published,
    )


def summarize(config: ImageGPTConfig, grid: tuple[int, int], openai: str | None) -> str:
    """What the model is, in two or three sentences."""
    what = {
        "causal": "learned to predict each pixel from those before it, without labels"
        + (
            ", and so draws and completes images"
            if "ImageGPTForCausalImageModeling" in (config.architectures or [])
            else ""
        ),
        "masked": "learned to predict hidden pixels from all others, without labels (BERT-style)",
    }[config.objective]
    origin = f"OpenAI's iGPT-{openai.upper()}, converted from its TensorFlow checkpoint: an" if openai else "An"
    if config.n_class_tokens and "ImageGPTForCausalImageModeling" in (config.architectures or []):
        what = "learned to predict each pixel from those before it and from the class of the image"
        what += f", and so draws and completes images of any of {config.n_class_tokens} classes, or of none"
    text = (
        f"{origin} [Image GPT](https://cdn.openai.com/papers/Generative_Pretraining_from_Pixels_V2.pdf) of "
        f"{config.n_layer} blocks of width {config.n_embd} for images of {grid[0]}x{grid[1]} pixels in "
        f"{config.vocab_size - 1} colours. It {what}."
    )
    if "ImageGPTForImageClassification" in (config.architectures or []):
        text += f" Its classification head knows {config.num_labels} classes."
    return text


def describe_data(recipe: Mapping[str, Any], openai: str | None) -> str:
    """What the model was trained on, as far as it is known."""
    if openai:
        return "OpenAI trained it on ILSVRC-2012's training images, without their labels (paper 3.1)."
    if "converted from" in recipe:
        return "Converted from a TensorFlow checkpoint; its data are not known here."
    return f"Trained on {recipe['data']}." if "data" in recipe else "Nothing is known here of its data."
