"""The derivatives of an operator, and its transforms."""

from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from kart import tree
from kart.testing import draw
from kart.testing.compare import agree, agree_trees
from kart.testing.core import Property
from kart.testing.laws import adjoint, check_line, every_leaf_counts, vjp, vmaps
from kart.testing.operator.subject import (
    KIND,
    MASK,
    PAIR,
    ROW,
    Params,
    Row,
    Subject,
    attend_slack,
    masked_by,
    mild,
)


def gradient_is_right(s: Subject, row: Row, kept: list[bool], mask: str, seed: int) -> None:
    """The derivative of attend along any line is that of its difference quotients, away from kinks,
    masked or not.

    The gradient is not that of the value: a wrong custom backward, or a value computed outside
    autograd.
    """
    # tied scores sit on kinks, where every subgradient is right
    row = row._replace(kind="normal", size=min(max(row.size, 1.0), 5.0), jitter=0.3)
    given = masked_by(row, kept, mask)
    check_line(lambda *x: s.op.attend(*x, given), tuple(s.inputs(row, torch.float64)), seed)


def forward_meets_reverse(s: Subject, row: Row, kept: list[bool], mask: str, seed: int) -> None:
    """<u, J v> = <J^T u, v> for the Jacobian J of attend in (theta, q, k, v).

    Forward and reverse mode disagree, or one is missing: Hessian-vector products fail.
    """
    given = masked_by(row, kept, mask)
    adjoint(lambda *x: s.op.attend(*x, given), tuple(s.inputs(row, torch.float64)), seed, 16.0)


def curvature_is_right(s: Subject, row: Row, kept: list[bool], mask: str, seed: int) -> None:
    """The second derivative of attend along any line is that of difference quotients of the first,
    away from kinks.

    Sharpness and loss landscapes need Hessians; a custom backward is often not differentiable
    itself, or silently constant.
    """
    row = row._replace(kind="normal", size=min(max(row.size, 1.0), 5.0), jitter=0.3)
    given, at = masked_by(row, kept, mask), tuple(s.inputs(row, torch.float64))
    size = s.op.attend(*at, given).detach().abs().max().clamp(min=1)

    def slopes(*x: Any) -> Tensor:
        out, pullback = vjp(lambda *x: s.op.attend(*x, given), *x)
        # not linear in the values, of which the second derivative would be none; of large outputs
        # the cosine itself would turn faster than any step
        return tree.ravel(pullback((out / size).cos()))

    check_line(slopes, at, seed)


def vmap_is_a_loop(s: Subject, row: Row, dtype: torch.dtype) -> None:
    """vmap(attend) over examples and their masks, and over populations of theta, is the loop,
    whichever axis is mapped and within another vmap.

    Per-example gradients and populations of models are vmapped: a rule takes the mapped axis for
    the first, or the mask is looked at.
    """
    x = s.inputs(row, dtype)
    limit = attend_slack(s, x)
    axes = (None, 0, 0, 0)
    wanted = torch.stack([s.op.attend(x.params, *one) for one in zip(*x[1:], strict=True)])
    for how, got in vmaps(s.op.attend, axes, x).items():
        agree(got, wanted, limit, f"vmap{how} over examples", "the loop")
    masks = torch.rand(row.batch, row.keys, generator=draw.generator(row.seed)) > 0.4
    wanted = torch.stack([s.op.attend(x.params, *one) for one in zip(*x[1:], masks, strict=True)])
    limits = attend_slack(s, x, masks[:, None, None])
    for how, got in vmaps(s.op.attend, (*axes, 0), (*x, masks)).items():
        agree(got, wanted, limits, f"vmap{how} over examples and masks", "the loop")
    if not x.params:
        return
    others = s.inputs(row._replace(seed=row.seed + 1), dtype).params
    members = (tree.stack([x.params, others]), *x[1:])
    loop = torch.stack([s.op.attend(p, *x[1:]) for p in (x.params, others)])
    both = torch.stack([limit, attend_slack(s, x._replace(params=others))])
    for how, got in vmaps(s.op.attend, (0, None, None, None), members).items():
        agree(got, loop, both, f"vmap{how} over a population", "the loop")


def per_example_gradients(s: Subject, row: Row) -> None:
    """vmap(grad(f)) over examples = grad(f) of each, and they sum to grad of the sum.

    Examples mix in the backward.
    """
    x = s.inputs(mild(row), torch.float64)
    if not x.params:
        return

    def loss(params: Params, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s.op.attend(params, q, k, v).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0))(*x)
    single = tree.stack([grad(loss)(x.params, *one) for one in zip(*x[1:], strict=True)])
    agree_trees(each, single, 64, "the mapped gradient of", "the loop's")
    summed = tree.map(lambda leaf: leaf.sum(0), each)
    agree_trees(summed, grad(loss)(*x), 64, "the sum of gradients of", "the whole")


def every_parameter_counts(s: Subject, seed: int) -> None:
    """d attend / d theta is not zero for any leaf theta, once training has moved it.

    A parameter is drawn, counted and saved, but not used.
    """
    x = s.inputs(Row(seed, 2, s.heads or 2, 5, 5, 4, jitter=0.3), torch.float64)
    every_leaf_counts(lambda params: s.op.attend(params, *x[1:]), x.params, seed)


MASKED: dict[str, Any] = {**ROW, "kept": MASK, "mask": KIND, "seed": draw.seeds}

PROPERTIES = (
    Property(gradient_is_right, MASKED),
    Property(forward_meets_reverse, MASKED, "forward_mode"),
    Property(curvature_is_right, MASKED, "second_derivative"),
    Property(vmap_is_a_loop, PAIR, "vmap"),
    Property(per_example_gradients, ROW, "vmap"),
    Property(every_parameter_counts, {"seed": draw.seeds}),
)
