"""Triton kernels of `x (w^T v)`: what passes between N tokens and the r ranks of each head.

`gather` is `x^T z (r, e)`, summed over a share of the tokens; `spread` is `x h (N, e)`, of a block
of them; `score` is `z h^T (N, r)`. Operands may be float32 or half types and are multiplied as
float32, see PRECISION in `device`.
"""

import triton
import triton.language as tl

from kart.kernels.triton.device import COUNTS, load_tile, tile_offsets


@triton.jit
def _at(ptr, b, h, n, stride_b, stride_h, stride_n):
    return ptr + b * stride_b + h * stride_h + n.to(tl.int64) * stride_n


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
    rows = tl.arange(0, R)[:, None]
    columns = tl.arange(0, E)[None, :]
    at = out_ptr + ((part * (tl.num_programs(0) // shares) + head) * RANK + rows) * WIDTH + columns
    tl.store(at, total, mask=(rows < RANK) & (columns < WIDTH))


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
    inside = (tl.arange(0, BLOCK)[:, None] < N - n) & (tl.arange(0, E)[None, :] < WIDTH)
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def score(
    z_ptr,
    h_ptr,
    out_ptr,
    z_b,
    z_h,
    z_n,
    z_e,
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
    z_at = _at(z_ptr, head // H, head % H, n, z_b, z_h, z_n)
    z = load_tile(z_at, tile_offsets(z_n, z_e, BLOCK, E), N - n, WIDTH, BLOCK, E).to(tl.float32)
    h_at = h_ptr + head * RANK * WIDTH
    held = load_tile(h_at, tile_offsets(WIDTH, 1, R, E), RANK, WIDTH, R, E)
    out = tl.dot(z, tl.trans(held), input_precision=PRECISION)
    at = out_ptr + (head * N + n) * RANK + tile_offsets(RANK, 1, BLOCK, R)
    inside = (tl.arange(0, BLOCK)[:, None] < N - n) & (tl.arange(0, R)[None, :] < RANK)
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)
