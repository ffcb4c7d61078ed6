"""What would be read of a source: splits, classes, kinds of images, what is left out or changed."""

import hashlib
import io
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from kart import tables
from kart.data import digits, finding, images, splits
from kart.data.dataset import SPLITS, Converted, Unused
from kart.data.finding import Options
from kart.data.loading import asked, load
from kart.data.source import EMPTY, Row, Source, check_labels

_FEW = 8  # kinds of a thing that the text names before it counts the rest
_UNREADABLE = "unreadable"
_ENDS = 1024  # bytes at either end of a file by which copies are looked for


class SplitDescription(NamedTuple):
    """One split as `load` would give it; every count is of images."""

    origin: str  # the folder, file name or split of the source, or what it is cut from
    counts: dict[str, int]  # by class, in the order of the classes, 0 where there are none
    sizes: dict[tuple[int, int], int]  # by (width, height), of those that can be read
    modes: dict[str, int]  # by Pillow's mode, or "unreadable"
    formats: dict[str, int]

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(self.counts.values())


class Copies(NamedTuple):
    """`count` images of `split` are in `other` as well, byte for byte, `elsewhere` of them there
    in other classes alone; where both are one split, they stand in it behind the same image.
    """

    split: str
    other: str
    count: int
    elsewhere: int


