"""Properties of a basis: those of everyone, and those its traits declare."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.func import grad, vmap

from kart import bases, tree
from kart.testing import draw
from kart.testing.core import Property, show
from kart.testing.draw import Theta, agree, any_finite, jvp, reals, same, slack, unit, vjp

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
    """Any number, or one beside a declared point."""
    return reals(s.points)


def knots(s: Subject) -> SearchStrategy[float]:
    """The declared points themselves, which float32 may not hold, and any number."""
    return st.one_of(st.sampled_from(list(s.points) or [0.0]), near(s))


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


def setting(
    s: Subject, theta: Theta, x: Sequence[float], dtype: torch.dtype
) -> tuple[Params, Tensor]:
    """Parameters of one function an element of `x`, and `x` as a tensor."""
    return s.params(theta, (len(x),), dtype), torch.tensor(x, dtype=dtype)


# --- everyone -------------------------------------------------------------------------------------


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
    first = s.basis.init(draw.generator(seed), shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 7)
        again = s.basis.init(draw.generator(seed), shape)
    for name, leaf in tree.named(first).items():
        if leaf.dtype != torch.float32 or leaf.shape[: len(shape)] != shape:
            raise AssertionError(
                f"{name} is {leaf.dtype} of shape {tuple(leaf.shape)}: wanted float32 with "
                f"leading axes {shape}"
            )
        if not bool(leaf.isfinite().all()):
            raise AssertionError(f"{name} has entries that are not finite")
        same(tree.named(again)[name], leaf, f"{name} of a second init", "that of the first")


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
    s: Subject, seed: int, size: int, cut: int, pokes: list[float], dtype: torch.dtype
) -> None:
    """phi of a large tensor is phi of its pieces, put together.

    Vectorised and leftover elements, or blocks and the last block, are treated differently.
    """
    source = draw.generator(seed)
    x = torch.randn(size, generator=source, dtype=torch.float64).float().to(dtype) * 3
    where = torch.randint(0, size, (len(pokes),), generator=source)
    x[where] = torch.tensor(pokes, dtype=dtype)
    params = s.params(Theta(seed, 0.0), (), dtype)
    parts = torch.cat([s.basis.apply(params, part) for part in (x[:cut], x[cut:])])
    whole = s.basis.apply(params, x)
    spread = tree.map(lambda leaf: leaf.expand(size, *leaf.shape), params)
    agree(whole, parts, phi_slack(s, spread, x), "phi of the whole", "phi of the pieces")


def layout_does_not_matter(s: Subject, theta: Theta, x: list[float], dtype: torch.dtype) -> None:
    """phi sees numbers, not strides: views that are transposed, flipped, strided or expanded count
    as their copies.

    A `.view`, a raw pointer or an in-place write assumes contiguous memory.
    """
    n = len(x)
    values = torch.tensor(x, dtype=dtype)
    table = torch.stack([values, values.flip(0)])
    params = s.params(theta, (n,), dtype)
    views = {
        "transposed": table.mT.contiguous().mT,
        "strided": table.repeat_interleave(2, -1)[:, ::2],
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


def inputs_untouched(s: Subject, theta: Theta, x: list[float], dtype: torch.dtype) -> None:
    """apply, expand and their gradients write to neither x nor theta.

    In-place changes reach whoever else holds the tensor: scores before the activation, parameters
    of the last step.
    """
    params, values = setting(s, theta, x, dtype)
    before = tree.map(torch.clone, {"theta": params, "x": values})
    s.basis.apply(params, values)
    s.basis.expand(values)
    vjp(s.basis.apply, params, values)[1](torch.ones_like(values))
    for name, leaf in tree.named({"theta": params, "x": values}).items():
        same(leaf, tree.named(before)[name], f"{name} afterwards", f"{name} before")


def global_state() -> dict[str, Any]:
    """What no function may change."""
    return {
        "torch's global generator": torch.get_rng_state().tolist(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's grad mode": torch.is_grad_enabled(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "torch's float32 precision": torch.get_float32_matmul_precision(),
        "numpy's global generator": str(numpy.random.get_state()),
        "python's global generator": random.getstate(),
    }


def restore(state: dict[str, Any]) -> None:
    """Puts back what was changed, or every check after this one would fail for it."""
    torch.set_default_dtype(state["torch's default dtype"])
    torch.set_rng_state(torch.tensor(state["torch's global generator"], dtype=torch.uint8))
    torch.set_num_threads(state["torch's number of threads"])
    torch.set_grad_enabled(state["torch's grad mode"])
    torch.use_deterministic_algorithms(state["torch's deterministic mode"])
    torch.set_float32_matmul_precision(state["torch's float32 precision"])
    random.setstate(state["python's global generator"])


def show_changes(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Asserts that nothing global changed."""
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        raise AssertionError(f"{', '.join(changed)} changed")


