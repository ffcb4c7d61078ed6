"""The cache of decoded images: private directories of arrays, made in one step, checked if opened.

`<cache>/<name>-<role>-<key>/` holds `<split>.images.npy`, `<split>.labels.npy`, `manifest.json`.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kart import schema
from kart.data.dataset import Converted, Unused

_BLOCK = 2**24
_WORKSHOP = re.compile(r"\..+-(fit|test|files)-[0-9a-f]{20}-\w+")
_LOG = logging.getLogger("kart.data")


class Manifest(NamedTuple):
    """What the arrays of an entry are; `blocks` has the SHA-256 of every 16 MiB of each file."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    holds_test: bool
    unused: tuple[Unused, ...]
    converted: dict[str, tuple[Converted, ...]]
    blocks: dict[str, tuple[str, ...]]


def directory(cache: str | Path | None) -> Path:
    """The cache directory, private: made with mode 0700, refused if others may write to it."""
    base = Path(cache or os.environ.get("KART_CACHE") or "~/.cache/kart")
    try:
        base = base.expanduser()
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = base.stat()
    except (OSError, RuntimeError) as err:  # the latter of a user who has no home
        raise _unwritable(base, err) from err
    if not stat.S_ISDIR(info.st_mode):
        raise ValueError(f"`load` needs `cache` to be a directory, got {str(base)!r}.")
    open_to_all = info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX
    if info.st_uid not in (os.geteuid(), 0) or open_to_all:
        raise ValueError(
            f"`load` needs a `cache` directory that no one else can write to, got {str(base)!r} of "
            f"user {info.st_uid} with mode {stat.S_IMODE(info.st_mode):o}. "
            f"Run `chmod go-w {base}`, or pass another."
        )
    return base


def place(base: Path, name: str, role: str, key: list) -> Path:
    """The directory of an entry: `name` is for readers, `role` and `key` make it another one."""
    stem = re.sub(r"[^\w.-]+", "-", name).encode()[:80].decode(errors="ignore")
    return base / f"{stem}-{role}-{schema.digest(key)[:20]}"


def lost(path: Path) -> ValueError:
    """The error of an entry that is gone, or was changed, after it was made."""
    return ValueError(f"`load` lost {str(path)!r} while reading it. Keep `cache` for kart alone.")


def read(path: Path) -> Manifest | None:
    """The manifest of an entry; None if it is absent, damaged, or of another schema."""
    content = read_json(path, "manifest.json")
    try:
        return None if content is None else _manifest(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_json(path: Path, name: str) -> Any:
    """What `write_json` wrote to the file `name` of an entry; None if that is absent or damaged."""
    try:
        info = path.lstat()
    except OSError:
        return None
    if stat.S_ISDIR(info.st_mode) and info.st_uid != os.geteuid():
        raise ValueError(
            f"`load` reads no cache that user {info.st_uid} has made, got {str(path)!r}. "
            "Remove it, or pass another `cache`."
        )
    try:
        note = json.loads((path / name).read_text())
        return note["content"] if note["sha256"] == schema.digest(note["content"]) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def arrays(path: Path, manifest: Manifest, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Images (memory-mapped) and labels of one split; None if they are not what was written."""
    names = (f"{split}.images.npy", f"{split}.labels.npy")
    try:
        if any(_blocks(path / name) != manifest.blocks.get(name) for name in names):
            return None
        images = np.load(path / names[0], mmap_mode="r")
        labels = np.load(path / names[1])
    except (OSError, ValueError):
        return None
    fits = images.dtype == np.uint8 and labels.dtype == np.int64 and labels.ndim == 1
    fits = fits and images.shape == (len(labels), *manifest.shape) and len(labels) > 0
    fits = fits and labels.min() >= 0 and labels.max() < len(manifest.classes)
    return (images, labels) if fits else None


def build(path: Path, fill: Callable[[Path], None], note: Callable[[Path], Any]) -> Any:
    """Calls `fill(work)`, which writes `work / "entry"`, moves that to `path` in one step, and
    returns `note(path)`, which reads what is there and is None where nothing is.

    What is at `path` now is taken for damaged, since who builds has found nothing there to use;
    what comes there meanwhile stays if it is whole.
    """
    base, damaged = path.parent, os.path.lexists(path)
    if damaged:
        # on standard error, unless a program has set up logging otherwise
        _LOG.warning("the cache %s is damaged; decoding again", path)
    with writing(base), workshop(base, path.name) as work:
        if damaged:
            with contextlib.suppress(FileNotFoundError):
                path.rename(work / "damaged")
        fill(work)
        # another process may have been first, or a damaged entry be there, or both in turn
        for attempt in range(5):
            try:
                (work / "entry").rename(path)
                break
            except OSError:
                if _whole(path):
                    break
                with contextlib.suppress(FileNotFoundError):
                    path.rename(work / f"damaged-{attempt}")
        else:
            (work / "entry").rename(path)
        _sync_directory(base)
    found = note(path)
    if found is None:
        raise lost(path)
    return found


@contextlib.contextmanager
def writing(base: Path) -> Iterator[None]:
    """A block that writes to the cache: what the system says of it becomes a ValueError."""
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(base).free // 2**20
            raise ValueError(
                f"`load` ran out of room in {str(base)!r}, {free} MiB are free now: "
                f"{err.strerror or err}. Make room, pass `cache`, or set KART_CACHE."
            ) from err
        raise _unwritable(base, err) from err


def check_room(work: Path, needed: int) -> None:
    """Refuses to start what will not fit: `needed` bytes below `work`."""
    free = shutil.disk_usage(work).free
    if needed > free:
        raise ValueError(
            f"`load` needs {needed / 2**20:.0f} MiB in {str(work.parent)!r} to decode the images, "
            f"{free / 2**20:.0f} MiB are free. Make room, pass `cache`, or set KART_CACHE."
        )


def write_array(path: Path, shape: tuple[int, ...], chunks: Iterator[np.ndarray]) -> None:
    """A uint8 array of `shape` as an .npy file, chunk by chunk along its first axis."""
    # plain writes: a full disk under a memory map would kill the process
    with path.open("wb") as out:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        for chunk in chunks:
            out.write(chunk.tobytes())
        _sync(out)


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Labels as an .npy file."""
    with path.open("wb") as out:
        np.save(out, labels)
        _sync(out)


def write_manifest(entry: Path, manifest: Manifest) -> None:
    """Writes the manifest of `entry` with the hashes of the arrays that are there."""
    blocks = {file.name: _blocks(file) for file in sorted(entry.glob("*.npy"))}
    write_json(entry / "manifest.json", manifest._replace(blocks=blocks)._asdict())


def write_json(path: Path, content: Any) -> None:
    """Writes `content` with its hash, the last file of an entry."""
    with path.open("w") as out:
        json.dump({"content": content, "sha256": schema.digest(content)}, out)
        _sync(out)
    _sync_directory(path.parent)


def sweep(base: Path) -> None:
    """Removes what killed processes left in `base`: workshops that nobody holds."""
    with _door(base):
        _sweep(base)


def _sweep(base: Path) -> None:
    for old in base.glob(".*"):
        if not _WORKSHOP.fullmatch(old.name):
            continue
        with contextlib.suppress(OSError), _opened(old, os.O_NOFOLLOW) as place:
            if os.fstat(place).st_uid == os.geteuid() and _abandoned(place):
                shutil.rmtree(old)


def _abandoned(place: int) -> bool:
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    # a file system without locks on directories: whoever works changes something within a day
    except OSError:
        return time.time() - os.fstat(place).st_mtime > 86400


@contextlib.contextmanager
def _door(base: Path) -> Iterator[None]:
    """One at a time: else a sweep could come between the making of a workshop and its lock."""
    with _opened(base) as place:
        with contextlib.suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def workshop(base: Path, name: str) -> Iterator[Path]:
    """A directory of one's own in `base`, locked while in use."""
    with _door(base):
        _sweep(base)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=base))
        place = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_EX)
    try:
        (work / "entry").mkdir(mode=0o700)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(place)


