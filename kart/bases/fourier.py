"""The paper's own family: sums of harmonics."""

import math

import torch
from torch import Tensor

from kart.bases.basis import Basis, Cpp, Shared, Triton, check_integer, expansion, last_axis

CPP = """
struct Piece {
  static constexpr int K = 2 * GRID;
  explicit Piece(const float*) {}
  INLINE void features(vec x, vec* f) const {
    vec *c = f, *s = f + GRID;
    sincos(x, s[0], c[0]);
    UNROLL for (int k = 2; k <= GRID; ++k) {
      // angle sum of the two halves: the error grows like k, that of a recurrence like its square
      const int i = k / 2 - 1, j = k - k / 2 - 1;
      c[k - 1] = c[i] * c[j] - s[i] * s[j];
      s[k - 1] = s[i] * c[j] + c[i] * s[j];
    }
  }
  INLINE void slopes(vec, const vec* f, vec* g) const {
    UNROLL for (int k = 0; k < GRID; ++k) {
      g[k] = f[GRID + k] * -float(k + 1);
      g[GRID + k] = f[k] * float(k + 1);
    }
  }
};
"""

# 2 cos kx for k = 1..G, then sin kx, both by y_{k+1} = 2 cos x y_k - y_{k-1}: the first cosine
# doubled is the factor itself, one tile less to keep
TRITON = """
def start(x, gate, origin, density, FAST: tl.constexpr):
    sine, cosine = sincos(x, FAST)
    factor = cosine + cosine
    # the recurrence is linear: from a start of zeros, where `gate` is 0, it stays zero
    return factor, factor * gate, gate + gate, sine * gate


def feature(state, density, J: tl.constexpr, SIZE: tl.constexpr):
    factor, now, before, sine = state
    if J == SIZE // 2:
        now, before = sine, tl.zeros_like(now)
    return now, now, (factor, factor * now - before, now, sine)
"""


def harmonics(x: Tensor, grid: int) -> tuple[list[Tensor], list[Tensor]]:
    """`cos(kx)` and `sin(kx)` for k = 1..grid, two lists of tensors like `x`, from one of each.

    Harmonic k is the angle sum of harmonics k//2 and k - k//2, from the fourth on brought back to
    the unit circle by one Newton step: without it every doubling doubles the error of the radius.
    What is left is a few eps times (abs(value) + condition), the condition k x d/dx of the
    harmonic; the three-term recurrence would lose k^2 eps.
    """
    cosines, sines = [x.cos()], [x.sin()]
    for k in range(2, grid + 1):
        i, j = k // 2 - 1, k - k // 2 - 1
        c = torch.addcmul(cosines[i] * cosines[j], sines[i], sines[j], value=-1)
        s = torch.addcmul(sines[i] * cosines[j], cosines[i], sines[j])
        if k > 3:
            radius = torch.rsub(torch.addcmul(c * c, s, s), 1.5, alpha=0.5)
            c, s = c * radius, s * radius
        cosines.append(c)
        sines.append(s)
    return cosines, sines


def fourier(
    grid: int = 3, *, base: str = "zero", init: str = "scaled", scales: bool = False
) -> Basis:
    """Fourier-KArAt (eq. 2): phi(x) = sum_{k=1..G} a_k cos(kx) + b_k sin(kx), period 2 pi, no
    constant; K = 2G.

    `coefs[..., :G]` are a_1..a_G and `coefs[..., G:]` are b_1..b_G. Inits: "paper" N(0, 1) as
    printed (the output of a head then grows like the number of keys), "scaled" N(0, 1 / (keys G))
    (default), "smooth" amplitudes falling as 1/k.

    x is an angle in radians, and what is not finite gives NaN. The neighbours of a float32 of
    2^22 = 4e6 are half a radian away: beyond, the compiled engines still give points of the unit
    circle, but not those of torch.

    >>> fourier(2).expand(torch.tensor(0.0))
    tensor([1., 1., 0., 0.])
    """
    check_integer("fourier", "grid", grid, 1)

    def expand(x: Tensor) -> Tensor:
        cosines, sines = harmonics(x, grid)
        return last_axis(torch.stack(cosines + sines))

    def fill(out: Tensor, x: Tensor) -> None:
        rows = out.unbind(1)
        cosines, sines = rows[:grid], rows[grid:]
        torch.cos(x, out=cosines[0])
        torch.sin(x, out=sines[0])
        for k in range(2, grid + 1):
            # as in `harmonics`, without the step that keeps the radius
            i, j = k // 2 - 1, k - k // 2 - 1
            cosine, sine = cosines[k - 1], sines[k - 1]
            torch.mul(cosines[i], cosines[j], out=cosine).addcmul_(sines[i], sines[j], value=-1)
            torch.mul(sines[i], cosines[j], out=sine).addcmul_(cosines[i], sines[j])

    def fold(coefs: Tensor) -> Tensor:
        # (cos kx)' = -k sin kx and (sin kx)' = k cos kx
        order = torch.arange(1, grid + 1, dtype=coefs.dtype, device=coefs.device)[:, None]
        return torch.cat([coefs[..., grid:, :] * order, coefs[..., :grid, :] * -order], dim=-2)

    return expansion(
        fourier,
        expand,
        2 * grid,
        Shared(base, init, scales),
        orders=[*range(1, grid + 1)] * 2,
        grid=grid,
        options={"grid": grid},
        traits={"periodic": 2 * math.pi, "zero_mean": True, "bounded": 1.0, "smooth": math.inf}
        | {"points": (0.0, math.pi / 2, math.pi, -math.pi, 2 * math.pi), "operations": 3 * grid},
        fill=fill,
        fold=fold,
        cpp=Cpp(CPP, {"GRID": grid}),
        triton=Triton(TRITON, fold=fold, rescale=lambda coefs: coefs[..., :grid, :, :].mul_(0.5)),
    )
