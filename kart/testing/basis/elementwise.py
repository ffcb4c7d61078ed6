"""A basis is elementwise: every number meets its own parameters, and no other number."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from kart import tree
from kart.testing import draw, laws
from kart.testing.basis.subject import PAIR, Params, Subject, finite, near, phi_slack, rows, setting
from kart.testing.compare import agree, agree_trees
from kart.testing.core import Property
from kart.testing.draw import Theta


def elementwise(s: Subject, theta: Theta, x: list[float], other: float, dtype: torch.dtype) -> None:
    """phi(x)[0] depends on x[0] alone.

    A sum, a maximum or a normalisation over elements has leaked in: results change with the batch,
    and one bad score spoils a whole row.
    """
    params, values = setting(s, theta, x, dtype)
    poked = torch.full_like(values, other)
    poked[0] = values[0]
    tolerance = phi_slack(s, params, values)[0]
    got = s.basis.apply(params, poked)[0]
    agree(got, s.basis.apply(params, values)[0], tolerance, "phi(x)[0] among others", "phi(x)[0]")
    one, features = s.basis.expand(values[:1]), s.basis.expand(poked)
    if features is not None:
        agree(features[0], one[0], s.slack(values[:1])[0], "expand(x)[0] among others", "alone")


def large_as_small(
    s: Subject, seed: int, rows: int, size: int, cut: int, pokes: list[float], dtype: torch.dtype
) -> None:
    """phi of a large tensor is phi of its pieces, put together, and so are its features and its
    derivatives in x and theta.

    Vectorised and leftover elements, or blocks and the last block, are treated differently.
    """
    source = draw.generator(seed)
    count = rows * size
    x = torch.randn(count, generator=source, dtype=torch.float64).float().to(dtype) * 3
    # off the points where something happens
    params, clear = s.params(Theta(seed, 0.0), (), torch.float64), x.double()

    def slopes(values: Tensor) -> tuple[Params, Tensor]:
        return laws.vjp(s.basis.apply, params, values)[1](values.cos())

    (first, here), (second, there) = slopes(clear[:cut]), slopes(clear[cut:])
    pieces = tree.map(torch.add, first, second), torch.cat([here, there]).view(rows, size)
    got = slopes(clear.view(rows, size))
    agree_trees(got, pieces, 64, "the derivatives of the whole,", "of the pieces,")
    where = torch.randint(0, count, (len(pokes),), generator=source)
    x[where] = torch.tensor(pokes, dtype=dtype)
    params = s.params(Theta(seed, 0.0), (), dtype)
    parts = torch.cat([s.basis.apply(params, part) for part in (x[:cut], x[cut:])])
    whole = s.basis.apply(params, x.view(rows, size)).flatten()
    spread = tree.map(lambda leaf: leaf.expand(count, *leaf.shape), params)
    agree(whole, parts, phi_slack(s, spread, x), "phi of the whole", "phi of the pieces")
    features = s.basis.expand(x.view(rows, size))
    if features is not None:
        parts = torch.cat([s.basis.expand(part) for part in (x[:cut], x[cut:])])
        agree(features.flatten(0, 1), parts, s.slack(x), "features of the whole", "of the pieces")


def nan_stays_nan(s: Subject, theta: Theta, dtype: torch.dtype) -> None:
    """phi(NaN) is NaN, unless phi is constant.

    A NaN score that turns into a number hides that training has diverged.
    """
    params = s.params(theta, (), dtype)
    x = torch.tensor([math.nan, -1.0, -0.3, 0.0, 0.4, 1.0, 2.2], dtype=dtype)
    y = s.basis.apply(params, x)
    if not bool(y[0].isnan()) and bool((y[1:] != y[1]).any()):
        raise AssertionError(f"phi(nan) is {float(y[0]):g}, and phi is not constant")


def units_permute(
    s: Subject, theta: Theta, x: list[float], order: list[int], dtype: torch.dtype
) -> None:
    """phi(P x; P theta) = P phi(x; theta) for permutations P of the units.

    Where a unit stands must not matter: a position-dependent factor hides in the axes.
    """
    params, values = setting(s, theta, x, dtype)
    index = torch.tensor([i for i in order if i < len(x)])
    moved = s.basis.apply(tree.map(lambda leaf: leaf[index], params), values[index])
    wanted = s.basis.apply(params, values)[index]
    agree(moved, wanted, phi_slack(s, params, values)[index], "phi(P x; P theta)", "P phi(x)")


def units_stand_alone(s: Subject, theta: Theta, x: list[float], dtype: torch.dtype) -> None:
    """phi(x; theta)[p, i] = phi(x[i]; theta[p, i]): every unit uses its own parameters, under any
    leading axes of x.

    Parameters are paired with the wrong units when they broadcast against x, or leading axes are
    flattened in one order and restored in another.
    """
    n = len(x)
    values = torch.tensor(x, dtype=dtype)
    params = s.params(theta, (2, n), dtype)
    whole = s.basis.apply(params, values)
    for p in range(2):
        for i in range(n):
            own = tree.map(lambda leaf, p=p, i=i: leaf[p, i], params)
            limit = phi_slack(s, own, values[i])
            agree(whole[p, i], s.basis.apply(own, values[i]), limit, f"unit {p, i}", "alone")
    more = s.basis.apply(tree.map(lambda leaf: leaf[:, None], params), values)[:, 0]
    limit = phi_slack(s, params, values.expand(2, n))
    agree(more, whole, limit, "units of three axes", "of two")
    one = s.params(theta, (), dtype)
    for lead in ((2, 2), (1, 3)):
        pieces = [values * (1 - 0.3 * j) for j in range(math.prod(lead))]
        stacked = torch.stack(pieces).unflatten(0, lead)
        # units of their own under the leading axes, and one that all share
        cases = ((params, stacked[:, :, None], (2, n)), (one, stacked, (n,)))
        for theirs, given, shape in cases:
            got = s.basis.apply(theirs, given).flatten(0, 1)
            for j, piece in enumerate(pieces):
                wanted = s.basis.apply(theirs, piece)
                each = params if len(shape) > 1 else tree.map(lambda p: p.expand(n, *p.shape), one)
                limit = phi_slack(s, each, piece.expand(shape))
                agree(got[j], wanted, limit, f"phi under leading axes {lead}", "phi alone")


def vmap_is_a_loop(s: Subject, theta: Theta, x: list[float], dtype: torch.dtype) -> None:
    """vmap(phi) over parameters, over x and over both is the loop, whichever axis is mapped and
    within another vmap.

    Populations of models and per-example gradients are vmapped: an operation without a rule for
    batches, one whose rule takes the mapped axis for the first, or one that looks at values, breaks
    them.
    """
    n = len(x)
    values = torch.tensor([x, x[::-1], [0.25] * n], dtype=dtype)
    members = s.params(theta, (3, n), dtype)
    member = [tree.map(lambda leaf, i=i: leaf[i], members) for i in range(3)]
    apply = s.basis.apply
    cases = {
        "parameters": ((0, None), (members, values[0]), [(m, values[0]) for m in member]),
        "x": ((None, 0), (member[0], values), [(member[0], v) for v in values]),
        "both": ((0, 0), (members, values), list(zip(member, values, strict=True))),
    }
    for name, (axes, stacked, single) in cases.items():
        wanted = torch.stack([apply(*one) for one in single])
        limit = torch.stack([phi_slack(s, *one) for one in single])
        for how, got in laws.vmaps(apply, axes, stacked).items():
            agree(got, wanted, limit, f"vmap{how} over {name}", "the loop")


PROPERTIES = (
    Property(
        elementwise,
        {**PAIR, "x": rows(near, 2), "other": lambda s: st.one_of(finite(s), st.just(math.nan))},
    ),
    Property(
        large_as_small,
        {
            "seed": draw.seeds,
            "rows": st.sampled_from([1, 5]),
            "size": st.sampled_from([17, 130, 1023]),
            "cut": st.integers(0, 16),
            "pokes": rows(near, 0),
            "dtype": draw.dtypes,
        },
    ),
    Property(nan_stays_nan, {"theta": draw.thetas, "dtype": draw.dtypes}),
    Property(units_permute, {**PAIR, "x": rows(near, 2), "order": st.permutations(range(4))}),
    Property(units_stand_alone, {**PAIR, "x": rows(near, 1, 3)}),
    Property(vmap_is_a_loop, PAIR, "vmap"),
)
