"""Kolmogorov-Arnold Attention: learnable attention as pure functions over parameter pytrees.

`kart.guides` is where to begin. A model is made of `kart.models`, its attention of an operator
(`kart.operators`) whose functions are written in a basis (`kart.bases`); `kart.kernels` make that
fast, `kart.train` and `kart.optim` train it, `kart.search` compares, `kart.analysis` takes it
apart, and `kart.testing` holds a basis or an operator of your own to what it promises.

`import kart` loads nothing else; a room loads when it is first used.
"""

import importlib.util
from typing import Any

ROOMS = (
    *("analysis", "augment", "bases", "bridges", "checkpoint", "cli", "code", "commands", "data"),
    *("distributed", "export", "factories", "guides", "kernels", "layers", "models", "nn"),
    *("operators", "optim", "pages", "population", "projections", "recipes", "runs", "schema"),
    *("search", "statistics", "tables", "testing", "train", "transfer", "tree"),
)


def _version() -> str:
    """The installed version; "0+unknown", which no release has, where kart is not installed."""
    from importlib import metadata

    try:
        return metadata.version("kart-attention")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def file(package: str, name: str) -> Any:
    """The file `name` of a room that loads its files when they are first used."""
    whole = f"{package}.{name}"
    if name.startswith("_") or importlib.util.find_spec(whole) is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(whole)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in ROOMS:
        return importlib.import_module(f"kart.{name}")
    raise AttributeError(f"module 'kart' has no attribute {name!r}; its rooms: {', '.join(ROOMS)}")


def __dir__() -> list[str]:
    return ["__version__", *ROOMS]
