"""The suite of a basis: what is asked of everyone, of declared traits and of known families."""

from collections.abc import Mapping
from typing import Any

import torch

from kart.testing import laws
from kart.testing.basis import derivatives, elementwise, families, numbers, purity, traits
from kart.testing.basis.subject import Subject
from kart.testing.core import Suite, dtypes_of, require, title, with_traits

PROPERTIES = (
    *purity.PROPERTIES,
    *elementwise.PROPERTIES,
    *derivatives.PROPERTIES,
    *numbers.PROPERTIES,
    *traits.PROPERTIES,
)
# by the name in `basis.family`
OF_FAMILY = families.OF


def suite(
    obj: Any,
    *,
    dtype: torch.dtype | None = None,
    traits: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Suite:
    """Puts a basis through its suite.

    Args:
        obj: anything with `init(generator, shape)`, `apply(params, x)` and `expand(x)`; its
            `traits`, `options` and `family` are used where it has them (see `kart.bases.Basis`).
    """
    require("basis", obj, ("init", "apply", "expand"), "`kart.bases.linear` makes a basis.")
    # the contract itself declares it: features are what `apply` is linear in
    own = {**laws.TRANSFORMS, "compiles": True, "linear": obj.expand(torch.zeros(1)) is not None}
    claims = getattr(obj, "traits", None)
    options = dict(getattr(obj, "options", None) or {})
    family = str(getattr(obj, "family", None) or type(obj).__name__)
    shown = {k: v for k, v in options.items() if k != "init"}
    asked = (*PROPERTIES, *OF_FAMILY.get(family, ()))
    others = ("amplitude", "finite", "points")
    declared = with_traits("basis", asked, own, traits, others, claims, ["operations"])
    subject = Subject(obj, family, options, declared, dtypes_of(dtype))
    return Suite("basis", name or title(family, shown), subject, declared, asked)
