"""Sums of operators: all of them in every head."""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Generator, Tensor

from kart.bases import Basis, Params
from kart.factories import remember
from kart.operators.contract import Operator, check_names, check_params, check_sizes
from kart.operators.relative import lattice_of
from kart.operators.resize import Lattice


def parts_of(op: Operator) -> list[Operator]:
    """The operators that one is made of, hybrid or a sum; none of any other."""
    return [part for part, _ in op.options.get("groups", ())] + [*op.options.get("parts", ())]


def simple_parts(op: Operator) -> list[Operator]:
    """The operators that one is made of, down to those that are made of none; of those itself."""
    parts = parts_of(op)
    return [one for part in parts for one in simple_parts(part)] if parts else [op]


# options of operators and bases that say how parameters are drawn
DRAWN = frozenset(("init", "locality", "mix", "start"))
# and those by which the weights are another function of them, which training may change
CHANGED = DRAWN | {"base", "normalise", "project"}


def meaning(value: Any, free: Collection[str] = (), tokens: int | None = None) -> Any:
    """What the parameters of an operator mean: its options and those of its basis, but `free`. For
    so many `tokens` a lattice is what it is, whether an option says so or is left out.
    """
    if isinstance(value, Operator):
        options = {**value.options, "basis": value.basis}
        if tokens is not None and {"prefix", "rows"} <= options.keys():
            # a table that was moved to another lattice says so itself
            with contextlib.suppress(ValueError):
                found = lattice_of(value.name, tokens, options["prefix"], options["rows"])
                options |= {"prefix": found.prefix, "rows": found.rows / found.columns}
        return meaning(options, free, tokens)
    if isinstance(value, Basis):
        return value.family, meaning(value.options, free)
    if isinstance(value, Mapping):
        return {key: meaning(one, free, tokens) for key, one in value.items() if key not in free}
    if isinstance(value, list | tuple):
        return [meaning(one, free, tokens) for one in value]
    return value if isinstance(value, str | int | float) else type(value).__name__


def same_meaning(one: Any, other: Any) -> bool:
    """Whether two meanings are one in all that both say: another version may have more options."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(same_meaning(one[key], other[key]) for key in one.keys() & other.keys())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_meaning, one, other))
    return one == other


def own_params(name: str, parts: Sequence[Operator], params: Params) -> list[Params]:
    """The parameters of each part, under `str(i)`; a part without any may be left out, as where a
    tree was made of its leaves.
    """
    check_params(name, params)
    names = [str(i) for i in range(len(parts))]
    some = {i for i, op in zip(names, parts, strict=True) if op.traits.get("learned", True)}
    if not some <= params.keys():
        check_names(name, params, names)
    return [params.get(i, {}) for i in names]


def of_parts(parts: Sequence[Operator]) -> dict[str, Any]:
    """`traits` and `resize` of an operator made of others, whose parameters are under `str(i)`."""

    def resize(params: Params, old: Lattice, new: Lattice) -> Params:
        return {
            str(i): params.get(str(i), {})
            if op.resize is None
            else op.resize(params[str(i)], old, new)
            for i, op in enumerate(parts)
        }

    some = ("self_attention", "by_length", "by_place", "queries_last")
    traits = {
        "learned": any(op.traits.get("learned", True) for op in parts),
        "length_free": all(op.traits.get("length_free", False) for op in parts),
        **{name: any(op.traits.get(name, False) for op in parts) for name in some},
        "of_scores": all(op.traits.get("of_scores", True) for op in parts),
    }
    # one that cannot move its parameters is not skipped: then the whole has no `resize`
    movable = all(op.resize or op.traits.get("length_free") for op in parts)
    return {"traits": traits, "resize": resize if movable else None}


@remember
def added(operators: Sequence[Operator]) -> Operator:
    """The sum of the weights of some operators, e.g. softmax + a table + KArAt (ours).

    Operator i has its parameters under `str(i)`. Each normalises and masks as it does alone.
    """
    if not operators or not all(isinstance(op, Operator) for op in operators):
        raise ValueError(
            f"`added` needs one Operator or more, got {list(operators)!r}. "
            "Pass for example [softmax(), relative()]."
        )
    parts = list(operators)

    def init(generator: Generator, heads: int, tokens: int) -> Params:
        check_sizes(heads, tokens)
        return {str(i): op.init(generator, heads, tokens) for i, op in enumerate(parts)}

    def total(call: Callable[[Operator, Params], Tensor], params: Params) -> Tensor:
        first, *others = map(call, parts, own_params("added", parts, params))
        return sum(others, start=first)

    def weights(params: Params, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        return total(lambda op, own: op.weights(own, scores, mask), params)

    def attend(
        params: Params, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return total(lambda op, own: op.attend(own, q, k, v, mask), params)

    options = {"kind": "added", "parts": parts}
    name = "added " + ", ".join(op.name for op in parts)
    return Operator(name, init, weights, attend, None, options, **of_parts(parts))
