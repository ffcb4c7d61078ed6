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
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kart.kernels.family import Family, Product
from kart.kernels.plain import pullback, wide, wide_dtype
from kart.kernels.transforms import unseen, untransformed

Features = Callable[[Tensor], Tensor]

# floats of features in a block, 1 MiB of float32: whole samples and heads join up to it, queries
# are parted above twice of it. A level-2 cache holds two such buffers; what smaller ones would
# gain, calls cost
BLOCK = 2**18


class _Blocks:
    """A product in blocks: some of its `G` groups (heads; or samples and heads, where each sample
    has its own coefficients), of the `S` samples that share coefficients, and of the queries.

    A call into torch costs as much as a pass over a small block, and more after a matrix product:
    whatever can be made or cut before the first block is.
    """

    def __init__(self, product: Product, buffers: int):
        family, q, k, _, self.mask, scale = product
        self.family, self.own, self.lead = family, product.own, q.shape[:2]
        queries = self.laid(wide(q) * scale)
        self.sizes = queries.shape[:3]
        self.keys, self.row = k.shape[2], k.shape[2] * family.width
        self.steps = self._steps()
        self.q = [x.flatten(0, 1) for x in self.parts(queries, 0, 1, 2)]
        self.k = [x.flatten(0, 1) for x in self.parts(self.laid(wide(k)), 0, 1)]
        count = math.prod(self.steps)
        self.scores = queries.new_empty(count * self.keys)
        self.buffers = queries.new_empty(buffers, count * self.row)
        # a product with 0 is a pass, filling by a mask takes 25 times as long on a CPU; of what is
        # hidden the features are those of the score 0
        masked = self.mask is not None and q.device.type == "cpu"
        self.multiplies = masked and bool(family.features(q.new_zeros(1)).isfinite().all())

    def _steps(self) -> tuple[int, int, int]:
        """Groups, samples and queries of a block: samples join first, one product has them all."""
        groups, samples, queries = self.sizes
        budget = BLOCK * torch.get_num_threads()
        parts = -(-self.row * queries // (2 * budget))
        rows = min(queries, max(64, -(-queries // parts)))
        joined = max(1, budget // (self.row * rows)) if rows == queries else 1
        step = min(samples, joined)
        return min(groups, joined // step), step, rows

    def laid(self, x: Tensor) -> Tensor:
        """`(B or 1, H, ...)` to `(G, S or 1, ...)`."""
        return x.flatten(0, 1).unsqueeze(1) if self.own else x.transpose(0, 1)

    def unlaid(self, x: Tensor) -> Tensor:
        """`(G, S or 1, ...)` to `(B or 1, H, ...)`."""
        return x.squeeze(1).unflatten(0, self.lead) if self.own else x.transpose(0, 1)

    def zeros(self, like: Tensor) -> Tensor:
        """`(G, S, a, b)` for `like (B, H, a, b)`, whose parts `(g, s, ..)` flatten as views."""
        groups, samples, _ = self.sizes
        joined = self.steps[0] > 1 and not self.own
        shape = (groups, samples) if joined else self.lead
        x = torch.zeros(*shape, *like.shape[2:], dtype=wide_dtype(like), device=like.device)
        return x if joined else self.laid(x)

    def parts(self, x: Tensor, *axes: int) -> list[Tensor]:
        """The part of `x` in every block; `axes` are those of its groups, samples and queries, as
        far as it has them.
        """
        found = [x]
        for axis, size, step in itertools.zip_longest(axes, self.sizes, self.steps):
            if step >= size:
                continue
            if axis is None or x.shape[axis] != size:
                found = [y for y in found for _ in range(0, size, step)]
            else:
                found = [part for y in found for part in y.split(step, axis)]
        return found

    def matrices(self, x: Tensor) -> list[Tensor]:
        """`(g, a, b)` of every block, of `x (B or 1, H, a, b)`."""
        return [part.squeeze(1) for part in self.parts(self.laid(x), 0)]

    def _hidden(self) -> Iterator[Tensor | None]:
        """Of every block the pairs that are hidden, `(g or 1, M or 1, s or 1, n or 1)`."""
        if self.mask is None:
            yield from [None] * len(self.q)
        elif not self.own:
            yield from (~x for x in self.parts(self.laid(self.mask.mT).transpose(1, 2), 0, 2, 3))
        else:
            # laid out as a whole, a mask that samples or heads share would be repeated for each
            whole = self.mask.mT.expand(*self.lead, -1, -1)
            groups = torch.arange(self.sizes[0], device=whole.device)
            for own in groups.split(self.steps[0]):
                some = ~whole[own // self.lead[1], own % self.lead[1]].unsqueeze(2)
                step = self.steps[2] if some.shape[3] > 1 else 1
                blocks = -(-self.sizes[2] // self.steps[2])
                yield from itertools.islice(itertools.cycle(some.split(step, 3)), blocks)

    def tiles(self) -> Iterator["_Tile"]:
        """The blocks; the next one overwrites the scores and features of the one before."""
        tiles: dict[tuple[int, int], _Tile] = {}
        for q, k, hidden in zip(self.q, self.k, self._hidden(), strict=True):
            size = q.shape[0], q.shape[1]
            if size not in tiles:
                tiles[size] = _Tile(self, *size)
            tiles[size].load(q, k, hidden)
            yield tiles[size]


class _Tile:
    """Blocks of one size: scores, features, and what the backward needs to differentiate."""

    def __init__(self, blocks: _Blocks, batch: int, queries: int):
        self.family = family = blocks.family
        self.multiplies = blocks.multiplies
        samples = blocks.sizes[1] if blocks.steps[0] > 1 else batch
        shape = (batch // samples, samples, blocks.keys, queries)
        count = math.prod(shape)
        self.scores = blocks.scores[:count].view(batch, *shape[2:])  # (G S, M, n)
        self.x = self.scores.view(shape).transpose(1, 2)  # (G, M, S, n)
        wide_shape = (shape[0], family.width, *self.x.shape[1:])
        room = [y[: count * family.width].view(wide_shape) for y in blocks.buffers]
        self.features, self.pulled = room[0], room[-1]  # (G, K, M, S, n)
        self.matrix, self.pulled_matrix = (
            y.view(shape[0], family.width * shape[2], -1) for y in (self.features, self.pulled)
        )  # (G, K M, S n)
        self.fill, self.folds = family.own("fill"), family.own("fold") is not None
        # of the two buffers the second is that of a backward
        self.pulls = len(room) > 1 and not self.folds
        self.pairs = [*zip(self.features.unbind(1), self.pulled.unbind(1), strict=True)]

    def load(self, q: Tensor, k: Tensor, hidden: Tensor | None) -> None:
        self.q, self.k, self.hidden = q, k, hidden  # (G S, n or M, d)
        torch.bmm(k, q.mT, out=self.scores)
        if hidden is not None:
            self.x.masked_fill_(hidden, 0)
        if self.fill is not None and not self.pulls:
            self.fill(self.features, self.x)
        else:
            self.features.copy_(self._made().movedim(-1, 1))
        if hidden is not None and self.multiplies:
            self.features.mul_((~hidden).to(self.x.dtype).unsqueeze(1))
        elif hidden is not None:
            self.features.masked_fill_(hidden.unsqueeze(1), 0)

    def _made(self) -> Tensor:
        """Features of the scores; where `score_gradient` pulls through them, with their graph."""
        if not self.pulls:
            return self.family.features(self.x)
        with untransformed(), torch.enable_grad():
            self.leaf = self.x.detach().requires_grad_()
            self.traced = self.family.features(self.leaf)
            return self.traced.detach()

    def score_gradient(self, slopes: Tensor, dy: Tensor) -> Tensor:
        """`dL/ds`, `(G S, M, n)`, from `slopes (G, K M, r)` and `dy (G, r, S n)`; ends the scores
        and features.
        """
        torch.bmm(slopes, dy, out=self.pulled_matrix)
        if self.folds:
            torch.mul(*self.pairs[0], out=self.x)
            for features, pulled in self.pairs[1:]:
                self.x.addcmul_(features, pulled)
            return self.scores
        if not self.traced.requires_grad:  # they depend on no score
            return self.scores.zero_()
        with untransformed():
            cotangent = self.pulled.movedim(1, -1)
            (gradient,) = torch.autograd.grad(self.traced, self.leaf, cotangent)
        if self.hidden is not None:
            gradient = gradient.masked_fill(self.hidden, 0)
        return gradient.transpose(1, 2).flatten(0, 1)


def _matrices(coefs: Tensor) -> Tensor:
    """`coefs (B, H, r, M, K)` as matrices `(B, H, r, K M)`, in at least float32."""
    return wide(coefs).transpose(-1, -2).flatten(-2)


def forward(product: Product) -> Tensor:
    """`y (B, H, N, r)`, contiguous, in the dtype of q."""
    q, coefs = product.q, product.coefs
    shape = (*q.shape[:3], coefs.shape[2])
    if 0 in shape:
        return q.new_empty(shape)
    blocks, units = _Blocks(product, 1), shape[-1]
    groups, samples, queries = blocks.sizes
    y = wide(q.new_empty(0)).new_empty(groups, units, samples, queries)
    for tile, matrix, part in zip(
        blocks.tiles(), blocks.matrices(_matrices(coefs)), blocks.parts(y, 0, 2, 3), strict=True
    ):
        part.copy_(torch.bmm(matrix, tile.matrix).view_as(part))
    return blocks.unlaid(y.permute(0, 2, 3, 1)).to(q.dtype).contiguous()


def backward(product: Product, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`dq (B, H, N, d)`, `dk (B, H, M, d)` and `dcoefs (B or 1, H, r, M, K)`, contiguous."""
    family, q, k, coefs, _, scale = product
    if not dy.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(coefs)
    blocks, fold = _Blocks(product, 2), family.own("fold")
    slopes = wide(coefs).transpose(-1, -2)
    slopes = (slopes if fold is None else fold(slopes)).flatten(-2).mT.contiguous()
    given = blocks.laid(wide(dy)).permute(0, 3, 1, 2).contiguous()  # (G, r, S, N)
    dmatrices = torch.zeros_like(_matrices(coefs), memory_format=torch.contiguous_format)
    dq, dk = blocks.zeros(q), blocks.zeros(k)
    for tile, dys, slope, dmatrix, dqs, dks in zip(
        blocks.tiles(),
        [x.flatten(2) for x in blocks.parts(given, 0, 2, 3)],
        blocks.matrices(slopes),
        blocks.matrices(dmatrices),
        [x.flatten(0, 1) for x in blocks.parts(dq, 0, 1, 2)],
        [x.flatten(0, 1) for x in blocks.parts(dk, 0, 1)],
        strict=True,
    ):
        dmatrix.baddbmm_(dys, tile.matrix.mT)
        ds = tile.score_gradient(slope, dys)
        torch.bmm(ds.mT, tile.k, out=dqs)
        dks.baddbmm_(ds, tile.q)
    dcoefs = dmatrices.unflatten(-1, (family.width, -1)).transpose(-1, -2)
    return (
        blocks.unlaid(dq.mul_(scale)).to(q.dtype).contiguous(),
        blocks.unlaid(dk).to(k.dtype).contiguous(),
        dcoefs.to(coefs.dtype).contiguous(),
    )


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
        return fold, fold(torch.eye(family.width, dtype=torch.float64, device="cpu")).tolist()


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
        """`(S, H, a, b)` to `(G, a, S, b)`."""
        return x.flatten(0, 1).unsqueeze(2) if self.own else x.permute(1, 2, 0, 3)

    def ungroup(self, x: Tensor) -> Tensor:
        """`(G, a, S, b)` back to `(S, H, a, b)`."""
        return x.squeeze(2).unflatten(0, (self.samples, -1)) if self.own else x.permute(2, 0, 1, 3)

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
    step = max(1, BLOCK * torch.get_num_threads() // size)
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
        adjoint = fold(torch.eye(width, dtype=wide(coefs).dtype, device=coefs.device)).mT
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
