"""What a mask hides has no part in anything, whatever stands there."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kart.testing import draw
from kart.testing.compare import agree, agree_trees, same
from kart.testing.core import Property
from kart.testing.laws import eager_vjp, vjp
from kart.testing.operator.subject import (
    MASK,
    PAIR,
    Params,
    Row,
    Subject,
    attend_slack,
    mask_of,
    mild,
    scores_of,
)


def masked_keys_are_silent(
    s: Subject, row: Row, kept: list[bool], poke: float, dtype: torch.dtype
) -> None:
    """attend(theta, q, k, v, mask) does not depend on k and v of masked keys, nor has it a gradient
    there; the weights there are 0.

    A mask leaks: padding or the future has influence, mostly through a hidden sum over keys.
    """
    mask = mask_of(row, kept)
    x = s.inputs(row, dtype)
    hidden = ~mask[:, None]
    y = x._replace(k=torch.where(hidden, poke, x.k), v=torch.where(hidden, -poke, x.v))
    wanted = s.op.attend(*x, mask)
    agree(s.op.attend(*y, mask), wanted, attend_slack(s, x, mask), "with other masked keys", "with")
    out, pullback = vjp(lambda k, v: s.op.attend(x.params, x.q, k, v, mask), x.k, x.v)
    for name, slope in zip("kv", pullback(torch.ones_like(out)), strict=True):
        at_masked = torch.where(hidden, slope, 0)
        same(at_masked, torch.zeros_like(slope), f"the gradient of {name} at masked keys", "zero")
    weights = s.op.weights(x.params, scores_of(x.q, x.k), mask)
    same(torch.where(mask, 0, weights), torch.zeros_like(weights), "the masked weights", "zero")


def poison_stays_hidden(
    s: Subject, row: Row, kept: list[bool], by_query: bool, poison: float, dtype: torch.dtype
) -> None:
    """attend and weights, and all their gradients, are the same with NaN or infinite k, v and
    scores behind the mask, whether it differs between queries or not.

    Padding that was never written (`torch.empty`), or overflowed, spoils everything: 0 * NaN is
    NaN, and `torch.where` lets NaN through to the gradient.
    """
    keys = mask_of(row, kept)
    mask = keys
    if by_query:
        mask = keys & (torch.rand(row.queries, row.keys, generator=draw.generator(row.seed)) > 0.3)
    x = s.inputs(mild(row), dtype)
    hidden = ~keys[:, None]
    y = x._replace(k=torch.where(hidden, poison, x.k), v=torch.where(hidden, poison, x.v))
    scores = scores_of(x.q, x.k)
    spoiled = torch.where(mask, scores, poison)

    def attended(*args: Any) -> Tensor:
        return s.op.attend(*args, mask)

    def looked_at(params: Params, scores: Tensor) -> Tensor:
        return s.op.weights(params, scores, mask)

    wanted, pullback = vjp(attended, *x)
    probe = draw.probe(wanted.shape, row.seed).to(dtype)
    slopes, limit = pullback(probe), attend_slack(s, x, mask)
    # the two ways to differentiate may take different code
    for way in (vjp, eager_vjp):
        got, poisoned = way(attended, *y)
        agree(got, wanted, limit, f"poisoned attend ({way.__name__})", "attend")
        agree_trees(poisoned(probe), slopes, 64, f"the poisoned gradient ({way.__name__})", "the")
    wanted, pullback = vjp(looked_at, x.params, scores)
    got, poisoned = vjp(looked_at, x.params, spoiled)
    agree_trees(got, wanted, 64, "the poisoned weights", "the weights")
    probe = draw.probe(wanted.shape, row.seed).to(dtype)
    agree_trees(poisoned(probe), pullback(probe), 64, "the poisoned gradient of weights in", "the")


def masking_is_deleting(s: Subject, row: Row, kept: list[bool], dtype: torch.dtype) -> None:
    """attend(theta, q, k, v, mask) = attend(theta', q, k', v') with the masked keys deleted from
    theta, k and v; zero where none is left.

    Masked keys still count, in a normalisation or a hidden sum.
    """
    mask = mask_of(row, kept)
    x = s.inputs(row, dtype)
    got = s.op.attend(*x, mask)
    index = mask.nonzero()[:, 0]
    if not len(index):
        same(got, torch.zeros_like(got), "attend without any key", "zero")
        return
    params = s.keep(x.params, index, row.heads)
    wanted = s.op.attend(params, x.q, x.k[..., index, :], x.v[..., index, :])
    agree(got, wanted, attend_slack(s, x, mask), "masked attend", "attend without those keys")


def masks_broadcast(s: Subject, row: Row, seed: int, dtype: torch.dtype) -> None:
    """attend with a mask (M,), (N, 1), (N, M), (H, N, M) or (B, 1, 1, M) is attend with its
    expansion, and with a mask of True attend without.

    A mask of queries and keys takes another path than a mask of keys, and the two differ, or keys
    are counted along an axis of one.
    """
    x = s.inputs(row, dtype)
    full = (row.batch, row.heads, row.queries, row.keys)
    shapes = [full[3:], (row.queries, 1), full[2:], full[1:], (row.batch, 1, 1, row.keys)]
    for shape in shapes:
        mask = torch.rand(shape, generator=draw.generator(seed)) > 0.4
        # not `expand`, which strides of zero could give away
        whole = mask.expand(full).clone()
        limit = attend_slack(s, x, mask)
        agree(s.op.attend(*x, mask), s.op.attend(*x, whole), limit, f"mask {shape}", "expanded")
    limit = attend_slack(s, x)
    true = torch.ones(row.queries, row.keys, dtype=torch.bool)
    agree(s.op.attend(*x, true), s.op.attend(*x), limit, "a mask of True", "no mask")


# not NaN, which has a property of its own
LOUD = st.sampled_from([50.0, 1e4])

PROPERTIES = (
    Property(masked_keys_are_silent, {**PAIR, "kept": MASK, "poke": LOUD}),
    Property(
        poison_stays_hidden,
        {**PAIR, "kept": MASK, "by_query": st.booleans(), "poison": draw.poisons},
    ),
    Property(masking_is_deleting, {**PAIR, "kept": MASK}),
    Property(masks_broadcast, {**PAIR, "seed": draw.seeds}),
)
