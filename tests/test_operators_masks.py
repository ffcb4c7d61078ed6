"""Operators at their edges: what is masked has no part in anything; half precision is float32
inside; both for drawn orders, bases, projections and masks.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad_and_value
from torch.testing import assert_close

from kart import operators, tree

HEADS, N, M, D = 2, 4, 6, 3
ORDERS = ["low_rank", "full_rank", "project_first", "two_stage"]
UNITS = ["G2", "polynomial-2", "bspline-G4", "chebyshev-3", "gaussian_rbf-G4", "rational-3/2"]
UNITS += ["mexican_hat", "morlet", "dog", "meyer", "shannon", "G2:scales=true,unit_base=silu"]
FIXED = ["softmax", "sigmoid", "relu", "sparsemax"]
ROWS = ["", "base=softmax", "project=simplex", "project=simplex,base=softmax"]
# axes of a mask; what it shows is drawn
MASKS = [(), (M,), (1, M), (N, M), (N, 1), (HEADS, N, M), (2, 1, 1, M), (2, HEADS, N, M)]


def spec_of(units, order, rows):
    options = [f"order={order}", *filter(None, [rows, "mix=scaled" * (order == "low_rank")])]
    return units + (":" if ":" not in units else ",") + ",".join(options)


specs = st.one_of(
    st.sampled_from([*FIXED, "softmax+G2", "sparsemax+dog:project=simplex"]),
    st.builds(spec_of, *map(st.sampled_from, (UNITS, ORDERS, ROWS))),
)


def drawn(spec, seed, dtype=torch.float64, n=N, m=M):
    generator = torch.Generator().manual_seed(seed)
    op = operators.parse(spec, rank=3 if "rank" in operators.options(spec) else None).operator
    params = tree.to(op.init(generator, HEADS, m), torch.promote_types(dtype, torch.float32))
    q, k, v = (torch.randn(2, HEADS, x, D, generator=generator).to(dtype) for x in (n, m, m))
    return op, params, q, k, v


def draw_mask(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4


def probed(call, *arguments):
    """The value of `call` and the gradients of a fixed mixture of it."""

    def loss(*arguments):
        y = call(*arguments)
        probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).cos()
        return (y * probe).sum(), y

    gradients, (_, y) = grad_and_value(loss, tuple(range(len(arguments))), has_aux=True)(*arguments)
    return y, gradients


def assert_same(got, wanted):
    tree.map(lambda a, b: assert_close(a, b, rtol=1e-9, atol=1e-11), got, wanted)


@given(
    spec=specs,
    shape=st.sampled_from(MASKS),
    poison=st.sampled_from([math.nan, math.inf, -math.inf, 1e300]),
    seed=st.integers(0, 2**31),
)
def test_what_masked_scores_keys_and_values_hold_changes_no_value_and_no_gradient(
    spec, shape, poison, seed
):
    op, params, q, k, v = drawn(spec, seed)
    mask = draw_mask(shape, seed)
    full = mask.expand(2, HEADS, N, M)
    scores = q @ k.mT / math.sqrt(D)

    def look(params, scores):
        return op.weights(params, scores, mask)

    weights, gradients = probed(look, params, scores)
    assert (weights[~full] == 0).all()
    poisoned = torch.where(full, scores, poison)
    got, got_gradients = probed(look, params, poisoned)
    assert_same((got, got_gradients), (weights, gradients))
    assert (got_gradients[1][~full] == 0).all()

    def attend(params, q, k, v):
        return op.attend(params, q, k, v, mask)

    seen, awake = full.any(-2)[..., None], full.any(-1)[..., None]
    out, gradients = probed(attend, params, q, k, v)
    assert_close(out, weights @ v, rtol=1e-8, atol=1e-10)
    assert (out[~awake.expand(out.shape)] == 0).all()
    # a key that nobody attends to, and a query that attends to nothing
    tensors = (torch.where(awake, q, poison), torch.where(seen, k, poison))
    poisoned = (params, *tensors, torch.where(seen, v, poison))
    got, got_gradients = probed(attend, *poisoned)
    assert_same((got, got_gradients), (out, gradients))
    for gradient, kept in zip(got_gradients[1:], (awake, seen, seen), strict=True):
        assert (gradient[~kept.expand(gradient.shape)] == 0).all()


@pytest.mark.parametrize("spec", [*FIXED, "G2", "dog", "G2:project=simplex", "softmax+G2"])
def test_poison_passes_where_it_is_attended_to(spec):
    op, params, q, k, v = drawn(spec, 0)
    mask = torch.ones(N, M, dtype=torch.bool).tril(2)
    v = v.clone()
    v[..., 0, :] = math.nan
    assert op.attend(params, q, k, v, mask).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("keys", [1, 7, 15, 16])
@pytest.mark.parametrize(
    "spec", [*FIXED, "tempered", "G2", "G2:base=softmax", "dog", "G2:project=simplex", "softmax+G2"]
)
def test_a_query_of_nan_has_an_output_of_nan_and_the_others_have_theirs(spec, keys, dtype):
    op, params, q, k, v = drawn(spec, 0, dtype, m=keys)
    wanted = op.attend(params, q, k, v)
    q[1, 0, 2, 1] = math.nan
    out = op.attend(params, q, k, v)
    assert out[1, 0, 2].isnan().all()
    others = torch.ones(q.shape[:-1], dtype=torch.bool)
    others[1, 0, 2] = False
    assert_close(out[others], wanted[others])


@pytest.mark.parametrize("show", [True, False])
@pytest.mark.parametrize(
    "spec", [*FIXED, *(spec_of(*x) for x in itertools.product(["G2", "dog"], ORDERS, ROWS))]
)
def test_a_mask_without_axes_shows_all_or_nothing(spec, show):
    op, params, q, k, v = drawn(spec, 3)
    mask = torch.tensor(show)
    scores = q @ k.mT / math.sqrt(D)
    out, weights = op.attend(params, q, k, v, mask), op.weights(params, scores, mask)
    factor = 1.0 if show else 0.0
    assert_close(out, op.attend(params, q, k, v) * factor)
    assert_close(weights, op.weights(params, scores) * factor)


# the unit roundoff of bfloat16 is 4e-3, of float16 5e-4
HALF = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_rows_of_ones_own_that_ignore_the_mask_leak_into_neither_form(shape):
    # from_rows promises scores of zero where they are masked, and drops what rows hold there
    op = operators.from_rows("own", lambda scores, mask: 1 + scores.relu())
    _, _, q, k, v = drawn("softmax", 0)
    mask = draw_mask(shape, 1)
    wanted = torch.where(mask, 1 + (q @ k.mT / D**0.5).relu(), 0)
    assert_close(op.weights({}, q @ k.mT / D**0.5, mask), wanted)
    assert_close(op.attend({}, q, k, v, mask), wanted @ v)


@pytest.mark.parametrize("dtype", HALF)
@given(spec=specs, shape=st.sampled_from([None, *MASKS]), seed=st.integers(0, 2**31))
def test_half_inputs_are_computed_in_float32_and_rounded_once(dtype, spec, shape, seed):
    op, params, q, k, v = drawn(spec, seed, dtype, n=8, m=12)
    if shape is not None:
        sizes = {N: 8, M: 12}
        shape = draw_mask([sizes.get(size, size) for size in shape], seed)
    # scores of a trained size, at which a rounded score is another angle
    q = (q * 6).to(dtype)
    wanted = op.attend(params, q.float(), k.float(), v.float(), shape)
    got = op.attend(params, q, k, v, shape)
    assert got.dtype == dtype
    error = (got.float() - wanted).norm() / wanted.norm().clamp(min=1e-20)
    assert error < HALF[dtype], float(error)
    scores = (q.float() @ k.float().mT / math.sqrt(D)).to(dtype)
    wanted, got = (op.weights(params, s, shape) for s in (scores.float(), scores))
    assert got.dtype == dtype
    error = (got.float() - wanted).norm() / wanted.norm().clamp(min=1e-20)
    assert error < HALF[dtype], float(error)


@pytest.mark.parametrize(
    "spec",
    [
        *("G3", "G3:order=project_first", "G3:order=two_stage", "sigmoid"),
        *("G3:order=generated", "G3:order=generated,base=softmax,mix=scaled"),
    ],
)
def test_autocast_leaves_the_scores_in_float32(spec):
    op, params, q, k, v = drawn(spec, 1, torch.float32)
    wanted = op.attend(params, q * 6, k, v)
    scores = q @ k.mT
    looked = op.weights(params, scores)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(op.attend(params, q * 6, k, v), wanted)
        assert_close(op.weights(params, scores), looked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("spec", ["softmax+G2:rank=2", "G2:rank=2", "softconv", "linformer"])
def test_autocast_takes_every_type(spec, dtype):
    op = operators.parse(spec).operator
    params = op.init(torch.Generator().manual_seed(0), 2, 4)
    q = torch.linspace(-1, 1, 48).view(2, 2, 4, 3).to(dtype)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    expected = op.attend(params, q, q, q, mask), op.weights(params, q @ q.mT, mask)
    scores = q @ q.mT
    with torch.autocast("cpu", torch.bfloat16):
        found = op.attend(params, q, q, q, mask), op.weights(params, scores, mask)
    assert all(map(torch.equal, found, expected))
