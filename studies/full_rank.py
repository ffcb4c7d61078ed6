"""Does a full-rank ViT-Tiny with G = 10 train, which the paper could not hold in memory?

    python -m studies.full_rank --data uoft-cs/cifar10 [--steps 200] [--batch-size 4]

Full rank has one unit for each pair of keys, 28 million coefficients in a ViT-Tiny at 197 tokens;
the paper's form took 60 GB for a batch of one image. Trains it on real images at 224 px with the
step of `kart train`, and prints the loss as it falls, the time of a step and the peak memory of the
process. Expected on one core, in twelve minutes: a loss that falls from 2.2 to 0.9 in 200 steps
over 64 images, and 1.15 GB at a batch of 4.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from kart import tables, train
from kart.analysis import bench
from kart.commands.command import integer, number, standalone
from kart.train import Config


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and prints a row every tenth of the steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="a directory, or a public name")
    parser.add_argument("--operator", default="G10B:order=full_rank", metavar="SPEC")
    parser.add_argument("--model", default="vit_tiny")
    parser.add_argument("--image-size", type=integer(1), default=224)
    parser.add_argument("--steps", type=integer(1), default=200)
    parser.add_argument("--batch-size", type=integer(1), default=4)
    parser.add_argument("--images", type=integer(1), default=64, help="training images (64)")
    parser.add_argument("--learning-rate", type=number(0), default=2e-4)
    args = parser.parse_args(argv)
    if args.images < args.batch_size:
        parser.error(f"--images needs at least --batch-size {args.batch_size}, got {args.images}")
    torch.set_num_threads(1)
    per_epoch = args.images // args.batch_size
    config = Config(
        data=args.data,
        train_limit=args.images,
        model=args.model,
        image_size=args.image_size,
        operator=args.operator,
        epochs=-(-args.steps // per_epoch),
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
    )
    run = train.solo(config, train.load_data(config))
    state = run.init()
    losses: list[float] = []
    seconds: list[float] = []
    rows: list[list[str]] = []
    print(f"{config.model}, {config.operator}, {args.image_size} px, batch {config.batch_size}")
    for step in range(args.steps):
        began = time.process_time()
        state, metrics = run.advance(state, run.hyper, *run.batch(step))
        losses.append(float(metrics.loss))
        seconds.append(time.process_time() - began)
        if bool(state.bad_step >= 0):
            sys.exit(f"full_rank: {run.diagnose(state, 0)}")
        if (step + 1) % max(1, args.steps // 10) == 0:
            recent = statistics.fmean(losses[-max(1, args.steps // 10) :])
            peak = bench.resident_mib(peak=True)
            rows.append([str(step + 1), f"{recent:.3f}", f"{peak:.0f}"])
            print(f"step {step + 1}: loss {recent:.3f}", flush=True)
    print()
    print(tables.table(rows, ["step", "mean loss since the last row, nats", "peak MiB"]))
    print(f"{1000 * statistics.median(seconds):.0f} ms a step, CPU time, one thread")


if __name__ == "__main__":
    standalone(main)
