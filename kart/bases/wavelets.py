"""Wavelets, one dilated and shifted mother function a unit (Table 6)."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from kart import schema
from kart.bases import names
from kart.bases.basis import DRAWN, Basis, Cpp, Params, Triton, assemble, normal

# of every wavelet, after a `struct Psi` with the mother function and its slope
UNIT = """
struct Unit {
  static constexpr int P = 3;
  Psi psi;
  float weight, shift, scale, below, inverse;
  Unit(const float* options, const float* theta)
      : psi(options), weight(theta[0]), shift(theta[1]), scale(theta[2]),
        below(scale * scale + 1e-20f), inverse(scale / below) {}
  INLINE vec value(vec x) const {
    vec unused;
    return psi.both((x - shift) * inverse, unused) * weight;
  }
  INLINE vec slope(vec x, vec dy, vec* sums) const {
    const vec moved = x - shift;
    vec d;
    sums[0] += dy * psi.both(moved * inverse, d);
    const vec part = dy * d;
    sums[1] += part;
    // where the mother function is flat its argument may be infinite
    sums[2] += d == 0.0f ? vec{} : part * moved;
    return d * (weight * inverse);
  }
  void finish(const float* sums, float* gradient) const {
    gradient[0] = sums[0];
    gradient[1] = -weight * inverse * sums[1];
    gradient[2] = weight * sums[2] * (1e-20f - scale * scale) / below / below;
  }
};
"""

# the same in Triton, beside `psi(t, FAST)`, the mother function and its slope
UNIT_TRITON = """
def unit(x, theta, FAST: tl.constexpr):
    weight = theta[0]
    scale = theta[2]
    below = scale * scale + 1e-20
    inverse = scale / below
    moved = x - theta[1]
    value, slope = psi(moved * inverse, FAST)
    # where the mother function is flat its argument may be infinite
    stretch = tl.where(slope == 0.0, 0.0, slope * moved)
    narrow = weight * (1e-20 - scale * scale) / below / below
    slope = slope * (weight * inverse)
    return value * weight, slope, (value, -slope, stretch * narrow)
"""

MEXICAN_HAT = """
struct Psi {
  float factor;
  explicit Psi(const float* options) : factor(options[0]) {}
  INLINE vec both(vec t, vec& slope) const {
    t = clamp(t, -15.0f, 15.0f);
    const vec z = t * t, e = exponential(-0.5f * z) * factor;
    slope = t * (z - 3.0f) * e;
    return (1.0f - z) * e;
  }
};
"""

MEXICAN_HAT_TRITON = """
def psi(t, FAST: tl.constexpr):
    t = clamp(t, -15.0, 15.0)
    z = t * t
    e = tl.exp(-0.5 * z) * FACTOR
    return (1.0 - z) * e, t * (z - 3.0) * e
"""

MORLET = """
struct Psi {
  float omega;
  explicit Psi(const float* options) : omega(options[0]) {}
  INLINE vec both(vec t, vec& slope) const {
    t = clamp(t, -15.0f, 15.0f);
    vec s, c;
    sincos(omega * t, s, c);
    const vec e = exponential(-0.5f * t * t), y = c * e;
    slope = -omega * s * e - t * y;
    return y;
  }
};
"""

MORLET_TRITON = """
def psi(t, FAST: tl.constexpr):
    t = clamp(t, -15.0, 15.0)
    s, c = sincos(OMEGA * t, FAST)
    e = tl.exp(-0.5 * t * t)
    value = c * e
    return value, -OMEGA * s * e - t * value
"""

DOG = """
struct Psi {
  explicit Psi(const float*) {}
  INLINE vec both(vec t, vec& slope) const {
    t = clamp(t, -15.0f, 15.0f);
    const vec e = exponential(-0.5f * t * t), y = t * e;
    slope = e - t * y;
    return y;
  }
};
"""

DOG_TRITON = """
def psi(t, FAST: tl.constexpr):
    t = clamp(t, -15.0, 15.0)
    e = tl.exp(-0.5 * t * t)
    value = t * e
    return value, e - t * value
