"""The Triton engine in Triton's interpreter, on the CPU, against the plain expression in float64.

The interpreter must be chosen before Triton is imported, so cases run in a process of their own:
`TRITON_INTERPRET=1 PYTHONPATH=. python tests/test_triton.py GROUP` runs a group.
bfloat16 products are wrong in the interpreter (triton#11584): it sees float32 and float16 only.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from kart import bases
from kart.bases.basis import Triton, expansion
from kart.kernels import triton as engine
from kart.kernels.family import Family, Product, family_of

# relative error in the norm; float32 here is that of `tl.dot` in numpy
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3}


def small_tiles(kernel: str, *_: Any) -> engine.Tiles:
    """Many blocks of few tokens, several launches of few features."""
    return engine.Tiles(16, 32, 4, 2, 2 if kernel == "key_gradient" else 4)


def case(
    basis, n, m, width=16, rank=12, batch=2, heads=2, own=False, mask=None, dtype=torch.float32
) -> tuple[list[torch.Tensor], torch.Tensor | None, Family]:
    """Drawn `[dy, q, k, coefs]`, a mask of the given shape, and the family."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    q = draw(batch, n, heads, width).transpose(1, 2).to(dtype)
    k = draw(batch, m, heads, width).transpose(1, 2).to(dtype)
    family = family_of(basis)
    coefs = draw(batch if own else 1, heads, rank, m, family.width) / m**0.5
    dy = draw(batch, heads, n, rank).to(dtype)
    return [dy, q, k, coefs], None if mask is None else draw(*mask) > -0.5, family


def reference(tensors, mask, family, scale):
    """y and the gradients of q, k, coefs by the plain expression in float64."""
    dy, *leaves = [x.double() for x in tensors]
    q, k, coefs = (x.requires_grad_() for x in leaves)
    features = family.features(scale * q @ k.mT)
    if mask is not None:
        features = torch.where(mask[..., None], features, 0.0)
    y = torch.einsum("bhnmj,bhpmj->bhnp", features, coefs.expand(q.shape[0], -1, -1, -1, -1))
    # a constant basis does not depend on q and k
    gradients = torch.autograd.grad((y * dy).sum(), (q, k, coefs), materialize_grads=True)
    return [y.detach(), *gradients]


def compare(tensors, mask, family, scale=None, limit=None, **options) -> None:
    dy, q, k, coefs = tensors
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    product = Product(family, q, k, coefs, mask, scale)
    assert engine.refuses(product) == ""
    got = [engine.forward(product, **options)]
    got += engine.backward(product, dy, **options)
    limit = limit or LIMITS[q.dtype]
    wanted = reference(tensors, mask, family, scale)
    names = ["y", "dq", "dk", "dc"]
    for name, a, b, like in zip(names, got, wanted, tensors, strict=True):
        assert a.shape == b.shape and a.dtype == like.dtype and a.is_contiguous()
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-12)
        assert error < limit, f"{name} {tuple(b.shape)}: {error:.1e}"


# --- cases, run in the interpreter ----------------------------------------------------------------


def sizes() -> None:
    for n, m in [(1, 1), (1, 65), (63, 2), (65, 63), (2, 1)]:
        compare(*case(bases.fourier(3), n, m))


def grids_and_ranks() -> None:
    for grid, rank in [(1, 1), (1, 16), (3, 17), (5, 12)]:
        compare(*case(bases.fourier(grid), 20, 33, rank=rank, batch=1))
    # several launches of features, and of ranks
    compare(*case(bases.fourier(5), 20, 33, rank=3), choose=small_tiles)
    compare(*case(bases.fourier(2), 5, 9, rank=70, heads=1), choose=small_tiles)
    compare(*case(bases.fourier(10), 5, 9, heads=1))


def masks() -> None:
    for shape in [(2, 1, 1, 33), (1, 1, 20, 33), (2, 2, 20, 33), (1, 1, 20, 1), (1, 1, 1, 1)]:
        compare(*case(bases.fourier(2, base="silu"), 20, 33, rank=3, mask=shape))
    for shape in [(2, 1, 1, 33), (1, 1, 20, 33)]:
        compare(*case(bases.bspline(1), 20, 33, heads=1, mask=shape), choose=small_tiles)
    tensors, _, family = case(bases.fourier(3), 20, 33)
    nothing = torch.zeros(1, 1, 1, 33, dtype=torch.bool)
    dy, *leaves = tensors
    for x in engine.backward(Product(family, *leaves, nothing, 0.25), dy):
        assert_close(x, torch.zeros_like(x))
    # an infinite score that nobody attends to
    nothing[..., 1:] = True
    tensors[2][:, :, 0] = torch.inf
    assert engine.forward(Product(family, *leaves, nothing, 0.25)).isfinite().all()


