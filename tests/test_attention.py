"""Maps against planted masks, weights of known spread, operators of known dependence on scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kart import models, operators, pages
from kart.analysis import attention
from kart.models import windows
from kart.models.model import place

SCORES = [attention.pointing_game, attention.mass_inside, attention.best_iou]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# maps and masks


def test_a_planted_map_scores_one_and_its_opposite_zero():
    masks = torch.zeros(3, 4, 5, dtype=torch.bool)
    masks[:, 1:3, 2:4] = True
    inside = torch.where(masks, torch.rand(3, 4, 5, generator=seeded()) + 0.1, 0)
    for score in SCORES:
        assert_close(score(inside, masks), torch.ones(3).double())
        assert_close(score(torch.where(masks, 0, 1.0), masks), torch.zeros(3).double())
    assert_close(attention.mass_inside(torch.ones(4, 5), masks), torch.full((3,), 0.2).double())
    assert_close(attention.best_iou(torch.ones(4, 5), masks), torch.full((3,), 0.2).double())


def test_scores_by_hand():
    maps = torch.tensor([[5.0, 3.0, -9.0], [3.0, 1.0, 0.0]])
    mask = torch.tensor([[False, True, False], [True, True, True]])
    assert attention.pointing_game(maps, mask) == 0
    assert float(attention.mass_inside(maps, mask)) == pytest.approx(7 / 12)
    # {5, 3, 3, 1} holds three of the four of the object: 3 / 5; what is zero is in no region
    assert float(attention.best_iou(maps, mask)) == pytest.approx(3 / 5)
    # equal values enter together: the region {3, 3} alone does not exist
    tied = torch.tensor([[3.0, 3.0]])
    assert float(attention.best_iou(tied, torch.tensor([[True, False]]))) == 0.5
    assert float(attention.pointing_game(tied, torch.tensor([[True, False]]))) == 0.5


def test_a_map_without_positive_values_finds_nothing():
    mask = torch.tensor([[True, False]])
    for score in SCORES:
        assert score(torch.zeros(1, 2), mask) == 0
        assert score(torch.tensor([[-1.0, -2.0]]), mask) == 0


def reference_iou(values, mask):
    found = 0.0
    for t in values[values > 0].tolist():
        region = values >= t
        found = max(found, float((region & mask).sum() / (region | mask).sum()))
    return found


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_scores_have_no_unit_and_do_not_see_the_order_of_heads(seed, factor):
    drawn = seeded(seed)
    maps = torch.randint(-2, 5, (2, 3, 3, 4), generator=drawn).double()
    masks = torch.rand(2, 1, 3, 4, generator=drawn) < 0.4
    masks[..., 0, 0] = True
    order = torch.randperm(3, generator=drawn)
    for score in SCORES:
        found = score(maps, masks)
        assert found.shape == (2, 3) and ((found >= 0) & (found <= 1)).all()
        assert_close(score(factor * maps, masks), found)
        assert_close(score(maps[:, order], masks), found[:, order])
        assert_close(score(maps.clamp(min=0), masks), found)
        assert_close(score(maps.flip(-1), masks.flip(-1)), found)
    expected = [
        [reference_iou(m, mask[0]) for m in row] for row, mask in zip(maps, masks, strict=True)
    ]
    assert_close(attention.best_iou(maps, masks), torch.tensor(expected).double())


def test_maps_are_brought_to_the_size_of_masks():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    big = attention.enlarge(maps, 4, 6)
    assert big.shape == (1, 4, 6) and big[0, 1, 2] == 1 and big[0, 2, 3] == 4
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[2:, 3:] = True
    assert_close(attention.mass_inside(big, mask), torch.tensor([0.4]).double())
    assert attention.best_iou(big, mask) == 1


# curves


def brightness(images):
    """A model that sees the left half: its brightness is the probability of class 1."""
    p = images[..., : images.shape[-1] // 2].mean((1, 2, 3))
    return torch.stack([1 - p, p], dim=-1)


@pytest.mark.parametrize(("side", "window", "shift"), [(4, 2, 0), (6, 3, 1), (8, 4, 2), (7, 3, 0)])
def test_weights_of_windows_return_to_their_places(side, window, shift):
    cut = windows.Cut(side, window, shift)
    weights = torch.randn(2, cut.count, 3, window**2, window**2, generator=seeded())
    # the place of each key in the image; padding has none
    places = torch.arange(side**2).view(side, side, 1).roll((-shift, -shift), (0, 1)) + 1
    keys = windows.partition(windows.pad(places, window), window)[..., 0] - 1
    expected = torch.zeros(2, 3, side**2)
    for n, window_keys in enumerate(keys.tolist()):
        for m, key in enumerate(window_keys):
            if key >= 0:
                expected[:, :, key] = weights[:, n, :, :, m].clamp(min=0).mean(-1)
    found = attention.window_maps(weights, cut)
    assert_close(found, expected.unflatten(-1, (side, side)))
    with pytest.raises(ValueError, match=f"needs weights .*{cut.count}, H, {window**2}"):
        attention.window_maps(weights[:, :, :, :, 1:], cut)


def test_a_patch_is_found_where_it_is_in_the_image():
    sizes = {"image_size": 16, "patch_size": 2, "num_classes": 3, "embed_dim": 8}
    model = models.create("swin_nano", depths=(2,), num_heads=(2,), **sizes)
    params = model.init(seeded())
    # the first block hands on what it is given
    for path in ("attn.proj", "mlp.fc2"):
        at = f"layers.0.blocks.0.{path}.weight"
        params = place(params, at, torch.zeros(8, 32 if "mlp" in path else 8))
    images = torch.randn(1, 3, 16, 16, generator=seeded(1))
    for row, column in ((0, 0), (1, 6), (5, 2), (7, 7)):
        other = images.clone()
        other[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
        values = [model.intermediates(params, x)["blocks.1.values"] for x in (images, other)]
        changed = (values[1] - values[0]).abs().sum(-1)  # (1, n, H, M)
        weights = changed[..., None, :].expand(-1, -1, -1, 16, -1)
        maps = attention.window_maps(weights, model.sites[1].cut)
        assert model.sites[1].cut.shift == 2 and maps.shape == (1, 2, 8, 8)
        for head in maps[0]:
            assert head.nonzero().tolist() == [[row, column]]


def test_curves_of_a_model_that_sees_one_half():
    images = torch.ones(2, 3, 4, 4)
    maps = torch.stack([torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([[1.0, 2.0]] * 2)])
    fell = attention.deletion(brightness, images, maps)
    assert_close(fell.shares, torch.linspace(0, 1, 5).double())
    assert_close(fell.values[0], torch.tensor([1.0, 0.5, 0, 0, 0]).double())
    assert_close(fell.values[1], torch.tensor([1.0, 1, 1, 0.5, 0]).double())
    assert_close(fell.area, torch.tensor([0.25, 0.75]).double())
    rose = attention.insertion(brightness, images, maps)
    assert_close(rose.values, 1 - fell.values)
    assert_close(rose.area, 1 - fell.area)
    coarse = attention.deletion(brightness, images, maps, steps=2)
    assert_close(coarse.values, fell.values[:, ::2])
    other = attention.deletion(brightness, images, maps, labels=torch.tensor([0, 0]))
    assert_close(other.values, 1 - fell.values)
    half = attention.deletion(brightness, images, maps, fill=torch.full((1, 4, 4), 0.5))
    assert_close(half.values, 0.5 + fell.values / 2)
    fig = attention.plot_curves({"a": fell, "b": coarse}, {"a": rose, "b": rose})
    assert [ax.get_title().split(":")[0] for ax in fig.axes] == ["deletion", "insertion"]
    assert "area 0.500 and 0.500" in pages.svg(fig, "x")
    # a long name takes nothing from the axes
    long = attention.plot_curves({"x" * 60: fell}, {"x" * 60: rose})
    long.draw_without_rendering()
    assert min(ax.get_window_extent().width for ax in long.axes) > 200


def test_bands_of_curves_are_standard_errors_over_images_and_one_image_has_none():
    shares, values = torch.tensor([0.0, 1.0]).double(), torch.tensor([[0.2, 0.1], [0.6, 0.1]])
    two = attention.Curve(shares, values.double(), torch.zeros(2))
    ax = attention.plot_curves({"a": two}, {"a": two}).axes[0]
    (band,) = ax.collections
    ends = band.get_paths()[0].vertices
    start = sorted(y for x, y in ends if x == 0)
    assert start[0] == pytest.approx(0.2) and start[-1] == pytest.approx(0.6)
    one = attention.Curve(shares, two.values[:1], two.area[:1])
    assert not attention.plot_curves({"a": one}, {"a": one}).axes[0].collections


def test_shares_are_those_of_the_patches_taken():
    """Nine patches in four steps are 2, 4, 7 and 9 of them."""
    images, maps = torch.ones(1, 1, 3, 3), torch.rand(1, 3, 3, generator=seeded())

    def seen(images):
        return images.mean((1, 2, 3))[:, None]

    fell = attention.deletion(seen, images, maps, steps=4)
    assert_close(9 * fell.shares, torch.tensor([0, 2, 4, 7, 9]).double())
    assert_close(fell.values[0], 1 - fell.shares, check_dtype=False, atol=1e-6, rtol=0)
    assert float(fell.area) == pytest.approx(0.5)
    assert float(attention.insertion(seen, images, maps, steps=4).area) == pytest.approx(0.5)


# spread


def test_spread_by_hand():
    weights = torch.tensor([[0.5, 0.5, 0.0], [1.0, -1.0, 2.0]])
    assert_close(attention.row_sums(weights), torch.tensor([1.0, 2.0]).double())
    assert float(attention.negative_share(weights)) == pytest.approx(1 / 5)
    assert_close(
        attention.entropy(weights), torch.tensor([math.log(2), 1.5 * math.log(2)]).double()
    )
    assert attention.entropy(torch.zeros(2, 3)).tolist() == [0, 0]
    assert attention.negative_share(torch.zeros(2, 3)) == 0
    same = weights.expand(3, 2, 3)
    assert float(attention.head_diversity(same)) == pytest.approx(0, abs=1e-12)
    assert float(attention.head_diversity(torch.stack([weights, -2 * weights]))) == pytest.approx(2)
    pair = torch.stack([weights, torch.zeros(2, 3)])
    assert attention.head_diversity(pair) == 1


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_spread_has_no_unit_and_no_order_of_heads(seed, factor):
    drawn = seeded(seed)
    weights = torch.randn(2, 4, 5, 6, generator=drawn).double()
    order = torch.randperm(4, generator=drawn)
    diversity = attention.head_diversity(weights)
    assert_close(attention.head_diversity(factor * weights[:, order]), diversity)
    cosines = torch.nn.functional.normalize(weights.flatten(-2), dim=-1)
    cosines = cosines @ cosines.mT
    expected = 1 - (cosines.sum((-2, -1)) - 4) / 12
    assert_close(diversity, expected)
    for measure in (attention.entropy, attention.negative_share):
        assert_close(measure(factor * weights), measure(weights))
    assert (attention.entropy(weights) <= math.log(6) + 1e-9).all()
    keys = torch.randperm(6, generator=drawn)
    assert_close(attention.entropy(weights[..., keys]), attention.entropy(weights))


def test_rollout_of_positive_weights_is_the_product_of_the_source():
    blocks = torch.rand(3, 2, 4, 5, 5, generator=seeded()).double()  # (L, B, H, N, N)
    blocks = blocks / blocks.sum(-1, keepdim=True)
    eye = torch.eye(5).double()
    steps = [(block.mean(1) + eye) / 2 for block in blocks]
    assert_close(attention.rollout(blocks), steps[2] @ steps[1] @ steps[0])
    order = torch.tensor([2, 0, 3, 1])
    assert_close(attention.rollout(blocks[:, :, order]), attention.rollout(list(blocks)))
    signed = torch.randn(3, 4, 5, 5, generator=seeded(1))
    found = attention.rollout(signed)
    assert_close(found.sum(-1), torch.ones(5).double())
    assert (found >= 0).all()
    assert_close(attention.rollout(signed.clamp(min=0)), found)
    assert_close(attention.rollout(-torch.rand(2, 3, 5, 5, generator=seeded())), eye.expand(5, 5))
    maps = attention.class_maps(found[None])
    assert maps.shape == (1, 2, 2)


# dependence on the image


@pytest.mark.parametrize(
    ("spec", "static"), [("polynomial-0B:rank=3", True), ("G2B:rank=3", False)]
)
def test_static_share_of_operators(spec, static):
    operator = operators.parse(spec).operator
    params = operator.init(seeded(), 2, 5)
    scores = torch.randn(60, 2, 5, 5, generator=seeded(1)).double()
    values = torch.randn(60, 2, 5, 4, generator=seeded(2)).double()
    weights = operator.weights(params, scores).double()
    for found in (attention.static_share(weights), attention.static_share(weights, values)):
        if static:
            assert_close(found, torch.ones(2).double(), rtol=0, atol=1e-6)
        else:
            assert ((found >= 0) & (found < 0.5)).all()


def test_static_share_of_a_known_mixture():
    # a constant part and a part of independent sign, of equal size: half of the variance
    drawn = seeded()
    constant = torch.randn(1, 3, 4, 6, generator=drawn).double()
    sign = torch.where(torch.rand(4000, 3, 1, 1, generator=drawn) < 0.5, -1.0, 1.0).double()
    values = torch.randn(4000, 3, 6, 8, generator=drawn).double()
    found = attention.static_share(constant * (1 + sign), values)
    assert_close(found, torch.full((3,), 0.5).double(), rtol=0, atol=0.03)
    # for white values both definitions are one
    assert_close(attention.static_share(constant * (1 + sign)), found, rtol=0, atol=0.03)


def test_static_share_is_least_squares():
    weights = torch.randn(30, 1, 3, 4, generator=seeded()).double()
    values = torch.randn(30, 1, 4, 2, generator=seeded(1)).double() + 3
    out = weights @ values
    out = (out - out.mean(0)).movedim(2, 0).reshape(3, -1)
    inputs = (values - values.mean(0)).movedim(2, 0).reshape(4, -1)
    constant = torch.linalg.lstsq(inputs.mT, out.mT).solution
    left = (out.mT - inputs.mT @ constant).square().sum()
    expected = (1 - left / out.square().sum())[None]
    assert_close(attention.static_share(weights, values), expected)
    turned = values @ torch.linalg.qr(torch.randn(2, 2, generator=seeded(2)).double())[0]
    assert_close(attention.static_share(5 * weights, turned), expected)


def test_a_head_that_does_nothing_is_static():
    values = torch.randn(30, 1, 4, 2, generator=seeded())
    assert attention.static_share(torch.zeros(30, 1, 3, 4)).tolist() == [1]
    assert attention.static_share(torch.zeros(30, 1, 3, 4), values).tolist() == [1]
    # the mean of equal numbers differs from them by its rounding
    same = torch.randn(1, 2, 4, 4, generator=seeded()).double().repeat(12, 1, 1, 1) / 3
    for fitted in (True, False):
        assert attention.static_share(same, same, fitted=fitted).tolist() == [1, 1]


def test_masks_are_outlined():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[:, 2:5, 3:6] = True
    maps = torch.rand(2, 3, 4, 4, generator=seeded())
    plain = attention.plot(torch.rand(2, 3, 8, 8), maps)
    lined = attention.plot(torch.rand(2, 3, 8, 8), maps, masks=masks)
    assert all(
        len(b.collections) > len(a.collections) for a, b in zip(plain.axes, lined.axes, strict=True)
    )


MASK = torch.tensor([[True, False]])
IMAGES, MAPS = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        *((lambda s=s: s(torch.ones(2, 2), MASK), "of one size.*enlarge") for s in SCORES),
        *((lambda s=s: s(torch.ones(1, 2), MASK & False), "1 empty masks") for s in SCORES),
        (lambda: attention.mass_inside(torch.ones(1, 2), MASK.float()), "boolean masks"),
        (lambda: attention.mass_inside(torch.full((1, 2), torch.nan), MASK), "2 values nan"),
        (lambda: attention.best_iou(torch.ones(2, 1, 2), MASK.expand(3, 1, 2)), "leading axes"),
        (lambda: attention.enlarge(torch.ones(2, 2), 5, 4), "divisible by the map's 2 x 2"),
        (lambda: attention.deletion(brightness, IMAGES, MAPS[0]), r"maps \(B, rows, columns\)"),
        (lambda: attention.insertion(brightness, IMAGES, MAPS * torch.nan), "finite maps"),
        (lambda: attention.deletion(brightness, IMAGES, MAPS, steps=3), "`steps` <= 2"),
        (lambda: attention.rollout([torch.ones(1, 3, 3), torch.ones(1, 4, 4)]), "each block"),
        (lambda: attention.rollout([]), "each block"),
        (lambda: attention.rollout([torch.full((1, 2, 2), torch.nan)]), "finite weights"),
        (lambda: attention.static_share(torch.full((9, 1, 2, 2), torch.nan)), "got nan or inf"),
        (
            lambda: attention.deletion(brightness, IMAGES, MAPS, labels=torch.zeros(2).long()),
            r"labels \(1,\) of these images",
        ),
        (lambda: attention.entropy(torch.ones(3)), r"\(\.\.\., N, M\)"),
        (lambda: attention.head_diversity(torch.ones(1, 2, 2)), "two heads"),
        (lambda: attention.head_diversity(torch.ones(2, 2)), r"H, N, M"),
        (
            lambda: attention.static_share(torch.ones(9, 1, 2, 3), torch.ones(9, 1, 2, 3)),
            r"values \(9, 1, 3, d\)",
        ),
        (
            lambda: attention.static_share(torch.ones(3, 1, 2, 3), torch.ones(3, 1, 3, 3)),
            "4 M = 12.*Pass more images",
        ),
        (
            lambda: attention.plot(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2), masks=MASK),
            "needs masks",
        ),
        (lambda: attention.plot_curves({}, {}), "of the same names"),
    ],
)
def test_what_measures_of_attention_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()
