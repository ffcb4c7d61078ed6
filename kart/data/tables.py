"""Parquet files as data sets: those of a directory, read by pyarrow, whatever else lies there."""

import functools
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kart.data import splits
from kart.data.dataset import Unused
from kart.data.source import Row, Source, check_labels, library, reading

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("fine_label", "label", "labels")


class Column(NamedTuple):
    """A column's kind ("image", "bytes", "classes", "integer", "other"), type, names of classes."""

    kind: str
    text: str
    names: tuple[str, ...] | None = None


def choose(columns: dict[str, Column], image: str | None, label: str | None) -> tuple[str, str]:
    """The columns of images and labels: those named, else told by their types and names."""
    image = _choose(columns, image, "image_column", "image", "Image", _IMAGE_NAMES)
    label = _choose(columns, label, "label_column", "classes", "ClassLabel", _LABEL_NAMES)
    if columns[image].kind not in ("image", "bytes"):
        raise ValueError(
            f"`load` needs images in `image_column`, got {columns[image].text} in {image!r}. "
            f"Name another column of {sorted(columns)}."
        )
    if columns[label].kind not in ("classes", "integer"):
        raise ValueError(
            f"`load` needs integer or ClassLabel labels in `label_column`, got "
            f"{columns[label].text} in {label!r}. Name another column of {sorted(columns)}, or "
            "save the table again with its classes numbered from 0."
        )
    return image, label


def _choose(
    columns: dict[str, Column],
    wanted: str | None,
    argument: str,
    kind: str,
    title: str,
    preferred: tuple[str, ...],
) -> str:
    found = [name for name, column in columns.items() if column.kind == kind]
    if wanted is not None:
        if wanted in columns:
            return wanted
        problem = f"got {wanted!r}"
    elif len(found) == 1:
        return found[0]
    else:
        # labels may be integers, which tell by their name alone
        kinds = [kind, "integer"] if kind == "classes" and not found else [kind]
        for name in preferred:
            if name in columns and columns[name].kind in kinds:
                return name
        problem = f"found {len(found)} columns of type {title}"
    types = {name: column.text for name, column in columns.items()}
    raise ValueError(
        f"`load` needs `{argument}`, {problem}. Name one of the columns {types} (kart train: "
        f"`--data 'NAME?{argument}=COLUMN'`)."
    )


def unused_columns(
    columns: dict[str, Column], used: Sequence[str], rows: int
) -> tuple[Unused, ...]:
    """The columns that no one reads."""
    why = {
        "image": "another column of images: `image_column` chooses",
        "classes": "another column of labels: `label_column` chooses",
    }
    return tuple(
        Unused(f"column {name!r}", rows, why.get(column.kind, f"{column.text}: not needed"))
        for name, column in columns.items()
        if name not in used
    )


def renumbering(
    names: tuple[str, ...] | None, classes: tuple[str, ...] | None, whole: bool, where: str
) -> np.ndarray | None:
    """What turns a label among `names` into one among `classes`; None where they are the same, or
    one of both has none.

    With `whole` no name may be missing. A name that `classes` does not have, or one that is there
    twice, is an error.
    """
    if names is None or classes is None:
        return None
    twice = len(set(names)) < len(names)
    if names == classes and not twice:
        return None
    more = [name for name in names if name not in classes]
    less = [name for name in classes if name not in names] if whole else []
    if more or less or twice:
        raise ValueError(
            f"`load` needs the same class names everywhere, got {where!r} "
            + " and ".join(
                [f"with {more[:5]} beside those of the training images"] * bool(more)
                + [f"without {less[:5]}"] * bool(less)
                or ["with a name twice"]
            )
            + ". Rename the classes, or move these files away."
        )
    return np.array([classes.index(name) for name in names], dtype=np.int64)


class _Table(NamedTuple):
    """One parquet file."""

    path: Path
    columns: dict[str, Column]
    rows: int


def _open(path: Path) -> _Table:
    parquet = _pyarrow()
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, path.stat().st_size - 4))
        complete = start == file.read(4) == b"PAR1"
    if not complete:
        raise ValueError(
            f"`load` needs whole parquet files, got {str(path)!r}, truncated or something else. "
            "Fetch it again."
        )
    with reading(path), parquet.ParquetFile(path) as file:
        return _Table(path, _columns(file.schema_arrow), file.metadata.num_rows)


def has_images(path: Path, image_column: str | None) -> bool:
    """Whether a parquet file has a column that may hold images."""
    columns = _open(path).columns
    return image_column in columns or any(column.kind == "image" for column in columns.values())


def _pyarrow() -> Any:
    return library("pyarrow.parquet", "`pyarrow` to read parquet files")


