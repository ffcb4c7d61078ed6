"""Does a per-example loss mapped by `torch.func.vmap` cost more than a natively batched one?

    python -m studies.batching [--threads 1] [--repeats 15]

Prints, for each operator and model, the median time of a whole training step (loss, gradients,
AdamW) in both forms, interleaved in one process after a warm-up, and their ratio. One minute on one
core. Expected: the mapped form takes 1.1 to 1.4 times as long on a CPU, since torch.func keeps the
graph of its backward and updates nothing in place; so the native form is the default of `Config`,
and the other stays tested equal to it (tests/test_train.py).
"""

import argparse
import dataclasses
import statistics

import torch

from kart import tables, train
from kart.analysis import bench
from kart.commands.command import integer, standalone
from kart.train import Config

from .population_speed import stepper

SETTINGS = {
    "digits, 17 tokens, D 64": Config(patch_size=2, batch_size=64),
    "digits, 65 tokens, D 64": Config(patch_size=1, batch_size=32),
    "digits, 17 tokens, D 192": Config(patch_size=2, batch_size=32, model="vit_tiny", depth=4),
}


def measure(config: Config, splits: train.Splits, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of steps of each form, taken in turn."""
    calls = {
        batching: stepper(dataclasses.replace(config, batching=batching), [config.seed], splits)
        for batching in ("native", "vmap")
    }
    return bench.interleave(calls, repeats, bench.Clock("cpu"))


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--threads", type=integer(1), default=1)
    arguments.add_argument("--repeats", type=integer(1), default=15)
    args = arguments.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for title, setting in SETTINGS.items():
        for operator in ("softmax", "G3B"):
            config = dataclasses.replace(setting, operator=operator)
            seconds = measure(config, train.load_data(config), args.repeats)
            native, mapped = (statistics.median(values) for values in seconds.values())
            cells = [f"{1000 * native:.1f}", f"{1000 * mapped:.1f}", f"{mapped / native:.2f}"]
            rows.append([f"{title}, {operator}", *cells])
    print(tables.table(rows, ["setting", "native ms", "vmap ms", "vmap / native"]))
    print(
        f"medians of {args.repeats}, CPU time, {args.threads} thread(s), torch {torch.__version__}"
    )


if __name__ == "__main__":
    standalone(main)
