"""Radial functions on a grid of centres."""

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

CPP = """
struct Piece {
  static constexpr int K = GRID;
  float low, density;
  explicit Piece(const float* options) : low(options[0]), density(options[1]) {}
  INLINE void features(vec x, vec* f) const {
    const vec t = (x - low) * density;
    UNROLL for (int j = 0; j < K; ++j) {
      const vec z = t - float(j);
      f[j] = exponential(-z * z);
    }
  }
  INLINE void slopes(vec x, const vec* f, vec* g) const {
    // far outside, where every feature is 0, the distance may not be finite
    const vec t = clamp((x - low) * density, -1e4f, 1e4f);
    UNROLL for (int j = 0; j < K; ++j) g[j] = (t - float(j)) * (-2.0f * density) * f[j];
  }
};
"""

TRITON = """
def start(x, gate, origin, density, FAST: tl.constexpr):
    return (x - origin) * density, gate


def feature(state, density, J: tl.constexpr, SIZE: tl.constexpr):
    t, gate = state
    z = t - J
    value = tl.exp(-z * z) * gate
    return value, -2.0 * density * z * value, state
"""


def gaussian_rbf(
    grid: int = 8,
    span: Sequence[float] = (-4.0, 4.0),
    *,
    base: str = "zero",
    init: str = "scaled",
    scales: bool = False,
) -> Basis:
    """Gaussian bumps exp(-((x - t_j) / h)^2) at `grid` centres t_j spread evenly over `span`, h
    their distance; K = grid.
    """
    check_integer("gaussian_rbf", "grid", grid, 2)
    low, high = check_span("gaussian_rbf", span)
    width = (high - low) / (grid - 1)

    def expand(x: Tensor) -> Tensor:
        centres = torch.arange(grid, dtype=x.dtype, device=x.device) * width + low
        centres = centres.view(-1, *[1] * x.dim())
        away = x - centres
        return last_axis(away.new_zeros(()).addcmul(away, away, value=-(width**-2)).exp())

    return expansion(
        gaussian_rbf,
        expand,
        grid,
        Shared(base, init, scales),
        options={"grid": grid, "span": (low, high)},
        traits={"bounded": 1.0, "nonnegative": True, "smooth": math.inf}
        | {"points": tuple(low + j * width for j in range(grid))},
        cpp=Cpp(CPP, {"GRID": grid}, (low, 1 / width)),
        triton=Triton(TRITON, low, 1 / width),
    )
