"""Images of parquet files and public data sets as files of the cache, so that they can stream.

A row of a parquet file cannot be read alone. So the images of a split are written once, as they are
compressed, to `<cache>/<name>-<split>-files-<key>/<thousands>/<number>`, and decode when drawn.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from kart.data import cache
from kart.data.dataset import SPLITS, Unused
from kart.data.finding import Finding
from kart.data.source import EMPTY, Row, Source, check_labels

_FORMAT = 1  # part of the name of every entry
_FOLDER = 1000  # files of one


class Index(NamedTuple):
    """What the files of one split are: what messages call them, their labels and bytes; and what is
    known of the whole source, so that it need not be opened again.
    """

    where: list[str]
    labels: list[int]
    sizes: list[int]
    classes: list[str]
    splits: list[str]
    unused: list[list]
    renumbered: dict[str, int]


def source(found: Finding, base: Path, split: str) -> tuple[Source, dict[str, Path]]:
    """The source of `found` with "train" and `split` in files, and the directory of each split.

    What is there already is not read again, nor is the network asked for it.
    """
    cache.sweep(base)
    places = {one: _path(found, base, one) for one in SPLITS}
    known = {one: _read(places[one]) for one in ("train", split)}
    train = known["train"]
    if train is None or (known[split] is None and split in train.splits):
        name = _path(found, base, "source").name
        with cache.writing(base), cache.workshop(base, name) as work:
            opened = found.open(work / "scratch")
            for one in known:
                if known[one] is None and one in opened.rows:
                    classes = opened.classes if known["train"] is None else known["train"].classes
                    known[one] = _unpack(places[one], opened, one, classes)
        train = known["train"]
    assert train is not None
    unused = found.source.unused if found.source is not None else map(Unused._make, train.unused)
    whole = Source(
        classes=tuple(train.classes),
        rows={one: _reader(places[one], known.get(one)) for one in train.splits},
        sizes={one: None if index is None else len(index.labels) for one, index in known.items()},
        origins={one: one for one in train.splits},
        unused=tuple(unused),
        renumbered=train.renumbered,
    )
    return whole, places


def _path(found: Finding, base: Path, split: str) -> Path:
    return cache.place(base, found.name, f"{split}-files", [_FORMAT, found.identity, split])


def _file(path: Path, number: int) -> Path:
    return path / f"{number // _FOLDER:05d}" / f"{number:08d}"


def _unpack(path: Path, opened: Source, split: str, classes: Sequence[str] | None) -> Index:
    def fill(work: Path) -> None:
        entry, where, labels, sizes = work / "entry", [], [], []
        rows, size = opened.rows[split](), opened.sizes[split]
        bar = tqdm(rows, f"unpacking {split}", size, unit=" images", disable=None)
        for number, row in enumerate(bar):
            if number % _FOLDER == 0:
                _file(entry, number).parent.mkdir()
            content = row.file.getvalue()
            _file(entry, number).write_bytes(content)
            where.append(row.where)
            labels.append(min(row.label, 2**63 - 1))
            sizes.append(len(content))
        if not labels:
            raise ValueError(EMPTY)
        names = check_labels(np.array(labels), classes, lambda n: where[n])
        of_all = list(names), list(opened.rows), list(map(list, opened.unused)), opened.renumbered
        cache.write_json(entry / "index.json", Index(where, labels, sizes, *of_all)._asdict())

    return cache.build(path, fill, _read)


def _read(path: Path) -> Index | None:
    """The index of an entry; None if it is absent or not what was written."""
    content = cache.read_json(path, "index.json")
    try:
        index = Index(**content)  # type: ignore[arg-type]  # None is no mapping
        sizes = [os.stat(_file(path, i)).st_size for i in range(len(index.sizes))]
    except (TypeError, OSError):
        return None
    return index if sizes == index.sizes and len(index.labels) == len(sizes) > 0 else None


def _reader(path: Path, index: Index | None) -> Callable[[], Iterator[Row]]:
    def rows() -> Iterator[Row]:
        if index is None:
            raise ValueError(f"`load` has not unpacked {str(path)!r}.")
        for number, (where, label) in enumerate(zip(index.where, index.labels, strict=True)):
            yield Row(where, _file(path, number), label)

    return rows
