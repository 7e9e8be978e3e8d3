"""Model cards: what a card says for each kind of model; those in model_cards/ are sound."""

import ast
import re
from pathlib import Path

import pytest
from conftest import small_config
from huggingface_hub import ModelCard

from hf_igpt.evaluation.records import Record
from hf_igpt.publishing.cards import render_card


FOLDER = Path(__file__).parent.parent / "model_cards"
CARDS = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}


def card(records=(), recipe=None, **options):
    config = small_config(**options)
    return render_card("org/name", config, (8, 8), True, recipe or {"data": "noise"}, list(records), {})


@pytest.mark.parametrize("name", CARDS)
def test_cards_are_sound(name):
    text = CARDS[name]
    for picture in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (FOLDER / picture).is_file(), picture
    for snippet in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        ast.parse(snippet)
    data = ModelCard(text).data
    assert data.library_name == "transformers" and data.pipeline_tag and data.license


def test_openais_figures_are_marked_as_theirs():
    for size, nats, probe in (("s", 2.0895, "41.9 %"), ("m", 2.0614, "54.5 %"), ("l", 2.0466, "60.3 %")):
        text = CARDS[f"igpt-{size}.md"]
        rows = [line for line in text.splitlines() if line.startswith("| iGPT-")]
        assert all("OpenAI's figure" in row for row in rows)
        assert any(f"{nats} nats/pixel" in row for row in rows) and any(probe in row for row in rows)
        results = ModelCard(text).data.eval_results
        assert all(result.source_name.startswith("OpenAI") for result in results)
        assert results[0].metric_value == nats
    # A checkpoint of another shape, or not converted, has none of them.
    assert "OpenAI" not in card(architectures=["ImageGPTForCausalImageModeling"], recipe={"converted from": "x"})


def test_measured_results_are_metadata_and_baselines_are_not():
    fields = {"task": "generation", "split": "test", "n": 10, "seed": 0, "dataset": "noise", "image_size": (8, 8)}
    nats = {"metric": "nats_per_pixel", "unit": "nats/pixel"} | fields
    records = [
        Record(value=1.25, **nats),
        Record(value=2.5, baseline="unigram", **nats),
        Record(metric="accuracy", value=0.875, unit="fraction", **fields),
    ]
    text = card(records, architectures=["ImageGPTForCausalImageModeling"])
    results = ModelCard(text).data.eval_results
    assert [(r.metric_type, r.metric_value) for r in results] == [("nats_per_pixel", 1.25), ("accuracy", 0.875)]
    assert "| unigram | noise, 8x8, test | 10 | 2.5 nats/pixel |" in text and "87.5 %" in text


@pytest.mark.parametrize(
    ("options", "tag", "says", "says_not"),
    [
        ({"architectures": ["ImageGPTForCausalImageModeling"]}, "unconditional-image-generation", "alone", "refuse"),
        (
            {"architectures": ["ImageGPTForImageClassification"], "num_labels": 4},
            "image-classification",
            'pipeline("image-classification", "org/name")',
            "image-completion",
        ),
        (
            {"architectures": ["ImageGPTForImageClassification"], "num_labels": 4, "sos_inputs": True},
            "image-classification",
            "needs the package hf_igpt",
            "transformers alone",
        ),
        (
            {"architectures": ["ImageGPTForCausalImageModeling"], "n_class_tokens": 3},
            "unconditional-image-generation",
            "generate(class_labels=[0] * 8, guidance_scale=1.5)",
            "transformers alone",
        ),
        (
            {"architectures": ["ImageGPTForMaskedImageModeling"], "objective": "masked"},
            "image-feature-extraction",
            "AutoModelForMaskedImageModeling.from_pretrained",
            "transformers alone",
        ),
    ],
)
def test_each_kind_says_how_to_load_it(options, tag, says, says_not):
    text = card(**options)
    assert ModelCard(text).data.pipeline_tag == tag
    assert says in text and says_not not in text


def test_facts_cannot_break_the_card():
    text = card(
        architectures=["ImageGPTForCausalImageModeling"], recipe={"data": "a | b", "note": "one | two\nthree <b>"}
    )
    assert "| note | one \\| two three &lt;b> |" in text and "Trained on a \\| b." in text


def test_strangers_recipes_and_records_are_text():
    words = "x | y\n![p](http://t.co) [l](javascript:a) <b>`c` $z$"
    fields = {"task": "generation", "split": words, "n": 10, "dataset": words, "baseline": words, "unit": words}
    record = Record(value=1.25, metric="nats_per_pixel", **fields)
    recipe = {"data": words, words: words, "batch": ["a", words], "hub dataset": words}
    text = card([record], architectures=["ImageGPTForCausalImageModeling"], recipe=recipe)
    body = text.split("\n---\n", 1)[1]
    assert "t.co" in body and "http://t.co" not in body and "<b>" not in body
    assert re.search(r"(?<!\\)\[[lp]\]", body) is None and re.search(r"(?<![\\`])`c", body) is None
    assert ModelCard(text).data.datasets == [words]  # YAML keeps it a string


def test_a_template_in_a_record_is_not_filled():
    text = card(recipe={"data": "{{ repo_id }} {% for a in b %}"})
    assert "Trained on {{ repo_id }} {% for a in b %}." in text
