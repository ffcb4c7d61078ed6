"""`kart predict`: the classes of images, by the model of a run."""

import argparse
import sys
from collections import Counter

import torch

from kart import data, runs, tables, train
from kart.commands.command import Command, integer
from kart.commands.config import check_code
from kart.runs import owned

BATCH = 256


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="directory of one run, as `kart train` wrote it")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--checkpoint", default="last", choices=["last", "best"])
    parser.add_argument(
        "--seed", type=integer(0), metavar="INT", help="the member, where a run has several"
    )
    parser.add_argument("--top", type=integer(1), metavar="INT", help="classes of each image (3)")


def _run(args: argparse.Namespace) -> int:
    check_code(args.code, args.run)
    one = runs.only(args.run, args.checkpoint, args.seed)
    own = one.identity.data
    classes, dataset = own["classes"], owned.empty(own)
    dtype = getattr(torch, one.config.precision)
    if args.top is not None and args.top > len(classes):
        raise ValueError(f"`--top` needs at most the {len(classes)} classes, got {args.top}.")
    top = min(3, len(classes)) if args.top is None else args.top
    changed: Counter[str] = Counter()
    rows = []
    # as `kart eval` computes its scores, and as many at a time: all at once may not fit
    for start in range(0, len(args.images), BATCH):
        names = args.images[start : start + BATCH]
        pixels, converted = data.read_images(names, tuple(own["image"]))
        changed.update(dict(converted))
        images = train.prepare(data.as_float(torch.from_numpy(pixels)), dataset, one.config)
        with torch.no_grad():
            shares = one.model.apply(one.params, images.to(dtype)).float().softmax(-1)
        best = shares.topk(top, dim=-1)
        for name, ps, index in zip(names, best.values.tolist(), best.indices.tolist(), strict=True):
            found = zip(ps, index, strict=True)
            rows.append([name, *(f"{classes[i]} {100 * p:.1f} %" for p, i in found)])
    if changed:
        told = "; ".join(f"{count} {what}" for what, count in sorted(changed.items()))
        print(f"converted: {told}", file=sys.stderr)
    ranks = [f"{place}." for place in range(1, len(rows[0]))]
    print(tables.table(rows, ["image", *ranks]))
    return 0


COMMAND = Command(
    "predict",
    "print the classes of images, with probabilities, by the model of a run",
    _flags,
    _run,
    reads=True,
    description="Reads images as the run's own data were read, with its size and statistics, and "
    "prints the most probable classes.",
)
