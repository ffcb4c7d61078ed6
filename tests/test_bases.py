"""The families of functions: each through its property suite, golden values, inits, bad input."""

import functools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kart import bases, operators, tree
from kart.bases import wavelets
from kart.testing import basis_suite, check_basis

# a third of the profile's: every family has thirty properties
EXAMPLES = max(10, settings().max_examples // 3)


def of(basis, **expected):
    return basis_suite(basis, expected_failures=expected, max_examples=EXAMPLES)


@of(bases.fourier(3))
def test_fourier(): ...


@of(bases.fourier(2, base="silu", init="smooth", scales=True))
def test_fourier_with_base_and_scales(): ...


@of(bases.polynomial(3, base="identity"))
def test_polynomial(): ...


@of(bases.polynomial(0))
def test_constant(): ...


@of(bases.chebyshev(4))
def test_chebyshev(): ...


@of(bases.gaussian_rbf(5, (-3.0, 1.0)))
def test_gaussian_rbf(): ...


@of(bases.bspline(4))
def test_bspline(): ...


@of(bases.bspline(3, 0, (-1.0, 2.0)))
def test_bspline_steps(): ...


@of(bases.bspline(5, 1, (-1.0, 2.0), base="gelu"))
def test_bspline_hats_with_base(): ...


@of(bases.rational())
def test_rational(): ...


@of(bases.mexican_hat("negated", base="gelu"))
def test_mexican_hat(): ...


@of(bases.morlet())
def test_morlet(): ...


@of(bases.dog(scales=True), every_parameter_counts="`scale_base` of no base is for the count")
def test_dog(): ...


@of(bases.meyer())
def test_meyer(): ...


@of(bases.meyer("direct"))
def test_meyer_read_directly(): ...


@of(bases.shannon())
def test_shannon(): ...


@of(
    bases.shannon("index"),
    units_permute="the printed window runs over the keys",
    units_stand_alone="the printed window runs over the keys",
)
def test_shannon_with_a_window_over_keys(): ...


BASE = st.sampled_from(sorted(bases.BASES))
SPAN = st.tuples(st.floats(-6, -0.5), st.floats(0.5, 6))
ANY = st.one_of(
    st.builds(bases.fourier, st.integers(1, 12), base=BASE, scales=st.booleans()),
    st.builds(bases.polynomial, st.integers(0, 8), base=BASE, scales=st.booleans()),
    st.builds(bases.chebyshev, st.integers(0, 10), SPAN, base=BASE, scales=st.booleans()),
    st.builds(bases.gaussian_rbf, st.integers(2, 12), SPAN, base=BASE, scales=st.booleans()),
    st.builds(bases.bspline, st.integers(1, 12), st.integers(0, 5), SPAN, base=BASE),
    st.builds(bases.rational, st.integers(0, 6), st.integers(1, 5), base=BASE),
    st.builds(bases.morlet, st.floats(0.5, 10), base=BASE, scales=st.booleans()),
    st.builds(bases.meyer, st.sampled_from(["printed", "direct"]), base=BASE),
    st.builds(bases.shannon, half_width=st.floats(1, 20), base=BASE, scales=st.booleans()),
)


@pytest.mark.nightly
@settings(max_examples=60)
@given(ANY)
def test_any_basis_that_can_be_made_passes_its_suite(basis):
    # tracing costs more than all other properties, and depends on no option
    skipped = {"compiles"}
    if basis.options.get("scales") and basis.options["base"] == "zero":
        skipped.add("every_parameter_counts")  # `scale_base` of no base is for the count
    names = [r.name for r in check_basis(basis, max_examples=1) if r.name not in skipped]
    failed = [r.message for r in check_basis(basis, only=names) if r.passed is False]
    assert not failed, "\n\n".join(failed)


HALF, ROOT = 0.5, math.sqrt(0.5)
GOLDEN = {
    # cos x, cos 2x, sin x, sin 2x
    "fourier": (bases.fourier(2), math.pi / 2, [0, -1, 1, 0]),
    "polynomial": (bases.polynomial(3), -2.0, [1, -2, 4, -8]),
    # t = 1/2: 1, t, 2t^2 - 1, 4t^3 - 3t
    "chebyshev": (bases.chebyshev(3), 2.0, [1, 0.5, -0.5, -1]),
    "chebyshev, held": (bases.chebyshev(2, (-1.0, 1.0)), 7.0, [1, 1, 1]),
    "gaussian_rbf": (bases.gaussian_rbf(3, (-1.0, 1.0)), 0.0, [math.exp(-1), 1, math.exp(-1)]),
    # at a knot a cubic B-spline has 1/6, 4/6, 1/6; in the middle of an interval 1, 23, 23, 1 / 48
    "bspline at a knot": (bases.bspline(2, 3, (-1.0, 1.0)), 0.0, [0, 1 / 6, 4 / 6, 1 / 6, 0]),
    "bspline between": (
        bases.bspline(2, 3, (-1.0, 1.0)),
        0.5,
        [0, 1 / 48, 23 / 48, 23 / 48, 1 / 48],
    ),
    "bspline at its right end": (bases.bspline(2, 2, (-1.0, 1.0)), 1.0, [0, 0, 0.5, 0.5]),
    "steps at the right end": (bases.bspline(2, 0, (-1.0, 1.0)), 1.0, [0, 1]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_features_by_hand(name):
    basis, x, wanted = GOLDEN[name]
    got = basis.expand(torch.tensor(x, dtype=torch.float64))
    assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


WAVELETS = {
    "mexican_hat": (bases.mexican_hat(), 0.0, 2 / (math.pi**0.25 * math.sqrt(3))),
    "mexican_hat at 2": (
        bases.mexican_hat(),
        2.0,
        -3 * math.exp(-2) * 2 / (math.pi**0.25 * math.sqrt(3)),
    ),
    "morlet": (bases.morlet(), 1.0, math.cos(5) * math.exp(-0.5)),
    "dog": (bases.dog(), -1.0, -math.exp(-0.5)),
    # nu(1/2) = 1/2, where m is still 1
    "meyer": (bases.meyer(), 0.5, 1.0),
    # m(3/4) = cos(pi/2 nu(1/2)) = cos(pi/4)
    "meyer read directly": (bases.meyer("direct"), -0.75, math.sin(0.75 * math.pi) * ROOT),
    "meyer outside": (bases.meyer(), 1.5, 0.0),
    "shannon": (
        bases.shannon(),
        math.pi / 2,
        2 / math.pi * (0.54 + 0.46 * math.cos(math.pi / 8)),
    ),
    "shannon at a zero": (bases.shannon(), math.pi, 0.0),
    "shannon beyond its window": (bases.shannon(), 13.0, 0.0),
}


@pytest.mark.parametrize("name", WAVELETS)
def test_wavelets_by_hand(name):
    basis, x, wanted = WAVELETS[name]
    leaves = {"weight": 2.0, "shift": 1.0, "scale": -0.5}
    params = {k: torch.tensor(v, dtype=torch.float64) for k, v in leaves.items()}
    at = torch.tensor(1 - 0.5 * x, dtype=torch.float64)  # (at - 1) / -0.5 = x
    assert_close(basis.apply(params, at), at.new_tensor(2 * wanted), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["mexican_hat", "morlet", "dog", "meyer", "shannon"])
def test_wavelets_and_their_slopes_are_zero_at_infinity(family):
    basis = getattr(bases, family)()
    units = basis.init(torch.Generator().manual_seed(0), ())
    x = torch.tensor([math.inf, -math.inf, 1e30, -1e30], requires_grad=True)
    y = basis.apply(units, x)
    slopes = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(y.abs(), torch.zeros(4)) and torch.equal(slopes.abs(), torch.zeros(4))


def test_rational_by_hand():
    basis = bases.rational(2, 2)
    params = {
        "numerator": torch.tensor([1.0, 2.0, 3.0]),
        "denominator": torch.tensor([-4.0, 1.0]),
    }
    # (1 + 4 + 12) / (1 + |-8 + 4|)
    assert_close(basis.apply(params, torch.tensor(2.0)), torch.tensor(17 / 5))


def test_base_and_scales_follow_equation_5():
    basis = bases.fourier(1, base="identity", scales=True)
    params = {
        "coefs": torch.tensor([2.0, 3.0]),
        "scale_base": torch.tensor(5.0),
        "scale_basis": torch.tensor(7.0),
    }
    x = torch.tensor(0.3)
    wanted = 5 * x + 7 * (2 * x.cos() + 3 * x.sin())
    assert_close(basis.apply(params, x), wanted)
    assert_close((basis.features(x) * basis.coefficients(params)).sum(-1), wanted)


def test_shannon_index_is_the_hamming_window_over_keys():
    basis = bases.shannon("index")
    params = basis.init(torch.Generator().manual_seed(0), (2, 5))
    y = basis.apply(params, torch.zeros(5))  # sinc(0) = 1
    assert_close(y, params["weight"] * torch.hamming_window(5, periodic=False))


@pytest.mark.parametrize("grid", [3, 11, 64])
@pytest.mark.parametrize("size", [1.0, 50.0, 1e4])
def test_harmonics_keep_float32_to_their_condition(grid, size):
    x = torch.randn(4001, generator=torch.Generator().manual_seed(0)) * size
    k = torch.arange(1, grid + 1, dtype=torch.float64)
    angles = x.double()[:, None] * k
    cosines, sines = bases.harmonics(x, grid)
    got = torch.stack(cosines + sines, -1).double()
    wanted = torch.cat([angles.cos(), angles.sin()], -1)
    # the condition of cos kx is kx sin kx: an error of a half eps in x cannot be told from it
    slope = torch.cat([angles * angles.sin(), angles * angles.cos()], -1).abs()
    units = (got - wanted).abs() / torch.finfo(torch.float32).eps / (1 + slope)
    # measured 2.5 for G = 64; the naive recurrence has 300 there
    assert units.max() < 6
    radius = (got[:, :grid] ** 2 + got[:, grid:] ** 2).sqrt()
    assert (radius - 1).abs().max() < 4 * torch.finfo(torch.float32).eps


def test_sinc_keeps_its_derivatives_near_zero():
    # -t/3 and -1/3; torch.sinc has errors of eps / t, and NaN for the second one at 0
    for t in (0.0, 1e-6, -1e-4, 1e-2):
        x = torch.tensor(t, requires_grad=True)
        (first,) = torch.autograd.grad(wavelets.sinc(x), x, create_graph=True)
        (second,) = torch.autograd.grad(first, x)
        assert_close(first, torch.tensor(-t / 3), rtol=1e-4, atol=0)
        assert_close(second, torch.tensor(-1 / 3), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("basis", "wanted"),
    [
        (bases.fourier(4, init="paper"), 1.0),
        (bases.fourier(4), 1 / math.sqrt(50 * 4)),
        (bases.bspline(5, init="paper"), 1.0),
        (bases.bspline(5), 1 / math.sqrt(50 * 8)),
    ],
)
def test_inits_have_the_deviation_they_state(basis, wanted):
    coefs = basis.init(torch.Generator().manual_seed(0), (200, 50))["coefs"]
    assert_close(float(coefs.std()), wanted, rtol=0.02, atol=0)
    assert abs(float(coefs.mean())) < 0.02 * wanted


def test_smooth_init_falls_with_frequency_and_keeps_the_variance():
    make = torch.Generator().manual_seed
    smooth = bases.fourier(4, init="smooth").init(make(0), (400, 50))["coefs"]
    scaled = bases.fourier(4).init(make(0), (400, 50))["coefs"]
    deviation = smooth.std((0, 1))
    assert_close(deviation[0] / deviation[:4], torch.arange(1.0, 5.0), rtol=0.05, atol=0)
    assert_close(smooth.square().sum(-1).mean(), scaled.square().sum(-1).mean(), rtol=0.05, atol=0)


@pytest.mark.parametrize("family", bases.FAMILIES)
def test_huge_scores_stay_finite_where_a_bound_is_declared(family):
    basis = bases.FAMILIES[family]()
    params = basis.init(torch.Generator().manual_seed(0), ())
    x = torch.tensor([1e10, -1e20, 3e38, -3e38])
    if "bounded" in basis.traits:
        assert basis.apply(params, x).isfinite().all()


@pytest.mark.parametrize("family", bases.FAMILIES)
def test_one_number_has_forward_derivatives(family):
    basis = bases.FAMILIES[family]()
    params = basis.init(torch.Generator().manual_seed(0), ())
    for x in (torch.tensor(0.3), torch.tensor(0.3, dtype=torch.bfloat16)):
        phi = functools.partial(basis.apply, params)
        slope, curve = torch.func.jacfwd(phi), torch.func.hessian(phi)
        assert_close(slope(x).to(x), torch.func.grad(phi)(x))
        assert curve(x).isfinite()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bases.fourier(0), "`fourier` needs an integer `grid` >= 1, got 0"),
        (lambda: bases.fourier(True), "integer `grid`"),
        (lambda: bases.fourier(3, base="relu"), "`base` in"),
        (lambda: bases.fourier(3, init="warm"), "`init` in"),
        (lambda: bases.polynomial(-1), "`degree` >= 0"),
        (lambda: bases.chebyshev(2, (1.0, 1.0)), "finite low < high"),
        (lambda: bases.bspline(2, 3, (0.0, math.inf)), "finite low < high"),
        (lambda: bases.gaussian_rbf(1), "`grid` >= 2"),
        (lambda: bases.rational(2, 0), "`denominator` >= 1"),
        (lambda: bases.bspline(2, span=None), "`span` = (low, high)"),
        (lambda: bases.chebyshev(2, span="ab"), "`span` = (low, high)"),
        (lambda: bases.fourier(2.0), "got 2.0. Pass a Python int."),
        (lambda: bases.morlet(0.0), "finite `omega` > 0"),
        (lambda: bases.morlet("5"), "finite `omega` > 0"),
        (lambda: bases.shannon(half_width=None), "finite `half_width` > 0"),
        (lambda: bases.shannon(half_width=-1.0), "finite `half_width` > 0"),
        (lambda: bases.shannon("index", 2.0), 'reading="argument" for `half_width`'),
        (lambda: bases.meyer("upside down"), "`reading` in"),
        (lambda: bases.linear(torch.sin, 2, orders=[1]), "`orders` of 2 positive integers"),
        (lambda: bases.fourier(2).init(3, (2,)), r"`torch.Generator` on the CPU first"),
    ],
)
def test_bad_hyperparameters_are_refused_with_the_words(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["low_rank", "full_rank", "two_stage", "elementwise"])
@pytest.mark.parametrize("others", ["rational-5/4", "rational-1/2", "rational-2/1"])
def test_parameters_of_other_degrees_are_refused(others, order, dtype):
    op, other = (operators.parse(f"{x}:order={order}").operator for x in ("rational-2/2", others))
    x = torch.ones(1, 2, 5, 3, dtype=dtype)
    params = tree.to(other.init(torch.Generator().manual_seed(0), 2, 5), dtype)
    refused = r"needs units with '\w+' \(H.*\), got shape .* of another operator or basis"
    with pytest.raises(ValueError, match=refused):
        op.attend(params, x, x, x)
    with pytest.raises(ValueError, match=refused):
        op.weights(params, x @ x.mT)
    with pytest.raises(ValueError, match="last axes of 3 and 2, got shapes"):
        op.basis.apply(other.basis.init(torch.Generator(), (1, 2, 5, 3)), x)


