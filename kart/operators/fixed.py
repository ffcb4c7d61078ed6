"""The fixed operators, baselines of the learnable ones: softmax, sigmoid, relu, sparsemax."""

from typing import Any

import torch
from torch import Tensor

from kart import bases, kernels
from kart.factories import remember
from kart.kernels.plain import scores as scores_of
from kart.kernels.plain import wide
from kart.operators.contract import (
    SIMPLEX,
    SOFTMAX,
    Operator,
    attended_keys,
    from_rows,
    only,
    scored,
    simplex_rows,
    simplex_values,
    softmax_rows,
    two_axes,
)
from kart.operators.static import beside

# keys a query from which on there are few queries
FEW = 16


def pieces(value: str, slope: str, expression: str, derivative: str) -> dict[str, Any]:
    """The one feature `f` of a score `x`, and its slope, in C++, and as `y` in Triton."""
    cpp = f"""
struct Piece {{
  static constexpr int K = 1;
  explicit Piece(const float*) {{}}
  INLINE void features(vec x, vec* f) const {{ f[0] = {value}; }}
  INLINE void slopes(vec x, const vec* f, vec* g) const {{ g[0] = {slope}; }}
}};
"""
    triton = f"""
def start(x, gate, origin, density, FAST: tl.constexpr):
    return x, gate


def feature(state, density, J: tl.constexpr, SIZE: tl.constexpr):
    x, gate = state
    y = {expression}
    return y * gate, {derivative} * gate, state
"""
    return {"cpp": bases.Cpp(cpp), "triton": bases.Triton(triton)}


def each(basis: bases.Basis, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention with the one feature of `basis` for weights: see `kernels.entry_attention`."""
    units = {"coefs": q.new_ones(v.shape[-3], 1)}
    return kernels.entry_attention(basis, units, q, k, v, **options)


def on_simplex(each: int) -> dict[str, Any]:
    """The traits of rows on the simplex that take `each` operations a score."""
    return {**scored(each), "simplex": True, "shift_invariant": True}


@remember
def softmax() -> Operator:
    """Rows of softmax; a row whose keys are all masked is zero, one whose attended scores are all
    -inf NaN, of which `kernels.softmax_attention` says more.
    """
    return from_rows("softmax", softmax_rows, kernels.softmax_attention, traits=on_simplex(SOFTMAX))


@remember
def sigmoid() -> Operator:
    """sigmoid(s - log n), n the number of keys that are attended (Ramapuram et al. 2024)."""
    basis = bases.linear(
        lambda x: x.sigmoid()[..., None],
        1,
        family="sigmoid",
        **pieces("sigmoid(x)", "f[0] * (1.0f - f[0])", "tl.sigmoid(x)", "y * (1.0 - y)"),
    )

    def rows(scores: Tensor, mask: Tensor | None) -> Tensor:
        count = attended_keys(mask, scores.shape[-1], scores)
        return only((scores - count.log()).sigmoid(), mask)

    def product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if not torch.compiler.is_exporting() and FEW * q.shape[-2] <= k.shape[-2]:
            # their weights are less than a copy of the keys
            return rows(only(scores_of(q, k, None), mask), mask) @ wide(v)
        q, k, v = wide(q), wide(k), wide(v)
        shift = -attended_keys(mask, k.shape[-2], q).log()
        # s - log n is the product of vectors with a number more
        q = beside(q * q.shape[-1] ** -0.5, shift.reshape(*shift.shape[:-1], 1))
        k = beside(k, torch.ones_like(k[..., :1]))
        return each(basis, q, k, v, mask=mask, scale=1.0)

    return from_rows("sigmoid", rows, product, traits=scored(3))


@remember
def relu() -> Operator:
    """relu(s) / n, n the number of keys that are attended (Wortsman et al. 2023)."""
    basis = bases.linear(
        lambda x: x.relu()[..., None],
        1,
        family="relu",
        **pieces(
            *("x <= 0.0f ? vec{} : x", "x <= 0.0f ? vec{} : splat(1.0f)"),
            *("tl.where(x <= 0.0, 0.0, x)", "tl.where(x <= 0.0, 0.0, 1.0)"),
        ),
    )

    def rows(scores: Tensor, mask: Tensor | None) -> Tensor:
        return only(scores.relu() / attended_keys(mask, scores.shape[-1], scores), mask)

    def product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        factor = two_axes(1 / attended_keys(mask, k.shape[-2], wide(q[..., :0])))
        return each(basis, q, k, v, mask=mask, factor=factor)

    return from_rows("relu", rows, product, traits=scored(2))


@remember
def sparsemax() -> Operator:
    """Rows of scores projected onto the simplex (Martins and Astudillo 2016)."""
    return from_rows("sparsemax", simplex_rows, simplex_values, traits=on_simplex(SIMPLEX))
