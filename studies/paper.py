"""How close does kart come to the paper's tables, row by row, with the paper's recipe?

    python -m studies.paper --list                              # the rows, each with its command
    python -m studies.paper tiny-g3b-cifar10 --minutes 9        # train it for nine minutes, or on
    python -m studies.paper --table                             # published against ours

A row is the paper's recipe (`kart train --recipe paper`) with its model, operator and data. It
trains in slices: the same command goes on after the last finished epoch, and at the end scores the
test split (the paper's tables say top-1 of the test images). Numbers are those of Maity et al.
2025, arXiv:2503.10632, tables 1 and 6 and the appendix.

`--scale cpu` is another setting: the same recipe with 32 px images, patches of 8 and 10 epochs of
4,000 images, minutes a row for a machine without a GPU. Its numbers stand in a table of their own
and are not comparable with the paper's. No row of the paper's size has been trained here yet: none
of its numbers of ours was measured.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kart import runs, statistics, tables
from kart.commands.command import number, standalone

OUT = Path("runs/paper")
# the paper's recipe but for the size of images and of training
CPU = [
    *("--image-size", "32", "--patch-size", "8", "--epochs", "10", "--warmup-epochs", "0.5"),
    *("--train-limit", "4000", "--learning-rate", "5e-4"),
]
SCALES = {"paper": [], "cpu": CPU}


class Row(NamedTuple):
    """One number of the paper: where it stands, what trains it, top-1 in per cent."""

    table: str
    model: str
    operator: str
    data: str
    top1: float
    donor: str | None = None  # the row from whose weights it starts
    teacher: str | None = None  # the row whose attention it has

    @property
    def name(self) -> str:
        """The row's name on the command line."""
        size = self.model.removeprefix("vit_").replace("_", "-")
        parts = [size, runs.slug(self.operator).lower(), self.data.replace("_", "-")]
        return "-".join(parts)


def _rows(
    table: str, numbers: dict[str, float], model: str = "vit_tiny", data: str = "cifar10"
) -> list[Row]:
    return [Row(table, model, spec, data, top1) for spec, top1 in numbers.items()]


TABLE_1 = [
    *_rows("1", {"softmax": 83.45, "G1B": 81.81, "G1U": 80.75}, "vit_base", "cifar10"),
    *_rows("1", {"softmax": 58.07, "G1B": 55.92, "G1U": 57.36}, "vit_base", "cifar100"),
    *_rows("1", {"softmax": 72.90, "G1B": 68.03, "G1U": 68.83}, "vit_base", "imagenet"),
    *_rows("1", {"softmax": 81.08, "G3B": 79.78, "G3U": 79.52}, "vit_small", "cifar10"),
    *_rows("1", {"softmax": 53.47, "G3B": 54.11, "G3U": 53.86}, "vit_small", "cifar100"),
    *_rows("1", {"softmax": 70.50, "G3B": 67.77, "G3U": 67.76}, "vit_small", "imagenet"),
    *_rows("1", {"softmax": 72.76, "G3B": 76.69, "G3U": 75.56}, "vit_tiny", "cifar10"),
    *_rows("1", {"softmax": 43.53, "G3B": 46.29, "G3U": 46.75}, "vit_tiny", "cifar100"),
    *_rows("1", {"softmax": 59.15, "G3B": 59.11, "G3U": 57.97}, "vit_tiny", "imagenet"),
    *_rows("1", {"softmax": 71.36, "G3B": 75.57, "G3U": 74.51}, "convit_tiny", "cifar10"),
    *_rows("1", {"softmax": 57.91, "G3B": 56.57, "G3U": 56.51}, "convit_tiny", "imagenet"),
    *_rows("1", {"softmax": 84.83, "G3B": 79.34}, "swin_tiny", "cifar10"),
    *_rows("1", {"softmax": 76.14, "G3B": 73.19}, "swin_tiny", "imagenet"),
]

