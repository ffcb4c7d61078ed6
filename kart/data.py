"""Data sets as arrays: fixed splits, a memory-mapped cache, batches as pure functions."""

import contextlib
import difflib
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from tqdm import tqdm

SPLITS = ("train", "val", "test")
PUBLIC = ("digits", "uoft-cs/cifar10", "uoft-cs/cifar100")
_ALIASES = {
    "training": "train",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "testing": "test",
}
_IMAGE_SUFFIXES = {
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".pgm",
}
_GRAY_MODES = {"1", "L", "LA", "La"}
_FORMAT = 1  # part of every cache key: raise it when the layout or the splits change
_SPLIT_SEED = 1905  # fixes the shuffle behind every split, never a user's choice
_INSTALL = 'Run `pip install "kart-attention[data]"`.'


class Dataset(NamedTuple):
    """One split: images and labels as NumPy arrays, images possibly memory-mapped and read-only.

    `mean` and `std` are per channel, of pixels in [0, 1], over the whole training split (whatever
    `train_limit`), and the same on every split.
    """

    images: np.ndarray  # uint8 (n, channels, height, width)
    labels: np.ndarray  # int64 (n,)
    classes: tuple[str, ...]
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


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
) -> Dataset:
    """One split of an image classification data set, the same on every machine and every call.

    Fit on "train", choose on "val"; "test" is for the final evaluation and is to be read by nothing
    else (no other split touches a source's own test files).

    Splits: a source's own test split stays as it is and 10 % of its training images become "val",
    unless it also has a validation split; a lone held-out split, whatever its name, is the test
    split. A source with one split only is cut 60/20/20. Cuts are stratified by class, and "train"
    is in a fixed shuffled order, so its first n images are a fair sample.

    Args:
        source: "digits" (scikit-learn's 1797 handwritten digits of 8 x 8, no network); a directory
            of parquet files or of images, one sub-folder per class, below `train` and `test` where
            there are such; or a public Hugging Face name such as "uoft-cs/cifar10".
        split: "train", "val" or "test".
        image_size: side in pixels; shorter sides are scaled to it and the centre is cropped. Needed
            where images differ in size.
        train_limit: keeps the first images of "train"; the other splits ignore it.
        cache: where decoded images are kept; default `$KART_CACHE`, else `~/.cache/kart`. A source
            directory is decoded again when its files change, a public name only under another
            `revision`.
        image_column, label_column: column names, where types do not tell (an `Image` and a
            `ClassLabel`; of several labels `fine_label` or `label`). Labels may be integers.
        config, revision: configuration and git revision of a public name.

    Raises:
        ValueError: unknown source or split, an unreadable or incomplete one, a label outside the
            classes, images of several sizes without `image_size`, or a library that is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"`load` needs `split` in {SPLITS}, got {split!r}.{_near(split, SPLITS)}")
    for argument, value in (("image_size", image_size), ("train_limit", train_limit)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"`load` needs `{argument}` >= 1 or None, got {value!r}.")
    columns = (image_column, label_column)
    if str(source) == "digits":
        if any((*columns, config, revision)):
            raise ValueError(
                "`load` needs no columns, `config` or `revision` for 'digits'. Leave them out."
            )
        dataset = _digits(split, image_size)
    else:
        dataset = _load_cached(str(source), split, image_size, cache, columns, config, revision)
    if split != "train" or train_limit is None:
        return dataset
    if train_limit > len(dataset.labels):
        raise ValueError(
            f"`load` needs `train_limit` <= {len(dataset.labels)}, the training images of "
            f"{str(source)!r}, got {train_limit}. Leave it out to use them all."
        )
    return dataset._replace(
        images=dataset.images[:train_limit], labels=dataset.labels[:train_limit]
    )


def generator_for(*keys: int | str) -> Generator:
    """A CPU generator whose seed depends on `keys` alone, the same on every machine.

    >>> generator_for("augment", 0, 7).initial_seed()
    5680788064619122746
    """
    if not keys or not all(isinstance(key, int | str) for key in keys):
        raise ValueError(f"`generator_for` needs one or more int or str keys, got {keys!r}.")
    digest = hashlib.sha256(json.dumps(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def batch_indices(n: int, batch_size: int, seed: int, epoch: int, drop_last: bool = True) -> Tensor:
    """Shuffled indices of one epoch, int64 `(steps, batch_size)`, from the arguments alone.

    With `drop_last` the n mod `batch_size` images at the end of the shuffle sit this epoch out;
    else the last batch is filled up from the shuffle's start.
    """
    if batch_size < 1 or n < (batch_size if drop_last else 1):
        raise ValueError(
            f"`batch_indices` needs 1 <= `batch_size` <= n = {n}, got {batch_size}. "
            "Lower the batch size, or pass `drop_last=False`."
        )
    order = torch.randperm(n, generator=generator_for("batches", seed, epoch))
    steps = n // batch_size if drop_last else -(-n // batch_size)
    return order[torch.arange(steps * batch_size) % n].reshape(steps, batch_size)


def take(dataset: Dataset, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Images, uint8 `(..., C, height, width)`, and labels, int64 `(...)`, at `indices (...)`."""
    index = indices.numpy(force=True)
    if index.dtype.kind not in "iu":
        raise ValueError(f"`take` needs integer `indices`, got {indices.dtype}.")
    n = len(dataset.labels)
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(
            f"`take` needs indices in 0..{n - 1}, got {index.min()}..{index.max()}. "
            f"Draw them with `batch_indices(n={n}, ...)`."
        )
    return torch.from_numpy(dataset.images[index]), torch.from_numpy(dataset.labels[index])


