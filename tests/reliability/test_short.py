"""The soak in a minute: a few of each kind. `make soak` has all of them."""

import pytest
from damage import changed_arguments, damaged_checkpoints
from fuzz import KINDS, fuzz
from kills import kill_runs
from load import in_threads
from outcomes import Count, alike, read_counts, rows, write_counts
from trials import Trials


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    with Trials(tmp_path_factory.mktemp("trials")) as running:
        yield running


def assert_right(counts):
    counts = list(counts)
    assert counts and all(count.injected for count in counts)
    assert not [(count.what, count.examples) for count in counts if count.wrong]


@pytest.mark.parametrize("name", ["causal, flips", "fine-tuning, early stopping"])
def test_killed_runs_end_as_if_nothing_had_been(trials, tmp_path, name):
    assert_right(kill_runs(trials, tmp_path, [name], at_events=2, at_random=1, seed=0))


def test_damaged_checkpoints_are_not_continued(trials, tmp_path):
    assert_right(damaged_checkpoints(trials, tmp_path, ["causal, flips"], share=0.08))


def test_changed_arguments_are_refused_or_change_nothing(trials, tmp_path):
    assert_right(changed_arguments(trials, tmp_path, ["causal, flips"], share=0.08))


def test_threads_get_what_one_thread_gets(trials, tmp_path):
    assert_right(in_threads(trials, tmp_path, seed=0, times=0.05))


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "indexes"]
)  # which need TensorFlow, imported in 10 s
def test_what_others_made_is_read_or_refused(trials, tmp_path, kind):
    assert_right(fuzz(trials, tmp_path, seed=0, times=0.005, kinds=[kind]))


def test_counts_and_their_table(tmp_path):
    count = Count("kills", "a scenario", allowed=("equal", "refused"))
    for outcome, said in (
        ("equal", ""),
        ("refused", "no"),
        ("silent", "step 3"),
        ("silent", "step 5"),
        ("lost", "all"),
    ):
        count.add(outcome, "a fault", said)
    assert (count.injected, count.wrong, [example["times"] for example in count.examples]) == (5, 3, [2, 1])
    write_counts(tmp_path / "counts.json", {}, [count])
    assert read_counts(tmp_path / "counts.json") == [count]
    _, row, _, total = rows([count, count])
    assert row == ("kills", "a scenario", "5", "1", "1", "2 ✗", "–", "1 ✗") and total[2:] == (
        "10",
        "2",
        "2",
        "4",
        "0",
        "2",
    )
    assert alike("traceback", "KeyError at a.py:3: x") == alike("traceback", "KeyError at a.py:3: y")
