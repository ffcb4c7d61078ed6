"""`kart train`: one or several operators on one or several seeds."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kart import population, runs, tables, train, tree
from kart.commands.command import Command, integer
from kart.commands.config import OPERATORS_HELP, add_config_flags, config_of
from kart.train import Config, Record

SEED = integer(0, most=2**63 - 1)


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--operator", nargs="+", default=["softmax"], metavar="SPEC", help="see below"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=SEED, default=[0], metavar="INT", help="seeds (default 0)"
    )
    parser.add_argument(
        "--group",
        default="auto",
        help="seeds that train as one vmapped program; auto (default) measures what is fastest",
    )
    parser.add_argument("--out", help="run directory (default runs/<data>-<hash of the config>)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_config_flags(parser)


def _run(args: argparse.Namespace) -> int:
    if args.threads is None:
        args.threads = torch.get_num_threads()
    named = [config_of(args, operator=spec) for spec in args.operator]
    if len({runs.slug(spec) for spec in args.operator}) != len(args.operator):
        raise ValueError(f"`--operator` needs different operators, got {args.operator}.")
    splits = train.load_data(named[0])
    for config in named:
        train.build(config, splits.train)  # a bad operator is found before the first one trains
    out = Path(args.out or f"runs/{runs.slug(Path(args.data).name)}-{named[0].hash}")
    results: list[tuple[str, int, list[Record]]] = []
    for config in named:
        configs = population.seeds(config, args.seeds)
        home = out if len(named) == 1 else out / runs.slug(str(config.operator))
        size = runs.group_size(home) or _group_size(configs, splits, args.group)
        parts = runs.parts(configs, size, home)
        last: list[Record] = []
        for part, directory in parts:
            last += _train(part, splits, directory, args.quiet)
        parameters = tree.size(runs.load_weights(parts[0][1])[0])
        results.append((str(config.operator), parameters, last))
    rows = [
        [
            operator,
            tables.spread([record["val_top1"] for record in last]),
            tables.spread([record["val_top5"] for record in last]),
            tables.spread([record["val_loss"] for record in last], 3, 1.0),
            f"{parameters:,}",
            str(len(last)),
        ]
        for operator, parameters, last in results
    ]
    header = ["operator", "val top-1 %", "val top-5 %", "val loss", "parameters", "n"]
    print(tables.table(rows, header))
    print(f"written to {out}; score it on the test split with: kart eval {out}")
    return 0


def _group_size(configs: Sequence[Config], splits: train.Splits, asked: str) -> int:
    if len(configs) == 1:
        return 1
    if asked != "auto":
        return int(asked)
    size, seconds = population.fastest_group(configs, splits)
    shown = ", ".join(f"{k}: {1000 * s:.1f} ms" for k, s in seconds.items())
    print(f"{configs[0].operator}: {size} at a time (ms per member and step: {shown})")
    return size


def _train(
    configs: list[Config], splits: train.Splits, directory: Path, quiet: bool
) -> list[Record]:
    seeds = ",".join(str(config.seed) for config in configs)
    label = f"{configs[0].operator} seed {seeds}"
    record: Record = {}
    with tables.bar(desc=label, unit="step", disable=quiet) as bar:

        def on_step(step: int, total: int, loss: Any) -> None:
            if bar.total is None:
                bar.reset(total)
                bar.initial = bar.n = step - 1
            bar.update(1)

        for record in runs.execute(directory, configs, splits, on_step=on_step):
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
