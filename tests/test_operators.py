"""Row operators: attend against weights @ v, masks, invariants, bad input."""

import contextlib
import copy
import inspect
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, linearize, vmap
from torch.testing import assert_close

from kart import bases, kernels, operators, tree
from kart.kernels.cpp import weights

SPECS = [
    "softmax",
    "sigmoid",
    "relu",
    "sparsemax",
    "G3",
    "G2:scales=true,base=gelu",
    "G1:init=paper,mix=linear",
    "G3:base=softmax,mix=scaled",
    "G2:project=simplex",
    "G2:project=simplex,base=softmax",
    "polynomial-0",
    "polynomial-1",
    "bspline-G4:base=silu,degree=2",
    "chebyshev-4",
    "gaussian_rbf-G5",
    "rational-5/4",
    "mexican_hat:base=softmax,mix=scaled",
    "morlet",
    "dog:scales=true",
    "meyer",
    "shannon:reading=index",
    "G2:order=full_rank",
    "morlet:order=full_rank",
    "G2:order=project_first",
    "dog:order=project_first",
    "G2:order=two_stage",
    "rational:order=two_stage,base=softmax",
    "2*softmax+G3",
]
MASKS = {
    "none": None,
    "keys of an example": (2, 1, 1, "M"),
    "keys": ("M",),
    "queries and keys": ("N", "M"),
    "heads": (3, "N", "M"),
    "full": (2, 3, "N", "M"),
}
HEADS = 3


def setting(spec, n, m, seed=0, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(seed)
    rank = 3 if "rank" in operators.options(spec) else None
    op = operators.parse(spec, rank=rank).operator
    params = tree.to(op.init(generator, HEADS, m), dtype)
    q, k, v = (torch.randn(batch, HEADS, x, 4, generator=generator).to(dtype) for x in (n, m, m))
    return op, params, q, k, v


def draw_mask(shape, n, m, seed=1):
    if shape is None:
        return None
    sizes = [{"N": n, "M": m}.get(s, s) for s in shape]
    return torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) > 0.4


def scores_of(q, k):
    return q @ k.mT / math.sqrt(q.shape[-1])


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("spec", [s for s in operators.EXAMPLES if "-" not in s])
def test_linearize_is_jvp(spec):
    spec += ":width=4" if spec in ("synthesizer", "performer") else ""
    op, params, q, k, v = setting(spec, 5, 5)
    mask = draw_mask(("N", "M"), 5, 5) if "order" in spec else None

    def attend(params, q):
        return op.attend(params, q, k, v, mask)

    at = (params, q)
    along = tree.map(torch.cos, at)
    out, derivative = linearize(attend, *at)
    assert_close((out, derivative(*along)), jvp(attend, at, along))


