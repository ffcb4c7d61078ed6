"""The streamed products against the plain expressions, in value, under every transform."""

import gc
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import func
from torch.testing import assert_close

from kart import bases, kernels, operators
from kart.kernels import chunked, fused, plain, softmax
from kart.kernels.arguments import laid_like, room_like

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


# every basis in every transform is slow: by default two families and, with them, masks
MATRIX = [
    pytest.param(engine, dtype, name, masked, marks=[] if fast else [pytest.mark.slow])
    for engine, dtype in ENGINES
    for name in BASES
    for masked in ("whole", "masked")
    if engine != "cpp" or name == "fourier"
    for fast in [name == "fourier" or (name == "bspline" and masked == "masked")]
]


@pytest.mark.parametrize("engine,dtype,name,masked", MATRIX)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_an_engine_is_that_of_the_plain_expression(
    transform, name, engine, dtype, masked
):
    needs(engine)
    basis = BASES[name]
    args = example(basis, lead=(2,), dtype=dtype)
    mask = torch.tensor([True, False, True, True]) if masked == "masked" else None

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


# the table beside softmax is without the axis of examples
def beside_functions(mask):
    q, k, v = draw(2, 2, 5, 3), draw(2, 4, 3, seed=1), draw(2, 2, 4, 6, seed=2)

    def bind(module):
        def attend(q, v, table):
            return module.softmax_attention(q, k, v, mask, 0.7, table)

        return attend

    return bind, (q, v, draw(2, 5, 4, seed=3))


def full_functions(mask):
    basis = bases.fourier(2)
    k = draw(2, 4, 3, seed=3)

    def bind(module):
        if module is plain:
            return lambda q, v, coefs: plain.contract(basis, coefs, q, k, mask) @ v
        return lambda q, v, coefs: kernels.contract_values(basis, coefs, q, k, v, mask)

    return bind, (draw(2, 2, 5, 3), draw(2, 2, 4, 6, seed=1), draw(2, 4, 4, 4, seed=2))


OTHERS = {
    "units": units_functions,
    "mix": mix_functions,
    "softmax": softmax_functions,
    "full": full_functions,
}
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


SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 1, 2, 1, 3, 2, 5),
    (1, 2, 63, 65, 16, 12, 2),
    (2, 3, 65, 63, 8, 13, 3),
    (1, 1, 197, 197, 64, 12, 3),
    pytest.param(1, 2, 785, 785, 64, 12, 3, marks=pytest.mark.slow),
    pytest.param(1, 1, 300, 2100, 24, 40, 4, marks=pytest.mark.slow),
]


