"""Attention whose weights have a number, or a function of the score, for every place.

What is learned is as long as there are places. Each engine has it laid out for some queries and all
keys at a time: the compiled one between a look-up and a sum by places, torch with all else.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kart import schema
from kart.kernels import fused, plain, stream
from kart.kernels.arguments import broadcast_leading, check, flat_mask, four_axes
from kart.kernels.cpp import weights as compiled
from kart.kernels.cpp.weights import Weighted
from kart.kernels.family import Family, family_of
from kart.kernels.plain import wide_dtype
from kart.kernels.transforms import forward_levels, mapped, no_autocast

FORMS = ("plain", "inside", "beside")
# numbers that are laid out at a time, 16 MiB of float32
LAID = 2**22


def looked_up(entries: Tensor, index: Tensor) -> Tensor:
    """The entries `(H, ..., E)` at an index `(N, M)`: `(H, ..., N, M)`."""
    if entries.device.type == "cuda":
        # the gradient of this is summed in a fixed order, that of `index_select` is not there
        return entries[..., index]
    # of matrices it is several times as fast as with more axes
    rows = entries.flatten(0, -2).index_select(1, index.flatten())
    return rows.view(*entries.shape[:-1], *index.shape)


def pair_attention(
    basis: Any,
    entries: Tensor,
    index: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    form: str = "plain",
) -> Tensor:
    """`w v`, `(..., H, N, e)`, for weights w of entries `y = T + phi(s)` of the scores `s = d^-1/2
    q k^T`, where T and phi are those of the place of query and key.

    By `form` w is "plain" y, "inside" softmax(s + y) or "beside" y + softmax(s). Scores are
    computed again in the backward; no N x M matrix is kept.

    Args:
        basis: a basis that is linear in its coefficients, or None for y = T, not with "plain".
        entries: `(H, 1 + K, E)`, of every place T and the coefficients of phi, one a feature.
        index: `(N, M)` integers, the place of query n and key m.
        q, k, v: `(..., H, N, d)`, `(..., H, M, d)` and `(..., H, M, e)`.
        mask: boolean, True = attend, broadcasting to `(..., H, N, M)`.

    Raises:
        ValueError: names the argument that does not fit.
    """
    name, size = "pair_attention", (q.shape[-2], k.shape[-2])
    schema.check_choice(name, "form", form, FORMS if basis is not None else FORMS[1:])
    check(name, q, k, mask, None, v=v)
    # a family is not looked for while torch.compile traces
    family = None if basis is None or torch.compiler.is_compiling() else family_of(basis)
    planes = 1 if family is None else 1 + family.width
    if v.dim() < 3 or v.shape[-2] != size[1] or tuple(index.shape) != size:
        raise ValueError(
            f"`{name}` needs `v` (..., H, {size[1]}, e) and `index` {size} for these queries and "
            f"keys, got {tuple(v.shape)} and {tuple(index.shape)}. Take all of the same tokens."
        )
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"`{name}` needs an `index` of int64 or int32, got {index.dtype}. Convert it with "
            "`.long()`."
        )
    known = basis is None or family is not None
    if entries.dim() != 3 or (known and entries.shape[1] != planes):
        raise ValueError(
            f"`{name}` needs `entries` (H, {planes}, places) for this basis, got "
            f"{tuple(entries.shape)}. Put the coefficients after the constant, one a feature."
        )
    lead = broadcast_leading(name, q=q, k=k, v=v, mask=mask, entries=entries.shape[:1])
    q, k, v = four_axes(lead, q, k, v)
    own = entries.to(wide_dtype(q)).expand(lead[-1], -1, -1)[None]
    mask = None if mask is None else flat_mask(mask, lead[:-1])
    with no_autocast(q):
        out = _apply(basis, family, form, q, k, v, mask, index[None], own)
    return out.reshape(*lead, *out.shape[2:])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(tuple(parts), 2) if len(parts) > 1 else parts[0]


def _apply(
    basis: Any,
    family: Family | None,
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
    # the compiled engine has one index for all samples
    traced = torch.compiler.is_compiling() or forward_levels()
    if traced or mapped(index) or q.device.type != "cpu":
        return expression(*inputs)

    def parts(q, k, v, mask, index, *rest) -> Iterator[tuple[Weighted, Tensor, tuple[Tensor, ...]]]:
        """Of some queries the product, the order of its entries, and the others of `rest`."""
        entries, *rest = rest
        numbers, places = math.prod(entries.shape[:3]) * k.shape[2], entries.shape[3]
        # whole blocks of queries, whose entries fit
        step = compiled.BLOCK * max(1, LAID // numbers // compiled.BLOCK)
        padded = functional.pad(entries.flatten(0, 2), (0, 1))
        for i in range(0, q.shape[2], step):
            own, *others = (x[:, :, i : i + step] for x in (q, *rest))
            hidden = mask
            if mask is not None and mask.shape[2] > 1:
                hidden = mask[:, :, i : i + step]
            # what only fills a block has a place of its own, of zeros
            order = compiled.of_matrix(index[:, i : i + step], places).flatten()
            laid = padded.index_select(1, order).view(*entries.shape[:2], -1)
            x = Weighted(family, form, own, k, v, laid, hidden, None, scale, matrix=True)
            yield x, order, tuple(others)

    def forward(*inputs):
        (least, largest), places = map(int, inputs[4].aminmax()), inputs[5].shape[3]
        if largest >= places or least < 0:
            raise ValueError(
                f"`pair_attention` needs an `index` below the {places} places of `entries`, got "
                f"{least if least < 0 else largest}. Give an entry for every place."
            )
        found = [compiled.forward(x) for x, *_ in parts(*inputs)]
        return tuple(_joined(y) for y in zip(*found, strict=True))

    def backward(gradients, inputs, results):
        found, entries = [], inputs[5]
        sums = entries.new_zeros(math.prod(entries.shape[:3]), entries.shape[3] + 1)
        for x, order, given in parts(*inputs, *gradients, *results):
            *own, dlaid = compiled.backward(x, *given)
            found.append(own)
            sums.index_add_(1, order, dlaid.view(len(sums), -1))
        dq, dk, dv = zip(*found, strict=True)
        dentries = sums[:, :-1].reshape(entries.shape)
        return _joined(dq), reduce(torch.add, dk), reduce(torch.add, dv), dentries

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
        matrix = matrix.squeeze(-3) if basis is None else matrix
        return plain.entry_attention(basis, {}, q, k, v, mask, None, form, scale, matrix=matrix)

    # the features, their products with the coefficients, and what derivatives need
    numbers = 2 * (entries.shape[-2] + 1)
    return stream.by_queries(some, [index[0], q], [k, v, entries], mask, numbers)