@pytest.mark.parametrize("mask_shape", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("spec", SPECS)
def test_attend_equals_weights_times_values_in_value_and_every_gradient(
    spec, mask_shape, queries=5, keys=7
):
    op, params, q, k, v = setting(spec, queries, keys)
    mask = draw_mask(mask_shape, queries, keys)
    probe = torch.randn(2, HEADS, queries, 4, generator=torch.Generator().manual_seed(2)).double()

    def attended(params, q, k, v):
        return (op.attend(params, q, k, v, mask) * probe).sum()

    def looked_at(params, q, k, v):
        return ((op.weights(params, scores_of(q, k), mask) @ v) * probe).sum()

    both = [torch.func.grad_and_value(f, (0, 1, 2, 3)) for f in (attended, looked_at)]
    (got, got_value), (wanted, wanted_value) = (f(params, q, k, v) for f in both)
    assert_close(got_value, wanted_value)
    tree.map(lambda a, b: assert_close(a, b, rtol=1e-8, atol=1e-10), got, wanted)


@pytest.mark.parametrize("mask_shape", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("spec", ["softmax", "sigmoid", "relu", "sparsemax"])
def test_one_query_of_many_keys(spec, mask_shape):
    test_attend_equals_weights_times_values_in_value_and_every_gradient(spec, mask_shape, 1, 33)


@pytest.mark.parametrize("spec", SPECS)
def test_masked_keys_have_no_influence_at_all(spec):
    op, params, q, k, v = setting(spec, 4, 6)
    mask = torch.tensor([True, False, True, True, False, True])
    weights = op.weights(params, scores_of(q, k), mask)
    assert (weights[..., ~mask] == 0).all()
    out = op.attend(params, q, k, v, mask)
    k2, v2 = k.clone(), v.clone()
    k2[..., ~mask, :], v2[..., ~mask, :] = 50.0, -70.0
    assert_close(op.attend(params, q, k2, v2, mask), out, rtol=1e-12, atol=1e-12)
    nothing = op.attend(params, q, k, v, torch.zeros(4, 6, dtype=torch.bool))
    assert_close(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_any_leading_axes_are_kept(spec, dtype):
    op, params, q, k, v = setting(spec, 3, 5, dtype=torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out = op.attend(params, q, k, v)
    assert out.dtype == dtype and out.shape == q.shape
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    single = op.attend(params, q[0], k[0], v[0])
    assert_close(single, out[0], rtol=tolerance, atol=tolerance)
    deep = op.attend(params, q[None, :, None], k[None, :, None], v[None, :, None])
    assert_close(deep[0, :, 0], out, rtol=tolerance, atol=tolerance)
    weights = op.weights(params, scores_of(q, k))
    assert weights.dtype == dtype and weights.isfinite().all()


@pytest.mark.parametrize(
    "op",
    [
        operators.softmax(),
        operators.static(),
        operators.static(rank=2, normalise="softmax"),
        operators.relative(prefix=0, rows=1),
        operators.by_distance(bases.fourier(2)),
        operators.by_distance(bases.fourier(2), normalise="count"),
    ],
    ids=lambda op: op.name,
)
@pytest.mark.parametrize("axes", ["q", "k", "v"])
def test_leading_axes_of_any_are_those_of_the_output(op, axes):
    draw = torch.Generator().manual_seed(0)
    params = op.init(draw, 2, 5)
    shapes = ((*[3] * (name in axes), 2, 5, 4) for name in "qkv")
    q, k, v = (torch.randn(shape, generator=draw) for shape in shapes)
    wanted = op.attend(params, *(x.expand(3, 2, 5, 4) for x in (q, k, v)))
    assert_close(op.attend(params, q, k, v), wanted)


MORE = [
    "tempered",
    "static:base=softmax",
    "static:rank=2,inside=true",
    "softconv:prefix=0,rows=1",
    "G3:order=elementwise",
    "rational:order=elementwise,inside=true,start=scaled",
    "G3:order=by_distance,inside=true",
    "G2:order=full_rank,base=softmax",
]


@pytest.mark.parametrize("mask_shape", [None, (1, 1, "N", "M")], ids=["none", "full"])
@pytest.mark.parametrize("spec", [*SPECS, *MORE])
def test_no_samples_give_gradients_of_zero_like_those_of_some(spec, mask_shape):
    mask = draw_mask(mask_shape, 5, 5)

    def pulled(batch):
        op, params, *qkv = setting(spec, 5, 5, dtype=torch.float32, batch=batch)
        leaves = [x.requires_grad_() for x in (*qkv, *tree.leaves(params))]
        out = op.attend(params, *qkv, mask)
        found = torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
        return out, leaves, found

    out, leaves, found = pulled(0)
    assert out.shape == (0, HEADS, 5, 4)
    for leaf, gradient, wanted in zip(leaves, found, pulled(2)[2], strict=True):
        assert (gradient is None) == (wanted is None)
        if gradient is not None:
            assert_close(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("spec", [*SPECS, *MORE])
def test_vmap_over_nothing_gives_nothing(spec):
    op, params, q, k, v = setting(spec, 5, 5, dtype=torch.float32, batch=0)
    mask = torch.ones(0, 1, 5, 5, dtype=torch.bool)
    for masks in (None, mask):
        per_sample = vmap(
            grad(lambda params, q, *rest: op.attend(params, q, *rest).sum(), argnums=(0, 1)),
            in_dims=(None, 0, 0, 0, None if masks is None else 0),
        )
        of_params, of_q = per_sample(params, q, k, v, masks)
        assert of_q.shape == q.shape
        for x, leaf in zip(tree.leaves(of_params), tree.leaves(params), strict=True):
            assert x.shape == (0, *leaf.shape)
    if params:
        none = tree.map(lambda x: x.new_zeros(0, *x.shape), params)
        qkv = (torch.ones(2, HEADS, 5, 4) for _ in range(3))
        out = vmap(op.attend, in_dims=(0, None, None, None))(none, *qkv)
        assert out.shape == (0, 2, HEADS, 5, 4)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("meta", torch.float32), ("meta", torch.bfloat16), ("fake", torch.float32)],
)
@pytest.mark.parametrize("spec", [*SPECS, *MORE])
def test_tensors_without_numbers_have_the_shapes_of_those_with(spec, kind, dtype, masked):
    op, params, *qkv = setting(spec, 5, 5, dtype=torch.float32)
    qkv, mode = [x.to(dtype) for x in qkv], FakeTensorMode()
    mask = torch.ones(5, 5, dtype=torch.bool) if masked else None
    with contextlib.nullcontext() if kind == "meta" else mode:
        put = mode.from_tensor if kind == "fake" else lambda x: x.to("meta")
        leaves = [put(x).requires_grad_() for x in qkv]
        out = op.attend(tree.map(put, params), *leaves, put(mask) if masked else None)
        assert out.is_meta == (kind == "meta") and out.shape == qkv[2].shape
        gradients = torch.autograd.grad(
            out.sum(), leaves, allow_unused=True, materialize_grads=True
        )
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, dtype) for x in qkv]
    # what was first asked of fake tensors is not kept for others
    assert op.attend(params, *qkv).isfinite().all()


@pytest.mark.parametrize("mask_shape", ["none", "queries and keys"])
@pytest.mark.parametrize("spec", [*SPECS, *MORE])
def test_a_negation_that_is_put_off_is_seen(spec, mask_shape):
    op, params, *qkv = setting(spec, 5, 5, dtype=torch.float32)
    mask = draw_mask(MASKS[mask_shape], 5, 5)

    def negated(x):
        lazy = torch.complex(x, -x).conj().imag
        assert lazy.is_neg()
        return lazy

    found = []
    for put in (torch.clone, negated):
        leaves = [put(x).requires_grad_() for x in qkv]
        out = op.attend(tree.map(put, params), *leaves, mask)
        more = {"allow_unused": True, "materialize_grads": True}
        found.append((out, *torch.autograd.grad(out, leaves, put(qkv[0]), **more)))
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("spec", [*SPECS, *MORE])
def test_forward_mode_of_half_inputs(spec):
    op, params, *qkv = setting(spec, 5, 5, dtype=torch.float32)
    half = tuple(x.bfloat16() for x in qkv)
    along = tuple(x.cos() for x in half)
    found = jvp(lambda *x: op.attend(params, *x), half, along)
    exact = tree.to(params, torch.float64)
    wide = (tuple(x.double() for x in xs) for xs in (half, along))
    wanted = jvp(lambda *x: op.attend(exact, *x), *wide)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()


@pytest.mark.parametrize("spec", [*SPECS, *MORE])
def test_batched_gradients_of_autograd_are_those_of_a_loop(spec):
    op, params, *qkv = setting(spec, 5, 5, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (*qkv, *tree.leaves(params))]
    for mask in (None, draw_mask(("N", "M"), 5, 5)):
        out = op.attend(params, *qkv, mask)
        probes = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(2))

        def pull(probe, out=out, **options):
            options = {"retain_graph": True, "allow_unused": True, **options}
            return torch.autograd.grad(out, leaves, probe, **options, materialize_grads=True)

        loop = zip(*(pull(probe) for probe in probes), strict=True)
        for got, wanted in zip(pull(probes, is_grads_batched=True), loop, strict=True):
            assert_close(got, torch.stack(wanted).expand(got.shape), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_vmap_over_examples_and_over_populations_equals_a_loop(spec):
    op, params, q, k, v = setting(spec, 3, 4)
    mapped = vmap(op.attend, in_dims=(None, 0, 0, 0))(params, q, k, v)
    assert_close(mapped, op.attend(params, q, k, v))
    if not params:
        return  # nothing to stack
    members = [
        tree.to(op.init(torch.Generator().manual_seed(i), HEADS, 4), q.dtype) for i in (1, 2)
    ]
    population = vmap(op.attend, in_dims=(0, None, None, None))(tree.stack(members), q, k, v)
    loop = torch.stack([op.attend(member, q, k, v) for member in members])
    assert_close(population, loop)


ONE_OF_EACH = [
    *("softmax", "tempered", "G2:rank=2", "G2:base=softmax", "G2:order=full_rank", "softconv"),
    *("static:base=softmax", "G2:order=elementwise", "G2:order=by_distance,base=softmax", "dog"),
    *("linformer:rank=2", "gated", "relative:inside=true", "G2:order=by_offset", "sparsemax"),
    *("synthesizer:width=3", "performer:width=3", "G2:order=generated", "G2:order=project_first"),
    *(
        "static:rank=2",
        "static:rank=2,inside=true",
        "static:inside=true",
        "G2:project=simplex",
        "G2:order=two_stage",
        "G2:order=beside_relative",
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("one", ["params", "q", "k", "v"])
@pytest.mark.parametrize("spec", ONE_OF_EACH)
def test_what_has_one_head_has_it_for_all(spec, one, dtype):
    op = operators.parse(spec).operator
    generator = torch.Generator().manual_seed(0)
    params = op.init(generator, 1 if one == "params" else 3, 5)
    params = tree.map(lambda x: x + 0.3 * torch.randn(x.shape, generator=generator), params)
    given = {x: torch.randn(2, 1 if x == one else 3, 5, 3, generator=generator) for x in "qkv"}
    given = {x: y.to(dtype).requires_grad_() for x, y in given.items()}
    params = tree.map(lambda x: x.to(dtype).requires_grad_(), params)

    def spread():
        whole = {x: y.expand(2, 3, 5, 3) for x, y in given.items()}
        return tree.map(lambda x: x.expand(3, *x.shape[1:]), params), whole

    leaves, found = [*given.values(), *tree.leaves(params)], []
    for own, qkv in ((params, given), spread()):
        out = op.attend(own, *qkv.values())
        found.append([out, *torch.autograd.grad(out.sin().sum(), leaves, materialize_grads=True)])
    for got, wanted in zip(*found, strict=True):
        assert_close(got, wanted, rtol=1e-4, atol=1e-5)


OTHERS = [
    ("full_rank,mix", "needs parameters units, got units, mix, which are of another"),
    ("low_rank,units", "needs parameters units, mix, got units, which are"),
    ("elementwise,low_rank", "needs parameters units, got units, mix, which are"),
    (
        "elementwise,full_rank",
        r"needs units with '.*' \(H.*\), got shape \(2, 4, 4.*\), which is of",
    ),
    (
        "by_distance,full_rank",
        r"needs units with '.*' \(H.*\), got shape \(2, 4, 4.*\), which is of",
    ),
    (
        "full_rank,elementwise",
        r"needs units with '.*' \(H, ., ..*\), got shape \(2.*\), which is of",
    ),
    ("by_offset,low_rank", "needs parameters table, units, got units, mix"),
    ("two_stage,low_rank", "needs parameters first, second, got units, mix"),
    ("beside_relative,low_rank", "`added` needs parameters 0, 1, got units, mix"),
    ("hybrid,low_rank", "`hybrid` needs parameters 0, 1, got units, mix"),
    ("low_rank,moved", r"needs parameters of one number of keys, got \[4, 5\]"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["G2", "dog", "rational-2/2"])
@pytest.mark.parametrize(("pair", "words"), OTHERS)
def test_parameters_of_another_operator_are_refused(pair, words, family, dtype):
    generator, (name, given) = torch.Generator().manual_seed(0), pair.split(",")
    made = {
        order: operators.parse(f"{family}:order={order}{more}").operator
        for order, more in (
            *(("low_rank", ",rank=2"), ("full_rank", ""), ("two_stage", ",rank=2")),
            *(("elementwise", ""), ("by_distance", ""), ("by_offset", ",prefix=0,rows=1")),
            ("beside_relative", ",rank=2,prefix=0,rows=1"),
        )
    }
    made["hybrid"] = operators.hybrid([made["full_rank"], made["low_rank"]])
    params = {order: op.init(generator, 2, 4) for order, op in made.items()}
    params["mix"] = {**params["full_rank"], "mix": params["low_rank"]["mix"]}
    params["units"] = {"units": params["low_rank"]["units"]}
    other = made["low_rank"].init(generator, 2, 5)
    params["moved"] = {**params["low_rank"], "mix": other["mix"]}
    x = torch.ones(1, 2, 4, 3, dtype=dtype)
    own = tree.to(params[given], dtype)
    for call in (
        lambda: made[name].attend(own, x, x, x),
        lambda: made[name].weights(own, x @ x.mT),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_parts_without_parameters_may_be_missing_from_a_tree_of_leaves():
    x = torch.linspace(-1, 1, 48).view(2, 2, 4, 3)
    low_rank = operators.low_rank(bases.fourier(2), rank=2)
    for make in (operators.hybrid, operators.added):
        op = make([operators.softmax(), low_rank])
        params = op.init(torch.Generator().manual_seed(0), 2, 4)
        leaves = tree.unflatten(tree.named(params))
        assert torch.equal(op.attend(leaves, x, x, x), op.attend(params, x, x, x))


@pytest.mark.parametrize("spec", ["dog:scales=true", "dog:order=elementwise,scales=true"])
def test_a_parameter_without_a_part_has_zero_derivatives_of_any_order(spec):
    op = operators.parse(spec).operator
    params = op.init(torch.Generator().manual_seed(0), 2, 5)
    q = torch.linspace(-1, 1, 30).view(2, 5, 3)

    def loss(q, scale):
        # of a base activation that is zero
        units = {**params["units"], "scale_base": scale}
        return op.attend({**params, "units": units}, q, q, q).square().sum()

    slopes = torch.func.grad(loss, (0, 1))
    second = torch.func.grad(lambda *x: sum(g.square().sum() for g in slopes(*x)), (0, 1))
    found = [second(q, params["units"]["scale_base"])]
    leaves = [q.requires_grad_(), params["units"]["scale_base"].requires_grad_()]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True, materialize_grads=True)
    total = sum(g.square().sum() for g in first)
    found.append(torch.autograd.grad(total, leaves, materialize_grads=True))
    for of_q, of_scale in found:
        assert of_q.abs().max() > 0 and not of_scale.any()


@pytest.mark.parametrize("spec", SPECS)
def test_forward_derivative_agrees_with_the_reverse_one(spec):
    op, params, q, k, v = setting(spec, 3, 4)
    direction = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).double()

    def total(q):
        return op.attend(params, q, k, v).sin().sum()

    _, forward = jvp(total, (q,), (direction,))
    assert_close(forward, (grad(total)(q) * direction).sum(), rtol=1e-8, atol=1e-10)


FIXED = [spec for spec in SPECS if not operators.parse(spec).operator.traits["learned"]]
LEARNED = [spec for spec in SPECS if spec not in FIXED and "+" not in spec]


@pytest.mark.parametrize("spec", LEARNED)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 5), m=st.integers(1, 6))
def test_attention_is_linear_in_the_values_and_blind_to_the_order_of_queries(spec, seed, n, m):
    op, params, q, k, v = setting(spec, n, m, seed=seed, batch=1)
    out = op.attend(params, q, k, v)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert_close(op.attend(params, q[:, :, order], k, v), out[:, :, order], rtol=1e-8, atol=1e-9)
    other = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed)).double()
    both = op.attend(params, q, k, 2 * v - other)
    assert_close(both, 2 * out - op.attend(params, q, k, other), rtol=1e-7, atol=1e-8)


