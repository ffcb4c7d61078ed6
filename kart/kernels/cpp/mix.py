"""The compiled `y (mix^T v) + beside` of `kart.kernels.mixed`: mix.cpp.

As the other kernels it is held against the plain expression before its first use, and where
anything fails the reason is logged once and torch runs instead.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from kart.kernels.arguments import dense_rows, room_like
from kart.kernels.cpp import Shape, address_of, array_of, build
from kart.kernels.transforms import untransformed


class Engine:
    """The compiled kernels."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def _call(self, function: Any, v: Tensor, y: Tensor, *arguments: Any) -> None:
        rank = y.shape[3]
        shape = Shape(*y.shape[:3], v.shape[2], v.shape[3], rank, 0)
        threads = min(torch.get_num_threads(), v.shape[0] * v.shape[1])
        if function(ctypes.byref(shape), *arguments, threads):
            raise MemoryError("the C++ engine of the values could not allocate its buffers.")

    def forward(
        self, v: Tensor, y: Tensor, mix: Tensor, beside: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`y (mix^T v) + beside`, and `mix^T v (B, H, r, e)`, for `v (B, H, M, e)`, `y (B, H, N,
        r)`, `mix (B or 1, H, M, r)` and `beside (B, H, N, e)`, all float32.
        """
        y, mix = dense_rows(y, mix)
        out = room_like(v, y.shape[2])
        hidden = v.new_empty(*v.shape[:2], mix.shape[3], v.shape[3])
        inputs = [ctypes.byref(array_of(x)) for x in (v, y, mix, beside)]
        own = int(mix.shape[0] > 1)
        results = ctypes.byref(array_of(out)), address_of(hidden)
        self._call(self.library.kart_mix, v, y, *inputs, own, *results)
        return out, hidden

    def backward(
        self, dout: Tensor, v: Tensor, y: Tensor, mix: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dv, dy and dmix."""
        (y, mix), hidden = dense_rows(y, mix), hidden.contiguous()
        dv, dy, dmix = room_like(v), y.new_empty(y.shape), mix.new_empty(mix.shape)
        inputs = [ctypes.byref(array_of(x)) for x in (dout, v, y, mix)]
        own = int(mix.shape[0] > 1)
        results = [ctypes.byref(array_of(dv)), address_of(dy), address_of(dmix)]
        self._call(self.library.kart_unmix, v, y, *inputs, own, address_of(hidden), *results)
        return dv, dy, dmix


def _check(engine: Engine) -> None:
    """RuntimeError unless the kernels agree with the plain expression in float64: odd sizes and
    strides, one mix for all samples and one for each.
    """
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float32)
    for own, width, rank in ((1, 5, 13), (2, 64, 12), (2, 48, 1)):
        v, dout = (draw(2, n, 2, width).transpose(1, 2) for n in (53, 37))
        y, mix = draw(2, 2, rank, 37).mT, draw(own, 2, 53, rank)
        beside = draw(2, 37, 2, width).transpose(1, 2) if own > 1 else None
        with untransformed():
            out, hidden = engine.forward(v, y, mix, beside)
            found = (out, *engine.backward(dout, v, y, mix, hidden))
        v, y, mix, dout = (x.double() for x in (v, y, mix, dout))
        dhidden = y.mT @ dout
        dmix = v @ dhidden.mT
        dmix = dmix if own > 1 else dmix.sum(0, keepdim=True)
        plus = 0 if beside is None else beside.double()
        wanted = y @ (mix.mT @ v) + plus, mix @ dhidden, dout @ (mix.mT @ v).mT, dmix
        names: list[str] = ["out", "dv", "dy", "dmix"]
        build.compare(
            dict(zip(names, found, strict=True)), dict(zip(names, wanted, strict=True)), 1
        )


@functools.cache
def engine() -> Engine | None:
    """The checked kernels, or None, which is logged once."""
    return build.checked("values", '#include "mix.cpp"\n', Engine, _check)[0]
