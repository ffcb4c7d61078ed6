"""Properties of particular families of bases, by the name in `basis.family`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kart import bases
from kart.testing import draw
from kart.testing.basis.subject import PAIR, Params, Subject, X, near, phi_slack, rows, setting
from kart.testing.basis.traits import integral
from kart.testing.compare import agree, slack, unit
from kart.testing.core import Property
from kart.testing.draw import Theta
from kart.testing.laws import slope

DOUBLE = torch.float64


def _follows(
    s: Subject, x: list[float], dtype: torch.dtype, formula: Callable[[Tensor], Tensor]
) -> None:
    """Asserts that the functions are those of a formula, written down plainly."""
    values = torch.tensor(x, dtype=dtype)
    wanted = formula(values.double())
    limit = s.slack(values) + slack(formula, values, s.reach)
    agree(s.functions(values), wanted, limit, "phi_k(x)", "the formula")


def _coefs(s: Subject, seed: int) -> Tensor:
    return torch.randn(s.basis.size, generator=draw.generator(seed), dtype=DOUBLE)


def _sum(s: Subject, coefs: Tensor, x: Tensor) -> Tensor:
    return (s.basis.expand(x) * coefs).sum(-1)


SEED_X: dict[str, Any] = {"seed": draw.seeds, "x": rows(near)}


# --- fourier: c = (a_1 .. a_G, b_1 .. b_G) --------------------------------------------------------


def _grid(s: Subject) -> int:
    return s.options["grid"]


def fourier_features(s: Subject, x: list[float], dtype: torch.dtype) -> None:
    """expand(x) = (cos x, .., cos G x, sin x, .., sin G x).

    A harmonic is missing, doubled, out of order or of the wrong sign (paper, eq. 2).
    """
    k = torch.arange(1, _grid(s) + 1, dtype=DOUBLE)

    def formula(x: Tensor) -> Tensor:
        return torch.cat([(x[..., None] * k).cos(), (x[..., None] * k).sin()], dim=-1)

    _follows(s, x, dtype, formula)


def parseval(s: Subject, seed: int) -> None:
    """1/pi times the integral of phi^2 over a period = sum_k a_k^2 + b_k^2.

    The features are not orthogonal, or not of one size: one is wrong or stands twice.
    """
    coefs = _coefs(s, seed)
    points = 4 * _grid(s) + 1  # the rule is exact for degree 2 G
    x = torch.arange(points, dtype=DOUBLE) * 2 * math.pi / points
    energy = _sum(s, coefs, x).square().sum() * 2 / points
    wanted = coefs.square().sum()
    limit = unit(DOUBLE) * _grid(s) * wanted
    agree(energy, wanted, limit, "the integral", "the sum of squares")


def shift_is_rotation(s: Subject, seed: int, x: list[float], by: float) -> None:
    """phi(x + t; a, b) = phi(x; a cos kt + b sin kt, b cos kt - a sin kt).

    Cosines and sines of one frequency are no pair.
    """
    a, b = _coefs(s, seed).split(_grid(s))
    angle = by * torch.arange(1, _grid(s) + 1, dtype=DOUBLE)
    turned = torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()])
    values = torch.tensor(x, dtype=DOUBLE)
    size = turned.abs().sum() * _grid(s) * (1 + values.abs() + abs(by))
    got, wanted = _sum(s, torch.cat([a, b]), values + by), _sum(s, turned, values)
    agree(got, wanted, unit(DOUBLE) * size, "phi(x + t; a, b)", "phi(x; turned a, b)")


def derivative_swaps_pairs(s: Subject, seed: int, x: list[float]) -> None:
    """phi'(x; a, b) = phi(x; k b_k, -k a_k).

    The derivative of a harmonic is not its partner times its frequency.
    """
    a, b = _coefs(s, seed).split(_grid(s))
    k = torch.arange(1, _grid(s) + 1, dtype=DOUBLE)
    values = torch.tensor(x, dtype=DOUBLE)
    swapped = torch.cat([k * b, -k * a])
    found = slope(lambda x: _sum(s, torch.cat([a, b]), x), values)
    limit = unit(DOUBLE) * swapped.abs().sum() * _grid(s) * (1 + values.abs())
    agree(found, _sum(s, swapped, values), limit, "phi'(x; a, b)", "phi(x; k b, -k a)")


def zero_padding(s: Subject, seed: int, x: list[float], more: int) -> None:
    """phi(x; a, b) = phi(x; a padded, b padded) in kart's basis of G + m harmonics.

    The first G harmonics of a larger grid are not those of a smaller one: grids do not nest.
    """
    a, b = _coefs(s, seed).split(_grid(s))
    larger = bases.fourier(_grid(s) + more)
    padded = torch.cat([a, a.new_zeros(more), b, b.new_zeros(more)])
    values = torch.tensor(x, dtype=DOUBLE)
    limit = unit(DOUBLE) * padded.abs().sum() * _grid(s) * (1 + values.abs())
    wanted = (larger.expand(values) * padded).sum(-1)  # pyright: ignore[reportOptionalOperand]
    agree(_sum(s, torch.cat([a, b]), values), wanted, limit, "phi", "padded phi")


# --- polynomials ----------------------------------------------------------------------------------


def multiplicative(s: Subject, x: list[float], y: float) -> None:
    """expand(x y)_k = expand(x)_k expand(y)_k, with expand(x)_1 = x.

    A feature is not the power of its index.
    """
    values, other = torch.tensor(x, dtype=DOUBLE), torch.tensor(y, dtype=DOUBLE)
    wanted = s.basis.expand(values) * s.basis.expand(other)
    limit = unit(DOUBLE) * (wanted.abs() + 1e-300)
    agree(s.basis.expand(values * other), wanted, limit, "expand(x y)", "expand(x) expand(y)")
    if s.basis.size > 1:
        agree(s.basis.expand(values)[:, 1], values, 0.0, "expand(x)_1", "x")


def _span(s: Subject) -> tuple[float, float]:
    return s.options["span"]


def chebyshev_cosine(s: Subject, angles: list[float]) -> None:
    """T_k(cos u) = cos k u on the span mapped to [-1, 1].

    A wrong recurrence, or a span that is mapped wrongly.
    """
    u = torch.tensor(angles, dtype=DOUBLE)
    k = torch.arange(s.basis.size, dtype=DOUBLE)
    low, high = _span(s)
    x = (low + high) / 2 + u.cos() * (high - low) / 2
    limit = unit(DOUBLE) * (1 + k * k) * s.reach
    wanted = (k * u[..., None]).cos()
    agree(s.basis.expand(x), wanted, limit.expand(wanted.shape), "T_k", "cos ku")


def held_outside(s: Subject, beyond: float) -> None:
    """phi(x) = phi(high) for x > high and phi(low) for x < low.

    Polynomials continued outside their span grow like (2x)^k: one outlying score dominates a row.
    """
    low, high = _span(s)
    ends = torch.tensor([low, high], dtype=DOUBLE)
    outside = torch.tensor([low - abs(beyond), high + abs(beyond)], dtype=DOUBLE)
    agree(s.basis.expand(outside), s.basis.expand(ends), s.slack(ends), "outside", "at the end")


# --- gaussian_rbf ---------------------------------------------------------------------------------


def gaussian_bumps(s: Subject, x: list[float], dtype: torch.dtype) -> None:
    """expand(x)_j = exp(-((x - t_j) / h)^2), t_j = low + j h, h = (high - low) / (G - 1).

    Centres or widths are off: grid and span do not mean what they say.
    """
    low, high = _span(s)
    h = (high - low) / (_grid(s) - 1)
    centres = low + h * torch.arange(_grid(s), dtype=DOUBLE)
    _follows(s, x, dtype, lambda x: torch.exp(-(((x[..., None] - centres) / h) ** 2)))


# --- bspline: knots t_i = low + (i - k) h, i = 0 .. G + 2 k ---------------------------------------


def _degree(s: Subject) -> int:
    return s.options["degree"]


def _knots(s: Subject) -> Tensor:
    low, high = _span(s)
    step = (high - low) / _grid(s)
    return low + step * torch.arange(-_degree(s), _grid(s) + _degree(s) + 1, dtype=DOUBLE)


def cox_de_boor(s: Subject, x: list[float], dtype: torch.dtype) -> None:
    """B_j,k = (x - t_j)/(k h) B_j,k-1 + (t_j+k+1 - x)/(k h) B_j+1,k-1 on knots low + (j - k) h.

    The splines are not those of the uniform knots: off by one, wrong order or wrong spacing.
    """
    knots, degree = _knots(s), _degree(s)
    h = knots[1] - knots[0]
    last = degree + _grid(s) - 1  # with degree 0 the right end belongs to the last interval

    def formula(x: Tensor) -> Tensor:
        x = x[..., None]
        inside = (knots[:-1] <= x) & (x < knots[1:])
        if degree == 0:
            at_end = (torch.arange(len(knots) - 1) == last) & (x == knots[last + 1])
            inside = inside | at_end
        b = inside.double()
        for k in range(1, degree + 1):
            left = (x - knots[: -k - 1]) / (k * h) * b[..., :-1]
            right = (knots[k + 1 :] - x) / (k * h) * b[..., 1:]
            b = left + right
        return b

    _follows(s, x, dtype, formula)


def greville(s: Subject, x: list[float], dtype: torch.dtype) -> None:
    """sum_j xi_j B_j(x) = x inside the grid, xi_j = (t_j+1 + .. + t_j+k) / k.

    The splines cannot represent the line: their knots are not where the coefficients think.
    """
    knots, degree = _knots(s), _degree(s)
    low, high = _span(s)
    means = torch.stack([knots[j + 1 : j + degree + 1].mean() for j in range(s.basis.size)])
    inside = torch.tensor(x, dtype=torch.float64).clamp(low, high).to(dtype)
    got = (s.basis.expand(inside).double() * means).sum(-1)
    reached = inside.double().clamp(low, high)
    limit = unit(dtype) * (s.reach + means.abs().max())
    agree(got, reached, limit, "sum_j xi_j B_j(x)", "x")


def local_support(s: Subject, x: list[float]) -> None:
    """B_j(x) = 0 outside [t_j, t_j+k+1]: at most k + 1 splines (k + 2 at a knot) are not 0.

    A spline reaches too far: coefficients far away change the function here.
    """
    knots, degree = _knots(s), _degree(s)
    values = torch.tensor(x, dtype=DOUBLE)
    y = s.basis.expand(values)
    margin = 1e-9 * s.reach
    start, end = knots[: s.basis.size], knots[degree + 1 : degree + 1 + s.basis.size]
    outside = (values[:, None] < start - margin) | (values[:, None] > end + margin)
    agree(torch.where(outside, y, 0), torch.zeros_like(y), 0.0, "B_j(x)", "its value outside")


def knot_insertion(s: Subject, seed: int, x: list[float]) -> None:
    """sum_j c_j B_j = sum_i d_i B'_i, d_i = 2^-k sum_j C(k+1, i + k - 2j) c_j, on half the spacing.

    A refined grid (inside the span, by kart's `bspline`) does not continue the function it had.
    """
    grid, degree, size = _grid(s), _degree(s), s.basis.size
    low, high = _span(s)
    finer = bases.bspline(2 * grid, degree, (low, high))
    coefs = _coefs(s, seed)
    # B_j starts at knot j - k of the coarse grid, the fine spline i at knot i - k of the fine one
    mixing = torch.zeros(finer.size, size, dtype=DOUBLE)
    for i in range(finer.size):
        for j in range(size):
            m = (i - degree) - 2 * (j - degree)
            if 0 <= m <= degree + 1:
                mixing[i, j] = math.comb(degree + 1, m) / 2**degree
    values = torch.tensor(x, dtype=DOUBLE).clamp(low, high)
    wanted = (finer.expand(values) * (mixing @ coefs)).sum(-1)  # pyright: ignore[reportOptionalOperand]
    limit = unit(DOUBLE) * s.reach * _grid(s) * coefs.abs().sum()
    got = _sum(s, coefs, values)
    if degree == 0:  # they jump at knots, within rounding of which they are not compared
        place = (values - low) / ((high - low) / grid / 2)
        got = torch.where((place - place.round()).abs() > 1e-9, got, wanted)
    agree(got, wanted, limit, "the coarse spline", "the refined one")


# --- rational -------------------------------------------------------------------------------------


def rational_formula(s: Subject, theta: Theta, x: list[float], dtype: torch.dtype) -> None:
    """phi(x) = (a_0 + .. + a_m x^m) / (1 + abs(b_1 x + .. + b_n x^n)), plus the base.

    A coefficient is paired with the wrong power, or the denominator is not the safe one (Table 6).
    """
    params, values = setting(s, theta, x, dtype)
    wide = values.double()

    def power_sum(coefs: Tensor, first: int) -> Tensor:
        powers = torch.arange(first, first + coefs.shape[-1], dtype=DOUBLE)
        return (coefs.double() * wide[:, None] ** powers).sum(-1)

    wanted = power_sum(params["numerator"], 0) / (1 + power_sum(params["denominator"], 1).abs())
    wanted = _with_base(s, params, wanted, wide)
    limit = 2 * phi_slack(s, params, values)
    agree(s.basis.apply(params, values), wanted, limit, "phi(x)", "the formula")


def _with_base(s: Subject, params: Params, y: Tensor, x: Tensor) -> Tensor:
    base = bases.BASES[s.options.get("base", "zero")]
    y = y * params["scale_basis"].double() if "scale_basis" in params else y
    if base is None:
        return y
    return y + base(x) * (params["scale_base"].double() if "scale_base" in params else 1.0)


def no_poles(s: Subject, seed: int, root: float, x: list[float]) -> None:
    """abs(phi(x)) <= sum_k abs(a_k) abs(x)^k, whatever the roots of b_1 x + .. + b_n x^n + 1.

    The denominator passes through zero: with trained coefficients the function has a pole.
    """
    values = torch.tensor([*x, root], dtype=DOUBLE)
    params = s.params(Theta(seed, 0.0), (len(values),), DOUBLE)
    # 1 + b_1 x is zero at the root
    b = torch.zeros_like(params["denominator"])
    b[..., 0] = -1 / (root if abs(root) > 1e-3 else 1.0)
    zero = {**params, "denominator": b, "numerator": torch.zeros_like(params["numerator"])}
    y = s.basis.apply({**params, "denominator": b}, values) - s.basis.apply(zero, values)
    a = params["numerator"].abs()
    bound = (a * values.abs()[:, None] ** torch.arange(a.shape[-1], dtype=DOUBLE)).sum(-1)
    bound = bound * params["scale_basis"].abs() if "scale_basis" in params else bound
    limit = unit(DOUBLE) * (bound + 1)
    agree(y, torch.minimum(torch.maximum(y, -bound), bound), limit, "phi(x)", "its bound")


def mirrored(s: Subject, theta: Theta, x: list[float], dtype: torch.dtype) -> None:
    """phi(-x; a, b) = phi(x; (-1)^k a_k, (-1)^j b_j), for the part without base.

    Even and odd coefficients are not those of even and odd powers.
    """
    params, values = setting(s, theta, x, dtype)

    def alternate(c: Tensor, first: int) -> Tensor:
        signs = (-1.0) ** torch.arange(first, first + c.shape[-1])
        return c * signs.to(c.dtype)

    def part(p: Params, x: Tensor) -> Tensor:
        zero = {**p, "numerator": torch.zeros_like(p["numerator"])}
        return s.basis.apply(p, x) - s.basis.apply(zero, x)

    turned = {
        **params,
        "numerator": alternate(params["numerator"], 0),
        "denominator": alternate(params["denominator"], 1),
    }
    limit = phi_slack(s, params, -values) + phi_slack(s, turned, values)
    agree(part(params, -values), part(turned, values), 2 * limit, "phi(-x; a, b)", "mirrored phi")


# --- wavelets: phi(x; w, tau, s) = w psi((x - tau) / s) -------------------------------------------


def _wavelet(s: Subject, x: Tensor, shift: Any = 0.0, scale: Any = 1.0) -> Tensor:
    """One wavelet of weight 1 without base activation."""
    params = s.params(Theta(0, 0.0), (), x.dtype)

    def at(weight: float) -> Tensor:
        given = {"weight": weight, "shift": shift, "scale": scale}
        leaves = {k: torch.as_tensor(v, dtype=x.dtype) for k, v in given.items()}
        return s.basis.apply({**params, **leaves}, x)

    return at(1.0) - at(0.0)


def covariant(s: Subject, x: list[float], by: float, factor: float) -> None:
    """phi(x; w, tau, s) = phi(f x + c; w, f tau + c, f s) for any c and f > 0.

    Shift and scale do not move and stretch the wavelet: x - tau is not divided by s, or twice.
    """
    values = torch.tensor(x, dtype=DOUBLE)
    shift, scale = 0.7, 1.3

    def plain(x: Tensor) -> Tensor:
        return _wavelet(s, x, shift, scale)

    moved = _wavelet(s, factor * values + by, factor * shift + by, factor * scale)
    reach = s.reach + abs(by / factor) + 1
    limit = slack(plain, values, 4 * reach) + unit(DOUBLE)
    agree(moved, plain(values), limit, "the moved phi", "phi")


def _formula(psi: Callable[[Subject, Tensor], Tensor], source: str) -> Property:
    def definition(s: Subject, x: list[float], dtype: torch.dtype) -> None:
        _follows(s, x, dtype, lambda x: psi(s, x)[..., None])

    definition.__doc__ = (
        f"psi(t) = {source}.\n\nThe wavelet is not the one of the paper's Table 6: a sign, a width "
        "or a constant is off, so results do not compare."
    )
    return Property(definition, X)


def _mexican_hat(s: Subject, t: Tensor) -> Tensor:
    factor = 2 / (math.pi**0.25 * math.sqrt(3))
    factor = -factor if s.options.get("reading") == "negated" else factor
    return factor * (1 - t**2) * torch.exp(-(t**2) / 2)


def _morlet(s: Subject, t: Tensor) -> Tensor:
    return torch.cos(s.options["omega"] * t) * torch.exp(-(t**2) / 2)


def _meyer(s: Subject, t: Tensor) -> Tensor:
    def nu(a: Tensor) -> Tensor:
        y = a**4 * (35 - 84 * a + 70 * a**2 - 20 * a**3)
        return torch.where(a <= 0, torch.zeros_like(a), torch.where(a >= 1, torch.ones_like(a), y))

    def m(a: Tensor) -> Tensor:
        falling = torch.cos(math.pi / 2 * nu(2 * a - 1))
        rest = torch.where(a < 1, falling, torch.zeros_like(a))
        return torch.where(a <= 0.5, torch.ones_like(a), rest)

    a = t.abs()
    return torch.sin(math.pi * a) * m(nu(a) if s.options.get("reading") == "printed" else a)


def _shannon(s: Subject, t: Tensor) -> Tensor:
    y = torch.sinc(t / math.pi)
    if s.options.get("reading") == "index":
        return y
    width = s.options["half_width"]
    window = 0.54 + 0.46 * torch.cos(math.pi * t / width)
    return torch.where(t.abs() < width, y * window, torch.zeros_like(y))


def moments(orders: dict[int, float], formula: str) -> Property:
    """Integrals of t^n psi(t) that are known in closed form."""

    def moments(s: Subject) -> None:
        for n, wanted in orders.items():
            found, error = integral(lambda x, n=n: x[:, None] ** n * s.functions(x), s)
            expected = torch.full_like(found, wanted)
            agree(found, expected, error + 1e-12, f"the integral of t^{n} psi", "its value")

    moments.__doc__ = (
        f"{formula}.\n\nThe wavelet has another mean, slope or area than its formula gives."
    )
    return Property(moments)


def energy(s: Subject) -> None:
    """The integral of psi^2 is 1.

    The constant in front is not the one that normalises the wavelet.
    """
    found, error = integral(lambda x: s.functions(x).square(), s)
    agree(found, torch.ones_like(found), error + 1e-12, "the integral of psi^2", "its value")


SHIFT = st.floats(-4, 4, width=32)
COVARIANT = Property(
    covariant, {"x": rows(near), "by": SHIFT, "factor": st.sampled_from([1.0, 2.0, 0.5, 3.0])}
)
ROOT2PI = math.sqrt(2 * math.pi)


def _degree_zero(s: Subject) -> str | None:
    return None if _degree(s) >= 1 else "splines of degree 0 are steps, which have no slope"


OF: dict[str, tuple[Property, ...]] = {
    "fourier": (
        Property(fourier_features, X),
        Property(parseval, {"seed": draw.seeds}),
        Property(shift_is_rotation, {**SEED_X, "by": SHIFT}),
        Property(derivative_swaps_pairs, SEED_X),
        Property(zero_padding, {**SEED_X, "more": st.integers(1, 3)}),
    ),
    "polynomial": (Property(multiplicative, {"x": rows(near), "y": near}),),
    "chebyshev": (
        Property(chebyshev_cosine, {"angles": rows(near)}),
        Property(held_outside, {"beyond": near}),
    ),
    "gaussian_rbf": (Property(gaussian_bumps, X),),
    "bspline": (
        Property(cox_de_boor, X),
        Property(greville, X, unfit=_degree_zero),
        Property(local_support, {"x": rows(near)}),
        Property(knot_insertion, SEED_X),
    ),
    "rational": (
        Property(rational_formula, PAIR),
        Property(no_poles, {**SEED_X, "root": near}),
        Property(mirrored, PAIR),
    ),
    "mexican_hat": (
        _formula(_mexican_hat, "2 / (pi^(1/4) sqrt 3) (1 - t^2) exp(-t^2 / 2)"),
        COVARIANT,
        moments({0: 0.0, 1: 0.0}, "The integrals of psi and t psi are 0"),
        Property(energy),
    ),
    "morlet": (_formula(_morlet, "cos(omega t) exp(-t^2 / 2)"), COVARIANT),
    "dog": (
        _formula(lambda s, t: t * torch.exp(-(t**2) / 2), "t exp(-t^2 / 2)"),
        COVARIANT,
        moments({0: 0.0, 1: ROOT2PI}, "The integral of psi is 0, that of t psi is sqrt(2 pi)"),
    ),
    "meyer": (
        _formula(_meyer, "sin(pi abs(t)) m(nu(abs(t))), or m(abs(t)) read directly"),
        COVARIANT,
    ),
    "shannon": (
        _formula(_shannon, "sin(t) / t times the Hamming window, where it is one of t"),
        COVARIANT,
    ),
}
