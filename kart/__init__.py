"""Kolmogorov-Arnold Attention: learnable attention as pure functions over parameter pytrees.

`import kart` loads nothing else; `kart.bases`, `kart.models` and the other rooms load when first
used.
"""

import importlib
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


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in ROOMS:
        return importlib.import_module(f"kart.{name}")
    raise AttributeError(f"module 'kart' has no attribute {name!r}; its rooms: {', '.join(ROOMS)}")


def __dir__() -> list[str]:
    return ["__version__", *ROOMS]
