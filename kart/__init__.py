"""Kolmogorov-Arnold Attention: learnable attention as pure functions over parameter pytrees.

`import kart` loads nothing else; `kart.bases`, `kart.models` and the other rooms load when first
used.
"""

import importlib
from types import ModuleType

ROOMS = (
    *("analysis", "augment", "bases", "bridges", "checkpoint", "cli", "commands", "data"),
    *("export", "factories", "kernels", "layers", "models", "nn", "operators", "optim"),
    *("population", "projections", "recipes", "runs", "search", "tables", "testing", "train"),
    "tree",
)


def __getattr__(name: str) -> ModuleType:
    if name in ROOMS:
        return importlib.import_module(f"kart.{name}")
    raise AttributeError(f"module 'kart' has no attribute {name!r}; its rooms: {', '.join(ROOMS)}")


def __dir__() -> list[str]:
    return list(ROOMS)
