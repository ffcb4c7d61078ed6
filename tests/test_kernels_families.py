"""Every family in the C++ engine, in float32 and half types, against the plain expression."""

import functools
import math
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import func
from torch.testing import assert_close

from kart import bases, kernels
from kart.bases.basis import Cpp
from kart.kernels import cpp, plain
from kart.kernels.family import family_of

pytestmark = pytest.mark.skipif(
    kernels.engines()["cpp"] != "ready", reason="the C++ engine does not run here"
)

LINEAR = {
    "fourier": bases.fourier(3),
    "fourier-silu": bases.fourier(3, base="silu"),
    "polynomial": bases.polynomial(5),
    "chebyshev": bases.chebyshev(5, span=(-3.0, 2.0)),
    "gaussian_rbf-gelu": bases.gaussian_rbf(8, base="gelu"),
    "bspline": bases.bspline(8),
    "bspline-identity": bases.bspline(12, 2, span=(-1.0, 2.0), base="identity", scales=True),
}
UNITS = {
    "rational": bases.rational(),
    "mexican_hat": bases.mexican_hat(),
    "mexican_hat-silu": bases.mexican_hat("negated", base="silu", scales=True),
    "morlet": bases.morlet(),
    "dog": bases.dog(),
    "meyer": bases.meyer(),
    "meyer-direct": bases.meyer("direct", base="gelu"),
    "shannon": bases.shannon(),
    "shannon-index": bases.shannon("index"),
}
# a build each of some seconds: those that share no piece of C++ with another
QUICK = {"fourier", "fourier-silu", "chebyshev", "bspline", "gaussian_rbf-gelu"}
QUICK |= {"rational", "mexican_hat", "meyer", "shannon"}
# one rounding of the inputs' dtype beside some hundred of float32
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def some(names):
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def units_of(basis, heads, rank, keys):
    params = basis.init(torch.Generator().manual_seed(0), (heads, rank, keys))
    return {name: leaf + 0.3 * draw(*leaf.shape, seed=9) for name, leaf in params.items()}


