"""Layers against torch's own modules."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

from kart import layers, models


def test_linear_norm_and_mlp_are_torchs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 6, generator=generator)
    params = layers.mlp_init(generator, 6, 11)
    first, second = torch.nn.Linear(6, 11), torch.nn.Linear(11, 6)
    first.load_state_dict(params["fc1"])
    second.load_state_dict(params["fc2"])
    assert_close(layers.mlp(params, x), second(torch.nn.functional.gelu(first(x))))
    norm = torch.nn.LayerNorm(6, eps=1e-6)
    assert_close(layers.layer_norm(layers.layer_norm_init(6), 3 * x + 1), norm(3 * x + 1))


def test_patches_are_a_convolution():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 3, 8, 12, generator=generator)
    params = layers.patch_embed_init(generator, 3, 4, 7)
    weight, bias = params["proj"]["weight"], torch.randn(7, generator=generator)
    params["proj"]["bias"] = bias
    wanted = torch.nn.functional.conv2d(images.flatten(0, 1), weight, bias, stride=4)
    wanted = wanted.flatten(2).mT.unflatten(0, (2, 3))
    assert_close(layers.patch_embed(params, images), wanted, rtol=1e-4, atol=1e-5)


def test_weights_are_drawn_within_two_deviations():
    drawn = layers.truncated_normal(torch.Generator().manual_seed(0), 200, 200)
    assert drawn.abs().max() <= 0.04
    assert_close(drawn.std(), torch.tensor(0.02 * 0.8796), rtol=0.02, atol=0)


def test_linear_without_bias_and_beyond_three_axes():
    generator = torch.Generator().manual_seed(0)
    params = layers.linear_init(generator, 6, 4, bias=False)
    assert params.keys() == {"weight"}
    x = torch.randn(2, 3, 5, 6, generator=generator)
    assert_close(layers.linear(params, x), x @ params["weight"].mT)
    assert layers.linear(params, x[:0]).shape == (0, 3, 5, 4)
    _, pullback = torch.func.vjp(lambda y: layers.linear(params, y), x)
    assert torch.equal(layers.linear(params, x), torch.func.vjp(layers.linear, params, x)[0])
    assert pullback(torch.ones(2, 3, 5, 4))[0].shape == x.shape


def test_positions_follow_the_published_formula():
    # timm's resample_abs_pos_embed: bicubic, antialiased, in float32, class token aside
    generator = torch.Generator().manual_seed(0)
    positions = torch.randn(1, 2 + 12, 5, generator=generator)
    found = layers.resize_positions(positions, (3, 4), (5, 2))
    for channel in range(5):
        grid = positions[:, 2:, channel].reshape(1, 1, 3, 4)
        wanted = torch.nn.functional.interpolate(grid, (5, 2), mode="bicubic", antialias=True)
        assert_close(found[0, 2:, channel], wanted.flatten())
    assert torch.equal(found[:, :2], positions[:, :2])
    half = layers.resize_positions(positions.bfloat16(), (3, 4), (5, 2))
    assert half.dtype == torch.bfloat16
    assert layers.resize_positions(positions, (3, 4), (3, 4)) is positions


def test_layer_norm_has_the_right_hessian_under_every_transform():
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=drawn, dtype=torch.float64)
    start = torch.randn(12, generator=drawn, dtype=torch.float64)

    def loss(p):
        params = {"weight": p[4:8], "bias": p[8:]}
        return layers.layer_norm(params, (x * p[:4]).sin()).sin().sum()

    expected = torch.autograd.functional.hessian(loss, start)
    modes = (torch.func.jacrev, torch.func.jacfwd)
    for outer, inner in itertools.product(modes, modes):
        assert_close(outer(inner(loss))(start), expected)
    compiled = torch.compile(torch.func.hessian(loss), backend="aot_eager", fullgraph=True)
    assert_close(compiled(start), expected)
    with forward_ad.dual_level():
        moving = forward_ad.make_dual(start.requires_grad_(), torch.ones_like(start))
        slope = forward_ad.unpack_dual(loss(moving)).tangent
        (second,) = torch.autograd.grad(slope, start)
    assert_close(second, expected.sum(-1))

    def slope(f, mode):
        along = torch.linspace(-1, 1, 12, dtype=torch.float64)
        if mode is torch.func.jvp:
            return lambda p: torch.func.jvp(f, (p,), (along,))[1]
        return lambda p: torch.func.grad(f)(p) @ along

    modes = (torch.func.jvp, torch.func.grad)
    third, *others = (
        slope(slope(slope(loss, a), b), c)(start.detach())
        for a, b, c in itertools.product(modes, modes, modes)
    )
    for other in others:
        assert_close(other, third)


def test_integers_would_make_every_weight_zero():
    drawn = torch.Generator().manual_seed(0)
    linear, patches = layers.linear_init(drawn, 4, 3), layers.patch_embed_init(drawn, 1, 2, 3)
    with pytest.raises(ValueError, match="`linear` needs floating-point"):
        layers.linear(linear, torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="`patch_embed` needs floating-point"):
        layers.patch_embed(patches, torch.ones(1, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("generator", [None, 0])
def test_torchs_own_generator_is_never_drawn_from(generator):
    with pytest.raises(ValueError, match="`init` needs a `torch.Generator` on the CPU"):
        models.create("vit_nano").init(generator)