def _whole(path: Path) -> bool:
    manifest = read(path)
    if manifest is None:
        return False
    try:
        return all(_blocks(path / name) == blocks for name, blocks in manifest.blocks.items())
    except OSError:
        return False


def _blocks(path: Path) -> tuple[str, ...]:
    with path.open("rb", buffering=0) as file:
        blocks = iter(lambda: file.read(_BLOCK), b"")
        return tuple(hashlib.sha256(block).hexdigest() for block in blocks)


def _manifest(content: dict[str, Any]) -> Manifest:
    """The manifest that `content` describes; ValueError, KeyError or TypeError if it is none."""
    manifest = Manifest(
        classes=tuple(content["classes"]),
        shape=tuple(content["shape"]),
        mean=tuple(content["mean"]),
        std=tuple(content["std"]),
        holds_test=content["holds_test"],
        unused=tuple(Unused(*item) for item in content["unused"]),
        converted={
            split: tuple(Converted(*item) for item in items)
            for split, items in content["converted"].items()
        },
        blocks={name: tuple(items) for name, items in content["blocks"].items()},
    )
    channels = manifest.shape[0]
    numbers = [*manifest.mean, *manifest.std]
    fits = (
        len(manifest.shape) == 3
        and channels in (1, 3)
        and len(manifest.mean) == len(manifest.std) == channels
        and all(isinstance(number, float) for number in numbers)
        and manifest.classes
        and all(isinstance(name, str) for name in manifest.classes)
        and isinstance(manifest.holds_test, bool)
        and all(isinstance(item, str) for blocks in manifest.blocks.values() for item in blocks)
    )
    if not fits:
        raise ValueError("another schema")
    return manifest


def _unwritable(base: Path, err: OSError | RuntimeError) -> ValueError:
    return ValueError(
        f"`load` needs a writable `cache` directory, got {str(base)!r}: "
        f"{str(err).rstrip('.')}. Make room, pass `cache`, or set KART_CACHE."
    )


def _sync(file: Any) -> None:
    # else a crash after the rename could leave files of the right size without their content
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    # some network file systems cannot
    with _opened(path) as place, contextlib.suppress(OSError):
        os.fsync(place)


@contextlib.contextmanager
def _opened(directory: Path, flags: int = 0) -> Iterator[int]:
    """The descriptor of a directory."""
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | flags)
    try:
        yield place
    finally:
        os.close(place)
