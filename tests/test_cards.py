"""Model cards: those in model_cards/ are what their records say; what a card says for each kind of model."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from conftest import small_config
from huggingface_hub import ModelCard

from hf_igpt.cards import render
from hf_igpt.evaluation import Record


FOLDER = Path(__file__).parent.parent / "model_cards"
spec = importlib.util.spec_from_file_location("render", FOLDER / "render.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
RENDERED = module.render_all()


def card(records=(), recipe=None, **options):
    config = small_config(**options)
    return render("org/name", config, (8, 8), True, recipe or {"data": "noise"}, list(records), {})


def test_every_card_is_of_the_list():
    assert {path.name for path in FOLDER.glob("*.md")} == set(RENDERED)


@pytest.mark.parametrize("name", RENDERED)
def test_cards_are_what_records_say(name):
    assert (FOLDER / name).read_text() == RENDERED[name], "run python model_cards/render.py"
    text = RENDERED[name]
    for picture in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (FOLDER / picture).is_file(), picture
    for snippet in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        ast.parse(snippet)
    data = ModelCard(text).data
    assert data.library_name == "transformers" and data.pipeline_tag and data.license


def test_openais_figures_are_marked_as_theirs():
    for size, nats, probe in (("s", 2.0895, "41.9 %"), ("m", 2.0614, "54.5 %"), ("l", 2.0466, "60.3 %")):
        text = RENDERED[f"igpt-{size}.md"]
        rows = [line for line in text.splitlines() if line.startswith("| iGPT-")]
        assert all("OpenAI's figure" in row for row in rows)
        assert any(f"{nats} nats/pixel" in row for row in rows) and any(probe in row for row in rows)
        results = ModelCard(text).data.eval_results
        assert all(result.source_name.startswith("OpenAI") for result in results)
        assert results[0].metric_value == nats
    # A checkpoint of another shape, or not converted, has none of them.
    assert "OpenAI" not in card(architectures=["ImageGPTForCausalImageModeling"], recipe={"converted from": "x"})


def test_measured_results_are_metadata_and_baselines_are_not():
    fields = {"split": "test", "n": 10, "seed": 0, "data": "noise, 8x8"}
    records = [
        Record("nats_per_pixel", 1.25, "nats/pixel", model="Image GPT", **fields),
        Record("nats_per_pixel", 2.5, "nats/pixel", model="unigram counts", baseline=True, **fields),
        Record("accuracy", 0.875, "fraction", model="Image GPT", **fields),
    ]
    text = card(records, architectures=["ImageGPTForCausalImageModeling"])
    results = ModelCard(text).data.eval_results
    assert [(r.metric_type, r.metric_value) for r in results] == [("nats_per_pixel", 1.25), ("accuracy", 0.875)]
    assert "unigram counts" in text and "87.5 %" in text


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
