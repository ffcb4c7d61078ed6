"""The derivatives of an operator, and its transforms."""

import torch
from torch import Tensor
from torch.func import grad, vmap

from kart import tree
from kart.testing import draw
from kart.testing.compare import agree, agree_trees
from kart.testing.core import Property
from kart.testing.laws import adjoint, check_line
from kart.testing.operator.subject import PAIR, ROW, Params, Row, Subject, attend_slack, mild


def gradient_is_right(s: Subject, row: Row, seed: int) -> None:
    """The derivative of attend along any line is that of its difference quotients, away from kinks.

    The gradient is not that of the value: a wrong custom backward, or a value computed outside
    autograd.
    """
    # tied scores sit on kinks, where every subgradient is right
    row = row._replace(kind="normal", size=min(max(row.size, 1.0), 5.0), jitter=0.3)
    check_line(s.op.attend, tuple(s.inputs(row, torch.float64)), seed)


def forward_meets_reverse(s: Subject, row: Row, seed: int) -> None:
    """<u, J v> = <J^T u, v> for the Jacobian J of attend in (theta, q, k, v).

    Forward and reverse mode disagree, or one is missing: Hessian-vector products fail.
    """
    adjoint(s.op.attend, tuple(s.inputs(row, torch.float64)), seed, 16.0)


def vmap_is_a_loop(s: Subject, row: Row, dtype: torch.dtype) -> None:
    """vmap(attend) over examples and over populations of theta is the loop.

    Per-example gradients and populations of models are vmapped.
    """
    x = s.inputs(row, dtype)
    limit = attend_slack(s, x)
    mapped = vmap(s.op.attend, in_dims=(None, 0, 0, 0))(*x)
    wanted = torch.stack([s.op.attend(x.params, *one) for one in zip(*x[1:], strict=True)])
    agree(mapped, wanted, limit, "vmap over examples", "the loop")
    if not x.params:
        return
    others = s.inputs(row._replace(seed=row.seed + 1), dtype).params
    stacked = vmap(s.op.attend, in_dims=(0, None, None, None))(
        tree.stack([x.params, others]), *x[1:]
    )
    loop = torch.stack([s.op.attend(p, *x[1:]) for p in (x.params, others)])
    both = torch.stack([limit, attend_slack(s, x._replace(params=others))])
    agree(stacked, loop, both, "vmap over a population", "the loop")


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


PROPERTIES = (
    Property(gradient_is_right, {**ROW, "seed": draw.seeds}),
    Property(forward_meets_reverse, {**ROW, "seed": draw.seeds}, "forward_mode"),
    Property(vmap_is_a_loop, PAIR, "vmap"),
    Property(per_example_gradients, ROW, "vmap"),
)