def check(f, reference, leaves, dtype):
    """Values and the gradients of all leaves, in the norm."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found, wanted = f(*leaves), reference(*exact)
    found, wanted = ((x if isinstance(x, tuple) else (x,)) for x in (found, wanted))
    probes = [draw(*x.shape, seed=5 + i) for i, x in enumerate(wanted)]
    for x in found:
        assert x.dtype == dtype
    total = sum((x.float() * p).sum() for x, p in zip(found, probes, strict=True))
    exact_total = sum((x * p).sum() for x, p in zip(wanted, probes, strict=True))
    gradients = torch.autograd.grad(total, leaves)
    exact_gradients = torch.autograd.grad(exact_total, exact, materialize_grads=True)
    pairs = zip((*found, *gradients), (*wanted, *exact_gradients), strict=True)
    for i, (a, b) in enumerate(pairs):
        assert a.isfinite().all()
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-6)
        assert error < LIMITS[dtype], f"{i}: {error:.1e}"


def inputs(batch, heads, queries, keys, width, dtype=torch.float32):
    q = draw(batch, queries, heads, width).transpose(1, 2).to(dtype)
    k = draw(batch, heads, width, keys, seed=1).mT.to(dtype)
    return q, k


def mask_of(masked, queries, keys):
    if masked == "whole":
        return None
    drawn = draw(queries, keys, seed=3) < 0.8
    return drawn[:1] if masked == "keys" else drawn


SIZES = [(1, 1, 1, 1, 1, 1), (2, 3, 37, 29, 7, 5), (1, 2, 65, 50, 33, 17)]


@pytest.mark.parametrize("masked", ["whole", "keys", "pairs"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", some(LINEAR))
def test_a_linear_family_has_the_plain_values_and_gradients(name, size, masked):
    basis = LINEAR[name]
    batch, heads, queries, keys, width, rank = size
    q, k = inputs(*size[:5])
    mask = mask_of(masked, queries, keys)
    coefs = draw(heads, keys, rank, basis.pieces.width, seed=2).transpose(1, 2) / keys**0.5
    check(
        lambda q, k, c: kernels.contract(basis, c, q, k, mask, engine="cpp"),
        lambda q, k, c: plain.contract(basis, c, q, k, mask),
        (q, k, coefs),
        torch.float32,
    )


@pytest.mark.parametrize("masked", ["whole", "keys", "pairs"])
@pytest.mark.parametrize("size", [*SIZES, (1, 1, 530, 13, 4, 2)])
@pytest.mark.parametrize("name", some(UNITS))
def test_nonlinear_units_have_the_plain_values_and_gradients(name, size, masked):
    basis = UNITS[name]
    batch, heads, queries, keys, width, rank = size
    q, k = inputs(*size[:5])
    mask = mask_of(masked, queries, keys)
    units = units_of(basis, heads, rank, keys)
    assert cpp.engine_of(family_of(basis), False)[1] == ""

    def of(module):
        return lambda q, k, *leaves: module.contract_units(
            basis, dict(zip(units, leaves, strict=True)), q, k, mask
        )

    check(of(kernels), of(plain), (q, k, *units.values()), torch.float32)


@pytest.mark.parametrize("masked", ["whole", "keys", "pairs"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["fourier", pytest.param("bspline", marks=pytest.mark.slow)])
def test_softmax_beside_the_product_has_the_plain_values_and_gradients(name, size, masked):
    basis = LINEAR[name]
    batch, heads, queries, keys, width, rank = size
    q, k = inputs(*size[:5])
    v = draw(batch, keys, heads, 19, seed=4).transpose(1, 2)
    mask = mask_of(masked, queries, keys)
    if masked == "pairs":
        mask[0] = False  # a query without keys
    coefs = draw(heads, rank, keys, basis.pieces.width, seed=2) / keys**0.5
    assert cpp.engine_of(family_of(basis), True)[1] == ""

    def reference(q, k, v, c):
        return plain.contract(basis, c, q, k, mask), plain.softmax_attention(q, k, v, mask)

    check(
        lambda q, k, v, c: kernels.contract_softmax(basis, c, q, k, v, mask),
        reference,
        (q, k, v, coefs),
        torch.float32,
    )


def test_softmax_beside_units_of_infinities_alone_is_no_number():
    basis, heads, keys = LINEAR["bspline"], 1, 7  # no spline is at infinity
    q, k = torch.full((1, heads, 5, 1), -1e30), torch.full((1, heads, keys, 1), 1e10)
    coefs = draw(heads, 3, keys, basis.size)
    y, out = kernels.contract_softmax(basis, coefs, q, k, torch.ones(1, heads, keys, 2))
    assert torch.equal(y, torch.zeros_like(y))
    assert out.isnan().all()
    mask = torch.ones(5, keys, dtype=torch.bool)
    mask[0], mask[1, 2] = False, False
    y, out = kernels.contract_softmax(basis, coefs, q, k, torch.ones(1, heads, keys, 2), mask)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
    assert out[:, :, 1:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_widened_on_their_way_in(dtype):
    basis, heads, rank, keys = LINEAR["fourier"], 2, 5, 29
    q, k = inputs(2, heads, 37, keys, 7, dtype)
    v = draw(2, heads, keys, 6, seed=4).to(dtype)
    coefs = draw(heads, rank, keys, 6, seed=2) / keys**0.5
    check(
        lambda q, k, c: kernels.contract(basis, c, q, k, engine="cpp"),
        lambda q, k, c: plain.contract(basis, c, q, k),
        (q, k, coefs),
        dtype,
    )
    check(
        lambda q, k, v, c: kernels.contract_softmax(basis, c, q, k, v),
        lambda q, k, v, c: (plain.contract(basis, c, q, k), plain.softmax_attention(q, k, v)),
        (q, k, v, coefs),
        dtype,
    )
    basis = UNITS["mexican_hat"]
    units = units_of(basis, heads, rank, keys)

    def of(module):
        return lambda q, k, *leaves: module.contract_units(
            basis, dict(zip(units, leaves, strict=True)), q, k
        )

    check(of(kernels), of(plain), (q, k, *units.values()), dtype)


@pytest.mark.parametrize("name", ["fourier-silu", "bspline"])
def test_units_of_a_linear_family_have_the_plain_values_and_gradients(name):
    basis = LINEAR[name]
    q, k = inputs(2, 3, 37, 29, 7)
    units = units_of(basis, 3, 5, 29)

    def of(module):
        return lambda q, k, *leaves: module.contract_units(
            basis, dict(zip(units, leaves, strict=True)), q, k
        )

    check(of(kernels), of(plain), (q, k, *units.values()), torch.float32)


@pytest.mark.parametrize("name", some(UNITS))
def test_what_is_not_a_number_stays_seen(name):
    q, k = inputs(1, 2, 37, 29, 7)
    q[:, 1, 3] = torch.nan
    y = kernels.contract_units(UNITS[name], units_of(UNITS[name], 2, 5, 29), q, k)
    assert y[:, 1, 3].isnan().all()
    assert y.isnan().sum() == 5


@pytest.mark.parametrize("engine", ["torch", "cpp"])
def test_angles_are_those_of_float64_as_far_as_float32_has_any(engine):
    def circle(angles):
        """cos and sin of `angles`, which are scores as they are, and the sum of their slopes."""
        q = angles[None, None, :, None].clone().requires_grad_()
        coefs, key = torch.eye(2)[None, :, None], torch.ones(1, 1, 1, 1)
        y = kernels.contract(bases.fourier(1), coefs, q, key, scale=1.0, engine=engine)
        (slope,) = torch.autograd.grad(y.sum(), q)
        return y[0, 0], slope[0, 0, :, 0]

    angles = torch.cat([sign * torch.linspace(2**19, 2**22, 4001) for sign in (1, -1)])
    y, slope = circle(angles)
    exact = angles.double()
    cosine, sine = exact.cos(), exact.sin()
    assert_close(y.double(), torch.stack([cosine, sine], -1), rtol=0, atol=4e-7)
    assert_close(slope.double(), cosine - sine, rtol=0, atol=8e-7)
    y, slope = circle(torch.tensor([1e7, -1e10, 1e25, -3e38]))
    assert_close(y.norm(dim=-1), torch.ones(4))
    assert_close(slope, y[:, 0] - y[:, 1])
    y, slope = circle(torch.tensor([torch.inf, -torch.inf, torch.nan]))
    assert y.isnan().all() and slope.isnan().all()


# --- transforms -----------------------------------------------------------------------------------


def squares(f):
    return lambda *args: sum((x**2).sum() for x in flat(f(*args)))


def flat(x):
    return [x] if isinstance(x, torch.Tensor) else [leaf for part in x for leaf in flat(part)]


def gradient(f):
    return func.grad(squares(f), argnums=(0, 1, 2))


def double_backward(f, *args):
    leaves = [x.clone().requires_grad_() for x in args]
    first = torch.autograd.grad(squares(f)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum((x**2).sum() for x in first), leaves)


def hvp(f, *args):
    tangents = tuple(x.cos() for x in args)
    return func.jvp(gradient(f), args, tangents)[1]


def hvp_reverse(f, *args):
    def directional(*a):
        return sum((x * y.cos()).sum() for x, y in zip(gradient(f)(*a), args, strict=True))

    return func.grad(directional, argnums=(0, 1, 2))(*args)


def jvp_of_a_pullback(f, *args):
    y, pullback = func.vjp(f, *args)
    cotangent = func.vjp(lambda *a: a, *flat(y))[0]
    shape = y if isinstance(y, tuple) else cotangent[0]
    return func.jvp(pullback, (shape,), (shape,))[1]


# of the first two with an axis of examples and the third without
TRANSFORMS = {
    "grad": lambda f, *a: gradient(f)(*a),
    "vmap": lambda f, *a: func.vmap(f, (0, 0, None))(*a),
    "vmap_third": lambda f, a, b, c: func.vmap(f, (None, None, 0))(
        a, b, torch.stack([c, c.flip(0)])
    ),
    "vmap_all": lambda f, a, b, c: func.vmap(f, (0, None, 0))(
        torch.stack([a, a.flip(0)]), b, torch.stack([c, c.flip(0)])
    ),
    "per_example_grad": lambda f, *a: func.vmap(gradient(f), (0, 0, None))(*a),
    "population_grad": lambda f, a, b, c: func.vmap(gradient(f), (None, None, 0))(
        a, b, torch.stack([c, c.flip(0)])
    ),
    "nested": lambda f, a, b, c: func.vmap(func.vmap(gradient(f), (0, 0, None)), (None, None, 0))(
        a, b, torch.stack([c, c.flip(0)])
    ),
    "double_backward": double_backward,
    "hvp": hvp,
    "hvp_reverse": hvp_reverse,
    "jvp": lambda f, *a: func.jvp(f, a, tuple(x.cos() for x in a)),
    "jvp_of_a_pullback": jvp_of_a_pullback,
    "per_example_hvp": lambda f, a, b, c: func.vmap(lambda a, b: hvp(f, a, b, c))(a, b),
}


@pytest.mark.parametrize("masked", ["whole", "pairs"])
@pytest.mark.parametrize("product", ["units", "softmax"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_a_fused_product_is_that_of_the_plain_expression(transform, product, masked):
    q, k, v = draw(3, 2, 5, 3), draw(3, 2, 4, 3, seed=1), draw(3, 2, 4, 6, seed=2)
    mask = mask_of(masked, 5, 4)
    if product == "units":
        basis = bases.mexican_hat()
        units = units_of(basis, 2, 3, 4)
        rest = {name: leaf for name, leaf in units.items() if name != "shift"}
        third = units["shift"]

        def of(module, cast):
            others = {name: cast(leaf) for name, leaf in rest.items()}
            return lambda q, k, c: module.contract_units(basis, {**others, "shift": c}, q, k, mask)
    else:
        basis = LINEAR["fourier"]
        third = draw(2, 3, 4, 6, seed=3)

        def of(module, cast):
            if module is kernels:
                return lambda q, v, c: kernels.contract_softmax(basis, c, q, cast(k[0]), v, mask)
            return lambda q, v, c: (
                plain.contract(basis, c, q, cast(k[0]), mask),
                plain.softmax_attention(q, cast(k[0]), v, mask),
            )

    args = (q, k if product == "units" else v, third)
    found = TRANSFORMS[transform](of(kernels, lambda x: x), *args)
    wanted = TRANSFORMS[transform](of(plain, torch.Tensor.double), *(x.double() for x in args))
    for a, b in zip(flat(found), flat(wanted), strict=True):
        assert a.shape == b.shape
        assert_close(a.double(), b, rtol=0, atol=2e-4 * max(1, b.abs().max().item()))


# --- a piece of one's own -------------------------------------------------------------------------

SINES = """
struct Piece {
  static constexpr int K = 2;
  float pitch;
  explicit Piece(const float* options) : pitch(options[0]) {}
  INLINE void features(vec x, vec* f) const {
    sincos(x * pitch, f[0], f[1]);
  }
  INLINE void slopes(vec, const vec* f, vec* g) const {
    g[0] = f[1] * pitch;
    g[1] = f[0] * -pitch;
  }
};
"""


def sines(x):
    return torch.stack([(2 * x).sin(), (2 * x).cos()], -1)


def test_a_basis_of_ones_own_brings_its_piece():
    basis = bases.linear(sines, 2, family="sines", base="silu", cpp=Cpp(SINES, {}, (2.0,)))
    assert cpp.engine_of(family_of(basis), False)[1] == ""
    q, k = inputs(2, 2, 37, 29, 7)
    coefs = draw(2, 3, 29, 3, seed=2)
    check(
        lambda q, k, c: kernels.contract(basis, c, q, k, engine="cpp"),
        lambda q, k, c: plain.contract(basis, c, q, k),
        (q, k, coefs),
        torch.float32,
    )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (Cpp(SINES, {}, (2.001,)), "self-check failed: y"),
        (Cpp(SINES.replace("* -pitch", "* pitch"), {}, (2.0,)), "self-check failed: dq"),
        (Cpp(SINES.replace("K = 2", "K = 2 +"), {}, (2.0,)), "failed: .*error"),
    ],
)
def test_a_wrong_piece_is_refused_and_torch_runs_instead(wrong, words, caplog):
    basis = bases.linear(sines, 2, family="wrong-sines", cpp=wrong)
    q, k = inputs(2, 2, 5, 4, 3)
    coefs = draw(2, 3, 4, 2, seed=2)
    y = kernels.contract(basis, coefs, q, k)
    assert_close(y, plain.contract(basis, coefs, q, k))
    (line,) = [r.getMessage() for r in caplog.records]
    assert "torch runs instead" in line
    with pytest.raises(ValueError, match=words):
        kernels.contract(basis, coefs, q, k, engine="cpp")


@pytest.mark.parametrize("name", [*LINEAR, *UNITS])
def test_functions_that_were_replaced_do_not_run_on_the_pieces(name):
    basis = (LINEAR | UNITS)[name]
    field = "features" if name in LINEAR else "apply"
    changed = basis._replace(**{field: lambda *args: 2 * getattr(basis, field)(*args)})
    assert family_of(changed).pieces is None
    assert family_of(changed).name != family_of(basis).name


def test_features_with_learned_numbers_of_their_own_are_refused_where_gradients_would_be_lost():
    q, k = inputs(2, 2, 5, 4, 3)
    coefs = draw(2, 3, 4, 2, seed=2)

    def product(rates, contract=kernels.contract):
        waves = bases.linear(lambda x: (x[..., None] * rates).sin(), 2)
        return contract(waves, coefs, q, k).sum()

    rates = torch.tensor([1.0, 2.0])
    wanted = torch.func.grad(lambda x: product(x, plain.contract))(rates)
    assert wanted.abs().min() > 0.1
    calls = (
        lambda: product(rates.clone().requires_grad_()),
        lambda: torch.func.grad(product)(rates),
        lambda: torch.func.vmap(product)(rates[None]),
        lambda: torch.func.grad(lambda x: torch.func.vmap(product)(x[None]).sum())(rates),
    )
    for call in calls:
        with pytest.raises(ValueError, match="needs features of constants, got 'linear' with a"):
            call()
    # constants that are made inside a transform are some
    made = torch.func.grad(lambda x: x * product(torch.tensor([1.0, 2.0])))(torch.tensor(1.0))
    assert_close(made, product(rates))
    with torch.no_grad():
        assert_close(product(rates.clone().requires_grad_()), product(rates))


# --- names ----------------------------------------------------------------------------------------


def test_names_are_the_same_in_every_process():
    program = """
