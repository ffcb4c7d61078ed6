"""Checks of the sizes that a config gives, before anything is drawn."""

import math
from typing import Any

COMMON = ("image_size", "patch_size", "in_channels")
LARGEST = 2**31 - 1  # of an axis that torch can index on every device


def integers(function: str, config: Any, *names: str) -> None:
    """Refuses fields, COMMON and those of `names`, that are no integers from 1 on.

    A tuple is one of such integers, by stage. `mlp_ratio` is checked, too.
    """
    for name in (*COMMON, *names):
        value = getattr(config, name)
        parts = value if isinstance(value, tuple) and value else (value,)
        for part in parts:
            if isinstance(part, bool) or not isinstance(part, int) or part < 1:
                raise ValueError(
                    f"`{function}` needs an integer `{name}` >= 1, got {value!r}. Pass one."
                )
            if part > LARGEST:
                raise ValueError(
                    f"`{function}` needs `{name}` <= {LARGEST}, got an integer of {len(str(part))} "
                    "digits. Pass a smaller one."
                )
    ratio = config.mlp_ratio
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
        raise ValueError(f"`{function}` needs `mlp_ratio` > 0, got {ratio!r}. ViTs use 4.")


def divides(function: str, config: Any, *pairs: tuple[str, str]) -> None:
    """Refuses a field that its partner does not divide."""
    for whole, part in pairs:
        if getattr(config, whole) % getattr(config, part):
            raise ValueError(
                f"`{function}` needs `{whole}` divisible by `{part}`, got "
                f"{getattr(config, whole)} and {getattr(config, part)}. Change one of them."
            )
