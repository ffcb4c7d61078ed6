"""Directories of images: `[split/]class/.../image.png`, whatever wraps them."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kart import schema
from kart.data import files, splits
from kart.data.dataset import Unused
from kart.data.files import Folder, Found
from kart.data.source import Row, Source

_RENAME = "if they are classes, rename them, for instance to 'class_train'."


def read(root: Path, found: Found) -> Source:
    """The images below `root`, their splits and classes told by the names of the folders.

    Folders around the one that holds the splits or classes are passed through. Images beside the
    splits, and folders that are no split, are left out and counted; what could be read in two ways
    is an error.
    """
    unused = list(found.unused)
    chosen = _splits(_unwrap(found.top, unused, root), unused, root)
    own = splits.resolve({name: known for name, (_, known) in chosen.items()}, str(root))
    _check_links(found, set(own.values()))
    found_in = {split: _classes(chosen[name][0], root, unused) for split, name in own.items()}
    labelled, twice = _once(found_in, root)
    unused += twice
    classes = tuple(sorted({name for _, name in labelled["train"]}))
    if len(classes) < 2:
        raise ValueError(
            f"`load` needs two or more class folders in {str(root)!r}, got {list(classes)}. "
            "Put the images of each class into a folder of its own."
        )
    for split, images in labelled.items():
        strange = Counter(name for _, name in images if name not in classes)
        for name, count in strange.items():
            place = next(path for path, found_name in images if found_name == name)
            raise ValueError(
                f"`load` needs labels among the training classes {classes}, got {name!r} for "
                f"{str(place)!r} ({count} images of {split!r}). Rename the folder, or move it away."
                + schema.near_matches(name, classes)
            )
    index = {name: i for i, name in enumerate(classes)}

    def reader(split: str) -> Callable[[], Iterator[Row]]:
        return lambda: (Row(str(path), path, index[name]) for path, name in labelled[split])

    return Source(
        classes=classes,
        rows={split: reader(split) for split in own},
        sizes={split: len(images) for split, images in labelled.items()},
        origins={split: str(chosen[name][0].path.relative_to(root)) for split, name in own.items()},
        unused=tuple(unused),
        renumbered={},
        files=tuple(path for images in labelled.values() for path, _ in images),
        labels=np.array([index[name] for _, name in labelled["train"]], dtype=np.int64),
    )


def _full(folder: Folder) -> list[Folder]:
    return [inner for inner in folder.folders if files.below(inner, "images")]


def _inside(folder: Folder, root: Path) -> str:
    return f"{folder.path.relative_to(root)}/"


def _unwrap(folder: Folder, unused: list[Unused], root: Path) -> Folder:
    """The folder below `folder` that holds the splits or the classes."""
    inner = _full(folder)
    while len(inner) == 1 and _full(inner[0]) and not splits.role(inner[0].name):
        _leave_images(folder, unused, root)
        folder = inner[0]
        inner = _full(folder)
    return folder


def _leave_images(folder: Folder, unused: list[Unused], root: Path) -> None:
    unused += [
        Unused(str(path.relative_to(root)), 1, "outside of the class folders")
        for path in folder.images
    ]


def _splits(top: Folder, unused: list[Unused], root: Path) -> dict[str, tuple[Folder, str]]:
    """The folders that are splits, with their roles; `top` itself as "train" if it has classes."""
    inner = _full(top)
    known = splits.roles(folder.name for folder in inner)
    told = {name: found for name, found in known.items() if found != "other"}
    deep = {folder.name for folder in inner if _full(folder)}
    plain = [folder.name for folder in inner if folder.name not in known]
    held = {name for name in known if known[name] != "train"}
    training = [name for name in told if told[name] == "train"]
    whole = {top.name: (top, "train")}
    if not told:
        return whole
    if not deep & told.keys():
        # images right in folders called like splits
        if len(inner) > 1 and len(told) == 1:
            return whole
        raise ValueError(
            f"`load` needs one sub-folder per class below {sorted(told)} in {str(top.path)!r}, "
            f"got images right in them. Make class folders there; {_RENAME}"
        )
    flat = [name for name in training if name not in deep]
    if (plain and not (training and held)) or flat:
        raise ValueError(
            f"`load` cannot tell whether {sorted(told)} in {str(top.path)!r} are splits or classes "
            f"beside {sorted([*plain, *flat])}. Move what is neither away, or rename: splits are "
            "called train, val and test, and hold one folder per class."
        )
    _leave_images(top, unused, root)
    chosen = {}
    for folder in inner:
        count = len(files.below(folder, "images"))
        if folder.name not in told:
            why = "no split: its name is not one of train, val or test, or says it has no labels"
            unused.append(Unused(_inside(folder, root), count, why))
            continue
        body = _body(folder, unused, root)
        if _full(body):
            chosen[folder.name] = (body, told[folder.name])
        elif told[folder.name] == "train":
            raise ValueError(
                f"`load` needs one sub-folder per class in {str(body.path)!r}, got images right in "
                "it. Make class folders."
            )
        else:
            unused.append(Unused(_inside(folder, root), count, "no class folders: no labels"))
    names = {folder.name for folder in inner}
    for folder in top.folders:
        if folder.name not in names and splits.role(folder.name) not in (None, "other"):
            unused.append(_without_images(folder, root))
    return chosen


def _body(split: Folder, unused: list[Unused], root: Path) -> Folder:
    """The folder of a split that holds its classes: `seg_train/seg_train`, `train/images`."""
    folder = split
    inner = _full(folder)
    while len(inner) == 1 and not folder.images:
        name = inner[0].name
        again = splits.role(name) is not None and splits.role(name) == splits.role(split.name)
        if not (name == split.name or again or splits.fills(name)):
            break
        folder = inner[0]
        inner = _full(folder)
    return folder


def _classes(folder: Folder, root: Path, unused: list[Unused]) -> list[tuple[Path, str]]:
    """Every image of one split with the name of its class, in the order of the paths."""
    if folder.images:
        raise ValueError(
            f"`load` needs one sub-folder per class, got the image {str(folder.images[0])!r} "
            "outside. Move it into the folder of its class."
        )
    _check_no_splits(folder)
    labelled = []
    for inner in folder.folders:
        images = files.below(inner, "images")
        if not images:
            unused.append(_without_images(inner, root))
        _check_no_splits(inner)
        # one name in two encodings is one class: macOS takes letters and their accents apart
        name = unicodedata.normalize("NFC", inner.name)
        labelled += [(path, name) for path in images]
    inside = [{deeper.name for deeper in _full(inner)} for inner in _full(folder)]
    if len(inside) > 1 and len(inside[0]) > 1 and all(names == inside[0] for names in inside):
        raise ValueError(
            f"`load` cannot tell whether {[inner.name for inner in _full(folder)][:5]} in "
            f"{str(folder.path)!r} are classes: each holds folders of the same names, "
            f"{sorted(inside[0])[:5]}. Name the directory of one of them; if they are splits, call "
            "them train, val and test; if they are classes, put their images right into them."
        )
    deeper = [one for inner in folder.folders for one in _below(inner)]
    told = [one for one in deeper if not splits.fills(one.name)]
    if told:
        some = f"{len(told)} of them, as {_inside(told[0], root)!r}"
        # no image is left out, so that none is counted
        what = f"names of folders below classes, {some}"
        unused.append(Unused(what, 0, "their images are of the class above"))
    return sorted(labelled)


def _below(folder: Folder) -> list[Folder]:
    """The folders with images anywhere below `folder`."""
    return [one for inner in _full(folder) for one in (inner, *_below(inner))]


def _check_no_splits(folder: Folder) -> None:
    known = splits.roles(inner.name for inner in _full(folder))
    told = {name for name in known if known[name] != "other"}
    if len({known[name] for name in told}) > 1:
        raise ValueError(
            f"`load` needs splits above classes, got {sorted(told)} inside of "
            f"{str(folder.path)!r}. Name that directory if it is the data set, or move its splits "
            f"up; {_RENAME}"
        )


def _without_images(folder: Folder, root: Path) -> Unused:
    """What is left out where a folder holds no image; an error where it holds other pictures."""
    if pictures := files.below(folder, "pictures"):
        suffixes = sorted({path.suffix.lower() for path in pictures})
        raise ValueError(
            f"`load` needs images that Pillow reads in {str(folder.path)!r}, got {len(pictures)} "
            f"pictures of {suffixes} alone. Convert them, or move the folder away."
        )
    return Unused(_inside(folder, root), 0, "no image in it")


def _check_links(found: Found, names: set[str]) -> None:
    """Refuses a link that would have brought images of elsewhere into a split."""
    for link, target in found.links:
        parts, led = link.parts, target.parts
        place = next((i for i, part in enumerate(parts) if part in names), None)
        if place is None or parts[: len(led)] == led or parts[: place + 1] == led[: place + 1]:
            continue
        raise ValueError(
            f"`load` cannot tell whether the images of {str(target)!r} belong where they are or to "
            f"the link {str(link)!r}. Remove the link, or move the folder into its place."
        )


def _once(
    labelled: dict[str, list[tuple[Path, str]]], root: Path
) -> tuple[dict[str, list[tuple[Path, str]]], list[Unused]]:
    """Each real file once; in two classes or splits it is an error."""
    links = [p for images in labelled.values() for p, _ in images if os.path.islink(p)]
    if not links:
        return labelled, []
    # only files that a link leads to can be there twice
    targets = {os.path.realpath(path) for path in links}
    seen: dict[str, tuple[str, str]] = {}
    kept: dict[str, list[tuple[Path, str]]] = {}
    unused = []
    for split, images in labelled.items():
        # of the names of one file the real one stays
        first: dict[str, Path] = {}
        for path, name in images:
            real = os.path.realpath(path)
            if real not in targets:
                continue
            if seen.setdefault(real, (split, name)) != (split, name):
                raise ValueError(
                    f"`load` needs every image in one class of one split, got {str(path)!r} in "
                    f"{seen[real]} and in {(split, name)}. Remove one of the links."
                )
            if os.path.islink(first.setdefault(real, path)) and not os.path.islink(path):
                first[real] = path
        again = {p for p, _ in images if first.get(os.path.realpath(p), p) != p}
        unused += [
            Unused(str(path.relative_to(root)), 1, "a link to an image that is read already")
            for path in sorted(again)
        ]
        kept[split] = [item for item in images if item[0] not in again]
    return kept, unused
