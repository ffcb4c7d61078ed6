"""The Triton engine in Triton's interpreter, on the CPU, against the plain expression in float64.

The interpreter must be chosen before Triton is imported, so cases run in a process of their own:
`TRITON_INTERPRET=1 PYTHONPATH=. python tests/test_triton.py GROUP` runs a group.
bfloat16 products are wrong in the interpreter (triton#11584): it sees float32 and float16 only.
"""

import functools
import sys
import types
from typing import Any

import interpreter
import pytest
import torch
from torch.testing import assert_close

from kart import bases, kernels
from kart.bases.basis import Shared, Triton, assemble, expansion
from kart.kernels import core, plain
from kart.kernels import triton as engine
from kart.kernels.arguments import room_like
from kart.kernels.family import Family, Product, family_of
from kart.kernels.triton import launch, values

# relative error in the norm; float32 here is that of `tl.dot` in numpy
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3}

# a unit may be steep where a feature is not
UNIT_LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3}


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
    # as the values of a model lie, so that nothing is copied after it
    laid = [torch.empty(dy.shape), room_like(q), room_like(k), torch.empty(coefs.shape)]
    assert [x.stride() for x in got] == [x.stride() for x in laid]
    wanted = reference(tensors, mask, family, scale)
    agree(["y", "dq", "dk", "dc"], got, wanted, tensors, limit or LIMITS[q.dtype])


def agree(names, got, wanted, likes, limit) -> None:
    for name, a, b, like in zip(names, got, wanted, likes, strict=True):
        assert a.shape == b.shape and a.dtype == like.dtype
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-12)
        assert error < limit, f"{name} {tuple(b.shape)}: {error:.1e}"


def unit_case(
    basis, n, m, width=16, rank=3, batch=2, heads=1, own=False, mask=None, dtype=torch.float32,
    spread=0.2,
):  # fmt: skip
    """Drawn `{"dy", "q", "k", the parameters of nonlinear units}`, a mask, and the family."""
    (dy, q, k, _), mask, family = case(basis, n, m, width, rank, batch, heads, own, mask, dtype)
    generator = torch.Generator().manual_seed(1)
    units = basis.init(generator, (batch if own else 1, heads, rank, m))
    for name, x in units.items():
        # `init` draws some of them all equal
        units[name] = x + spread * torch.randn(x.shape, generator=generator)
    return {"dy": dy, "q": q, "k": k, **units}, mask, family


def unit_reference(tensors, mask, family, scale):
    """y and the gradients of q, k and the parameters by the plain expression in float64."""
    dy, *leaves = [x.double() for x in tensors.values()]
    q, k, *parameters = (x.requires_grad_() for x in leaves)
    units = dict(zip([*tensors][3:], parameters, strict=True))
    samples = []
    for i in range(q.shape[0]):
        own = {name: x[i if x.shape[0] > 1 else 0] for name, x in units.items()}
        keep = None if mask is None else mask.expand(q.shape[0], -1, -1, -1)[i]
        samples.append(plain.contract_units(family.basis, own, q[i], k[i], keep, scale))
    y = torch.stack(samples)
    return [y.detach(), *torch.autograd.grad((y * dy).sum(), (q, k, *parameters))]


def unit_results(tensors, mask, family, scale, **options):
    """The same by the kernels."""
    dy, q, k, *_ = tensors.values()
    units = {name: x.clone().requires_grad_() for name, x in [*tensors.items()][3:]}
    coefs = family.pieces.leaves(units)
    product = Product(family, q, k, coefs.detach(), mask, scale)
    assert engine.refuses(product) == ""
    y = engine.forward(product, **options)
    dq, dk, dcoefs = engine.backward(product, dy, **options)
    laid = [torch.empty(dy.shape), room_like(q), room_like(k), torch.empty(coefs.shape)]
    assert [x.stride() for x in (y, dq, dk, dcoefs)] == [x.stride() for x in laid]
    assert dcoefs.dtype == coefs.dtype
    return [y, dq, dk, *torch.autograd.grad(coefs, [*units.values()], dcoefs)]


def compare_units(tensors, mask, family, scale=0.7, limit=None, **options) -> None:
    got = unit_results(tensors, mask, family, scale, **options)
    wanted = unit_reference(tensors, mask, family, scale)
    limit = limit or UNIT_LIMITS[tensors["q"].dtype]
    agree(["y", *[*tensors][1:]], got, wanted, tensors.values(), limit)


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
    every += [bases.bspline(4, degree, span=(-2.0, 2.0)) for degree in (1, 2, 4, 5)]
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

    shared = Shared("zero", "scaled", False)
    piece = Triton(SINES, 1.0, 0.5, rescale=lambda coefs: coefs.mul_(0.5))
    return expansion(sines, expand, size, shared, options={"size": size}, traits={}, triton=piece)