def as_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1], what `kart.augment` takes."""
    if images.dtype != torch.uint8:
        raise ValueError(f"`as_float` needs uint8 images, got {images.dtype}.")
    return images.float() / 255


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images `(..., C, height, width)`, uint8 or float in [0, 1], less `mean` and over `std`."""
    x = as_float(images) if images.dtype == torch.uint8 else images
    if not x.is_floating_point():
        raise ValueError(f"`normalise` needs uint8 or float images, got {images.dtype}.")
    if images.ndim < 3 or not images.shape[-3] == len(mean) == len(std):
        raise ValueError(
            f"`normalise` needs images (..., C, height, width), C means and C deviations, got "
            f"shape {tuple(images.shape)}, {len(mean)} and {len(std)}. Take both from the data set."
        )
    shift, scale = (x.new_tensor(tuple(values))[:, None, None] for values in (mean, std))
    return (x - shift) / scale


# splits and statistics


def _partition(labels: np.ndarray, held: dict[str, float]) -> dict[str, np.ndarray]:
    """Disjoint indices of "train" and of each fraction in `held`, stratified, in shuffled order."""
    n = len(labels)
    counts = {split: math.ceil(fraction * n) for split, fraction in held.items()}
    if n <= sum(counts.values()):
        raise ValueError(
            f"`load` needs more than {sum(counts.values())} training images to cut the splits "
            f"{sorted(counts)} out of them, got {n}. Add images."
        )
    # NumPy guarantees the raw stream of a bit generator for all versions, `permutation` it does not
    order = np.argsort(np.random.PCG64(_SPLIT_SEED).random_raw(n), kind="stable")
    rest = order[np.argsort(labels[order], kind="stable")]  # by class, shuffled within
    owner = np.full(n, "train", dtype="<U5")
    for split, count in counts.items():
        # evenly spaced over the classes: each gets its share, to within one image
        places = (2 * np.arange(count) + 1) * len(rest) // (2 * count)
        owner[rest[places]] = split
        rest = np.delete(rest, places)
    return {split: order[owner[order] == split] for split in ("train", *held)}


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation per channel of uint8 images, in units of [0, 1]."""
    channels = images.shape[1]
    counts = np.zeros((channels, 256), dtype=np.int64)
    step = max(1, 2**22 // images[0].size)
    for start in range(0, len(images), step):
        chunk = images[start : start + step]
        counts += [np.bincount(chunk[:, c].ravel(), minlength=256) for c in range(channels)]
    share = counts / counts.sum(1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    # a constant channel has no spread: one grey level keeps `normalise` finite
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1)).clip(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


# sources


_Rows = Iterator[tuple[str, Any, Any]]  # where an image is (for messages), its file, its label


class _Source(NamedTuple):
    """A data set not decoded yet: rows and their number by split."""

    classes: tuple[str, ...] | None  # None where labels are bare integers
    rows: dict[str, Callable[[], _Rows]]
    sizes: dict[str, int | None]  # None where it is not known beforehand


def _digits(split: str, image_size: int | None) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as err:
        raise ValueError(f"`load` needs scikit-learn for 'digits'. {_INSTALL}") from err
    digits: Any = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    if image_size not in (None, 8):
        image = _pillow()
        resized = [_resize(image.fromarray(array[0]), image_size) for array in images]
        images = np.stack([np.asarray(array) for array in resized])[:, None]
    labels = digits.target.astype(np.int64)
    parts = _partition(labels, {"test": 0.2, "val": 0.2})
    mean, std = _statistics(images[parts["train"]])
    classes = tuple(str(name) for name in digits.target_names)
    part = parts[split]
    return Dataset(images[part], labels[part], classes, "digits", mean, std)


def _folder(root: Path, files: list[Path]) -> _Source:
    """A directory of images: `[split/]class/.../image.png`."""
    names = [path.relative_to(root).parts for path in files]
    # a folder `train` with images right in it is a class, and so are its neighbours
    depths = [len(parts) for parts in names if _ALIASES.get(parts[0], parts[0]) == "train"]
    has_splits = min(depths, default=0) > 2
    rows: dict[str, list[tuple[Path, str]]] = {}
    for path, parts in zip(files, names, strict=True):
        if len(parts) < has_splits + 2:
            raise ValueError(
                f"`load` needs one sub-folder per class, got the image {str(path)!r} outside. "
                "Move it into the folder of its class."
            )
        rows.setdefault(parts[0] if has_splits else "train", []).append((path, parts[has_splits]))
    train = next(name for name in rows if _ALIASES.get(name, name) == "train")
    classes = tuple(sorted({label for _, label in rows[train]}))
    index = {name: i for i, name in enumerate(classes)}

    def read(split: str) -> _Rows:
        for path, label in rows[split]:
            yield str(path), path, index.get(label, label)

    sizes: dict[str, int | None] = {name: len(found) for name, found in rows.items()}
    return _Source(classes, {name: lambda name=name: read(name) for name in rows}, sizes)


def _table(
    source: str, columns: tuple[str | None, str | None], scratch: Path, **options: Any
) -> _Source:
    """A parquet directory or a public name, streamed by the `datasets` library."""
    try:
        import datasets
    except ImportError as err:
        raise ValueError(f"`load` needs `datasets` to read {source!r}. {_INSTALL}") from err
    try:
        builder = datasets.load_dataset_builder(source, cache_dir=str(scratch), **options)
        streamed: Any = builder.as_streaming_dataset()
        streams = {str(name): stream for name, stream in streamed.items()}
    # offline, gated, no such name, unknown config: each has a class of its own, all are bad input
    except Exception as err:
        raise ValueError(
            f"`load` could not open {source!r}: {_first_line(err)} Check the directory; for a "
            f"public name, the spelling and the network.{_near(source, _candidates(source))}"
        ) from err
    features = next(iter(streams.values())).features or {}
    image_column = _column(features, columns[0], "image_column", datasets.Image, ("image", "img"))
    label_column = _column(
        features, columns[1], "label_column", datasets.ClassLabel, ("fine_label", "label", "labels")
    )
    label = features[label_column]
    if not isinstance(label, datasets.ClassLabel) and "int" not in str(getattr(label, "dtype", "")):
        raise ValueError(
            f"`load` needs integer or ClassLabel labels in `label_column`, got {label} in "
            f"{label_column!r}. Name another column of {sorted(features)}."
        )

    def read(split: str) -> _Rows:
        stream = streams[split].select_columns([image_column, label_column])
        if isinstance(features[image_column], datasets.Image):
            stream = stream.cast_column(image_column, datasets.Image(decode=False))
        try:
            for number, row in enumerate(stream):
                value = row[image_column]
                path = value.get("path") if isinstance(value, dict) else None
                data = value.get("bytes") if isinstance(value, dict) else value
                file = io.BytesIO(data) if isinstance(data, bytes) else path
                yield f"image {number} of {source!r}, split {split!r}", file, row[label_column]
        # Arrow's and the network's errors: name the source, keep the cause
        except Exception as err:
            raise ValueError(
                f"`load` could not read {source!r} to its end: {_first_line(err)} "
                "Fetch the damaged file again."
            ) from err

    classes = tuple(label.names) if isinstance(label, datasets.ClassLabel) else None
    sizes = {name: _size(builder, name) for name in streams}
    return _Source(classes, {name: lambda name=name: read(name) for name in streams}, sizes)


def _size(builder: Any, split: str) -> int | None:
    """Number of rows from the footers of local files or the notes of a public set, if they tell."""
    files = [str(path) for path in builder.config.data_files[split]]
    if all(os.path.isfile(path) for path in files):
        from pyarrow import parquet

        return sum(parquet.read_metadata(path).num_rows for path in files)
    return builder.info.splits[split].num_examples if builder.info.splits else None


def _column(
    features: Any, wanted: str | None, argument: str, kind: type, preferred: tuple[str, ...]
) -> str:
    """The column named `wanted`, else the one of type `kind`, else the first of `preferred`."""
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if wanted is not None:
        if wanted in features:
            return wanted
        problem = f"got {wanted!r}"
    elif len(found) == 1:
        return found[0]
    else:
        for name in preferred:
            if name in found:
                return name
        problem = f"found {len(found)} columns of type {kind.__name__}"
    columns = {name: str(getattr(f, "dtype", None) or f) for name, f in features.items()}
    raise ValueError(f"`load` needs `{argument}`, {problem}. Name one of the columns {columns}.")


def _check_parquet(files: list[Path]) -> None:
    """Refuses a truncated file, and a sharded set with shards missing."""
    shards: dict[tuple[str, str], int] = {}
    for path in files:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(max(0, path.stat().st_size - 4))
            complete = start == file.read(4) == b"PAR1"
        if not complete:
            raise ValueError(
                f"`load` needs whole parquet files, got {str(path)!r}, truncated or something "
                "else. Fetch it again."
            )
        if match := re.match(r"(.*)-\d+-of-(\d+)", str(path)):
            key = (match[1], match[2])
            shards[key] = shards.get(key, 0) + 1
    for (prefix, total), count in shards.items():
        if count != int(total):
            raise ValueError(
                f"`load` needs all {int(total)} shards of {prefix!r}, got {count}. "
                "Fetch the others."
            )


def _files(root: Path, suffixes: set[str]) -> list[Path]:
    """Files below `root` with one of `suffixes`, links followed, hidden ones left out."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in suffixes]
    return sorted(found)


