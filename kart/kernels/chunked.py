"""The "torch" engine: the streamed product in chunks of torch operations, recomputing backward.

Everything here takes the raw layout of `kart.kernels.family.Product`. `forward` and `backward` are
the raw operations; they write into buffers and are seen by no transform. `tangent` and
`backward_tangent` are their derivatives, in plain out-of-place operations one sample at a time, so
that transforms of any order go through them.

A chunk holds its features transposed, `(K M) x queries`, so that all K features meet the
coefficients in one matrix product whose long side is contiguous: 2-3 x faster on a CPU than K
skinny products.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart.kernels.family import Family, Product
from kart.kernels.plain import pullback, wide
from kart.kernels.transforms import fresh_keys

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
        """`(S, H, a, b)` to `(G, a, S, b)`."""
        return x.flatten(0, 1).unsqueeze(2) if self.own else x.permute(1, 2, 0, 3)

    def ungroup(self, x: Tensor) -> Tensor:
        """`(G, a, S, b)` back to `(S, H, a, b)`."""
        return (
            x.reshape(self.samples, self.heads, *x.shape[1::2])
            if self.own
            else x.permute(2, 0, 1, 3)
        )

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


def _derivatives(family: Family, x: Tensor, order: int) -> list[Tensor]:
    """Features and their derivatives up to `order`, each `(..., K)`."""
    fold = family.own("fold")
    if fold is None:
        fns = [family.features]
        for _ in range(order):
            fns.append(_slope(fns[-1]))
        return [fn(x) for fn in fns]
    matrix = fold(torch.eye(family.width, dtype=x.dtype, device=x.device))
    values = [family.features(x)]
    for _ in range(order):
        values.append(values[-1] @ matrix)
    return values


def _samples(x: Tensor | None, batch: int) -> list[Any]:
    if x is None:
        return [None] * batch
    return list(x.expand(batch, *x.shape[1:]).unbind(0))


def tangent(
    family: Family,
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The derivative of `forward` at `primals` (q, k, coefs) along `tangents`, `(B, H, N, r)`."""

    def sample(q, k, coefs, tq, tk, tcoefs, mask):
        q, k, coefs, tq, tk, tcoefs = (wide(x) for x in (q, k, coefs, tq, tk, tcoefs))
        x = q @ k.mT * scale
        tx = (tq @ k.mT + q @ tk.mT) * scale
        if mask is not None:
            x, tx = torch.where(mask, x, 0), torch.where(mask, tx, 0)
        value, slope = _derivatives(family, x, 1)
        if mask is not None:
            value = torch.where(mask[..., None], value, 0)
        slope = slope * tx[..., None]
        return value.flatten(-2) @ tcoefs.flatten(-2).mT + slope.flatten(-2) @ coefs.flatten(-2).mT

    batch = primals[0].shape[0]
    columns = [_samples(x, batch) for x in (*primals, *tangents, mask)]
    if not batch:
        return primals[0].new_zeros(*primals[0].shape[:3], primals[2].shape[2])
    return torch.stack([sample(*row) for row in zip(*columns, strict=True)]).to(primals[0].dtype)


def backward_tangent(
    family: Family,
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of `backward` at `primals` (dy, q, k, coefs) along `tangents`."""

    def sample(dy, q, k, coefs, tdy, tq, tk, tcoefs, mask):
        dy, q, k, coefs, tdy, tq, tk, tcoefs = (
            wide(x) for x in (dy, q, k, coefs, tdy, tq, tk, tcoefs)
        )
        x = q @ k.mT * scale
        tx = (tq @ k.mT + q @ tk.mT) * scale
        if mask is not None:
            x, tx = torch.where(mask, x, 0), torch.where(mask, tx, 0)
        value, slope, curve = _derivatives(family, x, 2)
        if mask is not None:
            value, slope, curve = (
                torch.where(mask[..., None], f, 0) for f in (value, slope, curve)
            )
        pulled = (dy @ coefs.flatten(-2)).view_as(value)
        tpulled = (tdy @ coefs.flatten(-2) + dy @ tcoefs.flatten(-2)).view_as(value)
        dx = (pulled * slope).sum(-1)
        tdx = (tpulled * slope).sum(-1) + (pulled * curve).sum(-1) * tx
        slope = slope * tx[..., None]
        return (
            (tdx @ k + dx @ tk) * scale,
            (tdx.mT @ q + dx.mT @ tq) * scale,
            (tdy.mT @ value.flatten(-2) + dy.mT @ slope.flatten(-2)).view_as(coefs),
        )

    _, q, k, coefs = primals
    batch = q.shape[0]
    columns = [_samples(x, batch) for x in (*primals, *tangents, mask)]
    if not batch:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(coefs)
    rows = [sample(*row) for row in zip(*columns, strict=True)]
    dq, dk, dcoefs = (list(parts) for parts in zip(*rows, strict=True))
    own = coefs.shape[0] > 1
    return (
        torch.stack(dq).to(q.dtype),
        torch.stack(dk).to(k.dtype),
        (torch.stack(dcoefs) if own else functools.reduce(torch.add, dcoefs)[None]).to(coefs.dtype),
    )
