"""The tables of the answer in README.md and studies/README.md, from the file of all runs.

    python -m studies.answer_tables                          # studies/answer_runs.csv
    python -m studies.answer_tables runs/answer/runs.csv     # what `studies.answer report` wrote

`tests/test_answer_tables.py` holds both to them.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kart import statistics
from kart.commands.command import standalone
from kart.statistics import Interval
from studies import answer

RUNS = Path(__file__).parent / "answer_runs.csv"
SHARE = "share of G3's gain that is a function of the scores"

# what the table of README.md calls the arms and the cells
HEADLINE = {
    "G3": "KArAt: G3",
    "polynomial-0": "the control, no scores",
    "softmax + relative": "`softconv`",
}
LENGTHS = {
    "centre": "8,000 images, 10 epochs: 1,250 steps",
    "16,000 images": "16,000, 10: 2,500",
    "30 epochs": "8,000, 30: 3,750",
    "45,000 images": "45,000, 10: 7,030",
    "60 epochs": "8,000, 60: 7,500",
    "45,000 images, 30 epochs": "45,000, 30: 21,090",
}
TOKENS = {
    "patch 4": "65 tokens; 8,000, 10: 1,250",
    "patch 4, 30 epochs": "65 tokens; 8,000, 30: 3,750",
    "patch 4, 45,000 images": "65 tokens; 45,000, 10: 7,030",
}
SIZES = {
    "2,000 images": "2,000",
    "4,000 images": "4,000",
    "centre": "8,000, width 64",
    "16,000 images": "16,000",
    "width 32": "width 32",
    "width 128": "width 128",
}
SHAPES = {
    "centre": "16 patches, 2 blocks",
    "patch 4": "64 patches",
    "patch 4, 30 epochs": "64 patches, 30 epochs: 3,750 steps",
    "patch 4, 45,000 images": "64 patches, 45,000 images: 7,030 steps",
    "depth 4": "4 blocks",
}
NAMES = {
    "relative": "the table alone, no scores",
    "softmax + relative": "**`softconv`**: softmax + signed table by offset",
    "softmax + relative + G3": "G3 on top of `softconv`",
    "relative + phi(S, offset)": "the table and a learned function by offset",
    "softmax(S + relative)": "the table inside softmax",
    "polynomial-0": "polynomial-0: a static row, no scores",
    "polynomial-1": "polynomial-1: affine in the score",
    "G3": "G3: a learned function",
}
LASTING = ("softmax", "softmax + relative", "polynomial-0", "polynomial-1", "G3")
BESIDE = ("softmax + relative + G3", "relative + phi(S, offset)", "softmax(S + relative)")
SHAPED = (*LASTING[:2], *BESIDE, *LASTING[2:])
LESS = {
    "G3 less polynomial-0": ("G3", "polynomial-0"),
    "`softconv` less polynomial-0": ("softmax + relative", "polynomial-0"),
    "`softconv` less G3": ("softmax + relative", "G3"),
}
OUTSIDE = {
    "G3 on top of `softconv`, less `softconv`": ("softmax + relative + G3", "softmax + relative"),
    "`softconv` less the table inside": ("softmax + relative", "softmax(S + relative)"),
}


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file that `studies.answer report` wrote."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for place, row in enumerate(rows, 2):
        if row.get("cell") not in answer.CELLS or row.get("arm") not in answer.ARMS:
            raise ValueError(
                "`answer_tables` needs the cells and arms of studies/answer.py, got "
                f"{row.get('cell')!r} and {row.get('arm')!r} in line {place} of {str(path)!r}. "
                "Name a runs.csv that `studies.answer report` wrote."
            )
    return [
        {
            "cell": row["cell"],
            "arm": row["arm"],
            "rate": float(row["rate"]),
            "seed": int(row["seed"]),
            "tuning": int(row["seed"]) == answer.TUNING_SEED,
            "val_top1": float(row["val_top1"]),
            "test_top1": float(row["test_top1"]) if row["test_top1"] else None,
        }
        for row in rows
    ]


def points(found: Interval | None, sign: str = "+") -> str:
    """A difference in points of top-1, `+6.4 [+5.9, +6.9]`."""
    return "" if found is None else found.text(digits=1, sign=sign)


def share(scores: answer.Scores, cell: str) -> str:
    """The share of the scores in G3's gain; "unclear" where its interval has no bounds."""
    found = answer.score_share(scores, cell)
    if found is None:
        return ""
    return "unclear" if found.why else found.text(1.0)


def top1(scores: answer.Scores, cell: str, arm: str) -> str:
    """Test top-1 in per cent with its number of seeds, and the gain over softmax."""
    own = list(scores.get((cell, arm), {}).values())
    if not own:
        return "not run"
    mean = f"{100 * statistics.accuracy(own).mean:.1f} ({len(own)})"
    gain = "" if arm == "softmax" else points(answer.gain(scores, cell, arm))
    return f"{mean}, {gain}" if gain else mean


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0].replace("|  |", "| |"), "|---" * len(head) + "|", *lines[1:]])


def by_cell(
    scores: answer.Scores,
    cells: Mapping[str, str],
    arms: Sequence[str],
    less: Mapping[str, tuple[str, str]],
    shares: bool,
) -> str:
    """A table with a column a cell and a row an arm, then differences and shares."""
    rows = [[NAMES.get(arm, arm), *(top1(scores, cell, arm) for cell in cells)] for arm in arms]
    rows += [
        [name, *(points(answer.gain(scores, cell, *pair)) for cell in cells)]
        for name, pair in less.items()
    ]
    rows += [[SHARE, *(share(scores, cell) for cell in cells)]] * shares
    return table(["", *cells.values()], rows)


def headline(scores: answer.Scores) -> str:
    """The first table: a row a length of training, gains over softmax with their pairs of seeds."""

    def gains(cell: str) -> list[str]:
        found = [answer.gain(scores, cell, arm) for arm in HEADLINE]
        return [f"{points(one)} ({one.n})" if one else "not run" for one in found]

    rows = [
        [words, top1(scores, cell, "softmax"), *gains(cell)]
        for cell, words in {**LENGTHS, **TOKENS}.items()
    ]
    return table(["", "softmax %", *HEADLINE.values()], rows)


def tables(scores: answer.Scores) -> list[str]:
    """The table of README.md, and those of studies/README.md in their order."""
    tried = [arm for arm in answer.ARMS if ("width 32", arm) in scores]
    return [
        headline(scores),
        by_cell(scores, SIZES, tried, {}, False),
        by_cell(scores, SIZES, [], answer.PARTS, True),
        by_cell(scores, LENGTHS, LASTING, LESS, False),
        by_cell(scores, SHAPES, SHAPED, LESS | OUTSIDE, True),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("runs", nargs="?", type=Path, default=RUNS, help="a file of runs")
    print("\n\n".join(tables(answer.tested(read(parser.parse_args(argv).runs)))))
    return 0


if __name__ == "__main__":
    standalone(main)