def compare(basis, engine, dtype, q, k, coefs, mask=None, scale=None):
    """Values and all gradients of an engine against the plain expression in float64."""

    def of(f, *args):
        leaves = [x.detach().requires_grad_() for x in args]
        y = f(*leaves)
        weights = draw(*y.shape, dtype=y.dtype, seed=5)
        return (y, *torch.autograd.grad((y * weights).sum(), leaves))

    actual = of(lambda q, k, c: kernels.contract(basis, c, q, k, mask, scale, engine), q, k, coefs)
    expected = of(
        lambda q, k, c: plain.contract(basis, c, q, k, mask, scale),
        *(x.double() for x in (q, k, coefs)),
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.isfinite().all()
        close(a, e, dtype)
    return actual


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("engine,dtype", ENGINES, ids=[engine for engine, _ in ENGINES])
@pytest.mark.parametrize("batch,heads,queries,keys,width,rank,grid", SIZES)
def test_every_size_has_the_plain_values_and_gradients(
    batch, heads, queries, keys, width, rank, grid, engine, dtype, own
):
    needs(engine)
    q = draw(batch, queries, heads, width, dtype=dtype).transpose(1, 2)
    k = draw(batch, heads, width, keys, dtype=dtype, seed=1).mT
    lead = (batch,) if own else ()
    coefs = draw(*lead, keys, heads, rank, 2 * grid, dtype=dtype, seed=2).movedim(-4, -2)
    mask = draw(queries, keys) < 1.0 if own else None
    compare(bases.fourier(grid), engine, dtype, q, k, coefs / keys**0.5, mask)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("queries,keys", [(1, 2), (65, 63)])
def test_every_basis_has_the_plain_values_and_gradients(name, queries, keys):
    q, k, coefs = example(BASES[name], (2,), queries=queries, keys=keys, width=4, rank=3)
    compare(BASES[name], "torch", torch.float64, q, k, coefs, draw(2, 1, 1, keys) < 1.0)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("engine,dtype", ENGINES, ids=[engine for engine, _ in ENGINES])
def test_threads_and_chunks_change_nothing_but_rounding(engine, dtype, threads, monkeypatch):
    needs(engine)
    torch.set_num_threads(threads)
    # rows, heads and samples are all cut
    monkeypatch.setattr(chunked, "BLOCK", 2**9)
    basis = bases.fourier(2)
    for shape in ((5, 2, 9, 4), (3, 3, 130, 7), (2, 1, 5, 3)):
        batch, heads, queries, keys = shape
        q, k, coefs = example(basis, (batch,), heads, queries, keys, 3, 2, dtype)
        first = compare(basis, engine, dtype, q, k, coefs)
        second = compare(basis, engine, dtype, q, k, coefs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("shape", [None, (1, 5), (130, 1), (130, 5), (4, 3, 130, 5), (4, 1, 1, 5)])
@pytest.mark.parametrize("block", [2**5, 2**12, 2**13, 2**15])
def test_blocks_of_some_queries_samples_and_heads_change_nothing(own, shape, block, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", block)
    q, k, coefs = example(BASES["fourier"], (4,), 3, queries=130, keys=5, rank=3)
    if own:
        coefs = coefs * draw(4, 1, 1, 1, 1, seed=3)
    mask = None if shape is None else draw(*shape, seed=4) < 0.7
    compare(BASES["fourier"], "torch", torch.float64, q, k, coefs, mask)


def test_what_is_hidden_counts_for_nothing_where_features_of_zero_are_infinite():
    basis = bases.linear(lambda x: torch.stack([1 / x, x], -1), 2, family="inverse")
    q, k, coefs = example(basis, (2,), queries=5)
    compare(basis, "torch", torch.float64, q, k, coefs, draw(2, 1, 5, 4) < 0.7)


@pytest.mark.parametrize("engine,dtype", ENGINES, ids=[engine for engine, _ in ENGINES])
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (4,), (3, 4), (3, 1), (2, 3, 4), (1, 3, 4), (5, 1, 1, 4), (5, 2, 3, 4), (1, 1)],
)
def test_a_mask_of_any_shape_silences_its_keys(shape, engine, dtype):
    needs(engine)
    basis = bases.fourier(2)
    q, k, coefs = example(basis, (5,), dtype=dtype)
    mask = draw(*shape) < 0.8
    compare(basis, engine, dtype, q, k, coefs, mask)
    # a key that is masked everywhere leaves no trace, whatever it holds
    keep = torch.tensor([True, True, False, True])
    other = k.clone()
    other[:, :, 2] = 1e3
    values = [
        (y, *g)
        for y, *g in (compare(basis, engine, dtype, q, x, coefs, mask & keep) for x in (k, other))
    ]
    for a, b in zip(*values, strict=True):
        assert_close(a, b)
    _, _, dk, dcoefs = values[0]
    assert (dk[:, :, 2] == 0).all() and (dcoefs[:, :, 2] == 0).all()


@pytest.mark.parametrize(
    "lead_q,lead_k,lead_c",
    [
        ((), (), ()),
        ((3,), (), ()),
        ((), (3,), (3,)),
        ((2, 3), (2, 3), (1, 3)),
        ((2, 3), (3,), (2, 1)),
        ((2, 3), (2, 1), (2, 3)),
        ((), (), (2, 3)),
        ((4, 2, 3), (2, 3), (4, 1, 3)),
        ((0,), (0,), ()),
        ((2, 0), (1, 0), (2, 1)),
    ],
)
@pytest.mark.parametrize("engine,dtype", ENGINES, ids=[engine for engine, _ in ENGINES])
def test_leading_axes_broadcast(lead_q, lead_k, lead_c, engine, dtype):
    needs(engine)
    basis = bases.fourier(1)
    q, k, _ = example(basis, dtype=dtype)
    q = draw(*lead_q, *q.shape, dtype=dtype)
    k = draw(*lead_k, *k.shape, dtype=dtype, seed=1)
    coefs = draw(*lead_c, 2, 2, 4, 2, dtype=dtype, seed=2)
    compare(basis, engine, dtype, q, k, coefs)
    lead = torch.broadcast_shapes(lead_q, lead_k, lead_c)
    compare(basis, engine, dtype, q, k, coefs, draw(*lead, 1, 1, 4) < 1.0)
    compare(basis, engine, dtype, q, k, coefs, draw(4) < 1.0)


@pytest.mark.parametrize("engine,dtype", ENGINES, ids=[engine for engine, _ in ENGINES])
def test_expanded_and_reversed_inputs(engine, dtype):
    needs(engine)
    basis = bases.fourier(2)
    q = draw(1, 1, 3, dtype=dtype).expand(2, 5, 3)
    k = draw(1, 4, 3, dtype=dtype, seed=1).flip(1).expand(2, 4, 3)
    coefs = draw(1, 3, 1, 4, dtype=dtype, seed=2).expand(2, 3, 4, 4)
    compare(basis, engine, dtype, q, k, coefs)


@pytest.mark.parametrize("grid", [1, 3, 10])
@pytest.mark.parametrize("engine", ["torch", "cpp"])
@pytest.mark.parametrize("size", [1.0, 10.0, 1e3, 1e5])
def test_float32_features_are_exact_for_the_score_they_are_given(size, engine, grid):
    needs(engine)
    # one query of 1 and one feature at a time, so that a score is k itself and y a feature
    basis = bases.fourier(grid)
    scores = torch.cat([torch.linspace(-size, size, 4001), torch.arange(-40, 41) * (torch.pi / 4)])
    k = scores[:, None, None, None]
    coefs = torch.eye(2 * grid)[:, None].unsqueeze(0)
    y = kernels.contract(basis, coefs, torch.ones(1, 1, 1), k, scale=1.0, engine=engine)
    angles = scores.double()[:, None] * torch.arange(1, grid + 1)
    expected = torch.cat([angles.cos(), angles.sin()], -1)
    # the angle sums lose about one rounding for each harmonic
    assert (y.flatten(1) - expected).abs().max() < 1e-7 * (2 + grid)


@pytest.mark.parametrize("engine", ["torch", "cpp"])
@pytest.mark.parametrize("size", [1e7, 1e30])
def test_scores_beyond_all_meaning_stay_bounded(size, engine):
    needs(engine)
    k = torch.tensor([size, -size])[:, None, None, None].requires_grad_()
    coefs = torch.eye(4)[:, None].unsqueeze(0)
    y = kernels.contract(bases.fourier(2), coefs, torch.ones(1, 1, 1), k, scale=1.0, engine=engine)
    assert (y.abs() <= 1.5).all()
    assert torch.autograd.grad(y.sum(), k)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_coefs", [True, False])
def test_half_inputs_are_summed_in_float32(dtype, wide_coefs):
    basis = bases.fourier(2)
    q, k, coefs = (x.to(dtype) for x in example(basis, (2,), queries=33, keys=65, width=8))
    if wide_coefs:
        coefs = coefs.float()
    leaves = [x.requires_grad_() for x in (q, k, coefs)]
    y = kernels.contract(basis, leaves[2], leaves[0], leaves[1])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = plain.contract(basis, exact[2], exact[0], exact[1])
    assert y.dtype == dtype
    # one rounding, of the result
    eps = torch.finfo(dtype).eps
    assert_close(y.double(), expected, rtol=eps, atol=1e-4)
    got = torch.autograd.grad((y * 0.25).sum(), leaves)
    wanted = torch.autograd.grad((expected * 0.25).sum(), exact)
    for leaf, a, b in zip(leaves, got, wanted, strict=True):
        assert a.dtype == leaf.dtype
        assert_close(a.double(), b, rtol=eps, atol=1e-4 * b.abs().max().item())


def test_autocast_does_not_round_the_scores():
    basis = bases.fourier(2)
    q, k, coefs = example(basis, (2,), queries=9, keys=8, width=8, dtype=torch.float32)
    k.requires_grad_()
    for engine in ("torch", "auto", "plain"):
        y = kernels.contract(basis, coefs, q, k, engine=engine)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = kernels.contract(basis, coefs, q, k, engine=engine)
            if engine == "plain":  # ordinary operations, rounded where their backward is run
                assert torch.equal(y, inside)
                continue
            (gradient,) = torch.autograd.grad(inside.sum(), k)
        assert torch.equal(y, inside)
        assert torch.equal(gradient, torch.autograd.grad(y.sum(), k)[0])


def test_gradcheck_of_first_and_second_order():
    basis = bases.fourier(2)
    q, k, coefs = (x.requires_grad_() for x in example(basis, (2,), heads=1, queries=2, keys=3))

    def f(q, k, coefs):
        return kernels.contract(basis, coefs, q, k, engine="torch")

    options = {"check_forward_ad": True, "check_batched_grad": True}
    # gradcheck batches forward mode by a vmap of its own, of few operations; `jacfwd` is tested
    assert torch.autograd.gradcheck(f, (q, k, coefs), **options, check_batched_forward_grad=False)
    assert torch.autograd.gradgradcheck(f, (q, k, coefs), check_fwd_over_rev=True)


def test_a_family_is_asked_not_believed():
    # claims to be fourier, is not: must not run on the Fourier kernels
    liar = bases.linear(lambda x: torch.stack([x.cos(), 2 * x.sin()], -1), 2, family="fourier")
    q, k, coefs = example(liar)
    compare(liar, "torch", torch.float64, q, k, coefs)
    compare(liar, "auto", torch.float32, q.float(), k.float(), coefs.float())


def test_the_basis_may_be_dropped_before_the_backward():
    q, k, coefs = example(bases.chebyshev(2, span=(-3.0, 3.0)))
    k.requires_grad_()
    y = kernels.contract(bases.chebyshev(2, span=(-3.0, 3.0)), coefs, q, k)
    gc.collect()
    assert torch.autograd.grad(y.sum(), k)[0].isfinite().all()


def peak_of(code):
    """Peak memory in MiB that `code` adds to a process which has imported everything."""
    program = f"""
import resource, torch
from kart import bases, kernels
torch.set_num_threads(1)
{code[0]}
kernels.contract(basis, coefs[:, :1], q[:1, :, :8], k[:1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{code[1]}
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return float(result.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "cpp"])
def test_memory_does_not_grow_with_the_scores(engine):
    needs(engine)
    # the features alone would be 16 x 3 x 512 x 512 x 6 floats: 288 MiB
    setup = """
basis = bases.fourier(3)
q, k = torch.randn(16, 3, 512, 64), torch.randn(16, 3, 512, 64)
coefs = torch.randn(3, 12, 512, 6)
"""
    run = f"""
leaves = [x.requires_grad_() for x in (q, k, coefs)]
kernels.contract(basis, coefs, q, k, engine="{engine}").sum().backward()
"""
    assert peak_of((setup, run)) < 60


def test_the_torch_engine_runs_where_the_compiled_one_cannot_be_built(tmp_path):
    # in a process of its own: what a library could be built for is remembered
    program = """
import logging, torch
from kart import bases, kernels
q = torch.ones(1, 2, 3)
assert kernels.contract(bases.fourier(1), torch.ones(1, 1, 2, 2), q, q).isfinite().all()
kernels.contract(bases.fourier(1), torch.ones(1, 1, 2, 2), q, q)
assert "no-such-compiler" in kernels.engines()["cpp"], kernels.engines()
try:
    kernels.contract(bases.fourier(1), torch.ones(1, 1, 2, 2), q, q, engine="cpp")
except ValueError as error:
    assert "no-such-compiler" in str(error)
else:
    raise SystemExit("no error")
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "KART_CACHE": str(tmp_path), "CXX": "no-such-compiler"},
    )
    assert result.returncode == 0, result.stderr
    # one line for each grid that was asked for, 1 and (by `engines`) 3
    assert result.stderr.count("torch runs instead") == 2


