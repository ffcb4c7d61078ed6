"""Whether values are of annotated types, for configs from files and from callers."""

import types
import typing
from typing import Any


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type: a union, a tuple of one type (or a list, as JSON
    has it), a number (an integer is a float, a truth value is neither) or a class.
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return isinstance(value, list | tuple) and all(fits(one, inner) for one in value)
    if kind is type(None):
        return value is None
    if kind in (int, float):
        number = (int, float) if kind is float else int
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)


def name(kind: Any) -> str:
    """An annotated type as a reader knows it.

    >>> name(int), name(tuple[int, ...])
    ('int', 'tuple[int, ...]')
    """
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
