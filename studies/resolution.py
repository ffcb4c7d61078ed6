"""What is left of a ViT's accuracy on images of other sizes than those it was trained on?

    kart train --data uoft-cs/cifar10 --train-limit 4000 --seeds 0 1 2 --group 1 --epochs 8 \\
        --batch-size 64 --augment flip_crop --patch-size 8 --depth 2 --threads 1 \\
        --out runs/length --operator softmax G3B G3B:base=softmax softconv \\
            G3B:order=generated,reach=none,prefix=1,features=10 \\
            G3B:order=elementwise G3B:order=elementwise,normalise=count \\
            G3B:order=elementwise,base=softmax \\
            G3B:order=elementwise,normalise=count,base=softmax \\
            G3B:order=by_distance,reach=64,inside=true
    python -m studies.resolution runs/length --sizes 48 64

Finished runs are moved by `models.resize`, positions and operators alike, and scored on the test
split at their own size and at the others, images scaled bilinearly. Nothing is trained again. The
change of each operator is paired with softmax's own by seed. Expected at 64 px after training at
32 (n = 3): G3B +0.2 [-0.7, +1.0] points, softmax -3.4 [-5.6, -1.2]. The thirty runs take about
ten minutes on one core.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

import torch

from kart import models, runs, statistics, tables, train
from kart.commands.command import integer, standalone
from kart.runs import owned

# top-1 by seed, of each size, of each operator
Found = Mapping[str, Mapping[int, Mapping[int, float]]]


def measure(
    paths: Sequence[str], sizes: Sequence[int], source: str | None = None, limit: int | None = None
) -> tuple[dict[str, dict[int, dict[int, float]]], int, int]:
    """Top-1 of the runs below `paths` at their own and other sizes, their own, and the number of
    images. The runs differ in operator and seed alone; seeds that diverged are left out.
    """
    found: dict[str, dict[int, dict[int, float]]] = {}
    results = runs.compare(*paths)
    own_size, count = 0, 0
    for result in results:
        homes = result.homes or ()
        for member, home, params in zip(result.configs, homes, result.params, strict=True):
            if member.threads is not None:
                torch.set_num_threads(member.threads)
            own = runs.read(home)
            place = owned.place(str(home), own.data, member.data, source)
            config = dataclasses.replace(member, data=place)
            test = owned.load_split(str(home), own.data, config, "test")
            test = test if limit is None else test.part(test.spread(limit))
            count = len(test.labels)
            model = train.build(config, test)
            own_size = model.config.image_size
            for size in sorted({own_size, *sizes}):
                moved, resized = models.resize(model, params, size)
                there = dataclasses.replace(config, image_size=size)
                top1 = float(train.evaluate(moved.apply, resized, test, there)["top1"])
                found.setdefault(result.name, {}).setdefault(size, {})[member.seed] = top1
    return found, own_size, count


def table(found: Found, own: int, images: int) -> str:
    """Top-1 at every size, the change from `own`, and that change beside softmax's."""
    rows = []
    for name, by_size in found.items():
        for size, scores in by_size.items():
            change, beside = "", ""
            if size != own:
                drop = statistics.pairs(scores, by_size[own])
                change = statistics.interval(drop, low=-1.0, high=1.0).text(sign="+")
                base = found.get("softmax")
                if base is not None and name != "softmax":
                    theirs = {seed: base[size][seed] - base[own][seed] for seed in base[size]}
                    ours = {seed: scores[seed] - by_size[own][seed] for seed in scores}
                    if gap := statistics.pairs(ours, theirs):
                        beside = statistics.interval(gap, low=-2.0, high=2.0).text(sign="+")
            top1 = statistics.accuracy(list(scores.values()), images).text()
            rows.append([name, str(size), top1, change, beside, str(len(scores))])
    header = ["operator", "px", "test top-1 %", f"change from {own} px", "over softmax's", "n"]
    return tables.table(rows, header)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of the runs that are named."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", help="directories that `kart train` wrote")
    parser.add_argument("--sizes", nargs="+", type=integer(1), default=[48, 64], metavar="PX")
    parser.add_argument("--data", help="where the data is now, if it has moved")
    parser.add_argument(
        "--limit", type=integer(1), metavar="N", help="N test images, of all classes"
    )
    args = parser.parse_args(argv)
    try:
        found, own, images = measure(args.runs, args.sizes, args.data, args.limit)
    except ValueError as error:
        parser.error(str(error))
    print(table(found, own, images))
    return 0


if __name__ == "__main__":
    standalone(main)