def global_state_untouched(s: Subject) -> None:
    """init, apply and expand leave generators, default dtype, threads and modes as they were.

    What one function changes for everybody makes the results of others depend on whether it ran.
    """
    before = global_state()
    params = s.params(Theta(0, 0.0), (3,), torch.float32)
    x = torch.linspace(-1, 1, 3)
    s.basis.apply(params, x)
    s.basis.expand(x)
    after = global_state()
    restore(before)
    show_changes(before, after)


def deterministic(
    s: Subject, theta: Theta, x: list[float], other: list[float], dtype: torch.dtype
) -> None:
    """phi(x; theta) is the same bit for bit whenever and wherever it is asked.

    A hidden state (a cache, a running statistic, the global seed) makes the same input give another
    output.
    """
    params, values = setting(s, theta, x, dtype)
    first = s.basis.apply(params, values)
    s.basis.apply(s.params(Theta(1, 1.0), (len(other),), dtype), torch.tensor(other, dtype=dtype))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(theta.seed + 11)
        again = s.basis.apply(params, values)
    same(again, first, "phi(x) asked again", "phi(x)")


def finite_with_derivatives(s: Subject, theta: Theta, x: list[float]) -> None:
    """phi, phi', phi'' and d phi / d theta are finite in float32 for abs(x) <= `finite`, 100 where
    it is not declared.

    An overflow, a pole, 0/0 or sqrt at zero: one such score ends a training run. A NaN in a
    derivative alone is mostly `torch.where` around a division.
    """
    params, values = setting(s, theta, x, torch.float32)

    def total(params: Params, values: Tensor) -> Tensor:
        return s.basis.apply(params, values).sum()

    def slope(values: Tensor) -> Tensor:
        return grad(total, 1)(params, values).sum()

    first = grad(total, (0, 1))(params, values)
    found = {"phi(x)": s.basis.apply(params, values), "phi'(x)": first[1]}
    found |= {"phi''(x)": grad(slope)(values)}
    found |= {f"d phi / d {name}": leaf for name, leaf in tree.named(first[0]).items()}
    for name, leaf in found.items():
        if not bool(leaf.isfinite().all()):
            raise AssertionError(f"{name} is {show(leaf)}")


def nan_stays_nan(s: Subject, theta: Theta, dtype: torch.dtype) -> None:
    """phi(NaN) is NaN, unless phi is constant.

    A NaN score that turns into a number hides that training has diverged.
    """
    params = s.params(theta, (), dtype)
    x = torch.tensor([math.nan, -1.0, -0.3, 0.0, 0.4, 1.0, 2.2], dtype=dtype)
    y = s.basis.apply(params, x)
    if not bool(y[0].isnan()) and bool((y[1:] != y[1]).any()):
        raise AssertionError(f"phi(nan) is {float(y[0]):g}, and phi is not constant")


def vmap_is_a_loop(s: Subject, theta: Theta, x: list[float], dtype: torch.dtype) -> None:
    """vmap(phi) over parameters, over x and over both is the loop.

    Populations of models and per-example gradients are vmapped: an operation without a rule for
    batches, or one that looks at values, breaks them.
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
        got = vmap(apply, in_dims=axes)(*stacked)
        wanted = torch.stack([apply(*one) for one in single])
        limit = torch.stack([phi_slack(s, *one) for one in single])
        agree(got, wanted, limit, f"vmap over {name}", "the loop")


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
    """phi(x; theta)[p, i] = phi(x[i]; theta[p, i]): every unit uses its own parameters.

    Parameters are paired with the wrong units when they broadcast against x.
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


