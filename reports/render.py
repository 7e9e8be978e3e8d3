"""Writes every table and card that a record, a preset or the planner stands behind; a test compares.

    make render

That is: the cards in `model_cards/` and `checkpoints/`, the reports of several runs, and in the README and `docs/` what stands between
`<!-- records: FILE -->`, `<!-- speed: FILE -->`, `<!-- reliability: FILE -->` or `<!-- plan TABLE: FLAGS -->` and `<!-- end -->`.
"""

import json
import re
import shlex
import sys
import tempfile
from pathlib import Path

from transformers import HfArgumentParser

from hf_igpt import ImageGPTConfig
from hf_igpt.commands.plan import PlanArguments, memory_table, options, run_table, simplest_that_fits
from hf_igpt.evaluation.records import RECORDS, RUN, markdown_rows, markdown_table, read_records
from hf_igpt.publishing.cards import render_card
from hf_igpt.publishing.hub import card_of_repository
from hf_igpt.reporting import plots
from hf_igpt.reporting.reports import write_report


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "reliability")]

from outcomes import read_counts, rows, summed

from table import format_table


PICTURES = ("samples.png", "completions.png", "training.png")  # that cards here show
OURS = {"igpt-digits-tiny": ("digits-tiny", {"size": "tiny", "image_size": 8, "n_colors": 16})}
TABLES_IN = ("README.md", *(f"docs/{name}.md" for name in ("drawing", "speed", "scaling", "reliability")))
REPORTS = ("cifar10-16-paper",)  # folders of reports/ with a report.md of the runs in them
PLANS = {
    "memory": memory_table,
    "hours": run_table,
    "fits": lambda plans: run_table(simplest_that_fits(plans)),
}


def render_card_of_openai(size: str) -> str:
    """The card of a converted checkpoint. Pictures are drawn when it is published, from its own palette."""
    config = ImageGPTConfig.from_preset(size, architectures=["ImageGPTForCausalImageModeling"])
    recipe = {"objective": "causal", "converted from": "model.ckpt-1000000"}
    return render_card(f"hf-igpt/igpt-{size}", config, (32, 32), True, recipe, [], {}, palette_picture=False)


def render_card_of_run(name: str, report: str, preset: dict) -> str:
    """The card of a model that was trained here, from its report's records, recipe and pictures."""
    folder = ROOT / "reports" / report
    config = ImageGPTConfig.from_preset(**preset, architectures=["ImageGPTForCausalImageModeling"])
    recipe = json.loads((folder / RUN).read_text())["recipe"]
    found = plots.find_pictures(folder, "causal")
    pictures = {plots.CAPTIONS[file]: file for file in PICTURES if file in found}
    grid = (preset["image_size"], preset["image_size"])
    records = read_records(folder / RECORDS)
    return render_card(f"hf-igpt/{name}", config, grid, True, recipe, records, pictures, folder=f"../reports/{report}/")


def render_table(kind: str, words: str) -> str:
    """The table that `<!-- KIND: WORDS -->` stands for; words that name none are a ValueError."""
    plan = re.fullmatch(r"plan (\w+)", kind)
    if plan:
        (args,) = HfArgumentParser(PlanArguments).parse_args_into_dataclasses(shlex.split(words))
        return PLANS[plan[1]](options(args))
    file, *choice = words.split()
    if kind == "reliability" and choice in ([], ["summary"]):
        counts = read_counts(ROOT / file)
        head, *body = rows(summed(counts) if choice else counts)
        return markdown_rows(head, body)
    records = read_records(ROOT / file)
    if (kind, choice) == ("records", ["test"]):
        return markdown_table([record for record in records if record.split == "test"])
    if (kind, choice) == ("records", []):
        return markdown_table(records)
    if kind == "speed" and choice in ([], ["summary"]):
        return format_table(records, summary=bool(choice))
    raise ValueError(f"There is no table <!-- {kind}: {words} -->.")


def render_tables(text: str) -> str:
    """`text` with all its marked tables made anew."""
    table = r"(<!-- (records|speed|reliability|plan \w+): (.*?) -->\n).*?(\n<!-- end -->)"
    return re.sub(table, lambda found: found[1] + render_table(found[2], found[3]) + found[4], text, flags=re.DOTALL)


def render_all() -> dict[str, str]:
    """Path in the repository -> text, of every file that holds something rendered."""
    files = {f"model_cards/igpt-{size}.md": render_card_of_openai(size) for size in "sml"}
    files |= {f"model_cards/{name}.md": render_card_of_run(name, *source) for name, source in OURS.items()}
    for folder in sorted((ROOT / "checkpoints").iterdir()):
        name = folder.relative_to(ROOT).as_posix()
        files[f"{name}/README.md"] = card_of_repository(folder, name, code=False)
    files |= {name: render_tables((ROOT / name).read_text(encoding="utf-8")) for name in TABLES_IN}
    for name in REPORTS:
        with tempfile.TemporaryDirectory() as folder:
            page, _ = write_report([ROOT / "reports" / name], folder)
            files[f"reports/{name}/report.md"] = page.read_text(encoding="utf-8")
    return files


if __name__ == "__main__":
    for name in REPORTS:
        write_report([ROOT / "reports" / name], ROOT / "reports" / name)  # with its pictures
    for name, text in render_all().items():
        if (ROOT / name).read_text(encoding="utf-8") != text:
            (ROOT / name).write_text(text, encoding="utf-8")
            print(f"Rendered {name}")