import torch
from kart import bases
shift = 3.0
def steps(x): return torch.stack([(x - shift).sign(), x.sign()], -1)
print(bases.bspline(5, base="silu", init="paper").pieces.name)
print(bases.linear(steps, 2).pieces.name)
print(bases.linear(lambda x: steps(x) * 2, 2).pieces.name)
"""
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert bases.bspline(5, base="silu", scales=True).pieces.name in runs[0].stdout


def test_names_tell_features_apart():
    def shifted(by):
        return bases.linear(lambda x: (x - by)[..., None], 1).pieces.name

    assert shifted(1.0) == shifted(1.0) != shifted(2.0)
    table = torch.tensor([1.0, 2.0])
    first = bases.linear(lambda x: x[..., None] * table[:1], 1).pieces.name
    assert first != bases.linear(lambda x: x[..., None] * table[1:], 1).pieces.name
    names = [f().pieces.name for f in bases.FAMILIES.values()]
    names += [bases.fourier(4).pieces.name, bases.chebyshev(4, (-1.0, 1.0)).pieces.name]
    assert len(set(names)) == len(names)
    # what does not change the features does not change the name
    assert bases.fourier(3, init="paper").pieces.name == bases.fourier(3).pieces.name


class Sines(NamedTuple):
    pitch: float
    more: Any = None

    def __call__(self, x):
        return (x * self.pitch).sin()[..., None]


class Cosines(NamedTuple):
    pitch: float
    more: Any = None

    def __call__(self, x):
        return (x * self.pitch).cos()[..., None]


class Attributes:
    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __call__(self, x):
        return (x * self.pitch + self.shift)[..., None]


def by_a_method(pitch):
    class Features:
        def __call__(self, x):
            return self.of(x)[..., None]

        def of(self, x):
            return x * pitch

    return Features()


def by_a_module(pitch):
    class Features(torch.nn.Module):
        def forward(self, x):
            return (x * pitch)[..., None]

    return Features()


def by_a_class(pitch):
    class Features:
        @staticmethod
        def of(x):
            return (x * pitch)[..., None]

    return lambda x: Features.of(x)


def scaled(x, pitch, shift):
    return (x * pitch + shift)[..., None]


FIRST, SECOND = torch.ones(2), torch.zeros(2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Sines(1.0), Cosines(1.0)),
        (Sines(1.0, (1, (2,), 3)), Sines(1.0, (1, (2, 3)))),
        (Sines(1.0, (FIRST, SECOND, FIRST)), Sines(1.0, (FIRST, SECOND, SECOND))),
        (Attributes(pitch=1.0, shift=2.0), Attributes(pitch=1.0, shift=3.0)),
        (functools.partial(scaled, pitch=1, shift=2), functools.partial(scaled, pitch=1, shift=3)),
        (by_a_method(1.0), by_a_method(2.0)),
        (by_a_module(1.0), by_a_module(2.0)),
        (by_a_class(1.0), by_a_class(2.0)),
    ],
    ids=["fields", "nested", "again", "attributes", "partial", "method", "module", "class"],
)
def test_names_tell_apart_what_objects_and_their_classes_do(one, other):
    first, second = (bases.linear(expand, 1, family="own") for expand in (one, other))
    assert first.pieces.name != second.pieces.name
    assert first.pieces.name == bases.linear(one, 1, family="own").pieces.name


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_exported_graph_runs_in_a_fresh_process(tmp_path):
    export = """
