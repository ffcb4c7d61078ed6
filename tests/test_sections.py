"""The sections of `kart analyse` against their measures called by hand, and what they refuse."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from kart import data, models, train, tree
from kart.analysis import (
    attention,
    bench,
    cost,
    curvature,
    functions,
    landscape,
    mechanism,
    report,
    scenes,
    scores,
    section,
    spectra,
    weights,
)
from kart.models import windows
from kart.train import Config

TINY = Config(
    epochs=1,
    train_limit=64,
    batch_size=32,
    embed_dim=8,
    depth=1,
    num_heads=2,
    patch_size=4,
    threads=1,
    trajectory=4,
)
SPLITS = train.load_data(TINY)
OPERATORS = ("softmax", "G2B")


def result(operator, seeds=(0, 1), **changes):
    """An untrained result whose trajectory leads from elsewhere to its weights."""
    config = dataclasses.replace(TINY, operator=operator, **changes)
    configs = [dataclasses.replace(config, seed=seed) for seed in seeds]
    model = train.build(configs[0], SPLITS.train)
    params = [model.init(torch.Generator().manual_seed(seed)) for seed in seeds]

    def snapshots(index):
        generator = torch.Generator().manual_seed(100 + index)
        away = tree.map(lambda x: 0.1 * torch.randn(x.shape, generator=generator), params[index])
        turned = tree.map(lambda x: 0.1 * torch.randn(x.shape, generator=generator), params[index])

        def at(t):
            return tree.map(lambda x, a, b: x + t * a + t * t * b, params[index], away, turned)

        return [(10 * i, at(1 - i / 3)) for i in range(4)]

    records = [[{"val_top1": 0.5, "val_loss": 1.0, "train_loss": 1.0}] * len(seeds)]
    return section.Result(operator, configs, records, params, snapshots=snapshots)


@pytest.fixture(scope="module")
def results():
    return [result(operator) for operator in OPERATORS]


def context(results, analysis, **options):
    options = {"examples": 16, "points": 11, **options}
    return section.Context(results, SPLITS, name=analysis.name, **options)


def numbers(found, operator, measure):
    """Values by seed; None is the mean."""
    return {
        one.seed: one.value
        for one in found.numbers
        if one.operator == operator and one.measure == measure
    }


def aux_of(one, images):
    model = train.build(one.config, SPLITS.train)
    with torch.no_grad():
        return model, model.intermediates(one.params, images)


def test_the_landscape_is_that_of_its_measures(results):
    own = context(results, landscape.ANALYSIS)
    found = landscape.section(own)
    members = list(own.members())
    reaches, planes = [], {}
    for one in members:
        path = torch.stack([tree.ravel(params) for _, params in one.snapshots()])
        planes[one.name, one.seed] = path, landscape.directions(path)[0]
        reaches.append(
            float(landscape.coordinates(path, planes[one.name, one.seed][1]).abs().max())
        )
    one = members[-1]
    path, plane = planes[one.name, one.seed]
    extent = float(landscape.measure(own, one)["path_axes"].max())
    assert max(reaches) < extent < 1.2 * max(reaches)
    model = own.model(one.config)
    images, labels = own.images(one.config, 16)

    def loss(params):
        return torch.nn.functional.cross_entropy(model.apply(params, images), labels)

    z = landscape.surface(loss, tree.unravel(path[-1], one.params), plane, extent, 11)
    grid = landscape.axes(extent, 11)
    rises = landscape.sharpness(z, grid, 0.4 * extent)
    for measure, value in (
        ("path_roughness", landscape.roughness(z, grid)),
        ("path_rise", rises.mean),
        ("path_largest", rises.largest),
        ("path_loss", z[5, 5]),
        ("path_distance", (path[0] - path[-1]).norm()),
    ):
        assert numbers(found, "G2B", measure)[1] == pytest.approx(float(value), rel=1e-4, abs=1e-5)
    page = " ".join(found.blocks)
    assert page.count("<svg") == 3 and "16 validation images around the final weights;" in page


def test_the_landscape_says_around_which_weights_each_plane_is():
    own = context([result("softmax", seeds=(0,))._replace(epochs=[0])], landscape.ANALYSIS)
    page = " ".join(landscape.section(own).blocks)
    assert "in the random plane around those of the best epoch;" in page


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_points_that_are_not_finite_are_counted_and_cost_only_their_roughness(
    results, monkeypatch, value
):
    kept = landscape._kept_surface

    def spoilt(context, member, kind, extent):
        z = kept(context, member, kind, extent).clone()
        if kind == "random" and member.name == "G2B" and member.seed == 0:
            z[0, :2] = value
        return z

    monkeypatch.setattr(landscape, "_kept_surface", spoilt)
    found = landscape.section(context(results, landscape.ANALYSIS))
    page = " ".join(found.blocks)
    said = f"2 of {landscape.GRID**2} points of G2B, seed 0, in the random plane"
    assert page.count(said) == page.count("have a loss of nan or inf") == 1
    assert page.count("<svg") == 3 and "1 of 2 not finite" in page
    assert set(numbers(found, "G2B", "random_roughness")) == {1, None}
    assert set(numbers(found, "G2B", "random_rise")) == {0, 1, None}
    assert set(numbers(found, "G2B", "path_roughness")) == {0, 1, None}


def test_numbers_of_the_landscape_do_not_depend_on_the_points_of_the_picture(results):
    coarse = landscape.measure(context(results, landscape.ANALYSIS), section.Member(results[1], 0))
    fine = landscape.measure(
        context(results, landscape.ANALYSIS, points=21), section.Member(results[1], 0)
    )
    assert fine["path_surface"].shape == (21, 21) and coarse["path_surface"].shape == (11, 11)
    for name in ("path_roughness", "path_rise", "random_roughness"):
        assert_close(fine[name], coarse[name], rtol=1e-6, atol=1e-9)


def test_the_curvature_is_that_of_its_measures(results):
    own = context(results, curvature.ANALYSIS, examples=32)
    found = curvature.section(own)
    one = section.Member(results[1], 1)
    losses = own.losses(own.model(one.config))
    images, labels = own.images(one.config, 8)
    for pattern, measure in (("*", "trace"), ("*.operator.*", "operator_trace")):
        part, some = curvature.subset(
            lambda params: losses(params, images, labels).mean(), one.params, pattern
        )
        draws = own.generator(pattern, 1)
        top = curvature.top_eigenvalues(
            part, some, 1, draws, which="largest", tolerance=curvature.TOLERANCE
        )
        value = curvature.trace(part, some, curvature.SAMPLES, draws).estimate
        name = measure.replace("trace", "top")
        assert numbers(found, "G2B", name)[1] == pytest.approx(float(top[0]), rel=1e-4, abs=1e-6)
        assert numbers(found, "G2B", measure)[1] == pytest.approx(float(value), rel=1e-4, abs=1e-6)
    assert not numbers(found, "softmax", "operator_trace")
    errors = []
    for result, seed, pattern in itertools.product(results, (0, 1), ("*", "*.operator.*")):
        if pattern == "*" or result.name != "softmax":
            some = curvature._curvature(own, section.Member(result, seed), pattern)
            errors.append(some["trace_error"] / abs(some["trace"]))
    assert f"of a trace is up to {100 * float(max(errors)):.0f} % of it" in " ".join(found.blocks)
    assert "8 validation images" in " ".join(found.blocks)


def test_spectra_are_those_of_their_measures(results):
    own = context(results, spectra.ANALYSIS)
    found = spectra.section(own)
    one = section.Member(results[1], 0)
    _, aux = aux_of(one, own.images(one.config, 5)[0])
    expected = spectra.effective_rank(aux["blocks.0.weights"]).mean()
    assert numbers(found, "G2B", "weights_effective")[0] == pytest.approx(float(expected))
    assert "cannot have a rank above r = 12" in " ".join(found.blocks)
    assert spectra.rank_of(own.model(TINY).operators[0]) is None


def test_distributions_are_those_of_their_measures(results):
    own = context(results, weights.ANALYSIS)
    found = weights.section(own)
    one = section.Member(results[1], 1)
    parts = weights.by_part(one.snapshots()[-1][1])
    expected = weights.kurtosis(parts["all"])[0]
    assert numbers(found, "G2B", "all_end_kurtosis")[1] == pytest.approx(float(expected))
    coefs = weights.kurtosis(parts["coefs"]).mean()
    assert numbers(found, "G2B", "coefs_end_kurtosis")[1] == pytest.approx(float(coefs))
    assert not numbers(found, "softmax", "coefs_end_kurtosis")
    start = weights.kurtosis(weights.by_part(one.snapshots()[0][1])["all"])[0]
    assert numbers(found, "G2B", "all_start_kurtosis")[1] == pytest.approx(float(start))


def test_attention_is_scored_by_its_measures(results):
    own = context(results, attention.ANALYSIS)
    found = attention.section(own)
    one = section.Member(results[1], 0)
    pixels = data.as_float(data.take(SPLITS.val, torch.arange(64))[0])
    images, masks = scenes.pasted(own.generator("scenes"), pixels)
    shown = data.normalise(images, SPLITS.val.mean, SPLITS.val.std)
    _, aux = aux_of(one, shown)
    maps = attention.enlarge(attention.class_maps(aux["blocks.0.weights"]), 8, 8)
    for name, score in (
        ("pointing", attention.pointing_game),
        ("mass", attention.mass_inside),
        ("iou", attention.best_iou),
    ):
        expected = score(maps, masks[:, None]).mean()
        assert numbers(found, "G2B", name)[0] == pytest.approx(float(expected))
    assert all(value == 0 for value in numbers(found, "softmax", "negative").values())
    page = " ".join(found.blocks)
    assert "mask covers 25 % of the image" in page and "pasted at a random place" in page


def test_masks_that_came_with_the_data_are_used():
    config = dataclasses.replace(TINY, data="masked_digits", patch_size=8)
    splits = train.load_data(config)
    model = train.build(config, splits.train)
    params = [model.init(torch.Generator().manual_seed(0))]
    one = section.Result("softmax", [config], [[{"val_top1": 0.1}]], params)
    own = section.Context([one], splits, name="attention", examples=16)
    page = " ".join(attention.section(own).blocks)
    assert "the masks that came with them" in page and "pasted" not in page


def test_images_that_lie_class_by_class_are_taken_of_all_classes():
    config = dataclasses.replace(TINY, data="masked_digits", patch_size=8)
    splits = train.load_data(config)
    sorted_ = splits._replace(val=splits.val.part(splits.val.labels.argsort(kind="stable")))
    model = train.build(config, splits.train)
    params = [model.init(torch.Generator().manual_seed(0))]
    one = section.Result("softmax", [config], [[{"val_top1": 0.1}]], params)
    own = section.Context([one], sorted_, name="attention")
    _, labels = own.images(config, 40)
    assert sorted(set(labels.tolist())) == list(range(10))
    assert torch.equal(labels, torch.from_numpy(sorted_.val.labels[sorted_.val.spread(40)]))
    shown = attention._scenes(own)
    index = sorted_.val.spread(len(shown.labels))
    pixels, own_labels = data.take(sorted_.val, torch.from_numpy(index))
    assert_close(shown.pixels, data.as_float(pixels))
    assert torch.equal(shown.labels, own_labels) and len(set(own_labels.tolist())) == 10
    assert torch.equal(shown.masks, torch.from_numpy(sorted_.val.masks[index]))
    # what was kept of the first ones is not read again, and of others what was kept is
    first = section.Context([one], splits, name="attention")
    assert len({first.data_key, own.data_key}) == 2


def test_functions_are_those_of_their_measures(results):
    own = context(results, functions.ANALYSIS)
    found = functions.section(own)
    one = section.Member(results[1], 0)
    model, aux = aux_of(one, own.images(one.config, 64)[0])
    share = attention.score_share(aux["blocks.0.weights"], aux["blocks.0.values"]).mean()
    assert numbers(found, "G2B", "score_share")[0] == pytest.approx(float(share))
    x = functions.score_range(aux["blocks.0.scores"], model.operators[0])
    params = model.operator_params(one.params, 0)
    values = functions.curves(model.operators[0], params, x)
    fits = functions.fits(values, x, functions.density(aux["blocks.0.scores"], x))
    expected = float(fits.affine.mean())
    assert numbers(found, "G2B", "r2_affine")[0] == pytest.approx(expected)
    whole = numbers(found, "G2B", "top1_pruned_0")[0]
    images, labels = own.images(one.config, 16)
    right = (model.apply(one.params, images).argmax(-1) == labels).double().mean()
    assert whole == pytest.approx(float(right))
    assert numbers(found, "softmax", "score_share") and not numbers(found, "softmax", "r2_affine")


def test_functions_are_shown_where_few_validation_images_tell_no_share(results):
    few = SPLITS.val._replace(images=SPLITS.val.images[:2], labels=SPLITS.val.labels[:2])
    splits = SPLITS._replace(val=few)
    found = functions.section(section.Context(results, splits, name="functions", examples=16))
    assert not numbers(found, "G2B", "score_share") and numbers(found, "G2B", "r2_affine")
    assert "a dash too few validation images" in " ".join(found.blocks)


def test_functions_of_hybrids_are_fitted_over_the_scores_of_their_heads():
    one = result("softmax+G2B", (0,))
    spread = tree.map_named(lambda name, x: 30 * x if "qkv" in name else x, one.params[0])
    one = one._replace(params=[spread])
    own = context([one], functions.ANALYSIS)
    found = functions.section(own)
    model, aux = aux_of(section.Member(one, 0), own.images(one.configs[0], 64)[0])
    params = model.operator_params(one.params[0], 0)
    (group,) = functions.learned_groups(model.operators[0], params)
    seen = aux["blocks.0.scores"][:, 1:]
    x = functions.score_range(seen, group.operator)
    values = functions.curves(group.operator, group.params, x)
    fits = functions.fits(values, x, functions.density(seen, x))
    expected = float(fits.affine.mean())
    assert numbers(found, "softmax+G2B", "r2_affine")[0] == pytest.approx(expected)
    assert "last block, head 2." in " ".join(found.blocks)


def test_every_group_of_heads_is_counted_and_shown():
    # the mean was over groups, however many units they have, and a group hid the one before
    name = "2*G2B+G3B:rank=2"
    one = result(name, (0,), num_heads=3, embed_dim=9)
    own = context([one], functions.ANALYSIS, shown=0)
    found = functions.section(own)
    model, aux = aux_of(section.Member(one, 0), own.images(one.configs[0], 64)[0])
    every = []
    groups = list(
        functions.learned_groups(model.operators[0], model.operator_params(one.params[0], 0))
    )
    for group in groups:
        seen = functions.seen_by(group, aux["blocks.0.scores"])
        x = functions.score_range(seen, group.operator)
        values = functions.curves(group.operator, group.params, x)
        every += functions.fits(values, x, functions.density(seen, x)).affine.flatten().tolist()
    mean = sum(every) / len(every)
    assert numbers(found, name, "r2_affine")[0] == pytest.approx(mean, rel=1e-6)
    assert f"Amplitude by harmonic of {name}, {name}, head 3" in " ".join(found.blocks)
    named = [(number.measure, number.seed) for number in found.numbers]
    assert len(named) == len(set(named))


def test_functions_that_are_not_of_the_score_alone_are_named():
    both = [result("G2B:order=elementwise", (0,)), result("G2B:order=by_distance", (0,))]
    found = functions.section(context(both, functions.ANALYSIS))
    page = " ".join(found.blocks)
    assert "G2B:order=by_distance: functions by offset and by distance are not" in page
    assert numbers(found, "G2B:order=elementwise", "change_block_1_panel_2")
    assert not numbers(found, "G2B:order=by_distance", "r2_affine")
    found = functions.section(context(both[1:], functions.ANALYSIS))
    assert "No operator here learns functions" not in " ".join(found.blocks)


STEPS = """
from kart import bases

