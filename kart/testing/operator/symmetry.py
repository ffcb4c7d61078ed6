"""What does not matter to an operator: order, place, and what belongs to others."""

import itertools
import math

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kart import tree
from kart.testing import draw
from kart.testing.compare import agree
from kart.testing.core import Property
from kart.testing.operator.subject import MASK, PAIR, Row, Subject, attend_slack, mask_of, scores_of


def queries_permute(s: Subject, row: Row, order: list[int], dtype: torch.dtype) -> None:
    """attend(theta, P q, k, v) = P attend(theta, q, k, v) for permutations P of the queries.

    A query knows its own position.
    """
    x = s.inputs(row, dtype)
    index = torch.tensor([i for i in order if i < row.queries])
    moved = s.op.attend(x.params, x.q[..., index, :], x.k, x.v)
    wanted, limit = s.op.attend(*x)[..., index, :], attend_slack(s, x)[..., index, :]
    agree(moved, wanted, limit, "attend(P q)", "P attend(q)")


def queries_stand_alone(s: Subject, row: Row, seed: int, dtype: torch.dtype) -> None:
    """attend(theta, q, k, v, mask)[b, :, n] = attend(theta, q[b, :, n], k[b], v[b], mask[b, :, n]).

    A query sees others, or the mask of another query or example.
    """
    x = s.inputs(row, dtype)
    shape = (row.batch, row.heads, row.queries, row.keys)
    mask = torch.rand(shape, generator=draw.generator(seed)) > 0.4
    for given in (None, mask):
        got, limit = s.op.attend(*x, given), attend_slack(s, x, given)
        for b, n in itertools.product(range(row.batch), range(row.queries)):
            own = None if given is None else given[b, :, n : n + 1]
            alone = s.op.attend(x.params, x.q[b, :, n : n + 1], x.k[b], x.v[b], own)
            here = (b, slice(None), slice(n, n + 1))
            agree(got[here], alone, limit[here], f"query {n} of example {b}", "it alone")


def keys_permute_with_parameters(
    s: Subject, row: Row, order: list[int], dtype: torch.dtype
) -> None:
    """attend(P theta, q, P k, P v) = attend(theta, q, k, v) for permutations P of the keys that
    move every axis of keys in theta along.

    A parameter is bound to a position other than its key's. (Without moving theta it is false for
    learned operators: they know keys by position.)
    """
    x = s.inputs(row, dtype)
    index = torch.tensor([i for i in order if i < row.keys])
    params = s.keep(x.params, index, row.heads)
    moved = s.op.attend(params, x.q, x.k[..., index, :], x.v[..., index, :])
    agree(moved, s.op.attend(*x), attend_slack(s, x), "attend(P theta, q, P k, P v)", "attend")


def examples_stand_alone(s: Subject, row: Row, poke: float, dtype: torch.dtype) -> None:
    """attend(theta, q, k, v)[b] depends on q[b], k[b] and v[b] alone.

    An example leaks into another: results depend on the batch, and one bad example spoils it.
    """
    x = s.inputs(row._replace(batch=2), dtype)
    for b in (0, 1):
        spoiled = [t.clone() for t in x[1:]]
        for t in spoiled:
            t[1 - b] = poke
        got = s.op.attend(x.params, *spoiled)[b]
        wanted = s.op.attend(x.params, *(t[b] for t in x[1:]))
        agree(got, wanted, attend_slack(s, x)[b], f"example {b} among others", "it alone")


def heads_stand_alone(
    s: Subject, row: Row, kept: list[bool], poke: float, dtype: torch.dtype
) -> None:
    """attend(theta, q, k, v, mask)[h] depends on theta[h], q[h], k[h], v[h] and mask[h] alone.

    A head leaks into another, or all work with what belongs to one.
    """
    count = max(2, row.heads)
    x = s.inputs(row._replace(heads=count), dtype)
    turns = [mask_of(row, kept), ~mask_of(row, kept)] * count
    mask = torch.stack(turns[:count])[:, None]
    limits = [attend_slack(s, x, given) for given in (None, mask)]
    for h, (given, limit) in itertools.product(
        (0, count - 1), zip((None, mask), limits, strict=True)
    ):
        own = torch.arange(count) == h
        spoiled = [torch.where(own[:, None, None], t, poke) for t in x[1:]]
        params = tree.map(
            lambda p, own=own: torch.where(own.view(count, *[1] * (p.dim() - 1)), p, poke), x.params
        )
        got = s.op.attend(params, *spoiled, given)[:, h]
        one = slice(h, h + 1)
        alone = tree.map(lambda p, one=one: p[one], x.params)
        part = None if given is None else given[one]
        wanted = s.op.attend(alone, *(t[:, one] for t in x[1:]), part)[:, 0]
        agree(got, wanted, limit[:, h], f"head {h} among others", f"head {h} alone")


def leading_axes_are_apart(
    s: Subject, row: Row, lead: tuple[int, ...], masked: bool, seed: int, dtype: torch.dtype
) -> None:
    """attend(theta, q, k, v, mask)[i] = attend(theta, q[i], k[i], v[i], mask[i]) for any leading
    axes, of equal lengths and of the length of others too.

    Axes are known by their length instead of their place: batch for heads, heads for queries.
    """
    x = s.inputs(row, dtype)
    q, k, v = (
        torch.stack([t[0] * (1 - 0.3 * i) for i in range(math.prod(lead))]).unflatten(0, lead)
        for t in x[1:]
    )
    mask = torch.rand(*lead, row.heads, row.queries, row.keys, generator=draw.generator(seed)) > 0.3
    given = mask if masked else None
    wanted, limits = [], []
    for i in itertools.product(*map(range, lead)):
        own = mask[i] if masked else None
        wanted.append(s.op.attend(x.params, q[i], k[i], v[i], own))
        limits.append(attend_slack(s, x._replace(q=q[i], k=k[i], v=v[i]), own))
    limit = torch.stack(limits).unflatten(0, lead)
    got = s.op.attend(x.params, q, k, v, given)
    agree(got, torch.stack(wanted).unflatten(0, lead), limit, "attend", "attend of each alone")
    looked = s.op.weights(x.params, scores_of(q, k), given) @ v
    agree(looked, got, limit, "weights v under leading axes", "attend")


ORDER = st.permutations(range(5))
# NaN as well: heads and examples never meet
SPOILED = st.sampled_from([50.0, math.nan])


def leads(s: Subject) -> SearchStrategy[tuple[int, ...]]:
    """Leading axes, of the length of the heads and of others."""
    heads = s.heads or 3
    return st.sampled_from([(2,), (heads,), (2, 2), (1, heads)])


PROPERTIES = (
    Property(queries_permute, {**PAIR, "order": ORDER}),
    Property(queries_stand_alone, {**PAIR, "seed": draw.seeds}),
    Property(keys_permute_with_parameters, {**PAIR, "order": ORDER}),
    Property(examples_stand_alone, {**PAIR, "poke": SPOILED}),
    Property(
        heads_stand_alone,
        {**PAIR, "kept": MASK, "poke": SPOILED},
        unfit=lambda s: "the heads are different operators" if s.heads is not None else None,
    ),
    Property(
        leading_axes_are_apart, {**PAIR, "lead": leads, "masked": st.booleans(), "seed": draw.seeds}
    ),
)
