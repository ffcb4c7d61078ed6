"""The numbers of an operator: finite, right in every precision, and at single scores."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kart import tree
from kart.testing import draw, laws
from kart.testing.compare import agree, close
from kart.testing.core import Property
from kart.testing.operator.subject import MASK, ROW, Row, Subject, attend_slack, mask_of, scores_of


def finite(s: Subject, row: Row, size: float) -> None:
    """attend, weights and all gradients are finite in float32 for scores up to 100 in size.

    One overflow or one 0/0 ends a training run.
    """
    x = s.inputs(row, torch.float32)
    largest = scores_of(x.q, x.k).abs().max().clamp(min=1e-3)
    x = x._replace(q=x.q * (size / largest))
    out, pullback = laws.vjp(s.op.attend, *x)
    found = {"attend": out, "weights": s.op.weights(x.params, scores_of(x.q, x.k))}
    slopes = tree.named(pullback(torch.ones_like(out)))
    laws.all_finite(found | {f"gradient {name}": leaf for name, leaf in slopes.items()})


def float32_follows_float64(s: Subject, row: Row) -> None:
    """attend in float32 is attend in float64 up to rounding times its condition.

    Scores or sums are kept in lower precision than their inputs, or cancel.
    """
    x = s.inputs(row, torch.float32)
    wanted = s.op.attend(*tree.to(tuple(x), torch.float64))
    agree(s.op.attend(*x), wanted, attend_slack(s, x), "attend in float32", "in float64")


def half_follows_float32(
    s: Subject, seed: int, size: float, kept: list[bool], masked: bool, dtype: torch.dtype
) -> None:
    """attend and weights of bfloat16 or float16 q, k, v and scores are those of the same numbers in
    float32, within 1e-2 of their norm.

    Scores, features or projections are rounded to 8 bits before a nonlinearity, which turns a
    rounding of 2^-8 of a large score into an error of order one: keep what is inside in float32.
    """
    row = Row(seed, 2, s.heads or 2, 4, 5, 4, size=size)
    x = s.inputs(row, torch.float32)
    low = [t.to(dtype) for t in x[1:]]
    mask = mask_of(row, [True, *kept[1:]]) if masked else None
    attended = s.op.attend(x.params, *low, mask)
    wanted = s.op.attend(x.params, *(t.float() for t in low), mask)
    close(attended, wanted, 1e-2, f"attend in {dtype}", "attend in float32")
    scores = scores_of(x.q, x.k).to(dtype)
    weights = s.op.weights(x.params, scores, mask)
    wanted = s.op.weights(x.params, scores.float(), mask)
    close(weights, wanted, 1e-2, f"weights in {dtype}", "weights in float32")


def half_gradients_follow_float32(
    s: Subject, seed: int, size: float, kept: list[bool], masked: bool, dtype: torch.dtype
) -> None:
    """The gradients of attend in theta and in bfloat16 or float16 q, k and v are those of the same
    numbers in float32, within 1e-2 of their norm.

    A backward has a case for half types that no other check sees, or sums up in them.
    """
    row = Row(seed, 2, s.heads or 2, 4, 5, 4, size=size, jitter=0.3)
    x = s.inputs(row, torch.float32)
    low = [t.to(dtype) for t in x[1:]]
    mask = mask_of(row, [True, *kept[1:]]) if masked else None
    pull = torch.randn(x.v.shape, generator=draw.generator(seed + 1))[..., : row.queries, :]
    pull = pull.to(dtype)
    found, wanted = (
        tree.named(
            laws.vjp(lambda *args: s.op.attend(*args, mask), x.params, *inputs)[1](
                pull.to(inputs[0].dtype)
            )
        )
        for inputs in (low, [t.float() for t in low])
    )
    # what cancels is known no better than its terms
    slip = 1e-3 * max(float(leaf.norm()) for leaf in wanted.values())
    for name, leaf in wanted.items():
        close(found[name], leaf, 1e-2, f"gradient {name} in {dtype}", "in float32", slip)


def no_stray_scores(s: Subject, row: Row) -> None:
    """weights(theta, S) is the limit of weights(theta, S + t E) as t falls to 0 from above, or from
    below, for S with zeros, ties, simple and large numbers, and the points of the basis.

    A case for one score: zero taken for masked, ties broken by place, a comparison that is off.
    """
    x = s.inputs(row._replace(kind="normal"), torch.float64)
    scores = scores_of(x.q, x.k)
    basis = getattr(getattr(s.op, "basis", None), "traits", None) or {}
    large = [n for n in draw.LARGE if abs(n) <= float(basis.get("finite", 100.0))]
    special = torch.tensor([*draw.SIMPLE, *basis.get("points", ()), *large]).double()
    source = draw.generator(row.seed)
    chosen = special[torch.randint(len(special), scores.shape, generator=source)]
    # the last row is one number throughout
    chosen[..., -1, :] = chosen[..., -1, :1]
    scores = torch.where(torch.rand(scores.shape, generator=source) < 0.3, scores, chosen)
    line = 0.5 + torch.rand(scores.shape, generator=source).double()
    step = 1e-9 * (1 + scores.abs()) * line

    def weights(shift: float) -> Tensor:
        return s.op.weights(x.params, scores + shift * step)

    here, sides = weights(0.0), [(weights(sign), weights(3 * sign)) for sign in (1.0, -1.0)]
    apart = [(here - near).abs().amax() / _margin(near, far) for near, far in sides]
    side = sides[int(apart[1] < apart[0])]
    agree(here, side[0], float(_margin(*side)), "weights(S)", "its limit", f"S = {scores.tolist()}")


def _margin(near: Tensor, far: Tensor) -> Tensor:
    # what the weights change by over the distance, and their rounding
    return 4 * (near - far).abs().amax() + 1e-9 * near.abs().amax() + 1e-12


HALF: dict[str, Any] = {
    "seed": draw.seeds,
    "size": st.sampled_from([1.0, 5.0]),
    "kept": MASK,
    "masked": st.booleans(),
    "dtype": draw.half_types,
}

PROPERTIES = (
    Property(finite, {**ROW, "size": st.sampled_from([1.0, 10.0, 100.0])}),
    Property(float32_follows_float64, ROW),
    Property(half_follows_float32, HALF),
    Property(half_gradients_follow_float32, HALF),
    Property(no_stray_scores, ROW),
)
