"""Products in chunks that are computed again in the backward: full rank, units nonlinear in their
parameters, masks that differ between queries.

Forward mode differentiates the chunks themselves: alone it holds one chunk at a time, under a
reverse pass it keeps them all. So does torch.compile, which plans the memory by itself.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from kart.kernels import chunked, fused, plain
from kart.kernels.arguments import broadcast_leading, check, check_mask, flat_mask, four_axes
from kart.kernels.core import choose, contract, engine_for
from kart.kernels.cpp import dense
from kart.kernels.family import Product, family_of
from kart.kernels.transforms import Quick, batchable, forward_levels, no_autocast, recorded

# scores in a chunk: 4 MiB of float32, a few of which are alive at a time
CHUNK = 2**20
# numbers of C V at a time, 8 MiB of float32
VALUES = 2**21
# as many times as much on a GPU, where an operation on so little is over before the next has begun
LARGER = 16


def _room(numbers: int, like: Tensor) -> int:
    return LARGER * numbers if like.device.type == "cuda" else numbers


class _Recompute(Quick):
    """`fn(*tensors)`, of which only the tensors are kept for the backward."""

    # only torch operations inside, so that torch can derive the rule
    generate_vmap_rule = True

    @staticmethod
    def forward(fn, *tensors):
        return fn(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.fn = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    @batchable
    def backward(ctx, gradient):
        tensors = list(ctx.saved_tensors)
        # no others: torch.func cannot give a gradient to a constant of a level that has ended
        learned = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]

        def fn(*values):
            inputs = list(tensors)
            for i, value in zip(learned, values, strict=True):
                inputs[i] = value
            with no_autocast(gradient):
                return ctx.fn(*inputs)

        pullback = plain.pullback(fn, *(tensors[i] for i in learned))
        gradients: list[Tensor | None] = [None] * len(tensors)
        for i, value in zip(learned, pullback(gradient), strict=True):
            gradients[i] = value
        return None, *gradients


def _recompute(fn: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    with no_autocast(next(x for x in tensors if x is not None)):
        if torch.compiler.is_compiling() or forward_levels() or not recorded():
            return fn(*tensors)
        return _Recompute.apply(fn, *tensors)  # type: ignore[no-any-return]


def _split(step: int, first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The tensors `(batch or 1, ...)`, or None, of each part of `step` samples of the first."""
    if torch.compiler.is_exporting():
        return iter([(first, *others)])
    batch = first.shape[0]

    def parts(x: Tensor | None) -> Sequence[Any]:
        # split, not sliced: the gradient of a slice is a tensor of the size of the whole, each
        whole = x is None or (x.shape[0] == 1 != batch)
        return [x] * len(firsts) if whole else x.split(step)  # type: ignore[union-attr]

    firsts = first.split(step)  # one of no samples, too
    return zip(firsts, *(parts(x) for x in others), strict=True)