@given(rank=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_low_rank_weights_have_the_rank_they_say(rank, seed):
    op = operators.low_rank(bases.fourier(2), rank=rank)
    params = tree.to(op.init(torch.Generator().manual_seed(seed), 1, 6), torch.float64)
    scores = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(seed)).double()
    assert torch.linalg.matrix_rank(op.weights(params, scores))[0] <= rank


@pytest.mark.parametrize("spec", [s for s in SPECS if "simplex" in s or s == "sparsemax"])
@given(seed=st.integers(0, 2**31), size=st.floats(0, 1e4))
def test_projected_rows_lie_on_the_simplex(spec, seed, size):
    op, params, q, k, _ = setting(spec, 3, 5, seed=seed, dtype=torch.float32)
    weights = op.weights(params, scores_of(q, k) * size)
    assert (weights >= 0).all()
    assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=1e-5, atol=1e-5)


def test_softmax_base_with_zero_mix_is_softmax():
    op, params, q, k, v = setting("G3:base=softmax", 4, 6)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_close(op.attend(params, q, k, v), wanted)
    assert not params["mix"].any() and params["units"]["coefs"].any()


def test_weights_by_hand():
    # one head, one unit, G = 1: phi_m(s) = a_m cos s + b_m sin s, W = (w_0, w_1)
    op = operators.low_rank(bases.fourier(1), rank=1)
    params = {
        "units": {"coefs": torch.tensor([[[[1.0, 2.0], [3.0, -1.0]]]])},
        "mix": torch.tensor([[[0.5], [-2.0]]]),
    }
    scores = torch.tensor([[[0.0, math.pi / 2]]])
    # phi_0(0) = 1, phi_1(pi/2) = -1: the hidden sum is 0; with the first score pi/2 it is 2 - 1
    assert_close(op.weights(params, scores), torch.zeros(1, 1, 2), atol=1e-6, rtol=0)
    scores = torch.tensor([[[math.pi / 2, math.pi / 2]]])
    assert_close(op.weights(params, scores), torch.tensor([[[0.5, -2.0]]]))


