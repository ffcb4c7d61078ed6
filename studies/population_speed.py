"""Do K seeds train faster as one vmapped program than one after the other?

    python -m studies.population_speed [--seeds 1 2 3 4 8] [--repeats 15] [--threads 1]

Times training steps of the model of `studies.grid_rank_sharing` (17 tokens, width 32) and of
vit_nano at 65 tokens, in turn in one process after a warm-up: one step of a population of K, then
one step of each of K members alone. Prints CPU milliseconds a member and their ratio (medians). The
group size of a study is measured in the same way when it starts. Two minutes on one core.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence

import torch

from kart import population, train
from kart.analysis import bench
from kart.commands.command import integer, standalone
from kart.tables import table
from kart.train import Config

from .grid_rank_sharing import CONFIG

SETTINGS = {
    "digits, 17 tokens, D 32": dataclasses.replace(CONFIG, learning_rate=3e-3),
    "digits, 65 tokens, D 64": Config(patch_size=1, batch_size=32),
}


def stepper(config: Config, seeds: Sequence[int], splits: train.Splits) -> Callable[[], None]:
    """A function that makes one training step of these seeds together."""
    run = population.run(population.seeds(config, seeds), splits)
    state, pair = run.init(), run.batch(0)

    def step() -> None:
        nonlocal state
        state, metrics = run.advance(state, run.hyper, *pair)
        metrics.loss.sum().item()  # waits for the device

    return step


def measure(
    config: Config, splits: train.Splits, count: int, repeats: int
) -> tuple[float, float, float]:
    """CPU seconds a member and step, together and alone, and the median ratio of the two."""
    together = stepper(config, range(count), splits)
    alone = [stepper(config, [seed], splits) for seed in range(count)]
    calls = {"together": together, "alone": lambda: [step() for step in alone]}
    both = bench.interleave(calls, repeats, bench.Clock("cpu")).values()
    first, second = (statistics.median(seconds) / count for seconds in both)
    return first, second, statistics.median(b / a for a, b in zip(*both, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=integer(1), nargs="+", default=[1, 2, 3, 4, 8], metavar="K")
    parser.add_argument("--repeats", type=integer(1), default=15)
    parser.add_argument("--threads", type=integer(1), default=1)
    parser.add_argument("--settings", type=integer(1), default=len(SETTINGS), help="so many")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for title, setting in list(SETTINGS.items())[: args.settings]:
        for operator in ("softmax", "G3B"):
            config = dataclasses.replace(setting, operator=operator)
            splits = train.load_data(config)
            for count in args.seeds:
                together, alone, ratio = measure(config, splits, count, args.repeats)
                cells = [str(count), f"{1000 * together:.1f}", f"{1000 * alone:.1f}"]
                rows.append([f"{title}, {operator}", *cells, f"{ratio:.2f}"])
    print(table(rows, ["setting", "K", "together ms", "alone ms", "alone / together"]))
    print(f"ms a member and step, CPU time, medians of {args.repeats}, {args.threads} thread(s)")


if __name__ == "__main__":
    standalone(main)
