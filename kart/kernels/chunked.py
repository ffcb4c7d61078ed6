"""The "torch" engine: the streamed product in chunks of torch operations, recomputing backward.

Everything here takes the raw layout of `kart.kernels.family.Product`. `forward` and `backward` are
the raw operations; they write into buffers and are seen by no transform. `tangent` and
`backward_tangent` are their derivatives, some samples at a time, in operations that transforms of
any order go through.

A chunk holds its features transposed, `(K M) x queries`, so that all K features meet the
coefficients in one matrix product whose long side is contiguous: 2-3 x faster on a CPU than K
skinny products.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart.kernels.family import Family, Product
from kart.kernels.plain import pullback, wide
from kart.kernels.transforms import fresh_keys, unseen, untransformed

Features = Callable[[Tensor], Tensor]

# floats of features in a chunk: whole samples join it up to 1 MiB, about the level-2 cache of a
# core; the heads of one sample, which share the cost of the calls, up to 4 MiB
SAMPLES_CHUNK = 2**18
CHUNK = 2**20


class _Chunk(NamedTuple):
    samples: slice
    heads: slice
    queries: slice


def _chunks(batch: int, heads: int, queries: int, row: int) -> Iterator[_Chunk]:
    """Slices of (sample, head, query), `row` features for each query."""
    threads = torch.get_num_threads()
    budget = CHUNK * threads
    rows = queries
    if row * queries > budget:
        rows = max(64, SAMPLES_CHUNK * threads // row)
    step_heads = max(1, min(heads, budget // (row * rows))) if rows == queries else 1
    step = max(1, SAMPLES_CHUNK * threads // (row * rows * heads)) if step_heads == heads else 1
    for b in range(0, batch, step):
        for h in range(0, heads, step_heads):
            for n in range(0, queries, rows):
                yield _Chunk(
                    slice(b, min(b + step, batch)),
                    slice(h, min(h + step_heads, heads)),
                    slice(n, min(n + rows, queries)),
                )


def _at(x: Tensor, axis_slices: tuple[slice, ...]) -> Tensor:
    """`x` at the slices, with axes of size 1 kept whole."""
    for axis, part in enumerate(axis_slices):
        if x.shape[axis] not in (1, part.stop - part.start):
            x = x.narrow(axis, part.start, part.stop - part.start)
    return x


def _group(x: Tensor, own: bool) -> Tensor:
    """`(S, H, a, b)` to `(G, a, S, b)`."""
    return x.flatten(0, 1).unsqueeze(2) if own else x.permute(1, 2, 0, 3)


def _ungroup(x: Tensor, samples: int, own: bool) -> Tensor:
    """`(G, a, S, b)` back to `(S, H, a, b)`."""
    return x.squeeze(2).unflatten(0, (samples, -1)) if own else x.permute(2, 0, 1, 3)


class _Tile:
    """One chunk: its scores, features and, for the backward, what it needs to differentiate.

    `G` groups (heads; or samples and heads, where each sample has its own coefficients), each with
    `S` samples that share coefficients.
    """

    def __init__(self, product: Product, chunk: _Chunk, buffer: Tensor):
        family, scale = product.family, product.scale
        q, k = _at(product.q, chunk), _at(product.k, chunk[:2])
        self.family = family
        self.own = product.own
        self.samples, self.heads, self.queries, _ = q.shape
        self.keys = k.shape[2]
        # torch.bmm on contiguous copies: matmul would copy both operands of a four-axis product
        self.q = (wide(q) * scale).flatten(0, 1)  # (S H, n, d)
        self.k = wide(k).flatten(0, 1).contiguous()
        x = self.group(self.split(torch.bmm(self.k, self.q.mT)))  # (G, M, S, n)
        self.hidden = None
        if product.mask is not None:
            shape = (self.samples, self.heads, self.keys, self.queries)
            self.hidden = self.group(~_at(product.mask, chunk).mT.expand(shape))
            x = x.masked_fill(self.hidden, 0)
        width = family.width
        shape = (x.shape[0], width, *x.shape[1:])
        self.features = buffer[: x.numel() * width].view(shape)  # (G, K, M, S, n)
        fill = family.own("fill")
        if fill is not None:
            fill(self.features, x)
        else:
            self.features.copy_(family.features(x).movedim(-1, 1))
        self.x = x
        if self.hidden is not None:
            self.features.masked_fill_(self.hidden[:, None], 0)

    def split(self, x: Tensor) -> Tensor:
        """`(S H, ...)` to `(S, H, ...)`."""
        return x.view(self.samples, self.heads, *x.shape[1:])

    def group(self, x: Tensor) -> Tensor:
        return _group(x, self.own)

    def ungroup(self, x: Tensor) -> Tensor:
        return _ungroup(x, self.samples, self.own)

    def matrix(self) -> Tensor:
        groups, width, keys = self.features.shape[:3]
        return self.features.view(groups, width * keys, -1)

    def score_gradient(self, slopes: Tensor, dy: Tensor, buffer: Tensor) -> Tensor:
        """`dL/ds`, `(S H, M, n)`, from `slopes (G, K M, r)` and `dy (G, r, S n)`; ends the
        features.
        """
        shape = self.features.shape
        pulled = buffer[: self.features.numel()].view(shape)
        torch.bmm(slopes, dy, out=pulled.view(shape[0], shape[1] * shape[2], -1))
        if self.family.own("fold") is not None:
            gradient = self.features[:, 0] * pulled[:, 0]
            for j in range(1, self.family.width):
                gradient.addcmul_(self.features[:, j], pulled[:, j])
        else:
            include, exclude = fresh_keys()
            with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
                (gradient,) = pullback(self.family.features, self.x)(pulled.movedim(1, -1))
            if self.hidden is not None:
                gradient = gradient.masked_fill(self.hidden, 0)
        return self.ungroup(gradient).flatten(0, 1)


def _matrices(coefs: Tensor) -> Tensor:
    """`coefs (B, H, r, M, K)` as matrices `(B, H, r, K M)`, in at least float32."""
    return wide(coefs).transpose(-1, -2).flatten(-2)


def _grouped(x: Tensor, chunk: _Chunk) -> Tensor:
    return _at(x, (chunk.samples, chunk.heads)).flatten(0, 1)


def _buffer(product: Product) -> tuple[list[_Chunk], Tensor]:
    batch, heads, queries, _ = product.q.shape
    row = product.k.shape[2] * product.family.width
    chunks = list(_chunks(batch, heads, queries, row))
    largest = max(
        (c.samples.stop - c.samples.start)
        * (c.heads.stop - c.heads.start)
        * (c.queries.stop - c.queries.start)
        for c in chunks
    )
    return chunks, wide(product.q.new_empty(0)).new_empty(largest * row)


def forward(product: Product) -> Tensor:
    """`y (B, H, N, r)`, contiguous, in the dtype of q."""
    q, coefs = product.q, product.coefs
    y = q.new_empty(*q.shape[:3], coefs.shape[2])
    if y.numel() == 0:
        return y
    matrices = _matrices(coefs)
    chunks, buffer = _buffer(product)
    for chunk in chunks:
        tile = _Tile(product, chunk, buffer)
        hidden = torch.bmm(_grouped(matrices, chunk), tile.matrix())  # (G, r, S n)
        hidden = hidden.view(*hidden.shape[:2], -1, tile.queries)
        _at(y, chunk).copy_(tile.ungroup(hidden).mT)
    return y


def backward(product: Product, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`dq (B, H, N, d)`, `dk (B, H, M, d)` and `dcoefs (B or 1, H, r, M, K)`, contiguous."""
    family, q, k, coefs, _, scale = product
    keys, width = coefs.shape[3:]
    sums = wide(q.new_empty(0))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = sums.new_zeros(k.shape)
    dmatrices = sums.new_zeros(*coefs.shape[:3], width * keys)
    if dy.numel():
        fold = family.own("fold")
        slopes = wide(coefs).transpose(-1, -2)
        slopes = (slopes if fold is None else fold(slopes)).flatten(-2).mT.contiguous()
        chunks, buffer = _buffer(product)
        pulled = torch.empty_like(buffer)
        for chunk in chunks:
            tile = _Tile(product, chunk, buffer)
            dyt = tile.group(wide(_at(dy, chunk)).mT).flatten(2)  # (G, r, S n)
            # a view: the chunk covers whole samples or one group of heads
            target = _at(dmatrices, chunk[:2])
            target += torch.bmm(dyt, tile.matrix().mT).view(target.shape)
            ds = tile.score_gradient(_grouped(slopes, chunk), dyt, pulled)  # (S H, M, n)
            _at(dq, chunk).copy_(tile.split(torch.bmm(ds.mT, tile.k).mul_(scale)))
            part = _at(dk, chunk[:2])
            part += tile.split(torch.bmm(ds, tile.q))
    dcoefs = dmatrices.unflatten(-1, (width, keys)).transpose(-1, -2)
    return dq, dk.to(k.dtype), dcoefs.to(coefs.dtype).contiguous()


