"""Triton kernels of `x (w^T v)`: what passes between N tokens and the r ranks of each head.

`gather` is `x^T z (r, e)`, summed over a share of the tokens; `spread` is `x h (N, e)`, of a block
of them; `pull` is what is left of the backward, `z h^T (N, r)` among it. Operands may be float32 or
half types and are multiplied as float32, see PRECISION in `device`.
"""

import triton
import triton.language as tl

from kart.kernels.triton.device import COUNTS, load_tile, tile_offsets


@triton.jit
def _at(ptr, b, h, n, stride_b, stride_h, stride_n):
    return ptr + b * stride_b + h * stride_h + n.to(tl.int64) * stride_n


@triton.jit
def _store(at, tile, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    inside = (tl.arange(0, ROWS)[:, None] < rows) & (tl.arange(0, COLUMNS)[None, :] < WIDTH)
    tl.store(at, tile, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def gather(
    x_ptr,
    z_ptr,
    out_ptr,
    x_b,
    x_h,
    x_n,
    x_p,
    z_b,
    z_h,
    z_n,
    z_e,
    H,
    N,
    share,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    shares = tl.cdiv(N, share)
    part = tl.program_id(0) % shares
    head = (tl.program_id(0) // shares).to(tl.int64)
    b = head // H
    h = head % H
    first = part * share
    last = tl.minimum(first + share, N)
    x_at = _at(x_ptr, b, h, first, x_b, x_h, x_n)
    z_at = _at(z_ptr, b, h, first, z_b, z_h, z_n)
    x_offsets = tile_offsets(x_n, x_p, BLOCK, R)
    z_offsets = tile_offsets(z_n, z_e, BLOCK, E)
    total = tl.zeros([R, E], tl.float32)
    for n in range(first, last, BLOCK):
        x = load_tile(x_at, x_offsets, last - n, RANK, BLOCK, R).to(tl.float32)
        z = load_tile(z_at, z_offsets, last - n, WIDTH, BLOCK, E).to(tl.float32)
        total = tl.dot(tl.trans(x), z, total, input_precision=PRECISION)
        x_at += BLOCK * x_n
        z_at += BLOCK * z_n
    at = out_ptr + (part * (tl.num_programs(0) // shares) + head) * RANK * WIDTH
    _store(at + tile_offsets(WIDTH, 1, R, E), total, RANK, WIDTH, R, E)


@triton.jit(do_not_specialize=COUNTS)
def spread(
    x_ptr,
    h_ptr,
    beside_ptr,
    out_ptr,
    x_b,
    x_h,
    x_n,
    x_p,
    beside_b,
    beside_h,
    beside_n,
    beside_e,
    out_b,
    out_h,
    out_n,
    out_e,
    H,
    N,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK)
    n = tl.program_id(0) % blocks * BLOCK
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b = head // H
    h = head % H
    x_at = _at(x_ptr, b, h, n, x_b, x_h, x_n)
    x = load_tile(x_at, tile_offsets(x_n, x_p, BLOCK, R), N - n, RANK, BLOCK, R).to(tl.float32)
    h_at = h_ptr + head * RANK * WIDTH
    held = load_tile(h_at, tile_offsets(WIDTH, 1, R, E), RANK, WIDTH, R, E)
    out = tl.dot(x, held, input_precision=PRECISION)
    if beside_ptr is not None:
        at = _at(beside_ptr, b, h, n, beside_b, beside_h, beside_n)
        offsets = tile_offsets(beside_n, beside_e, BLOCK, E)
        out += load_tile(at, offsets, N - n, WIDTH, BLOCK, E).to(tl.float32)
    at = _at(out_ptr, b, h, n, out_b, out_h, out_n) + tile_offsets(out_n, out_e, BLOCK, E)
    _store(at, out.to(out_ptr.dtype.element_ty), N - n, WIDTH, BLOCK, E)


@triton.jit(do_not_specialize=COUNTS)
def pull(
    dout_ptr,
    v_ptr,
    mix_ptr,
    hidden_ptr,
    dhidden_ptr,
    dv_ptr,
    dy_ptr,
    dmix_ptr,
    dout_b,
    dout_h,
    dout_n,
    dout_e,
    v_b,
    v_h,
    v_n,
    v_e,
    mix_b,
    mix_h,
    mix_n,
    mix_p,
    dv_b,
    dv_h,
    dv_n,
    dv_e,
    H,
    N,
    M,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dy of a block of queries, or dv and dmix of a block of keys."""
    queries = tl.cdiv(N, BLOCK)
    blocks = queries + tl.cdiv(M, BLOCK)
    part = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b = head // H
    h = head % H
    held = tile_offsets(WIDTH, 1, R, E)
    ranks = tile_offsets(RANK, 1, BLOCK, R)
    if part < queries:
        n = part * BLOCK
        dout_at = _at(dout_ptr, b, h, n, dout_b, dout_h, dout_n)
        z = load_tile(dout_at, tile_offsets(dout_n, dout_e, BLOCK, E), N - n, WIDTH, BLOCK, E)
        hidden = load_tile(hidden_ptr + head * RANK * WIDTH, held, RANK, WIDTH, R, E)
        dy = tl.dot(z.to(tl.float32), tl.trans(hidden), input_precision=PRECISION)
        dy_at = dy_ptr + (head * N + n) * RANK + ranks
        _store(dy_at, dy.to(dy_ptr.dtype.element_ty), N - n, RANK, BLOCK, R)
    else:
        n = (part - queries) * BLOCK
        hidden = load_tile(dhidden_ptr + head * RANK * WIDTH, held, RANK, WIDTH, R, E)
        v_at = _at(v_ptr, b, h, n, v_b, v_h, v_n)
        v = load_tile(v_at, tile_offsets(v_n, v_e, BLOCK, E), M - n, WIDTH, BLOCK, E)
        dmix = tl.dot(v.to(tl.float32), tl.trans(hidden), input_precision=PRECISION)
        _store(dmix_ptr + (head * M + n) * RANK + ranks, dmix, M - n, RANK, BLOCK, R)
        mix_at = _at(mix_ptr, b, h, n, mix_b, mix_h, mix_n)
        x = load_tile(mix_at, tile_offsets(mix_n, mix_p, BLOCK, R), M - n, RANK, BLOCK, R)
        dv = tl.dot(x.to(tl.float32), hidden, input_precision=PRECISION)
        dv_at = _at(dv_ptr, b, h, n, dv_b, dv_h, dv_n) + tile_offsets(dv_n, dv_e, BLOCK, E)
        _store(dv_at, dv.to(dv_ptr.dtype.element_ty), M - n, WIDTH, BLOCK, E)
