"""Functions with known coefficients: fits, harmonics, pruning, clusters, formulas, dependence."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kart import bases, models, operators, pages, tree
from kart.analysis import attention, functions, symbolic

X = torch.linspace(-3, 3, 121)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# density and fits


def test_density_counts_scores_at_the_nearest_point():
    x = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    scores = torch.tensor([[-1.4, -0.6, 0.4], [0.6, 2.1, 2.9], [-1.6, 4.1, 9.0]])
    found = functions.density(scores, x)
    assert_close(found, torch.tensor([2, 1, 1, 2]).double() / 6)


def test_fits_of_planted_functions():
    values = torch.stack([2 * X.exp() + 3, -0.5 * X, 4 * X - 7, torch.full_like(X, 5.0), 0 * X])
    found = torch.stack(functions.fits(values.double(), X.double()), dim=-1)
    # columns: constant, identity, affine, exp
    assert_close(found[0, 3], torch.tensor(1.0).double())
    assert found[0, 2] < 0.9 and found[0, 0] < 0.7
    assert_close(found[1, :3], torch.tensor([0.0, 1.0, 1.0]).double(), atol=1e-9, rtol=0)
    assert found[1, 3] < 0.8
    assert_close(found[2, 2], torch.tensor(1.0).double())
    share = 16 * float(X.square().mean())
    assert float(found[2, 1]) == pytest.approx(share / (share + 49), abs=1e-6)
    assert float(found[2, 0]) == pytest.approx(49 / (share + 49), abs=1e-6)
    assert_close(found[3, [0, 2, 3]], torch.ones(3).double())
    assert_close(found[4], torch.ones(4).double())


def test_fits_see_only_where_scores_are():
    step = torch.where(X < 0, -1.0, X)
    right, left = (X > 0).double(), (X < 0).double()
    assert_close(functions.fits(step, X, right).identity, torch.tensor(1.0).double())
    assert_close(functions.fits(step, X, left).constant, torch.tensor(1.0).double())
    assert functions.fits(step, X).affine < 0.95
    one = torch.zeros(121).double()
    one[40] = 1
    assert_close(torch.stack(functions.fits(X + 9, X, one)), torch.ones(4).double())


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_fits_have_no_unit(seed, factor):
    values = torch.randn(2, 121, generator=seeded(seed)).double()
    weights = torch.rand(121, generator=seeded(seed))
    found = functions.fits(values, X, weights)
    assert_close(functions.fits(-factor * values, X, 7 * weights), found)
    assert (found.affine >= found.constant - 1e-12).all()
    assert (found.affine >= found.identity - 1e-12).all()
    assert (found.exp >= found.constant - 1e-12).all()
    assert_close(
        functions.fits(values + 3, X, weights).affine >= 0, torch.ones(2, dtype=torch.bool)
    )


# harmonics and pruning


@pytest.mark.parametrize("scales", [False, True])
def test_harmonics_of_known_coefficients(scales):
    operator = operators.low_rank(bases.fourier(2, scales=scales), rank=1)
    params = operator.init(seeded(), 1, 3)
    params["units"]["coefs"] = torch.tensor([3.0, 0.0, 4.0, -2.0]).expand(1, 1, 3, 4)
    if scales:
        params["units"]["scale_basis"] = torch.tensor([1.0, -2.0, 0.0]).reshape(1, 1, 3)
    found = functions.harmonics(operator, params)
    factors = torch.tensor([1.0, 2.0, 0.0] if scales else [1.0, 1.0, 1.0])
    assert_close(found[0, 0], factors[:, None] * torch.tensor([5.0, 2.0]))
    # a function's variance over a period is half the sum of the squares
    x = torch.linspace(0, 2 * torch.pi, 1001)[:-1]
    values = functions.curves(operator, params, x)
    assert_close(values.square().mean(-1), found.square().sum(-1) / 2, rtol=1e-4, atol=1e-5)
    fig = functions.plot_harmonics({"G2B" * 20: found})
    assert "amplitude" in pages.svg(fig, "x")
    assert fig.axes[0].get_window_extent().width > 250


def curves_of(spec):
    operator = operators.parse(spec).operator
    return functions.curves(operator, operator.init(seeded(), 2, 5), X)


def model_of(spec, **options):
    return models.create(
        "vit_nano", spec, embed_dim=8, depth=2, num_heads=2, image_size=8, patch_size=4, **options
    )


@pytest.mark.parametrize(
    "spec",
    [
        "G3B:rank=2",
        "G3U:rank=2",
        "bspline-G3B:rank=2",
        "mexican_hat-B:rank=2",
        "rational-3/2B:rank=2",
        "G2B:order=full_rank",
        "G2B:rank=2,order=project_first",
        "G2B:rank=2,order=two_stage",
        "softmax+G3B:rank=2",
        "G2B:rank=2,scales=true",
    ],
)
def test_pruning_drops_what_is_small_and_counts_it(spec):
    model = model_of(spec)
    params = model.init(seeded())
    images = torch.randn(2, 3, 8, 8, generator=seeded(1))
    same = functions.prune(model, params, 0.0)
    assert all(found.terms == found.units == 0 for found in same.dropped.values())
    assert torch.equal(model.apply(same.params, images), model.apply(params, images))
    pruned = functions.prune(model, params, 0.4)
    before, after = tree.named(params), tree.named(pruned.params)
    assert before.keys() == after.keys()
    zeros = {
        path: sum(
            int((leaf == 0).sum())
            for name, leaf in after.items()
            if name.startswith(f"{path}.")
            and name.split(".")[-1] in ("coefs", "weight", "numerator")
        )
        for path in pruned.dropped
    }
    for path, found in pruned.dropped.items():
        assert 0 < found.terms < found.of_terms and 0 <= found.units < found.of_units
        each = {"G": 2, "r": 4}.get(spec[0], 1) if "softmax" not in spec else 2
        assert zeros[path] == each * found.terms, path
    for name, leaf in after.items():
        assert ((leaf == before[name]) | (leaf == 0)).all(), name
    assert model.apply(pruned.params, images).isfinite().all()
    untouched = tree.leaves(tree.map(torch.equal, params, model.init(seeded())))
    assert all(untouched)


def test_learned_functions_are_found_in_sums_inside_hybrids():
    model = model_of("softmax+G2B:rank=2,order=beside_relative")
    params = model.operator_params(model.init(seeded()), 0)
    (found,) = functions.learned_groups(model.operators[0], params)
    assert (found.first, found.path) == (1, "1.1") and found.params is params["1"]["1"]
    assert functions.curves(found.operator, found.params, X).shape == (1, 2, 5, 121)
    assert functions.learns(model.operators[0])
    # units by offset have other axes, those by distance are not of the score
    for order in ("by_offset", "by_distance"):
        model = model_of(f"G2B:order={order}")
        params = model.operator_params(model.init(seeded()), 0)
        assert not functions.learns(model.operators[0])
        assert not list(functions.learned_groups(model.operators[0], params))


def test_one_function_a_head_is_a_head_of_one_unit():
    operator = operators.parse("G1:order=elementwise").operator
    params = {"units": {"coefs": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}}
    values = functions.curves(operator, params, X)
    assert_close(values[:, 0, 0], torch.stack([X.cos(), 2 * X.sin()]))
    start = {"units": {"coefs": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}}
    moved = functions.moved(values, functions.curves(operator, start, X))
    assert_close(moved, torch.tensor([0.0, 1.0]))
    assert len(functions.plot(operator, params, X, initial=start).axes) == 2


@pytest.mark.parametrize("spec", ["G3B", "softmax+G3B", "bspline-G3B", "rational-3/2B"])
def test_one_function_a_head_is_pruned(spec):
    model = model_of(f"{spec}:order=elementwise")
    params = model.init(seeded())
    pruned, dropped = functions.prune(model, params, 0.9)
    before, after = tree.named(params), tree.named(pruned)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert all(before[name].shape == after[name].shape for name in before)
    assert all("units" in name for name in changed)
    terms = sum(found.terms for found in dropped.values())
    assert (terms > 0) == bool(changed) and (terms > 0 or spec.startswith("rational"))


@pytest.mark.parametrize("spec", ["G2B", "dog-B", "rational-2/2B"])
def test_what_is_pruned_is_small_by_its_scale_as_well(spec):
    model = model_of(f"{spec}:rank=2,scales=true")
    params = model.init(seeded())
    for block in range(len(model.sites)):
        model.operator_params(params, block)["units"]["scale_basis"][:, 1:] = 1e-6
    pruned = functions.prune(model, params, 1e-4).params
    amplitude = {"G2B": "coefs", "dog-B": "weight", "rational-2/2B": "numerator"}[spec]
    kept = pruned["blocks"]["0"]["operator"]["units"][amplitude]
    assert not kept[:, 1:].any() and kept[:, 0].any()


def test_units_see_the_scores_of_their_own_heads():
    scores = torch.randn(3, 2, 5, 5, generator=seeded())
    model = model_of("softmax+G2B:rank=2")
    params = model.operator_params(model.init(seeded()), 0)
    (group,) = functions.learned_groups(model.operators[0], params)
    assert_close(functions.seen_by(group, scores), scores[:, 1:])
    far = scores.clone()
    far[:, 0] *= 1000  # of softmax, where no unit looks
    fig = functions.plot(model.operators[0], params, scores=far)
    low, high = fig.axes[0].get_xlim()
    assert high == -low < 10
    # those of `project_first` see what W makes of them
    operator = operators.parse("G2:order=project_first,rank=3").operator
    params = operator.init(seeded(), 2, 5)
    (group,) = functions.learned_groups(operator, params)
    expected = torch.einsum("bhnm,hrm->bhnr", scores, params["mix"])
    assert_close(functions.seen_by(group, scores), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_may_be_of_half_precision(dtype):
    scores = 3 * torch.randn(2, 5, 5, generator=seeded())
    found = functions.score_range(scores.to(dtype), OPERATOR)
    assert_close(found, functions.score_range(scores, OPERATOR), rtol=0.01, atol=0.01)


def test_a_formula_over_a_narrow_range_keeps_what_matters_there():
    x = torch.linspace(-1e-3, 1e-3, 61).double()
    found = symbolic.candidate((1e3 * x - 0.2) ** 2 + 0.3, x)
    assert found.formula == "1e+06 (x - 0.0002)^2 + 0.3"


def test_pruning_keeps_the_largest_by_hand():
    model = model_of("G2U:rank=1")
    params = model.init(seeded())
    units = params["operator"]["units"]
    coefs = torch.zeros(2, 1, 5, 4)
    coefs[..., 0] = 0.1  # a_1 of every unit
    coefs[0, 0, 0] = torch.tensor([3.0, 0.2, 4.0, 0.0])  # harmonics of 5 and 0.2
    coefs[1] *= 100
    units["coefs"] = coefs
    pruned, dropped = functions.prune(model, params, 0.05)
    kept = pruned["operator"]["units"]["coefs"]
    expected = torch.zeros(2, 1, 5, 4)
    expected[0, 0, 0, 0], expected[0, 0, 0, 2] = 3.0, 4.0
    expected[1] = coefs[1]
    assert torch.equal(kept, expected)
    # head 1: one term of ten is left; head 2: the five zero harmonics go
    assert dropped == {"operator": functions.Dropped(9 + 5, 20, 4, 10)}
    assert params["operator"]["units"]["coefs"] is coefs


def test_pruning_weighs_units_by_their_column_of_the_mix():
    model = model_of("G1U:rank=2")
    params = model.init(seeded())
    params["operator"]["units"]["coefs"] = torch.ones(2, 2, 5, 2)
    params["operator"]["mix"] = torch.tensor([1.0, 0.01]).expand(2, 5, 2).clone()
    _, dropped = functions.prune(model, params, 0.1)
    assert dropped["operator"] == functions.Dropped(10, 20, 10, 20)


# what the scores do


def test_score_share_is_what_static_attention_leaves():
    values = torch.randn(50, 2, 5, 4, generator=seeded()).double()
    scores = torch.randn(50, 2, 5, 5, generator=seeded(1)).double()
    for spec, low, high in [("polynomial-0B:rank=3", 0, 1e-6), ("G3B:rank=3", 0.3, 1)]:
        operator = operators.parse(spec).operator
        weights = operator.weights(operator.init(seeded(), 2, 5), scores)
        found = attention.score_share(weights, values)
        assert found.shape == (2,) and ((found >= low) & (found <= high)).all()
        shuffled = attention.score_share(weights.flip(1), values.flip(1))
        assert_close(shuffled, found.flip(0))
        assert_close(attention.score_share(9 * weights, values), found, atol=1e-9, rtol=1e-6)


# clusters and formulas


def test_clusters_of_planted_shapes():
    scale = torch.tensor([1.0, -2.0, 0.5])[:, None]
    values = torch.cat([scale * X.sin() + 2, 3 * scale * X.cos() - 1, torch.full((1, 121), 7.0)])
    found = symbolic.clusters(values, X)
    assert found.labels.tolist() == [1, 1, 1, 0, 0, 0, -1]
    assert found.leaders.tolist() == [4, 1]
    assert symbolic.clusters(values, X, count=1).labels.tolist() == [-1] * 3 + [0] * 3 + [-1]
    # where only scores near zero are seen a sine is a line
    near = (X.abs() < 0.3).double()
    both = symbolic.clusters(torch.stack([X.sin(), X]), X, near)
    assert both.labels.tolist() == [0, 0]


@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-5, 5))
def test_clusters_do_not_see_an_affine_map(seed, factor, shift):
    values = torch.randn(6, 2, generator=seeded(seed)).double() @ torch.stack([X.sin(), X]).double()
    found = symbolic.clusters(values, X)
    again = symbolic.clusters(-factor * values + shift, X)
    assert torch.equal(found.labels, again.labels)


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("affine", lambda x: 2 * x - 1),
        ("square", lambda x: 3 * (x - 1) ** 2 + 1),
        ("exp", lambda x: -2 * torch.exp(-0.7 * x) + 5),
        ("sin", lambda x: 2 * torch.sin(1.5 * x + 0.3) - 1),
        ("abs", lambda x: (x + 0.5).abs()),
        ("relu", lambda x: torch.relu(1 - 2 * x)),
        ("tanh", lambda x: 4 * torch.tanh(3 * x - 1)),
        ("gauss", lambda x: torch.exp(-((2 * x + 1) ** 2))),
        ("cube", lambda x: (x - 0.5) ** 3),
        ("lorentz", lambda x: 1 / (1 + (3 * x) ** 2)),
    ],
)
def test_formulas_of_planted_functions(name, planted):
    x = X.double()
    found = symbolic.candidate(planted(x), x, margin=1e-6)
    assert found.name == name, found
    assert found.r2 == pytest.approx(1, abs=1e-5)
    assert_close(found(x), planted(x), rtol=0, atol=0.02 * float(planted(x).std()))


def test_formulas_as_they_are_written():
    x = X.double()
    assert symbolic.candidate(-2 * x + 1, x).formula == "-2 x + 1"
    assert symbolic.candidate(x.exp() - 3, x).formula == "exp(x) - 3"
    assert symbolic.candidate(torch.full_like(x, 2.5), x).formula == "2.5"
    assert symbolic.candidate(torch.full_like(x, 2.5), x)(x[:2]).tolist() == [2.5, 2.5]
    noise = torch.randn(121, generator=seeded()).double()
    assert symbolic.candidate(noise, x).r2 < 0.3
    for margin in (-0.1, math.nan):
        with pytest.raises(ValueError, match="`margin`"):
            symbolic.candidate(noise, x, margin=margin)
    # simple before better: a sine that is hardly bent is a line
    assert symbolic.candidate(torch.sin(0.1 * x), x).name == "affine"


def test_points_of_a_formula_stand_in_any_order():
    x = torch.randn(300, generator=torch.Generator().manual_seed(0))
    found = symbolic.candidate(2 * torch.sin(1.5 * x) + 1, x)
    assert found.name == "sin" and found.r2 > 1 - 1e-8


def test_a_formula_fits_where_scores_are():
    step = torch.where(X < 0, torch.zeros(()), X * X)
    found = symbolic.candidate(step, X, (X > 0).float())
    assert found.name == "square" and found.r2 > 0.999


def test_picture_of_clusters():
    values = torch.stack([X.sin(), 2 * X.sin() + 1, X, X * X])
    found = symbolic.clusters(values, X)
    formulas = [symbolic.candidate(values[i], X) for i in found.leaders]
    fig = symbolic.plot(values, X, found, formulas)
    text = pages.svg(fig, "x")
    assert "2 of 4" in text and "R²" in text
    assert len([ax for ax in symbolic.plot(values, X, found).axes if ax.get_visible()]) == 3


OPERATOR = operators.parse("G2B:rank=2").operator


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: functions.score_range(torch.tensor([torch.nan, 1.0]), operators.softmax()),
            "finite scores, got 1 of 2",
        ),
        (lambda: functions.density(torch.ones(3), X.flip(0)), "ascending"),
        (lambda: functions.density(torch.full((3,), 99.0), X), "got none of 3"),
        (lambda: functions.fits(torch.ones(2, 5), X), r"values \(\.\.\., X\)"),
        (lambda: functions.fits(torch.ones(121), X, torch.zeros(121)), "density"),
        (lambda: functions.fits(torch.full((121,), torch.nan), X), "finite values"),
        (
            lambda: functions.harmonics(
                operators.parse("dog-B").operator,
                operators.parse("dog-B").operator.init(seeded(), 1, 3),
            ),
            "Fourier units, got 'dog'",
        ),
        (lambda: functions.prune(model_of("softmax"), {}, 1.0), "`threshold` < 1"),
        (
            lambda: functions.prune(model_of("softmax"), model_of("softmax").init(seeded()), 0.1),
            "fixed operators alone",
        ),
        (
            lambda: functions.prune(m := model_of("G2B:order=by_offset"), m.init(seeded()), 0.1),
            "or by offset, all of which it leaves as they are",
        ),
        (lambda: curves_of("G2B:order=by_offset"), r"axes \(H, P, M\), got 'G2B:order=by_offset'"),
        (lambda: curves_of("softmax+G2B"), "pass a group of `learned_groups`"),
        (lambda: curves_of("G2B:order=beside_relative"), "pass a group of `learned_groups`"),
        (lambda: curves_of("softmax"), "Fixed functions have no units"),
        (
            lambda: functions.plot(
                op := operators.parse("G2B:order=by_distance").operator, op.init(seeded(), 2, 5)
            ),
            "`curves` shows those of the distance",
        ),
        (lambda: functions.plot_harmonics({}), "got none"),
        (lambda: symbolic.clusters(torch.ones(121), X), r"values \(n, X\)"),
        (lambda: symbolic.clusters(torch.ones(2, 121), X, similarity=0.0), "`similarity` <= 1"),
        (lambda: symbolic.candidate(torch.full((121,), torch.nan), X), "121 values nan"),
        (
            lambda: symbolic.plot(X[None], X, symbolic.clusters(0 * X[None], X)),
            "got 0 clusters",
        ),
    ],
)
def test_what_measures_of_functions_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()
