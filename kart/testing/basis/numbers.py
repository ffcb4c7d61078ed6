"""The numbers of a basis: right in every precision, and at single points as beside them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kart import tree
from kart.testing import draw
from kart.testing.basis.subject import THETA_X, Subject, phi_slack, rows, setting, within
from kart.testing.compare import agree, unit
from kart.testing.core import Property
from kart.testing.draw import LARGE, SIMPLE, Theta
from kart.testing.laws import vjp


def float32_follows_float64(s: Subject, theta: Theta, x: list[float]) -> None:
    """phi in float32 is phi in float64 at a point within C eps of (x, theta), up to C eps.

    Cancellation, a recurrence that amplifies errors, or a step in lower precision eats digits.
    """
    params, values = setting(s, theta, x, torch.float32)
    wanted = s.basis.apply(tree.to(params, torch.float64), values.double())
    got = s.basis.apply(params, values)
    agree(got, wanted, phi_slack(s, params, values), "phi in float32", "phi in float64")


def half_rounds_once(s: Subject, theta: Theta, x: list[float], dtype: torch.dtype) -> None:
    """phi and expand in bfloat16 and float16 are those in float32, rounded once.

    Evaluating in half precision itself loses what 8 or 11 bits cannot hold, and overflows: convert
    x to float32, and the result back.
    """
    params, values = setting(s, theta, x, torch.float32)
    low, kind = values.to(dtype), torch.finfo(dtype)

    def rounds_once(fn: Callable[[Tensor], Tensor], limit: Tensor, what: str) -> None:
        wanted = fn(low.float())
        size = (wanted.double().abs() + limit).clamp(min=kind.smallest_normal)
        # what float16 cannot hold is infinite, and counts as its largest number
        got, wanted = (y.double().clamp(-kind.max, kind.max) for y in (fn(low), wanted))
        agree(got, wanted, limit + kind.eps / 2 * size, f"{what} in {dtype}", f"{what} in float32")

    rounds_once(partial(s.basis.apply, params), phi_slack(s, params, low.float()), "phi")
    if s.basis.expand(low) is not None:
        rounds_once(s.basis.expand, s.slack(low.float()), "expand")


def no_stray_points(s: Subject, theta: Theta) -> None:
    """phi(x) and phi'(x) lie between their limits from the left and from the right, at 0, at simple
    and large numbers, and at declared points.

    The function is another at a single point: a case for zero, a comparison with the wrong sign of
    equality, `torch.where` around a division. Equal scores, and scores of zero, do happen.
    """
    large = [x for x in LARGE if abs(x) <= s.limit]
    x = torch.tensor([*SIMPLE, *s.points, *large], dtype=torch.float64)
    params = s.params(theta, (), torch.float64)

    def both(x: Tensor) -> Tensor:
        y, pullback = vjp(lambda x: s.basis.apply(params, x), x)
        return torch.stack([y, pullback(torch.ones_like(y))[0]])

    step = 1e-9 * (x.abs() + s.reach)
    here, *sides = (both(x + shift * step) for shift in (0, -3, -1, 1, 3))
    size = torch.stack([y.abs() for y in sides]).amax(0)
    # what the function changes by over the distance, and its rounding
    margin = 4 * (sides[0] - sides[1]).abs() + 4 * (sides[2] - sides[3]).abs()
    margin = margin + 1e-10 * size + 1e-12
    low = torch.minimum(sides[1], sides[2]) - margin
    high = torch.maximum(sides[1], sides[2]) + margin
    middle, width = (low + high) / 2, (high - low) / 2
    for i, name in enumerate(("phi(x)", "phi'(x)")):
        at = f"x = {x.tolist()}"
        agree(here[i], middle[i], width[i], name, "its limit from either side", at)


def infinity_is_a_limit(s: Subject, theta: Theta, dtype: torch.dtype) -> None:
    """phi(inf) and phi(-inf) are NaN, or what phi(x) tends to as x goes there.

    A score that overflowed is no number, and no one sees it: a clamp, a mask or `nan_to_num` has
    made one of it. Where phi stands still and moves again farther out, an index overflowed: clamp
    before `.long()`.
    """
    powers = [10.0**2**j for j in range(9 if dtype == torch.float64 else 6)]
    params = s.params(theta, (), dtype)
    for sign in (1.0, -1.0):
        x = sign * torch.tensor([*powers, float("inf")], dtype=dtype)
        y = s.basis.apply(params, x).double()
        *_, a, b, c, d, end = y
        if end.isnan() or d.isnan():
            continue
        still = y[1:] == y[:-1]
        for i in (still[:-1] & ~still[1:] & (x.abs()[:-2] > max(1e3, s.reach))).nonzero()[:, 0]:
            raise AssertionError(
                f"phi({x[i]}) and phi({x[i + 1]}) are {y[i]:.10g}, phi({x[i + 2]}) is "
                f"{y[i + 2]:.10g}"
            )
        if d == end:
            continue
        # logarithms double or halve from point to point, nothing is slower
        if end.isinf():
            fine = bool((end > 0) == (d > 0)) and bool(a.abs() < b.abs() < c.abs() < d.abs())
        else:
            apart = (torch.stack([a, b, c, d]) - end).abs()
            known = apart[3] <= unit(dtype) * (d.abs() + end.abs())
            fine = bool(known) or bool((apart[1:] <= 0.9 * apart[:-1]).all())
        if not fine:
            raise AssertionError(f"phi({x[-1]}) is {end:.10g}, phi({x[-2]}) is {d:.10g}")


PROPERTIES = (
    Property(float32_follows_float64, {**THETA_X, "x": rows(within)}),
    Property(half_rounds_once, {**THETA_X, "dtype": draw.half_types}),
    Property(no_stray_points, {"theta": draw.thetas}),
    Property(infinity_is_a_limit, {"theta": draw.thetas, "dtype": draw.dtypes}),
)
