"""What an operator declares in its traits, one property each."""

import math

import torch
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from kart import tree
from kart.testing import draw
from kart.testing.compare import agree, spread, unit
from kart.testing.core import Property
from kart.testing.operator.subject import (
    MASK,
    PAIR,
    ROW,
    Row,
    Subject,
    key_axes,
    mask_of,
    scores_of,
)


def length_free(s: Subject, row: Row) -> None:
    """init(generator, H, M) gives leaves of the same shapes for every number M of keys.

    Parameters of one key are stretched over all of them, where a model has rows of any length.
    """
    grown = [name for name, axes in key_axes(s.op, row.heads).items() if axes]
    if grown:
        raise AssertionError(f"another shape with 6 keys than with 5: {', '.join(grown)}")


def rank(s: Subject, row: Row, queries: int, keys: int) -> None:
    """rank(weights(theta, S)) <= r before any projection.

    The weights are not W Phi with r hidden units.
    """
    r = int(s.traits["rank"])
    row = row._replace(queries=queries, keys=keys, batch=1)
    x = s.inputs(row, torch.float64)
    values = torch.linalg.svdvals(s.op.weights(x.params, scores_of(x.q, x.k)))
    rest, largest = values[..., r:], values[..., :1]
    limit = 64 * unit(torch.float64) * largest.expand(rest.shape)
    agree(rest, torch.zeros_like(rest), limit, f"singular values beyond {r}", "zero")


def simplex(s: Subject, row: Row, size: float, kept: list[bool], dtype: torch.dtype) -> None:
    """weights(theta, S)[n, :] >= 0 and they sum to 1 (to 0 where every key is masked).

    Rows leave the probability simplex.
    """
    x = s.inputs(row, dtype)
    mask = mask_of(row, kept)
    weights = s.op.weights(x.params, scores_of(x.q, x.k) * size, mask)
    agree(weights, weights.clamp(min=0), 0.0, "weights", "their positive part")
    total = weights.sum(-1)
    wanted = torch.full_like(total, float(mask.any()))
    agree(total, wanted, unit(dtype) * row.keys, "the sum of a row", "its value")


def shift_invariant(s: Subject, row: Row, by: float) -> None:
    """weights(theta, S + c 1^T) = weights(theta, S) for a shift c of every row.

    True of softmax and of projections onto the simplex; Fourier operators know whole turns only.
    """
    x = s.inputs(row, torch.float64)
    scores = scores_of(x.q, x.k)
    moved = s.op.weights(x.params, scores + by)
    limit = 16 * unit(torch.float64) * (1 + abs(by) + scores.abs().max())
    agree(moved, s.op.weights(x.params, scores), limit, "weights(S + c)", "weights(S)")


def periodic(s: Subject, row: Row, turns: list[int]) -> None:
    """weights(theta, S + T Z) = weights(theta, S) for any matrix Z of integers and the period T.

    Scores reach the units changed (scaled, or masked by a finite number), or a base leaks in.
    """
    period = float(s.traits["periodic"])
    x = s.inputs(row, torch.float64)
    scores = scores_of(x.q, x.k)
    count = math.prod(scores.shape)
    z = torch.tensor((turns * count)[:count], dtype=torch.float64).reshape(scores.shape)
    there = scores + period * z
    here = there - period * z  # what is left of `scores` after the sum was rounded
    limit = spread(lambda t: s.op.weights(x.params, t), (there,), torch.float64)
    limit = limit + spread(lambda t: s.op.weights(x.params, t), (here,), torch.float64)
    got, wanted = s.op.weights(x.params, there), s.op.weights(x.params, here)
    agree(got, wanted, limit, "weights(S + T Z)", "weights(S)")


def softmax_base(s: Subject, row: Row, dtype: torch.dtype) -> None:
    """attend with the learned part zero = scaled_dot_product_attention(q, k, v).

    A model does not start from the softmax model that it extends.
    """
    x = s.inputs(row, dtype)
    params = x.params
    zero = {**params, "mix": torch.zeros_like(params["mix"])} if "mix" in params else None
    got = s.op.attend(zero or tree.map(torch.zeros_like, params), *x[1:])
    wanted = scaled_dot_product_attention(x.q, x.k, x.v)
    limit = spread(scaled_dot_product_attention, tuple(x[1:]), dtype)
    agree(got, wanted, limit, "attend with mix 0", "scaled_dot_product_attention")


