"""Launches of the kernels of attention with entries for weights, see `device_entries`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kart.kernels.arguments import room_like, side_by_side
from kart.kernels.cpp.weights import Weighted
from kart.kernels.family import Product
from kart.kernels.triton import refuses_family, refuses_tensors
from kart.kernels.triton.coefs import combinations
from kart.kernels.triton.launch import (
    Kind,
    Tiles,
    interpreted,
    kind_of,
    launched_on,
    padded,
    precision_of,
    slices,
)

TABLE = Kind("table", 0, "zero", None)


# of a function at most: each is written out in the kernels
FEATURES = 32


def refuses(x: Weighted) -> str:
    """Why the engine cannot take these inputs, or ""."""
    if x.form == "simplex":
        return "the Triton engine has no simplex, which takes whole rows"
    if x.matrix:
        return "the Triton engine has no entries of every query and key"
    reason = refuses_tensors((x.q, x.v, x.theta), (x.q.shape[3], x.v.shape[3]))
    if reason or x.family is None:
        return reason
    if x.family.width > FEATURES:
        most = FEATURES
        return f"the Triton engine takes functions of {most} features at most, not {x.family.width}"
    return refuses_family(x.family, x.q.device)


def tiles(
    kernel: str, dtype: torch.dtype, precision: str, width: int, form: str, kind: Kind
) -> Tiles:
    """The tiles of "forward", "query_gradient", "key_gradient" or "table_gradient" for a padded
    width, the larger of those of queries and values. More features than `held` are not kept until
    their gradients are known, but found again.

    Chosen from registers and spills of builds for sm_90 (tests/test_triton_aot.py).
    """
    wide = dtype == torch.float32
    # operands of float32 that are split in two take registers of their own
    split = wide and precision != "tf32"
    huge = width > 64
    stages = 2 if wide else 3
    many = kind.size + (kind.base != "zero") > 8
    if kernel == "key_gradient":
        warps = 8 if split and (huge or many) else 4
        return Tiles(16 if split or huge or many else 32, 64, warps, stages, 0)
    fine = split and (huge or kernel != "forward")
    fine |= many if kernel == "query_gradient" else wide and form == "beside"
    # what hardly fits into the shared memory of smaller GPUs
    rows = 32 if wide and huge and kernel == "query_gradient" else 64
    # where the gradient of an entry takes the entry, all its features would wait for it
    held = FEATURES if form in ("plain", "beside") else 8
    return Tiles(rows, 16 if fine else 32, 4, stages, held)


Choose = Callable[..., Tiles]


def _strided(x: Tensor | None, *shape: int) -> tuple[Any, ...] | None:
    """A tensor as the kernels take it, broadcast to a shape."""
    if x is None:
        return None
    x = x.expand(*shape, *x.shape[len(shape) :])
    return x, *x.stride()


class _Launcher:
    """The kernels, with the arguments that they share."""

    def __init__(self, x: Weighted, precision: str | None, choose: Choose):
        from kart.kernels.triton import device, device_entries

        family, form, q, k, v, theta, mask, factor, scale, _ = x
        self.kernels, self.choose, self.x = device_entries, choose, x
        kind = TABLE if family is None else kind_of(family)
        assert kind is not None  # `refuses` has asked
        self.kind = kind
        size = tuple(q.shape[:3])
        start = feature = None
        factors, slopes, span = (), (), (0.0, 1.0)
        if family is not None and family.basis.features is not None:
            _, slopes, factors = combinations(family)
            start, feature = device.functions(kind.piece, "start", "feature")
            span = (float(kind.piece.origin), float(kind.piece.density))
        elif family is not None:
            factors = (1.0,) * family.width
            (start,) = device.functions(kind.piece, "unit")
        hidden = None if mask is None else mask.expand(*size, k.shape[2]).view(torch.uint8)
        of_mask = _strided(hidden)
        if of_mask is not None and of_mask[3] == 0:
            of_mask = (*of_mask[:3], None, of_mask[4])  # a mask of keys alone
        theta = theta if theta.stride(2) == 1 else theta.contiguous()
        self.shared: dict[str, Any] = {
            "q": _strided(q),
            "k": _strided(k),
            "v": _strided(v),
            "mask": of_mask,
            "factor": _strided(factor, *size),
            "theta": _strided(theta, *size[:2]),
            "H": size[1],
            "N": size[2],
            "M": k.shape[2],
            "scale": scale,
            "span": span,
            "WIDTH": q.shape[3],
            "D": padded(q.shape[3]),
            "VALUES": v.shape[3],
            "E": padded(v.shape[3]),
            "FORM": form,
            "FACTORS": factors,
            "SLOPES": slopes,
            "START": start,
            "FEATURE": feature,
            "BASE": kind.base,
            "PRECISION": precision_of(precision),
            "FAST": not interpreted(),
            "enable_fp_fusion": True,
        }

    def tile(self, kernel: str) -> Tiles:
        """The tiles of a kernel."""
        shared, width = self.shared, max(self.shared["D"], self.shared["E"])
        dtype = torch.promote_types(self.x.q.dtype, self.x.v.dtype)
        return self.choose(kernel, dtype, shared["PRECISION"], width, self.x.form, self.kind)

    def __call__(self, kernel: str, programs: int, tile: Tiles, **arguments: Any) -> None:
        with launched_on(self.x.q):
            getattr(self.kernels, kernel)[(programs,)](
                **self.shared,
                **arguments,
                BLOCK_N=tile.queries,
                BLOCK_M=tile.keys,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


def forward(
    x: Weighted, precision: str | None = None, choose: Choose = tiles
) -> tuple[Tensor, ...]:
    """As `kart.kernels.cpp.weights.forward`; softmax's share is in the dtype of v."""
    batch, heads, queries, _ = x.q.shape
    launch = _Launcher(x, precision, choose)
    tile = launch.tile("forward")
    out = room_like(x.v, queries)
    row = None if x.form == "plain" else x.q.new_empty(batch, heads, queries, dtype=torch.float32)
    soft = torch.empty_like(out) if x.form == "beside" else None
    launch(
        "forward",
        math.ceil(queries / tile.queries) * batch * heads,
        tile,
        out_ptr=out,
        row_ptr=row,
        soft_ptr=soft,
        BESIDE=side_by_side(x.v),
    )
    return tuple(y for y in (out, row, soft) if y is not None)