def contract_values(
    basis: Any,
    coefs: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """`out[n] = sum_p (sum_m mask[n, m] sum_j features(scale q_n . k_m)[j] coefs[p, m, j]) v[p]`,
    `(..., H, N, e)`: full-rank attention, as F(S) (C V).

    The coefficients meet the values first, a few samples at a time, and again in the backward: C V
    is M K / d times as large as V and is never kept.

    Args:
        basis: a basis that is linear in its coefficients.
        coefs: `(H, P, M, K)`; more leading axes through `vmap`.
        q, k, v: `(..., H, N, d)`, `(..., H, M, d)` and `(..., H, P, e)`.
        mask, scale, engine: as in `contract`.

    Raises:
        ValueError: names the argument that does not fit.
    """
    check("contract_values", q, k, mask, scale, coefs=coefs, v=v)
    if coefs.dim() != 4 or coefs.shape[1:3] != (v.shape[-2], k.shape[-2]):
        raise ValueError(
            f"`contract_values` needs `coefs` (H, {v.shape[-2]}, {k.shape[-2]}, K) for the tokens "
            f"of `v` and `k`, got {tuple(coefs.shape)}. Call `init` of the operator for these keys."
        )
    lead = broadcast_leading("contract_values", q=q, k=k, v=v, coefs=coefs.shape[:1], mask=mask)
    qs, ks, vs = four_axes(lead, q, k, v)
    heads = qs.shape[1]
    coefs = coefs.expand(heads, *coefs.shape[1:])[None]
    mask = None if mask is None else flat_mask(mask, lead[:-1])
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    expression = partial(_values_in_chunks, basis, factor, engine)
    if torch.compiler.is_compiling() or forward_levels() or engine == "plain":
        y = expression(qs, ks, vs, coefs, mask)
    else:
        with no_autocast(q):
            (y,) = fused.apply(_values(basis, factor, engine), qs, ks, vs, coefs, mask)
    return y.reshape(*lead, *y.shape[-2:])


def _step(v: Tensor, coefs: Tensor) -> int:
    """Samples whose C V are held at a time."""
    return max(1, _room(VALUES, v) // (v.shape[-1] * coefs.shape[3:].numel() * v.shape[1]))


def _mixed(coefs: Tensor, v: Tensor) -> Tensor:
    """`C V`, `(B, H, e, M, K)`, for `coefs (B or 1, H, P, M, K)`."""
    heads = "h" if coefs.shape[0] == 1 else "bh"
    own = coefs[0] if coefs.shape[0] == 1 else coefs
    return torch.einsum(f"{heads}pmj,bhpe->bhemj", own.to(v.dtype), v).to(coefs.dtype)


def _raw_mixed(coefs: Tensor, v: Tensor, engine: str) -> Tensor:
    """`_mixed` on plain tensors, compiled where that is faster."""
    matrix = coefs.flatten(-2)
    unit = dense.engine() if engine in ("auto", "cpp") else None
    if unit is None or not unit.takes(matrix, v):
        return _mixed(coefs, v)
    return unit.mixed(matrix, v).unflatten(-1, coefs.shape[-2:])


def _unmixed(coefs: Tensor, v: Tensor, dmixed: Tensor, engine: str) -> tuple[Tensor, Tensor]:
    """The gradients of coefs and v from that of `_mixed`."""
    matrix, unit = coefs.flatten(-2), dense.engine() if engine in ("auto", "cpp") else None
    if unit is not None and unit.takes(matrix, v, dmixed):
        dcoefs, dv = unit.unmixed(matrix, v, dmixed.flatten(-2))
        return dcoefs.view(coefs.shape), dv
    flat, pulled = coefs.to(v.dtype).flatten(-2), dmixed.to(v.dtype).flatten(-2)
    if coefs.shape[0] != 1:
        dcoefs, dv = v @ pulled, flat @ pulled.mT
    else:
        # the samples of a head in one product each, from one copy
        pulled = pulled.transpose(0, 1).flatten(1, 2)  # (H, B e, M K)
        dcoefs = v.permute(1, 2, 0, 3).flatten(2) @ pulled
        dv = (pulled @ flat[0].mT).unflatten(1, (v.shape[0], -1)).permute(1, 0, 3, 2)
    return dcoefs.reshape(coefs.shape).to(coefs.dtype), dv


def _values(basis: Any, scale: float, engine: str) -> fused.Fused:
    """`contract_values` of q, k, v, coefs `(B or 1, H, P, M, K)` and mask, of one batch axis.

    The backward has C V again, but not the product with it.
    """
    family = family_of(basis)

    def forward(q, k, v, coefs, mask):
        parts = []
        for qs, ks, vs, cs, ms in _split(_step(v, coefs), q, k, v, coefs, mask):
            product = Product(family, qs, ks, _raw_mixed(cs, vs, engine), ms, scale)
            parts.append(engine_for(engine, product).forward(product))
        return (torch.cat(parts),)

    def backward(gradients, inputs, results):
        found = []
        for dy, q, k, v, coefs, mask in _split(_step(*inputs[2:4]), *gradients, *inputs):
            product = Product(family, q, k, _raw_mixed(coefs, v, engine), mask, scale)
            dq, dk, dmixed = engine_for(engine, product).backward(product, dy)
            found.append((dq, dk, *_unmixed(coefs, v, dmixed, engine)))
        dq, dk, dcoefs, dv = zip(*found, strict=True)
        shared = inputs[3].shape[0] == 1
        total = reduce(torch.add, dcoefs) if shared else torch.cat(dcoefs)
        return torch.cat(dq), torch.cat(dk), torch.cat(dv), total

    def expression(*tensors):
        return (_values_in_chunks(basis, scale, engine, *tensors),)

    return fused.Fused(forward, backward, expression, 1, (0, 1, 2, 3), (3, 4))


def _values_in_chunks(
    basis: Any,
    scale: float,
    engine: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefs: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """As `_values`, of operations that can be differentiated."""

    def one(q: Tensor, k: Tensor, v: Tensor, coefs: Tensor, mask: Tensor | None) -> Tensor:
        return contract(basis, _mixed(coefs, v), q, k, mask, scale, engine)

    parts = [_recompute(one, *part) for part in _split(_step(v, coefs), q, k, v, coefs, mask)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def contract_units(
    basis: Any,
    units: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`y[n, p] = sum_m mask[n, m] phi_pm(scale q_n . k_m)`, `(..., H, N, r)`, for any family.

    There is no matrix product to do it with. In half or single precision a family with a piece of
    C++ or Triton (all of kart's) runs in registers, on the CPU or on CUDA; otherwise one unit p and
    a few samples at a time, recomputed in the backward, which costs several times `contract`: the
    memory is O(N M), independent of r and of the batch.

    Args:
        basis: `apply(units, x)` evaluates each unit at its element of x.
        units: its parameters, every leaf `(H, r, M, ...)`; more leading axes through `vmap`.
        q, k: `(..., H, N, d)` and `(..., H, M, d)`.
        mask: boolean, True = attend, broadcasting to `(..., H, N, M)`.
        scale: of the scores; default `d^-1/2`.

    Raises:
        ValueError: names the argument that does not fit.
    """
    named = {f"units[{name!r}]": leaf for name, leaf in units.items()}
    check("contract_units", q, k, mask, scale, ("q", "k"), **named)
    keys = k.shape[-2]
    shapes = {name: tuple(leaf.shape) for name, leaf in units.items()}
    ranks = {shape[1:2] for shape in shapes.values()}
    bad = not shapes or len(ranks) != 1 or (0,) in ranks or () in ranks
    if bad or any(shape[2:3] != (keys,) for shape in shapes.values()):
        raise ValueError(
            f"`contract_units` needs `units` with leaves (H, r, {keys}, ...), r >= 1, got "
            f"{shapes}. Call `init` of the operator for this number of keys."
        )
    unit_heads = {f"units[{name!r}]": shape[:1] for name, shape in shapes.items()}
    *lead, heads = broadcast_leading("contract_units", q=q, k=k, mask=mask, **unit_heads)
    q, k = four_axes([*lead, heads], q, k)
    leaves = [leaf.expand(heads, *leaf.shape[1:])[None] for leaf in units.values()]
    mask = None if mask is None else flat_mask(mask, lead)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    y = _units(basis, list(units), factor, q, k, mask, *leaves)
    return y.reshape(*lead, heads, q.shape[-2], next(iter(ranks))[0])


def _units(
    basis: Any,
    names: list[str],
    scale: float,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    *leaves: Tensor,
) -> Tensor:
    """`contract_units` of four axes, leaves `(B or 1, H, r, M, ...)`, by the engine that can."""
    expression = partial(_units_in_chunks, basis, names, scale)
    if torch.compiler.is_compiling() or forward_levels():
        return expression(q, k, mask, *leaves)
    family = family_of(basis)
    # of the coefficients it takes the dtype, which is that of the leaves
    engine, _ = choose("auto", Product(family, q, k, leaves[0], mask, scale))
    if engine is chunked:  # of features, which these may not have
        return expression(q, k, mask, *leaves)

    def stacked(*leaves: Tensor) -> Tensor:
        found = family.stacked(dict(zip(names, leaves, strict=True)))
        if found.dim() != 5:
            shapes = [tuple(x.shape[1:]) for x in leaves]
            raise ValueError(
                f"`contract_units` needs `units` of shape (H, r, M), got leaves {shapes}. Call "
                "`init` of the operator for this number of keys."
            )
        return found

    def forward(q, k, mask, *leaves):
        return (engine.forward(Product(family, q, k, stacked(*leaves), mask, scale)),)

    def backward(gradients, inputs, results):
        q, k, mask, *leaves = inputs
        product = Product(family, q, k, stacked(*leaves), mask, scale)
        dq, dk, dcoefs = engine.backward(product, *gradients)
        return dq, dk, *plain.pullback(stacked, *leaves)(dcoefs)

    learned = (0, 1, *range(3, 3 + len(leaves)))
    op = fused.Fused(forward, backward, lambda *x: (expression(*x),), 1, learned, (2, *learned[2:]))
    with no_autocast(q):
        return fused.apply(op, q, k, mask, *leaves)[0]


def _units_in_chunks(
    basis: Any,
    names: list[str],
    scale: float,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    *leaves: Tensor,
) -> Tensor:
    """`_units` in torch, one unit and a few samples at a time, recomputed in the backward."""
    step = max(1, _room(CHUNK, q) // (q.shape[1] * q.shape[2] * k.shape[2]))

    def one(q: Tensor, k: Tensor, mask: Tensor | None, *leaves: Tensor) -> Tensor:
        lifted = {name: leaf.unsqueeze(2) for name, leaf in zip(names, leaves, strict=True)}
        values = basis.apply(lifted, plain.scores(q, k, scale))  # (b, H, N, M)
        if mask is not None:
            values = torch.where(mask, values, 0)
        return values.sum(-1)

    parts = []
    for qs, ks, ms, *units in _split(step, q, k, mask, *leaves):
        single = zip(*(leaf.unbind(2) for leaf in units), strict=True)
        parts.append(torch.stack([_recompute(one, qs, ks, ms, *unit) for unit in single], -1))
    y = torch.cat(parts) if len(parts) > 1 else parts[0]
    return y.to(q.dtype)


def mix_values(y: Tensor, mix: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`out[n] = sum_j mask[n, j] (y[n] . mix[j]) v[j]`, `(..., H, N, d)`, for a mask that differs
    between queries; without one this is `y @ (mix^T v)`.

    A block of queries at a time, recomputed in the backward.

    Args:
        y: `(..., H, N, r)`.
        mix: `(..., H, M, r)`.
        v: `(..., H, M, d)`.
        mask: boolean, True = attend, broadcasting to `(..., H, N, M)`.

    Raises:
        ValueError: names the argument that does not fit.
    """
    check("mix_values", y, mix, None, None, ("y", "mix"), v=v)
    if mix.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"`mix_values` needs `mix` (..., M, r) and `v` (..., M, d) with the same keys, got "
            f"{tuple(mix.shape)} and {tuple(v.shape)}. Initialise the operator for these keys."
        )
    if mask is None:
        raise ValueError("`mix_values` needs a `mask`, got None. Without one use y @ (mix.mT @ v).")
    check_mask("mix_values", mask, y.shape[-2], v.shape[-2], y.device)
    broadcast_leading("mix_values", y=y, mix=mix, v=v, mask=mask)
    return by_queries(plain.mix_values, [y], [mix, v], mask)


def by_queries(
    fn: Callable[..., Tensor],
    rows: Sequence[Tensor | None],
    whole: Sequence[Tensor | None],
    mask: Tensor | None = None,
    numbers: int = 1,
) -> Tensor:
    """`fn(*rows, *whole, mask)`, `(..., N, e)`, for a function of each query alone: a block of
    queries at a time, recomputed in the backward.

    Args:
        fn: of the rows of some queries, of `whole`, and of the mask of these queries.
        rows: tensors `(..., N, x)`, split along N; None stays None.
        whole: tensors with a second last axis of keys M, which every block sees.
        mask: boolean or None; split where its second last axis is N.
        numbers: values that `fn` holds for a query and key.
    """
    split = [x for x in rows if x is not None]
    count, keys = split[0].shape[-2], next(x for x in whole if x is not None).shape[-2]
    if torch.compiler.is_exporting():  # for any number of samples and queries
        return fn(*rows, *whole, mask)
    named = {f"argument {i}": x for i, x in enumerate((*rows, *whole, mask))}
    each = math.prod(broadcast_leading("by_queries", **named)) * keys * numbers
    step = max(1, _room(CHUNK, split[0]) // max(1, each))

    def parts(x: Tensor | None, cut: bool) -> Sequence[Tensor | None]:
        return x.split(step, -2) if x is not None and cut else [x] * -(-count // step)

    masked = mask is not None and mask.dim() > 1 and mask.shape[-2] == count
    columns = [*(parts(x, True) for x in rows), *(parts(x, False) for x in whole)]
    blocks = [_recompute(fn, *row) for row in zip(*columns, parts(mask, masked), strict=True)]
    return torch.cat(blocks, -2) if len(blocks) > 1 else blocks[0]