def _slope(features: Features) -> Features:
    """The derivative of elementwise features, from two reverse passes: the first, `u -> sum_j u_j
    f_j'`, is linear in u, and its own pullback of 1 is every `f_j'`. Forward mode would do it in
    one, but does not nest in the jvp rule of a Function (`torch.func.linearize` breaks).
    """

    def slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            value, first = torch.func.vjp(features, x)[:2]
            second = pullback(lambda u: first(u)[0], torch.zeros_like(value))
            return second(torch.ones_like(x))[0]

    return slope


def _folding(family: Family) -> tuple[Callable[[Tensor], Tensor], list[list[float]]]:
    """The map of coefficients `(..., K, M)` to those of the derivative, in terms of the features
    that `_features` gives for it, and its K x K matrix.
    """
    fold = family.own("fold") or (lambda coefs: coefs)
    with untransformed():
        return fold, fold(torch.eye(family.width, dtype=torch.float64)).tolist()


def _features(family: Family, x: Tensor, order: int, raw: bool) -> list[Tensor]:
    """Features of `x (G, ...)` and their derivatives up to `order`, each `(G, K, ...)`; where the
    family folds, the features again, which times folded coefficients are the derivatives. `raw`
    where the family fills them in and nothing needs to see it.
    """
    fold = family.own("fold")
    if raw:
        values = x.new_empty(x.shape[0], family.width, *x.shape[1:])
        family.own("fill")(values, x)
        return [values] * (order + 1)
    fns = [family.features]
    for _ in range(order if fold is None else 0):
        fns.append(_slope(fns[-1]))
    found = [fn(x).movedim(-1, 1) for fn in fns]
    return found if fold is None else found * (order + 1)