def backward(
    x: Weighted,
    dout: Tensor,
    *results: Tensor,
    precision: str | None = None,
    choose: Choose = tiles,
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v and theta, in their dtypes. Two runs agree in every bit."""
    batch, heads, queries, _ = x.q.shape
    keys = x.k.shape[2]
    launch = _Launcher(x, precision, choose)
    dq, dk, dv = (room_like(y) for y in (x.q, x.k, x.v))
    row = results[1].contiguous() if len(results) > 1 else None
    pull = None if row is None else torch.empty_like(row)
    given = {"dout": _strided(dout), "row_ptr": row, "pull_ptr": pull}
    tile = launch.tile("query_gradient")
    blocks = math.ceil(queries / tile.queries)
    count = len(launch.shared["FACTORS"])
    shares = x.q.new_empty(batch, heads, blocks, count, dtype=torch.float32)
    launch(
        "query_gradient",
        blocks * batch * heads,
        tile,
        **given,
        result=_strided(results[2 if x.form == "beside" else 0]),
        dq_ptr=dq,
        share_ptr=shares,
        BESIDE=side_by_side(x.q),
        zero=0.0,
        AGAIN=count > tile.held,
    )
    tile = launch.tile("key_gradient")
    launch(
        "key_gradient",
        math.ceil(keys / tile.keys) * batch * heads,
        tile,
        **given,
        dk_ptr=dk,
        dv_ptr=dv,
        BESIDE=side_by_side(x.k),
        VALUES_BESIDE=side_by_side(x.v),
    )
    if x.family is None:
        dtheta = _of_table(x, launch, given)
    else:
        dtheta = shares.sum(2) if x.theta.shape[0] > 1 else shares.sum((0, 2))[None]
    return dq, dk, dv, dtheta.to(x.theta.dtype)


def _of_table(x: Weighted, launch: _Launcher, given: dict[str, Any]) -> Tensor:
    """The gradient of a table `(B or 1, H, N + M - 1)`: sums of the tiles of each band of offsets,
    then of their diagonals.
    """
    batch, heads, queries, _ = x.q.shape
    keys, size = x.k.shape[2], x.theta.shape[2]
    tile = launch.tile("table_gradient")
    rows, columns = tile.queries, tile.keys
    steps, across = rows // columns, math.ceil(keys / columns)
    bands = (math.ceil(queries / rows) - 1) * steps + across
    product: Any = Product(None, x.q, x.k, x.theta, x.mask, x.scale)  # type: ignore[arg-type]
    samples, count = slices(product, bands * heads)
    tiles = x.q.new_empty(count, heads, bands, rows, columns, dtype=torch.float32)
    sizes = {"tiles_ptr": tiles, "B": batch, "samples": samples}
    launch("table_gradient", bands * heads * count, tile, **given, **sizes)
    if count > x.theta.shape[0]:
        tiles = tiles.sum(0, keepdim=True)
    # row i, shifted by i, has its offsets where the others have them
    turned = functional.pad(tiles.flip(-1), (0, rows)).flatten(-2)
    length = rows + columns - 1
    shifted = turned[..., : rows * length].unflatten(-1, (rows, length))
    sums = functional.pad(shifted.sum(-2), (0, 1)).unflatten(-1, (steps + 1, columns))
    # the offsets of a band are, but for one block, those of the next
    parts = [
        functional.pad(part.flatten(2), (i * columns, (steps - i) * columns))
        for i, part in enumerate(sums.unbind(-2))
    ]
    return sum(parts[1:], parts[0])[..., across * columns - keys :][..., :size]
