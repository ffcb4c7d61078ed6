"""Triton kernels between coefficients as parameters have them and as the products read them.

`pack` lays `(batch, H, r, M, K)` out as a product wants it, combined as it wants them and zero in
the rest of its tiles; `unpack` brings the gradients of slices of the batch back, summed in a fixed
order.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("M", "KEYS"))
def pack(
    c_ptr,
    out_ptr,
    c_b,
    c_h,
    c_p,
    c_m,
    c_k,
    out_b,
    out_h,
    out_p,
    out_m,
    out_k,
    H,
    M,
    RANK,
    KEYS,
    RANKS,
    MATRIX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row J of the output is the sum of `MATRIX[J][K] c_K`, zero from row ROWS on."""
    ranks = tl.cdiv(RANKS, BLOCK)
    keys = tl.cdiv(KEYS, BLOCK)
    part = tl.program_id(0) % (keys * ranks)
    head = (tl.program_id(0) // (keys * ranks)).to(tl.int64)
    m = (part // ranks * BLOCK + tl.arange(0, BLOCK))[:, None].to(tl.int64)
    p = (part % ranks * BLOCK + tl.arange(0, BLOCK))[None, :].to(tl.int64)
    c_at = c_ptr + head // H * c_b + head % H * c_h + p * c_p + m * c_m
    out_at = out_ptr + head // H * out_b + head % H * out_h + p * out_p + m * out_m
    for J in tl.static_range(OUT):
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        if J < ROWS:
            for K in tl.static_range(COLUMNS):
                if MATRIX[J][K] != 0.0:
                    c = tl.load(c_at + K * c_k, mask=(m < M) & (p < RANK), other=0.0)
                    total += c.to(tl.float32) * MATRIX[J][K]
        inside = (m < KEYS) & (p < RANKS)
        tl.store(out_at + J * out_k, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("M", "slices"))
def unpack(
    x_ptr,
    out_ptr,
    out_b,
    out_h,
    out_p,
    out_m,
    out_k,
    slices,
    H,
    M,
    RANK,
    FACTORS: tl.constexpr,
    COUNT: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of `factor x_k` over slices of `x (batch, slices, H, K, M, r)`, K = COUNT."""
    each = COUNT * M * RANK
    blocks = tl.cdiv(each, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b = head // H
    h = head % H
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, SLICES).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, slices, SLICES):
        row = ((b * slices + first + s) * H + h) * each
        inside = (first + s < slices)[:, None] & (i < each)[None, :]
        total += tl.sum(tl.load(x_ptr + row[:, None] + i[None, :], mask=inside, other=0.0), 0)
    k = i // (M * RANK)
    for K in tl.static_range(COUNT):
        if FACTORS[K] != 1.0:
            total = tl.where(k == K, total * FACTORS[K], total)
    at = out_ptr + b * out_b + h * out_h + k.to(tl.int64) * out_k
    at += (i // RANK % M).to(tl.int64) * out_m + (i % RANK).to(tl.int64) * out_p
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=i < each)