def test_bad_tensors_are_refused_with_the_words():
    basis = bases.fourier(2)
    params = basis.init(torch.Generator().manual_seed(0), (3,))
    with pytest.raises(ValueError, match="floating-point `x`"):
        basis.apply(params, torch.arange(3))
    with pytest.raises(ValueError, match="floating-point `x`"):
        basis.expand(torch.arange(3))
    with pytest.raises(ValueError, match="last axis of K = 4"):
        basis.apply({"coefs": torch.ones(3, 5)}, torch.ones(3))
    wrong = bases.linear(lambda x: x[..., None], 2, family="mine")
    with pytest.raises(ValueError, match=r"`mine` needs `expand` to map \(3,\) to \(3, 2\)"):
        wrong.expand(torch.ones(3))


@pytest.mark.parametrize(
    ("expand", "got"),
    [
        (lambda x: [x, x.square()], "a list"),
        (lambda x: None, "a NoneType"),
        (lambda x: torch.stack([x, x.square()]), r"\(2, 3\)"),
        (lambda x: x[..., None], r"\(3, 1\)"),
    ],
)
def test_features_that_are_not_stacked_on_a_last_axis_are_named(expand, got):
    basis = bases.linear(expand, 2, family="mine")
    with pytest.raises(
        ValueError, match=rf"`mine` needs `expand` to .*\(3, 2\), got {got}\. Stack"
    ):
        basis.expand(torch.ones(3))


