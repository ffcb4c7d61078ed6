"""The suite of a row operator: what is asked of everyone, and of declared traits."""

from collections.abc import Mapping
from typing import Any

import torch

from kart.testing import laws
from kart.testing.core import Suite, dtypes_of, require, with_traits
from kart.testing.operator import derivatives, masks, numbers, products, purity, symmetry, traits
from kart.testing.operator.subject import Subject, traits_of

PROPERTIES = (
    *purity.PROPERTIES,
    *products.PROPERTIES,
    *masks.PROPERTIES,
    *symmetry.PROPERTIES,
    *numbers.PROPERTIES,
    *derivatives.PROPERTIES,
    *traits.PROPERTIES,
)

# traits that other rooms read, see `kart.operators.Operator`
ELSEWHERE = ("activation_flops", "by_length", "by_place", "learned", "of_scores", "product_flops")
ELSEWHERE += ("queries_last", "self_attention", "whole")


def suite(
    obj: Any,
    *,
    dtype: torch.dtype | None = None,
    traits: Mapping[str, Any] | None = None,
    heads: int | None = None,
    name: str | None = None,
) -> Suite:
    """Puts a row operator through its suite.

    Args:
        obj: anything with `init(generator, heads, tokens)`, `weights(params, scores, mask=None)`
            and `attend(params, q, k, v, mask=None)`; its `traits` and `options` are used where it
            has them.
        heads: their number, where the operator works for one alone.
    """
    parts = ("init", "weights", "attend")
    require("operator", obj, parts, "`kart.operators.low_rank` makes one from a basis.")
    own = {**laws.TRANSFORMS, **traits_of(obj)}
    claims = getattr(obj, "traits", None)
    declared = with_traits("operator", PROPERTIES, own, traits, (), claims, ELSEWHERE)
    groups = (getattr(obj, "options", None) or {}).get("groups")
    if heads is None and groups:
        heads = sum(count for _, count in groups)
    subject = Subject(obj, heads, declared, dtypes_of(dtype))
    named = name or str(getattr(obj, "name", None) or type(obj).__name__)
    return Suite("operator", named, subject, declared, PROPERTIES)