def _columns(schema: Any) -> dict[str, Column]:
    """Kinds of columns by the notes that the `datasets` library leaves, else by Arrow's types."""
    import pyarrow

    notes: Any = {}
    try:
        notes = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        notes = {}
    columns = {}
    for field in schema:
        note = notes.get(field.name) if isinstance(notes, dict) else None
        note = note if isinstance(note, dict) else {}
        names = note.get("names")
        if pyarrow.types.is_integer(field.type):
            if note.get("_type") == "ClassLabel" and isinstance(names, list) and names:
                columns[field.name] = Column("classes", "ClassLabel", tuple(map(str, names)))
            else:
                columns[field.name] = Column("integer", str(field.type))
        elif pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            columns[field.name] = Column("image", "Image")
        elif pyarrow.types.is_binary(field.type) or pyarrow.types.is_large_binary(field.type):
            kind = "image" if note.get("_type") == "Image" else "bytes"
            columns[field.name] = Column(kind, str(field.type))
        else:
            columns[field.name] = Column("other", str(field.type))
    return columns


def read(root: Path, paths: list[Path], columns: tuple[str | None, str | None]) -> Source:
    """The parquet files `paths` below `root`, splits told by the names of files and folders.

    The class names of every file are compared with those of the first training file: labels are
    renumbered where the same names come in another order, other names are an error. A held-out
    split whose labels are all missing (-1) is left out.
    """
    _check_shards(paths)
    groups, found, unused = _groups(root, paths)
    tables = {name: [_open(path) for path in group] for name, group in groups.items()}
    # before the splits are told apart: without its labels a held-out split is none
    training = [name for name in tables if found[name] == "train"] or list(tables)
    image, label = choose(tables[training[0]][0].columns, *columns)
    raw: dict[Path, np.ndarray] = {}
    for name, group in list(tables.items()):
        for table in group:
            _check_like(tables[training[0]][0], table, image, label)
            raw[table.path] = _labels(table.path, label)
        rows = sum(table.rows for table in group)
        if name not in training and rows and all((raw[t.path] == -1).all() for t in group):
            unused.append(Unused(f"split {name!r}", rows, "no labels: all are -1"))
            del tables[name], found[name]
    own = splits.resolve(found, str(root))
    first = tables[own["train"]][0].columns
    total = sum(table.rows for name in own.values() for table in tables[name])
    unused += unused_columns(first, (image, label), total)
    classes = first[label].names
    maps: dict[Path, np.ndarray | None] = {}
    renumbered: dict[str, int] = {}
    for split, name in own.items():
        for table in tables[name]:
            names, where = table.columns[label].names, str(table.path)
            maps[table.path] = renumbering(names, classes, split == "train", where)
            if maps[table.path] is not None:
                renumbered[split] = renumbered.get(split, 0) + table.rows
        labels = np.concatenate([raw[table.path] for table in tables[name]])
        if not len(labels):
            raise ValueError(
                f"`load` needs images in every split, got none in {name!r} of {str(root)!r}. Add "
                "or remove it."
            )
        place = functools.partial(where_is, str(root), name)
        if classes is None and split == "train":
            classes = check_labels(labels, None, place)
        first_row = 0
        for table in tables[name]:
            known = table.columns[label].names or classes
            check_labels(raw[table.path], known, lambda n, at=first_row, of=place: of(at + n))
            first_row += table.rows
    if classes is None or len(classes) < 2:
        raise ValueError(
            f"`load` needs two or more classes in {str(root)!r}, got {classes} in the column "
            f"{label!r}. Name another column of labels, or add rows."
        )

    def reader(name: str) -> Callable[[], Iterator[Row]]:
        return lambda: _rows(root, name, tables[name], (image, label), maps)

    return Source(
        classes=classes,
        rows={split: reader(name) for split, name in own.items()},
        sizes={split: sum(table.rows for table in tables[name]) for split, name in own.items()},
        origins=own,
        unused=tuple(unused),
        renumbered=renumbered,
        files=tuple(table.path for name in own.values() for table in tables[name]),
        labels=np.concatenate(
            [_renumbered(raw[table.path], maps[table.path]) for table in tables[own["train"]]]
        ),
    )


def where_is(source: str, split: str, number: int) -> str:
    """How messages name a row."""
    return f"image {number} of {source!r}, split {split!r}"


def _rows(
    root: Path,
    name: str,
    group: list[_Table],
    columns: tuple[str, str],
    maps: dict[Path, np.ndarray | None],
) -> Iterator[Row]:
    parquet, number = _pyarrow(), 0
    for table in group:
        numbers = maps[table.path]
        with reading(table.path), parquet.ParquetFile(table.path) as file:
            for batch in file.iter_batches(batch_size=256, columns=list(columns)):
                images = batch.column(columns[0]).to_pylist()
                labels = batch.column(columns[1]).to_pylist()
                for value, label in zip(images, labels, strict=True):
                    data = value.get("bytes") if isinstance(value, dict) else value
                    where = where_is(str(root), name, number)
                    if not isinstance(data, bytes):
                        raise ValueError(
                            f"`load` needs images inside of the parquet file, got {where}, "
                            "without bytes. Save the table again with its images."
                        )
                    own = label if numbers is None else numbers[label]
                    yield Row(where, io.BytesIO(data), int(own))
                    number += 1


