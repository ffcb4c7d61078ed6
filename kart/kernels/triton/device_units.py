"""Triton kernels of units that are not linear in their parameters,
`y[n, p] = sum_m phi(scale q_n . k_m; theta[p, m])`.

None of them holds an N x M matrix or needs an atomic:

* `forward`: a program owns a block of queries and some ranks and walks over the keys;
* `query_gradient`: a program owns a block of queries and walks over the keys, for dQ;
* `key_gradient`: a program owns a block of keys and walks over a slice of the batch and all
  queries, for dK and dtheta of the ranks FIRST to LAST; dtheta stays in registers until the end of
  the slice. With ADD it adds to the dK of an earlier launch.

A unit is evaluated in registers, a rank after another on the same scores, and again in the
backward: there is no matrix product to do it with. Scores, units, parameters and sums are float32;
only the operands of the products with q and k are rounded, to their dtype.

The parameters are `(batch or 1, H, r, P, M')`, zero beyond M keys, and dY is `(B, H, r, N)`.
"""

import triton
import triton.language as tl

from kart.kernels.triton.device import (
    COUNTS,
    activation,
    load_tile,
    mask_tile,
    rows_at,
    store_tile,
    tile_offsets,
)


@triton.jit
def based(x, theta, UNIT: tl.constexpr, BASE: tl.constexpr, FAST: tl.constexpr):
    """Units at scores x: value, slope, and derivatives by the parameters theta."""
    value, slope, terms = UNIT(x, theta, FAST)
    if BASE != "zero":
        active, rise = activation(x, BASE)
        value += theta[len(theta) - 1] * active
        slope += theta[len(theta) - 1] * rise
        terms += (active,)
    return value, slope, terms


@triton.jit
def _unit(
    x,
    ptr,
    stride,
    KEYS: tl.constexpr,
    AXIS: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    BASE: tl.constexpr,
    FAST: tl.constexpr,
):
    """The units of one rank at scores x: value, slope, and derivatives by the P parameters.

    `ptr` has the parameters of KEYS keys, which are the axis of x other than AXIS.
    """
    theta = ()
    for i in tl.static_range(P):
        row = tl.load(ptr + i * stride + tl.arange(0, KEYS))
        theta += (tl.expand_dims(row, AXIS),)
    return based(x, theta, UNIT, BASE, FAST)


@triton.jit
def _put(tile, total, at, COLUMNS: tl.constexpr):
    """A tile with the column `total` added at the place `at`."""
    return tile + tl.where(tl.arange(0, COLUMNS)[None, :] == at, total[:, None], 0.0)