# --- copies ---------------------------------------------------------------------------------------


def halves(generator, shape):
    return {"coefs": bases.normal(generator, (*shape, 1))}


def halve(params, x):
    return params["coefs"][..., 0] * x / 2


def nothing(x):
    return None


def test_what_a_basis_is_pickles_with_it():
    by_hand = bases.Basis("halves", 1, halves, halve, nothing, None, None, {"by": 2}, {"odd": True})
    assert pickle.loads(pickle.dumps(by_hand)) == by_hand
    told = bases.fourier(2)._replace(traits={"mine": 1.0}, family="waves")
    copied = pickle.loads(pickle.dumps(told))
    assert (copied.traits, copied.family) == (told.traits, told.family)
    with pytest.raises(TypeError, match="as its factory made it, got a changed 'fourier'"):
        pickle.dumps(bases.fourier(2)._replace(apply=halve))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid": 0}, "integer `grid` >= 1, got 0"),
        ({"family": 3}, "`family` of type str, got 3"),
        ({"orders": ["a"], "init": "smooth"}, "`orders` of 1 positive integers"),
        ({"scales": "no"}, "`scales` of type bool, got 'no'"),
        ({"traits": ["periodic"]}, "`traits` of type .*Mapping.*, got"),
        ({"cpp": "struct Piece"}, "`cpp` of type .*Cpp.*, got 'struct Piece'"),
        ({"triton": "def start"}, "`triton` of type .*Triton.*, got 'def start'"),
        ({"expand": None}, "`expand` of type Callable, got None"),
    ],
)
def test_what_a_basis_of_ones_own_is_made_of_is_checked(options, words):
    with pytest.raises(ValueError, match=words):
        bases.linear(**{"expand": lambda x: x[..., None], "size": 1, **options})


