"""Curvature against quadratics, dense Hessians of small ViTs, and gradients example by example."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian
from torch.nn import functional as F
from torch.testing import assert_close

from kart import models, tree
from kart.analysis import curvature

SPECS = [
    "softmax",
    "G3B:rank=2",
    "G2U:rank=2",
    "bspline-G3B:rank=2",
    "mexican_hat-B:rank=2",
    "G2B:order=full_rank",
    "G2B:rank=2,order=project_first",
    "G2B:rank=2,order=two_stage",
    "G2B:rank=2,project=simplex",
    "G2B:rank=2,base=softmax,mix=scaled",
    "softmax+G2B:rank=2",
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def symmetric(values, seed=0):
    """A float64 matrix with these eigenvalues."""
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=seeded(seed)).double())[
        0
    ]
    return basis * torch.tensor(values, dtype=torch.float64) @ basis.mT


def quadratic(matrix):
    """Loss and parameters, a tree of two leaves, with this Hessian."""

    def loss(params):
        w = torch.cat([params["a"].flatten(), params["b"]])
        return w @ matrix @ w / 2 + w.sum()

    size = len(matrix)
    drawn = torch.randn(size, generator=seeded(1)).to(matrix)
    half = size // 2
    return loss, {"a": drawn[:half].reshape(1, half), "b": drawn[half:]}


def tiny(spec):
    sizes = {"image_size": 4, "patch_size": 2, "in_channels": 1, "num_classes": 3}
    return models.create(
        "vit_nano", spec, embed_dim=4, depth=1, num_heads=2, mlp_ratio=1.0, **sizes
    )


@functools.cache
def vit(spec, dtype=torch.float64):
    """Loss on three images, and parameters moved off their initial values."""
    model = tiny(spec)
    drawn = seeded(2)
    params = tree.map(
        lambda x: (x + 0.3 * torch.randn(x.shape, generator=drawn)).to(dtype),
        model.init(seeded()),
    )
    images = torch.randn(3, 1, 4, 4, generator=seeded(3)).to(dtype)
    labels = torch.tensor([0, 2, 1])
    return lambda p: F.cross_entropy(model.apply(p, images), labels), params


@functools.cache
def dense(spec):
    loss, params = vit(spec)
    start = tree.ravel(params)
    return hessian(lambda w: loss(tree.unravel(w, params)))(start)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_products_are_those_of_the_dense_hessian(spec, dtype):
    loss, params = vit(spec, dtype)
    vector = torch.randn(tree.size(params), generator=seeded(4)).to(dtype)
    found = curvature.hvp(loss, params, tree.unravel(vector, params))
    assert {x.dtype for x in tree.leaves(found)} == {dtype}
    expected = dense(spec) @ vector.double()
    close = 1e-10 if dtype == torch.float64 else 2e-5
    scale = float(expected.abs().max())
    assert_close(tree.ravel(found).double(), expected, rtol=0, atol=close * scale)


@pytest.mark.parametrize("spec", SPECS)
def test_eigenvalues_of_a_vit_are_those_of_the_dense_hessian(spec):
    exact = torch.linalg.eigvalsh(dense(spec))
    exact = exact[exact.abs().argsort(descending=True)]
    loss, params = vit(spec)
    found = curvature.top_eigenvalues(loss, params, 4, seeded())
    assert_close(found, exact[:4], rtol=1e-6, atol=0)
    loss, params = vit(spec, torch.float32)
    found = curvature.top_eigenvalues(loss, params, 4, seeded())
    assert_close(found, exact[:4].float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("spec", SPECS)
def test_both_ends_of_the_spectrum_of_a_vit(spec):
    exact = torch.linalg.eigvalsh(dense(spec))
    loss, params = vit(spec)
    for which, wanted in (("smallest", exact[:3]), ("largest", exact.flip(0)[:3])):
        found = curvature.top_eigenvalues(loss, params, 3, seeded(), which=which)
        assert_close(found, wanted, rtol=0, atol=1e-7 * float(exact.abs().max()))
    assert float(exact[0]) < 0 < float(exact[-1])


@pytest.mark.parametrize("spec", ["softmax", "G3B:rank=2"])
def test_trace_and_density_of_a_vit(spec):
    loss, params = vit(spec)
    exact, size = dense(spec), tree.size(params)
    estimate, error = curvature.trace(loss, params, 160, seeded())
    assert abs(estimate - exact.trace()) < 4 * error
    # Var(z^T H z) = 2 sum of squares off the diagonal
    off = exact.square().sum() - exact.diagonal().square().sum()
    assert float(error) == pytest.approx(float((2 * off / 160).sqrt()), rel=0.5)
    part, some = curvature.subset(loss, params, "head.*")
    whole, rounding = curvature.trace(part, some, 15, seeded())
    at = list(tree.named(params)).index("head.weight")
    before = sum(x.numel() for x in tree.leaves(params)[:at])
    assert_close(whole, exact.diagonal()[before : before + 15].sum(), rtol=1e-10, atol=1e-12)
    assert 0 < rounding < 1e-10
    grid, density = curvature.spectral_density(loss, params, 4, seeded(), steps=30)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-6)
    mean = float(torch.trapezoid(density * grid, grid))
    assert mean == pytest.approx(float(exact.trace() / size), abs=5 * float(error) / size * 40**0.5)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_eigenvalues_of_a_quadratic(count):
    values = [5.0, -4.0, 3.0, 3.0, 0.5, 0.0]
    loss, params = quadratic(symmetric(values))
    found = curvature.top_eigenvalues(loss, params, count, seeded())
    assert_close(found, torch.tensor(values[:count]).double(), rtol=0, atol=1e-6)


def test_restarts_find_what_one_sweep_does_not():
    values = torch.cat([torch.tensor([-9.0, 8.0, 7.5]), torch.linspace(-7, 7, 297)]).tolist()
    loss, params = quadratic(symmetric(values))
    found = curvature.top_eigenvalues(loss, params, 3, seeded(), vectors=12)
    assert_close(found, torch.tensor(values[:3]).double(), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"more than 20 Hessian-vector products for 3 .*got \d"):
        curvature.top_eigenvalues(loss, params, 3, seeded(), vectors=12, limit=20)


@pytest.mark.parametrize("limit", [0, 11, 12, 15, 29])
def test_no_more_products_are_spent_than_allowed(limit):
    values = torch.cat([torch.tensor([-9.0, 8.0, 7.5]), torch.linspace(-7, 7, 97)]).tolist()
    loss, params = quadratic(symmetric(values))
    spent = []

    def counted(w):
        spent.append(1)
        return loss(w)

    with pytest.raises(ValueError, match=f"more than {limit} Hessian-vector"):
        curvature.top_eigenvalues(counted, params, 3, seeded(), vectors=12, limit=limit)
    assert len(spent) <= limit


@pytest.mark.parametrize("tolerance", [0, -1, math.nan])
def test_a_tolerance_that_nothing_meets_is_refused(tolerance):
    loss, params = quadratic(symmetric([2.0, 1.0]))
    with pytest.raises(ValueError, match="0 < `tolerance` < 1"):
        curvature.top_eigenvalues(loss, params, 1, seeded(), tolerance=tolerance)


def test_eigenvalues_of_a_hessian_of_low_rank():
    values = [4.0, 2.0, 2.0, -1.0] + [0.0] * 96
    loss, params = quadratic(symmetric(values))
    found = curvature.top_eigenvalues(loss, params, 6, seeded())
    assert_close(found, torch.tensor(values[:6]).double(), rtol=0, atol=1e-6)


def test_trace_of_quadratics():
    loss, params = quadratic(symmetric([5.0, -4.0, 3.0, 1.0]))
    assert_close(curvature.trace(loss, params, 4, seeded())[0], torch.tensor(5.0).double())
    loss, params = quadratic(torch.diag(torch.arange(1.0, 9.0).double()))
    estimate, error = curvature.trace(loss, params, 2, seeded())  # signs see a diagonal exactly
    assert_close(estimate, torch.tensor(36.0).double(), rtol=0, atol=1e-12)
    assert 0 < error < 1e-12
    loss, params = quadratic(symmetric([float(i) for i in range(60)]))
    estimate, error = curvature.trace(loss, params, 50, seeded())
    assert abs(estimate - 1770) < 4 * error and 5 < error < 100


def test_density_of_a_quadratic_is_the_sum_of_its_peaks():
    values = torch.tensor([4.0, 1.0, 1.0, -2.0]).double()
    loss, params = quadratic(symmetric(values.tolist()))
    grid, density = curvature.spectral_density(loss, params, 4, seeded(), width=0.3)
    peaks = torch.exp(-0.5 * ((grid[:, None] - values) / 0.3) ** 2) / (0.3 * math.sqrt(2 * math.pi))
    assert_close(density, peaks.mean(-1), rtol=0, atol=1e-6)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-7)
    # signs on a diagonal: every probe has the same share in every axis
    loss, params = quadratic(torch.diag(values))
    grid, density = curvature.spectral_density(loss, params, 1, seeded(), width=0.3)
    peaks = torch.exp(-0.5 * ((grid[:, None] - values) / 0.3) ** 2) / (0.3 * math.sqrt(2 * math.pi))
    assert_close(density, peaks.mean(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_eigenvalue_alone_has_one_peak(dtype):
    # a random basis leaves rounding between the copies
    matrix = symmetric([2.0] * 6).to(dtype)
    loss = lambda w: w @ matrix @ w / 2  # noqa: E731
    for samples in (1, 3, 10):
        found = curvature.spectral_density(loss, torch.zeros(6, dtype=dtype), samples, seeded())
        assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1, abs=1e-6)
        mean = torch.trapezoid(found.density * found.grid, found.grid)
        assert float(mean) == pytest.approx(2, abs=1e-5)
        assert float(found.grid[-1] - found.grid[0]) == pytest.approx(12 * 0.02, rel=1e-3)


def test_a_flat_loss_has_one_peak_at_zero():
    found = curvature.spectral_density(lambda w: w.sum(), torch.ones(5), 3, seeded())
    assert float(found.grid[found.density.argmax()]) == pytest.approx(0, abs=1e-3)
    zeros = curvature.top_eigenvalues(lambda w: w.sum(), torch.ones(5), 2, seeded())
    assert torch.equal(zeros, torch.zeros(2))


@given(st.integers(0, 10**6), st.floats(0.1, 10))
def test_rotating_and_scaling_parameters(seed, factor):
    matrix = symmetric([3.0, -2.0, 1.0, 0.5], seed)
    loss, params = quadratic(factor * matrix)
    found = curvature.top_eigenvalues(loss, params, 4, seeded())
    expected = factor * torch.tensor([3.0, -2.0, 1.0, 0.5]).double()
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", ["G3B:rank=2", "G2U:rank=2"])
def test_a_subset_has_its_block_of_the_hessian(spec):
    loss, params = vit(spec)
    part, some = curvature.subset(loss, params, "*.operator.*")
    assert some and all("operator" in name for name in some)
    assert_close(part(some), loss(params))
    named = tree.named(params)
    flags = [torch.full((x.numel(),), name in some) for name, x in named.items()]
    chosen = torch.cat(flags)
    block = dense(spec)[chosen][:, chosen]
    vector = torch.randn(len(block), generator=seeded()).double()
    product = curvature.hvp(part, some, tree.unravel(vector, some))
    assert_close(tree.ravel(product), block @ vector)
    exact = torch.linalg.eigvalsh(block)
    exact = exact[exact.abs().argsort(descending=True)]
    found = curvature.top_eigenvalues(part, some, 2, seeded())
    assert_close(found, exact[:2], rtol=1e-6, atol=0)


def test_noise_scale_is_that_of_gradients_one_by_one():
    def loss(params, x, y):
        return F.mse_loss(x @ params["w"], y)

    params = {"w": torch.randn(3, 2, generator=seeded()).double()}
    x, y = torch.randn(7, 3, generator=seeded(1)), torch.randn(7, 2, generator=seeded(2))
    x, y = x.double() + 1, y.double() + 5
    rows = torch.stack([grad(loss)(params, a, b)["w"].flatten() for a, b in zip(x, y, strict=True)])
    covariance = torch.cov(rows.mT).trace()
    signal = rows.mean(0).square().sum() - covariance / 7
    assert signal > 0
    for chunk in (1, 3, 100):
        found = curvature.noise_scale(loss, params, x, y, chunk=chunk)
        assert_close(found.covariance_trace, covariance)
        assert_close(found.gradient_square, signal)
        assert_close(found.scale, covariance / signal)


def test_noise_scale_of_known_noise():
    # gradients are w + noise of variance 4 an axis: tr = 12, |G|^2 = 3
    data = 2 * torch.randn(20000, 3, generator=seeded()).double()
    found = curvature.noise_scale(
        lambda w, x: (w * w / 2 + w * x).sum(), torch.ones(3).double(), data, chunk=5000
    )
    assert float(found.covariance_trace) == pytest.approx(12, rel=0.03)
    assert float(found.scale) == pytest.approx(4, rel=0.1)
    noise = torch.tensor([[1.0], [-1.0]])
    pure = curvature.noise_scale(lambda w, x: (w * x).sum(), torch.ones(1), noise)
    assert pure.scale == math.inf and pure.gradient_square == -1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_density_and_noise_scale_run_through_every_operator(spec, dtype):
    loss, params = vit(spec, dtype)
    grid, density = curvature.spectral_density(loss, params, 1, seeded(), steps=8)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-6)
    model = tiny(spec)

    def one(params, image, label):
        return F.cross_entropy(model.apply(params, image), label)

    images = torch.randn(4, 1, 4, 4, generator=seeded(3)).to(dtype)
    labels = torch.tensor([0, 2, 1, 1])
    found = curvature.noise_scale(one, params, images, labels, chunk=3)
    rows = torch.stack(
        [tree.ravel(grad(one)(params, *pair)) for pair in zip(images, labels, strict=True)]
    ).double()
    assert_close(found.covariance_trace, rows.var(0).sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_by_its_rounding_alone(dtype):
    """Vectors of half precision are not orthogonal, and their rests look like rounding."""
    values = torch.logspace(-5, 2, 60)

    def loss(w):
        return (values * w.float().square()).sum() / 2

    params = torch.randn(60, generator=seeded()).to(dtype)
    top = curvature.top_eigenvalues(loss, params, 3, seeded())
    assert_close(top, values.flip(0)[:3], rtol=0.01, atol=0)
    assert float(curvature.trace(loss, params, 60, seeded()).estimate) == pytest.approx(
        float(values.sum()), rel=0.01
    )
    grid, density = curvature.spectral_density(loss, params, 60, seeded(), steps=60)
    mean = torch.trapezoid(grid * density, grid)
    assert float(mean) == pytest.approx(float(values.mean()), rel=0.02)


def test_parameters_that_are_trained_keep_no_graph():
    params = {"w": torch.ones(3, requires_grad=True)}

    def loss(params, *rest):
        return (params["w"] ** 3).sum() + sum(rest)

    assert not curvature.top_eigenvalues(loss, params, 1, seeded()).requires_grad
    assert not curvature.trace(loss, params, 2, seeded()).estimate.requires_grad
    assert not curvature.noise_scale(loss, params, torch.ones(2)).scale.requires_grad


def test_noise_of_equal_gradients_and_of_none():
    def loss(w, x):
        return (w * x).sum() ** 2

    w, x = torch.randn(3, generator=seeded()), torch.randn(1, 3, generator=seeded(1))
    assert curvature.noise_scale(loss, w, x.expand(5, 3)).scale == 0
    lost = curvature.noise_scale(loss, w * torch.nan, x.expand(5, 3))
    assert all(one.isnan() for one in lost)


def test_plot_of_densities():
    loss, params = quadratic(symmetric([4.0, 1.0, -2.0]))
    found = curvature.spectral_density(loss, params, 3, seeded())
    fig = curvature.plot({"softmax": found, "G3B": found})
    (ax,) = fig.axes
    assert ax.get_yscale() == "log" and len(fig.legends[0].get_texts()) == 2
    assert "eigenvalue" in ax.get_xlabel()


LOSS, PARAMS = quadratic(symmetric([1.0, 2.0]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: curvature.hvp(LOSS, PARAMS, {"a": torch.ones(1, 2), "b": 0}), "shapes and dtypes"),
        (lambda: curvature.hvp(LOSS, PARAMS, tree.to(PARAMS, torch.float32)), "float32"),
        (lambda: curvature.hvp(LOSS, PARAMS, {"a": PARAMS["a"]}), "one structure"),
        (lambda: curvature.subset(LOSS, PARAMS, "*.operator.*"), r"2 paths are a, b\."),
        (lambda: curvature.top_eigenvalues(LOSS, PARAMS, 3, seeded()), "`count` <= 2"),
        (lambda: curvature.top_eigenvalues(LOSS, PARAMS, 0, seeded()), "got 0"),
        (lambda: curvature.top_eigenvalues(LOSS, PARAMS, 1, seeded(), which="LM"), "'LM'"),
        (lambda: curvature.top_eigenvalues(LOSS, PARAMS, 2, seeded(), vectors=1), "`vectors` >= 2"),
        (lambda: curvature.trace(LOSS, PARAMS, 1, seeded()), "`samples` >= 2"),
        (lambda: curvature.spectral_density(LOSS, PARAMS, 0, seeded()), "`samples` >= 1"),
        (lambda: curvature.spectral_density(LOSS, PARAMS, 1, seeded(), width=0.0), "`width` > 0"),
        (
            lambda: curvature.spectral_density(LOSS, PARAMS, 2, seeded(), width=1e-6),
            r"`points` >= \d+ for peaks",
        ),
        (
            lambda: curvature.spectral_density(LOSS, PARAMS, 1, seeded(), steps=1.5),
            "integers `steps`",
        ),
        *(
            (lambda call=call: call({"w": torch.ones(2), "n": torch.ones(2).long()}), "at 'n'")
            for call in (
                lambda params: curvature.hvp(LOSS, params, params),
                lambda params: curvature.trace(LOSS, params, 2, seeded()),
                lambda params: curvature.noise_scale(LOSS, params, torch.ones(2)),
            )
        ),
        (lambda: curvature.noise_scale(LOSS, PARAMS, torch.ones(1, 2)), "n >= 2 examples"),
        (lambda: curvature.noise_scale(LOSS, PARAMS, torch.ones(3), torch.ones(2)), "n >= 2"),
        (
            lambda: curvature.trace(lambda w: w.sqrt().sum(), torch.zeros(5), 2, seeded()),
            "finite second derivatives",
        ),
        (
            lambda: curvature.top_eigenvalues(
                lambda w: w.sqrt().sum(), torch.zeros(3), 1, seeded()
            ),
            "finite second derivatives",
        ),
        (lambda: curvature.plot({}), "at least one density"),
    ],
)
def test_what_curvature_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