"""

MEYER = """
struct Psi {
  explicit Psi(const float*) {}
  static INLINE vec nu(vec a) {
    const vec b = a * a;
    return b * b * (35.0f + a * (-84.0f + a * (70.0f - 20.0f * a)));
  }
  static INLINE vec nu_slope(vec a) {
    const vec b = a * (1.0f - a);
    return 140.0f * b * b * b;
  }
  INLINE vec both(vec t, vec& slope) const {
    const vec a = clamp(magnitude(t), 0.0f, 1.0f), rest = 1.0f - a;
    const vec inner = clamp(2.0f * (PRINTED ? nu(rest) : rest), 0.0f, 1.0f);
    const vec half = 0.5f * nu(inner);
    const vec wave = sine_half_turns(clamp_below(a, rest)), window = sine_half_turns(half);
    // nu is flat at both ends, so that an argument held there needs no care
    vec change = sine_half_turns(0.5f - half) * nu_slope(inner);
    if (PRINTED) change = change * nu_slope(rest);
    const vec d = 3.14159265358979f * (sine_half_turns(0.5f - a) * window - wave * change);
    slope = magnitude(t) < 1.0f ? d * sign(t) : vec{};
    return wave * window;
  }
};
"""

MEYER_TRITON = """
def nu(a):
    b = a * a
    return b * b * (35.0 + a * (-84.0 + a * (70.0 - 20.0 * a)))


def nu_slope(a):
    b = a * (1.0 - a)
    return 140.0 * b * b * b


def psi(t, FAST: tl.constexpr):
    a = clamp(tl.abs(t), 0.0, 1.0)
    rest = 1.0 - a
    inner = rest
    if PRINTED:
        inner = nu(rest)
    inner = clamp(2.0 * inner, 0.0, 1.0)
    half = 0.5 * nu(inner)
    wave = sine_half_turns(tl.minimum(a, rest))
    window = sine_half_turns(half)
    # nu is flat at both ends, so that an argument held there needs no care
    change = sine_half_turns(0.5 - half) * nu_slope(inner)
    if PRINTED:
        change = change * nu_slope(rest)
    d = 3.14159265358979 * (sine_half_turns(0.5 - a) * window - wave * change)
    return wave * window, d * sign(t)
"""

SHANNON = """
struct Psi {
  float limit, inverse;
  explicit Psi(const float* options) : limit(options[0]), inverse(1.0f / options[0]) {}
  // sin(t) / t and its derivative: a series within 1, where the quotient loses digits
  static INLINE vec sinc(vec t, vec& slope) {
    vec s, c;
    sincos(t, s, c);
    const vec small = magnitude(t) < 1.0f ? t : vec{}, z = small * small;
    const vec over = 1.0f / (magnitude(t) < 1.0f ? splat(1.0f) : t), y = s * over;
    const vec high = 1.0f / 362880 - z * (1.0f / 39916800);
    const vec near = 1.0f + z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * high)));
    const vec top = -1.0f / 840 + z * (1.0f / 45360 - z * (1.0f / 3991680));
    const vec rise = small * (-1.0f / 3 + z * (1.0f / 30 + z * top));
    slope = magnitude(t) < 1.0f ? rise : (c - y) * over;
    return magnitude(t) < 1.0f ? near : y;
  }
  INLINE vec both(vec t, vec& slope) const {
    const vec held = clamp(t, -limit, limit);
    vec d;
    const vec y = sinc(held, d);
    if (!WINDOW) {
      slope = magnitude(t) <= limit ? d : vec{};
      return y;
    }
    const vec turns = magnitude(held) * inverse;  // half turns of the window's cosine
    const vec window = 0.54f + 0.46f * sine_half_turns(0.5f - turns);
    const vec fall = sine_half_turns(clamp_below(turns, 1.0f - turns)) * sign(held) *
                     (-0.46f * 3.14159265358979f * inverse);
    slope = magnitude(t) < limit ? d * window + y * fall : vec{};
    return magnitude(t) >= limit ? vec{} : y * window;  // keeps a NaN
  }
};
"""

SHANNON_TRITON = """
# sin(t) / t and its derivative: a series within 1, where the quotient loses digits
def sinc(t, FAST: tl.constexpr):
    s, c = sincos(t, FAST)
    inside = tl.abs(t) < 1.0
    small = tl.where(inside, t, 0.0)
    z = small * small
    over = 1.0 / tl.where(inside, 1.0, t)
    far = s * over
    high = 1.0 / 362880 - z * (1.0 / 39916800)
    near = 1.0 + z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * high)))
    top = -1.0 / 840 + z * (1.0 / 45360 - z * (1.0 / 3991680))
    rise = small * (-1.0 / 3 + z * (1.0 / 30 + z * top))
    return tl.where(inside, near, far), tl.where(inside, rise, (c - far) * over)


