"""Attention whose weights are functions of one score, another one for every place.

In memory what is learned is as long as there are places. The compiled engine reads it laid out for
every query and key, gathered before and summed after each call; torch gathers it for a block of
queries at a time.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kart.kernels import fused, plain, stream
from kart.kernels.arguments import broadcast_leading, check, flat_mask, four_axes
from kart.kernels.cpp import weights as compiled
from kart.kernels.cpp.weights import Weighted
from kart.kernels.family import family_of
from kart.kernels.plain import wide_dtype
from kart.kernels.transforms import forward_levels, no_autocast


def looked_up(entries: Tensor, index: Tensor) -> Tensor:
    """The entries `(..., E)` at an index `(N, M)`: `(..., N, M)`."""
    if entries.device.type == "cuda":
        # the gradient of this is summed in a fixed order, that of `index_select` is not there
        return entries[..., index]
    return entries.index_select(-1, index.flatten()).unflatten(-1, index.shape)


def pair_attention(
    basis: Any,
    entries: Tensor,
    index: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    base: str | None = None,
) -> Tensor:
    """`(T + phi(S)) v`, `(..., H, N, e)`, for scores `S = d^-1/2 q k^T`, where T and phi are those
    of the place of query and key; with `base="softmax"` plus `softmax(S) v`.

    Scores are computed again in the backward; no N x M matrix is kept.

    Args:
        basis: a basis that is linear in its coefficients, without a base activation.
        entries: `(H, 1 + K, E)`, of every place T and the K coefficients of phi.
        index: `(N, M)` integers, the place of query n and key m.
        q, k, v: `(..., H, N, d)`, `(..., H, M, d)` and `(..., H, M, e)`.
        mask: boolean, True = attend, broadcasting to `(..., H, N, M)`.

    Raises:
        ValueError: names the argument that does not fit.
    """
    name = "pair_attention"
    check(name, q, k, mask, None, v=v)
    lead = broadcast_leading(name, q=q, k=k, v=v, mask=mask, entries=entries[..., 0])
    q, k, v = four_axes(lead, q, k, v)
    own = entries.to(wide_dtype(q)).expand(lead[-1], -1, -1)[None]
    mask = None if mask is None else flat_mask(mask, lead[:-1])
    form = "beside" if base else "plain"
    with no_autocast(q):
        out = _apply(basis, form, q, k, v, mask, index[None], own)
    return out.reshape(*lead, *out.shape[2:])


def _order(index: Tensor, places: int) -> Tensor:
    """The places in the order of the compiled engine; of what only fills a block it is one more."""
    return compiled.of_matrix(index[None], places).flatten()


def _apply(
    basis: Any,
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    index: Tensor,
    entries: Tensor,
) -> Tensor:
    """`pair_attention` of four axes, index `(1, N, M)` and entries `(B or 1, H, 1 + K, E)`, by the
    engine that can.
    """
    scale = q.shape[-1] ** -0.5
    expression = partial(_in_blocks, basis, form, scale)
    inputs = (q, k, v, mask, index, entries)
    if torch.compiler.is_compiling() or forward_levels() or q.device.type != "cpu":
        return expression(*inputs)
    family = family_of(basis)

    def weighted(q, k, v, mask, index, entries) -> Weighted:
        laid = functional.pad(entries, (0, 1)).index_select(-1, _order(index, entries.shape[-1]))
        return Weighted(family, form, q, k, v, laid.flatten(2), mask, None, scale, matrix=True)

    def forward(*inputs):
        return compiled.forward(weighted(*inputs))

    def backward(gradients, inputs, results):
        *found, dlaid = compiled.backward(weighted(*inputs), *gradients, *results)
        index, entries = inputs[4:]
        order = _order(index, entries.shape[-1])
        dlaid = dlaid.view(-1, len(order))
        sums = dlaid.new_zeros(len(dlaid), entries.shape[-1] + 1).index_add_(1, order, dlaid)
        return *found, sums[:, :-1].reshape(entries.shape)

    if compiled.refuses(Weighted(family, form, q, k, v, entries, mask, None, scale, matrix=True)):
        return expression(*inputs)
    learned, shared = (0, 1, 2, 5), (3, 4, 5)
    op = fused.Fused(forward, backward, lambda *x: (expression(*x),), 1, learned, shared)
    return fused.apply(op, *inputs)[0]


def _in_blocks(
    basis: Any,
    form: str,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    index: Tensor,
    entries: Tensor,
) -> Tensor:
    """The expression, a block of queries at a time, which can be differentiated."""

    def some(index: Tensor, q: Tensor, *rest: Any) -> Tensor:
        k, v, entries, mask = rest
        matrix = looked_up(entries, index)
        return plain.entry_attention(basis, {}, q, k, v, mask, None, form, scale, matrix=matrix)

    # the features, their products with the coefficients, and what derivatives need
    numbers = 2 * (entries.shape[-2] + 1)
    return stream.by_queries(some, [index[0], q], [k, v, entries], mask, numbers)
