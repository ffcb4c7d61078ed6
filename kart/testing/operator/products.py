"""Two forms of one operator: `attend` is the materialised weights times the values."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad

from kart.testing import draw, laws
from kart.testing.compare import agree, agree_trees
from kart.testing.core import Property
from kart.testing.operator.subject import (
    KIND,
    MASK,
    PAIR,
    ROW,
    Params,
    Row,
    Subject,
    attend_slack,
    masked_by,
    mild,
    scores_of,
)


def attend_is_weights_times_values(
    s: Subject, row: Row, kept: list[bool], mask: str, dtype: torch.dtype
) -> None:
    """attend(theta, q, k, v, mask) = weights(theta, q k^T / sqrt(d), mask) v, of weights under
    torch.no_grad() as well.

    The form that trains and the form that is looked at are two operators.
    """
    x, given = s.inputs(row, dtype), masked_by(row, kept, mask)
    out, limit, scores = s.op.attend(*x, given), attend_slack(s, x, given), scores_of(x.q, x.k)
    agree(out, s.op.weights(x.params, scores, given) @ x.v, limit, "attend", "weights v")
    with torch.no_grad():
        looked = s.op.weights(x.params, scores, given) @ x.v
    agree(out, looked, limit, "attend", "weights v under no_grad")


def _large(
    s: Subject, seed: int, batch: int, queries: int, keys: int, width: int, masked: bool
) -> tuple[Row, Tensor | None]:
    """A case of many of everything, and its mask, which differs between queries."""
    row = Row(seed, batch, s.heads or 1, queries, keys, width, columns=width - 1)
    mask = torch.rand(queries, keys, generator=draw.generator(seed)) > 0.3
    return row, mask if masked else None


def large_as_weights(s: Subject, seed: int, poke: int, dtype: torch.dtype, **sizes: Any) -> None:
    """attend(theta, q, k, v, mask) = weights(theta, q k^T / sqrt(d), mask) v for many examples,
    queries, keys and columns.

    A fused form that works in blocks drops, repeats or misplaces the last one.
    """
    row, mask = _large(s, seed, **sizes)
    x = s.inputs(row, dtype)
    # one late key that matters more than all others
    place = max(0, row.keys - 1 - poke)
    x.v[..., place, :] = x.v[..., place, :] + 100
    wanted = s.op.weights(x.params, scores_of(x.q, x.k), mask) @ x.v
    agree(s.op.attend(*x, mask), wanted, attend_slack(s, x, mask), "attend", "weights v")


def _same_gradients(s: Subject, row: Row, given: Tensor | None) -> None:
    x = s.inputs(row, torch.float64)
    probe = draw.probe(x.q.shape[:-1] + x.v.shape[-1:], row.seed)

    def attended(params: Params, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (s.op.attend(params, q, k, v, given) * probe).sum()

    def looked_at(params: Params, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((s.op.weights(params, scores_of(q, k), given) @ v) * probe).sum()

    places = (0, 1, 2, 3) if x.params else (1, 2, 3)
    got, wanted = (grad(f, places)(*x) for f in (attended, looked_at))
    agree_trees(got, wanted, 64, "the gradient", "that of weights")
    for i, slope in zip(places, wanted, strict=True):

        def of_one(own: Any, i: int = i) -> Tensor:
            return s.op.attend(*x[:i], own, *x[i + 1 :], given)

        alone = laws.eager_vjp(of_one, x[i])[1](probe)
        agree_trees(alone, (slope,), 64, f"the gradient of argument {i} alone", "of all")


def attend_has_the_gradients_of_weights(s: Subject, row: Row, kept: list[bool], mask: str) -> None:
    """d attend = d (weights v) in theta, q, k and v, in all at once and in each alone.

    A fused backward is wrong, although the forward is right, or leaves out a gradient where another
    is not asked for (`ctx.needs_input_grad`).
    """
    _same_gradients(s, mild(row), masked_by(row, kept, mask))


def large_has_the_gradients_of_weights(s: Subject, seed: int, **sizes: Any) -> None:
    """d attend = d (weights v) for many examples, queries, keys and columns.

    A fused backward that works in blocks drops, repeats or misplaces the last one.
    """
    _same_gradients(s, *_large(s, seed, **sizes))


def linear_in_values(s: Subject, row: Row, seed: int, dtype: torch.dtype) -> None:
    """attend(theta, q, k, v B + w) = attend(theta, q, k, v) B + attend(theta, q, k, w), for
    matrices B on the columns.

    Values enter the weights, or columns of the output mix.
    """
    x = s.inputs(row, dtype)
    source = draw.generator(seed)
    b = torch.randn(x.v.shape[-1], 2, generator=source).to(dtype)
    w = torch.randn(*x.v.shape[:-1], 2, generator=source).to(dtype)
    got = s.op.attend(x.params, x.q, x.k, x.v @ b + w)
    wanted = s.op.attend(*x) @ b + s.op.attend(x.params, x.q, x.k, w)
    limit = attend_slack(s, x._replace(v=x.v @ b + w)) + attend_slack(s, x) @ b.double().abs()
    limit = limit + attend_slack(s, x._replace(v=w))
    agree(got, wanted, limit, "attend(v B + w)", "attend(v) B + attend(w)")


def change_of_basis(s: Subject, row: Row, seed: int) -> None:
    """attend(theta, q G, k G^-T, v) = attend(theta, q, k, v) for invertible G, orthogonal ones
    among them.

    Queries and keys count by more than their products.
    """
    x = s.inputs(row, torch.float64)
    a, b = (torch.randn(row.width, row.width, generator=draw.generator(seed + i)) for i in (0, 1))
    stretch = torch.linspace(0.5, 2.0, row.width, dtype=torch.float64)
    g = torch.linalg.qr(a.double())[0] * stretch @ torch.linalg.qr(b.double())[0]
    moved = x._replace(q=x.q @ g, k=x.k @ torch.linalg.inv(g).mT)
    limit = attend_slack(s, x) + attend_slack(s, moved)
    agree(s.op.attend(*moved), s.op.attend(*x), 4 * limit, "attend(q G, k G^-T)", "attend(q, k)")


LARGE: dict[str, Any] = {
    "seed": draw.seeds,
    "batch": st.sampled_from([1, 5]),
    "queries": st.sampled_from([1, 65]),
    "keys": st.sampled_from([33, 64, 129]),
    "width": st.sampled_from([4, 65]),
    "masked": st.booleans(),
}

PROPERTIES = (
    Property(attend_is_weights_times_values, {**PAIR, "kept": MASK, "mask": KIND}),
    Property(large_as_weights, {**LARGE, "poke": st.integers(0, 2), "dtype": draw.dtypes}),
    Property(attend_has_the_gradients_of_weights, {**ROW, "kept": MASK, "mask": KIND}),
    Property(large_has_the_gradients_of_weights, LARGE),
    Property(linear_in_values, {**PAIR, "seed": draw.seeds}),
    Property(change_of_basis, {**ROW, "seed": draw.seeds}),
)
