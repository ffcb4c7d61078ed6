"""The "cpp" engine: the streamed product of the families that declare a piece of C++.

A family's piece (`kart.bases.basis.Cpp`) is compiled together with product.cpp, or units.cpp for
units that are not linear in their parameters, with the machine's own compiler for its own
instruction set (AVX-512, AVX2 or NEON); see `build`. Where the processor has a tile unit (AMX-BF16)
the sums over long rows are its own, as exact as in float32; see amx.h. Before its first use in a
process a library is held against the plain expression. Where anything fails, no compiler, another
processor, a failed build or check, the reason is logged once and the torch engine runs instead.

The kernels compute in float32; half types are widened on their way in, and only the results are
rounded.
"""

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kart.kernels import plain
from kart.kernels.arguments import room_like
from kart.kernels.cpp import build
from kart.kernels.family import Family, Product, family_named, once, pin
from kart.kernels.transforms import untransformed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BASES = ("zero", "identity", "silu", "gelu")
# beyond it the unrolled features no longer fit the registers and the compile time grows
MAX_WIDTH = 33


class Array(ctypes.Structure):
    """A tensor of four axes for C: address and strides."""

    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in "bhnd"]


class Coefs(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in "bhpmj"]


class Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("batch", "heads", "queries", "keys", "width", "rank", "value_width")
    ]


class _Soft(ctypes.Structure):
    _fields_ = [(name, Array) for name in ("v", "dout", "out", "result", "dv")] + [
        ("logsumexp", ctypes.c_void_p)
    ]


class Softmax(NamedTuple):
    """What a product with softmax from the same scores takes besides: the values `(B, H, M, e)`,
    and for the backward the gradient of its output, the output `(B, H, N, e)` and the logarithm of
    its sums `(B, H, N)`.
    """

    v: Tensor
    dout: Tensor | None = None
    out: Tensor | None = None
    logsumexp: Tensor | None = None


class Engine:
    """The compiled kernels of one family."""

    def __init__(self, library: ctypes.CDLL, options: tuple[float, ...]):
        self.library = library
        self.options = floats(options)

    def _call(
        self,
        function: Callable[..., int],
        product: Product,
        inputs: Sequence[Tensor],
        soft: tuple[_Soft, int] | None,
        results: Sequence[Any],
    ) -> None:
        _, q, k, coefs, mask, scale = product
        if mask is not None:
            mask = mask.expand(*q.shape[:3], k.shape[2])
        value_width = 0 if soft is None else soft[1]
        shape = Shape(*q.shape[:3], k.shape[2], q.shape[3], coefs.shape[2], value_width)
        code = function(
            ctypes.byref(shape),
            self.options,
            *(ctypes.byref(array_of(x)) for x in (*inputs, q, k)),
            ctypes.byref(array_of(coefs, Coefs)),
            int(product.own),
            ctypes.byref(array_of(mask)),
            ctypes.c_float(scale),
            None if soft is None else ctypes.byref(soft[0]),
            *results,
            # at most one for each task, a head of a sample
            min(torch.get_num_threads(), q.shape[0] * q.shape[1]),
        )
        if code:
            raise MemoryError("the C++ engine of `contract` could not allocate its buffers.")

    def forward(self, product: Product, soft: Softmax | None = None) -> tuple[Tensor, ...]:
        """y, and with `soft` the output of softmax and the logarithm of its sums; float32."""
        q, extra = product.q, None
        found = [q.new_empty(*q.shape[:3], product.coefs.shape[2])]
        if soft is not None:
            out, logsumexp = room_like(soft.v, q.shape[2]), q.new_empty(q.shape[:3])
            found += [out, logsumexp]
            held = {"v": array_of(soft.v), "result": array_of(out)}
            extra = _Soft(**held, logsumexp=logsumexp.data_ptr()), soft.v.shape[3]
        if found[0].numel():
            self._call(self.library.kart_forward, product, [], extra, [address_of(found[0])])
        return tuple(found)

    def backward(
        self, product: Product, dy: Tensor, soft: Softmax | None = None
    ) -> tuple[Tensor, ...]:
        """dq, dk, dcoefs, and with `soft` dv; float32."""
        _, q, k, coefs, _, _ = product
        gradients = [room_like(q), room_like(k), coefs.new_empty(coefs.shape)]
        extra = None
        if soft is not None:
            dv = room_like(soft.v)
            gradients.append(dv)
            assert soft.logsumexp is not None  # for the type checker
            sums = soft.logsumexp.contiguous()
            arrays = {"v": soft.v, "dout": soft.dout, "out": soft.out, "dv": dv}
            held = {name: array_of(x) for name, x in arrays.items()}
            extra = _Soft(**held, logsumexp=sums.data_ptr()), soft.v.shape[3]
        if not dy.numel():
            return tuple(x.zero_() for x in gradients)
        rooms = (ctypes.byref(array_of(x)) for x in gradients[:2])
        results = [*rooms, address_of(gradients[2])]
        self._call(self.library.kart_backward, product, [dy], extra, results)
        return tuple(gradients)