def _candidates(source: str) -> list[str]:
    parent = Path(os.path.expanduser(source)).parent
    near = [str(path) for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    return [*PUBLIC, *near]


def _near(word: str, candidates: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, candidates)
    return f" Near matches: {', '.join(matches)}." if matches else ""


def _first_line(err: Exception) -> str:
    text = str(err).strip().splitlines()
    return f"{text[0] if text else type(err).__name__}".rstrip(".") + "."


# decoding


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as err:
        raise ValueError(f"`load` needs Pillow to decode or resize images. {_INSTALL}") from err
    return Image


def _resize(image: Any, size: int) -> Any:
    """`image` with its shorter side scaled to `size` (bicubic) and its centre square cropped."""
    if image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), resample=_pillow().Resampling.BICUBIC, box=box)


def _decode(
    rows: Iterable[tuple[str, Any, Any]],
    classes: Sequence[str] | None,
    image_size: int | None,
    out: Any,
) -> tuple[tuple[int, int], np.ndarray, bool]:
    """Writes every image to `out` as RGB bytes; returns (height, width), labels, all gray?"""
    image_module = _pillow()
    from PIL import ImageOps

    shape, labels, gray = None, [], True
    for where, file, label in rows:
        try:
            with image_module.open(file) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"mode {image.mode} is not 8 bits a channel")
                gray = gray and image.mode in _GRAY_MODES
                image = image.convert("RGB")
        # Pillow raises OSError, ValueError, SyntaxError, struct.error, ... on a damaged file
        except Exception as err:
            raise ValueError(
                f"`load` needs whole 8-bit images, got {where}: {_first_line(err)} "
                "Replace or remove it."
            ) from err
        if image_size is not None:
            image = _resize(image, image_size)
        shape = shape or image.size
        if image.size != shape:
            raise ValueError(
                f"`load` needs `image_size` where images differ in size: {where} is {image.size}, "
                f"those before are {shape} (width, height). Pass `image_size`, say {min(shape)}."
            )
        if not isinstance(label, int) or label < 0 or (classes and label >= len(classes)):
            raise ValueError(
                f"`load` needs labels among the training classes {tuple(classes or ())}, got "
                f"{label!r} for {where}. Correct it, or remove the image."
            )
        out.write(image.tobytes())
        labels.append(label)
    if shape is None:
        raise ValueError("`load` needs images in every split, got an empty one. Add or remove it.")
    return (shape[1], shape[0]), np.array(labels, dtype=np.int64), gray


