"""The simplex projection: its optimality, its derivative, the rows where textbook forms fail."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

from kart.projections import simplex

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.float64)

# ties, the edges of the support (differences of exactly one) and far values, beside any others
SPECIAL = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 1 / 3, 2.0, 1e-30, 1e4, -1e4, 1e8, -1e8])
ROWS = st.lists(SPECIAL | st.floats(-3, 3, width=32), min_size=1, max_size=9)


def tolerance(p):
    return 4 * p.shape[-1] * torch.finfo(p.dtype).eps


def close(p, q):
    assert_close(p, q, atol=tolerance(p), rtol=0)


def nearest_by_enumeration(row):
    """The exact projection: the nearest feasible point among the planes of all faces."""
    y = [Fraction(x) for x in row]
    candidates = []
    for size in range(1, len(y) + 1):
        for face in itertools.combinations(range(len(y)), size):
            excess = (sum(y[i] for i in face) - 1) / size
            p = [y[i] - excess if i in face else Fraction(0) for i in range(len(y))]
            if min(p) >= 0:
                candidates.append((sum((a - b) ** 2 for a, b in zip(p, y, strict=True)), p))
    return [float(x) for x in min(candidates)[1]]


def threshold_by_bisection(y):
    """The threshold, no better than the rounding of `y`: give it rows of small numbers."""
    low, high = y.amax(-1, keepdim=True) - 1, y.amax(-1, keepdim=True)
    for _ in range(80):
        middle = (low + high) / 2
        above = (y - middle).clamp(min=0).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def jacobian_of_theory(y):
    s = (y > threshold_by_bisection(y)).to(y.dtype)
    return torch.diag(s) - torch.outer(s, s) / s.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@given(row=ROWS)
def test_the_result_is_on_the_simplex_and_stays(dtype, row):
    p = simplex(torch.tensor(row, dtype=dtype))
    assert (p >= 0).all()
    close(p.sum(-1, keepdim=True), torch.ones(1, dtype=dtype))
    close(simplex(p), p)


@given(row=ROWS)
def test_the_result_is_the_nearest_point(row):
    y = torch.tensor(row, dtype=torch.float64)
    p = simplex(y)
    # <y - p, z - p> <= 0 for all z of the simplex, for which its vertices suffice
    gaps = (y - p)[None] * (torch.eye(len(row), dtype=torch.float64) - p)
    assert (gaps.sum(-1) <= 1e-13 * (1 + y.abs().max())).all()


@given(row=ROWS.filter(lambda row: len(row) <= 6))
def test_the_result_equals_the_exact_one_of_all_faces(row):
    y = torch.tensor(row, dtype=torch.float64)
    close(simplex(y), torch.tensor(nearest_by_enumeration(row), dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 17, 197, 1000])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_the_result_equals_bisection(size, spread):
    y = spread * torch.randn(
        5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    y = y - y.amax(-1, keepdim=True)
    close(simplex(y), (y - threshold_by_bisection(y)).clamp(min=0))
    close(simplex(y.float()), simplex(y.float().double()).float())


@given(row=ROWS)
def test_float32_equals_float64_of_the_same_numbers(row):
    y = torch.tensor(row, dtype=torch.float32)
    close(simplex(y), simplex(y.double()).float())


def test_many_entries_rounded_around_the_edge_keep_sign_and_order():
    y = torch.randn(500, 200, generator=torch.Generator().manual_seed(0)) / 100
    edge = threshold_by_bisection(y.double()).float()
    up, down = (edge.nextafter(torch.full_like(edge, to)) for to in (INF, -INF))
    y = torch.cat([y, *(x.expand(500, 40) for x in (edge, up, down))], -1)
    p = simplex(y)
    close(p, simplex(y.double()).float())
    close(p.sum(-1), torch.ones(500))
    assert (p >= 0).all()
    assert (p.gather(-1, y.argsort(-1)).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("shift", [1e8, -1e8, 12345.678, 3e-5])
@given(row=ROWS)
def test_shifted_rows_in_float32_lose_nothing_but_the_rounding_of_the_shift(shift, row):
    shifted = torch.tensor(row, dtype=torch.float32) + shift
    close(simplex(shifted), simplex(shifted.double()).float())
    close(simplex(shifted), simplex(shifted - shifted.max()))


def test_a_shift_of_1e8_is_exact():
    # multiples of 8, the spacing of float32 there
    y = torch.tensor([[0.0, 0.0, -8.0], [8.0, 0.0, 0.0], [16.0, 16.0, 16.0]])
    assert torch.equal(simplex(y + 1e8), simplex(y))


@pytest.mark.parametrize("dtype", DTYPES)
@given(row=ROWS, data=st.data())
def test_permuted_entries_give_permuted_weights_in_the_order_of_the_entries(dtype, row, data):
    y = torch.tensor(row, dtype=dtype)
    order = torch.tensor(data.draw(st.permutations(range(len(row)))))
    p = simplex(y)
    close(simplex(y[order]), p[order])
    ranks = y.argsort()
    assert (p[ranks].diff() >= 0).all()
    assert all(p[i] == p[j] for i in range(len(row)) for j in range(i) if y[i] == y[j])


@pytest.mark.parametrize(
    ("row", "weights"),
    [
        ([5.0], [1.0]),
        ([1.0, 0.5, -2.0], [0.75, 0.25, 0.0]),
        ([0.5, 0.25, 0.25], [0.5, 0.25, 0.25]),
        ([2.0, 1.0], [1.0, 0.0]),  # the edge: a difference of exactly one
        ([0.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]),
        ([-7.0, -7.0], [0.5, 0.5]),
        ([1.0, 1.0, 0.0], [0.5, 0.5, 0.0]),
        ([3.0, 3.0, 2.75, -INF], [5 / 12, 5 / 12, 2 / 12, 0.0]),
        ([3e38, -3e38], [1.0, 0.0]),
        ([-INF, 1.0, -INF], [0.0, 1.0, 0.0]),
        ([INF, 1.0, -INF], [1.0, 0.0, 0.0]),
        ([INF, 1e30, INF, -INF], [0.5, 0.0, 0.5, 0.0]),
        ([-INF, -INF], [0.5, 0.5]),
        ([NAN, 1.0, 0.0], [NAN, NAN, NAN]),
        ([NAN, INF, -INF], [NAN, NAN, NAN]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_worked_out_by_hand(row, weights, dtype):
    y = torch.tensor(row, dtype=dtype)
    assert_close(simplex(y), torch.tensor(weights, dtype=dtype), equal_nan=True)
    # beside another row as well
    both = simplex(torch.stack([y, torch.arange(len(row), dtype=dtype)]))
    assert_close(both[0], torch.tensor(weights, dtype=dtype), equal_nan=True)
    assert both[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    y = torch.randn(20, 197, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(simplex(y), simplex(y.float()).to(dtype))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_axis_can_be_the_row(dim):
    y = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([simplex(row) for row in y.movedim(dim, -1).reshape(-1, y.shape[dim])])
    expected = expected.reshape(y.movedim(dim, -1).shape).movedim(-1, dim)
    assert_close(simplex(y, dim), expected)
    assert simplex(y, dim).shape == y.shape


def test_strided_and_empty_batches():
    y = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    assert_close(simplex(y.mT[::2, ::3]), simplex(y.mT[::2, ::3].contiguous()))
    assert_close(simplex(y[:1].expand(4, 10)), simplex(y[:1].repeat(4, 1)))
    assert simplex(torch.zeros(0, 3, 5)).shape == (0, 3, 5)


def test_the_input_is_left_alone():
    y = torch.randn(4, 7)
    before = y.clone()
    simplex(y)
    assert torch.equal(y, before)


def rows_off_the_edges(count=4, size=6):
    y = 0.7 * torch.randn(
        200, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    safe = (y - threshold_by_bisection(y)).abs().amin(-1) > 0.01
    return y[safe][:count]


def test_derivatives_equal_finite_differences():
    y = rows_off_the_edges().requires_grad_()
    assert gradcheck(simplex, y, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda y: simplex(y) ** 2, y, check_fwd_over_rev=True)


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_the_jacobian_is_that_of_theory(jacobian):
    y = rows_off_the_edges()
    expected = torch.stack([jacobian_of_theory(row) for row in y])
    assert_close(torch.stack([jacobian(simplex)(row) for row in y]), expected)
    assert_close(vmap(jacobian(simplex))(y), expected)


def test_products_with_the_jacobian_under_every_transform():
    y = rows_off_the_edges()
    weight, tangent = torch.randn(
        2, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2)
    )
    jacobian = torch.stack([jacobian_of_theory(row) for row in y])

    def loss(row, c):
        return (c * simplex(row) ** 2).sum() / 2

    # of a quadratic of an affine map: gradient J c p, Hessian J diag(c) J
    gradient = torch.einsum("bij,bj->bi", jacobian, weight * simplex(y))
    product = torch.einsum("bij,bj,bjk,bk->bi", jacobian, weight, jacobian, tangent)
    assert_close(vmap(grad(loss))(y, weight), gradient)
    forward = vmap(lambda row, t: jvp(simplex, (row,), (t,))[1])(y, tangent)
    assert_close(forward, torch.einsum("bij,bj->bi", jacobian, tangent))
    fwd_over_rev = vmap(lambda row, c, t: jvp(lambda r: grad(loss)(r, c), (row,), (t,))[1])
    assert_close(fwd_over_rev(y, weight, tangent), product)
    rev_over_rev = vmap(grad(lambda r, c, t: (grad(loss)(r, c) * t).sum()))
    assert_close(rev_over_rev(y, weight, tangent), product)
    rev_over_fwd = vmap(grad(lambda r, c, t: jvp(lambda r: loss(r, c), (r,), (t,))[1]))
    assert_close(rev_over_fwd(y, weight, tangent), product)
    assert_close(vmap(hessian(loss))(y, weight) @ tangent[..., None], product[..., None])


@given(row=ROWS)
def test_gradients_of_finite_rows_are_finite_and_sum_to_zero(row):
    y = torch.tensor(row, dtype=torch.float64)
    slope = torch.linspace(-1, 1, len(row), dtype=torch.float64)
    gradient = grad(lambda y: (slope * simplex(y)).sum())(y)
    assert gradient.isfinite().all()
    assert abs(gradient.sum()) < 1e-12


def test_gradients_at_infinite_entries_are_zero():
    y = torch.tensor([[-INF, 0.2, 0.1], [INF, INF, 0.0], [-INF, -INF, -INF]])
    slope = torch.tensor([1.0, 2.0, 4.0])
    gradient = vmap(grad(lambda y: (slope * simplex(y)).sum()))(y)
    assert_close(gradient, torch.tensor([[0.0, -1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    tangent = jvp(simplex, (y,), (torch.ones_like(y),))[1]
    assert_close(tangent, torch.zeros(3, 3))


def test_vmap_over_every_axis_and_compile_without_a_break():
    y = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert_close(vmap(simplex)(y), simplex(y))
    assert_close(vmap(vmap(simplex))(y), simplex(y))
    assert_close(vmap(simplex, in_dims=2, out_dims=2)(y), simplex(y, 1))
    assert_close(vmap(lambda y: simplex(y, 0), in_dims=2, out_dims=2)(y), simplex(y, 0))
    assert_close(torch.compile(simplex, backend="aot_eager", fullgraph=True)(y), simplex(y))


@pytest.mark.parametrize(
    ("y", "dim", "words"),
    [
        (torch.zeros(3, dtype=torch.int64), -1, "needs floating-point rows, got torch.int64"),
        (torch.zeros(2, 3, dtype=torch.complex64), -1, "needs floating-point rows"),
        (torch.zeros(2, 0), -1, r"rows of at least one entry, got shape \(2, 0\)"),
        (torch.zeros(0, 2), 0, "rows of at least one entry"),
        (torch.zeros(()), -1, "needs an axis `dim`"),
        (torch.zeros(2, 3), 2, "needs an axis `dim` of its input, got dim 2"),
        (torch.zeros(2, 3), "rows", "needs an axis `dim` of its input, got dim 'rows'"),
        ([0.5, 0.5], -1, "needs floating-point rows, got list"),
    ],
)
def test_bad_input_says_what_to_do(y, dim, words):
    with pytest.raises(ValueError, match=words):
        simplex(y, dim)
