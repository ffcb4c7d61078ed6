"""Tuples of closures that pickle and deepcopy: as the call of the factory that made them.

A closure cannot be pickled, but a named function and its arguments can. `remember` decorates a
factory whose NamedTuple has a last field `call`; the tuple's `__reduce__` is `reduce`. Whatever was
replaced since (`op._replace(name=...)`) is stored beside the call, so that a copy never falls back
to what the factory made.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(eq=False, repr=False, slots=True)
class Call:
    """The call that made a tuple: a factory, its arguments, and the fields that it returned."""

    factory: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    fields: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<call of {self.factory.__qualname__}>"


def remember(factory: Callable[P, T]) -> Callable[P, T]:
    """`factory`, whose tuple keeps the call that made it in its field `call`."""

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> T:
        made: Any = factory(*args, **kwargs)
        return made._replace(call=Call(make, args, kwargs, made._asdict()))

    return make


def rebuild(
    factory: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    changed: Mapping[str, Any],
) -> Any:
    """The tuple that `factory(*args, **kwargs)` makes, with the fields `changed` put in."""
    return factory(*args, **kwargs)._replace(**changed)


def changed(made: Any) -> dict[str, Any]:
    """The fields of a tuple that are not those its factory returned; none of one made by hand."""
    if made.call is None:
        return {}
    return {
        name: value
        for name, value in made._asdict().items()
        if name != "call" and value is not made.call.fields[name]
    }


def reduce(made: Any) -> tuple[Any, ...]:
    """What `__reduce__` of a tuple with a field `call` returns, to be rebuilt by that call.

    A tuple without one (made by hand) pickles as its fields, if they do.
    """
    call = made.call
    if call is None:
        return type(made), tuple(made)
    return rebuild, (call.factory, call.args, call.kwargs, changed(made))
