"""Properties of a fast form against its plain one, under every transform."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.func import grad, vmap

from kart import tree
from kart.testing import draw, laws
from kart.testing.compare import agree, agree_trees, close, same, spread
from kart.testing.core import Property, Suite, dtypes_of, with_traits
from kart.testing.laws import jvp, vjp

Inputs = Callable[..., tuple[Any, ...]]


class Kernel(NamedTuple):
    """The arguments of `kernel_suite` in one, for the command line."""

    fast: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: Inputs
    sizes: Mapping[str, Sequence[int]]
    traits: Mapping[str, Any] = {}


class Subject(NamedTuple):
    """`fast` and `plain` take what `inputs(generator, **sizes)` gives: a tuple of float32 tensors
    (differentiated), other tensors and None (not). `sizes` are the numbers each size is drawn from.
    """

    fast: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: Inputs
    sizes: Mapping[str, Sequence[int]]
    traits: Mapping[str, Any]
    dtypes: Sequence[torch.dtype]

    def drawn(self, seed: int, sizes: Mapping[str, int], dtype: torch.dtype) -> "Case":
        """A case of these sizes, its floating-point tensors of `dtype` and in memory of their own:
        views of others are what `layout_does_not_matter` hands on.
        """
        arguments = self.inputs(draw.generator(seed), **sizes)
        return self.case([x.to(dtype).contiguous() if _is_float(x) else x for x in arguments])

    def case(self, arguments: Sequence[Any]) -> "Case":
        """The case of these arguments."""
        places = [i for i, x in enumerate(arguments) if _is_float(x)]

        def of_floats(f: Callable[..., Any]) -> Callable[..., Any]:
            def of(*floats: Tensor) -> Any:
                given = dict(zip(places, floats, strict=True))
                return f(*(given.get(i, x) for i, x in enumerate(arguments)))

            return of

        floats = tuple(arguments[i] for i in places)
        return Case(list(arguments), places, floats, of_floats(self.fast), of_floats(self.plain))


class Case(NamedTuple):
    """Arguments, the places of the floating-point tensors among them, and both forms as functions
    of those alone.
    """

    arguments: list[Any]
    places: list[int]
    floats: tuple[Tensor, ...]
    fast: Callable[..., Any]
    plain: Callable[..., Any]


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def sizes(s: Subject) -> SearchStrategy[dict[str, int]]:
    """One of the declared values of each size, or one that all share: axes that are mixed up go
    unnoticed where their lengths happen to differ, or not.
    """
    each = st.fixed_dictionaries({k: st.sampled_from(list(v)) for k, v in s.sizes.items()})
    shared = sorted(set.intersection(*(set(v) for v in s.sizes.values())) - {1})
    if not shared:
        return each
    return st.one_of(each, st.sampled_from(shared).map(lambda n: {k: n for k in s.sizes}))


def _along(f: Callable[..., Any], seed: int) -> Callable[..., Any]:
    """The derivative of `f` along a line that is drawn."""

    def derivative(*floats: Tensor) -> Any:
        source = draw.generator(seed)
        line = tuple(torch.randn(x.shape, generator=source).to(x.dtype) for x in floats)
        return jvp(f, floats, line)[1]

    return derivative


def _loss(f: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *floats: tree.ravel(f(*floats)).sin().sum()


def _gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of a loss of `f` in all its arguments."""
    return lambda *floats: grad(_loss(f), tuple(range(len(floats))))(*floats)


