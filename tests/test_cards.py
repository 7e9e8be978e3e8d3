"""Model cards: those in model_cards/ are what their records say; what a card says for each kind of model. Reports of runs."""

import ast
import base64
import importlib.util
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import small_config
from huggingface_hub import ModelCard
from PIL import Image

from hf_igpt import plots, probing
from hf_igpt.commands.report import ReportArguments, render, report
from hf_igpt.data import DataArguments
from hf_igpt.evaluation.records import Record, read_records, write_records
from hf_igpt.presets import PUBLISHED


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


# -- reports -----------------------------------------------------------------------------------------------------------

DIGITS = "scikit-learn digits, 8x8, 16 colours"
CLASSES = f"{DIGITS}, 10 classes"
OF_RUN = {"size": "tiny", "parameters": 800_000, "images seen": 17_256}


def nats(value, objective="causal", data=DIGITS, **settings):
    words = f"Image GPT {'masked ' if objective == 'masked' else ''}tiny"
    settings = {"objective": objective} | OF_RUN | settings
    return Record("nats_per_pixel", value, "nats/pixel", "held out", 359, 42, words, data, settings=settings)


def counts(value):
    return Record("nats_per_pixel", value, "nats/pixel", "held out", 359, 42, "left counts", DIGITS, baseline=True)


def accuracy(
    value, split, objective="causal", data=CLASSES, model="Image GPT tiny, probed", baseline=False, **settings
):
    settings = {"objective": objective} | OF_RUN | {name.replace("_", " "): found for name, found in settings.items()}
    return Record("accuracy", value, "fraction", split, 300, 42, model, data, baseline=baseline, settings=settings)


def probes(validated, tested, objective="causal", **options):
    """Records of layers 0, 1, …, of raw pixels, and of the test: of one number, or by the number of masks."""
    linear = {"probe": "logistic regression", "objective": objective} | options
    records = [
        accuracy(value, "validation", of="trained", layer=layer, model=f"Image GPT, layer {layer}, linear", **linear)
        for layer, value in enumerate(validated)
    ]
    raw = {"of": "raw pixels", "probe": "logistic regression", "baseline": True, "model": "raw pixels, linear"}
    records += [accuracy(value, split, **raw) for split, value in (("validation", 0.811), ("test", 0.8123))]
    tested = tested if isinstance(tested, dict) else {None: tested}
    for masks, value in tested.items():
        of_masks = {} if masks is None else {"masks": masks}
        records.append(accuracy(value, "test", of="trained", layer=1, **linear, **of_masks))
    return records


def fine_tuned(value, objective="causal", start="pretrained", masks=0):
    settings = {"started_from": start, "objective": objective, "masks": masks, "model": "Image GPT tiny, fine-tuned"}
    always = accuracy(0.0987, "test", **(settings | {"model": 'always "3"', "baseline": True}))
    return [accuracy(value, "test", **settings), accuracy(value - 0.01, "validation", **settings), always]


def picture(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)


