"""What a basis declares in its traits, one property each."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kart import bases
from kart.testing import draw
from kart.testing.basis.subject import (
    PAIR,
    Params,
    Subject,
    X,
    far,
    finite,
    knots,
    phi_slack,
    rows,
    setting,
)
from kart.testing.compare import agree, slack, unit
from kart.testing.core import Property
from kart.testing.draw import Theta
from kart.testing.laws import slope


def linear(s: Subject, theta: Theta, x: list[float], dtype: torch.dtype) -> None:
    """phi(x; c) - phi(x; 0) = sum_k c_k expand(x)_k, for c = theta["coefs"].

    Streamed attention contracts the features of `expand`; where `apply` computes something else,
    training and inference are two models.
    """
    params, values = setting(s, theta, x, dtype)
    features = s.basis.expand(values)
    if features is None:
        raise AssertionError("expand(x) is None, where a linear family has features (..., K)")
    coefs = params["coefs"]
    if coefs.shape != features.shape:
        raise AssertionError(
            f"coefs of {len(x)} units have shape {tuple(coefs.shape)}, features of {len(x)} "
            f"numbers {tuple(features.shape)}: wanted (..., K) both"
        )
    zero = {**params, "coefs": torch.zeros_like(coefs)}
    gain = params.get("scale_basis", torch.ones(()))
    wanted = (features * coefs).sum(-1) * gain
    whole, rest = s.basis.apply(params, values), s.basis.apply(zero, values)
    sizes = (features.abs() * coefs.abs()).sum(-1) * gain.abs() + whole.abs() + rest.abs()
    limit = phi_slack(s, params, values) + unit(dtype) * sizes
    agree(whole - rest, wanted, limit, "phi(x; c) - phi(x; 0)", "sum_k c_k expand(x)_k")
    if getattr(s.basis, "features", None) is not None:
        all_of_it = (s.basis.features(values) * s.basis.coefficients(params)).sum(-1)
        agree(all_of_it, whole, limit, "features(x) . coefficients(theta)", "phi(x; theta)")


def homogeneous(
    s: Subject, theta: Theta, x: list[float], factor: float, dtype: torch.dtype
) -> None:
    """phi(x; t a) - phi(x; 0) = t (phi(x; a) - phi(x; 0)) for the amplitude a.

    The declared amplitude is not a factor of the function, so operators scale it in vain.
    """
    params, values = setting(s, theta, x, dtype)
    name = s.amplitude
    if name not in params:
        raise AssertionError(f"the parameters are {sorted(params)}: no amplitude {name!r}")

    def scaled(t: float) -> Params:
        return {**params, name: params[name] * t}

    zero, one, more = (s.basis.apply(scaled(t), values) for t in (0.0, 1.0, factor))
    limit = sum(phi_slack(s, scaled(t), values) for t in (0.0, 1.0, factor))
    limit = limit * max(1.0, abs(factor)) + unit(dtype) * (one.abs() + zero.abs()) * abs(factor)
    agree(more - zero, factor * (one - zero), limit, "phi(x; t a) - phi(x; 0)", "t times that of a")


def periodic(s: Subject, x: list[float], turns: int, dtype: torch.dtype) -> None:
    """phi(x + n T) = phi(x) for integers n and the declared period T.

    The period is another one: operators that rely on it (scores shifted by whole turns) change.
    """
    period = float(s.traits["periodic"])
    here = torch.tensor(x, dtype=dtype)
    there = (here.double() + turns * period).to(dtype)
    # x + n T is not representable: its rounding moves the point by that much, no more
    moved = there.double() - turns * period
    wanted = s.functions(moved)
    limit = s.slack(here) + s.slack(there) + slack(s.functions, moved.to(dtype), s.reach)
    agree(s.functions(there), wanted, limit, "phi(x + n T)", "phi(x)")


def partition_of_unity(s: Subject, x: list[float], dtype: torch.dtype) -> None:
    """sum_k phi_k(x) = 1 for x in [low, high].

    A constant cannot be represented: knots are off by one, an end is open, or a spline is missing.
    """
    low, high = s.traits["partition_of_unity"]
    values = torch.tensor(x, dtype=dtype)
    inside = values.double().clamp(low, high).to(dtype)
    # clamping in float32 can leave the interval by one rounding
    inside = torch.where(inside.double() > high, torch.nextafter(inside, inside - 1), inside)
    inside = torch.where(inside.double() < low, torch.nextafter(inside, inside + 1), inside)
    total = s.functions(inside).sum(-1)
    limit = unit(dtype) * (1 + s.functions(inside).abs().sum(-1))
    at = f"x = {inside.tolist()}"
    agree(total, torch.ones_like(total), limit, "sum_k phi_k(x)", "its declared value", at)


def nonnegative(s: Subject, x: list[float], dtype: torch.dtype) -> None:
    """phi_k(x) >= 0.

    A function dips below zero: a wrong polynomial piece, or one used outside its interval.
    """
    y = s.functions(torch.tensor(x, dtype=dtype))
    agree(y, y.clamp(min=0), unit(dtype) * s.reach, "phi_k(x)", "its positive part")


def compact_support(s: Subject, beyond: float, side: str, dtype: torch.dtype) -> None:
    """phi_k(x) = 0 for x outside [low, high].

    The functions do not vanish where they are declared to: far scores still count.
    """
    low, high = s.traits["compact_support"]
    edge = torch.tensor(high if side == "above" else low, dtype=dtype)
    step = abs(beyond) * (1 if side == "above" else -1)
    x = (edge + step).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    away = torch.tensor(math.inf if side == "above" else -math.inf, dtype=dtype)
    outside = x.double() > high if side == "above" else x.double() < low
    x = x if bool(outside) else torch.nextafter(x, away)
    y = s.functions(x)
    # rounding may put an x that close to the edge on its other side
    radius = 4 * torch.finfo(dtype).eps * (x.double().abs() + s.reach)
    inside = s.functions(edge.double() - radius * (1 if side == "above" else -1)).abs()
    limit = torch.where((x - edge).abs() <= radius, inside, 0.0)
    agree(y, torch.zeros_like(y), limit, "phi_k(x)", "its value outside", f"x = {float(x)!r}")


def _derivatives(s: Subject, order: int) -> list[Callable[[Tensor], Tensor]]:
    """The functions and their derivatives up to `order`, `(P,)` to `(P, F)`, by reverse mode."""
    size = s.functions(torch.zeros(1, dtype=torch.float64)).shape[-1]

    # one copy of x a function, so that what is differentiated is elementwise
    def value(x: Tensor) -> Tensor:
        return s.functions(x).diagonal(dim1=-2, dim2=-1)

    stack: list[Callable[[Tensor], Tensor]] = [value]
    for _ in range(order):
        stack.append(functools.partial(slope, stack[-1]))
    return [lambda x, f=f: f(x[:, None].expand(-1, size)) for f in stack]


def smooth(s: Subject, x: float) -> None:
    """phi, phi', .., phi^(k) are continuous for the declared k (checked up to k = 3).

    A derivative jumps: pieces do not meet, and optimisers that use curvature see noise there.
    """
    order = int(min(s.traits["smooth"], 3 if s.traits.get("second_derivative", True) else 1))
    eps = torch.finfo(torch.float64).eps
    step = 8 * eps * (abs(x) + s.reach)
    sides = x + step * torch.tensor([-3, -1, 1, 3], dtype=torch.float64)
    grid = torch.linspace(-s.reach, s.reach, 33, dtype=torch.float64)
    for k, f in enumerate(_derivatives(s, order)):
        values = f(torch.cat([sides, grid]))
        far_left, left, right, far_right = values[:4]
        limit = (left - far_left).abs() + (right - far_right).abs()
        limit = 2 * limit + 1024 * eps * values.abs().amax(0)
        agree(right, left, limit, f"phi^({k})(x+)", f"phi^({k})(x-)", f"derivative {k} jumps")


def bounded(s: Subject, x: list[float], dtype: torch.dtype) -> None:
    """abs(phi_k(x)) <= B for every finite x, and amplitude 1.

    The function leaves its declared bound: heads can explode on large scores.
    """
    bound = float(s.traits["bounded"])
    y = s.functions(torch.tensor(x, dtype=dtype))
    limit = unit(dtype) * bound
    agree(y, y.clamp(-bound, bound), limit, "phi_k(x)", "it, held within the bound")


def parity(s: Subject, x: list[float], dtype: torch.dtype) -> None:
    """phi(-x) = phi(x) where declared "even", phi(-x) = -phi(x) where "odd".

    A sign is wrong, or the function is not centred.
    """
    sign = {"even": 1, "odd": -1}[s.traits["parity"]]
    values = torch.tensor(x, dtype=dtype)
    limit = s.slack(values) + s.slack(-values)
    wanted = sign * s.functions(values)
    agree(s.functions(-values), wanted, limit, "phi(-x)", f"{'-' * (sign < 0)}phi(x)")


def integral(f: Callable[[Tensor], Tensor], s: Subject) -> tuple[Tensor, Tensor]:
    """The integrals of f (over a period, the support, or the line) and how well they are known."""
    if s.traits.get("periodic") or s.traits.get("compact_support"):
        low, high = s.traits.get("compact_support") or (0.0, float(s.traits["periodic"]))
        places = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096 * (high - low) + low
        weights = torch.full_like(places, (high - low) / 4096)
    else:
        # x = sinh t reaches +-1e4, where what has an integral has died out
        t = torch.linspace(-10, 10, 8193, dtype=torch.float64)
        places, weights = t.sinh(), t.cosh() * 20 / 8192
    terms = f(places) * weights[:, None]
    coarse = terms[::2].sum(0) * 2
    total = terms.sum(0)
    return total, (total - coarse).abs() + 1e-12 * terms.abs().sum(0)


def zero_mean(s: Subject) -> None:
    """The integral of phi (over a period, its support, or the line) is 0.

    A wavelet without zero mean passes constants: it is a smoother, not a detector.
    """
    total, error = integral(s.functions, s)
    size, _ = integral(lambda x: s.functions(x).abs(), s)
    if bool((error > 1e-3 * size).any()):
        raise AssertionError(f"the integral {total.tolist()} does not converge: {error.tolist()}")
    agree(total, torch.zeros_like(total), error, "the integral of phi", "its declared value")


def refinable(s: Subject, x: list[float]) -> None:
    """Every phi_k is a combination of the functions of the refined basis.

    A grid that is refined during training does not keep the function it had. (`refinable` is a
    function that makes the refined basis; True for a family of kart is the one of twice the grid.)
    """
    finer = s.traits["refinable"]
    refined: Any
    if finer is True:
        options = {k: v for k, v in s.options.items() if k not in ("base", "scales", "init")}
        refined = bases.FAMILIES[s.family](**{**options, "grid": 2 * options["grid"]})
    else:
        refined = finer()
    low, high = s.traits.get("partition_of_unity") or (-s.reach, s.reach)
    size = refined.expand(torch.zeros(1, dtype=torch.float64)).shape[-1]
    places = torch.linspace(low, high, 8 * size + 1, dtype=torch.float64)
    fine = refined.expand(places)
    mixing = torch.linalg.lstsq(fine, s.functions(places), driver="gelsd").solution
    values = torch.tensor(x, dtype=torch.float64).clamp(low, high)
    limit = s.slack(values) + 1024 * unit(torch.float64) * mixing.abs().amax(0)
    got = refined.expand(values) @ mixing
    agree(got, s.functions(values), limit, "the refined combination", "phi_k(x)")


FAR: dict[str, Any] = {"x": rows(finite), "dtype": draw.dtypes}


def _no_amplitude(s: Subject) -> str | None:
    return None if s.amplitude else "no trait `amplitude` names a parameter that is a factor"


PROPERTIES = (
    Property(linear, PAIR, "linear", (True,)),
    Property(
        homogeneous, {**PAIR, "factor": st.sampled_from([2.0, -1.0, 0.5, 3.0])}, unfit=_no_amplitude
    ),
    Property(
        periodic,
        {**X, "turns": st.integers(-5, 5).filter(bool)},
        "periodic",
        (1.0, 2.0, math.pi, 2 * math.pi),
    ),
    Property(partition_of_unity, X, "partition_of_unity", ((-1.0, 1.0), (0.0, 1.0))),
    Property(nonnegative, FAR, "nonnegative", (True,)),
    Property(
        compact_support,
        {"beyond": finite, "side": st.sampled_from(["above", "below"]), "dtype": draw.dtypes},
        "compact_support",
        ((-1.0, 1.0), (-8.0, 8.0)),
    ),
    Property(
        smooth,
        {"x": knots},
        "smooth",
        (math.inf, 2, 1, 0),
        lambda s: "declares no continuity" if s.traits.get("smooth", 0) < 0 else None,
    ),
    Property(bounded, FAR, "bounded", (1.0, 10.0)),
    Property(parity, X, "parity", ("even", "odd")),
    Property(zero_mean, {}, "zero_mean", (True,)),
    Property(refinable, {"x": rows(far)}, "refinable", ()),
)
