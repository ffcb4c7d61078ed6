"""The streamed products against the plain expressions, in value, under every transform."""

import math

import pytest
import torch
from torch import func
from torch.testing import assert_close

from kart import bases, kernels
from kart.kernels import plain

# torch's own: the first forward-mode call compiles its decompositions, `linearize` folds constants
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

BASES = {
    "fourier": bases.fourier(2),
    "fourier-silu": bases.fourier(2, base="silu"),
    "bspline": bases.bspline(3, degree=3, span=(-2.0, 2.0)),
    "chebyshev": bases.chebyshev(3, span=(-3.0, 3.0)),
    "polynomial": bases.polynomial(2),
    "gaussian_rbf": bases.gaussian_rbf(3, span=(-2.0, 2.0)),
}
# (engine, dtype): the compiled engine computes in float32 only
ENGINES = [("torch", torch.float64), ("cpp", torch.float32)]
# what rounding may do to sums of some hundred terms, with second derivatives
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4}


def needs(engine):
    if engine == "cpp" and (reason := kernels.engines()["cpp"]) != "ready":
        pytest.skip(reason)


def draw(*shape, dtype=torch.float64, seed=0):
    # irregular numbers without a random operation, which vmap refuses
    count = torch.arange(math.prod(shape), dtype=torch.float64) + 101 * seed
    return (1.5 * torch.sin(count * count + 0.7 * count)).reshape(shape).to(dtype)


def example(basis, lead=(), heads=2, queries=3, keys=4, width=2, rank=2, dtype=torch.float64):
    size = basis.features(torch.zeros(1)).shape[-1]
    q = draw(*lead, heads, queries, width, dtype=dtype)
    k = draw(*lead, heads, keys, width, dtype=dtype, seed=1)
    coefs = draw(heads, rank, keys, size, dtype=dtype, seed=2)
    return q, k, coefs


def close(actual, expected, dtype):
    scale = max([1.0] + [x.abs().max().item() for x in flat(expected) if x.numel()])
    for a, b in zip(flat(actual), flat(expected), strict=True):
        assert_close(a.double(), b.double(), rtol=0, atol=TOLERANCES[dtype] * scale)


def flat(x):
    return [x] if isinstance(x, torch.Tensor) else [leaf for part in x for leaf in flat(part)]


def loss(f):
    return lambda *args: (f(*args) ** 2).sum()


def directions(args):
    return tuple(draw(*x.shape, dtype=x.dtype, seed=7 + i) for i, x in enumerate(args))


def autograd(f, *args):
    leaves = [x.clone().requires_grad_() for x in args]
    return torch.autograd.grad(loss(f)(*leaves), leaves)


def double_backward(f, *args):
    leaves = [x.clone().requires_grad_() for x in args]
    first = torch.autograd.grad(loss(f)(*leaves), leaves, create_graph=True)
    inner = sum((g * t).sum() for g, t in zip(first, directions(args), strict=True))
    return torch.autograd.grad(inner, leaves)


def population(f, q, k, coefs):
    members = torch.stack([coefs, 2 * coefs.flip(1)])
    return func.vmap(f, (None, None, 0))(q, k, members), func.vmap(f, (0, None, 0))(
        torch.stack([q, q.flip(-2)]), k, members
    )


def all_grads(f):
    return func.grad(loss(f), argnums=(0, 1, 2))


def hvp_forward_over_reverse(f, *args):
    return func.jvp(all_grads(f), args, directions(args))[1]


def hvp_reverse_over_reverse(f, *args):
    inner = all_grads(f)
    v = directions(args)
    return func.grad(
        lambda *a: sum((g * t).sum() for g, t in zip(inner(*a), v, strict=True)), argnums=(0, 1, 2)
    )(*args)


def hvp_reverse_over_forward(f, *args):
    v = directions(args)
    return func.grad(lambda *a: func.jvp(loss(f), a, v)[1], argnums=(0, 1, 2))(*args)


def linearize(f, *args):
    y, push = func.linearize(f, *args)
    return y, push(*directions(args))


def jvp_jvp(f, *args):
    v = directions(args)
    return func.jvp(lambda *a: func.jvp(f, a, v)[1], args, directions(v))


def jvp_jvp_grad(f, *args):
    v = directions(args)
    return func.jvp(lambda *a: func.jvp(all_grads(f), a, v)[1], args, directions(v))


def jvp_jvp_of_a_pullback(f, *args):
    _, pullback = func.vjp(f, *args)
    cotangent = draw(*f(*args).shape, dtype=args[0].dtype, seed=3)
    return func.jvp(lambda u: func.jvp(pullback, (u,), (cotangent,))[1], (cotangent,), (cotangent,))


def third_order(f, *args):
    def directional(q, k, coefs):
        g = func.grad(loss(f))(q, k, coefs)
        return (func.grad(lambda q: (func.grad(loss(f))(q, k, coefs) * g).sum())(q) ** 2).sum()

    return func.grad(directional)(*args)


