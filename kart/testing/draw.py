"""What the suites draw: numbers, special ones first, sizes that meet, and parameters."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Generator, Tensor

from kart import tree

LARGEST = torch.finfo(torch.float32).max
SIMPLE = (0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 3.0)
SMALL = (0.1, -0.01, 1e-3, -1e-4, 1e-6, 1e-8, 1.1754944e-38, -1e-30, 1e-45, -1e-45)
# where scores of a badly scaled or a diverging model lie, powers of two and of ten
LARGE = (50.0, -50.0, 64.0, 100.0, -128.0, 1e3, -1024.0, 1e4)
HUGE = (1e4, -1e4, 1e10, -1e20, 1e30, LARGEST, -LARGEST)

HALF_TYPES = (torch.bfloat16, torch.float16)

seeds = st.integers(0, 2**20)
half_types = st.sampled_from(HALF_TYPES)
all_types = st.sampled_from([torch.float32, torch.float64, *HALF_TYPES])
poisons = st.sampled_from([math.nan, math.inf, -math.inf])


def dtypes(s: Any) -> SearchStrategy[torch.dtype]:
    """One of the dtypes that subject `s` is held to."""
    return st.sampled_from(list(s.dtypes))


def narrow(x: float) -> float:
    """The float32 next to `x`, so that every dtype is given the same number."""
    return float(torch.tensor(x, dtype=torch.float32))


def beside(x: float) -> list[float]:
    """`x` as float32, and the float32 numbers on both sides of it."""
    here = torch.tensor(x, dtype=torch.float32)
    ends = (torch.tensor(side * math.inf) for side in (-1, 1))
    return [float(here), *(float(torch.nextafter(here, end)) for end in ends)]


def reals(
    points: Sequence[float] = (), limit: float = 8.0, far: float = 0.0
) -> SearchStrategy[float]:
    """Numbers up to `limit` in size: simple ones, points where something happens and their
    neighbours, tiny ones, and any; besides a few large ones up to `far`.
    """
    ends = (narrow(limit), -narrow(limit))
    special = [*SIMPLE, *(y for x in points for y in beside(x)), *map(narrow, SMALL), *ends]
    special = [x for x in special if abs(x) <= limit] + [x for x in LARGE if abs(x) <= far]
    special = list(dict.fromkeys(special))
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


def probe(shape: Sequence[int], seed: int) -> Tensor:
    """Normal numbers in float64, of `shape`."""
    return torch.randn(tuple(shape), generator=generator(seed)).double()
