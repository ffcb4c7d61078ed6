"""An operator as the checks see it: drawn sizes and inputs, declared traits, rounding."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from kart import tree
from kart.testing import draw
from kart.testing.compare import spread
from kart.testing.draw import Theta
from kart.testing.laws import TRANSFORMS

Params = dict[str, Any]


class Row(NamedTuple):
    """Drawn sizes and inputs of one head product; `kind` "integers" makes scores tie and hit knots,
    `size` scales the queries; values have `columns`.
    """

    seed: int
    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    kind: str = "normal"
    size: float = 1.0
    jitter: float = 0.0
    columns: int = 3


class Inputs(NamedTuple):
    """Arguments of `attend`: q (B, H, N, d), k (B, H, M, d), v (B, H, M, e)."""

    params: Params
    q: Tensor
    k: Tensor
    v: Tensor


def key_axes(op: Any, heads: int, tokens: tuple[int, int] = (5, 6)) -> dict[str, list[int]]:
    """The axes of every leaf that count keys: those that grow with their number."""
    small, large = (tree.named(op.init(draw.generator(0), heads, count)) for count in tokens)
    return {
        name: [i for i, n in enumerate(leaf.shape) if large[name].shape[i] != n]
        for name, leaf in small.items()
    }


class Subject(NamedTuple):
    """An operator as the checks see it; `heads` is fixed where it works for one number alone."""

    op: Any
    heads: int | None
    traits: Mapping[str, Any]
    dtypes: Sequence[torch.dtype]

    def inputs(self, row: Row, dtype: torch.dtype) -> Inputs:
        source = draw.generator(row.seed)
        params = self.op.init(source, row.heads, row.keys)
        params = draw.jittered(params, Theta(row.seed, row.jitter))
        sizes = (row.queries, row.width), (row.keys, row.width), (row.keys, row.columns)
        drawn = (torch.randn(row.batch, row.heads, *size, generator=source) for size in sizes)
        q, k, v = (x.round() if row.kind == "integers" else x for x in drawn)
        return Inputs(tree.to(params, dtype), (q * row.size).to(dtype), k.to(dtype), v.to(dtype))

    def keep(self, params: Params, index: Tensor, heads: int) -> Params:
        """Parameters whose keys are `index` of those of `params`."""
        axes = key_axes(self.op, heads)

        def picked(name: str, leaf: Tensor) -> Tensor:
            for axis in axes[name]:
                leaf = leaf.index_select(axis, index)
            return leaf

        return tree.map_named(picked, params)


def mild(row: Row) -> Row:
    """`row` with scores of moderate size, where gradients are known to a few roundings."""
    return row._replace(size=min(row.size, 5.0))


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """`q k^T / sqrt(d)`."""
    return q @ k.mT / math.sqrt(q.shape[-1])


def rows(s: Subject) -> SearchStrategy[Row]:
    """A small case: sizes and a seed for its tensors. Sizes are drawn one by one, or all equal, or
    all distinct: axes that are mixed up go unnoticed where their lengths happen to differ, or not.
    """
    fixed = s.heads
    few, heads = st.integers(1, 3), st.integers(1, 3) if fixed is None else st.just(fixed)
    sizes = st.one_of(
        st.tuples(st.integers(1, 2), heads, st.integers(1, 4), st.integers(1, 5), few),
        st.sampled_from([2, 3]).map(lambda n: (n, fixed or n, n, n, n)),
        st.sampled_from([4, 5, 8]).map(lambda h: (2, fixed or h, 3, 5, 1)),
    )

    return st.builds(
        lambda seed, sizes, *rest: Row(seed, *sizes, *rest),
        draw.seeds,
        sizes,
        st.sampled_from(["normal", "integers"]),
        st.sampled_from([1.0, 0.0, 5.0, 200.0]),
        st.sampled_from([0.0, 0.3]),
    )


def attend_slack(s: Subject, x: Inputs, mask: Tensor | None = None) -> Tensor:
    """How far rounding may carry `attend` of these inputs, in their dtype."""
    return spread(lambda *args: s.op.attend(*args, mask), tuple(x), x.q.dtype)


def mask_of(row: Row, kept: Sequence[bool]) -> Tensor:
    """The mask of keys that the drawn booleans say, `(M,)`."""
    return torch.tensor(list(kept)[: row.keys])


def masked_by(row: Row, kept: Sequence[bool], kind: str) -> Tensor | None:
    """The mask of `kind` "none", "keys" `(M,)`, or "queries" `(N, M)`, which differ in theirs."""
    if kind == "none":
        return None
    keys = mask_of(row, kept)
    if kind == "keys":
        return keys
    return keys | (torch.rand(row.queries, row.keys, generator=draw.generator(row.seed)) > 0.5)


def traits_of(op: Any) -> dict[str, Any]:
    """What the options of one of kart's operators declare."""
    options = dict(getattr(op, "options", None) or {})
    basis, kind = getattr(op, "basis", None), options.get("kind")
    basis_traits = dict(getattr(basis, "traits", None) or {})
    # what the units do not hold under, the operator does not either
    declared: dict[str, Any] = {k: v for k, v in basis_traits.items() if k in TRANSFORMS}
    if options.get("project") == "simplex":
        declared["simplex"] = True
    if options.get("base") == "softmax":
        declared["softmax_base"] = True
        declared["softmax_start"] = options.get("mix") == "zero" and not options.get("project")
    if basis is None:
        return declared
    plain = basis.options.get("base", "zero") == "zero"
    seen = kind not in ("project_first", "by_distance") and not options.get("inside")
    if seen and options.get("base") is None and plain:
        # the units see the scores themselves, and nothing else does
        declared |= {k: v for k, v in basis.traits.items() if k == "periodic"}
    if kind == "low_rank":
        declared["hidden_units_permute"] = True
        if basis.traits.get("linear") and plain and not basis.options.get("scales"):
            declared["gauge"] = True
        if options.get("project") is None and options.get("base") is None:
            declared["rank"] = options["rank"]
    return declared


KIND = st.sampled_from(["none", "keys", "queries"])
MASK = st.lists(st.booleans(), min_size=5, max_size=5)
ROW: dict[str, Any] = {"row": rows}
PAIR: dict[str, Any] = {"row": rows, "dtype": draw.dtypes}
