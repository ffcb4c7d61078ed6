"""Quotients of polynomials."""

import math

import torch
from torch import Generator, Tensor

from kart import schema
from kart.bases import names
from kart.bases.basis import Basis, Cpp, Params, Triton, assemble, check_integer, normal

CPP = """
struct Unit {
  static constexpr int P = NUMERATOR + 1 + DENOMINATOR;  // a_0 .. a_m, b_1 .. b_n
  vec theta[P];
  Unit(const float*, const float* parameters) {
    UNROLL for (int i = 0; i < P; ++i) theta[i] = splat(parameters[i]);
  }
  INLINE vec above(vec x) const {
    vec y = theta[NUMERATOR];
    UNROLL for (int k = NUMERATOR - 1; k >= 0; --k) y = y * x + theta[k];
    return y;
  }
  INLINE vec below(vec x) const {
    vec y = theta[P - 1];
    UNROLL for (int k = P - 2; k > NUMERATOR; --k) y = y * x + theta[k];
    return y * x;
  }
  INLINE vec value(vec x) const { return above(x) / (1.0f + magnitude(below(x))); }
  INLINE vec slope(vec x, vec dy, vec* sums) const {
    vec a = theta[NUMERATOR], da = vec{}, b = theta[P - 1], db = vec{};
    UNROLL for (int k = NUMERATOR - 1; k >= 0; --k) {
      da = da * x + a;
      a = a * x + theta[k];
    }
    UNROLL for (int k = P - 2; k > NUMERATOR; --k) {
      db = db * x + b;
      b = b * x + theta[k];
    }
    db = db * x + b;  // of x b(x)
    b = b * x;
    const vec inverse = 1.0f / (1.0f + magnitude(b));
    const vec pull = -a * inverse * inverse * sign(b);
    vec power = dy * inverse;
    UNROLL for (int k = 0; k <= NUMERATOR; ++k) {
      sums[k] += power;
      power = power * x;
    }
    power = dy * pull * x;
    UNROLL for (int k = NUMERATOR + 1; k < P; ++k) {
      sums[k] += power;
      power = power * x;
    }
    return da * inverse + pull * db;
  }
  void finish(const float* sums, float* gradient) const {
    for (int i = 0; i < P; ++i) gradient[i] = sums[i];
  }
};
"""

TRITON = """
def unit(x, theta, FAST: tl.constexpr):
    a = theta[NUMERATOR]
    b = theta[NUMERATOR + DENOMINATOR]
    da = tl.zeros_like(x)
    db = da
    for i in tl.static_range(NUMERATOR):
        da = da * x + a
        a = a * x + theta[NUMERATOR - 1 - i]
    for i in tl.static_range(DENOMINATOR - 1):
        db = db * x + b
        b = b * x + theta[NUMERATOR + DENOMINATOR - 1 - i]
    db = db * x + b  # of x b(x)
    b = b * x
    inverse = 1.0 / (1.0 + tl.abs(b))
    value = a * inverse
    pull = -value * inverse * sign(b)
    terms = ()
    power = inverse
    for _ in tl.static_range(NUMERATOR + 1):
        terms += (power,)
        power = power * x
    power = pull * x
    for _ in tl.static_range(DENOMINATOR):
        terms += (power,)
        power = power * x
    return value, da * inverse + pull * db, terms
"""


def _horner(coefs: Tensor, x: Tensor) -> Tensor:
    y = coefs[..., -1] + torch.zeros_like(x)
    for k in range(coefs.shape[-1] - 2, -1, -1):
        y = y * x + coefs[..., k]
    return y


def rational(
    numerator: int = 5,
    denominator: int = 4,
    *,
    base: str = "zero",
    init: str = "scaled",
    scales: bool = False,
) -> Basis:
    """Safe Pade rational of degrees (m, n) (Table 6): (a_0 + .. + a_m x^m) / (1 + abs(b_1 x + .. +
    b_n x^n)).

    Parameters `numerator (..., m + 1)` and `denominator (..., n)`; no poles, since the denominator
    is at least 1. Inits: "paper" all N(0, 1) as printed; "scaled" the numerator divided by
    sqrt(keys). Finite in float32 while abs(x)^m is.
    """
    check_integer("rational", "numerator", numerator, 0)
    check_integer("rational", "denominator", denominator, 1)
    schema.check_choice("rational", "init", init, ["paper", "scaled"])

    def draw(generator: Generator, shape: tuple[int, ...]) -> Params:
        a = normal(generator, (*shape, numerator + 1))
        b = normal(generator, (*shape, denominator))
        if init == "scaled":
            a = a / math.sqrt(shape[-1] if shape else 1)
        return {"numerator": a, "denominator": b}

    def both(params: Params) -> tuple[Tensor, Tensor]:
        a, b = params["numerator"], params["denominator"]
        if (a.shape[-1], b.shape[-1]) != (numerator + 1, denominator):
            raise ValueError(
                f"`rational` needs `numerator` and `denominator` with last axes of {numerator + 1} "
                f"and {denominator}, got shapes {tuple(a.shape)} and {tuple(b.shape)}. Call `init` "
                "of this basis for its parameters."
            )
        return a, b

    def core(params: Params, x: Tensor) -> Tensor:
        a, b = both(params)
        return _horner(a, x) / (1 + (_horner(b, x) * x).abs())

    def leaves(params: Params) -> Tensor:
        a, b = both(params)
        if scales:
            a = a * params["scale_basis"][..., None]
        return torch.cat([a, b], dim=-1)

    degrees = {"numerator": numerator, "denominator": denominator}
    shared = {"base": base, "init": init, "scales": scales}
    sizes = {"NUMERATOR": numerator, "DENOMINATOR": denominator}
    return assemble(
        "rational",
        numerator + 1 + denominator,
        draw,
        core,
        None,
        base,
        scales,
        {**degrees, "init": init},
        {"smooth": 0, "amplitude": "numerator", "points": (0.0, 1.0, -1.0)},
        (rational, {**degrees, **shared}),
        names.builtin(rational, {**degrees, "base": base, "scales": scales}),
        cpp=Cpp(CPP, sizes),
        triton=Triton(TRITON, sizes=sizes),
        leaves=leaves,
        learned=("numerator", "denominator"),
    )
