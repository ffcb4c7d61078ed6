"""A data set that is found but not decoded yet."""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kart.data.dataset import Unused

EMPTY = "`load` needs images in every split, got an empty one. Add or remove it."


def library(name: str, need: str) -> Any:
    """The module `name` of a library that may not be installed; `need` says for what it is."""
    try:
        importlib.import_module(name.partition(".")[0])
        return importlib.import_module(name)
    except ImportError as err:
        told = f'`load` needs {need}. Run `pip install "kart-attention[data]"`.'
        raise ValueError(told) from err


class Row(NamedTuple):
    """One image: where it is (for messages), its file (a path or an open one), its label."""

    where: str
    file: Any
    label: int


class Source(NamedTuple):
    """Rows by split, "train" among them; "val" and "test" only where the source has its own."""

    classes: tuple[str, ...] | None  # None where labels are bare integers
    rows: dict[str, Callable[[], Iterator[Row]]]
    sizes: dict[str, int | None]  # None where it is not known beforehand
    origins: dict[str, str]  # the name that each split has in the source
    unused: tuple[Unused, ...]
    renumbered: dict[str, int]  # labels of a split given another number to agree by name
    files: tuple[Any, ...] = ()  # what is read, where that is files of this machine
    labels: np.ndarray | None = None  # of the rows of "train", where known beforehand


def check_labels(
    labels: np.ndarray, classes: Sequence[str] | None, where: Callable[[int], str]
) -> tuple[str, ...]:
    """Refuses labels outside of `classes`; bare ones (None) if negative or more than images.
    Returns the classes, of bare labels the integers as text.
    """
    bound = len(labels) if classes is None else len(classes)
    wrong = np.flatnonzero((labels < 0) | (labels >= bound))
    if len(wrong):
        told = f"(0 to {bound - 1}, as many as images)" if classes is None else tuple(classes)
        raise ValueError(
            f"`load` needs labels among the training classes {told}, got {labels[wrong[0]]} for "
            f"{where(int(wrong[0]))} ({len(wrong)} such). Correct or remove them."
        )
    return tuple(map(str, range(labels.max() + 1)) if classes is None else classes)


@contextlib.contextmanager
def reading(source: object) -> Iterator[None]:
    """Names the source of a table that cannot be read to its end; errors of `load` pass."""
    try:
        yield
    # Arrow's and the network's are of many kinds, and may be ValueErrors too
    except Exception as err:
        if str(err).startswith("`load`"):
            raise
        raise ValueError(
            f"`load` could not read {str(source)!r} to its end: {first_line(err)} "
            "Fetch the damaged file again."
        ) from err


def first_line(err: Exception) -> str:
    """The first line of an error's message as a sentence."""
    text = str(err).strip().splitlines()
    return f"{text[0] if text else type(err).__name__}".rstrip(".") + "."