def psi(t, FAST: tl.constexpr):
    held = clamp(t, -LIMIT, LIMIT)
    value, slope = sinc(held, FAST)
    if WINDOW:
        outside = tl.abs(t) >= LIMIT
        turns = tl.abs(held) * (1.0 / LIMIT)  # half turns of the window's cosine
        window = 0.54 + 0.46 * sine_half_turns(0.5 - turns)
        fall = sine_half_turns(tl.minimum(turns, 1.0 - turns)) * sign(held)
        slope = slope * window - value * fall * (0.46 * 3.14159265358979 / LIMIT)
        value = tl.where(outside, 0.0, value * window)
    else:
        outside = tl.abs(t) > LIMIT
    return value, tl.where(outside, 0.0, slope)
"""


def _wavelet(
    factory: Callable[..., Basis],
    psi: Callable[[Tensor], Tensor],
    base: str,
    init: str,
    scales: bool,
    options: Mapping[str, Any],
    traits: Mapping[str, Any],
    cpp: Cpp,
    triton: Triton,
    window: Callable[[Tensor], Tensor] | None = None,
) -> Basis:
    """phi(x) = w psi((x - tau) / s): parameters `weight`, `shift`, `scale`, one each per function
    (K = 3).
    """
    family = factory.__name__
    schema.check_choice(family, "init", init, ["paper", "scaled"])

    def draw(generator: Generator, shape: tuple[int, ...]) -> Params:
        weight = normal(generator, shape)
        if init == "scaled":
            weight = weight / math.sqrt(shape[-1] if shape else 1)
        shift, scale = torch.zeros(shape, **DRAWN), torch.ones(shape, **DRAWN)
        return {"weight": weight, "shift": shift, "scale": scale}

    def core(params: Params, x: Tensor) -> Tensor:
        scale = params["scale"]
        # 1/s, kept finite where training carries s through 0; equal to 1/s within rounding for
        # abs(s) > 1e-6
        inverse = scale / (scale * scale + 1e-20)
        y = params["weight"] * psi((x - params["shift"]) * inverse)
        return y if window is None else y * window(params["weight"])

    def leaves(params: Params) -> Tensor:
        weight = params["weight"]
        if window is not None:
            weight = weight * window(weight)
        if scales:
            weight = weight * params["scale_basis"]
        return torch.stack([weight, params["shift"], params["scale"]], dim=-1)

    return assemble(
        family,
        3,
        draw,
        core,
        None,
        base,
        scales,
        {**options, "init": init},
        {"amplitude": "weight", **traits},
        (factory, {**options, "base": base, "init": init, "scales": scales}),
        names.builtin(factory, {**options, "base": base, "scales": scales}),
        cpp=cpp._replace(text=cpp.text + UNIT),
        triton=triton._replace(text=triton.text + UNIT_TRITON),
        leaves=leaves,
        learned=("weight", "shift", "scale"),
    )


def mexican_hat(
    reading: str = "usual", *, base: str = "zero", init: str = "scaled", scales: bool = False
) -> Basis:
    """Mexican hat (Table 6): w 2 / (pi^(1/4) sqrt 3) (1 - t^2) exp(-t^2 / 2), t = (x - tau) / s.

    The paper and its project page print opposite signs: `reading` "usual" has the sign above,
    "negated" the other. As w is drawn from a symmetric law and learned, the two are one model.
    """
    schema.check_choice("mexican_hat", "reading", reading, ["usual", "negated"])
    factor = 2 / (math.pi**0.25 * math.sqrt(3)) * (1 if reading == "usual" else -1)

    def psi(t: Tensor) -> Tensor:
        # (1 - t^2) overflows where the Gaussian is 0, and inf * 0 is NaN
        t = t.clamp(-1e4, 1e4)
        return factor * (1 - t * t) * torch.exp(-0.5 * t * t)

    traits = {"parity": "even", "zero_mean": True, "smooth": math.inf, "bounded": abs(factor)}
    traits |= {"points": (0.0, 1.0, -1.0), "operations": 6}
    cpp = Cpp(MEXICAN_HAT, {}, (factor,))
    triton = Triton(MEXICAN_HAT_TRITON, sizes={"FACTOR": factor})
    return _wavelet(mexican_hat, psi, base, init, scales, {"reading": reading}, traits, cpp, triton)


def morlet(
    omega: float = 5.0, *, base: str = "zero", init: str = "scaled", scales: bool = False
) -> Basis:
    """Morlet (Table 6): w cos(omega t) exp(-t^2 / 2), t = (x - tau) / s; its integral over t is
    sqrt(2 pi) w exp(-omega^2 / 2), not exactly 0.
    """
    if not schema.fits(omega, float) or not 0 < omega < math.inf:
        raise ValueError(f"`morlet` needs a finite `omega` > 0, got {omega!r}. The paper uses 5.")

    def psi(t: Tensor) -> Tensor:
        # cos of an infinite t is NaN, and the Gaussian is 0 long before 1e4
        t = t.clamp(-1e4, 1e4)
        return torch.cos(omega * t) * torch.exp(-0.5 * t * t)

    traits = {"parity": "even", "smooth": math.inf, "bounded": 1.0}
    traits |= {"points": (0.0, math.pi / 2 / omega, math.pi / omega), "operations": 6}
    cpp = Cpp(MORLET, {}, (float(omega),))
    triton = Triton(MORLET_TRITON, sizes={"OMEGA": float(omega)})
    return _wavelet(morlet, psi, base, init, scales, {"omega": omega}, traits, cpp, triton)


def dog(*, base: str = "zero", init: str = "scaled", scales: bool = False) -> Basis:
    """Derivative of Gaussian (Table 6): w t exp(-t^2 / 2), t = (x - tau) / s, that is -w d/dt
    exp(-t^2 / 2).
    """

    def psi(t: Tensor) -> Tensor:
        # inf * 0 is NaN
        t = t.clamp(-1e4, 1e4)
        return t * torch.exp(-0.5 * t * t)

    traits = {"parity": "odd", "zero_mean": True, "smooth": math.inf, "bounded": math.exp(-0.5)}
    traits |= {"points": (0.0, 1.0, -1.0), "operations": 5}
    return _wavelet(dog, psi, base, init, scales, {}, traits, Cpp(DOG), Triton(DOG_TRITON))


def meyer(
    reading: str = "printed", *, base: str = "zero", init: str = "scaled", scales: bool = False
) -> Basis:
    """Meyer (Table 6): w sin(pi abs(t)) m(.), t = (x - tau) / s, zero for abs(t) >= 1.

    m(a) is 1 up to 1/2, cos(pi/2 nu(2a - 1)) up to 1, 0 beyond, with nu(a) = a^4 (35 - 84 a + 70
    a^2 - 20 a^3) on [0, 1]. The paper prints m(nu(abs(t))), `reading` "printed"; the wavelet-KAN
    code in circulation has m(abs(t)), "direct".
    """
    schema.check_choice("meyer", "reading", reading, ["printed", "direct"])

    def nu(a: Tensor) -> Tensor:
        a = a.clamp(0, 1)
        return a**4 * (35 + a * (-84 + a * (70 - 20 * a)))

    def psi(t: Tensor) -> Tensor:
        # beyond 1 everything is 0: holding t there keeps sin of huge arguments out
        rest = 1 - t.abs().clamp(max=1)
        # nu(1 - a) = 1 - nu(a), so m(a) = sin(pi/2 nu(2 - 2a)) for every a >= 0, and 1 - a is known
        # without cancellation: the digits of m hold to its zero
        rest = nu(rest) if reading == "printed" else rest
        return torch.sin(math.pi * t.abs().clamp(max=1)) * torch.sin(math.pi / 2 * nu(2 * rest))

    traits = {"parity": "even", "smooth": 0, "bounded": 1.0, "compact_support": (-1.0, 1.0)}
    traits |= {"nonnegative": True, "points": (0.0, 0.5, -0.5, 1.0, -1.0), "operations": 14}
    sizes = {"PRINTED": int(reading == "printed")}
    cpp, triton = Cpp(MEYER, sizes), Triton(MEYER_TRITON, sizes=sizes)
    return _wavelet(meyer, psi, base, init, scales, {"reading": reading}, traits, cpp, triton)


def sinc(t: Tensor) -> Tensor:
    """`sin(t) / t`; `torch.sinc` has a derivative that is off by eps / t near 0, where its second
    one is NaN.
    """
    small = t.abs() < 1
    square = torch.where(small, t, 0.0) ** 2
    series = torch.zeros_like(t)
    for k in range(8, -1, -1):  # the next term is 1 / 19!, below float64's eps
        series = series * square + (-1) ** k / math.factorial(2 * k + 1)
    far = torch.where(small, 1.0, t)
    return torch.where(small, series, far.sin() / far)


HALF_WIDTH = 4 * math.pi  # of Shannon's window


def shannon(
    reading: str = "argument",
    half_width: float = HALF_WIDTH,
    *,
    base: str = "zero",
    init: str = "scaled",
    scales: bool = False,
) -> Basis:
    """Shannon (Table 6): w sinc(t / pi) times a symmetric Hamming window, t = (x - tau) / s, sinc(t
    / pi) = sin(t) / t.

    What the window runs over is not printed. `reading` "argument": over t, 0.54 + 0.46 cos(pi t /
    half_width), 0 beyond half_width, so that phi is a function of x alone. "index": over the last
    axis of `shape` (the keys), a fixed factor per unit, as `hamming_window(x.shape[-1])` in
    wavelet-KAN code in circulation.
    """
    schema.check_choice("shannon", "reading", reading, ["argument", "index"])
    if not schema.fits(half_width, float) or not 0 < half_width < math.inf:
        raise ValueError(
            f"`shannon` needs a finite `half_width` > 0, got {half_width!r}. Pass a multiple of pi."
        )
    if reading == "index" and half_width != HALF_WIDTH:
        raise ValueError(
            f'`shannon` needs reading="argument" for `half_width`, got {half_width!r} with '
            f"{reading!r}, whose window is as wide as the keys. Leave it out."
        )

    def psi(t: Tensor) -> Tensor:
        # beyond the window, or where sin(t) / t is below rounding, the argument is held
        limit = half_width if reading == "argument" else 1e6
        t = t.clamp(-limit, limit)
        y = sinc(t)
        if reading == "index":
            return y
        inside = t.abs() < limit
        return y * torch.where(inside, 0.54 + 0.46 * torch.cos(math.pi / limit * t), 0.0)

    def window(weight: Tensor) -> Tensor:
        if not weight.dim():
            return torch.ones_like(weight)
        keys = weight.shape[-1]
        return torch.hamming_window(keys, periodic=False, dtype=weight.dtype, device=weight.device)

    argument = reading == "argument"
    traits: dict[str, Any] = {"parity": "even", "bounded": 1.0, "operations": 7}
    traits |= {"points": (0.0, math.pi, -math.pi, half_width, -half_width)}
    if argument:
        # the window ends at 0.08: a jump, unless the sinc has a zero there
        traits |= {"smooth": 0 if abs(math.sin(half_width)) < 1e-9 else -1}
        traits |= {"compact_support": (-half_width, half_width)}
    else:
        traits |= {"smooth": math.inf}
    limit = half_width if argument else 1e6
    return _wavelet(
        shannon,
        psi,
        base,
        init,
        scales,
        {"reading": reading, "half_width": half_width},
        traits,
        Cpp(SHANNON, {"WINDOW": int(argument)}, (limit,)),
        Triton(SHANNON_TRITON, sizes={"WINDOW": int(argument), "LIMIT": float(limit)}),
        None if argument else window,
    )
