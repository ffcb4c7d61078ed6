"""B-splines on a uniform grid, of KAN."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kart.bases.basis import Basis, Cpp, Shared, Triton, check_integer, check_span, expansion

CPP = """
struct Piece {
  static constexpr int K = GRID + DEGREE;
  float low, density;
  explicit Piece(const float* options) : low(options[0]), density(options[1]) {}

  // the interval of x and the place in it; NaN stays NaN in the place
  INLINE void locate(vec x, vec& cell, vec& u) const {
    const vec place = clamp((x - low) * density, -float(DEGREE + 1), float(K + 1));
    cell = place == place ? floor(place) : vec{};
    if (DEGREE == 0) cell = place == float(GRID) ? splat(GRID - 1) : cell;
    u = place - cell;
  }
  // the D + 1 splines of degree D that are not zero there, as in bspline.py
  template <int D>
  INLINE void triangle(vec u, vec* v) const {
    v[0] = splat(1.0f) + 0.0f * u;
    UNROLL for (int k = 1; k <= D; ++k) {
      const float inverse = 1.0f / k;
      v[k] = u * v[k - 1] * inverse;
      for (int i = k - 1; i > 0; --i)
        v[i] = ((u + float(k - i)) * v[i - 1] + (float(i + 1) - u) * v[i]) * inverse;
      v[0] = (1.0f - u) * v[0] * inverse;
    }
  }
  INLINE void put(vec cell, const vec* v, vec* f) const {
    UNROLL for (int j = 0; j < K; ++j) {
      f[j] = vec{};
      UNROLL for (int i = 0; i <= DEGREE; ++i) f[j] = cell == float(j - i) ? v[i] : f[j];
    }
  }
  INLINE void features(vec x, vec* f) const {
    vec cell, u, v[DEGREE + 1];
    locate(x, cell, u);
    triangle<DEGREE>(u, v);
    put(cell, v, f);
  }
  INLINE void slopes(vec x, const vec*, vec* g) const {
    vec cell, u, v[DEGREE + 1], w[DEGREE + 1];
    locate(x, cell, u);
    if constexpr (DEGREE > 0) {
      triangle<DEGREE - 1>(u, v);
      w[0] = v[0] * -density;
      UNROLL for (int i = 1; i < DEGREE; ++i) w[i] = (v[i - 1] - v[i]) * density;
      w[DEGREE] = v[DEGREE - 1] * density;
    } else {
      w[0] = vec{};
    }
    put(cell, w, g);
  }
};
"""


def _triton(degree: int) -> str:
    """The spline centred at 0, on unit intervals: sum_k (-1)^k C(p + 1, k) (h - k - |v|)+^p / p!,
    h = (p + 1) / 2, over k < h.
    """
    half, lines = (degree + 1) / 2, list[str]()
    for k in range((degree + 2) // 2):
        weight = (-1) ** k * math.comb(degree + 1, k) / math.factorial(degree)
        power = " * ".join(["r"] * (degree - 1)) or "tl.where(r > 0.0, 1.0, 0.0)"
        lines.append(f"""
    r = tl.maximum({half - k} - tl.abs(v), 0.0)
    power = {weight} * {power}
    value += power * r
    slope += power""")
    return f"""
def start(x, gate, origin, density, FAST: tl.constexpr):
    return (x - origin) * density, gate


def feature(state, density, J: tl.constexpr, SIZE: tl.constexpr):
    t, gate = state
    v = t - (J + {(1 - degree) / 2})
    value = tl.zeros_like(t)
    slope = tl.zeros_like(t){"".join(lines)}
    return value * gate, slope * density * tl.where(v < 0.0, {degree}.0, -{degree}.0) * gate, state
"""


def bspline(
    grid: int = 8,
    degree: int = 3,
    span: Sequence[float] = (-4.0, 4.0),
    *,
    base: str = "zero",
    init: str = "scaled",
    scales: bool = False,
) -> Basis:
    """B-splines of any degree on `grid` equal intervals of `span`, the knots continued beyond it
    (KAN); K = grid + degree.

    They sum to 1 on `span` and fall to 0 within `degree` intervals beyond it. Only the degree + 1
    splines that are not zero at x are computed (de Boor's triangle on one interval), then placed;
    the recursion never runs over the whole grid. With degree 0 the right end of `span` counts to
    the last interval.
    """
    check_integer("bspline", "grid", grid, 1)
    check_integer("bspline", "degree", degree, 0)
    low, high = check_span("bspline", span)
    size = grid + degree

    def expand(x: Tensor) -> Tensor:
        # held where no spline is: far outside its powers would be infinite, and their share of the
        # gradient, zero times infinity, NaN
        # with its last axis at once: torch's tangents of 0-d tensors change their dtype
        place = ((x[..., None] - low) * (grid / (high - low))).clamp(-degree - 1, size + 1)
        cell = place.detach().floor()
        if degree == 0:
            cell = torch.where(place.detach() == grid, cell.new_tensor(grid - 1.0), cell)
        u = place - cell  # in [0, 1) within the grid
        # values[i] is the spline that started degree - i intervals before this one
        values = [torch.ones_like(u)]
        for k in range(1, degree + 1):
            row = [(1 - u) * values[0] / k]
            for i in range(1, k):
                row.append(((u + (k - i)) * values[i - 1] + (i + 1 - u) * values[i]) / k)
            values = [*row, u * values[-1] / k]
        # splines that end before or start behind the grid have places of their own beside it
        first = cell.nan_to_num(0).long() + degree + 1
        places = first + torch.arange(degree + 1, device=x.device)
        room = x.new_zeros(*x.shape, size + 2 * (degree + 1) + 1)
        y = room.scatter(-1, places, torch.cat(values, -1))[..., degree + 1 : degree + 1 + size]
        # NaN scores stay NaN and do not become zeros
        return torch.where(torch.isnan(x)[..., None], x[..., None], y)

    step = (high - low) / grid
    return expansion(
        bspline,
        expand,
        size,
        Shared(base, init, scales),
        options={"grid": grid, "degree": degree, "span": (low, high)},
        traits={
            "bounded": 1.0,
            "nonnegative": True,
            "partition_of_unity": (low, high),
            "compact_support": (low - degree * step, high + degree * step),
            "smooth": degree - 1,
            "refinable": True,
            "points": tuple(low + j * step for j in range(-degree, grid + degree + 1)),
        },
        cpp=Cpp(CPP, {"GRID": grid, "DEGREE": degree}, (low, 1 / step)),
        # higher powers cancel, and a step has no such sum
        triton=Triton(_triton(degree), low, 1 / step) if 1 <= degree <= 5 else None,
    )