def _renumbered(labels: np.ndarray, numbers: np.ndarray | None) -> np.ndarray:
    return labels if numbers is None else numbers[labels]


def _labels(path: Path, label: str) -> np.ndarray:
    """The labels of one file, int64; a missing one is -1."""
    parquet = _pyarrow()
    with reading(path), parquet.ParquetFile(path) as file:
        column = file.read(columns=[label]).column(label)
        values = [-1 if value is None else value for value in column.to_pylist()]
    # an unsigned one may not fit; nor is it a label
    return np.array([min(value, 2**63 - 1) for value in values], dtype=np.int64)


def _check_like(first: _Table, table: _Table, image: str, label: str) -> None:
    for name in (image, label):
        there = table.columns.get(name)
        if there is None or there.kind != first.columns[name].kind:
            told = f"{there.text} in" if there else "no"
            raise ValueError(
                f"`load` needs the same columns everywhere, got {told} {name!r} in "
                f"{str(table.path)!r} beside {first.columns[name].text} in {str(first.path)!r}. "
                "Move away the files of other data."
            )


def _groups(
    root: Path, paths: list[Path]
) -> tuple[dict[str, list[Path]], dict[str, str], list[Unused]]:
    """The files of each split name, the role of each name, and what is in no split."""
    parts = {path: _parts(root, path) for path in sorted(paths)}
    known = splits.roles(sorted({part for all_parts in parts.values() for part in all_parts}))
    groups: dict[str, list[Path]] = {}
    roles: dict[str, str] = {}
    left: list[Path] = []
    for path, components in parts.items():
        names = [part for part in components if part in known]
        if len({known[name] for name in names}) > 1:
            raise ValueError(
                f"`load` cannot tell the split of {str(path)!r}, whose path names {names}. "
                "Rename its folder or the file."
            )
        if names:
            groups.setdefault(names[-1], []).append(path)
            roles[names[-1]] = known[names[-1]]
        else:
            left.append(path)
    unused = []
    if not groups:
        groups, roles, left = {"train": left}, {"train": "train"}, []
    elif left and "train" not in roles.values():
        raise ValueError(
            f"`load` needs a split named 'train' in {str(root)!r}, got {sorted(groups)} beside "
            f"{str(left[0])!r}. Rename the training files."
        )
    for path in left:
        why = "no split: the name says none of train, val and test"
        unused.append(Unused(str(path.relative_to(root)), _open(path).rows, why))
    for name in [name for name in groups if roles[name] == "other"]:
        rows = sum(_open(path).rows for path in groups.pop(name))
        unused.append(Unused(f"split {name!r}", rows, "not one of train, val and test"))
        del roles[name]
    _check_configurations(root, groups, parts, known)
    return groups, roles, unused


def _parts(root: Path, path: Path) -> list[str]:
    """The names on the way to a file that may tell its split."""
    *folders, _ = path.relative_to(root).parts
    # shards may be counted in other ways than `-00000-of-00002`
    stem = re.sub(r"[\W_]*\d+$", "", splits.SHARD.sub("", path.stem))
    return [*folders, stem]


def _check_configurations(
    root: Path, groups: dict[str, list[Path]], parts: dict[Path, list[str]], known: dict[str, str]
) -> None:
    """Refuses files of several data sets, and one file in two places."""
    found: dict[tuple[str, ...], Path] = {}
    reals: dict[Path, Path] = {}
    for group in groups.values():
        for path in group:
            folders = parts[path][:-1]
            key = tuple(part for part in folders if part not in known and not splits.fills(part))
            found.setdefault(key, path)
            if (other := reals.setdefault(path.resolve(), path)) != path:
                raise ValueError(
                    f"`load` needs every file once, got {str(path)!r} and {str(other)!r}, which "
                    "are the same. Remove one of the links."
                )
    if len(found) > 1:
        names = sorted("/".join(key) or "." for key in found)
        raise ValueError(
            f"`load` found {len(found)} configurations in {str(root)!r}: {names}. Name the "
            f"directory of one, say {str(root / names[-1])!r}, or put their files together."
        )


def _check_shards(paths: list[Path]) -> None:
    """Refuses a sharded set with shards missing."""
    found = (re.match(r"(.*)-\d+-of-(\d+)", str(path)) for path in paths)
    shards = Counter((match[1], match[2]) for match in found if match)
    for (prefix, total), count in shards.items():
        if count != int(total):
            raise ValueError(
                f"`load` needs all {int(total)} shards of {prefix!r}, got {count}. "
                "Fetch the others."
            )
