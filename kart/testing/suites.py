"""From an object to its suite: which properties are asked of it."""

from collections.abc import Mapping
from typing import Any

import torch

from kart.testing import basis as basis_properties
from kart.testing import draw, families
from kart.testing import operator as operator_properties
from kart.testing.core import Suite, title


def _require(function: str, obj: Any, parts: tuple[str, ...], advice: str) -> None:
    missing = [part for part in parts if not callable(getattr(obj, part, None))]
    if missing:
        raise ValueError(
            f"`{function}` needs an object with {', '.join(f'`{p}`' for p in parts)}, got "
            f"{obj!r:.200} without {', '.join(missing)}. {advice}"
        )


def _dtypes(dtype: torch.dtype | None) -> tuple[torch.dtype, ...]:
    if dtype not in (None, *draw.dtypes):
        raise ValueError(
            f"`dtype` needs torch.float32, torch.float64 or None for both, got {dtype!r}. "
            "bfloat16 has a property of its own."
        )
    return draw.dtypes if dtype is None else (dtype,)


def basis(
    obj: Any, name: str | None, traits: Mapping[str, Any] | None, dtype: torch.dtype | None
) -> Suite:
    """The suite of a basis: any object with `init`, `apply` and `expand`."""
    advice = "`kart.bases.linear` makes a basis from its features."
    _require("basis_suite", obj, ("init", "apply", "expand"), advice)
    # the contract itself declares it: features are what `apply` is linear in
    declared = {"linear": obj.expand(torch.zeros(1)) is not None}
    declared |= {**(getattr(obj, "traits", None) or {}), **(traits or {})}
    options = dict(getattr(obj, "options", None) or {})
    family = str(getattr(obj, "family", None) or type(obj).__name__)
    subject = basis_properties.Subject(obj, family, options, declared, _dtypes(dtype))
    shown = {k: v for k, v in options.items() if k != "init"}
    return Suite(
        "basis",
        name or title(family, shown),
        subject,
        declared,
        (*basis_properties.EVERYONE, *basis_properties.TRAITS, *families.OF.get(family, ())),
        lambda trait, value: subject._replace(traits={**declared, trait: value}),
    )


def operator(
    obj: Any,
    name: str | None,
    traits: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
    heads: int | None,
) -> Suite:
    """The suite of a row operator: any object with `init`, `weights` and `attend`."""
    advice = "`kart.operators.low_rank` makes one from a basis."
    _require("operator_suite", obj, ("init", "weights", "attend"), advice)
    declared = {**operator_properties.traits_of(obj), **(traits or {})}
    groups = (getattr(obj, "options", None) or {}).get("groups")
    if heads is None and groups:
        heads = sum(count for _, count in groups)
    subject = operator_properties.Subject(obj, heads, declared, _dtypes(dtype))
    return Suite(
        "operator",
        name or str(getattr(obj, "name", None) or type(obj).__name__),
        subject,
        declared,
        (*operator_properties.EVERYONE, *operator_properties.TRAITS),
        lambda trait, value: subject._replace(traits={**declared, trait: value}),
    )
