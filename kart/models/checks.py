"""Checks of the sizes that a config gives, before anything is drawn."""

import math
import os
from typing import Any

from kart import schema

COMMON = ("image_size", "patch_size", "in_channels")
LARGEST = 2**31 - 1  # of an axis that torch can index on every device


def integers(function: str, config: Any, *names: str) -> None:
    """Refuses fields, COMMON and those of `names`, that are no integers from 1 on.

    A tuple is one of such integers, by stage. `mlp_ratio` is checked, too, which is over
    `embed_dim`, one of `names`.
    """
    for name in (*COMMON, *names):
        value = getattr(config, name)
        parts: Any = value if isinstance(value, tuple) and value else (value,)
        for part in parts:
            if not schema.fits(part, int) or part < 1:
                raise ValueError(
                    f"`{function}` needs an integer `{name}` >= 1, got {value!r}. Pass one."
                )
            if part > LARGEST:
                raise ValueError(
                    f"`{function}` needs `{name}` <= {LARGEST}, got an integer of {len(str(part))} "
                    "digits. Pass a smaller one."
                )
    ratio = config.mlp_ratio
    if not schema.fits(ratio, float) or not 0 < ratio < math.inf:
        raise ValueError(f"`{function}` needs `mlp_ratio` > 0, got {ratio!r}. ViTs use 4.")
    if ratio * config.embed_dim < 1:
        raise ValueError(
            f"`{function}` needs an MLP of one hidden value or more, got none with `mlp_ratio` "
            f"{ratio:g} and `embed_dim` {config.embed_dim}: it would ignore its input. Raise it."
        )


def divides(function: str, config: Any, *pairs: tuple[str, str]) -> None:
    """Refuses a field that its partner does not divide."""
    for whole, part in pairs:
        if getattr(config, whole) % getattr(config, part):
            raise ValueError(
                f"`{function}` needs `{whole}` divisible by `{part}`, got "
                f"{getattr(config, whole)} and {getattr(config, part)}. Change one of them."
            )


def block_numbers(width: int, mlp_ratio: float) -> int:
    """Parameters of a block, its row operator aside: the matrices, and what holds its tensors."""
    # a tensor takes about a KiB before its first number, and a block has a dozen of them
    return 4 * width**2 + 2 * width * int(width * mlp_ratio) + 4096


def fits_memory(function: str, **numbers: int) -> None:
    """Refuses float32 parameters, counted by part of the model, that this machine cannot hold."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = 4 * sum(numbers.values())
    if needed > memory:
        part = max(numbers, key=lambda name: numbers[name])
        raise ValueError(
            f"`{function}` needs parameters that fit the {memory / 2**30:.0f} GiB of memory, got "
            f"{needed / 2**30:,.0f} GiB, most of them in the {part}. Choose smaller sizes."
        )


def columnar(function: str, config: Any, *names: str) -> None:
    """The checks of a model whose blocks have one width; `names` are further integers."""
    integers(function, config, "embed_dim", "depth", "num_heads", *names)
    divides(function, config, ("image_size", "patch_size"), ("embed_dim", "num_heads"))
    width = config.embed_dim
    fits_memory(
        function,
        patches=width * config.in_channels * config.patch_size**2,
        positions=width * config.tokens,
        blocks=config.depth * block_numbers(width, config.mlp_ratio),
        classifier=width * getattr(config, "num_classes", 0),
    )