def strides() -> None:
    family = family_of(bases.fourier(2))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 20, 16, generator=generator).expand(-1, 3, -1, -1)
    k = torch.randn(2, 3, 9, 32, generator=generator)[..., ::2]
    coefs = torch.randn(1, 1, 5, 9, 4, generator=generator).expand(-1, 3, -1, -1, -1)
    dy = torch.ones(1).expand(2, 3, 20, 5)
    compare([dy, q, k, coefs], None, family)
    mask = (torch.rand(2, 3, 9, 20, generator=generator) > 0.3).mT
    compare([dy, q, k, coefs], mask, family)
    # heads before samples
    turned = [x.transpose(0, 1) for x in (dy, q, k)]
    compare([*turned, coefs[:, :2]], mask.transpose(0, 1), family)


def own_coefficients() -> None:
    compare(*case(bases.fourier(3), 20, 33, own=True, mask=(2, 1, 1, 33)))
    compare(*case(bases.fourier(3), 20, 33, batch=3, heads=1, own=True), choose=small_tiles)


def families() -> None:
    every = [bases.polynomial(0), bases.polynomial(3), bases.chebyshev(0), bases.chebyshev(5)]
    every += [bases.gaussian_rbf(5, span=(-2.0, 3.0)), bases.bspline(3, span=(-1.0, 2.0))]
    for basis in every:
        compare(*case(basis, 20, 33, rank=5, heads=1), scale=0.7)
    for base in ("identity", "silu", "gelu"):
        compare(*case(bases.chebyshev(2, base=base), 9, 5, rank=5, heads=1), choose=small_tiles)


# a new family is one file, its features in Triton among the others
SINES = """
def start(x, gate, origin, density, FAST: tl.constexpr):
    return (x - origin) * density, gate


def feature(state, density, J: tl.constexpr, SIZE: tl.constexpr):
    t, gate = state
    order = J + 1
    value = 2.0 * tl.sin(t * order) * gate
    return value, 2.0 * density * order * tl.cos(t * order) * gate, state
"""


def sines(size: int) -> bases.Basis:
    def expand(x):
        return torch.stack([((x - 1) * 0.5 * (j + 1)).sin() for j in range(size)], -1)

    shared = {"base": "zero", "init": "scaled", "scales": False}
    piece = Triton(SINES, 1.0, 0.5, rescale=lambda coefs: coefs.mul_(0.5))
    return expansion(sines, expand, size, **shared, options={"size": size}, traits={}, triton=piece)


def new_families() -> None:
    for mask in (None, (2, 1, 1, 33), (1, 1, 20, 33)):
        compare(*case(sines(3), 20, 33, rank=5, heads=1, mask=mask))
    compare(*case(sines(5), 9, 5, rank=5, heads=1), choose=small_tiles)


def half_precision() -> None:
    compare(*case(bases.fourier(3), 20, 33, dtype=torch.float16))


def large_scores() -> None:
    tensors, mask, family = case(bases.fourier(3), 20, 33)
    for size in (1e2, 1e3, 1e5):
        dy, q, k, coefs = tensors
        scores = q @ k.mT
        scale = size / scores.abs().max().item()
        # rounded to float32 a score is right to eps / 2, a sum of 16 products to some more
        limit = 3 * size * torch.finfo(torch.float32).eps
        compare([dy, q, k, coefs], mask, family, scale=scale, limit=limit)
    for size in (1e7, 1e20, 1e37):
        scale = size / scores.abs().max().item()
        y = engine.forward(Product(family, q, k, coefs, mask, scale))
        assert y.isfinite().all() and y.abs().max() <= 2 * coefs.abs().sum((3, 4)).max()