def bad(**changes):
    q, k, coefs = example(bases.fourier(2))
    return {"basis": bases.fourier(2), "coefs": coefs, "q": q, "k": k, **changes}


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"q": draw(2, 0, 2)}, "`q`"),
        ({"k": draw(2, 0, 2)}, "`k`"),
        ({"q": draw(2, 3, 3)}, "one width"),
        ({"q": draw(3, 2)}, "`q`"),
        ({"q": None}, "`q`"),
        ({"coefs": draw(2, 0, 4, 4)}, "r >= 1"),
        ({"coefs": draw(2, 2, 5, 4)}, "`coefs`"),
        ({"coefs": draw(2, 2, 4, 6)}, "`coefs`"),
        ({"coefs": draw(2, 4, 4)}, "`coefs`"),
        ({"coefs": draw(3, 2, 4, 4)}, "broadcast"),
        ({"k": draw(3, 1, 2, 4, 2), "q": draw(2, 1, 2, 3, 2)}, "broadcast"),
        ({"k": draw(2, 4, 2).float()}, "dtype"),
        ({"coefs": draw(2, 2, 4, 4).float()}, "dtype"),
        ({"q": draw(2, 3, 2).long(), "k": draw(2, 4, 2).long()}, "floating-point"),
        ({"k": draw(2, 4, 2).to("meta")}, "one device"),
        ({"mask": torch.ones(3, 4)}, "boolean `mask`"),
        ({"mask": torch.ones(3, 5, dtype=torch.bool)}, "`mask`"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "`mask`"),
        ({"mask": torch.ones(3, 1, 3, 4, dtype=torch.bool).to("meta")}, "one device"),
        ({"scale": float("nan")}, "`scale`"),
        ({"engine": "fast"}, "`engine`"),
        ({"basis": bases.rational()}, "contract_units"),
    ],
)
def test_bad_input_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        kernels.contract(**bad(**changes))