# q and k with a leading axis of 2 examples; the coefficients are shared
TRANSFORMS = {
    "value": lambda f, *a: f(*a),
    "autograd": autograd,
    "double_backward": double_backward,
    "grad": lambda f, *a: all_grads(f)(*a),
    "vmap_examples": lambda f, *a: func.vmap(f, (0, 0, None))(*a),
    "vmap_last_axis": lambda f, q, k, c: func.vmap(f, (3, 3, None), 1)(
        q.movedim(0, 3), k.movedim(0, 3), c
    ),
    "vmap_queries": lambda f, q, k, c: func.vmap(f, (0, None, None))(q, k[0], c),
    "population": population,
    "vmap_nested": lambda f, q, k, c: func.vmap(func.vmap(f, (0, 0, None)), (None, None, 0))(
        q, k, torch.stack([c, 2 * c, c.flip(0)])
    ),
    "vmap_nested_twice_coefs": lambda f, q, k, c: func.vmap(
        func.vmap(f, (None, None, 0)), (None, None, 0)
    )(q, k, torch.stack([torch.stack([c, 2 * c]), torch.stack([c.flip(0), -c])])),
    "per_example_grad": lambda f, *a: func.vmap(all_grads(f), (0, 0, None))(*a),
    "population_grad": lambda f, q, k, c: func.vmap(all_grads(f), (None, None, 0))(
        q, k, torch.stack([c, 2 * c])
    ),
    "population_per_example_grad": lambda f, q, k, c: func.vmap(
        func.vmap(all_grads(f), (0, 0, None)), (None, None, 0)
    )(q, k, torch.stack([c, 2 * c])),
    "grad_of_vmap": lambda f, *a: all_grads(func.vmap(f, (0, 0, None)))(*a),
    "grad_of_population": lambda f, q, k, c: func.grad(
        lambda c: loss(func.vmap(f, (None, None, 0)))(q, k, c)
    )(torch.stack([c, 2 * c])),
    "jvp": lambda f, *a: func.jvp(f, a, directions(a)),
    "jvp_of_one": lambda f, q, k, c: func.jvp(lambda k: f(q, k, c), (k,), (k.flip(0),)),
    "vmap_jvp": lambda f, q, k, c: func.vmap(
        lambda q, k: func.jvp(f, (q, k, c), (q.sin(), k.cos(), c.sin()))
    )(q, k),
    "linearize": linearize,
    "hvp_forward_over_reverse": hvp_forward_over_reverse,
    "hvp_reverse_over_reverse": hvp_reverse_over_reverse,
    "hvp_reverse_over_forward": hvp_reverse_over_forward,
    "per_example_hvp": lambda f, *a: func.vmap(
        lambda q, k: hvp_forward_over_reverse(f, q, k, a[2])
    )(a[0], a[1]),
    "jacrev": lambda f, q, k, c: func.jacrev(f, argnums=(0, 1, 2))(q[0], k[0], c),
    "jacfwd": lambda f, q, k, c: func.jacfwd(f, argnums=(0, 1, 2))(q[0], k[0], c),
    "hessian": lambda f, q, k, c: func.jacfwd(
        func.jacrev(loss(f), argnums=(0, 1, 2)), argnums=(0, 2)
    )(q[0], k[0], c),
    "jacfwd_jacfwd": lambda f, q, k, c: func.jacfwd(func.jacfwd(loss(f), argnums=0), argnums=2)(
        q[0], k[0], c
    ),
    "jvp_jvp": jvp_jvp,
    "jvp_jvp_grad": jvp_jvp_grad,
    "jvp_jvp_of_a_pullback": jvp_jvp_of_a_pullback,
    "third_order": third_order,
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("engine,dtype", ENGINES, ids=[engine for engine, _ in ENGINES])
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_an_engine_is_that_of_the_plain_expression(
    transform, name, engine, dtype, masked
):
    needs(engine)
    basis = BASES[name]
    if engine == "cpp" and name != "fourier":
        pytest.skip("the C++ engine computes the Fourier family alone")
    args = example(basis, lead=(2,), dtype=dtype)
    mask = torch.tensor([True, False, True, True]) if masked else None

    def streamed(q, k, coefs):
        return kernels.contract(basis, coefs, q, k, mask, engine=engine)

    def reference(q, k, coefs):
        return plain.contract(basis, coefs, q, k, mask)

    apply = TRANSFORMS[transform]
    actual = apply(streamed, *args)
    expected = apply(reference, *(x.double() for x in args))
    close(actual, expected, dtype)


def units_example(lead=(2,), dtype=torch.float64):
    basis = bases.rational(2, 2)
    units = basis.init(torch.Generator().manual_seed(0), (2, 3, 4))
    q, k = draw(*lead, 2, 5, 3, dtype=dtype), draw(*lead, 2, 4, 3, dtype=dtype, seed=1)
    return basis, {name: leaf.to(dtype) for name, leaf in units.items()}, q, k


# three tensors in, the third without the axis of examples, as `TRANSFORMS` expects
def units_functions(mask):
    basis, units, q, k = units_example()
    others = {"denominator": units["denominator"]}

    def bind(module):
        return lambda q, k, a: module.contract_units(basis, {"numerator": a, **others}, q, k, mask)

    return bind, (q, k, units["numerator"])


def mix_functions(mask):
    y, v, mix = draw(2, 2, 5, 3), draw(2, 2, 4, 3, seed=1), draw(2, 4, 3, seed=2)
    mask = torch.ones(5, 4, dtype=torch.bool).tril() if mask is None else mask
    return lambda module: lambda y, v, mix: module.mix_values(y, mix, v, mask), (y, v, mix)


def softmax_functions(mask):
    q, k, v = draw(2, 2, 5, 3), draw(2, 2, 4, 3, seed=1), draw(2, 4, 3, seed=2)
    return lambda module: lambda q, k, v: module.softmax_attention(q, k, v, mask), (q, k, v)


OTHERS = {"units": units_functions, "mix": mix_functions, "softmax": softmax_functions}
MASKS = {
    "whole": None,
    "keys": torch.tensor([True, False, True, True]),
    "pairs": torch.tensor([[True, False, True, True]] * 4 + [[False] * 4]),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_the_other_products_is_that_of_the_plain_expression(transform, name, mask):
    bind, args = OTHERS[name](MASKS[mask])
    apply = TRANSFORMS[transform]
    close(apply(bind(kernels), *args), apply(bind(plain), *args), torch.float64)
