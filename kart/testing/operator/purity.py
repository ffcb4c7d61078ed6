"""What an operator may do to others: nothing. Shapes, dtypes, seeds and state."""

import torch

from kart import tree
from kart.testing import draw, laws
from kart.testing.compare import agree, agree_trees, same
from kart.testing.core import Property
from kart.testing.operator.subject import (
    PAIR,
    ROW,
    Row,
    Subject,
    attend_slack,
    mild,
    rows,
    scores_of,
)


def keeps_shape_and_dtype(s: Subject, row: Row, dtype: torch.dtype) -> None:
    """attend maps q (.., H, N, d), k (.., H, M, d), v (.., H, M, e) to (.., H, N, e), and weights
    maps (.., H, N, M) to itself, in the dtype of q and with any leading axes.

    Shapes or dtypes that change on the way break models under mixed precision or with more axes.
    """
    x = s.inputs(row, torch.float32)
    q, k, v = (t.to(dtype) for t in x[1:])
    for lead in (slice(None), 0):
        out = s.op.attend(x.params, q[lead], k[lead], v[lead])
        shape = (*q[lead].shape[:-1], v.shape[-1])
        if out.shape != shape or out.dtype != dtype:
            raise AssertionError(
                f"attend gives {out.dtype} of shape {tuple(out.shape)} for q of {dtype} and shape "
                f"{tuple(q[lead].shape)}, v of shape {tuple(v[lead].shape)}"
            )
        scores = scores_of(q[lead], k[lead])
        weights = s.op.weights(x.params, scores)
        if weights.shape != scores.shape or weights.dtype != dtype:
            raise AssertionError(
                f"weights gives {weights.dtype} of shape {tuple(weights.shape)} for scores of "
                f"{dtype} and shape {tuple(scores.shape)}"
            )


def init_follows_its_generator(s: Subject, row: Row) -> None:
    """init(generator, H, M) is a function of the generator: finite float32 with a leading axis H.

    Parameters that come from elsewhere make runs that cannot be repeated; leaves without the axis
    of heads cannot be stacked.
    """
    laws.follows_its_generator(
        lambda generator: s.op.init(generator, row.heads, row.keys),
        row.seed,
        # the parts of a hybrid have the axis of their own heads
        lambda leaf: bool(leaf.dim()) and (s.heads is not None or leaf.shape[0] == row.heads),
        f" led by H = {row.heads}",
    )


def inputs_untouched(s: Subject, row: Row, dtype: torch.dtype) -> None:
    """attend, weights and their gradients write to none of theta, q, k, v, scores and mask.

    In-place changes reach whoever else holds the tensor.
    """
    x = s.inputs(row, dtype)
    scores = scores_of(x.q, x.k)
    hidden = torch.arange(row.queries)[:, None] % 2 == torch.arange(row.keys) % 2
    with laws.untouched(**x._asdict(), scores=scores, mask=hidden):
        out, pullback = laws.vjp(s.op.attend, *x)
        pullback(torch.ones_like(out))
        # plain as well: what nobody differentiates is where writing in place pays
        for mask in (None, hidden):
            s.op.attend(*x, mask)
            s.op.weights(x.params, scores, mask)


def global_state_untouched(s: Subject) -> None:
    """init, attend and weights leave generators, default dtype, threads and modes as they were.

    What one function changes for everybody makes the results of others depend on whether it ran.
    """
    with laws.world_untouched():
        x = s.inputs(Row(0, 1, s.heads or 2, 3, 4, 2), torch.float32)
        s.op.attend(*x)
        s.op.weights(x.params, scores_of(x.q, x.k))


def deterministic(s: Subject, row: Row, other: Row, dtype: torch.dtype) -> None:
    """attend(theta, q, k, v) is the same bit for bit whenever it is asked, and follows what is
    written into its arguments.

    A hidden state (a cache, a buffer that is used again) or the global seed makes the same input
    give another output.
    """
    x = s.inputs(row, dtype)
    first = s.op.attend(*x)
    between = s.inputs(other, dtype)
    # loud, so that it changes whatever is kept of the largest seen
    s.op.attend(between.params, *(1e3 * t for t in between[1:]))
    with laws.another_seed(row.seed + 11), torch.no_grad():
        again = s.op.attend(*x)
    same(again, first, "attend asked again", "attend")
    with torch.no_grad():
        moved = tree.map(lambda leaf: leaf * 0.5 + 0.25, tuple(x))
        laws.keeps_nothing(s.op.attend, tuple(x), moved)


def layout_does_not_matter(s: Subject, row: Row, dtype: torch.dtype) -> None:
    """attend, weights and their gradients see numbers, not strides: views that are transposed,
    strided or of one projection q, k, v count as their copies, and so do gradients handed to the
    backward.

    A `.view` or a raw pointer assumes contiguous memory. (Models give (B, N, H, d) transposed, and
    `out.sum()` an expanded gradient.)
    """
    x = s.inputs(mild(row), dtype)
    wanted, limit = s.op.attend(*x), attend_slack(s, x)
    views = {
        "transposed": laws.transposed,
        "with heads inside": lambda t: (
            t.transpose(-3, -2).contiguous().transpose(-3, -2) if t.dim() > 2 else t
        ),
        "strided": laws.strided,
    }
    scores = scores_of(x.q, x.k)
    for name, view in views.items():
        got = s.op.attend(*tree.map(view, tuple(x)))
        agree(got, wanted, limit, f"attend of {name} views", "of their copies")
        looked = s.op.weights(tree.map(view, x.params), view(scores))
        agree_trees(
            looked, s.op.weights(x.params, scores), 64, f"weights of {name} views", "of copies"
        )
    laws.any_cotangent(s.op.attend, *x)


PROPERTIES = (
    Property(keeps_shape_and_dtype, {**ROW, "dtype": draw.all_types}),
    Property(init_follows_its_generator, ROW),
    Property(inputs_untouched, PAIR),
    Property(global_state_untouched),
    Property(deterministic, {**PAIR, "other": rows}),
    Property(layout_does_not_matter, PAIR),
)
