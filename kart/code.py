"""Code of the user's own: modules and files by name, run only where the caller names them.

A spec that was read from a run, a checkpoint or a database may name a file as well. It is a
`Stored` string: what it names is found among the code that this process was given, never run.
"""

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)

# what this process was given, by the name it was given as
_given: dict[str, ModuleType] = {}


class Stored(str):
    """A spec that was read, not given by the caller: code that it names is not run."""


def stored(spec: Any) -> Any:
    """`spec`, or each of several, marked as read: see `Stored`."""
    if isinstance(spec, list | tuple):
        return tuple(stored(one) for one in spec)
    return Stored(spec) if isinstance(spec, str) else spec


def is_name(name: Any) -> bool:
    """Whether `name` is one of a module, or of a Python file."""
    return isinstance(name, str) and (name.endswith(".py") or bool(MODULE.fullmatch(name)))


def run(name: str) -> ModuleType:
    """The module that `name` names, `my_module` or `path/to/file.py`; it is run at each call.

    Raises ValueError, with file and line, where it cannot be.
    """
    try:
        if not name.endswith(".py"):
            here = str(Path.cwd())
            if here not in sys.path:
                sys.path.insert(0, here)
            return importlib.import_module(name)
        if not Path(name).is_file():
            raise ModuleNotFoundError(f"there is no file {name}")
        # named as no import is, for dataclasses to find it under its name while it runs
        spec = importlib.util.spec_from_file_location(Path(name).name, name)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(f"{name} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    except Exception as error:
        raise ValueError(
            f"`{name}` needs to be a module or file that can be run: {where(error, name)}. Mend "
            "it, or run this in the folder of the module."
        ) from error


def where(error: Exception, name: str) -> str:
    """The error in one line, with file and line where they are those of the user."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if name.endswith(".py") and Path(f.filename) == Path(name)]
    machinery = ("importlib", __file__)
    others = [f for f in frames if not any(part in f.filename for part in machinery)]
    frame = (own or others or [None])[-1]
    return text if frame is None else f"{frame.filename}, line {frame.lineno}: {text}"


def use(name: str) -> ModuleType:
    """Runs the code that the caller names, once in this process; specs that were stored may name it
    from then on.

    A file is known by its own name, wherever it lies: `use("new/place/sinc.py")` gives what the
    stored spec `old/place/sinc.py:sinc-B` names.
    """
    if not is_name(name):
        raise ValueError(
            f"`use` needs a module such as my_module, or a file such as my_file.py, got {name!r}."
        )
    if name not in _given:
        _given[name] = run(name)
    return _given[name]


def find(spec: str, name: str, attribute: str) -> Any:
    """The object that `spec` names: `attribute` of the module or file `name`.

    Raises ValueError where the code is not to be run: `spec` is `Stored`, and nobody has given it.
    """
    module = _lookup(name) if isinstance(spec, Stored) else use(name)
    if module is None:
        raise ValueError(
            f"`operator` needs code that this command names itself, got {str(spec)!r}, which was "
            f"read from a file and is not run. If you trust {name!r}, add `--code {name}`, or call "
            f"`kart.code.use({name!r})`."
        )
    if not hasattr(module, attribute):
        known = [one for one in dir(module) if not one.startswith("_")]
        raise ValueError(
            f"`operator` needs a name that {name!r} has, got {attribute!r}. It has "
            f"{', '.join(known) or 'no names'}."
        )
    return getattr(module, attribute)


def _lookup(name: str) -> ModuleType | None:
    if name in _given or not name.endswith(".py"):
        return _given.get(name)
    same = [one for given, one in _given.items() if Path(given).name == Path(name).name]
    return same[0] if len(same) == 1 else None


def fingerprint(name: str) -> str | None:
    """SHA-256 of the source that was given under `name`; None where there is none."""
    file = getattr(_lookup(name), "__file__", None)
    if file is None or not Path(file).is_file():
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