import sys, torch
from kart import bases, kernels
class Module(torch.nn.Module):
    def forward(self, c, q, k):
        return kernels.contract(bases.chebyshev(3, (-3.0, 2.0)), c, q, k)
c, q, k = torch.randn(2, 3, 4, 4), torch.randn(1, 2, 5, 3), torch.randn(1, 2, 4, 3)
program = torch.export.export(Module(), (c, q, k))  # before any eager call
torch.export.save(program, sys.argv[1])
torch.save((c, q, k, Module()(c, q, k)), sys.argv[2])
"""
    load = """
import sys, torch, kart.kernels
*inputs, wanted = torch.load(sys.argv[2])
torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(*inputs), wanted)
"""
    for program in (export, load):
        command = [sys.executable, "-c", program, tmp_path / "graph.pt2", tmp_path / "tensors.pt"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]


def test_a_graph_with_a_basis_that_nobody_made_says_so():
    x = torch.ones(1, 1, 2, 3)
    with pytest.raises(ValueError, match="has not made. Make it and pass it to `kernels.keep`"):
        torch.ops.kart.contract_forward(x, x, torch.ones(1, 1, 2, 2, 1), None, 1.0, "own:x", "auto")


def test_far_scores_have_finite_gradients():
    for basis in (*LINEAR.values(), *UNITS.values()):
        if basis.family == "polynomial" or basis.family == "rational":
            continue
        x = torch.tensor([1e4, -1e8, 1e20, -1e30, math.pi], requires_grad=True)
        params = basis.init(torch.Generator().manual_seed(0), (5,))
        (gradient,) = torch.autograd.grad(basis.apply(params, x).sum(), x)
        assert gradient.isfinite().all(), basis.family


def test_an_engine_first_asked_inside_a_transform_passes_its_check():
    # a basis that nothing else has made an engine of: units, and features, of odd options
    for basis in (bases.morlet(omega=4.75), bases.chebyshev(3, span=(-3.25, 3.5))):
        x = torch.randn(3, generator=torch.Generator().manual_seed(0))

        def ask(x, basis=basis):
            assert cpp.engine_of(family_of(basis), False)[1] == ""
            return (x**2).sum()

        assert_close(torch.func.grad(ask)(x), 2 * x)


@pytest.mark.parametrize(
    "what",
    [
        # parameters that do not reach the coefficients at the base "zero"
        "cpp.engine_of(family_of(bases.morlet(scales=True)), False)",
        "cpp.engine_of(family_of(bases.rational(2, 2, scales=True)), False)",
        # a gradient that is zero: the sum of a row does not change with the size of a weight
        "weights.engine_of(family_of(bases.dog()), 'l1', False)",
    ],
)
def test_the_check_of_a_library_holds_for_gradients_of_zero(what):
    """In a process of its own: which of a family's bases comes first is the one that is checked."""
    lines = (
        "from kart import bases",
        "from kart.kernels import cpp",
        "from kart.kernels.cpp import weights",
        "from kart.kernels.family import family_of",
        f"engine, why = {what}",
        "assert engine is not None, why",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr


@pytest.mark.parametrize("make", [bases.dog, bases.rational, bases.morlet])
@pytest.mark.parametrize("first", [False, True])
def test_units_with_scales_are_others_than_those_without(make, first):
    """Each by its own leaves, whichever of the two the engines have met before."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 5, 4, generator=generator)
    for scales in (first, not first):
        basis = make(scales=scales)
        units = basis.init(generator, (2, 3, 5))
        units = {name: leaf * (3 if name == "scale_basis" else 1) for name, leaf in units.items()}
        wide = {name: leaf.double() for name, leaf in units.items()}
        found = kernels.contract_units(basis, units, x, x)
        assert_close(
            found.double(),
            plain.contract_units(basis, wide, x.double(), x.double(), None, 0.5),
            rtol=1e-4,
            atol=1e-4,
        )
    names = {family_of(make(scales=scales)).name for scales in (False, True)}
    assert len(names) == 2