# the cache: <cache>/<name>-<key>/ holds <split>.images.npy, <split>.labels.npy and manifest.json


def _load_cached(
    source: str,
    split: str,
    image_size: int | None,
    cache: str | Path | None,
    columns: tuple[str | None, str | None],
    config: str | None,
    revision: str | None,
) -> Dataset:
    root = Path(os.path.expanduser(source))
    table = bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source))
    files: list[Path] = []
    if root.is_dir():
        files = _files(root, {".parquet"})
        table = bool(files)
        files = files or _files(root, _IMAGE_SUFFIXES)
        if not files:
            raise ValueError(
                f"`load` needs a directory of parquet files or images, got {source!r} with none. "
                "Check the path, or fetch the data again."
            )
        if any((*columns, config, revision) if not table else (config, revision)):
            raise ValueError(
                f"`load` needs `config` and `revision` for public names only, and columns for "
                f"tables only, got them with the directory {source!r}. Leave them out."
            )
        stats = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        identity: Any = stats
        name = root.resolve().name
    # "data/cifar" beside a directory "data" is a mistyped path: say so before the network times out
    elif table and not root.parent.is_dir():
        identity, name = [source, config, revision], source
    else:
        raise ValueError(
            f"`load` needs `source` to be 'digits', a directory or a public name like "
            f"'uoft-cs/cifar10', got {source!r}.{_near(source, _candidates(source))}"
        )
    base = Path(cache or os.environ.get("KART_CACHE") or "~/.cache/kart").expanduser()
    digest = hashlib.sha256(json.dumps([_FORMAT, identity, image_size, columns]).encode())
    stem = re.sub(r"[^\w.-]+", "-", name)

    def open_source(scratch: Path) -> _Source:
        if not files:
            return _table(source, columns, scratch, name=config, revision=revision)
        if not table:
            return _folder(root, files)
        _check_parquet(files)
        return _table(str(root.resolve()), columns, scratch)

    def entry(role: str, like: dict[str, Any] | None = None) -> Path:
        """The directory of the training images and what is cut from them, or of the test images."""
        path = base / f"{stem}-{role}-{digest.hexdigest()[:20]}"
        if _manifest(path) is None:
            _build(path, open_source, image_size, like)
        return path

    path = entry("fit")
    fit = _manifest(path)
    if fit is None:
        raise ValueError(
            f"`load` lost {str(path)!r} while reading it. Keep `cache` for kart alone."
        )
    if split == "test" and not fit["holds_test"]:
        path = entry("test", fit)
    images = np.load(path / f"{split}.images.npy", mmap_mode="r")
    labels = np.load(path / f"{split}.labels.npy")
    mean, std = tuple(fit["mean"]), tuple(fit["std"])
    return Dataset(images, labels, tuple(fit["classes"]), name, mean, std)