def forward_meets_reverse(s: Subject, theta: Theta, x: list[float], seed: int) -> None:
    """<u, J v> = <J^T u, v> for the Jacobian J of phi in (theta, x).

    Forward and reverse mode disagree: a custom derivative is wrong in one of them, or missing.
    """
    params, values = setting(s, theta, x, torch.float64)
    source = draw.generator(seed)

    def like(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, generator=source, dtype=torch.float64)

    tangents = (tree.map(like, params), like(values))
    y, forward = jvp(s.basis.apply, (params, values), tangents)
    u = like(y)
    reverse = vjp(s.basis.apply, params, values)[1](u)
    terms = tree.map(lambda a, b: a * b, reverse, tangents)
    right = torch.stack([t.sum() for t in tree.leaves(terms)]).sum()
    size = sum(t.abs().sum() for t in tree.leaves(terms)) + (u * forward).abs().sum()
    limit = unit(torch.float64) * (size + 1e-30)
    agree((u * forward).sum(), right, limit, "<u, J v>", "<J^T u, v>")


def _one_sided(f: Callable[[Tensor], Tensor], x: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest value that the derivative of elementwise `f` at `x` may have: its
    one-sided difference quotients, of second order, and their errors.
    """
    eps = torch.finfo(x.dtype).eps
    h = (x.abs() + reach) * eps ** (1 / 3)
    steps = [0, 0.5, 1, 2, -0.5, -1, -2]
    fixed = [0.0, -0.5, 0.5, -1.0, 1.0]
    places = [x + step * h for step in steps] + [torch.full_like(x, place) for place in fixed]
    values = f(torch.stack(places))
    here, *sides = values[:7]
    size = values.abs().max()  # rounding inside f is of this size, not of that of f(x)
    low, high = [], []
    for side, (half, whole, twice) in ((h, sides[:3]), (-h, sides[3:])):
        coarse = (-3 * here + 4 * whole - twice) / (2 * side)
        fine = (-3 * here + 4 * half - whole) / side
        noise = 64 * eps * (size + (x.abs() + reach) * fine.abs())
        error = 2 * (coarse - fine).abs() + noise / h
        low.append(fine - error)
        high.append(fine + error)
    return torch.minimum(*low), torch.maximum(*high)


def _clear(s: Subject, x: Tensor) -> Tensor:
    """`x`, moved off places where the function may have a kink, unless it is declared smooth."""
    if s.traits.get("smooth", 0) >= 2:
        return x
    kinks = torch.tensor([*draw.SIMPLE, *s.points], dtype=x.dtype)
    distance = (x[:, None] - kinks).abs().amin(-1)
    return torch.where(distance < 1e-3 * s.reach, x + 0.0137 * s.reach, x)


def check_slope(f: Callable[[Tensor], Tensor], x: Tensor, reach: float, name: str) -> None:
    """Asserts that elementwise `f` has at `x` the derivative that its values have."""
    y, pullback = vjp(f, x)
    (slope,) = pullback(torch.ones_like(y))
    low, high = _one_sided(f, x, reach)
    middle, width = (low + high) / 2, (high - low) / 2
    agree(slope, middle, width, f"{name} by autograd", "its difference quotient")


def gradient_is_right(s: Subject, theta: Theta, x: list[float]) -> None:
    """phi'(x) by autograd lies between the two one-sided difference quotients, away from kinks.

    The gradient is not that of the value: a wrong custom backward, or a value computed outside
    autograd (`.detach()`, numpy, rounding).
    """
    params, values = setting(s, theta, x, torch.float64)
    values = _clear(s, values)
    check_slope(lambda x: s.basis.apply(params, x), values, s.reach, "phi'(x)")


def curvature_is_right(s: Subject, theta: Theta, x: list[float]) -> None:
    """phi''(x) by autograd lies between the one-sided difference quotients of phi', away from
    kinks.

    Hessian-vector products (sharpness, loss landscapes) need the second derivative; a custom
    backward is often not differentiable itself.
    """
    params, values = setting(s, theta, x, torch.float64)
    values = _clear(s, values)

    def slope(x: Tensor) -> Tensor:
        y, pullback = vjp(lambda x: s.basis.apply(params, x), x)
        return pullback(torch.ones_like(y))[0]

    check_slope(slope, values, s.reach, "phi''(x)")


def parameter_gradient_is_right(s: Subject, theta: Theta, x: list[float], seed: int) -> None:
    """d phi / d theta by autograd lies between the one-sided difference quotients along any line.

    The parameters get a wrong gradient, and training follows it.
    """
    params, values = setting(s, theta, x, torch.float64)
    source = draw.generator(seed)
    line = tree.map(lambda p: torch.randn(p.shape, generator=source, dtype=p.dtype), params)

    def along(t: Tensor) -> Tensor:
        def moved(p: Tensor, d: Tensor) -> Tensor:
            return p + t.view(*t.shape, *[1] * (p.dim() - 1)) * d

        return s.basis.apply(tree.map(moved, params, line), values)

    check_slope(along, torch.zeros_like(values), 1.0, "d phi / d theta")


def float32_follows_float64(s: Subject, theta: Theta, x: list[float]) -> None:
    """phi in float32 is phi in float64 at a point within C eps of (x, theta), up to C eps.

    Cancellation, a recurrence that amplifies errors, or a step in lower precision eats digits.
    """
    params, values = setting(s, theta, x, torch.float32)
    wanted = s.basis.apply(tree.to(params, torch.float64), values.double())
    got = s.basis.apply(params, values)
    agree(got, wanted, phi_slack(s, params, values), "phi in float32", "phi in float64")


def bfloat16_rounds_once(s: Subject, theta: Theta, x: list[float]) -> None:
    """phi in bfloat16 is phi in float32, rounded once.

    Evaluating in bfloat16 itself loses what 8 bits cannot hold: convert x to float32, and the
    result back.
    """
    params, values = setting(s, theta, x, torch.float32)
    low = values.to(torch.bfloat16)
    wanted = s.basis.apply(params, low.float())
    limit = phi_slack(s, params, low.float())
    limit = limit + torch.finfo(torch.bfloat16).eps / 2 * (wanted.double().abs() + limit)
    agree(s.basis.apply(params, low), wanted, limit, "phi in bfloat16", "phi in float32")


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
    if results[0][1] is not None:
        wanted = results[1][1]
        limit = unit(torch.float32) * (wanted.abs() + 1)
        agree(results[0][1], wanted, limit, "the gradient of compiled phi", "that of phi")


SHAPES = st.sampled_from([(), (3,), (2, 3), (2, 1)])
X_SHAPES = st.sampled_from([(), (1,), (3,), (4, 1, 3), (0, 1, 3), (2, 3)])
X_DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
THETA_X: dict[str, Any] = {"theta": draw.thetas, "x": rows(near)}
PAIR: dict[str, Any] = {**THETA_X, "dtype": draw.dtypes}

EVERYONE = (
    Property(
        keeps_shape_and_dtype,
        {
            "shape": SHAPES,
            "x_shape": X_SHAPES,
            "dtype": X_DTYPES,
            "params_dtype": st.sampled_from([torch.float32, torch.float64]),
        },
    ),
    Property(init_follows_its_generator, {"seed": draw.seeds, "shape": SHAPES}),
    Property(
        elementwise,
        {**PAIR, "x": rows(near, 2), "other": lambda s: st.one_of(finite(s), st.just(math.nan))},
    ),
    Property(
        large_as_small,
        {
            "seed": draw.seeds,
            "size": st.sampled_from([17, 130, 1023]),
            "cut": st.integers(0, 16),
            "pokes": rows(near, 0),
            "dtype": draw.dtypes,
        },
    ),
    Property(layout_does_not_matter, PAIR),
    Property(inputs_untouched, PAIR),
    Property(global_state_untouched),
    Property(deterministic, {**PAIR, "other": rows(near)}),
    Property(finite_with_derivatives, {**THETA_X, "x": rows(within)}),
    Property(nan_stays_nan, {"theta": draw.thetas, "dtype": draw.dtypes}),
    Property(vmap_is_a_loop, PAIR),
    Property(units_permute, {**PAIR, "x": rows(near, 2), "order": st.permutations(range(4))}),
    Property(units_stand_alone, {**PAIR, "x": rows(near, 1, 3)}),
    Property(forward_meets_reverse, {**THETA_X, "seed": draw.seeds}),
    Property(gradient_is_right, THETA_X),
    Property(curvature_is_right, THETA_X),
    Property(parameter_gradient_is_right, {**THETA_X, "seed": draw.seeds}),
    Property(float32_follows_float64, {**THETA_X, "x": rows(within)}),
    Property(bfloat16_rounds_once, THETA_X),
    Property(compiles),
)


# --- declared traits ------------------------------------------------------------------------------


def linear(s: Subject, theta: Theta, x: list[float], dtype: torch.dtype) -> None:
    """phi(x; c) - phi(x; 0) = sum_k c_k expand(x)_k, for c = theta["coefs"].

    Streamed attention contracts the features of `expand`; where `apply` computes something else,
    training and inference are two models.
    """
    params, values = setting(s, theta, x, dtype)
    features = s.basis.expand(values)
    if features is None:
        raise AssertionError("expand(x) is None, where a linear family has features (..., K)")
    coefs = params["coefs"]
    if coefs.shape != features.shape:
        raise AssertionError(
            f"coefs of {len(x)} units have shape {tuple(coefs.shape)}, features of {len(x)} "
            f"numbers {tuple(features.shape)}: wanted (..., K) both"
        )
    zero = {**params, "coefs": torch.zeros_like(coefs)}
    gain = params.get("scale_basis", torch.ones(()))
    wanted = (features * coefs).sum(-1) * gain
    whole, rest = s.basis.apply(params, values), s.basis.apply(zero, values)
    sizes = (features.abs() * coefs.abs()).sum(-1) * gain.abs() + whole.abs() + rest.abs()
    limit = phi_slack(s, params, values) + unit(dtype) * sizes
    agree(whole - rest, wanted, limit, "phi(x; c) - phi(x; 0)", "sum_k c_k expand(x)_k")
    if getattr(s.basis, "features", None) is not None:
        all_of_it = (s.basis.features(values) * s.basis.coefficients(params)).sum(-1)
        agree(all_of_it, whole, limit, "features(x) . coefficients(theta)", "phi(x; theta)")


def homogeneous(
    s: Subject, theta: Theta, x: list[float], factor: float, dtype: torch.dtype
) -> None:
    """phi(x; t a) - phi(x; 0) = t (phi(x; a) - phi(x; 0)) for the amplitude a.

    The declared amplitude is not a factor of the function, so operators scale it in vain.
    """
    params, values = setting(s, theta, x, dtype)
    name = s.amplitude
    if name not in params:
        raise AssertionError(f"the parameters are {sorted(params)}: no amplitude {name!r}")

    def scaled(t: float) -> Params:
        return {**params, name: params[name] * t}

    zero, one, more = (s.basis.apply(scaled(t), values) for t in (0.0, 1.0, factor))
    limit = sum(phi_slack(s, scaled(t), values) for t in (0.0, 1.0, factor))
    limit = limit * max(1.0, abs(factor)) + unit(dtype) * (one.abs() + zero.abs()) * abs(factor)
    agree(more - zero, factor * (one - zero), limit, "phi(x; t a) - phi(x; 0)", "t times that of a")


def periodic(s: Subject, x: list[float], turns: int, dtype: torch.dtype) -> None:
    """phi(x + n T) = phi(x) for integers n and the declared period T.

    The period is another one: operators that rely on it (scores shifted by whole turns) change.
    """
    period = float(s.traits["periodic"])
    here = torch.tensor(x, dtype=dtype)
    there = (here.double() + turns * period).to(dtype)
    # x + n T is not representable: its rounding moves the point by that much, no more
    moved = there.double() - turns * period
    wanted = s.functions(moved)
    limit = s.slack(here) + s.slack(there) + slack(s.functions, moved.to(dtype), s.reach)
    agree(s.functions(there), wanted, limit, "phi(x + n T)", "phi(x)")


def partition_of_unity(s: Subject, x: list[float], dtype: torch.dtype) -> None:
    """sum_k phi_k(x) = 1 for x in [low, high].

    A constant cannot be represented: knots are off by one, an end is open, or a spline is missing.
    """
    low, high = s.traits["partition_of_unity"]
    values = torch.tensor(x, dtype=dtype)
    inside = values.double().clamp(low, high).to(dtype)
    # clamping in float32 can leave the interval by one rounding
    inside = torch.where(inside.double() > high, torch.nextafter(inside, inside - 1), inside)
    inside = torch.where(inside.double() < low, torch.nextafter(inside, inside + 1), inside)
    total = s.functions(inside).sum(-1)
    limit = unit(dtype) * (1 + s.functions(inside).abs().sum(-1))
    at = f"x = {inside.tolist()}"
    agree(total, torch.ones_like(total), limit, "sum_k phi_k(x)", "its declared value", at)


def nonnegative(s: Subject, x: list[float], dtype: torch.dtype) -> None:
    """phi_k(x) >= 0.

    A function dips below zero: a wrong polynomial piece, or one used outside its interval.
    """
    values = torch.tensor(x, dtype=dtype)
    y = s.functions(values)
    agree(y, y.clamp(min=0), unit(dtype) * s.reach, "phi_k(x)", "its positive part")


def compact_support(s: Subject, beyond: float, side: str, dtype: torch.dtype) -> None:
    """phi_k(x) = 0 for x outside [low, high].

    The functions do not vanish where they are declared to: far scores still count.
    """
    low, high = s.traits["compact_support"]
    edge = torch.tensor(high if side == "above" else low, dtype=dtype)
    step = abs(beyond) * (1 if side == "above" else -1)
    x = (edge + step).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    away = torch.tensor(math.inf if side == "above" else -math.inf, dtype=dtype)
    outside = x.double() > high if side == "above" else x.double() < low
    x = x if bool(outside) else torch.nextafter(x, away)
    y = s.functions(x)
    # rounding may put an x that close to the edge on its other side
    radius = 4 * torch.finfo(dtype).eps * (x.double().abs() + s.reach)
    inside = s.functions(edge.double() - radius * (1 if side == "above" else -1)).abs()
    limit = torch.where((x - edge).abs() <= radius, inside, 0.0)
    agree(y, torch.zeros_like(y), limit, "phi_k(x)", "its value outside", f"x = {float(x)!r}")


def _derivative(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]


def smooth(s: Subject, x: float) -> None:
    """phi, phi', .., phi^(k) are continuous for the declared k (checked up to k = 3).

    A derivative jumps: pieces do not meet, and optimisers that use curvature see noise there.
    """
    f = s.functions
    eps = torch.finfo(torch.float64).eps
    step = 8 * eps * (abs(x) + s.reach)
    sides = x + step * torch.tensor([-3, -1, 1, 3], dtype=torch.float64)
    grid = torch.linspace(-s.reach, s.reach, 33, dtype=torch.float64)
    for k in range(int(min(s.traits["smooth"], 3)) + 1):
        values = f(torch.cat([sides, grid]))
        far_left, left, right, far_right = values[:4]
        limit = (left - far_left).abs() + (right - far_right).abs()
        limit = 2 * limit + 1024 * eps * values.abs().amax(0)
        agree(right, left, limit, f"phi^({k})(x+)", f"phi^({k})(x-)", f"derivative {k} jumps")
        f = _derivative(f)


def bounded(s: Subject, x: list[float], dtype: torch.dtype) -> None:
    """abs(phi_k(x)) <= B for every finite x, and amplitude 1.

    The function leaves its declared bound: heads can explode on large scores.
    """
    bound = float(s.traits["bounded"])
    y = s.functions(torch.tensor(x, dtype=dtype))
    limit = unit(dtype) * bound
    agree(y, y.clamp(-bound, bound), limit, "phi_k(x)", "it, held within the bound")


def parity(s: Subject, x: list[float], dtype: torch.dtype) -> None:
    """phi(-x) = phi(x) where declared "even", phi(-x) = -phi(x) where "odd".

    A sign is wrong, or the function is not centred.
    """
    sign = {"even": 1, "odd": -1}[s.traits["parity"]]
    values = torch.tensor(x, dtype=dtype)
    limit = s.slack(values) + s.slack(-values)
    wanted = sign * s.functions(values)
    agree(s.functions(-values), wanted, limit, "phi(-x)", f"{'-' * (sign < 0)}phi(x)")


def integral(f: Callable[[Tensor], Tensor], s: Subject) -> tuple[Tensor, Tensor]:
    """The integrals of f (over a period, the support, or the line) and how well they are known."""
    if s.traits.get("periodic") or s.traits.get("compact_support"):
        low, high = s.traits.get("compact_support") or (0.0, float(s.traits["periodic"]))
        places = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096 * (high - low) + low
        weights = torch.full_like(places, (high - low) / 4096)
    else:
        # x = sinh t reaches +-1e4, where what has an integral has died out
        t = torch.linspace(-10, 10, 8193, dtype=torch.float64)
        places, weights = t.sinh(), t.cosh() * 20 / 8192
    terms = f(places) * weights[:, None]
    coarse = terms[::2].sum(0) * 2
    total = terms.sum(0)
    return total, (total - coarse).abs() + 1e-12 * terms.abs().sum(0)


def zero_mean(s: Subject) -> None:
    """The integral of phi (over a period, its support, or the line) is 0.

    A wavelet without zero mean passes constants: it is a smoother, not a detector.
    """
    total, error = integral(s.functions, s)
    size, _ = integral(lambda x: s.functions(x).abs(), s)
    if bool((error > 1e-3 * size).any()):
        raise AssertionError(f"the integral {total.tolist()} does not converge: {error.tolist()}")
    agree(total, torch.zeros_like(total), error, "the integral of phi", "its declared value")


def refinable(s: Subject, x: list[float]) -> None:
    """Every phi_k is a combination of the functions of the refined basis.

    A grid that is refined during training does not keep the function it had. (`refinable` is a
    function that makes the refined basis; True for a family of kart is the one of twice the grid.)
    """
    finer = s.traits["refinable"]
    refined: Any
    if finer is True:
        options = {k: v for k, v in s.options.items() if k not in ("base", "scales", "init")}
        refined = bases.FAMILIES[s.family](**{**options, "grid": 2 * options["grid"]})
    else:
        refined = finer()
    low, high = s.traits.get("partition_of_unity") or (-s.reach, s.reach)
    size = refined.expand(torch.zeros(1, dtype=torch.float64)).shape[-1]
    places = torch.linspace(low, high, 8 * size + 1, dtype=torch.float64)
    fine = refined.expand(places)
    mixing = torch.linalg.lstsq(fine, s.functions(places), driver="gelsd").solution
    values = torch.tensor(x, dtype=torch.float64).clamp(low, high)
    limit = s.slack(values) + 1024 * unit(torch.float64) * mixing.abs().amax(0)
    got = refined.expand(values) @ mixing
    agree(got, s.functions(values), limit, "the refined combination", "phi_k(x)")


X: dict[str, Any] = {"x": rows(near), "dtype": draw.dtypes}
FAR: dict[str, Any] = {"x": rows(finite), "dtype": draw.dtypes}


def _no_amplitude(s: Subject) -> str | None:
    return None if s.amplitude else "no trait `amplitude` names a parameter that is a factor"


TRAITS = (
    Property(linear, PAIR, "linear", (True,)),
    Property(
        homogeneous,
        {**PAIR, "factor": st.sampled_from([2.0, -1.0, 0.5, 3.0])},
        unfit=_no_amplitude,
    ),
    Property(
        periodic,
        {**X, "turns": st.integers(-5, 5).filter(bool)},
        "periodic",
        (1.0, 2.0, math.pi, 2 * math.pi),
    ),
    Property(partition_of_unity, X, "partition_of_unity", ((-1.0, 1.0), (0.0, 1.0))),
    Property(nonnegative, FAR, "nonnegative", (True,)),
    Property(
        compact_support,
        {"beyond": finite, "side": st.sampled_from(["above", "below"]), "dtype": draw.dtypes},
        "compact_support",
        ((-1.0, 1.0), (-8.0, 8.0)),
    ),
    Property(
        smooth,
        {"x": knots},
        "smooth",
        (math.inf, 2, 1, 0),
        lambda s: "declares no continuity" if s.traits.get("smooth", 0) < 0 else None,
    ),
    Property(bounded, FAR, "bounded", (1.0, 10.0)),
    Property(parity, X, "parity", ("even", "odd")),
    Property(zero_mean, {}, "zero_mean", (True,)),
    Property(refinable, {"x": rows(near)}, "refinable", ()),
)
