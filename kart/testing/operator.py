"""Properties of a row operator: what stands where softmax stood."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import scaled_dot_product_attention

from kart import tree
from kart.testing import draw
from kart.testing.basis import check_slope, global_state, restore, show_changes
from kart.testing.core import Property
from kart.testing.draw import Theta, agree, jvp, same, spread, unit, vjp

Params = dict[str, Any]


class Row(NamedTuple):
    """Drawn sizes and inputs of one head product; `kind` "integers" makes scores tie and hit knots,
    `size` scales the queries.
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


class Inputs(NamedTuple):
    """Arguments of `attend`: q (B, H, N, d), k (B, H, M, d), v (B, H, M, e)."""

    params: Params
    q: Tensor
    k: Tensor
    v: Tensor


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
        tensors = []
        for n, width in ((row.queries, row.width), (row.keys, row.width), (row.keys, 3)):
            x = torch.randn(row.batch, row.heads, n, width, generator=source)
            tensors.append(x.round() if row.kind == "integers" else x)
        q, k, v = tensors
        return Inputs(tree.to(params, dtype), (q * row.size).to(dtype), k.to(dtype), v.to(dtype))

    def key_axes(self, heads: int) -> dict[str, list[int]]:
        """The axes of every leaf that count keys: those that grow by one with their number."""
        small, large = (
            tree.named(self.op.init(draw.generator(0), heads, tokens)) for tokens in (5, 6)
        )
        return {
            name: [i for i, n in enumerate(leaf.shape) if large[name].shape[i] != n]
            for name, leaf in small.items()
        }

    def keep(self, params: Params, index: Tensor, heads: int) -> Params:
        """Parameters whose keys are `index` of those of `params`."""
        axes = self.key_axes(heads)

        def picked(name: str, leaf: Tensor) -> Tensor:
            for axis in axes[name]:
                leaf = leaf.index_select(axis, index)
            return leaf

        return tree.map_named(picked, params)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """`q k^T / sqrt(d)`."""
    return q @ k.mT / math.sqrt(q.shape[-1])


def rows(s: Subject) -> SearchStrategy[Row]:
    """A small case: sizes and a seed for its tensors."""
    heads = st.integers(1, 3) if s.heads is None else st.just(s.heads)
    return st.builds(
        Row,
        seed=draw.seeds,
        batch=st.integers(1, 2),
        heads=heads,
        queries=st.integers(1, 4),
        keys=st.integers(1, 5),
        width=st.integers(1, 3),
        kind=st.sampled_from(["normal", "integers"]),
        size=st.sampled_from([1.0, 0.0, 5.0]),
        jitter=st.sampled_from([0.0, 0.3]),
    )


def _attend_slack(s: Subject, x: Inputs, mask: Tensor | None = None) -> Tensor:
    return spread(lambda *args: s.op.attend(*args, mask), tuple(x), x.q.dtype)


def _mask(row: Row, kept: Sequence[bool]) -> Tensor:
    return torch.tensor(list(kept)[: row.keys])


# --- everyone -------------------------------------------------------------------------------------


def keeps_shape_and_dtype(s: Subject, row: Row, dtype: torch.dtype) -> None:
    """attend maps q (.., H, N, d), k (.., H, M, d), v (.., H, M, e) to (.., H, N, e), and weights
    maps (.., H, N, M) to itself, in the dtype of q and with any leading axes.

    Shapes or dtypes that change on the way break models under mixed precision or with more axes.
    """
    x = s.inputs(row, torch.float32)
    q, k, v = (t.to(dtype) for t in x[1:])
    for lead in (slice(None), 0):
        out = s.op.attend(x.params, q[lead], k[lead], v[lead])
        shape = (*q[lead].shape[:-1], v.shape[-1])
        if out.shape != shape or out.dtype != dtype:
            raise AssertionError(
                f"attend gives {out.dtype} of shape {tuple(out.shape)} for q of {dtype} and shape "
                f"{tuple(q[lead].shape)}, v of shape {tuple(v[lead].shape)}"
            )
        scores = scores_of(q[lead], k[lead])
        weights = s.op.weights(x.params, scores)
        if weights.shape != scores.shape or weights.dtype != dtype:
            raise AssertionError(
                f"weights gives {weights.dtype} of shape {tuple(weights.shape)} for scores of "
                f"{dtype} and shape {tuple(scores.shape)}"
            )