def floats(values: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    """Numbers as the kernels take them; of none there is memory, too."""
    return (ctypes.c_float * max(1, len(values)))(*values)


def array_of(x: Tensor | None, kind: type[ctypes.Structure] = Array) -> ctypes.Structure:
    """Address and strides of a tensor as the kernels take them; zeros for None."""
    return kind() if x is None else kind(x.data_ptr(), *x.stride())


def address_of(x: Tensor) -> ctypes.c_void_p:
    """Address of a contiguous tensor."""
    return ctypes.c_void_p(x.data_ptr())


# --- build and check ------------------------------------------------------------------------------


def source(family: Family, softmax: bool) -> str:
    """The C++ of a family: its piece, then the product that it is for."""
    cpp = family.pieces.cpp
    constants = {**cpp.sizes, "BASE": BASES.index(family.base), "SOFTMAX": int(softmax)}
    lines = [f"constexpr int {name} = {value};" for name, value in constants.items()]
    last = "units.cpp" if family.basis.features is None else "product.cpp"
    return "\n".join(['#include "vector.h"', *lines, cpp.text, f'#include "{last}"', ""])


class _Case(NamedTuple):
    """Drawn inputs: q, k, the parameters of nonlinear units or else coefs, values, and the
    gradients of y and of the output of softmax.
    """

    leaves: dict[str, Tensor]
    mask: Tensor | None
    dy: Tensor
    dout: Tensor
    scale: float


def _cases(family: Family, attempt: int) -> list[_Case]:
    """Odd sizes, strides and masks: more than one block of queries and of keys, and a rest of each;
    widths and ranks of no whole vector, below and above those that the tile unit takes. Each
    attempt draws anew, smaller scores than the one before.
    """
    generator = torch.Generator().manual_seed(attempt)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float32)
    batch, heads = 2, 2
    small, large = (37, 45, 7, 13, 5), (135, 147, 70, 13, 66)
    # units that are not linear are never on the tile unit, and amplify the roundings of a score
    second = (small, 1.5) if family.basis.features is None else (large, 0.6)
    cases = []
    for own, sizes, scale in ((1, small, 0.4), (batch, *second)):
        queries, keys, width, rank, value_width = sizes
        q = draw(batch, queries, heads, width).transpose(1, 2)
        k, v = draw(batch, heads, width, keys).mT, draw(batch, keys, heads, value_width)
        if family.basis.features is None:
            units = family.basis.init(generator, (own, heads, rank, keys))
            units = {name: x + 0.3 * draw(*x.shape) for name, x in units.items()}
        else:
            units = {"coefs": draw(own, heads, rank, keys, family.width) / keys**0.5}
        mask = torch.rand(1, heads, queries, keys, generator=generator) < 0.7
        dy, dout = draw(batch, heads, queries, rank), draw(batch, heads, queries, value_width)
        leaves = {"q": q, "k": k, "v": v.transpose(1, 2), **units}
        cases.append(_Case(leaves, mask if own > 1 else None, dy, dout, scale * 0.8**attempt))
    return cases