def _manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a whole cache entry; None if it is absent, half-written or truncated."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        whole = all((path / f).stat().st_size == size for f, size in manifest["bytes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def _build(
    path: Path,
    open_source: Callable[[Path], _Source],
    image_size: int | None,
    like: dict[str, Any] | None,
) -> None:
    """Decodes into a directory of its own and moves that to `path` in one step.

    `like` is the manifest of the training images when the test images are decoded, else None.
    """
    work = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        _fill(work, open_source(work / "scratch"), image_size, like)
        # another process may have been first, or a damaged entry be there, or both in turn
        for attempt in range(5):
            try:
                (work / "entry").rename(path)
                return
            except OSError:
                if _manifest(path) is not None:
                    return
                with contextlib.suppress(FileNotFoundError):
                    path.rename(work / f"damaged-{attempt}")
        (work / "entry").rename(path)
    except OSError as err:
        raise ValueError(
            f"`load` needs a writable `cache` directory, got {str(path.parent)!r}: {err}. "
            "Make room, pass `cache`, or set KART_CACHE."
        ) from err
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        # what killed processes left behind
        for old in path.parent.glob(f".{path.name}-*"):
            with contextlib.suppress(OSError):
                if time.time() - max(p.stat().st_mtime for p in (old, *old.rglob("*"))) > 86400:
                    shutil.rmtree(old)


