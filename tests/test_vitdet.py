"""The ViTDet backbone: windows beside whole images, padding, levels by hand."""

import dataclasses
import functools

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.testing import assert_close

from kart import models, tree
from kart.models import blocks, pyramid, vitdet
from tests.tiny import drawn

SMALL = {"image_size": 32, "patch_size": 4, "in_channels": 2, "embed_dim": 8} | {
    "depth": 2,
    "num_heads": 2,
    "window_size": 4,
    "global_blocks": (1,),
    "pyramid_dim": 6,
}


def small(operator="softmax", **overrides):
    return models.create("vitdet_tiny", operator=operator, **{**SMALL, **overrides})


def test_levels_have_their_strides():
    model = small()
    params, images = drawn(model)
    levels = model.apply(params, images)
    assert model.config.strides == {"p0": 1, "p1": 2, "p2": 4, "p3": 8}
    for name, stride in model.config.strides.items():
        assert levels[name].shape == (2, 6, 32 // stride, 32 // stride)
    usual = models.create("vitdet_tiny", image_size=64)
    assert usual.config.strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
    # any leading axes
    nested = model.apply(params, images[None, :, None])
    assert_close({k: v[0, :, 0] for k, v in nested.items()}, levels)
    assert_close(model.apply(params, images[0]), {k: v[0] for k, v in levels.items()})
    assert model.apply(params, images[:0])["p0"].shape == (0, 6, 32, 32)


@pytest.mark.parametrize("operator", ["softmax", "sigmoid", "relu", "G2B:rank=3", "G2U:rank=3"])
def test_windows_as_large_as_the_image_are_global_attention(operator):
    windowed, whole = small(operator, window_size=8), small(operator, global_blocks=(0, 1))
    params, images = drawn(windowed)
    if "operator" in params:
        params["operator"]["whole"] = params["operator"]["windows"]
    assert_close(windowed.apply(params, images), whole.apply(params, images))


@pytest.mark.parametrize("operator", ["softmax", "sigmoid", "relu", "sparsemax"])
@pytest.mark.parametrize("window", [9, 13])
def test_padding_has_no_part_in_attention(operator, window):
    windowed, whole = small(operator, window_size=window), small(operator, global_blocks=(0, 1))
    params, images = drawn(windowed)
    assert_close(windowed.apply(params, images), whole.apply(params, images))


def test_padded_keys_of_karat_are_keys_that_nobody_sees():
    # one window of 6 x 6 over a grid of 4 x 4: the units and mix of the keys that are there
    large, exact = small("G2B", image_size=16, window_size=6), small("G2B", image_size=16)
    params, images = drawn(large)
    real = (torch.arange(6)[:, None] * 6 + torch.arange(6))[:4, :4].flatten()
    own = params["blocks"]["0"]["operator"]
    cut = {"mix": own["mix"][:, real], "units": {"coefs": own["units"]["coefs"][:, :, real]}}
    blocks = {**params["blocks"], "0": {**params["blocks"]["0"], "operator": cut}}
    wanted = exact.apply({**params, "blocks": blocks}, images)
    assert_close(large.apply(params, images), wanted)


def test_windows_do_not_see_each_other_but_global_blocks_do():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 8, 8, generator=generator)
    params, _ = drawn(small(), dtype=torch.float32)
    attn = params["blocks"]["0"]["attn"]
    softmax = models.create("vit_nano").operators[0]

    def attend(q, k, v, mask=None):
        return softmax.attend({}, q, k, v, mask)

    attention = functools.partial(blocks.attention, heads=2, attend=attend)
    other = x.clone()
    other[:4, :4] += 1.0  # the first window
    for window, seen in ((4, False), (8, True)):
        before, after = (vitdet.windowed_attention(attn, y, window, attention) for y in (x, other))
        assert bool((before[4:] != after[4:]).any()) is seen
        assert bool((before[:4, :4] != after[:4, :4]).any())


def test_what_is_looked_at_is_what_is_used():
    model = small("G2B")
    params, images = drawn(model)
    aux = model.intermediates(params, images)
    assert_close({name: aux[name] for name in model.config.strides}, model.apply(params, images))
    assert aux["blocks.0.weights"].shape == (2, 4, 2, 16, 16)
    assert aux["blocks.1.weights"].shape == (2, 1, 2, 64, 64)  # one window
    assert aux["blocks.1.tokens"].shape == (2, 64, 8)


def test_doubling_is_a_transposed_convolution_and_halving_a_maximum():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 6, 8, generator=generator)
    params = pyramid.double_init(generator, 8, 5)
    params["bias"] = torch.randn(5, generator=generator)
    channels_first = x.movedim(-1, 1)
    wanted = F.conv_transpose2d(channels_first, params["weight"], params["bias"], stride=2)
    assert_close(pyramid.double(params, x), wanted.movedim(1, -1))
    wanted = F.max_pool2d(channels_first, 2).movedim(1, -1)
    assert torch.equal(pyramid.halve(x), wanted)


def test_every_parameter_of_every_level_counts_and_maps():
    model = small("G2U")
    params, images = drawn(model)

    def loss(p):
        return sum(level.square().mean() for level in model.apply(p, images).values())

    for name, slope in tree.named(grad(loss)(params)).items():
        assert slope.isfinite().all() and slope.any(), name
    mapped = vmap(model.apply, (None, 0))(params, images)
    assert_close(mapped, model.apply(params, images))


def test_config_comes_back():
    model = small("G2U", rank=3)
    fields = {**dataclasses.asdict(model.config), "global_blocks": [1]}
    assert models.from_config(fields).config == model.config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"patch_size": 2}, "`patch_size` of 4, 8, 16"),
        ({"image_size": 20}, "an even grid.*5 x 5"),
        ({"global_blocks": (2,)}, r"`global_blocks` among 0 .. 1, got \(2,\)"),
        ({"global_blocks": 1}, r"`global_blocks` of type tuple\[int, ...\], got 1"),
        ({"window_size": 0}, "`window_size` >= 1"),
        ({"num_classes": 10}, "overrides among"),
    ],
)
def test_bad_configurations_say_what_is_wrong(overrides, words):
    with pytest.raises(ValueError, match=words):
        small(**overrides)
