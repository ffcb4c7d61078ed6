"""The numbers of a basis: right in every precision, and at single points as beside them."""

import torch
from torch import Tensor

from kart import tree
from kart.testing import draw
from kart.testing.basis.subject import THETA_X, Subject, phi_slack, rows, setting, within
from kart.testing.compare import agree
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
    """phi in bfloat16 and float16 is phi in float32, rounded once.

    Evaluating in half precision itself loses what 8 or 11 bits cannot hold, and overflows: convert
    x to float32, and the result back.
    """
    params, values = setting(s, theta, x, torch.float32)
    low, kind = values.to(dtype), torch.finfo(dtype)
    wanted = s.basis.apply(params, low.float())
    limit = phi_slack(s, params, low.float())
    limit = limit + kind.eps / 2 * (wanted.double().abs() + limit).clamp(min=kind.smallest_normal)
    # what float16 cannot hold is infinite, and counts as its largest number
    got, wanted = (
        y.double().clamp(-kind.max, kind.max) for y in (s.basis.apply(params, low), wanted)
    )
    agree(got, wanted, limit, f"phi in {dtype}", "phi in float32")


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


PROPERTIES = (
    Property(float32_follows_float64, {**THETA_X, "x": rows(within)}),
    Property(half_rounds_once, {**THETA_X, "dtype": draw.half_types}),
    Property(no_stray_points, {"theta": draw.thetas}),
)
