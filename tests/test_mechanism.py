"""Swaps of functions that are simple already, gradients, layouts of planted matrices."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from kart import bases, models, operators, pages, train, tree
from kart.analysis import attention, mechanism, report, section
from kart.models.model import find, place
from kart.train import Config

SIZE = {"embed_dim": 8, "depth": 2, "num_heads": 2, "image_size": 8, "patch_size": 4}
TINY = Config(
    epochs=1,
    train_limit=64,
    batch_size=32,
    embed_dim=8,
    depth=2,
    num_heads=2,
    patch_size=4,
    threads=1,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_of(spec, name="vit_nano", **options):
    return models.create(name, spec, **{**SIZE, **options})


def looked_at(model, params, count=6):
    config = model.config
    images = torch.randn(
        count, config.in_channels, config.image_size, config.image_size, generator=seeded(9)
    )
    with torch.no_grad():
        return images, model.intermediates(params, images)


def grown(params):
    """Parameters with scores that differ and parts that start at zero drawn."""
    draws = seeded(5)
    return tree.map(lambda x: x + 0.3 * torch.randn(x.shape, generator=draws), params)


# swaps

LEARNED = [
    ("{}B:rank=3", {}),
    ("{}U:rank=3", {}),
    ("{}B:rank=3,base=softmax", {}),
    ("{}B:rank=3,project=simplex", {}),
    ("{}B:order=full_rank", {}),
    ("{}B:rank=3,order=project_first", {}),
    ("{}B:rank=3,order=two_stage", {}),
    ("{}B:order=elementwise", {}),
    ("{}B:order=elementwise,inside=true", {}),
    ("{}B:order=by_offset", {}),
    ("{}B:order=by_offset,prefix=1,rows=1", {}),
    ("{}B:order=by_offset,prefix=2,rows=3", {}),
    ("{}B:order=beside_relative,rank=3", {}),
    ("softmax+{}B:rank=3", {}),
]


@pytest.mark.parametrize(("spec", "options"), LEARNED)
@pytest.mark.parametrize(
    ("kind", "family"), [("affine", "polynomial-1"), ("constant", "polynomial-0")]
)
def test_functions_that_are_simple_already_lose_nothing(spec, options, kind, family):
    model = model_of(spec.format(family), **options)
    params = grown(model.init(seeded()))
    images, aux = looked_at(model, params)
    before = tree.map(torch.clone, params)
    simpler, fitted = mechanism.swap(model, params, kind, aux)
    assert_close(simpler.apply(fitted, images), aux["logits"], rtol=0, atol=1e-5)
    # other images see the same functions
    others = torch.randn(3, 3, 8, 8, generator=seeded(4))
    assert_close(simpler.apply(fitted, others), model.apply(params, others), rtol=0, atol=1e-5)
    assert all(tree.leaves(tree.map(torch.equal, before, params)))


@pytest.mark.parametrize("name", ["swin_tiny", "convit_tiny"])
def test_other_families_lose_nothing_either(name):
    small = {"image_size": 16, "patch_size": 2}
    if name == "swin_tiny":
        small |= {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    else:
        small |= {"embed_dim": 8, "depth": 2, "num_heads": 2, "gated_blocks": 1}
    model = models.create(name, "polynomial-1B:rank=2", **small)
    params = model.init(seeded())
    images, aux = looked_at(model, params, 3)
    simpler, fitted = mechanism.swap(model, params, "affine", aux)
    assert_close(simpler.apply(fitted, images), aux["logits"], rtol=0, atol=1e-5)
    if name == "swin_tiny":
        new, fitted = mechanism.swap(model, params, "position", aux)
        assert new.apply(fitted, images).shape == aux["logits"].shape
        return
    with pytest.raises(ValueError, match="1 gated blocks of a ConViT"):
        mechanism.swap(model, params, "position", aux)
    new, fitted = mechanism.swap(model, params, "position", aux, [1])
    assert new.apply(fitted, images).shape == aux["logits"].shape


def test_the_mean_matrix_of_windows_is_that_of_whole_ones():
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "num_heads": (2, 2)}
    model = models.create("swin_nano", "G2B:rank=2", **sizes)
    params = grown(model.init(seeded()))
    _, aux = looked_at(model, params, 3)
    _, fitted = mechanism.swap(model, params, "position", aux)
    own = fitted["layers"]["0"]["blocks"]
    assert_close(own["0"]["operator"]["matrix"], aux["blocks.0.weights"].mean((0, 1)))
    # of the four windows of a shifted grid the first has no mask; the others keep part of its rows
    assert_close(own["1"]["operator"]["matrix"], aux["blocks.1.weights"][:, 0].mean(0))


def test_an_exp_is_found_again():
    basis = mechanism.simple_basis("exp", 0.5)
    model = model_of(operators.low_rank(basis, rank=3))
    params = grown(model.init(seeded()))
    images, aux = looked_at(model, params)
    simpler, fitted = mechanism.swap(model, params, "exp", aux)
    assert_close(simpler.apply(fitted, images), aux["logits"], rtol=0, atol=1e-5)
    # a exp(x - 0.5) + c, whatever the shift of the fit
    for i, op in enumerate(simpler.operators):
        shift = op.basis.options["shift"]
        assert shift == pytest.approx(float(aux[f"blocks.{i}.scores"].max()))
        own = model.operator_params(params, i)["units"]["coefs"]
        found = simpler.operator_params(fitted, i)["units"]["coefs"]
        factor = own.new_tensor([1.0, math.exp(shift - 0.5)])
        assert_close(found, own * factor, rtol=1e-3, atol=1e-4)


def test_a_cubic_is_fitted_by_least_squares_key_by_key():
    model = model_of("polynomial-3B:rank=2", depth=1)
    params = grown(model.init(seeded()))
    _, aux = looked_at(model, params, 7)
    scores = aux["blocks.0.scores"].double()  # (7, 2, 5, 5)
    coefs = model.operator_params(params, 0)["units"]["coefs"].double()
    for kind, power in (("constant", 0), ("affine", 1)):
        _, fitted = mechanism.swap(model, params, kind, aux)
        found = fitted["blocks"]["0"]["operator"]["units"]["coefs"]
        assert found.shape == (2, 2, 5, power + 1)
        for h, p, m in ((0, 0, 0), (1, 1, 3), (0, 1, 4)):
            x = scores[:, h, :, m].flatten()
            y = sum(coefs[h, p, m, k] * x**k for k in range(4))
            design = torch.stack([x**k for k in range(power + 1)], -1)
            best = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
            assert_close(found[h, p, m].double(), best, rtol=1e-4, atol=1e-5)


def test_units_of_one_offset_are_fitted_to_all_they_see():
    model = model_of("polynomial-2B:order=by_offset", depth=1, patch_size=2)  # 17 tokens
    params = grown(model.init(seeded()))
    _, aux = looked_at(model, params)
    _, fitted = mechanism.swap(model, params, "affine", aux)
    units = params["blocks"]["0"]["operator"]["units"]
    found = fitted["blocks"]["0"]["operator"]["units"]
    scores = aux["blocks.0.scores"].double()

    def best(coefs, pairs):
        x = torch.cat([scores[:, 1, n, m] for n, m in pairs])
        y = sum(coefs.double()[k] * x**k for k in range(3))
        return torch.linalg.lstsq(torch.stack([torch.ones_like(x), x], -1), y[:, None]).solution[
            :, 0
        ]

    # one row down and one column left: the key's patch is n + 4 - 1
    pairs = [(1 + 4 * y + x, 1 + 4 * (y + 1) + x - 1) for y in range(3) for x in range(1, 4)]
    at = (1, 3 + 1, 3 - 1)
    expected = best(units["offsets"]["coefs"][at], pairs)
    assert_close(found["offsets"]["coefs"][at].double(), expected, rtol=1e-4, atol=1e-5)
    expected = best(units["from_prefix"]["coefs"][1, 0, 5], [(0, 6)])
    assert_close(found["from_prefix"]["coefs"][1, 0, 5].double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(
        fitted["blocks"]["0"]["operator"]["table"]["offsets"],
        params["blocks"]["0"]["operator"]["table"]["offsets"],
    )


def test_scores_that_are_all_the_same_have_no_slope():
    model = model_of("G2B:rank=2", depth=1)
    params = model.init(seeded())
    aux = {"blocks.0.scores": torch.full((3, 2, 5, 5), 0.7)}
    for kind in ("affine", "exp"):
        new, fitted = mechanism.swap(model, params, kind, aux)
        units = fitted["blocks"]["0"]["operator"]["units"]
        assert (units["coefs"][..., 1] == 0).all()
        values = new.operators[0].weights(fitted["blocks"]["0"]["operator"], aux["blocks.0.scores"])
        own = model.operators[0].weights(params["blocks"]["0"]["operator"], aux["blocks.0.scores"])
        assert_close(values, own)


def test_one_block_at_a_time_leaves_the_others():
    model = model_of("G2U:rank=2")
    params = grown(model.init(seeded()))
    images, aux = looked_at(model, params)
    new, fitted = mechanism.swap(model, params, "constant", aux, blocks=[1])
    assert new.config.sharing == "blockwise" and "operator" not in fitted
    assert new.operators[0] is model.operators[0]
    assert fitted["blocks"]["0"]["operator"] is params["operator"]
    again = new.intermediates(fitted, images)
    assert_close(again["blocks.0.weights"], aux["blocks.0.weights"])
    weights = again["blocks.1.weights"]
    # constants: every query has the same row, whatever the image
    assert_close(weights, weights[:1, :, :1].expand_as(weights), rtol=0, atol=1e-6)
    assert not torch.allclose(again["logits"], aux["logits"], atol=1e-4)


def test_position_is_the_mean_of_the_weights():
    for spec in ("softmax", "G2B:rank=2", "softconv", "softmax+G2B:rank=2"):
        model = model_of(spec)
        params = grown(model.init(seeded()))
        images, aux = looked_at(model, params)
        new, fitted = mechanism.swap(model, params, "position", aux)
        again = new.intermediates(fitted, images)
        for i in range(2):
            mean = aux[f"blocks.{i}.weights"].mean(0)
            assert_close(again[f"blocks.{i}.weights"], mean.expand(6, -1, -1, -1))


def test_position_costs_a_static_operator_nothing():
    model = model_of("polynomial-0B:rank=2")
    params = model.init(seeded())
    images, aux = looked_at(model, params)
    new, fitted = mechanism.swap(model, params, "position", aux)
    assert_close(new.apply(fitted, images), aux["logits"], rtol=0, atol=1e-5)
    share = attention.static_share(aux["blocks.0.weights"], aux["blocks.0.values"], fitted=False)
    assert_close(share, torch.ones(2).double())


def test_the_share_of_position_is_by_hand():
    weights = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    values = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    # outputs 1 and -3, off their mean by 2 and -2; the mean weight 2 gives just that
    assert attention.static_share(weights, values, fitted=False).tolist() == [1.0]
    values = torch.tensor([3.0, -1.0]).reshape(2, 1, 1, 1)
    # outputs 3 and -3, off by 3; values off their mean by 2, times 2 is 4: 1 - 2 / 18
    found = attention.static_share(weights, values, fitted=False)
    assert_close(found, torch.tensor([1 - 1 / 9]).double())
    # the other way round: 1 - (3 + 4)^2 / 9
    values = torch.tensor([-3.0, 1.0]).reshape(2, 1, 1, 1)
    weights = torch.tensor([3.0, 1.0]).reshape(2, 1, 1, 1)
    mean = (weights * values).mean()
    out = (weights * values - mean).flatten()
    guess = 2 * (values - values.mean()).flatten()
    expected = 1 - (out - guess).square().sum() / out.square().sum()
    found = attention.static_share(weights, values, fitted=False)
    assert_close(found[0], expected.double())


def test_the_mean_matrix_explains_at_most_what_the_fitted_one_does():
    weights = torch.randn(30, 2, 5, 5, generator=seeded()).double()
    values = torch.randn(30, 2, 5, 4, generator=seeded(1)).double()
    mean = attention.static_share(weights, values, fitted=False)
    assert (mean <= attention.static_share(weights, values) + 1e-12).all()


# training on


def test_training_goes_on_with_the_batches_that_come_next():
    config = dataclasses.replace(TINY, operator="G2B", rank=2, epochs=2)
    splits = train.load_data(config)
    model = train.build(config, splits.train)
    params = model.init(seeded())
    one = mechanism.retrain(config, model, params, splits, 1, rate=1.0)
    images, targets = train.batches(config, splits.train).at(config.seed, 4)
    functions = train.program(config, model, 1)
    state = train.begin_with(functions.init(seeded()), params)
    grads, _ = functions.gradients(state, images, targets)
    named, moved = tree.named(grads), tree.named(tree.map(torch.sub, one, params))
    # the first step of AdamW goes against the sign of the gradient
    for name in ("head.weight", "blocks.1.operator.mix", "blocks.0.mlp.fc1.bias"):
        clear = named[name].abs() > 1e-4
        assert clear.any()
        assert (moved[name][clear].sign() == -named[name][clear].sign()).all(), name
    half = mechanism.retrain(config, model, params, splits, 1, rate=0.5)
    assert_close(
        tree.map(lambda a, b: 2 * (a - b), half, params)["head"]["bias"], moved["head.bias"]
    )
    again = mechanism.retrain(config, model, params, splits, 1, rate=1.0)
    assert all(tree.leaves(tree.map(torch.equal, one, again)))


# gradients


def test_gradient_norms_of_softmax_by_hand():
    model = model_of("softmax", depth=1, num_classes=3)
    params = grown(model.init(seeded()))
    images, labels = looked_at(model, params, 4)[0], torch.tensor([0, 2, 1, 1])
    found = mechanism.gradient_norms(model, params, images, labels)
    # through the bias of qkv: its gradient is the sum over tokens of those of q, k and v
    assert found.shape == (1, 3) and (found > 0).all()
    kept = []

    def attend(own, q, k, v, mask=None):
        kept.extend(x.detach().requires_grad_() for x in (q, k, v))
        q, k, v = kept
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    twin = models.with_operators(model, model.operators[0]._replace(attend=attend))
    loss = torch.nn.functional.cross_entropy(twin.apply(params, images), labels, reduction="sum")
    for value, grad in zip(found[0], torch.autograd.grad(loss, kept), strict=True):
        assert_close(value, grad.double().square().sum((1, 2, 3)).mean().sqrt(), rtol=1e-4, atol=0)


def test_gradient_norms_under_position_biases_by_hand():
    # one token an image, so that the gradient of the bias of qkv is that of q, k and v
    sizes = {"image_size": 2, "patch_size": 2, "embed_dim": 8, "num_classes": 3}
    model = models.create("swin_nano", "G2B:rank=2", depths=(1,), num_heads=(2,), **sizes)
    params = grown(model.init(seeded()))
    images, labels = looked_at(model, params, 4)[0], torch.tensor([0, 2, 1, 1])
    bias = "layers.0.blocks.0.attn.qkv.bias"
    squares = torch.zeros(3, dtype=torch.float64)
    for image, label in zip(images, labels, strict=True):

        def loss(leaf, image=image, label=label):
            logits = model.apply(place(params, bias, leaf), image)
            return torch.nn.functional.cross_entropy(logits, label)

        gradient = torch.func.grad(loss)(find(params, bias))
        squares += gradient.double().view(3, 8).square().sum(1) / 4
    found = mechanism.gradient_norms(model, params, images, labels)
    assert (squares > 0).all()
    assert_close(found[0], squares.sqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("spec", ["softconv", "G2B:base=softmax", "G2B:order=beside_relative"])
def test_what_starts_as_softmax_has_its_gradients(spec):
    images, labels = torch.randn(4, 3, 8, 8, generator=seeded(1)), torch.arange(4)
    base, model = model_of("softmax"), model_of(spec)
    expected = mechanism.gradient_norms(base, base.init(seeded()), images, labels)
    found = mechanism.gradient_norms(model, model.init(seeded()), images, labels)
    assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("spec", ["polynomial-0B", "polynomial-0U", "static", "relative"])
def test_what_ignores_the_scores_sends_nothing_to_queries_and_keys(spec):
    model = model_of(spec)
    images, labels = torch.randn(4, 3, 8, 8, generator=seeded(1)), torch.arange(4)
    found = mechanism.gradient_norms(model, model.init(seeded()), images, labels)
    assert (found[:, :2] == 0).all() and (found[:, 2] > 0).all()


# layouts


def planted(function, side=4, prefix=1):
    """A matrix by function of (row, column) of the query and of the key."""
    places = [(y, x) for y in range(side) for x in range(side)]
    matrix = torch.zeros(prefix + side**2, prefix + side**2)
    for n, query in enumerate(places):
        for m, key in enumerate(places):
            matrix[prefix + n, prefix + m] = function(query, key)
    return matrix


EDGE = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])


def edge(query, key):
    dy, dx = key[0] - query[0], key[1] - query[1]
    return float(EDGE[dy + 1, dx + 1]) if max(abs(dy), abs(dx)) <= 1 else 0.0


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_planted_convolution_is_one(prefix):
    found = mechanism.layout(planted(edge, prefix=prefix))
    assert found.offsets.shape == (7, 7)
    assert_close(found.offsets[2:5, 2:5], EDGE.double())
    assert float(found.offsets.abs().sum()) == float(EDGE.abs().sum())
    assert float(found.by_offset) == pytest.approx(1)
    # 100 of 256 pairs are at most a patch apart, and hold all of it
    assert float(found.near) == pytest.approx(2.56)
    assert mechanism.verdict(found) == "convolution"
    assert (found.own is None) == (prefix == 0)


def test_equal_rows_are_pooling_and_noise_is_neither():
    row = torch.randn(16, generator=seeded())
    pooled = mechanism.layout(planted(lambda query, key: float(row[4 * key[0] + key[1]])))
    assert float(pooled.by_key) == pytest.approx(1)
    assert mechanism.verdict(pooled) == "global pooling"
    noise = mechanism.layout(torch.randn(200, 17, 17, generator=seeded()))
    assert noise.chance == (48 / 255, 15 / 255)
    assert float(noise.by_offset.mean()) == pytest.approx(48 / 255, abs=0.01)
    assert float(noise.by_key.mean()) == pytest.approx(15 / 255, abs=0.01)
    assert float(noise.near.mean()) == pytest.approx(1, abs=0.02)
    assert set(mechanism.verdict(noise)) == {"neither"}


def test_the_verdict_needs_both_offset_and_nearness():
    far = mechanism.layout(planted(lambda a, b: float(abs(a[0] - b[0]) == 3 and a[1] == b[1])))
    assert float(far.by_offset) == pytest.approx(1) and float(far.near) == 0
    assert mechanism.verdict(far) == "neither"
    # some of the mean square is one weight for all, and the rest a convolution
    both = planted(lambda a, b: 3 * edge(a, b) + 1.0)
    found = mechanism.layout(both)
    assert float(found.by_offset) == pytest.approx(1)
    mean, square = both[1:, 1:].mean().double(), both[1:, 1:].double().square().mean()
    assert_close(found.level, mean**2 / square)
    assert 0.1 < float(found.level) < 0.4
    assert mechanism.verdict(found) == "convolution"
    stack = mechanism.layout(torch.stack([both, torch.ones(17, 17)])[None])
    assert mechanism.verdict(stack) == [["convolution", "global pooling"]]


def test_the_row_of_the_class_token_is_its_own():
    matrix = torch.zeros(2, 17, 17)
    matrix[1, 0, 1:] = torch.arange(16.0)
    found = mechanism.layout(matrix)
    assert_close(found.own[1], torch.arange(16.0).double().reshape(4, 4))
    assert (found.own[0] == 0).all()
    # zeros are equal rows
    assert mechanism.verdict(found) == ["global pooling"] * 2


def test_a_table_by_offset_is_read_as_it_is_written():
    op = operators.relative()
    params = op.init(seeded(), 2, 17)
    weights = op.weights(params, torch.zeros(1, 2, 17, 17))[0]
    found = mechanism.layout(weights)
    assert_close(found.offsets, params["offsets"].double())
    assert_close(found.own.flatten(1), params["from_prefix"][:, 0].double())
    assert (found.by_offset > 1 - 1e-9).all()


def test_picture_of_layouts():
    found = mechanism.layout(torch.randn(2, 17, 17, generator=seeded()))
    fig = mechanism.plot([found, mechanism.layout(torch.randn(2, 16, 16))], ["block 1", "block 2"])
    assert len(fig.axes) == 8 and sum(len(ax.images) for ax in fig.axes) == 6
    text = pages.svg(fig, "x")
    assert "head 2, by offset" in text and "head 2, class" in text and "block 2" in text


# the section


def result(operator, splits, seeds=(0, 1)):
    configs = [dataclasses.replace(TINY, operator=operator, seed=seed) for seed in seeds]
    model = train.build(configs[0], splits.train)
    params = [model.init(seeded(seed)) for seed in seeds]
    records = [[{"val_top1": 0.5, "val_loss": 1.0, "train_loss": 1.0}] * len(seeds)]
    return section.Result(operator, configs, records, params)


@pytest.fixture(scope="module")
def splits():
    return train.load_data(TINY)


def value(found, operator, measure, seed=0):
    (one,) = [
        x.value
        for x in found.numbers
        if (x.operator, x.measure, x.seed) == (operator, measure, seed)
    ]
    return one


def test_the_section_is_that_of_its_measures(splits):
    names = ["softmax", "G2B:rank=2", "polynomial-1B:rank=2", "G2B:order=by_distance"]
    results = [result(name, splits) for name in names]
    own = section.Context(results, splits, name="mechanism", examples=16, retrain=1)
    found = mechanism.section(own)
    one = section.Member(results[1], 1)
    model = own.model(one.config)
    images, labels = own.images(one.config, 128)
    seen, _ = own.images(one.config, own.few(model), splits.train)
    aux = model.intermediates(one.params, seen)

    def top1(model, params):
        return float((model.apply(params, images).argmax(-1) == labels).double().mean())

    whole = top1(model, one.params)
    swapped = mechanism.swap(model, one.params, "constant", aux)
    cost = value(found, "G2B:rank=2", "cost_constant", 1)
    assert cost == pytest.approx(whole - top1(*swapped))
    swapped = mechanism.swap(model, one.params, "exp", aux, [1])
    cost = value(found, "G2B:rank=2", "cost_exp_block_2", 1)
    assert cost == pytest.approx(whole - top1(*swapped))
    again = mechanism.retrain(one.config, model, one.params, splits, 1)
    assert value(found, "G2B:rank=2", "again", 1) == pytest.approx(top1(model, again))
    assert value(found, "polynomial-1B:rank=2", "cost_affine") == 0
    look = model.intermediates(one.params, own.images(one.config, own.few(model))[0])
    share = attention.static_share(look["blocks.1.weights"], look["blocks.1.values"], fitted=False)
    assert value(found, "G2B:rank=2", "position_block_2_head_1", 1) == pytest.approx(
        float(share[0])
    )
    placed = mechanism.layout(look["blocks.0.weights"].mean(0))
    near = value(found, "G2B:rank=2", "layout_near_block_1_head_2", 1)
    assert near == pytest.approx(float(placed.near[1]), rel=1e-5)
    some = own.images(one.config, 64, splits.train)
    norms = mechanism.gradient_norms(model, model.init(seeded(3)), *some)
    grad = value(found, "G2B:rank=2", "gradient_v_block_2", 3)
    assert grad == pytest.approx(float(norms[1, 2]), rel=1e-5)
    page = " ".join(found.blocks)
    assert "128 validation images" in page and page.count("<svg") == 4
    measures = {x.measure for x in found.numbers if x.operator == "softmax"}
    assert "cost_position" in measures and "cost_affine" not in measures
    # functions of the place have no fit over scores
    measures = {x.measure for x in found.numbers if x.operator == names[3]}
    assert "cost_position" in measures and "cost_affine" not in measures


def test_blocks_without_functions_are_left_out_of_a_block_at_a_time(splits):
    # which used to cost the section, of all operators
    name = "softmax|G2B:rank=2"
    own = section.Context([result(name, splits, (0,))], splits, name="mechanism", examples=16)
    found = mechanism.section(dataclasses.replace(own, retrain=0))
    measures = {one.measure for one in found.numbers if one.measure.startswith("cost_affine")}
    assert measures == {"cost_affine", "cost_affine_block_2"}
    measures = {one.measure for one in found.numbers if one.measure.startswith("cost_position_")}
    assert measures == {"cost_position_block_1", "cost_position_block_2"}


def test_the_section_is_kept_and_stops_at_its_minutes(splits, tmp_path, monkeypatch):
    results = [result("G2B:rank=2", splits, [0])]
    context = section.Context(results, splits, cache=tmp_path, examples=16, retrain=0)
    chosen, options = report.select(["mechanism"]), {"title": "t", "command": "c"}
    (late,) = report.analyse(context, chosen, 0.0, tmp_path / "a.html", **options)
    assert "its minutes are used up" in late.problem
    (done,) = report.analyse(context, chosen, out=tmp_path / "a.html", **options)
    assert done.problem == ""
    assert not any("again" in one.measure for one in done.section.numbers)

    def never(*args, **options):
        raise AssertionError("it is kept")

    monkeypatch.setattr(mechanism, "swap", never)
    for path in tmp_path.glob("mechanism-*.json"):
        path.unlink()
    (again,) = report.analyse(context, chosen, out=tmp_path / "a.html", **options)
    assert again.section.numbers == done.section.numbers


MODEL = model_of("G2B:rank=2")
PARAMS = MODEL.init(seeded())
APART = torch.zeros(2, 2, 5, 5)
APART[:, 0] = 200 * torch.rand(2, 5, 5, generator=seeded())
APART[:, 1] = -APART[:, 0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mechanism.swap(MODEL, PARAMS, "cubic", {}), "`kind` in .* got 'cubic'"),
        (lambda: mechanism.swap(MODEL, PARAMS, "affine", {}), r"`aux` with blocks.0.scores"),
        (lambda: mechanism.swap(MODEL, PARAMS, "exp", {}, [2]), r"from 0 to 1, got \[2\]"),
        (
            lambda: mechanism.swap(MODEL, PARAMS, "exp", {"blocks.0.scores": APART}, [0]),
            "finite in torch.float32, got nan or inf, of scores up to",
        ),
        (lambda: mechanism.layout(torch.full((5, 5), torch.nan)), "finite matrices"),
        (
            lambda: mechanism.swap(
                model_of("softmax"),
                {},
                "affine",
                {f"blocks.{i}.scores": torch.zeros(1, 2, 5, 5) for i in (0, 1)},
            ),
            "fixed operators alone, such as 'softmax'",
        ),
        (
            lambda: mechanism.swap(
                model_of("G2B:order=by_distance"),
                model_of("G2B:order=by_distance").init(seeded()),
                "affine",
                {f"blocks.{i}.scores": torch.zeros(1, 2, 5, 5) for i in (0, 1)},
            ),
            "functions of one score, got",
        ),
        (
            lambda: mechanism.swap(
                model_of(operators.low_rank(bases.fourier(2))._replace(call=None)),
                model_of("G2B").init(seeded()),
                "affine",
                {f"blocks.{i}.scores": torch.zeros(1, 2, 5, 5) for i in (0, 1)},
            ),
            "that a factory made",
        ),
        (lambda: mechanism.swap(MODEL, PARAMS, "affine", {}, blocks=[]), r"`blocks` .*got \[\]"),
        (lambda: mechanism.retrain(TINY, MODEL, PARAMS, (), -1), "`steps` >= 0"),
        (lambda: mechanism.retrain(TINY, MODEL, PARAMS, (), 1, rate=0.0), "`rate` <= 1"),
        (
            lambda: mechanism.gradient_norms(MODEL, PARAMS, torch.ones(3, 8, 8), torch.ones(3)),
            r"images \(B, C, height, width\)",
        ),
        (lambda: mechanism.layout(torch.ones(2, 5, 4)), r"\(\.\.\., N, N\) with N >= 4"),
        (lambda: mechanism.layout(torch.ones(3, 3)), "N >= 4"),
        (lambda: mechanism.plot([]), "one or more, got offsets of"),
        (lambda: mechanism.plot([mechanism.layout(torch.ones(17, 17))]), r"\[\(7, 7\)\]"),
    ],
)
def test_what_measures_of_mechanism_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()
