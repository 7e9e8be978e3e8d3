"""Reports of runs: what is drawn, what the tables hold, and how they compare with the paper."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from hf_igpt.commands import report as command
from hf_igpt.commands.report import ReportArguments, report
from hf_igpt.data import DataArguments
from hf_igpt.evaluation.records import (
    Record,
    describe_images,
    describe_model,
    escape_markdown,
    read_records,
    write_records,
)
from hf_igpt.presets import PUBLISHED
from hf_igpt.reporting import plots


DIGITS = {"dataset": "scikit-learn digits", "image_size": (8, 8), "colors": 16}
CLASSES = DIGITS | {"classes": 10}
CIFAR10 = {"dataset": "cifar10", "image_size": (16, 16), "colors": 512, "classes": 10}
OF_RUN = {"size": "tiny", "parameters": 800_000, "images_seen": 17_256}
LINEAR = {"task": "linear probe", "probe": "logistic regression"}


def nats(value, objective="causal", images=DIGITS, **fields):
    fields = {"task": "generation", "split": "held out", "objective": objective, "seed": 42} | OF_RUN | fields
    return Record(metric="nats_per_pixel", value=value, unit="nats/pixel", n=359, **images, **fields)


def counts(value):
    nothing = dict.fromkeys(("objective", *OF_RUN))
    return nats(value, **nothing, baseline="left bigram")


def accuracy(value, split, images=CLASSES, **fields):
    fields = {"objective": "causal", "seed": 42} | OF_RUN | fields
    return Record(metric="accuracy", value=value, unit="fraction", split=split, n=300, **images, **fields)


def probes(validated, tested, images=CLASSES, **fields):
    """Records of layers 0, 1, …, of raw pixels, and of the test: of one number, or by the number of masks."""
    fields = LINEAR | fields
    records = [
        accuracy(value, "validation", images, layers=(layer,), **fields) for layer, value in enumerate(validated)
    ]
    nothing = dict.fromkeys(("objective", *OF_RUN)) | {"baseline": "raw pixels"}
    records += [
        accuracy(value, split, images, **LINEAR, **nothing)
        for split, value in (("validation", 0.811), ("test", 0.8123))
    ]
    tested = tested if isinstance(tested, dict) else {None: tested}
    records += [accuracy(value, "test", images, layers=(1,), masks=masks, **fields) for masks, value in tested.items()]
    return records


def fine_tuned(value, objective="causal", start="pretrained", masks=None):
    fields = {"task": "fine-tuning", "started_from": start, "objective": objective, "masks": masks}
    always = accuracy(0.0987, "test", task="fine-tuning", baseline='always "3"')
    return [accuracy(value, "test", **fields), accuracy(value - 0.01, "validation", **fields), always]


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
    few = LINEAR | {"layers": (1,), "labels_per_class": 4, "deviation": 0.0171}
    together = LINEAR | {"layers": (0, 1, 2, 3, 4)}
    neighbours = {"task": "nearest neighbours", "probe": "200 nearest neighbours", "layers": (1,)}
    records = [*probes([0.7011, 0.9044, 0.8055], 0.9077), accuracy(0.9222, "test", **together)]
    records += [accuracy(0.6543, "test", **few), accuracy(0.9999, "test", **neighbours)]
    write_records(root / "causal" / "probe" / "probe.json", records)
    # Some images that were easy: no figure to set beside the paper's.
    write_records(root / "causal" / "score" / "score.json", [nats(0.5432, task="scoring")])
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
        masks = 5 if objective == "masked" else None
        write_records(root / name / "records.json", fine_tuned(value, objective, start, masks))
        log = [{"epoch": 1.0, "eval_accuracy": value - 0.2}, {"epoch": 1.5, "loss": 1.0}]
        log.append({"epoch": 2.0, "eval_accuracy": value - 0.01})
        (root / name / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return root


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    return make_story(tmp_path_factory.mktemp("somewhere") / "story")


def reported(*folders, to):
    """The text of a report."""
    page = report(ReportArguments([str(folder) for folder in folders], output_dir=str(to)), DataArguments())
    assert page == to / "report.md"
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(story):
    """Of the whole story: the text, the folder."""
    to = story.parent / "report"
    return reported(story, to=to), to


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


def rows_of(text):
    """Rows of all tables, each a list of its cells."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def row_of(text, kind):
    """The row of the comparison with the paper of one kind of figure."""
    (row,) = [row for row in rows_of(text) if row[0] == kind]
    return row


