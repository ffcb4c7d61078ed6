"""Coefficients as the kernels of a product read them, and their gradients back; see `device_coefs`.

torch would take a launch for each step of it, twenty of them as long as a kernel of the product.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kart.kernels.family import Family, once
from kart.kernels.triton.launch import kind_of, launched_on

KEYS = 64
BLOCK = 16
# gradients of a program, and slices of the batch that it loads at a time
SUMS, SLICES = 128, 16

Rows = tuple[tuple[tuple[int, float], ...], ...]


def _rows(matrix: Tensor) -> Rows:
    """The places and values of what is not zero in each row."""
    return tuple(
        tuple((k, value) for k, value in enumerate(row) if value) for row in matrix.tolist()
    )


@once
def combinations(family: Family | None) -> tuple[Rows, Rows, tuple[float, ...]]:
    """How the rows of C, and of D, see `device`, are made of coefficients, and what a row of the
    gradient of C is multiplied with.
    """
    assert family is not None
    kind = kind_of(family)
    assert kind is not None  # `refuses` has asked
    like = {"dtype": torch.float32, "device": "cpu"}
    factors = torch.ones(family.width, 1, 1, **like)
    slopes = torch.eye(family.width, **like)
    if kind.piece.rescale is not None:
        kind.piece.rescale(factors)
    if kind.piece.fold is not None:
        slopes[: kind.size, : kind.size] = kind.piece.fold(torch.eye(kind.size, **like))
    factors = factors.flatten()
    return _rows(factors.diag()), _rows(factors[:, None] * slopes), tuple(factors.tolist())


def identity(count: int) -> Rows:
    """Rows of the coefficients as they are."""
    return tuple(((k, 1.0),) for k in range(count))


def pack(coefs: Tensor, rows: Rows, out: Tensor) -> None:
    """Writes coefs `(batch, H, r, M, K)`, combined by `rows`, to `out (batch, H, R, M', K'')`, zero
    beyond r, M and the rows.
    """
    from kart.kernels.triton import device_coefs as kernels

    batch, heads, rank, keys, _ = coefs.shape
    ranks, padded = out.shape[2:4]
    programs = math.ceil(padded / BLOCK) * math.ceil(ranks / BLOCK) * batch * heads
    with launched_on(coefs):
        kernels.pack[(programs,)](
            c_ptr=coefs,
            out_ptr=out,
            **_strides("c", coefs),
            **_strides("out", out),
            H=heads,
            M=keys,
            RANK=rank,
            KEYS=padded,
            RANKS=ranks,
            ROWS=(*rows, *[()] * (out.shape[4] - len(rows))),
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )


def unpack(x: Tensor, out: Tensor, factors: tuple[float, ...]) -> None:
    """Writes the gradients `x (slices, H, K, M, r)` to `out (batch, H, r, M, K)`: a slice a sample,
    or the sum of all for a batch of one.
    """
    from kart.kernels.triton import device_coefs as kernels

    batch, heads, rank, keys, count = out.shape
    programs = math.ceil(count * keys * rank / SUMS) * batch * heads
    with launched_on(x):
        kernels.unpack[(programs,)](
            x_ptr=x,
            out_ptr=out,
            **_strides("out", out),
            slices=len(x) // batch,
            H=heads,
            M=keys,
            RANK=rank,
            FACTORS=factors,
            SLICES=SLICES,
            BLOCK=SUMS,
            enable_fp_fusion=True,
        )


def _strides(name: str, x: Tensor) -> dict[str, Any]:
    names = (f"{name}_{axis}" for axis in "bhpmk")
    return dict(zip(names, x.stride(), strict=True))
