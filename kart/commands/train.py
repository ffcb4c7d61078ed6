"""`kart train`: one or several operators on one or several seeds."""

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator

from kart import data, distributed, operators, population, recipes, runs, statistics, tables, train
from kart.analysis import cost
from kart.commands.command import Command, integer, number, place
from kart.commands.config import (
    OPERATORS_HELP,
    add_config_flags,
    check_device,
    check_effects_on,
    configs_of,
)
from kart.runs import donors
from kart.train import Config, Record

SEED = integer(0)
MOST_STEPS = 10**9
LONG_S = 86_400.0  # what would take longer is said


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--operator", nargs="+", default=["softmax"], metavar="SPEC", help="see below")
    add("--seeds", nargs="+", type=SEED, default=[0], metavar="INT", help="seeds (default 0)")
    add(
        "--group",
        type=_group,
        default="auto",
        metavar="INT",
        help="seeds that train as one vmapped program; auto (default) measures what is fastest",
    )
    add("--out", type=place, help="run directory (default runs/<data>-<hash of the config>)")
    add("--quiet", action="store_true", help="no progress bar")
    add(
        "--space-timeout",
        type=number(0),
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for room where the disk is full (600)",
    )
    add(
        "--workers",
        type=integer(0, 256),
        metavar="INT",
        help="processes that decode images that stream (the cores but one), shared by seeds that "
        "train together: no batch depends on it",
    )
    add_config_flags(parser)


def _run(args: argparse.Namespace) -> int:
    args.threads = getattr(args, "threads", None) or torch.get_num_threads()
    device = getattr(args, "device", Config.device)
    check_device(device)
    with distributed.joined(device) as ranks:
        return _run_on(ranks, args)


def _run_on(ranks: train.Ranks, args: argparse.Namespace) -> int:
    named = configs_of(args)
    seeds = [config.seed for config in population.seeds(named[0], args.seeds)]
    splits = train.load_data(named[0], workers=args.workers)
    _check_flags(args, len(seeds), splits, ranks)
    out = Path(args.out) if args.out else runs.default_directory(named, seeds)
    args.out = str(out)  # where the traceback of what nobody foresaw goes
    homes = runs.homes(named, out)
    # nothing is written before all of it is known to be in order
    for config, home in zip(named, homes, strict=True):
        _check(config, splits, ranks, args)
        members = population.seeds(config, seeds)
        for _, directory in runs.parts(members, 1, home):
            runs.check_place(directory)
        # a run that was begun needs its donor no more, and the one that begins first looks itself
        if ranks.rank == 0 and not any(home.glob("**/last.safetensors")):
            alone = home == homes[0] and ranks.size == 1
            donors.check(members[1:] if alone else members, splits)
    if ranks.size > 1:
        described = [runs.describe([config], splits)["run"] for config in named]
        distributed.check_same(ranks, "data and configuration", " ".join(described))
    if ranks.rank:
        for config in named:
            for one in population.seeds(config, seeds):
                with contextlib.suppress(train.Diverged):  # which rank 0 tells
                    distributed.follow(ranks, one, splits)
        return 0
    if named[0].recipe is not None:
        changes = recipes.overridden(named[0])
        shown = ", ".join(f"{name} {value}" for name, value in changes.items())
        print(f"recipe {named[0].recipe}{', but ' if shown else ''}{shown}")
    results: list[_Result] = []
    told: list[str] = []
    for config, home in zip(named, homes, strict=True):
        result, lines = _train_one(population.seeds(config, seeds), splits, home, args, ranks)
        told += lines
        if result.records:
            results.append(result)
    print("\n".join([_table(results)] * bool(results) + told))
    if results:
        score = shlex.join(["kart", "eval", str(out), *_code_flags(named)])
        print(f"written to {out}; score it on the test split with: {score}")
    return 0 if len(results) == len(named) else 1


def _check_flags(
    args: argparse.Namespace, seeds: int, splits: train.Splits, ranks: train.Ranks
) -> None:
    """Raises ValueError for flags without effect; several processes train one seed at a time."""
    if args.workers is not None and not isinstance(splits.train.images, data.Pictures):
        raise ValueError(
            f"`--workers` has no effect on {splits.train.name!r}, whose images are decoded: "
            "leave it out, or let them stream with `--stream yes`."
        )
    if args.group != "auto" and seeds == 1:
        raise ValueError("`--group` needs several seeds, got one. Leave it out.")
    if ranks.size > 1:
        if args.group not in ("auto", 1):
            raise ValueError(
                f"`--group` needs to be 1 with {ranks.size} processes, got {args.group}: a "
                "population is one process. Leave it out."
            )
        args.group = 1


class _Result(NamedTuple):
    """An operator: its name, its parameters, and the last records of the seeds that are fine."""

    operator: str
    parameters: int
    records: list[Record]