def init_follows_its_generator(s: Subject, row: Row) -> None:
    """init(generator, H, M) is a function of the generator: finite float32 with a leading axis H.

    Parameters that come from elsewhere make runs that cannot be repeated; leaves without the axis
    of heads cannot be stacked.
    """
    first = tree.named(s.op.init(draw.generator(row.seed), row.heads, row.keys))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(row.seed + 7)
        again = tree.named(s.op.init(draw.generator(row.seed), row.heads, row.keys))
    for name, leaf in first.items():
        # the parts of a hybrid have the axis of their own heads
        led = leaf.dim() and (s.heads is not None or leaf.shape[0] == row.heads)
        if leaf.dtype != torch.float32 or not led or not bool(leaf.isfinite().all()):
            raise AssertionError(
                f"{name} is {leaf.dtype} of shape {tuple(leaf.shape)}, or not finite: wanted "
                f"finite float32 led by H = {row.heads}"
            )
        same(again[name], leaf, f"{name} of a second init", "that of the first")


def inputs_untouched(s: Subject, row: Row, dtype: torch.dtype) -> None:
    """attend, weights and their gradients write to none of theta, q, k, v.

    In-place changes reach whoever else holds the tensor.
    """
    x = s.inputs(row, dtype)
    before = tree.map(torch.clone, tuple(x))
    out, pullback = vjp(s.op.attend, *x)
    pullback(torch.ones_like(out))
    # plain as well: what nobody differentiates is where writing in place pays
    s.op.attend(*x)
    s.op.weights(x.params, scores_of(x.q, x.k))
    for name, leaf in tree.named(tuple(x)).items():
        same(leaf, tree.named(before)[name], f"argument {name} afterwards", "it before")


def global_state_untouched(s: Subject) -> None:
    """init, attend and weights leave generators, default dtype, threads and modes as they were.

    What one function changes for everybody makes the results of others depend on whether it ran.
    """
    before = global_state()
    x = s.inputs(Row(0, 1, s.heads or 2, 3, 4, 2), torch.float32)
    s.op.attend(*x)
    s.op.weights(x.params, scores_of(x.q, x.k))
    after = global_state()
    restore(before)
    show_changes(before, after)


def deterministic(s: Subject, row: Row, other: Row, dtype: torch.dtype) -> None:
    """attend(theta, q, k, v) is the same bit for bit whenever it is asked.

    A hidden state or the global seed makes the same input give another output.
    """
    x = s.inputs(row, dtype)
    first = s.op.attend(*x)
    between = s.inputs(other, dtype)
    # loud, so that it changes whatever is kept of the largest seen
    s.op.attend(between.params, *(1e3 * t for t in between[1:]))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(row.seed + 11)
        again = s.op.attend(*x)
    same(again, first, "attend asked again", "attend")


def finite(s: Subject, row: Row, size: float) -> None:
    """attend, weights and all gradients are finite in float32 for scores up to 100 in size.

    One overflow or one 0/0 ends a training run.
    """
    x = s.inputs(row, torch.float32)
    largest = scores_of(x.q, x.k).abs().max().clamp(min=1e-3)
    x = x._replace(q=x.q * (size / largest))
    out, pullback = vjp(s.op.attend, *x)
    found = {"attend": out, "weights": s.op.weights(x.params, scores_of(x.q, x.k))}
    found |= {
        f"gradient {name}": leaf
        for name, leaf in tree.named(pullback(torch.ones_like(out))).items()
    }
    for name, leaf in found.items():
        if not bool(leaf.isfinite().all()):
            raise AssertionError(f"{name} is not finite")


def attend_is_weights_times_values(
    s: Subject, row: Row, kept: list[bool], masked: bool, dtype: torch.dtype
) -> None:
    """attend(theta, q, k, v, mask) = weights(theta, q k^T / sqrt(d), mask) v.

    The form that trains and the form that is looked at are two operators.
    """
    x = s.inputs(row, dtype)
    mask = _mask(row, kept) if masked else None
    wanted = s.op.weights(x.params, scores_of(x.q, x.k), mask) @ x.v
    agree(s.op.attend(*x, mask), wanted, _attend_slack(s, x, mask), "attend", "weights v")