def _exactly(
    f: Callable[..., Any], floats: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`f(*floats)` in float64, flat, and what rounding in `dtype` may do to it."""
    wide = tuple(x.double() for x in floats)
    return tree.ravel(f(*wide)), spread(lambda *x: tree.ravel(f(*x)), wide, dtype)


def _compare(
    s: Subject,
    seed: int,
    drawn: Mapping[str, int],
    dtype: torch.dtype,
    transform: Callable[[Callable[..., Any]], Callable[..., Any]],
    what: str,
    factor: float = 1.0,
) -> None:
    """Asserts that the transform of `fast` in `dtype` is that of `plain` in float64, up to what
    rounding in `dtype` may do to the latter.
    """
    case = s.drawn(seed, drawn, dtype)
    got = tree.ravel(transform(case.fast)(*case.floats))
    exact, limit = _exactly(transform(case.plain), case.floats, dtype)
    agree(got, exact, factor * limit, f"{what} of the fast form", "of the plain one")


def values(s: Subject, seed: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """fast(x) = plain(x), under torch.no_grad() as well.

    The fast form computes something else: a block is dropped, doubled or misplaced, or sums are
    kept in too low a precision.
    """
    _compare(s, seed, sizes, dtype, lambda f: f, "the value")
    with torch.no_grad():
        _compare(s, seed, sizes, dtype, lambda f: f, "the value under no_grad")


def gradients(s: Subject, seed: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """grad(fast) = grad(plain) in every floating-point argument.

    The hand-written backward is wrong, although the forward is right.
    """
    _compare(s, seed, sizes, dtype, _gradient, "the gradient")


def eager_gradients(s: Subject, seed: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """torch.autograd.grad(fast) = grad(plain): outside torch.func, too, in all arguments at once
    and in each alone.

    The two ways to differentiate take different code, or a gradient is left out where another is
    not asked for (`ctx.needs_input_grad`).
    """
    case = s.drawn(seed, sizes, dtype)
    floats, loss = case.floats, _loss(case.fast)

    def eager(f: Callable[..., Tensor], *x: Tensor) -> Any:
        value, pullback = laws.eager_vjp(f, *x)
        return pullback(torch.ones_like(value))

    exact, limit = _exactly(_gradient(case.plain), floats, dtype)
    agree(tree.ravel(eager(loss, *floats)), exact, limit, "the eager gradient", "that of plain")
    each = [
        eager(lambda leaf, i=i: loss(*floats[:i], leaf, *floats[i + 1 :]), x)
        for i, x in enumerate(floats)
    ]
    agree(tree.ravel(each), exact, limit, "the eager gradients, one at a time,", "those of plain")


def mapped(s: Subject, seed: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """vmap(fast) over each floating-point argument, over all, and over all with their masks, = the
    loop of plain, whichever axis is mapped and within another vmap.

    The rule for batches folds the wrong axis; populations and per-example gradients mix.
    """
    case = s.drawn(seed, sizes, dtype)
    arguments, places = case.arguments, case.places
    masks = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.dtype == torch.bool]
    over = {f"[{n}]": [place] for n, place in enumerate(places)}
    over[str(list(range(len(places))))] = places
    if masks:
        over["floats and masks"] = [*places, *masks]
    for what, chosen in over.items():

        def members(floats: Sequence[Tensor], chosen: Sequence[int] = chosen) -> list[list[Any]]:
            given = dict(zip(places, floats, strict=True))
            full: list[Any] = [given.get(i, x) for i, x in enumerate(arguments)]
            return [
                [_three(x)[m] if i in chosen else x for i, x in enumerate(full)] for m in range(3)
            ]

        def loop(*floats: Tensor, members: Any = members) -> Any:
            return tree.stack([s.plain(*member) for member in members(floats)])

        axes = tuple(0 if i in chosen else None for i in range(len(arguments)))
        together = [
            x[0] if axis is None else torch.stack(x)
            for axis, x in zip(axes, zip(*members(case.floats), strict=True), strict=True)
        ]
        exact, limit = _exactly(loop, case.floats, dtype)
        for how, got in laws.vmaps(s.fast, axes, together).items():
            what_of = f"vmap{how} of fast over {what}"
            agree(tree.ravel(got), exact, limit, what_of, "the loop of plain")


def _three(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What members have for `x`, a mask or numbers."""
    if x.dtype == torch.bool:
        return x, x.flip(-1) if x.dim() else x, x | True
    return x, x * 0.5, -x


def per_example_gradients(s: Subject, seed: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """vmap(grad(fast)) = the loop of grad(plain).

    The backward has no rule for batches, or sums over the examples it should keep apart.
    """
    case = s.drawn(seed, sizes, dtype)
    stacked = tuple(torch.stack(_three(x)) for x in case.floats)
    got = tree.ravel(vmap(_gradient(case.fast))(*stacked))
    plain = _gradient(case.plain)

    def loop(*x: Tensor) -> Any:
        return tree.stack([plain(*(y[m] for y in x)) for m in range(3)])

    exact, limit = _exactly(loop, stacked, dtype)
    agree(got, exact, limit, "vmap(grad(fast))", "the loop of grad(plain)")


def forward_mode(s: Subject, seed: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """jvp(fast) = jvp(plain).

    Forward mode is missing, wrong, or silently zero: Hessian-vector products are wrong.
    """
    _compare(s, seed, sizes, dtype, lambda f: _along(f, seed), "the forward derivative")


def second_derivative(s: Subject, seed: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """jvp(grad(fast)) = jvp(grad(plain)): Hessian-vector products.

    The backward is not differentiable itself.
    """
    what = "the Hessian-vector product"
    _compare(s, seed, sizes, dtype, lambda f: _along(_gradient(f), seed), what, 4.0)


def every_element_counts(
    s: Subject, seed: int, sizes: dict[str, int], poke: float, dtype: torch.dtype
) -> None:
    """fast(x + t e_i) - fast(x) = plain(x + t e_i) - plain(x) for the last element i of each
    argument.

    The end of an axis is not read: a loop stops a block early.
    """
    case = s.drawn(seed, sizes, dtype)
    for i, place in enumerate(case.places):
        if not case.floats[i].numel():
            continue
        poked = [x.clone() for x in case.floats]
        poked[i].view(-1)[-1] += poke
        fast = tree.ravel(case.fast(*poked)).double() - tree.ravel(case.fast(*case.floats)).double()
        there, here = (_exactly(case.plain, floats, dtype) for floats in (poked, case.floats))
        limit = there[1] + here[1]
        agree(fast, there[0] - here[0], limit, f"what argument {place} changes", "in plain")


def layout_does_not_matter(
    s: Subject, seed: int, sizes: dict[str, int], dtype: torch.dtype
) -> None:
    """fast sees numbers, not strides: transposed and strided views count as their copies, and so do
    gradients handed to the backward.

    A raw pointer assumes contiguous memory. (`out.sum()` hands an expanded gradient to the
    backward.)
    """
    case = s.drawn(seed, sizes, dtype)

    wanted = tree.ravel(s.fast(*case.arguments))
    _, limit = _exactly(case.plain, case.floats, dtype)
    for name, change in (("transposed", laws.transposed), ("strided", laws.strided)):
        views = [change(x) if isinstance(x, Tensor) else x for x in case.arguments]
        got = tree.ravel(s.fast(*views))
        agree(got, wanted, limit, f"fast of {name} views", "fast of their copies")
    laws.any_cotangent(case.fast, *case.floats)


def inputs_untouched(s: Subject, seed: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """fast and its gradient write neither to their arguments nor to anything global, give the same
    bits when asked again, and follow what is written into their arguments.

    In-place changes reach whoever else holds the tensor; so does a buffer that is used again, and
    what is kept of an argument is stale once an optimizer has written to it.
    """
    case = s.drawn(seed, sizes, dtype)
    kept = {str(i): x for i, x in enumerate(case.arguments) if isinstance(x, Tensor)}
    with laws.world_untouched(), laws.untouched(argument=kept):
        first = tree.ravel(s.fast(*case.arguments))
        _gradient(case.fast)(*case.floats)
        again = tree.ravel(s.fast(*case.arguments))
    same(again, first, "fast asked again", "fast")
    with torch.no_grad():
        laws.keeps_nothing(case.fast, case.floats, tuple(x * 0.5 + 0.25 for x in case.floats))


def special_values(
    s: Subject, seed: int, sizes: dict[str, int], place: int, kind: str, dtype: torch.dtype
) -> None:
    """fast(x) = plain(x), and finite, with one argument all zero, in ties, 50 times as large, or
    100 lower, where the plain form is finite.

    A shortcut for zeros, an order of ties, or an overflow that the plain form does not have; a
    largest number that is looked for from zero on.
    """
    case = s.drawn(seed, sizes, dtype)
    chosen = place % len(case.places)
    change = {
        "zero": lambda x: x * 0,
        "ties": torch.round,
        "large": lambda x: x * 50,
        "low": lambda x: x - 100,
    }[kind]
    floats = [change(x) if i == chosen else x for i, x in enumerate(case.floats)]
    exact, limit = _exactly(case.plain, floats, dtype)
    if not bool(exact.isfinite().all()):
        return
    what = f"fast with argument {case.places[chosen]} {kind}"
    agree(tree.ravel(case.fast(*floats)), exact, limit, what, "the plain form")


def poison_stays_hidden(
    s: Subject, seed: int, sizes: dict[str, int], poison: float, dtype: torch.dtype
) -> None:
    """fast and its gradients are the same with NaN or infinite numbers behind the mask, put there
    by the declared function `poison(arguments, value)`.

    0 * NaN is NaN, and `torch.where` lets NaN through to the gradient: padding spoils the rest.
    """
    case = s.drawn(seed, sizes, dtype)
    spoiled = s.case(s.traits["poison"](case.arguments, poison))
    value, pullback = vjp(case.fast, *case.floats)
    probe = tree.map(lambda x: draw.probe(x.shape, seed).to(x.dtype), value)
    slopes = pullback(probe)
    for way in (vjp, laws.eager_vjp):
        got, poisoned = way(spoiled.fast, *spoiled.floats)
        agree_trees(got, value, 64, f"poisoned fast ({way.__name__})", "fast")
        agree_trees(poisoned(probe), slopes, 64, f"poisoned gradient ({way.__name__})", "gradient")


def half(s: Subject, seed: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """fast in bfloat16 and float16 is plain in float64 of the same numbers, rounded once: within
    eps of every value and the rounding of float32. With half = c declared, c eps of the largest
    value besides.

    Sums or scores are kept in half precision: they must be accumulated in float32.
    """
    case = s.drawn(seed, sizes, dtype)
    fast = s.fast(*case.arguments)
    kinds = {leaf.dtype for leaf in tree.leaves(fast)}
    if kinds != {dtype}:
        raise AssertionError(f"fast gives {kinds} for {dtype}")
    # inputs are exact; what is left is one rounding, and that of sums in float32
    exact, limit = _exactly(case.plain, case.floats, torch.float32)
    eps, declared = torch.finfo(dtype).eps, s.traits.get("half", True)
    # below the smallest normal number of float16 the distance of neighbours is fixed
    limit = limit + eps * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    if declared is not True:
        limit = limit + declared * eps * exact.abs().max()
    agree(tree.ravel(fast), exact, limit, f"fast in {dtype}", "plain in float64")


def half_gradients(s: Subject, seed: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """The gradient of fast in bfloat16 and float16, in each argument, is that of plain in float64
    of the same numbers, within 1e-2 of its norm, and finite.

    The backward sums many terms in half precision, where the forward does not.
    """
    case = s.drawn(seed, sizes, dtype)
    value, pullback = vjp(case.fast, *case.floats)
    probe = tree.map(lambda x: draw.probe(x.shape, seed).to(dtype), value)
    got = pullback(probe)
    exact = vjp(case.plain, *(x.double() for x in case.floats))[1]
    for i, (a, b) in enumerate(zip(got, exact(tree.to(probe, torch.float64)), strict=True)):
        # what is left of sums that cancel is rounding of their terms
        slip = torch.finfo(dtype).eps * b.numel() ** 0.5
        close(a, b, 1e-2, f"the gradient of float {i} in {dtype}", "that of plain", slip)


CASE: dict[str, Any] = {"seed": draw.seeds, "sizes": sizes}
PAIR: dict[str, Any] = {**CASE, "dtype": draw.dtypes}

KINDS = st.sampled_from(["zero", "ties", "large", "low"])

PROPERTIES = (
    Property(values, PAIR),
    Property(special_values, {**PAIR, "place": st.integers(0, 3), "kind": KINDS}),
    Property(gradients, PAIR),
    Property(eager_gradients, PAIR),
    Property(every_element_counts, {**PAIR, "poke": st.sampled_from([1.0, 30.0])}),
    Property(layout_does_not_matter, PAIR),
    Property(inputs_untouched, PAIR),
    Property(mapped, PAIR, "vmap"),
    Property(per_example_gradients, PAIR, "vmap"),
    Property(forward_mode, PAIR, "forward_mode"),
    Property(second_derivative, PAIR, "second_derivative"),
    Property(half, {**CASE, "dtype": draw.half_types}, "half"),
    Property(half_gradients, {**CASE, "dtype": draw.half_types}, "half"),
    Property(poison_stays_hidden, {**PAIR, "poison": draw.poisons}, "poison"),
)


def suite(
    fast: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Inputs,
    sizes: Mapping[str, Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
    traits: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Suite:
    """Puts a fast form beside its plain expression, under every transform.

    Args:
        fast, plain: functions of the same arguments, with one result or a tree of them.
        inputs: `inputs(generator, **sizes)` gives the arguments, floating-point tensors in float32
            (the suite casts and differentiates them), masks and None as they are.
        sizes: the numbers to draw each size from; include those around the blocks of `fast`.
        traits: "vmap", "forward_mode", "second_derivative" or "half" as False, where `fast` does
            not claim it; "half" as the number of eps of the largest value that it may be off by,
            where it keeps what is between in half precision on purpose; "poison" as a function of
            (arguments, value) to arguments in which `value` stands wherever the masks hide it.
    """
    for argument, value in (("fast", fast), ("plain", plain), ("inputs", inputs)):
        if not callable(value):
            raise ValueError(
                f"`kernel_suite` needs a function as `{argument}`, got {value!r:.200}. Pass one."
            )
    if not sizes or not all(list(values) for values in sizes.values()):
        raise ValueError(
            f"`kernel_suite` needs one or more numbers for each of `sizes`, got {dict(sizes)!r}. "
            "Include those around the block size of the fast form."
        )
    declared = with_traits("kernel", PROPERTIES, {**laws.TRANSFORMS, "half": True}, traits)
    subject = Subject(fast, plain, inputs, sizes, declared, dtypes_of(dtype))
    named = name or getattr(fast, "__name__", type(fast).__name__)
    return Suite("kernel", named, subject, declared, PROPERTIES)
