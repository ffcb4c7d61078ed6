"""Triton kernels of the streamed product `y[n, p] = sum_m sum_j f_j(scale q_n . k_m) C[p, m, j]`.

None of them holds an N x M matrix or needs an atomic:

* `forward`: a program owns a block of queries and walks over the keys;
* `query_gradient`: the same walk, for dQ;
* `key_gradient`: a program owns a block of keys and walks over a slice of the batch and all
  queries, for dK and dC; dC stays in registers until the end of the slice.

Each handles the features FIRST to LAST and, with ADD, adds to the output of an earlier launch: what
one program can hold bounds the features of a launch, not those of a basis.

Scores, features and sums are float32. The operands of a matrix product are rounded: features and
dY to the dtype of the packed coefficients `(batch or 1, H, K', M', R)`, zero beyond M keys and r
ranks; dS to the dtype of q and k.

The score gradient is `dS = sum_j g_j (dY D_j^T)`. Where the derivatives of a family are again
combinations of its features (Fourier, powers, Chebyshev) the combination is in D and `g_j = f_j`,
so that a backward kernel has nothing to differentiate; elsewhere `D = C` and `g_j = f_j'`.
"""

import functools
import hashlib
import inspect
import linecache
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice

from kart.kernels.triton.launch import interpreted

# what loops run over: of a loop known to have one turn Triton makes no pipeline, and the ptxas of
# CUDA 12.8 then reads a register that nothing wrote (tests/test_triton_aot.py looks for it)
COUNTS = ("N", "M", "B", "samples", "share")


@triton.jit
def sincos(x, FAST: tl.constexpr):
    # the hardware's sine is good to 2^-20.5 within one turn and loses digits far outside: take
    # whole turns off first. Adding and taking away 1.5 * 2^23 rounds to an integer without the slow
    # FRND; 2 pi = 6.28125 + 0.0019353... makes the first product exact up to 2^15 turns (Cody and
    # Waite)
    turns = x * 0.15915494309189535 + 12582912.0
    turns = turns - 12582912.0
    x = x - turns * 6.28125
    x = x - turns * 0.0019353071795864769
    if FAST:
        sine = libdevice.fast_sinf(x)
        cosine = libdevice.fast_cosf(x)
    else:
        sine = tl.sin(x)
        cosine = tl.cos(x)
    return sine, cosine


@triton.jit
def sine_half_turns(u):
    """sin(pi u) for abs(u) <= 1/2, to 2 ulp: its zero stays one, which the hardware's does not."""
    r = u * 3.14159265358979
    z = r * r
    p = ((-2.5052108e-8 * z + 2.7557319e-6) * z - 1.9841270e-4) * z + 8.3333333e-3
    return (p * z - 1.6666667e-1) * z * r + r


