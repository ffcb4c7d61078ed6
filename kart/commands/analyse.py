"""`kart analyse`: one page on runs."""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from kart import runs, tables, train
from kart.commands.command import Command, integer, number
from kart.runs import owned


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="directory that `kart train` wrote")
    parser.add_argument("--out", metavar="HTML", help="the page (default RUN/report.html)")
    parser.add_argument("--title", help="its headline")
    parser.add_argument(
        "--images", type=integer(0), default=4, metavar="INT", help="images with attention maps (4)"
    )
    parser.add_argument("--sections", metavar="NAMES", help="comma-separated; default all")
    parser.add_argument(
        "--minutes", type=number(0), default=float("inf"), help="for all slow sections together"
    )
    parser.add_argument("--checkpoint", default="last", choices=["last", "best"])
    parser.add_argument("--data", help="where the data is now, if it has moved")


def _run(args: argparse.Namespace) -> int:
    from kart.analysis import cost, report, scores, training

    results = runs.compare(args.run, args.checkpoint)
    config = results[0].configs[0]
    config = dataclasses.replace(config, data=args.data or config.data)
    splits = train.load_data(config)
    for directory in runs.find(args.run):
        owned.check(str(directory), runs.read(directory).data, splits)
    out = Path(args.out or Path(args.run) / "report.html")
    title = args.title or f"{', '.join(one.name for one in results)} on {splits.train.name}"
    done = report.analyse(
        results,
        splits,
        report.select(args.sections.split(",")) if args.sections else report.SECTIONS,
        args.minutes,
        out,
        title=title,
        command=shlex.join(["kart", *args.given]),
        shown=args.images,
        cache=Path(args.run) / "analysis",
        say=lambda line: print(line, file=sys.stderr),
    )
    split = "val" if results[0].test is None else "test"
    rows = []
    for result in results:
        counted = cost.parameters(train.build(result.configs[0], splits.train))
        numbers = [f"{counted.total:,}", f"{counted.operator:,}", str(len(result.configs))]
        rows.append([result.name, tables.spread(result.top1), *numbers])
    header = ["operator", f"{split} top-1 %", "parameters", "in operators", "n"]
    print(tables.table(rows, header))
    print("\n".join([*scores.verdicts(results), *training.warnings(results)]))
    for one in done:
        if one.problem:
            print(f"{one.name} is not shown: {one.problem}")
    print(f"written to {out}, its numbers beside it as .json and .csv")
    return 0


COMMAND = Command(
    "analyse",
    "one page on runs: curves, learned functions, attention maps",
    _flags,
    _run,
    reads=True,
    description="Compares the operators that `kart train` trained at or below a directory, and "
    "writes a self-contained page: training curves, the functions that each head learned, "
    "attention maps over validation images. Scores are those of the test split where `kart eval` "
    "has scored every run, else of the validation split.",
)