def init(generator, shape):
    height, slope = bases.normal(generator, (2, *shape))
    return {"height": height, "slope": slope}

def apply(params, x):
    return params["height"] * (params["slope"] * x).tanh()

def expand(x):
    return None

silent = bases.Basis("steps", 2, init, apply, expand, None, None, {}, {})
told = silent._replace(traits={"amplitude": "height"})
"""


def test_functions_of_a_family_of_ones_own_are_dropped_by_what_it_says_is_a_factor(tmp_path):
    (tmp_path / "steps.py").write_text(STEPS)
    silent, told = (result(f"{tmp_path}/steps.py:{name}-B:rank=2") for name in ("silent", "told"))
    found = functions.section(context([silent, told], functions.ANALYSIS))
    page = " ".join(found.blocks)
    assert f"{silent.name}: nothing is dropped" in page and f"{told.name}:" not in page
    assert len(numbers(found, told.name, "top1_pruned_0.1")) == 1
    assert not numbers(found, silent.name, "top1_pruned_0.1")
    model = context([silent], functions.ANALYSIS).model(silent.configs[0])
    with pytest.raises(ValueError, match="`prune` needs a basis that says which of its param"):
        functions.prune(model, silent.params[0], 0.1)


def test_pictures_say_of_which_seeds_they_are():
    alike = context([result("softmax"), result("G2B")], spectra.ANALYSIS)
    assert alike.first_seeds == "seed 0"
    apart = [result("softmax"), result("G2B", (3, 4))]
    page = " ".join(spectra.section(context(apart, spectra.ANALYSIS)).blocks)
    assert "last block, seed 0 of softmax, 3 of G2B: mean" in page
    page = " ".join(weights.section(context(apart, weights.ANALYSIS)).blocks)
    assert "Pictures: seed 0 of softmax, 3 of G2B, at the start" in page


class Recording(section.Context):
    """A context that knows which of its options were read."""

    def __getattribute__(self, name):
        if name in section.OPTIONS:
            object.__getattribute__(self, "memory").setdefault("read", set()).add(name)
        return object.__getattribute__(self, name)


def test_sections_say_which_options_they_use():
    results = [result("G2B", seeds=(0,))]
    for one in report.SECTIONS:
        options = {"examples": 16, "points": 11, "retrain": 1}
        own = Recording(results, SPLITS, name=one.name, **options)
        own.memory["read"] = set()
        one.section(own)
        assert own.memory["read"] == {*one.uses}, one.name


def test_pictures_of_more_images_change_no_number(monkeypatch):
    one, plot = result("G2B", seeds=(0,)), attention.plot
    monkeypatch.setattr(attention, "plot", lambda pixels, maps: plot(pixels[:1], maps[:1]))
    few, many = (context([one], functions.ANALYSIS, shown=shown) for shown in (1, 80))
    assert functions.measure(few, next(few.members())) == functions.measure(
        many, next(many.members())
    )
    assert attention._maps(few)[1] == attention._maps(many)[1]


def test_attention_without_pictures(results):
    shown = attention.section(context(results, attention.ANALYSIS, shown=1))
    found = attention.section(context(results, attention.ANALYSIS, shown=0))
    assert [one.measure for one in found.numbers] == [one.measure for one in shown.numbers]
    page = " ".join(found.blocks)
    assert "scaled to its own maximum" not in page and page.count("<svg") == 1  # of the curves


def test_captions_count_the_images_that_there_are(results):
    few = train.Splits(SPLITS.train.part(slice(40)), SPLITS.val.part(slice(3)))
    own = {"examples": 16, "retrain": 0}
    page = " ".join(spectra.section(section.Context(results, few, name="spectra", **own)).blocks)
    assert "over heads and 3 validation images" in page
    found = mechanism.section(section.Context(results, few, name="mechanism", **own))
    page = " ".join(found.blocks)
    for words in (
        "on 3 validation images",
        "of 40 training images, by least squares",
        "over 40 training images",
        "over 3 validation images",
    ):
        assert words in page, words


def test_no_interval_of_a_rank_goes_beyond_the_keys(results):
    found = spectra.section(context(results, spectra.ANALYSIS))
    bounds = [one for one in found.numbers if one.high is not None]
    assert bounds and all(one.low >= 0 and one.high <= 5 for one in bounds)


def test_functions_of_fixed_operators_alone_say_so(results):
    found = functions.section(context(results[:1], functions.ANALYSIS))
    assert "No operator here learns functions" in " ".join(found.blocks)


def test_cost_is_measured_beside_softmax_even_where_it_is_not_among_the_runs(results):
    found = cost.section(context(results[1:], cost.ANALYSIS))
    (ratio,) = numbers(found, "G2B", "step_over_softmax").values()
    assert ratio > 0 and not numbers(found, "softmax", "step_ms")
    (product,) = numbers(found, "G2B", "hvp_over_gradient").values()
    assert product > 1  # it has a gradient inside
    assert "softmax" in found.blocks[0]


def test_cost_is_measured_with_one_thread_whatever_torch_has(results, monkeypatch):
    threads, interleave = [], bench.interleave

    def spy(*args):
        threads.append(torch.get_num_threads())
        return interleave(*args)

    monkeypatch.setattr(bench, "interleave", spy)
    torch.set_num_threads(2)
    cost.section(context(results[1:], cost.ANALYSIS))
    assert set(threads) == {1} and torch.get_num_threads() == 2


def test_cost_is_that_of_the_cpu_where_a_run_was_trained_on_another_device(results):
    configs = [dataclasses.replace(one, device="cuda") for one in results[1].configs]
    elsewhere = results[1]._replace(configs=configs)
    found = cost.section(context([elsewhere], cost.ANALYSIS))
    assert numbers(found, "G2B", "step_ms")


def test_an_object_is_pasted_where_its_mask_is():
    objects = torch.ones(6, 3, 8, 8)
    images, masks = scenes.pasted(torch.Generator().manual_seed(0), objects)
    assert masks.flatten(1).sum(1).tolist() == [16] * 6
    assert_close(images.movedim(1, -1)[masks], torch.ones(96, 3))
    assert float(images.movedim(1, -1)[~masks].std()) > 0.05
    again = scenes.pasted(torch.Generator().manual_seed(0), objects)
    assert torch.equal(images, again[0]) and torch.equal(masks, again[1])
    grey, _ = scenes.pasted(torch.Generator().manual_seed(0), objects[:, :1])
    assert grey.shape == (6, 1, 8, 8)
    with pytest.raises(ValueError, match="square images"):
        scenes.pasted(torch.Generator(), torch.ones(1, 3, 8, 9))


def test_a_table_counts_what_is_not_finite_and_shows_what_is_missing():
    found = {"a": {0: {"x": 1.0}, 1: {"x": math.inf}}, "b": {0: {"x": math.inf}}, "c": {0: {}}}
    table, own = section.seeds_table(found, [section.Column("x", "x", 1)], "")
    assert "1.0<br>" in table and "1 of 2 not finite" in table
    assert "infinite" in table and "\N{EN DASH}" in table
    assert [one.value for one in own] == [1.0, 1.0]


def test_a_difference_that_is_clear_of_zero_does_not_read_as_zero():
    column = section.Column("x", "height", 1)
    found = {
        "softmax": {0: {"x": 0.0}, 1: {"x": 0.0}},
        "G3B": {0: {"x": 0.0011}, 1: {"x": 0.0012}},
        "G3U": {0: {"x": 0.0}, 1: {"x": 1e-7}},
        "same": {0: {"x": 0.0}, 1: {"x": 0.0}},
    }
    clear, unclear, equal = section.differences(found, "x", "Height", column)
    assert "+0.001 [+0.001, +0.002], more than" in clear
    assert "+0.0 [-0.0, +0.0], not clear" in unclear
    assert "+0.0 (2 equal seeds), not clear" in equal


def test_differences_are_paired_by_seed():
    column = section.Column("x", "x", 2)
    found = {
        "a": {0: {"x": 1.0}, 1: {"x": 5.0}},
        "b": {0: {"x": 2.0}, 1: {"x": 6.1}},
        "c": {0: {"x": 9.0}, 1: {"x": -9.0}},
    }
    first, second = section.differences(found, "x", "Height", column)
    assert first.startswith("Height of b less that of a: +1.05 [") and "more than seeds" in first
    assert "not clear of the noise" in second and "Left out" not in second
    # seeds of one side alone, and without a finite value
    found["b"] |= {2: {"x": 3.0}}
    found["c"] |= {1: {"x": math.inf}}
    found["d"] = {7: {"x": 1.0}}
    first, second, third = section.differences(found, "x", "Height", column)
    assert "+1.05 [" in first and first.endswith(
        "Left out, as one of the two has no such value: seed 2."
    )
    assert "+8.00 (one seed)" in second and second.endswith("seed 1.")
    assert third == "Height of d and of a: no seed has finite values of both."


def test_a_difference_stays_within_what_two_values_can_be_apart():
    found = {"a": {0: {"x": 0.1}, 1: {"x": 0.2}}, "b": {0: {"x": 0.9}, 1: {"x": 0.3}}}
    (share,) = section.differences(found, "x", "Share", section.percent("x", "x"))
    assert "+45.0 [-100.0, +100.0]" in share
    (one_sided,) = section.differences(found, "x", "Size", section.Column("x", "x", 1, low=0.0))
    assert "+0.5 [-4.0, +4.9]" in one_sided


def test_accuracies_are_paired_by_seed_and_never_by_place():
    def scored(operator, by_seed):
        top1 = [{"val_top1": value} for value in by_seed.values()]
        return result(operator, tuple(by_seed))._replace(records=[top1])

    base = scored("softmax", {0: 0.4, 1: 0.6, 2: 0.5})
    (told,) = scores.verdicts([base, scored("G2B", {1: 0.7, 2: 0.6, 3: 0.1})])
    assert "10.00 points above softmax with each of 2 seeds" in told
    assert told.endswith("Left out, as one of the two has no such seed: 0, 3.")
    (told,) = scores.verdicts([base, scored("G2B", {0: 0.5, 1: 0.7})])
    assert "10.00 points above softmax" in told and told.endswith("seed: 2.")
    (told,) = scores.verdicts([base, scored("G2B", {7: 0.5, 8: 0.7, 9: 0.1})])
    assert "no seed in common" in told and "points" not in told


def test_what_several_processes_measured_is_not_measured_again(results, tmp_path, monkeypatch):
    chosen = report.select(["spectra", "landscape"])
    own = section.Context(results, SPLITS, cache=tmp_path, examples=16, points=11)
    for part in (0, 1):
        report.measure(dataclasses.replace(own, memory={}), chosen, 10.0, part, 2)

    def never(*args, **options):
        raise AssertionError("it is kept")

    monkeypatch.setattr(landscape, "surface", never)
    monkeypatch.setattr(spectra, "singular_values", never)
    own = dataclasses.replace(own, memory={})
    done = report.analyse(own, chosen, out=tmp_path / "page.html", title="t", command="c")
    assert [one.problem for one in done] == ["", ""]


@pytest.mark.parametrize(
    ("change", "limit", "words"),
    [
        ({"snapshots": None}, 4096, "three snapshots of the weights or more, got 0 of softmax"),
        ({}, 0, "MiB for the 4 snapshots of softmax, got a limit of 0 MiB"),
        ({"params": [math.nan] * 2}, 4096, "nan"),
    ],
)
def test_what_cannot_be_is_one_line_and_the_others_are_shown(change, limit, words, tmp_path):
    one = result("softmax")
    if "params" in change:
        spoiled = [tree.map(lambda x: x * math.nan, params) for params in one.params]
        last = [(10 * i, spoiled[0]) for i in range(4)]
        change = {"params": spoiled, "snapshots": lambda index: last}
    chosen = report.select(["training", "landscape", "weights"])
    own = section.Context([one._replace(**change)], SPLITS, examples=16, points=11, limit_mib=limit)
    done = report.analyse(own, chosen, out=tmp_path / "page.html", title="t", command="c")
    assert [bool(part.problem) for part in done] == [False, True, True]
    assert words in done[-1].problem and "\n" not in done[-1].problem
    assert "Not shown" in (tmp_path / "page.html").read_text()


SIZES = {"image_size": 16, "patch_size": 2, "embed_dim": None, "depth": None, "num_heads": None}
ALL = ["scores", "training", "functions", "attention", "mechanism", "spectra", "weights"]


@pytest.mark.parametrize("name", ["swin_nano", "convit_nano"])
def test_models_whose_blocks_differ_have_every_section(name, tmp_path):
    sizes = SIZES if name == "swin_nano" else {**SIZES, "image_size": 8}
    results = [result(operator, seeds=(0,), model=name, **sizes) for operator in OPERATORS]
    own = section.Context(results, SPLITS, examples=4, retrain=0)
    page = tmp_path / "report.html"
    # an hour: on a busy machine, too
    done = report.analyse(own, report.select(ALL), 60, page, title="runs", command="kart analyse")
    assert {one.name: one.problem for one in done} == dict.fromkeys(ALL, "")
    text = page.read_text()
    assert "not counted" not in text and "No rollout" in text and "rollout, mass" not in text
    windowed = name == "swin_nano"
    assert ("each window of an image is a sample" in text) == windowed
    assert ("Windows that the mask of a shift cuts are left out" in text) == windowed
    assert ("class token" in text) != windowed
    # weights of gated blocks are mixed with those of positions, whose rank nothing bounds
    assert ("G2B cannot have a rank above r = 12" in text) == windowed
    assert ("gated blocks are mixed with those of positions" in text) != windowed


def test_windows_are_samples_of_their_block():
    one = result("G2B", seeds=(0,), model="swin_nano", **SIZES)
    own = context([one], spectra.ANALYSIS)
    member = next(own.members())
    images, _ = own.images(member.config, 5)
    model, aux = aux_of(member, images)
    # a grid of 8 in windows of 4: four, of which the roll leaves the first whole; then one of 4
    chosen = [[0, 1, 2, 3], [0], [0], [0]]
    weights = [
        torch.cat([aux[f"blocks.{i}.weights"][:, n] for n in whole])
        for i, whole in enumerate(chosen)
    ]
    found = spectra.measure(own, member)
    expected = torch.stack([spectra.effective_rank(block).mean() for block in weights])
    assert_close(found["weights_by_block"], expected)
    assert_close(found["weights_effective"], expected.mean())
    # a masked window's weights are of higher rank than r
    ranks = spectra.numerical_rank(aux["blocks.1.weights"][:, 3], spectra.CUT)
    assert int(found["weights_most"]) <= 12 < int(ranks.max())

    own = context([one], functions.ANALYSIS)
    with torch.no_grad():
        aux = model.intermediates(member.params, own.images(member.config, own.few(model))[0])
    shares = []
    for i, whole in enumerate(chosen):
        block = [
            torch.stack([aux[f"blocks.{i}.{kind}"][:, n] for n in whole], 1).flatten(0, 1)
            for kind in ("weights", "values")
        ]
        shares.append(attention.score_share(*block))
    found = functions.measure(own, member)
    assert_close(found["by_block"], torch.stack([share.mean() for share in shares]))
    assert_close(found["score_share"], torch.cat(shares).mean())

    own = context([one], attention.ANALYSIS)
    look = own.look(one)
    assert_close(look.seen("scores", 1), look.aux["blocks.1.scores"][:, 0], rtol=0, atol=0)
    assert look.seen("weights", 0).shape == (4 * len(look.pixels), 1, 16, 16)
    with pytest.raises(ValueError, match="needs windows that no mask cuts.*grid of 3"):
        cut = windows.Cut(3, 4)
        section.samples(model.sites[0]._replace(cut=cut), torch.zeros(1, 1, 1, 16, 16))


def test_blocks_that_share_an_operator_share_a_panel():
    one = result("G2U", seeds=(0,), model="swin_nano", **SIZES)
    found = functions.section(context([one], functions.ANALYSIS))
    text = "".join(found.blocks)
    for words in ("blocks 1, 2 (shared)", "blocks 3, 4 (shared)"):
        assert f"G2U, {words}. Change" in text
    model = models.create("vit_nano", "G2U", image_size=8, patch_size=4, depth=1)
    assert scores.described("G2U", model).endswith(", one for all blocks")
    model = context([one], scores.ANALYSIS).model(one.configs[0])
    assert scores.described("G2U", model).endswith(", 2 that blocks share")
    pruned = functions.prune(model, one.params[0], 0.1)
    assert list(pruned.dropped) == ["operator.0", "operator.1"]


def test_functions_before_training_are_those_that_a_run_began_with():
    # not those that its seed draws, where its weights came from another run
    one = result("G2B", seeds=(0,), start="runs/donor")
    own = context([one], functions.ANALYSIS, shown=0)
    look, began = own.look(one), one.snapshots(0)[0][1]
    operator = look.model.operators[0]
    x = functions.score_range(look.seen("scores", 0), operator)
    now, then = (
        functions.curves(operator, look.model.operator_params(params, 0), x)
        for params in (look.params, began)
    )
    found = numbers(functions.section(own), "G2B", "change_block_1_panel_1")
    assert found[0] == pytest.approx(100 * float(functions.moved(now, then)[0]), rel=1e-5)
    unknown = context([one._replace(snapshots=None)], functions.ANALYSIS, shown=0)
    page = " ".join(functions.section(unknown).blocks)
    assert "began with other weights and kept no trajectory" in page


def test_operators_of_blocks_that_differ_are_described_apart():
    model = models.create("vit_nano", "softmax|...|G2B|G3B", image_size=8, patch_size=4)
    assert scores.described("mine", model) == (
        "mine: softmax in blocks 1, 2; low rank 12 of fourier units (grid 2) in block 3; low rank "
        "12 of fourier units (grid 3) in block 4"
    )


def test_what_is_learned_without_a_basis_is_not_called_fixed():
    for spec, words in [
        ("sparsemax", "a fixed function"),
        ("static", "learned, of no basis"),
        ("linformer:rank=4", "learned, of no basis"),
        ("softmax+G2B", "heads that differ"),
        ("dog-B:rank=4", "low rank 4 of dog units, one a block"),
    ]:
        model = models.create("vit_nano", spec, image_size=8, patch_size=4)
        assert scores.described(spec, model) == f"{spec}: {words}"
