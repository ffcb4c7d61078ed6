"""`kart predict`: the classes of images, by the model of a run."""

import argparse
import sys

import torch

from kart import data, runs, tables, train
from kart.commands.command import Command, integer
from kart.runs import owned


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="directory of one run, as `kart train` wrote it")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--checkpoint", default="last", choices=["last", "best"])
    parser.add_argument(
        "--seed", type=integer(0), metavar="INT", help="the member, where a run has several"
    )
    parser.add_argument(
        "--top", type=integer(1), default=3, metavar="INT", help="classes of each image (3)"
    )


def _run(args: argparse.Namespace) -> int:
    one = runs.only(args.run, args.checkpoint, args.seed)
    own = one.identity.data
    pixels, converted = data.read_images(args.images, tuple(own["image"]))
    if converted:
        changed = "; ".join(f"{item.count} {item.what}" for item in converted)
        print(f"converted: {changed}", file=sys.stderr)
    dataset = owned.empty(own)
    images = train.prepare(data.as_float(torch.from_numpy(pixels)), dataset, one.config)
    # as `kart eval` computes its scores
    images = images.to(getattr(torch, one.config.precision))
    with torch.no_grad():
        shares = one.model.apply(one.params, images).float().softmax(-1)
    best = shares.topk(min(args.top, shares.shape[-1]), dim=-1)
    rows = [
        [name, *(f"{own['classes'][i]} {100 * p:.1f} %" for p, i in zip(ps, index, strict=True))]
        for name, ps, index in zip(
            args.images, best.values.tolist(), best.indices.tolist(), strict=True
        )
    ]
    ranks = [f"{place}." for place in range(1, best.values.shape[-1] + 1)]
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
