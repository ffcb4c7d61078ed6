"""Families of learnable functions of one real variable, the units `phi_pq` of KArAt (paper, eq. 1,
2, 5 and Table 6).

A family is a factory that returns a `Basis`, a tuple of pure functions. `basis.init(generator,
shape)` draws the parameters of `prod(shape)` functions and `basis.apply(params, x)` evaluates them.
Families that are linear in their coefficients also have `expand`, their features: the streamed
attention of `kart.kernels` needs no more than those. What else its engines can use, slopes, C++ and
Triton, a family declares beside its features, in one file.

| family | unit phi(x), for base "zero" | source |
|---|---|---|
| `fourier` | sum_k a_k cos(kx) + b_k sin(kx), k = 1..G | eq. 2 |
| `polynomial` | sum_k c_k x^k, k = 0..degree (0 and 1 are controls) | - |
| `bspline` | sum_j c_j B_j(x), G + degree splines on a uniform grid | sec. 3, KAN |
| `chebyshev` | sum_k c_k T_k(x / span) | - |
| `gaussian_rbf` | sum_j c_j exp(-((x - t_j) / h)^2) | - |
| `rational` | (a_0 + .. + a_m x^m) / (1 + abs(b_1 x + .. + b_n x^n)) | Table 6 |
| `mexican_hat`, `morlet`, `dog`, `meyer`, `shannon` | w psi((x - tau) / s) | Table 6 |

All take `base`, `init` and `scales`, of which `linear` says more; `init="smooth"` is for `fourier`,
`polynomial` and `chebyshev`, whose features have an order.
"""

from collections.abc import Callable

from kart.bases.basis import BASES, DRAWN, Basis, Cpp, Params, Triton, linear, normal
from kart.bases.bspline import bspline
from kart.bases.fourier import fourier, harmonics
from kart.bases.polynomial import chebyshev, polynomial
from kart.bases.rational import rational
from kart.bases.rbf import gaussian_rbf
from kart.bases.wavelets import dog, mexican_hat, meyer, morlet, shannon

FAMILIES: dict[str, Callable[..., Basis]] = {
    "fourier": fourier,
    "polynomial": polynomial,
    "bspline": bspline,
    "chebyshev": chebyshev,
    "gaussian_rbf": gaussian_rbf,
    "rational": rational,
    "mexican_hat": mexican_hat,
    "morlet": morlet,
    "dog": dog,
    "meyer": meyer,
    "shannon": shannon,
}

# the positional numbers of a family in a spec, as the grid in G3B; families not named take none
NUMBERS: dict[str, tuple[str, ...]] = {
    "fourier": ("grid",),
    "bspline": ("grid",),
    "gaussian_rbf": ("grid",),
    "polynomial": ("degree",),
    "chebyshev": ("degree",),
    "rational": ("numerator", "denominator"),
}

__all__ = [
    "BASES",
    "DRAWN",
    "FAMILIES",
    "NUMBERS",
    "Basis",
    "Cpp",
    "Params",
    "Triton",
    "harmonics",
    "linear",
    "normal",
    *FAMILIES,
]
