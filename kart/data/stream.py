"""Images too many to be decoded beforehand: left in their files, read when drawn.

Those of parquet files and of public data sets become files first: see `unpacked.py`. The splits,
their order and the pixels of a whole image are those of the cache. What is known of the files
beforehand comes from their headers, and mean and standard deviation from the first images of the
(shuffled) training split; both are noted in the cache directory.
"""

import json
import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from kart import schema
from kart.data import cache, files, images, splits, unpacked
from kart.data.dataset import Dataset, mean_and_std
from kart.data.finding import Finding
from kart.data.pictures import Pictures
from kart.data.source import Row, Source

STREAM_LIMIT = 16 * 2**30  # bytes of decoded pixels above which a directory of images streams
SAMPLE = 2000  # images whose pixels give mean and standard deviation

_FORMAT = 1  # part of the name of every note
_LOG = logging.getLogger("kart.data")


class Seen(NamedTuple):
    """What the headers of one split of a source say; `kinds` is indexed by `kind (n,)`."""

    kind: list[int]
    kinds: list[tuple[bool, tuple[str, ...]]]  # whether it is grey, what decoding changes
    shapes: list[tuple[int, int]]  # the sizes that occur: height, width

    def grey(self) -> np.ndarray:
        """Which images are grey, bool `(n,)`."""
        return np.array([self.kinds[i][0] for i in self.kind], dtype=bool)

    def changes(self) -> list[tuple[str, ...]]:
        """What decoding changes in each image."""
        return [self.kinds[i][1] for i in self.kind]


def check(stream: Any, workers: Any) -> None:
    """Refuses options of `load` of a wrong type or range."""
    if stream is not None and not isinstance(stream, bool):
        raise ValueError(f"`load` needs `stream` to be True, False or None, got {stream!r}.")
    if workers is not None and (type(workers) is not int or not 0 <= workers <= 256):
        raise ValueError(f"`load` needs `workers` in 0..256 or None, got {workers!r}.")


class TooLarge(Exception):
    """Raised for a public data set whose size, of which nothing was known, makes it stream."""


def chosen(found: Finding, image_size: int | None, stream: bool | None, base: Path) -> bool:
    """Whether `found` is to stream: as `stream` says, else by the size of its decoded pixels.

    The size of a public data set is known once `measure` has noted it.
    """
    if stream is not None:
        return stream
    if found.source is None:
        known = _Note(base, found, ["size", image_size]).read()
        needed = 0 if known is None else int(known["bytes"])
    else:
        needed = _needed(found.source, image_size)
    if needed <= STREAM_LIMIT:
        return False
    told = "%s would take %.0f GiB decoded, above %.0f: its images stay in their files"
    _LOG.warning(told, found.name, needed / 2**30, STREAM_LIMIT / 2**30)
    return True


def measure(found: Finding, source: Source, image_size: int | None, base: Path) -> None:
    """Raises TooLarge for a public data set that is to stream, and notes its size."""
    needed = _needed(source, image_size)
    if needed > STREAM_LIMIT:
        _Note(base, found, ["size", image_size]).write({"bytes": needed})
        raise TooLarge


def _needed(source: Source, image_size: int | None) -> int:
    """Bytes of the decoded pixels, of the splits whose size is known."""
    if image_size is None:
        first = next(source.rows["train"]())
        width, height = images.header(first.file, first.where).size
    else:
        width = height = image_size
    return 3 * width * height * sum(source.sizes[split] or 0 for split in source.rows)


