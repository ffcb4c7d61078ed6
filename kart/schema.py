"""Values from files and callers: whether they are of annotated types, and JSON that all read."""

import difflib
import hashlib
import json
import math
import numbers
import types
import typing
from collections.abc import Collection, Iterable
from typing import Any


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type: a union, a tuple of one type (or a list, as JSON
    has it), a list or dict of one, a number (an integer is a float, a truth value is neither), a
    class or Any.
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return isinstance(value, list | tuple) and all(fits(one, inner) for one in value)
    if typing.get_origin(kind) is list:
        inner = typing.get_args(kind)[0]
        return isinstance(value, list) and all(fits(one, inner) for one in value)
    if typing.get_origin(kind) is dict:
        left, right = typing.get_args(kind)
        whole = isinstance(value, dict)
        return whole and all(fits(a, left) and fits(b, right) for a, b in value.items())
    if kind is Any:
        return True
    if kind is type(None):
        return value is None
    if kind in (int, float):
        number = (int, float) if kind is float else int
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)


def check_type(function: str, argument: str, value: Any, kind: Any) -> None:
    """Raises ValueError unless `value` is of the type `kind`."""
    if not fits(value, kind):
        raise ValueError(
            f"`{function}` needs `{argument}` of type {name(kind)}, got {value!r:.100}. Change it."
        )


def check_integer(function: str, argument: str, value: Any, least: int, advice: str = "") -> None:
    """Raises ValueError unless `value` is an integer from `least` on."""
    if not fits(value, int) or value < least:
        if isinstance(value, numbers.Integral) and not isinstance(value, int):  # as of numpy
            advice = "Pass a Python int."
        told = f"`{function}` needs an integer `{argument}` >= {least}, got {value!r}. {advice}"
        raise ValueError(told.strip())


def check_choice(function: str, argument: str, value: Any, allowed: Collection[Any]) -> None:
    """Raises ValueError unless `value` is among `allowed`: words, and None."""
    if value not in allowed:
        words = [word for word in allowed if word is not None]
        some = "None or in" if None in allowed else "in"
        advice = near_matches(value, words) or " Choose one of them."
        raise ValueError(f"`{function}` needs `{argument}` {some} {words}, got {value!r}.{advice}")


def near(word: Any, known: Iterable[str]) -> list[str]:
    """Up to three of `known` that `word` may have meant, whatever its case."""
    folded = {name.casefold(): name for name in known}
    return [folded[name] for name in difflib.get_close_matches(str(word).casefold(), folded)]


def near_matches(word: Any, known: Iterable[str]) -> str:
    """The end of a message on an unknown `word`: those of `known` that are near, if any."""
    found = near(word, known)
    return f" Near matches: {', '.join(found)}." if found else ""


def name(kind: Any) -> str:
    """An annotated type as a reader knows it.

    >>> name(int), name(tuple[int, ...])
    ('int', 'tuple[int, ...]')
    """
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def dumps(value: Any, indent: int | None = None) -> str:
    """`value` as JSON, as whose null stands a number that is not finite: JSON has no other word.

    >>> dumps({"loss": [0.5, float("nan")]})
    '{"loss": [0.5, null]}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of `value` as JSON with sorted keys, in hex digits: the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
