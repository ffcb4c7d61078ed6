"""The Triton engine: forward and backward of the streamed product on CUDA, as raw operations.

Raw means outside autograd and `torch.func`: `kart.kernels` wraps them. Triton is imported by the
first call, so that a machine without it can import this module. With TRITON_INTERPRET=1 in the
environment before that call the same kernels run on CPU tensors, slowly: so they are tested.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("tf32", "tf32x3", "ieee")
# programs wanted in a launch of `key_gradient`, two for each SM of an H100. A constant, so that the
# order of summation, and with it the last bit, does not depend on the GPU
PROGRAMS = 264
# ranks of one launch, of which a program holds a tile
RANKS = 64


class Family(NamedTuple):
    """What the kernels know of a basis: `size` features, then that of `base` unless it is "zero".

    The features of score x are functions of `(x - origin) * density`; those of "fourier" and
    "polynomial" of x itself.
    """

    name: str
    size: int
    base: str = "zero"
    origin: float = 0.0
    density: float = 1.0


def family(basis: Any) -> Family | None:
    """The `Family` of a basis of `kart.bases`, or None where the kernels do not have it."""
    options = basis.options
    low, high = options.get("span", (0.0, 1.0))
    if basis.family in ("fourier", "polynomial"):
        placed = 0.0, 1.0
    elif basis.family == "chebyshev":
        placed = (low + high) / 2, 2 / (high - low)
    elif basis.family == "gaussian_rbf":
        placed = low, (options["grid"] - 1) / (high - low)
    elif basis.family == "bspline" and options["degree"] == 3:
        placed = low, options["grid"] / (high - low)
    else:
        return None
    return Family(basis.family, basis.size, options.get("base", "zero"), *placed)


class Tiles(NamedTuple):
    """How a kernel is cut: queries and keys of a block, warps, pipeline stages, features of a
    launch.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    features: int