def test_an_integer_of_numpy_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"integer `size` >= 1, got .*3.*\. Pass a Python int\."):
        bases.linear(lambda x: x[..., None], np.int64(3))


def test_leaves_in_a_parameter_dict_are_taken():
    basis = bases.fourier(2)
    units = basis.init(torch.Generator().manual_seed(0), (3,))
    held = torch.nn.ParameterDict(units)
    x = torch.linspace(-1, 1, 3)
    torch.testing.assert_close(basis.apply(held, x), basis.apply(units, x))
    torch.testing.assert_close(basis.coefficients(held), basis.coefficients(units))


@pytest.mark.parametrize("family", bases.FAMILIES.values(), ids=lambda family: family.__name__)
def test_parameters_with_a_leaf_more_or_less_are_refused(family):
    x, generator = torch.ones(3), torch.Generator().manual_seed(0)
    plain, scaled = family(), family(scales=True)
    params = scaled.init(generator, (3,))
    # what is not there would be missed, and scales that nobody reads be left out in silence
    wrong = [(scaled, {k: v for k, v in params.items() if k != name}) for name in params]
    for basis, leaves in [*wrong, (plain, params)]:
        with pytest.raises(ValueError, match=f"`{basis.family}` needs parameters '"):
            basis.apply(leaves, x)
