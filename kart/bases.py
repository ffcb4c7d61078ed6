"""Families of learnable functions of one real variable, the units `phi_pq` of KArAt (paper, eq. 1,
2, 5 and Table 6).

A family is a factory that returns a `Basis`, a tuple of pure functions. `basis.init(generator,
shape)` draws the parameters of `prod(shape)` functions and `basis.apply(params, x)` evaluates them.
Families that are linear in their coefficients also have `expand`, their features: the streamed
attention of `kart.kernels` needs no more than those.

| family | unit phi(x), for base "zero" | source |
|---|---|---|
| `fourier` | sum_k a_k cos(kx) + b_k sin(kx), k = 1..G | eq. 2 |
| `polynomial` | sum_k c_k x^k, k = 0..degree (0 and 1 are controls) | - |
| `bspline` | sum_j c_j B_j(x), G + degree splines on a uniform grid | sec. 3, KAN |
| `chebyshev` | sum_k c_k T_k(x / span) | - |
| `gaussian_rbf` | sum_j c_j exp(-((x - t_j) / h)^2) | - |
| `rational` | (a_0 + .. + a_m x^m) / (1 + abs(b_1 x + .. + b_n x^n)) | Table 6 |
| `mexican_hat`, `morlet`, `dog`, `meyer`, `shannon` | w psi((x - tau) / s) | Table 6 |
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

Params = dict[str, Any]


class Basis(NamedTuple):
    """A family of univariate functions phi(x; theta), as pure functions of its parameters.

    `init(generator, shape)` draws float32 parameters of `prod(shape)` functions, with `shape` as
    their leading axes. `apply(params, x)` evaluates each function at its element of `x`, which
    broadcasts against `shape`; it keeps x's dtype. `expand(x)` maps `(...)` to the features `(...,
    K)` in which `apply` is linear with `params["coefs"]`, `K = size`; it returns None for a family
    that has none. `features(x)`, `(..., K')`, and `coefficients(params)`, `(..., K')`, are the same
    with the base activation (one more feature) and the per-unit scales absorbed, so that
    `apply(params, x) == (features(x) * coefficients(params)).sum(-1)`; both are None where `expand`
    returns None. `options` are the hyperparameters and `traits` the properties that `kart.testing`
    holds the family to.
    """

    family: str
    size: int
    init: Callable[[Generator, Sequence[int]], Params]
    apply: Callable[[Params, Tensor], Tensor]
    expand: Callable[[Tensor], Tensor | None]
    features: Callable[[Tensor], Tensor] | None
    coefficients: Callable[[Params], Tensor] | None
    options: Mapping[str, Any]
    traits: Mapping[str, Any]


BASES = {"zero": None, "identity": lambda x: x, "silu": F.silu, "gelu": F.gelu}


def _wide(x: Tensor) -> Tensor:
    # 8 bits of mantissa are too few for harmonics and powers: half types are evaluated in float32
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _check_input(name: str, x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(
            f"`{name}` needs floating-point `x`, got {x.dtype}. Convert it with `x.float()`."
        )


def _check_choice(function: str, argument: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(
            f"`{function}` needs `{argument}` in {sorted(allowed)}, got {value!r}. "
            "Choose one of them."
        )


def _check_integer(function: str, argument: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{function}` needs an integer `{argument}` >= {least}, got {value!r}. "
            "Pass a larger one."
        )


def _check_span(function: str, span: Sequence[float]) -> tuple[float, float]:
    if len(span) != 2 or not -math.inf < span[0] < span[1] < math.inf:
        raise ValueError(
            f"`{function}` needs `span` = (low, high) with finite low < high, got {span!r}. "
            "Pass for example (-4.0, 4.0)."
        )
    return float(span[0]), float(span[1])