def _open(family: Family, *tensors: Tensor | None) -> Any:
    """A block with (raw, tensors), as in `_features`."""
    if family.own("fill") is None or family.own("fold") is None:
        return contextlib.nullcontext((False, list(tensors)))
    return unseen(*tensors)


def _product(
    start: Tensor, x: Tensor, y: Tensor, terms: Iterable[tuple[int, int, float]], raw: bool
) -> Tensor:
    """`start (G, ...)` plus the sum of `w x_i y_j`, of two `(G, K, ...)`, over terms `(i, j, w)`;
    where `raw`, in place.
    """
    # vmap has no batching rule for the other
    add = Tensor.addcmul_ if raw else torch.addcmul
    for i, j, w in terms:
        start = add(start, x[:, i], y[:, j], value=w)
    return start


class _Moving:
    """Some samples of moving scores: `features` of the scores and of their derivatives up to
    `order`, `(G, K, M, S, n)` each, and `speed (G, M, S, n)`, the tangent of the scores.
    """

    def __init__(
        self, family: Family, points: Sequence[Any], scale: float, order: int, own: bool, raw: bool
    ):
        *vectors, mask = points
        q, k, tq, tk = (wide(x).flatten(0, 1) for x in vectors)  # (S H, n or M, d)
        self.q, self.k, self.tq, self.tk = q * scale, k, tq * scale, tk
        self.samples, self.own = vectors[0].shape[0], own
        x = torch.bmm(k, self.q.mT)
        speed = torch.baddbmm(torch.bmm(k, self.tq.mT), tk, self.q.mT)
        # contiguous, so that what follows runs over all keys and queries of a feature at once
        x, speed = (self.group(y.unflatten(0, (self.samples, -1))).contiguous() for y in (x, speed))
        hidden = None
        if mask is not None:
            shape = (*vectors[0].shape[:2], k.shape[1], q.shape[1])
            hidden = self.group(~mask.mT.expand(shape))
            x, speed = x.masked_fill(hidden, 0), speed.masked_fill(hidden, 0)
        self.speed = speed
        self.features = _features(family, x, order, raw)
        if hidden is not None:
            self.features = [f.masked_fill(hidden[:, None], 0) for f in self.features]

    def group(self, x: Tensor) -> Tensor:
        return _group(x, self.own)

    def ungroup(self, x: Tensor) -> Tensor:
        return _ungroup(x, self.samples, self.own)

    def moved(self) -> Tensor:
        """The tangent of the features, or what folded coefficients make it, `(G, K M, S n)`."""
        return _tall(self.features[1] * self.speed[:, None])


def _tall(x: Tensor) -> Tensor:
    """`(G, K, M, S, n)` to `(G, K M, S n)`."""
    return x.flatten(3).flatten(1, 2)


