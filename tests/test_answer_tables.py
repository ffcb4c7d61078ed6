"""What README.md and studies/README.md say of the answer is what the file of all runs says."""

import itertools
import re
from pathlib import Path

import pytest

from kart import statistics
from studies import answer, answer_tables

ROOT = Path(__file__).parent.parent
WRITTEN = (ROOT / "README.md").read_text(), (ROOT / "studies" / "README.md").read_text()
RECORDS = answer_tables.read(answer_tables.RUNS)
SCORES = answer.tested(RECORDS)


@pytest.mark.parametrize("index", range(5))
def test_the_tables_are_those_of_the_runs(index):
    (wanted,) = answer_tables.tables(SCORES)[index : index + 1]
    assert wanted in WRITTEN[0 if index == 0 else 1], wanted


def views():
    """The scores at the rates that were chosen, of the first three seeds, at the rates of the
    centre, and with one rate for all arms.
    """
    yield SCORES
    yield {key: {seed: own[seed] for seed in own if seed < 3} for key, own in SCORES.items()}
    yield answer.tested(RECORDS, own=False)
    for rate in answer.RATES:
        found = {}
        for one in RECORDS:
            if one["rate"] == rate and not one["tuning"]:
                found.setdefault((one["cell"], one["arm"]), {})[one["seed"]] = one["test_top1"]
        yield found


def intervals():
    """Every difference, share and slope that the runs give, as text without signs."""
    for scores, cell in itertools.product(views(), answer.CELLS):
        yield answer_tables.share(scores, cell)
        for arm, over in itertools.permutations(answer.ARMS, 2):
            yield answer_tables.points(answer.gain(scores, cell, arm, over), "")
    for trend in answer.trends(RECORDS).values():
        for mean, low, high in (trend.centre, *trend.slopes.values()):
            yield f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def test_the_intervals_in_the_text_are_those_of_the_runs():
    known = set(intervals())
    found = []
    titles = ("What was found", "Is learnable attention better than softmax?")
    for document, title in zip(WRITTEN, titles, strict=True):
        part = document.split(f"\n## {title}\n")[1].split("\n## ")[0]
        text = re.sub(r"\s+", " ", part)
        found += re.findall(r"-?[\d.]+ \[[-\d.]+, [-\d.]+\]", text)
    assert len(found) > 40
    # of another study and of the blocks of a model
    other = {"7.9 [6.1, 9.7]", "8.7 [8.5, 8.9]"}
    assert not sorted(set(found) - known - other)


def test_a_share_and_a_top1_of_the_tables_by_hand():
    scores = {
        ("centre", "softmax"): {0: 0.30, 1: 0.32},
        ("centre", "G3"): {0: 0.40, 1: 0.43},
        ("centre", "polynomial-0"): {0: 0.35, 1: 0.37},
    }
    mean = 100 * statistics.accuracy([0.40, 0.43]).mean
    shown = answer_tables.top1(scores, "centre", "G3")
    assert shown.startswith(f"{mean:.1f} (2), +10.5 [+4.1, +16.9]")
    assert answer_tables.top1(scores, "centre", "relative") == "not run"
    assert answer_tables.share(scores, "centre").startswith("0.5")
    assert answer_tables.table(["", "a"], [["b", "1"]]) == "| | a |\n|---|---|\n| b | 1 |"


@pytest.mark.parametrize("line", ["a,b\n1,2", "cell,arm,rate\nnowhere,softmax,1"])
def test_a_file_of_something_else_is_named(line, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(f"{line}\n")
    with pytest.raises(ValueError, match="in line 2 of .*runs.csv"):
        answer_tables.read(path)
