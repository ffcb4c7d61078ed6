"""What a basis may do to others: nothing. Shapes, dtypes, strides, seeds and state."""

import math

import torch
from hypothesis import strategies as st

from kart import tree
from kart.testing import draw, laws
from kart.testing.basis.subject import PAIR, Subject, near, phi_slack, rows, setting
from kart.testing.compare import agree, same, unit
from kart.testing.core import Property
from kart.testing.draw import Theta


def keeps_shape_and_dtype(
    s: Subject,
    shape: tuple[int, ...],
    x_shape: tuple[int, ...],
    dtype: torch.dtype,
    params_dtype: torch.dtype,
) -> None:
    """phi(x; theta) has the dtype of x and the shape that x and the functions broadcast to.

    Shapes or dtypes that change on the way break attention under mixed precision, or broadcast
    silently into something larger.
    """
    params = s.params(Theta(0, 0.0), shape, params_dtype)
    x = torch.linspace(-1, 1, math.prod(x_shape)).reshape(x_shape).to(dtype)
    y = s.basis.apply(params, x)
    expected = torch.broadcast_shapes(shape, x_shape)
    if y.shape != expected or y.dtype != dtype:
        raise AssertionError(
            f"phi(x; theta) is {y.dtype} of shape {tuple(y.shape)} for x of {dtype}, "
            f"{tuple(x_shape)}, and functions {tuple(shape)}: wanted {tuple(expected)}"
        )
    features = s.basis.expand(x)
    if features is not None and (features.shape[:-1] != x.shape or features.dtype != dtype):
        raise AssertionError(
            f"expand(x) is {features.dtype} of shape {tuple(features.shape)} for x of {dtype}, "
            f"{tuple(x_shape)}: wanted (*x.shape, K) in the dtype of x"
        )


def init_follows_its_generator(s: Subject, seed: int, shape: tuple[int, ...]) -> None:
    """init(generator, shape) is a function of the generator: finite float32, led by `shape`.

    Parameters that come from elsewhere (the global seed, a cache) make runs that cannot be
    repeated; leaves without the leading axes cannot be stacked into heads.
    """
    laws.follows_its_generator(
        lambda generator: s.basis.init(generator, shape),
        seed,
        lambda leaf: leaf.shape[: len(shape)] == shape,
        f" with leading axes {shape}",
    )


def layout_does_not_matter(s: Subject, theta: Theta, x: list[float], dtype: torch.dtype) -> None:
    """phi and its gradient see numbers, not strides: views that are transposed, flipped, strided or
    expanded count as their copies, as x and as the gradient handed to the backward.

    A `.view`, a raw pointer or an in-place write assumes contiguous memory. (`y.sum()` hands an
    expanded gradient to the backward.)
    """
    n = len(x)
    values = torch.tensor(x, dtype=dtype)
    table = torch.stack([values, values.flip(0)])
    params = s.params(theta, (n,), dtype)
    views = {
        "transposed": laws.transposed(table),
        "strided": laws.strided(table),
        "flipped": table.flip(0).flip(0),
        "expanded": values.expand(3, n),
    }
    for name, view in views.items():
        plain = view.contiguous().clone()
        count = len(view)
        rows_of = tree.map(lambda p, count=count: p.expand(count, *p.shape), params)
        tolerance = phi_slack(s, rows_of, plain)
        got, wanted = s.basis.apply(params, view), s.basis.apply(params, plain)
        agree(got, wanted, tolerance, f"phi of the {name} view", "phi of its copy")
    laws.any_cotangent(s.basis.apply, params, table)


def inputs_untouched(s: Subject, theta: Theta, x: list[float], dtype: torch.dtype) -> None:
    """apply, expand and their gradients write to neither x nor theta.

    In-place changes reach whoever else holds the tensor: scores before the activation, parameters
    of the last step.
    """
    params, values = setting(s, theta, x, dtype)
    with laws.untouched(theta=params, x=values):
        s.basis.apply(params, values)
        s.basis.expand(values)
        laws.vjp(s.basis.apply, params, values)[1](torch.ones_like(values))