@triton.jit
def clamp(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """`x` between two numbers; NaN stays NaN."""
    return tl.clamp(x, LOW, HIGH, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(x):
    """1, -1, or 0 for 0."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


def functions(piece: Any, *names: str) -> list[Any]:
    """Functions of the text of a `kart.bases.basis.Triton`, by name."""
    # in the interpreter `2 * x` of a `tl.constexpr` of 2 would be another
    kind = "" if interpreted() else "tl.constexpr"
    sizes = "".join(f"{name} = {kind}({value!r})\n" for name, value in piece.sizes.items())
    space = _compiled(sizes + piece.text)
    return [space[name] for name in names]


@functools.cache
def _compiled(text: str) -> dict[str, Any]:
    name = f"<kart {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    # Triton reads the source of a function again, and there is no file
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    given = (sincos, sine_half_turns, clamp, sign)
    space = {"__name__": __name__, "tl": tl, "libdevice": libdevice}
    space |= {function.__name__: function for function in given}
    exec(compile(text, name, "exec"), space)
    for key, value in space.items():
        if inspect.isfunction(value):
            space[key] = triton.jit(value)
    return space


@triton.jit
def activation(x, BASE: tl.constexpr):
    """A base activation and its slope."""
    if BASE == "identity":
        value = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    elif BASE == "silu":
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    else:
        tl.static_assert(BASE == "gelu")
        normal = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * normal
        slope = normal + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    return value, slope


@triton.jit
def feature(
    x,
    gate,
    state,
    density,
    J: tl.constexpr,
    SIZE: tl.constexpr,
    FEATURE: tl.constexpr,
    BASE: tl.constexpr,
):
    """Feature J of scores x, what its row of D meets in dS, and the state for J + 1."""
    if J > SIZE or (J == SIZE and BASE == "zero"):
        # the partner of a last odd feature
        value = tl.zeros_like(x)
        slope = value
    elif J == SIZE:
        value, slope = activation(x, BASE)
        value *= gate
        slope *= gate
    else:
        value, slope, state = FEATURE(state, density, J, SIZE)
    return value, slope, state


@triton.jit
def tile_offsets(stride_row, stride_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * stride_row + tl.arange(0, COLUMNS)[None, :] * stride_column


@triton.jit
def _pair_offsets(stride_feature, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of the coefficients of a pair of features, one below the other."""
    row = tl.arange(0, 2 * ROWS)
    start = row // ROWS * stride_feature + row % ROWS * COLUMNS
    return start[:, None] + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _stack(a, b, AXIS: tl.constexpr):
    """Two tiles as one of twice the rows (AXIS 0) or columns (1): no data moves between threads."""
    both = tl.join(a, b)
    if AXIS == 0:
        return tl.reshape(tl.permute(both, 2, 0, 1), 2 * a.shape[0], a.shape[1])
    else:
        return tl.reshape(tl.permute(both, 0, 2, 1), a.shape[0], 2 * a.shape[1])


@triton.jit
def _unstack(tile, AXIS: tl.constexpr):
    if AXIS == 0:
        both = tl.permute(tl.reshape(tile, 2, tile.shape[0] // 2, tile.shape[1]), 1, 2, 0)
    else:
        both = tl.permute(tl.reshape(tile, tile.shape[0], 2, tile.shape[1] // 2), 0, 2, 1)
    return tl.split(both)


@triton.jit
def _inside(rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    inside = tl.arange(0, ROWS)[:, None] < rows
    if WIDTH < COLUMNS:
        inside = inside & (tl.arange(0, COLUMNS)[None, :] < WIDTH)
    return inside


@triton.jit
def load_tile(ptr, offsets, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile at `offsets` from `ptr`, zero from row `rows` and column WIDTH on."""
    return tl.load(ptr + offsets, mask=_inside(rows, WIDTH, ROWS, COLUMNS), other=0.0)


@triton.jit
def rows_at(ptr, b, h, n, H, N, WIDTH: tl.constexpr, BESIDE: tl.constexpr):
    """Where row n of a head is in `(B, H, N, WIDTH)`, and the stride of rows: those of the heads
    lie beside each other, or each head is whole.
    """
    if BESIDE:
        return ptr + ((b * N + n) * H + h) * WIDTH, H * WIDTH
    else:
        return ptr + ((b * H + h) * N + n) * WIDTH, WIDTH * 1


@triton.jit
def store_tile(
    ptr,
    tile,
    rows,
    stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Writes a tile, or adds it, as rows of WIDTH elements, `stride` apart."""
    at = ptr + tile_offsets(stride, 1, ROWS, COLUMNS)
    inside = _inside(rows, WIDTH, ROWS, COLUMNS)
    if ADD:
        tile += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def mask_tile(
    ptr, stride_row, stride_column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A tile of the mask; a stride of None stands for an axis that the mask lacks."""
    if stride_row is None:
        column = tl.arange(0, COLUMNS)
        tile = tl.load(ptr + column * stride_column, mask=column < columns, other=0)[None, :]
    elif stride_column is None:
        row = tl.arange(0, ROWS)
        tile = tl.load(ptr + row * stride_row, mask=row < rows, other=0)[:, None]
    else:
        inside = (tl.arange(0, ROWS)[:, None] < rows) & (tl.arange(0, COLUMNS)[None, :] < columns)
        at = ptr + tile_offsets(stride_row, stride_column, ROWS, COLUMNS)
        tile = tl.load(at, mask=inside, other=0)
    return tile != 0


@triton.jit(do_not_specialize=COUNTS)
def forward(
    q_ptr,
    k_ptr,
    c_ptr,
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
    c_b,
    c_h,
    c_j,
    mask_b,
    mask_h,
    mask_n,
    mask_m,
    H,
    N,
    M,
    scale,
    origin,
    density,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    START: tl.constexpr,
    FEATURE: tl.constexpr,
    BASE: tl.constexpr,
    MASK: tl.constexpr,
    ADD: tl.constexpr,
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
    c_ptr += b * c_b + h * c_h
    if MASK:
        mask_ptr += b * mask_b + h * mask_h
        if mask_n is not None:
            mask_ptr += n * mask_n
    q = load_tile(q_ptr, tile_offsets(q_n, q_d, BLOCK_N, D), N - first, WIDTH, BLOCK_N, D)
    k_offsets = tile_offsets(k_m, k_d, BLOCK_M, D)
    c_offsets = tile_offsets(R, 1, BLOCK_M, R)
    y = tl.zeros([BLOCK_N, R], tl.float32)
    for m in range(0, M, BLOCK_M):
        k = load_tile(k_ptr, k_offsets, M - m, WIDTH, BLOCK_M, D)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASK:
            keep = mask_tile(mask_ptr, mask_n, mask_m, N - first, M - m, BLOCK_N, BLOCK_M)
            # what is masked may not be finite
            x = tl.where(keep, x, 0.0)
            gate = tl.where(keep, tl.full(x.shape, 1.0, tl.float32), 0.0)
            mask_ptr += BLOCK_M * mask_m
        else:
            gate = tl.full(x.shape, 1.0, tl.float32)
        state = START(x, gate, origin, density, FAST)
        for J in tl.static_range(LAST):
            f, _, state = feature(x, gate, state, density, J, SIZE, FEATURE, BASE)
            if J >= FIRST:
                c = tl.load(c_ptr + J * c_j + c_offsets)
                y = tl.dot(f.to(c.dtype), c, y, input_precision=PRECISION)
        k_ptr += BLOCK_M * k_m
        c_ptr += BLOCK_M * R
    store_tile(y_ptr + (head * N + n) * RANK, y, N - first, RANK, RANK, BLOCK_N, R, ADD)


@triton.jit(do_not_specialize=COUNTS)
def query_gradient(
    q_ptr,
    k_ptr,
    c_ptr,
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
    c_b,
    c_h,
    c_j,
    mask_b,
    mask_h,
    mask_n,
    mask_m,
    H,
    N,
    M,
    scale,
    origin,
    density,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    START: tl.constexpr,
    FEATURE: tl.constexpr,
    BASE: tl.constexpr,
    MASK: tl.constexpr,
    BESIDE: tl.constexpr,
    ADD: tl.constexpr,
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
    c_ptr += b * c_b + h * c_h
    if MASK:
        mask_ptr += b * mask_b + h * mask_h
        if mask_n is not None:
            mask_ptr += n * mask_n
    q = load_tile(q_ptr, tile_offsets(q_n, q_d, BLOCK_N, D), N - first, WIDTH, BLOCK_N, D)
    dy_ptr += (head * N + n) * RANK
    dy = load_tile(dy_ptr, tile_offsets(RANK, 1, BLOCK_N, R), N - first, RANK, BLOCK_N, R)
    dy = dy.to(c_ptr.dtype.element_ty)
    k_offsets = tile_offsets(k_m, k_d, BLOCK_M, D)
    c_offsets = _pair_offsets(c_j, BLOCK_M, R)
    dq = tl.zeros([BLOCK_N, D], tl.float32)
    for m in range(0, M, BLOCK_M):
        k = load_tile(k_ptr, k_offsets, M - m, WIDTH, BLOCK_M, D)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASK:
            keep = mask_tile(mask_ptr, mask_n, mask_m, N - first, M - m, BLOCK_N, BLOCK_M)
            # what is masked may not be finite
            x = tl.where(keep, x, 0.0)
            gate = tl.where(keep, tl.full(x.shape, 1.0, tl.float32), 0.0)
            mask_ptr += BLOCK_M * mask_m
        else:
            gate = tl.full(x.shape, 1.0, tl.float32)
        state = START(x, gate, origin, density, FAST)
        dx = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for J in tl.static_range(0, LAST, 2):
            _, g0, state = feature(x, gate, state, density, J, SIZE, FEATURE, BASE)
            _, g1, state = feature(x, gate, state, density, J + 1, SIZE, FEATURE, BASE)
            if J >= FIRST:
                c = tl.load(c_ptr + J * c_j + c_offsets)
                df0, df1 = _unstack(tl.dot(dy, tl.trans(c), input_precision=PRECISION), 1)
                dx += g0 * df0
                dx += g1 * df1
        dq = tl.dot(dx.to(k.dtype), k, dq, input_precision=PRECISION)
        k_ptr += BLOCK_M * k_m
        c_ptr += BLOCK_M * R
    dq_at, stride = rows_at(dq_ptr, b, h, n, H, N, WIDTH, BESIDE)
    store_tile(dq_at, dq * scale, N - first, stride, WIDTH, BLOCK_N, D, ADD)


@triton.jit(do_not_specialize=COUNTS)
def key_gradient(
    q_ptr,
    k_ptr,
    c_ptr,
    mask_ptr,
    dy_ptr,
    dk_ptr,
    dc_ptr,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_m,
    k_d,
    c_b,
    c_h,
    c_j,
    mask_b,
    mask_h,
    mask_n,
    mask_m,
    B,
    samples,
    H,
    N,
    M,
    scale,
    origin,
    density,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    START: tl.constexpr,
    FEATURE: tl.constexpr,
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
    # one slice is one sample where the coefficients differ between samples
    c_ptr += start.to(tl.int64) * c_b + h * c_h + m * R
    c_offsets = _pair_offsets(c_j, BLOCK_M, R)
    k_offsets = tile_offsets(k_m, k_d, BLOCK_M, D)
    q_offsets = tile_offsets(q_n, q_d, BLOCK_N, D)
    dy_offsets = tile_offsets(RANK, 1, BLOCK_N, R)
    c = ()
    dc = ()
    for J in tl.static_range(FIRST, LAST, 2):
        c += (tl.load(c_ptr + J * c_j + c_offsets),)
        dc += (tl.zeros([2 * BLOCK_M, R], tl.float32),)
    # without hoisting: the addresses of dK would hold registers all through the inner loop
    for sample in tl.range(start, tl.minimum(start + samples, B), disable_licm=True):
        b = tl.cast(sample, tl.int64)
        q_at = q_ptr + b * q_b + h * q_h
        k_at = k_ptr + b * k_b + h * k_h + m * k_m
        dy_at = dy_ptr + (b * H + h) * N * RANK
        if MASK:
            mask_at = mask_ptr + b * mask_b + h * mask_h + m * mask_m
        k = load_tile(k_at, k_offsets, M - first, WIDTH, BLOCK_M, D)
        dk = tl.zeros([BLOCK_M, D], tl.float32)
        for n in tl.range(0, N, BLOCK_N, disable_licm=True):
            q = load_tile(q_at, q_offsets, N - n, WIDTH, BLOCK_N, D)
            dy = load_tile(dy_at, dy_offsets, N - n, RANK, BLOCK_N, R).to(c_ptr.dtype.element_ty)
            x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            if MASK:
                keep = mask_tile(mask_at, mask_m, mask_n, M - first, N - n, BLOCK_M, BLOCK_N)
                x = tl.where(keep, x, 0.0)
                gate = tl.where(keep, tl.full(x.shape, 1.0, tl.float32), 0.0)
                if mask_n is not None:
                    mask_at += BLOCK_N * mask_n
            else:
                gate = tl.full(x.shape, 1.0, tl.float32)
            state = START(x, gate, origin, density, FAST)
            dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            sums = ()
            for J in tl.static_range(0, LAST, 2):
                f0, g0, state = feature(x, gate, state, density, J, SIZE, FEATURE, BASE)
                f1, g1, state = feature(x, gate, state, density, J + 1, SIZE, FEATURE, BASE)
                if J >= FIRST:
                    df = tl.dot(c[(J - FIRST) // 2], tl.trans(dy), input_precision=PRECISION)
                    df0, df1 = _unstack(df, 0)
                    dx += g0 * df0
                    dx += g1 * df1
                    f = _stack(f0.to(dy.dtype), f1.to(dy.dtype), 0)
                    sums += (tl.dot(f, dy, dc[(J - FIRST) // 2], input_precision=PRECISION),)
            dc = sums
            dk = tl.dot(dx.to(q.dtype), q, dk, input_precision=PRECISION)
            q_at += BLOCK_N * q_n
            dy_at += BLOCK_N * RANK
        dk_at, stride = rows_at(dk_ptr, b, h, m, H, M, WIDTH, BESIDE)
        store_tile(dk_at, dk * scale, M - first, stride, WIDTH, BLOCK_M, D, ADD)
    # partial sums (slices, H, COUNT, M, r)
    row = head.to(tl.int64) * COUNT
    for J in tl.static_range(FIRST, LAST, 2):
        at = dc_ptr + ((row + J) * M + m) * RANK
        dc0, dc1 = _unstack(dc[(J - FIRST) // 2], 0)
        store_tile(at, dc0, M - first, RANK, RANK, BLOCK_M, R, False)
        if J + 1 < LAST:
            at += tl.cast(M, tl.int64) * RANK
            store_tile(at, dc1, M - first, RANK, RANK, BLOCK_M, R, False)
