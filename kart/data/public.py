"""Public data sets of the Hugging Face hub, streamed by the `datasets` library."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kart import schema
from kart.data import splits, tables
from kart.data.dataset import Unused
from kart.data.names import Public
from kart.data.source import Row, Source, first_line, library, reading


def read(
    public: Public,
    columns: tuple[str | None, str | None],
    revision: str | None,
    scratch: Path,
    candidates: list[str],
) -> Source:
    """The splits of a public data set; `scratch` is where the library may write. A held-out split
    whose first label is missing (-1) has none to score by, and is left out.
    """
    source = public.path
    datasets = library("datasets", f"`datasets` to read {source!r}")
    try:
        builder = datasets.load_dataset_builder(
            source, cache_dir=str(scratch), name=public.config, revision=revision
        )
        streamed: Any = builder.as_streaming_dataset()
        streams = {str(name): stream for name, stream in streamed.items()}
    # offline, gated, no such name, unknown config: each has a class of its own, all are bad input
    except Exception as err:
        raise ValueError(
            f"`load` could not open {source!r}: {first_line(err)} Check the spelling and the "
            f"network.{schema.near_matches(source, candidates)}"
        ) from err
    found = splits.roles(streams)
    if public.test:
        found = {"train": "train", public.test: "test"}
    elif len(streams) == 1:
        found = dict.fromkeys(streams, "train")
    notes = {name: _columns(stream.features or {}, datasets) for name, stream in streams.items()}
    training = next((name for name in found if found[name] == "train"), None)
    hidden: list[str] = []
    if training is not None:
        _, label = tables.choose(notes[training], *columns)
        held = [name for name in found if found[name] not in ("train", "other")]
        hidden = [
            name for name in held if label in notes[name] and _hides(source, streams[name], label)
        ]
        found = {name: known for name, known in found.items() if name not in hidden}
    own = splits.resolve(found, source)
    first = notes[own["train"]]
    image, label = tables.choose(first, *columns)
    classes, maps, renumbered = first[label].names, {}, {}
    for split, name in own.items():
        there = notes[name].get(label)
        if there is None or there.kind != first[label].kind or image not in notes[name]:
            raise ValueError(
                f"`load` needs the same columns in every split of {source!r}, got "
                f"{sorted(notes[name])} in {name!r} beside {sorted(first)}. Name other columns."
            )
        maps[name] = tables.renumbering(there.names, classes, split == "train", name)
        if maps[name] is not None:
            renumbered[split] = _size(builder, name) or 0
    unused = [
        Unused(
            f"split {name!r}",
            _size(builder, name) or 0,
            "no labels: the first is missing"
            if name in hidden
            else "not one of train, val and test",
        )
        for name in streams
        if name not in own.values()
    ]
    unused += tables.unused_columns(first, (image, label), _size(builder, own["train"]) or 0)

    def reader(name: str) -> Callable[[], Iterator[Row]]:
        return lambda: _rows(source, name, streams[name], (image, label), first, maps[name])

    return Source(
        classes=classes,
        rows={split: reader(name) for split, name in own.items()},
        sizes={split: _size(builder, name) for split, name in own.items()},
        origins=own,
        unused=tuple(unused),
        renumbered=renumbered,
    )


def _hides(source: str, stream: Any, label: str) -> bool:
    """Whether a split begins without a label; its images are not read."""
    with reading(source):
        first = next(iter(stream.select_columns([label])), None)
    return first is not None and first[label] in (-1, None)


def _columns(features: Any, datasets: Any) -> dict[str, tables.Column]:
    columns = {}
    for name, feature in features.items():
        text = str(getattr(feature, "dtype", None) or feature)
        if isinstance(feature, datasets.Image):
            columns[name] = tables.Column("image", "Image")
        elif isinstance(feature, datasets.ClassLabel):
            columns[name] = tables.Column("classes", "ClassLabel", tuple(feature.names))
        elif text.startswith(("int", "uint")):
            columns[name] = tables.Column("integer", text)
        else:
            kind = "bytes" if text in ("binary", "large_binary") else "other"
            columns[name] = tables.Column(kind, text)
    return columns


def _rows(
    source: str,
    name: str,
    stream: Any,
    columns: tuple[str, str],
    notes: dict[str, tables.Column],
    numbers: np.ndarray | None,
) -> Iterator[Row]:
    import datasets

    stream = stream.select_columns(list(columns))
    if notes[columns[0]].kind == "image":
        stream = stream.cast_column(columns[0], datasets.Image(decode=False))
    bound = 2**63 if numbers is None else len(numbers)
    with reading(source):
        for number, row in enumerate(stream):
            value, label = row[columns[0]], row[columns[1]]
            data = value.get("bytes") if isinstance(value, dict) else value
            where = tables.where_is(source, name, number)
            if not isinstance(data, bytes):
                raise ValueError(f"{where}, has no bytes")
            if not isinstance(label, int) or not 0 <= label < bound:
                raise ValueError(
                    f"`load` needs a label for every image, got {label!r} for {where}. Name "
                    "another column of labels, or use a revision that has them."
                )
            yield Row(where, io.BytesIO(data), label if numbers is None else int(numbers[label]))


def _size(builder: Any, split: str) -> int | None:
    """Number of rows from the notes of the set, if they tell."""
    noted = builder.info.splits
    return noted[split].num_examples if noted and split in noted else None
