"""The "cpp" engine: the streamed product of the Fourier family by a vector kernel in C++.

`fourier.cpp` is compiled on first use, once for each grid size, with the machine's own compiler for
its own instruction set (AVX-512 or AVX2), into `$KART_CACHE` or `~/.cache/kart`. Before its first
use in a process it is held against the chunked engine. Where anything fails, no compiler, another
processor, a failed build or check, the reason is logged once and the torch engine runs instead.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kart.kernels import chunked
from kart.kernels.chunked import Family

log = logging.getLogger("kart.kernels")

SOURCE = Path(__file__).with_name("fourier.cpp")
# no -ffast-math: it deletes the rounding by a magic number and gives wrong sines
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
# beyond it the unrolled features no longer fit the registers and the compile time grows
MAX_GRID = 16


class _Array(ctypes.Structure):
    """A tensor of four axes for C: address and strides."""

    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in "bhnd"]


class _Coefs(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in "bhpmj"]


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "width", "rank")
    ]


def _array(x: Tensor | None, kind: type[ctypes.Structure] = _Array) -> ctypes.Structure:
    return kind() if x is None else kind(x.data_ptr(), *x.stride())


def _processor() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor() + platform.machine()


def _cache() -> Path:
    return Path(os.environ.get("KART_CACHE") or Path.home() / ".cache" / "kart")


def _build(grid: int) -> ctypes.CDLL:
    """The compiled kernel, from the cache or the compiler; RuntimeError says why there is none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("no C++ compiler (g++ or c++) was found")
    flags = (*FLAGS, f"-DGRID={grid}")
    key = hashlib.sha256(
        "\n".join(
            (SOURCE.read_text(), *flags, compiler, _processor(), platform.platform())
        ).encode()
    ).hexdigest()[:16]
    path = _cache() / f"fourier-{grid}-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # built aside and renamed, so that another process sees all of it or nothing
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            command = [*compiler.split(), *flags, "-o", str(part), str(SOURCE)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if result.returncode:
                lines = [x for x in result.stderr.splitlines() if "error" in x] or ["no message"]
                raise RuntimeError(f"{compiler} failed: {lines[0].strip()}")
            part.replace(path)
    return ctypes.CDLL(str(path))


def _check(library: ctypes.CDLL, grid: int) -> None:
    """RuntimeError unless the kernel agrees with the chunked engine: odd sizes, strides, masks."""
    generator = torch.Generator().manual_seed(0)
    size = 2 * grid

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # more than one block of queries and of keys, and a rest of each; widths of no whole vector
    batch, heads, queries, keys, width, rank = 2, 2, 37, 29, 7, 13
    family = Family(None, lambda x: x, size, grid)
    q = draw(batch, queries, heads, width).transpose(1, 2)
    k, dy = draw(batch, heads, width, keys).mT, draw(batch, heads, queries, rank)
    for own in (1, batch):
        coefs = draw(own, heads, rank, keys, size) / keys**0.5
        for mask in (None, torch.rand(1, heads, queries, keys, generator=generator) < 0.7):
            actual = (
                _forward(library, q, k, coefs, mask, 1.5),
                *_backward(library, dy, q, k, coefs, mask, 1.5),
            )
            expected = (
                chunked.forward(family, q, k, coefs, mask, 1.5),
                *chunked.backward(family, dy, q, k, coefs, mask, 1.5),
            )
            for name, a, e in zip(("y", "dq", "dk", "dcoefs"), actual, expected, strict=True):
                # a few hundred roundings of terms whose error grows with the harmonic
                tolerance = 1e-5 * (1 + grid) * e.abs().max().item()
                difference = (a - e).abs().max().item()
                if not difference <= tolerance:
                    raise RuntimeError(
                        f"its self-check failed: {name} differs by {difference:.1e}, more than "
                        f"{tolerance:.1e}"
                    )


@functools.cache
def _library(grid: int) -> tuple[ctypes.CDLL | None, str]:
    """The checked kernel for a grid size and "", or None and why there is none; logged once."""
    try:
        # asked under any transform or dispatch mode; the check is on plain tensors
        include, exclude = chunked.fresh_keys()
        with (
            torch._C._DisableFuncTorch(),
            torch._C._ForceDispatchKeyGuard(include, exclude),
            torch.no_grad(),
        ):
            library = _build(grid)
            _check(library, grid)
    except Exception as error:
        log.warning("kart's C++ engine is off for grid %d, torch runs instead: %s", grid, error)
        return None, str(error)
    return library, ""


def status() -> str:
    """ "ready", or why the engine does not run here; builds the kernel of grid 3 if need be."""
    return _library(3)[1] or "ready"


def refuses(family: Family, q: Tensor, k: Tensor, coefs: Tensor, mask: Tensor | None) -> str:
    """Why this engine cannot run these tensors; "" if it can."""
    if family.grid is None:
        return "the C++ engine computes the Fourier family without a base alone"
    if family.grid > MAX_GRID:
        return f"the C++ engine computes grids up to {MAX_GRID}"
    if {x.dtype for x in (q, k, coefs)} != {torch.float32}:
        return "the C++ engine computes in float32 alone"
    return _library(family.grid)[1]


def _shape(q: Tensor, k: Tensor, coefs: Tensor) -> _Shape:
    return _Shape(*q.shape[:3], k.shape[2], q.shape[3], coefs.shape[2])


def _threads(q: Tensor) -> int:
    # at most one for each task, a head of a sample
    return min(torch.get_num_threads(), q.shape[0] * q.shape[1])


def _expanded(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(*q.shape[:3], k.shape[2])


def _call(function: Callable[..., int], *arguments: object) -> None:
    if function(*arguments):
        raise MemoryError("the C++ engine of `contract` could not allocate its buffers.")


def _forward(library: ctypes.CDLL, q, k, coefs, mask, scale) -> Tensor:
    y = q.new_empty(*q.shape[:3], coefs.shape[2])
    mask = _expanded(mask, q, k)
    if y.numel():
        _call(
            library.kart_forward,
            ctypes.byref(_shape(q, k, coefs)),
            ctypes.byref(_array(q)),
            ctypes.byref(_array(k)),
            ctypes.byref(_array(coefs, _Coefs)),
            int(coefs.shape[0] > 1),
            ctypes.byref(_array(mask)),
            ctypes.c_float(scale),
            ctypes.c_void_p(y.data_ptr()),
            _threads(q),
        )
    return y


def _backward(library: ctypes.CDLL, dy, q, k, coefs, mask, scale) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dcoefs = coefs.new_empty(coefs.shape)
    mask = _expanded(mask, q, k)
    if not dy.numel():
        return dq.zero_(), dk.zero_(), dcoefs.zero_()
    _call(
        library.kart_backward,
        ctypes.byref(_shape(q, k, coefs)),
        ctypes.byref(_array(dy)),
        ctypes.byref(_array(q)),
        ctypes.byref(_array(k)),
        ctypes.byref(_array(coefs, _Coefs)),
        int(coefs.shape[0] > 1),
        ctypes.byref(_array(mask)),
        ctypes.c_float(scale),
        ctypes.c_void_p(dq.data_ptr()),
        ctypes.c_void_p(dk.data_ptr()),
        ctypes.c_void_p(dcoefs.data_ptr()),
        _threads(q),
    )
    return dq, dk, dcoefs


def _loaded(family: Family) -> ctypes.CDLL:
    assert family.grid is not None  # for the type checker: `refuses` was asked
    library = _library(family.grid)[0]
    assert library is not None
    return library


def forward(
    family: Family, q: Tensor, k: Tensor, coefs: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """As `chunked.forward`."""
    return _forward(_loaded(family), q, k, coefs, mask, scale)


def backward(
    family: Family,
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    coefs: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.backward`."""
    return _backward(_loaded(family), dy.float(), q, k, coefs, mask, scale)
