"""Renders the cards in this folder from presets and from the records in reports/; a test compares.

python model_cards/render.py
"""

import json
from pathlib import Path

from hf_igpt import ImageGPTConfig
from hf_igpt.evaluation.records import RECORDS, RUN, read_records
from hf_igpt.publishing.cards import render_card


HERE = Path(__file__).parent
PICTURES = {
    "samples.png": "Images drawn by the model",
    "completions.png": "Images given, their upper halves, completions",
    "training.png": "Nats per pixel while training",
}
OURS = {"igpt-digits-tiny": ("digits-tiny", {"size": "tiny", "image_size": 8, "n_colors": 16})}


def card_of_openai(size: str) -> str:
    """The card of a converted checkpoint. Pictures are drawn when it is published, from its own palette."""
    config = ImageGPTConfig.from_preset(size, architectures=["ImageGPTForCausalImageModeling"])
    recipe = {"objective": "causal", "converted from": "model.ckpt-1000000"}
    return render_card(f"hf-igpt/igpt-{size}", config, (32, 32), True, recipe, [], {}, palette_picture=False)


def card_of_run(name: str, report: str, preset: dict) -> str:
    """The card of a model that was trained here, from its report's records, recipe and pictures."""
    folder = HERE.parent / "reports" / report
    config = ImageGPTConfig.from_preset(**preset, architectures=["ImageGPTForCausalImageModeling"])
    recipe = json.loads((folder / RUN).read_text())["recipe"]
    pictures = {caption: file for file, caption in PICTURES.items() if (folder / file).is_file()}
    grid = (preset["image_size"], preset["image_size"])
    records = read_records(folder / RECORDS)
    return render_card(f"hf-igpt/{name}", config, grid, True, recipe, records, pictures, folder=f"../reports/{report}/")


def render_all() -> dict[str, str]:
    """File name -> card."""
    rendered = {f"igpt-{size}.md": card_of_openai(size) for size in "sml"}
    return rendered | {f"{name}.md": card_of_run(name, *source) for name, source in OURS.items()}


if __name__ == "__main__":
    for name, card in render_all().items():
        (HERE / name).write_text(card)
        print(f"Wrote {HERE / name}")
