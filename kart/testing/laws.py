"""What suites of several kinds ask alike: purity, one seed, derivatives that fit together."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from kart import tree
from kart.testing import draw
from kart.testing.compare import agree, same, same_tree, unit

# what an object is taken to hold under, unless its traits say False
TRANSFORMS = {"vmap": True, "forward_mode": True, "second_derivative": True}


def vjp(f: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.vjp`, typed as the pair that it returns without `has_aux`."""
    value, pullback, *_ = torch.func.vjp(f, *primals)
    return value, pullback


def eager_vjp(f: Callable[..., Tensor], *primals: Any) -> tuple[Tensor, Callable[..., Any]]:
    """As `vjp`, by `torch.autograd` outside all transforms; the value is that of a plain call."""
    leaves = tree.map(lambda t: t.clone().requires_grad_(), primals)
    y, flat = f(*leaves), tree.leaves(leaves)

    def pullback(cotangent: Tensor) -> Any:
        if not y.requires_grad:
            return tree.map(torch.zeros_like, primals)
        found = iter(
            torch.autograd.grad(y, flat, cotangent, allow_unused=True, materialize_grads=True)
        )
        return tree.map(lambda t: next(found), primals)

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


def follows_its_generator(
    init: Callable[[torch.Generator], Any], seed: int, fits: Callable[[Tensor], bool], wanted: str
) -> None:
    """Asserts that `init(generator)` gives finite float32 leaves that `fits`, twice the same."""
    first = init(draw.generator(seed))
    with another_seed(seed + 7):
        again = init(draw.generator(seed))
    for name, leaf in tree.named(first).items():
        if leaf.dtype != torch.float32 or not fits(leaf) or not bool(leaf.isfinite().all()):
            raise AssertionError(
                f"{name} is {leaf.dtype} of shape {tuple(leaf.shape)}, or not finite: wanted "
                f"finite float32{wanted}"
            )
        same(tree.named(again)[name], leaf, f"{name} of a second init", "that of the first")


def all_finite(found: dict[str, Tensor]) -> None:
    """Asserts that every tensor is finite."""
    odd = [name for name, leaf in found.items() if not bool(leaf.isfinite().all())]
    if odd:
        raise AssertionError(f"not finite: {', '.join(odd)}")


def adjoint(f: Callable[..., Tensor], x: tuple[Any, ...], seed: int, factor: float) -> None:
    """Asserts `<u, J v> = <J^T u, v>` for the Jacobian J of f at x, within `factor` roundings."""
    source = draw.generator(seed)
    tangents = tree.map(lambda t: torch.randn(t.shape, generator=source).double(), x)
    y, forward = jvp(f, x, tangents)
    u = torch.randn(y.shape, generator=source).double()
    reverse = vjp(f, *x)[1](u)
    terms = tree.leaves(tree.map(lambda a, b: (a * b).flatten(), reverse, tangents))
    right = torch.cat(terms)
    size = right.abs().sum() + (u * forward).abs().sum() + 1e-30
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
    y, pullback = vjp(f, x)
    (slope,) = pullback(torch.ones_like(y))
    low, high = _one_sided(f, x, reach)
    middle, width = (low + high) / 2, (high - low) / 2
    agree(slope, middle, width, f"{name} by autograd", "its difference quotient")


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