def new_families() -> None:
    for mask in (None, (2, 1, 1, 33), (1, 1, 20, 33)):
        compare(*case(sines(3), 20, 33, rank=5, heads=1, mask=mask))
    compare(*case(sines(5), 9, 5, rank=5, heads=1), choose=small_tiles)


def own_pieces() -> None:
    """A basis of one's own brings its piece; a wrong one is refused."""
    draw = engine.cpp._cases
    engine.cpp._cases = lambda family, attempt: draw(family, attempt)[:1]
    (_, q, k, coefs), mask, _ = case(sines(2), 9, 5, rank=5, heads=1)
    for text, words in [
        (SINES, ""),
        (SINES.replace("tl.cos(t", "tl.cos(0.99 * t"), "self-check failed: dq"),
        (SINES.replace("tl.sin", "tl.sine"), "has no attribute"),
    ]:
        piece = sines(2).pieces.triton._replace(text=text)
        basis = bases.linear(sines(2).expand, 2, family="own-sines", triton=piece)
        product = Product(family_of(basis), q, k, coefs, mask, 0.25)
        assert words in engine.refuses(product) and bool(words) == bool(engine.refuses(product))
        found = kernels.contract(basis, coefs, q, k, mask, 0.25, "auto" if words else "triton")
        assert_close(found, plain.contract(basis, coefs, q, k, mask, 0.25))


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


UNITS = [
    bases.rational(),
    bases.rational(0, 1),
    bases.rational(2, 3, base="identity", scales=True),
    bases.mexican_hat(),
    bases.mexican_hat("negated", base="silu", scales=True),
    bases.morlet(),
    bases.morlet(2.5),
    bases.dog(),
    bases.meyer(),
    bases.meyer("direct", base="gelu"),
    bases.shannon(),
    bases.shannon(half_width=2.0),
    bases.shannon("index"),
]


def unit_families() -> None:
    for basis in UNITS:
        compare_units(*unit_case(basis, 20, 33))


def unit_sizes() -> None:
    for n, m, rank in [(1, 1, 1), (1, 65, 2), (65, 63, 5)]:
        compare_units(*unit_case(bases.dog(), n, m, rank=rank))
    drawn = torch.rand(4, 6, generator=torch.Generator().manual_seed(2))
    most = torch.tensor([80.0, 80.0, 128.0, 9.0, 3.0, 3.0])
    for n, m, width, rank, batch, heads in (1 + drawn * (most - 1)).round().int().tolist():
        inputs = unit_case(bases.dog(), n, m, width, rank, batch, heads)
        compare_units(*inputs, scale=width**-0.5)
    # several launches of ranks
    compare_units(*unit_case(bases.dog(), 20, 33, rank=19, batch=1))
    compare_units(*unit_case(bases.rational(), 20, 33, rank=13, batch=1))
    compare_units(*unit_case(bases.dog(), 20, 33, rank=5), choose=small_tiles)


def unit_masks() -> None:
    for shape in [(2, 1, 1, 33), (1, 1, 20, 33), (2, 2, 20, 33), (1, 1, 20, 1), (1, 1, 1, 1)]:
        basis = bases.mexican_hat(base="silu")
        compare_units(*unit_case(basis, 20, 33, heads=2, mask=shape))
    compare_units(*unit_case(bases.rational(2, 2), 20, 33, mask=(1, 1, 20, 33)), choose=small_tiles)
    tensors, _, family = unit_case(bases.meyer(), 20, 33)
    nothing = torch.zeros(1, 1, 1, 33, dtype=torch.bool)
    for x in unit_results(tensors, nothing, family, 0.7):
        assert_close(x, torch.zeros_like(x))
    # an infinite score that nobody attends to
    nothing[..., 1:] = True
    tensors["k"][:, :, 0] = torch.inf
    for i, x in enumerate(unit_results(tensors, nothing, family, 0.7)):
        assert i == 1 or x.isfinite().all()  # dq meets the key itself