def test_full_rank_by_hand():
    op = operators.full_rank(bases.polynomial(1))
    coefs = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [3.0, 0.0]]]])  # (1, out, in, K)
    weights = op.weights({"units": {"coefs": coefs}}, torch.tensor([[[5.0, 7.0]]]))
    # out 0: 1 + 2 * 7, out 1: 5 + 3
    assert_close(weights, torch.tensor([[[15.0, 8.0]]]))


def test_fixed_operators_by_hand():
    scores = torch.tensor([[[0.0, math.log(3.0)]]])
    sigmoid = operators.sigmoid().weights({}, scores)  # sigmoid(s - log 2)
    assert_close(sigmoid, torch.tensor([[[1 / 3, 3 / 5]]]))
    relu = operators.relu().weights({}, torch.tensor([[[-1.0, 4.0]]]))
    assert_close(relu, torch.tensor([[[0.0, 2.0]]]))
    sparse = operators.sparsemax().weights({}, torch.tensor([[[0.5, 0.0, -3.0]]]))
    assert_close(sparse, torch.tensor([[[0.75, 0.25, 0.0]]]))


@pytest.mark.parametrize("spec", ["sigmoid", "relu"])
@pytest.mark.parametrize("shape", [None, (37,), (2, 1, 37, 37)])
def test_a_fixed_function_of_the_score_is_one_compiled_pass(spec, shape, monkeypatch):
    if reason := kernels.engines()["cpp"].replace("ready", ""):
        pytest.skip(reason)
    runs = []
    forward = weights.forward
    monkeypatch.setattr(weights, "forward", lambda x: runs.append(x.form) or forward(x))
    op = operators.parse(spec).operator
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 2, HEADS, 37, 4, generator=generator).unbind(0)
    mask = None if shape is None else torch.rand(shape, generator=generator) > 0.4
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = op.attend({}, *leaves, mask)
    out.square().sum().backward()
    wide = [x.double().requires_grad_() for x in qkv]
    q, k, v = wide
    wanted = op.weights({}, q @ k.mT / 2, mask) @ v
    wanted.square().sum().backward()
    assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)
    for x, y in zip(leaves, wide, strict=True):
        assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-6)
    assert runs == ["plain"]