def pictures_in(text):
    return re.findall(r"!\[.*\]\((.*)\)", text)


def test_a_report_has_all_its_pictures(page):
    text, folder = page
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    figures = {"layers.png", "loss-and-probe.png", "objectives.png", "epochs.png"}
    # The last picture that was drawn in training, not the first, and the score's.
    copies = {"pictures/causal/samples.png": (0, 128, 0), "pictures/causal/score-surprise.png": (0, 0, 255)}
    assert files == {"report.md", *figures, *copies}
    assert sorted(pictures_in(text)) == sorted([*figures, *copies])
    assert "Not drawn" not in text
    for name in figures:
        assert Image.open(folder / name).width > 300
    for name, color in copies.items():
        assert Image.open(folder / name).getpixel((0, 0)) == color


def test_no_file_names_a_place_of_this_machine(page, story):
    text, _ = page
    assert str(story.parent) not in text and story.parent.name not in text and "/tmp" not in text


def test_figures_are_drawn_of_the_records(story, drawn, tmp_path):
    reported(story, to=tmp_path)
    layers = {
        run: [record.value for record in records if record.layers is not None]
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
    text = reported(root, to=tmp_path / "report")
    assert not (tmp_path / "report" / missing).exists()
    for name in ("layers.png", "loss-and-probe.png", "objectives.png", "epochs.png"):
        assert name == missing or (f"({name})" in text and (tmp_path / "report" / name).is_file())
    assert text.count("Not drawn: it needs ") == 1
    assert text.index(title) < text.index("Not drawn: it needs ")


def test_tables_hold_the_numbers_of_the_records(page, story):
    text, _ = page
    rows = [tuple(row) for row in rows_of(text)]
    files = [path for name in ("records", "probe", "score") for path in story.rglob(f"{name}.json")]
    shown = [record for path in files if "milestones" not in path.parts for record in read_records(path)]
    assert len(shown) > 20
    for record in shown:
        value = f"{100 * record.value:.1f}" if record.unit == "fraction" else f"{record.value:.5g}"
        value += f" ± {100 * record.deviation:.1f}" if record.deviation is not None else ""
        value += " %" if record.unit == "fraction" else " nats/pixel"
        images = f"{describe_images(record)}, {record.split}"
        assert (describe_model(record), images, str(record.n), value) in rows
    assert {("left bigram",), ("raw pixels, logistic regression",)} <= {row[:1] for row in rows}
    assert all(f"## {run}\n" in text for run in ("causal", "masked", "finetuned", "scratch", "finetuned-masked"))


def test_the_comparison_with_the_paper(page):
    """The best of ours of each kind: of all held-out images, of test images, of the objective; none of baselines."""
    text, _ = page
    ours = {row[0]: row[1] for row in rows_of(text) if len(row) == 5}
    assert ours["generation, held out"] == "1.2671 nats/pixel"  # not the score's 0.5432
    assert ours["linear probe, test"] == "90.8 %"  # neither of nearest neighbours nor of layers together
    assert ours["linear probe, test, 5 layers together"] == "92.2 %"
    assert ours["linear probe, test, 4 labels per class"] == "65.4 ± 1.7 %"
    assert ours["linear probe, test, 25 labels per class"] == "not measured"
    assert ours["fine-tuning, test"] == "95.5 %"  # not of random weights
    assert ours["fine-tuning, test (BERT)"] == "94.4 %"


def test_published_figures_are_named_as_openais(page):
    text, _ = page
    head, *rows = [row for row in rows_of(text) if len(row) == 5]
    column = head.index("OpenAI's")
    cells = "; ".join(row[column] for row in rows)
    for figure in PUBLISHED:
        value = f"{figure.value:.4f}" if figure.task == "generation" else f"{100 * figure.value:.1f} %"
        value += " nats/pixel" if figure.task == "generation" else ""
        size = f"{figure.image_size}x{figure.image_size}"
        assert f"iGPT-{figure.size.upper()} {value} ({figure.data} at {size}, {figure.source})" in cells
    ours = "; ".join(row[head.index("ours")] for row in rows)
    assert "2.0466" not in ours and "96.3" not in ours


def test_differences_are_spelled_out(page):
    """Parameters of iGPT-L and -XL counted from OpenAI's model.py; 1 M steps of 128 images, 2 M of 64 (paper, A.1)."""
    row = row_of(page[0], "generation, held out")
    assert row[4] == (
        "data scikit-learn digits, not ILSVRC-2012; 8x8 pixels, not 32x32; 800,000 parameters, not 1,362,250,752; "
        "17,256 images seen, not 128,000,000"
    )
    row = row_of(page[0], "linear probe, test, 5 layers together")
    assert "8x8 pixels, not 64x64" in row[4] and "not 6,801,438,720" in row[4] and "not 128,000,000" in row[4]
    row = row_of(page[0], "fine-tuning, test")
    assert "800,000 parameters" in row[4] and "images seen" not in row[4]  # the paper does not say how many


def test_the_same_data_are_held_against_the_same_data(drawn, tmp_path):
    images = {"dataset": "uoft-cs/cifar10", "image_size": (32, 32), "colors": 512, "classes": 10}
    write_records(tmp_path / "run" / "records.json", probes([0.5, 0.6], 0.7123, images))
    row = row_of(reported(tmp_path / "run", to=tmp_path / "report"), "linear probe, test")
    assert row[1] == "71.2 %" and row[3] == "iGPT-L 96.3 % (CIFAR-10 at 32x32, paper, Table 1)"
    assert row[4] == "800,000 parameters, not 1,362,250,752; 17,256 images seen, not 128,000,000"


def test_numbers_follow_the_records(drawn, tmp_path):
    """Another number in a record is another number in the report, and nothing else changes."""
    texts = []
    for value in (1.2345, 1.5432):
        write_records(tmp_path / "run" / "records.json", [nats(value), counts(2.3456)])
        texts.append(reported(tmp_path / "run", to=tmp_path / "report"))
    before, after = texts
    assert before.count("1.2345") == 2 and before.replace("1.2345", "1.5432") == after


def test_only_what_is_alike_is_compared(drawn, tmp_path):
    """Objectives on other images, or of models of other sizes, say nothing of each other."""
    for name, objective, images, value in (
        ("one", "causal", CLASSES, 0.9),
        ("two", "masked", CIFAR10, 0.4),
        ("three", "causal", CIFAR10, 0.5),
    ):
        write_records(tmp_path / name / "records.json", probes([0.5, 0.6], value, images, objective=objective))
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
        "linear probe\nscikit-learn digits, 8x8, 16 colours, 10 classes": {"causal": 0.9, "masked": 0.85},
        "linear probe\ncifar10, 16x16, 512 colours, 10 classes": {"causal": 0.5, "masked": 0.4},
    }


