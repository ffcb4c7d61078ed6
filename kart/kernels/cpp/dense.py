"""The compiled products of full rank, coefficients by values and back: dense.cpp.

Held against float64 before their first use.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from kart.kernels.arguments import dense_rows, room_like
from kart.kernels.cpp import Coefs, Shape, address_of, array_of, build
from kart.kernels.transforms import untransformed

# tokens and columns from which on they are faster than torch's
ROWS, COLUMNS = 16, 16


class Engine:
    """The compiled products."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def takes(self, coefs: Tensor, *others: Tensor) -> bool:
        """Whether these products of `coefs (B or 1, H, P, J)` are worth it, and can be."""
        return (
            min(coefs.shape[-2:]) >= ROWS
            and others[0].shape[-1] >= COLUMNS
            and all(x.device.type == "cpu" and x.dtype is torch.float32 for x in (coefs, *others))
        )

    def _call(self, function: Any, coefs: Tensor, v: Tensor, *arguments: Any) -> None:
        batch, heads, tokens, width = v.shape
        shape = Shape(batch, heads, tokens, coefs.shape[3], 0, 0, width)
        (coefs,) = dense_rows(coefs)
        code = function(
            ctypes.byref(shape),
            ctypes.byref(array_of(coefs[..., None], Coefs)),
            int(coefs.shape[0] > 1),
            ctypes.byref(array_of(v)),
            *arguments,
            torch.get_num_threads(),
        )
        if code:
            raise MemoryError("the C++ engine of full rank could not allocate its buffers.")

    def mixed(self, coefs: Tensor, v: Tensor) -> Tensor:
        """`C V`, `(B, H, e, J)`, for `coefs (B or 1, H, P, J)` and `v (B, H, P, e)`."""
        rows, columns = (-(-n // 16) * 16 for n in (v.shape[3], coefs.shape[3]))
        out = v.new_empty(*v.shape[:2], rows, columns)
        self._call(self.library.kart_mixed, coefs, v, ctypes.byref(array_of(out)))
        return out[:, :, : v.shape[3], : coefs.shape[3]]

    def unmixed(self, coefs: Tensor, v: Tensor, dmixed: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of coefs and v."""
        dcoefs, dv = coefs.new_empty(coefs.shape), room_like(v)
        results = [ctypes.byref(array_of(dmixed)), ctypes.byref(array_of(dv)), address_of(dcoefs)]
        self._call(self.library.kart_unmixed, coefs, v, *results)
        return dcoefs, dv


def _check(engine: Engine) -> None:
    """RuntimeError unless the products agree with float64: odd sizes and strides, coefficients of
    all samples and of each.
    """
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float32)
    for own in (1, 2):
        coefs, v = draw(own, 2, 77, 67), draw(2, 77, 2, 37).transpose(1, 2)
        dmixed = draw(2, 2, 37, 67)
        with untransformed():
            out, pulled = engine.mixed(coefs, v), engine.unmixed(coefs, v, dmixed)
        coefs, v, dmixed = (x.double() for x in (coefs, v, dmixed))
        dcoefs = v @ dmixed
        dcoefs = dcoefs if own > 1 else dcoefs.sum(0, keepdim=True)
        wanted = {"mixed": v.mT @ coefs, "dcoefs": dcoefs, "dv": coefs @ dmixed.mT}
        build.compare({"mixed": out, "dcoefs": pulled[0], "dv": pulled[1]}, wanted, 1)


@functools.cache
def engine() -> Engine | None:
    """The checked products; None without a compiler, and where they failed, which is logged."""
    return build.checked("full rank", '#include "dense.cpp"\n', Engine, _check)[0]
