"""Names of what a basis computes, the same in every process: from the factory and its options, or
from the code of a function of one's own.
"""

import hashlib
import itertools
import json
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

# values that their text tells apart
PLAIN = (bool, int, float, complex, str, bytes, slice, types.EllipsisType, torch.dtype)

_unnamed = itertools.count()


def builtin(factory: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """`module:factory?{options}`, by which `kart.kernels` can make the basis of a stored graph."""
    return f"kart.bases:{factory.__name__}?{json.dumps(options, sort_keys=True)}"


def own(family: str, expand: Callable[..., Any], size: int, base: str, cpp: Any) -> str:
    """The name of features of one's own: where they are written, and a hash of what they are."""
    where = f"{getattr(expand, '__module__', '')}.{getattr(expand, '__qualname__', '')}"
    text = "\n".join((family, str(size), base, repr(cpp), *_parts(expand, set())))
    return f"own:{family}:{where}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _parts(value: Any, seen: set[int]) -> Iterator[str]:
    """What the behaviour of `value` depends on, as text, in a fixed order."""
    if value is None or isinstance(value, PLAIN):
        yield repr(value)
    elif id(value) in seen:
        yield "again"
    elif isinstance(value, torch.Tensor):
        try:
            held = value.detach().cpu().tolist()
        except RuntimeError:  # mapped by vmap, or without data
            held = next(_unnamed)
        yield f"{value.dtype} {tuple(value.shape)} {held}"
    elif isinstance(value, types.ModuleType):
        yield f"module {value.__name__}"
    elif isinstance(value, types.CodeType):
        yield value.co_code.hex()
        yield repr((value.co_names, value.co_varnames, value.co_freevars))
        for constant in value.co_consts:
            yield from _parts(constant, seen)
    elif isinstance(value, types.FunctionType):
        seen.add(id(value))
        yield from _parts(value.__code__, seen)
        for cell in value.__closure__ or ():
            yield from _parts(cell.cell_contents, seen)
        yield from _parts((value.__defaults__, value.__kwdefaults__), seen)
        for name in sorted(_names_in(value.__code__) & value.__globals__.keys()):
            yield name
            yield from _parts(value.__globals__[name], seen)
    elif isinstance(value, types.BuiltinFunctionType | type):
        yield f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, types.MethodType):
        yield from _parts((value.__func__, value.__self__), seen)
    elif isinstance(value, list | tuple | set | frozenset | range):
        seen.add(id(value))
        ordered = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        for item in ordered:
            yield from _parts(item, seen)
    elif isinstance(value, dict):
        seen.add(id(value))
        for key, item in value.items():
            yield from _parts((key, item), seen)
    elif hasattr(value, "__dict__") and type(value).__module__ != "builtins":
        seen.add(id(value))
        yield from _parts(type(value), seen)
        yield from _parts(vars(type(value)).get("__call__"), seen)
        yield from _parts(vars(value), seen)
    else:
        # nothing to tell it by: two must not share a name, so this one is of this process alone
        yield f"{type(value).__qualname__} {next(_unnamed)}"


def _names_in(code: types.CodeType) -> set[str]:
    inner = [x for x in code.co_consts if isinstance(x, types.CodeType)]
    return set(code.co_names).union(*(_names_in(x) for x in inner))
