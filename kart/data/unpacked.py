"""Images of parquet files and public data sets as files of the cache, so that they can stream.

A row of a parquet file cannot be read alone. So the images of a split are written once, as they are
compressed, to `<cache>/<name>-<split>-files-<key>/<thousands>/<number>`, and decode when drawn.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from kart.data import cache
from kart.data.finding import Finding
from kart.data.source import Row, Source, check_labels

_FORMAT = 1  # part of the name of every entry
_FOLDER = 1000  # files of one


class Index(NamedTuple):
    """What the files of one split are: what messages call them, their labels and bytes."""

    where: list[str]
    labels: list[int]
    sizes: list[int]
    classes: list[str]


def source(found: Finding, base: Path, wanted: Iterable[str]) -> tuple[Source, dict[str, Path]]:
    """The source of `found` with its splits `wanted` in files, and the directory of each of them.

    `train` must be among them: bare integers are classes by the labels that occur there.
    """
    cache.sweep(base)
    with cache.workshop(base, _path(found, base, "source").name) as work:
        opened = found.open(work / "scratch")
        splits = ["train", *sorted({*wanted} & opened.rows.keys() - {"train"})]
        classes, rows, places = opened.classes, dict(opened.rows), {}
        for split in splits:
            path = _path(found, base, split)
            index = _read(path)
            if index is None:
                damaged = os.path.lexists(path)
                cache.build(path, _filler(opened, split, classes), damaged)
                index = _read(path)
            if index is None:
                raise ValueError(
                    f"`load` lost {str(path)!r} while reading it. Keep `cache` for kart alone."
                )
            classes = tuple(index.classes)
            rows[split] = _reader(path, index)
            places[split] = path
    return opened._replace(classes=classes, rows=rows), places


def _path(found: Finding, base: Path, split: str) -> Path:
    key = json.dumps([_FORMAT, found.identity, split])
    stem = re.sub(r"[^\w.-]+", "-", found.name)[:80]
    return base / f"{stem}-{split}-files-{hashlib.sha256(key.encode()).hexdigest()[:20]}"


def _file(path: Path, number: int) -> Path:
    return path / f"{number // _FOLDER:05d}" / f"{number:08d}"


def _filler(opened: Source, split: str, classes: tuple[str, ...] | None) -> Callable[[Path], None]:
    def fill(work: Path) -> None:
        entry, index = work / "entry", Index([], [], [], [])
        rows, size = opened.rows[split](), opened.sizes[split]
        for number, row in enumerate(
            tqdm(rows, f"unpacking {split}", size, unit=" images", disable=None)
        ):
            if number % _FOLDER == 0:
                _file(entry, number).parent.mkdir()
            content = row.file.getvalue()
            _file(entry, number).write_bytes(content)
            index.where.append(row.where)
            index.labels.append(min(row.label, 2**63 - 1))
            index.sizes.append(len(content))
        if not index.labels:
            raise ValueError(
                "`load` needs images in every split, got an empty one. Add or remove it."
            )
        check_labels(np.array(index.labels), classes, lambda n: index.where[n])
        names = classes or tuple(str(i) for i in range(max(index.labels) + 1))
        content = index._replace(classes=list(names))._asdict()
        cache.write_json(entry / "index.json", content)

    return fill


def _read(path: Path) -> Index | None:
    """The index of an entry; None if it is absent or not what was written."""
    content = cache.read_json(path, "index.json")
    try:
        index = Index(**content)  # type: ignore[arg-type]  # None is no mapping
        sizes = [os.stat(_file(path, i)).st_size for i in range(len(index.sizes))]
    except (TypeError, OSError):
        return None
    return index if sizes == index.sizes and len(index.labels) == len(sizes) > 0 else None


def _reader(path: Path, index: Index) -> Callable[[], Iterator[Row]]:
    def rows() -> Iterator[Row]:
        for number, (where, label) in enumerate(zip(index.where, index.labels, strict=True)):
            yield Row(where, _file(path, number), label)

    return rows
