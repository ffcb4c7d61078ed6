"""How far apart two right answers may be, and what is said where they are further."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kart import tree
from kart.testing.draw import generator

# rounding errors that a right evaluation may gather, in units of eps times the condition
ROUNDINGS = 16


def unit(dtype: torch.dtype) -> float:
    """The rounding allowed to one well-conditioned result, relative to it."""
    return ROUNDINGS * torch.finfo(dtype).eps


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
    change over four relative shakes of all arguments by a few eps, and a few eps of the largest
    value. Measured in float64, so that it needs no knowledge of f.
    """
    exact = tree.map(lambda x: x.double(), args)
    source = generator(0)

    def shaken(x: Tensor) -> Tensor:
        sign = torch.randint(0, 2, x.shape, generator=source).double() * 2 - 1
        return x * (1 + unit(dtype) * sign)

    value = f(*exact)
    swing = [(f(*tree.map(shaken, exact)) - value).abs() for _ in range(4)]
    largest = value.abs().amax() if value.numel() else 0.0
    return 4 * torch.stack(swing).amax(0) + unit(dtype) * largest


def close(
    got: Tensor, wanted: Tensor, share: float, left: str, right: str, slip: float = 0.0
) -> None:
    """Asserts that `norm(got - wanted) <= share * norm(wanted) + slip`."""
    a, b = got.detach().double(), wanted.detach().double()
    apart, size = float((a - b).norm()), float(b.norm())
    if a.shape != b.shape or not apart <= share * size + slip:
        raise AssertionError(
            f"{left} is apart from {right} by {apart / max(size, 1e-30):.3g} of its norm, "
            f"tolerated {share:.3g} (largest entry {float(b.abs().max()):.3g})"
        )


def same_tree(got: Any, wanted: Any, left: str, right: str) -> None:
    """Asserts that two trees are equal bit for bit, names and dtypes included."""
    here, there = tree.named(got), tree.named(wanted)
    if here.keys() != there.keys():
        raise AssertionError(f"{left} and {right} differ in {sorted(here.keys() ^ there.keys())}")
    for name, leaf in there.items():
        if here[name].dtype != leaf.dtype:
            raise AssertionError(f"{name} is {here[name].dtype} in {left}, {leaf.dtype} in {right}")
        same(here[name], leaf, f"{name} of {left}", f"that of {right}")


def agree_trees(got: Any, wanted: Any, factor: float, left: str, right: str) -> None:
    """Asserts that trees agree within `factor` roundings of the largest entry of all, or of 1."""
    here, there = tree.named(got), tree.named(wanted)
    size = max([1.0, *(float(leaf.abs().max()) for leaf in there.values() if leaf.numel())])
    for name, leaf in there.items():
        limit = factor * unit(leaf.dtype) * size
        agree(here[name], leaf, limit, f"{left} {name}", f"{right} {name}")
