"""Polynomials: monomials and Chebyshev's."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kart.bases.basis import (
    Basis,
    Cpp,
    Shared,
    Triton,
    check_integer,
    check_span,
    expansion,
    last_axis,
)

MONOMIALS = """
struct Piece {
  static constexpr int K = DEGREE + 1;
  explicit Piece(const float*) {}
  INLINE void features(vec x, vec* f) const {
    f[0] = splat(1.0f);
    UNROLL for (int k = 1; k < K; ++k) f[k] = f[k - 1] * x;
  }
  INLINE void slopes(vec, const vec* f, vec* g) const {
    g[0] = vec{};
    UNROLL for (int k = 1; k < K; ++k) g[k] = f[k - 1] * float(k);
  }
};
"""

CHEBYSHEV = """
struct Piece {
  static constexpr int K = DEGREE + 1;
  float middle, density;
  explicit Piece(const float* options) : middle(options[0]), density(options[1]) {}
  INLINE vec held(vec x) const {
    const vec t = (x - middle) * density;
    return clamp(t, -1.0f, 1.0f);
  }
  INLINE void features(vec x, vec* f) const {
    const vec t = held(x);
    f[0] = splat(1.0f);
    if (K > 1) f[1] = t;
    UNROLL for (int k = 2; k < K; ++k) f[k] = 2.0f * t * f[k - 1] - f[k - 2];
  }
  // T_k' = k U_{k-1}, zero where x is held at an end
  INLINE void slopes(vec x, const vec*, vec* g) const {
    const vec t = (x - middle) * density;
    vec now = (t < -1.0f) | (t > 1.0f) ? vec{} : splat(density), before = vec{};
    g[0] = vec{};
    UNROLL for (int k = 1; k < K; ++k) {
      g[k] = now * float(k);
      const vec next = 2.0f * t * now - before;
      before = now;
      now = next;
    }
  }
};
"""

MONOMIALS_IN_TRITON = """
def start(x, gate, origin, density, FAST: tl.constexpr):
    return x, gate


def feature(state, density, J: tl.constexpr, SIZE: tl.constexpr):
    x, power = state
    return power, power, (x, power * x)
"""

CHEBYSHEV_IN_TRITON = """
def start(x, gate, origin, density, FAST: tl.constexpr):
    t = (x - origin) * density
    # T_{-1} = T_1; from a start of zeros, where `gate` is 0, the recurrence stays zero
    return t, gate, gate * tl.minimum(tl.maximum(t, -1.0), 1.0)


def feature(state, density, J: tl.constexpr, SIZE: tl.constexpr):
    t, now, before = state
    # x held at an end of the span has no slope
    slope = tl.where((t >= -1.0) & (t <= 1.0), now, 0.0)
    held = tl.minimum(tl.maximum(t, -1.0), 1.0)
    return now, slope, (t, 2.0 * held * now - before, now)
"""


def polynomial(
    degree: int = 3, *, base: str = "zero", init: str = "scaled", scales: bool = False
) -> Basis:
    """Monomials 1, x, .., x^degree; K = degree + 1.

    Degree 0 and 1 are the controls: learned mixing that ignores the scores, and mixing affine in
    them.

    >>> polynomial(2).expand(torch.tensor(3.0))
    tensor([1., 3., 9.])
    """
    check_integer("polynomial", "degree", degree, 0)

    def expand(x: Tensor) -> Tensor:
        powers = [torch.ones_like(x)]
        for _ in range(degree):
            powers.append(powers[-1] * x)
        return last_axis(torch.stack(powers))

    def fill(out: Tensor, x: Tensor) -> None:
        rows = out.unbind(1)
        rows[0].fill_(1)
        for k in range(degree):
            torch.mul(rows[k], x, out=rows[k + 1])

    def fold(coefs: Tensor) -> Tensor:
        order = torch.arange(1, degree + 1, dtype=coefs.dtype, device=coefs.device)[:, None]
        last = torch.zeros_like(coefs[..., :1, :])
        return torch.cat([coefs[..., 1:, :] * order, last], dim=-2)

    return expansion(
        polynomial,
        expand,
        degree + 1,
        Shared(base, init, scales),
        orders=range(1, degree + 2),
        options={"degree": degree},
        traits={"smooth": math.inf, "points": (0.0, 1.0, -1.0)},
        fill=fill,
        fold=fold,
        cpp=Cpp(MONOMIALS, {"DEGREE": degree}),
        triton=Triton(MONOMIALS_IN_TRITON, fold=fold),
    )


def chebyshev(
    degree: int = 4,
    span: Sequence[float] = (-4.0, 4.0),
    *,
    base: str = "zero",
    init: str = "scaled",
    scales: bool = False,
) -> Basis:
    """Chebyshev polynomials T_0..T_degree on `span`; K = degree + 1.

    x is mapped to t in [-1, 1] and held at the end it passes (T_k grows like (2t)^k outside), so
    features stay in [-1, 1].
    """
    check_integer("chebyshev", "degree", degree, 0)
    low, high = check_span("chebyshev", span)

    def expand(x: Tensor) -> Tensor:
        t = ((x - (low + high) / 2) / ((high - low) / 2)).clamp(-1, 1)
        values, twice = [torch.ones_like(t), t], 2 * t
        for _ in range(2, degree + 1):
            values.append(twice * values[-1] - values[-2])
        return last_axis(torch.stack(values[: degree + 1]))

    def fold(coefs: Tensor) -> Tensor:
        # T_n' = 2 n (T_{n-1} + T_{n-3} + ..), its T_0 once
        order = torch.arange(degree + 1, dtype=coefs.dtype, device=coefs.device)
        above = order - order[:, None]
        matrix = torch.where((above > 0) & (above % 2 == 1), 2 * order, 0.0)
        matrix = matrix * torch.where(order == 0, 0.5, 1.0)[:, None] * (2 / (high - low))
        return (matrix[..., None] * coefs[..., None, :, :]).sum(-2)

    return expansion(
        chebyshev,
        expand,
        degree + 1,
        Shared(base, init, scales),
        orders=range(1, degree + 2),
        options={"degree": degree, "span": (low, high)},
        traits={"bounded": 1.0, "smooth": 0, "points": (low, (low + high) / 2, high)},
        cpp=Cpp(CHEBYSHEV, {"DEGREE": degree}, ((low + high) / 2, 2 / (high - low))),
        triton=Triton(CHEBYSHEV_IN_TRITON, (low + high) / 2, 2 / (high - low), fold),
    )
