"""One split of a data set, from the cache or decoded into it."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kart import schema
from kart.data import cache as entries
from kart.data import digits, finding, images, splits
from kart.data import stream as streaming
from kart.data.cache import Manifest
from kart.data.dataset import SPLITS, Converted, Dataset, mean_and_std
from kart.data.finding import Finding, Options
from kart.data.source import EMPTY, Row, Source, check_labels

_FORMAT = 3  # part of every cache key: raise it when the layout, the splits or what is read changes
_LARGEST = 8192  # pixels a side
_LOG = logging.getLogger("kart.data")


def load(
    source: str | Path = "digits",
    split: str = "train",
    *,
    image_size: int | None = None,
    train_limit: int | None = None,
    cache: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    stream: bool | None = None,
    workers: int | None = None,
) -> Dataset:
    """One split of an image classification data set, the same on every machine and every call.

    Fit on "train", choose on "val"; "test" is for the final evaluation and its images are to be
    read by nothing else (no other split touches a source's own test images).

    Splits: a source's own test split stays as it is and 10 % of its training images become "val",
    unless it also has a validation split; a lone held-out split, whatever its name, is the test
    split. A source with one split only is cut 60/20/20. Cuts are stratified by class, and "train"
    is in a fixed shuffled order, so its first n images are a fair sample. Folders, parquet files
    and public splits are told by one table of names (`kart.data.splits`), in upper or lower case;
    what could be read in two ways is an error.

    Nothing is left out or changed in silence: `Dataset.unused` and `Dataset.converted` have it, and
    the logger "kart.data" warns of it (on standard error, unless logging is set up otherwise) when
    the training split is loaded, and of what was changed whenever a split is, or where it has no
    image of a class. `describe` tells it beforehand.

    Args:
        source: "digits" (scikit-learn's 1797 handwritten digits of 8 x 8, no network);
            "masked_digits" (those digits on photographs, with masks); a directory of parquet files
            or of images, one sub-folder per class, below `train` and `test` where there are such;
            a short name (`kart.data.SHORT`: "cifar10", "svhn", ...) or another public Hugging Face
            name such as "uoft-cs/cifar10"; options may follow it, as in
            "uoft-cs/cifar100?label_column=coarse_label&revision=main". Of a directory nothing is
            read but images and parquet files below it; links that lead elsewhere are refused.
        split: "train", "val" or "test".
        image_size: side in pixels; shorter sides are scaled to it and the centre is cropped. Needed
            where images differ in size.
        train_limit: keeps the first images of "train"; the other splits ignore it.
        cache: where decoded images are kept; default `$KART_CACHE`, else `~/.cache/kart`. A source
            directory is decoded again when its files change, a public name only under another
            `revision`.
        image_column, label_column: column names, where types do not tell (an `Image` and a
            `ClassLabel`; of several labels `fine_label` or `label`). Labels may be integers, which
            are found by these names.
        config, revision: configuration and git revision of a public name.
        stream: whether images stay compressed in their files, as `Pictures`, and are decoded when
            they are drawn (those of parquet files and public names are copied to the cache as files
            first); None (default) for those that take more than `kart.data.STREAM_LIMIT` bytes
            decoded. See `kart.data.stream`.
        workers: processes that decode images that stream, ahead of the training; None (default) for
            the cores but one. What is read does not depend on it.

    Raises:
        ValueError: unknown source or split, an unreadable, incomplete or ambiguous one, a label
            outside the classes, images of several sizes without `image_size`, or a library that is
            missing.
    """
    schema.check_choice("load", "split", split, SPLITS)
    given = Options(image_column, label_column, config, revision)
    source, options = asked(source, given, image_size)
    if train_limit is not None and (type(train_limit) is not int or train_limit < 1):
        raise ValueError(f"`load` needs `train_limit` >= 1 or None, got {train_limit!r}.")
    if cache is not None and not isinstance(cache, str | Path):
        raise ValueError(f"`load` needs `cache` to be a path or None, got {cache!r}.")
    streaming.check(stream, workers)
    if str(source) in finding.BUILT_IN:
        if stream:
            raise ValueError(
                f"`load` streams directories and public data sets alone, got {str(source)!r}. "
                "Leave `stream` out."
            )
        dataset = digits.load(str(source), split, image_size)
    else:
        found = finding.find(source, options)
        base = entries.directory(cache)
        streams = streaming.chosen(found, image_size, stream, base)
        if not streams:
            try:
                dataset = _cached(found, split, image_size, base, stream is None)
            except streaming.TooLarge:
                streams = streaming.chosen(found, image_size, stream, base)
        if streams:
            dataset = streaming.load(found, split, image_size, base, workers)
    if split == "train" and train_limit is not None:
        if train_limit > len(dataset.labels):
            raise ValueError(
                f"`load` needs `train_limit` <= {len(dataset.labels)}, the training images of "
                f"{str(source)!r}, got {train_limit}. Leave it out to use them all."
            )
        dataset = dataset.part(slice(train_limit))
    for line in [*notes(dataset, unused=split == "train"), *_absent(dataset, split)]:
        _LOG.warning("%s", line)
    return dataset


def read_images(
    paths: Sequence[str | Path], shape: tuple[int, ...]
) -> tuple[np.ndarray, tuple[Converted, ...]]:
    """Image files as uint8 `(n, *shape)`, shape (channels, height, width), read as `load` reads
    them, and what was changed in them.
    """
    if isinstance(paths, str | Path) or not len(paths):
        raise ValueError(f"`read_images` needs a list of one path or more, got {paths!r}.")
    channels, height, width = shape
    pixels, told, grey = [], [], []
    for path in paths:
        image, header = images.decode(path, repr(str(path)))
        changed = header.changes
        if image.size != (width, height):
            if width != height:
                raise ValueError(
                    f"`read_images` needs images of {width} x {height}, got {str(path)!r} of "
                    f"{image.width} x {image.height}. Cut it to that size."
                )
            image = images.resize(image, height)
            changed = (*changed, f"resized to {width} x {height}, the middle square")
        pixels.append(images.channels_first(np.asarray(image), channels))
        told.append(changed)
        grey.append(header.grey)
    index = np.arange(len(pixels))
    return np.stack(pixels), images.tally(told, np.array(grey, bool), index, channels)


def _check_source(source: Any) -> None:
    if not isinstance(source, str | Path) or not str(source) or "\0" in str(source):
        raise ValueError(f"`load` needs `source` to be a name or a path, got {source!r}.")
    try:
        Path(source).exists()
    except OSError as err:  # too long a name
        raise ValueError(
            f"`load` needs `source` to be a name or a path, got {str(source)!r:.100} "
            f"({err.strerror})."
        ) from err


def asked(source: Any, options: Options, image_size: Any = None) -> tuple[str | Path, Options]:
    """A source without the options that it names itself, and all options; refuses a source, a size,
    columns, a `config` or a `revision` of a wrong type or range.
    """
    _check_source(source)
    source, options = finding.address(source, options)
    _check_source(source)
    for name, value in options._asdict().items():
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError(f"`load` needs `{name}` to be a name or None, got {value!r}.")
    built_in = str(source) in finding.BUILT_IN
    if built_in and any(options):
        raise ValueError(
            f"`load` needs no columns, `config` or `revision` for {str(source)!r}. Leave them out."
        )
    largest = digits.LARGEST if built_in else _LARGEST
    if image_size is None:
        return source, options
    if type(image_size) is not int or image_size < 1:
        raise ValueError(f"`load` needs `image_size` >= 1 or None, got {image_size!r}.")
    if image_size > largest:
        raise ValueError(
            f"`load` needs `image_size` <= {largest} for {str(source)!r}, got {image_size}."
        )
    return source, options


def notes(dataset: Dataset, unused: bool = True) -> list[str]:
    """Lines that name what was left out of the source and changed in the images of this split."""
    lines = []
    if unused and dataset.unused:
        lines.append(f"{dataset.name}: not used: " + "; ".join(map(str, dataset.unused)))
    if dataset.converted:
        changed = "; ".join(f"{item.count} {item.what}" for item in dataset.converted)
        lines.append(f"{dataset.name}: converted: {changed}")
    return lines


def _absent(dataset: Dataset, split: str) -> list[str]:
    """A line that names the classes of which a split has no image, though it has as many images;
    of the training split in any case, as what is not there is not learned.
    """
    absent = [name for name, n in zip(dataset.classes, dataset.counts, strict=True) if not n]
    few = split != "train" and len(dataset.labels) < len(dataset.classes)
    if not absent or few:
        return []
    shown = ", ".join(absent[:5]) + ", ..." * (len(absent) > 5)
    every = len(dataset.classes)
    return [f"{dataset.name}: {split!r} has no image of {len(absent)} of {every} classes: {shown}"]


def _entry(base: Path, found: Finding, image_size: int | None, role: str) -> Path:
    return entries.place(base, found.name, role, [_FORMAT, found.identity, image_size])


def _cached(found: Finding, split: str, size: int | None, base: Path, limited: bool) -> Dataset:
    entries.sweep(base)
    fit_path = _entry(base, found, size, "fit")
    fit = entries.read(fit_path)
    if fit is None:
        fit = _build(fit_path, found, size, None, limited)
    path, manifest = fit_path, fit
    if split == "test" and not fit.holds_test:
        path = _entry(base, found, size, "test")
        manifest = entries.read(path)
        if manifest is None or manifest.classes != fit.classes or manifest.shape != fit.shape:
            manifest = _build(path, found, size, fit)
    arrays = entries.arrays(path, manifest, split)
    if arrays is None:
        manifest = _build(path, found, size, None if path == fit_path else fit)
        fit = manifest if path == fit_path else fit
        arrays = entries.arrays(path, manifest, split)
    if arrays is None:
        raise entries.lost(path)
    # of a directory the present state: what is not used is not part of the key
    unused = fit.unused if found.source is None else found.source.unused
    converted = manifest.converted.get(split, ())
    return Dataset(
        *arrays, fit.classes, found.name, fit.mean, fit.std, unused=unused, converted=converted
    )


def _build(
    path: Path, found: Finding, image_size: int | None, like: Manifest | None, limited: bool = False
) -> Manifest:
    def decode(work: Path) -> None:
        source = found.open(work / "scratch")
        if limited and found.source is None:
            streaming.measure(found, source, image_size, path.parent)
        fill(work, source, image_size, like)

    return entries.build(path, decode, entries.read)


def fill(work: Path, source: Source, image_size: int | None, like: Manifest | None) -> None:
    """Writes the arrays and the manifest of one cache entry into `work / "entry"`.

    `like` is the manifest of the training images when the test images are decoded, else None.
    """
    entry = work / "entry"
    own = source.rows
    classes, shape = source.classes, None
    if like is not None:
        classes, shape = like.classes, like.shape
    converted: dict[str, tuple[Converted, ...]] = {}
    for split in ["test"] if like else [name for name in ("train", "val") if name in own]:
        rows, size = own[split](), source.sizes[split]
        bar = tqdm(rows, f"decoding {split}", size, unit=" images", disable=None)
        with (work / "raw").open("wb") as raw, bar:
            height, width, labels, grey, told = _decode(bar, classes, image_size, raw, work, size)
        classes = check_labels(labels, classes, lambda n, split=split: f"image {n} of {split!r}")
        pixels = np.memmap(work / "raw", np.uint8, "r", shape=(len(labels), height, width, 3))
        if shape is None:
            shape = (1 if grey.all() else 3, height, width)
        if (height, width) != shape[1:]:
            raise ValueError(
                f"`load` needs `image_size` where splits differ in size, got {[height, width]} for "
                f"{split!r} and {list(shape[1:])} for 'train' (height, width). Pass it (kart "
                "train: `--decode-size`)."
            )
        parts = {split: np.arange(len(labels))}
        if split == "train":
            parts = splits.partition(labels, splits.cuts(own))
        for part, index in parts.items():
            count = source.renumbered.get(split, 0) and len(index)
            converted[part] = images.tally(told, grey, index, shape[0], count)
            size_on_disk = (len(index), *shape)
            chunks = _chunks(pixels, index, shape[0])
            entries.write_array(entry / f"{part}.images.npy", size_on_disk, chunks)
            entries.write_labels(entry / f"{part}.labels.npy", labels[index])
        del pixels
        (work / "raw").unlink()
    assert classes is not None and shape is not None  # "train" is among the splits
    if like is None:
        train = np.load(entry / "train.images.npy", mmap_mode="r")
        mean, std = mean_and_std(train)
    else:
        mean, std = like.mean, like.std
    holds_test = "test" not in own
    manifest = Manifest(classes, shape, mean, std, holds_test, source.unused, converted, blocks={})
    entries.write_manifest(entry, manifest)


def _decode(
    rows: Iterable[Row],
    classes: tuple[str, ...] | None,
    image_size: int | None,
    out: Any,
    work: Path,
    count: int | None,
) -> tuple[int, int, np.ndarray, np.ndarray, list[tuple[str, ...]]]:
    """Writes every image to `out` as RGB bytes; returns their height and width, labels `(n,)`,
    which are grey, bool `(n,)`, and what decoding changed in each.
    """
    shape, labels, grey, changed = None, [], [], []
    for row in rows:
        image, header = images.decode(row.file, row.where)
        if image_size is not None:
            image = images.resize(image, image_size)
        if shape is None:
            shape = image.size
            # once as they come and once in the order of the splits
            entries.check_room(work, 2 * 3 * shape[0] * shape[1] * (count or 1))
        if image.size != shape:
            raise ValueError(
                f"`load` needs `image_size` where images differ in size: {row.where} is "
                f"{image.size}, those before are {shape} (width, height). "
                f"Pass `image_size`, say {min(shape)} (kart train: `--decode-size`)."
            )
        if row.label < 0 or (classes is not None and row.label >= len(classes)):
            raise ValueError(
                f"`load` needs labels among the training classes {tuple(classes or ())}, got "
                f"{row.label} for {row.where}. Correct it, or remove the image."
            )
        out.write(image.tobytes())
        labels.append(row.label)
        grey.append(header.grey)
        changed.append(header.changes)
    if shape is None:
        raise ValueError(EMPTY)
    # an unsigned one may not fit; nor is it a label, and it is found to be out of range
    labels = np.array([min(label, 2**63 - 1) for label in labels], dtype=np.int64)
    return shape[1], shape[0], labels, np.array(grey), changed


def _chunks(pixels: np.ndarray, index: np.ndarray, channels: int) -> Iterator[np.ndarray]:
    """Images at `index` as `(n, channels, height, width)`, some at a time."""
    step = max(1, 2**24 // pixels[0].size)
    for start in range(0, len(index), step):
        yield images.channels_first(pixels[index[start : start + step]], channels)
