"""Properties of a projection of rows onto the probability simplex."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.func import jacrev

from kart.testing import draw, laws
from kart.testing.compare import agree, close, same, unit
from kart.testing.core import Property, Suite, dtypes_of, with_traits
from kart.testing.draw import reals

# the support ends between neighbours that are this far apart
EDGES = (1 / 2, 1 / 3, 1 / 4, 0.2)


class Subject(NamedTuple):
    """A projection as the checks see it: `project(y, dim=-1)`."""

    project: Callable[..., Any]
    traits: Mapping[str, Any]
    dtypes: Sequence[torch.dtype]


def rows(s: Subject) -> SearchStrategy[list[float]]:
    """One row, with ties and extremes among its numbers."""
    return st.lists(reals(EDGES, far=1e4), min_size=1, max_size=5)


def _slack(row: Tensor) -> float:
    # the entries of the support lie within 1 of the largest: nothing larger is ever rounded
    return unit(row.dtype) * row.shape[-1]


def keeps_shape_and_dtype(s: Subject, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """project maps (..) to (..) in its dtype, along any axis `dim`.

    Shapes or dtypes that change on the way break attention under mixed precision.
    """
    y = torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(dtype)
    for dim in range(-len(shape), len(shape)):
        p = s.project(y, dim=dim)
        if p.shape != y.shape or p.dtype != dtype:
            raise AssertionError(f"dim {dim}: {p.dtype} of shape {tuple(p.shape)} for {shape}")
        moved = s.project(y.movedim(dim, -1).contiguous()).movedim(-1, dim)
        agree(p, moved, unit(dtype), f"project(y, dim={dim})", "project of y with the axis moved")


def inputs_untouched(s: Subject, y: list[float], dtype: torch.dtype) -> None:
    """project writes neither to its argument nor to anything global.

    In-place changes reach whoever else holds the tensor.
    """
    row = torch.tensor(y, dtype=dtype)
    with laws.world_untouched(), laws.untouched(y=row):
        laws.vjp(s.project, row)[1](torch.ones_like(row))
        s.project(row)


def deterministic(s: Subject, y: list[float], other: list[float], dtype: torch.dtype) -> None:
    """project(y) is the same bit for bit whenever it is asked, the same under torch.no_grad(), and
    follows what is written into y.

    A hidden state, or a buffer that is used again, makes the same row give another; a path of its
    own where no gradient is wanted evaluates another model than is trained.
    """
    row = torch.tensor(y, dtype=dtype)
    first = s.project(row)
    s.project(torch.tensor(other, dtype=dtype))
    same(s.project(row), first, "project asked again", "project")
    with torch.no_grad():
        agree(s.project(row), first, _slack(row), "project under no_grad", "project")
    laws.keeps_nothing(s.project, (row,), (row.flip(0) * 0.5,))


def on_the_simplex(s: Subject, y: list[float], by: float, dtype: torch.dtype) -> None:
    """p_i >= 0 and sum_i p_i = 1, however far y is from zero.

    Rows are no probabilities; far from zero the running sums lose their digits.
    """
    row = torch.tensor(y, dtype=dtype) + by
    p = s.project(row)
    agree(p, p.clamp(min=0), 0.0, "p", "its positive part")
    agree(p.sum(-1), torch.ones_like(p.sum(-1)), _slack(row), "sum_i p_i", "its value")


def nearest(s: Subject, y: list[float], by: float, dtype: torch.dtype) -> None:
    """max_i (y - p)_i = <y - p, p>: no point z of the simplex has <y - p, z - p> > 0.

    The result lies on the simplex, but is not the nearest point of it.
    """
    row = torch.tensor(y, dtype=dtype) + by
    p = s.project(row).double()
    # what is common to the row does not count, and is taken off where nothing is rounded
    rest = row.double() - row.double().max() - p
    agree(rest.max(), (rest * p).sum(), 2 * _slack(row), "max_i (y - p)_i", "<y - p, p>")


def fixed_points(s: Subject, y: list[float], dtype: torch.dtype) -> None:
    """project(p) = p for p on the simplex.

    It is no projection.
    """
    p = s.project(torch.tensor(y, dtype=dtype))
    agree(s.project(p), p, 2 * _slack(p), "project(p)", "p")


def shift_invariant(s: Subject, y: list[float], by: float, dtype: torch.dtype) -> None:
    """project(y + c) = project(y).

    Digits are lost far from zero, which the largest entry taken off first would keep.
    """
    there = torch.tensor(y, dtype=dtype) + by
    here = there.double() - by
    wanted = s.project(here)
    agree(s.project(there), wanted, 2 * _slack(there), "project(y + c)", "project(y)")


def entries_permute(s: Subject, y: list[float], order: list[int], dtype: torch.dtype) -> None:
    """project(P y) = P project(y), and equal entries get equal weight.

    The place of an entry counts: a sort is undone wrongly, or ties are broken.
    """
    row = torch.tensor(y, dtype=dtype)
    index = torch.tensor([i for i in order if i < len(y)])
    p = s.project(row)
    agree(s.project(row[index]), p[index], _slack(row), "project(P y)", "P project(y)")
    tied = row[:, None] == row[None, :]
    pairs = (p[:, None] - p[None, :]).abs()
    zero = torch.zeros_like(pairs)
    agree(torch.where(tied, pairs, 0), zero, _slack(row), "the gap of tied entries", "zero")


def monotone(s: Subject, y: list[float], dtype: torch.dtype) -> None:
    """y_i >= y_j implies p_i >= p_j, and p_i - p_j <= y_i - y_j.

    A larger score gets a smaller weight.
    """
    row = torch.tensor(y, dtype=dtype)
    p = s.project(row).double()
    gaps, wide = p[:, None] - p[None, :], row.double()[:, None] - row.double()[None, :]
    low, high = wide.clamp(max=0), wide.clamp(min=0)
    agree(gaps, gaps.clamp(low, high), _slack(row), "p_i - p_j", "it, between 0 and y_i - y_j")


def nonexpansive(s: Subject, y: list[float], seed: int, dtype: torch.dtype) -> None:
    """norm(project(y) - project(z)) <= norm(y - z).

    A small change of the scores makes a large one of the weights: the map jumps.
    """
    row = torch.tensor(y, dtype=dtype)
    step = torch.randn(row.shape, generator=draw.generator(seed)).to(dtype) * 0.1
    other = row + step
    apart = (s.project(row).double() - s.project(other).double()).norm()
    bound = (row.double() - other.double()).norm()
    over = (apart - bound).clamp(min=0)
    agree(over, torch.zeros_like(over), 2 * _slack(row), "the excess of the distance", "zero")


def rows_stand_alone(s: Subject, y: list[float], poke: float, dtype: torch.dtype) -> None:
    """project(Y)[n] depends on Y[n] alone, under any leading axes, and NaN in a row makes that
    whole row NaN.

    One bad row spoils the others, or passes for a good one.
    """
    row = torch.tensor(y, dtype=dtype)
    table = torch.stack([row, torch.full_like(row, poke)])
    agree(s.project(table)[0], s.project(row), _slack(row), "a row among others", "it alone")
    many = torch.stack([row * (1 - 0.3 * i) for i in range(4)])
    alone = torch.stack([s.project(one) for one in many])
    for lead in ((2, 2), (2, 1, 2)):
        got = s.project(many.unflatten(0, lead)).flatten(0, -2)
        agree(got, alone, _slack(row), f"rows under leading axes {lead}", "each alone")
    spoiled = row.clone()
    spoiled[-1] = math.nan
    p = s.project(spoiled)
    same(p, torch.full_like(p, math.nan), "project of a row with NaN", "NaN")


def minus_infinity_is_deleting(s: Subject, y: list[float], kept: list[bool], by: float) -> None:
    """project(y) with y_i = -inf is project of the row without y_i, and p_i = 0.

    A masked score has weight, or turns the row into NaN.
    """
    row = torch.tensor(y, dtype=torch.float64) + by
    mask = torch.tensor(kept[: len(y)])
    mask[0] = True
    p = s.project(torch.where(mask, row, -math.inf))
    wanted = torch.zeros_like(row)
    wanted[mask] = s.project(row[mask])
    agree(p, wanted, _slack(row), "project with -inf", "project without those entries")


def jacobian_of_theory(s: Subject, y: list[float], seed: int) -> None:
    """The Jacobian is diag(s) - s s^T / abs(s), s the indicator of the support.

    The gradient is not that of the projection, as where the sort or the threshold is detached.
    """
    source = draw.generator(seed)
    row = torch.tensor(y, dtype=torch.float64)
    # off the kinks, where an entry sits exactly on the edge of the support
    row = row + 0.01 * torch.randn(row.shape, generator=source, dtype=torch.float64)
    p = s.project(row)
    edge = (row - (row - p)[p.argmax()]).abs().min()
    if float(edge) < 1e-9:
        return
    support = (p > 0).double()
    wanted = support.diag() - support.outer(support) / support.sum()
    limit = unit(torch.float64) * len(y)
    agree(jacrev(s.project)(row), wanted, limit, "the Jacobian", "diag(s) - s s^T / abs(s)")


def forward_meets_reverse(s: Subject, y: list[float], seed: int) -> None:
    """<u, J v> = <J^T u, v>.

    Forward and reverse mode disagree, or one is missing.
    """
    laws.adjoint(s.project, (torch.tensor(y, dtype=torch.float64),), seed, 16.0)


def vmap_is_a_loop(s: Subject, y: list[float], dtype: torch.dtype) -> None:
    """vmap(project) over rows is the loop, whichever axis is mapped and within another vmap.

    An operation without a rule for batches, one whose rule takes the mapped axis for the first, or
    one that looks at values.
    """
    row = torch.tensor(y, dtype=dtype)
    table = torch.stack([row, row.flip(0), row * 0])
    wanted = torch.stack([s.project(one) for one in table])
    for how, got in laws.vmaps(s.project, (0,), (table,)).items():
        agree(got, wanted, _slack(row), f"vmap{how} of project", "the loop")


def large_rows(s: Subject, seed: int, count: int, size: int, by: float, dtype: torch.dtype) -> None:
    """p_i = max(y_i - lambda, 0) with sum_i p_i = 1 for long and many rows, lambda found by
    bisection, and the gradient of <u, p> is that of this support, away from kinks.

    The running sum over a long sorted row loses digits, or the support is counted wrongly.
    """
    source = draw.generator(seed)
    row = (torch.randn(count, size, generator=source) * 0.3).to(dtype) + by
    wide = row.double() - row.double().amax(-1, keepdim=True)
    low, high = torch.full((count, 1), -1.0).double(), torch.zeros(count, 1).double()
    for _ in range(60):
        middle = (low + high) / 2
        over = (wide - middle).clamp(min=0).sum(-1, keepdim=True) > 1
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    wanted = (wide - low).clamp(min=0)
    agree(s.project(row), wanted, unit(dtype), "project", "max(y - lambda, 0)")
    p, pullback = laws.vjp(s.project, row)
    support, u = (p > 0).to(dtype), draw.probe(row.shape, seed).to(dtype)
    slope = support * (u - (u * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True))
    # far from zero rounded entries do sit on the edge of the support, as a part of it or not
    clear = (wide - low).abs().amin(-1, keepdim=True) > unit(dtype)
    got, slope = (torch.where(clear, x, 0) for x in (pullback(u)[0], slope))
    agree(got, slope, 4 * unit(dtype), "the gradient", "s (u - <u, s> / abs(s))")


def half_rounds_once(s: Subject, seed: int, size: int, by: float, dtype: torch.dtype) -> None:
    """project in bfloat16 or float16 is project in float32 of the same row, within 1e-2.

    The threshold is found in half precision, where its running sum has three digits.
    """
    row = (draw.probe((3, size), seed) + by).to(dtype)
    wanted = s.project(row.float())
    close(s.project(row), wanted, 1e-2, f"project in {dtype}", "project in float32")


Y: dict[str, Any] = {"y": rows}
PAIR: dict[str, Any] = {"y": rows, "dtype": draw.dtypes}
FAR = st.sampled_from([0.0, 1.0, -100.0, 1e6, -1e8])
SHAPES = st.sampled_from([(1,), (3,), (2, 3), (2, 1, 4)])

PROPERTIES = (
    Property(keeps_shape_and_dtype, {"shape": SHAPES, "dtype": draw.all_types}),
    Property(inputs_untouched, PAIR),
    Property(deterministic, {**PAIR, "other": rows}),
    Property(on_the_simplex, {**PAIR, "by": FAR}),
    Property(nearest, {**PAIR, "by": FAR}),
    Property(fixed_points, PAIR),
    Property(shift_invariant, {**PAIR, "by": FAR}),
    Property(entries_permute, {**PAIR, "order": st.permutations(range(5))}),
    Property(monotone, PAIR),
    Property(nonexpansive, {**PAIR, "seed": draw.seeds}),
    Property(rows_stand_alone, {**PAIR, "poke": st.sampled_from([50.0, math.nan, math.inf])}),
    Property(
        minus_infinity_is_deleting,
        {**Y, "kept": st.lists(st.booleans(), min_size=5, max_size=5), "by": FAR},
    ),
    Property(jacobian_of_theory, {**Y, "seed": draw.seeds}),
    Property(forward_meets_reverse, {**Y, "seed": draw.seeds}, "forward_mode"),
    Property(vmap_is_a_loop, PAIR, "vmap"),
    Property(
        large_rows,
        {
            "seed": draw.seeds,
            "count": st.sampled_from([3, 65]),
            "size": st.sampled_from([2, 17, 197, 1000, 4100]),
            "by": FAR,
            "dtype": draw.dtypes,
        },
    ),
    Property(
        half_rounds_once,
        {
            "seed": draw.seeds,
            "size": st.sampled_from([2, 17, 197]),
            "by": st.sampled_from([0.0, 1.0, -100.0]),
            "dtype": draw.half_types,
        },
    ),
)


def suite(
    project: Callable[..., torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    traits: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Suite:
    """Puts a projection of rows onto the probability simplex through its suite.

    Args:
        project: `project(y, dim=-1)`, `(..., M)` to `(..., M)`.
    """
    if not callable(project):
        raise ValueError(
            f"`projection_suite` needs a function of (y, dim=-1), got {project!r:.200}. "
            "Pass one such as `kart.projections.simplex`."
        )
    declared = with_traits("projection", PROPERTIES, laws.TRANSFORMS, traits)
    subject = Subject(project, declared, dtypes_of(dtype))
    named = name or getattr(project, "__name__", type(project).__name__)
    return Suite("projection", named, subject, declared, PROPERTIES)