def unit_inputs() -> None:
    for mask in (None, (2, 1, 1, 33)):
        compare_units(*unit_case(bases.shannon(), 20, 33, heads=2, own=True, mask=mask))
    compare_units(*unit_case(bases.dog(), 20, 33, batch=3, own=True), choose=small_tiles)
    # strides of every kind
    tensors, _, family = unit_case(bases.dog(), 20, 9, heads=3)
    generator = torch.Generator().manual_seed(0)
    tensors["q"] = torch.randn(2, 1, 20, 16, generator=generator).expand(-1, 3, -1, -1)
    tensors["k"] = torch.randn(2, 3, 9, 32, generator=generator)[..., ::2]
    tensors["dy"] = torch.ones(1).expand(2, 3, 20, 3)
    mask = (torch.rand(2, 3, 9, 20, generator=generator) > 0.3).mT
    compare_units(tensors, None, family)
    compare_units(tensors, mask, family)
    # half types: parameters of their own dtype or float32
    for basis in (bases.dog(), bases.rational(3, 2)):
        tensors, mask, family = unit_case(basis, 20, 33, dtype=torch.float16)
        compare_units(tensors, mask, family)
    tensors = {name: x.half() for name, x in tensors.items()}
    compare_units(tensors, mask, family)
    # several samples in a slice of the batch, and no sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "PROGRAMS", 2)
        compare_units(*unit_case(bases.dog(), 3, 2, batch=3, rank=2))
    tensors, mask, family = unit_case(bases.dog(), 3, 2)
    tensors = {name: x[:0] if name in ("dy", "q", "k") else x for name, x in tensors.items()}
    y, dq, dk, *rest = unit_results(tensors, mask, family, 0.7)
    assert y.shape == (0, 1, 3, 3) and dq.shape == tensors["q"].shape
    assert all(not x.any() for x in rest)


# one that is not zero where its parameters are, as they are beyond the keys of a block
BUMP = """
def unit(x, theta, FAST: tl.constexpr):
    t = x - theta[0]
    value = tl.exp(-SHARP * t * t)
    slope = -2.0 * SHARP * t * value
    return value, slope, (-slope,)
"""


def bump(sharp: float) -> bases.Basis:
    def core(params, x):
        return torch.exp(-sharp * (x - params["centre"]) ** 2)

    options = {"sharp": sharp}
    return assemble(
        "bump",
        1,
        lambda generator, shape: {"centre": bases.normal(generator, shape)},
        core,
        None,
        "zero",
        False,
        options,
        {},
        (bump, options),
        f"tests:bump?{sharp}",
        triton=Triton(BUMP, sizes={"SHARP": sharp}),
        leaves=lambda params: params["centre"][..., None],
    )


def new_units() -> None:
    for sharp in (0.5, 2.0):
        compare_units(*unit_case(bump(sharp), 20, 33, rank=5))
    compare_units(*unit_case(bump(0.5), 20, 33, mask=(1, 1, 20, 33)), choose=small_tiles)


def far_units() -> None:
    for basis in UNITS:
        if basis.family == "rational":
            continue
        tensors, mask, family = unit_case(basis, 20, 33, batch=1)
        # the last makes scores infinite, and with them a base activation
        for size in (1e4, 1e9, 1e30, 1e38)[: 4 if family.base == "zero" else 3]:
            for x in unit_results(tensors, mask, family, size):
                assert x.isfinite().all(), basis.family
        # what is not a number stays seen
        tensors["q"][..., 3, 0] = torch.nan
        assert unit_results(tensors, mask, family, 0.7)[0][..., 3, :].isnan().all(), basis.family


