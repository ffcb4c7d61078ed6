"""`kart eval`: scores runs on the test split."""

import argparse
import dataclasses

import torch

from kart import operators, runs, tables, train, tree
from kart.commands.command import Command
from kart.commands.config import check_device
from kart.runs import owned


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="directory that `kart train` wrote")
    parser.add_argument("--split", default="test", choices=["test", "val", "train"])
    parser.add_argument("--checkpoint", default="last", choices=["last", "best"])
    parser.add_argument("--data", help="where the data is now, if it has moved")
    parser.add_argument("--device", help="cpu or cuda (default that of the run)")


def _run(args: argparse.Namespace) -> int:
    check_device(args.device)
    by_operator: dict[str, list[dict[str, float]]] = {}
    found = runs.distinct(args.run)
    for directory in found:
        # the test split is read once, at the end
        runs.check_finished(directory, runs.read_metrics(directory))
    for directory in found:
        own = runs.read(directory)
        config = own.configs[0]
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        config = dataclasses.replace(
            config, device=args.device or config.device, data=args.data or config.data
        )
        dataset = owned.load_split(str(directory), own.data, config, args.split)
        model = train.build(config, dataset)
        scores = []
        weights = runs.load_weights(directory, args.checkpoint)
        for member, params in zip(own.configs, weights, strict=True):
            params = tree.to(params, config.device)
            values = train.evaluate(model.apply, params, dataset, config)
            scores.append(
                {"seed": member.seed, **{name: float(value) for name, value in values.items()}}
            )
        runs.write_scores(directory, args.split, args.checkpoint, scores, len(dataset.labels))
        by_operator.setdefault(operators.shown(config.operator), []).extend(scores)
    rows = [
        [
            operator,
            tables.spread([score["top1"] for score in scores]),
            tables.spread([score["top5"] for score in scores]),
            tables.spread([score["loss"] for score in scores], 3, 1.0),
            str(len(scores)),
        ]
        for operator, scores in by_operator.items()
    ]
    names = ["operator", *(f"{args.split} {what}" for what in ("top-1 %", "top-5 %", "loss")), "n"]
    print(tables.table(rows, names))
    return 0


COMMAND = Command(
    "eval",
    "score runs on the test split",
    _flags,
    _run,
    reads=True,
    description="Scores every run at or below a directory. This is the only command that reads "
    "the test split.",
)
