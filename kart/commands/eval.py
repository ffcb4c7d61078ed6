"""`kart eval`: scores runs on the test split."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from kart import operators, runs, statistics, tables, train, tree
from kart.commands.command import Command
from kart.commands.config import check_code, check_device
from kart.runs import owned
from kart.train import Config


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="directory that `kart train` wrote")
    parser.add_argument("--split", default="test", choices=["test", "val", "train"])
    parser.add_argument("--checkpoint", default="last", choices=["last", "best"])
    parser.add_argument("--data", help="where the data is now, if it has moved")
    parser.add_argument("--device", help="cpu or cuda (default that of the run)")


def _run(args: argparse.Namespace) -> int:
    check_device(args.device)
    check_code(args.code, args.run)
    by_setting: dict[tuple[Config, str], list[dict[str, float]]] = {}
    told: list[str] = []
    found = runs.distinct(args.run)
    ended = []
    for directory in found:
        configs, bad = runs.members(directory), runs.diverged(directory)
        told += statistics.left_out(operators.shown(configs[0].operator), bad)
        if len(bad) < len(configs):
            # the test split is read once, at the end
            runs.check_finished(directory, runs.read_metrics(directory))
            runs.check_writable(directory)
            ended.append(directory)
    if not ended:
        raise ValueError(
            f"`kart eval` needs runs that did not diverge, got {args.run!r}: {' '.join(told)} "
            "Train with a lower learning rate."
        )
    for directory in ended:
        own = runs.read(directory)
        config = own.configs[0]
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        source = owned.place(str(directory), own.data, config.data, args.data)
        config = dataclasses.replace(config, device=args.device or config.device, data=source)
        dataset = owned.load_split(str(directory), own.data, config, args.split)
        model = train.build(config, dataset)
        scores, bad = [], runs.diverged(directory)
        weights = runs.load_weights(directory, args.checkpoint)
        for member, params in zip(own.configs, weights, strict=True):
            params = tree.to(params, config.device)
            values = train.evaluate(model.apply, params, dataset, config)
            scores.append(
                {
                    "seed": member.seed,
                    **{name: float(value) for name, value in values.items()},
                    "diverged": bad.get(member.seed, -1),
                }
            )
        runs.write_scores(directory, args.split, args.checkpoint, scores, dataset)
        for member, score in zip(own.configs, scores, strict=True):
            if member.seed not in bad:
                by_setting.setdefault(_setting(member, own.data), []).append(score)
    rows = [
        [name, *tables.scores(scores), str(len(scores))]
        for name, scores in zip(_names(list(by_setting)), by_setting.values(), strict=True)
    ]
    names = ["operator", *(f"{args.split} {what}" for what in ("top-1 %", "top-5 %", "loss")), "n"]
    print("\n".join([tables.table(rows, names), *told]))
    return 0


def _setting(config: Config, data: dict[str, Any]) -> tuple[Config, str]:
    """What runs that are seeds of one another have in common, wherever they were trained."""
    place = {"data": data["name"], "threads": None, "device": "cpu"}
    return dataclasses.replace(config, seed=0, **place), data["fingerprint"]["train"]


def _names(settings: Sequence[tuple[Config, str]]) -> list[str]:
    """A name for each setting: the operator, and what sets it apart from others with the same."""
    names = []
    for config, data in settings:
        alike = [one for one in settings if one[0].operator == config.operator]
        facts = [{**config.asdict(), "images": data[:8]} for config, data in alike]
        own = {**config.asdict(), "images": data[:8]}
        odd = [key for key in own if any(one[key] != own[key] for one in facts)]
        if "data" in odd:  # of two data sets of one name the fingerprints differ alone
            odd.remove("images")
        shown = [operators.shown(config.operator), *(f"{key} {own[key]}" for key in odd)]
        names.append(", ".join(shown))
    return names


COMMAND = Command(
    "eval",
    "score runs on the test split",
    _flags,
    _run,
    reads=True,
    description="Scores every run at or below a directory, on the test split unless told "
    "otherwise. Only `kart study`, of its winners, scores on that split, too.",
)