def test_probes_of_models_that_saw_labels_are_no_linear_probes(drawn, tmp_path):
    few = accuracy(0.985, "test", **LINEAR, layers=(1,), labels_per_class=4)
    records = [replace(record, started_from="pretrained") for record in (*probes([0.5, 0.6], 0.987), few)]
    write_records(tmp_path / "run" / "probe" / "probe.json", records)
    text = reported(tmp_path, to=tmp_path / "report")
    assert {row[1] for row in rows_of(text) if len(row) == 5} == {"ours", "not measured"}


def test_layers_of_several_runs_are_lines_of_their_own(monkeypatch):
    """Runs of the same model have the same words in their records; raw pixels of the same images are one line."""
    lines = {}

    def look(figure):
        for line in figure.axes[0].get_lines():
            lines.setdefault(line.get_label(), []).append(list(np.round(line.get_ydata(), 3)))

    monkeypatch.setattr(plots, "_picture", look)
    one, other = probes([0.5, 0.6], 0.1), probes([0.7, 0.8, 0.75], 0.1)
    plots.layer_curves({"a": one, "b": other})
    words = "Image GPT tiny, logistic regression, 17,256 images seen"
    assert lines == {
        f"a: {words}": [[50, 60]],
        f"b: {words}": [[70, 80, 75]],
        "raw pixels, logistic regression": [[81.1, 81.1]],
    }
    lines.clear()
    plots.layer_curves({"a": one})
    assert set(lines) == {words, "raw pixels, logistic regression"}


