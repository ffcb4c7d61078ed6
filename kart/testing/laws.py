"""What suites of several kinds ask alike: purity, one seed, derivatives that fit together."""

import contextlib
import random
import sys
import sysconfig
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

from kart import tree
from kart.testing import draw
from kart.testing.compare import agree, agree_trees, same_tree, unit

# what an object is taken to hold under, unless its traits say False
TRANSFORMS = {"vmap": True, "forward_mode": True, "second_derivative": True}


def vjp(f: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.vjp`, typed as the pair that it returns without `has_aux`."""
    value, pullback, *_ = torch.func.vjp(f, *primals)
    return value, pullback


def slope(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of elementwise `f` at `x`, by reverse mode."""
    y, pullback = vjp(f, x)
    return pullback(torch.ones_like(y))[0]


def eager_vjp(f: Callable[..., Tensor], *primals: Any) -> tuple[Tensor, Callable[..., Any]]:
    """As `vjp`, by `torch.autograd` outside all transforms; the value is that of a plain call."""
    leaves = tree.map(lambda t: t.clone().requires_grad_(), primals)
    y, flat = f(*leaves), tree.leaves(leaves)

    def pullback(cotangent: Tensor) -> Any:
        if not y.requires_grad:
            return tree.map(torch.zeros_like, primals)
        found = torch.autograd.grad(y, flat, cotangent, allow_unused=True, materialize_grads=True)
        return tree.with_leaves(primals, found)

    return f(*primals), pullback


def jvp(f: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """`torch.func.jvp`, typed as the pair that it returns without `has_aux`."""
    value, tangent, *_ = torch.func.jvp(f, primals, tangents)
    return value, tangent


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


@contextlib.contextmanager
def world_untouched() -> Iterator[None]:
    """Asserts that nothing global changes within the block."""
    before = global_state()
    yield
    after = global_state()
    restore(before)
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        raise AssertionError(f"{', '.join(changed)} changed")


@contextlib.contextmanager
def untouched(**arguments: Any) -> Iterator[None]:
    """Asserts that no tensor of `arguments` is written to within the block."""
    before = tree.map(torch.clone, arguments)
    yield
    same_tree(arguments, before, "the arguments afterwards", "those before")


@contextlib.contextmanager
def another_seed(seed: int) -> Iterator[None]:
    """Runs the block with another global seed of torch, which it puts back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class _TorchDraws(TorchDispatchMode):
    """Notes in `seen` the state of every generator that torch draws from, before the draw."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            source = kwargs.get("generator") or torch.default_generator
            before = source.get_state()
            drawn = func(*args, **kwargs)
            if not torch.equal(source.get_state(), before):  # an order of one number takes none
                self.seen.append(before.numpy().tobytes())
            return drawn
        return func(*args, **kwargs)


def _noting(make: Any, seen: list[Any]) -> Any:
    """`make`, a function or class that is given a seed, which notes in `seen` what it is given."""

    def note(*args: Any, **options: Any) -> None:
        seen.append(repr((make, args, options)))

    def called(*args: Any, **options: Any) -> Any:
        note(*args, **options)
        return make(*args, **options)

    def initialised(self: Any, *args: Any, **options: Any) -> None:
        note(*args, **options)
        make.__init__(self, *args, **options)

    # a class that others take for `make`, as they may ask what is an instance of it
    return type(make.__name__, (make,), {"__init__": initialised}) if type(make) is type else called


# what is made of a seed beside torch's generators
SEEDED = [(random, "Random"), (numpy.random, "default_rng"), (numpy.random, "RandomState")]
SEEDED += [(numpy.random, name) for name in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")]
# where modules are that are nobody's own: Python's and those that are installed
INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def _bound(make: Any) -> Iterator[tuple[ModuleType, str]]:
    """Where modules that are not installed have `make` by a name, as an import gives it to them."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and not file.startswith(INSTALLED):
            yield from ((module, name) for name, one in list(vars(module).items()) if one is make)


@contextlib.contextmanager
def _draws() -> Iterator[list[Any]]:
    """Notes what torch draws from, and what seeds generators of numpy and Python are made of."""
    seen: list[Any] = []
    with contextlib.ExitStack() as stack:
        for module, name in SEEDED:
            make = getattr(module, name)
            noting = _noting(make, seen)
            for place in [(module, name), *_bound(make)]:
                stack.enter_context(unittest.mock.patch.object(*place, noting))
        stack.enter_context(_TorchDraws(seen))
        yield seen


def drawn_from_its_generator(init: Callable[[torch.Generator], Any], seed: int) -> tuple[Any, Any]:
    """Asserts that `init(generator)` gives twice the same, and draws no number that is the same for
    every generator, or again from a generator that has been drawn from; returns both.
    """
    source = draw.generator(seed)
    with _draws() as drawn:
        first = init(source)
    with _draws() as following:
        init(source)
    with another_seed(seed + 7):
        again = init(draw.generator(seed))
    same_tree(again, first, "a second init", "the first")
    with another_seed(seed + 8), _draws() as elsewhere:
        init(draw.generator(seed + 1))
    for others, what in (
        (
            elsewhere,
            f"for generators of seeds {seed} and {seed + 1}: it is from another, seeded in the "
            "same way every time",
        ),
        (
            following,
            "for one generator used twice: what is drawn next, as for another block, starts as a "
            "copy. Draw from the generator itself, and leave it where that ends",
        ),
    ):
        for i, (one, other) in enumerate(zip(drawn, others, strict=False)):
            if one == other:
                raise AssertionError(f"draw {i} of random numbers is the same {what}")
    return first, again


def follows_its_generator(
    init: Callable[[torch.Generator], Any], seed: int, fits: Callable[[Tensor], bool], wanted: str
) -> None:
    """Asserts that `init(generator)` gives finite float32 leaves that `fits`, twice the same."""
    first, again = drawn_from_its_generator(init, seed)
    for name, leaf in tree.named(first).items():
        if leaf.requires_grad:
            raise AssertionError(f"{name} requires a gradient: wanted numbers alone")
        if leaf.dtype != torch.float32 or not fits(leaf) or not bool(leaf.isfinite().all()):
            raise AssertionError(
                f"{name} is {leaf.dtype} of shape {tuple(leaf.shape)}, or not finite: wanted "
                f"finite float32{wanted}"
            )
    shared = "memory is shared, and an optimizer in place writes to all that share it"
    kept = tree.map(torch.clone, again)
    for leaf in tree.leaves(first):
        try:
            leaf += 1
        except RuntimeError as error:
            raise AssertionError(f"the elements of a leaf: {shared}") from error
    same_tree(again, kept, f"a second init after a change to the first ({shared})", "before")
    moved = tree.map(lambda leaf: leaf + 1, kept)
    same_tree(first, moved, f"the first init, 1 added to each leaf ({shared})", "the second + 1")


def vmaps(f: Callable[..., Any], axes: Sequence[int | None], args: Sequence[Any]) -> dict[str, Any]:
    """What `vmap(f)` over axis 0 of the `args` whose `axes` are 0 gives, by how it is asked:
    plainly, over another axis of the same numbers, and within another vmap.
    """

    def put(change: Callable[[Tensor], Tensor]) -> list[Any]:
        return [x if a is None else tree.map(change, x) for a, x in zip(axes, args, strict=True)]

    ends = tuple(None if axis is None else -1 for axis in axes)
    at_end = vmap(f, in_dims=ends)(*put(lambda t: t.movedim(0, -1)))
    twice = vmap(vmap(f, in_dims=tuple(axes)), in_dims=tuple(axes))
    nested = twice(*put(lambda t: torch.stack([t.flip(0), t])))
    return {
        "": vmap(f, in_dims=tuple(axes))(*args),
        ", of the last axis,": at_end,
        ", within another,": tree.map(lambda t: t[1], nested),
    }


def transposed(x: Tensor) -> Tensor:
    """The numbers of `x`, where it has two axes those of a transposed tensor in memory."""
    return x.mT.contiguous().mT if x.dim() > 1 else x


def strided(x: Tensor) -> Tensor:
    """The numbers of `x`, where it has an axis every second of another tensor."""
    return x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x


def any_cotangent(f: Callable[..., Any], *primals: Any) -> None:
    """Asserts that the gradients of `f` see the numbers of the cotangent, not its strides: `sum`
    hands on one that is expanded, a transposed product one that is transposed.
    """
    leaves = tree.map(lambda t: t.detach().clone().requires_grad_(), primals)
    values, flat = tree.leaves(f(*leaves)), tree.leaves(leaves)
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "expanded": lambda t: t.new_ones(()).expand_as(t),
        "transposed": lambda t: transposed(t.cos()),
        "strided": lambda t: strided(t.cos()),
    }
    for name, view in views.items():
        given = [view(value.detach()) for value in values]
        got, wanted = (
            torch.autograd.grad(
                values, flat, seeds, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for seeds in (given, [seed.contiguous().clone() for seed in given])
        )
        agree_trees(got, wanted, 64, f"by {name} cotangents, gradient", "by their copies, gradient")


def keeps_nothing(f: Callable[..., Any], arguments: Any, others: Any) -> None:
    """Asserts that a result of `f(*arguments)` stands after `f(*others)`, and that `f` sees what is
    written into its arguments; `arguments` and `others` are lists of alike tensors, or trees.
    """
    held = tree.map(torch.clone, arguments)
    first = f(*held)
    kept = tree.map(torch.clone, first)
    f(*others)
    same_tree(first, kept, "the first result after another call", "it before")
    tree.map(lambda old, new: old.copy_(new), held, others)
    seen, wanted = f(*held), f(*tree.map(torch.clone, others))
    same_tree(seen, wanted, "asked again after writing into the arguments, it", "of their copies")


def all_finite(found: dict[str, Tensor]) -> None:
    """Asserts that every tensor is finite."""
    odd = [name for name, leaf in found.items() if not bool(leaf.isfinite().all())]
    if odd:
        raise AssertionError(f"not finite: {', '.join(odd)}")


def every_leaf_counts(f: Callable[[Any], Tensor], params: Any, seed: int) -> None:
    """Asserts that no leaf of `params` has a derivative of zero in all of `f(params)`."""
    y, pullback = vjp(f, params)
    (slopes,) = pullback(torch.randn(y.shape, generator=draw.generator(seed), dtype=y.dtype))
    dead = [name for name, leaf in tree.named(slopes).items() if leaf.numel() and not leaf.any()]
    if dead:
        raise AssertionError(f"without influence: {dead}")


def adjoint(
    f: Callable[..., Tensor],
    x: tuple[Any, ...],
    seed: int,
    factor: float,
    places: Sequence[float] = (),
) -> None:
    """Asserts `<u, J v> = <J^T u, v>` for the Jacobian J of f at x, within `factor` roundings of
    what is summed, at x and where all of its last argument is one of `places`.
    """
    source = draw.generator(seed)
    tangents = tree.map(lambda t: torch.randn(t.shape, generator=source).double(), x)
    y, forward = jvp(f, x, tangents)
    u = torch.randn(y.shape, generator=source).double()
    reverse = vjp(f, *x)[1](u)
    right = tree.ravel(tree.map(torch.mul, reverse, tangents))
    size = right.abs().sum() + (u * forward).abs().sum() + 1e-30
    # terms that cancel at x are rounded as they are elsewhere
    others = [jvp(f, (*x[:-1], torch.full_like(x[-1], at)), tangents)[1] for at in places]
    sums = [(u * other).nan_to_num(0, 0, 0).abs().sum() for other in others]
    size = size + max(sums, default=0.0)
    limit = factor * unit(torch.float64) * size
    agree((u * forward).sum(), right.sum(), limit, "<u, J v>", "<J^T u, v>")


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


def check_slope(f: Callable[[Tensor], Tensor], x: Tensor, reach: float, name: str) -> None:
    """Asserts that elementwise `f` has at `x` the derivative that its values have."""
    low, high = _one_sided(f, x, reach)
    middle, width = (low + high) / 2, (high - low) / 2
    agree(slope(f, x), middle, width, f"{name} by autograd", "its difference quotient")


def check_line(f: Callable[..., Tensor], x: tuple[Any, ...], seed: int, step: float = 1.0) -> None:
    """Asserts that `f(*x)` has, along one line, the derivative that its values have."""
    source = draw.generator(seed)
    line = tree.map(lambda t: torch.randn(t.shape, generator=source).double(), x)
    probe = torch.randn(f(*x).shape, generator=source).double()

    def along(t: Tensor) -> Tensor:
        flat = [
            (f(*tree.map(lambda a, b, t=t: a + t * b, x, line)) * probe).sum()
            for t in step * t.flatten()
        ]
        return torch.stack(flat).reshape(t.shape)

    check_slope(along, torch.zeros(1, dtype=torch.float64), 1.0, "the derivative")
