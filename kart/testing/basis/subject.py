"""A basis as the checks see it: its functions, what is drawn for it, and what rounding may do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from kart import tree
from kart.testing import draw
from kart.testing.compare import slack, unit
from kart.testing.draw import Theta, any_finite, reals

Params = dict[str, Any]

# scores of attention stay far below this; a family that promises more or less declares `finite`
FINITE_LIMIT = 100.0


class Subject(NamedTuple):
    """A basis as the checks see it: `reach` is the size of its farthest declared point."""

    basis: Any
    family: str
    options: Mapping[str, Any]
    traits: Mapping[str, Any]
    dtypes: Sequence[torch.dtype]

    @property
    def points(self) -> Sequence[float]:
        return tuple(self.traits.get("points", ()))

    @property
    def reach(self) -> float:
        return max([1.0, *(abs(x) for x in self.points)])

    @property
    def limit(self) -> float:
        return float(self.traits.get("finite", FINITE_LIMIT))

    @property
    def amplitude(self) -> str | None:
        return self.traits.get("amplitude", "coefs" if self.traits.get("linear") else None)

    def params(self, theta: Theta, shape: Sequence[int], dtype: torch.dtype) -> Params:
        drawn = self.basis.init(draw.generator(theta.seed), tuple(shape))
        return tree.to(draw.jittered(drawn, theta), dtype)

    def functions(self, x: Tensor) -> Tensor:
        """The functions that traits speak of, `(...)` to `(..., F)`: the features of a linear
        family, else one unit of amplitude 1 without its base activation.
        """
        if self.traits.get("linear"):
            return self.basis.expand(x)
        params = self.params(Theta(0, 0.0), (), x.dtype)
        if self.amplitude is None:
            return self.basis.apply(params, x)[..., None]
        ones = {**params, self.amplitude: torch.ones_like(params[self.amplitude])}
        zero = {**params, self.amplitude: torch.zeros_like(params[self.amplitude])}
        y = self.basis.apply(ones, x)
        if self.options.get("base", "zero") != "zero":
            y = y - self.basis.apply(zero, x)
        return y[..., None]

    def slack(self, x: Tensor) -> Tensor:
        """Tolerance of `functions(x)`: `draw.slack`, and a few eps of the size of the functions."""
        grid = torch.linspace(-self.reach, self.reach, 33, dtype=torch.float64)
        size = self.functions(grid).abs().amax(0).clamp(max=1e3)
        return slack(self.functions, x, self.reach) + unit(x.dtype) * size


def near(s: Subject) -> SearchStrategy[float]:
    """Any number, one beside a declared point, or a large one for which `phi` is finite."""
    return reals(s.points, far=s.limit)


def knots(s: Subject) -> SearchStrategy[float]:
    """The declared points themselves, which float32 may not hold, and any number."""
    return st.one_of(st.sampled_from(list(s.points) or [0.0]), near(s))


def far(s: Subject) -> SearchStrategy[float]:
    """As `near`, with large numbers up to 1e4 unless `finite` is declared for less."""
    return reals(s.points, far=float(s.traits.get("finite", 1e4)))


def within(s: Subject) -> SearchStrategy[float]:
    """As `near`, up to the size that the checks of accuracy reach."""
    return reals(s.points, s.limit)


def finite(s: Subject) -> SearchStrategy[float]:
    """Any finite number, however large."""
    # where the base activation has to be subtracted, nothing is left of the function far out
    cancels = not s.traits.get("linear") and s.options.get("base", "zero") != "zero"
    return within(s) if cancels else any_finite(s.points)


def rows(element: Callable[[Subject], SearchStrategy[float]], least: int = 1, most: int = 4):
    """Lists of numbers."""
    return lambda s: st.lists(element(s), min_size=least, max_size=most)


def phi_slack(s: Subject, params: Params, x: Tensor) -> Tensor:
    """How far rounding may carry `apply(params, x)`, for parameters of the shape of `x`: the swing
    over a few eps of x, over a few eps of every parameter, and a few eps of the result.
    """
    if not x.dim():
        return phi_slack(s, tree.map(lambda leaf: leaf[None], params), x[None])[0]
    few = unit(x.dtype)
    shifts = torch.tensor([0, -1, -0.5, -0.1, 0.1, 0.5, 1] + [0] * 8, dtype=torch.float64)
    column = shifts.view(-1, *[1] * x.dim())
    around = x.double() + column * few * (x.double().abs() + s.reach)
    signs = draw.generator(0)

    def shaken(leaf: Tensor) -> Tensor:
        sign = torch.randint(0, 2, (8, *leaf.shape), generator=signs).double() * 2 - 1
        still = torch.zeros(7, *leaf.shape, dtype=torch.float64)
        return leaf.double() * (1 + 2 * few * torch.cat([still, sign]))

    values = s.basis.apply(tree.map(shaken, params), around)
    swing = (values - values[0]).abs()
    size = unit(x.dtype) * (values[0].abs() + 1e-30)
    if s.options.get("base", "zero") != "zero":
        # torch's gelu and silu keep absolute, not relative accuracy in their left tail
        size = size + unit(x.dtype) * x.double().abs()
    return swing[:7].amax(0) + swing[7:].amax(0) + size


def setting(s: Subject, theta: Theta, x: list[float], dtype: torch.dtype) -> tuple[Params, Tensor]:
    """Parameters of one function an element of `x`, and `x` as a tensor."""
    return s.params(theta, (len(x),), dtype), torch.tensor(x, dtype=dtype)


THETA_X: dict[str, Any] = {"theta": draw.thetas, "x": rows(near)}
PAIR: dict[str, Any] = {**THETA_X, "dtype": draw.dtypes}
X: dict[str, Any] = {"x": rows(far), "dtype": draw.dtypes}
