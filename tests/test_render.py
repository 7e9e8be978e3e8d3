"""Every table, card and report that records, presets or the planner stand behind is what they say now."""

import importlib.util
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("render", ROOT / "reports" / "render.py")
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)


@pytest.fixture(scope="module")
def rendered():
    return render.render_all()


def test_files_are_what_is_rendered(rendered):
    for name, text in rendered.items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name}: run make render"


def test_everything_that_can_be_rendered_is(rendered):
    """Every card, every report of runs, every kind of table; and every mark has an end."""
    assert {f"model_cards/{path.name}" for path in (ROOT / "model_cards").glob("*.md")} <= set(rendered)
    assert {f"checkpoints/{path.parent.name}/README.md" for path in ROOT.glob("checkpoints/*/config.json")} <= set(
        rendered
    )
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "reports").rglob("report.md")} <= set(rendered)
    marks = {}
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "reports").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        for kind in re.findall(r"<!-- ([\w ]+):", text):
            marks.setdefault(kind, set()).add(path.relative_to(ROOT).as_posix())
        assert text.count("<!-- end -->") == len(re.findall(r"<!-- [\w ]+:", text)), path
    assert set(marks) == {"records", "speed", "reliability", "plan memory", "plan hours", "plan fits"}
    assert set().union(*marks.values()) <= set(rendered)
    assert marks["speed"] == {"README.md", "docs/speed.md"}


def test_a_changed_table_is_made_anew_and_nothing_else():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    spoiled = text.replace("nats/pixel |", "nats/pixel, or so |")
    assert spoiled != text and render.render_tables(spoiled) == text


@pytest.mark.parametrize("mark", ["records: reports/digits-tiny/records.json train", "speed: nowhere.json"])
def test_a_mark_of_no_table_is_refused(mark):
    with pytest.raises((ValueError, OSError), match=r"no table|No such file"):
        render.render_tables(f"<!-- {mark} -->\nx\n<!-- end -->")


def test_pictures_of_reports_are_there(rendered):
    for name, text in rendered.items():
        for picture in re.findall(r"!\[.*\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / name).parent.joinpath(picture).is_file(), f"{name}: {picture}"