ABLATIONS = [
    *_rows("6: basis", {
        "rational-5/4B": 69.22, "mexican_hat-B": 69.62, "morlet-B": 70.84, "dog-B": 73.89,
        "meyer-B": 71.13, "shannon-B": 71.41,
    }),
    *_rows("base activation", {
        "G3B:unit_base=identity": 75.90, "G3B:unit_base=silu": 76.25, "G3B:unit_base=gelu": 76.48,
    }),
    # G3 is a row of table 1
    *_rows("grid", {"G1B": 75.75, "G5B": 75.85, "G7B": 75.11, "G9B": 74.85, "G11B": 74.52}),
    *_rows("grid", {"G1U": 74.94, "G5U": 74.71, "G7U": 74.45, "G9U": 73.97, "G11U": 73.58}),
    *_rows("grid", {"G3B": 80.09, "G5B": 79.80, "G11B": 50.47}, "vit_base"),
    *_rows("rank", {"G3B:rank=8": 80.76, "G3B:rank=24": 80.54}, "vit_base"),
    *_rows("order", {"G11B:order=project_first": 67.04, "G11B:order=two_stage": 33.09}),
    *_rows("simplex", {"G3B:project=simplex": 41.99, "G3U:project=simplex": 40.85}),
]  # fmt: skip


TRANSFER = [
    Row("fine-tuning", "vit_tiny", spec, data, top1, donor=f"tiny-{spec.lower()}-imagenet")
    for spec, numbers in (("softmax", (96.69, 84.21, 93.20)), ("G3B", (96.37, 83.67, 93.09)))
    for data, top1 in zip(("svhn", "flowers102", "stl10"), numbers, strict=True)
]

# `--operator` is the teacher's
ATTENTION = [
    Row("attention transfer", "vit_tiny", "given", data, top1, teacher=f"tiny-g3b-{data}")
    for data, top1 in (("cifar10", 77.94), ("cifar100", 48.91))
]

ROWS = {row.name: row for row in (*TABLE_1, *ABLATIONS, *TRANSFER, *ATTENTION)}


def rows(scale: str) -> dict[str, Row]:
    """The rows that can be trained at a scale: Swin's windows do not fit images of 32 px."""
    found = ROWS.items()
    return {name: row for name, row in found if scale == "paper" or "swin" not in row.model}


def home(row: Row, scale: str, out: Path = OUT) -> Path:
    """The run directory of a row."""
    return out / scale / row.name


def flags(row: Row, scale: str, out: Path = OUT) -> list[str]:
    """The arguments of `kart` that train a row.

    >>> shlex.join(flags(ROWS["tiny-g3b-cifar10"], "paper"))[:58]
    'train --recipe paper --model vit_tiny --operator G3B --dat'
    """
    operator = row.operator if row.teacher is None else ROWS[row.teacher].operator
    given = ["train", "--recipe", "paper", "--model", row.model, "--operator", operator]
    given += ["--data", row.data, *SCALES[scale]]
    if row.data == "imagenet" and scale == "paper":
        given += ["--batch-size", "128"]
    if row.donor is not None:
        given += ["--from", str(home(ROWS[row.donor], scale, out))]
    if row.teacher is not None:
        given += ["--attention-from", str(home(ROWS[row.teacher], scale, out))]
    return [*given, "--out", str(home(row, scale, out))]


def over(given: Sequence[str], rest: Sequence[str]) -> list[str]:
    """The arguments `given`, of which each flag has one value, with those of `rest` over them.

    >>> over(["train", "--data", "svhn", "--epochs", "10"], ["--data=digits", "--seeds", "0", "1"])
    ['train', '--epochs', '10', '--data=digits', '--seeds', '0', '1']
    """
    named = {word.partition("=")[0] for word in rest}
    pairs = zip(given[1::2], given[2::2], strict=True)
    return [given[0], *(word for pair in pairs if pair[0] not in named for word in pair), *rest]


