"""The "triton" engine: the streamed product on CUDA, for the linear bases that bring their features
in Triton.

`forward` and `backward` are raw operations on a `kart.kernels.family.Product`, deterministic and
seen by no transform. Triton itself is imported by their first call. With TRITON_INTERPRET=1 in the
environment before that, the same kernels run on CPU tensors, slowly: so they are tested.

Products of float32 inputs follow `torch.set_float32_matmul_precision`: "highest", torch's default,
splits each operand in two ("tf32x3", about 22 bits); "high" and "medium" round it to tf32 (11
bits: with a score of 100 goes an error of 0.05). Scores and sums are float32 for every input.
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart.kernels.family import Family, Product

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# programs wanted in a launch of `key_gradient`, two for each SM of an H100. A constant, so that the
# order of summation, and with it the last bit, does not depend on the GPU
PROGRAMS = 264
# ranks in a launch: a program holds a tile of all of them
RANKS = 64
WIDTH = 128


class Kind(NamedTuple):
    """What the kernels know of a basis: `size` features, then that of `base` unless it is "zero".

    `piece` is the `kart.bases.basis.Triton` of its family.
    """

    name: str
    size: int
    base: str
    piece: Any


def kind_of(family: Family) -> Kind | None:
    """The `Kind` that a family declares, or None where the kernels do not have it."""
    piece = getattr(family.pieces, "triton", None)
    if piece is None:
        return None
    size = family.width - (family.base != "zero")
    return Kind(family.basis.family, size, family.base, piece)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def status() -> str:
    """ "ready", or why the engine cannot run here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available() or _interpreted():
        return "ready"
    return "torch sees no CUDA device"


def refuses(product: Product) -> str:
    """Why the engine cannot take these inputs, or ""."""
    family, q, _, coefs, _, _ = product
    if status() != "ready":
        return status()
    if q.device.type != "cuda" and not _interpreted():
        return f"the Triton engine runs on CUDA, not on {q.device.type}"
    if kind_of(family) is None:
        return f"the Triton engine has no {family.basis.family!r} basis of this kind"
    if q.dtype not in DTYPES or coefs.dtype not in DTYPES:
        return f"the Triton engine has no {q.dtype}"
    if q.shape[-1] > WIDTH:
        return f"the Triton engine takes heads of width {WIDTH} at most, not {q.shape[-1]}"
    return ""


class Tiles(NamedTuple):
    """How a launch is cut: queries and keys of a block, warps, pipeline stages, features."""

    queries: int
    keys: int
    warps: int
    stages: int
    features: int


