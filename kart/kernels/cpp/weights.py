"""The compiled attention of `kart.kernels.entries`: weights.cpp behind a family, a table of
offsets, or one of every query and key.

As the engine of products it is held against the plain expression before its first use, and where
anything fails the reason is logged once and torch runs instead.
"""

import ctypes
import functools
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kart.kernels import plain
from kart.kernels.arguments import room_like
from kart.kernels.cpp import (
    BASES,
    DTYPES,
    Array,
    Shape,
    array_of,
    build,
    floats,
    refuses_family,
    units_of,
)
from kart.kernels.family import Family, once, pin
from kart.kernels.transforms import untransformed


class Weighted(NamedTuple):
    """The arguments of raw attention: `q (B, H, N, d)`, `k (B, H, M, d)`, `v (B, H, M, e)`, `theta
    (B or 1, H, P)` of the functions of a family or, without one, the entries of every offset, or,
    where it is `matrix`, what `of_matrix` packs: entries of every query and key, with a family
    `(B or 1, H, 1 + K, N, M)`, the coefficients of a function for each after them; `mask` None or
    boolean `(B or 1, H or 1, N or 1, M or 1)`, `factor` None or `(B or 1, H or 1, N or 1, 1)`;
    `form` is one of `plain.FORMS`.
    """

    family: Family | None
    form: str
    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    mask: Tensor | None
    factor: Tensor | None
    scale: float
    matrix: bool = False


# queries of a packed matrix that lie together, for each key: as many as a kernel takes at once, or
# a multiple of it
BLOCK = 32


def of_matrix(matrix: Tensor, beyond: float = 0) -> Tensor:
    """`(B or 1, H, .., N, M)` as the kernels take it, `(B or 1, H, .. N' M)`: N' a multiple of
    `BLOCK`, whose entries are `beyond` after N, in blocks of that many queries, keys first.
    """
    padded = functional.pad(matrix, (0, 0, 0, -matrix.shape[-2] % BLOCK), value=beyond)
    return padded.unflatten(-2, (-1, BLOCK)).mT.flatten(2)


def as_matrix(packed: Tensor, rows: int, keys: int) -> Tensor:
    """The matrix `(B or 1, H, N, M)` of `of_matrix`."""
    return packed.unflatten(-1, (-1, keys, BLOCK)).mT.flatten(-3, -2)[..., :rows, :]


FIELDS = ("theta", "factor", "statistic", "low", "dtheta")


class _Extra(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in FIELDS] + [
        ("size", ctypes.c_int64),
        ("soft", Array),
    ]