def make_story(root):
    """Folders of runs as the scripts leave them: pretraining with milestones, probes, scores, fine-tuning, from scratch."""
    for step, (loss, tested) in enumerate(((2.0111, 0.6011), (1.5222, 0.7022), (1.2671, 0.8033)), start=1):
        place = root / "causal" / "milestones" / f"step-000000{step}"
        write_records(place / "records.json", [nats(loss)])
        write_records(place / "probe" / "probe.json", probes([0.5, 0.6], tested))
    write_records(root / "causal" / "records.json", [nats(1.26714), counts(1.9133)])
    few = {"of": "trained", "probe": "logistic regression", "layer": 1, "labels_per_class": 4, "deviation": 0.0171}
    together = {"of": "trained", "probe": "logistic regression", "layers": [0, 1, 2, 3, 4]}
    neighbours = {"of": "trained", "probe": "200 nearest neighbours", "layer": 1}
    records = [*probes([0.7011, 0.9044, 0.8055], 0.9077), accuracy(0.9222, "test", **together)]
    records += [accuracy(0.6543, "test", **few), accuracy(0.9999, "test", **neighbours)]
    write_records(root / "causal" / "probe" / "probe.json", records)
    # Some images that were easy: no figure to set beside the paper's.
    write_records(root / "causal" / "score" / "score.json", [nats(0.5432, set="scored")])
    picture(root / "causal" / "samples" / "step-0000005.png", "red")
    picture(root / "causal" / "samples" / "step-0000010.png", "green")
    picture(root / "causal" / "score" / "surprise.png", "blue")
    write_records(root / "masked" / "records.json", [nats(0.9911, objective="masked")])
    write_records(root / "masked" / "milestones" / "step-0000001" / "records.json", [nats(1.1, objective="masked")])
    masked = probes([0.6, 0.7], {5: 0.7111, 1: 0.7044}, objective="masked")
    write_records(root / "masked" / "milestones" / "step-0000001" / "probe" / "probe.json", masked)
    write_records(root / "masked" / "probe" / "probe.json", masked)
    runs = {"finetuned": ("pretrained", "causal", 0.9555), "scratch": ("random weights", "causal", 0.8666)}
    runs["finetuned-masked"] = ("pretrained", "masked", 0.9444)
    for name, (start, objective, value) in runs.items():
        masks = 5 if objective == "masked" else 0
        write_records(root / name / "records.json", fine_tuned(value, objective, start, masks))
        log = [{"epoch": 1.0, "eval_accuracy": value - 0.2}, {"epoch": 1.5, "loss": 1.0}]
        log.append({"epoch": 2.0, "eval_accuracy": value - 0.01})
        (root / name / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return root


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    return make_story(tmp_path_factory.mktemp("somewhere") / "story")


def reported(*folders, to):
    """The page and the Markdown of a report."""
    page = report(ReportArguments([str(folder) for folder in folders], output_dir=str(to)), DataArguments())
    assert page == to / "index.html"
    return page.read_text(encoding="utf-8"), (to / "report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(story):
    """Of the whole story: HTML, Markdown, the folder."""
    to = story.parent / "report"
    return *reported(story, to=to), to


@pytest.fixture
def drawn(monkeypatch):
    """What each figure is drawn of, by the function that would draw it."""
    calls = {}
    for name in ("layer_curves", "loss_against_probe", "accuracy_bars", "accuracy_courses"):

        def draw(of, name=name):
            calls[name] = of
            return Image.new("RGB", (4, 4))

        monkeypatch.setattr(plots, name, draw)
    return calls


class Tables(HTMLParser):
    """`rows`: of all tables, each a list of the texts of its cells."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.cell = [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


def rows_of(text, kind):
    """Rows of the table beside the paper of one kind of figure."""
    return [row for row in Tables(text).rows if row and row[0] == kind]


def without_pictures(html):
    return re.sub(r'"data:image/png;base64,[^"]*"', "", html)


def test_a_report_holds_all_its_pictures(page):
    html, markdown, folder = page
    files = {path.name for path in folder.iterdir()}
    figures = {"layers.png", "loss-and-probe.png", "objectives.png", "epochs.png"}
    assert files == {"index.html", "report.md"} | figures
    assert "Not drawn" not in html + markdown
    sources = re.findall(r'\ssrc="([^"]*)"', html)
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True) for source in sources]
    assert {(folder / name).read_bytes() for name in figures} <= set(embedded)
    assert len(embedded) == len(figures) + 2 and all(Image.open(io.BytesIO(image)).size > (7, 7) for image in embedded)
    # The last picture that was drawn in training, not the first, and the score's.
    colors = {Image.open(io.BytesIO(image)).convert("RGB").getpixel((0, 0)) for image in embedded}
    assert {(0, 128, 0), (0, 0, 255)} <= colors and (255, 0, 0) not in colors
    for link in re.findall(r'(?:href|action|data|url)\s*[=(]\s*"?([^")>]*)', html):
        assert link.startswith("#run-") and f'id="{link[1:]}"' in html
    without = without_pictures(html)
    assert "http" not in without and "<script" not in without and "@import" not in without
    for name in re.findall(r"!\[.*\]\((.*)\)", markdown):
        assert name in figures
    assert len(re.findall(r"!\[.*\]\((.*)\)", markdown)) == 4


def test_no_file_names_a_place_of_this_machine(page, story):
    for text in map(without_pictures, page[:2]):
        assert str(story.parent) not in text and story.parent.name not in text and "/tmp" not in text


def test_figures_are_drawn_of_the_records(story, drawn, tmp_path):
    reported(story, to=tmp_path)
    layers = {
        run: [record.value for record in records if "layer" in record.settings]
        for run, records in drawn["layer_curves"].items()
    }
    assert layers == {"causal": [0.7011, 0.9044, 0.8055], "masked": [0.6, 0.7]}
    # A masked model's loss is of hidden pixels alone: another quantity.
    assert drawn["loss_against_probe"] == {"causal": [(2.0111, 0.6011), (1.5222, 0.7022), (1.2671, 0.8033)]}
    probe = {"causal": 0.9077, "masked, 5 masks": 0.7111, "masked, 1 mask": 0.7044}
    tuned = {"causal": 0.9555, "masked, 5 masks": 0.9444}
    assert drawn["accuracy_bars"] == {"linear probe": probe, "fine-tuning": tuned}
    assert list(drawn["accuracy_bars"]) == ["linear probe", "fine-tuning"]
    courses = drawn["accuracy_courses"]
    assert set(courses) == {"finetuned: pretrained", "finetuned-masked: pretrained", "scratch: random weights"}
    assert courses["scratch: random weights"] == [(1.0, pytest.approx(0.6666)), (2.0, pytest.approx(0.8566))]


@pytest.mark.parametrize(
    ("missing", "pattern", "title"),
    [
        ("layers.png", "*/probe/probe.json", "Probe accuracy by layer"),
        ("loss-and-probe.png", "causal/milestones/*/records.json", "Generative loss against probe accuracy"),
        ("loss-and-probe.png", "causal/milestones/*/probe/probe.json", "Generative loss against probe accuracy"),
        ("objectives.png", "*masked/*/*.json|*masked/*.json", "Autoregressive against BERT"),
        ("epochs.png", "*/trainer_state.json", "Fine-tuned from pretrained weights"),
    ],
)
def test_what_cannot_be_drawn_is_said_to_be_missing(missing, pattern, title, story, drawn, tmp_path):
    root = shutil.copytree(story, tmp_path / "story")
    for part in pattern.split("|"):
        for file in root.glob(part):
            file.unlink()
    html, markdown = reported(root, to=tmp_path / "report")
    assert not (tmp_path / "report" / missing).exists()
    for name in ("layers.png", "loss-and-probe.png", "objectives.png", "epochs.png"):
        assert name == missing or (f"({name})" in markdown and (tmp_path / "report" / name).is_file())
    for text in (html, markdown):
        assert text.count("Not drawn: it needs ") == 1
        assert text.index(title) < text.index("Not drawn: it needs ")


def test_tables_hold_the_numbers_of_the_records(page, story):
    html, markdown, _ = page
    rows = [tuple(row) for row in Tables(html).rows]
    files = [path for name in ("records", "probe", "score") for path in story.rglob(f"{name}.json")]
    shown = [record for path in files if "milestones" not in path.parts for record in read_records(path)]
    assert len(shown) > 20
    for record in shown:
        value = f"{100 * record.value:.1f}" if record.unit == "fraction" else f"{record.value:.4f}"
        value += f" ± {100 * record.settings['deviation']:.1f}" if "deviation" in record.settings else ""
        value += " %" if record.unit == "fraction" else " nats/pixel"
        assert (record.model, f"{record.data}, {record.split}", str(record.n), value) in rows
        assert record.model in markdown
    baselines = re.findall(r'<tr class="baseline"><td>(.*?)</td>', html)
    assert {"left counts", "raw pixels, linear"} < set(baselines) and "Image GPT tiny" not in baselines
    assert all(f"## {run}\n" in markdown for run in ("causal", "masked", "finetuned", "scratch", "finetuned-masked"))


def test_the_table_beside_the_paper(page):
    """The best of ours of each kind: of all held-out images, of test images, of the objective; none of baselines."""
    html, _, _ = page
    ours = {row[0]: row[1] for row in Tables(html).rows if len(row) == 5}
    assert ours["generation, held out"] == "1.2671 nats/pixel"  # not the score's 0.5432
    assert ours["linear probe, test"] == "90.8 %"  # neither of nearest neighbours nor of layers together
    assert ours["linear probe, test, 5 layers together"] == "92.2 %"
    assert ours["linear probe, test, 4 labels per class"] == "65.4 ± 1.7 %"
    assert ours["linear probe, test, 25 labels per class"] == "not measured"
    assert ours["fine-tuning, test"] == "95.5 %"  # not of random weights
    assert ours["fine-tuning, test (BERT)"] == "94.4 %"


def test_published_figures_are_named_as_openais(page):
    html, markdown, _ = page
    (head,) = [row for row in Tables(html).rows if "OpenAI's" in row]
    column = head.index("OpenAI's")
    cells = "; ".join(row[column] for row in Tables(html).rows if len(row) == len(head))
    for figure in PUBLISHED:
        value = f"{figure.value:.4f} nats/pixel" if figure.task == "generation" else f"{100 * figure.value:.1f} %"
        size = f"{figure.image_size}x{figure.image_size}"
        cited = f"iGPT-{figure.size.upper()} {value} ({figure.data} at {size}, {figure.source})"
        assert cited in cells and cited in markdown
    ours = "; ".join(row[head.index("ours")] for row in Tables(html).rows if len(row) == len(head))
    assert "2.0466" not in ours and "96.3" not in ours


def test_differences_are_spelled_out(page):
    """Parameters of iGPT-L and -XL counted from OpenAI's model.py; 1 M steps of 128 images, 2 M of 64 (paper, A.1)."""
    (row,) = rows_of(page[0], "generation, held out")
    assert row[4] == (
        "data scikit-learn digits, not ILSVRC-2012; 8x8 pixels, not 32x32; 800,000 parameters, not 1,362,250,752; "
        "17,256 images seen, not 128,000,000"
    )
    (row,) = rows_of(page[0], "linear probe, test, 5 layers together")
    assert "8x8 pixels, not 64x64" in row[4] and "not 6,801,438,720" in row[4] and "not 128,000,000" in row[4]
    (row,) = rows_of(page[0], "fine-tuning, test")
    assert "800,000 parameters" in row[4] and "images seen" not in row[4]  # the paper does not say how many


def test_the_same_data_are_held_against_the_same_data(drawn, tmp_path):
    data = "uoft-cs/cifar10, 32x32, 512 colours, 10 classes"
    write_records(tmp_path / "run" / "records.json", probes([0.5, 0.6], 0.7123, data=data))
    html, _ = reported(tmp_path / "run", to=tmp_path / "report")
    (row,) = rows_of(html, "linear probe, test")
    assert row[1] == "71.2 %" and row[3] == "iGPT-L 96.3 % (CIFAR-10 at 32x32, paper, Table 1)"
    assert row[4] == "800,000 parameters, not 1,362,250,752; 17,256 images seen, not 128,000,000"


def test_numbers_follow_the_records(drawn, tmp_path):
    """Another number in a record is another number in the report, and nothing else changes."""
    texts = []
    for value in (1.2345, 1.5432):
        write_records(tmp_path / "run" / "records.json", [nats(value), counts(2.3456)])
        texts.append(reported(tmp_path / "run", to=tmp_path / "report"))
    for before, after in zip(*texts, strict=True):
        assert before.count("1.2345") == 2 and before.replace("1.2345", "1.5432") == after


def test_only_what_is_alike_is_compared(drawn, tmp_path):
    """Objectives on other images, or of models of other sizes, say nothing of each other."""
    for name, objective, data, value in (
        ("one", "causal", CLASSES, 0.9),
        ("two", "masked", "cifar10, 16x16, 512 colours, 10 classes", 0.4),
        ("three", "causal", "cifar10, 16x16, 512 colours, 10 classes", 0.5),
    ):
        write_records(tmp_path / name / "records.json", probes([0.5, 0.6], value, objective=objective, data=data))
    write_records(tmp_path / "four" / "records.json", probes([0.5], 0.8, objective="masked", size="xs"))
    reported(tmp_path / "one", tmp_path / "two", to=tmp_path / "report")
    assert "accuracy_bars" not in drawn
    reported(tmp_path / "one", tmp_path / "four", to=tmp_path / "report")
    assert "accuracy_bars" not in drawn
    reported(tmp_path, to=tmp_path / "report")
    assert drawn["accuracy_bars"] == {"linear probe": {"causal": 0.5, "masked": 0.4}}
    write_records(tmp_path / "five" / "records.json", probes([0.5, 0.6], 0.85, objective="masked"))
    reported(tmp_path, to=tmp_path / "report")
    assert drawn["accuracy_bars"] == {
        f"linear probe\n{CLASSES}": {"causal": 0.9, "masked": 0.85},
        "linear probe\ncifar10, 16x16, 512 colours, 10 classes": {"causal": 0.5, "masked": 0.4},
    }


def test_probes_of_models_that_saw_labels_are_no_linear_probes(drawn, tmp_path):
    few = {"of": "trained", "probe": "logistic regression", "layer": 1, "labels_per_class": 4}
    records = [*probes([0.5, 0.6], 0.987), accuracy(0.985, "test", **few)]
    for record in records:
        record.settings["fine-tuned"] = True
    write_records(tmp_path / "run" / "probe" / "probe.json", records)
    html, _ = reported(tmp_path, to=tmp_path / "report")
    assert {row[1] for row in Tables(html).rows if len(row) == 5} == {"ours", "not measured"}


def test_layers_of_several_runs_are_lines_of_their_own(monkeypatch):
    """Runs of the same model have the same words in their records; raw pixels of the same images are one line."""
    lines = {}

    def look(figure):
        for line in figure.axes[0].get_lines():
            lines.setdefault(line.get_label(), []).append(list(np.round(line.get_ydata(), 3)))

    monkeypatch.setattr(plots, "_picture", look)
    one, other = probes([0.5, 0.6], 0.1), probes([0.7, 0.8, 0.75], 0.1)
    plots.layer_curves({"a": one, "b": other})
    words = "Image GPT, linear, 17,256 images seen"
    assert lines == {
        f"a: {words}": [[50, 60]],
        f"b: {words}": [[70, 80, 75]],
        "raw pixels, linear": [[81.1, 81.1]],
    }
    lines.clear()
    plots.layer_curves({"a": one})
    assert set(lines) == {words, "raw pixels, linear"}


def test_names_of_runs_are_escaped(drawn, tmp_path):
    name = 'a <b>run & "more"'
    write_records(tmp_path / name / "records.json", [nats(1.5, data="<i>data, 8x8, 16 colours")])
    picture(tmp_path / name / "samples.png", "red")
    html, _ = reported(tmp_path / name, to=tmp_path / "report")
    assert "<b>" not in html and "<i>" not in html and "a &lt;b&gt;run &amp; &#34;more&#34;" in html
    assert '<h2 id="run-1">' in html


def test_each_run_once_under_a_name_of_its_own(story, drawn, tmp_path, monkeypatch):
    for place in ("x/one/run", "y/one/run", "y/other"):
        write_records(tmp_path / place / "records.json", [nats(1.5)])
    monkeypatch.chdir(tmp_path)
    html, markdown = reported(Path("."), Path("x"), tmp_path / "y" / "other", to=tmp_path / "report")
    assert re.findall(r"<h2 id=.*?>(.*?)</h2>", html) == ["x/one/run", "y/one/run", "other"]
    assert markdown.count("| 359 |") == 3


def test_again_into_the_same_folder(story, drawn, tmp_path):
    first, second = (reported(story, to=tmp_path / "report") for _ in range(2))
    assert first == second
    reported(story / "causal", to=tmp_path / "report")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {
        "index.html",
        "report.md",
        "layers.png",
        "loss-and-probe.png",
    }  # none is left of the earlier report


@pytest.mark.parametrize("probe_milestones", [False, True])
def test_folders_without_records_are_refused_before_anything_is_done(probe_milestones, story, tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "probe", lambda *_: pytest.fail("probed"))
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        folders = [str(story / "masked"), str(tmp_path / name)]
        args = ReportArguments(folders, str(tmp_path / "report"), probe_milestones)
        with pytest.raises(ValueError, match=rf"no records \(records\.json, probe\.json, score\.json\) in .*{name}"):
            report(args, DataArguments())
    assert not (tmp_path / "report").exists()


def test_milestones_are_probed_if_they_were_not(story, drawn, tmp_path, monkeypatch):
    root = shutil.copytree(story, tmp_path / "story")
    places = [root / "causal" / "milestones" / f"step-000000{step}" for step in (1, 3)]
    for place in places:
        (place / "probe" / "probe.json").unlink()
    images = DataArguments(max_eval_samples=7)
    asked = []

    def probe(args, data_args):
        asked.append((args.model_name_or_path, args.baselines, args.knn, data_args))
        for name in args.model_name_or_path:
            write_records(Path(name) / "probe" / "probe.json", probes([0.5], 0.4321))

    monkeypatch.setattr(probing, "probe", probe)
    arguments = ReportArguments([str(root)], str(tmp_path / "report"), probe_milestones=True)
    report(arguments, images)
    assert asked == [([str(place) for place in places], False, False, images)]
    assert drawn["loss_against_probe"]["causal"] == [(2.0111, 0.4321), (1.5222, 0.7022), (1.2671, 0.4321)]
    report(arguments, images)
    assert len(asked) == 1