def test_bad_input_of_the_other_products_is_named():
    basis, units, q, k = units_example()
    short = {name: leaf[:, :, :3] for name, leaf in units.items()}
    for broken in ({}, short, {name: leaf[:, :0] for name, leaf in units.items()}):
        with pytest.raises(ValueError, match="`units`"):
            kernels.contract_units(basis, broken, q, k)
    with pytest.raises(ValueError, match="boolean `mask`"):
        kernels.contract_units(basis, units, q, k, torch.ones(4))
    y, mix, v = draw(2, 5, 3), draw(2, 4, 3), draw(2, 4, 6)
    with pytest.raises(ValueError, match="needs a `mask`"):
        kernels.mix_values(y, mix, v, None)
    with pytest.raises(ValueError, match="same keys"):
        kernels.mix_values(y, mix, v[:, :3], torch.ones(5, 3, dtype=torch.bool))
    full = draw(2, 4, 4, 2)
    with pytest.raises(ValueError, match="`coefs`"):
        kernels.contract_values(bases.fourier(1), full[:, :3], q, k, k)
    with pytest.raises(ValueError, match="`coefs`"):
        kernels.contract_values(bases.fourier(1), full[None], q, k, k)
    with pytest.raises(ValueError, match="boolean `mask`"):
        kernels.contract_values(bases.fourier(1), full, q, k, k, torch.ones(4))
    with pytest.raises(ValueError, match="`v`"):
        kernels.softmax_attention(q, k, k[..., :3, :])
    with pytest.raises(ValueError, match="boolean `mask`"):
        kernels.softmax_attention(q, k, k, torch.ones(5, 4))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_softmax_beside_a_table_is_that_of_the_plain_expression(transform):
    bind, args = beside_functions(None)
    apply = TRANSFORMS[transform]
    close(apply(bind(kernels), *args), apply(bind(plain), *args), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_softmax_beside_a_table_in_layers_that_are_views(dtype):
    # q, k and v as a model cuts them from one product; the gradient with the tokens first
    whole = draw(3, 7, 3, 2, 4, dtype=dtype).requires_grad_()
    table = draw(2, 7, 7, dtype=torch.float32, seed=1).requires_grad_()
    probe = draw(3, 7, 2, 4, dtype=dtype, seed=2)

    def run(module, whole, table):
        q, k, v = whole.movedim(2, 0).transpose(2, 3)
        out = module.softmax_attention(q, k, v, None, None, table).transpose(1, 2)
        return out, *torch.autograd.grad(out, (whole, table), probe.to(out.dtype))

    exact = (x.detach().double().requires_grad_() for x in (whole, table))
    bound = 2e-2 if dtype is torch.bfloat16 else 1e-5
    for found, expected in zip(run(kernels, whole, table), run(plain, *exact), strict=True):
        assert_close(found.double(), expected, rtol=bound, atol=bound)


def test_a_table_beside_softmax_does_not_fit():
    q, k, v = draw(2, 2, 5, 3), draw(2, 2, 4, 3), draw(2, 2, 4, 6)
    table = draw(2, 5, 4)
    words = r"`table` \(H, N, M\) = \(2, 5, 4\) without a mask, got"
    with pytest.raises(ValueError, match=words + " a mask"):
        kernels.softmax_attention(q, k, v, torch.ones(5, 4, dtype=torch.bool), None, table)
    with pytest.raises(ValueError, match=words + r" shape \(2, 4, 5\)"):
        kernels.softmax_attention(q, k, v, table=table.mT)
    with pytest.raises(ValueError, match="dtype of `q`"):
        kernels.softmax_attention(q, k, v, table=table.float())
    assert kernels.softmax_attention(q[:0], k[:0], v[:0], table=table).shape == (0, 2, 5, 6)


@pytest.mark.parametrize("product", OTHERS)
def test_empty_batches_of_the_other_products(product):
    basis, units, _, _ = units_example()
    q, k, v = draw(0, 2, 5, 3), draw(0, 2, 4, 3), draw(0, 2, 4, 6)
    mask = torch.ones(5, 4, dtype=torch.bool)
    if product == "units":
        assert kernels.contract_units(basis, units, q, k, mask).shape == (0, 2, 5, 3)
    elif product == "full":
        full = draw(2, 4, 4, 4)
        out = kernels.contract_values(bases.fourier(2), full, q, k, v, mask)
        assert out.shape == (0, 2, 5, 6)
    elif product == "mix":
        assert kernels.mix_values(q, k, v, mask).shape == (0, 2, 5, 6)
    else:
        assert kernels.softmax_attention(q, k, v, mask).shape == (0, 2, 5, 6)


def test_a_query_without_keys_gets_zeros_and_finite_gradients():
    q, k, v = (draw(2, 5, 3, seed=i).requires_grad_() for i in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    out = kernels.softmax_attention(q, k, v, mask)
    assert (out[:, 2] == 0).all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients) and (gradients[0][:, 2] == 0).all()


def test_plain_softmax_attention_is_the_fused_kernel():
    q, k, v = (draw(2, 3, 33, 8, dtype=torch.float32, seed=i) for i in range(3))
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(kernels.softmax_attention(q, k, v), fused)


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_kernel_of_a_gpu_is_mapped_as_a_whole(masked):
    """On the CPU, whose kernel has a forward and a backward of the same names."""
    q, k, v = (draw(3, 2, 2, 5, 4, seed=i) for i in range(3))
    mask = draw(2, 1, 1, 5) > -0.3 if masked else None

    def loss(q, k, v):
        return fused.apply(softmax._whole(0.25), q, k, v, mask)[0].square().sum()

    def wanted(q, k, v):
        return plain.softmax_attention(q, k, v, mask, 0.25).square().sum()

    def of_members(loss):
        return func.grad(lambda *qkv: func.vmap(loss)(*qkv).sum(), (0, 1, 2))

    def second(loss):
        return func.vmap(func.grad(lambda *qkv: func.grad(loss)(*qkv).sin().sum()))

    def per_member(loss):
        return func.vmap(func.grad_and_value(loss, (0, 1, 2)))

    for transform in (per_member, of_members, second):
        assert_close(transform(loss)(q, k, v), transform(wanted)(q, k, v))


def test_softmax_of_infinities_alone_is_no_number_but_in_the_fused_kernel():
    q, k, v = torch.full((1, 3, 4), -1e30), torch.full((1, 5, 4), 1e10), torch.ones(1, 5, 4)
    some = torch.ones(3, 5, dtype=torch.bool)
    some[0], some[1, 2] = False, False
    op = operators.softmax()
    for mask in (None, torch.ones_like(some), some):
        wanted = torch.full((1, 3, 4), torch.nan)
        if mask is some:
            wanted[:, 0] = 0  # a query without keys
        assert_close(op.weights({}, q @ k.mT, mask) @ v, wanted, equal_nan=True)
        assert_close(op.attend({}, q, k, v[..., :3], mask), wanted[..., :3], equal_nan=True)
        assert_close(op.attend({}, q, k, v, mask), torch.zeros(1, 3, 4))


# --- where gradients lie --------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch", "cpp"])
@pytest.mark.parametrize(
    "spec", ["G2B", "G2B:base=softmax", "mexican_hat-B", "G2B:order=elementwise"]
)
def test_gradients_of_views_lie_as_the_projection_has_them(engine, spec):
    """Rows of all heads side by side, so that joining them copies nothing; the numbers are those of
    tensors that lie by themselves.
    """
    needs(engine)
    op = operators.parse(f"{spec}{',' if ':' in spec else ':'}engine={engine}").operator
    heads, tokens, width = 2, 17, 5
    generator = torch.Generator().manual_seed(0)
    params = op.init(generator, heads, tokens)
    qkv = torch.randn(2, tokens, 3 * heads * width, generator=generator)
    probe = torch.randn(2, heads, tokens, width, generator=generator)
    views = [x.unflatten(-1, (heads, width)).transpose(1, 2) for x in qkv.chunk(3, -1)]
    found = []
    for inputs in (views, [x.contiguous() for x in views]):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = op.attend(params, *leaves)
        found.append((out, *torch.autograd.grad(out, leaves, probe)))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=0, atol=0 if engine == "cpp" else 1e-5)
    if spec in ("G2B", "mexican_hat-B"):
        assert all(x.transpose(1, 2).is_contiguous() for x in found[0][1:3])
        assert all(x.is_contiguous() for x in found[1][1:3])


def test_room_like_is_as_wide_as_it_is_read():
    rows = torch.randn(2, 5, 3, 4).transpose(1, 2)  # (B, H, N, d), heads side by side
    assert room_like(rows).stride() == rows.stride() and room_like(rows, 7).shape == (2, 3, 7, 4)
    alone, shared = torch.randn(2, 3, 5, 4), torch.randn(2, 1, 5, 4).expand(2, 3, 5, 4)
    assert room_like(alone).is_contiguous() and room_like(shared).is_contiguous()
    for x in (rows, alone, shared, torch.randn(2, 3, 4, 5).mT):
        assert laid_like(alone, x).stride() == room_like(x).stride()
        assert torch.equal(laid_like(alone, x), alone)


@pytest.mark.parametrize("operator", ["by_offset", "full_rank,engine=plain"])
def test_constant_units_have_no_slope_by_queries_and_keys(operator):
    op = operators.parse(f"polynomial-0:order={operator}").operator
    params = op.init(torch.Generator().manual_seed(0), 2, 10)
    q, k = (draw(2, 10, 3, dtype=torch.float32).requires_grad_() for _ in range(2))
    out = op.attend(params, q, k, draw(2, 10, 3, dtype=torch.float32))
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), (q, k), allow_unused=False))