def _train_one(
    configs: Sequence[Config],
    splits: train.Splits,
    home: Path,
    args: argparse.Namespace,
    ranks: train.Ranks,
) -> tuple[_Result, list[str]]:
    """Trains the seeds of one operator below `home`; and what is to be told at the end."""
    size = _group_size(configs, splits, args.group, home)
    parts = runs.parts(configs, size, home)
    last: list[Record] = []
    name, bad = operators.shown(configs[0].operator), dict[int, int]()
    model = train.build(configs[0], splits.train)
    for part, directory in parts:
        try:
            found = _train(part, splits, directory, args.quiet, args.space_timeout, ranks)
        except train.Diverged as error:
            # the seeds of other parts go on, as those of this one would
            found, shown = [], ", ".join(str(one.seed) for one in part)
            print(f"kart: {name} seed {shown}: {error}", file=sys.stderr)
        last += [one for one in found if one["diverged"] < 0]
        bad |= runs.diverged(directory)
    print("".join(f"{one}\n" for one in {donors.told(home) for _, home in parts} if one), end="")
    told = statistics.left_out(name, bad)
    if unused := cost.told(cost.unused(model)):
        told.append(f"{name} has parameters without effect: {unused}.")
    return _Result(name, cost.parameters(model).total, last), told


def _table(results: Sequence[_Result]) -> str:
    rows = [
        [operator, *tables.scores(last, "val_"), f"{parameters:,}", str(len(last))]
        for operator, parameters, last in sorted(results, key=runs.baseline_first)
    ]
    header = ["operator", "val top-1 %", "val top-5 %", "val loss", "parameters", "n"]
    return tables.table(rows, header)


def _code_flags(configs: Sequence[Config]) -> list[str]:
    """What other commands must be told to run of the code that the operators name."""
    names = set[str]().union(*(operators.sources(config.operator) for config in configs))
    return [word for name in sorted(names) for word in ("--code", name)]


def _check(
    config: Config, splits: train.Splits, ranks: train.Ranks, args: argparse.Namespace
) -> None:
    """Raises ValueError for what would stop `config` later: an operator that does not fit the
    model, found by a pass over one image, parameters that it has not, too large a batch; and for
    flags in `args` without effect on such data.
    """
    model = train.build(config, splits.train)
    # weights, gradients and AdamW's two moments
    needed = 16 * cost.parameters(model).total
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if config.device == "cpu" and needed > memory:
        raise ValueError(
            f"`kart train` needs parameters that fit the {memory / 2**30:.0f} GiB of memory, got "
            f"{needed / 2**30:,.0f} GiB of them with their moments. Choose a smaller model."
        )
    pixels = data.as_float(data.take(splits.val, torch.arange(1))[0])
    with torch.no_grad():
        model.apply(model.init(Generator()), train.prepare(pixels, splits.val, config))
    steps_per_epoch = train.solo(config, splits, model, ranks).steps_per_epoch
    check_effects_on(vars(args), config, model.config.image_size, steps_per_epoch)
    steps = config.epochs * steps_per_epoch
    if steps > MOST_STEPS:
        raise ValueError(
            f"`--epochs` needs at most {MOST_STEPS:,} steps together, got {steps:,}: even at 1 ms "
            f"each {steps / 86_400_000:,.0f} days. Train for fewer epochs."
        )
    if config.trajectory:
        runs.snapshot_steps(config.trajectory, steps)


def _group(text: str) -> int | str:
    return text if text == "auto" else integer(1)(text)


def _group_size(
    configs: Sequence[Config], splits: train.Splits, asked: int | str, home: Path
) -> int:
    if len(configs) == 1:
        return 1
    begun = runs.group_size(home)
    if isinstance(asked, int):
        if asked > len(configs):
            raise ValueError(f"`--group` needs at most the {len(configs)} seeds, got {asked}.")
        if begun not in (None, len(population.groups(configs, asked)[0])):
            raise ValueError(
                f"`--group` needs to be that of the run that was begun in {str(home)!r}, {begun}, "
                f"got {asked}. Leave it out, or choose another directory."
            )
        return asked
    if begun is not None:
        return begun
    size, seconds = population.fastest_group(configs, splits)
    shown = ", ".join(f"{k}: {1000 * s:.1f} ms" for k, s in seconds.items())
    name = operators.shown(configs[0].operator)
    print(f"{name}: {size} at a time (ms per member and step: {shown})")
    return size


def _train(
    configs: list[Config],
    splits: train.Splits,
    directory: Path,
    quiet: bool,
    wait_s: float,
    ranks: train.Ranks,
) -> list[Record]:
    seeds = ",".join(str(config.seed) for config in configs)
    label = f"{operators.shown(configs[0].operator)} seed {seeds}"
    record: Record = {}
    marks: list[float] = []
    with tables.bar(desc=label, unit="step", disable=quiet) as bar:

        def on_step(step: int, total: int, loss: Any) -> None:
            if bar.total is None:
                bar.reset(total)
                bar.initial = bar.n = step - 1
            bar.update(1)
            marks.append(time.monotonic())
            if len(marks) == 11:  # the first steps warm up
                left = (marks[-1] - marks[5]) / 5 * (total - step)
                if left > LONG_S:
                    tell = f"{label}: about {left / 86_400:,.0f} days for {total:,} steps"
                    print(f"{tell}; stop it with Ctrl-C, it goes on later", file=sys.stderr)

        for record in runs.execute(
            directory, configs, splits, on_step=on_step, space_timeout=wait_s, ranks=ranks
        ):
            top1 = [one["val_top1"] for one in population.split_record(record, len(configs))]
            shown = tables.spread(top1)
            bar.set_postfix_str(f"epoch {record['epoch']}/{configs[0].epochs} val {shown} %")
    return population.split_record(record, len(configs))


COMMAND = Command(
    "train",
    "train one or several operators on one or several seeds",
    _flags,
    _run,
    description="Trains a vision transformer. Killed and started again with the same command it "
    "goes on where it stopped, to the same result.",
    epilog=OPERATORS_HELP,
)