def units_of(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The leaves but q, k and v."""
    return {name: x for name, x in leaves.items() if name not in ("q", "k", "v")}


def _wanted(family: Family, case: _Case, softmax: bool) -> dict[str, Tensor]:
    """Values and gradients by the plain expressions in float64."""
    leaves = {name: x.double().requires_grad_() for name, x in case.leaves.items()}
    q, k, v = (leaves[name] for name in "qkv")
    units = units_of(leaves)
    with torch.enable_grad():
        if family.basis.features is not None:
            y = plain.contract(family.basis, units["coefs"], q, k, case.mask, case.scale)
        else:
            mask, samples = None if case.mask is None else case.mask[0], []
            for i in range(len(q)):
                own = {name: x[i if len(x) > 1 else 0] for name, x in units.items()}
                y = plain.contract_units(family.basis, own, q[i], k[i], mask, case.scale)
                samples.append(y)
            y = torch.stack(samples)
        found, total = {"y": y}, (y * case.dy).sum()
        if softmax:
            found["out"] = plain.softmax_attention(q, k, v, case.mask, case.scale)
            total = total + (found["out"] * case.dout).sum()
        else:
            leaves.pop("v")
        gradients = torch.autograd.grad(total, [*leaves.values()], materialize_grads=True)
    return found | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def _found(engine: Any, family: Family, case: _Case, softmax: bool) -> dict[str, Tensor]:
    """The same by the compiled kernels."""
    q, k, v = (case.leaves[name] for name in "qkv")
    units = {name: x.clone().requires_grad_() for name, x in units_of(case.leaves).items()}
    with torch.enable_grad():
        linear = family.basis.features is not None
        coefs = units["coefs"] if linear else family.pieces.leaves(units)
    product = Product(family, q, k, coefs.detach(), case.mask, case.scale)
    y, *rest = engine.forward(product, Softmax(v) if softmax else None)
    found, soft = {"y": y}, None
    if softmax:
        found["out"], sums = rest
        soft = Softmax(v, case.dout, found["out"], sums)
    dq, dk, dcoefs, *rest = engine.backward(product, case.dy, soft)
    found |= {"dq": dq, "dk": dk} | ({"dv": rest[0]} if softmax else {})
    pulled = torch.autograd.grad(coefs, [*units.values()], dcoefs, materialize_grads=True)
    return found | {f"d{name}": x for name, x in zip(units, pulled, strict=True)}


def _steady(family: Family, case: _Case) -> bool:
    """Whether roundings of the scores do no more than the check tolerates, as near a pole."""
    moved = case._replace(scale=case.scale * (1 + 2**-20))
    with untransformed():
        try:
            build.compare(_wanted(family, moved, False), _wanted(family, case, False), family.width)
        except RuntimeError:
            return False
    return True


def check(engine: Any, family: Family, softmax: bool) -> None:
    """RuntimeError unless the kernels agree with the plain expressions."""
    draws = (_cases(family, attempt) for attempt in range(16))
    steady = (cases for cases in draws if all(_steady(family, case) for case in cases))
    for case in next(steady, _cases(family, 0)):
        # one at a time: what torch.func does inside forbids `requires_grad_` again to what follows
        with untransformed():
            found = _found(engine, family, case, softmax)
        with untransformed():
            wanted = _wanted(family, case, softmax)
        build.compare(found, wanted, family.width)


def refuses_family(family: Family) -> str:
    """Why there can be no kernels of a family; "" if there can."""
    if getattr(family.pieces, "cpp", None) is None:
        return f"the C++ engine has no piece of the {family.basis.family!r} basis"
    if family.width > MAX_WIDTH:
        return f"the C++ engine takes {MAX_WIDTH} features at most, not {family.width}"
    return ""


@once
def engine_of(family: Family, softmax: bool) -> tuple[Engine | None, str]:
    """The checked kernels of a family and "", or None and why there are none, logged once."""
    reason = refuses_family(family)
    if reason:
        return None, reason
    pin(family)
    return build.checked(
        re.sub(r"[^\w]+", "-", family.basis.family),
        source(family, softmax),
        functools.partial(Engine, options=family.pieces.cpp.options),
        functools.partial(check, family=family, softmax=softmax),
    )


def status() -> str:
    """ "ready", or why the engine does not run here; builds that of Fourier G = 3 if need be."""
    family = family_named('kart.bases:fourier?{"base": "zero", "grid": 3}')
    return engine_of(family, False)[1] or "ready"


# --- the engine -----------------------------------------------------------------------------------


def refuses(product: Product, softmax: bool = False) -> str:
    """Why this engine cannot run a product; "" if it can."""
    if any(x.dtype not in DTYPES for x in (product.q, product.k, product.coefs)):
        return "the C++ engine computes in float32 alone, and takes half precision beside it"
    return engine_of(product.family, softmax)[1]


def widened(product: Product) -> Product:
    """A product in float32, which the kernels take."""
    q, k, coefs = (x.float() for x in (product.q, product.k, product.coefs))
    return product._replace(q=q, k=k, coefs=coefs)


def _loaded(product: Product, softmax: bool = False) -> Engine:
    engine = engine_of(product.family, softmax)[0]
    assert engine is not None  # `refuses` was asked
    return engine


def forward(product: Product) -> Tensor:
    """As `chunked.forward`."""
    (y,) = _loaded(product).forward(widened(product))
    return y.to(product.q.dtype)


def backward(product: Product, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.backward`."""
    dq, dk, dcoefs = _loaded(product).backward(widened(product), dy.float())
    return dq.to(product.q.dtype), dk.to(product.k.dtype), dcoefs.to(product.coefs.dtype)


def forward_beside(product: Product, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`forward`, softmax attention to `v (B, H, M, e)` and the logarithm of its sums."""
    y, out, sums = _loaded(product, True).forward(widened(product), Softmax(v.float()))
    return y.to(product.q.dtype), out.to(v.dtype), sums


def backward_beside(
    product: Product, dy: Tensor, v: Tensor, dout: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, coefs and v from those of the outputs of `forward_beside`."""
    soft = Softmax(v.float(), dout.float(), out.float(), logsumexp)
    inputs = (product.q, product.k, product.coefs, v)
    found = _loaded(product, True).backward(widened(product), dy.float(), soft)
    dq, dk, dcoefs, dv = (x.to(y.dtype) for x, y in zip(found, inputs, strict=True))
    return dq, dk, dcoefs, dv
