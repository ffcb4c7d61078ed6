"""Triton kernels of attention `out[n] = sum_m w[n, m] v[m]`, the weights w in a FORM of entries y.

An entry is a function of its score, of a linear family or a unit, or that of its offset in a table.

* `forward`: a program owns a block of queries and walks over the keys, softmax on the way;
* `query_gradient`: the same walk, for dQ, the program's share of dtheta, and of each query `pull`,
  the sum of what is divided by in its row times the gradients of that;
* `key_gradient`: a program owns a block of keys and walks over the queries, for dK and dV;
* `table_gradient`: a program owns a band of tiles along the diagonal, which have their offsets in
  the same places, and sums the gradients of their entries, over a slice of the batch, too.

None of them holds an N x M matrix or needs an atomic. Scores, entries and sums are float32; only
the operands of matrix products are rounded, to the dtype of what they are multiplied with.

A tensor is a tuple of its address and strides of samples, heads, tokens and the last axis. `row` is
what a backward needs of the forward of each query: 1 / sum |y|, or the logarithm of the sum of
softmax, which is inf for a query without keys. `span` is the origin and the density of a family.
"""

import triton
import triton.language as tl

from kart.kernels.triton.device import (
    COUNTS,
    feature,
    load_tile,
    mask_tile,
    rows_at,
    sign,
    store_tile,
    tile_offsets,
)
from kart.kernels.triton.device_units import based

# the smallest normal number: a row of zeros stays one
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _block(tokens, H, SIZE: tl.constexpr):
    """The first token of this program's block, its sample and head, and the number of both."""
    blocks = tl.cdiv(tokens, SIZE)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    return tl.program_id(0) % blocks * SIZE, head // H, head % H, head


@triton.jit
def _at(x, b, h, n):
    return x[0] + b * x[1] + h * x[2] + tl.cast(n, tl.int64) * x[3]