@pytest.mark.parametrize(
    ("options", "per_pair"), [({}, 2 * 3 + 1), ({"scales": True}, 2 * 3 + 3)], ids=["2G+1", "2G+3"]
)
def test_parameter_counts_of_the_paper(options, per_pair):
    op = operators.low_rank(bases.fourier(3, **options), rank=12)
    params = op.init(torch.Generator().manual_seed(0), 3, 197)
    assert tree.size(params) == 3 * per_pair * 12 * 197


# of unit scale: not the paper's draw, the powers of a rational, or base activations
SCALED = [s for s in LEARNED if not any(x in s for x in ("init=paper", "rational", "base="))]


@pytest.mark.parametrize("spec", SCALED)
def test_a_new_head_neither_explodes_nor_vanishes(spec):
    op = operators.parse(spec).operator
    generator = torch.Generator().manual_seed(0)
    params = op.init(generator, 2, 197)
    q, k, v = (torch.randn(2, 197, 16, generator=generator) for _ in range(3))
    assert 0.005 < float(op.attend(params, q, k, v).std()) < 5


@pytest.mark.parametrize(
    "factory",
    [
        operators.low_rank,
        operators.full_rank,
        operators.project_first,
        operators.two_stage,
        operators.elementwise,
        operators.by_distance,
        operators.by_offset,
        operators.generated,
    ],
)
@pytest.mark.parametrize("basis", ["fourier", bases.fourier, None, operators.softmax()])
def test_what_is_no_basis_is_refused_when_the_operator_is_made(factory, basis):
    with pytest.raises(ValueError, match="needs a Basis first"):
        factory(basis)