def large_as_weights(
    s: Subject, seed: int, queries: int, keys: int, poke: int, dtype: torch.dtype
) -> None:
    """attend(theta, q, k, v) = weights(theta, q k^T / sqrt(d)) v for many queries and keys.

    A fused form that works in blocks drops, repeats or misplaces the last one.
    """
    row = Row(seed, 1, s.heads or 1, queries, keys, 4)
    x = s.inputs(row, dtype)
    # one late key that matters more than all others
    place = max(0, keys - 1 - poke)
    x.v[..., place, :] = x.v[..., place, :] + 100
    wanted = s.op.weights(x.params, scores_of(x.q, x.k)) @ x.v
    agree(s.op.attend(*x), wanted, _attend_slack(s, x), "attend", "weights v")


def attend_has_the_gradients_of_weights(
    s: Subject, row: Row, kept: list[bool], masked: bool
) -> None:
    """d attend = d (weights v) in theta, q, k and v.

    A fused backward is wrong, although the forward is right.
    """
    x = s.inputs(row, torch.float64)
    mask = _mask(row, kept) if masked else None
    probe = torch.randn(
        x.q.shape[:-1] + x.v.shape[-1:], generator=draw.generator(row.seed)
    ).double()

    def attended(params: Params, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (s.op.attend(params, q, k, v, mask) * probe).sum()

    def looked_at(params: Params, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((s.op.weights(params, scores_of(q, k), mask) @ v) * probe).sum()

    places = (0, 1, 2, 3) if x.params else (1, 2, 3)
    got, wanted = (tree.named(grad(f, places)(*x)) for f in (attended, looked_at))
    size = max([1.0, *(float(leaf.abs().max()) for leaf in wanted.values())])
    for name, leaf in wanted.items():
        agree(
            got[name], leaf, 64 * unit(torch.float64) * size, f"gradient {name}", "that of weights"
        )


def gradient_is_right(s: Subject, row: Row, seed: int) -> None:
    """The derivative of attend along any line is that of its difference quotients, away from kinks.

    The gradient is not that of the value: a wrong custom backward, or a value computed outside
    autograd.
    """
    # tied scores sit on kinks, where every subgradient is right
    row = row._replace(kind="normal", size=max(row.size, 1.0), jitter=0.3)
    x = s.inputs(row, torch.float64)
    source = draw.generator(seed)
    line = tree.map(lambda t: torch.randn(t.shape, generator=source).double(), tuple(x))
    probe = torch.randn(x.q.shape[:-1] + x.v.shape[-1:], generator=source).double()

    def along(t: Tensor) -> Tensor:
        flat = [
            (s.op.attend(*tree.map(lambda a, b, t=t: a + t * b, tuple(x), line)) * probe).sum()
            for t in t.flatten()
        ]
        return torch.stack(flat).reshape(t.shape)

    check_slope(along, torch.zeros(1, dtype=torch.float64), 1.0, "the derivative")


def forward_meets_reverse(s: Subject, row: Row, seed: int) -> None:
    """<u, J v> = <J^T u, v> for the Jacobian J of attend in (theta, q, k, v).

    Forward and reverse mode disagree, or one is missing: Hessian-vector products fail.
    """
    x = tuple(s.inputs(row, torch.float64))
    source = draw.generator(seed)
    tangents = tree.map(lambda t: torch.randn(t.shape, generator=source).double(), x)
    out, forward = jvp(s.op.attend, x, tangents)
    u = torch.randn(out.shape, generator=source).double()
    reverse = vjp(s.op.attend, *x)[1](u)
    terms = [t.flatten() for t in tree.leaves(tree.map(lambda a, b: a * b, reverse, tangents))]
    right = torch.cat(terms)
    limit = 16 * unit(torch.float64) * (right.abs().sum() + (u * forward).abs().sum() + 1e-30)
    agree((u * forward).sum(), right.sum(), limit, "<u, J v>", "<J^T u, v>")


def vmap_is_a_loop(s: Subject, row: Row, dtype: torch.dtype) -> None:
    """vmap(attend) over examples and over populations of theta is the loop.

    Per-example gradients and populations of models are vmapped.
    """
    x = s.inputs(row, dtype)
    limit = _attend_slack(s, x)
    mapped = vmap(s.op.attend, in_dims=(None, 0, 0, 0))(*x)
    wanted = torch.stack([s.op.attend(x.params, *one) for one in zip(*x[1:], strict=True)])
    agree(mapped, wanted, limit, "vmap over examples", "the loop")
    if not x.params:
        return
    others = s.inputs(row._replace(seed=row.seed + 1), dtype).params
    stacked = vmap(s.op.attend, in_dims=(0, None, None, None))(
        tree.stack([x.params, others]), *x[1:]
    )
    loop = torch.stack([s.op.attend(p, *x[1:]) for p in (x.params, others)])
    both = torch.stack([limit, _attend_slack(s, x._replace(params=others))])
    agree(stacked, loop, both, "vmap over a population", "the loop")


def per_example_gradients(s: Subject, row: Row) -> None:
    """vmap(grad(f)) over examples = grad(f) of each, and they sum to grad of the sum.

    Examples mix in the backward.
    """
    x = s.inputs(row, torch.float64)
    if not x.params:
        return

    def loss(params: Params, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s.op.attend(params, q, k, v).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0))(*x)
    single = tree.stack([grad(loss)(x.params, *one) for one in zip(*x[1:], strict=True)])
    whole = tree.named(grad(loss)(*x))
    size = max([1.0, *(float(leaf.abs().max()) for leaf in tree.leaves(single))])
    limit = 64 * unit(torch.float64) * size
    for name, leaf in tree.named(each).items():
        agree(leaf, tree.named(single)[name], limit, f"mapped gradient of {name}", "the loop's")
        agree(leaf.sum(0), whole[name], limit, f"the sum of gradients of {name}", "the whole one")


def float32_follows_float64(s: Subject, row: Row) -> None:
    """attend in float32 is attend in float64 up to rounding times its condition.

    Scores or sums are kept in lower precision than their inputs, or cancel.
    """
    x = s.inputs(row, torch.float32)
    wanted = s.op.attend(*tree.to(tuple(x), torch.float64))
    agree(s.op.attend(*x), wanted, _attend_slack(s, x), "attend in float32", "in float64")


def queries_permute(s: Subject, row: Row, order: list[int], dtype: torch.dtype) -> None:
    """attend(theta, P q, k, v) = P attend(theta, q, k, v) for permutations P of the queries.

    A query knows its own position.
    """
    x = s.inputs(row, dtype)
    index = torch.tensor([i for i in order if i < row.queries])
    moved = s.op.attend(x.params, x.q[..., index, :], x.k, x.v)
    wanted, limit = s.op.attend(*x)[..., index, :], _attend_slack(s, x)[..., index, :]
    agree(moved, wanted, limit, "attend(P q)", "P attend(q)")


def queries_stand_alone(s: Subject, row: Row, seed: int, dtype: torch.dtype) -> None:
    """attend(theta, q, k, v, mask)[b, :, n] = attend(theta, q[b, :, n], k[b], v[b], mask[b, :, n]).

    A query sees others, or the mask of another query or example.
    """
    x = s.inputs(row, dtype)
    shape = (row.batch, row.heads, row.queries, row.keys)
    mask = torch.rand(shape, generator=draw.generator(seed)) > 0.4
    for given in (None, mask):
        got, limit = s.op.attend(*x, given), _attend_slack(s, x, given)
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
    agree(moved, s.op.attend(*x), _attend_slack(s, x), "attend(P theta, q, P k, P v)", "attend")


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
    limit = _attend_slack(s, x._replace(v=x.v @ b + w)) + _attend_slack(s, x) @ b.double().abs()
    limit = limit + _attend_slack(s, x._replace(v=w))
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
    limit = _attend_slack(s, x) + _attend_slack(s, moved)
    agree(s.op.attend(*moved), s.op.attend(*x), 4 * limit, "attend(q G, k G^-T)", "attend(q, k)")


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
        agree(got, wanted, _attend_slack(s, x)[b], f"example {b} among others", "it alone")


def heads_stand_alone(
    s: Subject, row: Row, kept: list[bool], poke: float, dtype: torch.dtype
) -> None:
    """attend(theta, q, k, v, mask)[h] depends on theta[h], q[h], k[h], v[h] and mask[h] alone.

    A head leaks into another, or all work with what belongs to one.
    """
    x = s.inputs(row._replace(heads=2), dtype)
    mask = torch.stack([_mask(row, kept), ~_mask(row, kept)])[:, None]
    for h, given in itertools.product((0, 1), (None, mask)):
        own = torch.tensor([i == h for i in (0, 1)])
        spoiled = [torch.where(own[:, None, None], t, poke) for t in x[1:]]
        params = tree.map(
            lambda p, own=own: torch.where(own.view(2, *[1] * (p.dim() - 1)), p, poke), x.params
        )
        got = s.op.attend(params, *spoiled, given)[:, h]
        one = slice(h, h + 1)
        alone = tree.map(lambda p, one=one: p[one], x.params)
        part = None if given is None else given[one]
        wanted = s.op.attend(alone, *(t[:, one] for t in x[1:]), part)[:, 0]
        limit = _attend_slack(s, x, given)[:, h]
        agree(got, wanted, limit, f"head {h} among others", f"head {h} alone")


def masked_keys_are_silent(
    s: Subject, row: Row, kept: list[bool], poke: float, dtype: torch.dtype
) -> None:
    """attend(theta, q, k, v, mask) does not depend on k and v of masked keys, nor has it a gradient
    there; the weights there are 0.

    A mask leaks: padding or the future has influence, mostly through a hidden sum over keys.
    """
    mask = _mask(row, kept)
    x = s.inputs(row, dtype)
    hidden = ~mask[:, None]
    y = x._replace(k=torch.where(hidden, poke, x.k), v=torch.where(hidden, -poke, x.v))
    wanted = s.op.attend(*x, mask)
    agree(
        s.op.attend(*y, mask), wanted, _attend_slack(s, x, mask), "with other masked keys", "with"
    )
    out, pullback = vjp(lambda k, v: s.op.attend(x.params, x.q, k, v, mask), x.k, x.v)
    for name, slope in zip("kv", pullback(torch.ones_like(out)), strict=True):
        at_masked = torch.where(hidden, slope, 0)
        same(at_masked, torch.zeros_like(slope), f"the gradient of {name} at masked keys", "zero")
    weights = s.op.weights(x.params, scores_of(x.q, x.k), mask)
    same(torch.where(mask, 0, weights), torch.zeros_like(weights), "the masked weights", "zero")


def masking_is_deleting(s: Subject, row: Row, kept: list[bool], dtype: torch.dtype) -> None:
    """attend(theta, q, k, v, mask) = attend(theta', q, k', v') with the masked keys deleted from
    theta, k and v; zero where none is left.

    Masked keys still count, in a normalisation or a hidden sum.
    """
    mask = _mask(row, kept)
    x = s.inputs(row, dtype)
    got = s.op.attend(*x, mask)
    index = mask.nonzero()[:, 0]
    if not len(index):
        same(got, torch.zeros_like(got), "attend without any key", "zero")
        return
    params = s.keep(x.params, index, row.heads)
    wanted = s.op.attend(params, x.q, x.k[..., index, :], x.v[..., index, :])
    agree(got, wanted, _attend_slack(s, x, mask), "masked attend", "attend without those keys")


def masks_broadcast(s: Subject, row: Row, seed: int, dtype: torch.dtype) -> None:
    """attend with a mask (M,), (N, M), (H, N, M) or (B, 1, 1, M) is attend with its expansion, and
    with a mask of True attend without.

    A mask of queries and keys takes another path than a mask of keys, and the two differ.
    """
    x = s.inputs(row, dtype)
    full = (row.batch, row.heads, row.queries, row.keys)
    shapes = [full[3:], full[2:], full[1:], (row.batch, 1, 1, row.keys)]
    for shape in shapes:
        mask = torch.rand(shape, generator=draw.generator(seed)) > 0.4
        # not `expand`, which strides of zero could give away
        whole = mask.expand(full).clone()
        limit = _attend_slack(s, x, mask)
        agree(s.op.attend(*x, mask), s.op.attend(*x, whole), limit, f"mask {shape}", "expanded")
    limit = _attend_slack(s, x)
    true = torch.ones(row.queries, row.keys, dtype=torch.bool)
    agree(s.op.attend(*x, true), s.op.attend(*x), limit, "a mask of True", "no mask")


MASK = st.lists(st.booleans(), min_size=5, max_size=5)
ORDER = st.permutations(range(5))
# not NaN, which 0 * NaN keeps in the products of masked weights and values; heads and examples
# never meet
LOUD = st.sampled_from([50.0, 1e4])
SPOILED = st.sampled_from([50.0, math.nan])
ROW: dict[str, Any] = {"row": rows}
PAIR: dict[str, Any] = {"row": rows, "dtype": draw.dtypes}

EVERYONE = (
    Property(
        keeps_shape_and_dtype,
        {"row": rows, "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16])},
    ),
    Property(init_follows_its_generator, ROW),
    Property(inputs_untouched, PAIR),
    Property(global_state_untouched),
    Property(deterministic, {**PAIR, "other": rows}),
    Property(finite, {**ROW, "size": st.sampled_from([1.0, 10.0, 100.0])}),
    Property(attend_is_weights_times_values, {**PAIR, "kept": MASK, "masked": st.booleans()}),
    Property(
        large_as_weights,
        {
            "seed": draw.seeds,
            "queries": st.sampled_from([1, 65]),
            "keys": st.sampled_from([33, 64, 129]),
            "poke": st.integers(0, 2),
            "dtype": draw.dtypes,
        },
    ),
    Property(attend_has_the_gradients_of_weights, {**ROW, "kept": MASK, "masked": st.booleans()}),
    Property(gradient_is_right, {**ROW, "seed": draw.seeds}),
    Property(forward_meets_reverse, {**ROW, "seed": draw.seeds}),
    Property(vmap_is_a_loop, PAIR),
    Property(per_example_gradients, ROW),
    Property(float32_follows_float64, ROW),
    Property(queries_permute, {**PAIR, "order": ORDER}),
    Property(queries_stand_alone, {**PAIR, "seed": draw.seeds}),
    Property(keys_permute_with_parameters, {**PAIR, "order": ORDER}),
    Property(linear_in_values, {**PAIR, "seed": draw.seeds}),
    Property(change_of_basis, {**ROW, "seed": draw.seeds}),
    Property(examples_stand_alone, {**PAIR, "poke": SPOILED}),
    Property(
        heads_stand_alone,
        {**PAIR, "kept": MASK, "poke": SPOILED},
        unfit=lambda s: "the heads are different operators" if s.heads is not None else None,
    ),
    Property(masked_keys_are_silent, {**PAIR, "kept": MASK, "poke": LOUD}),
    Property(masking_is_deleting, {**PAIR, "kept": MASK}),
    Property(masks_broadcast, {**PAIR, "seed": draw.seeds}),
)


# --- declared traits ------------------------------------------------------------------------------


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
    mask = _mask(row, kept)
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


TRAITS = (
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
        {**ROW, "turns": st.lists(st.integers(-5, 5), min_size=1, max_size=4)},
        "periodic",
        (2 * math.pi,),
    ),
    Property(softmax_base, PAIR, "softmax_base", (True,)),
    Property(softmax_start, PAIR, "softmax_start", (True,)),
    Property(gauge, {**ROW, "seed": draw.seeds}, "gauge", (True,)),
    Property(hidden_units_permute, {**PAIR, "seed": draw.seeds}, "hidden_units_permute", (True,)),
)


def traits_of(op: Any) -> dict[str, Any]:
    """What the options of one of kart's operators declare."""
    options = dict(getattr(op, "options", None) or {})
    basis, kind = getattr(op, "basis", None), options.get("kind")
    if getattr(op, "name", None) in ("softmax", "sparsemax"):
        return {"simplex": True, "shift_invariant": True}
    declared: dict[str, Any] = {}
    if options.get("project") == "simplex":
        declared["simplex"] = True
    if options.get("base") == "softmax":
        declared["softmax_base"] = True
        declared["softmax_start"] = options.get("mix") == "zero" and not options.get("project")
    if basis is None:
        return declared
    plain = basis.options.get("base", "zero") == "zero"
    if kind != "project_first" and options.get("base") is None and plain:
        # the units see the scores themselves
        declared |= {k: v for k, v in basis.traits.items() if k == "periodic"}
    if kind == "low_rank":
        declared["hidden_units_permute"] = True
        if basis.traits.get("linear") and plain and not basis.options.get("scales"):
            declared["gauge"] = True
        if options.get("project") is None and options.get("base") is None:
            declared["rank"] = options["rank"]
    return declared
