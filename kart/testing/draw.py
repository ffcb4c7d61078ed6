"""What the suites draw, and how far apart two right answers may be."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Generator, Tensor

from kart import tree

# rounding errors that a right evaluation may gather, in units of eps times the condition
ROUNDINGS = 16

LARGEST = torch.finfo(torch.float32).max
SIMPLE = (0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 3.0)
SMALL = (0.1, -0.01, 1e-3, -1e-4, 1e-6, 1e-8, 1.1754944e-38, -1e-30, 1e-45, -1e-45)
HUGE = (1e4, -1e4, 1e10, -1e20, 1e30, LARGEST, -LARGEST)

seeds = st.integers(0, 2**20)
DTYPES = (torch.float32, torch.float64)


def dtypes(s: Any) -> SearchStrategy[torch.dtype]:
    """One of the dtypes that subject `s` is held to."""
    return st.sampled_from(list(s.dtypes))


def unit(dtype: torch.dtype) -> float:
    """The rounding allowed to one well-conditioned result, relative to it."""
    return ROUNDINGS * torch.finfo(dtype).eps


def narrow(x: float) -> float:
    """The float32 next to `x`, so that every dtype is given the same number."""
    return float(torch.tensor(x, dtype=torch.float32))


def beside(x: float) -> list[float]:
    """`x` as float32, and the float32 numbers on both sides of it."""
    here = torch.tensor(x, dtype=torch.float32)
    ends = (torch.tensor(side * math.inf) for side in (-1, 1))
    return [float(here), *(float(torch.nextafter(here, end)) for end in ends)]


def reals(points: Sequence[float] = (), limit: float = 8.0) -> SearchStrategy[float]:
    """Numbers up to `limit` in size: simple ones, points where something happens and their
    neighbours, tiny ones, and any.
    """
    ends = (narrow(limit), -narrow(limit))
    special = [*SIMPLE, *(y for x in points for y in beside(x)), *map(narrow, SMALL), *ends]
    special = list(dict.fromkeys(x for x in special if abs(x) <= limit))
    near = narrow(min(limit, 8.0))
    parts = [st.sampled_from(special), st.floats(-near, near, width=32)]
    if limit > 8:
        parts.append(st.floats(-narrow(limit), narrow(limit), width=32))
    return st.one_of(*parts)


def any_finite(points: Sequence[float] = ()) -> SearchStrategy[float]:
    """Every finite float32, special ones first."""
    wide = st.floats(allow_nan=False, allow_infinity=False, width=32)
    return st.one_of(reals(points), st.sampled_from(HUGE), wide)


class Theta(NamedTuple):
    """Drawn parameters: those of `init` with this seed, plus `jitter` times a normal deviate."""

    seed: int
    jitter: float

    def __repr__(self) -> str:
        more = f" + {self.jitter:g} randn" if self.jitter else ""
        return f"init(seed {self.seed}){more}"


thetas = st.builds(Theta, seeds, st.sampled_from([0.0, 1.0]))


def generator(seed: int) -> Generator:
    """A generator on the CPU with this seed."""
    return torch.Generator().manual_seed(seed)


def jittered(params: Any, theta: Theta) -> Any:
    """`params` moved off their initialisation, as training would."""
    if not theta.jitter:
        return params
    source = generator(theta.seed + 1)
    return tree.map(lambda x: x + theta.jitter * torch.randn(x.shape, generator=source), params)


def vjp(f: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.vjp`, typed as the pair that it returns without `has_aux`."""
    value, pullback, *_ = torch.func.vjp(f, *primals)
    return value, pullback


def jvp(f: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """`torch.func.jvp`, typed as the pair that it returns without `has_aux`."""
    value, tangent, *_ = torch.func.jvp(f, primals, tangents)
    return value, tangent


def agree(
    got: Tensor, wanted: Tensor, tolerance: Tensor | float, left: str, right: str, why: str = ""
) -> None:
    """Asserts that `left`, which is `got`, lies within `tolerance` of `right`, which is `wanted`.

    Numbers that are not finite agree with nothing, infinities of one sign excepted; with tolerance
    0 NaN agrees with NaN.
    """
    if got.shape != wanted.shape:
        raise AssertionError(
            f"{left} has shape {tuple(got.shape)}, {right} has {tuple(wanted.shape)}"
        )
    a, b = got.detach().double(), wanted.detach().double()
    limit = torch.as_tensor(tolerance, dtype=torch.float64).expand(a.shape)
    apart = (a - b).abs()
    # a tolerance that is not a number allows nothing
    fine = (apart <= limit) | (a == b)
    if isinstance(tolerance, float) and tolerance == 0:
        fine = fine | (a.isnan() & b.isnan())
    if bool(fine.all()):
        return
    excess = torch.where(fine, -1.0, (apart / limit).nan_to_num(math.inf, math.inf))
    worst = int(excess.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), a.shape))
    where = f" at {list(place)}" if place else ""
    raise AssertionError(
        f"{left} is {float(a.flatten()[worst]):.10g}{where}, "
        f"{right} is {float(b.flatten()[worst]):.10g}: apart by "
        f"{float(apart.flatten()[worst]):.3g}, tolerated {float(limit.flatten()[worst]):.3g}"
        + (f"; {why}" if why else "")
    )


def same(got: Tensor, wanted: Tensor, left: str, right: str) -> None:
    """Asserts equality bit for bit, with NaN equal to NaN."""
    agree(got, wanted, 0.0, left, right, "they must be equal bit for bit")


def slack(f: Callable[[Tensor], Tensor], x: Tensor, reach: float = 1.0) -> Tensor:
    """How far rounding may carry an evaluation of `f (...) -> (..., F)` at `x`: the swing of `f`
    over the few eps of x that rounding its argument and its knots (of size `reach`) amounts to, and
    the same few eps of its value. Measured in float64, so that it holds at steep places, kinks and
    jumps alike.
    """
    radius = unit(x.dtype) * (x.double().abs() + reach)
    shifts = torch.tensor([0.0, -1.0, -0.5, -0.1, 0.1, 0.5, 1.0], dtype=torch.float64)
    around = f(x.double() + shifts.view(-1, *[1] * x.dim()) * radius)
    swing = (around - around[0]).abs().amax(0)
    return swing + unit(x.dtype) * around[0].abs()


def spread(f: Callable[..., Tensor], args: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """How far rounding in `dtype` may carry `f(*args)`, like its result: four times the largest
    change over six relative shakes of all arguments by a few eps, and a few eps of the largest
    value. Measured in float64, so that it needs no knowledge of f.
    """
    exact = tree.map(lambda x: x.double(), args)
    source = generator(0)

    def shaken(x: Tensor) -> Tensor:
        sign = torch.randint(0, 2, x.shape, generator=source).double() * 2 - 1
        return x * (1 + unit(dtype) * sign)

    value = f(*exact)
    swing = [(f(*tree.map(shaken, exact)) - value).abs() for _ in range(6)]
    return 4 * torch.stack(swing).amax(0) + unit(dtype) * value.abs().amax()