def test_bad_tensors_name_the_argument():
    op, params, q, k, v = setting("G2", 4, 6)
    with pytest.raises(ValueError, match="initialised for rows of 6 keys, got 5"):
        op.attend(params, q, k[:, :, :5], v[:, :, :5])
    with pytest.raises(ValueError, match="initialised for rows of 6 keys, got 5"):
        op.weights(params, scores_of(q, k)[..., :5])
    with pytest.raises(ValueError, match="boolean `mask`"):
        op.attend(params, q, k, v, torch.ones(4, 6))
    with pytest.raises(ValueError, match="boolean `mask`"):
        op.attend(params, q, k, v, torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="one floating-point dtype"):
        op.attend(params, q, k.float(), v)
    with pytest.raises(ValueError, match="no empty axis"):
        op.attend(params, q[:, :, :0], k, v)
    with pytest.raises(ValueError, match="`scores`"):
        op.weights(params, torch.ones(4, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="`heads` >= 1"):
        op.init(torch.Generator(), 0, 5)
    with pytest.raises(ValueError, match=r"torch\.Generator"):
        op.init(0, 1, 5)
    mixed = operators.hybrid([operators.softmax(), operators.relu()])
    with pytest.raises(ValueError, match="as many heads as operators"):
        mixed.init(torch.Generator(), 3, 5)
    with pytest.raises(ValueError, match="one Operator per head"):
        operators.hybrid([])
    with pytest.raises(ValueError, match="as many heads as operators, 2, got 1"):
        mixed.attend({}, q[:, :2], k[:, :1], v[:, :2])
    two = {"0": {}, "1": {}}
    with pytest.raises(ValueError, match="`hybrid.attend` needs a `mask` whose axes"):
        mixed.attend(two, q[:, :2], k[:, :2], v[:, :2], torch.ones(3, 4, 6, dtype=torch.bool))


@pytest.mark.parametrize("spec", ["softmax", "G2", "static", "2*softmax+G2", "cosformer"])
def test_what_is_no_tensor_or_no_dict_of_them_is_refused(spec):
    op, params, q, k, v = setting(spec, 4, 4)
    for other in (None, 3, "q", [[1.0]]):
        for i in range(3):
            given = [*(q, k, v)[:i], other, *(q, k, v)[i + 1 :]]
            with pytest.raises(ValueError, match=f"needs tensors, got .*{type(other).__name__}"):
                op.attend(params, *given)
    if op.traits.get("of_scores", True):
        with pytest.raises(ValueError, match="weights` needs tensors, got list"):
            op.weights(params, [[1.0]])
    for other in (None, 3, [], q):
        for call in (lambda p: op.attend(p, q, k, v), lambda p: operators.resize(op, p, 17, 65)):
            with pytest.raises(ValueError, match="as a dict, got (NoneType|int|list|Tensor)"):
                call(other)
    with pytest.raises(ValueError, match="`resize` needs an Operator first, got str"):
        operators.resize(spec, params, 17, 65)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(
    "spec", ["G2", "G2:order=elementwise", "static", "tempered", "G2:order=by_offset"]
)
def test_rows_of_other_heads_than_the_parameters_are_refused(spec, heads):
    op, params, q, k, v = setting(spec, 5, 5)
    few = [torch.cat([x, x], 1)[:, :heads] for x in (q, k, v)]
    with pytest.raises(ValueError, match=f"needs parameters of {heads} heads, got those of 3"):
        op.attend(params, *few)
    with pytest.raises(ValueError, match=f"needs parameters of {heads} heads, got those of 3"):
        op.weights(params, scores_of(*few[:2]))


HUGE = 10**30


@pytest.mark.parametrize(
    "op",
    [
        operators.low_rank(bases.fourier(2), rank=HUGE),
        operators.low_rank(bases.linear(lambda x: x[..., None], 10**15)),
        operators.project_first(bases.dog(), rank=HUGE),
        operators.two_stage(bases.dog(), rank=HUGE),
    ],
)
def test_parameters_that_do_not_fit_memory_are_refused_before_any_is_drawn(op):
    with pytest.raises(ValueError, match=r"parameters that fit the \d+ GiB of memory, got"):
        op.init(torch.Generator(), 2, 5)


def test_keys_that_do_not_fit_memory_are_refused():
    op = operators.full_rank(bases.fourier(1))
    with pytest.raises(ValueError, match="1 x 10,000,000 x 10,000,000 units of 2 numbers"):
        op.init(torch.Generator(), 1, 10**7)


def wave(x):
    return torch.stack([x.sin(), x.cos()], dim=-1)


def fixed_weights(params, scores, mask=None):
    return torch.ones_like(scores)


@pytest.mark.parametrize("spec", FIXED)
def test_a_fixed_operator_pickles_and_deepcopies(spec):
    op, params, q, k, v = setting(spec, 4, 6)
    for copied in (pickle.loads(pickle.dumps(op)), copy.deepcopy(op)):
        assert copied.name == spec and copied.options == op.options
        assert_close(copied.attend(params, q, k, v), op.attend(params, q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize("spec", [*LEARNED, "2*softmax+G3"])
def test_an_operator_deepcopies(spec):
    op, params, q, k, v = setting(spec, 4, 6)
    copied = copy.deepcopy(op)
    assert isinstance(copied, operators.Operator) and copied.name == op.name
    assert_close(copied.attend(params, q, k, v), op.attend(params, q, k, v), rtol=0, atol=0)


def test_what_was_replaced_after_the_factory_survives_a_copy():
    op = operators.softmax()._replace(name="mine", weights=fixed_weights)
    for copied in (pickle.loads(pickle.dumps(op)), copy.deepcopy(op)):
        assert copied.name == "mine" and copied.weights is fixed_weights
        again = copy.deepcopy(copied)
        assert again.name == "mine" and again.weights is fixed_weights
    by_hand = op._replace(call=None, init=fixed_weights, attend=fixed_weights)
    assert pickle.loads(pickle.dumps(by_hand)) == by_hand
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(op._replace(attend=lambda *_: None))


def test_groups_of_a_mixture_survive_a_copy():
    op = operators.hybrid([operators.softmax()] * 2 + [operators.relu()])
    copied = pickle.loads(pickle.dumps(op))
    assert [count for _, count in copied.options["groups"]] == [2, 1]


def test_a_factory_keeps_its_signature_and_says_what_made_a_tuple():
    assert list(inspect.signature(operators.low_rank).parameters)[:2] == ["basis", "rank"]
    assert repr(operators.softmax().call) == "<call of softmax>"


def test_what_an_operator_of_ones_own_is_made_of_is_at_hand():
    made = operators.from_forms("own", None, lambda p, s, mask: s, lambda p, q, k, v, mask: v)
    assert {"from_forms", "from_logits", "from_rows"} <= set(operators.__all__)
    assert made.name == "own" and not made.traits["learned"]


@pytest.mark.parametrize(
    ("spec", "path", "part"),
    [
        # axes of one that products would repeat, or of the wrong place
        ("static", "matrix", (..., slice(1))),
        ("static:rank=2", "queries", (..., slice(1))),
        ("static:rank=2,inside=true", "keys", (..., slice(1))),
        ("gated", "position", (..., slice(1))),
        ("tempered", "sharpness", (slice(None), None)),
        ("synthesizer:width=4", "bias", (..., slice(1))),
        ("synthesizer:width=4,normalise=none", "second", (..., slice(4))),
        ("relative", "to_prefix", (slice(None), slice(3))),
        ("relative:inside=true", "prefix", (..., slice(0))),
        ("softconv", "from_prefix", (..., slice(3))),
        ("G2:order=by_offset", "table.to_prefix", (slice(None), slice(3))),
        ("G2:order=by_offset", "units.to_prefix.coefs", (slice(None), slice(3))),
        ("G2:rank=3", "mix", (..., slice(2))),
        ("G2:rank=3", "units.coefs", (slice(None), slice(2))),
        ("linformer:rank=3", "values", (slice(None), slice(2))),
    ],
)
def test_parameters_of_two_operators_are_refused(spec, path, part):
    op = operators.parse(spec).operator
    params = op.init(torch.Generator().manual_seed(0), 2, 5)
    named = tree.named(params)
    q, k, v = torch.randn(3, 2, 5, 4).unbind(0)
    op.attend(params, q, k, v)
    wrong = tree.unflatten({**named, path: named[path][part]})
    with pytest.raises(ValueError, match=r"needs|was initialised for"):
        op.attend(wrong, q, k, v)
