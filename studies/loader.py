"""How many images a second does one core prepare, and how many cores feed which model?

    python -m studies.loader [--images 200] [--size 224] [--model vit_tiny] [--device cuda]

Photographs of 500 x 375, JPEG of quality 90, cut from the sample images of scikit-learn, are read
in both ways: streamed (decoded, and a random box of the file's own resolution scaled to `--size`)
and from the memory-mapped cache of decoded images. Times are CPU time of one thread, so that other
work on the machine matters little; what is left of the augmentation runs on the training device in
both ways and is not counted. A training step of each model on `--device` says how many images a
second it takes, and the quotient how many cores. One minute on one core. Expected on a core of an
x86-64 server: more than 300 images a second streamed, ten times as many from the cache, so that a
model on a CPU never waits for a loader.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kart import augment, data, models, tables, train
from kart.commands.command import integer, standalone
from kart.commands.config import check_device
from kart.train import Config

SHAPE = (500, 375)  # width, height: the most frequent ones of ImageNet
BATCH = 20


def photographs(root: Path, count: int) -> Path:
    """A directory of `count` JPEGs in two classes, parts of scikit-learn's two photographs."""
    from PIL import Image
    from sklearn import datasets

    sample: Any = datasets.load_sample_images()
    draws = np.random.default_rng(0)
    width, height = SHAPE
    for i in range(count):
        whole = Image.fromarray(sample.images[i % 2])
        left = int(draws.integers(0, whole.width - width + 1))
        top = int(draws.integers(0, whole.height - height + 1))
        path = root / f"class_{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.crop((left, top, left + width, top + height)).save(path, "JPEG", quality=90)
    return root


def images_per_second(dataset: data.Dataset, cut: data.Cut | None, repeats: int = 3) -> float:
    """Median rate, over `repeats` epochs, at which this process alone prepares batches."""
    read = data.reader(dataset, BATCH, cut)
    rates = []
    for epoch in range(repeats):
        began = time.process_time()
        for position in range(read.steps_per_epoch):
            read.at(0, epoch * read.steps_per_epoch + position)
        rates.append(read.steps_per_epoch * BATCH / (time.process_time() - began))
    return statistics.median(rates)


def trained_per_second(model: str, size: int, device: str, splits: train.Splits) -> float:
    """Images a second of wall time that a training step of `model` takes, without the loader."""
    config = Config(
        model=model,
        image_size=size,
        batch_size=BATCH if device == "cpu" else 6 * BATCH,
        device=device,
        precision="float32" if device == "cpu" else "bfloat16",
    )
    run = train.solo(config, splits)
    state, seconds = run.init(), []
    images, targets = run.batch(0)
    for _ in range(3 if device == "cpu" else 20):
        began = time.perf_counter()
        state, metrics = run.advance(state, run.hyper, images, targets)
        metrics.loss.item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return config.batch_size / statistics.median(seconds[1:])


def main(argv: list[str] | None = None) -> None:
    """Prints both tables."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    # the training split has a batch of them
    arguments.add_argument("--images", type=integer(2 * BATCH), default=300)
    arguments.add_argument("--size", type=integer(1), default=224)
    known = list(filter(models.classifies, models.MODELS))
    arguments.add_argument("--model", nargs="*", choices=known, default=["vit_tiny"])
    arguments.add_argument("--device", default="cpu")
    args = arguments.parse_args(argv)
    check_device(args.device)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = photographs(Path(scratch) / "photographs", args.images), Path(scratch)
        streamed, cached = (
            data.load(
                folder, image_size=args.size, stream=stream, workers=0, cache=cache / f"{stream}"
            )
            for stream in (True, False)
        )
        cut = data.Cut(augment.random_box, args.size)
        rates = {
            "streamed": images_per_second(streamed, cut),
            "cached": images_per_second(cached, None),
        }
        rows = [[name, f"{rate:.0f}"] for name, rate in rates.items()]
        print(tables.table(rows, ["way", "images/s a core"]))
        splits = train.Splits(cached, cached)
        rows = []
        for model in args.model:
            taken = trained_per_second(model, args.size, args.device, splits)
            cores = [f"{taken / rate:.2f}" for rate in rates.values()]
            rows.append([model, f"{taken:.0f}", *cores])
    if rows:
        header = ["model", f"images/s on {args.device}", "cores to stream", "cores to gather"]
        print(tables.table(rows, header))
    width, height = SHAPE
    print(f"JPEG {width} x {height} to {args.size} px; CPU time of one thread, median of 3 epochs")


if __name__ == "__main__":
    standalone(main)