def load(found: Finding, split: str, size: int | None, base: Path, workers: int | None) -> Dataset:
    """One split of `found` with `Pictures` for images."""
    if workers is None:
        # macOS does not tell which cores a process may use
        asked = getattr(os, "sched_getaffinity", None)
        workers = max(0, (len(asked(0)) if asked else os.cpu_count() or 1) - 1)
    source, places = found.source, dict[str, Path]()
    if source is None or not all(p.suffix.lower() in files.IMAGES for p in source.files):
        source, places = unpacked.source(found, base, split)
    else:
        root = Path(os.path.commonpath([os.path.abspath(file.parent) for file in source.files]))
        places = dict.fromkeys(source.rows, root)
    assert source.classes is not None
    own = {"train", split} & source.rows.keys()
    rows = {name: list(source.rows[name]()) for name in sorted(own)}
    seen = {name: _noted(found, base, name, rows[name]) for name in rows}
    channels = 1 if seen["train"].grey().all() else 3
    height, width = _shape(seen, size)

    def pictures(rows: list[Row], root: Path) -> Pictures:
        paths = [os.path.abspath(row.file) for row in rows]
        return Pictures(
            root=str(root),
            names=np.array([os.fsencode(os.path.relpath(path, root)) for path in paths]),
            sizes=np.array([os.stat(path).st_size for path in paths], dtype=np.int64),
            channels=channels,
            height=height,
            width=width,
            scaled=size is not None,
            workers=workers,
        )

    labels = np.array([row.label for row in rows["train"]], dtype=np.int64)
    parts = splits.partition(labels, splits.cuts(source.rows))
    of = "train" if split in parts else split
    index = parts.get(split, np.arange(len(rows[of])))
    note = _Note(base, found, ["statistics", size])
    known = note.read()
    if known is None:
        sample = pictures([rows["train"][i] for i in parts["train"][:SAMPLE]], places["train"])
        mean, std = mean_and_std(np.asarray(sample))
        known = {"mean": mean, "std": std}
        note.write(known)
    renumbered = source.renumbered.get(of, 0) and len(index)
    return Dataset(
        pictures([rows[of][i] for i in index], places[of]),
        np.array([rows[of][i].label for i in index], dtype=np.int64),
        source.classes,
        found.name,
        tuple(known["mean"]),
        tuple(known["std"]),
        unused=source.unused,
        converted=images.tally(seen[of].changes(), seen[of].grey(), index, channels, renumbered),
    )


def _shape(seen: dict[str, Seen], image_size: int | None) -> tuple[int, int]:
    if image_size is not None:
        return image_size, image_size
    shapes = sorted({shape for one in seen.values() for shape in one.shapes})
    if len(shapes) > 1:
        raise ValueError(
            f"`load` needs `image_size` where images differ in size, got {len(shapes)} sizes, "
            f"{shapes[0]} to {shapes[-1]} (height, width). Pass `image_size`, say {min(shapes[0])} "
            "(kart train: `--decode-size`)."
        )
    return shapes[0]


def _noted(found: Finding, base: Path, name: str, rows: list[Row]) -> Seen:
    """What the headers of `rows` say, read once."""
    note = _Note(base, found, ["headers", name])
    if (known := note.read()) is not None:
        kinds = [(bool(grey), tuple(told)) for grey, told in known["kinds"]]
        return Seen(known["kind"], kinds, [(h, w) for h, w in known["shapes"]])
    with ThreadPoolExecutor(8) as pool:
        told = pool.map(_header, rows)
        headers = list(tqdm(told, f"reading {name}", len(rows), unit=" images", disable=None))
    kinds = sorted({(header.grey, header.changes) for header in headers})
    place = {kind: i for i, kind in enumerate(kinds)}
    shapes = sorted({(header.size[1], header.size[0]) for header in headers})
    seen = Seen([place[header.grey, header.changes] for header in headers], kinds, shapes)
    note.write(seen._asdict())
    return seen


def _header(row: Row) -> images.Header:
    """The header of an image file; one that does not end as it should is decoded to be sure."""
    with open(row.file, "rb") as file:
        start = file.read(2)
        file.seek(max(0, os.fstat(file.fileno()).st_size - 64))
        # the end of a JPEG, perhaps with some padding
        if start == b"\xff\xd8" and b"\xff\xd9" not in file.read():
            return images.decode(row.file, row.where)[1]
    return images.header(row.file, row.where)


class _Note:
    """A small JSON file in the cache directory about files that did not change since."""

    def __init__(self, base: Path, found: Finding, about: list):
        key = schema.digest([_FORMAT, found.identity, about])
        self.path = base / f"stream-{key[:20]}.json"

    def read(self) -> dict[str, Any] | None:
        try:
            if self.path.stat().st_uid != os.geteuid():
                return None
            return json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None

    def write(self, content: dict[str, Any]) -> None:
        base = self.path.parent
        with cache.writing(base), tempfile.TemporaryDirectory(prefix=".stream-", dir=base) as work:
            path = Path(work) / self.path.name
            path.write_text(json.dumps(content))
            os.replace(path, self.path)
