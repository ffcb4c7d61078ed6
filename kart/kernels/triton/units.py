"""Launches of the kernels of units that are not linear in their parameters, see `device_units`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kart.kernels.arguments import side_by_side
from kart.kernels.family import Product
from kart.kernels.triton.coefs import KEYS, identity, pack, unpack
from kart.kernels.triton.launch import Kind, Launcher, Tiles, batch_stride, groups, room_for, slices

# of a unit at most: beyond, its derivatives by them no longer fit the registers
PARAMETERS = 25


def tiles(
    kernel: str,
    dtype: torch.dtype,
    precision: str,
    width: int,
    ranks: int,
    masked: bool,
    kind: Kind,
) -> Tiles:
    """The tiles of "forward", "query_gradient" or "key_gradient" for a padded width and ranks.

    Chosen from registers and spills of builds for sm_90 (tests/test_triton_aot.py).
    """
    count = kind.size + (kind.base != "zero")
    exact = dtype == torch.float32 and precision == "ieee"
    split = dtype == torch.float32 and precision == "tf32x3"
    # a program holds the parameters of its keys, and their derivatives at its scores
    across = 16 if exact or count > 8 or (split and width > 64) else 32
    if kernel == "key_gradient":
        # dtheta takes ranks / 2 registers for each parameter
        held = 16 if count <= 4 else 8 if count <= 12 else 4
        return Tiles(across, 32 if exact else 64, 4, 2, min(held, ranks))
    # the scores are cheap beside the units of 4 ranks, and more programs fill a GPU
    return Tiles(64, across, 4, 2, min(4, ranks))


def _pack(coefs: Tensor) -> Tensor:
    """`(batch, H, r, M, P)` to the kernels' `(batch, H, r, P, M')`, zero beyond M."""
    *lead, keys, count = coefs.shape
    shape = (*lead, count, math.ceil(keys / KEYS) * KEYS)
    packed = torch.empty(shape, dtype=torch.float32, device=coefs.device)
    pack(coefs, identity(count), packed.mT)
    return packed


class _Launcher(Launcher):
    """The kernels, with the arguments that they share."""

    def __init__(self, product: Product, precision: str | None, choose: Callable[..., Tiles]):
        from kart.kernels.triton import device, device_units

        super().__init__(product, precision, choose)
        self.kernels = device_units
        self.ranks, packed = product.coefs.shape[2], _pack(product.coefs)
        (unit,) = device.functions(self.kind.piece, "unit")
        self.shared |= {
            "t_ptr": packed,
            "t_b": batch_stride(packed),
            **dict(zip(("t_h", "t_p", "t_i"), packed.stride()[1:4], strict=True)),
            "RANK": self.ranks,
            "P": packed.shape[3],
            "UNIT": unit,
        }

    def tile(self, kernel: str) -> Tiles:
        """The tiles of a kernel for the ranks of the product."""
        return self.tiles(kernel, 1 << (self.ranks - 1).bit_length())


def forward(product: Product, precision: str | None, choose: Callable[..., Tiles]) -> Tensor:
    """The product, see `kart.kernels.triton`."""
    q, ranks = product.q, product.coefs.shape[2]
    batch, heads, queries, _ = q.shape
    y = q.new_empty(batch, heads, queries, ranks)
    if y.numel():
        launch = _Launcher(product, precision, choose)
        tile = launch.tile("forward")
        programs = math.ceil(queries / tile.queries) * math.ceil(ranks / tile.held)
        grid = (programs * batch * heads,)
        launch("forward", grid, tile, y_ptr=y, R=tile.held)
    return y


def backward(
    product: Product, dy: Tensor, precision: str | None, choose: Callable[..., Tiles]
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients, see `kart.kernels.triton`."""
    _, q, k, coefs, _, _ = product
    batch, heads, queries, _ = q.shape
    ranks, keys, count = coefs.shape[2:]
    if not batch:
        zeros = torch.zeros_like(coefs, memory_format=torch.contiguous_format)
        return room_for(q, False), room_for(k, False), zeros
    launch = _Launcher(product, precision, choose)
    shared: dict[str, Any] = {"dy_ptr": dy.float().mT.contiguous()}
    tile = launch.tile("query_gradient")
    dq = room_for(q, False)
    grid = (math.ceil(queries / tile.queries) * batch * heads,)
    launch("query_gradient", grid, tile, dq_ptr=dq, BESIDE=side_by_side(q), **shared)
    tile = launch.tile("key_gradient")
    parts = groups(ranks, tile.held)
    dk = room_for(k, len(parts) > 1)
    blocks = math.ceil(keys / tile.keys) * heads
    samples, cuts = slices(product, blocks)
    dt = torch.empty(cuts, heads, count, keys, ranks, dtype=torch.float32, device=q.device)
    shared |= {"dt_ptr": dt, "B": batch, "samples": samples, "R": tile.held}
    shared |= {"dk_ptr": dk, "BESIDE": side_by_side(k)}
    for first, last in parts:
        shared |= {"FIRST": first, "LAST": last, "ADD": first > 0}
        launch("key_gradient", (blocks * cuts,), tile, **shared)
    dcoefs = torch.empty(coefs.shape, dtype=coefs.dtype, device=coefs.device)
    unpack(dt, dcoefs, (1.0,) * count)
    return dq, dk.to(k.dtype), dcoefs