def unit_repeats() -> None:
    inputs = unit_case(bases.morlet(), 65, 63, mask=(2, 1, 1, 63))
    first, second = (unit_results(*inputs, 0.25) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def unit_entry() -> None:
    """The public product takes the kernels, under transforms too."""
    basis = bases.mexican_hat()
    tensors, mask, family = unit_case(basis, 9, 5, batch=3, heads=2, mask=(3, 1, 1, 5))
    dy, q, k, *leaves = tensors.values()
    names = [*tensors][3:]
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        spy = types.SimpleNamespace(
            refuses=engine.refuses,
            forward=lambda product: calls.append("forward") or engine.forward(product),
            backward=lambda product, dy: calls.append("backward") or engine.backward(product, dy),
        )
        patch.setattr(core, "cpp", spy)  # the engine of the CPU

        def loss(q, k, mask, dy, *leaves):
            units = {name: x[0] for name, x in zip(names, leaves, strict=True)}
            return (kernels.contract_units(basis, units, q, k, mask, 0.7) * dy).sum()

        learned = (0, 1, *range(4, 4 + len(leaves)))
        found = torch.func.grad(loss, learned)(q, k, mask, dy, *leaves)
        each = torch.func.vmap(torch.func.grad(loss, learned), (0, 0, 0, 0) + (None,) * len(leaves))
        per_example = each(q, k, mask, dy, *leaves)
    assert calls == ["forward", "backward"] * 2
    wanted = unit_reference(tensors, mask, family, 0.7)[1:]
    agree([*tensors][1:], found, wanted, [*tensors.values()][1:], 2e-5)
    summed = [*per_example[:2], *(x.sum(0) for x in per_example[2:])]
    agree([*tensors][1:], summed, wanted, [*tensors.values()][1:], 2e-5)


VALUES = [  # samples of the mix, B, H, M, N, width, rank, and the dtype of v, y and dout
    (1, 2, 2, 53, 37, 5, 13, torch.float32),
    (2, 2, 2, 70, 130, 64, 12, torch.float32),
    (1, 1, 2, 700, 37, 48, 1, torch.float16),
    (1, 3, 1, 1, 1, 128, 64, torch.float16),
]


def value_case(own, batch, heads, keys, queries, width, rank, dtype, device="cpu"):
    """What `values` gives for drawn operands, some of them views, and what is right."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    v, dout, beside = (
        draw(batch, n, heads, width).to(device, dtype).transpose(1, 2)
        for n in (keys, queries, queries)
    )
    y = draw(batch, heads, rank, queries).to(device, dtype).mT
    mix = draw(own, heads, keys, rank).to(device)
    more = [beside] if own > 1 else []
    out, hidden = values.forward(v, y, mix, *more)
    dv, dy, dmix = values.backward(dout, v, y, mix, hidden)
    v, y, mix, dout, *more = (x.double().cpu() for x in (v, y, mix, dout, *more))
    dhidden = y.mT @ dout
    wanted = {
        "out": sum(more, start=y @ (mix.mT @ v)),
        "dv": mix @ dhidden,
        "dy": dout @ (mix.mT @ v).mT,
        "dmix": (v @ dhidden.mT).sum_to_size(mix.shape),
    }
    return [out, dv, dy, dmix], wanted


def between_tokens_and_ranks():
    for sizes in VALUES:
        got, wanted = value_case(*sizes)
        likes = [torch.empty(0, dtype=sizes[-1])] * 3 + [torch.empty(0)]
        agree(list(wanted), got, list(wanted.values()), likes, LIMITS[sizes[-1]])


# those of a row share a process, most of whose time goes into imports
GROUPS = {
    "sizes": [sizes, grids_and_ranks, empty_batch],
    "inputs": [masks, strides, own_coefficients],
    "values": [families, new_families, own_pieces, half_precision, large_scores, repeats],
    "mixes": [between_tokens_and_ranks],
    "units": [unit_families, new_units, unit_repeats, unit_entry],
    "unit inputs": [unit_sizes, unit_masks, unit_inputs, far_units],
    "images": [images],
}


@pytest.mark.parametrize(
    "group",
    [pytest.param(x, marks=[pytest.mark.slow] if x == "images" else []) for x in GROUPS],
)
def test_the_kernels_are_the_plain_expression_in_the_interpreter(group):
    interpreter.run(__file__, group)


# --- in this process ------------------------------------------------------------------------------


def test_a_basis_is_known_by_what_its_family_declares():
    for basis in [
        bases.fourier(4, base="gelu"),
        bases.polynomial(2),
        bases.chebyshev(3, span=(-1.0, 5.0)),
        bases.gaussian_rbf(4),
        bases.bspline(6, span=(-3.0, 3.0), base="identity"),
        bases.bspline(6, degree=1),
        *UNITS,
    ]:
        kind = engine.kind_of(family_of(basis))
        assert kind is not None and kind.name == basis.family and kind.size == basis.size
    fourier = bases.fourier(2)
    for basis in [
        bases.bspline(6, degree=0),
        bases.bspline(6, degree=6),
        bases.linear(torch.nn.functional.one_hot, 2, family="mine"),
        bases.linear(lambda x: torch.stack([x.sin(), x.cos()], -1), 2, family="fourier"),
        bases.linear(lambda x: torch.stack([x, x], -1), 2, family="chebyshev"),
        fourier._replace(features=lambda x: 2 * fourier.expand(x)),
        bases.dog()._replace(apply=lambda params, x: 2 * bases.dog().apply(params, x)),
    ]:
        assert engine.kind_of(family_of(basis)) is None


def test_what_it_cannot_take_is_said():
    tensors, mask, family = case(bases.fourier(3), 5, 4)
    reason = engine.refuses(Product(family, *tensors[1:], mask, 0.25))
    if engine.status() == "ready":
        assert reason == "the Triton engine runs on CUDA, not on cpu"
    else:
        assert reason == engine.status()


@pytest.mark.parametrize(
    ("found", "words"), [((7, 5), "needs sm_80 or later, not sm_75"), ((8, 0), "")]
)
def test_a_gpu_without_bfloat16_and_tf32_is_refused(found, words, monkeypatch):
    monkeypatch.setattr(engine, "status", lambda: "ready")
    monkeypatch.setattr(engine, "capability", lambda device: found)
    reason = engine.refuses_device(torch.device("cuda", 1))
    assert reason.endswith(words) and bool(reason) == bool(words)


def test_a_unit_of_too_many_parameters_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(1, 1, 2, 3)
    for basis, words in [
        (bases.rational(12, 12), ""),
        (bases.rational(12, 12, base="silu"), "takes units of 25 parameters at most, not 26"),
    ]:
        family = family_of(basis)
        coefs = torch.zeros(1, 1, 1, 2, family.width)
        reason = engine.refuses(Product(family, x, x, coefs, None, 1.0))
        assert reason == words or (words and words in reason)


@pytest.mark.parametrize("narrow", ["q", "coefs"])
def test_bfloat16_is_refused_in_the_interpreter_alone(narrow, monkeypatch):
    tensors, mask, family = case(bases.fourier(3), 5, 4)
    _, q, k, coefs = tensors
    if narrow == "q":
        q, k = q.bfloat16(), k.bfloat16()
    else:
        coefs = coefs.bfloat16()
    product = Product(family, q, k, coefs, mask, 0.25)
    assert "bfloat16" not in engine.refuses(product)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if engine.status() == "ready":
        assert "multiplies bfloat16 wrong" in engine.refuses(product)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("dtype", "precision"), GPU_LIMITS, ids=str)
@pytest.mark.parametrize(
    ("basis", "options"),
    [
        (bases.dog(), {}),
        (bases.mexican_hat(base="silu", scales=True), {"rank": 17}),
        (bases.mexican_hat(), {"mask": (2, 1, 1, 197), "own": True}),
        (bases.morlet(), {"mask": (1, 1, 65, 197), "width": 128}),
        (bases.meyer(), {"rank": 70, "width": 20}),
        (bases.shannon(), {"width": 32}),
        (bases.rational(), {"rank": 12}),
        (bases.rational(7, 6, base="gelu"), {"width": 128}),
    ],
    ids=lambda x: x.family if isinstance(x, bases.Basis) else str(x),
)
def test_units_are_the_plain_expression_on_the_gpu(dtype, precision, basis, options):
    tensors, mask, family = unit_case(basis, 65, 197, dtype=dtype, **{"width": 64, **options})
    # numbers that tf32 holds: it cuts others off, and where a unit is steep that shows
    tensors |= {name: tensors[name].bfloat16().to(dtype) for name in "qk"}
    wanted = unit_reference(tensors, mask, family, 0.125)
    tensors = {name: x.cuda() for name, x in tensors.items()}
    mask = None if mask is None else mask.cuda()
    got, again = (unit_results(tensors, mask, family, 0.125, precision=precision) for _ in range(2))
    limit = GPU_LIMITS[dtype, precision]
    if dtype == torch.float32:
        # a slope that jumps does so at a score that tf32 may put on the other side
        kinked = precision == "tf32" and basis.traits["smooth"] == 0
        limit = 10 * limit if kinked or precision != "tf32" else limit
    for a, b, c in zip(got, again, wanted, strict=True):
        assert torch.equal(a, b)
        error = (a.double().cpu() - c).norm() / c.norm()
        assert error < limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("sizes", [*VALUES, (1, 8, 3, 197, 197, 64, 12, torch.bfloat16)], ids=str)
def test_what_passes_between_tokens_and_ranks_on_the_gpu(sizes):
    got, wanted = value_case(*sizes, device="cuda")
    for a, b in zip(got, wanted.values(), strict=True):
        error = (a.double().cpu() - b).norm() / b.norm()
        assert error < (5e-6 if a.dtype == torch.float32 else GPU_LIMITS[a.dtype, None])


if __name__ == "__main__":
    torch.set_num_threads(1)
    # fills `torch.empty` with NaN, so that an output nobody wrote is seen
    torch.use_deterministic_algorithms(True)
    for run in GROUPS[sys.argv[1]]:
        run()