class Engine:
    """The compiled kernels of one family, or of tables, in one form."""

    def __init__(self, library: ctypes.CDLL, options: tuple[float, ...]):
        self.library = library
        self.options = floats(options)

    def _call(
        self,
        function: Any,
        x: Weighted,
        inputs: list[Tensor],
        results: list[Tensor],
        soft: Tensor | None = None,
        **held: Tensor | None,
    ) -> None:
        theta, mask, factor = x.theta.contiguous(), x.mask, x.factor
        if mask is not None:
            mask = mask.expand(*x.q.shape[:3], x.k.shape[2])
        if factor is not None:
            factor = factor.expand(*x.q.shape[:3], 1).contiguous()
        held |= {"theta": theta, "factor": factor}
        addresses = {name: None if y is None else y.data_ptr() for name, y in held.items()}
        extra = _Extra(size=theta.shape[2], soft=array_of(soft), **addresses)
        shape = Shape(*x.q.shape[:3], x.k.shape[2], x.q.shape[3], 1, x.v.shape[3])
        code = function(
            ctypes.byref(shape),
            self.options,
            *(ctypes.byref(array_of(y)) for y in (x.q, x.k, x.v, mask)),
            ctypes.byref(extra),
            int(theta.shape[0] > 1),
            ctypes.c_float(x.scale),
            *(ctypes.byref(array_of(y)) for y in (*inputs, *results)),
            min(torch.get_num_threads(), x.q.shape[0] * x.q.shape[1]),
        )
        if code:
            raise MemoryError("the C++ engine of attention could not allocate its buffers.")

    def forward(self, x: Weighted) -> tuple[Tensor, ...]:
        """The output `(B, H, N, e)`, and what the backward needs: what every row was divided by, or
        the logarithm of that, or its greatest entry; and `(B, H, N, e)`, in the form "beside" the
        output of softmax alone, in "simplex" the mean of the values that have a weight, and what is
        taken away from entries beside the greatest; float32.
        """
        out = room_like(x.v, x.q.shape[2])
        statistic = x.q.new_empty(x.q.shape[:3])
        soft = torch.empty_like(out) if x.form in ("beside", "simplex") else None
        low = torch.empty_like(statistic) if x.form == "simplex" else None
        held = {"statistic": statistic, "low": low}
        self._call(self.library.kart_forward, x, [], [out], soft=soft, **held)
        return tuple(y for y in (out, statistic, soft, low) if y is not None)

    def backward(self, x: Weighted, dout: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        """dq, dk, dv and dtheta, float32."""
        out, statistic, *others = results
        gradients = [room_like(y) for y in (x.q, x.k, x.v)]
        dtheta = x.theta.new_empty(x.theta.shape)
        inputs = [dout, others[0] if others else out]
        low = others[1].contiguous() if x.form == "simplex" else None
        held = {"statistic": statistic.contiguous(), "low": low, "dtheta": dtheta}
        self._call(self.library.kart_backward, x, inputs, gradients, **held)
        return *gradients, dtheta


def source(family: Family | None, form: str, matrix: bool) -> str:
    """The C++ of a family in a form."""
    lines = ['#include "vector.h"', f"constexpr int FORM = {plain.FORMS.index(form)};"]
    lines.append(f"constexpr long BLOCK = {BLOCK};")
    if family is None:
        lines.append("#define MATRIX" if matrix else "#define PLACES")
    else:
        cpp = family.pieces.cpp
        constants = {**cpp.sizes, "BASE": BASES.index(family.base)}
        lines += [f"constexpr int {name} = {value};" for name, value in constants.items()]
        lines.append(cpp.text)
        if matrix:
            lines.append("#define PAIRS")
        elif family.basis.features is not None:
            lines.append('#include "linear.h"')
    return "\n".join([*lines, '#include "weights.cpp"', ""])


class _Case(NamedTuple):
    leaves: dict[str, Tensor]
    mask: Tensor | None
    factor: Tensor
    scale: float
    dout: Tensor

    def entries(self, family: Family) -> Tensor:
        """The entries `(B, H, N, M)` in float64."""
        leaves = {name: x.double() for name, x in self.leaves.items()}
        x = plain.scores(leaves.pop("q"), leaves.pop("k"), self.scale)
        return plain.entries(family.basis, leaves, x)


def _cases(family: Family | None, matrix: bool, seed: int) -> list[_Case]:
    """Odd sizes and strides, a rest of every block, a query without keys, a query alone; widths
    below and above those that the tile unit takes. Scores of variance one, and small coefficients:
    an exponential amplifies the roundings of larger ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    batch, heads = 2, 2
    cases = []
    small, large, one = (37, 53, 7, 5), (135, 147, 70, 66), (1, 53, 16, 16)
    for own, (queries, keys, width, value_width) in ((1, small), (batch, large), (batch, one)):
        leaves = {"q": draw(batch, queries, heads, width).transpose(1, 2)}
        leaves |= {"k": draw(batch, heads, width, keys).mT}
        leaves |= {"v": draw(batch, keys, heads, value_width).transpose(1, 2)}
        if matrix:
            planes = () if family is None else (1 + family.width,)
            leaves["matrix"] = draw(own, heads, *planes, queries, keys) / (planes or (1,))[0]
        elif family is None:
            leaves["theta"] = draw(own, heads, queries + keys - 1)
        elif family.basis.features is not None:
            leaves["theta"] = draw(own, heads, family.width) / (1 + family.width)
        else:
            units = family.basis.init(generator, (own, heads))
            leaves |= {name: x + 0.3 * draw(*x.shape) for name, x in units.items()}
        mask = torch.rand(1, heads, queries, keys, generator=generator) < 0.7
        mask[:, :, 3:4] = False
        factor = draw(1, 1, queries, 1)
        dout = draw(batch, heads, queries, value_width)
        cases.append(_Case(leaves, mask if own > 1 else None, factor, width**-0.5, dout))
    return cases


def _steady(family: Family, cases: list[_Case]) -> bool:
    """Whether roundings leave the signs of entries, of which sums of magnitudes have a step."""
    entries = (case.entries(family).abs() for case in cases)
    return not any(((y > 0) & (y < 1e-6 * y.max())).any() for y in entries)


def _theta(family: Family | None, leaves: dict[str, Tensor]) -> Tensor:
    if "matrix" in leaves:
        return of_matrix(leaves["matrix"])
    if "theta" in leaves:
        return leaves["theta"]
    assert family is not None  # for the type checker
    return family.pieces.leaves(units_of(leaves))


def _plainly(family: Family | None, form: str, case: _Case) -> list[Tensor]:
    """The output of the plain expression in float64, and the gradients of the leaves."""
    with untransformed(), torch.enable_grad():
        leaves = {name: x.double().requires_grad_() for name, x in case.leaves.items()}
        q, k, v = (leaves[name] for name in "qkv")
        units = units_of(leaves)
        matrix, basis = units.get("matrix"), family and family.basis
        more = (case.mask, case.factor.double(), form, case.scale)
        out = plain.entry_attention(basis, units, q, k, v, *more, matrix=matrix)
        dout = case.dout.double()
        pulled = torch.autograd.grad(out, [*leaves.values()], dout, materialize_grads=True)
        return [out, *pulled]


def _check(engine: Engine, family: Family | None, form: str, matrix: bool) -> None:
    """RuntimeError unless the kernels agree with the plain expression in float64."""
    draws = (_cases(family, matrix, seed) for seed in range(100))
    if form == "l1" and family is not None:
        # none is where functions vanish by and by: there small entries keep their signs, too
        draws = (cases for cases in draws if _steady(family, cases))
    for case in next(draws, _cases(family, matrix, 0)):
        with untransformed(), torch.enable_grad():
            leaves = {name: x.clone().requires_grad_() for name, x in case.leaves.items()}
            q, k, v = (leaves[name].detach() for name in "qkv")
            theta, more = _theta(family, leaves), (case.mask, case.factor, case.scale, matrix)
            x = Weighted(family, form, q, k, v, theta.detach(), *more)
            results = engine.forward(x)
            *found, dtheta = engine.backward(x, case.dout, *results)
            units = [*units_of(leaves).values()]
            pulled = torch.autograd.grad(theta, units, dtheta, materialize_grads=True)
        names = ["out", *(f"d{name}" for name in leaves)]
        build.compare(
            dict(zip(names, (results[0], *found, *pulled), strict=True)),
            dict(zip(names, _plainly(family, form, case), strict=True)),
            1 if family is None else family.width,
        )


@once
def engine_of(family: Family | None, form: str, matrix: bool) -> tuple[Engine | None, str]:
    """The checked kernels and "", or None and why there are none, logged once."""
    options, name = (), "matrix" if matrix else "table"
    if family is not None:
        reason = refuses_family(family)
        if matrix and family.base != "zero":
            reason = "the C++ engine takes no base activation beside a function for every place"
        if reason:
            return None, reason
        pin(family)
        options, name = family.pieces.cpp.options, family.name
    return build.checked(
        re.sub(r"[^\w]+", "-", name.partition("?")[0].partition(":")[2] or name) + "-" + form,
        source(family, form, matrix),
        functools.partial(Engine, options=options),
        functools.partial(_check, family=family, form=form, matrix=matrix),
    )


def refuses(x: Weighted) -> str:
    """Why this engine cannot run; "" if it can."""
    if any(y.dtype not in DTYPES for y in (x.q, x.theta)):
        return "the C++ engine computes in float32 alone, and takes half precision beside it"
    return engine_of(x.family, x.form, x.matrix)[1]


def _widened(x: Weighted) -> Weighted:
    q, k, v, theta = (y.float() for y in (x.q, x.k, x.v, x.theta))
    factor = None if x.factor is None else x.factor.float()
    return x._replace(q=q, k=k, v=v, theta=theta, factor=factor)


def forward(x: Weighted) -> tuple[Tensor, ...]:
    """The output in the dtype of v, and what the backward needs besides."""
    engine = engine_of(x.family, x.form, x.matrix)[0]
    assert engine is not None  # `refuses` was asked
    out, *rest = engine.forward(_widened(x))
    return out.to(x.v.dtype), *rest


def backward(x: Weighted, dout: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
    """The gradients of q, k, v and theta."""
    engine = engine_of(x.family, x.form, x.matrix)[0]
    assert engine is not None  # `refuses` was asked
    out, *rest = results
    found = engine.backward(_widened(x), dout.float(), out.float(), *rest)
    inputs = (x.q, x.k, x.v, x.theta)
    return tuple(y.to(like.dtype) for y, like in zip(found, inputs, strict=True))
