"""`kart bench`: time and memory of each engine beside softmax, on this machine."""

import argparse

from kart.analysis import bench
from kart.commands.command import Command, file, flag, integer


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    count = integer(1)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--precision", choices=["float32", "bfloat16"])
    add("--repeats", type=count, default=15, metavar="INT", help="timed rounds (default 15)")
    add("--op-batch", type=count, metavar="INT", help="batch at N = 197 (default 8; GPU 128)")
    add("--step-batch", type=count, metavar="INT", help="batch of a step (default 8; GPU 128)")
    add("--sizes", type=integer(0), metavar="INT", help="drawn sizes (default 16)")
    add("--quick", action="store_true", help="operator level only")
    add("--out", type=file, default="cost.json", help="JSON; the plot goes beside it")
    add("--quiet", action="store_true", help="no progress on stderr")


def _run(args: argparse.Namespace) -> int:
    for name in ("step_batch", "sizes"):
        if args.quick and getattr(args, name) is not None:
            raise ValueError(
                f"`{flag(name)}` has no effect with `--quick`, which measures single operators "
                "alone. Leave one of them out."
            )
    args.sizes = 16 if args.sizes is None else args.sizes
    bench.run(args)
    return 0


COMMAND = Command(
    "bench",
    "time and memory of each engine beside softmax",
    _flags,
    _run,
    description="Measures each engine beside softmax in the same run: single operators, a training "
    "step, its memory. kart/analysis/bench.py says what is measured and how.",
)