def softmax_start(s: Subject, row: Row, dtype: torch.dtype) -> None:
    """attend(init(generator), q, k, v) = scaled_dot_product_attention(q, k, v).

    The learned part is not zero at the start, where training is to leave from softmax.
    """
    x = s.inputs(row._replace(jitter=0.0), dtype)
    wanted = scaled_dot_product_attention(x.q, x.k, x.v)
    limit = spread(scaled_dot_product_attention, tuple(x[1:]), dtype)
    agree(s.op.attend(*x), wanted, limit, "attend at the start", "scaled_dot_product_attention")


def gauge(s: Subject, row: Row, seed: int) -> None:
    """weights(theta) = weights(theta') for units c' = G c and mix W' = W G^-1, G invertible.

    Units and mix do not meet over the same axis of hidden units.
    """
    x = s.inputs(row, torch.float64)
    units, mix = x.params["units"], x.params["mix"]
    r = mix.shape[-1]
    a, b = (torch.randn(r, r, generator=draw.generator(seed + i)).double() for i in (0, 1))
    g = torch.linalg.qr(a)[0] * torch.linspace(0.5, 2, r).double() @ torch.linalg.qr(b)[0]
    moved = {
        "units": {**units, "coefs": torch.einsum("ab,hbmk->hamk", g, units["coefs"])},
        "mix": mix @ torch.linalg.inv(g),
    }
    scores = scores_of(x.q, x.k)
    limit = spread(lambda p: s.op.weights(p, scores), (x.params,), torch.float64)
    got = s.op.weights(moved, scores)
    agree(got, s.op.weights(x.params, scores), 8 * limit, "weights(G c, W G^-1)", "weights(c, W)")


def hidden_units_permute(s: Subject, row: Row, seed: int, dtype: torch.dtype) -> None:
    """weights(theta) = weights(theta') with the r hidden units of Phi and of W permuted alike.

    A hidden unit is known by its place.
    """
    x = s.inputs(row, dtype)
    order = torch.randperm(x.params["mix"].shape[-1], generator=draw.generator(seed))
    moved = {
        "units": tree.map(lambda leaf: leaf[:, order], x.params["units"]),
        "mix": x.params["mix"][..., order],
    }
    scores = scores_of(x.q, x.k)
    limit = spread(lambda p: s.op.weights(p, scores), (x.params,), dtype)
    got, wanted = s.op.weights(moved, scores), s.op.weights(x.params, scores)
    agree(got, wanted, limit, "weights of permuted units", "weights")


TURNS = st.one_of(st.integers(-5, 5), st.sampled_from([40, -200, 1600]))

PROPERTIES = (
    Property(length_free, ROW, "length_free", (True,)),
    Property(
        rank, {**ROW, "queries": st.integers(5, 9), "keys": st.integers(5, 9)}, "rank", (1, 4)
    ),
    Property(
        simplex,
        {**PAIR, "size": st.sampled_from([1.0, 0.0, 1e4]), "kept": MASK},
        "simplex",
        (True,),
    ),
    Property(
        shift_invariant,
        {**ROW, "by": st.sampled_from([1.0, -3.0, 100.0])},
        "shift_invariant",
        (True,),
    ),
    Property(
        periodic,
        {**ROW, "turns": st.lists(TURNS, min_size=1, max_size=4)},
        "periodic",
        (2 * math.pi,),
    ),
    Property(softmax_base, PAIR, "softmax_base", (True,)),
    Property(softmax_start, PAIR, "softmax_start", (True,)),
    Property(gauge, {**ROW, "seed": draw.seeds}, "gauge", (True,)),
    Property(hidden_units_permute, {**PAIR, "seed": draw.seeds}, "hidden_units_permute", (True,)),
)