def _parts(q: Tensor, coefs: Tensor) -> Iterator[slice]:
    """Slices of samples whose features fit a chunk, or of one."""
    batch, heads, queries, _ = q.shape
    size = max(1, coefs.shape[3] * coefs.shape[4] * heads * queries)
    step = max(1, SAMPLES_CHUNK * torch.get_num_threads() // size)
    for b in range(0, batch, step):
        yield slice(b, min(b + step, batch))


def _part(x: Any, part: slice) -> Any:
    """`(B or 1, ...)`, or None, at some samples."""
    return x if x is None or x.shape[0] == 1 else x[part]


def tangent(
    family: Family,
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The derivative of `forward` at `primals` (q, k, coefs) along `tangents`, `(B, H, N, r)`."""
    with _open(family, *primals, *tangents, mask) as (raw, (q, k, coefs, tq, tk, tcoefs, mask)):
        if not q.shape[0]:
            return q.new_zeros(*q.shape[:3], coefs.shape[2])
        own, fold = coefs.shape[0] > 1, _folding(family)[0]
        matrices = _matrices(tcoefs), fold(wide(coefs).mT).flatten(-2)
        found = []
        for part in _parts(q, coefs):
            points = [_part(x, part) for x in (q, k, tq, tk, mask)]
            moving = _Moving(family, points, scale, 1, own, raw)
            still, slopes = (_part(x, part).flatten(0, 1) for x in matrices)
            values = moving.features[0]
            y = torch.baddbmm(torch.bmm(still, _tall(values)), slopes, moving.moved())
            found.append(moving.ungroup(y.unflatten(-1, values.shape[3:])).mT)
        return torch.cat(found).to(q.dtype)


def backward_tangent(
    family: Family,
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of `backward` at `primals` (dy, q, k, coefs) along `tangents`."""
    with _open(family, *primals, *tangents, mask) as (raw, tensors):
        dy, q, k, coefs, tdy, tq, tk, tcoefs, mask = tensors
        if not q.shape[0]:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(coefs)
        own = coefs.shape[0] > 1
        fold, matrix = _folding(family)
        width, keys = family.width, coefs.shape[3]
        same = [(j, j, 1.0) for j in range(width)]
        folded = [(i, j, w) for i, row in enumerate(matrix) for j, w in enumerate(row) if w]
        adjoint = torch.tensor(matrix, dtype=torch.float64).to(wide(coefs)).mT
        slopes, tslopes = (fold(wide(x).mT).flatten(-2) for x in (coefs, tcoefs))
        both = torch.cat([slopes, tslopes], dim=2)  # (B or 1, H, 2 r, K M)
        dq, dk, dcoefs = [], [], []
        for part in _parts(q, coefs):
            points = [_part(x, part) for x in (q, k, tq, tk, mask)]
            moving = _Moving(family, points, scale, 2, own, raw)
            values, slope, curve = moving.features
            dyt, tdyt = (moving.group(wide(x[part]).mT).flatten(2) for x in (dy, tdy))
            pulls = [(slopes, dyt), (both, torch.cat([tdyt, dyt], dim=1))]
            pulled, tpulled = (
                torch.bmm(_part(x, part).flatten(0, 1).mT, y).view_as(slope) for x, y in pulls
            )
            zeros = torch.zeros_like(moving.speed)
            tdx = _product(zeros, curve, pulled, folded, raw) * moving.speed
            tdx = _product(tdx, slope, tpulled, same, raw)  # (G, M, S, n)
            dx = _product(torch.zeros_like(zeros), slope, pulled, same, raw)
            dx, tdx = (moving.ungroup(x).flatten(0, 1) for x in (dx, tdx))  # (S H, M, n)
            dq.append(torch.baddbmm(torch.bmm(tdx.mT, moving.k), dx.mT, moving.tk) * scale)
            dk.append(torch.baddbmm(torch.bmm(tdx, moving.q), dx, moving.tq))
            still, moved = (
                torch.bmm(x, y.mT).unflatten(-1, (width, keys))
                for x, y in ((tdyt, _tall(values)), (dyt, moving.moved()))
            )
            dcoefs.append((still + adjoint @ moved).mT)  # (G, r, M, K)
        total = torch.cat(dcoefs) if own else functools.reduce(torch.add, dcoefs)
        return (
            torch.cat(dq).view_as(q).to(q.dtype),
            torch.cat(dk).view_as(k).to(k.dtype),
            total.view_as(coefs).to(coefs.dtype),
        )