def global_state_untouched(s: Subject) -> None:
    """init, apply and expand leave generators, default dtype, threads and modes as they were.

    What one function changes for everybody makes the results of others depend on whether it ran.
    """
    with laws.world_untouched():
        params = s.params(Theta(0, 0.0), (3,), torch.float32)
        x = torch.linspace(-1, 1, 3)
        s.basis.apply(params, x)
        s.basis.expand(x)


def deterministic(
    s: Subject, theta: Theta, x: list[float], other: list[float], dtype: torch.dtype
) -> None:
    """phi(x; theta) is the same bit for bit whenever and wherever it is asked, and follows what is
    written into x and theta.

    A hidden state (a cache, a running statistic, a buffer that is used again, the global seed)
    makes the same input give another output.
    """
    params, values = setting(s, theta, x, dtype)
    first = s.basis.apply(params, values)
    s.basis.apply(s.params(Theta(1, 1.0), (len(other),), dtype), torch.tensor(other, dtype=dtype))
    with laws.another_seed(theta.seed + 11), torch.no_grad():
        again = s.basis.apply(params, values)
    same(again, first, "phi(x) asked again", "phi(x)")
    with torch.no_grad():
        moved = tree.map(lambda leaf: leaf * 0.5 + 0.25, (params, values))
        laws.keeps_nothing(s.basis.apply, (params, values), moved)


def compiles(s: Subject) -> None:
    """torch.compile(phi, fullgraph=True) = phi, in value and in gradient.

    A branch on values, a side effect or a call out of torch breaks the graph, or is traced once and
    frozen. (Traced and differentiated by aot_eager; no C++ compiler is needed.)
    """
    params = s.params(Theta(0, 0.0), (5,), torch.float32)
    x = torch.tensor([[-1.5, -0.2, 0.0, 0.3, 2.0], [0.1, 0.2, -0.4, 1.0, -3.0]])
    results = []
    torch.compiler.reset()
    compiled = torch.compile(s.basis.apply, backend="aot_eager", fullgraph=True)
    for apply in (compiled, s.basis.apply):
        leaf = x.clone().requires_grad_()
        y = apply(params, leaf)
        grads = torch.autograd.grad(y.sum(), leaf, allow_unused=True) if y.requires_grad else [None]
        results.append((y, *grads))
    torch.compiler.reset()
    pairs = tree.map(lambda p: p.expand(2, *p.shape), params)
    agree(results[0][0], results[1][0], phi_slack(s, pairs, x), "compiled phi", "phi")
    got, wanted = (result[1] for result in results)
    if (got is None) != (wanted is None):
        names = ("phi", "compiled phi") if wanted is None else ("compiled phi", "phi")
        raise AssertionError(f"{names[0]} has no gradient in x where {names[1]} has one")
    if got is not None:
        limit = unit(torch.float32) * (wanted.abs() + 1)
        agree(got, wanted, limit, "the gradient of compiled phi", "that of phi")


SHAPES = st.sampled_from([(), (3,), (2, 3), (2, 1)])
X_SHAPES = st.sampled_from([(), (1,), (3,), (4, 1, 3), (0, 1, 3), (2, 3)])

PROPERTIES = (
    Property(
        keeps_shape_and_dtype,
        {
            "shape": SHAPES,
            "x_shape": X_SHAPES,
            "dtype": draw.all_types,
            "params_dtype": st.sampled_from([torch.float32, torch.float64]),
        },
    ),
    Property(init_follows_its_generator, {"seed": draw.seeds, "shape": SHAPES}),
    Property(layout_does_not_matter, PAIR),
    Property(inputs_untouched, PAIR),
    Property(global_state_untouched),
    Property(deterministic, {**PAIR, "other": rows(near)}),
    Property(compiles, {}, "compiles"),
)
