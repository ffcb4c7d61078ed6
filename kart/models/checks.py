"""Checks of the sizes that a config gives, before anything is drawn."""

import math
from typing import Any

COMMON = ("image_size", "patch_size", "in_channels", "num_classes")


def integers(function: str, config: Any, *names: str) -> None:
    """Refuses fields, `COMMON` and those of `names`, that are no integers >= 1 of a usable size."""
    for name in (*COMMON, *names):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"`{function}` needs an integer `{name}` >= 1, got {value!r}. Pass one."
            )
    if not 0 < config.mlp_ratio < math.inf:
        raise ValueError(
            f"`{function}` needs `mlp_ratio` > 0, got {config.mlp_ratio!r}. ViTs use 4."
        )


def divides(function: str, config: Any, *pairs: tuple[str, str]) -> None:
    """Refuses a field that its partner does not divide."""
    for whole, part in pairs:
        if getattr(config, whole) % getattr(config, part):
            raise ValueError(
                f"`{function}` needs `{whole}` divisible by `{part}`, got "
                f"{getattr(config, whole)} and {getattr(config, part)}. Change one of them."
            )