def train(argv: Sequence[str], minutes: float) -> int:
    """Runs `kart` for at most so many minutes, then stops it as Ctrl-C does; its exit status."""
    process = subprocess.Popen([sys.executable, "-m", "kart", *argv])
    try:
        return process.wait(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return process.wait()
    except KeyboardInterrupt:  # which the child has got, too
        return process.wait()


def epochs(directory: Path) -> tuple[int, int]:
    """Finished and all epochs of the runs below `directory`, (0, 0) where there are none."""
    places = sorted(path.parent for path in directory.glob("**/config.json"))
    done = sum(len(runs.read_metrics(place)) for place in places)
    return done, sum(runs.read(place).configs[0].epochs for place in places)


def work(row: Row, scale: str, minutes: float, out: Path, rest: Sequence[str]) -> int:
    """One slice of a row, and its score on the test split once it is trained."""
    began, directory = time.monotonic(), home(row, scale, out)
    before = epochs(directory)[0]
    status = train(over(flags(row, scale, out), rest), minutes)
    done, total = epochs(directory)
    if status not in (0, 130):
        return status
    print(f"{row.name}: {done} of {total} epochs after {time.monotonic() - began:.0f} s more")
    if status == 0:
        return train(["eval", str(directory)], 60.0)
    if done == before:
        print("no epoch was finished in this slice: give it more --minutes", file=sys.stderr)
        return 1
    return 0


def ours(row: Row, scale: str, out: Path = OUT) -> str:
    """Our top-1 of a row with n and interval, of seeds that did not diverge; how far it is, or
    `-`.
    """
    directory = home(row, scale, out)
    places = sorted(path.parent for path in directory.glob("**/config.json"))
    if not places:
        return "-"
    done, total = epochs(directory)
    scores = [runs.read_scores(place, "test", "last") for place in places]
    found = [score for score in scores if score is not None]
    if len(found) < len(places):
        return f"({done} of {total} epochs)"
    bad = {(i, seed) for i, place in enumerate(places) for seed in runs.diverged(place)}
    values = [
        member["top1"]
        for i, score in enumerate(found)
        for member in score["members"]
        if (i, member["seed"]) not in bad
    ]
    told = f", {len(bad)} diverged" if bad else ""
    if not values:
        return f"n = 0{told}"
    images = {score["images"] for score in found}
    shown = statistics.accuracy(values, images.pop() if len(images) == 1 else None)
    return f"{shown.text()}, n = {len(values)}{told}"


def table(scale: str, out: Path = OUT) -> str:
    """All rows: published and ours; at another scale ours alone, of rows that have some."""
    if scale == "paper":
        lines = [
            [row.table, name, f"{row.top1:.2f}", ours(row, scale, out)]
            for name, row in ROWS.items()
        ]
        return tables.table(lines, ["table", "row", "published top-1 %", "ours top-1 %"])
    found = [(name, ours(row, scale, out)) for name, row in rows(scale).items()]
    lines = [[name, text] for name, text in found if text != "-"]
    told = f"another setting than the paper's: {shlex.join(SCALES[scale])}"
    return f"{told}\n" + tables.table(lines, ["row", f"ours at scale {scale}, top-1 %"])


def main(argv: Sequence[str] | None = None) -> int:
    """Lists rows, trains one, or prints the table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="further flags go to `kart train`, such as --data, --device cuda, --seeds 0 1 2",
    )
    parser.add_argument("row", nargs="?", help="a row to train (see --list)")
    parser.add_argument("--list", action="store_true", help="the rows and their commands")
    parser.add_argument("--table", action="store_true", help="published numbers and ours")
    parser.add_argument("--scale", default="paper", choices=list(SCALES))
    parser.add_argument("--minutes", type=number(0), default=9.0, help="of a slice (default 9)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    args, rest = parser.parse_known_args(argv)
    if args.row is None and rest:
        parser.error(f"{shlex.join(rest)} has no effect without a row to train: leave it out")
    if args.list:
        for name, row in rows(args.scale).items():
            command = f"kart {shlex.join(flags(row, args.scale, args.out))}"
            print(f"{name}  [{row.table}, published {row.top1:.2f}]\n    {command}")
    if args.table:
        print(table(args.scale, args.out))
    if args.row is None:
        if not (args.list or args.table):
            parser.error("name a row, --list or --table")
        return 0
    if args.row not in rows(args.scale):
        parser.error(f"no row of scale {args.scale} is called {args.row!r}: see --list")
    if not args.minutes > 0:
        parser.error(f"--minutes needs to be > 0, got {args.minutes}")
    try:
        return work(ROWS[args.row], args.scale, args.minutes, args.out, rest)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    standalone(main)