@triton.jit
def _tile(x, at, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return load_tile(at, tile_offsets(x[3], x[4], ROWS, COLUMNS), rows, WIDTH, ROWS, COLUMNS)


@triton.jit
def _numbers(ptr, stride, rows, ROWS: tl.constexpr):
    """A number of each row, zero from row `rows` on."""
    row = tl.arange(0, ROWS)
    return tl.load(ptr + row * stride, mask=row < rows, other=0.0).to(tl.float32)


@triton.jit
def _factors(factor, b, h, n, rows, ROWS: tl.constexpr):
    """The factors of queries from n on."""
    if factor is None:
        return tl.full([ROWS], 1.0, tl.float32)
    else:
        return _numbers(_at(factor, b, h, n), factor[3], rows, ROWS)


@triton.jit
def _kept(mask, b, h, n, m, N, M, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr):
    """Which pairs of a tile at query n and key m are attended; keys are columns, or with TURNED
    rows. Columns beyond the last are not.
    """
    columns = N - n if TURNED else M - m
    keep = tl.arange(0, COLUMNS)[None, :] < columns
    if mask is not None:
        at = mask[0] + b * mask[1] + h * mask[2] + tl.cast(m, tl.int64) * mask[4]
        if mask[3] is not None:
            at += tl.cast(n, tl.int64) * mask[3]
        if TURNED:
            keep &= mask_tile(at, mask[4], mask[3], M - m, columns, ROWS, COLUMNS)
        else:
            keep &= mask_tile(at, mask[3], mask[4], N - n, columns, ROWS, COLUMNS)
    return keep


@triton.jit
def _learned(theta, b, h, FACTORS: tl.constexpr, SLOPES: tl.constexpr, START: tl.constexpr):
    """What a head has learned, in registers: the coefficients of features, and those of what their
    slopes are combinations of; or the parameters of a unit. Of a table its address.
    """
    at = _at(theta, b, h, 0)
    if START is None:
        return at
    else:
        own = ()
        coefs = ()
        slopes = ()
        for i in tl.static_range(len(FACTORS)):
            own += (tl.load(at + i).to(tl.float32),)
        for i in tl.static_range(len(FACTORS)):
            coefs += (own[i] * FACTORS[i],)
        for J in tl.static_range(len(SLOPES)):
            total = 0.0
            for i in tl.static_range(len(FACTORS)):
                if SLOPES[J][i] != 0.0:
                    total += own[i] * SLOPES[J][i]
            slopes += (total,)
        return coefs, slopes


@triton.jit
def _entries(
    x,
    place,
    last,
    learned,
    span,
    START: tl.constexpr,
    FEATURE: tl.constexpr,
    BASE: tl.constexpr,
    FAST: tl.constexpr,
):
    """Entries of scores x, or at a place in a table, and their slopes."""
    slope = tl.zeros_like(x)
    if START is None:
        inside = (place >= 0) & (place < last)
        y = tl.load(learned + place, mask=inside, other=0.0).to(tl.float32)
    elif FEATURE is None:
        y, slope, _ = based(x, learned[0], START, BASE, FAST)
    else:
        y = tl.zeros_like(x)
        SIZE: tl.constexpr = len(learned[0]) - (BASE != "zero")
        gate = tl.full(x.shape, 1.0, tl.float32)
        state = START(x, gate, span[0], span[1], FAST)
        for J in tl.static_range(len(learned[0])):
            f, g, state = feature(x, gate, state, span[1], J, SIZE, FEATURE, BASE)
            y += learned[0][J] * f
            slope += learned[1][J] * g
    return y, slope


@triton.jit
def _pulled(
    x, dw, keep, place, last, row, pull, c, learned, span, FORM: tl.constexpr, START: tl.constexpr,
    FEATURE: tl.constexpr, BASE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Weights, and the gradients of entries and of scores x, from those of the weights."""
    y, slope = _entries(x, place, last, learned, span, START, FEATURE, BASE, FAST)
    beside = tl.zeros_like(x)
    if FORM == "plain":
        weight = c * y
        g = c * dw
    elif FORM == "l1":
        weight = row * y
        g = row * (dw - sign(y) * pull)
    elif FORM == "beside":
        soft = tl.exp(x - row)
        weight = c * y + soft
        g = c * dw
        beside = tl.where(keep, soft * (dw - pull), 0.0)
    else:
        logits = x + y if FORM == "inside" else y
        weight = tl.exp(logits - row)
        g = weight * (dw - pull)
    weight = tl.where(keep, weight, 0.0)
    g = tl.where(keep, g, 0.0)
    if FORM == "inside":
        beside = g
    return weight, g, slope * g + beside


@triton.jit
def _shares(
    sums,
    x,
    g,
    learned,
    span,
    START: tl.constexpr,
    FEATURE: tl.constexpr,
    BASE: tl.constexpr,
    FAST: tl.constexpr,
):
    """`sums` with those of the gradients of what is learned added, of each row."""
    found = ()
    if FEATURE is None:
        _, _, terms = based(x, learned[0], START, BASE, FAST)
        for i in tl.static_range(len(sums)):
            found += (sums[i] + tl.sum(terms[i] * g, 1),)
    else:
        SIZE: tl.constexpr = len(learned[0]) - (BASE != "zero")
        gate = tl.full(x.shape, 1.0, tl.float32)
        state = START(x, gate, span[0], span[1], FAST)
        for J in tl.static_range(len(sums)):
            f, _, state = feature(x, gate, state, span[1], J, SIZE, FEATURE, BASE)
            found += (sums[J] + tl.sum(f * g, 1),)
    return found


@triton.jit(do_not_specialize=COUNTS)
def forward(
    q, k, v, mask, factor, theta, out_ptr, row_ptr, soft_ptr, H, N, M, scale, span,
    WIDTH: tl.constexpr, D: tl.constexpr, VALUES: tl.constexpr, E: tl.constexpr, FORM: tl.constexpr,
    FACTORS: tl.constexpr, SLOPES: tl.constexpr, START: tl.constexpr, FEATURE: tl.constexpr,
    BASE: tl.constexpr, BESIDE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    n, b, h, head = _block(N, H, BLOCK_N)
    learned = _learned(theta, b, h, FACTORS, SLOPES, START)
    own = _tile(q, _at(q, b, h, n), N - n, WIDTH, BLOCK_N, D)
    rows = n + tl.arange(0, BLOCK_N)
    # sums of softmax and its greatest so far, and which queries have a key; entries as they are
    some = tl.zeros([BLOCK_N], tl.int32)
    most = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    soft = tl.zeros([BLOCK_N, E], tl.float32)
    out = tl.zeros([BLOCK_N, E], tl.float32)
    for m in range(0, M, BLOCK_M):
        keys = _tile(k, _at(k, b, h, m), M - m, WIDTH, BLOCK_M, D)
        values = _tile(v, _at(v, b, h, m), M - m, VALUES, BLOCK_M, E)
        keep = _kept(mask, b, h, n, m, N, M, BLOCK_N, BLOCK_M, False)
        x = tl.dot(own, tl.trans(keys), input_precision=PRECISION) * scale
        # what is masked may not be finite
        x = tl.where(keep, x, 0.0)
        place = rows[:, None] - m - tl.arange(0, BLOCK_M)[None, :] + M - 1
        last = N + M - 1
        y, _ = _entries(x, place, last, learned, span, START, FEATURE, BASE, FAST)
        if FORM == "plain" or FORM == "l1" or FORM == "beside":
            y = tl.where(keep, y, 0.0)
            out = tl.dot(y.to(values.dtype), values, out, input_precision=PRECISION)
        if FORM == "l1":
            total += tl.sum(tl.abs(y), 1)
        elif FORM != "plain":
            logits = y if FORM == "softmax" else x + y if FORM == "inside" else x
            logits = tl.where(keep, logits, float("-inf"))
            now = tl.maximum(most, tl.max(logits, 1))
            # of -inf alone, as long as there is nothing else
            base = tl.where(now == float("-inf"), 0.0, now)
            fade = tl.exp(most - base)
            p = tl.exp(logits - base[:, None])
            total = total * fade + tl.sum(p, 1)
            soft *= fade[:, None]
            soft = tl.dot(p.to(values.dtype), values, soft, input_precision=PRECISION)
            most = now
            some |= tl.max(keep.to(tl.int32), 1)
    at, stride = rows_at(out_ptr, b, h, n, H, N, VALUES, BESIDE)
    row = total
    if FORM == "l1":
        row = 1.0 / tl.maximum(total, TINY)
        out *= row[:, None]
    else:
        out *= _factors(factor, b, h, n, N - n, BLOCK_N)[:, None]
    if FORM != "plain" and FORM != "l1":
        # without keys zeros, of -inf alone NaN
        row = tl.where(total == 0.0, float("nan"), most + tl.log(total))
        row = tl.where(some == 0, float("inf"), row)
        soft *= tl.where(some == 0, 0.0, 1.0 / total)[:, None]
        if FORM == "beside":
            soft_at, _ = rows_at(soft_ptr, b, h, n, H, N, VALUES, BESIDE)
            store_tile(soft_at, soft, N - n, stride, VALUES, BLOCK_N, E, False)
        out += soft
    if FORM != "plain":
        tl.store(row_ptr + head * N + rows, row, mask=rows < N)
    store_tile(at, out, N - n, stride, VALUES, BLOCK_N, E, False)


@triton.jit(do_not_specialize=COUNTS)
def query_gradient(
    q, k, v, mask, factor, theta, dout, result, row_ptr, pull_ptr, dq_ptr, share_ptr, zero, H, N, M,
    scale, span, WIDTH: tl.constexpr, D: tl.constexpr, VALUES: tl.constexpr, E: tl.constexpr,
    FORM: tl.constexpr, FACTORS: tl.constexpr, SLOPES: tl.constexpr, START: tl.constexpr,
    FEATURE: tl.constexpr, BASE: tl.constexpr, BESIDE: tl.constexpr, AGAIN: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    n, b, h, head = _block(N, H, BLOCK_N)
    learned = _learned(theta, b, h, FACTORS, SLOPES, START)
    own = _tile(q, _at(q, b, h, n), N - n, WIDTH, BLOCK_N, D)
    given = _tile(dout, _at(dout, b, h, n), N - n, VALUES, BLOCK_N, E)
    rows = n + tl.arange(0, BLOCK_N)
    row = tl.zeros([BLOCK_N], tl.float32)
    pull = row
    if FORM != "plain":
        row = _numbers(row_ptr + head * N + n, 1, N - n, BLOCK_N)
        found = _tile(result, _at(result, b, h, n), N - n, VALUES, BLOCK_N, E)
        pull = tl.sum(given.to(tl.float32) * found.to(tl.float32), 1)
        tl.store(pull_ptr + head * N + rows, pull, mask=rows < N)
    c = _factors(factor, b, h, n, N - n, BLOCK_N)
    dq = tl.zeros([BLOCK_N, D], tl.float32)
    sums = ()
    for _i in tl.static_range(len(FACTORS)):
        sums += (tl.zeros([BLOCK_N], tl.float32),)
    for m in range(0, M, BLOCK_M):
        keys = _tile(k, _at(k, b, h, m), M - m, WIDTH, BLOCK_M, D)
        values = _tile(v, _at(v, b, h, m), M - m, VALUES, BLOCK_M, E)
        keep = _kept(mask, b, h, n, m, N, M, BLOCK_N, BLOCK_M, False)
        x = tl.dot(own, tl.trans(keys), input_precision=PRECISION) * scale
        x = tl.where(keep, x, 0.0)
        dw = tl.dot(given, tl.trans(values), input_precision=PRECISION)
        place = rows[:, None] - m - tl.arange(0, BLOCK_M)[None, :] + M - 1
        _, g, dx = _pulled(
            x, dw, keep, place, N + M - 1, row[:, None], pull[:, None], c[:, None],
            learned, span, FORM, START, FEATURE, BASE, FAST,
        )  # fmt: skip
        dq = tl.dot(dx.to(keys.dtype), keys, dq, input_precision=PRECISION)
        if START is not None:
            if AGAIN:
                # else the compiler holds the features of x until they are wanted again
                x += zero
            sums = _shares(sums, x, g, learned, span, START, FEATURE, BASE, FAST)
    at, stride = rows_at(dq_ptr, b, h, n, H, N, WIDTH, BESIDE)
    store_tile(at, dq * scale, N - n, stride, WIDTH, BLOCK_N, D, False)
    share_at = share_ptr + tl.program_id(0).to(tl.int64) * len(FACTORS)
    for i in tl.static_range(len(FACTORS)):
        tl.store(share_at + i, tl.sum(sums[i], 0) * FACTORS[i])


@triton.jit(do_not_specialize=COUNTS)
def key_gradient(
    q, k, v, mask, factor, theta, dout, row_ptr, pull_ptr, dk_ptr, dv_ptr, H, N, M, scale, span,
    WIDTH: tl.constexpr, D: tl.constexpr, VALUES: tl.constexpr, E: tl.constexpr, FORM: tl.constexpr,
    FACTORS: tl.constexpr, SLOPES: tl.constexpr, START: tl.constexpr, FEATURE: tl.constexpr,
    BASE: tl.constexpr, BESIDE: tl.constexpr, VALUES_BESIDE: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    m, b, h, head = _block(M, H, BLOCK_M)
    learned = _learned(theta, b, h, FACTORS, SLOPES, START)
    keys = _tile(k, _at(k, b, h, m), M - m, WIDTH, BLOCK_M, D)
    values = _tile(v, _at(v, b, h, m), M - m, VALUES, BLOCK_M, E)
    columns = tl.arange(0, BLOCK_N)[None, :]
    offsets = columns - m - tl.arange(0, BLOCK_M)[:, None] + M - 1
    dk = tl.zeros([BLOCK_M, D], tl.float32)
    dv = tl.zeros([BLOCK_M, E], tl.float32)
    for n in tl.range(0, N, BLOCK_N, disable_licm=True):
        own = _tile(q, _at(q, b, h, n), N - n, WIDTH, BLOCK_N, D)
        given = _tile(dout, _at(dout, b, h, n), N - n, VALUES, BLOCK_N, E)
        keep = _kept(mask, b, h, n, m, N, M, BLOCK_M, BLOCK_N, True)
        row = tl.zeros([BLOCK_N], tl.float32)
        pull = row
        if FORM != "plain":
            row = _numbers(row_ptr + head * N + n, 1, N - n, BLOCK_N)
            pull = _numbers(pull_ptr + head * N + n, 1, N - n, BLOCK_N)
        c = _factors(factor, b, h, n, N - n, BLOCK_N)
        x = tl.dot(keys, tl.trans(own), input_precision=PRECISION) * scale
        x = tl.where(keep, x, 0.0)
        dw = tl.dot(values, tl.trans(given), input_precision=PRECISION)
        weight, _, dx = _pulled(
            x, dw, keep, n + offsets, N + M - 1, row[None, :], pull[None, :], c[None, :],
            learned, span, FORM, START, FEATURE, BASE, FAST,
        )  # fmt: skip
        dv = tl.dot(weight.to(given.dtype), given, dv, input_precision=PRECISION)
        dk = tl.dot(dx.to(own.dtype), own, dk, input_precision=PRECISION)
    at, stride = rows_at(dk_ptr, b, h, m, H, M, WIDTH, BESIDE)
    store_tile(at, dk * scale, M - m, stride, WIDTH, BLOCK_M, D, False)
    at, stride = rows_at(dv_ptr, b, h, m, H, M, VALUES, VALUES_BESIDE)
    store_tile(at, dv, M - m, stride, VALUES, BLOCK_M, E, False)


@triton.jit(do_not_specialize=COUNTS)
def table_gradient(
    q, k, v, mask, factor, theta, dout, row_ptr, pull_ptr, tiles_ptr, B, samples, H, N, M, scale,
    span, WIDTH: tl.constexpr, D: tl.constexpr, VALUES: tl.constexpr, E: tl.constexpr,
    FORM: tl.constexpr, FACTORS: tl.constexpr, SLOPES: tl.constexpr, START: tl.constexpr,
    FEATURE: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = BLOCK_N // BLOCK_M
    tl.static_assert(BLOCK_N == STEPS * BLOCK_M)
    across = tl.cdiv(M, BLOCK_M)
    down = tl.cdiv(N, BLOCK_N)
    bands = (down - 1) * STEPS + across
    band = tl.program_id(0) % bands
    head = tl.program_id(0) // bands
    h = (head % H).to(tl.int64)
    start = head // H * samples
    # from key to query the tiles of this band are `shift` blocks of keys apart
    shift = band - across + 1
    first = tl.cdiv(tl.maximum(shift, 0), STEPS)
    end = tl.minimum(down, band // STEPS + 1)
    offsets = tl.arange(0, BLOCK_N)[:, None] - tl.arange(0, BLOCK_M)[None, :] + M - 1
    place = shift * BLOCK_M + offsets
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # one slice is one sample where the tables differ between samples
    learned = _learned(theta, start.to(tl.int64), h, FACTORS, SLOPES, START)
    for sample in tl.range(start, tl.minimum(start + samples, B)):
        b = tl.cast(sample, tl.int64)
        for i in tl.range(first, end):
            n = i * BLOCK_N
            m = n - shift * BLOCK_M
            own = _tile(q, _at(q, b, h, n), N - n, WIDTH, BLOCK_N, D)
            given = _tile(dout, _at(dout, b, h, n), N - n, VALUES, BLOCK_N, E)
            keys = _tile(k, _at(k, b, h, m), M - m, WIDTH, BLOCK_M, D)
            values = _tile(v, _at(v, b, h, m), M - m, VALUES, BLOCK_M, E)
            keep = _kept(mask, b, h, n, m, N, M, BLOCK_N, BLOCK_M, False)
            row = _numbers(row_ptr + (b * H + h) * N + n, 1, N - n, BLOCK_N)
            pull = _numbers(pull_ptr + (b * H + h) * N + n, 1, N - n, BLOCK_N)
            c = _factors(factor, b, h, n, N - n, BLOCK_N)
            x = tl.dot(own, tl.trans(keys), input_precision=PRECISION) * scale
            x = tl.where(keep, x, 0.0)
            dw = tl.dot(given, tl.trans(values), input_precision=PRECISION)
            _, g, _ = _pulled(
                x, dw, keep, place, N + M - 1, row[:, None], pull[:, None], c[:, None],
                learned, span, FORM, START, FEATURE, BASE, FAST,
            )  # fmt: skip
            total += g
    at = tiles_ptr + tl.program_id(0).to(tl.int64) * BLOCK_N * BLOCK_M
    store_tile(at, total, BLOCK_N, BLOCK_M, BLOCK_M, BLOCK_N, BLOCK_M, False)
