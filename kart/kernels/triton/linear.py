"""Launches of the kernels of the linear families, see `device`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kart.kernels.arguments import side_by_side
from kart.kernels.family import Product
from kart.kernels.triton.coefs import KEYS, Matrix, combinations, pack, unpack
from kart.kernels.triton.launch import (
    Kind,
    Launcher,
    Tiles,
    batch_stride,
    groups,
    padded,
    room_for,
    slices,
)

# ranks in a launch: a program holds a tile of all of them
RANKS = 64


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

    Chosen from registers and spills of builds for sm_90 (tests/test_triton_aot.py), those of half
    types of Fourier bases from times on an H200, at 197 and at 785 tokens.
    """
    # operands of float32, above all if split in two, masks and slopes take registers of their own
    wide = dtype == torch.float32
    split = wide and precision != "tf32"
    exact = wide and precision == "ieee"
    local = kind.piece.fold is None
    stages = 2 if wide or local else 3
    # what hardly fits into the shared memory of smaller GPUs
    huge = wide and width > 64 and ranks > 32
    if kernel == "key_gradient":
        # dK takes width / 2 registers and dC ranks / 2 for each feature
        features = 4 if local and not huge else min(8, max(2, (160 - width) // ranks // 2 * 2))
        stages = 2 if masked or ranks > 32 else stages
        keys = 32 if exact or huge else 64
        return Tiles(16 if split or local else 32, keys, 4, stages, features)
    large = split and (width > 64 or ranks > 32 or masked or exact)
    light = kernel == "forward" and wide and not (split or ranks > 16 or local or masked)
    features = max(2, (12 if wide else 24) * 16 // ranks // 2 * 2)
    features = min(6, features) if local and kernel == "query_gradient" else features
    return Tiles(32 if huge else 64, 16 if large else 64 if light else 32, 4, stages, features)


def _packed(coefs: Tensor, matrix: Matrix, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that coefficients `(batch, H, r, M, K)` are, combined by `matrix`: `(batch, H,
    K'', M', R)`, zero beyond K, M and r.
    """
    batch, heads, rank, keys, _ = coefs.shape
    # K'' is even: the backward kernels take features in pairs
    count, tokens = len(matrix) + len(matrix) % 2, math.ceil(keys / KEYS) * KEYS
    shape = (batch, heads, count, tokens, padded(rank))
    packed = torch.empty(shape, dtype=dtype, device=coefs.device)
    pack(coefs, matrix, packed.permute(0, 1, 4, 3, 2))
    strides = {"c_b": batch_stride(packed), "c_h": packed.stride(1), "c_j": packed.stride(2)}
    return {"c_ptr": packed, **strides, "R": packed.shape[4]}


class _Launcher(Launcher):
    """The kernels, with the arguments that they share."""

    def __init__(self, product: Product, precision: str | None, choose: Callable[..., Tiles]):
        from kart.kernels.triton import device

        super().__init__(product, precision, choose)
        self.kernels = device
        piece = self.kind.piece
        start, feature = device.functions(piece, "start", "feature")
        self.shared |= {
            "origin": float(piece.origin),
            "density": float(piece.density),
            "SIZE": self.kind.size,
            "START": start,
            "FEATURE": feature,
        }


def forward(product: Product, precision: str | None, choose: Callable[..., Tiles]) -> Tensor:
    """The product, see `kart.kernels.triton`."""
    _, q, _, coefs, _, _ = product
    batch, heads, queries, _ = q.shape
    launch = _Launcher(product, precision, choose)
    matrix, _, _ = combinations(product.family)
    outputs = [q.new_empty(batch, heads, queries, 0)]
    for part in coefs.split(RANKS, dim=2):
        rank = part.shape[2]
        tile = launch.tiles("forward", padded(rank))
        features = groups(coefs.shape[4], tile.held)
        # what several launches add up is float32 until the last
        dtype = q.dtype if len(features) == 1 else torch.float32
        y = torch.empty(batch, heads, queries, rank, dtype=dtype, device=q.device)
        if batch:
            grid = (math.ceil(queries / tile.queries) * batch * heads,)
            shared = {**_packed(part, matrix, q.dtype), "y_ptr": y, "RANK": rank}
            for first, last in features:
                shared |= {"FIRST": first, "LAST": last, "ADD": first > 0}
                launch("forward", grid, tile, **shared)
        outputs.append(y.to(q.dtype))
    return outputs[1] if len(outputs) == 2 else torch.cat(outputs, dim=-1)


def backward(
    product: Product, dy: Tensor, precision: str | None, choose: Callable[..., Tiles]
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients, see `kart.kernels.triton`."""
    _, q, k, coefs, _, _ = product
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if not batch:
        zeros = torch.zeros_like(coefs, memory_format=torch.contiguous_format)
        return room_for(q, False), room_for(k, False), zeros
    launch = _Launcher(product, precision, choose)
    _, matrix, factors = combinations(product.family)
    parts = list(zip(coefs.split(RANKS, 2), dy.split(RANKS, 3), strict=True))
    plans = []
    for kernel, x in (("query_gradient", q), ("key_gradient", k)):
        tile = launch.tiles(kernel, padded(parts[0][0].shape[2]))
        features = groups(coefs.shape[4], tile.held)
        several = len(parts) * len(features) > 1
        plans.append((tile, features, room_for(x, several)))
    (tile_q, features_q, dq), (tile_k, features_k, dk) = plans
    to_q = {"dq_ptr": dq, "BESIDE": side_by_side(q)}
    to_k = {"dk_ptr": dk, "BESIDE": side_by_side(k)}
    blocks = math.ceil(keys / tile_k.keys) * heads
    samples, count = slices(product, blocks)
    dcoefs = torch.empty(coefs.shape, dtype=coefs.dtype, device=coefs.device)
    for i, (part, dy_part) in enumerate(parts):
        rank = part.shape[2]
        shared = {**_packed(part, matrix, q.dtype), "dy_ptr": dy_part.contiguous(), "RANK": rank}
        grid = (math.ceil(queries / tile_q.queries) * batch * heads,)
        for first, last in features_q:
            each = {"FIRST": first, "LAST": last, "ADD": i + first > 0}
            launch("query_gradient", grid, tile_q, **shared, **each, **to_q)
        grid = (blocks * count,)
        dc = q.new_empty(count, heads, coefs.shape[4], keys, rank, dtype=torch.float32)
        shared |= {"dc_ptr": dc, "COUNT": dc.shape[2], "B": batch, "samples": samples}
        for first, last in features_k:
            each = {"FIRST": first, "LAST": last, "ADD": i + first > 0}
            launch("key_gradient", grid, tile_k, **shared, **each, **to_k)
        unpack(dc, dcoefs.narrow(2, i * RANKS, rank), factors)
    return dq.to(q.dtype), dk.to(k.dtype), dcoefs
