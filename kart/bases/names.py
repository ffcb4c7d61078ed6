"""Names of what a basis computes, the same in every process: from the factory and its options, or
from the code of a function of one's own.
"""

import functools
import hashlib
import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

# whose functions and classes their names tell apart
LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy"}

# values that their text tells apart
PLAIN = (bool, int, float, complex, str, bytes, slice, types.EllipsisType, torch.dtype)

_unnamed = itertools.count()


def builtin(factory: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """`module:factory?{options}`, by which `kart.kernels` can make the basis of a stored graph."""
    return f"kart.bases:{factory.__name__}?{json.dumps(options, sort_keys=True)}"


def own(family: str, expand: Callable[..., Any], size: int, base: str, pieces: Any) -> str:
    """The name of features of one's own: where they are written, and a hash of what they are."""
    where = f"{getattr(expand, '__module__', '')}.{getattr(expand, '__qualname__', '')}"
    text = "\n".join((family, str(size), base, *_parts((pieces, expand), {})))
    return f"own:{family}:{where}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _parts(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[str]:
    """What the behaviour of `value` depends on, as text, in a fixed order; `seen` are the objects
    met before by their ids, held so that no other takes an id over.
    """
    if value is None or isinstance(value, PLAIN):
        yield repr(value)
    elif id(value) in seen:
        yield f"again {seen[id(value)][0]}"
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
        seen[id(value)] = len(seen), value
        for cell in value.__closure__ or ():
            yield from _parts(cell.cell_contents, seen)
        yield from _parts((value.__defaults__, value.__kwdefaults__, vars(value)), seen)
        if _of_library(value):
            yield f"{value.__module__}.{value.__qualname__}"
            return
        yield from _parts(value.__code__, seen)
        for name in sorted(_names_in(value.__code__) & value.__globals__.keys()):
            yield name
            yield from _parts(value.__globals__[name], seen)
    elif isinstance(value, types.BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, type):
        seen[id(value)] = len(seen), value
        yield f"{value.__module__}.{value.__qualname__}"
        if not _of_library(value):
            yield from _parts(value.__bases__, seen)
            for name, item in sorted(vars(value).items()):
                if _is_written(name, item):
                    yield name
                    yield from _parts(item, seen)
    elif isinstance(value, types.MethodType):
        yield from _parts((value.__func__, value.__self__), seen)
    elif isinstance(value, staticmethod | classmethod):
        yield from _parts(value.__func__, seen)
    elif isinstance(value, property):
        yield from _parts(value.fget, seen)
    elif isinstance(value, list | tuple | set | frozenset | range | dict):
        seen[id(value)] = len(seen), value
        yield str(len(value))
        yield from _parts(type(value), seen)
        ordered = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        for item in value.items() if isinstance(value, dict) else ordered:
            yield from _parts(item, seen)
        if type(value).__module__ != "builtins":
            yield from _parts(_attributes(value), seen)
    elif isinstance(value, functools.partial) or _is_whole(value):
        seen[id(value)] = len(seen), value
        yield from _parts(type(value), seen)
        yield from _parts(_attributes(value), seen)
    else:
        # nothing to tell it by: two must not share a name, so this one is of this process alone
        yield f"{type(value).__qualname__} {next(_unnamed)}"


def _of_library(value: Any) -> bool:
    return str(value.__module__).partition(".")[0] in LIBRARIES


def _is_written(name: str, item: Any) -> bool:
    """Whether an item of a class is its author's: not what Python puts there of itself, nor the
    descriptors of slots and of fields.
    """
    if isinstance(item, types.FunctionType | staticmethod | classmethod | property):
        return True
    getter = getattr(type(item), "__get__", None)
    return not name.startswith("__") and not isinstance(getter, types.WrapperDescriptorType)


def _is_whole(value: Any) -> bool:
    """Whether all that `value` does is in its class, of Python, and in its attributes."""
    call = type(value).__call__ if callable(value) else None
    written = call is None or isinstance(call, types.FunctionType)
    kept = hasattr(value, "__dict__") or bool(_attributes(value))
    return written and kept and type(value).__module__ != "builtins"


def _attributes(value: Any) -> dict[str, Any]:
    """What an object has of its own, in slots and in its dict."""
    slots = [
        name
        for kind in type(value).__mro__
        for name, item in vars(kind).items()
        if isinstance(item, types.MemberDescriptorType)
        and not name.startswith("__")
        and hasattr(value, name)
    ]
    return {name: getattr(value, name) for name in sorted(slots)} | getattr(value, "__dict__", {})


def _names_in(code: types.CodeType) -> set[str]:
    inner = [x for x in code.co_consts if isinstance(x, types.CodeType)]
    return set(code.co_names).union(*(_names_in(x) for x in inner))
