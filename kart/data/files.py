"""The files below a directory: each real one once, links and what is not read named."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from kart.data.dataset import Unused

IMAGES = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".tif", ".tiff")
    + (".webp", ".avif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga")
)
# pictures all the same: a class that has only these must not vanish
_OTHER_IMAGES = frozenset(
    (".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".nef", ".cr2", ".cr3", ".arw")
    + (".dcm", ".exr", ".hdr", ".jpx", ".ico")
)
_DEPTH = 64
# a data set has few files beside its images: more are a home directory, or a whole machine
_OTHERS = 200_000
_SYSTEM = ("/", "/proc", "/sys", "/dev")


class Folder(NamedTuple):
    """A directory with what it holds, in the order of the names."""

    name: str
    path: Path
    folders: list["Folder"]
    images: list[Path]
    tables: list[Path]  # parquet files
    pictures: list[Path]  # of formats that are not read


class Found(NamedTuple):
    """All below one directory."""

    top: Folder
    unused: tuple[Unused, ...]
    links: tuple[tuple[Path, Path], ...]  # left out, with the folder each leads to; below the top


def below(folder: Folder, kind: str) -> list[Path]:
    """The `images`, `tables` or `pictures` in `folder` and below it, as `kind` says."""
    return [*getattr(folder, kind), *(p for inner in folder.folders for p in below(inner, kind))]


def walk(root: Path) -> Found:
    """Reads the names of all files below `root`.

    A link is followed to where it leads below `root` if that is not read anyway. A link to an
    image, a table or a folder elsewhere is an error: the data would depend on what was not named.
    """
    real = Path(os.path.realpath(root))
    if str(real) in _SYSTEM:
        raise ValueError(
            f"`load` needs a directory of images or tables, got {str(root)!r}, which holds a whole "
            "machine. Name the directory of the data."
        )
    counts: Counter[tuple[str, str]] = Counter()
    links: list[tuple[Folder, Path]] = []
    left_out: list[tuple[Path, Path]] = []
    visited = {str(real)}
    seen = {"used": 0, "others": 0}

    def count(used: bool) -> None:
        seen["used" if used else "others"] += 1
        if seen["others"] > _OTHERS + 10 * seen["used"]:
            raise ValueError(
                f"`load` needs a directory of images or tables, got {str(root)!r} with "
                f"{seen['others']:,} other files and {seen['used']:,} of these, so far. Name the "
                "directory of the data."
            )

    def read(path: Path, name: str, depth: int) -> Folder:
        if depth > _DEPTH:
            raise ValueError(
                f"`load` needs folders within {_DEPTH} of each other, got {str(path)!r}. "
                "Name a directory further down."
            )
        folder = Folder(name, path, [], [], [], [])
        try:
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as err:
            raise ValueError(
                f"`load` cannot list {str(path)!r}: {err.strerror}. Make it readable."
            ) from err
        for entry in entries:
            bar.update(1)
            place, suffix = path / entry.name, Path(entry.name).suffix.lower()
            kind = suffix in IMAGES or suffix in _OTHER_IMAGES or suffix == ".parquet"
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                inner = entry.is_dir(follow_symlinks=False)
                what = f"{place.relative_to(root)}/" if inner else ".*"
                below = (file for *_, names in os.walk(place) for file in names)
                for _ in below if inner else (place,):
                    count(False)
                    counts[what, "hidden"] += 1
            elif entry.is_symlink() and not place.exists():
                counts[str(place.relative_to(root)), "a link that leads nowhere"] += 1
            elif entry.is_symlink() and (entry.is_dir() or kind):
                target = Path(os.path.realpath(place))
                if not target.is_relative_to(real):
                    raise ValueError(
                        f"`load` reads nothing outside the directory named, got the link "
                        f"{str(place)!r} to {str(target)!r}. Copy what it leads to, or name a "
                        "directory that holds both."
                    )
                if entry.is_dir():
                    links.append((folder, place))
                else:
                    add(folder, place, suffix)
            elif entry.is_dir():
                visited.add(os.path.realpath(place))
                folder.folders.append(read(place, entry.name, depth + 1))
            elif entry.is_file():
                add(folder, place, suffix)
            else:
                counts[str(place.relative_to(root)), "not a file"] += 1
        return folder

    def add(folder: Folder, place: Path, suffix: str) -> None:
        count(suffix in IMAGES or suffix == ".parquet")
        if suffix in IMAGES:
            folder.images.append(place)
        elif suffix == ".parquet":
            folder.tables.append(place)
        elif suffix in _OTHER_IMAGES:
            folder.pictures.append(place)
            counts[f"*{suffix}", "an image format that is not read"] += 1
        else:
            what = f"*{suffix}" if suffix else "files without a suffix"
            counts[what, "neither an image nor a parquet file"] += 1

    bar = tqdm(desc=f"listing {root}", unit=" files", delay=2, disable=None)
    with bar:
        top = read(root, root.name, 0)
    # after the real folders: a link to one of them adds nothing; those found below a link come last
    for folder, place in links:
        target = os.path.realpath(place)
        if target in visited:
            link, led = place.relative_to(root), Path(target).relative_to(real)
            left_out.append((link, led))
            counts[f"{link}/", f"a link to the folder {str(led)!r}, read in its own place"] += 1
        else:
            visited.add(target)
            folder.folders.append(read(place, place.name, len(place.relative_to(root).parts)))
            folder.folders.sort(key=lambda inner: inner.name)
    unused = tuple(Unused(what, count, why) for (what, why), count in sorted(counts.items()))
    return Found(top, unused, tuple(left_out))
