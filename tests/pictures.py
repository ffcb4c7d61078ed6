"""Data sets of noise for the tests of `kart.data`: folders and tables of small pictures."""

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from kart import data

CLASSES = ["ant", "bee", "cat"]


def picture(number: int, size=(6, 5), mode="RGB") -> Image.Image:
    """A picture of noise; its first pixel, `number`, tells it from the others."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(number).integers(0, 256, shape).astype(np.uint8)
    pixels[0, 0] = number
    return Image.fromarray(pixels)


def save_folder(root: Path, count=30, classes=CLASSES, start=0, **options) -> Path:
    """`count` pictures, one sub-folder per class, the classes taking turns."""
    for i in range(count):
        path = root / classes[i % len(classes)] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(start + i, **options).save(path)
    return root


def encoded(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def save_table(root: Path, split="train", count=30, shards=1, start=0, extra=None) -> Path:
    """A parquet directory as on the public hub; picture i is of class i mod 3."""
    root.mkdir(exist_ok=True)
    columns = {
        "img": [encoded(picture(start + i)) for i in range(count)],
        "label": [i % 3 for i in range(count)],
    }
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    for name, (values, feature) in (extra or {}).items():
        columns[name], features[name] = values, feature
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for shard in range(shards):
        part = table.shard(shards, shard, contiguous=True)
        part.to_parquet(root / f"{split}-{shard:05}-of-{shards:05}.parquet")
    return root


def numbers(dataset: data.Dataset) -> list[int]:
    return dataset.images[:, 0, 0, 0].tolist()


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def same(first: data.Dataset, second: data.Dataset) -> bool:
    return (
        np.array_equal(first.images, second.images)
        and np.array_equal(first.labels, second.labels)
        and first[2:] == second[2:]
    )