def _fill(work: Path, source: _Source, image_size: int | None, like: dict[str, Any] | None) -> None:
    """Writes the arrays and the manifest of one cache entry into `work / "entry"`."""
    entry = work / "entry"
    entry.mkdir()
    own = {_ALIASES.get(name, name): name for name in source.rows}
    if len(own) == 1:
        own = {"train": next(iter(own.values()))}
    if "test" not in own and "val" in own:
        own["test"] = own.pop("val")
    if "train" not in own:
        raise ValueError(f"`load` needs a split named 'train', got {sorted(source.rows)}.")
    manifest: dict[str, Any] = {"bytes": {}, "holds_test": "test" not in own}
    classes = source.classes or (tuple(like["classes"]) if like else None)
    for split in ["test"] if like else [s for s in ("train", "val") if s in own]:
        rows, size = source.rows[own[split]](), source.sizes[own[split]]
        bar = tqdm(rows, f"decoding {split}", size, unit=" images", disable=None)
        with (work / "raw").open("wb") as raw, bar:
            (height, width), labels, gray = _decode(bar, classes, image_size, raw)
        classes = classes or tuple(str(i) for i in range(labels.max() + 1))
        pixels = np.memmap(work / "raw", np.uint8, "r", shape=(len(labels), height, width, 3))
        shape = [1 if gray else 3, height, width]
        if split == "train":
            manifest["shape"] = shape
        expected = (like or manifest)["shape"]
        if shape[1:] != expected[1:]:
            raise ValueError(
                f"`load` needs `image_size` where splits differ in size, got {shape[1:]} for "
                f"{split!r} and {expected[1:]} for 'train' (height, width)."
            )
        parts = {split: np.arange(len(labels))}
        if split == "train":
            cut = {"val": 0.1} if "test" in own else {"test": 0.2, "val": 0.2}
            parts = _partition(labels, {} if "val" in own else cut)
        for part, index in parts.items():
            _write(entry, part, pixels, labels, index, expected[0])
        del pixels
        (work / "raw").unlink()
    if like is None:
        train = np.load(entry / "train.images.npy", mmap_mode="r")
        manifest["mean"], manifest["std"] = _statistics(train)
    manifest["classes"] = classes
    manifest["bytes"] = {file.name: file.stat().st_size for file in entry.glob("*.npy")}
    with (entry / "manifest.json").open("w") as file:
        json.dump(manifest, file)
        _sync(file)


def _write(
    entry: Path,
    split: str,
    pixels: np.ndarray,
    labels: np.ndarray,
    index: np.ndarray,
    channels: int,
) -> None:
    _, height, width, _ = pixels.shape
    step = max(1, 2**24 // (height * width * 3))
    # plain writes: a full disk under a memory map would kill the process
    with (entry / f"{split}.images.npy").open("wb") as out:
        shape = (len(index), channels, height, width)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        for start in range(0, len(index), step):
            chunk = pixels[index[start : start + step]]
            out.write(chunk.transpose(0, 3, 1, 2)[:, :channels].tobytes())
        _sync(out)
    with (entry / f"{split}.labels.npy").open("wb") as out:
        np.save(out, labels[index])
        _sync(out)


def _sync(file: Any) -> None:
    # else a crash after the rename could leave files of the right size without their content
    file.flush()
    os.fsync(file.fileno())