def repeats() -> None:
    tensors, mask, family = case(bases.fourier(1), 65, 63, heads=1, mask=(2, 1, 1, 63))
    dy, q, k, coefs = tensors
    product = Product(family, q, k, coefs, mask, 0.25)
    first, second = (engine.backward(product, dy) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(*(engine.forward(product) for _ in range(2)))


def empty_batch() -> None:
    (dy, q, k, coefs), mask, family = case(bases.fourier(3), 5, 4, batch=1)
    dy, q, k = dy[:0], q[:0], k[:0]
    product = Product(family, q, k, coefs, mask, 0.25)
    assert engine.forward(product).shape == (0, 2, 5, 12)
    dq, dk, dc = engine.backward(product, dy)
    assert dq.shape == q.shape and dk.shape == k.shape
    assert_close(dc, torch.zeros_like(coefs))


def images() -> None:
    for n, m in [(197, 197), (785, 197), (64, 785)]:
        compare(*case(bases.fourier(3), n, m, width=64, batch=1, heads=1))


# those of a row share a process, most of whose time goes into imports
GROUPS = {
    "sizes": [sizes, grids_and_ranks, empty_batch],
    "inputs": [masks, strides, own_coefficients],
    "values": [families, new_families, half_precision, large_scores, repeats],
    "images": [images],
}


@pytest.mark.parametrize(
    "group", ["sizes", "inputs", "values", pytest.param("images", marks=pytest.mark.slow)]
)
def test_the_kernels_are_the_plain_expression_in_the_interpreter(group):
    pytest.importorskip("triton")
    root = Path(__file__).parents[1]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, group]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# --- in this process ------------------------------------------------------------------------------


def test_a_basis_is_known_by_what_its_family_declares():
    for basis in [
        bases.fourier(4, base="gelu"),
        bases.polynomial(2),
        bases.chebyshev(3, span=(-1.0, 5.0)),
        bases.gaussian_rbf(4),
        bases.bspline(6, span=(-3.0, 3.0), base="identity"),
    ]:
        kind = engine.kind_of(family_of(basis))
        assert kind is not None and kind.name == basis.family and kind.size == basis.size
    fourier = bases.fourier(2)
    for basis in [
        bases.bspline(6, degree=2),
        bases.linear(torch.nn.functional.one_hot, 2, family="mine"),
        bases.linear(lambda x: torch.stack([x.sin(), x.cos()], -1), 2, family="fourier"),
        bases.linear(lambda x: torch.stack([x, x], -1), 2, family="chebyshev"),
        fourier._replace(features=lambda x: 2 * fourier.expand(x)),
    ]:
        assert engine.kind_of(family_of(basis)) is None


def test_what_it_cannot_take_is_said():
    tensors, mask, family = case(bases.fourier(3), 5, 4)
    reason = engine.refuses(Product(family, *tensors[1:], mask, 0.25))
    if engine.status() == "ready":
        assert reason == "the Triton engine runs on CUDA, not on cpu"
    else:
        assert reason == engine.status()


# --- on a GPU -------------------------------------------------------------------------------------

GPU_LIMITS = {
    (torch.bfloat16, None): 1e-2,
    (torch.float16, None): 2e-3,
    (torch.float32, "tf32"): 5e-3,
    (torch.float32, "tf32x3"): 5e-6,
    (torch.float32, "ieee"): 5e-6,
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("dtype", "precision"), GPU_LIMITS, ids=str)
@pytest.mark.parametrize(
    ("basis", "options"),
    [
        (bases.fourier(1), {}),
        (bases.fourier(3), {"rank": 17}),
        (bases.fourier(3), {"mask": (2, 1, 1, 197), "own": True}),
        (bases.fourier(3), {"mask": (1, 1, 65, 197), "width": 128}),
        (bases.fourier(10), {"rank": 70, "width": 20}),
        (bases.chebyshev(4), {"width": 32}),
        (bases.gaussian_rbf(6), {}),
        (bases.bspline(5, base="silu"), {}),
        (bases.polynomial(3), {}),
    ],
    ids=lambda x: x.family if isinstance(x, bases.Basis) else str(x),
)
def test_the_kernels_are_the_plain_expression_on_the_gpu(dtype, precision, basis, options):
    options = {"width": 64, **options}
    tensors, mask, family = case(basis, 65, 197, dtype=dtype, **options)
    # inputs as the kernels see them, so that the error is the kernels'
    wanted = reference(tensors, mask, family, 0.125)
    dy, q, k, coefs = (x.cuda() for x in tensors)
    mask = None if mask is None else mask.cuda()
    product = Product(family, q, k, coefs, mask, 0.125)
    got = [engine.forward(product, precision)]
    got += engine.backward(product, dy, precision)
    again = engine.backward(product, dy, precision)
    for a, b in zip(got[1:], again, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(got, wanted, strict=True):
        error = (a.double().cpu() - b).norm() / b.norm()
        assert error < GPU_LIMITS[dtype, precision]


if __name__ == "__main__":
    torch.set_num_threads(1)
    # fills `torch.empty` with NaN, so that an output nobody wrote is seen
    torch.use_deterministic_algorithms(True)
    for run in GROUPS[sys.argv[1]]:
        run()
