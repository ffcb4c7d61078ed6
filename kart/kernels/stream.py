"""Products in chunks that are computed again in the backward: full rank, units nonlinear in their
parameters, masks that differ between queries.

Forward mode differentiates the chunks themselves: alone it holds one chunk at a time, under a
reverse pass it keeps them all. So does torch.compile, which plans the memory by itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kart.kernels import plain
from kart.kernels.core import (
    broadcast_leading,
    check,
    check_mask,
    contract,
    flat_mask,
    forward_levels,
    no_autocast,
)

# scores in a chunk: 4 MiB of float32, a few of which are alive at a time
CHUNK = 2**20


class _Recompute(Function):
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
    def backward(ctx, gradient):
        tensors = list(ctx.saved_tensors)
        learned = [i for i, x in enumerate(tensors) if x is not None and x.is_floating_point()]

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
        if torch.compiler.is_compiling() or forward_levels():
            return fn(*tensors)
        return _Recompute.apply(fn, *tensors)  # type: ignore[no-any-return]


def _flat(lead: list[int], *tensors: Tensor) -> list[Tensor]:
    """Tensors `(..., a, b)` as `(B, heads, a, b)`, for the common leading axes and heads."""
    return [x.expand(*lead, *x.shape[-2:]).reshape(-1, lead[-1], *x.shape[-2:]) for x in tensors]


def _masks(mask: Tensor | None, lead: list[int], step: int, parts: int) -> list[Tensor | None]:
    """The mask of each part of `step` samples."""
    if mask is None:
        return [None] * parts
    mask = flat_mask(mask, lead)
    return [mask] * parts if mask.shape[0] == 1 else list(mask.split(step))


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
    lead = broadcast_leading(
        "contract_values",
        q=q.shape[:-2],
        k=k.shape[:-2],
        v=v.shape[:-2],
        coefs=coefs.shape[:1],
        mask=() if mask is None else mask.shape[:-2],
    )
    qs, ks, vs = _flat([*lead], q, k, v)
    batch, heads = qs.shape[:2]
    if not batch:
        return q.new_zeros(*lead, q.shape[-2], v.shape[-1])
    coefs = coefs.expand(heads, *coefs.shape[1:])
    step = max(1, CHUNK // (v.shape[-1] * coefs.shape[2:].numel() * heads))
    masks = _masks(mask, [*lead[:-1]], step, -(-batch // step))

    def one(coefs: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        mixed = torch.einsum("hpmj,bhpe->bhemj", coefs.to(v.dtype), v)
        return contract(basis, mixed.to(coefs.dtype), q, k, mask, scale, engine)

    parts = [
        _recompute(one, coefs, *tensors)
        for tensors in zip(qs.split(step), ks.split(step), vs.split(step), masks, strict=True)
    ]
    y = torch.cat(parts) if len(parts) > 1 else parts[0]
    return y.reshape(*lead, *y.shape[-2:])


def contract_units(
    basis: Any,
    units: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`y[n, p] = sum_m mask[n, m] phi_pm(scale q_n . k_m)`, `(..., H, N, r)`, for any family.

    One unit p and a few samples at a time, recomputed in the backward: the memory is O(N M),
    independent of r and of the batch. There is no matrix product to do it with, so it costs several
    times `contract`.

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
    mask_lead = () if mask is None else mask.shape[:-2]
    unit_heads = {f"units[{name!r}]": shape[:1] for name, shape in shapes.items()}
    *lead, heads = broadcast_leading(
        "contract_units", q=q.shape[:-2], k=k.shape[:-2], mask=mask_lead, **unit_heads
    )
    batch = math.prod(lead)
    rows, names = q.shape[-2], list(units)
    q, k = _flat([*lead, heads], q, k)
    step = max(1, CHUNK // (heads * rows * keys))
    masks = _masks(mask, lead, step, -(-batch // step))

    def one(q: Tensor, k: Tensor, mask: Tensor | None, *leaves: Tensor) -> Tensor:
        lifted = {name: leaf.unsqueeze(1) for name, leaf in zip(names, leaves, strict=True)}
        values = basis.apply(lifted, plain.scores(q, k, scale))  # (b, H, N, M)
        if mask is not None:
            values = torch.where(mask, values, 0)
        return values.sum(-1)

    if not batch:
        return q.new_zeros(*lead, heads, rows, next(iter(ranks))[0])
    # unbind and split: the gradient of a slice would be a tensor of the size of the whole, each
    single = list(zip(*(leaf.unbind(1) for leaf in units.values()), strict=True))
    parts = [
        torch.stack([_recompute(one, qs, ks, ms, *leaves) for leaves in single], -1)
        for qs, ks, ms in zip(q.split(step), k.split(step), masks, strict=True)
    ]
    y = torch.cat(parts) if len(parts) > 1 else parts[0]
    return y.reshape(*lead, heads, rows, -1).to(q.dtype)


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
    lead = broadcast_leading(
        "mix_values",
        y=y.shape[:-2],
        mix=mix.shape[:-2],
        v=v.shape[:-2],
        mask=mask.shape[:-2],
    )
    rows, keys = y.shape[-2], v.shape[-2]
    step = max(1, CHUNK // max(1, math.prod(lead) * keys))
    ys = y.split(step, -2)
    split = mask.dim() > 1 and mask.shape[-2] == rows
    masks = mask.split(step, -2) if split else [mask] * len(ys)
    parts = [
        _recompute(plain.mix_values, *row)
        for row in zip(ys, [mix] * len(ys), [v] * len(ys), masks, strict=True)
    ]
    return torch.cat(parts, -2) if len(parts) > 1 else parts[0]


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
    leads = [x.shape[:-2] for x in (*rows, *whole, mask) if x is not None]
    each = math.prod(torch.broadcast_shapes(*leads)) * keys * numbers
    step = max(1, CHUNK // max(1, each))

    def parts(x: Tensor | None, cut: bool) -> Sequence[Tensor | None]:
        return x.split(step, -2) if x is not None and cut else [x] * -(-count // step)

    masked = mask is not None and mask.dim() > 1 and mask.shape[-2] == count
    columns = [*(parts(x, True) for x in rows), *(parts(x, False) for x in whole)]
    blocks = [_recompute(fn, *row) for row in zip(*columns, parts(mask, masked), strict=True)]
    return torch.cat(blocks, -2) if len(blocks) > 1 else blocks[0]