def test_names_cannot_break_a_table(drawn, tmp_path):
    name = "a <b>run | more"
    images = DIGITS | {"dataset": "<i>data | 8x8\nnext"}
    write_records(tmp_path / name / "records.json", [nats(1.5, images=images)])
    picture(tmp_path / name / "samples.png", "red")
    text = reported(tmp_path / name, to=tmp_path / "report")
    assert "<b>" not in text and "<i>" not in text and "## a &lt;b>run \\| more\n" in text
    assert [
        "Image GPT tiny, 800,000 parameters, 17,256 images seen",
        "&lt;i>data \\| 8x8 next, 8x8, 16 colours, held out",
    ] in [row[:2] for row in rows_of(text)]
    (link,) = [link for link in pictures_in(text) if "samples" in link]
    assert " " not in link and (tmp_path / "report" / unquote(link)).is_file()
    assert escape_markdown("plain, 8x8") == "plain, 8x8"


def test_hostile_records_are_text(drawn, tmp_path):
    """Everywhere: data, hardware, run, baseline, and their names in figures."""
    words = "x | y\n![p](http://t.co) [l](javascript:a) <b>`c` $z$"
    record = replace(nats(1.5, images=DIGITS | {"dataset": words}), hardware=words, size=words, unit=words)
    write_records(tmp_path / "run" / "records.json", [record, replace(record, baseline=words)])
    text = reported(tmp_path / "run", to=tmp_path / "report")
    assert "t.co" in text and "http://" not in text and "<b>" not in text
    assert pictures_in(text) == [] and re.search(r"(?<!\\)\[l", text) is None
    assert re.search(r"(?<!\\)[`$]", text) is None
    assert all(len(row) in (4, 5) for row in rows_of(text))


def test_words_in_figures_are_no_formulas():
    plots.accuracy_courses({"a $\\frac{ b": [(1.0, 0.5)], "$x^": [(1.0, 0.6), (2.0, 0.7)]})
    plots.accuracy_bars({"$\\frac{": {"$": 0.5}})


def hostile(place, kind):
    """A run whose picture, or records, are not its own, or whose picture is none."""
    write_records(place / "run" / "records.json", [nats(1.5)])
    (place / "secret.png").write_bytes(b"secret")
    picture(place / "others" / "step-0000001.png", "red")
    write_records(place / "records.json", [nats(1.25)])
    run = place / "run"
    if kind == "picture":
        (run / "samples.png").symlink_to(place / "secret.png")
    elif kind == "real picture":
        (run / "training.png").symlink_to(place / "others" / "step-0000001.png")
    elif kind == "folder":
        (run / "samples").symlink_to(place / "others")
    elif kind == "records":
        (run / "score").mkdir()
        (run / "score" / "score.json").symlink_to(place / "records.json")
    elif kind == "log":
        write_records(run / "records.json", fine_tuned(0.5))
        (run / "trainer_state.json").symlink_to(place / "records.json")
    elif kind == "no picture":
        (run / "samples.png").write_text("text")
    elif kind == "half a picture":
        picture(run / "samples.png", "red")
        (run / "samples.png").write_bytes((run / "samples.png").read_bytes()[:50])
    return run


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("picture", "samples.png leads out of .*run by a link"),
        ("real picture", "training.png leads out"),
        ("folder", "step-0000001.png leads out"),
        ("records", "score.json leads out"),
        ("log", "trainer_state.json leads out"),
        ("no picture", "samples.png is no picture"),
        ("half a picture", "samples.png is no picture"),
    ],
)
def test_what_is_not_the_runs_own_is_not_reported(kind, message, drawn, tmp_path):
    run = hostile(tmp_path, kind)
    with pytest.raises(ValueError, match=message):
        reported(run, to=tmp_path / "report")
    assert not (tmp_path / "report" / "report.md").exists()


