"""`kart analyse`: one page on runs."""

import argparse
import dataclasses
import functools
import multiprocessing
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from kart import code, runs, tables, train
from kart.analysis import cost, report, scores, training
from kart.analysis.section import Analysis, Context
from kart.commands.command import Command, commas, file, flag, integer, number
from kart.commands.config import check_code
from kart.runs import owned

# what sections may use (see `kart.analysis.section.OPTIONS`): least, and what it says
OPTIONS = {
    "images": ("shown", 0, "images with attention maps"),
    "examples": ("examples", 16, "validation images that losses are taken on"),
    "points": ("points", 11, "a side of the pictured surfaces, 11, 21, 31 ..."),
    "retrain": (
        *("retrain", 0),
        "steps of training after learned functions are made simple; 0 for none",
    ),
    "memory_mib": ("limit_mib", 64, "what a section may hold at a time"),
}
DEFAULTS = {name: getattr(Context, field) for name, (field, *_) in OPTIONS.items()}


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", nargs="+", help="directories that `kart train` wrote")
    add("--out", type=file, metavar="HTML", help="the page (default report.html in the first)")
    add("--title", help="its headline")
    add("--sections", type=commas, metavar="NAMES", help="comma-separated; default all")
    add("--minutes", type=number(0), help="for all slow sections together (28)")
    add(
        "--processes",
        type=integer(1),
        metavar="INT",
        help="that share the runs, one thread each (1)",
    )
    for name, (_, least, text) in OPTIONS.items():
        add(flag(name), type=integer(least), metavar="INT", help=f"{text} ({DEFAULTS[name]})")
    add("--checkpoint", default="last", choices=["last", "best"])
    add("--data", help="where the data is now, if it has moved")


def _context(args: argparse.Namespace) -> Context:
    """The runs as results, their data, and what sections may ask for besides."""
    results = runs.compare(*args.run, which=args.checkpoint)
    config = results[0].configs[0]
    assert results[0].homes is not None  # those that were read have them
    first = results[0].homes[0]
    own = runs.read(first).data
    source = owned.place(str(first), own, config.data, args.data)
    return Context(
        results,
        owned.load(str(first), own, dataclasses.replace(config, data=source)),
        cache=Path(args.run[0]) / "analysis",
        say=functools.partial(print, file=sys.stderr, flush=True),
        **{field: getattr(args, name) for name, (field, *_) in OPTIONS.items()},
    )


def _measure(args: argparse.Namespace, part: int) -> None:
    """The part of one process."""
    torch.set_num_threads(1)
    for name in args.code:
        code.use(name)
    report.measure(_context(args), _sections(args), args.minutes, part, args.processes)


def _sections(args: argparse.Namespace) -> Sequence[Analysis]:
    return report.SECTIONS if args.sections is None else report.select(args.sections)


def _check_effects(args: argparse.Namespace, sections: Sequence[Analysis]) -> None:
    """Raises ValueError for flags that none of `sections` uses, and fills in what was not given."""
    used = {field for one in sections for field in one.uses}
    idle = {name: field not in used for name, (field, *_) in OPTIONS.items()}
    idle["minutes"] = not any(one.minutes for one in sections)
    idle["processes"] = not any(one.measure for one in sections)
    for name, is_idle in idle.items():
        if getattr(args, name) is not None and is_idle:
            raise ValueError(
                f"`{flag(name)}` has no effect on the sections "
                f"{', '.join(one.name for one in sections)}. Leave it out, or choose others."
            )
    for name, default in {**DEFAULTS, "minutes": 28.0, "processes": 1}.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    check_code(args.code, *args.run)
    sections = _sections(args)
    _check_effects(args, sections)
    if args.points % 10 != 1:
        raise ValueError(f"`--points` needs 11, 21, 31 or so on, got {args.points}. Take 41.")
    out = Path(args.out or Path(args.run[0]) / "report.html")
    report.check_out(out)
    runs.check_writable(Path(args.run[0]))  # which keeps what is computed
    context = _context(args)
    results, splits = context.results, context.splits
    for directory in runs.find(*args.run):
        owned.check(str(directory), runs.read(directory).data, splits)
    if args.processes > 1:
        # spawn: a fork of a process that has run torch may hang
        spawn = multiprocessing.get_context("spawn")
        given = {name: v for name, v in vars(args).items() if name not in ("call", "parser")}
        workers = [
            spawn.Process(target=_measure, args=(argparse.Namespace(**given), part), daemon=True)
            for part in range(args.processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    minutes = max(0.0, args.minutes - (time.monotonic() - began) / 60)
    title = args.title or f"{', '.join(one.name for one in results)} on {splits.train.name}"
    done = report.analyse(
        context, sections, minutes, out, title=title, command=shlex.join(["kart", *args.given])
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
    "one page on runs: scores, functions, attention, spectra, landscape, curvature, cost",
    _flags,
    _run,
    reads=True,
    description="Takes apart, side by side, what `kart train` trained at or below some "
    "directories, and writes a self-contained page with its numbers beside it as JSON and CSV: "
    "training curves, learned functions, attention maps and how well they find objects, spectra, "
    "distributions of weights, loss landscape and path, curvature, cost. Scores are those of the "
    "test split where `kart eval` has scored every run, else of the validation split. What was "
    "computed is kept beside the runs: a second call is quick, and one that was killed goes on. "
    "Train with `--trajectory 60` for the landscape and the distributions over training.",
)