@triton.jit
def _store_columns(ptr, tile, stride, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes the first columns of a tile to rows `stride` elements apart."""
    inside = (tl.arange(0, ROWS)[:, None] < rows) & (tl.arange(0, COLUMNS)[None, :] < columns)
    at = ptr + tile_offsets(stride, 1, ROWS, COLUMNS)
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def forward(
    q_ptr,
    k_ptr,
    t_ptr,
    mask_ptr,
    y_ptr,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_m,
    k_d,
    t_b,
    t_h,
    t_p,
    t_i,
    mask_b,
    mask_h,
    mask_n,
    mask_m,
    H,
    N,
    M,
    RANK,
    scale,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    BASE: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    groups = tl.cdiv(RANK, R)
    first = tl.program_id(0) % blocks * BLOCK_N
    rank = tl.program_id(0) // blocks % groups * R
    head = (tl.program_id(0) // blocks // groups).to(tl.int64)
    ranks = tl.minimum(R, RANK - rank)
    b = head // H
    h = head % H
    n = first.to(tl.int64)
    q_ptr += b * q_b + h * q_h + n * q_n
    k_ptr += b * k_b + h * k_h
    t_ptr += b * t_b + h * t_h + rank.to(tl.int64) * t_p
    if MASK:
        mask_ptr += b * mask_b + h * mask_h
        if mask_n is not None:
            mask_ptr += n * mask_n
    q = load_tile(q_ptr, tile_offsets(q_n, q_d, BLOCK_N, D), N - first, WIDTH, BLOCK_N, D)
    k_offsets = tile_offsets(k_m, k_d, BLOCK_M, D)
    y = tl.zeros([BLOCK_N, R], tl.float32)
    for m in range(0, M, BLOCK_M):
        k = load_tile(k_ptr, k_offsets, M - m, WIDTH, BLOCK_M, D)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        keep = tl.arange(0, BLOCK_M)[None, :] < M - m
        if MASK:
            keep &= mask_tile(mask_ptr, mask_n, mask_m, N - first, M - m, BLOCK_N, BLOCK_M)
            mask_ptr += BLOCK_M * mask_m
        t_at = t_ptr
        for p in range(ranks):
            value, _, _ = _unit(x, t_at, t_i, BLOCK_M, 0, P, UNIT, BASE, FAST)
            y = _put(y, tl.sum(tl.where(keep, value, 0.0), 1), p, R)
            t_at += t_p
        k_ptr += BLOCK_M * k_m
        t_ptr += BLOCK_M
    _store_columns(y_ptr + (head * N + n) * RANK + rank, y, RANK, N - first, ranks, BLOCK_N, R)


@triton.jit(do_not_specialize=COUNTS)
def query_gradient(
    q_ptr,
    k_ptr,
    t_ptr,
    mask_ptr,
    dy_ptr,
    dq_ptr,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_m,
    k_d,
    t_b,
    t_h,
    t_p,
    t_i,
    mask_b,
    mask_h,
    mask_n,
    mask_m,
    H,
    N,
    M,
    RANK,
    scale,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    BASE: tl.constexpr,
    MASK: tl.constexpr,
    BESIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b = head // H
    h = head % H
    n = first.to(tl.int64)
    q_ptr += b * q_b + h * q_h + n * q_n
    k_ptr += b * k_b + h * k_h
    t_ptr += b * t_b + h * t_h
    dy_ptr += head * N * RANK + n
    if MASK:
        mask_ptr += b * mask_b + h * mask_h
        if mask_n is not None:
            mask_ptr += n * mask_n
    q = load_tile(q_ptr, tile_offsets(q_n, q_d, BLOCK_N, D), N - first, WIDTH, BLOCK_N, D)
    k_offsets = tile_offsets(k_m, k_d, BLOCK_M, D)
    row = tl.arange(0, BLOCK_N)
    dq = tl.zeros([BLOCK_N, D], tl.float32)
    for m in range(0, M, BLOCK_M):
        k = load_tile(k_ptr, k_offsets, M - m, WIDTH, BLOCK_M, D)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        keep = tl.arange(0, BLOCK_M)[None, :] < M - m
        if MASK:
            keep &= mask_tile(mask_ptr, mask_n, mask_m, N - first, M - m, BLOCK_N, BLOCK_M)
            mask_ptr += BLOCK_M * mask_m
        t_at = t_ptr
        dy_at = dy_ptr
        dx = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for _p in range(RANK):
            dy = tl.load(dy_at + row, mask=row < N - first, other=0.0)
            _, slope, _ = _unit(x, t_at, t_i, BLOCK_M, 0, P, UNIT, BASE, FAST)
            dx += slope * dy[:, None]
            t_at += t_p
            dy_at += N
        dx = tl.where(keep, dx, 0.0)
        dq = tl.dot(dx.to(k.dtype), k, dq, input_precision=PRECISION)
        k_ptr += BLOCK_M * k_m
        t_ptr += BLOCK_M
    dq_at, stride = rows_at(dq_ptr, b, h, n, H, N, WIDTH, BESIDE)
    store_tile(dq_at, dq * scale, N - first, stride, WIDTH, BLOCK_N, D, False)


@triton.jit(do_not_specialize=COUNTS)
def key_gradient(
    q_ptr,
    k_ptr,
    t_ptr,
    mask_ptr,
    dy_ptr,
    dk_ptr,
    dt_ptr,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_m,
    k_d,
    t_b,
    t_h,
    t_p,
    t_i,
    mask_b,
    mask_h,
    mask_n,
    mask_m,
    B,
    samples,
    H,
    N,
    M,
    RANK,
    FIRST,
    LAST,
    scale,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    BASE: tl.constexpr,
    MASK: tl.constexpr,
    BESIDE: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    blocks = tl.cdiv(M, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    head = tl.program_id(0) // blocks
    h = (head % H).to(tl.int64)
    start = head // H * samples
    m = first.to(tl.int64)
    # one slice is one sample where the parameters differ between samples
    t_ptr += start.to(tl.int64) * t_b + h * t_h + tl.cast(FIRST, tl.int64) * t_p + m
    k_offsets = tile_offsets(k_m, k_d, BLOCK_M, D)
    q_offsets = tile_offsets(q_n, q_d, BLOCK_N, D)
    column = tl.arange(0, BLOCK_N)
    dt = ()
    for _i in tl.static_range(P):
        dt += (tl.zeros([BLOCK_M, R], tl.float32),)
    # without hoisting: the addresses of dK would hold registers all through the inner loop
    for sample in tl.range(start, tl.minimum(start + samples, B), disable_licm=True):
        b = tl.cast(sample, tl.int64)
        q_at = q_ptr + b * q_b + h * q_h
        k_at = k_ptr + b * k_b + h * k_h + m * k_m
        dy_block = dy_ptr + ((b * H + h) * RANK + FIRST) * N
        if MASK:
            mask_at = mask_ptr + b * mask_b + h * mask_h + m * mask_m
        k = load_tile(k_at, k_offsets, M - first, WIDTH, BLOCK_M, D)
        dk = tl.zeros([BLOCK_M, D], tl.float32)
        for n in tl.range(0, N, BLOCK_N, disable_licm=True):
            q = load_tile(q_at, q_offsets, N - n, WIDTH, BLOCK_N, D)
            x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            if MASK:
                keep = mask_tile(mask_at, mask_m, mask_n, M - first, N - n, BLOCK_M, BLOCK_N)
                # what is masked may not be finite, nor then a derivative
                x = tl.where(keep, x, 0.0)
                if mask_n is not None:
                    mask_at += BLOCK_N * mask_n
            t_at = t_ptr
            dy_at = dy_block
            dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for p in range(LAST - FIRST):
                # zero beyond N, where x is too
                dy = tl.load(dy_at + column, mask=column < N - n, other=0.0)[None, :]
                if MASK:
                    dy = tl.where(keep, dy, 0.0)
                _, slope, terms = _unit(x, t_at, t_i, BLOCK_M, 1, P, UNIT, BASE, FAST)
                dx += slope * dy
                sums = ()
                for i in tl.static_range(P):
                    sums += (_put(dt[i], tl.sum(terms[i] * dy, 1), p, R),)
                dt = sums
                t_at += t_p
                dy_at += N
            dk = tl.dot(dx.to(q.dtype), q, dk, input_precision=PRECISION)
            q_at += BLOCK_N * q_n
            dy_block += BLOCK_N
        dk_at, stride = rows_at(dk_ptr, b, h, m, H, M, WIDTH, BESIDE)
        store_tile(dk_at, dk * scale, M - first, stride, WIDTH, BLOCK_M, D, ADD)
    # partial sums (slices, H, P, M, r)
    row = head.to(tl.int64) * P
    for i in tl.static_range(P):
        at = dt_ptr + ((row + i) * M + m) * RANK + FIRST
        _store_columns(at, dt[i], RANK, M - first, LAST - FIRST, BLOCK_M, R)