def normal(generator: Generator, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 `shape`, drawn on the CPU, so that a seed means the same numbers on
    every device.
    """
    if not isinstance(generator, Generator) or generator.device.type != "cpu":
        raise ValueError(
            f"`init` needs a `torch.Generator` on the CPU first, got {generator!r}. "
            "Draw with torch.Generator().manual_seed(seed), then move with tree.to(params, device)."
        )
    return torch.randn(tuple(shape), generator=generator)


def _assemble(
    family: str,
    size: int,
    draw: Callable[[Generator, tuple[int, ...]], Params],
    core: Callable[[Params, Tensor], Tensor] | None,
    expand: Callable[[Tensor], Tensor] | None,
    base: str,
    scales: bool,
    options: Mapping[str, Any],
    traits: Mapping[str, Any],
) -> Basis:
    """Adds what all families share: base activation (eq. 5), KAN's per-unit scales, dtype rules,
    checks.
    """
    _check_choice(family, "base", base, list(BASES))
    activation = BASES[base]

    def init(generator: Generator, shape: Sequence[int]) -> Params:
        shape = tuple(shape)
        params = draw(generator, shape)
        if scales:
            params["scale_base"] = torch.ones(shape)
            params["scale_basis"] = torch.ones(shape)
        return params

    def features(x: Tensor) -> Tensor:
        _check_input(f"{family}.features", x)
        assert expand is not None  # for the type checker: only linear families reach this
        wide = _wide(x)
        values = expand(wide)
        if activation is not None:
            values = torch.cat([values, activation(wide)[..., None]], dim=-1)
        return values.to(x.dtype)

    def coefficients(params: Params) -> Tensor:
        coefs = params["coefs"]
        if coefs.shape[-1] != size:
            raise ValueError(
                f"`{family}` needs `coefs` with a last axis of K = {size}, got shape "
                f"{tuple(coefs.shape)}. Call `init` of this basis for its parameters."
            )
        if scales:
            coefs = coefs * params["scale_basis"][..., None]
        if activation is None:
            return coefs
        last = params["scale_base"][..., None] if scales else torch.ones_like(coefs[..., :1])
        return torch.cat([coefs, last], dim=-1)

    def apply(params: Params, x: Tensor) -> Tensor:
        _check_input(f"{family}.apply", x)
        wide = _wide(x)
        if expand is not None:
            coefs = coefficients(params)
            values = features(wide)
            # one feature at a time: the (..., K) product of a broadcast x and coefs is never built
            y = values[..., 0] * coefs[..., 0]
            for k in range(1, coefs.shape[-1]):
                y = y + values[..., k] * coefs[..., k]
            return y.to(x.dtype)
        assert core is not None
        y = core(params, wide)
        if scales:
            y = y * params["scale_basis"]
        if activation is not None:
            y = y + (activation(wide) * params["scale_base"] if scales else activation(wide))
        return y.to(x.dtype)

    def expanded(x: Tensor) -> Tensor | None:
        _check_input(f"{family}.expand", x)
        return None if expand is None else expand(_wide(x)).to(x.dtype)

    return Basis(
        family=family,
        size=size,
        init=init,
        apply=apply,
        expand=expanded,
        features=None if expand is None else features,
        coefficients=None if expand is None else coefficients,
        options={**options, "base": base, "scales": scales},
        traits={"linear": expand is not None, **traits},
    )


def linear(
    expand: Callable[[Tensor], Tensor],
    size: int,
    *,
    family: str = "linear",
    init: str = "scaled",
    orders: Sequence[int] | None = None,
    grid: int | None = None,
    base: str = "zero",
    scales: bool = False,
    options: Mapping[str, Any] | None = None,
    traits: Mapping[str, Any] | None = None,
) -> Basis:
    """A basis of one's own from its features: phi(x) = sum_k coefs[k] expand(x)[k].

    Args:
        expand: elementwise features, `(...)` to `(..., K)`, in the dtype of `x`; torch operations
        only.
        size: K.
        init: standard deviation of the coefficients, for `keys` = last axis of `shape`: "paper" 1;
            "scaled" 1/sqrt(keys * grid); "smooth" falling as 1/order and of the variance of
            "scaled" in sum (needs `orders`).
        orders: K positive integers, the frequency or degree of each feature, for "smooth".
        grid: the grid size of "scaled"; K where it is not given.
        base: b(x) of eq. 5, "zero", "identity", "silu" or "gelu", added to every function.
        scales: adds KAN's learnable `scale_base` and `scale_basis`, one each per function: phi =
            scale_base b + scale_basis sum. With them a unit has 2 more parameters, the count of the
            paper's tables ((2G + 3) with W's one).
        options, traits: recorded in the result as they are.

    >>> waves = linear(lambda x: torch.stack([x.sin(), (2 * x).sin()], dim=-1), 2, family="sines")
    >>> params = waves.init(torch.Generator().manual_seed(0), (3, 5))
    >>> waves.apply(params, torch.zeros(4, 1, 5)).shape
    torch.Size([4, 3, 5])
    """
    _check_integer(family, "size", size, 1)
    _check_choice(family, "init", init, ["paper", "scaled"] + ["smooth"] * (orders is not None))
    if orders is not None and (len(orders) != size or min(orders) < 1):
        raise ValueError(
            f"`{family}` needs `orders` of {size} positive integers, got {orders!r}. "
            "Give one a feature."
        )
    grid = size if grid is None else grid
    smooth = None
    if init == "smooth" and orders is not None:
        falling = torch.tensor([1.0 / k for k in orders])
        # phi has at a typical x the variance that "scaled" gives it, size / grid / keys
        smooth = falling * math.sqrt(size / grid) / falling.square().sum().sqrt()

    def draw(generator: Generator, shape: tuple[int, ...]) -> Params:
        coefs = normal(generator, (*shape, size))
        keys = shape[-1] if shape else 1
        if smooth is not None:
            coefs = coefs * smooth / math.sqrt(keys)
        elif init == "scaled":
            coefs = coefs / math.sqrt(keys * grid)
        return {"coefs": coefs}

    def checked(x: Tensor) -> Tensor:
        values = expand(x)
        if values.shape != (*x.shape, size):
            raise ValueError(
                f"`{family}` needs `expand` to map {tuple(x.shape)} to {(*x.shape, size)}, got "
                f"{tuple(values.shape)}. Stack the K = {size} features along a new last axis."
            )
        return values

    options = {"init": init, **(options or {})}
    return _assemble(family, size, draw, None, checked, base, scales, options, traits or {})


def harmonics(x: Tensor, grid: int) -> tuple[list[Tensor], list[Tensor]]:
    """`cos(kx)` and `sin(kx)` for k = 1..grid, two lists of tensors like `x`, from one of each.

    Harmonic k is the angle sum of harmonics k//2 and k - k//2, brought back to the unit circle by
    one Newton step: without it every doubling doubles the error of the radius. What is left is a
    few eps times (abs(value) + condition), the condition k x d/dx of the harmonic; the three-term
    recurrence would lose k^2 eps.
    """
    cosines, sines = [x.cos()], [x.sin()]
    for k in range(2, grid + 1):
        i, j = k // 2 - 1, k - k // 2 - 1
        c = cosines[i] * cosines[j] - sines[i] * sines[j]
        s = sines[i] * cosines[j] + cosines[i] * sines[j]
        radius = 1.5 - 0.5 * (c * c + s * s)
        cosines.append(c * radius)
        sines.append(s * radius)
    return cosines, sines


def fourier(
    grid: int = 3, *, base: str = "zero", init: str = "scaled", scales: bool = False
) -> Basis:
    """Fourier-KArAt (eq. 2): phi(x) = sum_{k=1..G} a_k cos(kx) + b_k sin(kx), period 2 pi, no
    constant; K = 2G.

    `coefs[..., :G]` are a_1..a_G and `coefs[..., G:]` are b_1..b_G. Inits: "paper" N(0, 1) as
    printed (the output of a head then grows like the number of keys), "scaled" N(0, 1 / (keys G))
    (default), "smooth" amplitudes falling as 1/k.

    >>> fourier(2).expand(torch.tensor(0.0))
    tensor([1., 1., 0., 0.])
    """
    _check_integer("fourier", "grid", grid, 1)

    def expand(x: Tensor) -> Tensor:
        cosines, sines = harmonics(x, grid)
        return torch.stack(cosines + sines, dim=-1)

    orders = [*range(1, grid + 1)] * 2
    return linear(
        expand,
        2 * grid,
        family="fourier",
        init=init,
        orders=orders,
        grid=grid,
        base=base,
        scales=scales,
        options={"grid": grid},
        traits={"periodic": 2 * math.pi, "zero_mean": True, "bounded": 1.0, "smooth": math.inf}
        | {"points": (0.0, math.pi / 2, math.pi, -math.pi, 2 * math.pi)},
    )


def polynomial(
    degree: int = 3, *, base: str = "zero", init: str = "scaled", scales: bool = False
) -> Basis:
    """Monomials 1, x, .., x^degree; K = degree + 1.

    Degree 0 and 1 are the controls: learned mixing that ignores the scores, and mixing affine in
    them.

    >>> polynomial(2).expand(torch.tensor(3.0))
    tensor([1., 3., 9.])
    """
    _check_integer("polynomial", "degree", degree, 0)

    def expand(x: Tensor) -> Tensor:
        powers = [torch.ones_like(x)]
        for _ in range(degree):
            powers.append(powers[-1] * x)
        return torch.stack(powers, dim=-1)

    return linear(
        expand,
        degree + 1,
        family="polynomial",
        init=init,
        orders=range(1, degree + 2),
        base=base,
        scales=scales,
        options={"degree": degree},
        traits={"smooth": math.inf, "points": (0.0, 1.0, -1.0)},
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
    _check_integer("chebyshev", "degree", degree, 0)
    low, high = _check_span("chebyshev", span)

    def expand(x: Tensor) -> Tensor:
        t = ((x - (low + high) / 2) / ((high - low) / 2)).clamp(-1, 1)
        values = [torch.ones_like(t), t]
        for _ in range(2, degree + 1):
            values.append(2 * t * values[-1] - values[-2])
        return torch.stack(values[: degree + 1], dim=-1)

    return linear(
        expand,
        degree + 1,
        family="chebyshev",
        init=init,
        orders=range(1, degree + 2),
        base=base,
        scales=scales,
        options={"degree": degree, "span": (low, high)},
        traits={"bounded": 1.0, "smooth": 0, "points": (low, (low + high) / 2, high)},
    )


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
    _check_integer("gaussian_rbf", "grid", grid, 2)
    low, high = _check_span("gaussian_rbf", span)
    width = (high - low) / (grid - 1)

    def expand(x: Tensor) -> Tensor:
        centres = torch.arange(grid, dtype=x.dtype, device=x.device) * width + low
        return torch.exp(-(((x[..., None] - centres) / width) ** 2))

    return linear(
        expand,
        grid,
        family="gaussian_rbf",
        init=init,
        base=base,
        scales=scales,
        options={"grid": grid, "span": (low, high)},
        traits={"bounded": 1.0, "nonnegative": True, "smooth": math.inf}
        | {"points": tuple(low + j * width for j in range(grid))},
    )


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
    _check_integer("bspline", "grid", grid, 1)
    _check_integer("bspline", "degree", degree, 0)
    low, high = _check_span("bspline", span)
    size = grid + degree

    def expand(x: Tensor) -> Tensor:
        place = (x - low) * (grid / (high - low))
        cell = place.detach().floor().clamp(-degree - 1, size + 1)
        if degree == 0:
            cell = torch.where(place.detach() == grid, cell.new_tensor(grid - 1.0), cell)
        u = place - cell  # in [0, 1) within the grid
        # values[i] is the spline that started degree - i intervals before this one
        values = [torch.ones_like(x)]
        for k in range(1, degree + 1):
            row = [(1 - u) * values[0] / k]
            for i in range(1, k):
                row.append(((u + (k - i)) * values[i - 1] + (i + 1 - u) * values[i]) / k)
            values = [*row, u * values[-1] / k]
        # splines that end before or start behind the grid have places of their own beside it
        first = cell.nan_to_num(0).long() + degree + 1
        places = first[..., None] + torch.arange(degree + 1, device=x.device)
        room = x.new_zeros(*x.shape, size + 2 * (degree + 1) + 1)
        y = room.scatter(-1, places, torch.stack(values, -1))[..., degree + 1 : degree + 1 + size]
        # far outside u is huge, where no spline is; NaN scores stay NaN and do not become zeros
        return torch.where(torch.isnan(x)[..., None], x[..., None], y)

    step = (high - low) / grid
    return linear(
        expand,
        size,
        family="bspline",
        init=init,
        base=base,
        scales=scales,
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
    )


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
    _check_integer("rational", "numerator", numerator, 0)
    _check_integer("rational", "denominator", denominator, 1)
    _check_choice("rational", "init", init, ["paper", "scaled"])

    def draw(generator: Generator, shape: tuple[int, ...]) -> Params:
        a = normal(generator, (*shape, numerator + 1))
        b = normal(generator, (*shape, denominator))
        if init == "scaled":
            a = a / math.sqrt(shape[-1] if shape else 1)
        return {"numerator": a, "denominator": b}

    def core(params: Params, x: Tensor) -> Tensor:
        below = 1 + (_horner(params["denominator"], x) * x).abs()
        return _horner(params["numerator"], x) / below

    return _assemble(
        "rational",
        numerator + 1 + denominator,
        draw,
        core,
        None,
        base,
        scales,
        {"numerator": numerator, "denominator": denominator, "init": init},
        {"smooth": 0, "amplitude": "numerator", "points": (0.0, 1.0, -1.0)},
    )


def _wavelet(
    family: str,
    psi: Callable[[Tensor], Tensor],
    base: str,
    init: str,
    scales: bool,
    options: Mapping[str, Any],
    traits: Mapping[str, Any],
    window: Callable[[Tensor], Tensor] | None = None,
) -> Basis:
    """phi(x) = w psi((x - tau) / s): parameters `weight`, `shift`, `scale`, one each per function
    (K = 3).
    """
    _check_choice(family, "init", init, ["paper", "scaled"])

    def draw(generator: Generator, shape: tuple[int, ...]) -> Params:
        weight = normal(generator, shape)
        if init == "scaled":
            weight = weight / math.sqrt(shape[-1] if shape else 1)
        return {"weight": weight, "shift": torch.zeros(shape), "scale": torch.ones(shape)}

    def core(params: Params, x: Tensor) -> Tensor:
        scale = params["scale"]
        # 1/s, kept finite where training carries s through 0; equal to 1/s within rounding for
        # abs(s) > 1e-6
        inverse = scale / (scale * scale + 1e-20)
        y = params["weight"] * psi((x - params["shift"]) * inverse)
        return y if window is None else y * window(params["weight"])

    options = {**options, "init": init}
    traits = {"amplitude": "weight", **traits}
    return _assemble(family, 3, draw, core, None, base, scales, options, traits)


def mexican_hat(
    reading: str = "usual", *, base: str = "zero", init: str = "scaled", scales: bool = False
) -> Basis:
    """Mexican hat (Table 6): w 2 / (pi^(1/4) sqrt 3) (1 - t^2) exp(-t^2 / 2), t = (x - tau) / s.

    The paper and its project page print opposite signs: `reading` "usual" has the sign above,
    "negated" the other. As w is drawn from a symmetric law and learned, the two are one model.
    """
    _check_choice("mexican_hat", "reading", reading, ["usual", "negated"])
    factor = 2 / (math.pi**0.25 * math.sqrt(3)) * (1 if reading == "usual" else -1)

    def psi(t: Tensor) -> Tensor:
        # (1 - t^2) overflows where the Gaussian is 0, and inf * 0 is NaN
        t = t.clamp(-1e4, 1e4)
        return factor * (1 - t * t) * torch.exp(-0.5 * t * t)

    traits = {"parity": "even", "zero_mean": True, "smooth": math.inf, "bounded": abs(factor)}
    traits |= {"points": (0.0, 1.0, -1.0)}
    return _wavelet("mexican_hat", psi, base, init, scales, {"reading": reading}, traits)


def morlet(
    omega: float = 5.0, *, base: str = "zero", init: str = "scaled", scales: bool = False
) -> Basis:
    """Morlet (Table 6): w cos(omega t) exp(-t^2 / 2), t = (x - tau) / s; its mean is exp(-omega^2 /
    2), not exactly 0.
    """
    if not 0 < omega < math.inf:
        raise ValueError(f"`morlet` needs a finite `omega` > 0, got {omega!r}. The paper uses 5.")

    def psi(t: Tensor) -> Tensor:
        # cos of an infinite t is NaN, and the Gaussian is 0 long before 1e4
        return torch.cos(omega * t.clamp(-1e4, 1e4)) * torch.exp(-0.5 * t * t)

    traits = {"parity": "even", "smooth": math.inf, "bounded": 1.0}
    traits |= {"points": (0.0, math.pi / 2 / omega, math.pi / omega)}
    return _wavelet("morlet", psi, base, init, scales, {"omega": omega}, traits)


def dog(*, base: str = "zero", init: str = "scaled", scales: bool = False) -> Basis:
    """Derivative of Gaussian (Table 6): w t exp(-t^2 / 2), t = (x - tau) / s, that is -w d/dt
    exp(-t^2 / 2).
    """

    def psi(t: Tensor) -> Tensor:
        return t * torch.exp(-0.5 * t * t)

    traits = {"parity": "odd", "zero_mean": True, "smooth": math.inf, "bounded": math.exp(-0.5)}
    traits |= {"points": (0.0, 1.0, -1.0)}
    return _wavelet("dog", psi, base, init, scales, {}, traits)


def meyer(
    reading: str = "printed", *, base: str = "zero", init: str = "scaled", scales: bool = False
) -> Basis:
    """Meyer (Table 6): w sin(pi abs(t)) m(.), t = (x - tau) / s, zero for abs(t) >= 1.

    m(a) is 1 up to 1/2, cos(pi/2 nu(2a - 1)) up to 1, 0 beyond, with nu(a) = a^4 (35 - 84 a + 70
    a^2 - 20 a^3) on [0, 1]. The paper prints m(nu(abs(t))), `reading` "printed"; the wavelet-KAN
    code in circulation has m(abs(t)), "direct".
    """
    _check_choice("meyer", "reading", reading, ["printed", "direct"])

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
    traits |= {"nonnegative": True, "points": (0.0, 0.5, -0.5, 1.0, -1.0)}
    return _wavelet("meyer", psi, base, init, scales, {"reading": reading}, traits)


def _sinc(t: Tensor) -> Tensor:
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


def shannon(
    reading: str = "argument",
    half_width: float = 4 * math.pi,
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
    _check_choice("shannon", "reading", reading, ["argument", "index"])
    if not 0 < half_width < math.inf:
        raise ValueError(
            f"`shannon` needs a finite `half_width` > 0, got {half_width!r}. Pass a multiple of pi."
        )

    def psi(t: Tensor) -> Tensor:
        # beyond the window, or where sin(t) / t is below rounding, the argument is held
        limit = half_width if reading == "argument" else 1e6
        t = t.clamp(-limit, limit)
        y = _sinc(t)
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
    traits: dict[str, Any] = {"parity": "even", "bounded": 1.0}
    traits |= {"points": (0.0, math.pi, -math.pi, half_width, -half_width)}
    if argument:
        # the window ends at 0.08: a jump, unless the sinc has a zero there
        traits |= {"smooth": 0 if abs(math.sin(half_width)) < 1e-9 else -1}
        traits |= {"compact_support": (-half_width, half_width)}
    else:
        traits |= {"smooth": math.inf}
    return _wavelet(
        "shannon",
        psi,
        base,
        init,
        scales,
        {"reading": reading, "half_width": half_width},
        traits,
        None if argument else window,
    )


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
