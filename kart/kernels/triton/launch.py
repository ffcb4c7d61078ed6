"""What all launches of the Triton engine share: a family as the kernels know it, tiles, arguments.

Triton itself is imported by the first launch.
"""

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart.kernels.arguments import room_like
from kart.kernels.family import Family, Product

# programs wanted in a launch of a `key_gradient`, two for each SM of an H100. A constant, so that
# the order of summation, and with it the last bit, does not depend on the GPU
PROGRAMS = 264


class Kind(NamedTuple):
    """What the kernels know of a basis: `size` features, or parameters of a nonlinear unit, then
    that of `base` unless it is "zero".

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


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Tiles(NamedTuple):
    """How a launch is cut: queries and keys of a block, warps, pipeline stages, and how many
    features, or ranks of nonlinear units, a program holds.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    held: int


def padded(size: int) -> int:
    """Matrix products take powers of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())


def slices(product: Product, programs: int) -> tuple[int, int]:
    """Samples of a slice of the batch, over which one program sums the gradient of the
    coefficients, and the number of slices, for `programs` of one.
    """
    batch = product.q.shape[0]
    samples = 1 if product.own else math.ceil(batch / min(batch, math.ceil(PROGRAMS / programs)))
    return samples, math.ceil(batch / samples)


def precision_of(precision: str | None) -> str:
    """How products of float32 are taken; by default as torch is set to."""
    highest = torch.get_float32_matmul_precision() == "highest"
    return precision or ("tf32x3" if highest else "tf32")


def launched_on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the device of `x`, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


class Launcher:
    """Launches the kernels of a product, in the module `kernels`, with the arguments that they
    share.
    """

    kernels: Any

    def __init__(self, product: Product, precision: str | None, choose: Callable[..., Tiles]):
        family, q, k, _, mask, scale = product
        kind = kind_of(family)
        assert kind is not None  # `refuses` has asked
        self.kind, self.choose, self.q = kind, choose, q
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
            "WIDTH": width,
            "D": padded(width),
            "BASE": kind.base,
            "MASK": mask is not None,
            "PRECISION": precision_of(precision),
            "FAST": not interpreted(),
            # the reduction of angles and the recurrences are meant for fused multiply-add
            "enable_fp_fusion": True,
        }

    def tiles(self, kernel: str, ranks: int) -> Tiles:
        """The tiles of a kernel for a padded number of ranks."""
        precision, width, masked = (self.shared[name] for name in ("PRECISION", "D", "MASK"))
        return self.choose(kernel, self.q.dtype, precision, width, ranks, masked, self.kind)

    def __call__(self, kernel: str, grid: tuple[int, ...], tile: Tiles, **arguments: Any) -> None:
        with launched_on(self.q):
            getattr(self.kernels, kernel)[grid](
                **self.shared,
                **arguments,
                BLOCK_N=tile.queries,
                BLOCK_M=tile.keys,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


def groups(count: int, held: int) -> list[tuple[int, int]]:
    """First and last of the features, or ranks, of each launch."""
    return [(first, min(first + held, count)) for first in range(0, count, held)]


def room_for(x: Tensor, several: bool) -> Tensor:
    """Room for the gradient of `x (B, H, tokens, d)`: what several launches add up is float32
    until the last.
    """
    return room_like(x, dtype=torch.float32 if several else x.dtype)


def batch_stride(packed: Tensor) -> int:
    """Of coefficients: one set of them serves all samples."""
    return packed.stride(0) if packed.shape[0] > 1 else 0
