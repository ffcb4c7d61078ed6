"""Does TPE find better configurations than random search in as many trials?

    kart study run grid_rank_sharing --data digits --epochs 4 --sampler grid --levels 4 \\
        --fix weight_decay=0.02 --seeds 1 --trials 256 --confirm 0 --pruner none --pool 4 \\
        --out runs/table
    python -m studies.samplers --table runs/table/trials.csv

The first command trains every point of a grid and records it, in six minutes; the second searches
that table with each sampler from many seeds. Without `--table` it takes studies/samplers.csv, which
was recorded so. Regret is the best accuracy of the table less the best one found so far. A look-up
stands for a training run, so a search takes milliseconds and its noise is that of the table alone.
Expected after 24 trials (n = 40 searches): random search 0.26 [0.17, 0.36] points, TPE 0.06 [0.02,
0.11].
"""

import argparse
import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna

from kart import statistics
from kart.commands.command import integer, standalone
from kart.search.storage import SAMPLERS, PerTrial
from kart.tables import table

Table = dict[tuple[Any, ...], float]
# those that choose what to try: grid and brute take points from a queue
CHOOSING = [name for name in SAMPLERS if name not in ("grid", "brute")]
RECORDED = Path(__file__).with_suffix(".csv")


def read(path: Path, arm: str) -> tuple[list[str], list[list[Any]], Table]:
    """Parameters, their values in order, and the accuracy of each point, of a study's CSV."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("arm") == arm]
    rows = [row for row in rows if row["state"] == "complete"]
    names = [name for name in (rows[0] if rows else {}) if name.startswith("param.")]
    names = [name for name in names if len({row[name] for row in rows}) > 1]
    levels = [sorted({_number(row[name]) for row in rows}) for name in names]
    points = {
        tuple(_number(row[name]) for name in names): float(row["values"].split()[0]) for row in rows
    }
    size = math.prod(map(len, levels))
    if size != len(points) or size < 2:
        raise ValueError(
            f"`--table` needs every point of a grid, got {len(points)} of {size} of arm {arm!r} in "
            f"{str(path)!r}. Run the study with `--sampler grid --pruner none` to its end."
        )
    return names, levels, points


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def regrets(
    sampler: str, seed: int, trials: int, names: list[str], levels: list[list[Any]], points: Table
) -> list[float]:
    """Regret after each trial of one search."""

    def objective(trial: optuna.Trial) -> float:
        point = []
        for name, values in zip(names, levels, strict=True):
            if isinstance(values[0], str):
                point.append(trial.suggest_categorical(name, values))
            else:  # ordered: its place among the levels
                point.append(values[trial.suggest_int(name, 0, len(values) - 1)])
        return points[tuple(point)]

    def make(number: int) -> optuna.samplers.BaseSampler:
        return SAMPLERS[sampler](number, False)

    study = optuna.create_study(direction="maximize", sampler=PerTrial(make, seed, sampler))
    study.optimize(objective, n_trials=trials)
    best = max(points.values())
    so_far = itertools.accumulate((trial.values[0] for trial in study.trials), max)
    return [best - value for value in so_far]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints mean regret, in points, with its interval over seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", type=Path, default=RECORDED, metavar="CSV")
    parser.add_argument("--arm", default="KArAt")
    parser.add_argument("--samplers", nargs="+", choices=CHOOSING, default=["random", "tpe", "gp"])
    parser.add_argument("--trials", type=integer(1), default=24)
    parser.add_argument("--seeds", type=integer(1), default=40)
    args = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        names, levels, points = read(args.table, args.arm)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    marks = sorted({max(1, args.trials // 3), max(1, 2 * args.trials // 3), args.trials})
    rows = []
    for sampler in args.samplers:
        runs = [
            regrets(sampler, seed, args.trials, names, levels, points) for seed in range(args.seeds)
        ]
        # a regret is never negative, and none is larger than that of the worst point
        most = max(points.values()) - min(points.values())
        cells = [
            statistics.interval([run[mark - 1] for run in runs], low=0.0, high=most).text()
            for mark in marks
        ]
        found = sum(run[-1] == 0 for run in runs)
        rows.append([sampler, *cells, f"{found}/{args.seeds}"])
    print(table(rows, ["sampler", *(f"after {mark}" for mark in marks), "best found"]))
    shown = ", ".join(name.removeprefix("param.") for name in names)
    print(
        f"regret in points of accuracy, mean and 95 % interval over {args.seeds} seeds; "
        f"{len(points)} points ({shown}), accuracies {100 * min(points.values()):.1f} to "
        f"{100 * max(points.values()):.1f} %"
    )


if __name__ == "__main__":
    standalone(main)