def test_a_report_is_not_written_through_links(drawn, tmp_path):
    write_records(tmp_path / "run" / "records.json", [nats(1.5)])
    picture(tmp_path / "run" / "samples.png", "red")
    (tmp_path / "secret").write_text("mine")
    to = tmp_path / "report"
    to.mkdir()
    for name in ("report.md", "report.md.partial", "layers.png"):
        (to / name).symlink_to(tmp_path / "secret")
    reported(tmp_path / "run", to=to)
    assert (tmp_path / "secret").read_text() == "mine" and not (to / "report.md").is_symlink()
    shutil.rmtree(to / "pictures")
    (tmp_path / "elsewhere").mkdir()
    (to / "pictures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of .*report by a link"):
        reported(tmp_path / "run", to=to)
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "log",
    [
        "[" * 100_000,
        "[]",
        '{"log_history": 3}',
        '{"log_history": [{"eval_accuracy": 1}]}',
        '{"log_history": ["eval_accuracy"]}',
        '{"log_history": [{"eval_accuracy": "x", "epoch": 1}]}',
        "",
    ],
)
def test_broken_logs_are_named(log, drawn, tmp_path):
    write_records(tmp_path / "run" / "records.json", fine_tuned(0.5))
    (tmp_path / "run" / "trainer_state.json").write_text(log)
    with pytest.raises(ValueError, match=r"trainer_state\.json does not hold the log of a run"):
        reported(tmp_path / "run", to=tmp_path / "report")


def test_each_run_once_under_a_name_of_its_own(story, drawn, tmp_path, monkeypatch):
    for place in ("x/one/run", "y/one/run", "y/other"):
        write_records(tmp_path / place / "records.json", [nats(1.5)])
    monkeypatch.chdir(tmp_path)
    text = reported(Path("."), Path("x"), tmp_path / "y" / "other", to=tmp_path / "report")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE)[-3:] == ["x/one/run", "y/one/run", "other"]
    assert text.count("| 359 |") == 3


def test_again_into_the_same_folder(story, drawn, tmp_path):
    first, second = (reported(story, to=tmp_path / "report") for _ in range(2))
    assert first == second
    reported(story / "causal", to=tmp_path / "report")
    names = {path.name for path in (tmp_path / "report").glob("*.*")}
    assert names == {"report.md", "layers.png", "loss-and-probe.png"}  # no figure is left of the earlier report


@pytest.mark.parametrize("probe_milestones", [False, True])
def test_folders_without_records_are_refused_before_anything_is_done(probe_milestones, story, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "probe", lambda *_: pytest.fail("probed"))
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

    monkeypatch.setattr(command, "probe", probe)
    arguments = ReportArguments([str(root)], str(tmp_path / "report"), probe_milestones=True)
    report(arguments, images)
    assert asked == [([str(place) for place in places], False, False, images)]
    assert drawn["loss_against_probe"]["causal"] == [(2.0111, 0.4321), (1.5222, 0.7022), (1.2671, 0.4321)]
    report(arguments, images)
    assert len(asked) == 1