def tiles(
    kernel: str,
    dtype: torch.dtype,
    precision: str,
    width: int,
    ranks: int,
    masked: bool,
    kind: Kind,
) -> Tiles:
    """The tiles of "forward", "query_gradient" or "key_gradient" for a padded width and rank.

    Chosen from registers and spills of builds for sm_90 (tests/test_triton_aot.py).
    """
    # operands of float32, above all if split in two, masks and slopes take registers of their own
    wide = dtype == torch.float32
    split = wide and precision != "tf32"
    exact = wide and precision == "ieee"
    local = kind.piece.fold is None
    large = width > 64 or ranks > 32
    if kernel == "key_gradient":
        # dK takes width / 2 registers and dC ranks / 2 for each feature
        features = 4 if local else min(8, max(2, (160 - width) // ranks // 2 * 2))
        return Tiles(16 if split or local else 32, 32 if exact else 64, 4, 2, features)
    if kernel == "forward":
        heavy = split or (wide and (ranks > 16 or local or masked))
    else:
        heavy = wide or masked or local or large or kind.size > 6
    keys = 64 if not heavy else 16 if split and (large or masked or exact) else 32
    features = 6 if local and kernel == "query_gradient" else 24 * 16 // ranks
    return Tiles(64, keys, 4, 2, features)


def _slopes(coefs: Tensor, kind: Kind) -> Tensor:
    """D of coefs C `(..., K')`: what the kernels multiply with their features, or slopes, in dS."""
    if kind.piece.fold is None:
        return coefs
    weights, base = coefs.split([kind.size, coefs.shape[-1] - kind.size], dim=-1)
    return torch.cat([kind.piece.fold(weights.float().mT).mT, base.float()], dim=-1)


def _padded(size: int) -> int:
    # matrix products take powers of two from 16 on
    return max(16, 1 << (size - 1).bit_length())


def _pack(coefs: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
    """`(batch, H, r, M, K')` to the kernels' `(batch, H, K'', M', R)`, zero beyond K', M and r."""
    batch, heads, rank, keys, count = coefs.shape
    # K'' is even: the backward kernels take features in pairs
    shape = (batch, heads, count + count % 2, math.ceil(keys / 64) * 64, _padded(rank))
    packed = torch.zeros(shape, dtype=dtype, device=coefs.device)
    inside = packed[:, :, :count, :keys, :rank]
    inside.copy_(coefs.permute(0, 1, 4, 3, 2))
    if kind.piece.rescale is not None:
        kind.piece.rescale(inside)
    return packed


class _Launcher:
    """The kernels, with the arguments that they share."""

    def __init__(self, product: Product, kind: Kind, precision: str | None, choose):
        _, q, k, coefs, mask, scale = product
        self.kind, self.choose, self.q = kind, choose, q
        if precision is None:
            highest = torch.get_float32_matmul_precision() == "highest"
            precision = "tf32x3" if highest else "tf32"
        self.precision = precision
        self.count = coefs.shape[4]
        batch, heads, queries, width = q.shape
        keys = k.shape[2]
        strides: list[int | None] = [None] * 4
        if mask is not None:
            mask = mask.expand(batch, heads, queries, keys).view(torch.uint8)
            strides = [*mask.stride()]
            if strides[2] == 0:
                strides[2] = None  # a mask of keys alone
        self.shared: dict[str, Any] = {
            **dict(zip(("q_b", "q_h", "q_n", "q_d"), q.stride(), strict=True)),
            **dict(zip(("k_b", "k_h", "k_m", "k_d"), k.stride(), strict=True)),
            **dict(zip(("mask_b", "mask_h", "mask_n", "mask_m"), strides, strict=True)),
            "q_ptr": q,
            "k_ptr": k,
            "mask_ptr": mask,
            "H": heads,
            "N": queries,
            "M": keys,
            "scale": scale,
            "origin": float(kind.piece.origin),
            "density": float(kind.piece.density),
            "WIDTH": width,
            "D": _padded(width),
            "SIZE": kind.size,
            "BASE": kind.base,
            "MASK": mask is not None,
            "PRECISION": precision,
            "FAST": not _interpreted(),
            # the reduction of angles and the recurrences are meant for fused multiply-add
            "enable_fp_fusion": True,
        }

    def tiles(self, kernel: str, rank: int) -> Tiles:
        width, masked = self.shared["D"], self.shared["MASK"]
        ranks = _padded(rank)
        return self.choose(kernel, self.q.dtype, self.precision, width, ranks, masked, self.kind)

    def groups(self, tile: Tiles) -> list[tuple[int, int]]:
        """First and last of the features of each launch."""
        starts = range(0, self.count, tile.features)
        return [(first, min(first + tile.features, self.count)) for first in starts]

    def __call__(
        self, kernel: str, grid: tuple[int, ...], tile: Tiles, packed: Tensor, **arguments: Any
    ) -> None:
        from kart.kernels.triton import device

        start, feature = device.piece(self.kind.piece.text)
        guard = torch.cuda.device(self.q.device) if self.q.is_cuda else contextlib.nullcontext()
        with guard:
            getattr(device, kernel)[grid](
                **self.shared,
                **arguments,
                START=start,
                FEATURE=feature,
                c_ptr=packed,
                # one set of coefficients serves all samples
                c_b=packed.stride(0) if packed.shape[0] > 1 else 0,
                c_h=packed.stride(1),
                c_j=packed.stride(2),
                R=packed.shape[4],
                BLOCK_N=tile.queries,
                BLOCK_M=tile.keys,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


def forward(
    product: Product, precision: str | None = None, choose: Callable[..., Tiles] = tiles
) -> Tensor:
    """The streamed product `(B, H, N, r)`, contiguous, in q's dtype.

    A Fourier feature of harmonic g is right to `g (abs(score) 2^-24 + 2^-20)` up to scores of 2^15
    turns (2e5), where a float32 score has two digits left, and bounded beyond.

    Args:
        precision: "tf32", "tf32x3" or "ieee" (exact, slow) products of float32 inputs; by default
            what torch is set to, see the module.
        choose: of the tiles of each kernel; to tune them.
    """
    family, q, _, coefs, _, _ = product
    kind = kind_of(family)
    assert kind is not None  # `refuses` has asked
    batch, heads, queries, _ = q.shape
    launch = _Launcher(product, kind, precision, choose)
    outputs = [q.new_empty(batch, heads, queries, 0)]
    for part in coefs.split(RANKS, dim=2):
        rank = part.shape[2]
        tile = launch.tiles("forward", rank)
        groups = launch.groups(tile)
        # what several launches add up is float32 until the last
        dtype = q.dtype if len(groups) == 1 else torch.float32
        y = torch.empty(batch, heads, queries, rank, dtype=dtype, device=q.device)
        if batch:
            packed = _pack(part, kind, q.dtype)
            grid = (math.ceil(queries / tile.queries) * batch * heads,)
            shared: dict[str, Any] = {"y_ptr": y, "RANK": rank}
            for first, last in groups:
                shared |= {"FIRST": first, "LAST": last, "ADD": first > 0}
                launch("forward", grid, tile, packed, **shared)
        outputs.append(y.to(q.dtype))
    return outputs[1] if len(outputs) == 2 else torch.cat(outputs, dim=-1)


def backward(
    product: Product,
    dy: Tensor,
    precision: str | None = None,
    choose: Callable[..., Tiles] = tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dcoefs)` of `(forward(...) * dy).sum()`, contiguous, in the dtypes of q, k, coefs.

    dcoefs is summed over the batch where coefs has a batch of 1. Two runs agree in every bit.
    """
    family, q, k, coefs, _, _ = product
    kind = kind_of(family)
    assert kind is not None  # `refuses` has asked
    batch, heads, queries, _ = q.shape
    keys, own = k.shape[2], product.own
    launch = _Launcher(product, kind, precision, choose)
    if not batch:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(coefs)
    parts = list(zip(_slopes(coefs, kind).split(RANKS, 2), dy.split(RANKS, 3), strict=True))
    plans = []
    for kernel, x in (("query_gradient", q), ("key_gradient", k)):
        tile = launch.tiles(kernel, parts[0][0].shape[2])
        groups = launch.groups(tile)
        several = len(parts) * len(groups) > 1
        dtype = torch.float32 if several else x.dtype
        plans.append((tile, groups, torch.empty(x.shape, dtype=dtype, device=x.device)))
    (tile_q, groups_q, dq), (tile_k, groups_k, dk) = plans
    blocks = math.ceil(keys / tile_k.keys) * heads
    # samples in a slice of the batch, over which one program sums dC
    samples = 1 if own else math.ceil(batch / min(batch, math.ceil(PROGRAMS / blocks)))
    slices = math.ceil(batch / samples)
    dcoefs = []
    for i, (part, dy_part) in enumerate(parts):
        rank = part.shape[2]
        packed = _pack(part, kind, q.dtype)
        shared: dict[str, Any] = {"dy_ptr": dy_part.contiguous(), "RANK": rank}
        grid = (math.ceil(queries / tile_q.queries) * batch * heads,)
        for first, last in groups_q:
            shared |= {"FIRST": first, "LAST": last, "ADD": i + first > 0}
            launch("query_gradient", grid, tile_q, packed, dq_ptr=dq, **shared)
        features = []
        for first, last in groups_k:
            shared |= {"FIRST": first, "LAST": last, "ADD": i + first > 0}
            shape = (slices, heads, last - first, keys, rank)
            dc = torch.empty(shape, dtype=torch.float32, device=q.device)
            shared |= {"dc_ptr": dc, "B": batch, "samples": samples}
            launch("key_gradient", (blocks * slices,), tile_k, packed, dk_ptr=dk, **shared)
            features.append(dc if own else dc.sum(0, keepdim=True))
        dc = torch.cat(features, dim=2)
        if kind.piece.rescale is not None:
            kind.piece.rescale(dc)
        dcoefs.append(dc.permute(0, 1, 4, 3, 2))
    dc = torch.cat(dcoefs, dim=2).to(coefs.dtype).contiguous()
    return dq.to(q.dtype), dk.to(k.dtype), dc