def tiles(kernel: str, dtype: torch.dtype, width: int, ranks: int) -> Tiles:
    """The tiles of "forward", "query_gradient" or "key_gradient" for padded head width and rank.

    Chosen from registers and spills of builds for sm_90 (tests/test_triton_aot.py).
    """
    if kernel == "key_gradient":
        return Tiles(32, 64, 4, 2, max(2, 96 // ranks))
    return Tiles(64, 64, 4, 2, 6)


def _check(
    q: Tensor, k: Tensor, coefs: Tensor, mask: Tensor | None, family: Family, precision: str
) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"`triton` needs `q` (B, H, N, d) and `k` (B, H, M, d), got {tuple(q.shape)} and "
            f"{tuple(k.shape)}. Fold or add leading axes first."
        )
    count = family.size + (family.base != "zero")
    if (
        coefs.dim() != 5
        or coefs.shape[0] not in (1, q.shape[0])
        or (coefs.shape[1], *coefs.shape[3:]) != (*k.shape[1:3], count)
    ):
        raise ValueError(
            f"`triton` needs `coefs` (B or 1, H, r, M, K') = ({q.shape[0]} or 1, {k.shape[1]}, r, "
            f"{k.shape[2]}, {count}), got {tuple(coefs.shape)}. Fold or add leading axes first."
        )
    if 0 in q.shape or 0 in k.shape or 0 in coefs.shape or q.shape[3] > 128:
        raise ValueError(
            f"`triton` needs non-empty inputs and a head width d <= 128, got `q` {tuple(q.shape)}, "
            f"`k` {tuple(k.shape)}, `coefs` {tuple(coefs.shape)}. Use engine='torch' for others."
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or coefs.dtype not in DTYPES:
        raise ValueError(
            f"`triton` needs `q` and `k` of one dtype and `coefs` in float32, bfloat16 or float16, "
            f"got {q.dtype}, {k.dtype}, {coefs.dtype}. Convert them, or use engine='torch'."
        )
    if not q.device == k.device == coefs.device == (q if mask is None else mask).device:
        raise ValueError(
            f"`triton` needs `q`, `k`, `coefs` and `mask` on one device, got `q` on {q.device}, "
            f"`k` on {k.device}, `coefs` on {coefs.device}. Move them with tree.to."
        )
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(
            f"`triton` needs a boolean `mask` (True = attend), got {mask.dtype}. Pass mask != 0."
        )
    if precision not in PRECISIONS:
        raise ValueError(
            f"`triton` needs `precision` in {PRECISIONS}, got {precision!r}. Choose one of them."
        )


def _slopes(coefs: Tensor, family: Family) -> Tensor:
    """D of `(..., K')` coefs C: what the kernels multiply with their features, or slopes, in dS."""
    weights, base = coefs.split([family.size, coefs.shape[-1] - family.size], dim=-1)
    order = torch.arange(family.size, device=coefs.device, dtype=torch.float32)
    if family.name == "fourier":
        grid = family.size // 2
        cosine, sine = weights.split(grid, dim=-1)
        order = order[:grid] + 1
        weights = torch.cat([order * sine, -order * cosine], dim=-1)
    elif family.name == "polynomial":
        weights = torch.cat([(weights * order)[..., 1:], torch.zeros_like(weights[..., :1])], -1)
    elif family.name == "chebyshev":
        # T_n' = 2 n (T_{n-1} + T_{n-3} + ..), its T_0 once
        above = order[:, None] - order
        matrix = torch.where((above > 0) & (above % 2 == 1), 2 * order[:, None], 0.0)
        matrix = matrix * torch.where(order == 0, 0.5, 1.0) * family.density
        weights = weights.float() @ matrix
    return torch.cat([weights, base], dim=-1)


def _pack(coefs: Tensor, family: Family, dtype: torch.dtype) -> Tensor:
    """`(batch, H, r, M, K')` to the kernels' `(batch, H, K'', M', R)`, zero beyond K', M and r."""
    batch, heads, rank, keys, count = coefs.shape
    # K'' is even: the kernels take features in pairs
    shape = (batch, heads, count + count % 2, -(-keys // 128) * 128, _padded(rank))
    packed = torch.zeros(shape, dtype=dtype, device=coefs.device)
    inside = packed[:, :, :count, :keys, :rank]
    inside.copy_(coefs.permute(0, 1, 4, 3, 2))
    if family.name == "fourier":
        # the kernels' cosines are doubled
        inside[:, :, : family.size // 2] *= 0.5
    return packed


def _padded(size: int) -> int:
    # matrix products take no less than 16 and powers of two only
    return max(16, 1 << (size - 1).bit_length())


def _common(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, family: Family, precision: str
) -> dict[str, Any]:
    """The arguments that all three kernels share."""
    from triton import knobs

    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    interpreted = knobs.runtime.interpret
    if not (q.is_cuda or interpreted):
        raise ValueError(
            f"`triton` needs CUDA tensors, got {q.device}. Use engine='torch', or set "
            "TRITON_INTERPRET=1 before triton is imported to run its interpreter."
        )
    strides: list[int | None] = [None] * 4
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys).view(torch.uint8)
        strides = [*mask.stride()]
        if strides[2] == 0 or queries == 1:
            strides[2] = None
    names = "q_b q_h q_n q_d k_b k_h k_m k_d mask_b mask_h mask_n mask_m"
    return {
        **dict(zip(names.split(), (*q.stride(), *k.stride(), *strides), strict=True)),
        "q_ptr": q,
        "k_ptr": k,
        "mask_ptr": mask,
        "H": heads,
        "N": queries,
        "M": keys,
        "scale": float(scale),
        "origin": float(family.origin),
        "density": float(family.density),
        "WIDTH": width,
        "D": _padded(width),
        "SIZE": family.size,
        "FAMILY": family.name,
        "BASE": family.base,
        "MASK": mask is not None,
        "PRECISION": precision,
        "FAST": not interpreted,
        # the range reduction and the recurrences are written for fused multiply-add
        "enable_fp_fusion": True,
    }


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    common: dict[str, Any],
    packed: Tensor,
    tile: Tiles,
    first: int,
    last: int,
    **arguments: Any,
) -> None:
    # a batch of one set of coefficients serves all images
    c_b = packed.stride(0) if packed.shape[0] > 1 else 0
    q = common["q_ptr"]
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        kernel[grid](
            **common,
            **arguments,
            c_ptr=packed,
            c_b=c_b,
            c_h=packed.stride(1),
            c_j=packed.stride(2),
            R=packed.shape[4],
            FIRST=first,
            LAST=last,
            BLOCK_N=tile.queries,
            BLOCK_M=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def forward(
    q: Tensor,
    k: Tensor,
    coefs: Tensor,
    mask: Tensor | None,
    scale: float,
    family: Family,
    precision: str = "tf32",
    choose: Callable[..., Tiles] = tiles,
) -> Tensor:
    """`y[b, h, n, p] = sum_m mask sum_j f_j(scale q_n . k_m) coefs[b, h, p, m, j]`, `(B, H, N, r)`.

    Args:
        q, k: `(B, H, N, d)`, `(B, H, M, d)`, d <= 128, any strides; float32, bfloat16 or float16.
        coefs: `(B, H, r, M, K')`, or with a batch of 1 for all of B.
        mask: boolean, True = attend, or None; expands to `(B, H, N, M)`.
        precision: of the matrix products of float32 inputs: "tf32" rounds their operands to 11
            bits; "tf32x3" keeps about 22 at three times the cost; "ieee" is exact and slow.
        choose: the tiles of a kernel, see `tiles`; to tune them.

    Returns:
        y, contiguous, in the dtype of q. Scores and sums are float32; for Fourier the angle of
        harmonic g is then right to `g (abs(score) 2^-24 + 2^-22)` and the hardware's sine to
        2^-20.5, up to scores of 2^15 turns (2e5); beyond, the score itself has no digits left.
    """
    from kart.kernels.triton import device

    _check(q, k, coefs, mask, family, precision)
    batch, heads, queries, _ = q.shape
    common = _common(q, k, mask, scale, family, precision)
    outputs = []
    for part in coefs.split(RANKS, dim=2):
        packed = _pack(part, family, q.dtype)
        rank, count = part.shape[2], part.shape[4]
        tile = choose("forward", q.dtype, common["D"], packed.shape[4])
        starts = range(0, count, tile.features)
        # what several launches add up is kept in float32 until the last
        wide = q.dtype if len(starts) == 1 else torch.float32
        y = torch.empty((batch, heads, queries, rank), dtype=wide, device=q.device)
        grid = (-(-queries // tile.queries), batch * heads)
        for first in starts:
            last = min(first + tile.features, count)
            _launch(
                device.forward,
                grid,
                common,
                packed,
                tile,
                first,
                last,
                y_ptr=y,
                RANK=rank,
                ADD=first > 0,
            )
        outputs.append(y.to(q.dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    coefs: Tensor,
    mask: Tensor | None,
    scale: float,
    family: Family,
    precision: str = "tf32",
    choose: Callable[..., Tiles] = tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients `(dq, dk, dcoefs)` of `(forward(...) * dy).sum()`, contiguous, of the shape and
    dtype of q, k and coefs.

    dcoefs is summed over the batch where coefs has a batch of 1. No atomics: two runs agree in
    every bit.
    """
    from kart.kernels.triton import device

    _check(q, k, coefs, mask, family, precision)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    if dy.shape != (batch, heads, queries, coefs.shape[2]):
        raise ValueError(
            f"`triton` needs `dy` {(batch, heads, queries, coefs.shape[2])}, got "
            f"{tuple(dy.shape)}. Pass the gradient of what `forward` returned."
        )
    common = _common(q, k, mask, scale, family, precision)
    slopes = _slopes(coefs, family)
    parts = list(zip(slopes.split(RANKS, 2), dy.split(RANKS, 3), strict=True))
    count = coefs.shape[4]

    def starts(kernel: str) -> tuple[Tiles, range, torch.dtype]:
        tile = choose(kernel, q.dtype, common["D"], _padded(min(coefs.shape[2], RANKS)))
        several = len(parts) > 1 or count > tile.features
        return tile, range(0, count, tile.features), torch.float32 if several else q.dtype

    tile_q, starts_q, wide = starts("query_gradient")
    dq = torch.empty((batch, heads, queries, width), dtype=wide, device=q.device)
    tile_k, starts_k, wide = starts("key_gradient")
    dk = torch.empty((batch, heads, keys, width), dtype=wide, device=q.device)
    grid_q = (-(-queries // tile_q.queries), batch * heads)
    blocks = -(-keys // tile_k.keys) * heads
    images = 1 if coefs.shape[0] > 1 else -(-batch // min(batch, -(-PROGRAMS // blocks)))
    slices = -(-batch // images)
    grid_k = (-(-keys // tile_k.keys), heads, slices)
    dcoefs = []
    for i, (part, dy_part) in enumerate(parts):
        packed = _pack(part, family, q.dtype)
        rank = part.shape[2]
        common |= {"dy_ptr": dy_part.contiguous(), "RANK": rank}
        for first in starts_q:
            last = min(first + tile_q.features, count)
            add = i > 0 or first > 0
            _launch(
                device.query_gradient,
                grid_q,
                common,
                packed,
                tile_q,
                first,
                last,
                dq_ptr=dq,
                ADD=add,
            )
        features = []
        for first in starts_k:
            last = min(first + tile_k.features, count)
            add = i > 0 or first > 0
            shape = (slices, heads, last - first, keys, rank)
            partial = torch.empty(shape, dtype=torch.float32, device=q.device)
            _launch(
                device.key_gradient,
                grid_k,
                common,
                packed,
                tile_k,
                first,
                last,
                dk_ptr=dk,
                dc_ptr=partial,
                B=batch,
                images=images,
                ADD=add,
            )
            features.append(partial if coefs.shape[0] > 1 else partial.sum(0, keepdim=True))
        dcoefs.append(torch.cat(features, dim=2).permute(0, 1, 4, 3, 2))
    dc = torch.cat(dcoefs, dim=2).to(coefs.dtype).contiguous()
    return dq.to(q.dtype), dk.to(k.dtype), dc
