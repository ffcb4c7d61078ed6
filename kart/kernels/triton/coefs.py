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

Matrix = tuple[tuple[float, ...], ...]


def _matrix(x: Tensor) -> Matrix:
    return tuple(map(tuple, x.tolist()))


@once
def combinations(family: Family | None) -> tuple[Matrix, Matrix, tuple[float, ...]]:
    """What coefficients are multiplied with to be the rows of C, and of D, see `device`, and what a
    row of the gradient of C is multiplied with.
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
    return _matrix(factors.diag()), _matrix(factors[:, None] * slopes), tuple(factors.tolist())


def identity(count: int) -> Matrix:
    """The matrix of coefficients as they are."""
    return _matrix(torch.eye(count, device="cpu"))


def pack(coefs: Tensor, matrix: Matrix, out: Tensor) -> None:
    """Writes coefs `(batch, H, r, M, K)`, combined by `matrix`, to `out (batch, H, R, M', K'')`,
    zero beyond r, M and its rows.
    """
    from kart.kernels.triton import device_coefs as kernels

    batch, heads, rank, keys, count = coefs.shape
    ranks, padded, rows = out.shape[2:]
    programs = math.ceil(padded / BLOCK) * math.ceil(ranks / BLOCK) * batch * heads
    built: dict[str, Any] = {"BLOCK": BLOCK, "enable_fp_fusion": True}
    built |= {"MATRIX": matrix, "ROWS": len(matrix), "COLUMNS": count, "OUT": rows}
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
            **built,
        )


def unpack(x: Tensor, out: Tensor, factors: tuple[float, ...]) -> None:
    """Writes the gradients `x (slices, H, K, M, r)` to `out (batch, H, r, M, K)`: a slice a sample,
    or the sum of all for a batch of one.
    """
    from kart.kernels.triton import device_coefs as kernels

    batch, heads, rank, keys, count = out.shape
    programs = math.ceil(count * keys * rank / SUMS) * batch * heads
    built: dict[str, Any] = {"BLOCK": SUMS, "SLICES": SLICES, "enable_fp_fusion": True}
    built |= {"FACTORS": factors, "COUNT": count}
    with launched_on(x):
        kernels.unpack[(programs,)](
            x_ptr=x,
            out_ptr=out,
            **_strides("out", out),
            slices=len(x) // batch,
            H=heads,
            M=keys,
            RANK=rank,
            **built,
        )


def _strides(name: str, x: Tensor) -> dict[str, Any]:
    names = (f"{name}_{axis}" for axis in "bhpmk")
    return dict(zip(names, x.stride(), strict=True))