class Description(NamedTuple):
    """What `load` would read of a source."""

    name: str
    classes: tuple[str, ...]
    channels: int
    splits: dict[str, SplitDescription]  # "train", "val", "test"
    unused: tuple[Unused, ...]
    converted: tuple[Converted, ...]  # over all splits
    unreadable: tuple[str, ...]  # one message for each image without a readable header
    copies: tuple[Copies, ...] = ()  # of files; not looked for in a built-in source

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Number of images by split and class."""
        return {name: split.counts for name, split in self.splits.items()}


def describe(
    source: str | Path = "digits",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> Description:
    """What `load` would read of `source`, with the same options: the header of every image is read.

    Other than of PNG pixels are not decoded: damage behind the header may be found by `load` alone.
    Copies of an image file in several splits, which would make a score too good, are counted.

    Raises:
        ValueError: where `load` would refuse the source, other than for an image that is damaged.
    """
    source, options = asked(source, Options(image_column, label_column, config, revision))
    if str(source) in finding.BUILT_IN:
        return _built_in(str(source))
    found = finding.find(source, options)
    with tempfile.TemporaryDirectory(prefix="kart-") as scratch:
        return _describe(found.name, found.open(Path(scratch)))


def summary(description: Description) -> str:
    """The description as plain text: a table of classes by splits, then everything else."""
    parts = list(description.splits)
    rows = [["class", *parts]]
    rows += [
        [name, *(str(description.splits[part].counts[name]) for part in parts)]
        for name in description.classes
    ]
    rows.append(["all", *(str(description.splits[part].images) for part in parts)])
    lines = [f"{description.name}: {len(description.classes)} classes", *tables.aligned(rows)]
    for name, split in description.splits.items():
        sizes = {f"{width} x {height}": count for (width, height), count in split.sizes.items()}
        kinds = ", ".join(_few(kind) for kind in (sizes, split.modes, split.formats) if kind)
        lines.append(f"{name}: from {split.origin}: {kinds}")
    every = Counter[int]()
    for split in description.splits.values():
        for size, count in split.sizes.items():
            every[min(size)] += count
    if len({size for split in description.splits.values() for size in split.sizes}) > 1:
        # what most have, so that one tiny image does not decide
        side = every.most_common(1)[0][0]
        lines.append(f"sizes differ: to train, cut them with `--decode-size`, say {side}")
    lines.append(f"read as: {'grey' if description.channels == 1 else 'colour'}")
    lines += [f"converted: {item.count} {item.what}" for item in description.converted]
    lines += [f"not used: {item}" for item in description.unused]
    lines += [f"unreadable: {message}" for message in description.unreadable]
    lines += [f"copies: {_told(copies)}" for copies in description.copies]
    return "\n".join(lines)


def contact_sheet(
    source: str | Path = "digits",
    *,
    per_class: int = 8,
    side: int = 64,
    classes: int = 40,
    cache: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> Any:
    """A picture of some training images of each class, one row a class, as a Pillow image.

    Of a directory only the images shown are decoded; a public name is loaded, at `side` pixels.

    Args:
        source: as `load` takes it, with `cache`, the columns, `config` and `revision`.
        per_class: images in a row.
        side: of each image, pixels.
        classes: rows at most, the first ones; the last line of the picture says how many are not
            shown.
    """
    for name, value in (("per_class", per_class), ("side", side), ("classes", classes)):
        if type(value) is not int or not 1 <= value <= 512:
            raise ValueError(f"`contact_sheet` needs `{name}` in 1..512, got {value!r}.")
    source, options = asked(source, Options(image_column, label_column, config, revision))
    pillow = images.pillow()
    built_in = str(source) in finding.BUILT_IN
    found = None if built_in else finding.find(source, options)
    if found is not None and found.source is not None:
        local = found.source
        assert local.labels is not None and local.classes is not None  # of a directory
        own, labels = local.classes, local.labels
        # in the order of the source: a table is not read further than it must be
        train = np.sort(splits.partition(labels, splits.cuts(local.rows))["train"])
        labels = labels[train]
        chosen = {int(train[i]) for i in _first(labels, len(own[:classes]), per_class)}
        rows = itertools.islice(local.rows["train"](), max(chosen) + 1)
        decoded = {
            n: images.decode(row.file, row.where)[0] for n, row in enumerate(rows) if n in chosen
        }
        shown = [(int(local.labels[n]), image) for n, image in decoded.items()]
    else:
        size = None if built_in else side
        dataset = load(source, "train", image_size=size, cache=cache, **options._asdict())
        own, labels = dataset.classes, dataset.labels
        shown = []
        for i in _first(labels, len(own[:classes]), per_class):
            pixels = dataset.images[i]
            pixels = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
            shown.append((int(labels[i]), pillow.fromarray(np.ascontiguousarray(pixels))))
    counts = np.bincount(labels, minlength=len(own)).tolist()
    return _sheet(dict(zip(own[:classes], counts, strict=False)), shown, per_class, side, len(own))


def _first(labels: np.ndarray, classes: int, per_class: int) -> list[int]:
    """Where the first images of each class are."""
    return [i for c in range(classes) for i in np.flatnonzero(labels == c)[:per_class].tolist()]


def _sheet(
    counts: dict[str, int], shown: list[tuple[int, Any]], per_class: int, side: int, classes: int
) -> Any:
    from PIL import ImageDraw

    pillow = images.pillow()
    gap, text = 2, 160
    more = classes - len(counts)
    height = (len(counts) + (more > 0)) * (side + gap) + gap
    sheet = pillow.new("RGB", (text + per_class * (side + gap) + gap, height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, count) in enumerate(counts.items()):
        place = (gap, gap + row * (side + gap) + side // 2 - 8)
        printable = name.encode("ascii", "replace").decode()[:20]  # Pillow's own font has no more
        draw.text(place, f"{printable} ({count})", fill="black", font_size=14)
        for column, image in enumerate(image for label, image in shown if label == row):
            # small images stay sharp squares, large ones are scaled down smoothly
            small = max(image.size) <= side
            how = pillow.Resampling.NEAREST if small else pillow.Resampling.BICUBIC
            scale = side / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            corner = (text + column * (side + gap), gap + row * (side + gap))
            sheet.paste(image.convert("RGB").resize(size, how), corner)
    if more > 0:
        place = (gap, height - side // 2 - 8)
        draw.text(place, f"{more} more classes", fill="black", font_size=14)
    return sheet


def _few(counts: dict[str, int]) -> str:
    items = sorted(counts.items(), key=lambda item: -item[1])
    told = " + ".join(f"{count} of {name}" for name, count in items[:_FEW])
    return told + (f" + {len(items) - _FEW} other kinds" if len(items) > _FEW else "")


def _describe(name: str, source: Source) -> Description:
    classes, channels = source.classes, 3
    found: dict[str, SplitDescription] = {}
    converted: Counter[str] = Counter()
    unreadable: list[str] = []
    marks: dict[str, list[_Mark]] = {}
    for split, rows in source.rows.items():
        headers, labels, own = [], [], []
        bar = tqdm(rows(), f"reading {split}", source.sizes[split], unit=" images", disable=None)
        with bar:
            for row in bar:
                labels.append(min(row.label, 2**63 - 1))
                own.append(_mark(row, labels[-1]))
                try:
                    headers.append(images.header(row.file, row.where))
                except ValueError as err:
                    if "needs Pillow" in str(err):
                        raise
                    unreadable.append(str(err))
                    headers.append(images.Header((0, 0), _UNREADABLE, _UNREADABLE, True, ()))
        if not labels:
            raise ValueError(EMPTY)
        array = np.array(labels, dtype=np.int64)
        classes = check_labels(array, classes, lambda n, split=split: f"image {n} of {split!r}")
        origin, parts = source.origins[split], {split: np.arange(len(array))}
        if split == "train":
            channels = 1 if all(header.grey for header in headers) else 3
            parts = splits.partition(array, splits.cuts(source.rows))
        grey = np.array([header.grey for header in headers])
        readable = np.array([header.mode != _UNREADABLE for header in headers])
        kinds = [header.changes for header in headers]
        for part, index in parts.items():
            told = repr(origin) if part == split else f"{len(index)} images cut from {origin!r}"
            found[part] = _split(told, classes, array[index], [headers[i] for i in index])
            marks[part] = [own[i] for i in index]
            count = source.renumbered.get(split, 0) and len(index)
            for what, number in images.tally(kinds, grey, index[readable[index]], channels, count):
                converted[what] += number
    assert classes is not None  # "train" is among the splits
    return Description(
        name=name,
        classes=classes,
        channels=channels,
        splits={split: found[split] for split in SPLITS},
        unused=source.unused,
        converted=tuple(Converted(*item) for item in sorted(converted.items())),
        unreadable=tuple(unreadable),
        copies=_copies({split: marks[split] for split in SPLITS}),
    )


class _Mark(NamedTuple):
    """By what copies of an image file are found: `key`, and if that is there twice its content."""

    key: tuple[int, bytes]
    label: int
    file: Any  # a path, or the open file of a row that `key` has the whole of


def _mark(row: Row, label: int) -> _Mark:
    if isinstance(row.file, io.BytesIO):
        content = row.file.getvalue()
        return _Mark((len(content), hashlib.sha256(content).digest()), label, None)
    try:
        with open(row.file, "rb") as file:
            ends, size = file.read(_ENDS), os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _ENDS))
            ends += file.read()
    except OSError:  # which reading its header tells
        return _Mark((-1, os.fsencode(row.file)), label, None)
    return _Mark((size, hashlib.sha256(ends).digest()), label, row.file)


def _copies(marks: dict[str, list[_Mark]]) -> tuple[Copies, ...]:
    """The images that are in several splits, or several times in one."""
    often = Counter(mark.key for own in marks.values() for mark in own)

    def whole(mark: _Mark) -> tuple[int, bytes]:
        if often[mark.key] == 1 or mark.file is None:
            return mark.key
        with open(mark.file, "rb") as file:
            return mark.key[0], hashlib.file_digest(file, "sha256").digest()

    found: list[Copies] = []
    seen: dict[str, dict[tuple[int, bytes], set[int]]] = {}
    for split, own in marks.items():
        seen[split] = {}
        counts = {other: [0, 0] for other in seen}
        for mark in own:
            key = whole(mark)
            for other, labels in seen.items():
                if key in labels:
                    counts[other][0] += 1
                    counts[other][1] += mark.label not in labels[key]
            seen[split].setdefault(key, set()).add(mark.label)
        found += [Copies(split, other, *two) for other, two in counts.items() if two[0]]
    return tuple(found)


def _told(copies: Copies) -> str:
    split, other, count, elsewhere = copies
    where = f"are in {other!r} as well" if split != other else "stand there twice"
    told = f"{count} of {split!r} {where}, byte for byte"
    return told + f", {elsewhere} of them in another class" * bool(elsewhere)


def _split(
    origin: str, classes: tuple[str, ...], labels: np.ndarray, headers: Sequence[images.Header]
) -> SplitDescription:
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    return SplitDescription(
        origin=origin,
        counts=dict(zip(classes, counts, strict=True)),
        sizes=dict(Counter(header.size for header in headers if header.mode != _UNREADABLE)),
        modes=dict(Counter(header.mode for header in headers)),
        formats=dict(Counter(header.format for header in headers)),
    )


def _built_in(name: str) -> Description:
    datasets = {split: digits.load(name, split, None) for split in SPLITS}
    train = datasets["train"]
    height, width = train.images.shape[2:]
    grey = train.channels == 1
    header = images.Header((width, height), "L" if grey else "RGB", "array", grey, ())
    found = {
        split: _split(finding.BUILT_IN[name], train.classes, one.labels, [header] * len(one.labels))
        for split, one in datasets.items()
    }
    return Description(name, train.classes, train.channels, found, (), (), ())
