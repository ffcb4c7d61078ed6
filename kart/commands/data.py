"""`kart data`: what would be read of a source of images."""

import argparse

import numpy as np

from kart import data, tables
from kart.commands.command import Command, integer


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="digits, a directory, or a public name")
    parser.add_argument(
        "--decode-size",
        type=integer(1),
        metavar="INT",
        help="side to cut images to, where they differ",
    )


def _run(args: argparse.Namespace) -> int:
    splits = {
        name: data.load(args.source, name, image_size=args.decode_size) for name in data.SPLITS
    }
    first = splits["train"]
    counts = {
        name: np.bincount(one.labels, minlength=len(one.classes)) for name, one in splits.items()
    }
    rows = [[name, *(str(counts[s][i]) for s in splits)] for i, name in enumerate(first.classes)]
    rows.append(["all", *(str(len(one.labels)) for one in splits.values())])
    print(tables.table(rows, ["class", *splits]))
    shape = " x ".join(str(size) for size in first.images.shape[1:])
    print(f"{first.name}: images of {shape} (channels, height, width)")
    return 0


COMMAND = Command("data", "show what would be read: splits, classes, counts, sizes", _flags, _run)
